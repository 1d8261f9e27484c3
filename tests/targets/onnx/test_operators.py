"""Every operator of the table, run by ONNX Runtime, against torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikeport import deploy
from spikeport.converters.builder import Builder
from spikeport.converters.capture import capture
from spikeport.converters.ops import aten
from spikeport.converters.passes import decompose_operators
from spikeport.converters.program import PassReport, Program, TensorSpec, short
from spikeport.targets.onnx.export import OPSETS, export
from spikeport.targets.onnx.operators import OPERATORS

Case = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]

torch.manual_seed(0)
W = {
    "conv": torch.randn(6, 2, 3, 3),
    "conv1": torch.randn(6, 4, 3),
    "conv3": torch.randn(3, 2, 2, 2, 2),
    "up": torch.randn(4, 3, 3, 3),
    "up1": torch.randn(4, 2, 3),
    "up3": torch.randn(2, 3, 2, 2, 2),
    "linear": torch.randn(5, 10),
    "bias": torch.randn(5),
    "matrix": torch.randn(10, 7),
    "scale": torch.rand(4) + 0.5,
    "shift": torch.randn(4),
    "mean": torch.randn(4),
    "var": torch.rand(4) + 0.5,
    "norm": torch.randn(10),
    "index": torch.tensor([3, 0, 2]),
    "twice": torch.tensor([3, 0, 2, 3]),
    "bool": torch.rand(3, 4, 9, 10) > 0.5,
    "other": torch.randn(4, 1, 10),
    "exponent": torch.randint(0, 4, (10,)).float(),
}


# x is [3, 4, 9, 10], normal; names are for the failure's message.
def both(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Values and places in one tensor."""
    return parts[0] + parts[1]


CASES: dict[str, Case] = {
    "add": lambda x, w: torch.add(x, w["other"], alpha=2.5),
    "add_scalar": lambda x, w: x + 1.5,
    "sub": lambda x, w: x - w["other"],
    "rsub": lambda x, w: 1.0 - x,
    "mul_bool": lambda x, w: x * w["bool"],
    "div": lambda x, w: x / w["scale"].reshape(4, 1, 1),
    "div_floor": lambda x, w: torch.div(x, 0.3, rounding_mode="floor"),
    "div_trunc": lambda x, w: torch.div(x, 0.3, rounding_mode="trunc"),
    "div_whole": lambda x, w: (10 * x).int().div(-3, rounding_mode="trunc"),
    "floor_divide": lambda x, w: x // -0.3 + x // w["scale"].reshape(4, 1, 1),
    "fmod": lambda x, w: x.fmod(0.3) + x.fmod(w["other"]),
    "remainder": lambda x, w: x % 0.3 + x % -0.3 + x % w["other"],
    "square": lambda x, w: x**2,
    "cube": lambda x, w: x**3.0,
    "power": lambda x, w: x.abs() ** w["exponent"],
    "maximum": lambda x, w: torch.maximum(x, w["other"]),
    "minimum": lambda x, w: torch.minimum(x, w["other"]),
    "neg": lambda x, w: -x,
    "abs": lambda x, w: x.abs(),
    "sign": lambda x, w: x.sign(),
    "exp": lambda x, w: x.exp(),
    "log": lambda x, w: x.abs().log(),
    "sqrt": lambda x, w: x.abs().sqrt(),
    "rsqrt": lambda x, w: (x.abs() + 1).rsqrt(),
    "reciprocal": lambda x, w: (x.abs() + 1).reciprocal(),
    "sin": lambda x, w: x.sin(),
    "cos": lambda x, w: x.cos(),
    "erf": lambda x, w: x.erf(),
    "floor": lambda x, w: x.floor(),
    "ceil": lambda x, w: x.ceil(),
    "round": lambda x, w: (x * 2).round(),
    "trunc": lambda x, w: (x * 2).trunc(),
    "sigmoid": lambda x, w: x.sigmoid(),
    "tanh": lambda x, w: x.tanh(),
    "relu": lambda x, w: x.relu(),
    "leaky_relu": lambda x, w: F.leaky_relu(x, 0.2),
    "silu": lambda x, w: F.silu(x),
    "gelu": lambda x, w: F.gelu(x),
    "gelu_tanh": lambda x, w: F.gelu(x, approximate="tanh"),
    "elu": lambda x, w: F.elu(x, 0.5),
    "softplus": lambda x, w: F.softplus(8 * x),
    "mish": lambda x, w: F.mish(x),
    "prelu": lambda x, w: F.prelu(x, w["shift"]),
    "hardsigmoid": lambda x, w: F.hardsigmoid(4 * x),
    "hardswish": lambda x, w: F.hardswish(4 * x),
    "hardtanh": lambda x, w: F.hardtanh(x, -0.5, 0.7),
    "clamp": lambda x, w: x.clamp(-0.5, 0.7),
    "clamp_high": lambda x, w: x.clamp(max=0.7),
    "clamp_tensor": lambda x, w: x.clamp(w["other"]),
    "clamp_min": lambda x, w: torch.clamp_min(x, 0.1),
    "clamp_max": lambda x, w: torch.clamp_max(x, 0.1),
    "ge": lambda x, w: x.round() >= 1,
    "ge_tensor": lambda x, w: x >= w["other"],
    "gt": lambda x, w: x.round() > 1,
    "gt_tensor": lambda x, w: x > w["other"],
    "le": lambda x, w: x.round() <= 1,
    "le_tensor": lambda x, w: x <= w["other"],
    "lt": lambda x, w: x.round() < 1,
    "lt_tensor": lambda x, w: x < w["other"],
    "eq": lambda x, w: x.round() == 1,
    "eq_tensor": lambda x, w: x.round() == w["other"].round(),
    "ne": lambda x, w: x.round() != 1,
    "ne_tensor": lambda x, w: x.round() != w["other"].round(),
    "logical": lambda x, w: torch.logical_and(x > 0, w["bool"]) ^ torch.logical_not(w["bool"]),
    "logical_or": lambda x, w: torch.logical_or(x > 0, w["bool"]),
    "logical_xor": lambda x, w: torch.logical_xor(x > 0, w["bool"]),
    "bits": lambda x, w: ~((x > 0) & w["bool"]) | (x > 1) ^ w["bool"],
    "bitwise_and": lambda x, w: torch.bitwise_and(x > 0, w["bool"]),
    "bitwise_or": lambda x, w: torch.bitwise_or(x > 0, w["bool"]),
    "bitwise_xor": lambda x, w: torch.bitwise_xor(x > 0, w["bool"]),
    "where": lambda x, w: torch.where(x > 0, x, w["other"]),
    "where_left": lambda x, w: torch.where(x > 0, 2.0, x),
    "where_right": lambda x, w: torch.where(x > 0, x, 2.0),
    "where_scalars": lambda x, w: torch.where(x > 0, 1.0, 2.0),
    "to": lambda x, w: (x > 0).to(torch.int32) + 1,
    "conv2d": lambda x, w: F.conv2d(x, w["conv"], None, (2, 1), (0, 2), (1, 2), 2),
    "conv1d": lambda x, w: F.conv1d(x[:, :, 0], w["conv1"], w["mean"].repeat(2)[:6], 2, 1),
    "conv3d": lambda x, w: F.conv3d(x.reshape(3, 2, 2, 9, 10), w["conv3"], padding=1),
    "conv_transpose2d": lambda x, w: F.conv_transpose2d(x, w["up"], None, 2, 1, 1),
    "conv_transpose1d": lambda x, w: F.conv_transpose1d(x[:, :, 0], w["up1"], None, 3),
    "conv_transpose3d": lambda x, w: F.conv_transpose3d(x.reshape(3, 2, 2, 9, 10), w["up3"]),
    "linear": lambda x, w: F.linear(x, w["linear"], w["bias"]),
    "linear_rows": lambda x, w: F.linear(x[:, 0, 0], w["linear"], w["bias"]),
    "linear_computed": lambda x, w: F.linear(x, x[0, 0, :5]),
    "matmul": lambda x, w: x @ w["matrix"],
    "bmm": lambda x, w: torch.bmm(x[0], x[1].transpose(1, 2)),
    "mm": lambda x, w: torch.mm(x[0, 0], w["matrix"]),
    "addmm": lambda x, w: torch.addmm(w["norm"][:7], x[0, 0], w["matrix"], beta=0.5, alpha=2),
    "batch_norm": lambda x, w: F.batch_norm(x, w["mean"], w["var"], w["scale"], w["shift"]),
    "batch_norm_plain": lambda x, w: F.batch_norm(x, w["mean"], w["var"]),
    "layer_norm": lambda x, w: F.layer_norm(x, (10,), w["norm"], w["norm"]),
    "layer_norm_plain": lambda x, w: F.layer_norm(x, (9, 10)),
    "group_norm": lambda x, w: F.group_norm(x, 2, w["scale"], w["shift"]),
    "instance_norm": lambda x, w: F.instance_norm(x, None, None, w["scale"], w["shift"]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x[:, :, :5], x[:, :, :5]),
    "attention_causal": lambda x, w: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention_masked": lambda x, w: F.scaled_dot_product_attention(
        x, x, x, torch.ones(9, 9, dtype=torch.bool).tril(2), scale=0.5
    ),
    "unfold": lambda x, w: F.unfold(x, (3, 2), 1, (1, 0), 2),
    "einsum": lambda x, w: torch.einsum("nchw,wk->nkhc", x, w["matrix"]),
    "softmax": lambda x, w: x.softmax(1),
    "log_softmax": lambda x, w: x.log_softmax(-1),
    "max_pool1d": lambda x, w: F.max_pool1d(x[:, :, 0], 3, 2, 1),
    "max_pool2d": lambda x, w: F.max_pool2d(x, 3, 2, 1, dilation=2),
    "max_pool2d_ceil": lambda x, w: F.max_pool2d(x, 2, 2, 1, ceil_mode=True),
    "max_pool3d": lambda x, w: F.max_pool3d(x.reshape(3, 2, 2, 9, 10), 2),
    "avg_pool1d": lambda x, w: F.avg_pool1d(x[:, :, 0], 5),
    "avg_pool2d": lambda x, w: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d_ceil": lambda x, w: F.avg_pool2d(x, (4, 3), 3, 1, ceil_mode=True),
    "avg_pool2d_excluded": lambda x, w: F.avg_pool2d(x, 4, 3, 1, True, count_include_pad=False),
    "avg_pool2d_divisor": lambda x, w: F.avg_pool2d(x, 3, 2, 1, divisor_override=4),
    "avg_pool3d": lambda x, w: F.avg_pool3d(x.reshape(3, 2, 2, 9, 10), 2),
    "adaptive_avg_pool2d": lambda x, w: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d_even": lambda x, w: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive_avg_pool2d_uneven": lambda x, w: F.adaptive_avg_pool2d(x, (7, 12)),
    "adaptive_avg_pool1d": lambda x, w: F.adaptive_avg_pool1d(x[:, :, 0], 5),
    "adaptive_avg_pool3d": lambda x, w: F.adaptive_avg_pool3d(x.reshape(3, 2, 2, 9, 10), 1),
    "adaptive_max_pool2d": lambda x, w: F.adaptive_max_pool2d(x, (3, 5)),
    "adaptive_max_pool3d": lambda x, w: F.adaptive_max_pool3d(x.reshape(3, 2, 2, 9, 10), 1),
    "nearest": lambda x, w: F.interpolate(x, (27, 20)),
    "nearest_scaled": lambda x, w: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x, w: F.interpolate(x, (13, 21), mode="bilinear"),
    "bilinear_corners": lambda x, w: F.interpolate(x, (4, 5), mode="bilinear", align_corners=True),
    "reshape": lambda x, w: x.reshape(12, 90),
    "unsqueeze": lambda x, w: x.unsqueeze(2).squeeze(2).unsqueeze(-1),
    "permute": lambda x, w: x.permute(0, 2, 3, 1),
    "transpose": lambda x, w: x.transpose(-1, 1),
    "slice": lambda x, w: x[:, 1:3, ::2, -4:],
    "select": lambda x, w: x[:, -1],
    "index_select": lambda x, w: torch.index_select(x, 1, w["index"]),
    "index": lambda x, w: x[:, w["index"]],
    "embedding": lambda x, w: F.embedding((x[:, 0] > 0).sum(1), w["matrix"]),
    "masked_fill": lambda x, w: x.masked_fill(w["bool"], 0.5),
    "flip": lambda x, w: x.flip(1, 3),
    "roll": lambda x, w: x.roll((1, -2), (1, 3)) + x.roll(5),
    "circular": lambda x, w: F.pad(x, (1, 2, 3, 0), mode="circular"),
    "pixel_shuffle": lambda x, w: F.pixel_shuffle(x, 2),
    "tril": lambda x, w: x.tril(1) + x.triu(),
    "cat": lambda x, w: torch.cat([x, x > 0], -1),
    "stack": lambda x, w: torch.stack([x, 2 * x], 1),
    "expand": lambda x, w: x[:, :1].expand(3, 6, 9, 10),
    "repeat": lambda x, w: x.repeat(2, 1, 2, 1, 1),
    "pad": lambda x, w: F.pad(x, (1, 2, 0, 3), value=0.5),
    "reflect": lambda x, w: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "replicate": lambda x, w: F.pad(x, (1, 2, 3, 0), mode="replicate"),
    "mean": lambda x, w: x.mean((1, -1)),
    "mean_all": lambda x, w: x.mean(),
    "sum_bools": lambda x, w: (x > 0).sum((0, 2), keepdim=True),
    "sum_all": lambda x, w: x.sum(),
    "amax": lambda x, w: x.amax((2, 3), keepdim=True),
    "max": lambda x, w: x + x.max(),
    "norm": lambda x, w: torch.norm(x, dim=(1, 2)),
    "norm_1": lambda x, w: torch.norm(x, p=1, dim=3, keepdim=True),
    "amin": lambda x, w: x.amin(1),
    "max_values": lambda x, w: x.max(2)[0],
    "std": lambda x, w: x.std((2, 3)) + torch.std(x, (2, 3), correction=2),
    "logsumexp": lambda x, w: x.logsumexp((1, 2), keepdim=True),
    "prod": lambda x, w: x.prod(2),
    "cumsum": lambda x, w: x.cumsum(-1),
    "argmax": lambda x, w: x.argmax(1),
    "argmin": lambda x, w: x.argmin(1),
    "max_dim": lambda x, w: both(x.max(1)),
    "min_dim": lambda x, w: both(x.min(2, keepdim=True)),
    "topk": lambda x, w: both(x.topk(3, 1)),
    "topk_smallest": lambda x, w: both(x.topk(3, largest=False)),
    "sort": lambda x, w: both(x.sort(1)),
    "sort_stable": lambda x, w: both(x.round().sort(dim=-1, descending=True, stable=True)),
    "argsort": lambda x, w: x.argsort(-1),
    "gather": lambda x, w: x.gather(1, x.argsort(1)[:, :2]),
    "scatter_value": lambda x, w: x.scatter(1, x.topk(2, 1)[1], 0.5),
    "scatter": lambda x, w: x.scatter(-1, x.argsort(-1)[:, :2, :, :3], 2 * x),
    "median": lambda x, w: both(x.median(1)),
    "kthvalue": lambda x, w: both(x.kthvalue(2, -1, keepdim=True)),
    "windows": lambda x, w: x.unfold(2, 4, 2),
    "msort": lambda x, w: x.flatten().msort()[5],
    "adaptive_max_pool_uneven": lambda x, w: F.adaptive_max_pool2d(x, (4, 3)),
    "max_pool_indices": lambda x, w: F.max_pool1d(x[0], 3, return_indices=True)[0],
    "var_mean": lambda x, w: sum(torch.var_mean(x, -1)) - torch.std_mean(x, 3, correction=2)[0],
    "hypot": lambda x, w: torch.hypot(x, w["other"]),
    "copysign": lambda x, w: x.copysign(-0.0 * w["other"]) + x.copysign(-2.0),
    "isnan": lambda x, w: (x.round() / x.round()).isnan(),
    "exponential": lambda x, w: 2**x + x.exp2(),
    "logarithms": lambda x, w: x.abs().log2() + x.abs().log10() + x.abs().log1p(),
    "softplus_beta": lambda x, w: F.softplus(x, 2.0, 1.5) + F.softplus(x, 0.5),
    "logaddexp": lambda x, w: torch.logaddexp(x.round(), w["other"].round()),
    "infinite": lambda x, w: (x / 0).isinf() & (x / 0).isposinf() ^ (x / 0).isneginf(),
    "finite": lambda x, w: (1 / x.round()).isfinite(),
    "whole_division": lambda x, w: (x * 9).int() // 4 + (x * 9).int() // -3,
    "whole_division_int64": lambda x, w: (x * 9).long() // 7 + (x * 9).long() % -3,
    "fmax": lambda x, w: torch.fmax(0 / x.round(), x) + torch.fmin(x, w["other"]),
    "round_decimals": lambda x, w: x.round(decimals=2) + (x * 100).round(decimals=-1),
    "norm_inf": lambda x, w: F.normalize(x, p=torch.inf) + torch.linalg.vector_norm(x, -torch.inf),
    "norm_3": lambda x, w: torch.linalg.vector_norm(x, 3, (1, 2)),
    "norm_0": lambda x, w: torch.linalg.vector_norm(x.round(), 0, 3),
    "prod_all": lambda x, w: x[0, 0, 0].prod(),
    "batch_norm_own": lambda x, w: F.batch_norm(x, None, None, w["scale"], None, training=True),
    "nearest_uneven": lambda x, w: (
        F.interpolate(x, (4, 17)) + F.interpolate(x, (4, 17), mode="nearest-exact")
    ),
    "nearest_by_a_factor": lambda x, w: F.interpolate(x, scale_factor=1.7),
    "bilinear_by_a_factor": lambda x, w: F.interpolate(x, scale_factor=1.3, mode="bilinear"),
    "bicubic": lambda x, w: F.interpolate(x, (13, 4), mode="bicubic"),
    "bicubic_corners": lambda x, w: F.interpolate(x, (4, 13), mode="bicubic", align_corners=True),
    "bicubic_by_a_factor": lambda x, w: F.interpolate(x, scale_factor=1.3, mode="bicubic"),
    "adaptive_avg_pool3d_uneven": lambda x, w: F.adaptive_avg_pool3d(x[:, None], (3, 4, 7)),
    "fold": lambda x, w: F.fold(F.unfold(x, (3, 2), 1, 1, 2), (9, 10), (3, 2), 1, 1, 2),
    "diagonal": lambda x, w: x.diagonal(1, -1, 2) + x.diagonal(-2, 2, 3)[..., :1],
    "index_add": lambda x, w: x.index_add(1, w["twice"], 2 * x, alpha=0.5),
    "index_copy": lambda x, w: x.index_copy(-1, w["index"], 2 * x[..., :3]),
    "index_fill": lambda x, w: x.index_fill(2, w["index"], 0.5),
    "asinh": lambda x, w: x.asinh() + (x.abs() + 1).acosh() + (x.tanh() / 2).atanh(),
    "erfc": lambda x, w: x.erfc(),
    "tan": lambda x, w: x.tan() + x.clamp(-1, 1).asin() + x.clamp(-1, 1).acos() + x.atan(),
    "sinh": lambda x, w: x.sinh() + x.cosh(),
    "var": lambda x, w: x.var((2, 3)),
    "var_biased": lambda x, w: torch.var(x, 1, unbiased=False, keepdim=True),
    "var_corrected": lambda x, w: torch.var(x, (1, 2), correction=2),
}

#: In the table because torch may write an operator so; none of the cases makes it do that.
SPELLINGS = {
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.rsub.Tensor,
    aten._softmax.default,
    aten._log_softmax.default,
    aten._adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.default,
    aten.squeeze.default,
    aten.squeeze.dims,
}
#: Of later opsets than the oldest, at which all cases run.
LATER = {aten.scatter_add.default}


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in W.items():
            self.register_buffer(f"w_{name}", value)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = {name: getattr(self, f"w_{name}") for name in W}
        return {name: case(x, weights) for name, case in CASES.items()}


def run(file: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


@pytest.fixture(scope="module")
def everything() -> Program:
    captured = capture(Everything(), (torch.randn(3, 4, 9, 10),))
    return decompose_operators({*map(short, OPERATORS)})(captured)


@pytest.mark.parametrize("opset", [13, 17, 18, 22])
def test_every_case(everything: Program, opset: int, tmp_path: Path) -> None:
    x = torch.randn(3, 4, 9, 10)
    (file,) = export(everything, tmp_path / "model.onnx", opset)
    for name, expected, found in zip(CASES, everything.run((x,)), run(file, x), strict=True):
        assert found.dtype == expected.dtype, name
        assert found.shape == expected.shape, name
        if expected.is_floating_point():
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(found, expected), name


def test_the_cases_cover_the_table(everything: Program) -> None:
    covered = {n.target for n in everything.nodes("call_function")}
    assert set(OPERATORS) - covered == SPELLINGS | LATER


def test_sums_of_what_is_written_to_one_place_need_opset_16(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(2, 3).scatter_add(1, x.argsort(1) % 3, x)

    x = torch.randn(2, 7)
    program = capture(Net(), (x,))
    (file,) = export(program, tmp_path / "model.onnx", 16)
    torch.testing.assert_close(run(file, x)[0], Net()(x))
    with pytest.raises(deploy.UnsupportedError, match="scatter_add before opset 16"):
        export(program, tmp_path / "older.onnx", 15)


def test_other_spellings(tmp_path: Path) -> None:
    """Operators that capture writes otherwise, put into a graph by hand."""
    x = torch.randn(2, 4, 6, 6)
    spelled: dict[Any, tuple[Any, ...]] = {
        aten.add.Scalar: (1.5,),
        aten.sub.Scalar: (1.5,),
        aten.mul.Scalar: (1.5,),
        aten.div.Scalar: (1.5,),
        aten._softmax.default: (1, False),
        aten._log_softmax.default: (1, False),
        aten._adaptive_avg_pool2d.default: ([3, 2],),
        aten.upsample_nearest2d.default: ([12, 18],),
        aten.upsample_bilinear2d.default: ([9, 7], False),
        aten.squeeze.default: (),
        aten.squeeze.dims: ([0, 1],),
        aten.constant_pad_nd.default: ([1, 2], 0.5),
    }
    base = capture(nn.Sequential(nn.Identity(), nn.ReLU()), (x,))
    build = Builder(base)
    start = build.placeholder(next(base.nodes("placeholder")), x)
    results = [build.call(target, start, *rest, path="") for target, rest in spelled.items()]
    row = build.call(
        aten.select.int, build.call(aten.select.int, start, 0, 0, path=""), 0, 0, path=""
    )
    results.append(build.call(aten.rsub.Tensor, start, row, path=""))
    assert {n.target for n in build.graph.nodes} >= SPELLINGS
    outputs = [
        TensorSpec(f"y{i}", tuple(r.meta["val"].shape), torch.float32)
        for i, r in enumerate(results)
    ]
    program = build.finish(results, PassReport("by hand"), outputs=tuple(outputs))
    (file,) = export(program, tmp_path / "model.onnx", 17)
    for n, expected, found in zip(results, program.run((x,)), run(file, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=str(n.target))


def test_what_onnx_cannot_say_is_refused_all_of_it(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bits = (x > 0).to(torch.int32) & 1
            return x.mode(-1, True)[0] + bits + x.erfinv()

    findings = deploy.check(Net(), (torch.randn(2, 3, 3, 3),), ["onnx"])
    assert {f.found for f in findings} >= {"aten.mode", "aten.erfinv"}
    program = capture(Net(), (torch.randn(2, 3, 3, 3),))
    with pytest.raises(deploy.UnsupportedError) as refused:
        export(program, tmp_path / "model.onnx", 17)
    text = str(refused.value)
    for part in ("aten.mode.default", "aten.erfinv.default", "aten.__and__.Scalar"):
        assert part in text
    assert not list(tmp_path.iterdir())
    assert OPSETS[0] == 13
