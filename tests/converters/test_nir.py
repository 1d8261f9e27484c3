"""NIR graphs as networks: against NIR's definitions in NumPy, and all that is wrong with a graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
import pytest
import torch
from nir_equations import interpret

from spikeport import deploy
from spikeport.converters.errors import CaptureError, Finding, UnsupportedError, UsageError
from spikeport.converters.sources.nir import NirNetwork

DT = 0.25
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def drawn_anew() -> None:
    """Each test has the same numbers, whichever ran before it."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def eighths(*shape: int, low: int = -8, high: int = 8) -> Any:
    """Values on a grid on which sums are exact in float32."""
    return RANDOM.integers(low, high + 1, shape).astype(np.float32) / 8


def full(value: Any, *shape: int) -> Any:
    return np.full(shape, value, dtype=np.float64)


def lif(*shape: int, tau: float = 2 * DT, v_reset: float = 0.0, **fields: Any) -> nir.LIF:
    given = {"r": 1.0, "v_leak": 0.0, "v_threshold": 0.5, **fields}
    return nir.LIF(full(tau, *shape), v_reset=full(v_reset, *shape), **_wide(given, shape))


def cuba(*shape: int, kind: Any = nir.CubaLIF, **fields: Any) -> Any:
    given = {"tau_syn": 2 * DT, "tau_mem": 4 * DT, "r": 2.0, "v_leak": 0.25, "w_in": 4.0, **fields}
    if kind is nir.CubaLIF:
        given |= {"v_threshold": 0.75, "v_reset": -0.25}
    return kind(**_wide(given, shape))


def _wide(fields: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    return {n: full(v, *shape) if isinstance(v, (int, float)) else v for n, v in fields.items()}


def graph(edges: str | list[tuple[str, str]], **nodes: Any) -> nir.NIRGraph:
    """A graph; edges as ``"input a b output"`` for a chain."""
    if isinstance(edges, str):
        names = edges.split()
        edges = list(itertools.pairwise(names))
    return nir.NIRGraph({n: nodes[n] for n in sorted(nodes)}, edges, type_check=False)


def chain(size: tuple[int, ...], after: tuple[int, ...], *nodes: nir.NIRNode) -> nir.NIRGraph:
    names = [f"n{i}" for i in range(len(nodes))]
    ports = {"input": nir.Input(np.array(size)), "output": nir.Output(np.array(after))}
    named = dict(zip(names, nodes, strict=True))
    return graph(" ".join(["input", *names, "output"]), **named, **ports)


def saved(g: nir.NIRGraph, tmp_path: Path) -> Path:
    file = tmp_path / "net.nir"
    nir.write(file, g)
    return file


CHAINS: dict[str, Callable[[], nir.NIRGraph]] = {
    "affine": lambda: chain((4,), (3,), nir.Affine(eighths(3, 4), eighths(3)), lif(3)),
    "linear": lambda: chain((4,), (3,), nir.Linear(eighths(3, 4)), lif(3, v_reset=-0.25)),
    "scale": lambda: chain((3,), (3,), nir.Scale(eighths(3)), nir.Threshold(eighths(3))),
    "conv1d": lambda: chain(
        (4, 9), (6, 4), nir.Conv1d(9, eighths(6, 2, 3), 2, 1, 2, 2, eighths(6)), lif(6, 4)
    ),
    "conv2d": lambda: chain(
        (2, 7, 6),
        (4, 3, 6),
        nir.Conv2d((7, 6), eighths(4, 1, 3, 2), (2, 1), (1, 0), (1, 0 + 1), 2, eighths(4)),
        nir.Threshold(full(0.25, 4, 4, 5)),
        nir.Conv2d((4, 5), eighths(4, 4, 2, 2), 1, (0, 1), 1, 1, eighths(4)),
    ),
    "same": lambda: chain(
        (2, 5, 6), (3, 5, 6), nir.Conv2d((5, 6), eighths(3, 2, 3, 2), 1, "same", 1, 1, eighths(3))
    ),
    "valid": lambda: chain(
        (2, 5, 6), (3, 3, 4), nir.Conv2d((5, 6), eighths(3, 2, 3, 3), 1, "valid", 1, 1, eighths(3))
    ),
    "pools": lambda: chain(
        (2, 9, 8),
        (2, 2, 2),
        nir.SumPool2d(np.array([3, 2]), np.array([2, 2]), np.array([1, 0])),
        nir.Threshold(full(0.5, 2, 5, 4)),
        nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
    ),
    "flatten": lambda: chain(
        (2, 3, 2),
        (2, 6),
        nir.Flatten(np.array([2, 3, 2]), 1, 2),
        lif(2, 6, v_threshold=eighths(2, 6, low=1)),
    ),
    "integrator": lambda: chain((3,), (3,), nir.I(full(2.0, 3))),
    "if": lambda: chain(
        (3,), (3,), nir.IF(np.array([4.0, 2.0, 1.0]), full(0.5, 3), np.array([0.0, -0.5, 0.25]))
    ),
    "li": lambda: chain((3,), (3,), nir.LI(full(4 * DT, 3), eighths(3), eighths(3))),
    "cuba_li": lambda: chain((3,), (3,), cuba(3, kind=nir.CubaLI, w_in=eighths(3))),
    "cuba_lif": lambda: chain((3,), (3,), cuba(3)),
    "delay": lambda: chain((3,), (3,), nir.Delay(np.array([0.0, DT, 3 * DT])), lif(3)),
    "late": lambda: chain((3,), (3,), nir.Delay(full(9 * DT, 3)), lif(3)),
    "leak": lambda: chain((3,), (3,), lif(3, v_leak=1.0, v_threshold=np.array([0.5, 0.75, 2.0]))),
}


def drive(g: nir.NIRGraph, steps: int = 6, batch: int = 2) -> list[torch.Tensor]:
    inputs = sorted(n for n, node in g.nodes.items() if isinstance(node, nir.Input))
    shapes = [g.nodes[n].input_type["input"] for n in inputs]
    return [torch.from_numpy(eighths(steps, batch, *shape)) for shape in shapes]


def equals(net: NirNetwork, g: nir.NIRGraph, x: list[torch.Tensor]) -> None:
    found = net(*x)
    expected = interpret(g, DT, *(part.numpy() for part in x))
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(expected)
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape
        assert np.array_equal(y.numpy(), z.astype(np.float32))


@pytest.mark.parametrize("name", CHAINS)
def test_each_node_computes_its_equation(name: str, tmp_path: Path) -> None:
    g = CHAINS[name]()
    x = drive(g)
    for source in (g, saved(g, tmp_path)):
        equals(NirNetwork(source, DT), g, x)


def test_time_constants_that_are_no_power_of_two() -> None:
    g = chain((3,), (3,), nir.LI(full(0.7, 3), full(1.3, 3), full(0.2, 3)))
    (x,) = drive(g)
    expected = interpret(g, 0.1, x.numpy())[0]
    assert np.allclose(NirNetwork(g, 0.1)(x).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_it_fires_above_the_threshold_and_not_at_it() -> None:
    g = chain((1,), (1,), nir.IF(full(1 / DT, 1), full(1.0, 1), full(0.0, 1)))
    above = np.nextafter(np.float32(1), np.float32(2))
    x = torch.tensor([1.0, 0.0, float(above), 0.0]).reshape(1, 4, 1)
    assert NirNetwork(g, DT)(x).flatten().tolist() == [0.0, 0.0, 1.0, 0.0]


# Cycles


def self_loop() -> nir.NIRGraph:
    return graph(
        [("input", "a"), ("a", "w"), ("w", "a"), ("a", "output")],
        input=nir.Input(np.array([3])),
        a=lif(3, v_reset=-0.25),
        w=nir.Affine(eighths(3, 3), eighths(3)),
        output=nir.Output(np.array([3])),
    )


def two_neurons() -> nir.NIRGraph:
    """b drives a back through w, and itself at once; a Delay of two steps goes back besides."""
    edges = "input-a a-u u-b b-w w-a b-b b-d d-a b-output a-spikes"
    return graph(
        [tuple(edge.split("-")) for edge in edges.split()],
        input=nir.Input(np.array([3])),
        a=lif(3),
        b=cuba(3),
        u=nir.Linear(eighths(3, 3)),
        w=nir.Affine(eighths(3, 3), eighths(3)),
        d=nir.Delay(full(2 * DT, 3)),
        output=nir.Output(np.array([3])),
        spikes=nir.Output(np.array([3])),
    )


@pytest.mark.parametrize("make", [self_loop, two_neurons])
def test_cycles_hold_what_the_neuron_gave_before(make: Any, tmp_path: Path) -> None:
    for _ in range(8):
        g = make()
        x = [part * 2 for part in drive(g, steps=8)]
        net = NirNetwork(saved(g, tmp_path), DT)
        equals(net, g, x)
        equals(net, g, [part.flip(0) for part in x])


def leading_on(**nodes: Any) -> nir.NIRGraph:
    """What s gives of lif is an output, and goes back through w; s adds a bias."""
    return graph(
        [tuple(e.split("-")) for e in ["input-lif", "lif-s", "s-output", "s-w", "w-lif"]],
        input=nir.Input(np.array([3])),
        lif=lif(3),
        s=nir.Affine(eighths(3, 3), eighths(3)),
        w=nir.Linear(eighths(3, 3)),
        output=nir.Output(np.array([3])),
        **nodes,
    )


def test_what_goes_back_leads_on_at_once(tmp_path: Path) -> None:
    for _ in range(4):
        g = leading_on()
        x = [part * 2 for part in drive(g, steps=8)]
        equals(NirNetwork(g, DT), g, x)
    net = NirNetwork(g, DT)
    stepped = deploy.convert(g, x, "reference", time="stepped", dt=DT)
    assert torch.equal(stepped(*x), net(*x))
    written = deploy.convert(g, x, "nir", dt=DT)
    artifact = deploy.compile(written, tmp_path / "nir", cache=False, dt=DT)
    assert torch.equal(deploy.load(artifact.path)(*x), net(*x))
    outer = leading_on()
    inner = graph(
        "input lif output", lif=lif(3), **{n: outer.nodes[n] for n in ("input", "output")}
    )
    nodes = {**outer.nodes, "lif": inner}
    equals(NirNetwork(saved(graph(outer.edges, **nodes), tmp_path), DT), outer, x)


def test_what_leads_on_and_back_with_other_signals_is_refused() -> None:
    g = leading_on(p=lif(3))
    (wrong,) = findings(graph([*g.edges, ("input", "p"), ("p", "s")], **g.nodes))
    assert (wrong.rule, wrong.where) == ("nir-cycle", "s -> w")


def test_neurons_equally_near_to_the_input_hear_each_other_later() -> None:
    def against(order: list[int]) -> Any:
        inhibit = nir.Linear(np.eye(2, dtype=np.float32) - 1)
        ports = {"input": nir.Input(np.array([2])), "a_": nir.Output(np.array([2]))}
        ports["b_"] = nir.Output(np.array([2]))
        edges = ["input-a", "input-b", "a-ab", "ab-b", "b-ba", "ba-a", "a-a_", "b-b_"]
        pairs = [tuple(edges[i].split("-")) for i in order]
        g = graph(pairs, a=lif(2), b=lif(2), ab=inhibit, ba=inhibit, **ports)
        return NirNetwork(g, DT)(2 * torch.ones(4, 1, 2))

    for order in (list(range(8)), list(reversed(range(8))), [1, 0, 2, 4, 3, 5, 7, 6]):
        a, b = against(order)
        assert torch.equal(a, b)
        assert 0 < a.mean() < 1


@pytest.mark.parametrize(("target", "steps"), [("reference", 1), ("lynxi-sim", 3), ("onnx", 5)])
def test_cycles_convert(target: str, steps: int) -> None:
    g = two_neurons()
    x = [part * 2 for part in drive(g, steps=steps)]
    program = deploy.convert(g, x, target=target, dtype="float32", dt=DT)
    for expected, found in zip(NirNetwork(g, DT)(*x), program(*x), strict=True):
        assert torch.equal(expected, found)


def test_subgraphs_are_their_nodes(tmp_path: Path) -> None:
    flat = self_loop()
    inner = graph(flat.edges, **flat.nodes)
    nested = graph(
        "input rnn output",
        input=nir.Input(np.array([3])),
        rnn=inner,
        output=nir.Output(np.array([3])),
    )
    equals(NirNetwork(saved(nested, tmp_path), DT), flat, drive(flat))


def test_sums_of_several_inputs_and_a_chain_convert(tmp_path: Path) -> None:
    g = graph(
        [("x", "w"), ("y", "a"), ("w", "a"), ("a", "li"), ("w", "li"), ("li", "output")],
        x=nir.Input(np.array([4])),
        y=nir.Input(np.array([3])),
        w=nir.Linear(eighths(3, 4)),
        a=lif(3),
        li=nir.LI(full(2 * DT, 3), full(1.0, 3), full(0.0, 3)),
        output=nir.Output(np.array([3])),
    )
    x, y = drive(g)
    equals(NirNetwork(g, DT), g, [x, y])
    program = deploy.convert(saved(g, tmp_path), (x, y), target="lynxi-sim", dtype="float32", dt=DT)
    assert torch.equal(program(x, y), NirNetwork(g, DT)(x, y))


def test_steps_of_a_graph_that_delays_for_longer_than_the_example() -> None:
    g = chain((3,), (3,), nir.Delay(np.array([0.0, DT, 3 * DT])), lif(3))
    with pytest.raises(UnsupportedError, match="a Delay of 3 time steps, in an example of 3"):
        deploy.convert(g, drive(g, steps=3), "reference", time="stepped", dt=DT)
    findings = deploy.check(g, drive(g, steps=3), ["reference"], time="stepped", dt=DT)
    assert [f.rule for f in findings.errors] == ["time-steps"]
    stepped = deploy.convert(g, drive(g, steps=5), "reference", time="stepped", dt=DT)
    x = drive(g, steps=9)
    assert torch.equal(stepped(*x), NirNetwork(g, DT)(*x))


# The time step


def test_the_time_step_is_given_or_in_the_metadata(tmp_path: Path) -> None:
    g = CHAINS["affine"]()
    (x,) = drive(g)
    with pytest.raises(UsageError, match="does not say its time step; give it: dt="):
        NirNetwork(g)
    expected = NirNetwork(g, DT)(x)
    g.metadata["dt"] = DT
    file = saved(g, tmp_path)
    assert torch.equal(NirNetwork(file)(x), expected)
    assert not torch.equal(NirNetwork(file, DT / 4)(x), expected)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="allowed: a time above 0"):
            NirNetwork(file, wrong)
    with pytest.raises(UsageError, match="dt is the time step of a NIR graph"):
        deploy.convert(torch.nn.Linear(4, 3), (x,), "reference", dt=DT)


def test_files_of_before_there_was_a_v_reset(tmp_path: Path) -> None:
    g = chain((3,), (3,), lif(3), cuba(3, w_in=1.0))
    file = saved(g, tmp_path)
    (x,) = drive(g)
    expected = NirNetwork(file, DT)(x)
    with h5py.File(file, "r+") as content:
        del content["node/nodes/n0/v_reset"], content["node/nodes/n1/w_in"]
        del content["version"]
        content["version"] = "0.2.0"
    assert torch.equal(NirNetwork(file, DT)(x), expected)


# Bad input


def findings(source: Any, dt: float = DT) -> list[Finding]:
    with pytest.raises(CaptureError) as caught:
        NirNetwork(source, dt)
    return [*caught.value.findings]


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


def test_many_ways_without_a_cycle_are_searched_once() -> None:
    ways = [(f"j{k}", f"{way}{k}") for k in range(40) for way in "lr"]
    joins = [(f"{way}{k}", f"j{k + 1}") for k in range(40) for way in "lr"]
    nodes = {b: nir.Scale(full(0.5, 1)) for _, b in [*ways, *joins]}
    ports = {"j0": nir.Input(np.array([1])), "output": nir.Output(np.array([1]))}
    NirNetwork(graph([*ways, *joins, ("j40", "output")], **nodes, **ports), DT)


def test_scalar_parameters_in_a_cycle() -> None:
    g = self_loop()
    scalar = nir.LIF(*(np.array(v) for v in (2 * DT, 1.0, 0.0, 0.5, -0.25)))
    (x,) = drive(g)
    nodes = {**g.nodes, "a": scalar}
    assert torch.equal(NirNetwork(graph(g.edges, **nodes), DT)(x), NirNetwork(g, DT)(x))


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
        ("nir-shape", "affine"),
        ("nir-shape", "scale"),
    }


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


def test_graphs_of_tensors_and_of_other_containers() -> None:
    g = CHAINS["affine"]()
    (x,) = drive(g)
    expected = NirNetwork(g, DT)(x)
    affine = g.nodes["n0"]
    affine.weight = torch.nn.Parameter(torch.from_numpy(affine.weight))
    affine.bias = torch.from_numpy(affine.bias).to(torch.bfloat16)
    assert torch.equal(NirNetwork(g, torch.tensor(DT))(x), expected)
    for edges in ({*g.edges}, np.array(g.edges), [tuple(map(np.str_, e)) for e in g.edges]):
        g.edges = edges
        g.metadata = g.nodes["n0"].metadata = None
        assert torch.equal(NirNetwork(g, DT)(x), expected)
    affine.weight = [[1.0, 2.0], [3.0]]
    assert ("nir-value", "n0") in {(f.rule, f.where) for f in findings(g)}


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


def test_nodes_named_as_torch_names_its_own() -> None:
    flat = self_loop()
    names = {"a": "if", "w": "0 graph-x.forward", "input": "type", "output": "train."}
    nodes = {names[n]: node for n, node in flat.nodes.items()}
    renamed = graph([(names[a], names[b]) for a, b in flat.edges], **nodes)
    (x,) = drive(flat, steps=2)
    equals(NirNetwork(renamed, DT), renamed, [x])
    deploy.convert(renamed, (x,), "reference", dt=DT)
