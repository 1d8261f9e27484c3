"""Networks whose neurons hear earlier spikes, as NIR graphs with cycles.

What such a network computes at one step has each layer once, and what goes from step to step is explicit
in it: the states of neurons, which NIR's nodes have themselves, and values that are used a step later.
These are edges that go back: around a cycle, a neuron's output arrives one step later (see
:mod:`...converters.sources.nir.network`, which says of which edges that holds). A value that is used
later and comes by any other edge goes through a Delay of one time step.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import torch
from torch import fx

from ...converters.builder import seal
from ...converters.errors import UnsupportedError
from ...converters.neurons import Neuron
from ...converters.ops import RESHAPE, Node, aten, dim, shape
from ...converters.passes import step_time
from ...converters.program import NEURON_STEP, PassReport, Program, where
from ...converters.sources.nir import Graph, Unit
from ...converters.sources.nir.graph import NEURONS
from ...converters.sources.nir.network import distances, parts
from ...converters.sources.nir.neurons import KEY
from .export import Exported, Exporter, NotInNir, Signal
from .operators import divides


def export(program: Program, dt: float) -> Exported:
    """The graph for a program, or what keeps it from being one; dt is the time step."""
    if not any(n.target is NEURON_STEP for n in program.nodes("call_function")):
        return Exporter(program, dt).run()
    try:
        return CycleExporter(program, dt).run()
    except UnsupportedError as error:
        found = [replace(f, rule="recurrence", target="nir") for f in error.findings]
        return Exported(findings=found)


class CycleExporter(Exporter):
    """Makes the nodes for what a program computes at one step.

    Raises:
        UnsupportedError: It cannot be computed step by step.
    """

    def __init__(self, program: Program, dt: float) -> None:
        whole, self._over_time = _every_step(program)
        step = step_time(whole)
        super().__init__(step, dt)
        assert step.stepping is not None
        calls = [n for n in step.nodes("call_function") if n.target is NEURON_STEP]
        self.steps, self.batch = step.stepping.steps, shape(calls[0].args[0])[0]
        self.done = Exported(steps=self.steps)
        self.stepping = step.stepping
        count = len(step.inputs)
        self.states = list(step.nodes("placeholder"))[count:]
        self.after = dict(zip(self.states, step.results[len(step.outputs) :], strict=True))
        self._shapes: dict[str, tuple[int, ...]] = {}

    def emit(self, n: Node) -> Signal | None:
        """The signal of a node; None for what stays inside of a neuron."""
        if n.target is NEURON_STEP:
            return replace(self._fires(n), binary=True) if _spikes_are_used(n) else None
        if n.target is operator.getitem:
            return self.signals.get(n.args[0]) if n.args[1] == 0 else None
        if n.target is aten.stack.default and all(a in self.states for a in n.args[0]):
            return None
        if n.target is aten.select.int and n.args[0].target is operator.getitem:
            return self._membrane(n)
        return super().emit(n)

    def wanted(self, n: Node) -> list[Node]:
        """What a call takes, less the states of neurons."""
        if n.target is NEURON_STEP:
            return [n.args[0]]
        state = n.target is operator.getitem and n.args[1] == 1
        if state or (n.target is aten.stack.default and n.args[0][0] in self.states):
            return []
        if n.target is aten.select.int and n.args[0].target is operator.getitem:
            return [n.args[0].args[0].args[0]]
        return super().wanted(n)

    def run(self) -> Exported:
        """The graph, whole if there is no finding that is an error."""
        for n, state in zip(self.states, self.stepping.states, strict=True):
            if not _of_neuron(n):
                fires = self.after[n].target is operator.getitem
                size = tuple(state.initial.shape[1:])
                self.signals[n] = Signal((_later(n),), size, "step", fires)
        super().run()
        if not any(f.severity == "error" for f in self.done.findings):
            self._close()
        return self.done

    def add_unit(self, unit: Unit, x: Signal, shape: Sequence[int], name: str = "") -> Signal:
        """A node, whose shape is noted."""
        signal = super().add_unit(unit, x, shape, name)
        self._shapes[signal.sources[0]] = signal.shape
        return signal

    # Ports

    def input(self, n: Node, name: str, position: int) -> Signal:
        """An Input, of one step."""
        if not n.users:
            raise NotInNir("an input that nothing is computed from", "leave it out of the forward")
        axis = self.stepping.inputs[position]
        if axis not in (0, 1, None):
            raise NotInNir(f"an input whose dimension {axis} is time", "give [T, N, ...]")
        name = self.unique(name)
        size = shape(n)[1:]
        said = {"position": position, "over_time": "same" if axis is None else "steps"}
        said |= {"batch_first": axis == 1}
        self.done.units[name] = Unit("Input", {"shape": np.array(size)}, said)
        self._shapes[name] = size
        return Signal((name,), size, "step")

    def output(self, signal: Signal, name: str, position: int) -> None:
        """An Output, with what is done over time to what it holds."""
        how, axis = self._over_time[position], self.stepping.outputs[position]
        if axis is None and how != "steps":
            raise NotInNir(
                f"the {how} over the batch of what the last step gives",
                "return what the step gives, and compute from it outside of the network",
            )
        if axis is None:
            how = "last"
        elif axis == 1 and how == "steps":
            signal = replace(signal, layout="samples")
        elif axis != 0:
            raise NotInNir(f"an output whose dimension {axis} is time", "return [T, N, ...]")
        super().output(replace(signal, over_time=how), name, position)

    # Neurons

    def _fires(self, n: Node) -> Signal:
        return self.population(self.signal(n.args[0]), self._declared(n), fires=True)

    def _membrane(self, n: Node) -> Signal | None:
        call, index = n.args[0].args[0], n.args[2]
        used = any(u.op != "output" for u in n.users)
        if not used and n not in self.program.results[: len(self.program.outputs)]:
            return None
        return self.readout(self.signal(call.args[0]), self._declared(call), index)

    def _declared(self, n: Node) -> Neuron:
        return Neuron.from_json(n.args[3], [self.program.tensor(p.target) for p in n.args[2]])

    # What comes back

    def _close(self) -> None:
        """Put what each state is after a step in the place of the state."""
        later = {
            _later(n): self.signals[self.after[n]].sources for n in self.states if n in self.signals
        }
        if self._endless(later):
            return
        edges = list[tuple[str, str, int]]()
        for a, b in self.done.edges:
            # The loop of a neuron that hears itself is the only one that is closed already.
            ends = [(a, int(self.done.units[b].metadata.get(KEY, {}).get("hears") == a))]
            while any(end in later for end, _ in ends):
                ends = [
                    (source, k + (end in later))
                    for end, k in ends
                    for source in later.get(end, (end,))
                ]
            edges += [(end, b, k) for end, k in ends]
        edges, passed = self._moved_back(edges)
        edges = self._further(edges)
        neurons = {name for name, unit in self.done.units.items() if unit.kind in NEURONS}
        found, plain = self._placed(edges, {a for a, _, _ in edges})
        # Before the first step, NIR has such a node give what it gives without spikes; a Delay gives 0.
        if others := self._starting_otherwise(passed | {a for a, _ in plain} - neurons):
            found, plain = self._placed(edges, neurons)
            others = self._starting_otherwise(passed)
        for name in others:
            self.tell(
                "recurrence",
                "what comes back starts from something else than neurons give that have not fired",
                "spikes that come back, 0 before the first step",
                "start from zeros",
                place=name,
            )
        self._place(found, plain)

    def _starting_otherwise(self, passed: set[str]) -> list[str]:
        """The states that NIR starts from other values."""
        return [
            state.name
            for n, state in zip(self.states, self.stepping.states, strict=True)
            if n in self.signals and not torch.equal(self._at_first(n, passed), state.initial)
        ]

    def _endless(self, later: Mapping[str, tuple[str, ...]]) -> bool:
        """Whether states come back to themselves without any node, each of which is a finding."""
        found = False
        for n, state in zip(self.states, self.stepping.states, strict=True):
            reached, new = set[str](), {_later(n)} & later.keys()
            while new:
                ends = {end for name in new for end in later[name]} & later.keys()
                new = ends - reached
                reached |= new
            if _later(n) in reached:
                found = True
                self.tell(
                    "recurrence",
                    "a sum that goes on from step to step in plain arithmetic",
                    "what comes back through a node, such as a neuron that does not fire",
                    "let a neuron that neither leaks nor fires add it up (snnTorch: beta=1.0, "
                    "reset_mechanism='none')",
                    place=state.name,
                )
        return found

    def _moved_back(
        self, edges: list[tuple[str, str, int]]
    ) -> tuple[list[tuple[str, str, int]], set[str]]:
        """The same with steps taken before a node without a memory where all take it later; and these."""
        passed = set[str]()
        instant = [
            n for n, u in self.done.units.items() if u.kind not in (*NEURONS, "Input", "Output")
        ]
        moved = True
        while moved:
            moved = False
            for name in instant:
                least = min((k for a, _, k in edges if a == name), default=0)
                if least and name not in passed and (name, name) not in _pairs(edges):
                    edges = [(a, b, k + least * ((b == name) - (a == name))) for a, b, k in edges]
                    passed.add(name)
                    moved = True
        return edges, passed

    def _at_first(
        self, n: Node, passed: set[str], seen: frozenset[Node] = frozenset()
    ) -> torch.Tensor:
        """What a node of the program gives before the first step, where 0 goes into ``passed``."""
        if n.op == "get_attr":
            return self.program.tensor(n.target)
        if n in self.after and n not in seen:
            return self._at_first(self.after[n], passed, seen | {n})
        sources = self.signals[n].sources if n in self.signals else ()
        if n.op != "call_function" or n.target is operator.getitem or _lone(sources, passed):
            return torch.zeros(shape(n))
        given: Any = (n.args, n.kwargs)
        args, kwargs = fx.map_arg(given, lambda a: self._at_first(a, passed, seen))
        value: torch.Tensor = n.target(*args, **kwargs)
        return value

    def _further(self, edges: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
        """The same with neurons that hear others of their cycle at once put behind these.

        NIR takes what a neuron hears of one that is no nearer to an input for a step later, so that the
        ways to it that are too short go through nodes that change nothing.
        """
        units = self.done.units
        instant = {n for n, u in units.items() if not u.holds_back}
        at_once = self._graph(units, [(a, b) for a, b, k in edges if k == 0])
        order: TopologicalSorter[str] = TopologicalSorter({n: at_once.into(n) for n in units})
        heard = {
            n: at_once.reached_from([n], instant) for n, u in units.items() if u.kind in NEURONS
        }
        for name in [n for n in order.static_order() if n in heard]:
            whole = self._graph(units, _pairs(edges))
            cycle = {a for a in whole.reached_from([name]) if name in heard.get(a, ())}
            far = distances(self._graph(units, [(a, b) for a, b in whole.edges if a != name]))
            least = max((far.get(a, 0) for a in cycle), default=0)
            for at, (a, b, k) in enumerate(edges):
                source = a
                for _ in range(least - far.get(a, least) if b == name else 0):
                    waits = self.unique(f"{name}.behind")
                    units[waits] = Unit("Scale", {"scale": np.ones(self._shapes[a], np.float32)})
                    self._shapes[waits] = self._shapes[a]
                    edges = [*edges, (source, waits, k)]
                    source, k = waits, 0
                edges[at] = (source, b, k)
        return edges

    def _placed(
        self, edges: Sequence[tuple[str, str, int]], known: Collection[str]
    ) -> tuple[Graph, set[tuple[str, str]]]:
        """The graph, and its edges that NIR takes a step later itself; others go through a Delay.

        Only those from ``known`` are left to NIR, and of a node that fires not, all or none.
        """
        twice = {pair for pair, count in Counter((a, b) for a, b, _ in edges).items() if count > 1}
        neurons = {name for name, unit in self.done.units.items() if unit.kind in NEURONS}
        plain = {(a, b) for a, b, k in edges if k == 1 and a in known} - twice
        instant = self.done.units.keys() - neurons
        whole = self._graph(self.done.units, _pairs(edges))
        closed = {n for n in instant if n in whole.reached_from([n], instant)}  # needs a Delay
        plain = {(a, b) for a, b in plain if a not in closed}
        while True:
            split = {a for a, b, k in edges if k and (a, b) not in plain} - neurons
            plain = {(a, b) for a, b in plain if a not in split}
            found = self._with_delays(edges, plain)
            kept = {edge for part in parts(found) for edge in part.late - part.mixed}
            if plain <= kept:
                return found, plain
            plain &= kept

    def _place(self, found: Graph, plain: set[tuple[str, str]]) -> None:
        """Take over a graph, if NIR computes it in the order of the program."""
        late = {edge for part in parts(found) for edge in part.late}
        for a, b in sorted(late - plain):
            self.tell(
                "recurrence",
                f"{b} takes what {a} gives at the same step, and {a} hears of {b} later: in NIR, where "
                f"{b} is as near to an input, it is {a} that is heard later",
                "cycles in which the neurons nearer to an input come first",
                "write the cycle with the nir package itself, or convert for another target",
                place=a,
            )
        for name in found.units.keys() - self.done.units.keys():
            if name in found.reached_from([name]):
                self.tell(
                    "recurrence",
                    "what comes back goes through a Delay of its own",
                    "tools that hold a Delay's cycle back by its own time alone",
                    "let the spikes of neurons that NIR has come back, in the network's forward",
                    "warning",
                    place=name,
                )
        self.done.units.update(found.units)
        self.done.edges[:] = found.edges

    def _with_delays(
        self, edges: Sequence[tuple[str, str, int]], plain: set[tuple[str, str]]
    ) -> Graph:
        units, placed = dict(self.done.units), dict[tuple[str, str], None]()
        for a, b, k in edges:
            if k == 0 or (a, b) in plain:
                placed[a, b] = None
                continue
            name = self.unique(f"{a}.later" if k == 1 else f"{a}.later_{k}")
            units[name] = Unit("Delay", {"delay": np.full(self._shapes[a], k * self.dt)})
            placed[a, name] = placed[name, b] = None
        return self._graph(units, placed)

    def _graph(self, units: Mapping[str, Unit], edges: Iterable[tuple[str, str]]) -> Graph:
        kinds = {
            kind: [n for n, u in units.items() if u.kind == kind] for kind in ("Input", "Output")
        }
        ports = (tuple(sorted(kinds["Input"])), tuple(sorted(kinds["Output"])))
        return Graph(units, tuple(edges), *ports)


def _later(n: Node) -> str:
    """What stands for the sources of a state until they are known; no node is called so."""
    return f"/{n.name}"


def _pairs(edges: Sequence[tuple[str, str, int]]) -> set[tuple[str, str]]:
    return {(a, b) for a, b, _ in edges}


def _lone(sources: Sequence[str], passed: set[str]) -> bool:
    """Whether a signal is that of one node at which steps are taken."""
    return len(sources) == 1 and sources[0] not in passed


def _spikes_are_used(n: Node) -> bool:
    """Whether a layer is more than its potential, which a node of its own gives."""
    return any(u.target is operator.getitem and u.args[1] == 0 and u.users for u in n.users)


def _of_neuron(n: Node) -> bool:
    """Whether a state is one of a layer of neurons."""
    return all(
        u.target is aten.stack.default and any(v.target is NEURON_STEP for v in u.users)
        for u in n.users
    )


def _every_step(program: Program) -> tuple[Program, list[str]]:
    """The program without what its outputs do over time, each [T, N, ...]; and what that is."""
    call = next(n for n in program.nodes("call_function") if n.target is NEURON_STEP)
    lead = (program.sites[0].T, shape(call.args[0])[0])
    found = [_reduction(r, lead[0]) for r in program.results]
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(program.graph, env)
    for old, new in env.items():
        new.meta, new.name = dict(old.meta), old.name
    results, outputs = [], []
    for (_, x), spec in zip(found, program.outputs, strict=True):
        result, size = env[x], shape(x)
        if size[:2] != lead and size[0] == math.prod(lead):
            size = (*lead, *size[1:])
            result = graph.call_function(RESHAPE, (result, list(size)))
            result.meta = {"val": x.meta["val"].reshape(size), "path": where(x)}
        results.append(result)
        outputs.append(replace(spec, shape=size, folded=False))
    graph.output(tuple(results))
    report = PassReport("every_step")
    whole = seal(program, graph, program.tensors, report, program.sites, outputs=tuple(outputs))
    return whole, [how for how, _ in found]


def _reduction(r: Node, steps: int) -> tuple[str, Node]:
    """What an output does over time at its end, and to what, however either is laid out."""
    x = _unshaped(r)
    if divided := divides(x, steps):
        x = _unshaped(x.args[0])
    reductions = {aten.mean.dim: "mean", aten.sum.dim_IntList: "sum"}
    how = reductions.get(x.target)
    if how is None or [dim(x.args[0], d) for d in x.args[1]] != [0] or (divided and how == "mean"):
        return "steps", r
    return "mean" if divided else how, _unshaped(x.args[0])


def _unshaped(n: Node) -> Node:
    """What a value is a reshape of."""
    while n.target is RESHAPE:
        n = n.args[0]
    return n
