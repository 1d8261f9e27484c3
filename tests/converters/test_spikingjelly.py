"""Networks of the real SpikingJelly, 2.0.0 and 0.0.0.0.14, whichever is installed."""

from __future__ import annotations

import copy
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import equal, grid, rand, refused
from torch import nn

from spikeport import deploy
from spikeport.converters import verify
from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError
from spikeport.converters.passes import (
    flatten_time,
    fold_batch_norm,
    hoist_time_invariant,
    lower_neurons,
)
from spikeport.converters.program import Program
from spikeport.converters.sources.spikingjelly import _KNOWN

pytest.importorskip("spikingjelly")
sj_base = pytest.importorskip("spikingjelly.activation_based.base")
functional = pytest.importorskip("spikingjelly.activation_based.functional")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")

pytestmark = pytest.mark.spikingjelly
#: 0.0.0.0.14, whose neurons choose their backend.
OLD = hasattr(neuron.IFNode(), "backend")
T, N = 4, 2


def reference(net: nn.Module, *inputs: torch.Tensor) -> Any:
    work = copy.deepcopy(net).eval()
    functional.reset_net(work)
    with torch.no_grad():
        return work(*inputs)


def lowered(program: Program) -> Program:
    for rewrite in (hoist_time_invariant, flatten_time, lower_neurons):
        program = rewrite(program)
    return program


def converted(net: nn.Module, *inputs: torch.Tensor) -> Program:
    """The captured network, checked bit for bit with its lowered form on several inputs."""
    program = capture(net, inputs)
    low = lowered(program)
    for example in (inputs, tuple(grid(*x.shape, seed=5) for x in inputs)):
        expected = reference(net, *example)
        for form in (program, low):
            assert equal(form(*example), expected)
    return program


# The grid of neurons

KINDS = ("IFNode", "LIFNode", "ParametricLIFNode")
#: LIF in eval mode, single-step only.
ONLINE = ("OTTTLIFNode", "SLTTLIFNode")
V_RESETS = (-0.3, 0.0, 0.2, None)


def make(kind: str, v_reset: float | None, tau: float, decay_input: bool, **extra: Any) -> Any:
    arguments = {"v_reset": v_reset, "step_mode": "m", **extra}
    if kind == "LIFNode":
        arguments |= {"tau": tau, "decay_input": decay_input}
    elif kind == "ParametricLIFNode":
        arguments |= {"init_tau": tau, "decay_input": decay_input}
    return getattr(neuron, kind)(**arguments)


class Population(nn.Module):
    """Every kind of neuron on the same drive."""

    def __init__(self, kinds: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kinds)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


VARIANTS = [
    (kind, v_reset, tau, decay)
    for kind, v_reset, tau, decay in itertools.product(KINDS, V_RESETS, (2.0, 3.0), (True, False))
    if kind != "IFNode" or (tau == 2.0 and decay)
]


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_zero_differing_spikes(steps: int) -> None:
    net = Population([make(*variant) for variant in VARIANTS])
    program = lowered(capture(net, (rand(steps, N, 500),)))
    fired = 0.0
    for drive in (rand, grid):
        x = drive(steps, N, 500, seed=steps)
        for variant, ours, theirs in zip(VARIANTS, program(x), reference(net, x), strict=True):
            assert torch.equal(ours, theirs), variant
            fired += theirs.mean().item()
    assert 0.05 < fired / len(VARIANTS) / 2 < 0.6


@pytest.mark.parametrize("steps", [1, 4])
def test_zero_differing_spikes_step_by_step(steps: int) -> None:
    """The single-step kernels have their own order of rounding in some releases."""

    class Loop(Population):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.stack([layer(x[t]) for t in range(steps)]) for layer in self.layers]

    net = Loop([make(*variant, step_mode="s") for variant in VARIANTS])
    if steps == 1:
        assert {rule for rule, _ in refused(net, rand(1, N, 50))} == {"time-loop-outside"}
        return
    program = lowered(capture(net, (rand(steps, N, 500),)))
    for drive in (rand, grid):
        x = drive(steps, N, 500, seed=steps)
        for variant, ours, theirs in zip(VARIANTS, program(x), reference(net, x), strict=True):
            assert torch.equal(ours, theirs), variant


@pytest.mark.parametrize("mode", ["m", "s"])
def test_thresholds_and_time_constants_set_as_attributes(mode: str) -> None:
    net = nn.Sequential(make("LIFNode", 0.0, 2.0, True), make("ParametricLIFNode", None, 2.0, True))
    net[0].v_threshold, net[0].tau, net[1].v_threshold = 0.5, 4.0, 0.75
    with torch.no_grad():
        net[1].w.fill_(0.3)
    net[0].v_reset = -0.1
    sites = converted(net, rand(T, N, 20)).sites
    assert (sites[0].neuron.v_threshold, sites[0].neuron.params["tau"]) == (0.5, 4.0)
    assert sites[1].neuron.v_threshold == 0.75


def test_the_reset_value() -> None:
    node = make("IFNode", 0.0, 2.0, True)
    node.set_reset_value("v", 0.4)
    node.reset()
    program = converted(nn.Sequential(node), rand(T, N, 50))
    assert program.sites[0].neuron.v_0 == pytest.approx(0.4)


def test_state_that_is_left_from_a_run() -> None:
    net = nn.Sequential(layer.Linear(5, 6, step_mode="m"), make("LIFNode", 0.0, 2.0, True))
    with torch.no_grad():
        net(rand(T, N, 5, seed=9))
    left = net[1].v.clone()
    converted(net, rand(T, N, 5))
    assert torch.equal(net[1].v, left)


def test_a_network_in_training_mode_with_gradients_left() -> None:
    net = nn.Sequential(layer.Linear(5, 6, step_mode="m"), make("LIFNode", 0.0, 2.0, True)).train()
    net(rand(T, N, 5)).sum().backward()
    if refusal := _refusal_or_none(net, rand(T, N, 5)):
        assert refusal == [("copy", "")]
    functional.reset_net(net)
    converted(net, rand(T, N, 5))
    assert net.training


def _refusal_or_none(net: nn.Module, x: torch.Tensor) -> list[tuple[str, str]]:
    try:
        capture(net, (x,))
    except CaptureError as error:
        return [(f.rule, f.where) for f in error.findings]
    return []


@pytest.mark.parametrize("name", ["ATan", "Sigmoid", "PiecewiseQuadratic", "SoftSign", "Erf"])
def test_surrogates(name: str) -> None:
    node = make("LIFNode", 0.0, 2.0, True, surrogate_function=getattr(surrogate, name)())
    program = capture(nn.Sequential(node), (rand(T, N, 20),))
    x = grid(T, N, 200)
    assert torch.equal(lowered(capture(nn.Sequential(node), (x,)))(x), reference(node, x))
    assert program.sites[0].neuron.fires == ">="


def test_a_surrogate_that_does_not_spike() -> None:
    net = nn.Sequential(
        make("IFNode", 0.0, 2.0, True, surrogate_function=surrogate.Sigmoid(spiking=False)),
        make("IFNode", 0.0, 2.0, True),
    )
    assert refused(net, rand(T, N, 5)) == [("surrogate-output", "0")]


def test_a_surrogate_of_the_users() -> None:
    class Shifted(nn.Module):
        spiking = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x >= 0.5).to(x)

    node = make("ParametricLIFNode", 0.0, 2.0, True)
    node.surrogate_function = Shifted()
    assert refused(nn.Sequential(node), rand(T, N, 5)) == [("surrogate-output", "0")]


def test_store_v_seq_changes_nothing() -> None:
    converted(nn.Sequential(make("LIFNode", 0.0, 2.0, True, store_v_seq=True)), rand(T, N, 5))


@pytest.mark.parametrize("reach", [1, 2, 3])
def test_spikes_of_steps_before_go_in_step_by_step(reach: int) -> None:
    """Layer by layer the steps are slices of one another; one at a time they come from states."""

    class Window(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(6, 5), neuron.LIFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            past, sums = [torch.zeros(x.shape[1], 5)] * reach, []
            for now in x:
                past = [*past, self.lif(self.fc(now))]
                sums.append(past[0] + past[-1])
                past = past[1:]
            return torch.stack(sums)

    torch.manual_seed(0)
    net = Window()
    program = deploy.convert(net, (rand(6, N, 6),), "reference", time="stepped")
    x = rand(9, N, 6, seed=1)
    assert torch.equal(program(x), reference(net, x))


class Twice(nn.Module):
    """One layer of neurons in two places, reset between them or not."""

    def __init__(self, resets: bool) -> None:
        super().__init__()
        self.fc, self.lif, self.resets = nn.Linear(6, 6), neuron.LIFNode(step_mode="m"), resets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.lif(self.fc(x))
        if self.resets:
            self.lif.reset()
        return first + self.lif(self.fc(x))


def test_a_layer_of_neurons_in_two_places() -> None:
    x = torch.zeros(T, N, 6)  # on which nothing fires, so that only the calls tell
    net = Twice(resets=False)
    assert refused(net, x) == [("neuron-called-again", "lif")]
    with pytest.raises(CaptureError, match="calls 2 times"):
        capture(net, (x,))
    converted(Twice(resets=True), grid(T, N, 6))


def test_a_network_that_resets_itself() -> None:
    class Resets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(layer.Linear(5, 5), make("LIFNode", 0.0, 2.0, True))
            functional.set_step_mode(self.body, "m")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            functional.reset_net(self.body)
            y = self.body(x)
            functional.reset_net(self.body)
            return y + self.body(x)

    converted(Resets(), rand(T, N, 5))


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.25])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("name", [name for name in ONLINE if hasattr(neuron, name)])
def test_neurons_for_online_training(name: str, decay_input: bool, v_reset: float | None) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spike = getattr(neuron, name)(decay_input=decay_input, v_reset=v_reset)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.spike(step) for step in x])

    program = converted(Loop(), grid(T, N, 5))
    assert program.sites[0].neuron.fires == ">="


# Neurons of other dynamics

SOME = {"tau": 2.5}
OTHERS = {
    "SimpleIFNode": [{}],
    "SimpleLIFNode": [{**SOME, "decay_input": True}, {**SOME, "decay_input": False}],
    "QIFNode": [{**SOME, "v_c": 0.7, "a0": 0.9}],
    "EIFNode": [{**SOME, "delta_T": 0.7}],
    "IzhikevichNode": [{**SOME, "a": 0.3, "b": 0.2, "tau_w": 3.0, "w_rest": 0.25}],
    "KLIFNode": [
        {**SOME, "decay_input": decay_input, "scale_reset": scale_reset}
        for decay_input in (True, False)
        for scale_reset in (True, False)
    ],
    "CUBALIFNode": [{}],
    "RAFNode": [{}],
    "LIAFNode": [
        {**SOME, "act": torch.relu, "threshold_related": related} for related in (True, False)
    ],
    "ComplementaryLIFNode": [SOME],
    "HalfThresholdIFNode": [{}],
    "TernaryIFNode": [{}],
    "TernaryLIFNode": [{**SOME, "decay_input": decay_input} for decay_input in (True, False)],
    "MPBNLIFNode": [{"out_features": 37, "learnable_vth": learned} for learned in (True, False)],
}
#: Their reset is their own.
ONE_RESET = ("ComplementaryLIFNode", "HalfThresholdIFNode")


class Stepwise(nn.Module):
    def __init__(self, spike: nn.Module) -> None:
        super().__init__()
        self.spike = spike

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.spike(step) for step in x])


class SideBySide(nn.Module):
    """Neurons side by side on one input, of all steps or of one after another."""

    def __init__(self, nodes: list[nn.Module]) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(nodes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.nodes[0].step_mode == "m":
            return tuple(node(x) for node in self.nodes)
        steps = [[node(step) for node in self.nodes] for step in x]
        return tuple(torch.stack(spikes) for spikes in zip(*steps, strict=True))


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("name", OTHERS)
def test_neurons_of_other_dynamics(name: str, step_mode: str) -> None:
    if not hasattr(neuron, name):
        pytest.skip("only in 2.0.0")
    if name == "LIAFNode" and OLD:
        pytest.skip("fails inside SpikingJelly")
    no_soft_reset = {"KLIFNode": OLD, "SimpleLIFNode": True}.get(name, False)
    resets = [0.0, -0.25] if no_soft_reset else [None, 0.0, -0.25]
    starts: list[dict] = [{}] if name in ONE_RESET else [{"v_reset": reset} for reset in resets]
    nodes = [getattr(neuron, name)(**given, **start) for given in OTHERS[name] for start in starts]
    for node in nodes:
        node.step_mode = step_mode
        if name == "KLIFNode":
            nn.init.constant_(node.k, 1.3)
    net = SideBySide(nodes)
    program = converted(net, grid(T + 2, N, 37))
    assert len(program.sites) >= len(nodes)
    assert verify._probe_neurons(program, net, "unrolled")


@pytest.mark.parametrize(
    ("name", "given"), [("PSN", {"T": T}), ("SlidingPSN", {"k": 3, "step_mode": "m"})]
)
def test_neurons_that_are_a_linear_map_over_time(name: str, given: dict) -> None:
    if not hasattr(neuron, name):
        pytest.skip("only in 2.0.0")
    net = nn.Sequential(nn.Linear(5, 5), getattr(neuron, name)(**given))
    program = converted(net, rand(T, N, 5))
    assert [site.path for site in program.sites] == ["1.surrogate_function"]
    assert verify._probe_neurons(program, net, "unrolled")


def test_a_linear_map_over_time_takes_all_steps() -> None:
    if not hasattr(neuron, "SlidingPSN"):
        pytest.skip("only in 2.0.0")
    assert refused(Stepwise(neuron.SlidingPSN(k=2)), rand(T, N, 5)) == [("step-mode", "spike")]


# Every other keeper of state

NEEDS = {
    "MaskedPSN": {"k": 2, "T": T},
    "SlidingPSN": {"k": 2},
    "PSN": {"T": T},
    "LIAFNode": {"act": torch.relu, "threshold_related": False},
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "STBIFNode": {"q_threshold": torch.tensor(1.0), "level": 4},
}


def other_neurons() -> list[str]:
    return [
        name
        for name, kind in inspect.getmembers(neuron, inspect.isclass)
        if issubclass(kind, sj_base.MemoryModule) and name not in _KNOWN and "Base" not in name
    ]


@pytest.mark.parametrize("name", other_neurons())
def test_every_other_neuron_is_refused_by_name(name: str) -> None:
    try:
        node = getattr(neuron, name)(**NEEDS.get(name, {}))
    except Exception as error:
        pytest.skip(f"cannot be made without more: {error}")
    with pytest.raises(CaptureError) as caught:
        capture(nn.Sequential(nn.Identity(), node), (rand(T, N, 5),))
    found = {(f.rule, f.where): f.found for f in caught.value.findings}
    assert ("unknown-neuron", "1") in found
    assert name in found["unknown-neuron", "1"]


# Readouts


@pytest.mark.parametrize("decode", [None, "max-mem", "max-abs-mem", "mean-mem", "last_mem"])
@pytest.mark.parametrize("name", ["NonSpikingIFNode", "NonSpikingLIFNode"])
def test_readouts_of_membrane_potentials(name: str, decode: str | None) -> None:
    if not hasattr(neuron, name):
        pytest.skip("only in 2.0.0")
    tau = {"tau": 2.5} if "LIF" in name else {}
    net = nn.Sequential(nn.Linear(5, 5), getattr(neuron, name)(decode=decode, **tau))
    x = rand(T, N, 5)
    low = lowered(capture(net, (x,)))
    found, expected = low(x), reference(net, x)
    if decode is None:
        assert isinstance(found, list)
        found, expected = torch.stack(found), torch.stack(expected)
    # Unrolled, the means are sums in another order.
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 * (decode == "mean-mem"))
    assert not low.sites


def test_a_subclass_of_the_users() -> None:
    class Mine(neuron.LIFNode):
        def neuronal_charge(self, x: torch.Tensor) -> None:
            self.v = self.v + 2 * x

    net = nn.Sequential(Mine(step_mode="m"))
    assert refused(net, rand(T, N, 5)) == [("look-alike-neuron", "0")]


def test_an_instance_with_another_charge() -> None:
    net = nn.Sequential(make("LIFNode", 0.0, 2.0, True))
    net[0].neuronal_charge = lambda x: x
    if hasattr(neuron.LIFNode, "neuronal_charge"):
        assert refused(net, rand(T, N, 5)) == [("altered-neuron", "0")]


# Layers


@pytest.mark.parametrize("name", ["SeqToANNContainer", "MultiStepContainer"])
def test_containers(name: str) -> None:
    torch.manual_seed(0)
    container = getattr(layer, name)
    inner = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2))
    if name == "MultiStepContainer":
        inner.append(make("LIFNode", None, 2.0, True, step_mode="s"))
    net = nn.Sequential(container(*inner), make("IFNode", 0.0, 2.0, True))
    program = converted(net, rand(T, N, 2, 8, 8))
    assert program.sites[-1].path == "1"


class CSNN(nn.Module):
    """SpikingJelly's tutorial network, in both of its step modes."""

    def __init__(self, step_mode: str) -> None:
        super().__init__()
        self.step_mode = step_mode
        self.conv_fc = nn.Sequential(
            layer.Conv2d(1, 4, 3, padding=1, bias=False),
            layer.BatchNorm2d(4),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2, 2),
            layer.Conv2d(4, 4, 3, padding=1, bias=False),
            layer.BatchNorm2d(4),
            neuron.LIFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2, 2),
            layer.Flatten(),
            layer.Dropout(0.5),
            layer.Linear(4 * 4, 10, bias=False),
            neuron.ParametricLIFNode(surrogate_function=surrogate.ATan()),
        )
        functional.set_step_mode(self.conv_fc, step_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.step_mode == "m":
            return self.conv_fc(x.unsqueeze(0).repeat(T, 1, 1, 1, 1)).mean(0)
        return sum(self.conv_fc(x) for _ in range(T)) / T


def awake(net: CSNN) -> CSNN:
    """With weights that make every layer fire."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 2, 4)
            nn.init.uniform_(module.bias, 0, 1)
    with torch.no_grad():
        net.conv_fc[10].weight.mul_(10)
    return net


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_convolutional_network_the_whole_way(step_mode: str, dtype: str) -> None:
    from spikeport.deploy.pipeline import convert

    torch.manual_seed(0)
    net = awake(CSNN(step_mode))
    x = rand(N, 1, 8, 8).abs() * 4
    program = convert(net, (x,), "lynxi-sim", dtype=dtype)
    assert [s.path for s in program.sites] == ["conv_fc.2", "conv_fc.6", "conv_fc.11"]
    assert [s.T for s in program.sites] == [T] * 3
    assert reference(net, x).abs().sum() > 0


def test_both_step_modes_compute_the_same() -> None:
    torch.manual_seed(0)
    multi = awake(CSNN("m"))
    single = CSNN("s")
    single.load_state_dict(multi.state_dict())
    x = rand(N, 1, 8, 8).abs() * 4
    a, b = (lowered(capture(net, (x,))) for net in (multi, single))
    assert torch.allclose(a(x), b(x))
    assert a(x).sum() > 0


class SEWBlock(nn.Module):
    """Fang et al. 2021, Deep Residual Learning in Spiking Neural Networks."""

    def __init__(self, channels: int, join: str) -> None:
        super().__init__()
        self.join = join
        self.conv = nn.Sequential(
            layer.Conv2d(channels, channels, 3, padding=1),
            layer.BatchNorm2d(channels),
            neuron.IFNode(),
            layer.Conv2d(channels, channels, 3, padding=1),
            layer.GroupNorm(1, channels),
            neuron.ParametricLIFNode(v_reset=None),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return {
            "ADD": lambda: x + y,
            "AND": lambda: x * y,
            "IAND": lambda: x * (1.0 - y),
            "CAT": lambda: torch.cat([x, y], dim=2),
        }[self.join]()


@pytest.mark.parametrize("join", ["ADD", "AND", "IAND", "CAT"])
def test_residual_blocks(join: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        neuron.LIFNode(decay_input=False),
        SEWBlock(4, join),
        layer.AvgPool2d(2),
        layer.ConvTranspose2d(8 if join == "CAT" else 4, 2, 2, stride=2),
        neuron.IFNode(),
    )
    functional.set_step_mode(net, "m")
    program = converted(net, rand(T, N, 2, 6, 6) * 2)
    assert (
        max(len(n.meta["val"].shape) for n in lowered(program).graph.nodes if "val" in n.meta) <= 4
    )
    assert fold_batch_norm(flatten_time(program)).history[-1].done


def test_a_forward_that_asks_for_the_neurons_class() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 5), make("LIFNode", 0.0, 2.0, True)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for each in self.layers:
                x = each(x) * 2 if isinstance(each, neuron.LIFNode) else each(x)
            return x

    converted(Asks(), rand(T, N, 5))


def test_half_precision_networks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(5, 6), neuron.LIFNode(tau=3.0, v_reset=-0.3))
    functional.set_step_mode(net, "m")
    net = net.half()
    x = rand(T, N, 5).half()
    assert torch.equal(capture(net, (x,))(x), reference(net, x))


# Without SpikingJelly


def test_converters_never_import_spikingjelly() -> None:
    code = (
        "import sys; sys.modules['spikingjelly'] = None\n"
        "import torch\n"
        "from torch import nn\n"
        "from spikeport.converters.neurons import LIFNode\n"
        "from spikeport.converters.capture import capture\n"
        "from spikeport.deploy.pipeline import convert\n"
        "x = torch.rand(4, 2, 5)\n"
        "print(convert(nn.Sequential(nn.Linear(5, 5), LIFNode()), (x,), 'lynxi-sim').T)\n"
        "assert not any(name.startswith('spikingjelly.') for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "4", done.stderr


class Reads(nn.Module):
    """Reads what its layers end with, as networks for regression and for values of actions do."""

    def __init__(self, lif: nn.Module, read: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.lif, self.read = nn.Linear(6, 5), lif, read

    def forward(self, x: torch.Tensor) -> Any:
        return self.read(self, x)


def step_by_step(net: Any, x: torch.Tensor) -> Any:
    rates = sum(net.lif(net.fc(x[t]) * 4) for t in range(T))
    return rates, net.lif.v


@pytest.mark.parametrize("make", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.EIFNode])
def test_the_membrane_that_a_layer_ends_with(make: Callable[..., nn.Module]) -> None:
    converted(Reads(make(), step_by_step), rand(T, N, 6))
    converted(Reads(make(step_mode="m"), lambda s, x: (s.lif(s.fc(x) * 4), s.lif.v)), rand(T, N, 6))


def test_the_membrane_at_all_steps() -> None:
    lif = neuron.LIFNode(step_mode="m", v_reset=None, store_v_seq=True)
    converted(Reads(lif, lambda s, x: (s.lif(s.fc(x) * 4).mean(0), s.lif.v_seq)), rand(T, N, 6))


def test_a_second_state() -> None:
    node = neuron.IzhikevichNode()
    converted(Reads(node, lambda s, x: (*step_by_step(s, x), s.lif.w)), rand(T, N, 6) * 9)


@pytest.mark.skipif(OLD, reason="only in 2.0.0")
def test_an_integrator_that_a_forward_calls_twice_starts_anew() -> None:
    lif = neuron.NonSpikingLIFNode(decode="last_mem")
    converted(
        Reads(lif, lambda s, x: s.lif(s.fc(x)) + s.lif(s.fc(x.flip(0))) + s.lif.v), rand(T, N, 6)
    )


@pytest.mark.skipif(not OLD, reason="only 0.0.0.0.14 has backends to choose from")
def test_a_backend_whose_kernels_run_in_evaluation_too() -> None:
    nodes = [neuron.IFNode(step_mode="m"), neuron.ParametricLIFNode(step_mode="m")]
    for node in nodes:
        node._backend = "cupy"  # its setter asks for CuPy
    with pytest.raises(CaptureError) as caught:
        capture(nn.Sequential(*nodes), (rand(T, N, 5),))
    first = caught.value.findings[0]
    assert (first.rule, first.where) == ("neuron-backend", "1")
    assert "functional.set_backend(net, 'torch')" in first.fix
    nodes[1]._backend = "torch"
    capture(nn.Sequential(*nodes), (rand(T, N, 5),))
