"""Every neuron in a NIR file: what its fields say, what its metadata add, and which NIR does not have."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
from networks import Net
from nir_equations import interpret
from nir_files import DT, GRID, compiled, exact, file
from torch import nn

from spikeport import deploy
from spikeport.converters import neurons
from spikeport.converters.errors import UnsupportedError
from spikeport.converters.neurons import Neuron, Node, Readout
from spikeport.converters.sources.nir import NirNetwork
from spikeport.converters.sources.nir.neurons import continuous, metadata

TENSOR = torch.tensor([0.5, 1.0, 0.25, 0.75, 1.5])

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
