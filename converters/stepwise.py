"""What a program over T steps becomes in the program of one step: values, states and layers."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from . import ops
from .builder import Builder
from .errors import Finding
from .neurons import Neuron
from .ops import Node, aten, shape
from .program import NEURON, NEURON_STEP, STATE, Program, Site, short, where
from .stepping import COUNTER, State
from .unstacked import Steps


@dataclass(frozen=True)
class Same:
    """A value that is the same at every step."""

    node: Node


@dataclass(frozen=True)
class At:
    """A value at one step of a loop; ``pick`` if it is taken out of a sequence."""

    step: int
    pick: Pick | None = None


@dataclass(frozen=True)
class Last:
    """What is left at the end, computed at each step as if it were the last.

    ``total`` if it is a sum over the steps; ``summed`` if it follows from one that is no mean.
    """

    node: Node
    total: bool = False
    summed: bool = False


@dataclass(frozen=True)
class Unknown:
    """A value that a finding was made for."""


@dataclass(frozen=True)
class Pick:
    """One step of a sequence; ``kept`` if its dimension for time stays, with size 1."""

    sequence: Node
    step: int
    kept: bool


@dataclass(frozen=True)
class Neutral:
    """What was gathered before the first step: 0 of a sum, the infinities of an extreme."""

    value: float


#: What a node of the program over T steps has become.
Value: TypeAlias = "Same | Steps | At | Last | Unknown"
#: One of a row of copies, a step each; None where the program ends before it.
Member: TypeAlias = "Node | Pick | Neutral | None"
Row: TypeAlias = "tuple[Member, ...]"


def as_near(value: float, dtype: torch.dtype) -> float:
    """What a sum or an extreme begins with, where the numbers of a dtype do not reach so far."""
    if dtype.is_floating_point:
        return value
    if dtype == torch.bool:
        return value > 0
    kind = torch.iinfo(dtype)
    return int(min(max(value, kind.min), kind.max))


def _numbers(program: Program) -> dict[str, set[float]]:
    """The numbers that pointwise operators take, by path."""
    found: dict[str, set[float]] = defaultdict(set)
    for n in program.nodes("call_function"):
        if ops.is_pointwise(n.target):
            found[where(n)] |= set(numbers_of(n))
    return found


def numbers_of(n: Node) -> list[float]:
    """The numbers that an operator takes besides tensors."""
    given = (*n.args, *n.kwargs.values())
    return [a for a in given if isinstance(a, (int, float)) and not isinstance(a, bool)]


class RefusedError(Exception):
    """A value that no step can compute; ``node`` is None if there is a finding for it already."""

    def __init__(self, n: Node | None, reason: str = "", rule: str = "mixes-time") -> None:
        self.node, self.rule = n, rule
        super().__init__(reason)


class Stepwise(Builder):
    """Emits the program of one step for a program over T steps.

    Attributes:
        T: Time steps of the program.
        env: What each of its nodes has become.
        states: The states so far.
        after: What each is after the step: a node, or a row of copies that is aligned at the end.
        sites: The neuron layers of the one step, by name.
        done: What there is to tell.
        numbers: Those that operators of the network take, by the operators' paths.
        doubts: Where a number may be that of the steps, which one example cannot show.
    """

    def __init__(self, program: Program, T: int) -> None:
        super().__init__(program)
        self.T = T
        self.env: dict[Node, Value] = {}
        self.states: list[State] = []
        self.after: list[Node | Row] = []
        self.sites: dict[str, Site] = {}
        self.done: dict[str, None] = {}
        self.numbers = _numbers(program.captured or program)
        self.doubts: dict[str, Finding] = {}
        self._counted: Node | None = None

    def call(self, target: Any, *args: Any, path: str, **kwargs: Any) -> Node:
        """A call; the spikes and the state of a layer's step are taken out of it once."""
        if target is operator.getitem:
            for user in args[0].users:
                if user.target is target and user.args[1] == args[1]:
                    return user
        return super().call(target, *args, path=path, **kwargs)

    def plain(self, a: Node) -> Any:
        """What an operand is for an operator that takes sequences and values without time."""
        value = self.env[a]
        return value if isinstance(value, Steps) else value.node  # type: ignore[union-attr]

    def shaped(self, node: Node, sizes: Sequence[int]) -> Node:
        """A node in this shape."""
        if list(shape(node)) == list(sizes):
            return node
        return self.call(ops.RESHAPE, node, list(sizes), path=where(node))

    def value_of(self, a: Node) -> torch.Tensor | None:
        """The tensor of a value that follows from weights alone."""
        if a.op == "get_attr":
            return self.program.tensor(str(a.target))
        if a.op != "call_function" or a.target in (NEURON, NEURON_STEP, STATE):
            return None
        known = {b: self.value_of(b) for b in a.all_input_nodes}
        if not known or any(v is None for v in known.values()):
            return None
        args, kwargs = fx.map_arg((a.args, a.kwargs), known.__getitem__)
        with torch.no_grad():
            value: torch.Tensor = a.target(*args, **kwargs)
        return value

    def layer(self, site: Site, x: Node, like: Node) -> Node:
        """A layer's step, its drive x [N, ...], with its states as inputs and outputs of the graph."""
        neuron, path = site.neuron, where(like)
        if neuron.reset_at != "now" and neuron.reset != "none" and self._fires_at_once(neuron):
            raise RefusedError(
                like,
                "v_0 lies at the threshold, and the reset of the first step, which is left out, could "
                "not be told from those of later ones",
                "steps-differ",
            )
        wide = torch.promote_types(x.meta["val"].dtype, torch.float32)
        zeros = torch.zeros(shape(x), dtype=wide)
        names = ("v", *neuron.dynamics.states)
        whole = None if site.sample is None else (shape(x)[0], *site.sample)
        parts = [
            self.new_state(f"{site.name}.{name}", value.detach().clone(), whole)
            for name, value in zip(names, neuron.initial(zeros), strict=True)
        ]
        state = self.call(aten.stack.default, parts, 0, path=path)
        given, spec = like.args[2:4] if like.target is NEURON_STEP else like.args[1:3]
        weights = [self.plain(p) for p in given]
        call = self.call(NEURON_STEP, x, state, weights, spec, 1, path=path)
        after = self.call(operator.getitem, call, 1, path=path)
        self.after[len(self.after) - len(parts) :] = [
            self.call(aten.select.int, after, 0, i, path=path) for i in range(len(parts))
        ]
        spikes = self.call(operator.getitem, call, 0, path=path)
        self.sites[site.name] = replace(
            site, T=1, layout="step", drives=(x.name,), spikes=(spikes.name,)
        )
        return call

    @staticmethod
    def _fires_at_once(neuron: Neuron) -> bool:
        return bool(torch.as_tensor(neuron.fired(torch.as_tensor(neuron.v_0))).any())

    def new_state(
        self, name: str, initial: torch.Tensor, whole: tuple[int, ...] | None = None
    ) -> Node:
        """A new state's input; what it is after the step is noted by the caller.

        ``whole``: its shape, where the graph holds its last dimensions as one.
        """
        taken = {state.name for state in self.states} | {s.name for s in self.program.inputs}
        names = itertools.chain([name], (f"{name}#{k}" for k in itertools.count(2)))
        name = next(n for n in names if n not in taken)
        self.states.append(State(name, initial, whole))
        others = (n for n in self.graph.nodes if n.op != "placeholder")
        label = "".join(c if c.isalnum() else "_" for c in f"state_{name}")
        with self.graph.inserting_before(next(others, self.graph._root)):
            node = self.graph.placeholder(label)
        node.meta = {"val": initial.to("meta"), "path": ""}
        self.after.append(node)
        return node

    def doubt(self, n: Node, number: float, why: str) -> None:
        """Note that a number of the network's own may be, or follow from, that of the steps."""
        if number not in self.numbers[where(n)]:  # a pass has put it there
            return
        self.doubts[n.name] = Finding(
            rule="time-steps",
            where=where(n),
            found=f"{short(n.target)} takes {number:g} {why}, and no longer example can be made that would "
            f"show whether that follows from the number of time steps, {self.T}",
            allowed="what does not follow from the number of time steps, and sums that are divided by it "
            "at the end",
            fix="let the number of time steps follow from the input, or be an attribute of the network, as "
            "self.T, so that more steps can be tried; or convert it unrolled",
            node=n.name,
        )

    def counter(self) -> Node:
        """The number of steps so far, this one included."""
        if self._counted is None:
            before = self.new_state(COUNTER, torch.zeros(1, dtype=self.program.dtype))
            self._counted = self.after[-1] = self.call(aten.add.Tensor, before, 1.0, path="")
        return self._counted
