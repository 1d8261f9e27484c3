"""Captures that are checked against their network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import equal, reference
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError, Findings
from spikeport.converters.neurons import IF, Neuron
from spikeport.converters.passes import (
    flatten_time,
    fold_batch_norm,
    hoist_time_invariant,
    lower_neurons,
)
from spikeport.converters.program import Program
from spikeport.converters.sources import Reading


class SingleStep(nn.Module):
    """A single-step neuron as frameworks have it: its state survives until it is reset."""

    def __init__(self) -> None:
        super().__init__()
        self.step_mode = "s"
        self.v: Any = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = torch.zeros_like(x) if isinstance(self.v, float) else self.v
        spikes, (self.v,) = Neuron(IF).single_step(x, (v,))
        return spikes


class SingleStepSource:
    """What reads it."""

    name = "test"

    def read(self, module: nn.Module, path: str) -> Any:
        return Reading(Neuron(IF), "s") if type(module) is SingleStep else None

    def reset(self, module: nn.Module) -> None:
        if type(module) is SingleStep:
            module.v = 0.0


def lowered(program: Program) -> Program:
    """The program with every neuron lowered."""
    for rewrite in (hoist_time_invariant, flatten_time, fold_batch_norm, lower_neurons):
        program = rewrite(program)
    return program


def captured(net: nn.Module, *inputs: torch.Tensor) -> Program:
    """The program, checked against the network on these inputs and on others, and lowered."""
    torch.manual_seed(0)
    program = capture(net, inputs)
    for example in (inputs, tuple(x.flip(0) for x in inputs)):
        expected = reference(net, *example)
        assert equal(program(*example), expected)
        assert equal(lowered(program)(*example), expected)
    return program


def findings(net: nn.Module, *inputs: Any) -> Findings:
    """Why it cannot be captured."""
    with pytest.raises(CaptureError) as caught:
        capture(net, inputs)
    for finding in caught.value.findings:
        assert finding.found
        assert finding.allowed
        assert finding.fix
        assert finding.rule in str(caught.value)
    return caught.value.findings


def rules(found: Findings) -> list[tuple[str, str]]:
    """What was found, and where."""
    return [(f.rule, f.where) for f in found]
