"""What comes back: NIR's cycles, loops over time, and what is done with all their steps."""

from __future__ import annotations

import functools
from collections import deque
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
from networks import Net
from nir_equations import interpret
from nir_files import DT, GENERATOR, GRID, compiled, file
from torch import nn

from spikeport import deploy
from spikeport.converters import neurons
from spikeport.converters.errors import CaptureError, UnsupportedError
from spikeport.converters.neurons import Neuron, Node, Readout
from spikeport.converters.sources.nir import NirNetwork
from spikeport.converters.sources.nir.layers import Cell


def cycle(edges: str, **nodes: Any) -> nir.NIRGraph:
    """Neurons of three, from x to y."""
    nodes = {"x": nir.Input(np.array([3])), "y": nir.Output(np.array([3])), **nodes}
    pairs = [tuple(edge.split("-")) for edge in edges.split()]
    return nir.NIRGraph(nodes, pairs, type_check=False)


def spiking() -> nir.LIF:
    tau = np.array([2.0, 4.0, 3.0]) * DT
    return nir.LIF(tau, tau / DT, np.zeros(3), np.ones(3), np.full(3, -0.25))


def mixing(seed: int, scale: float = 1.0) -> nir.Affine:
    random = np.random.default_rng(seed)
    weight, bias = (random.integers(-8, 9, size) / 8 * scale for size in ((3, 3), (3,)))
    return nir.Affine(weight.astype(np.float32), bias.astype(np.float32))


def held(steps: int) -> nir.Delay:
    return nir.Delay(np.full(3, steps * DT))


CYCLES = {
    "itself": lambda: cycle("x-a a-w w-a a-y", a=spiking(), w=mixing(0)),
    "at-once": lambda: cycle("x-a a-a a-y", a=spiking()),
    "two": lambda: cycle(
        "x-a a-u u-b b-w w-a b-y", a=spiking(), b=spiking(), u=mixing(1), w=mixing(2)
    ),
    "delayed": lambda: cycle("x-a a-d d-w w-a a-y", a=spiking(), w=mixing(3), d=held(2)),
}


@pytest.mark.parametrize("name", CYCLES)
def test_cycles_are_written_as_edges_that_go_back(name: str, tmp_path: Path) -> None:
    """Held against an interpreter of NIR's equations, which holds back what goes back by one step."""
    source, x = CYCLES[name](), GRID[..., :3] * 2
    net = NirNetwork(source, DT)
    path = compiled(net, (x,), tmp_path, dt=DT)
    assert 0.05 < net(x).mean() < 0.8
    assert torch.equal(deploy.load(path)(x), net(x))
    written = nir.read(file(path))
    kinds, found = (
        sorted(kind for node in g.nodes.values() if (kind := type(node).__name__) != "Scale")
        for g in (source, written)
    )
    assert found == kinds  # but for the gains, which are nodes of their own
    (values,) = interpret(written, DT, x.numpy())
    assert np.array_equal(values, net(x).numpy())


def test_a_neuron_that_hears_itself_is_a_loop_and_is_declared(tmp_path: Path) -> None:
    """Its own order of sums stands in the metadata; read without them, on a grid, it is the same."""
    V = torch.tensor([0.5, -0.25, 1.0])
    neuron = Node(neurons.RLeaky, beta=0.5, V=V, fires=">", v_reset=0.0)
    x = GRID[..., :3] * 2
    path = compiled(nn.Sequential(nn.Identity(), neuron), (x,), tmp_path, dt=DT)
    assert torch.equal(deploy.load(path)(x), neuron(x))
    written = nir.read(file(path))
    assert {("1", "1.hears"), ("1.hears", "1")} <= {*written.edges}
    for node in written.nodes.values():
        node.metadata.pop("spikeport", None)
    assert torch.equal(NirNetwork(written, DT)(x), neuron(x))
    (found,) = interpret(written, DT, x.numpy())
    assert np.array_equal(found, neuron(x).numpy())
    contradicting = nir.read(file(path))
    contradicting.nodes["1.hears"].scale[0] = 2.0
    with pytest.raises(CaptureError) as caught:
        NirNetwork(contradicting, DT)
    assert [(f.rule, f.where) for f in caught.value.findings] == [("nir-loop", "1")]


class Looped(nn.Module):
    """Two layers of neurons step by step; ``step`` says what they hear."""

    def __init__(self, step: Any, first: float = 0.0, end: Any = torch.stack) -> None:
        super().__init__()
        self.a, self.b = (
            Cell(Neuron(neurons.LIF, {"tau": 2.0, "v_rest": 0.0}), True) for _ in "ab"
        )
        self.step, self.first, self.end = step, first, end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a.reset()
        self.b.reset()
        a = b = torch.full_like(x[0], self.first)
        steps = []
        for x_t in x:
            a, b = self.step(self, x_t, a, b)
            steps.append(a + b)
        return self.end(steps)


def ahead(self: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
    a = self.a(x + 0.5 * b)
    return a, self.b(x + a)


def crossed(self: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
    return self.a(2 * x + 0.5 * b), self.b(x - 0.5 * a)


def far(self: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
    """Through a Scale, a is further from the input than b, which hears it at once all the same."""
    a = self.a(3 * x + 0.5 * b)
    return a, self.b(x + a)


@pytest.mark.parametrize(
    ("step", "end"),
    [
        (ahead, torch.stack),
        (crossed, lambda steps: torch.stack(steps).mean(0)),
        (far, torch.stack),
    ],
    ids=["steps", "mean", "far"],
)
def test_values_that_are_used_a_step_later(step: Any, end: Any, tmp_path: Path) -> None:
    net, x = Looped(step, end=end), 3 * GRID
    path = compiled(net, (x,), tmp_path, dt=DT)
    assert 0.05 < net(x).mean() < 1.5
    assert torch.equal(deploy.load(path)(x), net(x))


def test_a_delay_in_a_loop_in_which_nothing_comes_back(tmp_path: Path) -> None:
    class Late(Looped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.a.reset()
            self.b.reset()
            heard, steps = deque([torch.zeros_like(x[0])] * 2), []
            for x_t in x:
                heard.append(self.a(2 * x_t))
                steps.append(self.b(3 * heard.popleft()))
            return torch.stack(steps)

    net, x = Late(None), 3 * GRID
    path = compiled(net, (x,), tmp_path, dt=DT)
    assert "Delay" in {type(n).__name__ for n in nir.read(file(path)).nodes.values()}
    assert net(x).any()
    assert torch.equal(deploy.load(path)(x), net(x))


def test_the_order_that_nir_computes_a_cycle_in() -> None:
    """No Input leads to a but through b, so that b is nearer whatever lies between."""

    def behind(self: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        a = self.a(3 * b)
        return a, self.b(x + a)

    (found,) = deploy.check(Looped(behind), (GRID,), ["nir"]).errors
    assert (found.rule, found.where) == ("recurrence", "a")


def test_what_a_loop_ends_with(tmp_path: Path) -> None:
    class Net(Looped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.a.reset()
            a = torch.zeros_like(x[0])
            for x_t in x:
                a = self.a(x_t + 0.5 * a)
            return a

    net, x = Net(ahead), 3 * GRID
    path = compiled(net, (x,), tmp_path, dt=DT)
    assert 0.05 < net(x).mean() < 0.95
    assert torch.equal(deploy.load(path)(x), net(x))


def _mean(steps: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(steps).mean(0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("feedback", [0.0, 0.25])
def test_what_is_done_over_time_with_maps_of_spikes(
    feedback: float, batch: int, tmp_path: Path
) -> None:
    """[T, N, C, H, W], at once where nothing comes back; NIR's Output says what is done."""
    ends: dict[str, list[Any]] = {
        "mean": [
            _mean,
            lambda steps: torch.stack(steps).sum(0) / len(steps),
            lambda steps: _mean(steps).flatten(1),
            lambda steps: _mean([s.flatten(1) for s in steps]),
            lambda steps: torch.stack(steps).flatten(2).mean(0),
            lambda steps: torch.stack(steps).mean(0, keepdim=True),
            lambda steps: sum(steps) / len(steps),
        ],
        "sum": [
            lambda steps: torch.stack(steps).sum(0),
            sum,
            lambda steps: sum(steps, torch.zeros_like(steps[0])).flatten(1),
            lambda steps: functools.reduce(lambda so_far, step: step + so_far, steps),
        ],
        "last": [lambda steps: steps[-1], lambda steps: torch.stack(steps).flatten(2)[-1]],
        "steps": [
            torch.stack,
            torch.cat,
            lambda steps: torch.stack(steps).flatten(2),
            lambda steps: torch.cat([s.unsqueeze(0) for s in steps]),
            lambda steps: torch.stack(steps, 1),
            lambda steps: torch.stack(steps).flatten(2).transpose(0, 1),
        ],
    }

    def run(s: Any, x: torch.Tensor) -> Any:
        s.lif.reset()
        back, steps = torch.zeros(x.shape[1], 3, 4, 4), []
        for x_t in x:
            y = s.conv(x_t)
            back = s.lif(y + feedback * s.back(back) if feedback else y)
            steps.append(back)
        return [end(steps) for made in ends.values() for end in made]

    torch.manual_seed(0)
    lif = Cell(Neuron(neurons.LIF, {"tau": 2.0, "v_rest": 0.0}), True)
    convs = {
        "conv": nn.Conv2d(2, 3, 3, padding=1),
        "back": nn.Conv2d(3, 3, 3, padding=1, bias=False),
    }
    net = Net(run, lif=lif, **convs)
    x = 12 * torch.rand(4, batch, 2, 4, 4, generator=GENERATOR)
    path = compiled(net, (x,), tmp_path, dt=DT)
    expected = net(x)
    assert 0.05 < expected[0].mean() < 0.95
    with deploy.load(path) as model:
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))
    outputs = nir.read(file(path)).outputs.values()
    said = {int(n.metadata["position"]): n.metadata["over_time"] for n in outputs}
    told = [how for how, made in ends.items() for _ in made]
    assert [said[i] for i in range(len(told))] == told


def test_a_sum_of_as_many_parts_as_steps_is_none_over_time(tmp_path: Path) -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        s.one.reset()
        s.two.reset()
        back, steps = torch.zeros(x.shape[1], 5), []
        for x_t in x:
            first = s.one(x_t + s.back(back))
            back = s.two(s.a(first) + s.b(first) + s.c(back))
            steps.append(back)
        return torch.stack(steps)

    torch.manual_seed(0)
    layers: dict[str, nn.Module]
    layers = {name: nn.Linear(5, 5, bias=False) for name in ("a", "b", "c", "back")}
    cells = {name: Cell(Neuron(neurons.IF, {}), True) for name in ("one", "two")}
    net, x = Net(run, **layers, **cells), 3 * torch.rand(3, 2, 5, generator=GENERATOR)
    with deploy.load(compiled(net, (x,), tmp_path, dt=DT)) as model:
        assert 0.05 < net(x).mean() < 0.95
        assert torch.equal(model(x), net(x))


def test_a_mean_over_the_batch_is_no_mean_over_time() -> None:
    (found,) = deploy.check(Looped(ahead, end=lambda s: s[-1].mean(0)), (GRID,), ["nir"]).errors
    assert "the mean over the batch" in found.found


def test_a_readout_after_a_loop(tmp_path: Path) -> None:
    """No spikes of the readout are used: it is a layer by its state alone."""
    net, x = nn.Sequential(Looped(ahead), Readout(neurons.LIF, tau=2.0, v_rest=0.0)), 3 * GRID
    path = compiled(net, (x,), tmp_path, dt=DT)
    assert net(x).std() > 0.1
    assert torch.equal(deploy.load(path)(x), net(x))


@pytest.mark.snntorch
@pytest.mark.parametrize("end", [torch.stack, _mean, lambda steps: steps[-1]])
def test_a_readout_by_its_membrane_alone(end: Any, tmp_path: Path) -> None:
    snn = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l1, self.l2 = snn.Leaky(beta=0.5), snn.Leaky(beta=0.75, reset_mechanism="none")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            m1, m2, steps = self.l1.init_leaky(), self.l2.init_leaky(), []
            for x_t in x:
                spk, m1 = self.l1(x_t, m1)
                _, m2 = self.l2(spk, m2)
                steps.append(m2)
            out: torch.Tensor = end(steps)
            return out

    net = Net()
    path = compiled(net, (GRID,), tmp_path, dt=DT)
    assert net(GRID).std() > 0.1
    assert torch.equal(deploy.load(path)(GRID), net(GRID))


@pytest.mark.snntorch
def test_what_no_neuron_of_nir_computes_is_written_as_its_arithmetic(tmp_path: Path) -> None:
    """Neurons that hear all spikes of their layer, added last: Scale, Affine, Threshold and Delay."""
    snn = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lif = snn.RLeaky(beta=0.5, linear_features=5, threshold=0.4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spk, mem = self.lif.reset_mem()
            steps = []
            for x_t in x:
                spk, mem = self.lif(x_t, spk, mem)
                steps.append(spk)
            return torch.stack(steps)

    net = Net()
    path = compiled(net, (GRID,), tmp_path, dt=DT)
    assert 0.1 < net(GRID).mean() < 0.9
    assert torch.equal(deploy.load(path)(GRID), net(GRID))
    told = deploy.check(net, (GRID,), ["nir"])
    assert {(f.rule, f.severity) for f in told} == {("recurrence", "warning")}
    with pytest.raises(UnsupportedError, match="Delay of its own"):
        compiled(net, (GRID,), tmp_path / "strict", strict=True)


def test_what_comes_back_starts_from_silence() -> None:
    (found,) = deploy.check(Looped(ahead, first=1.0), (GRID,), ["nir"]).errors
    assert (found.rule, found.target) == ("recurrence", "nir")
    assert "have not fired" in found.found


def test_a_sum_that_comes_back_without_a_node() -> None:
    def counted(self: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return self.a(x + b), b + a

    (found,) = deploy.check(Looped(counted), (GRID,), ["nir"]).errors
    assert (found.rule, found.where) == ("recurrence", "forward.add#2")
    assert "plain arithmetic" in found.found


def test_a_cycle_that_cannot_be_run_step_by_step() -> None:
    def step(self: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return self.a(x + 0.5 * b), self.b(x * self.x.mean(0) + a)

    class Net(Looped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            object.__setattr__(self, "x", x)
            y = super().forward(x)
            object.__delattr__(self, "x")
            return y

    found = deploy.check(Net(step), (GRID,), ["nir"]).errors
    assert {f.rule for f in found} == {"recurrence"}
