"""Neurons of the real SpikingJelly's ``activation_based``, and networks held against their conversion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import equal, grid
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.passes import flatten_time, hoist_time_invariant, lower_neurons
from spikeport.converters.program import Program

functional = pytest.importorskip("spikingjelly.activation_based.functional")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")


def reference(net: nn.Module, *inputs: torch.Tensor) -> Any:
    work = copy.deepcopy(net).eval()
    functional.reset_net(work)
    with torch.no_grad():
        return work(*inputs)


def lowered(program: Program) -> Program:
    for rewrite in (hoist_time_invariant, flatten_time, lower_neurons):
        program = rewrite(program)
    return program


def converted(net: nn.Module, *inputs: torch.Tensor) -> Program:
    """The captured network, checked bit for bit with its lowered form on several inputs."""
    program = capture(net, inputs)
    low = lowered(program)
    for example in (inputs, tuple(grid(*x.shape, seed=5) for x in inputs)):
        expected = reference(net, *example)
        for form in (program, low):
            assert equal(form(*example), expected)
    return program


def make(kind: str, v_reset: float | None, tau: float, decay_input: bool, **extra: Any) -> Any:
    arguments = {"v_reset": v_reset, "step_mode": "m", **extra}
    if kind == "LIFNode":
        arguments |= {"tau": tau, "decay_input": decay_input}
    elif kind == "ParametricLIFNode":
        arguments |= {"init_tau": tau, "decay_input": decay_input}
    return getattr(neuron, kind)(**arguments)
