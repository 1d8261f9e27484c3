"""State: what survives a call is refused by name, and what a neuron keeps within one is traced."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capturing import SingleStep, captured, findings, lowered, rules
from networks import Net, rand
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.neurons import IFNode, LIFNode

T, N = 4, 2

pytestmark = pytest.mark.usefixtures("single_step")


class Memory(nn.Module):
    """Keeps a trace of its inputs from one call to the next."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("trace", torch.zeros(3))
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "buffer":
            self.trace.add_(x[0, 0])
            return x + self.trace
        if self.how == "attribute":
            y = x if self.last is None else x + self.last
            self.last = x
            return y
        if self.how == "counter":
            self.last = (self.last or 0) + 1
            return x * self.last
        if self.how == "new buffer":
            self.trace = self.trace + x[0, 0]
            return x + self.trace
        raise AssertionError


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("buffer", "trace"),
        ("attribute", "last"),
        ("counter", "last"),
        ("new buffer", "trace"),
    ],
)
def test_state_that_survives(how: str, name: str) -> None:
    found = findings(nn.Sequential(Memory(how), IFNode()), rand(T, N, 3))
    assert rules(found) == [("surviving-state", "0")]
    assert f"self.{name}" in found[0].found


def test_a_written_buffer_whose_value_is_not_used_in_the_same_call() -> None:
    """Two calls give the same outputs here; a third, on other inputs, would not."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.spike(x + s.memory.trace)
        s.memory.trace.clamp_(min=x.min().detach())
        return y

    found = findings(Net(run, spike=IFNode(), memory=Memory("")), rand(T, N, 3) + 100)
    assert rules(found) == [("surviving-state", "memory")]


def test_a_value_that_the_first_call_caches() -> None:
    """The network goes on with what its first input gave; no constant of the graph may."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        if s.memory.last is None:
            s.memory.last = float(x.max())
        return s.spike(x / s.memory.last)

    found = findings(Net(run, spike=IFNode(), memory=Memory("")), rand(T, N, 3))
    assert rules(found) == [("surviving-state", "memory")]


class Holder:
    """A plain object with a state; as a call, somebody's normaliser of observations."""

    def __init__(self, mem: Any) -> None:
        self.mem = mem

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.mem = 0.9 * self.mem + 0.1 * x.mean(0)
        return x - self.mem


class Slots:
    __slots__ = ("mem",)

    def __init__(self, mem: Any) -> None:
        self.mem = mem


def _looped() -> list[Any]:
    """A list with a state that holds itself too."""
    found: list[Any] = [torch.zeros(N, 3)]
    found.append(found)
    return found


@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0])
@pytest.mark.parametrize(
    ("state", "way"),
    [
        (lambda: torch.zeros(N, 3), ""),
        (lambda: nn.Buffer(torch.zeros(N, 3)), ""),
        (lambda: [(torch.zeros(N, 3),)], "[0][0]"),
        (lambda: {"a": {"mem": torch.zeros(N, 3)}}, "['a']['mem']"),
        (lambda: Holder(torch.zeros(N, 3)), ".mem"),
        (lambda: Slots([torch.zeros(N, 3)]), ".mem[0]"),
        (lambda: SimpleNamespace(mem=torch.zeros(N, 3)), ".mem"),
        (_looped, "[0]"),
    ],
    ids=["tensor", "buffer", "list", "dict", "object", "slots", "namespace", "cycle"],
)
def test_a_membrane_of_ones_own(state: Callable[[], Any], way: str, scale: float) -> None:
    """Whatever keeps it; of an example of zeros nothing is left, and one call after it shows nothing."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        mem = eval(f"s.kept{way}", {"s": s})
        mem.mul_(0.9).add_(s.fc(x))
        spikes = (mem > 1).float()
        mem.mul_(1 - spikes)
        return spikes

    net = Net(run, fc=nn.Linear(3, 3, bias=False))
    net.kept = state()
    found = findings(net, rand(N, 3) * scale)
    assert rules(found) == [("surviving-state", "")]
    assert f"writes to self.kept{way}, which survives the call and changes" in found[0].found
    assert "declare the state as a neuron's" in found[0].fix


def test_a_normaliser_that_runs_on_in_a_plain_object() -> None:
    net = Net(lambda s, x: s.spike(s.norm(x)), spike=IFNode())
    net.norm = Holder(torch.zeros(N, 3))
    found = findings(net, rand(T, N, 3))
    assert rules(found) == [("surviving-state", "")]
    assert "self.norm.mem" in found[0].found


def test_what_is_merely_kept_has_advice_of_its_own() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        s.calls += 1
        return s.spike(x)

    net = Net(run, spike=IFNode())
    net.calls = 0
    found = findings(net, rand(T, N, 3))
    assert rules(found) == [("surviving-state", "")]
    assert "self.calls, which survives the call; no output was seen to change" in found[0].found
    assert "a count or a log" in found[0].fix


def test_an_earlier_value_that_is_read_and_hardly_shows() -> None:
    """Two calls leave what each leaves alone, and no spike comes of the difference."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.spike(x + s.last.clamp(-1e-9, 1e-9))
        s.last = x
        return y

    net = Net(run, spike=IFNode())
    net.last = torch.zeros(())
    assert rules(findings(net, rand(T, N, 3))) == [("surviving-state", "")]


class Anew(nn.Module):
    """Keeps on self what each call begins anew."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc = how, nn.Linear(3, 3)
        self.mem: Any = None
        self.register_buffer("trace", torch.ones(N, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "shape":
            self.mem = x.shape[1]
            return self._spikes(x, torch.zeros(self.mem, 3))
        if self.how == "cache":
            if self.mem is None or self.mem.shape != x.shape[1:]:
                self.mem = torch.arange(3.0).expand(x.shape[1:])
            return self._spikes(x, self.mem)
        if self.how == "buffer in place":
            return self._spikes(x, self.trace.zero_())
        if self.how == "new buffer":
            self.trace = torch.zeros_like(self.trace)
            return self._spikes(x, self.trace)
        if self.how == "nested":
            self.mem = {"layers": [torch.zeros(N, 3)]}
            return self._spikes(x, self.mem["layers"][0])
        self.mem = torch.zeros(x.shape[1:])
        spikes = self._spikes(x, self.mem)
        if self.how == "log":
            self.mem = {"spikes": spikes, "shape": x.shape}
        return spikes

    def _spikes(self, x: torch.Tensor, mem: torch.Tensor) -> torch.Tensor:
        spikes = []
        for step in x:
            mem *= 0.9
            mem += self.fc(step)
            spikes.append((mem > 0.5).float())
            mem -= mem * spikes[-1]
        return torch.stack(spikes)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "how", ["membrane", "shape", "log", "buffer in place", "new buffer", "nested"]
)
def test_attributes_that_each_call_sets_anew(how: str, warm: bool) -> None:
    net = Anew(how)
    if warm:
        with torch.no_grad():
            net(rand(T, N, 3, seed=1))
    before = dict(vars(net)), net.trace.clone()
    captured(net, rand(T, N, 3))
    assert all(vars(net)[name] is value for name, value in before[0].items())
    assert torch.equal(net.trace, before[1])


def test_a_single_step_neuron_whose_spikes_are_used_at_the_end_only() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        for t in range(T):
            y = s.b(s.fc(s.a(x[t])))
        return y

    net = Net(run, fc=nn.Linear(3, 3), a=SingleStep(), b=SingleStep())
    program = captured(net, rand(T, N, 3))
    for form in (program, lowered(program)):
        assert [len(s.spikes) for s in form.sites] == [T, T]


def test_a_neurons_state_is_read_after_its_call() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        between = []
        for t in range(T):
            s.spike(s.fc(x[t]))
            between.append(s.spike.v)
        return torch.stack(between) + s.spike.v

    net = Net(run, fc=nn.Linear(3, 3), spike=SingleStep())
    program = captured(net, rand(T, N, 3))
    for form in (program, lowered(program)):
        assert [len(s.spikes) for s in form.sites] == [T]


def test_a_neurons_state_before_its_first_call() -> None:
    net = Net(
        lambda s, x: s.spike.v + torch.stack([s.spike(x[t]) for t in range(T)]), spike=SingleStep()
    )
    found = findings(net, rand(T, N, 3))
    assert rules(found) == [("neuron-state", "spike")]
    assert found[0].found == "the forward reads its v"


def test_setting_a_neurons_state() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        s.spike.v = torch.full_like(x[0], 0.5)
        return torch.stack([s.spike(x[t]) for t in range(T)])

    found = findings(Net(run, spike=SingleStep()), rand(T, N, 3))
    assert rules(found) == [("neuron-state", "spike")]
    assert found[0].found == "the forward sets its v"


def test_a_neuron_in_a_list() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spikes = [SingleStep()]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.spikes[0](x[t]) for t in range(T)])

    found = findings(Hidden(), rand(T, N, 3))
    assert [f.rule for f in found] == ["hidden-module"]
    assert found[0].where == "spikes[0]"


def test_a_multi_step_neuron_in_a_list_is_refused_too() -> None:
    """Its equation would be traced as loose arithmetic, with no layer to compare or to name."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spikes = {"a": (LIFNode(),)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.spikes["a"][0](x)

    assert [f.rule for f in findings(Hidden(), rand(T, N, 3))] == ["hidden-module"]


def test_a_neuron_in_a_plain_object_is_refused_too() -> None:
    net = Net(lambda s, x: s.helper.layers[0](x))
    net.helper = SimpleNamespace(layers=[LIFNode()])
    assert rules(findings(net, rand(T, N, 3))) == [("hidden-module", "helper.layers[0]")]


def test_other_modules_in_a_plain_object() -> None:
    """What keeps nothing traces as it is, and what does is seen."""
    net = Net(lambda s, x: s.spike(s.helper.layer(x)), spike=LIFNode())
    net.helper = SimpleNamespace(layer=nn.ReLU())
    captured(net, rand(T, N, 3))
    net.helper.layer = Memory("buffer")
    found = findings(net, torch.zeros(T, N, 3))
    assert rules(found) == [("surviving-state", "helper.layer")]


def test_state_outside_the_network() -> None:
    calls: list[int] = []

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return s.spike(x) * len(calls)

    found = findings(Net(run, spike=IFNode()), rand(T, N, 3) + 1)
    assert rules(found) == [("surviving-state", "")]


def test_state_outside_the_network_that_does_not_show() -> None:
    """The trace leaves its tensor there, which the next call cannot compute with."""
    kept: dict[str, Any] = {}

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        kept["mem"] = kept.get("mem", 0.0) * 1e-9 + s.fc(x)
        return s.spike(kept["mem"])

    found = findings(Net(run, fc=nn.Linear(3, 3), spike=IFNode()), rand(T, N, 3))
    assert rules(found) == [("surviving-state", "")]
    assert "as in a global" in found[0].found


@pytest.mark.parametrize("children", [{}, {"spike": IFNode()}], ids=["no neuron", "a neuron"])
def test_state_outside_the_network_that_shows_late(children: dict[str, nn.Module]) -> None:
    """It is not put down to the neurons, of which there may be none."""
    calls: list[int] = []

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (s.spike(x) if children else x) * (1 if len(calls) < 5 else 2)

    found = findings(Net(run, **children), rand(T, N, 3) + 1)
    assert rules(found) == [("surviving-state", "")]


def test_a_batch_size_kept_beside_integers() -> None:
    """Which no random numbers take the place of."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        s.batch = x.shape[1]
        return s.spike(s.embed(x).reshape(T, s.batch, 3))

    net = Net(run, embed=nn.Embedding(T * N, 3), spike=IFNode())
    x = torch.arange(T * N).reshape(T, N)
    assert torch.equal(capture(net, (x,))(x), net(x))


class Settings:
    """An object that is equal to itself alone."""

    scale = 2.0


def test_objects_that_a_module_keeps_are_no_state() -> None:
    net = Net(lambda s, x: s.spike(s.fc(x) * s.settings.scale), fc=nn.Linear(3, 3), spike=IFNode())
    net.settings = Settings()
    captured(net, rand(T, N, 3))
