"""A NIR graph as a torch network: time-major, each call from the initial state.

A node takes the sum of the edges into it, in the order of the file. Nodes outside cycles compute all
steps at once. Around a cycle, a neuron's output arrives one step later: the way that goes back, from a
neuron to one that is as near to an Input or nearer, counted in nodes, holds what it had a step before,
that of a neuron which gave 0 at first. What leads on from a node on that way hears it at once: the edge
that is late is the first behind which all goes back. A Delay in a cycle delays by its own time and by
nothing more.
"""

from __future__ import annotations

import functools
import keyword
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import CaptureError, Finding, UsageError
from ...neurons import Neuron
from .graph import (
    ELEMENTWISE,
    HEADLINE,
    NEURONS,
    Graph,
    UnbuildableError,
    Unit,
    finding,
    read,
    time_step,
)
from .layers import Delay, Neurons, build
from .neurons import without_own_loops


@dataclass(frozen=True)
class Part:
    """Nodes that are computed together: one over all steps, or those of a cycle step by step.

    Attributes:
        nodes: In the order in which a step computes them.
        late: Edges inside it that hold what they had a step before.
        cyclic: Whether it is a cycle.
        mixed: Those of the late edges that hold back, too, what should arrive at once.
    """

    nodes: tuple[str, ...]
    late: frozenset[tuple[str, str]] = frozenset()
    cyclic: bool = False
    mixed: frozenset[tuple[str, str]] = frozenset()


class NirNetwork(nn.Module):
    """A NIR graph in discrete time: each Input [T, N, ...] -> each Output [T, N, ...].

    Inputs and outputs are ordered by name; a single output comes as a tensor, several as a tuple.

    Args:
        source: A .nir file or an ``nir.NIRGraph``.
        dt: Time step in the unit of the graph's time constants; the ``dt`` of its metadata unless given.

    Attributes:
        graph: The graph.
        dt: The time step.
        longest_delay: That of its Delay nodes, in time steps.

    Raises:
        UsageError: There is no such file, or no time step.
        CaptureError: With everything in the graph that cannot be computed.
    """

    def __init__(self, source: Any, dt: float | None = None) -> None:
        super().__init__()
        graph, findings = read(source)
        broken = {f.where for f in findings}
        if not findings:
            graph, findings = without_own_loops(graph)
        self.graph = graph
        self.dt = time_step(graph, dt)
        self._parts = tuple(parts(graph))
        findings += [_mixed(*edge) for part in self._parts for edge in sorted(part.mixed)]
        cyclic = {name for part in self._parts if part.cyclic for name in part.nodes}
        self._paths = {}
        for name, unit in graph.units.items():
            try:
                module = nn.Identity() if name in broken else build(unit, self.dt, name in cyclic)
            except (UsageError, RuntimeError, ValueError) as error:
                findings.append(_refused(name, unit, error))
                module = nn.Identity()
                broken.add(name)
            self._paths[name] = _attach(self, name, module)
        findings += self._infer_shapes(broken)
        if findings:
            raise CaptureError(HEADLINE, findings)
        delays = (m.longest for m in self.modules() if isinstance(m, Delay))
        self.longest_delay: int = max(delays, default=0)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Each Input [T, N, ...] -> each Output [T, N, ...]."""
        self._check(inputs)
        values = dict(zip(self.graph.inputs, inputs, strict=True))
        for part in self._parts:
            if part.cyclic:
                self._run_cycle(part, values, inputs[0])
            elif part.nodes[0] not in values:
                (name,) = part.nodes
                x = _sum([values[a] for a in self.graph.into(name)])
                values[name] = self._over_time(name, x)
        outputs = tuple(values[name] for name in self.graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def declarations(self) -> Iterator[Neuron]:
        """Its neurons, as they are declared in discrete time."""
        for name in self._paths:
            if isinstance(module := self._module(name), Neurons):
                yield module.neuron

    def _check(self, inputs: Sequence[torch.Tensor]) -> None:
        names = self.graph.inputs
        if len(inputs) != len(names):
            raise UsageError(
                f"{len(inputs)} given of the graph's {len(names)} inputs: {', '.join(names)} (nir adds "
                "one called input_NODE before a node that no edge leads to)"
            )
        for name, x in zip(names, inputs, strict=True):
            shape = self._shapes[name]
            if tuple(x.shape[2:]) != shape:
                raise UsageError(
                    f"{name} is given {list(x.shape)}; it takes [T, N, {', '.join(map(str, shape))}]"
                )
            if x.shape[:2] != inputs[0].shape[:2]:
                raise UsageError(
                    f"{names[0]} is given {list(inputs[0].shape[:2])} time steps and samples, {name} "
                    f"{list(x.shape[:2])}; allowed: one T and one N for all inputs"
                )

    def _module(self, name: str) -> nn.Module:
        return self.get_submodule(self._paths[name])

    def _over_time(self, name: str, x: torch.Tensor) -> torch.Tensor:
        module = self._module(name)
        if isinstance(module, (Neurons, Delay, nn.Identity)):
            y: torch.Tensor = module(x)
            return y
        folded: torch.Tensor = module(x.flatten(0, 1))
        return folded.reshape(*x.shape[:2], *folded.shape[1:])

    def _run_cycle(self, part: Part, values: dict[str, torch.Tensor], like: torch.Tensor) -> None:
        """Compute the nodes of a cycle step by step."""
        steps, batch = like.shape[:2]
        inside = {name: list[torch.Tensor]() for name in part.nodes}
        taken = {name: list[torch.Tensor]() for name in part.nodes}
        for name in part.nodes:
            if isinstance(module := self._module(name), Neurons):
                module.reset()

        @functools.cache
        def silent(name: str) -> torch.Tensor:
            """What a node gives where its neurons give 0, as before the first step."""
            module = self._module(name)
            if isinstance(module, Neurons):
                return like.new_zeros(batch, *self._shapes[name])
            x = _sum([silent(a) for a in self.graph.into(name)])
            quiet: torch.Tensor = module.at([x], 0) if isinstance(module, Delay) else module(x)
            return quiet

        def output(a: str, b: str, t: int) -> torch.Tensor:
            """What the edge from a to b holds at step t."""
            if a not in inside:
                return values[a][t]
            if (a, b) in part.late:
                if t == 0:
                    return silent(a)
                t -= 1
            if isinstance(delay := self._module(a), Delay):
                late: torch.Tensor = delay.at(taken[a], t, like.new_zeros(batch, *self._shapes[a]))
                return late
            return inside[a][t]

        for t in range(steps):
            for name in part.nodes:
                x = _sum([output(a, name, t) for a in self.graph.into(name)])
                taken[name].append(x)
                if not isinstance(module := self._module(name), Delay):
                    inside[name].append(module(x))
        for name in part.nodes:
            if isinstance(delay := self._module(name), Delay):
                inside[name] = [delay.at(taken[name], t) for t in range(steps)]
            values[name] = torch.stack(inside[name])

    def _infer_shapes(self, broken: Collection[str]) -> Iterator[Finding]:
        """Set the shape of every signal at one step; what does not fit is found."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        units = self.graph.units
        # Nearest to the inputs first: each has a node before it by then.
        for name in distances(self.graph):
            unit = units[name]
            given = [self._shapes[a] for a in self.graph.into(name) if a in self._shapes]
            if name in broken:
                if given and unit.kind in ELEMENTWISE:
                    self._shapes[name] = given[0]
                continue
            taken = unit.shape if name in self.graph.inputs else next(iter(given), None)
            if taken is None:
                continue
            try:
                self._shapes[name] = self._shape_after(name, unit, taken)
            except (RuntimeError, UsageError, ValueError, IndexError) as error:
                yield _misfit(
                    name, f"{unit.kind} on a signal {list(taken)}: {error}", "signals that it takes"
                )
        for a, b in self.graph.edges:
            known = [self._shapes[n] for n in self.graph.into(b) if n in self._shapes]
            if a in self._shapes and self._shapes[a] != known[0]:
                yield _misfit(
                    f"{a} -> {b}",
                    f"a signal {list(self._shapes[a])} added to one {list(known[0])}",
                    "signals of one shape",
                )

    def _shape_after(self, name: str, unit: Unit, taken: tuple[int, ...]) -> tuple[int, ...]:
        if unit.shape is None:
            with torch.no_grad():
                return tuple(self._module(name)(torch.zeros(1, *taken)).shape[1:])
        if unit.kind in ("Input", "Output"):
            if name in self.graph.outputs and unit.shape != taken:
                raise UsageError(f"it says {list(unit.shape)}")
            return taken
        own = max((np.shape(value) for value in unit.fields.values()), key=len)
        if own not in ((), taken):
            raise UsageError(f"its parameters are of shape {list(own)}")
        return taken


def _attach(root: nn.Module, name: str, module: nn.Module) -> str:
    """Register a node's module under its name, as near as torch allows; the path."""
    *groups, last = (part or "_" for part in name.split("."))
    parent, path = root, []
    for part in groups:
        key = part
        while not isinstance(parent._modules.get(key), nn.Module):
            if _free(parent, key):
                parent.add_module(key, nn.Module())
            else:
                key += "_"
        parent = parent.get_submodule(key)
        path.append(key)
    key = last
    while not _free(parent, key):
        key += "_"
    parent.add_module(key, module)
    return ".".join([*path, key])


def _free(parent: nn.Module, key: str) -> bool:
    """Whether a child can be called so; torch.export writes Python in which it is an attribute."""
    return not hasattr(parent, key) and not keyword.iskeyword(key)


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(operator.add, terms)


def _refused(name: str, unit: Unit, error: Exception) -> Finding:
    told = (str(error), "constants that such a node takes", "mend the node")
    if isinstance(error, UnbuildableError):
        told = (error.found, error.allowed, error.fix)
    found, *rest = told
    return finding("node", name, f"{unit.kind}: {found}", *rest)


def _mixed(a: str, b: str) -> Finding:
    return finding(
        "cycle",
        f"{a} -> {b}",
        f"what {a} gives leads on at once and goes back to {b} a step later, and not all that {a} takes "
        "may be held back",
        "nodes that lead on and back only with what neurons of their cycle give",
        f"give {b} a node like {a} of its own, or put a Delay node between them",
    )


def _misfit(name: str, found: str, allowed: str) -> Finding:
    return finding("shape", name, found, allowed, "mend the shapes of the nodes before it")


# The order of computing


def parts(graph: Graph) -> Iterator[Part]:
    """The graph's nodes in the order of computing, those of a cycle together."""
    reach = {name: graph.reached_from([name]) for name in graph.units}
    cycles = {name: frozenset(n for n in reach[name] if name in reach[n]) for name in graph.units}
    whole = {name: cycles[name] or frozenset({name}) for name in graph.units}
    order = TopologicalSorter({whole[name]: set() for name in graph.units})
    for a, b in graph.edges:
        if whole[a] != whole[b]:
            order.add(whole[b], whole[a])
    for nodes in order.static_order():
        if len(nodes) == 1 and not cycles[next(iter(nodes))]:
            yield Part(tuple(nodes))
        else:
            yield _cycle(graph, nodes)


def distances(graph: Graph) -> dict[str, int]:
    """How many edges each node is from the nearest Input."""
    found = dict.fromkeys(graph.inputs, 0)
    queue = [*graph.inputs]
    for name in queue:
        for follower in graph.after(name):
            if follower not in found:
                found[follower] = found[name] + 1
                queue.append(follower)
    return found


def _cycle(graph: Graph, nodes: frozenset[str]) -> Part:
    neurons = {name for name in nodes if graph.units[name].kind in NEURONS}
    delays = {name for name in nodes if graph.units[name].holds_back} - neurons
    instant = nodes - neurons - delays
    distance = distances(graph)
    leads = {name: graph.reached_from([name], instant) & neurons for name in instant}
    back = dict[str, frozenset[tuple[str, str]]]()
    for a in neurons:
        near = {n for n in neurons if distance[n] <= distance[a]}
        returning = near | {n for n in instant if leads[n] & near}
        further = {n for n in returning if distance[n] > distance[a]}
        back[a] = frozenset(_edges_back(graph, a, returning, further))
    late = frozenset[tuple[str, str]]().union(*back.values())
    order: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(sorted(nodes), ()))
    for a, b in graph.edges:
        if {a, b} <= nodes and (a, b) not in late and a not in delays:
            order.add(b, a)
    mixed = frozenset(e for e in late if e[0] in instant and _is_mixed(graph, e, back, instant))
    return Part(tuple(order.static_order()), late, True, mixed)


def _edges_back(
    graph: Graph, neuron: str, returning: set[str], further: set[str]
) -> Iterator[tuple[str, str]]:
    """The edges on which what a neuron gives turns back, to nodes that it is ``returning`` by.

    Those ``further`` from the inputs than it may lead on as well, and are passed at once then.
    """
    onward, more = set[str](), True
    while more:
        found = {n for n in further if {*graph.after(n)} - (returning - onward)}
        onward, more = found, found != onward
    stack, seen = [neuron], {neuron}
    while stack:
        name = stack.pop()
        for follower in graph.after(name):
            if follower in returning - onward:
                yield name, follower
            elif follower in onward and follower not in seen:
                seen.add(follower)
                stack.append(follower)


def _is_mixed(
    graph: Graph,
    edge: tuple[str, str],
    back: Mapping[str, frozenset[tuple[str, str]]],
    instant: frozenset[str] | set[str],
) -> bool:
    """Whether a late edge holds back more than neurons' outputs, each of which turns back on it."""
    stack, seen = [edge[0]], {edge[0]}
    while stack:
        name = stack.pop()
        for source in graph.into(name):
            if any((source, name) in edges for edges in back.values()):
                return True
            if source in instant:
                stack += {source} - seen
                seen.add(source)
            elif edge not in back.get(source, ()):
                return True
    return False
