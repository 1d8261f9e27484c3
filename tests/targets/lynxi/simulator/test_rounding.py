"""The chip's arithmetic against definitions written in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


class Neuron(nn.Module):
    """Leaky integrate and fire over T = 4, flat layout [T * N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0] // 4
        v = torch.zeros_like(x[:n])
        spikes = []
        for t in range(4):
            v = v + (x[t * n : (t + 1) * n] - v) * 0.3
            s = (v >= 0.7).to(x)
            v = (1.0 - s) * v + s * 0.1
            spikes.append(s + v)
        return torch.cat(spikes)


def _neuron(x: np.ndarray[Any, Any], f: Any) -> np.ndarray[Any, Any]:
    n = x.shape[0] // 4
    v = np.zeros_like(x[:n])
    out = []
    for t in range(4):
        v = f(v + f(f(x[t * n : (t + 1) * n] - v) * f(0.3)))
        s = f(v >= f(0.7))
        v = f(f(f(f(1) - s) * v) + f(s * f(0.1)))
        out.append(f(s + v))
    return np.concatenate(out)


def test_every_elementwise_result_is_rounded(build: Any) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * 1.5
    half = _neuron(x.numpy().astype(np.float16), np.float16)
    single = _neuron(x.numpy(), np.float32)
    got = build(Neuron(), [x]).run([x])[0].numpy()
    assert np.array_equal(got, half.astype(np.float32))
    assert not np.array_equal(got, single)
    wide = build(Neuron(), [x], storage="float32").run([x])[0].numpy()
    assert np.array_equal(wide, single)


def test_dense_rounds_once_with_a_wide_accumulator(build: Any) -> None:
    torch.manual_seed(0)
    net = nn.Linear(64, 8)
    x = torch.randn(5, 64)
    got = build(net, [x]).run([x])[0].numpy()
    f16 = np.float16
    exact = x.numpy().astype(f16).astype(np.float64) @ net.weight.detach().numpy().astype(
        f16
    ).astype(np.float64).T + net.bias.detach().numpy().astype(f16).astype(np.float64)
    # The float32 sum errs by far less than half a unit of float16, so a result may differ from
    # the rounded exact one only where the exact one lies almost in the middle.
    off = got != exact.astype(f16)
    assert off.sum() <= 1
    assert np.abs(got - exact).max() < 2**-10 * np.abs(exact).max()


def _rounded_dot(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> np.float16:
    total = np.float16(0)
    for i, (a, b) in enumerate(zip(x, w, strict=True)):
        product = np.float16(a * b)
        total = product if i == 0 else np.float16(total + product)
    return total


def test_float16_accumulation_of_dense(build: Any) -> None:
    torch.manual_seed(1)
    net = nn.Linear(40, 6)
    x = torch.randn(3, 40)
    got = build(net, [x], accumulate="float16").run([x])[0].numpy()
    w, b = (p.detach().numpy().astype(np.float16) for p in (net.weight, net.bias))
    h = x.numpy().astype(np.float16)
    wanted = [[_rounded_dot(row, w[o]) + b[o] for o in range(6)] for row in h]
    assert np.array_equal(got, np.array(wanted, np.float16).astype(np.float32))
    assert not np.array_equal(got, build(net, [x]).run([x])[0].numpy())


@pytest.mark.parametrize("groups", [1, 2])
def test_float16_accumulation_of_convolution(groups: int, build: Any) -> None:
    torch.manual_seed(2)
    net = nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=1, groups=groups)
    x = torch.randn(2, 4, 5, 6)
    got = build(net, [x], accumulate="float16").run([x])[0].numpy()
    w, b = (p.detach().numpy().astype(np.float16) for p in (net.weight, net.bias))
    h = np.pad(x.numpy().astype(np.float16), ((0, 0), (0, 0), (1, 1), (1, 1)))
    per = 4 // groups
    wanted = np.zeros(got.shape, np.float16)
    for n, o, i, j in np.ndindex(*got.shape):
        first = o // per * per
        window = h[n, first : first + per, 2 * i : 2 * i + 3, j : j + 2]
        wanted[n, o, i, j] = _rounded_dot(window.ravel(), w[o].ravel()) + b[o]
    assert np.array_equal(got, wanted.astype(np.float32))


def test_float16_accumulation_of_mean_loses_small_terms(build: Any) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    x = torch.ones(4096, 1)
    assert build(Mean(), [x]).run([x])[0].item() == 1.0
    # From 2048 on, adding 1 to a float16 changes nothing.
    assert build(Mean(), [x], accumulate="float16").run([x])[0].item() == 0.5


def test_constants_and_inputs_are_rounded(build: Any) -> None:
    class Compare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x >= 0.3).to(x)

    x = torch.tensor([0.3, 0.29999, 0.2998, float(np.float16(0.3))])
    assert build(Compare(), [x]).run([x])[0].tolist() == [1, 1, 0, 1]
    assert build(Compare(), [x], storage="float32").run([x])[0].tolist() == [1, 0, 0, 1]


def test_overflow_is_infinite(build: Any) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 / 4

    x = torch.tensor([40000.0])
    assert build(Double(), [x]).run([x])[0].item() == float("inf")
    assert build(Double(), [x], target="cpu").run([x])[0].item() == 20000.0


def test_host_targets_do_not_round(build: Any) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(8, 4), torch.randn(2, 8)
    with torch.no_grad():
        wanted = net(x)
    for target in ("cpu", "llvm"):
        assert torch.equal(build(net, [x], target=target).run([x])[0], wanted)


def _normed() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3))
    net[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    net[1].running_var.copy_(torch.tensor([0.3, 1.7, 0.9]))
    return net.eval()


def test_batch_norm_is_folded_from_level_3(build: Any) -> None:
    net, x = _normed(), torch.randn(2, 2, 6, 6)
    folded = build(net, [x])
    assert [n.op for n in folded.graph.nodes if n.inputs] == ["conv"]
    norm = net[1]
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    weight = (net[0].weight.detach().double() * scale[:, None, None, None]).half()
    bias = (-norm.running_mean.double() * scale).half()
    with torch.no_grad():
        wanted = nn.functional.conv2d(x.half().double(), weight.double(), bias.double())
    torch.testing.assert_close(folded.run([x])[0], wanted.half().float(), rtol=1e-3, atol=1e-5)
    apart = build(net, [x], opt_level=2)
    assert [n.op for n in apart.graph.nodes if n.inputs] == ["conv", "mul", "add"]
    with torch.no_grad():
        torch.testing.assert_close(apart.run([x])[0], net(x), rtol=5e-3, atol=5e-3)


def test_norm_whose_convolution_has_another_reader_stays(build: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _normed()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net[0](x)
            return self.net[1](y) + y

    x = torch.randn(1, 2, 5, 5)
    net = Both().eval()
    engine = build(net, [x])
    assert [n.op for n in engine.graph.nodes if n.inputs] == ["conv", "mul", "add", "add"]
    with torch.no_grad():
        torch.testing.assert_close(engine.run([x])[0], net(x), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("optimise", [True, False])
def test_in_float32_layers_are_torch_s_own(optimise: bool, build: Any) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    wide[1].running_mean.uniform_(-1, 1)
    wide[1].running_var.uniform_(0.5, 2)
    net = nn.Sequential(*wide, nn.Conv2d(64, 64, 3, groups=2)).eval()
    x = torch.randn(4, 32, 16, 16)
    engine = build(net, [x], storage="float32", optimise=optimise, opt_level=2)
    with torch.no_grad():
        assert torch.equal(engine.run([x])[0], net(x))


def test_float16_io_changes_buffers_not_arithmetic(build: Any) -> None:
    x = torch.randn(64, 7).half()
    narrow = build(Neuron(), [x], io="float16").run([x])[0]
    wide = build(Neuron(), [x.float()]).run([x.float()])[0]
    assert narrow.dtype == torch.float16
    assert torch.equal(narrow.float(), wide)


def test_hybrid_computes_its_cpu_part_in_float32(build: Any) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erf(torch.erf(x * 3)) * 3

    x = torch.linspace(-1, 1, 101)
    with pytest.warns(UserWarning, match="hybrid"):
        engine = build(Mixed(), [x], apu_only=False)
    h = (x.half() * 3).float()
    wanted = (torch.erf(torch.erf(h)).half() * 3).float()
    assert torch.equal(engine.run([x])[0], wanted)
    with pytest.warns(UserWarning, match="hybrid"):
        plain = build(Mixed(), [x], apu_only=False, optimise=False)
    assert torch.equal(plain.run([x])[0], wanted)
