"""A sample of the conformance matrix, and that it sees what it is there for."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from conformance import EXPLAINED, cells, table
from conformance_sources import SOURCES, Variant, variants
from torch import nn

from spikeport.converters import neurons
from spikeport.converters.neurons import Neuron
from spikeport.converters.sources import Reading, register

THERE = [name for name, (package, _) in SOURCES.items() if importlib.util.find_spec(package)]
TARGETS = ("reference", "lynxi-sim", "onnx", "nir")


@pytest.mark.spikingjelly
@pytest.mark.snntorch
def test_a_sample_of_the_matrix() -> None:
    """Neurons of every source, in few steps, side by side in one network."""
    everything = variants(THERE)
    assert len(everything) > 350
    sample = [replace(v, steps=8) for v in everything[:: len(everything) // 12]]
    found = cells(sample, TARGETS, "unrolled")
    assert {c.verdict for c in found} <= {"equal", "refused", EXPLAINED}, table(found)
    assert {c.target for c in found if c.refused} <= {"nir"}, table(found)
    assert all(c.fired for c in found if c.neuron not in ("Alpha", "Lapicque"))
    assert sum(c.verdict == "equal" for c in found) > 40


@pytest.mark.spikingjelly
def test_an_exponential_with_another_last_bit_is_explained() -> None:
    """ONNX Runtime's own, in a charge that the inputs take to the threshold exactly."""
    pytest.importorskip("spikingjelly")
    some = variants(["spikingjelly-others"], ["EIFNode"])[:2]
    found = cells(some, ["onnx"], "unrolled")
    assert {c.verdict for c in found} == {EXPLAINED}, table(found)
    assert all(0 < c.differing < c.fired for c in found)
    assert "0/0/0+2" in table(found)


class Early(nn.Module):
    """Fires at the threshold; declared as if it fired above it."""

    neuron = Neuron(neurons.IF, fires=">")

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return Neuron(neurons.IF).multi_step(x_seq)


def test_the_matrix_sees_a_wrong_comparison() -> None:
    register(Early, lambda m: Reading(m.neuron))
    (cell,) = cells([Variant("test", "Early", "hard", "", Early, 8)], ["reference"], "unrolled")
    assert cell.verdict == "WRONG"
    assert "MismatchError" in cell.failed
    assert table([cell]).startswith("1 cells: 1 WRONG")
