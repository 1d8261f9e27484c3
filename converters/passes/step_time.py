"""Derive the program of one time step, whose states are explicit inputs and outputs.

Every value of the program over T steps is one of four things: the same at every step; a sequence, of
which one step is computed (:mod:`..unstacked`); one step of a loop that was kept as steps; or what is
left of a sequence at its end. Out of these follow the states:

* A layer of neurons has those of its declaration, v and the others.
* In a loop, the copies of an operator at steps 0 ... T-1 are aligned operand by operand; an operand
  that lies a step back is a state, whose initial value is what stands in its place at step 0.
* A sum, a mean or a maximum over time is taken over the steps so far, so that after T steps it is that
  of the whole call. A sum that is divided by T is a mean.

What the network returns after its last step is given at each step, as if it were the last. An input is
a sequence if the network treats it as one; an image that the network itself repeats is given to every
step. T must be 2 at least and longer than any delay in the network, or steps could not be told from
one another.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .. import ops
from ..errors import Finding, UnsupportedError
from ..neurons import Neuron
from ..ops import Node, aten, shape
from ..program import (
    NEURON,
    NEURON_STEP,
    STATE,
    Builder,
    PassReport,
    Program,
    Site,
    TensorSpec,
    short,
    where,
)
from ..stepping import COUNTER, State, Stepping
from ..unstacked import MixesTimeError, Steps, fold_in, lay_bare, unstack

_HEADLINE = "the network cannot be run step by step:"
#: Ways to read the inputs that are tried: sequences or not, with time first or second.
_MOST_READINGS = 81


def step_time(program: Program) -> Program:
    """The program of one step, for a program whose neurons are still operators.

    Raises:
        UnsupportedError: With everything that no step can compute by itself.
    """
    T = _time_steps(program)
    best: list[Finding] | None = None
    choices = [
        [*(d for d in (0, 1) if spec.shape[d : d + 1] == (T,)), None] for spec in program.inputs
    ]
    for axes in itertools.islice(itertools.product(*choices), _MOST_READINGS):
        attempt = _StepTime(program, T, axes)
        result = attempt.run()
        if result is not None:
            return result
        if best is None or len(attempt.findings) < len(best):
            best = attempt.findings
    raise UnsupportedError(_HEADLINE, best or ())


def _time_steps(program: Program) -> int:
    """How many steps the program has."""
    counts = sorted({site.T for site in program.sites})
    fix = "give an example input of 2 time steps or more; the result does not depend on their number"
    if len(counts) == 1 and counts[0] > 1:
        return counts[0]
    found = " and ".join(map(str, counts)) + " time steps" if counts else "no neuron"
    if len(counts) > 1:
        fix = "pool or stride over time outside the network, or convert it unrolled"
    raise UnsupportedError(
        _HEADLINE,
        [
            Finding(
                rule="time-steps",
                where=", ".join(s.name for s in program.sites) if len(counts) > 1 else "",
                found=found,
                allowed="neurons that all run over the same number of time steps, 2 or more",
                fix=fix,
            )
        ],
    )


@dataclass(frozen=True)
class _Same:
    """A value that is the same at every step."""

    node: Node


@dataclass(frozen=True)
class _At:
    """A value at one step of a loop; ``pick`` if it is taken out of a sequence."""

    step: int
    pick: _Pick | None = None


@dataclass(frozen=True)
class _Last:
    """What is left at the end, computed at each step as if it were the last; ``total`` if a sum."""

    node: Node
    total: bool = False


@dataclass(frozen=True)
class _Unknown:
    """A value that a finding was made for."""


@dataclass(frozen=True)
class _Pick:
    """One step of a sequence; ``kept`` if its dimension for time stays, with size 1."""

    sequence: Node
    step: int
    kept: bool


@dataclass(frozen=True)
class _Zero:
    """Nothing yet, in the shape of a value of the program."""

    like: Node


_Value: TypeAlias = "_Same | Steps | _At | _Last | _Unknown"
#: One member of a row of copies, a step each; None where the program ends before it.
_Member: TypeAlias = "Node | _Pick | _Zero | None"
_Row: TypeAlias = "tuple[_Member, ...]"


class _RefusedError(Exception):
    """A value that no step can compute; ``node`` is None if there is a finding for it already."""

    def __init__(self, n: Node | None, reason: str = "", rule: str = "mixes-time") -> None:
        self.node, self.rule = n, rule
        super().__init__(reason)


_FIXES = {
    "mixes-time": "let the network compute each time step out of this and earlier ones, or convert it "
    "unrolled",
    "time-varying": "use the same weights and constants at every time step, or convert it unrolled",
    "steps-differ": "let the network do the same at every time step, or convert it unrolled",
    "state-init": "start from a constant, or convert it unrolled",
    "output": "return what the network computes at every step or after the last, or convert it unrolled",
    "time-steps": "give an example input of 3 time steps or more; the result does not depend on it",
}
_ALLOWED = {
    "mixes-time": "operators on each time step alone, and mean, sum or maximum over all of them",
    "time-varying": "weights and constants that are the same at every time step",
    "steps-differ": "a loop whose steps are alike, the first one from constants",
    "state-init": "states that start from the same values in every call",
    "output": "[T, N, ...] with a step each, or the value after the last step",
    "time-steps": "time steps that can be told from one another",
}


class _StepTime(Builder):
    """One attempt, with ``axes`` saying which dimension of each input is time."""

    def __init__(self, program: Program, T: int, axes: Sequence[int | None]) -> None:
        super().__init__(program)
        self.T, self.axes = T, axes
        self.env: dict[Node, _Value] = {}
        self.findings: list[Finding] = []
        self.done: dict[str, None] = {}
        self.states: list[State] = []
        self.after: list[Node | _Row] = []
        self.calls: dict[Hashable, Node] = {}
        self.rows: dict[_Row, Node] = {}
        self.sites: dict[str, Site] = {}
        named = {n.name: n for n in program.walk()}
        self.chains: dict[Node, tuple[Site, int]] = {
            named[spikes].args[0]: (site, t)
            for site in program.sites
            if site.layout == "steps"
            for t, spikes in enumerate(site.spikes)
        }
        self.loops = {site.name: [n for n, (s, _) in self.chains.items() if s is site]
                      for site in program.sites}
        self.single = {named[s.spikes[0]]: s for s in program.sites if s.layout != "steps"}

    def run(self) -> Program | None:
        """The program, or None if there are findings."""
        inputs = self._inputs()
        for n in self.program.walk():
            if n.op in ("get_attr", "call_function"):
                self.env[n] = self._guarded(n)
        outputs = [
            self._output(spec, r)
            for spec, r in zip(self.program.outputs, self.program.results, strict=True)
        ]
        states = self._finish_states()
        if self.findings:
            return None
        stepping = Stepping(
            self.T, tuple(self.axes), tuple(time for _, _, time in outputs), tuple(self.states)
        )
        report = PassReport("step_time", (*self._told(inputs), *self.done))
        return self.finish(
            [*(node for node, _, _ in outputs), *states],
            report,
            [self.sites[site.name] for site in self.program.sites],
            inputs=tuple(inputs),
            outputs=tuple(spec for _, spec, _ in outputs),
            stepping=stepping,
        )

    def _told(self, inputs: Sequence[TensorSpec]) -> Iterator[str]:
        for spec, axis in zip(inputs, self.axes, strict=True):
            yield (
                f"input {spec}: given to every step"
                if axis is None
                else f"input {spec}: one step of dimension {axis}"
            )
        names = ", ".join(state.name for state in self.states)
        yield f"{len(self.states)} states: {names}"

    def _tell(self, error: _RefusedError | MixesTimeError, n: Node, rule: str = "") -> None:
        """Note a finding, at ``n`` unless the error says where."""
        at = error.node if isinstance(error, _RefusedError) else n
        if at is None:
            return
        rule = rule if rule and at is n and error.rule == "mixes-time" else error.rule
        finding = Finding(
            rule=rule,
            where=where(at),
            found=str(error),
            allowed=_ALLOWED[rule],
            fix=_FIXES[rule],
            node=at.name,
        )
        if finding not in self.findings:
            self.findings.append(finding)

    # Inputs and outputs

    def _inputs(self) -> list[TensorSpec]:
        found = []
        for n, spec, axis in zip(
            self.program.nodes("placeholder"), self.program.inputs, self.axes, strict=True
        ):
            if axis is None:
                self.env[n] = _Same(self.placeholder(n, n.meta["val"]))
                found.append(spec)
                continue
            sizes = list(spec.shape)
            del sizes[axis]
            node = self.placeholder(n, n.meta["val"].new_empty(sizes))
            x = Steps(node, axis, self.T)
            if spec.folded:
                # The program has [a, b, ...] as [ab, ...]; one of the two is time.
                outer, inner = (1, sizes[0]) if axis == 0 else (sizes[0], 1)
                x = Steps(node, 0, self.T, outer, inner, bare=False)
            self.env[n] = x
            found.append(replace(spec, shape=tuple(sizes), folded=False))
        return found

    def _output(self, spec: TensorSpec, r: Node) -> tuple[Node, TensorSpec, int | None]:
        """What a step gives in place of an output of the call, and where time was."""
        value = self.env[r]
        try:
            if isinstance(value, Steps):
                node, axis = self._every(spec, r, value)
                sizes = list(spec.shape)
                del sizes[axis]
                return node, replace(spec, shape=tuple(sizes), folded=False), axis
            node = self._last(r)
        except (_RefusedError, MixesTimeError) as error:
            self._tell(error, r, "output")
            return r, spec, None
        if not isinstance(value, (_Same, _Unknown)):
            self.done[f"output {spec.name}: at each step as if it were the last"] = None
        return node, spec, None

    def _every(self, spec: TensorSpec, r: Node, value: Steps) -> tuple[Node, int]:
        """One step of an output that holds all of them, and the dimension that is time."""
        if value.count != self.T:
            raise _RefusedError(r, f"{value.count} of {self.T} time steps are returned", "output")
        if not spec.folded:
            bare = lay_bare(self, value, where(r))
            return bare.node, bare.axis
        folded = fold_in(self, value, where(r))
        axis = 0 if folded.outer == 1 else 1
        return self._shaped(folded.node, [s for d, s in enumerate(spec.shape) if d != axis]), axis

    def _shaped(self, node: Node, sizes: Sequence[int]) -> Node:
        if list(shape(node)) == list(sizes):
            return node
        return self.call(ops.RESHAPE, node, list(sizes), path=where(node))

    # Every value in turn

    def _guarded(self, n: Node) -> _Value:
        try:
            return self._value(n)
        except (_RefusedError, MixesTimeError) as error:
            self._tell(error, n)
            return _Unknown()

    def _value(self, n: Node) -> _Value:
        if n.op == "get_attr":
            return _Same(self.copy(n, {}))
        if n in self.chains:
            return _At(self.chains[n][1])
        operands = [self.env[a] for a in n.all_input_nodes]
        if any(isinstance(v, _Unknown) for v in operands):
            return _Unknown()
        if n.target in (NEURON, STATE):
            return self._neuron(n)
        if (taken := self._take(n)) is not None:
            return taken
        if (collected := self._collect(n)) is not None:
            return collected
        if (over := self._over_time(n)) is not None:
            return over
        if any(isinstance(v, _At) for v in operands):
            return self._in_loop(n, operands)
        if any(isinstance(v, _Last) for v in operands):
            return self._at_end(n)
        if any(isinstance(v, Steps) for v in operands):
            known = {a: self._plain(a) for a in n.all_input_nodes}
            return unstack(self, n, known, self._still)
        return _Same(self.copy(n, {a: self._plain(a) for a in n.all_input_nodes}))

    def _plain(self, a: Node) -> Any:
        value = self.env[a]
        return value if isinstance(value, Steps) else value.node  # type: ignore[union-attr]

    def _in_loop(self, n: Node, operands: Sequence[_Value]) -> _Value:
        if any(isinstance(v, Steps) for v in operands):
            raise _RefusedError(
                n, f"{short(n.target)} takes one time step together with all of them"
            )
        if any(isinstance(v, _Last) for v in operands):
            return self._at_end(n)
        return _At(max(v.step for v in operands if isinstance(v, _At)))

    def _at_end(self, n: Node) -> _Last:
        if any(isinstance(self.env[a], Steps) for a in n.all_input_nodes):
            raise _RefusedError(
                n, f"{short(n.target)} takes each time step together with what all of them give"
            )
        operands = {a: self._last(a) for a in n.all_input_nodes}
        totals = (v for a in operands if isinstance(v := self.env[a], _Last))
        if any(v.total for v in totals) and (count := self._count_instead(n)) is not None:
            self.done[f"{where(n) or n.name}: a sum divided by {self.T} is the mean so far"] = None
            return _Last(self.call(aten.div.Tensor, operands[n.args[0]], count, path=where(n)))
        return _Last(self.copy(n, operands))

    def _count_instead(self, n: Node) -> Node | None:
        """The steps so far, where a sum is divided by the number of all steps."""
        by = n.args[1] if len(n.args) > 1 and len(n.all_input_nodes) == 1 else None
        if not isinstance(by, (int, float)):
            return None
        divides = n.target is aten.div.Tensor and by == self.T
        scales = n.target is aten.mul.Tensor and math.isclose(by * self.T, 1.0)
        return self._counter() if divides or scales else None

    def _still(self, a: Node, at: int, like: Steps) -> Node:
        """One step of a value that has a dimension for time, along which it does not change."""
        value = self._constant(a)
        if value is not None and like.outer == 1:
            rows = value.reshape(*value.shape[:at], like.count, -1, *value.shape[at + 1 :])
            first = rows.narrow(at, 0, 1)
            if torch.equal(rows, first.expand_as(rows)):
                step = first.squeeze(at)
                step = step.squeeze(at) if like.bare else step
                return self.constant(f"{a.name}.step", step.contiguous())
        raise MixesTimeError(
            f"{a.name} {list(shape(a))} has a value of its own for each of {like.count} time steps",
            "time-varying",
        )

    def _constant(self, a: Node) -> torch.Tensor | None:
        """The tensor of a value that follows from weights alone."""
        if a.op == "get_attr":
            return self.program.tensor(str(a.target))
        if a.op != "call_function" or a.target in (NEURON, NEURON_STEP, STATE):
            return None
        known = {b: self._constant(b) for b in a.all_input_nodes}
        if not known or any(v is None for v in known.values()):
            return None
        args, kwargs = fx.map_arg((a.args, a.kwargs), known.__getitem__)
        with torch.no_grad():
            value: torch.Tensor = a.target(*args, **kwargs)
        return value

    # Neurons

    def _neuron(self, n: Node) -> Steps:
        x, _, _, layout, T = n.args[:5]
        value, path = self.env[x], where(n)
        key = _identity(n)
        if key not in self.calls:
            drive = self._drive(n, x, value, layout)
            site = next(s for m, s in self.single.items() if _identity(m) == key)
            self.calls[key] = self._layer(site, drive, n)
        call = self.calls[key]
        if n.target is NEURON:
            node = self.call(operator.getitem, call, 0, path=path)
        else:
            state = self.call(operator.getitem, call, 1, path=path)
            kept = self.call(aten.select.int, state, 0, n.args[5], path=path)
            # The operator keeps its state in float32; the network's own membrane has its drive's dtype.
            dtype = call.args[0].meta["val"].dtype
            node = self.call(aten._to_copy.default, kept, path=path, dtype=dtype)
        if layout == "stepped":
            return Steps(node, 0, T)
        return Steps(node, 0, T, 1, shape(n)[0] // T, bare=False)

    def _drive(self, n: Node, x: Node, value: _Value, layout: str) -> Node:
        """One step [N, ...] of a neuron's input."""
        path = where(n)
        if layout == "static" and isinstance(value, _Same):
            return value.node
        if isinstance(value, Steps) and value.axis == 0 and value.outer == 1:
            if layout == "stepped" and value.bare:
                return value.node
            if layout == "flat":
                return fold_in(self, value, path).node
        raise _RefusedError(
            n, f"its input {x.name} {list(shape(x))} does not hold the time steps in order"
        )

    def _layer(self, site: Site, x: Node, like: Node, params: Any = None) -> Node:
        """A layer's step, with its states as inputs and outputs of the graph."""
        neuron, path = site.neuron, where(like)
        if site.neuron.reset_at != "now" and neuron.reset != "none" and self._fires_at_once(neuron):
            raise _RefusedError(
                like,
                "v_0 lies at the threshold, and the reset of the first step, which is left out, could "
                "not be told from those of later ones",
                "steps-differ",
            )
        wide = torch.promote_types(x.meta["val"].dtype, torch.float32)
        zeros = torch.zeros(shape(x), dtype=wide)
        names = ("v", *neuron.dynamics.states)
        parts = [
            self._state(f"{site.name}.{name}", value.detach().clone())
            for name, value in zip(names, neuron.initial(zeros), strict=True)
        ]
        state = self.call(aten.stack.default, parts, 0, path=path)
        given = like.args[1] if like.target is not NEURON_STEP else like.args[2]
        spec = like.args[2] if like.target is not NEURON_STEP else like.args[3]
        weights = [self._plain(p) for p in given]
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

    def call(self, target: Any, *args: Any, path: str, **kwargs: Any) -> Node:
        """A call; the spikes and the state of a layer's step are taken out of it once."""
        if target is operator.getitem:
            for user in args[0].users:
                if user.target is target and user.args[1] == args[1]:
                    return user
        return super().call(target, *args, path=path, **kwargs)

    @staticmethod
    def _fires_at_once(neuron: Neuron) -> bool:
        return bool(torch.as_tensor(neuron.fired(torch.as_tensor(neuron.v_0))).any())

    # States

    def _state(self, name: str, initial: torch.Tensor) -> Node:
        """A new state's input; what it is after the step is noted by the caller."""
        taken = {state.name for state in self.states} | {s.name for s in self.program.inputs}
        names = itertools.chain([name], (f"{name}#{k}" for k in itertools.count(2)))
        name = next(n for n in names if n not in taken)
        self.states.append(State(name, initial))
        first = next(
            (n for n in self.graph.nodes if n.op != "placeholder"),
            self.graph._root,
        )
        with self.graph.inserting_before(first):
            node = self.graph.placeholder("".join(c if c.isalnum() else "_" for c in f"state_{name}"))
        node.meta = {"val": initial.to("meta"), "path": ""}
        self.after.append(node)
        return node

    def _finish_states(self) -> list[Node]:
        """What each state is after the step."""
        found: list[Node] = []
        for state in iter(self.after):  # which aligning a row may make longer
            try:
                found.append(self._align(state) if isinstance(state, tuple) else state)
            except (_RefusedError, MixesTimeError) as error:
                self._tell(error, self.program.results[0])
        return found

    def _counter(self) -> Node:
        """The number of steps so far, this one included."""
        if "counter" not in self.calls:
            before = self._state(COUNTER, torch.zeros(1, dtype=self.program.dtype))
            self.calls["counter"] = self.call(aten.add.Tensor, before, 1.0, path="")
            self.after[-1] = self.calls["counter"]
        return self.calls["counter"]

    # Reductions over time

    def _over_time(self, n: Node) -> _Last | None:
        """A mean, sum or maximum over time, over the steps so far."""
        if n.target not in (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default):
            return None
        source = n.args[0]
        x, path = self.env[source], where(n)
        if not isinstance(x, Steps):
            return None
        given = n.args[1] if len(n.args) > 1 else None
        dims = sorted({ops.dim(source, d) for d in given or range(len(shape(source)))})
        if x.axis not in dims:
            return None
        if x.count != self.T:
            raise _RefusedError(n, f"{short(n.target)} takes {x.count} of {self.T} time steps")
        kwargs = {k: v for k, v in n.kwargs.items() if k == "dtype" and v is not None}
        within = [
            d - (x.bare and d > x.axis) for d in dims if d != x.axis or not x.bare
        ]
        node = x.node
        if within:
            node = self.call(n.target, node, within, False, path=path, **kwargs)
        elif kwargs:
            node = self.call(aten._to_copy.default, node, path=path, **kwargs)
        dtype, name = node.meta["val"].dtype, f"{path or 'forward'}.{short(n.target)[5:]}"
        if n.target is aten.amax.default:
            least = -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
            before = self._state(name, torch.full(shape(node), least, dtype=dtype))
            so_far = self.call(aten.maximum.default, before, node, path=path)
        else:
            before = self._state(name, torch.zeros(shape(node), dtype=dtype))
            so_far = self.call(aten.add.Tensor, before, node, path=path)
        self.after[-1] = so_far
        count = None if n.target is aten.amax.default else self._counter()
        if n.target is aten.mean.dim:
            so_far = self.call(aten.div.Tensor, so_far, count, path=path)
        kind = short(n.target)[5:]
        self.done[f"{path or n.name}: the {kind} over time is that of the steps so far"] = None
        return _Last(self._shaped(so_far, shape(n)), total=n.target is aten.sum.dim_IntList)

    # Loops

    def _take(self, n: Node) -> _Value | None:
        """One step out of a sequence, or its first few; or a sequence of one value repeated."""
        if n.target in (aten.cat.default, aten.stack.default, aten.expand.default):
            return self._repeated(n)
        if n.target not in (aten.select.int, aten.slice.Tensor):
            return None
        source = n.args[0]
        x = self.env[source]
        if not isinstance(x, Steps):
            return None
        if n.target is aten.select.int:
            if ops.dim(source, n.args[1]) != x.axis:
                return None
            if x.outer * x.inner > 1:
                raise _RefusedError(n, "one entry is taken out of time and batch together")
            t = n.args[2] % x.count
            return _At(t, _Pick(source, t, kept=False))
        at, start, end, step = ops.slice_args(n, 1)
        if ops.dim(source, at) != x.axis:
            return None
        first, last, _ = slice(start, end).indices(shape(source)[x.axis])
        t, ahead = divmod(first, x.inner)
        count, rest = divmod(last - first, x.inner)
        if step != 1 or ahead or rest or x.outer > 1 or (t and count > 1):
            raise _RefusedError(n, f"entries {first} to {last} of time are taken out together")
        if count == 1:
            return _At(t, _Pick(source, t, kept=True))
        return replace(x, count=count)

    def _repeated(self, n: Node) -> _Value | None:
        """A value that is put down once for each time step."""
        T, path = self.T, where(n)
        if n.target in (aten.cat.default, aten.stack.default):
            parts = n.args[0]
            at = n.args[1] if len(n.args) > 1 else 0
            value = self.env[parts[0]]
            if at or len(parts) != T or len(set(parts)) > 1 or not isinstance(value, _Same):
                return None
            if n.target is aten.stack.default:
                return Steps(value.node, 0, T)
            return Steps(value.node, 0, T, 1, shape(parts[0])[0], bare=False)
        source = n.args[0]
        value = self.env[source] if isinstance(source, fx.Node) else _Unknown()
        if not isinstance(value, _Same) or shape(n)[:1] != (T,) or source.op == "get_attr":
            return None
        given = shape(source)
        if len(given) == len(shape(n)) and given[0] == 1 and given[1:] == shape(n)[1:]:
            return Steps(self._shaped(value.node, given[1:]), 0, T)
        if len(given) == len(shape(n)) - 1 and given == shape(n)[1:]:
            return Steps(value.node, 0, T)
        return None

    def _collect(self, n: Node) -> Steps | None:
        """The steps of a loop put together into a sequence."""
        if n.target not in (aten.stack.default, aten.cat.default):
            return None
        parts = list(n.args[0])
        values = [self.env[p] for p in parts]
        at = ops.dim(n, n.args[1] if len(n.args) > 1 else 0)
        stacks = n.target is aten.stack.default
        steps = {v.step for v in values if isinstance(v, _At)}
        pieces = [v for v in values if isinstance(v, Steps) and v.axis == at and not stacks]
        if not steps and not any(v.count < self.T for v in pieces):
            return None
        row: list[_Member] = []
        for part, value in zip(parts, values, strict=True):
            if isinstance(value, Steps):
                row += [_Pick(part, t, kept=True) for t in range(value.count)]
            else:
                row.append(self._member(part))
        begun = self.T == 2 and not at and steps == {0} and isinstance(values[0], _Same)
        if len(row) != self.T or not (len(steps) > 1 or pieces or begun):
            return None
        if stacks:
            return Steps(self._align(tuple(row)), at, self.T)
        sizes = {v.inner if isinstance(v, Steps) else shape(p)[at] for p, v in zip(parts, values, strict=True)}
        if len(sizes) != 1:
            return None
        return Steps(self._align(tuple(row)), at, self.T, 1, sizes.pop(), bare=False)

    def _member(self, n: Node) -> Node | _Pick:
        """A value at one step as a member of a row."""
        value = self.env[n]
        return value.pick if isinstance(value, _At) and value.pick else n

    def _step(self, member: _Member) -> int | None:
        """The step of a member; None if it is the same at every step."""
        if isinstance(member, _Pick):
            return member.step
        if member is None or isinstance(member, _Zero):
            return None
        value = self.env[member]
        if isinstance(value, _Unknown):
            raise _RefusedError(None)
        return value.step if isinstance(value, _At) else None

    def _align(self, row: _Row) -> Node:
        """The one step that all members of a row are copies of, each at its own step."""
        if (known := self._known(row)) is None:
            known = self.rows[row] = self._aligned(row)
        return known

    def _known(self, row: _Row) -> Node | None:
        """A row that was aligned before and says as much."""
        for other, node in self.rows.items():
            same = other[0] == row[0] and all(
                a is None or a == b for a, b in zip(row, other, strict=True)
            )
            # One member alone says nothing of a row that goes on in another way than it began.
            if same and (row[1] is not None or other[1] is None or _alike(other[0], other[1])):
                return node
        return None

    def _aligned(self, row: _Row) -> Node:
        members = [m for m in row if m is not None]
        steps = [self._step(m) for m in members]
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

    def _all_same(self, members: Sequence[_Member]) -> Node:
        first = members[0]
        if all(m == first for m in members) and isinstance(first, fx.Node):
            return self._plain(first)
        nodes = [m for m in members if isinstance(m, fx.Node)]
        values = [self._constant(m) for m in nodes]
        if len(nodes) == len(members) and all(
            v is not None and values[0] is not None and torch.equal(v, values[0]) for v in values
        ):
            return self._plain(nodes[0])
        raise _RefusedError(
            nodes[0],
            f"a value of its own at each time step ({', '.join(n.name for n in nodes[:3])}, ...)",
            "time-varying",
        )

    def _copies(self, row: _Row) -> Node:
        members = [m for m in row if m is not None]
        first = members[0]
        if isinstance(first, _Pick):
            for t, m in enumerate(members):
                if not isinstance(m, _Pick) or (m.sequence, m.kept) != (first.sequence, first.kept):
                    return self._first_apart(row, t)
            x: Any = self.env[first.sequence]
            return fold_in(self, x, where(first.sequence)).node if first.kept else x.node
        nodes: list[Node] = members
        for t, n in enumerate(nodes):
            if isinstance(n, _Pick) or n.target is not nodes[0].target:
                return self._first_apart(row, t)
        if first in self.chains:
            return self._chain(nodes)
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
            self._align((*map(self._member, column), *missing))
            if isinstance(column[0], fx.Node)
            else column[0]
            for column in zip(*leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(new, flat[-1][1])
        return self.call(first.target, *args, path=where(nodes[-1]), **kwargs)

    def _first_apart(self, row: _Row, t: int) -> Node:
        """Copies that differ: where step 0 alone does, it may be a sum that begins."""
        members = [m for m in row if m is not None]
        if t == 1:
            return self._accumulated(row)
        raise self._differs(members, f"step {t} computes something else than the steps before it", t)

    def _differs(self, members: Sequence[_Member], reason: str, t: int) -> _RefusedError:
        member = members[t]
        n = member.sequence if isinstance(member, _Pick) else member
        return _RefusedError(n if isinstance(n, fx.Node) else None, reason, "steps-differ")

    def _chain(self, calls: Sequence[Node]) -> Node:
        """A neuron that is called step by step."""
        site = self.chains[calls[0]][0]
        if any(self.chains.get(n, (None,))[0] is not site for n in calls):
            raise self._differs(calls, "the steps go through different neurons", 1)
        if site.name not in self.calls:
            # Its drive may lead back to its own spikes, a step earlier: they are known by then.
            whole = self.loops[site.name]
            drive = self._align(tuple(self._member(n.args[0]) for n in whole))
            self.calls[site.name] = self._layer(site, drive, whole[0])
        return self.calls[site.name]

    def _delay(self, row: _Row) -> Node:
        """What a step later is, kept from the step before."""
        members = [m for m in row if m is not None]
        first, like = members[0], members[-1]
        at = like.sequence if isinstance(like, _Pick) else like
        sizes = shape(first.like if isinstance(first, _Zero) else first)
        dtype = at.meta["val"].dtype
        if isinstance(first, _Zero):
            initial: torch.Tensor | None = torch.zeros(sizes, dtype=dtype)
        else:
            initial = self._constant(first)
        if initial is None:
            raise _RefusedError(first, "a loop starts from what depends on the input", "state-init")
        sizes = self._step_shape(like)
        kind = "delayed" if at.op != "call_function" else short(at.target).rpartition(".")[2]
        node = self._state(
            f"{where(at) or 'forward'}.{kind}", initial.to(dtype).expand(sizes).clone()
        )
        self.after[-1] = (*row[1:], None)
        self.done[f"{where(at) or at.name}: {kind} is kept for the next step"] = None
        return node

    def _step_shape(self, member: _Member) -> tuple[int, ...]:
        if isinstance(member, _Pick):
            x: Any = self.env[member.sequence]
            sizes = list(shape(x.node))
            if member.kept and x.bare:
                sizes.insert(x.axis, 1)
            return tuple(sizes)
        return shape(member)

    def _accumulated(self, row: _Row) -> Node:
        """y[t] = a[t-1] + b[t], where y[0] is b[0] alone: as if a[-1] were 0."""
        members = [m for m in row if m is not None]
        later = members[1:]
        if all(isinstance(m, fx.Node) and _adds(m) for m in later):
            nodes: list[Node] = later
            steps = [[self._step(self._member(a)) for a in n.args[:2]] for n in nodes]
            missing = (None,) * (len(row) - len(members))
            for back in (0, 1):
                earlier = all(s[back] is None or s[back] < t for t, s in enumerate(steps, 1))
                if earlier and all(s[1 - back] == t for t, s in enumerate(steps, 1)):
                    before = [self._member(n.args[back]) for n in nodes]
                    now = [self._member(n.args[1 - back]) for n in nodes]
                    start = members[0]
                    if isinstance(start, fx.Node) and _adds_zero(start):
                        start = self._member(start.args[0])
                    if before == [start]:
                        raise _RefusedError(
                            nodes[0],
                            "after 2 time steps a sum over all of them cannot be told from the sum of "
                            "two neighbours",
                            "time-steps",
                        )
                    a = self._align((_Zero(nodes[0]), *before, *missing))
                    b = self._align((start, *now, *missing))
                    pair = (a, b) if back == 0 else (b, a)
                    return self.call(aten.add.Tensor, *pair, path=where(nodes[-1]))
        raise self._differs(members, "step 1 computes something else than step 0", 1)

    # What is returned after the last step

    def _last(self, n: Node) -> Node:
        """A value after the last step, as it is at each."""
        value = self.env[n]
        if isinstance(value, (_Same, _Last)):
            return value.node
        if isinstance(value, _Unknown):
            raise _RefusedError(None)
        if isinstance(value, Steps):
            raise _RefusedError(n, "all time steps are taken together with what the last one gives")
        if value.step != self.T - 1:
            raise _RefusedError(n, f"step {value.step} is returned by itself", "output")
        if n in self.chains:
            return self._chain(self.loops[self.chains[n][0].name])
        if value.pick is not None:
            x: Any = self.env[value.pick.sequence]
            return fold_in(self, x, where(n)).node if value.pick.kept else x.node
        path = self._way_back(n)
        if path is not None and (row := self._history(n, path)) is not None:
            node = self._align(row)
            total = _adds(n) and len(path) == 1
            if total:
                self._counter()
            self.env[n] = _Last(node, total)
            return node
        last = self._at_end(n)
        self.env[n] = last
        return last.node

    def _history(self, n: Node, path: Sequence[int]) -> _Row | None:
        """The copies at earlier steps of what a value is at the last, each by the same way."""
        row: list[_Member] = [n]
        for _ in range(self.T - 1):
            for position in path:
                leaves = pytree.tree_leaves((n.args, n.kwargs)) if isinstance(n, fx.Node) else []
                if position >= len(leaves) or not isinstance(leaves[position], fx.Node):
                    return None
                n = leaves[position]
            row.append(self._member(n))
        return tuple(reversed(row))

    def _way_back(self, n: Node) -> list[int] | None:
        """Positions of operands from a value at the last step to its copy a step before."""
        todo: list[tuple[Node, list[int]]] = [(n, [])]
        seen = {n}
        for node, path in todo:
            for i, a in enumerate(pytree.tree_leaves((node.args, node.kwargs))):
                value = self.env.get(a) if isinstance(a, fx.Node) else None
                if not isinstance(value, _At) or a in seen:
                    continue
                seen.add(a)
                step = value.step
                if step == self.T - 2 and a.target is n.target and value.pick is None:
                    return [*path, i]
                if a not in self.chains and value.pick is None:
                    todo.append((a, [*path, i]))
        # The first two of a sum have no copy before them.
        for i, a in enumerate(n.args[:2]):
            if self.T == 2 and _adds(n) and self._step(self._member(a)) == 0:
                return [i]
        return None


def _identity(n: Node) -> Hashable:
    """What a layer's spikes have in common with its states, and with no other layer."""
    x, params, spec = n.args[:3]
    while x.target is ops.RESHAPE:
        x = x.args[0]
    return (x, tuple(params), spec, where(n))


def _alike(a: Any, b: Any) -> bool:
    """Whether two members of a row look like copies."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return bool(a.target is b.target)
    return isinstance(a, _Pick) and isinstance(b, _Pick)


def _adds(n: Node) -> bool:
    """Whether a node is a sum of two tensors."""
    return n.target is aten.add.Tensor and len(n.all_input_nodes) == 2 and not n.kwargs


def _adds_zero(n: Node) -> bool:
    return n.target is aten.add.Tensor and isinstance(n.args[1], (int, float)) and n.args[1] == 0
