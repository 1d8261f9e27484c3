"""Capabilities are data, and the checker returns every rule that a graph breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from spikeport import deploy, targets
from spikeport.converters import neurons
from spikeport.converters.capture import capture
from spikeport.converters.errors import UnsupportedError
from spikeport.converters.neurons import IFNode
from spikeport.converters.passes import flatten_time, lower_neurons
from spikeport.targets import Capabilities
from spikeport.targets.base import check, memory
from spikeport.targets.lynxi import adapter


class _Target:
    name = "toy"

    def __init__(self, **capabilities: object) -> None:
        everything: dict[str, object] = {"ops": None, "dtypes": None}
        self.capabilities = Capabilities(**{**everything, **capabilities})  # type: ignore[arg-type]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.spikes = IFNode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return torch.erf(self.spikes(y))


def _program(N: int = 2):
    return capture(Net().eval(), (torch.rand(4, N, 2, 8, 8),))


def test_a_target_that_takes_all_finds_nothing() -> None:
    assert not check(_program(), _Target())


def test_all_findings_come_at_once_each_with_its_place() -> None:
    wanted = Capabilities(
        ops=frozenset({"aten.conv2d", "aten.reshape"}),
        dtypes=frozenset({torch.float16}),
        max_rank=4,
        max_batch=1,
    )
    found = check(_program(), _Target(**vars(wanted)))
    by_rule = {f.rule for f in found}
    assert by_rule == {"batch", "rank", "dtype", "operator"}
    operators = {(f.where, f.found) for f in found if f.rule == "operator"}
    assert operators == {("spikes", "spikeport.neuron"), ("", "aten.erf")}
    rank = next(f for f in found if f.rule == "rank" and f.where == "spikes")
    assert "[4, 2, 3, 6, 6], rank 5" in rank.found
    assert rank.allowed == "rank up to 4"
    assert rank.node == "neuron"
    assert rank.target == "toy"
    assert rank.fix


def test_flattened_and_lowered_the_same_network_fits_rank_4() -> None:
    program = lower_neurons(flatten_time(_program()))
    found = check(program, _Target(max_rank=4, ops=targets.get("lynxi").capabilities.ops))
    assert [(f.rule, f.found) for f in found] == [("operator", "aten.erf")]


def test_memory_counts_weights_and_what_is_alive_at_once() -> None:
    program = _program()
    weights = 4 * (3 * 2 * 9 + 3)
    drive = 4 * 4 * 2 * 3 * 6 * 6
    # The widest moment is the neuron's: its drive and its spikes.
    assert weights + 2 * drive <= memory(program) <= weights + 3 * drive
    assert not check(program, _Target(memory=memory(program)))
    (finding,) = check(program, _Target(memory=memory(program) - 1))
    assert finding.rule == "memory"


def test_a_device_that_rounds_anyway_is_a_warning() -> None:
    (finding,) = check(_program(), _Target(arithmetic=torch.float16))
    assert (finding.rule, finding.severity) == ("arithmetic", "warning")
    assert not check(_program(), _Target(arithmetic=torch.float16)).errors


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        (neurons.EIF, {"tau": 2.0, "v_rest": 0.0, "theta_rh": 0.8, "delta_T": 1.0}, "exp"),
        (neurons.CLIF, {"tau": 2.0, "jump": 1.0}, "sigmoid"),
        # A function of parameters alone is computed before.
        (neurons.ParametricLIF, {"w": torch.tensor(0.3), "v_rest": 0.0}, ""),
        (neurons.QIF, {"tau": 2.0, "v_rest": 0.0, "v_c": 0.8, "a_0": 1.0}, ""),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_functions_that_each_runtime_rounds_its_own_way(kind: Any, given: Any, named: str) -> None:
    program = capture(nn.Sequential(neurons.Node(kind, **given)), (torch.rand(4, 2, 5),))
    found = check(program, _Target())
    assert [(f.rule, f.where, f.severity) for f in found] == [("last-bit", "0", "warning")] * bool(
        named
    )
    assert all(f.found.startswith(f"{named} in the charge of {kind.name}") for f in found)
    assert not check(program, _Target(torch_functions=True))


class Handwritten(nn.Module):
    """Steps of its own, and what only looks like them."""

    def __init__(self, last: Callable[..., Any]) -> None:
        super().__init__()
        self.fc, self.lif, self.last = nn.Linear(5, 4), IFNode(), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.fc(x))
        return self.lif(found)


@pytest.mark.parametrize(
    ("last", "warned"),
    [
        (lambda h: (h > 1).float(), True),
        (lambda h: h * (h >= 1), True),
        (lambda h: torch.where(h > 0, 1.0, 0.0), True),
        (lambda h: torch.zeros_like(h).index_put((h > 1,), torch.tensor(1.0)), True),
        (lambda h: torch.heaviside(h, torch.tensor(1.0)), True),
        (lambda h: h.relu() + nn.functional.leaky_relu(h), False),
        (lambda h: h.masked_fill(torch.arange(4) > 2, 0.0), False),
    ],
)
def test_a_step_that_nobody_declared_is_told_of_in_float16(last: Any, warned: bool) -> None:
    net, x = Handwritten(last), torch.rand(4, 2, 5)
    rules = {f.rule for f in deploy.check(net, (x,), targets=["lynxi-sim"])}
    assert rules == ({"undeclared-neuron"} if warned else set())
    assert not deploy.check(net, (x,), targets=["reference"])


def test_a_count_of_spikes_is_no_step_of_its_own() -> None:
    class Voting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(5, 4), IFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.lif(self.fc(x)).sum(0) > 1).float()

    assert not deploy.check(Voting(), (torch.rand(4, 2, 5),), targets=["lynxi-sim"])


def test_a_batch_too_large_for_the_chip_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is Lynxi's own, the limit lowered so that the example fits this machine."""
    assert targets.get("lynxi").capabilities.memory == 8 * 2**30
    small = replace(adapter.CAPABILITIES, memory=100_000)
    monkeypatch.setattr(adapter, "CAPABILITIES", small)
    net = nn.Sequential(nn.Linear(100, 50), IFNode()).eval()
    deploy.convert(net, (torch.rand(4, 8, 100),), target="lynxi-sim")
    with pytest.raises(UnsupportedError) as caught:
        deploy.convert(net, (torch.rand(4, 512, 100),), target="lynxi-sim")
    (finding,) = caught.value.findings
    assert finding.rule == "memory"
    assert "batch of 512" in finding.found
    assert finding.fix == "convert with a smaller example input"


def test_an_operator_with_several_results_is_judged_once() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spikes = IFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.spikes(x).mean(0).sort(-1).values

    found = deploy.check(Sorted().eval(), (torch.rand(4, 2, 8),), targets=["lynxi"])
    assert ("operator", "aten.sort") in {(f.rule, f.found) for f in found}
    assert "getitem" not in {f.found for f in found if f.rule == "operator"}
