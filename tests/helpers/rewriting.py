"""Passes that are checked against the network, and what they leave behind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from networks import different, reference
from random_networks import settled
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.neurons import IFNode, LIFNode, ParametricLIFNode
from spikeport.converters.passes import (
    flatten_time,
    fold_constants,
    hoist_time_invariant,
    lower_neurons,
)
from spikeport.converters.program import PassReport, Program, short

EXACT = (fold_constants, hoist_time_invariant, flatten_time, lower_neurons)


def event_net() -> nn.Module:
    class Events(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.a, self.b, self.fc = IFNode(), ParametricLIFNode(v_reset=None), nn.Linear(64, 5)
            self.c = LIFNode()

        def each(self, f: Any, x: torch.Tensor) -> torch.Tensor:
            return f(x.flatten(0, 1)).unflatten(0, x.shape[:2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(self.each(lambda y: self.norm(self.conv(y)), x))
            x = self.b(x + self.each(self.conv, x[:, :, :2]))
            return self.c(self.fc(self.each(lambda y: F.max_pool2d(y, 2), x).flatten(2)))

    return settled(Events())


def report(program: Program, name: str) -> PassReport:
    return next(r for r in program.history if r.name == name)


def rank(program: Program) -> int:
    return max(n.meta["val"].dim() for n in program.graph.nodes if "val" in n.meta)


def names(program: Program) -> list[str]:
    return [short(n.target) for n in program.nodes("call_function")]


def shapes_are_true(program: Program, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Every node's value is of the shape and dtype that the node says."""
    wrong: list[str] = []

    def observe(n: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            said = n.meta["val"]
            if (said.shape, said.dtype) != (value.shape, value.dtype):
                wrong.append(f"{n.name}: {said.shape} {said.dtype}, is {value.shape} {value.dtype}")

    program.run(inputs, observe=observe)
    assert not wrong
    return True


def each_pass_keeps(net: nn.Module, *inputs: torch.Tensor) -> Program:
    """Flattening alone, and every exact pass after another; returns the last."""
    program = capture(net, inputs)
    expected = reference(net, *inputs)
    chained = program
    same(flatten_time(program)(*inputs), expected, "flattened alone")
    for rewrite in EXACT:
        chained = rewrite(chained)
        same(chained(*inputs), expected, rewrite.__name__)
        assert shapes_are_true(chained, inputs)
        assert [s.name for s in chained.sites] == [s.name for s in program.sites]
    again = tuple(x.flip(-1) for x in inputs)
    same(chained(*again), reference(net, *again), "other inputs")
    return chained


def same(found: Any, expected: Any, after: str) -> None:
    wrong = different(found, expected)
    assert not wrong, f"{after}: {', '.join(wrong)}"
