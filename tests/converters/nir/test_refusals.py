"""All that is wrong with a NIR graph, with its file or with its input, is found at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
import pytest
import torch
from nir_graphs import CHAINS, DT, chain, eighths, findings, full, graph, lif, saved, self_loop

from spikeport import deploy
from spikeport.converters.errors import UsageError
from spikeport.converters.sources.nir import NirNetwork


def test_everything_wrong_with_a_graph_is_found_at_once() -> None:
    nan = lif(3, tau=float("nan"))
    shapes = lif(3)
    shapes.v_leak = np.zeros(4)
    g = nir.NIRGraph(
        {
            "input": nir.Input(np.array([3])),
            "output": nir.Output(np.array([3])),
            "a": lif(3, tau=-1.0),
            "b": nan,
            "c": shapes,
            "alone": nir.Scale(np.ones(3)),
            "end": nir.Scale(np.ones(3)),
            "x": nir.Scale(np.ones(3)),
            "y": nir.Linear(np.eye(3)),
            "late": nir.Delay(np.array([-1.0, 0, 0])),
        },
        [
            *[("input", "a"), ("a", "b"), ("b", "c"), ("c", "output"), ("a", "b"), ("a", "end")],
            *[("a", "x"), ("x", "y"), ("y", "x"), ("y", "b"), ("a", "nobody"), ("a", "late")],
            ("late", "b"),
        ],
        type_check=False,
    )
    found = findings(g)
    assert {(f.rule, f.where) for f in found} == {
        ("nir-value", "a"),
        ("nir-value", "b"),
        ("nir-shape", "c"),
        ("nir-edge", "a -> b"),
        ("nir-edge", "a -> nobody"),
        ("nir-dangling", "alone"),
        ("nir-dangling", "end"),
        ("nir-cycle", "x"),
        ("nir-value", "late"),
    }
    text = "\n".join(map(str, found))
    assert "LIF whose tau is -1" in text
    assert "a cycle without delay: x -> y -> x" in text
    assert "no edge leads to it and no edge leaves it" in text
    assert [*deploy.check(g, (torch.zeros(2, 1, 3),), ["onnx"], dt=DT)] == found


def test_a_delay_in_a_cycle_is_one_for_all_or_refused() -> None:
    def late(*steps: float) -> nir.NIRGraph:
        ports = {"input": nir.Input(np.array([2])), "output": nir.Output(np.array([2]))}
        g = graph("input a output", a=lif(2), **ports)
        nodes = {**g.nodes, "d": nir.Delay(np.array(steps) * DT)}
        return nir.NIRGraph(nodes, [*g.edges, ("a", "d"), ("d", "a")])

    assert [(f.rule, f.where) for f in findings(late(0, 2))] == [("nir-delay", "d")]
    for steps in ((1, 2), (0, 0)):
        NirNetwork(late(*steps), DT)


def test_what_the_time_step_cannot_give_and_shapes_that_do_not_meet() -> None:
    short = chain((3,), (3,), lif(3, tau=DT / 2), nir.Delay(full(DT / 3, 3)))
    assert [(f.where, f.found, f.fix) for f in findings(short)] == [
        (
            "n0",
            "LIF: its tau of 0.125 is shorter than the time step of 0.25",
            "take a shorter dt",
        ),
        (
            "n1",
            "Delay: its delay is no multiple of the time step of 0.25",
            "take a dt that divides it, or round the delay",
        ),
    ]
    (wrong,) = findings(chain((4,), (3,), nir.Affine(eighths(3, 5), eighths(3))))
    assert (wrong.rule, wrong.where) == ("nir-shape", "n0")
    (wrong,) = findings(chain((4,), (4,), lif(3)))
    assert wrong.found == "LIF on a signal [4]: its parameters are of shape [3]"
    g = graph(
        [("x", "a"), ("y", "a"), ("a", "output")],
        x=nir.Input(np.array([3])),
        y=nir.Input(np.array([1])),
        a=nir.Scale(np.ones(3)),
        output=nir.Output(np.array([3])),
    )
    assert [(f.where, f.found) for f in findings(g)] == [
        ("y -> a", "a signal [1] added to one [3]")
    ]
    ports = {"n": nir.Input(np.array([3])), "output": nir.Output(np.array([3]))}
    net = NirNetwork(graph("n output", **ports), DT)
    with pytest.raises(UsageError, match=r"n is given \[2, 1, 5\]; it takes \[T, N, 3\]"):
        net(torch.zeros(2, 1, 5))


def test_inputs_have_one_number_of_steps_and_samples() -> None:
    ports = {n: nir.Input(np.array([3])) for n in "xy"} | {"output": nir.Output(np.array([3]))}
    net = NirNetwork(graph([("x", "a"), ("y", "a"), ("a", "output")], a=lif(3), **ports), DT)
    for size in ((5, 2), (4, 1)):
        with pytest.raises(UsageError, match=r"y \[.*allowed: one T and one N for all inputs"):
            net(torch.zeros(4, 2, 3), torch.zeros(*size, 3))


def test_parameters_that_overflow() -> None:
    (wrong,) = findings(chain((1,), (1,), lif(1, r=1e300)))
    assert wrong.found == "LIF whose r overflows float32, in which it is computed"


def test_shapes_that_do_not_fit_are_found_beside_other_findings() -> None:
    g = chain((4,), (3,), lif(4, tau=DT / 2), nir.Linear(eighths(3, 5)), nir.Scale(full(1, 2)))
    ports = {"second": nir.Input(np.array([4])), "end": nir.Output(np.array([3]))}
    wrong = {"affine": nir.Linear(eighths(3, 5)), "scale": nir.Scale(full(1, 2))}
    edges = [
        *g.edges,
        ("second", "affine"),
        ("affine", "end"),
        ("second", "scale"),
        ("scale", "end"),
    ]
    assert {(f.rule, f.where) for f in findings(graph(edges, **g.nodes, **ports, **wrong))} == {
        ("nir-node", "n0"),
        ("nir-shape", "n1"),
        ("nir-shape", "affine"),
        ("nir-shape", "scale"),
    }


def test_shapes_are_looked_at_behind_values_that_are_wrong() -> None:
    g = chain((4,), (3,), lif(4, tau=-1.0), nir.Linear(eighths(3, 5)))
    assert {(f.rule, f.where) for f in findings(g)} == {("nir-value", "n0"), ("nir-shape", "n1")}


@pytest.mark.parametrize("delay", ["a second", [1.0, [2.0]], []])
def test_delays_that_are_no_numbers(delay: Any) -> None:
    g = chain((3,), (3,), nir.Delay(full(0.0, 3)))
    g.nodes["n0"].delay = delay
    assert [(f.rule, f.where) for f in findings(g)] == [("nir-value", "n0")]


def test_cycles_of_delays_of_no_time_and_islands() -> None:
    g = self_loop()
    nodes = {**g.nodes, "a": nir.Delay(full(0.0, 3))}
    assert [f.rule for f in findings(graph(g.edges, **nodes))] == ["nir-cycle"]
    edges = [e for e in g.edges if e[0] != "input"]
    found = {(f.rule, f.where) for f in findings(graph(edges, **g.nodes))}
    assert found == {("nir-dangling", n) for n in ("a", "w", "input", "output")}


def test_graphs_that_are_malformed(tmp_path: Path) -> None:
    file = saved(CHAINS["affine"](), tmp_path)
    with h5py.File(file, "r+") as content:
        del content["node/edges"]
        content["node/edges"] = np.ones((2, 3))
    assert [f.rule for f in findings(file)] == ["nir-graph"]
    with h5py.File(file, "r+") as content:
        del content["node/edges"], content["node/nodes/n0"]
        content["node/nodes/n0"] = 1.0
    assert [f.rule for f in findings(file)] == ["nir-graph"]
    g = self_loop()
    inner = graph(g.edges, **{n: node for n, node in g.nodes.items() if n != "input"})
    ports = {n: g.nodes[n] for n in ("input", "output")}
    nested = graph("input rnn output", rnn=inner, **ports)
    (wrong, *_) = findings(nested)
    assert (wrong.rule, wrong.where) == ("nir-edge", "rnn.input -> rnn.a")
    assert ("nir-subgraph", "rnn") in {(f.rule, f.where) for f in findings(nested)}
    twice = graph(
        "input rnn.a rnn output", rnn=graph(g.edges, **g.nodes), **ports, **{"rnn.a": lif(3)}
    )
    assert "nir-name" in {f.rule for f in findings(twice)}
    back = graph([*g.edges, ("a", "input")], **g.nodes)
    assert [(f.rule, f.where) for f in findings(back)] == [("nir-edge", "input")]


def _put(place: str, value: Any) -> Callable[[h5py.File], None]:
    def edit(content: h5py.File) -> None:
        if place in content:
            del content[place]
        if value is not None:
            content[place] = value
        else:
            content.create_group(place)

    return edit


@pytest.mark.parametrize(
    ("rule", "edit"),
    [
        ("nir-file", _put("node/nodes/n0/weight", h5py.SoftLink("/nowhere"))),
        ("nir-version", _put("version", None)),
        ("nir-graph", _put("node", 1.0)),
        ("nir-graph", _put("node/edges", 1.0)),
        ("nir-graph", _put("node/edges", h5py.Empty("f"))),
        ("nir-metadata", _put("node/metadata", "text")),
        ("nir-metadata", _put("node/nodes/n0/metadata", 1.0)),
        ("nir-node", _put("node/nodes/n1/metadata/spikeport", "text")),
        ("nir-node", _put("node/nodes/n1/metadata/spikeport", 1.0)),
        ("nir-value", _put("node/nodes/input/shape", np.ones((2, 2)))),
        ("nir-value", _put("node/nodes/input/shape", np.array([4.5]))),
    ],
)
def test_files_of_other_contents(rule: str, edit: Any, tmp_path: Path) -> None:
    file = saved(CHAINS["affine"](), tmp_path)
    with h5py.File(file, "r+") as content:
        edit(content)
    assert findings(file)[0].rule == rule


@pytest.mark.parametrize("value", ["text", [DT], None])
def test_time_steps_in_the_metadata_that_are_none(value: Any, tmp_path: Path) -> None:
    file = saved(CHAINS["affine"](), tmp_path)
    with h5py.File(file, "r+") as content:
        _put("node/metadata/dt", value)(content)
    with pytest.raises(UsageError, match="allowed: a time above 0"):
        NirNetwork(file)


@pytest.mark.parametrize("dt", ["1e-4", [DT], np.array([DT]), 1j, True])
def test_time_steps_that_are_no_numbers(dt: Any) -> None:
    with pytest.raises(UsageError, match="allowed: a time above 0"):
        NirNetwork(CHAINS["affine"](), dt)


def test_files_that_are_none(tmp_path: Path) -> None:
    file = saved(CHAINS["conv2d"](), tmp_path)
    whole = file.read_bytes()
    for end in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        (wrong,) = findings(file)
        assert wrong.rule == "nir-file"
        assert str(file) in wrong.found
    file.write_bytes(whole[::-1])
    assert [f.rule for f in findings(file)] == ["nir-file"]
    with pytest.raises(UsageError, match="no such file"):
        NirNetwork(tmp_path / "none.nir", DT)
    with pytest.raises(UsageError, match=r"a \.nir file or an nir\.NIRGraph"):
        NirNetwork(3, DT)


def test_versions_and_nodes_that_are_not_known(tmp_path: Path) -> None:
    file = saved(CHAINS["affine"](), tmp_path)
    with h5py.File(file, "r+") as content:
        del content["version"], content["node/nodes/n0/bias"]
        content["node/nodes/n1/type"][()] = "Izhikevich"
    (wrong,) = findings(file)
    assert wrong.rule == "nir-version"
    assert "version none" in wrong.found
    with h5py.File(file, "r+") as content:
        content["version"] = "1.3.0"
    assert [(f.rule, f.where) for f in findings(file)] == [
        ("nir-field", "n0"),
        ("nir-unknown-node", "n1"),
    ]
    with h5py.File(file, "r+") as content:
        content["version"][()] = "2.0.0"
        content["node/type"][()] = "LIF"
    assert [f.rule for f in findings(file)] == ["nir-version", "nir-graph"]
