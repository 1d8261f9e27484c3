"""Captures that are checked against their network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import equal, reference
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError, Findings
from spikeport.converters.passes import (
    flatten_time,
    fold_batch_norm,
    hoist_time_invariant,
    lower_neurons,
)
from spikeport.converters.program import Program


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
