"""Operators written in others, against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


def test_what_a_target_has_stays() -> None:
    captured = capture(Net(nn.ConvTranspose2d(4, 6, 3, 2)), (torch.rand(IMAGE),))
    program = decompose_operators({*OPS, "aten.conv_transpose2d"})(captured)
    assert program.history[-1].done == ()
    assert [short(n.target) for n in program.nodes("call_function")] == ["aten.conv_transpose2d"]


def test_a_transposed_convolution_that_crops_is_told_of() -> None:
    captured = capture(Net(nn.ConvTranspose2d(4, 6, 3, 2, 3)), (torch.rand(IMAGE),))
    report = decompose_operators(OPS)(captured).history[-1]
    assert (report.done, len(report.skipped)) == ((), 1)
