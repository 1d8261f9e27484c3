"""Operators written in others, against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from spikeport.converters.capture import capture
from spikeport.converters.passes import decompose_operators
from spikeport.converters.program import short
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


IMAGE, LINE = (2, 4, 6, 5), (2, 4, 9)
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
    "attention with a mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(6) * 2 - 1),
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
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_in_others(name: str) -> None:
    run, shape = CASES[name]
    torch.manual_seed(0)
    net, x = Net(run).eval(), torch.randn(shape)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    captured = capture(net, (x,))
    program = decompose_operators(OPS)(captured)
    assert program.history[-1].done
    assert {short(n.target) for n in program.nodes("call_function")} <= OPS
    assert max(n.meta["val"].dim() for n in program.nodes("call_function")) <= 4
    with torch.no_grad():
        assert torch.allclose(program(x), net(x), rtol=1e-5, atol=1e-5)


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
