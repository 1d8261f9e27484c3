"""What the compiler refuses, drops or puts on the CPU."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeport.targets.lynxi.simulator import LyngorError, SimulatorWarning, lyngor, options


class Five(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.unsqueeze(0).repeat(4, 1, 1, 1, 1)
        return (y * 2).mean(0)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def test_rank_5_is_refused_with_every_node_and_scope(build: Any) -> None:
    with pytest.raises(LyngorError) as error:
        build(Wrapped(Five()), [torch.zeros(2, 1, 3, 3)])
    text = str(error.value)
    assert "rank 4 (lyngor 1.1.0)" in text
    for op in ("aten::unsqueeze", "aten::repeat", "aten::mul", "aten::mean"):
        assert f"{op} -> " in text
    assert "[4, 2, 1, 3, 3] in inner" in text


class ShapesOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([x, x + 1])  # [2, N, C, H, W]
        y = torch.cat([y, y])
        return y.mean(0) + y[1] + y.flatten(0, 1)[:2]


def test_rank_5_from_1_17_in_the_named_operations_only(build: Any) -> None:
    x = torch.rand(2, 1, 3, 3)
    with pytest.raises(LyngorError, match="rank 4 "):
        build(ShapesOnly(), [x], version="1.16.9")
    engine = build(ShapesOnly(), [x], version="1.17.0", storage="float32")
    torch.testing.assert_close(engine.run([x])[0], ShapesOnly()(x))
    with pytest.raises(LyngorError) as error:
        build(Five(), [x], version="1.22.0")
    assert "aten::mul" in str(error.value)
    assert "aten::unsqueeze" not in str(error.value)


class FiveInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1) * 2


def test_rank_of_inputs_counts(build: Any) -> None:
    x = torch.rand(2, 2, 1, 3, 3)
    with pytest.raises(LyngorError, match="input 'x0'"):
        build(FiveInput(), [x])
    assert build(FiveInput(), [x], version="1.17").run([x])[0].shape == (4, 9)
    with pytest.raises(LyngorError, match="rank 4"):
        build(FiveInput(), [x[None]], version="1.17")


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for t in range(2):
            y[t] = x[t] + 1
        return y + x


def test_writes_are_dropped_with_a_warning(build: Any) -> None:
    x = torch.ones(2, 3)
    with pytest.warns(SimulatorWarning, match="in-place writes") as caught:
        engine = build(Wrapped(Writes()), [x])
    text = str(caught[0].message)
    assert text.count("aten::copy_ in inner") == 2
    assert "test_rules.py(" in text
    # Eager PyTorch says 3: the written 2 and x. The chip never sees the 2.
    assert Writes()(x).tolist() == [[3.0] * 3] * 2
    assert engine.run([x])[0].tolist() == [[1.0] * 3] * 2


def test_writes_are_an_error_when_strict(build: Any) -> None:
    with pytest.raises(LyngorError, match=r"(?s)in-place writes.*copy_.*copy_"):
        build(Writes(), [torch.ones(2, 3)], strict=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda y, x: y.fill_(7.0),
        lambda y, x: y.zero_(),
        lambda y, x: y.index_put_((torch.tensor([0]),), torch.tensor(7.0)),
        lambda y, x: y.masked_fill_(x > 0, 7.0),
    ],
)
def test_other_writes_are_dropped(write: Any, build: Any) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            write(y, x)
            return y

    x = torch.ones(3)
    with pytest.warns(SimulatorWarning, match="in-place writes"):
        engine = build(Net(), [x])
    assert engine.run([x])[0].tolist() == [2.0, 2.0, 2.0]


class Stale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        part = y[0]
        y.add_(1)
        return part * 1


def test_inplace_arithmetic_seen_through_a_view(build: Any) -> None:
    x = torch.ones(2, 2)
    assert Stale()(x).tolist() == [3.0, 3.0]
    with pytest.warns(SimulatorWarning, match=r"aten::add_.*reads the old value"):
        engine = build(Stale(), [x])
    assert engine.run([x])[0].tolist() == [2.0, 2.0]
    with pytest.raises(LyngorError, match="another name"):
        build(Stale(), [x], strict=True)


def test_inplace_arithmetic_whose_result_is_used_is_silent(build: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Hardtanh(0, 1, inplace=True))
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = build(net, [x], strict=True, storage="float32")
    torch.testing.assert_close(engine.run([x])[0], net(x).detach())


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Surrogate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Function.apply(x)


@pytest.mark.parametrize("apu_only", [True, False])
def test_autograd_functions_are_refused_by_name(apu_only: bool, build: Any) -> None:
    with pytest.raises(LyngorError, match=r"autograd.Function Function in inner"):
        build(Wrapped(Surrogate()), [torch.zeros(2)], apu_only=apu_only)


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(torch.erf(x), 0) + torch.sort(x)[0]


def test_unsupported_operations_are_all_listed(build: Any) -> None:
    with pytest.raises(LyngorError) as error:
        build(Wrapped(Unsupported()), [torch.rand(4)])
    for op in ("erf", "cumsum", "sort"):
        assert f"aten::{op} -> [4] in inner" in str(error.value)


def test_hybrid_partition_is_in_top_graph(tmp_path: Path, build: Any) -> None:
    x = torch.rand(4)
    with pytest.warns(SimulatorWarning, match=r"(?s)erf.*cumsum.*sort"):
        engine = build(Unsupported(), [x], apu_only=False, storage="float32")
    torch.testing.assert_close(engine.run([x])[0], Unsupported()(x))
    top = json.loads((tmp_path / "out/Net_0/top_graph.json").read_text())
    assert "aten::erf (aten::erf)" in top["cpu_0"]["operations"]
    assert top["apu_0"]["operations"] == ["aten::add (add)"]


def test_several_breaches_in_one_text(build: Any) -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = Function.apply(torch.erf(x)).unsqueeze(0)
            y[0] = 1.0
            return y

    with pytest.raises(LyngorError) as error:
        build(Bad(), [torch.rand(1, 2, 3, 4)], strict=True)
    for part in ("autograd.Function", "aten::erf", "rank 4", "in-place writes"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (nn.BatchNorm2d(2), "training mode; call net.eval()"),
        (nn.Dropout(0.5), "training mode; call net.eval()"),
        (nn.Conv3d(1, 1, 1), "3-dimensional convolution"),
        (nn.AdaptiveAvgPool2d(2), "sizes that divide"),
    ],
)
def test_what_no_build_takes(net: nn.Module, text: str) -> None:
    model = lyngor.DLModel()
    shape = (1, 1, 2, 3, 3) if isinstance(net, nn.Conv3d) else (2, 2, 3, 3)
    model.load(net.train(), "Pytorch", {"x": shape})
    with pytest.raises(LyngorError, match=r"cannot take") as error:
        lyngor.Builder().build(model.graph, model.params, out_path="unused")
    assert text in str(error.value)


def test_shape_that_depends_on_data(build: Any) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0].sum()

    with pytest.raises(LyngorError, match="depends on data"):
        build(Masked(), [torch.rand(3)])


def test_random_numbers_are_no_constants(build: Any) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(3)

    with pytest.raises(LyngorError, match="aten::rand"):
        build(Noisy(), [torch.rand(3)])


def test_network_that_does_not_run(build: Any) -> None:
    with pytest.raises(LyngorError, match=r"torch.jit.trace of Linear on zeros of shape \{x0: \[2"):
        build(nn.Linear(3, 3), [torch.zeros(2, 4)])


def test_failed_build_writes_nothing(tmp_path: Path) -> None:
    model = lyngor.DLModel()
    model.load(Five(), "Pytorch", {"x": (1, 1, 2, 2)})
    with options(), pytest.raises(LyngorError):
        lyngor.Builder().build(model.graph, model.params, out_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()
