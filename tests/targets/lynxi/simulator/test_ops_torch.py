"""Every operation against torch, in float32; and fast against plain, bit for bit, in float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any], *tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for i, t in enumerate(tensors):
            self.register_buffer(f"t{i}", t)
        self.count = len(tensors)

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x, *(getattr(self, f"t{i}") for i in range(self.count)))


def norm(features: int, cls: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    module: Any = cls(features)
    module.running_mean.copy_(torch.linspace(-0.3, 0.3, features))
    module.running_var.copy_(torch.linspace(0.4, 1.6, features))
    nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.uniform_(module.bias, -0.5, 0.5)
    return module


def grid(*shape: int) -> Tensor:
    """Values on a grid of eighths, so that equal ones and zeros occur."""
    return (torch.randn(*shape) * 4).round() / 8


IMAGE = (2, 4, 6, 6)
FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "add": (lambda x, y: x + y, [IMAGE, IMAGE]),
    "add_broadcast": (lambda x, y: x + y, [IMAGE, (4, 1, 1)]),
    "add_alpha": (lambda x, y: torch.add(x, y, alpha=0.3), [IMAGE, IMAGE]),
    "sub": (lambda x, y: x - y, [IMAGE, IMAGE]),
    "rsub": (lambda x: 1 - x, [IMAGE]),
    "mul": (lambda x, y: x * y * 0.1, [IMAGE, IMAGE]),
    "div": (lambda x, y: x / (y.abs() + 0.3), [IMAGE, IMAGE]),
    "floor_div": (lambda x: torch.div(x, 0.25, rounding_mode="floor"), [IMAGE]),
    "reciprocal": (lambda x: (x.abs() + 0.5).reciprocal(), [IMAGE]),
    "neg": (lambda x: -x, [IMAGE]),
    "abs": (lambda x: x.abs(), [IMAGE]),
    "pow": (lambda x: x**2, [IMAGE]),
    "square": (lambda x: x.square(), [IMAGE]),
    "sqrt": (lambda x: x.abs().sqrt(), [IMAGE]),
    "rsqrt": (lambda x: (x.abs() + 0.5).rsqrt(), [IMAGE]),
    "exp": (lambda x: x.exp(), [IMAGE]),
    "log": (lambda x: (x.abs() + 0.5).log(), [IMAGE]),
    "tanh": (lambda x: x.tanh(), [IMAGE]),
    "sigmoid": (lambda x: x.sigmoid(), [IMAGE]),
    "silu": (F.silu, [IMAGE]),
    "relu": (F.relu, [IMAGE]),
    "relu6": (lambda x: F.relu6(x * 20), [IMAGE]),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), [IMAGE]),
    "hardtanh": (F.hardtanh, [IMAGE]),
    "round": (lambda x: x.round(), [IMAGE]),
    "floor": (lambda x: x.floor(), [IMAGE]),
    "ceil": (lambda x: x.ceil(), [IMAGE]),
    "clamp": (lambda x: x.clamp(-0.5, 0.25), [IMAGE]),
    "clamp_min": (lambda x: x.clamp(min=0.1), [IMAGE]),
    "clamp_max": (lambda x: x.clamp(max=0.1), [IMAGE]),
    "clamp_tensor": (lambda x, y: x.clamp(max=y), [IMAGE, IMAGE]),
    "maximum": (torch.maximum, [IMAGE, IMAGE]),
    "minimum": (torch.minimum, [IMAGE, IMAGE]),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.25), [IMAGE, IMAGE]),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.5), [IMAGE, IMAGE]),
    "compare": (
        lambda x, y: torch.stack([(x > y), (x >= y), (x < y), (x <= y), (x == y), (x != y)], 0).sum(
            (0, 1)
        ),
        [(4, 6), (4, 6)],
    ),
    "compare_number": (lambda x: (x >= 0.3).to(x) + (x < 0).float() * 2, [IMAGE]),
    "bool_output": (lambda x, y: x > y, [IMAGE, IMAGE]),
    "bool_compared": (lambda x, y: (x > 0) == (y > 0), [IMAGE, IMAGE]),
    "bool_arithmetic": (lambda x, y: ((x > 0) + (y > 0)) * ((x > 0) * 3), [IMAGE, IMAGE]),
    "bool_to_int": (lambda x: (x > 0).int() + (x > 0.5).long(), [IMAGE]),
    "float_to_int": (lambda x: (x * 4).int() * 2, [IMAGE]),
    "float_to_bool": (lambda x: x.bool().float() * 2, [IMAGE]),
    "bool_minus": (lambda x: 1.0 - (x > 0).to(x), [IMAGE]),
    "logical": (
        lambda x, y: torch.logical_xor(
            torch.logical_and(x > 0, y > 0), torch.logical_not(torch.logical_or(x > 0, y > 0))
        ).float(),
        [IMAGE, IMAGE],
    ),
    "bitwise": (lambda x, y: ((x > 0) & (y > 0) | ~(x > 1)).float(), [IMAGE, IMAGE]),
    "where": (lambda x, y: torch.where(x > y, x, y), [IMAGE, IMAGE]),
    "where_zero": (lambda x: torch.where(x >= 0.25, 0.0, x), [IMAGE]),
    "where_number": (lambda x: torch.where(x >= 0.25, x, -1.5), [IMAGE]),
    "where_numbers": (lambda x: torch.where(x >= 0.25, 2.0, -1.5), [IMAGE]),
    "where_broadcast": (lambda x, y: torch.where(y > 0, 0.0, x), [IMAGE, (4, 1, 1)]),
    "where_broadcast_value": (lambda x, y: torch.where(x > 0, 0.0, y), [IMAGE, (4, 1, 1)]),
    "where_int": (lambda x: torch.where(x > 0, torch.tensor(3), torch.tensor(5)), [IMAGE]),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 0.5), [IMAGE]),
    "slice": (lambda x: x[:, 1:3, ::2, -4:], [IMAGE]),
    "narrow": (lambda x: x.narrow(1, 1, 2), [IMAGE]),
    "select": (lambda x: x[1] + x[-1], [IMAGE]),
    "chunk": (lambda x: x.chunk(3, 1)[1] + x.chunk(3, 1)[0], [(2, 6, 3)]),
    "split": (lambda x: x.split([1, 3], 1)[1], [IMAGE]),
    "split_even": (lambda x: x.split(3, 1)[1], [IMAGE]),
    "unbind": (lambda x: x.unbind(1)[2], [IMAGE]),
    "cat": (lambda x, y: torch.cat([x, y], 1), [IMAGE, (2, 3, 6, 6)]),
    "stack": (lambda x, y: torch.stack([x, y], -1), [(4, 6), (4, 6)]),
    "permute": (lambda x: x.permute(0, 2, 3, 1), [IMAGE]),
    "transpose": (lambda x: x.transpose(1, -1), [IMAGE]),
    "t": (lambda x: x.t() + 1, [(4, 6)]),
    "reshape": (lambda x: x.reshape(2, -1), [IMAGE]),
    "view_as": (lambda x, y: x.view_as(y) + y, [IMAGE, (8, 36)]),
    "flatten": (lambda x: x.flatten(1), [IMAGE]),
    "unflatten": (lambda x: x.unflatten(0, (2, -1)), [(8, 6)]),
    "squeeze": (lambda x: x.squeeze(1) + x.squeeze(), [(3, 1, 4)]),
    "unsqueeze": (lambda x: x.unsqueeze(0).unsqueeze(-1), [(4, 6)]),
    "expand": (lambda x: x.expand(3, -1, 6), [(4, 1)]),
    "repeat": (lambda x: x.repeat(4, 1, 1, 1), [IMAGE]),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1), value=0.3), [IMAGE]),
    "pad_reflect": (lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), [IMAGE]),
    "zeros_like": (lambda x: torch.zeros_like(x) + x, [IMAGE]),
    "ones": (lambda x: torch.ones(4, 1, 1) + x, [IMAGE]),
    "new_full": (lambda x: x.new_full((6,), 0.3) * x, [IMAGE]),
    "full_like": (lambda x: torch.full_like(x, 0.3) * x, [IMAGE]),
    "arange": (lambda x: x + torch.arange(6), [IMAGE]),
    "mean": (lambda x: x.mean((2, 3)), [IMAGE]),
    "mean_all": (lambda x: x.mean() + x.sum(), [IMAGE]),
    "mean_first": (lambda x: x.mean(0, keepdim=True), [IMAGE]),
    "sum": (lambda x: x.sum(-1), [IMAGE]),
    "amax": (lambda x: x.amax(1) + x.amin(1), [IMAGE]),
    "softmax": (lambda x: x.softmax(-1), [IMAGE]),
    "index": (lambda x: x[:, [2, 0, 3]], [IMAGE]),
    "index_select": (lambda x: x.index_select(1, torch.tensor([3, 3, 0])), [IMAGE]),
    "gather": (lambda x: x.gather(0, torch.zeros(1, 6, dtype=torch.long)), [(4, 6)]),
    "matmul": (torch.matmul, [(3, 4, 5), (3, 5, 2)]),
    "matmul_vector": (torch.matmul, [(4, 5), (5,)]),
    "bmm": (torch.bmm, [(3, 4, 5), (3, 5, 2)]),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2), [(2,), (4, 5), (5, 2)]),
    "conv_two_inputs": (F.conv2d, [IMAGE, (3, 4, 3, 3)]),
    "max_pool_negative": (lambda x: F.max_pool2d(x - 9, 2), [IMAGE]),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), [IMAGE]),
    "bilinear": (
        lambda x: F.interpolate(x, size=(9, 11), mode="bilinear", align_corners=False),
        [IMAGE],
    ),
    "bilinear_corners": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        [IMAGE],
    ),
    "inplace_used": (lambda x: (x * 2).add_(1).relu_().mul_(0.5), [IMAGE]),
}

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 5, 3, padding=1), IMAGE),
    "conv_strided": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=2),
        (2, 4, 9, 9),
    ),
    "conv_grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), IMAGE),
    "conv_depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), IMAGE),
    "conv_one_channel": (lambda: nn.Conv2d(1, 4, 3, padding=1), (2, 1, 6, 6)),
    "conv_pointwise": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 1, 1)),
    "conv_same": (lambda: nn.Conv2d(4, 5, (2, 4), padding="same"), IMAGE),
    "conv_reflect": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv_no_batch": (lambda: nn.Conv2d(4, 5, 3), (4, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, stride=2, padding=1), (2, 4, 9)),
    "linear": (lambda: nn.Linear(6, 3), (2, 5, 6)),
    "linear_no_bias": (lambda: nn.Linear(6, 3, bias=False), (4, 6)),
    "conv_norm": (lambda: nn.Sequential(nn.Conv2d(4, 5, 3), norm(5)), IMAGE),
    "linear_norm": (lambda: nn.Sequential(nn.Linear(6, 5), norm(5, nn.BatchNorm1d)), (4, 6)),
    "norm_alone": (lambda: norm(4), IMAGE),
    "norm_first": (lambda: nn.Sequential(norm(4), nn.Conv2d(4, 5, 3)), IMAGE),
    "max_pool": (lambda: nn.MaxPool2d(2), IMAGE),
    "max_pool_odd": (lambda: nn.MaxPool2d(3, stride=1, dilation=2), (2, 4, 7, 7)),
    "max_pool_padded": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    "max_pool_one": (lambda: nn.MaxPool2d(1, 2), IMAGE),
    "avg_pool": (lambda: nn.AvgPool2d(2), IMAGE),
    "avg_pool_padded": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((3, 1)), IMAGE),
    "layer_norm": (lambda: nn.LayerNorm(6), IMAGE),
    "layer_norm_plain": (lambda: nn.LayerNorm(6, elementwise_affine=False), IMAGE),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Identity()), IMAGE),
}


def _case(name: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    if name in MODULES:
        make, shape = MODULES[name]
        return make().eval(), [grid(*shape)]
    function, shapes = FUNCTIONS[name]
    return Call(function), [grid(*s) for s in shapes]


def _outputs(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_float32_is_torch(name: str, build: Any) -> None:
    net, inputs = _case(name)
    with torch.no_grad():
        wanted = _outputs(net(*[x.clone() for x in inputs]))
    for optimise in (True, False):
        got = build(net, inputs, storage="float32", optimise=optimise).run(inputs)
        for g, w in zip(got, wanted, strict=True):
            assert g.shape == w.shape
            assert g.dtype == (torch.uint8 if w.dtype == torch.bool else w.dtype)
            torch.testing.assert_close(g, w.to(g.dtype), rtol=1e-5, atol=1e-5)


def bits(x: Tensor) -> bytes:
    return x.numpy().tobytes()


@pytest.mark.parametrize("accumulate", ["float32", "float16"])
@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_fast_is_plain(name: str, accumulate: str, build: Any) -> None:
    net, inputs = _case(name)
    fast = build(net, inputs, accumulate=accumulate).run(inputs)
    plain = build(net, inputs, accumulate=accumulate, optimise=False).run(inputs)
    for f, p in zip(fast, plain, strict=True):
        assert bits(f) == bits(p)


def test_hybrid_ops_are_torch(build: Any) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), nn.GELU())
    x = grid(*IMAGE)
    with torch.no_grad():
        wanted = net(x)
    with pytest.warns(UserWarning, match=r"(?s)hybrid.*gelu"):
        engine = build(net, [x], storage="float32", apu_only=False)
    torch.testing.assert_close(engine.run([x])[0], wanted, rtol=1e-5, atol=1e-5)


def test_embedding_of_integer_input(build: Any) -> None:
    net = nn.Embedding(10, 4)
    index = torch.tensor([[1, 2], [9, 0]])
    engine = build(net, [index], storage="float32")
    assert engine.graph.inputs[0].dtype == "int64"
    assert torch.equal(engine.run([index])[0], net(index).detach())


def test_several_outputs_and_a_shared_weight(build: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer(self.layer(x))

    net = Twice()
    layer = net.layer
    x = grid(2, 4)
    engine = build(net, [x], storage="float32")
    one, two = engine.run([x])
    torch.testing.assert_close(one, layer(x).detach())
    torch.testing.assert_close(two, layer(layer(x)).detach())
    weights = [n for n in engine.graph.nodes if n.op == "const" and n.shape == (4, 4)]
    assert len(weights) == 1


def test_half_network_is_read(build: Any) -> None:
    net = nn.Conv2d(1, 2, 3).half()
    x = grid(1, 1, 5, 5).half()
    engine = build(net, [x], io="float16")
    with torch.no_grad():
        wanted = F.conv2d(x.float(), net.weight.float(), net.bias.float()).half()
    assert torch.equal(engine.run([x])[0], wanted)
