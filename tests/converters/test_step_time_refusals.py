"""What no single step can compute is refused, with the true reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Net, rand
from steps import findings, layer, rewritten

from spikeport.converters.capture import capture
from spikeport.converters.errors import UnsupportedError, UsageError
from spikeport.converters.neurons import LIFNode
from spikeport.converters.passes import step_time

T, N = 4, 3


def test_everything_that_no_step_can_compute_is_told_at_once():
    def run(n: Any, x: torch.Tensor) -> Any:
        seen = n.lif(n.fc(x))
        centred = n.lif2(seen - seen.mean(0))  # needs steps that are still to come
        weighted = n.lif3(seen * torch.arange(1.0, T + 1).reshape(T, 1, 1))
        return centred, weighted, seen.flip(0), seen[1]

    net = Net(run, fc=layer(6, 5), lif=LIFNode(), lif2=LIFNode(), lif3=LIFNode())
    found = findings(net, rand(T, N, 6))
    assert [rule for rule, _ in found] == ["mixes-time", "time-varying", "steps-differ", "output"]


def test_control_flow_that_depends_on_time_is_named_with_the_step():
    def run(n: Any, x: torch.Tensor) -> torch.Tensor:
        spikes, back, seen = n.lif(x), torch.zeros(N, 5), []
        for t in range(x.shape[0]):
            back = back * 0.5 + spikes[t] if t != 2 else back - spikes[t]
            seen.append(back)
        return torch.stack(seen)

    net = Net(run, lif=LIFNode())
    with pytest.raises(UnsupportedError, match="step 2 computes something else") as caught:
        rewritten(net, rand(T, N, 5))
    assert [f.rule for f in caught.value.findings] == ["steps-differ"]


def test_a_state_that_starts_from_the_input_is_refused():
    def run(n: Any, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        spikes, back, seen = n.lif(x), start, []
        for t in range(x.shape[0]):
            back = back * 0.5 + spikes[t]
            seen.append(back)
        return torch.stack(seen)

    found = findings(Net(run, lif=LIFNode()), rand(T, N, 5), rand(N, 5))
    assert found[0][0] == "state-init"


@pytest.mark.parametrize(
    ("run", "x", "said"),
    [
        (lambda n, x: n.lif(x), rand(1, N, 5), "the network: 1 time step; .* 2 time steps or more"),
        (lambda n, x: x * 2, rand(T, N, 5), "no declared neuron; .*dynamics"),
        (lambda n, x: n.lif(n.lif(x)[::2]), rand(T, N, 5), "lif, lif#2: 2 and 4 time steps"),
        (
            lambda n, x: torch.cat([n.lif(x[t : t + 1]) for t in range(T)]),
            rand(T, N, 5),
            "lif: several calls, .* that starts anew",
        ),
    ],
)
def test_programs_without_steps_in_common_are_refused(run, x, said):
    with pytest.raises(UnsupportedError, match=said):
        rewritten(Net(run, lif=LIFNode()), x)


@pytest.mark.parametrize(
    ("drive", "size", "rule", "said"),
    [
        (
            lambda x: torch.stack([x // t for t in (1, 2, 3, 4)]),
            (N, 5),
            "time-varying",
            "of its own",
        ),
        (lambda x: x.logcumsumexp(-1), (T, N, 5), "mixes-time", "is not known step by step"),
        (lambda x: x.cumsum(0), (T, N, 5), "mixes-time", "over the time steps together"),
    ],
)
def test_the_reason_is_the_true_one(drive, size, rule, said):
    net = Net(lambda n, x: n.lif(drive(x)), lif=LIFNode())
    with pytest.raises(UnsupportedError, match=said) as caught:
        step_time(capture(net, (rand(*size),)))
    assert {f.rule for f in caught.value.findings} == {rule}


def test_steps_are_called_by_their_numbers_and_delays_what_they_are():
    def run(n: Any, x: torch.Tensor) -> torch.Tensor:
        seen = n.lif(n.fc(x.flatten(0, 1)).unflatten(0, (T, N)))
        return seen.flatten(0, 1)[N:]

    with pytest.raises(UnsupportedError, match="time steps 1 to 3 of 0 to 3 are taken out"):
        rewritten(Net(run, fc=layer(6, 5), lif=LIFNode()), rand(T, N, 6))

    def late(n: Any, x: torch.Tensor) -> torch.Tensor:
        seen = n.lif(x)
        return seen + n.fc(torch.stack([*[torch.zeros(N, 5)] * (T - 1), seen[0]]))

    with pytest.raises(
        UnsupportedError, match=r"4 time steps that cat puts together, one .* delay"
    ):
        rewritten(Net(late, fc=layer(5, 5), lif=LIFNode()), rand(T, N, 5))


def test_inputs_with_other_numbers_of_steps_are_refused():
    net = Net(lambda n, x, y: n.lif(x + y), lif=LIFNode())
    program = rewritten(net, rand(T, N, 5), rand(T, N, 5))
    with pytest.raises(UsageError, match="2 and 4 time steps"):
        program(rand(4, N, 5), rand(2, N, 5))
    with pytest.raises(UsageError, match="1 inputs given, 2 wanted"):
        program(rand(4, N, 5))
