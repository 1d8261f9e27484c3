"""Loops over time, taken at once where nothing forbids it: equal, and the report says what was done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spikeport import deploy
from spikeport.converters.capture import capture
from spikeport.converters.errors import MismatchError
from spikeport.converters.graphs import components
from spikeport.converters.neurons import IFNode
from spikeport.converters.passes import reroll_time
from spikeport.converters.program import NEURON, NEURON_STEP, Program
from spikeport.targets.reference import Reference

snn = pytest.importorskip("snntorch")
T, N, F = 5, 2, 12


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.4


class Layers(nn.Module):
    """Two layers that a function runs as it likes."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.fc1, self.fc2 = nn.Linear(F, F), nn.Linear(F, F)
        self.per_step = nn.ModuleList(nn.Linear(F, F) for _ in range(T))
        self.conv, self.norm = nn.Conv1d(1, 3, 3, padding=1), nn.BatchNorm1d(3)
        self.lif1 = snn.Leaky(beta=0.9, init_hidden=True, threshold=0.5)
        self.lif2 = snn.Leaky(beta=0.8, init_hidden=True, threshold=0.5)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)


def rolled(run: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    """The re-rolled program; it gives what the network gives."""
    net = Layers(run).eval()
    program = reroll_time(capture(net, inputs))
    for example in (inputs, tuple(rand(*x.shape, seed=9) for x in inputs)):
        with torch.no_grad():
            expected = copy.deepcopy(net)(*example)
        found = program(*example)
        pairs = (
            [(found, expected)]
            if isinstance(found, torch.Tensor)
            else zip(found, expected, strict=True)
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    return program


def count(program: Program, target: Any) -> int:
    return sum(n.target is target for n in program.graph.nodes)


def collect(step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A loop over the first dimension of its input."""

    def run(net: Layers, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([step(net, x_t) for x_t in x])

    return run


STEPS: dict[str, Callable[..., torch.Tensor]] = {
    "two layers": lambda n, x: n.lif2(n.fc2(n.lif1(n.fc1(x)))),
    "a residual": lambda n, x: n.lif2(n.fc2(s := n.lif1(n.fc1(x))) + s),
    "convolution and norm": lambda n, x: n.lif1(n.norm(n.conv(x.unsqueeze(1))).flatten(1)),
    "a mean": lambda n, x: n.lif1(x - x.mean(-1, keepdim=True)) * x.amax(1, True),
    "softmax": lambda n, x: n.lif1(torch.softmax(n.fc1(x), -1)),
    "attention": lambda n, x: n.lif1(
        (torch.softmax(x.unsqueeze(2) @ x.unsqueeze(1), -1) @ x.unsqueeze(2)).squeeze(2)
    ),
    "halves": lambda n, x: n.lif1(torch.cat([x[:, F // 2 :], x[:, : F // 2]], 1)),
    "permuted": lambda n, x: n.lif1(x.view(N, 3, 4).permute(0, 2, 1).reshape(N, F)),
    "transposed": lambda n, x: n.lif1(x.view(N, 3, 4).transpose(1, 2).flatten(1)),
    "expanded": lambda n, x: n.lif1(x.unsqueeze(1).expand(N, 3, F).sum(1)),
    "one element": lambda n, x: n.lif1(x * x[:, 3].unsqueeze(1)),
    "broadcast": lambda n, x: n.lif1(x.view(N, 3, 4) + x[:, :4].unsqueeze(1)).flatten(1),
    "layer norm": lambda n, x: n.lif1(nn.functional.layer_norm(x, (F,))),
    "pooling": lambda n, x: n.lif1(nn.functional.avg_pool1d(x.unsqueeze(1), 2).flatten(1)),
    "unbatched pooling": lambda n, x: n.lif1(nn.functional.max_pool1d(x, 2)),
    "the largest": lambda n, x: n.lif1(x * (x >= n.fc1(x).topk(3)[0][:, 2:])),
    "running sum": lambda n, x: n.lif1(x.cumsum(1)),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_operator_over_time(name: str) -> None:
    program = rolled(collect(STEPS[name]), rand(T, N, F))
    assert count(program, NEURON_STEP) == 0
    assert len(list(program.graph.nodes)) < 40
    kept = [line for line in program.history[-1].skipped if "no rule" in line]
    assert bool(kept) == (name in ("the largest", "running sum"))


def static(net: Layers, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([net.lif1(net.fc1(x)) for _ in range(T)])


def count_and_last(net: Layers, x: torch.Tensor) -> Any:
    total: Any = 0.0
    for x_t in x:
        spikes = net.lif1(net.fc1(x_t))
        total = total + spikes
    return total / len(x), net.fc2(spikes)


def time_second(net: Layers, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([net.lif1(x[:, t]) for t in range(x.shape[1])], dim=1)


def concatenated(net: Layers, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([net.lif1(x_t) for x_t in x.chunk(T)], dim=1)


def in_advance(net: Layers, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([net.lif1(x[t] + x[t + 1]) for t in range(T - 1)])


def delayed(net: Layers, x: torch.Tensor) -> torch.Tensor:
    before, outputs = torch.zeros(N, F), []
    for x_t in x:
        spikes = net.lif1(x_t)
        outputs.append(net.lif2(net.fc2(spikes) + before))
        before = spikes
    return torch.stack(outputs)


def two_loops(net: Layers, x: torch.Tensor) -> torch.Tensor:
    first = torch.stack([net.lif1(net.fc1(x_t)) for x_t in x])
    return torch.stack([net.lif2(y_t) for y_t in first - first.mean(0)])


def other_spelling(net: Layers, x: torch.Tensor) -> torch.Tensor:
    rates = torch.zeros(T, N, F)
    for t in range(T):
        rates[t] = net.lif1(x[t])
    return rates.mean(0)


@pytest.mark.parametrize(
    ("run", "size", "limit"),
    [
        (static, (N, F), 8),
        (count_and_last, (T, N, F), 24),
        (time_second, (N, T, F), 5),
        (concatenated, (T * N, F), 7),
        (in_advance, (T, N, F), 7),
        (delayed, (T, N, F), 15),
        (two_loops, (T, N, F), 12),
        (other_spelling, (T, N, F), 40),
    ],
)
def test_loops_as_they_are_written(
    run: Callable[..., Any], size: tuple[int, ...], limit: int
) -> None:
    program = rolled(run, rand(*size))
    assert count(program, NEURON_STEP) == 0
    assert len(list(program.graph.nodes)) <= limit
    assert not program.history[-1].skipped


# Where it does not apply


def recurrent(net: Layers, x: torch.Tensor) -> torch.Tensor:
    spikes, outputs = torch.zeros(N, F), []
    for x_t in x:
        spikes = net.lif1(net.fc1(x_t) + net.fc2(spikes))
        outputs.append(net.lif2(spikes))
    return torch.stack(outputs)


def test_a_recurrent_layer_stays_steps_and_what_is_around_it_does_not() -> None:
    program = rolled(recurrent, rand(T, N, F))
    assert count(program, NEURON_STEP) == T
    assert count(program, NEURON) == 1
    report = program.history[-1]
    assert any(line.startswith("fc1 (aten.linear): 5 steps at once") for line in report.done)
    (why,) = report.skipped
    assert why.startswith("lif1: kept as 5 steps: its input depends on its own earlier output")
    assert "fc2 (aten.linear)" in why


def test_a_cycle_through_two_layers() -> None:
    def run(net: Layers, x: torch.Tensor) -> torch.Tensor:
        back, outputs = torch.zeros(N, F), []
        for x_t in x:
            back = net.lif2(net.fc2(net.lif1(x_t + back)))
            outputs.append(back)
        return torch.stack(outputs)

    report = rolled(run, rand(T, N, F)).history[-1]
    assert [line.split(":")[0] for line in report.skipped] == ["lif1", "lif2"]


def differ(net: Layers, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([net.lif1(x[t] * 2 if t == 2 else net.fc1(x[t])) for t in range(T)])


def weights_of_a_step(net: Layers, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([net.lif1(net.per_step[t](x[t])) for t in range(T)])


def uneven(net: Layers, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([net.lif1(part.sum(0)) for part in x.chunk(T)])


@pytest.mark.parametrize(
    ("run", "steps"), [(differ, T), (weights_of_a_step, T), (uneven, 2 * T - 1)]
)
def test_steps_that_differ(run: Callable[..., Any], steps: int) -> None:
    """The neuron is rolled all the same; its input is computed as it was written, and said to be."""
    program = rolled(run, rand(steps, N, F))
    assert count(program, NEURON_STEP) == 0
    (why,) = program.history[-1].skipped
    assert why.startswith("lif1: its input is computed step by step, because step ")


def test_a_network_without_a_loop() -> None:
    program = capture(nn.Sequential(nn.Linear(F, F), IFNode()), (rand(T, N, F),))
    assert reroll_time(program).history[-1].skipped == ("no neuron is called step by step",)


def test_a_wrong_stack_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that mixes up the steps computes something else, and that is said."""

    def wrong(program: Program) -> Program:
        program = reroll_time(program)
        (n,) = (n for n in program.graph.nodes if n.target is NEURON)
        x = n.args[0]
        with program.graph.inserting_before(n):
            flipped = program.graph.call_function(torch.ops.aten.flip.default, (x, [0]))
        flipped.meta = dict(x.meta)
        n.replace_input_with(x, flipped)
        program.module.recompile()
        sites = tuple(replace(s, drives=(flipped.name,)) for s in program.sites)
        return replace(program, sites=sites)

    monkeypatch.setattr(Reference, "passes", lambda *_: (wrong,))
    with pytest.raises(MismatchError, match="lif1: its drive differs"):
        deploy.convert(
            Layers(collect(lambda n, x: n.lif1(x))), (rand(T, N, F),), target="reference"
        )


class LastToFirst(nn.Module):
    """Two layers of one neuron module; the second hears the first one's spikes of the step before."""

    def __init__(self, last: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, last)
        self.lif = snn.Leaky(beta=0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = v1 = torch.zeros(x.shape[1], 6)
        v2, spikes = torch.zeros(x.shape[1], self.fc2.out_features), []
        for now in x:
            last, v2 = self.lif(self.fc2(first), v2)
            first, v1 = self.lif(self.fc1(now), v1)
            spikes.append(last)
        return torch.stack(spikes)


@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("last", [6, 3])
def test_layers_of_one_module_keep_their_names(last: int, time: Any, tmp_path: Path) -> None:
    """Re-rolled, the layer that is called second comes first, as it needs nothing of the other."""
    net, x = LastToFirst(last), rand(T, N, 4) * 4
    program = deploy.convert(net, (x,), "lynxi-sim", dtype="float32", time=time)
    assert program.captured is not None
    for part in (program, program.captured):
        shapes = {site.name: part.shape(site.drives[0])[-1] for site in part.sites}
        assert shapes == {"lif": last, "lif#2": 6}
    deploy.compile(program, tmp_path / "a", cache=False)
    report = deploy.compare(net, deploy.load(tmp_path / "a"), [(x, torch.zeros(N))])
    assert not any(any(layer.differing) or layer.unexplained for layer in report.layers)


def test_a_reset_that_pools_otherwise_than_the_spikes_is_verified() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell = snn.SConv2dLSTM(
                1, 2, 3, threshold=0.05, max_pool=2, reset_mechanism="subtract"
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (syn, mem), spikes = self.cell.reset_mem(), []
            for now in x:
                spike, syn, mem = self.cell(now, syn, mem)
                spikes.append(spike)
            return torch.stack(spikes)

    program = deploy.convert(Net(), (rand(3, 2, 1, 8, 8),), "reference")
    assert [site.name for site in program.sites] == ["cell", "cell#2"]


def test_the_graph_does_not_grow_with_time() -> None:
    sizes = [len(list(rolled(static, rand(N, F)).graph.nodes))]
    step = collect(STEPS["two layers"])
    sizes = [len(list(rolled(step, rand(steps, N, F)).graph.nodes)) for steps in (3, 12)]
    assert sizes[0] == sizes[1]


def test_components() -> None:
    graph = {0: [1], 1: [2, 3], 2: [0], 3: [4], 4: [], 5: [5, 4]}
    assert sorted(map(sorted, components(graph))) == [[0, 1, 2], [3], [4], [5]]
    chain = {i: [i + 1] for i in range(5000)} | {5000: [0]}
    assert len(components(chain)) == 1
