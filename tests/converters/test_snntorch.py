"""Networks of the real snnTorch, 1.0 and 0.9, whichever is installed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import equal, grid
from snntorch_loops import Loop, beta, normal
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
T, N, F = 4, 3, 100


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
