"""Networks of the real snnTorch, 1.0 and 0.9, whichever is installed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import equal, grid, refused
from torch import nn

from spikeport import deploy
from spikeport.converters.capture import capture
from spikeport.converters.passes import (
    flatten_time,
    hoist_time_invariant,
    lower_neurons,
    reroll_time,
    step_time,
)
from spikeport.converters.program import NEURON_STEP, Program

snn = pytest.importorskip("snntorch")
surrogate = pytest.importorskip("snntorch.surrogate")
utils = pytest.importorskip("snntorch.utils")

pytestmark = pytest.mark.snntorch
T, N, F = 6, 2, 100


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.3


def edges(*shape: int, seed: int = 0) -> torch.Tensor:
    """Zeros, and numbers right at and beside multiples of the threshold."""
    one = torch.ones(())
    near = [torch.nextafter(one, one * d) for d in (0, 2)]
    values = torch.stack([0 * one, one, *near, 2 * one, 3 * one, -one, 0.5 * one])
    return values[torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(seed))]


DRIVES = (normal, grid, edges)


def reference(net: nn.Module, *inputs: torch.Tensor) -> Any:
    work = copy.deepcopy(net).eval()
    for module in work.modules():
        if hasattr(module, "reset_mem"):
            module.reset_mem()
    with torch.no_grad():
        return work(*inputs)


def forms(program: Program) -> Iterator[Program]:
    """The program as it was captured, re-rolled, and lowered."""
    yield program
    yield (form := reroll_time(program))
    for rewrite in (hoist_time_invariant, flatten_time, lower_neurons):
        form = rewrite(form)
    yield form


class Loop(nn.Module):
    """Every neuron on the same drive, its state handed on or kept on the module; all is recorded."""

    def __init__(self, *neurons: Any) -> None:
        super().__init__()
        self.neurons = nn.ModuleList(neurons)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for neuron in self.neurons:
            state = () if neuron.init_hidden else neuron.reset_mem()
            state = state if isinstance(state, tuple) else (state,)
            steps = []
            for t in range(x.shape[0]):
                out = neuron(x[t], *state)
                if not neuron.init_hidden:
                    state = out[0 if isinstance(neuron, (snn.RLeaky, snn.RSynaptic)) else 1 :]
                steps.append(out if isinstance(out, tuple) else (out,))
            results += [torch.stack(part) for part in zip(*steps, strict=True)]
        return results


def beta(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 1.2


RESETS = ("subtract", "zero", "none")


def leaky() -> list[Any]:
    made = [
        snn.Leaky(beta=b, reset_mechanism=reset, reset_delay=delay)
        for reset, delay, b in itertools.product(RESETS, (True, False), (0.9, 0.5, 1.0))
    ]
    return [
        *made,
        snn.Leaky(beta=1.3, threshold=0.7),
        snn.Leaky(beta=-0.2, learn_beta=True, threshold=0.5, learn_threshold=True),
        snn.Leaky(beta=beta(F), threshold=beta(F), reset_delay=False),
        snn.Leaky(beta=beta(F), learn_beta=True, threshold=beta(F), reset_mechanism="zero"),
        snn.Leaky(beta=beta(1), threshold=0.0),
        snn.Leaky(beta=0.8, init_hidden=True),
        snn.Leaky(beta=0.8, init_hidden=True, output=True, reset_delay=False),
        snn.Leaky(beta=0.8, graded_spikes_factor=0.3),
        snn.Leaky(beta=0.8, graded_spikes_factor=beta(F) + 1, reset_delay=False),
        snn.Leaky(beta=0.8, surrogate_disable=True),
        snn.Leaky(beta=0.8, spike_grad=surrogate.fast_sigmoid()),
    ]


def lapicque() -> list[Any]:
    parameters = (
        {"beta": 0.9},
        {"R": 5.1, "C": 5e-3, "time_step": 1e-3},
        {"beta": 0.5, "R": 2},
        {"beta": 0.7, "C": 0.3},
    )
    made = itertools.product(RESETS, parameters)
    return [
        *(snn.Lapicque(threshold=0.2, reset_mechanism=r, **given) for r, given in made),
        snn.Lapicque(beta=0.6, init_hidden=True),
    ]


def synaptic() -> list[Any]:
    made = itertools.product(RESETS, (True, False), (0.5, 0.9))
    return [
        *(
            snn.Synaptic(alpha=a, beta=0.8, reset_mechanism=reset, reset_delay=delay)
            for reset, delay, a in made
        ),
        snn.Synaptic(alpha=beta(F), beta=beta(F), threshold=beta(F) + 0.2, learn_alpha=True),
        snn.Synaptic(alpha=0.5, beta=0.5, init_hidden=True),
    ]


def alpha() -> list[Any]:
    made = itertools.product(RESETS, ((0.9, 0.8), (0.5, 0.25)), (1.0, 0.3))
    return [
        *(
            snn.Alpha(alpha=a, beta=b, reset_mechanism=reset, threshold=threshold)
            for reset, (a, b), threshold in made
        ),
        snn.Alpha(alpha=0.9, beta=0.5, threshold=0.3, init_hidden=True),
    ]


def recurrent() -> list[Any]:
    alone = {"all_to_all": False, "threshold": 0.8}
    made = itertools.product(RESETS, (1.0, -0.3))
    return [
        *(snn.RLeaky(beta=0.8, V=v, reset_mechanism=reset, **alone) for reset, v in made),
        snn.RLeaky(beta=0.8, reset_delay=False, **alone),
        snn.RLeaky(beta=beta(F), V=beta(F) - 0.5, learn_beta=True, all_to_all=False),
        snn.RLeaky(beta=0.5, init_hidden=True, output=True, **alone),
        *(snn.RSynaptic(alpha=0.5, beta=0.6, reset_mechanism=reset, **alone) for reset in RESETS),
        snn.RSynaptic(
            alpha=beta(F), beta=beta(F), V=beta(F) - 0.8, threshold=beta(F) + 0.2, all_to_all=False
        ),
        snn.RSynaptic(alpha=0.5, beta=0.5, init_hidden=True, **alone),
    ]


def together() -> list[Any]:
    """Each neuron hears the last spikes of all, through a layer that the module has."""
    torch.manual_seed(0)
    made = itertools.product(RESETS, (True, False))
    wide = {"linear_features": F}
    return [
        *(snn.RLeaky(beta=0.8, reset_mechanism=r, reset_delay=d, **wide) for r, d in made),
        snn.RLeaky(beta=beta(F), threshold=beta(F), learn_beta=True, init_hidden=True, **wide),
        *(snn.RSynaptic(alpha=0.5, beta=0.6, reset_mechanism=r, **wide) for r in RESETS),
        snn.RSynaptic(alpha=0.5, beta=beta(F), init_hidden=True, output=True, **wide),
    ]


@pytest.mark.parametrize("made", [leaky, lapicque, synaptic, alpha, recurrent, together])
def test_zero_differing_values(made: Callable[[], list[Any]]) -> None:
    """Spikes and states, bit for bit, as captured, re-rolled and lowered."""
    net = Loop(*made())
    programs = list(forms(capture(net, (normal(T, N, F),))))
    stepped = any(n.target is NEURON_STEP for n in programs[1].graph.nodes)
    assert stepped == (made is together)
    fired = 0.0
    for drive in DRIVES:
        x = drive(T, N, F, seed=3)
        expected = reference(net, x)
        fired += expected[0].mean().item()
        for form in programs:
            for i, (ours, theirs) in enumerate(zip(form(x), expected, strict=True)):
                assert torch.equal(ours, theirs), (form.history[-1].name, i)
    assert 0.1 < fired < 2.5


def test_a_reset_right_after_the_spike_is_compared_at_every_step() -> None:
    """It leaves another potential than fired; the first is what the layer starts from."""
    torch.manual_seed(0)
    now = {"linear_features": F, "reset_delay": False}
    made = [snn.RLeaky(beta=0.8, reset_mechanism=reset, **now) for reset in RESETS[:2]]
    net, x = Loop(*made), normal(T, N, F)
    program = step_time(flatten_time(reroll_time(capture(net, (x,)))))
    assert equal(program(x), reference(net, x))


class LSTMs(nn.Module):
    """Spiking LSTMs, pooled ones among them, and one whose states never fit and start anew each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        low = {"threshold": 0.05}
        self.flat = nn.ModuleList(
            [
                *(snn.SLSTM(F, F, reset_mechanism=r, **low) for r in RESETS),
                snn.SLSTM(F, 7, **low),
                snn.SLSTM(F, F, init_hidden=True, output=True, **low),
            ]
        )
        self.images = nn.ModuleList(
            [
                *(snn.SConv2dLSTM(1, 2, 3, reset_mechanism=r, **low) for r in RESETS),
                snn.SConv2dLSTM(1, 2, 3, max_pool=2, reset_mechanism="subtract", **low),
                snn.SConv2dLSTM(1, 2, (3, 5), avg_pool=2, **low),
            ]
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for lstm in (*self.flat, *self.images):
            state = lstm.reset_mem()
            steps = []
            for x_t in x:
                given = x_t if lstm in self.flat else x_t.reshape(-1, 1, 10, 10)
                out = lstm(given) if lstm.init_hidden else lstm(given, *state)
                state = out[1:]
                steps.append(out)
            results += [torch.stack(part) for part in zip(*steps, strict=True)]
        return results


def test_spiking_lstms() -> None:
    """As captured bit for bit; re-rolled, a product of all steps may sum in another order."""
    net = LSTMs()
    captured, *rest = forms(capture(net, (normal(T, N, F),)))
    for drive in DRIVES:
        x = drive(T, N, F, seed=3)
        expected = reference(net, x)
        assert 0.05 < expected[0].mean() < 0.95
        for ours, theirs in zip(captured(x), expected, strict=True):
            assert torch.equal(ours, theirs)
        for form in rest:
            for i, (ours, theirs) in enumerate(zip(form(x), expected, strict=True)):
                atol = 0 if i % 3 == 0 else 1e-6
                torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# Networks as they are written


class Tutorial(nn.Module):
    """The fully connected network of snnTorch's fifth tutorial; the input is the same at each step."""

    def __init__(self, steps: int = 5, hidden: int = 50, **leaky: Any) -> None:
        super().__init__()
        self.steps = steps
        self.fc1 = nn.Linear(64, hidden)
        self.lif1 = snn.Leaky(beta=0.95, **leaky)
        self.fc2 = nn.Linear(hidden, 10)
        self.lif2 = snn.Leaky(beta=0.95, **leaky)

    def forward(self, x: torch.Tensor) -> Any:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


class Hidden(nn.Module):
    """States on the modules, reset in the forward, convolutions, one input a step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.MaxPool2d(2),
            snn.Leaky(beta=0.5, init_hidden=True),
            nn.Flatten(),
            nn.Linear(36, 10),
            snn.Leaky(beta=0.5, init_hidden=True, output=True, reset_mechanism="none"),
        )

    def forward(self, data: torch.Tensor) -> Any:
        utils.reset(self.net)
        spikes, membranes = [], []
        for step in range(data.size(0)):
            spk, mem = self.net(data[step])
            spikes.append(spk)
            membranes.append(mem)
        return torch.stack(spikes), torch.stack(membranes)


class Synapses(nn.Module):
    """Named arguments, states made in the forward, a count of spikes and the last potential."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 20)
        self.lif = snn.Synaptic(alpha=0.9, beta=0.8)
        self.out = snn.Alpha(alpha=0.8, beta=0.7)

    def forward(self, x: torch.Tensor) -> Any:
        syn = mem = torch.zeros(x.shape[1], 20)
        exc, inh, last = self.out.reset_mem()
        count: Any = 0
        for x_t in x:
            spk, syn, mem = self.lif(self.fc(x_t), syn=syn, mem=mem.detach())
            out, exc, inh, last = self.out(spk, exc, inh, last)
            count = count + out
        return count, last


class Recurrent(nn.Module):
    """A layer whose spikes come back at the next step, between layers whose do not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.back, self.out = nn.Linear(64, 20), nn.Linear(20, 20), nn.Linear(20, 10)
        self.lif1, self.lif2 = snn.Leaky(beta=0.9), snn.Leaky(beta=0.8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spk, outputs = torch.zeros(x.shape[1], 20), []
        for x_t in x:
            spk, mem1 = self.lif1(self.fc(x_t) + self.back(spk), mem1)
            out, mem2 = self.lif2(self.out(spk), mem2)
            outputs.append(out)
        return torch.stack(outputs)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "tutorial": (Tutorial, (3, 1, 8, 8), ()),
    "hidden": (Hidden, (5, 2, 2, 8, 8), ()),
    "synapses": (Synapses, (5, 2, 64), ()),
    "recurrent": (Recurrent, (5, 2, 64), ("lif1",)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", ["reference", "lynxi-sim"])
def test_networks_are_verified(name: str, target: str) -> None:
    made, size, stepped = NETWORKS[name]
    torch.manual_seed(0)
    net = made()
    program = deploy.convert(net, (normal(*size) * 2,), target=target)
    report = next(r for r in program.history if r.name == "reroll_time")
    assert {line.split(":")[0] for line in report.skipped if "kept as" in line} == {*stepped}
    assert program.evidence is not None
    if target == "reference":
        sites = {site.name: site.layout for site in program.sites}
        assert {name for name, layout in sites.items() if layout == "steps"} == {*stepped}
        x = normal(*size, seed=4) * 2
        ours, theirs = program(x), reference(net, x)
        for a, b in zip((ours, theirs)[0], theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_framework_is_named_and_the_network_left_as_it_was() -> None:
    net = Hidden()
    x = normal(4, 2, 2, 8, 8)
    net(x)  # leaves membranes with a history on the modules, as training does
    before = {n: (b, b.clone()) for n, b in net.named_buffers()}
    assert capture(net, (x,)).source["framework"] == "snntorch"
    for name, buffer in net.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])


@pytest.mark.parametrize("made", [lambda: Tutorial(steps=1), Hidden])
def test_one_step_inside_the_forward(made: Callable[[], nn.Module]) -> None:
    """A single call is no time loop outside where the forward itself starts the neuron anew."""
    net = made()
    size = (3, 64) if isinstance(net, Tutorial) else (1, 2, 2, 8, 8)
    with torch.no_grad():
        net(normal(2 * size[0], *size[1:]))  # leaves states of another batch
    rolled = reroll_time(capture(net, (normal(*size),)))
    assert {site.layout for site in rolled.sites} == {"stepped"}
    x = normal(*size, seed=2)
    for ours, theirs in zip(rolled(x), reference(net, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


class Still(nn.Module):
    """A static input, and neurons that hear each other's last spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(64, 20), snn.RLeaky(beta=0.9, linear_features=20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spk, mem = self.lif.reset_mem()
        spikes = []
        for _ in range(4):
            spk, mem = self.lif(self.fc(x), spk, mem)
            spikes.append(spk)
        return torch.stack(spikes)


def test_a_neuron_of_as_many_states_as_time_steps() -> None:
    net = Loop(snn.Alpha(alpha=0.9, beta=0.8))
    states = len(net.neurons[0].reset_mem()) + 1  # with the spikes of the last step
    for steps in range(2, states + 2):
        program = deploy.convert(net, (grid(steps, N, F),), target="reference", time="stepped")
        x = grid(9, N, F, seed=1)
        assert equal(program(x), reference(net, x))


def test_a_static_input_is_stepped_where_spikes_come_back() -> None:
    """At the first step nothing is of that step but the neurons: the rest is copied all the same."""
    torch.manual_seed(0)
    net, x = Still(), normal(3, 64) * 3
    program = deploy.convert(net, (x,), target="reference", time="stepped")
    spikes = reference(net, x)
    assert torch.equal(program(x), spikes)
    assert 0.1 < spikes.mean() < 0.9


# What is refused


class Look(snn.Leaky):  # type: ignore[misc, name-defined]
    """Named as it likes."""


@pytest.mark.parametrize(
    ("neuron", "rule"),
    [
        (lambda: snn.Leaky(beta=0.9, inhibition=True), "inhibition"),
        (lambda: snn.Leaky(beta=0.9, state_quant=lambda v: v), "state-quant"),
        (lambda: snn.Leaky(beta=0.9, spike_grad=torch.sigmoid), "surrogate-output"),
        (lambda: snn.Leaky(beta=0.9, threshold=-0.5), "negative-threshold"),
        (lambda: snn.Leaky(beta=0.9, graded_spikes_factor=0.0), "graded-spikes"),
        (lambda: snn.Leaky(beta=beta(F).double()), "parameter-dtype"),
        (lambda: Look(beta=0.9), "look-alike-neuron"),
        (lambda: snn.LeakyParallel(F, F), "unknown-neuron"),
        (lambda: snn.SLSTM(F, F, threshold=-0.5), "negative-threshold"),
    ],
)
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_refused_by_name(neuron: Callable[[], Any], rule: str) -> None:
    assert (rule, "neurons.0") in refused(Loop(neuron()), normal(2, N, F))


def test_a_reset_mechanism_that_was_changed_later() -> None:
    neuron = snn.Leaky(beta=0.9)
    neuron.reset_mechanism = "zero"
    assert refused(Loop(neuron), normal(2, N, F)) == [("reset-mechanism", "neurons.0")]


class Handed(nn.Module):
    """Hands something to the neuron as its membrane."""

    def __init__(self, hand: Callable[..., Any]) -> None:
        super().__init__()
        self.lif, self.hand = snn.Leaky(beta=0.9), hand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem: Any = torch.zeros(N, F)
        spikes = []
        for x_t in x:
            spk, mem = self.lif(x_t, self.hand(mem, x))
            spikes.append(spk)
        return torch.stack(spikes)


@pytest.mark.parametrize(
    "hand",
    [lambda mem, x: mem * 0.5, lambda mem, x: x[0], lambda mem, x: mem * 0 + torch.ones(N, F)],
)
def test_another_membrane_than_its_own(hand: Callable[..., Any]) -> None:
    assert refused(Handed(hand), normal(3, N, F)) == [("neuron-state", "lif")]


@pytest.mark.parametrize("used", [True, False])
def test_a_second_call_from_the_same_membrane(used: bool) -> None:
    """Is refused, unless nothing uses it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(beta=0.9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mem, spikes = self.lif.reset_mem(), []
            for x_t in x:
                ahead, _ = self.lif(2 * x_t, mem)
                spk, mem = self.lif(x_t, mem)
                spikes.append(spk - ahead if used else spk)
            return torch.stack(spikes)

    if used:
        assert refused(Net(), normal(3, N, F)) == [("neuron-state", "lif")]
    else:
        (site,) = capture(Net(), (normal(3, N, F),)).sites
        assert site.T == 3


def test_a_state_that_comes_with_the_input() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(beta=0.9)

        def forward(self, x: torch.Tensor, mem: torch.Tensor) -> Any:
            return self.lif(x, mem)

    assert refused(Net(), normal(N, F), torch.zeros(N, F)) == [("neuron-state", "lif")]


def test_a_time_loop_outside() -> None:
    net = nn.Sequential(nn.Linear(F, F), snn.Leaky(beta=0.9, init_hidden=True))
    assert refused(net, normal(N, F)) == [("time-loop-outside", "1")]


class Twice(nn.Module):
    """Clears its neurons by ``utils.reset`` while it runs."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for t, x_t in enumerate(x):
            if t % 3 == 0:
                utils.reset(self)
            found.append(self.neuron(x_t))
        return torch.stack(found)


@pytest.mark.parametrize(
    "made",
    [
        lambda: snn.Leaky(beta=0.5, init_hidden=True),
        lambda: snn.Lapicque(beta=0.5, init_hidden=True),
        lambda: snn.Synaptic(alpha=0.5, beta=0.5, init_hidden=True),
        lambda: snn.Alpha(alpha=0.75, beta=0.5, init_hidden=True),
        lambda: snn.RLeaky(beta=0.5, V=0.5, all_to_all=False, init_hidden=True),
        lambda: snn.RSynaptic(alpha=0.5, beta=0.5, linear_features=F, init_hidden=True),
        lambda: snn.SLSTM(F, F, init_hidden=True),
    ],
)
def test_neurons_that_the_forward_clears(made: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    net, x = Twice(made()).eval(), grid(6, N, F)
    program = capture(net, (torch.zeros_like(x),))
    assert equal(program(x), net(x))


def test_clearing_leaves_a_state_alone_that_is_handed_over() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(beta=0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mem, found = self.lif.init_leaky(), []
            for x_t in x:
                utils.reset(self)
                spk, mem = self.lif(x_t, mem)
                found.append(spk)
            return torch.stack(found)

    net, x = Net(), grid(5, N, F)
    assert equal(capture(net, (x,))(x), net(x))


class Fed(nn.Module):
    """Feeds back to a neuron what ``feed`` makes of its last spikes."""

    def __init__(self, feed: Callable[..., Any]) -> None:
        super().__init__()
        self.lif, self.feed = snn.RLeaky(beta=0.5, V=0.5, all_to_all=False), feed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spk, mem = self.lif.reset_mem()
        found = []
        for t, x_t in enumerate(x):
            spk, mem = self.lif(x_t, self.feed(spk, t), mem)
            found.append(spk)
        return torch.stack(found)


@pytest.mark.parametrize(
    "feed",
    [
        lambda spk, t: spk * 0.5,
        lambda spk, t: torch.zeros_like(spk) if t == 3 else spk,
        lambda spk, t: spk if t else torch.ones(N, F),
    ],
)
def test_other_spikes_than_its_own_even_where_the_example_has_none(
    feed: Callable[..., Any],
) -> None:
    assert refused(Fed(feed), torch.zeros(5, N, F)) == [("neuron-state", "lif")]


def test_own_spikes_without_a_history() -> None:
    net, x = Fed(lambda spk, t: spk.detach()), grid(5, N, F)
    assert equal(capture(net, (x,))(x), net(x))


class Cut(nn.Module):
    """Starts from zeros that it keeps, cuts histories in place, reads its neuron's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lif = snn.Leaky(beta=0.5, threshold=0.75)
        self.register_buffer("start", torch.zeros(F))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem, found = self.start.expand(N, F), []
        for x_t in x:
            spk, mem = self.lif(x_t, mem)
            mem.detach_()
            found.append(spk + (mem - self.lif.threshold) * (1 - self.lif.beta))
        return torch.stack(found)


def test_what_a_training_loop_does_besides() -> None:
    net, x = Cut(), grid(5, N, F)
    assert equal(capture(net, (x,))(x), net(x))
