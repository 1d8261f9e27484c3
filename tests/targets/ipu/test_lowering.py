"""Rewritten networks against their source's own autograd."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeport.converters import neurons, surrogates
from spikeport.converters.errors import UnsupportedError, UsageError
from spikeport.targets import cuda, ipu
from spikeport.targets.ipu.simulator import poptorch, settings

T, N, F = 8, 5, 10


class Layers(nn.Module):
    """x [N, T, F] -> spikes [T, N, F] of two layers, one after the other or step by step."""

    def __init__(self, make: Callable[[], nn.Module], steps: bool = False) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(F, F) for _ in range(2))
        for fc in self.fc:
            nn.init.normal_(fc.weight, std=0.6)  # so that both layers fire
        self.neurons = nn.ModuleList(make() for _ in range(2))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        if not self.steps:
            for fc, neuron in zip(self.fc, self.neurons, strict=True):
                x = neuron(fc(x))
            return x
        states = [
            n.reset_mem() if hasattr(n, "reset_mem") and not n.init_hidden else ()
            for n in self.neurons
        ]
        states = [s if isinstance(s, tuple) else (s,) for s in states]
        recorded = []
        for step in x:
            for i, (fc, neuron) in enumerate(zip(self.fc, self.neurons, strict=True)):
                out = neuron(fc(step), *states[i])
                step, *states[i] = out if isinstance(out, tuple) else (out,)
            recorded.append(step)
        return torch.stack(recorded)


def drive() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, T, F, generator=generator) * 1.5 + 0.5
    # Above 0, so that the gradient of a number that all neurons share is no small rest of a large sum.
    return x, torch.rand(T, N, F, generator=generator)


def check(make: Callable[[], nn.Module], steps: bool = False) -> None:
    """Equal spikes, and weight gradients within 1e-5 relative."""
    torch.manual_seed(0)
    net = Layers(make, steps)
    x, weights = drive()
    model = ipu.training_module(net, loss=lambda spikes, label: (spikes * weights).sum())
    spikes = net(x)
    assert 0.005 < spikes.mean() < 0.98
    (spikes * weights).sum().backward()
    ours, loss = model(x, torch.zeros(N))
    loss.backward()
    assert torch.equal(ours.transpose(0, 1), spikes)
    rewritten = dict(model.net.named_parameters())
    compared = 0
    for name, p in net.named_parameters():
        grad = rewritten[name].grad
        if p.grad is None or grad is None:
            assert p.grad is None or not p.grad.any()
            continue
        assert (grad - p.grad).norm() <= 1e-5 * p.grad.norm(), name
        compared += bool(p.grad.any())
    assert compared >= 2


# Equality


SPIKINGJELLY = [
    ("IFNode", {}),
    ("LIFNode", {"tau": 2.5}),
    ("LIFNode", {"tau": 2.5, "decay_input": False}),
    ("ParametricLIFNode", {"init_tau": 3.0}),
]


@pytest.mark.spikingjelly
@pytest.mark.parametrize(("kind", "given"), SPIKINGJELLY)
@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
def test_spikingjelly(kind: str, given: dict[str, Any], v_reset: float | None) -> None:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    names = itertools.cycle(["ATan", "Sigmoid", "PiecewiseLeakyReLU", "Erf", "SoftSign", "S2NN"])
    theirs = pytest.importorskip("spikingjelly.activation_based.surrogate")
    for detach, mode in itertools.product((False, True), "ms"):
        surrogate = next(names)

        def make(detach: bool = detach, mode: str = mode, surrogate: str = surrogate) -> nn.Module:
            function = getattr(theirs, surrogate)()
            made: nn.Module = getattr(neuron, kind)(
                v_reset=v_reset,
                detach_reset=detach,
                step_mode=mode,
                surrogate_function=function,
                **given,
            )
            return made

        check(make, steps=mode == "s")


SNNTORCH: list[tuple[str, dict[str, Any]]] = [
    ("Leaky", {"beta": 0.9, "learn_beta": True}),
    ("Leaky", {"beta": 0.9, "reset_delay": False, "learn_threshold": True}),
    ("Leaky", {"beta": 0.9, "init_hidden": True}),
    ("Leaky", {"beta": 0.8, "graded_spikes_factor": 0.7, "learn_graded_spikes_factor": True}),
    ("Synaptic", {"alpha": 0.6, "beta": 0.8, "learn_alpha": True, "learn_threshold": True}),
    ("Synaptic", {"alpha": 0.6, "beta": 0.8, "reset_delay": False}),
    ("Alpha", {"alpha": 0.7, "beta": 0.5}),
    ("Lapicque", {"beta": 0.8, "threshold": 0.3}),
]


@pytest.mark.snntorch
@pytest.mark.parametrize(("kind", "given"), SNNTORCH)
def test_snntorch(kind: str, given: dict[str, Any]) -> None:
    snn = pytest.importorskip("snntorch")
    theirs = pytest.importorskip("snntorch.surrogate")
    names = itertools.cycle(["atan", "fast_sigmoid", "sigmoid", "triangular", "heaviside"])
    for reset in ("subtract", "zero", "none"):
        name = next(names)
        # snnTorch's sigmoid overflows, and gives NaN, where slope u < -88.
        function = getattr(theirs, name)(*[2] if name == "sigmoid" else [])

        def make(reset: str = reset, function: Any = function) -> nn.Module:
            made: nn.Module = getattr(snn, kind)(
                reset_mechanism=reset, spike_grad=function, **given
            )
            return made

        check(make, steps=True)


@pytest.mark.parametrize("surrogate", [k() for k in surrogates.KINDS.values()], ids=repr)
def test_every_surrogate(surrogate: surrogates.Surrogate) -> None:
    check(lambda: neurons.LIFNode(surrogate=surrogate, detach_reset=True))


@neurons.dynamics(states={"w": 0.0, "s": 0.0})
def LoweredAdaptive(v: Any, w: Any, s: Any, x: Any, *, tau: Any, tau_w: Any) -> Any:  # noqa: N802
    w = w + (0.1 * v - w) / tau_w + 0.2 * s
    return v + (x - w - v) / tau, w


@pytest.mark.parametrize(
    "population",
    [
        {"v_reset": 0.0},
        {"v_reset": -0.2, "detach_reset": True, "fires": ">"},
        {"v_reset": None, "reset_at": "next"},
        {"v_reset": 0.1, "reset_at": "before", "detach_reset": True},
        {"v_reset": None, "reset_at": "ahead", "v_threshold": 0.8},
    ],
)
def test_neurons_of_ones_own(population: dict[str, Any]) -> None:
    check(
        lambda: neurons.Node(
            LoweredAdaptive, tau=2.0, tau_w=nn.Parameter(torch.full((F,), 9.0)), **population
        )
    )


@pytest.mark.parametrize("mode", ["s", "m"])
def test_fused_nodes(mode: Any) -> None:
    check(lambda: cuda.ParametricLIFNode(step_mode=mode, v_reset=None), steps=mode == "s")


def test_fused_nodes_change_their_type_in_any_release_of_torch() -> None:
    model = ipu.training_module(nn.Sequential(nn.Linear(2, 2), cuda.ParametricLIFNode()), "mse")
    assert {p.dtype for p in model.half().parameters()} == {torch.half}


# What a compiler sees


@pytest.mark.parametrize(
    "make",
    [
        cuda.LIFNode,
        lambda: cuda.IFNode(step_mode="s"),
        lambda: neurons.Node(LoweredAdaptive, tau=2.0, tau_w=9.0),
    ],
)
def test_the_simulated_device_trains_what_torch_does(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = Layers(make, steps=getattr(make(), "step_mode", "m") == "s")
    x, weights = drive()

    def loss(spikes: Tensor, label: Tensor) -> Tensor:
        return (spikes * weights).sum()

    (net(x) * weights).sum().backward()
    wanted = {n: p.detach() - p.grad for n, p in net.named_parameters() if p.grad is not None}
    model = ipu.training_module(net, loss)
    model.sdk = poptorch.__name__
    with settings(strict=True):
        executor = poptorch.trainingModel(model, None, torch.optim.SGD(model.parameters(), lr=1.0))
        executor(x, torch.zeros(N, dtype=torch.int64))
        executor.copyWeightsToHost()
    for name, p in model.net.named_parameters():
        torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.snntorch
def test_stock_snntorch_is_refused_and_rewritten_it_learns() -> None:
    snn = pytest.importorskip("snntorch")
    net = Layers(lambda: snn.Leaky(beta=0.9), steps=True)
    x, y = torch.randn(N, T, F) + 0.5, torch.arange(N)

    class Stock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return poptorch.identity_loss(nn.functional.cross_entropy(self.net(x).sum(0), y), "sum")

    with pytest.raises(poptorch.Error) as caught:
        poptorch.trainingModel(Stock())(x, y)
    for text in ("net.neurons.0", "net.neurons.1", "mem is reassigned", "training_module"):
        assert text in str(caught.value)
    trainer = ipu.trainer(ipu.training_module(net), lr=0.02, simulator=True)
    losses = [trainer.step(x, y)[1].item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_each_forward_begins_anew() -> None:
    net = Layers(lambda: cuda.LIFNode(step_mode="s"), steps=True)
    model = ipu.training_module(net, "mse").eval()
    x, _ = drive()
    first, second = model(x), model(x)
    assert torch.equal(first, second)
    assert not torch.equal(net(x), net(x))  # the original goes on


@pytest.mark.spikingjelly
def test_spikingjelly_goes_on_from_call_to_call_of_one_forward() -> None:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.LIFNode(step_mode="m")

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.lif(x.transpose(0, 1)) for _ in range(2)])

    net, (x, _) = Twice(), drive()
    spikes = ipu.training_module(net, "mse").eval()(x).transpose(0, 1)
    assert torch.equal(spikes, net(x))
    assert not torch.equal(spikes[:T], spikes[T:])


@pytest.mark.snntorch
def test_states_are_read_and_set_by_name_as_in_the_original() -> None:
    snn = pytest.importorskip("snntorch")

    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(beta=0.9, init_hidden=True)

        def forward(self, x: Tensor) -> Tensor:
            self.lif.reset_mem()
            seen = []
            for t in range(T):
                self.lif(x[:, t])
                self.lif.mem = 0.5 * self.lif.mem
                seen.append(self.lif.mem)
            return torch.stack(seen)

    net = Peeking()
    x, _ = drive()
    assert torch.equal(ipu.training_module(net, "mse").eval()(x), net(x).transpose(0, 1))


@pytest.mark.snntorch
def test_a_reset_in_the_middle_of_a_forward_reaches_the_copy() -> None:
    snn = pytest.importorskip("snntorch")
    utils = pytest.importorskip("snntorch.utils")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(beta=0.9, init_hidden=True)

        def forward(self, x: Tensor) -> Tensor:
            utils.reset(self)
            first = [self.lif(x[:, t]) for t in range(T)]
            utils.reset(self)
            return torch.stack(first + [self.lif(x[:, t]) for t in range(T)])

    x, _ = drive()
    spikes = ipu.training_module(Twice(), "mse").eval()(x)
    assert spikes.any()
    assert torch.equal(spikes[:, :T], spikes[:, T:])


def test_checkpoints_go_both_ways() -> None:
    net = Layers(neurons.ParametricLIFNode)
    model = ipu.training_module(net)
    assert list(model.state_dict()) == list(net.state_dict())
    changed = {n: v + 1 for n, v in net.state_dict().items()}
    model.load_state_dict(changed)
    other = copy.deepcopy(net)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(v, changed[n]) for n, v in other.state_dict().items())
    assert not any(torch.equal(v, changed[n]) for n, v in net.state_dict().items())


@pytest.mark.snntorch
def test_a_checkpoint_of_snntorch_goes_both_ways() -> None:
    snn = pytest.importorskip("snntorch")
    net = Layers(lambda: snn.Leaky(beta=0.7, learn_beta=True), steps=True)
    model = ipu.training_module(net)
    assert list(model.state_dict()) == list(net.state_dict())
    net.load_state_dict(model.state_dict())


def test_firing_rates_and_several_outputs() -> None:
    class Rates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.node = neurons.LIFNode()

        def forward(self, x: Tensor) -> Any:
            spikes = self.node(x.transpose(0, 1))
            return spikes, spikes.mean(0)

    x, y = drive()[0], torch.arange(N)
    spikes, loss = ipu.training_module(Rates(), "mse")(x, y)
    rates, same = ipu.training_module(Rates(), "mse", output=1)(x, y)
    assert spikes.shape == (N, T, F)
    assert rates.shape == (N, F)
    assert math.isclose(loss.item(), same.item(), rel_tol=1e-6)
    with pytest.raises(UsageError, match=r"ce_count takes spikes \[T, N, C\].*gives \[5, 10\]"):
        ipu.training_module(Rates(), "ce_count", output=1)(x, y)


# What is refused


def test_all_findings_at_once() -> None:
    class Unknown(neurons.Node):
        def forward(self, x_seq: Tensor) -> Tensor:
            return x_seq

    kept = cuda.IFNode(keep_state=True)
    net = nn.Sequential(nn.Linear(F, F), kept, Unknown(neurons.IF), cuda.LIFNode())
    net.append(ipu.training_module(nn.Sequential(neurons.IFNode())).net)
    with pytest.raises(UnsupportedError) as caught:
        ipu.training_module(net)
    found = {(f.rule, f.where) for f in caught.value.findings}
    assert found == {("kept-state", "1"), ("look-alike-neuron", "2"), ("lowered-twice", "4.0")}


@pytest.mark.snntorch
def test_surrogates_that_are_not_declared() -> None:
    snn = pytest.importorskip("snntorch")
    theirs = pytest.importorskip("snntorch.surrogate")

    def half(u: Tensor, grad: Tensor, spikes: Tensor) -> Tensor:
        return 0.5 * grad

    net = nn.Sequential(
        snn.Leaky(beta=0.9, spike_grad=theirs.custom_surrogate(half), init_hidden=True),
        snn.Leaky(beta=0.9, spike_grad=theirs.SSO(), init_hidden=True),
        snn.Leaky(beta=0.9, surrogate_disable=True, init_hidden=True),
    )
    with pytest.raises(UnsupportedError) as caught:
        ipu.training_module(net)
    assert [(f.rule, f.where) for f in caught.value.findings] == [
        ("unknown-surrogate", name) for name in "012"
    ]
    assert "custom_surrogate" in str(caught.value)
    given = {name: surrogates.Window(height=0.5, c=0.5) for name in "012"}
    x = torch.ones(N, F, requires_grad=True)
    ipu.training_module(net, surrogates=given).net(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((N, F), 0.5**3))
    with pytest.raises(UsageError, match=r"surrogates names 7, where there is no neuron"):
        ipu.training_module(nn.Sequential(neurons.IFNode()), surrogates={"7": surrogates.ATan()})


@pytest.mark.spikingjelly
def test_layers_that_keep_a_mask_are_refused() -> None:
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    with pytest.raises(UnsupportedError, match="kept-mask.*keeps its mask from step to step"):
        ipu.training_module(nn.Sequential(layer.Dropout(0.5), neurons.IFNode()))


def test_wrong_calls() -> None:
    model = ipu.training_module(nn.Sequential(neurons.IFNode()), "mse")
    with pytest.raises(UsageError, match="is a training_module already"):
        ipu.training_module(model)
    with pytest.raises(UsageError, match="no loss 'ce_cont'.*did you mean ce_count"):
        ipu.training_module(nn.Identity(), "ce_cont")
    with pytest.raises(UsageError, match=r"returns \[4, 3, 2\] for 4 samples"):
        model(torch.ones(4, 3, 2), torch.zeros(4))
    with pytest.raises(UsageError, match="returns Tensor; allowed: spikes"):
        ipu.training_module(nn.Flatten(0), "mse")(torch.ones(4, 3), torch.zeros(4))
