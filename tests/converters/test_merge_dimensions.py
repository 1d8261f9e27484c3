"""Operators on tensors of many dimensions, on tensors of up to four, against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net, SideBySide, groups, rand
from torch import Tensor, nn

from spikeport import deploy
from spikeport.converters.capture import capture
from spikeport.converters.passes import merge_dimensions
from spikeport.converters.program import Program, where


def merged(run: Callable[..., Any], *inputs: Tensor, **layers: nn.Module) -> Program:
    return merged_network(Net(lambda s, *x: run(s, *x) if layers else run(*x), **layers), *inputs)


def merged_network(net: nn.Module, *inputs: Tensor) -> Program:
    program = merge_dimensions(4)(capture(net.eval(), inputs))
    with torch.no_grad():
        expected = net(*inputs)
    torch.testing.assert_close(program(*inputs), expected, rtol=1e-6, atol=1e-6)
    return program


def highest(program: Program) -> int:
    return max(n.meta["val"].dim() for n in program.nodes("call_function"))


WIDE = (2, 3, 2, 4, 3)
CASES: dict[str, Callable[..., Tensor]] = {
    "shapes": lambda x: x.reshape(2, 3, 8, 3).unsqueeze(2).squeeze(2).flatten(1),
    "pixel shuffle": lambda x: F.pixel_shuffle(x.reshape(3, 12, 4, 1), 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x.reshape(3, 3, 4, 4), 2),
    "batch before time": lambda x: torch.stack([x[:, t] * t for t in range(3)], 1),
    "transpose": lambda x: (x.transpose(1, 3) + 1).transpose(0, 4),
    "select and slice": lambda x: x[:, 1:, 0, ::2] + x[:, :2, 1, 1:3],
    "cat": lambda x: torch.cat([x, x[:, :, :1]], 2),
    "index": lambda x: x[:, :, :, [3, 0, 1]],
    "flip": lambda x: x.flip(1, 3),
    "expand": lambda x: x[:, :1, :, :1].expand(2, 5, 2, 3, 3) + x[:, :1, :, :1],
    "repeat": lambda x: x.repeat(2, 1, 1, 3, 2),
    "repeat with a new dimension": lambda x: x[0].repeat(2, 1, 3, 1, 1),
    "sum of one": lambda x: x.sum(2, keepdim=True) + x,
    "sum of two apart": lambda x: x.sum((0, 3)),
    "mean of three apart": lambda x: x.mean((0, 2, 4), keepdim=True),
    "mean of all": lambda x: x.mean(),
    "sum of nothing": lambda x: x[:1].sum(0),
    "largest": lambda x: x.amax((1, 3)),
    "softmax": lambda x: x.softmax(1) + F.softmax(x, -1),
    "log softmax": lambda x: x.log_softmax(2),
    "running sum": lambda x: x.cumsum(3),
    "argmax": lambda x: x.argmax(1).float(),
    "where": lambda x: torch.where(x > 0.5, x, x.mean(2, True)),
    "matrices": lambda x: x @ x.transpose(-1, -2),
    "matrices, the batch broadcast": lambda x: x @ x[:, :1, :, :3],
    "a matrix for all": lambda x: x @ torch.ones(3, 2),
    "operands of one dimension": lambda x: x * torch.arange(3.0) + torch.tensor(2.0),
    "every other dimension": lambda x: x[:, :1, :, :1] * x[:1, :, :1, :, :1],
    "all of size one": lambda x: x[:1, :1, :1, :1, :1] * 2,
}


@pytest.mark.parametrize("names", groups(CASES, 10))
def test_an_operator_on_merged_dimensions_is_itself(names: list[str]) -> None:
    net = SideBySide({name: Net(lambda s, x, name=name: CASES[name](x)) for name in names})
    program = merged_network(net, *[rand(*WIDE)] * len(names))
    ranks = {(where(n), n.meta["val"].dim()) for n in program.nodes("call_function")}
    assert not [(path, rank) for path, rank in ranks if rank > 4]


LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(3, 5),
    "layer norm": nn.LayerNorm((4, 3)),
    "batch norm": nn.BatchNorm3d(3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_merged_dimensions_is_itself(name: str) -> None:
    program = merged(lambda s, x: s.layer(x), rand(*WIDE), layer=LAYERS[name])
    assert highest(program) <= 4


def test_what_mixes_dimensions_stays_and_is_named() -> None:
    program = merged(lambda s, x: s.conv(x).relu(), rand(*WIDE), conv=nn.Conv3d(3, 2, 2))
    report = program.history[-1]
    assert report.skipped == ("aten.conv3d [2, 2, 1, 3, 2] (conv)",)
    assert highest(program) == 5


def test_a_program_of_few_dimensions_stays_as_it_is() -> None:
    program = capture(Net(lambda s, x: s.fc(x).relu(), fc=nn.Linear(3, 2)), (rand(2, 4, 3),))
    again = merge_dimensions(4)(program)
    assert [n.target for n in again.graph.nodes] == [n.target for n in program.graph.nodes]
    assert not again.history[-1].done


#: Dimensions in some order, and their sizes.
PERMUTATIONS = st.tuples(
    st.permutations(range(6)), st.lists(st.integers(1, 3), min_size=6, max_size=6)
)


@settings(max_examples=5, deadline=None)
@given(st.lists(PERMUTATIONS, min_size=5, max_size=5))
def test_any_permutation(drawn: list[tuple[list[int], list[int]]]) -> None:
    def run(*inputs: Tensor) -> list[Tensor]:
        return [x.permute(order).flatten(1) for x, (order, _) in zip(inputs, drawn, strict=True)]

    inputs = [torch.arange(float(math.prod(size))).reshape(size) for _, size in drawn]
    assert highest(merged(run, *inputs)) <= 4


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_any_broadcast(data: st.DataObject) -> None:
    def operands() -> list[Tensor]:
        size = data.draw(st.lists(st.integers(1, 3), min_size=5, max_size=7))
        found = [rand(*size)]
        for seed in (1, 2):
            own = [s if data.draw(st.booleans()) else 1 for s in size]
            found.append(rand(*own[data.draw(st.integers(0, 4)) :], seed=seed))
        return found

    def run(*inputs: Tensor) -> list[Tensor]:
        threes = zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
        return [torch.where(a > b, b * c, a).flatten(3) for a, b, c in threes]

    inputs = [operand for _ in range(5) for operand in operands()]
    assert highest(merged(run, *inputs)) <= 4


@pytest.mark.parametrize("samples", [2, 3])
def test_frames_with_the_batch_first_run_on_lynxi(samples: int) -> None:
    """[N, T, C, H, W] and neurons in plain torch, as in the code of many papers."""

    def run(s: Any, x: Tensor) -> Tensor:
        N, T = x.shape[:2]
        y = s.norm(s.conv(x.flatten(0, 1))).unflatten(0, (N, T))
        v, spikes = 0, []
        for t in range(T):
            v = v * 0.5 + y[:, t]
            spikes.append((v > 1.0).float())
            v = (1 - spikes[-1]) * v
        return torch.stack(spikes, 1)

    net = Net(run, conv=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4)).eval()
    x = rand(samples, 3, 2, 6, 6) * 8
    program = deploy.convert(net, (x,), "lynxi-sim")
    with torch.no_grad():
        assert torch.equal(program(x), net(x))
    assert program(x).shape == (samples, 3, 4, 4, 4)
    assert len(program.outputs[0].graph_shape) == 4
