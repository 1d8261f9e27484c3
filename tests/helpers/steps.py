"""Programs of one step, and their steps against the network's own call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import Net, rand
from torch import nn
from torch.utils import _pytree as pytree

from spikeport import targets
from spikeport.converters.capture import capture
from spikeport.converters.errors import UnsupportedError
from spikeport.converters.neurons import LIFNode
from spikeport.converters.passes import stepped
from spikeport.converters.program import Program


def layer(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    made.weight.data, made.bias.data = (
        rand(outputs, inputs, seed=seed),
        rand(outputs, seed=seed + 1),
    )
    return made


def feed_forward() -> Net:
    return Net(lambda n, x: n.lif(n.fc(x)), fc=layer(6, 5), lif=LIFNode())


def rewritten(net: nn.Module, *x: torch.Tensor) -> Program:
    """The network of one step, its neurons taken apart."""
    return one_step(capture(net, x), "onnx")


def one_step(program: Program, target: str) -> Program:
    """As a target takes it: onnx takes neurons apart, the reference does not."""
    program = replace(program, captured=program)
    for rewrite in stepped(targets.get(target).passes(torch.float32)):
        program = rewrite(program)
    return program


def findings(net: nn.Module, *x: torch.Tensor) -> list[tuple[str, str]]:
    with pytest.raises(UnsupportedError) as caught:
        rewritten(net, *x)
    assert all(f.found and f.allowed and f.fix for f in caught.value.findings)
    return [(f.rule, f.node) for f in caught.value.findings]


def assert_steps_equal_the_call(net: nn.Module, *x: torch.Tensor) -> Program:
    """All steps against the network's own call, neurons taken apart and not."""
    net.eval()
    with torch.no_grad():
        expected = pytree.tree_leaves(net(*x))
    captured = capture(net, x)
    for target in ("reference", "lynxi-sim", "onnx"):
        program = one_step(captured, target)
        found = pytree.tree_leaves(program(*x))
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            spikes = set(b.unique().tolist()) <= {0.0, 1.0}
            assert torch.equal(a, b) if spikes else torch.allclose(a, b, atol=1e-5)
    return program


def names(program: Program) -> list[str]:
    assert program.stepping is not None
    return [state.name for state in program.stepping.states]
