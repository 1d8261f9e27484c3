"""NIR graphs as networks, against NIR's definitions in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
import pytest
import torch
from nir_equations import interpret
from nir_graphs import (
    CHAINS,
    DT,
    chain,
    cuba,
    drive,
    eighths,
    equals,
    findings,
    full,
    graph,
    lif,
    saved,
    self_loop,
)

from spikeport import deploy
from spikeport.converters.errors import UnsupportedError, UsageError
from spikeport.converters.sources.nir import NirNetwork


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


# What graphs are made of


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


def test_nodes_named_as_torch_names_its_own() -> None:
    flat = self_loop()
    names = {"a": "if", "w": "0 graph-x.forward", "input": "type", "output": "train."}
    nodes = {names[n]: node for n, node in flat.nodes.items()}
    renamed = graph([(names[a], names[b]) for a, b in flat.edges], **nodes)
    (x,) = drive(flat, steps=2)
    equals(NirNetwork(renamed, DT), renamed, [x])
    deploy.convert(renamed, (x,), "reference", dt=DT)
