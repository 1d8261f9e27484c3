"""Operators written in others, against torch's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import SideBySide, groups
from torch import nn
from torch.utils._pytree import tree_leaves

from spikeport.converters.capture import capture
from spikeport.converters.ops import aten
from spikeport.converters.passes import decompose_operators, merge_dimensions
from spikeport.converters.passes.formulas import FORMULAS
from spikeport.converters.program import Program, short, where
from spikeport.targets.lynxi.capabilities import CAPABILITIES

OPS = CAPABILITIES.ops or frozenset()


class Net(nn.Module):
    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor] | nn.Module) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.run(x)
        return y


class Whole(nn.Module):
    """All that a recurrent layer returns, in one tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([y.flatten() for y in tree_leaves(self.layer(x))])


class Bilinear(nn.Bilinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, x.flip(0))


IMAGE, LINE, VIDEO = (2, 4, 6, 5), (2, 4, 9), (2, 4, 5, 6, 7)
CASES = {
    "addmm": (lambda x: torch.addmm(x[0], x, x.T, beta=0.5, alpha=2.0), (5, 5)),
    "rsub": (lambda x: torch.rsub(x, 2.0, alpha=3.0) + torch.rsub(x, x * x), IMAGE),
    "abs": (torch.abs, IMAGE),
    "amax over channels": (lambda x: x.amax(1, keepdim=True), IMAGE),
    "amax over the image": (lambda x: x.amax((2, 3)), IMAGE),
    "amax over time and width": (lambda x: x.amax((0, 3)), IMAGE),
    "amax over everything": (lambda x: x.amax(), IMAGE),
    "Euclidean norm": (lambda x: torch.norm(x, dim=1, keepdim=True), IMAGE),
    "Euclidean norm of everything": (torch.norm, IMAGE),
    "layer norm": (nn.LayerNorm((6, 5)), IMAGE),
    "layer norm without weights": (nn.LayerNorm(5, elementwise_affine=False), IMAGE),
    "group norm": (nn.GroupNorm(2, 4), IMAGE),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), IMAGE),
    "variance": (
        lambda x: x.var((2, 3), keepdim=True) + x.var(1, correction=0).unsqueeze(1),
        IMAGE,
    ),
    "standard deviation": (lambda x: x.std(-1) + torch.std(x, (0, 3), correction=2), IMAGE),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3), IMAGE),
    "causal attention": (
        lambda x: F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3], is_causal=True),
        IMAGE,
    ),
    "attention to some": (
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(6).bool()),
        IMAGE,
    ),
    "attention with a mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(6) * 2 - 1),
        IMAGE,
    ),
    "products added up": (
        lambda x: torch.baddbmm(x[:, 0], x[:, 1] @ x[:, 1].mT, x[:, 2], beta=0.5, alpha=2),
        IMAGE,
    ),
    "im2col": (lambda x: F.unfold(x, (3, 2), 1, (1, 0), (2, 1)), IMAGE),
    "running sum": (lambda x: x.cumsum(1) + x.cumsum(-1), IMAGE),
    "bilinear": (Bilinear(9, 9, 3), LINE),
    "bilinear without a bias": (Bilinear(9, 9, 3, bias=False), LINE),
    "no number": (lambda x: (x / x.relu()).nan_to_num(0.5) / 1e38, IMAGE),
    "no number, infinities": (lambda x: (x / x.relu()).nan_to_num(posinf=2, neginf=-3), IMAGE),
    "no number among whole ones": (lambda x: x.int().nan_to_num().float(), IMAGE),
    "exclusive or": (lambda x: ((x > 0) ^ (x > 1)).float(), IMAGE),
    "exclusive or by name": (lambda x: torch.logical_xor(x > 0, x > 1).float(), IMAGE),
    "LSTM": (Whole(nn.LSTM(9, 5)), LINE),
    "LSTM, two layers both ways": (
        Whole(nn.LSTM(9, 5, 2, batch_first=True, bidirectional=True)),
        LINE,
    ),
    "LSTM without biases": (Whole(nn.LSTM(9, 5, bias=False)), LINE),
    "GRU": (Whole(nn.GRU(9, 5, 2, dropout=0.5)), LINE),
    "GRU both ways": (Whole(nn.GRU(9, 5, batch_first=True, bidirectional=True)), LINE),
    "RNN": (Whole(nn.RNN(9, 5)), LINE),
    "RNN of rectifiers": (Whole(nn.RNN(9, 5, nonlinearity="relu")), LINE),
    "max pool": (nn.MaxPool1d(3, 2, 1), LINE),
    "max pool with its own stride": (nn.MaxPool1d(2), LINE),
    "adaptive average in 1-D": (nn.AdaptiveAvgPool1d(3), LINE),
    "adaptive average, windows that differ": (nn.AdaptiveAvgPool2d((4, 3)), IMAGE),
    "adaptive average, larger": (nn.AdaptiveAvgPool2d(7), (2, 3, 1, 1)),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), IMAGE),
    "transposed conv in groups": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), groups=2), IMAGE),
    "transposed conv, dilated": (nn.ConvTranspose2d(4, 4, 3, 2, 2, dilation=2), IMAGE),
    "transposed conv in 1-D": (nn.ConvTranspose1d(4, 6, 4, 2, 1, bias=False), LINE),
    "transposed conv in 3-D": (nn.ConvTranspose3d(4, 6, 3, (2, 1, 2), 1, (1, 0, 0)), VIDEO),
    "conv in 3-D": (nn.Conv3d(4, 6, (3, 2, 3), (2, 1, 2), (1, 0, 2)), VIDEO),
    "conv in 3-D, dilated, in groups": (nn.Conv3d(4, 8, 2, 1, 1, 2, groups=2, bias=False), VIDEO),
    "conv in 3-D over images": (nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), VIDEO),
    "conv in 3-D over all of D": (nn.Conv3d(4, 6, (5, 1, 1)), VIDEO),
    "conv of channels in 3-D": (nn.Conv3d(4, 6, 1, groups=2), VIDEO),
    "max pool in 3-D": (nn.MaxPool3d((2, 3, 2), padding=1, dilation=(2, 1, 1)), VIDEO),
    "max pool in 3-D, to the end": (nn.MaxPool3d(2, (1, 2, 3), ceil_mode=True), VIDEO),
    "max pool in 3-D without a batch": (nn.MaxPool3d(2), VIDEO[1:]),
    "average in 3-D": (nn.AvgPool3d((2, 3, 2), (1, 2, 2)), VIDEO),
    "average in 3-D, to the end": (nn.AvgPool3d(3, 2, 1, True), VIDEO),
    "average in 3-D without the padding": (nn.AvgPool3d(3, 2, 1, True, False), VIDEO),
    "average in 3-D by another number": (nn.AvgPool3d(2, divisor_override=5), VIDEO),
    "adaptive average in 3-D": (nn.AdaptiveAvgPool3d((2, 3, 7)), VIDEO),
    "adaptive average in 3-D of all": (nn.AdaptiveAvgPool3d(1), VIDEO),
    "adaptive max in 3-D": (nn.AdaptiveMaxPool3d((5, 3, 1)), VIDEO),
    "nearest in 1-D": (nn.Upsample(scale_factor=2), LINE),
    "linear in 1-D": (nn.Upsample(size=7, mode="linear", align_corners=True), LINE),
    "nearest in 3-D": (nn.Upsample(size=(7, 6, 4)), VIDEO),
    "linear in 3-D": (nn.Upsample(scale_factor=(2, 1, 1.5), mode="trilinear"), VIDEO),
    "amin": (lambda x: x.amin((1, 3)) + x.amin(), IMAGE),
    "RMS norm": (nn.RMSNorm((6, 5)), IMAGE),
    "padding": (lambda x: F.pad(x, (1, 2, 0, 3, 1, 0), value=0.5), IMAGE),
    "cropping": (lambda x: F.pad(x, (-1, 2, -2, -1)), IMAGE),
    "gate": (nn.GLU(1), IMAGE),
    "swish": (nn.SiLU(), IMAGE),
    "GELU by tanh": (nn.GELU("tanh"), IMAGE),
    "ELU": (nn.ELU(0.7), IMAGE),
    "CELU": (nn.CELU(0.7), IMAGE),
    "SELU": (nn.SELU(), IMAGE),
    "mish": (nn.Mish(), IMAGE),
    "leaky ReLU": (nn.LeakyReLU(0.2), IMAGE),
    "random leaky ReLU": (nn.RReLU(), IMAGE),
    "hard tanh": (nn.Hardtanh(-0.5, 0.8), IMAGE),
    "ReLU6": (nn.ReLU6(), IMAGE),
    "clip": (lambda x: x.clip(-0.5, 0.8) + x.clip(max=0.1), IMAGE),
    "hard sigmoid": (nn.Hardsigmoid(), IMAGE),
    "hard swish": (nn.Hardswish(), IMAGE),
    "threshold": (nn.Threshold(0.3, -2.0), IMAGE),
    "soft shrink": (nn.Softshrink(0.3), IMAGE),
    "square": (torch.square, IMAGE),
    "reciprocal": (torch.reciprocal, IMAGE),
    "power of two": (torch.exp2, IMAGE),
    "expm1": (torch.expm1, IMAGE),
    "step": (lambda x: torch.heaviside(x.round(), x), IMAGE),
    "sign": (lambda x: x.round().sign(), IMAGE),
    "whole numbers": (lambda x: (3 * x).floor() + (5 * x).ceil() * 10 + (7 * x).trunc(), IMAGE),
    "whole quotients": (
        lambda x: (
            torch.div(x, -0.25, rounding_mode="floor") + x // 2 + x.div(0.7, rounding_mode="trunc")
        ),
        IMAGE,
    ),
    "between": (lambda x: torch.lerp(x, -x, 0.3) + torch.lerp(x, -x, 0.8), IMAGE),
    "between, by a tensor": (lambda x: torch.lerp(x, x * x, x[0]), IMAGE),
    "added product": (lambda x: torch.addcmul(x, x, x[0], value=0.5), IMAGE),
    "larger number": (lambda x: torch.fmax(x / x.relu(), x) + torch.fmin(x, x * x), IMAGE),
    "round to decimals": (lambda x: x.round(decimals=1) + (x * 100).round(decimals=-1), IMAGE),
    "infinite": (lambda x: (1 / x.relu()).isinf() ^ (-1 / x.relu()).isneginf(), IMAGE),
    "infinite above": (lambda x: (1 / x.relu()).isposinf(), IMAGE),
    "norm of order 1": (lambda x: F.normalize(x, p=1.0), IMAGE),
    "norm of order infinity": (lambda x: F.normalize(x, p=torch.inf), IMAGE),
    "norm of the smallest": (lambda x: torch.linalg.vector_norm(x, -torch.inf, (1, 2)), IMAGE),
    "norm of order 3": (lambda x: torch.linalg.vector_norm(x, 3), IMAGE),
    "norm of what is not 0": (lambda x: torch.linalg.vector_norm(x.relu(), 0, 1), IMAGE),
    "product": (lambda x: x.prod(1, keepdim=True) + x[0, 0].prod(), IMAGE),
    "col2im": (
        lambda x: F.fold(F.unfold(x, (3, 2), 1, 1, 2), (6, 5), (3, 2), 1, 1, 2),
        IMAGE,
    ),
    "instance norm with statistics": (
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        IMAGE,
    ),
    "batch norm without statistics": (nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    "nearest by a factor": (lambda x: F.interpolate(x, scale_factor=1.7), IMAGE),
    "nearest in 1-D by a factor": (lambda x: F.interpolate(x, scale_factor=1.7), LINE),
    "exactly nearest": (lambda x: F.interpolate(x, (4, 7), mode="nearest-exact"), IMAGE),
    "exactly nearest in 3-D": (lambda x: F.interpolate(x, (4, 7, 9), mode="nearest-exact"), VIDEO),
    "bilinear by a factor": (
        lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear"),
        IMAGE,
    ),
    "bicubic": (lambda x: F.interpolate(x, (9, 4), mode="bicubic"), IMAGE),
    "added quotient": (lambda x: torch.addcdiv(x, x, x.exp(), value=0.5), IMAGE),
}


def decomposed(net: SideBySide, inputs: list[torch.Tensor], have: Collection[str]) -> Program:
    """The program of networks side by side, of each of which something was written in others."""
    program = decompose_operators(have)(capture(net, inputs))
    report = program.history[-1]
    assert not report.skipped
    for name in net.nets:
        at = (f"(nets.{name})", f"(nets.{name}.")
        assert any(start in line for line in report.done for start in at), name
    return program


@pytest.mark.parametrize("names", groups(CASES, 12))
def test_an_operator_in_others(names: list[str]) -> None:
    torch.manual_seed(0)
    net = SideBySide({name: Net(CASES[name][0]) for name in names}).eval()
    inputs = [torch.randn(CASES[name][1]) for name in names]
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
    program = merge_dimensions(4)(decomposed(net, inputs, OPS))
    used = {(where(n), short(n.target)) for n in program.nodes("call_function")}
    assert not [(path, operator) for path, operator in used if operator not in OPS]
    sizes = {(where(n), n.meta["val"].dim()) for n in program.nodes("call_function")}
    assert not [(path, rank) for path, rank in sizes if rank > 4]
    with torch.no_grad():
        expected, found = net(*inputs), program(*inputs)
    for name in names:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5), name


def test_formulas_where_arithmetic_ends() -> None:
    """Infinities, no number, both zeros, the largest numbers and what float16 holds no exponential of."""
    numbers = [0.0, 1.0, 12.0, 89.0, 65504.0, 3e38, torch.inf]
    x = torch.tensor([torch.nan, *numbers, *(-v for v in numbers)])
    rest = {
        aten.leaky_relu.default: (0.2,),
        aten.celu.default: (0.7,),
        aten.threshold.default: (0.3, -2.0),
        aten.heaviside.default: (torch.tensor(0.5),),
        aten.floor_divide.default: (-0.5,),
        aten.lerp.Scalar: (x + 1, 0.3),
        aten.lerp.Tensor: (x + 1, torch.tensor(0.7)),
        aten.addcmul.default: (x, x),
        aten.addcdiv.default: (x, x + 1),
        aten.clip.default: (-1.0, 2.0),
        aten.copysign.Tensor: (x.flip(0),),
        aten.copysign.Scalar: (-2.0,),
        aten.hypot.default: (x + 1,),
        aten.logaddexp.default: (x.roll(3),),
        aten.fmax.default: (x.roll(3),),
        aten.fmin.default: (x.roll(3),),
    }
    named: dict[Any, Any] = {
        aten.gelu.default: {"approximate": "tanh"},
        aten.round.decimals: {"decimals": 2},
    }

    def formula(target: Any) -> Net:
        return Net(lambda x: target(x, *rest.get(target, ()), **named.get(target, {})))

    net = SideBySide({str(target).replace(".", " "): formula(target) for target in FORMULAS})
    inputs = [x] * len(FORMULAS)
    program = decomposed(net, inputs, {*OPS, "aten.softplus", "aten.log", "aten.erf"})
    expected, found = net(*inputs), program(*inputs)
    for name in net.nets:
        torch.testing.assert_close(
            found[name],
            expected[name],
            equal_nan=True,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_what_needs_a_logarithm_is_refused_without_one() -> None:
    for run in (nn.LogSoftmax(-1), nn.LogSigmoid(), nn.GELU()):
        captured = capture(Net(run), (torch.randn(IMAGE),))
        report = decompose_operators(OPS)(captured).history[-1]
        assert (report.done, len(report.skipped)) == ((), 1)
    captured = capture(Net(nn.LogSoftmax(1)), (x := torch.randn(IMAGE) * 50,))
    program = decompose_operators({*OPS, "aten.log"})(captured)
    assert "aten.log_softmax" not in {short(n.target) for n in program.nodes("call_function")}
    torch.testing.assert_close(program(x), x.log_softmax(1), rtol=1e-5, atol=1e-5)


def test_log1p_where_there_is_a_logarithm() -> None:
    x = torch.cat([torch.tensor([0.0, 1e9, -1.0, -2.0, torch.inf]), torch.linspace(-0.9, 5, 99)])
    program = decompose_operators({*OPS, "aten.log"})(capture(Net(torch.log1p), (x,)))
    assert "aten.log1p" not in {short(n.target) for n in program.nodes("call_function")}
    torch.testing.assert_close(program(x), x.log1p(), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not decompose_operators(OPS)(capture(Net(torch.log1p), (x,))).history[-1].done


def test_an_lstm_that_projects_stays() -> None:
    program = capture(Net(Whole(nn.LSTM(9, 5, proj_size=3))), (torch.rand(LINE),))
    assert len(decompose_operators(OPS)(program).history[-1].skipped) == 1


def test_what_a_target_has_stays() -> None:
    captured = capture(Net(nn.ConvTranspose2d(4, 6, 3, 2)), (torch.rand(IMAGE),))
    program = decompose_operators({*OPS, "aten.conv_transpose2d"})(captured)
    assert program.history[-1].done == ()
    assert [short(n.target) for n in program.nodes("call_function")] == ["aten.conv_transpose2d"]


def test_a_transposed_convolution_that_crops_is_told_of() -> None:
    captured = capture(Net(nn.ConvTranspose2d(4, 6, 3, 2, 3)), (torch.rand(IMAGE),))
    report = decompose_operators(OPS)(captured).history[-1]
    assert (report.done, len(report.skipped)) == ((), 1)
