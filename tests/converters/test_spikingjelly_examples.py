"""Networks of SpikingJelly's examples, as benchmarks/spikingjelly_examples.py builds them."""

from __future__ import annotations

import pytest

pytest.importorskip("spikingjelly.activation_based.model.masnn", reason="needs SpikingJelly 2.0.0")

import spikingjelly_examples
import zoo

pytestmark = pytest.mark.spikingjelly


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("sequential, feedback", "lynxi-sim"),
        ("speech commands", "reference"),
        *(
            pytest.param(name, target, marks=pytest.mark.slow)
            for name in (
                "sequential, synapses",
                "spiking LSTM",
                "speech commands",
                "DSQN, last-mem",
                "ILC-SAN",
            )
            for target in ("onnx", "lynxi-sim", "ipu-sim")
        ),
    ],
)
def test_an_example_computes_on_a_target_what_it_says(name: str, target: str) -> None:
    net, batch = spikingjelly_examples.build(name)
    row = zoo.convert(net, batch, 2, target)
    assert row.verdict.startswith("equal")
    assert row.rate is None or 0.01 < row.rate < 0.99


@pytest.mark.parametrize("name", ["spiking DQN", "ResNet11"])
def test_state_that_nobody_declared_is_refused_by_name(name: str) -> None:
    net, batch = spikingjelly_examples.build(name)
    row = zoo.convert(net, batch, 2, "reference")
    assert row.verdict.startswith("REFUSED")
    assert "fix: " in row.verdict
