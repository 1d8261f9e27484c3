"""Constants and batch norms folded: within rounding, and where it is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Net, equal, rand, reference
from random_networks import settled
from rewriting import event_net, names, report
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.neurons import IFNode, LIFNode, Node
from spikeport.converters.passes import (
    absorb_batch_norm,
    flatten_time,
    fold_batch_norm,
    fold_constants,
)
from spikeport.converters.program import short

T, N = 4, 2


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
