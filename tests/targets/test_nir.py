"""NIR as a target: what a file says alone, what its metadata add, and what is refused."""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
from nir_equations import interpret
from torch import nn

from spikeport import deploy
from spikeport.converters import neurons
from spikeport.converters.errors import (
    CaptureError,
    CompileError,
    TargetUnavailableError,
    UnsupportedError,
    UsageError,
)
from spikeport.converters.neurons import IFNode, LIFNode, Neuron, Node, Readout
from spikeport.converters.sources.nir import NirNetwork
from spikeport.converters.sources.nir.layers import Cell
from spikeport.converters.sources.nir.neurons import continuous, metadata
from spikeport.deploy.cli import main

DT = 0.25
T, N = 12, 3
GENERATOR = torch.Generator().manual_seed(0)
#: On a grid that hits thresholds, with negative stretches and silence.
GRID = torch.randint(-6, 9, (T, N, 5), generator=GENERATOR) / 8
TENSOR = torch.tensor([0.5, 1.0, 0.25, 0.75, 1.5])


@pytest.fixture(autouse=True)
def _same_draws_in_any_order() -> None:
    GENERATOR.manual_seed(0)


class Net(nn.Module):
    """A forward over layers."""

    def __init__(self, run: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)


def exact() -> nn.Linear:
    """A layer that changes nothing."""
    layer = nn.Linear(5, 5, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(5))
    return layer


def compiled(net: nn.Module, inputs: Any, path: Path, **options: Any) -> Path:
    program = deploy.convert(net, inputs, target="nir", verify=False)
    return deploy.compile(program, path / "nir", cache=False, **options).path


def file(artifact: Path) -> Path:
    return artifact / "device" / "model.nir"


# Every declared neuron

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "if": (neurons.IF, {}),
    "lif": (neurons.LIF, {"tau": 2.0, "v_rest": 0.0}),
    "lif-input": (neurons.LIF, {"tau": 4.0, "v_rest": -0.25, "decay_input": False}),
    "lif-factored": (
        neurons.LIF,
        {"tau": 3.0, "v_rest": 0.0, "decay_input": False, "factored": True},
    ),
    "lif-tensor": (neurons.LIF, {"tau": 4 * TENSOR, "v_rest": 0.25}),
    "plif": (neurons.ParametricLIF, {"w": torch.tensor(0.3), "v_rest": 0.0}),
    "plif-zero": (neurons.ParametricLIF, {"w": torch.tensor(0.0), "v_rest": 0.0}),
    "leaky": (neurons.Leaky, {"beta": 0.9}),
    "leaky-1": (neurons.Leaky, {"beta": 1.0}),
    "leaky-tensor": (neurons.Leaky, {"beta": TENSOR / 2}),
    "lapicque": (neurons.Lapicque, {"R": 2.0, "C": 4.0, "dt": 1.0}),
    "synaptic": (neurons.Synaptic, {"alpha": 0.5, "beta": 0.75}),
    "cuba": (neurons.CubaLIF, {"tau_syn": 2.0, "tau_mem": 4.0, "r": 2.0, "v_rest": 0.25}),
    "heaviside": (neurons.Heaviside, {}),
}
#: Those whose arithmetic is exact on the grid in either order, so that the fields alone say them.
_DYADIC = (
    "if",
    "lif",
    "lif-input",
    "lif-tensor",
    "plif-zero",
    "leaky-1",
    "synaptic",
    "cuba",
    "heaviside",
)


def declared() -> list[tuple[str, Neuron]]:
    found = []
    resets = itertools.product(("hard", "soft", "none"), ("now", "next", "before", "ahead"))
    for (name, (kind, params)), (reset, at), fires in itertools.product(
        KINDS.items(), resets, (">=", ">")
    ):
        if (at == "ahead" and reset == "hard") or (reset == "none" and at != "now"):
            continue
        if kind is neurons.Heaviside and reset != "none":
            continue
        given: dict[str, Any] = {"v_threshold": 0.5, "reset": reset, "reset_at": at, "fires": fires}
        if name == "lif":
            given |= {"v_threshold": TENSOR, "v_reset": -0.25, "v_0": 0.125 * (fires == ">")}
        if name in ("if", "leaky-1"):
            given |= {"v_reset": torch.tensor(-0.125)}
        found.append((name, Neuron(kind, params, **given)))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_declared_neuron_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """By its metadata; and by the file's plain fields, where these say it all, in NumPy too."""
    for neuron in (neuron for kind, neuron in declared() if kind == name):
        node = continuous(neuron, (5,), DT)
        written = getattr(nir, node.kind)(**node.fields, metadata=metadata(neuron, node.unsaid))
        nir.write(tmp_path / "n.nir", nir.NIRGraph.from_list(written))
        expected = neuron.multi_step(GRID)
        assert expected.any()
        assert torch.equal(NirNetwork(tmp_path / "n.nir", DT)(GRID), expected)
        hard = neuron.reset == "hard" or name == "heaviside"
        says_all = hard and neuron.reset_at == "now" and neuron.v_0 == 0
        assert (node.unsaid == ()) == says_all
        if says_all and name in _DYADIC:
            graph = nir.read(tmp_path / "n.nir")
            assert np.array_equal(interpret(graph, DT, GRID.numpy())[0], expected.numpy())
            graph.nodes[node.kind.lower()].metadata.clear()
            assert torch.equal(NirNetwork(graph, DT)(GRID), expected)


def test_neurons_of_all_kinds_in_a_network(tmp_path: Path) -> None:
    firsts = {f"{name}_": Node.of(neuron) for name, neuron in reversed(declared())}
    net = Net(lambda s, x: tuple(s.get_submodule(n)(x) for n in firsts), **firsts)
    path = compiled(net, (GRID,), tmp_path, dt=DT)
    for found, y in zip(deploy.load(path)(GRID), net(GRID), strict=True):
        assert torch.equal(found, y)


#: Few enough steps for their potentials to be exact in float32.
SHORT = GRID[:6]


def test_readouts_come_back(tmp_path: Path) -> None:
    kinds = {
        "li": Readout(neurons.LIF, tau=2.0, v_rest=0.25),
        "i": Readout(neurons.IF),
        "cuba": Readout(neurons.CubaLIF, tau_syn=2.0, tau_mem=4.0, r=2.0, v_rest=0.0),
    }
    net = Net(lambda s, x: tuple(s.get_submodule(n)(x) for n in kinds), **kinds)
    path = compiled(net, (SHORT,), tmp_path, dt=DT)
    graph = nir.read(file(path))
    assert {type(graph.nodes[n]).__name__ for n in kinds} == {"LI", "I", "CubaLI"}
    by_fields = interpret(graph, DT, SHORT.numpy())
    ports = sorted(graph.outputs)
    for i, (found, y) in enumerate(zip(deploy.load(path)(SHORT), net(SHORT), strict=True)):
        z = by_fields[ports.index(f"output_{i}")]
        assert torch.equal(found, y)
        assert np.array_equal(z.astype(np.float32), y.numpy())


def test_what_only_metadata_say_is_told_and_strict_refuses_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(
        exact(),
        Node.of(Neuron(neurons.IF, reset="soft")),
        Node.of(Neuron(neurons.Leaky, {"beta": 0.5}, reset_at="next", v_0=0.5)),
    )
    findings = deploy.check(net, (GRID,), ["nir"])
    assert not findings.errors
    assert [(f.where, f.found) for f in findings] == [
        ("1", "reset is soft; NIR's is to v_reset; the node's metadata say it"),
        ("2", "reset_at is next; NIR's is now; the node's metadata say it"),
        ("2", "v_0 is not 0; NIR does not say where v starts; the node's metadata say it"),
    ]
    program = deploy.convert(net, (GRID,), target="nir", verify=False)
    with pytest.raises(UnsupportedError) as caught:
        deploy.compile(program, tmp_path / "strict", cache=False, strict=True)
    assert [f.severity for f in caught.value.findings] == ["error"] * 3
    with caplog.at_level(logging.WARNING):
        deploy.compile(program, tmp_path / "nir", cache=False)
    assert "reset is soft" in caplog.text


def test_neurons_that_nir_does_not_have_are_refused() -> None:
    @neurons.dynamics
    def Cubic(v: Any, x: Any, *, a: Any) -> Any:  # noqa: N802
        return v + x - a * v**3

    alpha = {"alpha": 0.5, "beta": 0.25, "tau": 1.5}
    net = nn.Sequential(
        Node(Cubic, a=0.1),
        Node.of(Neuron(neurons.Alpha, alpha, reset="none")),
        Node.of(Neuron(neurons.LIF, {"tau": 0.5, "v_rest": 0.0})),
        Node.of(Neuron(neurons.Leaky, {"beta": 1.5})),
    )
    found = {f.where: f.found for f in deploy.check(net, (GRID,), ["nir"]).errors}
    # Each depends on the one before, which is refused: they are found one by one.
    assert list(found) == ["0"]
    assert "NIR has no node of the dynamics Cubic" in found["0"]
    layers = {f"n{i}": layer for i, layer in enumerate(net)}
    beside = Net(lambda s, x: tuple(s.get_submodule(n)(x) for n in layers), **layers)
    with pytest.raises(UnsupportedError) as caught:
        deploy.convert(beside, (GRID,), target="nir")
    found = {f.where: f.found for f in caught.value.findings}
    assert list(found) == ["n0", "n1", "n2", "n3"]
    assert "tau is 0.5 time steps" in found["n2"]
    assert "a decay rate of 1.5" in found["n3"]


# Networks


class Events(nn.Module):
    """Convolutions, batch norm, both poolings, sums, gates, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.group = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=2, bias=False)
        self.a, self.b, self.c = IFNode(v_threshold=0.5), LIFNode(v_threshold=0.25), LIFNode()
        self.fc, self.out = nn.Linear(64, 5), IFNode(v_reset=None, v_threshold=0.5)
        self.register_buffer("four", torch.tensor(4.0))

    def forward(self, x: torch.Tensor) -> Any:
        def over(layer: Any, seq: torch.Tensor) -> torch.Tensor:
            return layer(seq.flatten(0, 1)).unflatten(0, seq.shape[:2])

        a = self.a(over(lambda y: self.norm(self.conv(y)), x))
        b = self.b(over(self.group, a) * 1.5 - a / self.four)
        gate = a * b
        pooled = over(lambda y: nn.functional.max_pool2d(y, 2), gate)
        mean = over(lambda y: nn.functional.avg_pool2d(y, 2), a + b + a)
        c = self.c(pooled + mean)
        out = self.out(self.fc(c.flatten(2)))
        return {"rate": out.mean(0), "out": out, "last": out[-1], "sum": c.sum(0)}


EVENTS = torch.rand(4, 3, 2, 8, 8, generator=GENERATOR).round()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_of_all_that_nir_can_say(batch: int, tmp_path: Path) -> None:
    net, x = Events().eval(), EVENTS[:, :batch]
    path = compiled(net, (x,), tmp_path)
    graph = nir.read(file(path), type_check=False)  # nir knows square kernels alone
    kinds = {type(node).__name__ for node in graph.nodes.values()}
    assert {"SumPool2d", "AvgPool2d", "Threshold", "Scale", "Flatten", "Affine"} <= kinds
    with torch.no_grad():
        expected = net(x)
    with deploy.load(path) as model:
        found = model(x)
        report = deploy.Artifact.open(path).verify()
    assert expected["rate"].any()
    assert all(torch.equal(found[name], y) for name, y in expected.items())
    assert report.ok
    assert report.equal


def test_convolutions_in_groups_are_read_with_nirs_own_checks(tmp_path: Path) -> None:
    """A norm of spikes, and what a residual makes of them, are convolutions of one channel each."""
    torch.manual_seed(0)
    net = nn.Sequential(
        Flat(nn.Conv2d(2, 4, 3, padding=1, groups=2)),
        IFNode(v_threshold=0.25),
        Flat(nn.BatchNorm2d(4)),
        Flat(nn.Conv2d(4, 8, 1, groups=4)),
        IFNode(v_threshold=0.5),
    ).eval()
    path = compiled(net, (EVENTS,), tmp_path)
    graph = nir.read(file(path))
    assert {node.groups for node in graph.nodes.values() if isinstance(node, nir.Conv2d)} == {1}
    again = NirNetwork(graph)
    assert {m.groups for m in again.modules() if isinstance(m, nn.Conv2d)} == {2, 4}
    with torch.no_grad():
        assert torch.equal(again(EVENTS), net(EVENTS))


class Late(nn.Module):
    """Neurons that hear others some steps later."""

    def __init__(self, delay: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.a, self.b = nn.Linear(6, 8), IFNode(v_threshold=0.5), IFNode()
        self.delay = delay

    def forward(self, x: torch.Tensor) -> Any:
        late = self.delay(self.a(self.fc(x)))
        return self.b(late) if isinstance(late, torch.Tensor) else late


SILENT = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("delay", "steps"),
    [
        (lambda z: torch.cat([SILENT, z[:-2]]), 2),
        (lambda z: torch.stack([SILENT[0], *z[:-1]]), 1),
        (lambda z: torch.cat([SILENT[0], SILENT[1], *z[:-2]]).unflatten(0, (5, 3)), 2),
    ],
)
def test_a_delay_between_layers(delay: Any, steps: int, tmp_path: Path) -> None:
    net, x = Late(delay), torch.rand(5, 3, 6, generator=GENERATOR)
    path = compiled(net, (x,), tmp_path, dt=0.25)
    (found,) = (n for n in nir.read(file(path)).nodes.values() if isinstance(n, nir.Delay))
    assert (found.delay == steps * 0.25).all()
    again = compiled(NirNetwork(file(path)), (x,), tmp_path / "again", dt=0.25)
    with torch.no_grad(), deploy.load(again) as model:
        assert net(x).any()
        assert torch.equal(model(x), net(x))


@pytest.mark.parametrize(
    ("delay", "found"),
    [
        (lambda z: torch.cat([SILENT + 1, z[:-2]]), "a constant where a signal"),
        (lambda z: torch.cat([SILENT[:1], z[:-2], SILENT[:1]]), "a constant where a signal"),
        (lambda z: torch.cat([SILENT, z[:-2] * 2]), "time steps 0 to 2 alone"),
        (lambda z: (z, z[:-2]), "time steps 0 to 2 alone"),
    ],
)
def test_what_only_looks_like_a_delay(delay: Any, found: str) -> None:
    findings = deploy.check(Late(delay), (torch.rand(5, 3, 6),), targets=["nir"])
    assert any(found in f.found for f in findings)


class Flat(nn.Module):
    """A layer over time and batch together."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.layer(x.flatten(0, 1))
        return flat.unflatten(0, x.shape[:2])


def norm(layer: nn.Module) -> nn.Module:
    """With statistics on a grid, so that any way to compute it is exact."""
    with torch.no_grad():
        for tensor, span in ((layer.weight, 4), (layer.bias, 4), (layer.running_mean, 8)):
            tensor.copy_(torch.randint(1, 1 + span, tensor.shape, generator=GENERATOR) / 4)
        layer.running_var.fill_(0.25)
    layer.eps = 0.0
    return layer.eval()


@pytest.mark.parametrize(
    ("size", "layers"),
    [
        ((5,), {"norm": nn.BatchNorm1d(5), "after": nn.Linear(13, 4)}),
        ((2, 6), {"norm": nn.BatchNorm1d(2), "after": nn.Conv1d(7, 4, 3)}),
        ((2, 4, 4), {"norm": nn.BatchNorm2d(2), "after": nn.Conv2d(7, 4, 3)}),
    ],
)
def test_concatenated_channels_norms_and_constants(
    size: tuple[int, ...], layers: dict[str, nn.Module], tmp_path: Path
) -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        flat = s.norm(x.flatten(0, 1))
        spikes = s.lif((flat * 2 + s.bias).unflatten(0, x.shape[:2])).flatten(0, 1)
        parts = torch.cat(
            [spikes, (1 - spikes) * s.other(x).flatten(0, 1), s.narrow(flat - 0.5)], 1
        )
        fired: torch.Tensor = s.out(s.after(parts).unflatten(0, x.shape[:2]))
        return fired

    C, features = size[0], len(size) - 1
    kinds = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}
    narrow = kinds[features](C, 3, *[1] * (features > 0))
    net = Net(
        run, lif=LIFNode(), other=IFNode(), out=IFNode(v_threshold=0.25), narrow=narrow, **layers
    )
    norm(layers["norm"])
    net.bias = nn.Parameter(torch.arange(C).reshape(C, *[1] * features) / 8)
    for layer in (narrow, layers["after"]):
        for p in layer.parameters():
            with torch.no_grad():
                p.copy_(torch.randint(-4, 5, p.shape, generator=GENERATOR) / 8)
    x = torch.randint(-8, 9, (T, N, *size), generator=GENERATOR) / 8
    with deploy.load(compiled(net, (x,), tmp_path)) as model:
        expected = net(x)
        assert 0.05 < expected.mean() < 0.95
        assert torch.equal(model(x), expected)


def test_constants_that_no_bias_adds() -> None:
    def run(s: Any, x: torch.Tensor) -> Any:
        maps = s.lif(x)
        return s.a(maps + s.each), s.b(torch.cat([maps, maps], 3))

    net = Net(run, lif=LIFNode(), a=LIFNode(), b=LIFNode())
    net.each = nn.Parameter(torch.rand(2, 4, 4))
    found = deploy.check(net, (torch.rand(T, N, 2, 4, 4),), ["nir"])
    assert "a constant that differs within a channel of [2, 4, 4]" in str(found)
    assert "concatenate channels" in str(found)


def test_an_image_is_the_same_at_every_step(tmp_path: Path) -> None:
    layers = {"fc": nn.Linear(5, 4), "spike": LIFNode(v_threshold=0.1)}

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.spike(s.fc(x).unsqueeze(0).repeat(4, 1, 1)).mean(0)

    net, image = Net(run, **layers), torch.rand(N, 5, generator=GENERATOR)
    path = compiled(net, (image,), tmp_path)
    (port,) = nir.read(file(path)).inputs.values()
    assert port.metadata["over_time"] == "same"
    assert torch.equal(deploy.load(path)(image), net(image))


def test_the_file_alone_is_the_network(tmp_path: Path) -> None:
    net = nn.Sequential(exact(), LIFNode(tau=2.0, v_threshold=0.5), exact(), IFNode())
    artifact = compiled(net, (GRID,), tmp_path, dt=1e-3)
    again = deploy.convert(str(file(artifact)), (GRID,), target="reference")
    assert torch.equal(again(GRID), net(GRID))
    metadata = nir.read(file(artifact)).metadata
    assert (float(metadata["dt"]), int(metadata["T"])) == (1e-3, T)


def test_all_that_nir_cannot_say_is_found_at_once() -> None:
    def run(s: Any, x: torch.Tensor, image: torch.Tensor) -> Any:
        a = s.a(x)
        return (
            a.mean(0) * 2,
            torch.cat([a, a], 1),
            s.b(a.unflatten(2, (1, 5)).transpose(2, 3)),
            s.pool(image.flatten(0, 1)),
            a / 3,
            x * a,
            a[2],
            torch.relu(x),
        )

    net = Net(run, a=IFNode(), b=IFNode(), pool=nn.MaxPool2d(1))
    found = deploy.check(net, (GRID, torch.rand(T, N, 2, 4, 4)), ["nir"])
    assert {f.target for f in found} == {"nir"}
    text = str(found)
    for part in (
        "after the mean over time, NIR has no step to compute it at",
        "aten.cat",
        "max pooling of values other than spikes of 0 and 1",
        "a division by 3",
        "a product of two signals that are not both spikes",
        "time step 2 alone",
        "aten.relu",
    ):
        assert part in text, text


# Cycles


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


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 2, 6, 6)])
def test_samples_before_time_steps(shape: tuple[int, ...], tmp_path: Path) -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        y = s.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        spikes: torch.Tensor = s.lif(y * 4).transpose(0, 1)
        return spikes

    torch.manual_seed(0)
    layer = nn.Linear(5, 6) if len(shape) == 3 else nn.Conv2d(2, 3, 3)
    net = Net(run, layer=layer, lif=LIFNode())
    with deploy.load(compiled(net, (torch.rand(shape),), tmp_path)) as model:
        x = torch.rand(shape, generator=GENERATOR)
        expected = net(x)
        assert 0.05 < expected.mean() < 0.95
        assert torch.equal(model(x), expected)
    # Where there are as many of one as of the other, nothing tells them apart.
    (found,) = deploy.check(net, (torch.rand(4, 4, *shape[2:]),), ["nir"]).errors
    assert "aten.reshape" in found.found


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


def test_inputs_and_outputs_that_have_nothing_to_do_with_each_other() -> None:
    def run(s: Any, x: torch.Tensor, unused: torch.Tensor) -> Any:
        return s.spike(x), s.constant

    net = Net(run, spike=IFNode())
    net.constant = nn.Parameter(torch.ones(3))
    found = deploy.check(net, (GRID, GRID), ["nir"]).errors
    assert ["nothing is computed from" in f.found for f in found] == [True, False]
    assert "is a constant" in found[1].found


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


# Bad input


def test_options_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(exact(), IFNode())
    program = deploy.convert(net, (GRID,), target="nir", verify=False)
    for wrong in ({"dt": 0}, {"dt": "1"}, {"strict": 1}, {"step": 1}):
        with pytest.raises(UsageError, match=r"allowed|has no option"):
            deploy.compile(program, tmp_path / "a", cache=False, **wrong)
    with pytest.raises(UsageError, match="leave dtype out"):
        deploy.convert(net, (GRID,), target="nir", dtype="float16")
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(TargetUnavailableError, match=r"pip install 'spikeport\[nir\]'"):
        deploy.compile(program, tmp_path / "a", cache=False)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"pip install 'spikeport\[nir\]'"):
        NirNetwork(__file__)


def test_metadata_that_contradict_the_parameters(tmp_path: Path) -> None:
    path = file(compiled(nn.Sequential(exact(), LIFNode()), (GRID,), tmp_path))
    graph = nir.read(path)
    graph.nodes["1"].tau *= 2
    with pytest.raises(CaptureError, match="metadata declare another neuron") as caught:
        NirNetwork(graph)
    assert [f.where for f in caught.value.findings] == ["1"]
    graph.nodes["1"].metadata["spikeport"]["declaration"] = "{}"
    with pytest.raises(CaptureError, match="metadata are no declaration"):
        NirNetwork(graph)


def test_a_file_that_reads_as_other_neurons_is_no_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = deploy.convert(nn.Sequential(exact(), IFNode()), (GRID,), "nir", verify=False)
    monkeypatch.setattr("spikeport.targets.nir.export.metadata", lambda *_: {})
    with pytest.raises(CompileError, match="declares other neurons"):
        deploy.compile(program, tmp_path / "a", cache=False)


def test_the_command_line_takes_and_gives_nir(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = tmp_path / "net.nir"
    ports = {"input": nir.Input(np.array([5])), "output": nir.Output(np.array([5]))}
    spike = nir.IF(np.full(5, 1 / DT), np.full(5, 0.5), np.zeros(5))
    edges = [("input", "spike"), ("spike", "output")]
    nir.write(net, nir.NIRGraph({**ports, "spike": spike}, edges))
    arguments = [str(net), "--input", "4,2,5", "--target", "nir", "--arg"]
    out = ["-o", str(tmp_path / "out"), "--option", "dt=0.5"]
    assert main(["compile", *arguments, f"dt={DT}", *out]) == 0
    assert "no --checkpoint" not in capsys.readouterr().err  # the file has the weights
    assert float(nir.read(file(tmp_path / "out")).metadata["dt"]) == 0.5
    assert main(["check", *arguments, "dt=-1"]) == 2
    assert "allowed: a time above 0" in capsys.readouterr().err
    net.write_bytes(net.read_bytes()[:200])
    assert main(["check", *arguments, "dt=1"]) == 1
    assert "no whole HDF5 file" in "".join(capsys.readouterr())
