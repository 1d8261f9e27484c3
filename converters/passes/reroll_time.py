"""Take the steps of a network's loop over time at once, layer by layer.

A forward that loops over time comes out of capture as T copies of each layer. Step t of a layer is

    y[t] = f(a[t + i], b[t + j], ..., w)

with the same operator f and weights w at every t. Copies are found by their labels: a label says what
is computed, relative to the step (operator, constants, and for each operand its label and how many
steps it lies back), so that the copies of a layer have one label and T steps. Where no operand depends
on y itself, all steps follow at once from the operands' stacks over time::

    stack(y) = f'(stack(a), stack(b), ..., w)        f' is f with a leading dimension for time

a chain of single-step neurons becomes one multi-step neuron, and ``torch.stack`` of a loop's results is
the stack that is there already. What has the same operands at every step, because it does not depend
on time, is computed once. Where a layer's input depends on its own earlier output, the layers of that
cycle (a strongly connected component of the graph of labels) stay steps, and what lies before and
after it does not.
"""

from __future__ import annotations

import heapq
import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import fx

from .. import ops
from ..builder import Builder, state_of
from ..graphs import components
from ..labels import Labels
from ..ops import Node, aten, shape
from ..program import NEURON, NEURON_STEP, STATE, PassReport, Program, Site, short, where
from ..stacked import over_time

#: What is emitted as one: a layer's label, or a node that stands alone.
_Unit: TypeAlias = "int | Node"


def reroll_time(program: Program) -> Program:
    """Turn the copies of each layer that a loop over time left into one layer over all steps."""
    if not any(site.layout == "steps" for site in program.sites):
        report = PassReport("reroll_time", (), ("no neuron is called step by step",))
        return replace(program, history=(*program.history, report))
    return _Reroll(program).run()


class _Reroll(Builder):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.labels = Labels(program)
        self.order = {n: i for i, n in enumerate(program.walk())}
        self.env: dict[Node, Node] = {}
        # The stack of all steps of a label, with its first step.
        self.stacks: dict[int, tuple[Node, int]] = {}
        self.gathered: dict[tuple[Node, ...], Node] = {}
        self.rolled: dict[str, Site] = {}
        self.done: dict[str, None] = {}
        self.skipped: dict[str, None] = {}

    def run(self) -> Program:
        self.together = {
            label
            for label, members in self.labels.members.items()
            if self._contiguous(label, members)
        }
        for unit, through in list(self._cycles()):
            self.together.discard(unit)
            if (site := self.labels.sites.get(unit)) is not None:
                self.skipped[
                    f"{site.name}: kept as {site.T} steps: its input depends on its own earlier output, "
                    f"through {through}"
                ] = None
        for unit in self._sorted():
            if isinstance(unit, fx.Node):
                self._alone(unit)
            elif unit in self.labels.sites:
                self._neuron(self.labels.sites[unit], unit)
            else:
                self._layer(unit)
        for n, count in self.labels.repeated.items():
            if n.op == "call_function" and self.labels.at(n).step is None:
                self.done[f"{_name(n)} computed once instead of {count} times"] = None
        report = PassReport("reroll_time", tuple(self.done), tuple(self.skipped))
        results = [self._value(r) for r in self.program.results]
        return self.finish(results, report, [self._site(s) for s in self.program.sites])

    def _contiguous(self, label: int, members: dict[int, Node]) -> bool:
        """Whether a label's nodes can be one: a neuron's calls, or copies without a gap in time."""
        if label in self.labels.sites:
            return True
        n = next(iter(members.values()))
        gap = max(members) - min(members) + 1 > len(members)
        # One of several results goes with them, and no rule takes an operator with several at once.
        part = n.target is operator.getitem or _call(n)
        return len(members) > 1 and not gap and label not in self.labels.views and not part

    # What is emitted as one, and in which order

    def _unit(self, n: Node) -> _Unit:
        n = self.labels.one(n)
        # The parts of a neuron's result go with the neuron.
        label = self.labels.places[_call(n) or n].label
        return label if label in self.together else n

    def _edges(self) -> dict[_Unit, set[_Unit]]:
        """For each unit those that it needs."""
        needs: dict[_Unit, set[_Unit]] = defaultdict(set)
        for n in self.labels.places:
            unit = self._unit(n)
            operands = n.all_input_nodes
            if n in self.labels.calls and unit is not n:
                operands = [n.args[0], *n.args[2]]  # it brings its own membrane
            elif _call(n) and unit is not n:
                operands = []
            needs[unit].update(map(self._unit, operands))
        return needs

    def _cycles(self) -> Iterator[tuple[int, str]]:
        """Labels that depend on themselves, and the layers on the way."""
        needs = self._edges()
        for component in components(needs):
            if len(component) > 1 or component[0] in needs[component[0]]:
                nodes = [u if isinstance(u, fx.Node) else self._members(u)[0] for u in component]
                through = ", ".join(sorted({_name(n) for n in nodes}))
                yield from ((u, through) for u in component if not isinstance(u, fx.Node))

    def _sorted(self) -> Iterator[_Unit]:
        """Every unit after those that it needs, otherwise in the order of the program."""
        needs = self._edges()
        users: dict[_Unit, list[_Unit]] = defaultdict(list)
        for unit, needed in needs.items():
            for other in needed:
                users[other].append(unit)
        missing = {unit: len(needed) for unit, needed in needs.items()}
        # No two units have the same first node.
        first = {u: self.order[u if isinstance(u, fx.Node) else self._members(u)[0]] for u in needs}
        units = {index: unit for unit, index in first.items()}
        queue = [first[u] for u, count in missing.items() if not count]
        heapq.heapify(queue)
        while queue:
            unit = units[heapq.heappop(queue)]
            yield unit
            for user in users[unit]:
                missing[user] -= 1
                if not missing[user]:
                    heapq.heappush(queue, first[user])

    def _members(self, label: int) -> list[Node]:
        """The nodes of a label, step by step."""
        members = self.labels.members[label]
        return [members[t] for t in sorted(members)]

    # Values

    def _value(self, n: Node) -> Node:
        """A node's value by itself."""
        n = self.labels.one(n)
        if n not in self.env:
            place = self.labels.places[n]
            stack, first = self.stacks[place.label]
            assert place.step is not None
            index = place.step - first
            self.env[n] = self.call(aten.select.int, stack, 0, index, path=where(n))
        return self.env[n]

    def _gather(self, nodes: Sequence[Node]) -> Node:
        """The stack over time of these nodes, out of as few pieces as there can be."""
        nodes = tuple(map(self.labels.one, nodes))
        if nodes not in self.gathered:
            path = where(nodes[0])
            pieces = [self._piece(run) for run in self._runs(nodes)]
            whole = pieces[0] if len(pieces) == 1 else None
            self.gathered[nodes] = whole or self.call(aten.cat.default, pieces, 0, path=path)
        return self.gathered[nodes]

    def _runs(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """The nodes cut into consecutive steps of one stack, repeats of one node, and the rest."""
        runs: list[list[Node]] = []
        for n in nodes:
            if (
                runs
                and self._kind(n) == self._kind(runs[-1][-1])
                and self._follows(runs[-1][-1], n)
            ):
                runs[-1].append(n)
            else:
                runs.append([n])
        return runs

    def _kind(self, n: Node) -> Hashable:
        place = self.labels.places[n]
        if place.label in self.stacks or place.label in self.labels.views:
            return place.label
        return "constant" if place.step is None else "single"

    def _follows(self, a: Node, b: Node) -> bool:
        kind = self._kind(a)
        if kind == "single":
            return True
        if kind == "constant":
            return a is b
        before, after = self.labels.places[a].step, self.labels.places[b].step
        return before is not None and after == before + 1

    def _piece(self, run: Sequence[Node]) -> Node:
        """The stack [len(run), ...] of one run."""
        n, path, kind = run[0], where(run[0]), self._kind(run[0])
        if kind == "single":
            return self.call(aten.stack.default, [self._value(r) for r in run], 0, path=path)
        if kind == "constant":
            head = self.call(aten.unsqueeze.default, self._value(n), 0, path=path)
            if len(run) == 1:
                return head
            return self.call(aten.expand.default, head, [len(run), *shape(n)], path=path)
        place = self.labels.places[n]
        assert place.step is not None
        if place.label in self.stacks:
            stack, first = self.stacks[place.label]
            return self._part(stack, place.step - first, len(run), path)
        x, at, size = self.labels.views[place.label]
        base = self._value(x)
        if size:
            rows = self._part(base, place.step * size, len(run) * size, path)
            return self.call(ops.RESHAPE, rows, [len(run), *shape(n)], path=path)
        if at:
            others = [d for d in range(len(shape(x))) if d != at]
            base = self.call(aten.permute.default, base, [at, *others], path=path)
        return self._part(base, place.step, len(run), path)

    def _part(self, x: Node, start: int, count: int, path: str) -> Node:
        if count == shape(x)[0]:
            return x
        return self.call(aten.slice.Tensor, x, 0, start, start + count, path=path)

    # One method for each kind of unit

    def _alone(self, n: Node) -> None:
        if n.op == "placeholder":
            self.env[n] = self.placeholder(n, n.meta["val"])
        elif n.target in (aten.stack.default, aten.cat.default) and self._collect(n):
            return
        else:
            self.env[n] = self.copy(n, {a: self._value(a) for a in n.all_input_nodes})

    def _collect(self, n: Node) -> bool:
        """A loop's results put together: where their stack is there, it is moved into place."""
        parts = [self.labels.one(p) for p in n.args[0]]
        if len(self._runs(parts)) > 1 or self._kind(parts[0]) in ("single", "constant"):
            return False
        at = ops.dim(n, n.args[1] if len(n.args) > 1 else 0)
        node, path = self._gather(parts), where(n)
        if at:
            rest = list(range(1, len(shape(node))))
            node = self.call(aten.permute.default, node, [*rest[:at], 0, *rest[at:]], path=path)
        if n.target is aten.cat.default:
            node = self.call(ops.RESHAPE, node, list(shape(n)), path=path)
        self.env[n] = node
        return True

    def _neuron(self, site: Site, label: int) -> None:
        calls = self._members(label)
        drives = [call.args[0] for call in calls]
        x = self._gather(drives)
        self._tell_difference(site, drives)
        params = [self._value(p) for p in calls[0].args[2]]
        spec, path = calls[0].args[3], where(calls[0])
        node = self.call(NEURON, x, params, spec, "stepped", site.T, path=path)
        node.meta["site"] = site.name
        parts: dict[int, Node] = {}
        for part in (u for call in calls for u in call.users):
            if part.args[1] == 0:
                self.stacks[self.labels.at(part).label] = (node, 0)
                continue
            for state in (u for u in part.users if state_of(u) is not None):
                i = state.args[2]
                if i not in parts:
                    parts[i] = self.call(STATE, x, params, spec, "stepped", site.T, i, path=path)
                self.stacks[self.labels.at(state).label] = (parts[i], 0)
        self.rolled[site.name] = replace(
            site, layout="stepped", drives=(x.name,), spikes=(node.name,)
        )
        self.done[f"{site.name}: {site.T} steps of {site.neuron.dynamics.name} at once"] = None

    def _tell_difference(self, site: Site, drives: Sequence[Node]) -> None:
        """Say so where the steps of a neuron's input are not copies of one another."""
        places = [self.labels.at(d) for d in drives]
        kinds = [p.label for p in places]
        # The first step may come from an initial value.
        usual = kinds[-1]
        odd = [t for t, kind in enumerate(kinds) if kind != usual and t > 0]
        if odd:
            n = drives[odd[0]]
            self.skipped[
                f"{site.name}: its input is computed step by step, because step {odd[0]} differs from "
                f"the last one ({_name(n)})"
            ] = None

    def _layer(self, label: int) -> None:
        nodes = self._members(label)
        columns = zip(*map(self.labels.operands, nodes), strict=True)
        stacked, fixed = dict[Node, Node](), dict[Node, Node]()
        for column in columns:
            if len(set(column)) > 1:
                stacked[column[0]] = self._gather(column)
            else:
                fixed[column[0]] = self._value(column[0])
        node = over_time(self, nodes[0], len(nodes), self.labels.one, stacked, fixed)
        if node is None:
            for n in nodes:
                self._alone(n)
            steps = f"{_name(nodes[0])} kept as {len(nodes)} steps"
            self.skipped[f"{steps}: no rule takes them at once"] = None
        else:
            self.stacks[label] = (node, self.labels.at(nodes[0]).step or 0)
            self.done[f"{_name(nodes[0])}: {len(nodes)} steps at once"] = None

    def _site(self, site: Site) -> Site:
        """The site in the new graph."""
        if site.name in self.rolled:
            return self.rolled[site.name]
        drives, spikes = (
            tuple(self._value(self.labels.named[name]).name for name in names)
            for names in (site.drives, site.spikes)
        )
        return replace(site, drives=drives, spikes=spikes)


def _call(n: Node) -> Node | None:
    """The call of a single-step neuron that a node is a part of the result of."""
    if (call := state_of(n)) is not None:
        return call
    source = n.args[0] if n.target is operator.getitem else None
    return source if isinstance(source, fx.Node) and source.target is NEURON_STEP else None


def _name(n: Node) -> str:
    return f"{where(n) or 'the network'} ({short(n.target)})"
