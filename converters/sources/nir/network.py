"""A NIR graph as a torch network: time-major, each call from the initial state.

A node takes the sum of the edges into it, in the order of the file. Nodes outside cycles compute all
steps at once. Around a cycle, a neuron's output arrives one step later: the edge that goes back, from a
neuron to one that is as near to an Input or nearer, holds what it had a step before, 0 at first. A Delay
in a cycle delays by its own time and by nothing more.
"""

from __future__ import annotations

import functools
import keyword
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import CaptureError, Finding, UsageError
from ...neurons import Neuron
from .graph import (
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
    """

    nodes: tuple[str, ...]
    late: frozenset[tuple[str, str]] = frozenset()
    cyclic: bool = False


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
        graph, findings = without_own_loops(read(source))
        self.graph = graph
        self.dt = time_step(graph, dt)
        self._parts = tuple(parts(graph))
        cyclic = {name for part in self._parts if part.cyclic for name in part.nodes}
        self._paths = {}
        for name, unit in graph.units.items():
            try:
                module = build(unit, self.dt, name in cyclic)
            except (UsageError, RuntimeError, ValueError) as error:
                findings.append(_refused(name, unit, error))
                module = nn.Identity()
            self._paths[name] = _attach(self, name, module)
        findings = findings or list(self._infer_shapes())
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
                yield module.layer.neuron

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

        def output(a: str, b: str, t: int) -> torch.Tensor:
            """What the edge from a to b holds at step t."""
            if a not in inside:
                return values[a][t]
            zeros = like.new_zeros(batch, *self._shapes[a])
            if isinstance(delay := self._module(a), Delay):
                late: torch.Tensor = delay.at(taken[a], t, zeros)
                return late
            if (a, b) not in part.late:
                return inside[a][t]
            return inside[a][t - 1] if t else zeros

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

    def _infer_shapes(self) -> Iterator[Finding]:
        """Set the shape of every signal at one step; what does not fit is found."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        units = self.graph.units
        for name in (n for part in self._parts for n in part.nodes):
            unit = units[name]
            # Around a cycle a neuron's output is taken before it was computed; its parameters say it.
            sources = ((a, units[a].shape) for a in self.graph.into(name))
            given = [shape for a, own in sources if (shape := self._shapes.get(a, own))]
            said = unit.shape
            if name in self.graph.inputs:
                assert said is not None
                self._shapes[name] = said
                continue
            taken = given[0] if given else said
            if taken is None:
                yield _misfit(name, "a cycle whose signal has no shape", "parameters of its shape")
                return
            try:
                self._shapes[name] = self._shape_after(name, unit, taken)
            except (RuntimeError, UsageError, ValueError, IndexError) as error:
                yield _misfit(
                    name, f"{unit.kind} on a signal {list(taken)}: {error}", "signals that it takes"
                )
                return
        for a, b in self.graph.edges:
            first = self.graph.into(b)[0]
            if self._shapes[a] != self._shapes[first]:
                yield _misfit(
                    f"{a} -> {b}",
                    f"a signal {list(self._shapes[a])} added to one {list(self._shapes[first])}",
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


def _distances(graph: Graph) -> dict[str, int]:
    """How soon each node is met from the inputs, all numbers different."""
    found: dict[str, int] = {}
    queue = [*graph.inputs]
    for name in queue:
        if name not in found:
            found[name] = len(found)
            queue += graph.after(name)
    return found


def _cycle(graph: Graph, nodes: frozenset[str]) -> Part:
    inner = [(a, b) for a, b in graph.edges if a in nodes and b in nodes]
    neurons = {name for name in nodes if graph.units[name].kind in NEURONS}
    delays = {name for name in nodes if graph.units[name].holds_back} - neurons
    instant = nodes - neurons - delays
    distance = _distances(graph)
    late = set()
    for a, b in inner:
        if a in neurons:
            fed = {b, *graph.reached_from([b], instant)} if b in instant else {b}
            if any(distance[n] <= distance[a] for n in fed & neurons):
                late.add((a, b))
    order: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(sorted(nodes), ()))
    for a, b in inner:
        if (a, b) not in late and a not in delays:
            order.add(b, a)
    return Part(tuple(order.static_order()), frozenset(late), cyclic=True)
