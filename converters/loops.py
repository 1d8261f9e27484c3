"""A loop over time as its body: the copies that each step left are aligned with one another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import ops
from .labels import Labels
from .ops import Node, aten, shape
from .program import Program, Site, short, where
from .stepwise import (
    At,
    Last,
    Member,
    Neutral,
    Pick,
    RefusedError,
    Row,
    Same,
    Stepwise,
    Unknown,
    as_near,
    numbers_of,
)
from .unstacked import Steps, fold_in, lay_bare


class Loops(Stepwise):
    """Aligns rows: a row has the copies of one value at steps 0, 1, ..., and becomes one node.

    Copies have the same operator, and operands that are rows again. An operand that lies a step back
    is a state, which starts from what stands in its place at step 0.
    """

    def __init__(self, program: Program, T: int) -> None:
        super().__init__(program, T)
        self._rows: dict[Row, Node] = {}
        self.labels = Labels(program)
        self.chains = self.labels.calls
        self._layers: dict[str, Node] = {}
        self._left: dict[Node, Last] = {}

    def member(self, n: Node) -> Node | Pick:
        """A value at one step as a member of a row."""
        value = self.env[n]
        if isinstance(value, Same):  # which a loop may compute anew at each step
            return self.labels.one(n)
        return value.pick if isinstance(value, At) and value.pick else n

    def step_at(self, member: Member) -> int | None:
        """The step of a member; None if it is the same at every step."""
        if isinstance(member, Pick):
            return member.step
        if member is None or isinstance(member, Neutral):
            return None
        value = self.env[member]
        if isinstance(value, Unknown):
            raise RefusedError(None)
        if isinstance(value, Last):
            raise RefusedError(member, "a step of a loop takes what all time steps together give")
        return value.step if isinstance(value, At) else None

    def align(self, row: Row) -> Node:
        """The one step that all members of a row are copies of, each at its own step."""
        if (known := self._known(row)) is None:
            known = self._rows[row] = self._aligned(row)
        return known

    def _known(self, row: Row) -> Node | None:
        """A row that was aligned before and says as much."""
        for other, node in self._rows.items():
            same = other[0] == row[0] and all(
                a is None or a == b for a, b in zip(row, other, strict=True)
            )
            # One member alone says nothing of a row that goes on in another way than it began.
            if same and (row[1] is not None or other[1] is None or _alike(other[0], other[1])):
                return node
        return None

    def _aligned(self, row: Row) -> Node:
        members = [m for m in row if m is not None]
        steps = [self.step_at(m) for m in members]
        if all(s is None for s in steps):
            return self._all_same(members)
        if all(s == t for t, s in enumerate(steps)):
            return self._copies(row)
        later = list(enumerate(steps))[1:]
        if steps[0] is None and all(s is None or s < t for t, s in later):
            return self._delay(row)
        if all(s == t for t, s in later):
            return self._accumulated(row)
        t, s = next((t, s) for t, s in later if s != t)
        raise self._differs(members, f"step {t} takes what step {s} gives", t)

    def _all_same(self, members: Sequence[Member]) -> Node:
        first = members[0]
        if all(m == first for m in members) and isinstance(first, fx.Node):
            return self.plain(first)
        nodes = [m for m in members if isinstance(m, fx.Node)]
        values = [self.value_of(m) for m in nodes]
        if len(nodes) == len(members) and all(
            v is not None and values[0] is not None and torch.equal(v, values[0]) for v in values
        ):
            return self.plain(nodes[0])
        raise RefusedError(
            nodes[0],
            f"a value of its own at each time step ({', '.join(n.name for n in nodes[:3])}, ...)",
            "time-varying",
        )

    def _copies(self, row: Row) -> Node:
        members = [m for m in row if m is not None]
        first = members[0]
        if isinstance(first, Pick):
            for t, m in enumerate(members):
                if not isinstance(m, Pick) or (m.sequence, m.kept) != (first.sequence, first.kept):
                    return self._first_apart(row, t)
            return self._picked(first)
        nodes: list[Any] = members
        for t, n in enumerate(nodes):
            if isinstance(n, Pick) or n.target is not nodes[0].target:
                return self._first_apart(row, t)
        if first in self.chains:
            return self.chain(nodes)
        flat = [pytree.tree_flatten((n.args, n.kwargs)) for n in nodes]
        leaves = [list(f[0]) for f in flat]
        for t, (found, structure) in enumerate(flat):
            same = structure == flat[0][1] and all(
                isinstance(a, fx.Node) == isinstance(b, fx.Node)
                and (isinstance(a, fx.Node) or a == b)
                for a, b in zip(found, leaves[0], strict=True)
            )
            if not same:
                return self._first_apart(row, t)
        missing = (None,) * (len(row) - len(members))
        new = [
            self.align((*map(self.member, column), *missing))
            if isinstance(column[0], fx.Node)
            else column[0]
            for column in zip(*leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(new, flat[-1][1])
        return self.call(nodes[0].target, *args, path=where(nodes[-1]), **kwargs)

    def _first_apart(self, row: Row, t: int) -> Node:
        """Copies that differ: where step 0 alone does, it may be a sum that begins."""
        members = [m for m in row if m is not None]
        if t == 1:
            return self._accumulated(row)
        raise self._differs(
            members, f"step {t} computes something else than the steps before it", t
        )

    def _differs(self, members: Sequence[Member], reason: str, t: int) -> RefusedError:
        member = members[t]
        n = member.sequence if isinstance(member, Pick) else member
        return RefusedError(n if isinstance(n, fx.Node) else None, reason, "steps-differ")

    def chain(self, calls: Sequence[Node]) -> Node:
        """A neuron that is called step by step."""
        site = self.chains[calls[0]][0]
        if any(self.chains[n][0] is not site for n in calls):
            raise self._differs(calls, "the steps go through different neurons", 1)
        if site.name not in self._layers:
            whole = self._calls(site)
            drive = self.align(tuple(self.member(n.args[0]) for n in whole))
            self._layers[site.name] = self.layer(site, drive, whole[0])
        return self._layers[site.name]

    def _calls(self, site: Site) -> list[Node]:
        return [n for n, (other, _) in self.chains.items() if other is site]

    def _delay(self, row: Row) -> Node:
        """What a step later is, kept from the step before."""
        members = [m for m in row if m is not None]
        first: Any = members[0]
        like: Any = members[-1]
        at: Node = like.sequence if isinstance(like, Pick) else like
        sizes, dtype = self._step_shape(like), at.meta["val"].dtype
        neutral = isinstance(first, Neutral)
        initial = (
            torch.full(sizes, as_near(first.value, dtype)) if neutral else self.value_of(first)
        )
        if initial is None and len(members) > 1 and _alike(first, members[1]):
            # Where the input is the same at every step, all that a step takes of its own is what the
            # step before gave: the state lies further back.
            return self._copies(row)
        if initial is None:
            raise RefusedError(first, "a loop starts from what depends on the input", "state-init")
        if len(members) == 2:
            raise RefusedError(
                at,
                f"of what is kept from step to step, {self.T} time steps show one alone: how it goes on "
                "after it is not seen",
                "time-steps",
            )
        kind = "delayed" if at.op != "call_function" else short(at.target).rpartition(".")[2]
        node = self.new_state(
            f"{where(at) or 'forward'}.{kind}", initial.to(dtype).expand(sizes).clone()
        )
        self.after[-1] = (*row[1:], None)
        self.done[f"{where(at) or at.name}: {kind} is kept for the next step"] = None
        return node

    def _step_shape(self, member: Member) -> tuple[int, ...]:
        return shape(self._picked(member) if isinstance(member, Pick) else member)

    def _picked(self, pick: Pick) -> Node:
        """One step of a sequence, in the shape in which the network takes it out."""
        x: Any = self.env[pick.sequence]
        return (fold_in if pick.kept else lay_bare)(self, x, where(pick.sequence)).node

    def _accumulated(self, row: Row) -> Node:
        """y[t] = a[t-1] + b[t], where y[0] is b[0] alone: as if a[-1] were 0; or their maximum."""
        members = [m for m in row if m is not None]
        later = members[1:]
        if all(isinstance(m, fx.Node) and _gathers(m, later[0]) for m in later):
            nodes: list[Node] = later
            target = nodes[0].target
            steps = [[self.step_at(self.member(a)) for a in n.args[:2]] for n in nodes]
            missing = (None,) * (len(row) - len(members))
            for back in (0, 1):
                earlier = all((s[back] or 0) < t for t, s in enumerate(steps, 1))
                if earlier and all(s[1 - back] == t for t, s in enumerate(steps, 1)):
                    before = [self.member(n.args[back]) for n in nodes]
                    now = [self.member(n.args[1 - back]) for n in nodes]
                    start = members[0]
                    if isinstance(start, fx.Node) and _adds_zero(start):
                        start = self.member(start.args[0])
                    a = self.align((Neutral(_NEUTRAL[target]), *before, *missing))
                    b = self.align((start, *now, *missing))
                    pair = (a, b) if back == 0 else (b, a)
                    return self.call(target, *pair, path=where(nodes[-1]))
        raise self._differs(members, "step 1 computes something else than step 0", 1)

    # What is returned after the last step

    def at_last(self, n: Node) -> Node:
        """A value after the last step, as it is at each."""
        return self.left(n).node

    def left(self, n: Node) -> Last:
        """The same, and whether it is a sum over the steps so far."""
        value = self.env[n]
        if isinstance(value, Last):
            return value
        if isinstance(value, Same):
            return Last(value.node)
        if isinstance(value, Unknown):
            raise RefusedError(None)
        if isinstance(value, Steps):
            raise RefusedError(n, "all time steps are taken together with what the last one gives")
        if n not in self._left:
            self._left[n] = self._after_last(n, value)
        return self._left[n]

    def _after_last(self, n: Node, value: At) -> Last:
        if value.step != self.T - 1:
            if value.step == self.T - 2 and (row := self._goes_on(n)) is not None:
                return Last(self.align(row))
            found = f"it follows from step {value.step}, and not from the last, {self.T - 1}"
            raise RefusedError(n, found, "output")
        if n in self.chains:
            return Last(self.chain(self._calls(self.chains[n][0])))
        if value.pick is not None:
            return Last(self._picked(value.pick))
        for path in self._ways_back(n):
            if (row := self._history(n, path)) is not None:
                node = self.align(row)
                total = _adds(n) and len(path) == 1
                if total:
                    self.counter()
                return Last(node, total)
        known = (node for row, node in self._rows.items() if row[-1] is n and len(row) == self.T)
        return next((Last(node) for node in known), None) or self.at_end(n)

    def _goes_on(self, n: Node) -> Row | None:
        """What is kept from step to step, where a value is what the last step leaves of it.

        Two states of which one takes what the other was have such ends: no step of the example hears them.
        """
        for row in self.after:
            before = row[-2] if isinstance(row, tuple) and row[-1] is None else None
            if (
                isinstance(before, fx.Node)
                and before.target is n.target
                and _settings(before) == _settings(n)
                and self.step_at(before) == self.T - 3
            ):
                return (*row[:-1], n)
        return None

    def _history(self, n: Node, path: Sequence[int]) -> Row | None:
        """The copies at earlier steps of what a value is at the last, each by the same way.

        None where the ways differ: an operator on what the last step left, and no step of a loop.
        """
        last, row = n, list[Member]([n])
        usual = self._passed(n, path, self.T - 1)
        for t in reversed(range(1, self.T)):
            if usual is None or self._passed(n, path, t) != usual:
                return None
            n = _along(n, path)[-1]
            row.append(self.member(n))
            if self.step_at(row[-1]) not in (t - 1, None if t == 1 else t - 1):
                return None
        return tuple(reversed(row)) if self._begins(n, last, path) else None

    def _passed(self, n: Node, path: Sequence[int], t: int) -> list[Any] | None:
        """What lies on the way to the copy a step before: operators, and steps relative to t."""
        way = [n, *_along(n, path)]
        if len(way) <= len(path):
            return None
        steps = [self.step_at(self.member(a)) for a in way[:-1]]
        return [
            (a.target, _settings(a), None if s is None else t - s)
            for a, s in zip(way, steps, strict=False)
        ]

    def _begins(self, first: Node, last: Node, path: Sequence[int]) -> bool:
        """Whether the value at step 0 goes the same way, up to constants that were folded there."""
        if first.target is not last.target or _settings(first) != _settings(last):
            return True
        for a, like in zip(_along(first, path), _along(last, path)[:-1], strict=False):
            if self.step_at(self.member(a)) is None:
                own = (self.step_at(self.member(b)) for b in like.all_input_nodes)
                return all(step != self.T - 1 for step in own)
            if a.target is not like.target:
                return False
        return True

    def _ways_back(self, n: Node) -> Iterator[list[int]]:
        """Positions of operands from a value at the last step to what may be its copy a step before."""
        todo: list[tuple[Node, list[int]]] = [(n, [])]
        seen = {n}
        for node, path in todo:
            for i, a in enumerate(pytree.tree_leaves((node.args, node.kwargs))):
                value = self.env.get(a) if isinstance(a, fx.Node) else None
                if not isinstance(value, At) or a in seen or value.step < self.T - 2:
                    continue
                seen.add(a)
                if value.step == self.T - 2 and a.target is n.target and value.pick is None:
                    yield [*path, i]
                if a not in self.chains and value.pick is None:
                    todo.append((a, [*path, i]))
        # The first two of a sum have no copy before them.
        for i, a in enumerate(n.args[:2]):
            if self.T == 2 and _adds(n) and self.step_at(self.member(a)) == 0:
                yield [i]

    def at_end(self, n: Node) -> Last:
        """An operator on what is left after the last step, as it is after each."""
        if any(isinstance(self.env[a], Steps) for a in n.all_input_nodes):
            raise RefusedError(
                n, f"{short(n.target)} takes each time step together with what all of them give"
            )
        operands = {a: self.left(a) for a in n.all_input_nodes}
        summed = any(v.total or v.summed for v in operands.values())
        if (
            any(v.total for v in operands.values())
            and (count := self._count_instead(n)) is not None
        ):
            self.done[f"{where(n) or n.name}: a sum divided by {self.T} is the mean so far"] = None
            return Last(self.call(aten.div.Tensor, operands[n.args[0]].node, count, path=where(n)))
        if summed and ops.is_pointwise(n.target):
            for number in filter(None, numbers_of(n)):
                self.doubt(n, number, "beside a sum over the time steps")
        return Last(self.copy(n, {a: v.node for a, v in operands.items()}), summed=summed)

    def _count_instead(self, n: Node) -> Node | None:
        """The steps so far, where a sum is divided by the number of all steps."""
        by = n.args[1] if len(n.args) > 1 and len(n.all_input_nodes) == 1 else None
        if not isinstance(by, (int, float)):
            return None
        divides = n.target is aten.div.Tensor and by == self.T
        scales = n.target is aten.mul.Tensor and math.isclose(by * self.T, 1.0)
        return self.counter() if divides or scales else None


def _along(n: Node, path: Sequence[int]) -> list[Node]:
    """The operands met on a way, as far as it goes."""
    way: list[Node] = []
    for position in path:
        leaves = pytree.tree_leaves((n.args, n.kwargs))
        if position >= len(leaves) or not isinstance(leaves[position], fx.Node):
            break
        n = leaves[position]
        way.append(n)
    return way


def _settings(n: Node) -> list[Any]:
    """A node's arguments other than values."""
    given = pytree.tree_leaves((n.args, n.kwargs))
    return [None if isinstance(a, fx.Node) else a for a in given]


def _alike(a: Any, b: Any) -> bool:
    """Whether two members of a row look like copies."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return bool(a.target is b.target)
    return isinstance(a, Pick) and isinstance(b, Pick)


#: What an operator that gathers values over the steps begins with.
_NEUTRAL = {
    aten.add.Tensor: 0.0,
    aten.maximum.default: -math.inf,
    aten.minimum.default: math.inf,
}


def _gathers(n: Node, like: Node) -> bool:
    """Whether a node is the same operator of two tensors as another, one of those."""
    return (
        n.target in _NEUTRAL
        and n.target is like.target
        and len(n.all_input_nodes) == 2
        and not n.kwargs
    )


def _adds(n: Node) -> bool:
    """Whether a node is a sum of two tensors."""
    return n.target is aten.add.Tensor and len(n.all_input_nodes) == 2 and not n.kwargs


def _adds_zero(n: Node) -> bool:
    return n.target is aten.add.Tensor and isinstance(n.args[1], (int, float)) and n.args[1] == 0
