"""The verification finds wrong conversions, names their layer, and lets right ones pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from spikeport.converters.builder import Builder
from spikeport.converters.capture import capture
from spikeport.converters.errors import MismatchError, UnsupportedError
from spikeport.converters.neurons import IFNode, LIFNode, ParametricLIFNode
from spikeport.converters.ops import aten
from spikeport.converters.passes import lower_neurons as lowering
from spikeport.converters.probes import probe_inputs
from spikeport.converters.program import PassReport, Program, where
from spikeport.converters.rounding import _perturbed
from spikeport.converters.verify import VerificationEvidence, to_threshold
from spikeport.deploy.pipeline import convert
from spikeport.targets.lynxi import Lynxi

T, N = 4, 2
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16"])


class Net(nn.Module):
    """Convolutions, norms, a residual, three kinds of neuron."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-3)
        self.spike1 = LIFNode(v_reset=-0.3)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.spike2 = IFNode(v_reset=None)
        self.fc, self.spike3 = nn.Linear(6 * 16, 10), ParametricLIFNode()
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 3)
            nn.init.uniform_(norm.bias, 0.2, 1)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.05, 2)
        self.eval()

    def each(self, f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return f(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.spike1(self.each(lambda y: self.norm1(self.conv1(y)), x))
        x = x + self.spike2(self.each(lambda y: self.norm2(self.conv2(y)), x))
        x = self.each(lambda y: nn.functional.max_pool2d(y, 2), x)
        return self.spike3(self.fc(x.flatten(2))).mean(0)


class Run(nn.Module):
    """What a function makes of spikes."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.lif, self.run = LIFNode(), run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.run(self.lif(x))
        return made


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


X = rand(T, N, 2, 8, 8)


def sabotage(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Program], Program], after: str
) -> None:
    """Put a wrong rewrite behind one of the target's passes."""
    passes = Lynxi.passes

    def with_sabotage(self: Lynxi, dtype: torch.dtype) -> tuple[Any, ...]:
        chosen = list(passes(self, dtype))
        at = [p.__name__ for p in chosen].index(after)
        return (*chosen[: at + 1], wrong, *chosen[at + 1 :])

    monkeypatch.setattr(Lynxi, "passes", with_sabotage)


def rewritten(
    change: Callable[[Builder, Any, dict[Any, Any]], Any], at: str
) -> Callable[[Program], Program]:
    """A pass that changes the nodes of one module and operator, ``"path operator"``."""
    path, _, operator = at.partition(" ")

    def wrong(program: Program) -> Program:
        build = Builder(program)
        env: dict[Any, Any] = {}
        hits = 0
        for n in program.graph.nodes:
            if n.op == "placeholder":
                env[n] = build.placeholder(n, n.meta["val"])
            elif n.op == "call_function" and (where(n), n.target._opname) == (path, operator):
                env[n], hits = change(build, n, env), hits + 1
            elif n.op != "output":
                env[n] = build.copy(n, env)
        assert hits
        return build.finish([env[r] for r in program.results], PassReport("wrong"))

    return wrong


def replaced(position: int, value: Callable[[Any], Any]) -> Callable[..., Any]:
    """The same node with another argument."""

    def change(build: Builder, n: Any, env: dict[Any, Any]) -> Any:
        args = [env.get(a, a) if isinstance(a, torch.fx.Node) else a for a in n.args]
        args[position] = value(args[position])
        return build.call(n.target, *args, path=where(n), **n.kwargs)

    return change


def with_tensor(
    position: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[..., Any]:
    """The same node with another weight."""

    def apply(build: Builder, n: Any, env: dict[Any, Any]) -> Any:
        args = [env.get(a, a) if isinstance(a, torch.fx.Node) else a for a in n.args]
        name = n.args[position].target
        args[position] = build.constant(f"{name}_wrong", change(build.program.tensor(name)))
        return build.call(n.target, *args, path=where(n), **n.kwargs)

    return apply


def one_step_late(build: Builder, n: Any, env: dict[Any, Any]) -> Any:
    """A neuron whose drive of each step is the one of the step before."""
    x, path = env[n.args[0]], where(n)
    rows = x.meta["val"].shape[0]
    first = build.call(aten.slice.Tensor, x, 0, 0, N, path=path)
    rest = build.call(aten.slice.Tensor, x, 0, 0, rows - N, path=path)
    late = build.call(aten.cat.default, [first, rest], 0, path=path)
    params = [env[p] for p in n.args[1]]
    return build.call(n.target, late, params, *n.args[2:], path=path)


BEHIND = {"norm1": "spike1", "conv1": "spike1", "norm2": "spike2", "conv2": "spike2"}
SABOTAGE = {
    "a norm without eps": ("norm1 batch_norm", replaced(7, lambda _: 0.0)),
    "a norm without beta": ("norm2 batch_norm", replaced(2, lambda _: None)),
    "a norm without mean": ("norm2 batch_norm", with_tensor(3, torch.zeros_like)),
    "a norm's channels permuted": ("norm1 batch_norm", with_tensor(1, lambda t: t.roll(1))),
    "a layer without bias": ("conv2 conv2d", replaced(2, lambda _: None)),
    "input channels permuted": ("conv1 conv2d", with_tensor(1, lambda w: w.flip(1))),
    "a kernel transposed": ("conv2 conv2d", with_tensor(1, lambda w: w.mT.contiguous())),
    "features permuted": ("fc linear", with_tensor(1, lambda w: w.roll(1, 1))),
    "a residual dropped": (" add", lambda build, n, env: env[n.args[1]]),
    "one step late": ("spike2 neuron", one_step_late),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in SABOTAGE),
        *((name, "float16") for name in list(SABOTAGE)[::4]),
        ("one step late", "float16"),
    ],
)
def test_a_wrong_rewrite_is_found_and_named(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, change = SABOTAGE[name]
    path = at.partition(" ")[0]
    layer = path if path.startswith("spike") else BEHIND.get(path, "spike3")
    sabotage(monkeypatch, rewritten(change, at), "flatten_time")
    with pytest.raises(MismatchError) as caught:
        convert(Net(), (X,), "lynxi-sim", dtype=dtype)
    # Compared on the network's own spikes, nothing but the layer behind the fault differs.
    lines = str(caught.value).splitlines()[1:]
    assert lines
    assert {line.strip().partition(":")[0] for line in lines} == {layer}


@DTYPES
def test_a_wrong_comparison(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = lowering.__globals__["_Value"]
    monkeypatch.setattr(value, "__ge__", value.__gt__)
    with pytest.raises(MismatchError, match=r"^spike1: on inputs that hit the threshold exactly"):
        convert(Net(), (X,), "lynxi-sim", dtype=dtype)


@DTYPES
def test_a_forgotten_reset_potential(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emitter = lowering.__globals__["_Emitter"]
    select = emitter.where

    def to_zero(self: Any, condition: Any, a: Any, b: Any) -> Any:
        return select(self, condition, 0.0 if isinstance(a, float) else a, b)

    monkeypatch.setattr(emitter, "where", to_zero)
    with pytest.raises(MismatchError, match="^spike1: .*hard reset to -0.3"):
        convert(Net(), (X,), "lynxi-sim", dtype=dtype)


@DTYPES
def test_a_forgotten_initial_potential(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = lowering.__globals__["_Lower"]
    monkeypatch.setattr(lower, "_initial", lambda *_: (torch.zeros(()),))
    with pytest.raises(MismatchError, match="^spike1: "):
        convert(Net(), (X,), "lynxi-sim", dtype=dtype)


@DTYPES
@pytest.mark.parametrize("fault", ["compare", "reset"])
def test_a_wrong_neuron_in_the_program_alone(
    fault: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowered right and spoiled after: the spikes are not the declaration's for their drive."""

    def wrong(program: Program) -> Program:
        for n in program.graph.nodes:
            if fault == "compare" and n.target is aten.ge.Scalar and where(n) == "spike3":
                n.args = (n.args[0], n.args[1] * 1.05)
            if fault == "reset" and where(n) == "spike1" and "where" in str(n.target):
                n.target, n.args = aten.where.self, (n.args[0], n.args[2], n.args[2])
        program.module.recompile()
        return program

    net = Net()
    with torch.no_grad():
        net.fc.weight.mul_(4)
    sabotage(monkeypatch, wrong, "lower_neurons")
    layer = "spike3" if fault == "compare" else "spike1"
    with pytest.raises(MismatchError, match=rf"\n  {layer}: .* spikes are not the declaration's"):
        convert(net, (X,), "lynxi-sim", dtype=dtype)


def test_a_wrong_cast_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 7 bits are no float16."""

    def coarse(program: Program) -> Program:
        for tensor in program.tensors.values():
            if tensor.dim() == 4:
                tensor.copy_((tensor.float() * 64).round() / 64)
        return program

    sabotage(monkeypatch, coarse, "cast_float16")
    with pytest.raises(MismatchError) as caught:
        convert(Net(), (X,), "lynxi-sim", dtype="float16")
    assert "spike1" in str(caught.value)
    assert "spike2" in str(caught.value)
    assert "spike3" not in str(caught.value)


def test_a_network_whose_module_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's own neuron is asked too, not its declaration alone."""
    forward = IFNode.forward
    net = nn.Sequential(nn.Linear(3, 3), IFNode())
    x = rand(T, N, 3)

    def strict(self: Any, x_seq: torch.Tensor) -> torch.Tensor:
        spikes = forward(self, x_seq)
        # Differs where h is exactly the threshold, and nowhere else.
        return torch.where(x_seq == 1.0, 0.0, spikes)

    monkeypatch.setattr("spikeport.converters.neurons.Node.forward", strict)
    with pytest.raises(MismatchError, match="^1: .*the network's own module and the declaration"):
        convert(net, (x,), "lynxi-sim")


# Right conversions pass


def large_fan_in() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(nn.Linear(4096, 16), IFNode(v_threshold=0.5), nn.Linear(16, 4), LIFNode())
    return net, rand(T, N, 4096) * 4


def tiny_variance() -> tuple[nn.Module, torch.Tensor]:
    net = Net()
    net.norm1.running_var.fill_(1e-6)
    net.norm2.running_var.fill_(1e-10)
    net.norm2.weight.data.mul_(1e-2)
    return net, X


def exact_threshold() -> tuple[nn.Module, torch.Tensor]:
    """Weights and inputs in eighths: membranes sit on the threshold all the time."""
    net = Net()
    with torch.no_grad():
        for layer in (net.conv1, net.conv2, net.fc):
            for p in layer.parameters():
                p.copy_((p * 16).round() / 8)
        for norm in (net.norm1, net.norm2):
            norm.weight.fill_(1.0)
            norm.bias.fill_(0.25)
            norm.running_mean.zero_()
            norm.running_var.fill_(0.75)
            norm.eps = 0.25
    return net, (X * 8).round() / 8


def cancelling() -> tuple[nn.Module, torch.Tensor]:
    """Large terms of both signs that sum to something small."""
    net = nn.Sequential(nn.Linear(512, 8), IFNode(v_threshold=0.01), nn.Linear(8, 4))
    with torch.no_grad():
        half = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 20
        net[0].weight.copy_(torch.cat([half, -half * (1 + 1e-3)], 1))
    x = rand(T, N, 256)
    return net, torch.cat([x, x], 2)


def dead_and_saturated() -> tuple[nn.Module, torch.Tensor]:
    net = Net()
    with torch.no_grad():
        net.norm1.weight[0] = 0.0
        net.norm1.weight[1] = -1.0
        net.norm1.bias[2] = -100.0
        net.norm1.bias[3] = 100.0
        net.conv2.weight[1] = 0.0
    return net, X


def tiny_weights() -> tuple[nn.Module, torch.Tensor]:
    """Below float16's smallest normal number."""
    net = nn.Sequential(nn.Linear(16, 8), IFNode(v_threshold=1e-4), nn.Linear(8, 4), IFNode())
    with torch.no_grad():
        net[0].weight.mul_(1e-5)
        net[0].bias.mul_(1e-4)
    return net, rand(T, N, 16)


def zero_input() -> tuple[nn.Module, torch.Tensor]:
    return Net(), torch.zeros_like(X)


def deep() -> tuple[nn.Module, torch.Tensor]:
    """Many operators between two neurons."""
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(32, 32), nn.ReLU(), nn.Tanh())]
    return nn.Sequential(*layers, IFNode(), nn.Linear(32, 4), LIFNode()), rand(T, N, 32)


def plain() -> tuple[nn.Module, torch.Tensor]:
    return Net(), X


RIGHT = [
    plain, deep, large_fan_in, tiny_variance, exact_threshold, cancelling, dead_and_saturated, tiny_weights,
    zero_input,
]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("made", RIGHT, ids=lambda f: f.__name__)
def test_a_right_conversion_passes(made: Callable[[], tuple[nn.Module, Any]], dtype: str) -> None:
    torch.manual_seed(0)
    net, x = made()
    program = convert(net.eval(), (x,), "lynxi-sim", dtype=dtype)
    evidence = program.evidence
    assert isinstance(evidence, VerificationEvidence)
    assert all(layer.drive_difference <= layer.drive_bound for layer in evidence.layers)
    assert evidence.dtype == dtype
    assert (evidence.before_cast is None) == (dtype == "float32")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]
)
def test_right_conversions_on_other_inputs(seed: int) -> None:
    net = Net()
    for scale in (0.01, 30.0):
        convert(net, (rand(T, N, 2, 8, 8, seed=seed) * scale,), "lynxi-sim", dtype="float16")


def test_float32_without_norms_is_bit_exact() -> None:
    net, x = large_fan_in()
    evidence = convert(net, (x,), "lynxi-sim", dtype="float32").evidence
    assert isinstance(evidence, VerificationEvidence)
    assert sum(evidence.end_to_end_flips.values()) == 0
    assert evidence.output_difference == 0
    assert all(layer.flips == 0 for layer in evidence.layers)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_norm_that_cancels_the_bias_before_it(dtype: str) -> None:
    """Where the input is 0, as an image's background is, the network's own rounding is all there is."""
    net = Net()
    for conv, norm in ((net.conv1, net.norm1), (net.conv2, net.norm2)):
        assert conv.bias is not None
        nn.init.constant_(conv.bias, 0.3)
        nn.init.uniform_(norm.running_mean, 0.29, 0.31)
        nn.init.uniform_(norm.running_var, 1e-3, 3e-3)
        nn.init.zeros_(norm.bias)
    x = X * (X > 1.5)
    assert convert(net, (x,), "lynxi-sim", dtype=dtype).evidence is not None


def test_the_probes_hit_every_threshold() -> None:
    """A grid of the threshold alone would miss the neurons that leak towards -0.3."""
    for node in (LIFNode(v_reset=-0.3), LIFNode(3.0, v_reset=0.2, decay_input=False), IFNode(),
                 LIFNode(v_reset=None, reset_at="next"), ParametricLIFNode(init_tau=3.0)):  # fmt: skip
        x = probe_inputs(node.neuron, 4, (50,))
        _, h, _ = node.neuron.trace(x)
        hits = (h == node.neuron.v_threshold).flatten(1).float().mean(1)
        assert (hits > 0.05).all(), node


def test_the_evidence_says_what_was_compared() -> None:
    program = convert(Net(), (X,), "lynxi-sim")
    evidence = program.evidence
    assert isinstance(evidence, VerificationEvidence)
    assert [layer.site for layer in evidence.layers] == ["spike1", "spike2", "spike3"]
    assert evidence.layers[0].spikes == 2 * T * N * 6 * 64
    assert evidence.layers[0].probe_spikes > 0
    assert "verified in float16 on 2 inputs, layer by layer" in str(evidence)
    data = evidence.to_dict()
    assert data["before_cast"]["dtype"] == "float32"
    assert data["layers"][0]["site"] == "spike1"


@pytest.mark.parametrize("layer", ["conv", "fc"])
def test_activations_that_overflow_are_named(layer: str) -> None:
    net = nn.Sequential()
    net.add_module("fc", nn.Linear(64, 8))
    net.add_module("spike", IFNode())
    net.add_module("conv", nn.Linear(8, 4))
    with torch.no_grad():
        net.get_submodule(layer).weight.fill_(60000.0)
    with pytest.raises(UnsupportedError) as caught:
        convert(net, (rand(T, N, 64).abs() + 1,), "lynxi-sim", dtype="float16")
    found = {(f.rule, f.where) for f in caught.value.findings}
    assert ("float16-overflow", layer) in found
    convert(net, (rand(T, N, 64).abs() + 1,), "lynxi-sim", dtype="float32")


def test_a_membrane_that_overflows_is_named() -> None:
    """The drive fits float16, its sum over time does not."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), IFNode(v_threshold=60000.0, v_reset=None))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
    with pytest.raises(UnsupportedError) as caught:
        convert(net, (torch.full((T, N, 4), 40000.0),), "lynxi-sim", dtype="float16")
    assert {(f.rule, f.where) for f in caught.value.findings} == {("float16-overflow", "1")}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_potential_beyond_all_numbers_explains_no_spike(value: float) -> None:
    site = capture(nn.Sequential(IFNode()), (rand(T, N, 3),)).sites[0]
    h, drive = torch.full((T, N, 3), value), torch.zeros(T, N, 3)
    everywhere = torch.ones(N, 3, dtype=torch.bool)
    distance, slack = to_threshold(site, everywhere, h, drive, torch.float32)
    assert (distance > slack).all()


@pytest.mark.parametrize(
    "run",
    [
        lambda s: s / s.sum(0),  # no number where nothing fires, in both
        lambda s: (s.mean(0) - 1).asin() + (s.mean(0) - 1).acos(),
        lambda s: (s.mean(0) - 0.5) ** 0.5,
    ],
)
def test_values_where_rounding_has_no_bound(run: Callable[..., Any]) -> None:
    net = Run(run)
    program = convert(net, (torch.full((T, N, 3), 0.3),), "reference", dtype="float32")
    x = rand(T, N, 3)
    torch.testing.assert_close(program(x), net(x), equal_nan=True)


def test_an_error_beyond_an_operators_domain_is_without_bound() -> None:
    x = torch.tensor([1e-3, 1.0])
    error = _perturbed(torch.rsqrt, (x,), (torch.tensor([1e-2, 1e-6]),), {}, x.rsqrt())
    assert error[0] == math.inf
    assert error[1] < 1e-5


def test_a_module_under_two_names() -> None:
    spike = LIFNode()
    program = convert(nn.Sequential(spike, nn.Linear(3, 3), spike), (rand(T, N, 3),), "lynxi-sim")
    assert len(program.sites) == 2


def test_the_network_is_left_as_it_was() -> None:
    net = Net().train()
    net.norm1.eval()
    before = copy.deepcopy(net.state_dict())
    convert(net, (X,), "lynxi-sim")
    assert net.training
    assert not net.norm1.training
    assert net.norm2.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
