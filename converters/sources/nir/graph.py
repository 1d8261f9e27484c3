"""A NIR graph as plain data: read from a file or from the ``nir`` package, checked, flattened.

NIR is the Neuromorphic Intermediate Representation, Pedersen et al. 2024, Nature Communications 15:8122.
The file is read with h5py alone, so that everything wrong with it is found, not the first alone.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from ...errors import CaptureError, Finding, UsageError

#: Releases of the format, as the files say them, whose nodes mean what is read here.
VERSIONS = ("0.", "1.")
HEADLINE = "the NIR graph cannot be read:"

#: The fields of each kind of node; those of the second tuple may be left out.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Input": (("shape",), ()),
    "Output": (("shape",), ()),
    "Affine": (("weight", "bias"), ()),
    "Linear": (("weight",), ()),
    "Scale": (("scale",), ()),
    "Conv1d": (("weight", "stride", "padding", "dilation", "groups", "bias"), ("input_shape",)),
    "Conv2d": (("weight", "stride", "padding", "dilation", "groups", "bias"), ("input_shape",)),
    "AvgPool2d": (("kernel_size", "stride", "padding"), ()),
    "SumPool2d": (("kernel_size", "stride", "padding"), ()),
    "Flatten": (("start_dim", "end_dim"), ("input_type",)),
    "Delay": (("delay",), ()),
    "Threshold": (("threshold",), ()),
    "I": (("r",), ()),
    "IF": (("r", "v_threshold"), ("v_reset",)),
    "LI": (("tau", "r", "v_leak"), ()),
    "LIF": (("tau", "r", "v_leak", "v_threshold"), ("v_reset",)),
    "CubaLI": (("tau_syn", "tau_mem", "r", "v_leak"), ("w_in",)),
    "CubaLIF": (("tau_syn", "tau_mem", "r", "v_leak", "v_threshold"), ("v_reset", "w_in")),
}
NEURONS = frozenset({"I", "IF", "LI", "LIF", "CubaLI", "CubaLIF"})
#: Other nodes that compute each element alone, with the parameter that has the signal's shape.
_SIZED = {"Scale": "scale", "Delay": "delay", "Threshold": "threshold"}
#: Nodes whose output has the shape of their input.
ELEMENTWISE = NEURONS | _SIZED.keys()
_SPACE = ("kernel_size", "stride", "padding", "dilation", "groups", "start_dim", "end_dim")


@dataclass(frozen=True)
class Unit:
    """One node.

    Attributes:
        kind: Its type in NIR.
        fields: Its parameters, arrays and numbers.
        metadata: What else the file says of it.
    """

    kind: str
    fields: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of its signal at one step, for nodes that say it."""
        if self.kind in ("Input", "Output"):
            return tuple(int(n) for n in np.atleast_1d(self.fields["shape"]))
        own = "r" if self.kind in NEURONS else _SIZED.get(self.kind)
        return None if own is None else tuple(np.shape(self.fields[own]))

    @property
    def holds_back(self) -> bool:
        """Whether what comes out at a moment depends on what went in before it alone."""
        return bool((self.delays > 0).all()) if self.kind == "Delay" else self.kind in NEURONS

    @property
    def delays(self) -> np.ndarray[Any, Any]:
        """Its delays; 0 where the graph says no number."""
        given = _array(self.fields.get("delay", 0) if self.kind == "Delay" else 0)
        return given if given.dtype.kind in "fiub" else np.zeros(1)


@dataclass(frozen=True)
class Graph:
    """A checked graph without subgraphs: nodes of these are called ``subgraph.node``.

    Attributes:
        units: The nodes by name.
        edges: (from, to); a node takes the sum of the edges into it.
        inputs: The graph's own Input nodes, sorted: a file does not keep their order.
        outputs: Its own Output nodes likewise.
        metadata: What else the file says.
    """

    units: Mapping[str, Unit]
    edges: tuple[tuple[str, str], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def into(self, name: str) -> list[str]:
        """The nodes whose outputs a node sums."""
        return [a for a, b in self.edges if b == name]

    @functools.cached_property
    def _after(self) -> dict[str, list[str]]:
        after: dict[str, list[str]] = {}
        for a, b in self.edges:
            after.setdefault(a, []).append(b)
        return after

    def after(self, name: str) -> list[str]:
        """The nodes that take a node's output."""
        return self._after.get(name, [])

    def reached_from(self, names: Iterable[str], through: Container[str] | None = None) -> set[str]:
        """The nodes that a signal from these reaches; beyond the first only by way of ``through``."""
        found: set[str] = set()
        stack = [b for name in names for b in self.after(name)]
        while stack:
            if (name := stack.pop()) not in found:
                found.add(name)
                stack += self.after(name) if through is None or name in through else []
        return found


class UnbuildableError(UsageError):
    """A node that cannot be computed at this time step or at all.

    Attributes:
        found: What it has.
        allowed: What it may have.
        fix: What to do.
    """

    def __init__(self, found: str, allowed: str, fix: str) -> None:
        super().__init__(f"{found}; allowed: {allowed}; {fix}")
        self.found, self.allowed, self.fix = found, allowed, fix


def read(source: Any) -> tuple[Graph, list[Finding]]:
    """A graph from a ``.nir`` file or an ``nir.NIRGraph``, and what is wrong with values in its nodes.

    Raises:
        UsageError: The source is neither.
        CaptureError: Its nodes and edges are no graph; with everything that is wrong with it.
    """
    if isinstance(source, (str, os.PathLike)):
        content = _from_file(Path(source))
    elif hasattr(source, "to_dict") and hasattr(source, "edges"):
        content = source.to_dict()
    else:
        raise UsageError(f"a NIR graph is a .nir file or an nir.NIRGraph, not {type(source)}")
    findings: list[Finding] = []
    units: dict[str, Unit] = {}
    edges: list[tuple[str, str]] = []
    _flatten(content, "", units, edges, findings)
    if findings and not units:
        raise CaptureError(HEADLINE, findings)
    inputs, outputs = (
        tuple(sorted(_named(content["nodes"], kind))) for kind in ("Input", "Output")
    )
    metadata = content.get("metadata") or {}
    graph = Graph(units, tuple(edges), inputs, outputs, metadata)
    findings += _connections(graph)
    values = [f for name, unit in units.items() for f in _values(name, unit)]
    if findings:
        raise CaptureError(HEADLINE, [*findings, *values])
    return graph, values


def finding(rule: str, where: str, found: str, allowed: str, fix: str) -> Finding:
    """A finding about a node of a NIR graph, whose name is its place."""
    return Finding(rule=f"nir-{rule}", where=where, found=found, allowed=allowed, fix=fix)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise UsageError(
            f"h5py cannot be imported ({error}), which .nir files are read with; install it: "
            "pip install 'spikeport[nir]'"
        ) from error
    if not path.is_file():
        raise UsageError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with h5py.File(path, "r") as file:
            version = _tree(file["version"], h5py) if "version" in file else "none"
            content = _tree(file["node"], h5py) if "node" in file else None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CaptureError(
            HEADLINE,
            [
                finding(
                    "file",
                    "",
                    f"{path} is no whole HDF5 file: {error}",
                    "what nir.write writes",
                    "write or copy the file again",
                )
            ],
        ) from error
    wrong = []
    if not str(version).startswith(VERSIONS):
        wrong.append(
            finding(
                "version",
                "",
                f"{path} is of NIR version {version}",
                f"versions {', '.join(f'{v}x' for v in VERSIONS)}",
                "write it again with nir 1.x, or update spikeport",
            )
        )
    if not isinstance(content, dict) or content.get("type") != "NIRGraph":
        wrong.append(
            finding(
                "graph",
                "",
                f"{path} holds {content.get('type') if isinstance(content, dict) else 'no node'!r}",
                "an NIRGraph",
                "wrap the node into a graph: nir.NIRGraph.from_list(node)",
            )
        )
    if wrong:
        raise CaptureError(HEADLINE, wrong)
    assert isinstance(content, dict)
    return content


def _tree(item: Any, h5py: Any) -> Any:
    if isinstance(item, h5py.Group):
        return {name: _tree(inner, h5py) for name, inner in item.items()}
    if item is None:
        raise ValueError("a link in it leads nowhere")
    return _plain(item[()])


def _plain(value: Any) -> Any:
    """Texts as str, also inside arrays of them; tensors as arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind in "OSU":
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _flatten(
    content: Mapping[str, Any],
    prefix: str,
    units: dict[str, Unit],
    edges: list[tuple[str, str]],
    findings: list[Finding],
) -> None:
    """Add a graph's nodes and edges, those of its subgraphs under their names."""
    nodes, pairs = content.get("nodes"), _pairs(content.get("edges"))
    findings += _metadata(prefix.rstrip("."), content)
    if not _groups(nodes) or pairs is None:
        findings.append(
            finding(
                "graph",
                prefix.rstrip("."),
                "a graph whose nodes are no groups or whose edges are no pairs",
                "nodes by name, and edges of two names each",
                "write it with nir.write",
            )
        )
        return
    for name, node in nodes.items():
        path, kind = f"{prefix}{name}", str(node.get("type"))
        if kind == "NIRGraph":
            _flatten(node, f"{path}.", units, edges, findings)
            findings += _ports(path, node)
            continue
        findings += _named_twice(path, units)
        findings += _fields(path, kind, node)
        findings += _metadata(path, node)
        given = {
            n: _plain(node[n])
            for n in (n for part in _FIELDS.get(kind, ()) for n in part)
            if node.get(n) is not None
        }
        metadata = node.get("metadata")
        units[path] = Unit(kind, given, metadata if isinstance(metadata, Mapping) else {})
    for a, b in pairs:
        findings += _edge(prefix, a, b, nodes, edges)


def _edge(
    prefix: str, a: str, b: str, nodes: Mapping[str, Any], edges: list[tuple[str, str]]
) -> Iterator[Finding]:
    """Add an edge, or say what is wrong with it."""
    missing = [end for end in (a, b) if end not in nodes]
    ends = (
        f"{prefix}{a}{_port(nodes, a, 'Output')}",
        f"{prefix}{b}{_port(nodes, b, 'Input')}",
    )
    if missing:
        yield finding(
            "edge",
            f"{prefix}{a} -> {prefix}{b}",
            f"an edge of {', '.join(missing)}, which is no node",
            "edges between nodes of the same graph",
            "add the node or remove the edge",
        )
    elif ends in edges:
        yield finding(
            "edge",
            f"{prefix}{a} -> {prefix}{b}",
            "the same edge twice",
            "one edge between two nodes",
            "remove one, or scale the signal with a Scale node",
        )
    else:
        edges.append(ends)


def _groups(nodes: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(nodes, Mapping) and all(isinstance(n, Mapping) for n in nodes.values())


def _pairs(edges: Any) -> list[list[str]] | None:
    """Edges as pairs of names, or None if they are something else."""
    given = sorted(edges) if isinstance(edges, (set, frozenset)) else _plain(edges)
    if given is None or (isinstance(given, np.ndarray) and given.ndim and not given.size):
        return []
    pairs = isinstance(given, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(n, str) for n in pair)
        for pair in given
    )
    return [[str(a), str(b)] for a, b in given] if pairs else None


def _metadata(path: str, node: Mapping[str, Any]) -> Iterator[Finding]:
    said = node.get("metadata")
    if said is not None and not isinstance(said, Mapping):
        yield finding(
            "metadata",
            path,
            f"metadata of type {type(said).__name__}",
            "values by name",
            "write the metadata as a dictionary, or leave them out",
        )


def _named(nodes: Mapping[str, Any], kind: str) -> list[str]:
    return [name for name, node in nodes.items() if node.get("type") == kind]


def _port(nodes: Mapping[str, Any], name: str, kind: str) -> str:
    """Where an edge of the outer graph ends inside a subgraph; "" for another node."""
    node = nodes.get(name, {})
    inner = _named(node.get("nodes", {}), kind) if node.get("type") == "NIRGraph" else []
    return f".{inner[0]}" if inner else ""


def _ports(path: str, node: Mapping[str, Any]) -> Iterator[Finding]:
    for kind in ("Input", "Output"):
        count = len(_named(node.get("nodes", {}), kind))
        if count != 1:
            yield finding(
                "subgraph",
                path,
                f"a subgraph with {count} {kind} nodes",
                f"one {kind} node, which the edges of the outer graph lead to",
                "write the nodes of the subgraph into the outer graph",
            )


def _named_twice(path: str, units: Mapping[str, Unit]) -> Iterator[Finding]:
    if path in units:
        yield finding(
            "name",
            path,
            "two nodes of this name, one of them in a subgraph",
            "names that differ, a subgraph's nodes being called subgraph.node",
            "rename one",
        )


def _fields(path: str, kind: str, node: Mapping[str, Any]) -> Iterator[Finding]:
    if kind not in _FIELDS:
        yield finding(
            "unknown-node",
            path,
            f"a node of type {kind}",
            ", ".join([*_FIELDS, "NIRGraph"]),
            "write the network with these",
        )
        return
    needed = _FIELDS[kind][0]
    if missing := [n for n in needed if node.get(n) is None]:
        yield finding(
            "field",
            path,
            f"{kind} without {', '.join(missing)}",
            f"{kind} with {', '.join(needed)}",
            "write the node again",
        )


def _connections(graph: Graph) -> Iterator[Finding]:
    """Nodes that nothing leads to or that lead nowhere, and cycles without any delay."""
    for kind, names in (("Input", graph.inputs), ("Output", graph.outputs)):
        if not names:
            yield finding(
                "ports",
                "",
                f"no {kind} node",
                "at least one Input and one Output",
                f"add a nir.{kind} node and an edge",
            )
    sources, ends = {a for a, _ in graph.edges}, {b for _, b in graph.edges}
    for name in sorted(ends & {*graph.inputs}):
        yield finding(
            "edge",
            name,
            "an edge that leads to an Input",
            "Inputs that data alone come from",
            "lead the edge to the node behind it",
        )
    for name in graph.units:
        lacks = []
        if name not in graph.inputs and name not in ends:
            lacks.append("no edge leads to it")
        if name not in graph.outputs and name not in sources:
            lacks.append("no edge leaves it")
        if lacks:
            yield finding(
                "dangling",
                name,
                " and ".join(lacks),
                "nodes on a way from an Input to an Output",
                "add the edge or remove the node",
            )
    fed = graph.reached_from(graph.inputs)
    for name in sorted(ends - fed):
        yield finding(
            "dangling",
            name,
            "no Input leads to it",
            "nodes on a way from an Input to an Output",
            "add an edge or remove the node",
        )
    for name, unit in sorted(graph.units.items()):
        comes_back = name in graph.reached_from(graph.after(name))
        if comes_back and (unit.delays > 0).any() and not unit.holds_back:
            yield finding(
                "delay",
                name,
                "delays of 0 and above in a cycle",
                "delays in a cycle that are all above 0",
                "give those of 0 a Delay node, and a way, of their own",
            )
    for cycle in _instant_cycles(graph):
        yield finding(
            "cycle",
            cycle[0],
            f"a cycle without delay: {' -> '.join([*cycle, cycle[0]])}",
            "cycles through a neuron or a Delay",
            "put a Delay node into the cycle",
        )


def _instant_cycles(graph: Graph) -> Iterator[list[str]]:
    """Cycles of nodes that hold nothing back: one for each edge that closes some."""
    through = {n for n, u in graph.units.items() if not u.holds_back}
    done: set[str] = set()
    for start in sorted(through):
        trail: list[str] = []
        ways = [iter([start])]
        while ways:
            name = next(ways[-1], None)
            if name is None:
                ways.pop()
                done.update(trail[-1:])
                del trail[-1:]
            elif name in trail:
                yield trail[trail.index(name) :]
            elif name in through - done:
                trail.append(name)
                ways.append(iter(graph.after(name)))


def _values(name: str, unit: Unit) -> Iterator[Finding]:
    """Parameters that are no finite numbers, time constants below zero, shapes that differ."""
    for key, value in unit.fields.items():
        text = key == "padding" and isinstance(value, str) and value in ("same", "valid")
        if key == "input_type" or text:
            continue
        array = _array(value)
        wrong = ""
        if array.dtype.kind not in "fiub":
            wrong, allowed = f"{key} is {value!r}", "numbers"
        elif key != "shape" and not array.size:
            wrong, allowed = f"{key} is empty", "at least one number"
        elif key == "shape" and (array.ndim > 1 or (array != np.floor(array)).any()):
            wrong, allowed = f"shape is {array.tolist()}", "one whole number for each dimension"
        elif not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            wrong, allowed = f"{key} has {count} values that are NaN or infinite", "finite numbers"
        elif (abs(array.astype(np.float64)) > np.finfo(np.float32).max).any():
            wrong, allowed = f"{key} overflows float32, in which it is computed", "up to 3.4e38"
        elif key.startswith("tau") and (array <= 0).any():
            wrong, allowed = f"{key} is {array.min():.6g}", "time constants above 0"
        elif key == "delay" and (array < 0).any():
            wrong, allowed = f"delay is {array.min():.6g}", "delays of at least 0"
        elif key in _SPACE and (array != np.floor(array)).any():
            wrong, allowed = f"{key} is {array.tolist()}", "whole numbers"
        if wrong:
            yield finding(
                "value", name, f"{unit.kind} whose {wrong}", allowed, "mend the parameter"
            )
    if unit.kind in NEURONS:
        shapes = {key: _array(value).shape for key, value in unit.fields.items()}
        sized = {key: s for key, s in shapes.items() if s}
        if len({*sized.values()}) > 1:
            yield finding(
                "shape",
                name,
                f"{unit.kind} with parameters of shapes "
                + ", ".join(f"{key} {list(s)}" for key, s in shapes.items()),
                "parameters of one shape, that of the signal at one step",
                "broadcast them",
            )


def _array(value: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(value)
    except ValueError:  # rows of several lengths
        return np.asarray(None)


def numbers(value: Any) -> list[int]:
    """A size or sizes as plain integers."""
    return [int(n) for n in np.atleast_1d(value)]


def whole_steps(delay: Any, dt: float) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Delays in time steps, or None if they are no multiples of dt."""
    steps = np.asarray(delay, dtype=np.float64) / dt
    near = np.rint(steps)
    if not np.allclose(steps, near, rtol=1e-6, atol=1e-6):
        return None
    return near.astype(np.int64)


def time_step(graph: Graph, dt: float | None) -> float:
    """The time step in the unit of the graph's time constants: the one given, or the graph's own.

    Raises:
        UsageError: Neither is there, or it is no time.
    """
    own = graph.metadata.get("dt")
    if dt is None and own is None:
        raise UsageError(
            "NIR describes networks in continuous time and this graph does not say its time step; "
            "give it: dt=1e-4 (--arg dt=1e-4), in the unit of its time constants"
        )
    given = _array(_plain(own if dt is None else dt))
    if given.ndim or given.dtype.kind not in "fiu" or not (math.isfinite(given) and given > 0):
        raise UsageError(f"dt is {own if dt is None else dt!r}; allowed: a time above 0")
    return float(given)


def sequence(value: Any) -> Sequence[int]:
    """A size of two dimensions; one number stands for both."""
    sizes = numbers(value)
    return sizes * 2 if len(sizes) == 1 else sizes
