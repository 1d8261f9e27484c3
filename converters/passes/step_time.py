"""Derive the program of one time step, whose states are explicit inputs and outputs.

Every value of the program over T steps is one of four things: the same at every step; a sequence, of
which one step is computed (:mod:`..unstacked`); one step of a loop that was kept as steps; or what is
left of a sequence at its end. Out of these follow the states:

* A layer of neurons has those of its declaration, v and the others.
* In a loop, the copies of an operator at steps 0 ... T-1 are aligned operand by operand; an operand
  that lies a step back is a state, whose initial value is what stands in its place at step 0.
* A convolution along time keeps the past steps that it looks back to.
* A sum, a mean, a maximum or a minimum over time is taken over the steps so far, so that after T steps
  it is that of the whole call. A sum that is divided by T is a mean.

What the network returns after its last step is given at each step, as if it were the last. An input is
a sequence if the network treats it as one; an image that the network itself repeats is given to every
step. T must be 2 at least and longer than any delay in the network, or steps could not be told from
one another, and 3 where a loop keeps something itself, or nothing would show how that goes on. Steps
that are all one constant are refused for that.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .. import ops
from ..delays import hidden_delays
from ..errors import Finding, UnsupportedError
from ..loops import Loops
from ..neurons import Neuron
from ..ops import Node, aten, shape
from ..program import (
    NEURON,
    STATE,
    PassReport,
    Program,
    Site,
    TensorSpec,
    short,
    where,
)
from ..stepping import Stepping
from ..stepwise import (
    At,
    Last,
    Member,
    Pick,
    RefusedError,
    Same,
    Unknown,
    Value,
    as_near,
    numbers_of,
)
from ..unstacked import MixesTimeError, Steps, fold_in, lay_bare, unstack

HEADLINE = "the network cannot be run step by step:"
#: Ways to read the inputs that are tried: which are sequences, and which of their dimensions is time.
_MOST_READINGS = 81


def step_time(program: Program) -> Program:
    """The program of one step, for a program whose neurons are still operators.

    Raises:
        UnsupportedError: With everything that no step can compute by itself.
    """
    T = _time_steps(program)
    if hidden := list(hidden_delays(program.captured or program, T)):
        raise UnsupportedError(HEADLINE, hidden)
    best: _StepTime | None = None
    for axes in itertools.islice(_readings(program.inputs, T), _MOST_READINGS):
        attempt = _StepTime(program, T, axes)
        result = attempt.run()
        if result is not None:
            return result
        if best is None or attempt.reach > best.reach:
            best = attempt
    raise UnsupportedError(HEADLINE, best.findings if best else ())


def _readings(inputs: Sequence[TensorSpec], T: int) -> Iterator[tuple[int | None, ...]]:
    """What may be time in each input, if any: first or second for the most part, or further back."""
    # Of what the graph holds as one, time cannot be taken out.
    found = [
        [
            d
            for d, size in enumerate(spec.shape)
            if size == T and (not spec.rank or d < spec.rank - 1)
        ]
        for spec in inputs
    ]
    usual = [[*(d for d in axes if d < 2), None] for axes in found]
    yield from itertools.product(*usual)
    whole = [
        [*first, *(d for d in axes if d > 1)] for first, axes in zip(usual, found, strict=True)
    ]
    yield from (axes for axes in itertools.product(*whole) if any((d or 0) > 1 for d in axes))


def _time_steps(program: Program) -> int:
    """How many steps the program has."""
    # Of some layers nothing but the potentials is read.
    states = program.graph.find_nodes(op="call_function", target=STATE)
    counts = sorted({site.T for site in program.sites} | {n.args[4] for n in states})
    if len(counts) == 1 and counts[0] > 1:
        return counts[0]
    paths = Counter(site.path for site in program.sites)
    anew = [s.path for s in program.sites if s.T == 1 and paths[s.path] > 1]
    sites = [s.name for s in program.sites] if len(counts) > 1 else []
    found = " and ".join(map(str, counts)) + f" time step{'s' * (counts != [1])}"
    allowed = "neurons that all run over the same number of time steps, 2 or more"
    if not counts:
        found, allowed = "no declared neuron", "a network whose neurons say what a time step is"
        fix = (
            "use neuron modules, or declare your own (spikeport.converters.neurons.dynamics): a threshold "
            "that is written by hand cannot be told from other arithmetic; or convert it unrolled"
        )
    elif anew:
        sites = list(dict.fromkeys(anew))
        found = "several calls, each of one time step that starts anew"
        fix = (
            "let each call go on from the one before: a neuron in single-step mode, of one shape, that is "
            "not reset in between; or give it all steps in one call, or convert it unrolled"
        )
    elif sites:
        fix = "let every layer run over all time steps, or convert it unrolled"
    else:
        fix = "give an example input of 2 time steps or more; the result does not depend on their number"
    raise UnsupportedError(HEADLINE, [Finding("time-steps", ", ".join(sites), found, allowed, fix)])


_FIXES = {
    "mixes-time": "let the network compute each time step out of this and earlier ones, or convert it "
    "unrolled",
    "time-varying": "use the same weights and constants at every time step, or convert it unrolled",
    "steps-differ": "let the network do the same at every time step, or convert it unrolled",
    "state-init": "start from a constant, or convert it unrolled",
    "output": "return what the network computes at every step or after the last, or convert it unrolled",
    "time-steps": "give an example input of more time steps, 3 for most; the result does not depend on it",
}
_ALLOWED = {
    "mixes-time": "operators on each time step alone, convolutions over past steps, and mean, sum, "
    "maximum or minimum over all of them",
    "time-varying": "weights and constants that are the same at every time step",
    "steps-differ": "a loop whose steps are alike, the first one from constants",
    "state-init": "states that start from the same values in every call",
    "output": "[T, N, ...] with a step each, or the value after the last step",
    "time-steps": "time steps that can be told from one another",
}

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
#: bias, stride, padding, dilation, groups
_CONVOLUTION_DEFAULTS: tuple[Any, ...] = (None, [1], [0], [1], 1)


#: What is taken over all steps, as an operator on chosen dimensions.
OVER_TIME = {
    aten.mean.dim: aten.mean.dim,
    aten.mean.default: aten.mean.dim,
    aten.sum.dim_IntList: aten.sum.dim_IntList,
    aten.sum.default: aten.sum.dim_IntList,
    aten.amax.default: aten.amax.default,
    aten.amin.default: aten.amin.default,
}
#: The extremes so far, with what they start from.
_EXTREMES = {
    aten.amax.default: (aten.maximum.default, -math.inf),
    aten.amin.default: (aten.minimum.default, math.inf),
}


class _StepTime(Loops):
    """One attempt, with ``axes`` saying which dimension of each input is time."""

    def __init__(self, program: Program, T: int, axes: Sequence[int | None]) -> None:
        super().__init__(program, T)
        self.axes = axes
        self.findings: list[Finding] = []
        self.calls: dict[Hashable, Node] = {}
        named = program.named()
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
        self._doubt_scales()
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
            doubts=tuple(self.doubts.values()),
        )

    def _doubt_scales(self) -> None:
        """Doubt what is still divided by the number of steps, or scaled by its inverse."""
        for n in self.graph.nodes:
            by = numbers_of(n)[:1] if n.target in (aten.div.Tensor, aten.mul.Tensor) else []
            if by and math.isclose(by[0], self.T if n.target is aten.div.Tensor else 1 / self.T):
                self.doubt(n, by[0], "as a scale")

    @property
    def reach(self) -> tuple[int, int]:
        """How far a failed attempt came: an input that is read amiss hides all that comes after."""
        return len(self.sites), -len(self.findings)

    def _told(self, inputs: Sequence[TensorSpec]) -> Iterator[str]:
        for spec, axis in zip(inputs, self.axes, strict=True):
            yield (
                f"input {spec}: given to every step"
                if axis is None
                else f"input {spec}: one step of dimension {axis}"
            )
        names = ", ".join(state.name for state in self.states)
        yield f"{len(self.states)} states: {names}"

    def _tell(self, error: RefusedError | MixesTimeError, n: Node, rule: str = "") -> None:
        """Note a finding, at ``n`` unless the error says where."""
        at = error.node if isinstance(error, RefusedError) else n
        if at is None:
            return
        rule = rule if rule and at is n and error.rule == "mixes-time" else error.rule
        finding = Finding(
            rule=rule,
            where=where(at) or next(filter(None, map(where, at.users)), ""),
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
                self.env[n] = Same(self.placeholder(n, n.meta["val"]))
                found.append(spec)
                continue
            one = _one_step(spec, axis)
            node = self.placeholder(n, n.meta["val"].new_empty(one.graph_shape))
            x = Steps(node, axis - one.folded, self.T)
            if spec.folded and not one.folded:
                # The program has [a, b, ...] as [ab, ...]; one of the two is time.
                outer, inner = (1, one.shape[0]) if axis == 0 else (one.shape[0], 1)
                x = Steps(node, 0, self.T, outer, inner, bare=False)
            self.env[n] = x
            found.append(one)
        return found

    def _output(self, spec: TensorSpec, r: Node) -> tuple[Node, TensorSpec, int | None]:
        """What a step gives in place of an output of the call, and where time was."""
        value = self.env[r]
        try:
            if isinstance(value, Steps):
                node, axis = self._every(spec, r, value)
                return node, _one_step(spec, axis), axis
            node = self.at_last(r)
        except (RefusedError, MixesTimeError) as error:
            self._tell(error, r, "output")
            return r, spec, None
        if not isinstance(value, (Same, Unknown)):
            self.done[f"output {spec.name}: at each step as if it were the last"] = None
        return node, spec, None

    def _every(self, spec: TensorSpec, r: Node, value: Steps) -> tuple[Node, int]:
        """One step of an output that holds all of them, and the dimension that is time."""
        if value.count != self.T:
            raise RefusedError(r, f"{value.count} of {self.T} time steps are returned", "output")
        if value.axis or not spec.folded:
            bare = lay_bare(self, value, where(r))
            return bare.node, bare.axis + spec.folded
        folded = fold_in(self, value, where(r))
        axis = 0 if folded.outer == 1 else 1
        return self.shaped(folded.node, list(_one_step(spec, axis).graph_shape)), axis

    # Every value in turn

    def _guarded(self, n: Node) -> Value:
        try:
            return self._value(n)
        except (RefusedError, MixesTimeError) as error:
            self._tell(error, n)
            return Unknown()

    def _value(self, n: Node) -> Value:
        if n.op == "get_attr":
            return Same(self.copy(n, {}))
        if n in self.chains:
            return At(self.chains[n][1])
        operands = [self.env[a] for a in n.all_input_nodes]
        if any(isinstance(v, Unknown) for v in operands):
            return Unknown()
        if n.target in (NEURON, STATE):
            return self._neuron(n)
        if (taken := self._take(n)) is not None:
            return taken
        if (collected := self._collect(n)) is not None:
            return collected
        if (over := self._over_time(n)) is not None:
            return over
        if (filtered := self._filter(n)) is not None:
            return filtered
        if any(isinstance(v, At) for v in operands):
            return self._in_loop(n, operands)
        if any(isinstance(v, Last) for v in operands):
            return self.at_end(n)
        if any(isinstance(v, Steps) for v in operands):
            known = {a: self.plain(a) for a in n.all_input_nodes}
            return unstack(self, n, known, self._still)
        return Same(self.copy(n, {a: self.plain(a) for a in n.all_input_nodes}))

    def _in_loop(self, n: Node, operands: Sequence[Value]) -> Value:
        if any(isinstance(v, Steps) for v in operands):
            if (joined := self._mostly_constant(n)) is not None:
                raise RefusedError(
                    n,
                    f"of {self.T} time steps that {joined.name} puts together, one alone follows from an "
                    "input, as of those of a delay that is almost as long as the example",
                    "time-steps",
                )
            raise RefusedError(
                n, f"{short(n.target)} takes one time step together with all of them"
            )
        steps = [v.step for v in operands if isinstance(v, At)]
        if any(isinstance(v, Last) for v in operands):
            if max(steps) < self.T - 1:
                raise RefusedError(
                    n,
                    f"{short(n.target)} takes step {max(steps)} together with what all steps give",
                )
            return self.at_end(n)
        return At(max(steps))

    def _mostly_constant(self, n: Node) -> Node | None:
        """As many parts as there are steps, which a value follows from and of which one is a step."""
        for a in ops.needed(n.all_input_nodes):
            if a.target in (aten.stack.default, aten.cat.default) and len(a.args[0]) == self.T:
                kinds = [type(self.env[p]) for p in a.args[0]]
                if kinds[:-1] == [Same] * (self.T - 1) and kinds[-1] is At:
                    return a
        return None

    def _still(self, a: Node, at: int, like: Steps) -> Node:
        """One step of a value that has a dimension for time, along which it does not change."""
        value = self.value_of(a)
        if value is not None and like.outer == 1:
            rows = value.reshape(*value.shape[:at], like.count, -1, *value.shape[at + 1 :])
            first = rows.narrow(at, 0, 1)
            if torch.equal(rows, first.expand_as(rows)):
                step = first.squeeze(at)
                step = step.squeeze(at) if like.bare else step
                return self.constant(f"{a.name}_step", step.contiguous())
        raise MixesTimeError(
            f"{a.name} {list(shape(a))} has a value of its own for each of {like.count} time steps",
            "time-varying",
        )

    # Neurons and states

    def _neuron(self, n: Node) -> Steps:
        x, _, _, layout, T = n.args[:5]
        value, path = self.env[x], where(n)
        key = _identity(n)
        if key not in self.calls:
            drive = self._drive(n, x, value, layout)
            sites = (s for m, s in self.single.items() if _identity(m) == key)
            made = next(sites, None) or self._silent(n)
            self.calls[key] = self.layer(made, drive, n)
            # A layer that takes the same input twice gives the same.
            self.sites |= {s.name: replace(self.sites[made.name], name=s.name) for s in sites}
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

    def _silent(self, n: Node) -> Site:
        """A layer of which only the states are used."""
        _, params, spec, layout, T = n.args[:5]
        neuron = Neuron.from_json(spec, [self.program.tensor(p.target) for p in params])
        return Site(where(n) or n.name, where(n), neuron, T, layout, (), ())

    def _drive(self, n: Node, x: Node, value: Value, layout: str) -> Node:
        """One step [N, ...] of a neuron's input."""
        path = where(n)
        if layout == "static" and isinstance(value, Same):
            return value.node
        if isinstance(value, Steps) and value.axis == 0 and value.outer == 1:
            if layout == "stepped":
                return lay_bare(self, value, path).node
            if layout == "flat":
                return fold_in(self, value, path).node
        drive = f"its input {x.name} {list(shape(x))}"
        if isinstance(value, Same):
            raise RefusedError(
                n,
                f"{drive} has a value of its own at each time step, out of what is the same at all",
                "time-varying",
            )
        raise RefusedError(n, f"{drive} does not hold the time steps in order")

    def _finish_states(self) -> list[Node]:
        """What each state is after the step."""
        found: list[Node] = []
        for state in iter(self.after):  # which aligning a row may make longer
            try:
                found.append(self.align(state) if isinstance(state, tuple) else state)
            except (RefusedError, MixesTimeError) as error:
                self._tell(error, self.program.results[0])
        return found

    # Over time

    def _over_time(self, n: Node) -> Last | None:
        """A mean, sum or extreme over time, over the steps so far."""
        target = OVER_TIME.get(n.target)
        if target is None:
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
            raise RefusedError(n, f"{short(n.target)} takes {x.count} of {self.T} time steps")
        kwargs = {k: v for k, v in n.kwargs.items() if k == "dtype" and v is not None}
        if n.meta["val"].dtype != source.meta["val"].dtype:  # truth values and numbers of few bits
            kwargs["dtype"] = n.meta["val"].dtype
        within = [d - (x.bare and d > x.axis) for d in dims if d != x.axis or not x.bare]
        node = x.node
        if within:
            node = self.call(target, node, within, False, path=path, **kwargs)
        elif kwargs:
            node = self.call(aten._to_copy.default, node, path=path, **kwargs)
        kind = short(n.target)[5:]
        dtype, name = node.meta["val"].dtype, f"{path or 'forward'}.{kind}"
        further, start = _EXTREMES.get(target, (aten.add.Tensor, 0.0))
        begun = torch.full(shape(node), as_near(start, dtype), dtype=dtype)
        before = self.new_state(name, begun)
        so_far = self.call(further, before, node, path=path)
        self.after[-1] = so_far
        count = None if target in _EXTREMES else self.counter()
        if target is aten.mean.dim:
            so_far = self.call(aten.div.Tensor, so_far, count, path=path)
        self.done[f"{path or n.name}: the {kind} over time is that of the steps so far"] = None
        return Last(self.shaped(so_far, shape(n)), total=target is aten.sum.dim_IntList)

    def _filter(self, n: Node) -> Steps | None:
        """A convolution along time that takes none but past steps: the last few are its state.

        It is padded with as many zeros as it looks back; what comes out after the last step is cut off.
        """
        if n.target not in _CONVOLUTIONS:
            return None
        x = self.env[n.args[0]]
        batched = len(shape(n)) == len(shape(n.args[1]))
        if not isinstance(x, Steps) or not batched or not x.bare or x.axis < 2:
            return None
        at, size = x.axis - 2, len(shape(n)) - 2
        settings: list[Any] = [*n.args[2:], *_CONVOLUTION_DEFAULTS[len(n.args) - 2 :]]
        bias, *given, groups = settings
        stride, padding, dilation = ([*v] * (size if len(v) == 1 else 1) for v in given)
        back = (shape(n.args[1])[x.axis] - 1) * dilation[at]
        if stride[at] != 1 or padding[at] != back:
            raise MixesTimeError(
                f"{short(n.target)} along time with stride {stride[at]} and padding {padding[at]}, where "
                f"stride 1 and padding {back} would take past steps alone"
            )
        path = where(n)
        window = now = self.call(aten.unsqueeze.default, x.node, x.axis, path=path)
        sizes = [back if d == x.axis else s for d, s in enumerate(shape(now))]
        dtype = now.meta["val"].dtype
        if back:
            before = self.new_state(f"{path or 'forward'}.past", torch.zeros(sizes, dtype=dtype))
            window = self.call(aten.cat.default, [before, now], x.axis, path=path)
            self.after[-1] = self.call(aten.slice.Tensor, window, x.axis, 1, back + 1, path=path)
        padding[at] = 0
        weight, bias = (None if w is None else self.plain(w) for w in (n.args[1], bias))
        geometry = (stride, padding, dilation, groups)
        node = self.call(n.target, window, weight, bias, *geometry, path=path)
        self.done[f"{path or n.name}: the last {back} steps are kept"] = None
        node = self.call(aten.squeeze.dim, node, x.axis, path=path)
        return replace(x, node=node, count=x.count + back)

    # Sequences and their steps

    def _take(self, n: Node) -> Value | None:
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
                raise RefusedError(n, "one entry is taken out of time and batch together")
            t = n.args[2] % x.count
            return At(t, Pick(source, t, kept=False))
        at, start, end, step = ops.slice_args(n, 1)
        if ops.dim(source, at) != x.axis:
            return None
        first, last, _ = slice(start, end).indices(shape(source)[x.axis])
        t, ahead = divmod(first, x.inner)
        count, rest = divmod(last - first, x.inner)
        if step != 1 or ahead or rest or x.outer > 1 or (t and count > 1):
            found = f"entries {first} to {last} of time"
            if step == 1 and not ahead and not rest and x.outer == 1:
                found = f"time steps {t} to {t + count - 1} of 0 to {x.count - 1}"
            raise RefusedError(n, f"{found} are taken out together")
        if count == 1:
            return At(t, Pick(source, t, kept=True))
        return replace(x, count=count)

    def _repeated(self, n: Node) -> Value | None:
        """A value that is put down once for each time step."""
        T = self.T
        if n.target in (aten.cat.default, aten.stack.default):
            parts = n.args[0]
            at = n.args[1] if len(n.args) > 1 else 0
            value = self.env[parts[0]]
            if at or len(parts) != T or len(set(parts)) > 1 or not isinstance(value, Same):
                return None
            if n.target is aten.stack.default:
                return Steps(value.node, 0, T)
            return Steps(value.node, 0, T, 1, shape(parts[0])[0], bare=False)
        source = n.args[0]
        value = self.env[source] if isinstance(source, fx.Node) else Unknown()
        if not isinstance(value, Same) or shape(n)[:1] != (T,) or source.op == "get_attr":
            return None
        given = shape(source)
        if len(given) == len(shape(n)) and given[0] == 1 and given[1:] == shape(n)[1:]:
            return Steps(self.shaped(value.node, given[1:]), 0, T)
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
        steps = {v.step for v in values if isinstance(v, At)}
        pieces = [v for v in values if isinstance(v, Steps) and v.axis == at and not stacks]
        if not steps and not any(v.count < self.T for v in pieces):
            return None
        row: list[Member] = []
        for part, value in zip(parts, values, strict=True):
            if isinstance(value, Steps):
                row += [Pick(part, t, kept=True) for t in range(value.count)]
            else:
                row.append(self.member(part))
        begun = self.T == 2 and not at and steps == {0} and isinstance(values[0], Same)
        if len(row) != self.T or not (len(steps) > 1 or pieces or begun):
            return None
        if stacks:
            return Steps(self.align(tuple(row)), at, self.T)
        sizes = {
            v.inner if isinstance(v, Steps) else shape(p)[at]
            for p, v in zip(parts, values, strict=True)
        }
        if len(sizes) != 1:
            return None
        return Steps(self.align(tuple(row)), at, self.T, 1, sizes.pop(), bare=False)


def _identity(n: Node) -> Hashable:
    """What a layer's spikes have in common with its states, and with no other layer."""
    x, params, spec = n.args[:3]
    while x.target is ops.RESHAPE:
        x = x.args[0]
    return (x, tuple(params), spec, where(n))


def _one_step(spec: TensorSpec, axis: int) -> TensorSpec:
    """An input or output without the dimension that is time."""
    size = tuple(s for d, s in enumerate(spec.shape) if d != axis)
    folded = spec.folded and axis > 1
    rank = None if spec.rank is None else spec.rank - (folded == spec.folded)
    return replace(spec, shape=size, folded=folded, rank=rank)
