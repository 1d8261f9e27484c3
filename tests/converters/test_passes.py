"""Each pass alone keeps the numbers, says what it did, and says where it did not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from networks import Net, SideBySide, equal, groups, rand, reference
from random_networks import RANDOM, sequence, settled, stacks
from rewriting import each_pass_keeps, event_net, names, rank, report
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.converters.passes import (
    flatten_time,
    fold_batch_norm,
    hoist_time_invariant,
    lower_neurons,
)
from spikeport.converters.program import NEURON, NEURON_STEP, Program, short

T, N = 4, 2


# Hoisting


class Static(nn.Module):
    """A static image, repeated; the first convolution does not depend on time."""

    def __init__(self, repeat: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.repeat = repeat
        self.conv, self.norm, self.spike = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), LIFNode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.repeat(x)
        y = self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.spike(y).mean(0)


@pytest.mark.parametrize(
    "repeat",
    [
        lambda x: sequence(x, T),
        lambda x: x.unsqueeze(0).expand(T, -1, -1, -1, -1),
        lambda x: x.expand(T, *x.shape),
        lambda x: x.repeat(T, 1, 1, 1, 1),
        lambda x: x[None].expand(T, *x.shape).contiguous(),
        lambda x: x.repeat(T, 1, 1, 1).unflatten(0, (T, -1)),
        lambda x: torch.stack([x] * T),
        lambda x: sequence(x, 1),
    ],
    ids=["repeat", "expand", "leading", "leading-repeat", "index", "tile", "stack", "T=1"],
)
def test_hoist_a_static_image(repeat: Any) -> None:
    x = rand(N, 2, 6, 6)
    net = settled(Static(repeat))
    each_pass_keeps(net, x)
    hoisted = hoist_time_invariant(capture(net, (x,)))
    conv = next(n for n in hoisted.nodes("call_function") if short(n.target) == "aten.conv2d")
    assert conv.meta["val"].shape[0] == N
    if repeat(x).shape[0] > 1:
        assert "conv" in report(hoisted, "hoist_time_invariant").done[0]


def test_hoist_says_that_nothing_repeats() -> None:
    program = hoist_time_invariant(
        capture(nn.Sequential(nn.Linear(3, 3), IFNode()), (rand(T, N, 3),))
    )
    assert report(program, "hoist_time_invariant").skipped == ("no input is repeated over time",)


def test_hoist_a_residual_from_the_static_input() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = sequence(x, T)
        return s.b(s.fc(s.a(s.fc(x))) + x).sum(0)

    net = Net(run, fc=nn.Linear(3, 3), a=IFNode(), b=LIFNode())
    program = hoist_time_invariant(capture(net, (rand(N, 3),)))
    assert report(program, "hoist_time_invariant").done == ("computed once, repeated after: fc",)
    each_pass_keeps(net, rand(N, 3))


def test_hoist_with_a_static_and_a_varying_input() -> None:
    def run(s: Any, image: torch.Tensor, events: torch.Tensor) -> torch.Tensor:
        x = s.a(sequence(image, T))
        return s.spike(s.b(x * 2 + events) - x)

    net = Net(run, a=nn.Linear(3, 4), b=nn.Linear(4, 4), spike=IFNode())
    program = hoist_time_invariant(capture(net, (rand(N, 3), rand(T, N, 4, seed=1))))
    done = report(program, "hoist_time_invariant")
    assert "a" in done.done[0]
    assert any("add" in line and "needs the time steps" in line for line in done.skipped)
    each_pass_keeps(net, rand(N, 3), rand(T, N, 4, seed=1))


def test_tensors_made_in_the_forward_are_constants() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(T, N, 3) + torch.arange(3) + torch.full_like(x, 0.5) + x.new_ones(3)
        y[1:] = torch.empty(3).fill_(0.25)
        return s.spike(y + torch.linspace(0, 1, T).reshape(T, 1, 1) * x)

    program = each_pass_keeps(Net(run, spike=IFNode()), rand(N, 3))
    assert not {"aten.zeros", "aten.arange", "aten.full_like", "aten.full"} & set(names(program))


def test_hoist_leaves_sums_over_time_alone() -> None:
    net = Net(lambda s, x: s.spike(sequence(x, T).cumsum(0)), spike=IFNode())
    each_pass_keeps(net, rand(N, 3))


def test_hoist_does_not_mix_time_and_batch() -> None:
    """An offset a sample broadcasts over time, an offset a step does not."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = sequence(x, T)
        y = y + torch.arange(4.0).reshape(4, 1, 1)
        return s.spike(y * torch.tensor([0.5, 1.0]).reshape(2, 1))

    each_pass_keeps(Net(run, spike=IFNode()), rand(N, 3))


@pytest.mark.parametrize(
    ("steps", "batch"),
    [
        *((1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 3), (3, 1), (3, 3))),
    ],
)
def test_equal_and_single_sizes(steps: int, batch: int) -> None:
    """T == N, T == 1, N == 1: time and batch cannot be told by their sizes."""

    def run(s: Any, x: torch.Tensor) -> Any:
        y = sequence(s.conv(x), steps)
        y = s.spike(y + x.mean())
        z = s.spike2(y.transpose(0, 1)).transpose(0, 1) if steps == batch else s.spike2(y)
        return s.pool(z.flatten(0, 1)).unflatten(0, (steps, batch)).mean(0), y.flatten(2).sum(0)

    net = Net(
        run, conv=nn.Conv2d(2, batch, 3), spike=IFNode(), spike2=LIFNode(), pool=nn.AvgPool2d(2)
    )
    assert rank(each_pass_keeps(net, rand(batch, 2, 6, 6))) <= 5


# Flattening


def test_flatten_leaves_nothing_above_rank_four() -> None:
    net, x = event_net(), rand(T, N, 2, 8, 8)
    program = each_pass_keeps(net, x)
    assert rank(program) <= 4
    assert program.inputs[0].folded
    assert program.inputs[0].graph_shape == (T * N, 2, 8, 8)
    flat = flatten_time(capture(net, (x,)))
    done = report(flat, "flatten_time").done
    assert "highest rank 5 -> 4" in done[0]
    assert done[1] == f"input x [{T}, {N}, 2, 8, 8] is folded on the host"


def test_flatten_folds_an_output_of_rank_five() -> None:
    net = Net(lambda s, x: s.spike(x), spike=IFNode())
    program = flatten_time(capture(net, (rand(T, N, 2, 3, 3),)))
    assert program.outputs[0].folded
    assert rank(program) == 4
    assert program(rand(T, N, 2, 3, 3)).shape == (T, N, 2, 3, 3)


def test_flatten_leaves_an_output_whose_batch_comes_first() -> None:
    net = Net(lambda s, x: s.spike(x).transpose(0, 1), spike=IFNode())
    x = rand(T, N, 2, 3, 3)
    program = flatten_time(capture(net, (x,)))
    assert not program.outputs[0].folded
    assert equal(program(x), reference(net, x))


def test_flatten_says_what_keeps_its_rank() -> None:
    net = Net(lambda s, x: s.spike(x).permute(1, 2, 0, 3, 4).flatten(2).sum(2), spike=IFNode())
    x = rand(T, N, 2, 3, 3)
    program = flatten_time(capture(net, (x,)))
    assert equal(program(x), reference(net, x))
    assert report(program, "flatten_time").skipped == (
        "permute: aten.permute mixes time with other dimensions and keeps [4, 2, 2, 3, 3]",
    )


BETWEEN: list[Callable[..., torch.Tensor]] = [
    lambda x: x[1:],
    lambda x: x[-1:],
    lambda x: x[::2],
    lambda x: x[:, :1],
    lambda x: x[:, :, 1:],
    lambda x: x.flip(0),
    lambda x: x.roll(1, 0),
    lambda x: torch.cat([x, x * 2]),
    lambda x: torch.cat([x, x * 2], 1),
    lambda x: torch.cat([x, x * 2], 2),
    lambda x: torch.cat([x, x * 2], -1),
    lambda x: torch.stack([x[0], x[2]]),
    lambda x: torch.stack(list(x), 1),
    lambda x: x.mean(0, keepdim=True),
    lambda x: x.mean(1, keepdim=True).expand_as(x),
    lambda x: x.mean((0, 1), keepdim=True) + x,
    lambda x: x.sum(2),
    lambda x: x.mean((2, 3)),
    lambda x: x.amax(-1),
    lambda x: x.mean() + x,
    lambda x: x.transpose(0, 1),
    lambda x: x.transpose(1, 2),
    lambda x: x.transpose(2, 3),
    lambda x: x.permute(0, 1, 3, 2),
    lambda x: x.permute(2, 0, 1, 3),
    lambda x: x.unsqueeze(2),
    lambda x: x.unsqueeze(0).squeeze(0),
    lambda x: x.softmax(-1),
    lambda x: x.softmax(0),
    lambda x: x @ x.transpose(-1, -2),
    lambda x: x + x[0],
    lambda x: x + x[:1],
    lambda x: x * x[:, :1],
    lambda x: x * torch.arange(4.0).reshape(4, 1, 1, 1),
    lambda x: x * torch.arange(2.0).reshape(2, 1, 1),
    lambda x: x * torch.arange(3.0).reshape(3, 1),
    lambda x: x + torch.arange(8.0).reshape(4, 2, 1, 1),
    lambda x: torch.where(x > 0, x, x[0]),
    lambda x: x.flatten(0, 1).unflatten(0, (2, 4)),
    lambda x: x.flatten(0, 2).unflatten(0, (4, 6)),
    lambda x: x.reshape(2, 4, 3, 5),
    lambda x: x.reshape(8, 3, 5).unflatten(0, (4, 2)),
    lambda x: x.reshape(4, 6, 5),
    lambda x: x.reshape(4, 2, 15),
    lambda x: x.reshape(24, 5).reshape(4, 2, 3, 5),
    lambda x: x.clamp(0, 1).exp(),
    lambda x: F.pad(x, (1, 1)),
    lambda x: F.layer_norm(x, (5,)),
    lambda x: F.layer_norm(x, (3, 5)),
    lambda x: x.cumsum(0),
    lambda x: x.split(2)[1],
    lambda x: x.chunk(3, -2)[1],
    lambda x: x[..., [0, 2]],
    lambda x: x.repeat_interleave(2, 0),
    lambda x: x.repeat(1, 1, 2, 1),
    lambda x: x.expand(3, 4, 2, 3, 5).mean(0),
    lambda x: torch.einsum("tncl,tnkl->tnck", x, x),
    lambda x: F.conv1d(x.flatten(0, 1), torch.ones(2, 3, 3)).unflatten(0, (4, 2)),
    lambda x: (x > 0).to(x.dtype),
    lambda x: -(x.abs() ** 2),
    lambda x: 1 - x,
    lambda x: 2 / (x.square() + 1),
    lambda x: x.min(0).values.unsqueeze(0),
]


class Between(nn.Module):
    """Neurons before and after an operator on [T, N, C, L]."""

    def __init__(self, between: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.between, self.a, self.b = between, IFNode(), LIFNode()

    def forward(self, x: torch.Tensor) -> Any:
        y = self.between(self.a(x) * 0.75 + x)
        return y, self.b(y)


@pytest.mark.parametrize("names", groups(map(str, range(len(BETWEEN))), 9))
def test_any_operator_between_neurons(names: list[str]) -> None:
    """[T, N, C, L] = [4, 2, 3, 5] through operators that may or may not stay folded."""
    net = SideBySide({name: Between(BETWEEN[int(name)]) for name in names})
    each_pass_keeps(net, *[rand(4, 2, 3, 5)] * len(names))


def test_a_single_number_from_all_steps() -> None:
    each_pass_keeps(Net(lambda s, x: s.a(x).mean() + x.amax(), a=IFNode()), rand(4, 2, 3, 5))


def test_per_channel_parameters_stay_with_their_channel() -> None:
    threshold = torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1)
    net = nn.Sequential(
        LIFNode(v_threshold=threshold, v_reset=torch.tensor([[0.0], [0.1], [-0.2]]))
    )
    each_pass_keeps(net, rand(T, N, 3, 5))


def test_two_inputs_of_rank_five() -> None:
    net = Net(lambda s, x, y: s.spike(x + y).mean(0), spike=IFNode())
    program = each_pass_keeps(net, rand(T, N, 2, 3, 3), rand(T, N, 2, 3, 3, seed=1))
    assert [s.folded for s in program.inputs] == [True, True]


@pytest.mark.parametrize("kind", ["channels_last", "strided", "expanded"])
def test_memory_layout(kind: str) -> None:
    x = {
        "channels_last": rand(T * N, 2, 8, 8).to(memory_format=torch.channels_last),
        "strided": rand(T * N, 2, 8, 16)[..., ::2],
        "expanded": rand(1, 2, 8, 8).expand(T * N, -1, -1, -1),
    }[kind].unflatten(0, (T, N))
    program = each_pass_keeps(event_net(), x.contiguous())
    assert equal(program(x), program(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_source_networks_of_another_dtype(dtype: torch.dtype) -> None:
    net = settled(nn.Sequential(nn.Linear(5, 6), LIFNode(tau=3.0), nn.Linear(6, 4), IFNode()))
    program = each_pass_keeps(net.to(dtype), rand(T, N, 5).to(dtype))
    assert program.dtype == dtype
    assert {n.meta["val"].dtype for n in program.graph.nodes if "val" in n.meta} <= {
        dtype,
        torch.bool,
    }


# Lowering


def test_lowering_writes_nothing_in_place_and_keeps_no_neuron() -> None:
    program = each_pass_keeps(event_net(), rand(T, N, 2, 8, 8))
    for n in program.nodes("call_function"):
        assert n.target not in (NEURON, NEURON_STEP)
        assert not n.target._schema.is_mutable
    assert len(report(program, "lower_neurons").done) == 3


def test_lowering_leaves_out_the_last_reset() -> None:
    program = lower_neurons(flatten_time(capture(nn.Sequential(IFNode()), (rand(1, N, 3),))))
    assert names(program) == ["aten.reshape", "aten.ge", "aten._to_copy", "aten.reshape"]


def test_lowering_carries_paths() -> None:
    program = each_pass_keeps(
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(LIFNode())), rand(T, N, 3)
    )
    assert {n.meta["path"] for n in program.nodes("call_function")} <= {"0", "1.0", ""}


# Random networks


def check_stack(net: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    program = each_pass_keeps(net, *inputs)
    assert rank(program) <= 4
    assert not any(n.target._schema.is_mutable for n in program.nodes("call_function"))
    captured = capture(net, inputs)
    folded = fold_batch_norm(flatten_time(hoist_time_invariant(captured)))
    spikes = {
        mine.name: theirs.fired(values)
        for (theirs, mine), values in zip(
            zip(captured.sites, folded.sites, strict=True),
            [observed(captured, inputs)] * len(folded.sites),
            strict=True,
        )
    }
    expected = observed(captured, inputs)
    found = observed(folded, inputs, spikes)
    for theirs, mine in zip(captured.sites, folded.sites, strict=True):
        a, b = theirs.drive(expected), mine.drive(found)
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), mine.name


def observed(
    program: Program,
    inputs: tuple[torch.Tensor, ...],
    spikes: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    program.run(inputs, spikes, lambda n, value: values.__setitem__(n.name, value))
    return values


@settings(RANDOM, max_examples=8)
@given(stacks())
def test_random_networks(stack: Any) -> None:
    check_stack(*stack)


@pytest.mark.slow
@settings(RANDOM, max_examples=150)
@given(stacks())
def test_many_random_networks(stack: Any) -> None:
    check_stack(*stack)
