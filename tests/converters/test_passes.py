"""Each pass alone keeps the numbers, says what it did, and says where it did not apply."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from networks import Net, equal, rand, reference
from random_networks import RANDOM, sequence, settled, stacks
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.errors import UnsupportedError
from spikeport.converters.neurons import IFNode, LIFNode, Node, ParametricLIFNode
from spikeport.converters.passes import (
    absorb_batch_norm,
    cast_float16,
    flatten_time,
    fold_batch_norm,
    fold_constants,
    hoist_time_invariant,
    lower_neurons,
)
from spikeport.converters.program import NEURON, NEURON_STEP, PassReport, Program, short

EXACT = (fold_constants, hoist_time_invariant, flatten_time, lower_neurons)
T, N = 4, 2


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
    assert equal(flatten_time(program)(*inputs), expected)
    for rewrite in EXACT:
        chained = rewrite(chained)
        assert equal(chained(*inputs), expected), rewrite.__name__
        assert shapes_are_true(chained, inputs)
        assert [s.name for s in chained.sites] == [s.name for s in program.sites]
    again = tuple(x.flip(-1) for x in inputs)
    assert equal(chained(*again), reference(net, *again))
    return chained


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


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
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


@pytest.mark.parametrize(
    "between",
    [
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
    ],
    ids=range(63),
)
def test_any_operator_between_neurons(between: Callable[..., torch.Tensor]) -> None:
    """[T, N, C, L] = [4, 2, 3, 5] through an operator that may or may not stay folded."""

    def run(s: Any, x: torch.Tensor) -> Any:
        y = between(s.a(x) * 0.75 + x)
        return y, s.b(y)

    each_pass_keeps(Net(run, a=IFNode(), b=LIFNode()), rand(4, 2, 3, 5))


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


# Folding


def test_constants_are_folded_once() -> None:
    """A standardised weight, in each step of a loop over time."""

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        steps = []
        for _ in range(3):
            w = net.conv.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.var((1, 2, 3), keepdim=True).sqrt()
            steps.append(net.spike(F.conv2d(x, w).unsqueeze(0)))
        return torch.cat(steps)

    net = Net(run, conv=nn.Conv2d(1, 4, 3), spike=IFNode()).eval()
    x = rand(2, 1, 6, 6)
    program = capture(net, (x,))
    folded = fold_constants(program)
    assert torch.equal(folded(x), reference(net, x))
    assert names(folded).count("aten.conv2d") == 3
    assert not {"aten.mean", "aten.var", "aten.sqrt", "aten.div"} & set(names(folded))
    assert [tuple(t.shape) for t in folded.tensors.values()] == [(4, 1, 3, 3)]
    assert len(report(folded, "fold_constants").done) == 1


def test_whole_numbers_among_others_are_as_torch_makes_them() -> None:
    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(3) + (x > torch.tensor([0, 1, 2])) + F.embedding(s.long(), x)

    s = torch.tensor([2, 0, 1, 3])
    net = Net(run)
    program = fold_constants(capture(net, (x := torch.rand(4, 3),)))
    assert torch.equal(program(x), net(x))
    kinds = {
        short(u.target): n.meta["val"].dtype for n in program.nodes("get_attr") for u in n.users
    }
    assert kinds["aten.mul"] == kinds["aten.gt"] == torch.float32
    assert torch.int64 in kinds.values()  # places


def test_a_constant_neuron_is_not_folded() -> None:
    net = Net(lambda net, x: x + net.spike(net.drive), spike=IFNode())
    net.register_buffer("drive", torch.full((4, 2, 3), 0.4))
    x = rand(4, 2, 3)
    folded = fold_constants(capture(net.eval(), (x,)))
    assert len(folded.sites) == 1
    assert torch.equal(folded(x), reference(net, x))


def test_fold_within_rounding() -> None:
    net, x = event_net(), rand(T, N, 2, 8, 8)
    captured = capture(net, (x,))
    folded = fold_batch_norm(captured)
    done = report(folded, "fold_batch_norm")
    # The convolution is used again without the norm.
    assert done.skipped == ("norm: conv is used elsewhere too",) or done.done == ("norm into conv",)
    assert torch.allclose(folded(x), captured(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "linear", "grouped"])
def test_fold_every_layer(kind: str, bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    layer, norm, shape = {
        "conv1d": (nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d, (N, 4, 8)),
        "conv2d": (nn.Conv2d(4, 6, 3, stride=2, bias=bias), nn.BatchNorm2d, (N, 4, 8, 8)),
        "conv3d": (nn.Conv3d(4, 6, 2, bias=bias), nn.BatchNorm3d, (N, 4, 3, 4, 4)),
        "linear": (nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, (N, 4)),
        "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d, (N, 4, 8, 8)),
    }[kind]
    net = settled(nn.Sequential(layer, norm(6, eps=1e-3, affine=affine)))
    x = rand(*shape)
    program = fold_batch_norm(capture(net, (x,)))
    assert report(program, "fold_batch_norm").done == ("1 into 0",)
    assert "aten.batch_norm" not in names(program)
    expected = reference(net.double(), x.double())
    # Two roundings of each weight and one of each sum, against float64.
    scale = copy.deepcopy(net[0])
    scale.weight.data.abs_()
    size = reference(nn.Sequential(scale.float()), x.abs()).abs().max().item() * 4
    assert (program(x) - expected).abs().max().item() < 2**-22 * max(size, 1)


def test_fold_refuses_what_is_used_elsewhere() -> None:
    net = Net(lambda s, x: (lambda y: s.norm(y) + y)(s.fc(x)), fc=nn.Linear(3, 3),
              norm=nn.BatchNorm1d(3))  # fmt: skip
    program = fold_batch_norm(capture(settled(net), (rand(N, 3),)))
    assert report(program, "fold_batch_norm").skipped == ("norm: fc is used elsewhere too",)
    assert equal(program(rand(N, 3)), reference(net, rand(N, 3)))


@pytest.mark.parametrize("kind", ["pool", "first", "neuron", "features"])
def test_fold_refuses_a_norm_elsewhere(kind: str) -> None:
    net, shape = {
        "pool": (
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.BatchNorm2d(3)),
            (N, 2, 8, 8),
        ),
        "first": (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)), (N, 2, 8, 8)),
        "neuron": (nn.Sequential(nn.Linear(5, 3), IFNode(), nn.BatchNorm1d(T)), (N, T, 5)),
        "features": (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(T)), (N, T, 5)),
    }[kind]
    x = rand(*shape)
    program = fold_batch_norm(capture(settled(net), (x,)))
    done = report(program, "fold_batch_norm")
    assert not done.done
    assert len(done.skipped) == 1
    assert equal(program(x), reference(net, x))


def test_fold_a_shared_layer_with_two_norms() -> None:
    """One convolution's weight, folded into two others."""
    net = Net(
        lambda s, x: s.a(s.conv(x)) + s.b(s.conv(x * 2)),
        conv=nn.Conv2d(2, 3, 3), a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3),
    )  # fmt: skip
    x = rand(N, 2, 6, 6)
    program = fold_batch_norm(capture(settled(net), (x,)))
    assert len(report(program, "fold_batch_norm").done) == 2
    assert torch.allclose(program(x), reference(net, x), atol=1e-5)


def test_fold_a_shared_layer_with_one_norm_twice() -> None:
    net = Net(
        lambda s, x: s.norm(s.conv(x)) + s.norm(s.other(x)),
        conv=nn.Conv2d(2, 3, 3), other=nn.Conv2d(2, 3, 3), norm=nn.BatchNorm2d(3),
    )  # fmt: skip
    x = rand(N, 2, 6, 6)
    program = fold_batch_norm(capture(settled(net), (x,)))
    assert torch.allclose(program(x), reference(net, x), atol=1e-5)


def test_fold_keeps_a_norm_without_statistics() -> None:
    """It normalises by the batch, in evaluation too."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False))
    x = rand(N, 2, 6, 6)
    captured = capture(net, (x,))
    assert torch.allclose(fold_batch_norm(captured)(x), captured(x))


@pytest.mark.parametrize("node", [IFNode, LIFNode, functools.partial(LIFNode, v_reset=None)])
def test_absorb_gives_the_same_spikes(node: Callable[[], Node]) -> None:
    net = settled(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Flatten(0, 0), IFNode()))
    torch.manual_seed(1)

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.spike = net[0], net[1], node()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.spike(self.norm(self.conv(x.flatten(0, 1))).unflatten(0, (T, N)))

    body, x = Body(), rand(T, N, 4, 32)
    before = flatten_time(capture(body, (x,)))
    after = absorb_batch_norm(before)
    assert report(after, "absorb_batch_norm").done == ("norm into conv and spike",)
    assert "aten.batch_norm" not in names(after)
    assert (after(x) != before(x)).float().mean() < 1e-3
    weight = next(t for name, t in after.tensors.items() if name.endswith("_weight"))
    ratio = (weight / body.conv.weight).detach().flatten(1)
    assert torch.equal(ratio.log2().round().exp2(), ratio)


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


# The cast


def lowered(net: nn.Module, *inputs: torch.Tensor) -> Program:
    program = capture(net, inputs)
    for rewrite in EXACT:
        program = rewrite(program)
    return program


def test_the_cast_names_every_layer_that_overflows() -> None:
    net = nn.Sequential(nn.Linear(3, 3), IFNode(), nn.Sequential(nn.Linear(3, 2, bias=False)))
    with torch.no_grad():
        net[0].bias[1] = 1e5
        net[2][0].weight[0, 0] = -7e4
    with pytest.raises(UnsupportedError) as caught:
        cast_float16(lowered(net, rand(T, N, 3)))
    found = [(f.rule, f.where) for f in caught.value.findings]
    assert found == [("float16-overflow", "0"), ("float16-overflow", "2.0")]
    assert "0.bias reaches 100000" in caught.value.findings[0].found


def test_the_cast_refuses_a_scalar_that_overflows() -> None:
    net = nn.Sequential(nn.Linear(3, 3), IFNode(v_threshold=1e5))
    with pytest.raises(UnsupportedError) as caught:
        cast_float16(lowered(net, rand(T, N, 3)))
    assert [(f.rule, f.where) for f in caught.value.findings] == [("float16-overflow", "1")]


def test_the_cast_takes_no_place_or_size_for_a_value() -> None:
    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., 1:]

    program = capture(nn.Sequential(nn.Linear(3, 3), Last()), (rand(T, N, 3),))
    assert any(2**63 - 1 in n.args for n in program.graph.nodes)
    assert cast_float16(program).dtype == torch.float16


def test_the_cast_counts_what_it_flushes() -> None:
    net = nn.Sequential(nn.Linear(3, 3), IFNode())
    with torch.no_grad():
        net[0].weight[0] = 1e-9
    program = cast_float16(lowered(net, rand(T, N, 3)))
    assert "0.weight: 3 of 9 weights flushed to 0" in report(program, "cast_float16").done
    assert program.dtype == torch.float16
    kinds = {n.meta["val"].dtype for n in program.graph.nodes if "val" in n.meta}
    assert kinds == {torch.float16, torch.bool}
    assert shapes_are_true(program, (rand(T, N, 3),))


@pytest.mark.parametrize("fires", [">=", ">"])
@pytest.mark.parametrize("threshold", [1.0, 0.1, 1 / 3, torch.tensor([0.1, 0.7, 1.3])])
def test_the_cast_keeps_every_comparison(fires: Any, threshold: Any) -> None:
    """On float16 membranes around the threshold, it fires where the float32 threshold says so."""
    net = nn.Sequential(IFNode(v_threshold=threshold, fires=fires))
    base = torch.as_tensor(threshold).half()
    ulp = (torch.nextafter(base, base * 2) - base).float()
    x = torch.stack([base.float() + k * ulp for k in range(-3, 4)]).reshape(1, 7, -1)
    program = cast_float16(lowered(net, x))
    assert torch.equal(program(x), reference(net, x))


def test_the_cast_keeps_integers() -> None:
    net = Net(lambda s, i: s.spike(s.table(i)), table=nn.Embedding(5, 3), spike=IFNode())
    x = torch.arange(T * N).reshape(T, N) % 5
    program = cast_float16(lowered(net, x))
    assert program.inputs[0].dtype == torch.int64
    assert program(x).shape == (T, N, 3)


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
