"""What rounding explains: a running error analysis of a program on one input.

Each value carries a bound of its error (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
ed., section 3.3). With u the unit roundoff of what is stored, U that of what sums are accumulated in
and K the number of terms of a sum, a layer y = W x + b has

    e(y) = |W| e(x) + e(W) |x| + e(b) + c sqrt(K) U (|W| |x| + |b|) + u |y|

where e(b) of a bias that a batch norm went into counts the terms that the network itself adds up, which
may cancel, and sqrt(K) instead of K is the probabilistic bound of Higham and Mary (2019, SIAM J. Sci.
Comput. 41(5), doi:10.1137/18M1226312), and c makes a miss unlikely. Spikes are given, so they have no
error; a membrane potential that the network returns has that of its steps, and where the potential is so
near the threshold that its spike is in doubt, the whole reset.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import ops
from .equations import Symbol
from .neurons import Neuron
from .ops import Node, aten, steps
from .program import NEURON_STEP, STATE, Program, Site

#: The c above; a wrong conversion is off by orders of magnitude more.
CERTAINTY = 4.0
_ACCUMULATOR = torch.finfo(torch.float32).eps / 2

#: Operators that move values or take the largest, which rounds nothing.
_EXACT = frozenset(
    {
        ops.RESHAPE,
        aten.slice.Tensor,
        aten.cat.default,
        aten.clone.default,
        aten.stack.default,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.permute.default,
        aten.transpose.int,
        aten.amax.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten._to_copy.default,
    }
)
_SUMS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.avg_pool2d.default,
        aten.avg_pool3d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
    }
)
_LAYERS = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.linear.default,
    }
)
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})

#: Operators on truth values, which are 0 and 1 here.
_LOGIC = frozenset(
    {
        aten.bitwise_and.Tensor,
        aten.bitwise_not.default,
        aten.bitwise_or.Tensor,
        aten.bitwise_xor.Tensor,
        aten.logical_and.default,
        aten.logical_not.default,
        aten.logical_or.default,
        aten.logical_xor.default,
    }
)
#: Operators that take values out of the first operand by whole numbers.
_TAKEN = frozenset(
    {aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.embedding.default}
)
#: Operators that put values in order along a dimension, or give those at a place of that order.
_ORDERED = frozenset(
    {
        aten.sort.default,
        aten.sort.stable,
        aten.argsort.default,
        aten.topk.default,
        aten.median.dim,
        aten.kthvalue.default,
        aten.max.dim,
        aten.min.dim,
        aten.argmax.default,
        aten.argmin.default,
    }
)
#: Operators of a charge equation that torch has under their names; the others are Python's.
_FUNCTIONS = frozenset({"div", "relu", "sigmoid", "exp", "tanh"})

_Pair = tuple[torch.Tensor, torch.Tensor]


class Bounds(fx.Interpreter):
    """Bounds at every drive and output, on given spikes; values are pairs (value, error).

    Args:
        program: The program.
        example: The user's inputs.
        spikes: Spikes [T, N, ...] by site.
    """

    def __init__(
        self, program: Program, example: Sequence[torch.Tensor], spikes: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(program.module)
        self._program = program
        self._firing = {node: site for site in program.sites for node in site.spikes}
        self._unit = torch.finfo(program.dtype).eps / 2
        self._least = torch.finfo(program.dtype).smallest_normal * self._unit
        self._rounded = program.rounded
        self._kept = {d for site in program.sites for d in site.drives}
        self._kept |= {n.name for n in program.results}
        self._wanted = self._ancestors(program)
        self._found: dict[str, list[torch.Tensor]] = defaultdict(list)
        states = list(program.nodes("placeholder"))[len(program.inputs) :]
        carried: list[_Pair] = [(s.float(), torch.zeros(s.shape)) for s in program.initial_state()]
        stepping = program.stepping
        for t, now in enumerate([example] if stepping is None else stepping.split(example)):
            self._spikes = {n: s if stepping is None else s[t] for n, s in spikes.items()}
            self._carried = dict(zip(states, carried, strict=True))
            inputs = [x.float() for x in program.flat_inputs(now)]
            with torch.no_grad():
                results = self.run(*inputs, *(value for value, _ in carried))
            carried = results[len(program.outputs) :] if stepping is not None else []

    def _ancestors(self, program: Program) -> set[str]:
        """Nodes that drives and outputs depend on, up to the neurons before them."""
        named = program.named()
        todo = [named[name] for name in self._kept]
        seen: set[str] = set()
        while todo:
            n = todo.pop()
            if n.name not in seen:
                seen.add(n.name)
                if n.name not in self._firing:
                    todo += n.all_input_nodes
        return seen

    def of(self, node: str) -> torch.Tensor:
        """How far a node's value may be from the network's own, of its shape."""
        found = self._found[node]
        return _twice(found[0] if self._program.stepping is None else torch.stack(found))

    def result(self, index: int) -> torch.Tensor:
        """The same for an output of the whole call."""
        stepping, found = self._program.stepping, self._found[self._program.results[index].name]
        return _twice(found[0] if stepping is None else stepping.join(index, found))

    def at(self, site: Site) -> torch.Tensor:
        """The same for a site's drive, [T, N, ...], in the source's scale."""
        return site.error({d: self.of(d) for d in site.drives})

    def run_node(self, n: Node) -> Any:
        """The node's value and error; nothing where no drive or output depends on it."""
        if n.op == "output":
            return super().run_node(n)
        if n.name not in self._wanted:
            return None
        if (site := self._firing.get(n.name)) is not None:
            spikes = site.scatter(self._spikes[site.name], n.meta["val"], n.name).float()
            pair = (spikes, torch.zeros(()).expand_as(spikes))
        elif n.op == "get_attr":
            value = super().run_node(n).float()
            exact = self._rounded is not None and n.target not in self._rounded
            exact |= not n.meta["val"].is_floating_point()
            error = torch.zeros_like(value) if exact else self._stored(value)
            if (terms := self._program.terms.get(str(n.target))) is not None:
                error = error + self._sum(terms, 1)
            pair = (value, error)
        elif n in self._carried:
            super().run_node(n)
            pair = self._carried[n]
        elif n.op == "placeholder":
            value = super().run_node(n)
            exact = not n.meta["val"].is_floating_point()
            pair = (value, torch.zeros_like(value) if exact else self._stored(value))
        else:
            value, error = self._call(n)
            if isinstance(value, tuple):
                return value, error
            pair = (value.float(), error.float())
        if n.name in self._kept:
            self._found[n.name].append(pair[1])
        return pair

    def _call(self, n: Node) -> Any:
        target: Any = n.target
        if target is NEURON_STEP:
            return self._neuron_step(n)
        if target is operator.getitem:
            given: Any = self.env[n.args[0]]
            if isinstance(given[0], tuple):
                return given[0][n.args[1]], given[1][n.args[1]]
            step: _Pair = given  # of a neuron, whose spikes are given
            return step
        if target is STATE:
            return self._state(n)
        pairs = [self.env[a] for a in n.all_input_nodes]
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: self.env[a][0])
        errors, _ = fx.map_arg((n.args, n.kwargs), lambda a: self.env[a][1])
        typed, options = fx.map_arg((n.args, n.kwargs), lambda a: _typed(a, self.env[a][0]))
        value = target(*typed, **options)
        if target in _LOGIC and _is_bool(n):
            doubt = sum((p[1] for p in pairs), torch.zeros(())) != 0
            return value, doubt.expand_as(value)
        if target in _EXACT:
            return value, target(*errors, **kwargs)
        if target in _TAKEN:
            return value, target(errors[0], *typed[1:], **options)
        if target in _ORDERED:
            first: _Pair = self.env[n.args[0]]
            return value, _ordered(n, *first, value)
        if isinstance(value, tuple):
            return value, self._perturbed_parts(target, typed, errors, options, value)
        if target in ops.COMPARISONS:
            return value, _doubt(args[0], args[1], sum(p[1] for p in pairs))
        if target in ops.SELECT:
            return value, _selected((typed[0], *args[1:]), errors)
        stored = self._stored(value.float())
        if target in _LAYERS:
            return value, self._layer(target, args, errors, kwargs, ops.fan_in(n)) + stored
        if target in _PRODUCTS:
            (a, b), (ea, eb) = args, errors
            sums = target(a.abs(), eb) + target(ea, b.abs())
            return value, sums + self._sum(target(a.abs(), b.abs()), ops.fan_in(n)) + stored
        if target in _SUMS:
            x: Any = n.args[0]
            terms = x.meta["val"].numel() / max(n.meta["val"].numel(), 1)
            magnitude = target(args[0].abs(), *args[1:], **kwargs)
            error = target(errors[0], *args[1:], **kwargs)
            return value, error + self._sum(magnitude, terms) + stored
        if target in (aten.add.Tensor, aten.sub.Tensor):
            error = sum((p[1] for p in pairs), torch.zeros(()))
            return value, error.expand_as(value) + stored
        if target is aten.mul.Tensor:
            return value, self._factor(args, errors) + stored
        if target is aten.batch_norm.default:
            return value, self._batch_norm(args, errors) + 4 * stored
        return value, _perturbed(target, typed, errors, options, value) + 4 * stored

    def _neuron_step(self, n: Node) -> _Pair:
        (x, ex), (state, error) = (self.env[a] for a in n.args[:2])
        neuron = Neuron.from_json(n.args[3], (self.env[p][0] for p in n.args[2]))
        before = tuple(_Bounded(*pair, self._unit) for pair in zip(state, error, strict=True))
        after = _step(neuron, before, _Bounded(x, ex, self._unit), n.args[4])
        return torch.stack([a.value for a in after]), torch.stack([a.error for a in after])

    def _state(self, n: Node) -> _Pair:
        params, spec, layout, T, index = n.args[1:6]
        neuron = Neuron.from_json(spec, (self.env[p][0] for p in params))
        x, error = (steps(part, layout, T) for part in self.env[n.args[0]])
        state = tuple(_Bounded(v, torch.zeros_like(v), self._unit) for v in neuron.initial(x[0]))
        kept = []
        for t in range(T):
            state = _step(neuron, state, _Bounded(x[t], error[t], self._unit), t)
            kept.append(state[index])
        pair = torch.stack([k.value for k in kept]), torch.stack([k.error for k in kept])
        return pair if layout == "stepped" else (pair[0].flatten(0, 1), pair[1].flatten(0, 1))

    def _stored(self, value: torch.Tensor) -> torch.Tensor:
        """u |y|, or half of the smallest number's distance to 0 where y is below normal numbers.

        Infinity, as of a mask of attention, is as exact.
        """
        error = value.abs().mul_(self._unit).clamp_(min=self._least)
        return error.masked_fill_(error.isinf(), 0.0)

    def _sum(self, magnitude: torch.Tensor, terms: float) -> torch.Tensor:
        return CERTAINTY * math.sqrt(terms) * _ACCUMULATOR * magnitude

    def _layer(self, target: Any, args: Any, errors: Any, kwargs: Any, terms: int) -> torch.Tensor:
        x, W, *rest = args
        b, geometry = (rest[0], rest[1:]) if rest else (None, [])

        def apply(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            given = () if b is None and not geometry else (b, *geometry)
            result: torch.Tensor = target(x, W, *given, **kwargs)
            return result

        # It is linear in the input, so that what |W| takes goes through it at once.
        x = x.abs()
        carried = self._sum(x, terms) + errors[0]
        error = apply(carried, W.abs(), None if b is None else self._sum(b.abs(), terms))
        bias = None if b is None else errors[2]
        if _any(errors[1]) or (bias is not None and _any(bias)):
            error += apply(x, errors[1], bias)
        return error

    @staticmethod
    def _factor(args: Any, errors: Any) -> torch.Tensor:
        (a, b), (ea, eb) = args, errors
        error = torch.zeros(())
        if isinstance(a, torch.Tensor):
            error = error + ea * (b.abs() if isinstance(b, torch.Tensor) else abs(b))
        if isinstance(b, torch.Tensor):
            error = error + eb * (a.abs() if isinstance(a, torch.Tensor) else abs(a))
        return error

    def _batch_norm(self, args: Any, errors: Any) -> torch.Tensor:
        x, weight, bias, mean, var, *rest = args

        def positive(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.abs()

        norm: Callable[..., torch.Tensor] = aten.batch_norm.default
        magnitude = norm(x.abs(), positive(weight), positive(bias), -mean.abs(), var, *rest)
        carried = norm(errors[0], positive(weight), None, torch.zeros_like(mean), var, *rest)
        return carried + 4 * self._unit * magnitude

    def _perturbed_parts(
        self, target: Any, args: Any, errors: Any, kwargs: Any, values: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """:func:`_perturbed` of an operator with several results."""

        def one(i: int) -> torch.Tensor:
            def part(*given: Any, **named: Any) -> torch.Tensor:
                result: torch.Tensor = target(*given, **named)[i]
                return result

            stored = 4 * self._stored(values[i].float())
            return _perturbed(part, args, errors, kwargs, values[i]) + stored

        return tuple(map(one, range(len(values))))


#: Where an operator's numbers end: below 0 there is no root.
_LEAST = {aten.sqrt.default: 0, aten.acosh.default: 1}


def _perturbed(
    target: Any, args: Any, errors: Any, kwargs: Any, value: torch.Tensor
) -> torch.Tensor:
    """An operator without a rule of its own: its answer to its inputs' errors, doubled."""
    if not value.is_floating_point():
        return torch.zeros_like(value, dtype=torch.float32)

    def moved(sign: int) -> torch.Tensor:
        def shift(a: Any, e: Any) -> Any:
            if not isinstance(a, torch.Tensor) or not a.is_floating_point():
                return a
            shifted = a + sign * e
            if (least := _LEAST.get(target)) is not None:
                return torch.where(a >= least, shifted.clamp(min=least), shifted)
            return shifted

        answer: torch.Tensor = target(*pytree.tree_map(shift, tuple(args), tuple(errors)), **kwargs)
        off = torch.where(answer == value, 0.0, (answer - value).abs())  # both may be infinite
        # Where the errors reach beyond what the operator takes, they bound nothing.
        return torch.where(answer.isnan() & ~value.isnan(), math.inf, off)

    return 2 * torch.maximum(moved(1), moved(-1))


def _ordered(n: Node, x: torch.Tensor, error: torch.Tensor, value: Any) -> Any:
    """What is put in order moves no further than the values; its places may be others where values
    are nearer to one another than that.
    """
    dim = ops.arguments(n)["dim"]
    if dim is None:
        x, error, dim = x.flatten(), error.flatten(), 0
    reach = error.amax(dim, keepdim=True)
    close = x.sort(dim).values.diff(dim=dim) <= 2 * reach
    doubt = (close & (reach > 0)).any(dim, keepdim=True).float() * x.shape[dim]

    def bound(part: torch.Tensor) -> torch.Tensor:
        found = reach if part.is_floating_point() else doubt
        if part.dim() < found.dim():
            found = found.squeeze(dim)
        return found.expand(part.shape)

    return tuple(map(bound, value)) if isinstance(value, tuple) else bound(value)


def _typed(n: Node, value: torch.Tensor) -> Any:
    """A value as an operator takes it: whole numbers and truth values as such."""
    dtype = n.meta["val"].dtype
    return value if dtype.is_floating_point else value.to(dtype)


def _is_bool(n: Node) -> bool:
    return bool(n.meta["val"].dtype == torch.bool)


def _any(errors: torch.Tensor) -> bool:
    """Whether any is another than 0; none is below."""
    return bool(errors.numel()) and bool(errors.amax() != 0)


def _twice(error: torch.Tensor) -> torch.Tensor:
    """The network's own rounding is none of the program's: it comes on top."""
    return 2 * error + torch.finfo(torch.float32).tiny


def _doubt(a: torch.Tensor, b: Any, reach: Any) -> torch.Tensor:
    """1 where a comparison of a and b may come out otherwise, else 0."""
    reach = torch.as_tensor(reach)
    doubt: torch.Tensor = ((a - b).abs() <= reach) & (reach > 0)
    return doubt.float()


def _selected(args: Sequence[Any], errors: Sequence[Any]) -> torch.Tensor:
    """The error of where(condition, a, b): a jump from one to the other where that is in doubt."""
    condition, a, b = args
    doubt, *rest = errors
    ea, eb = (e if isinstance(e, torch.Tensor) else torch.zeros(()) for e in rest)
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return torch.where(doubt != 0, (a - b).abs() + ea + eb, torch.where(condition, ea, eb))


def _step(neuron: Neuron, state: tuple[_Bounded, ...], x: _Bounded, t: int) -> tuple[_Bounded, ...]:
    """The state after a step, with its error."""
    return neuron.step(state, x, neuron.fired, _Bounded.select, t)[1]


def charged(
    neuron: Neuron,
    x_seq: torch.Tensor,
    reach: torch.Tensor,
    spikes: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The potentials that spikes came of, and how far rounding may carry them.

    Where the error of a charge that is not linear outgrows all numbers, the bound is that of its sums.

    Args:
        neuron: The neurons.
        x_seq: Their input [T, N, ...].
        reach: How far that may be off, likewise.
        spikes: What they fired, likewise, each of which resets as it would have.
        dtype: The arithmetic.

    Returns:
        h and its bound, both [T, N, ...].
    """
    unit = torch.finfo(dtype).eps / 2
    fired = [_Bounded(s.float(), torch.zeros(()).expand_as(s), unit) for s in spikes]
    state = tuple(_Bounded(v, torch.zeros_like(v), unit) for v in neuron.initial(x_seq[0]))
    h_seq, bound = torch.empty_like(x_seq), torch.empty_like(x_seq)
    for t, (x, error) in enumerate(zip(x_seq, reach, strict=True)):
        given = fired[t].instead
        # A reset that is taken ahead follows from the potential that it was taken from.
        before = neuron.fired if neuron.reset_at == "ahead" else fired[max(t - 1, 0)].instead
        drive = _Bounded(x, error, unit)
        _, state, h = neuron.step(state, drive, given, _Bounded.select, t, due=before)
        h_seq[t], bound[t] = h.value, h.error
    scale = torch.maximum(h_seq.abs(), x_seq.abs()).cummax(0).values
    rounds = torch.arange(1, len(x_seq) + 1).reshape(-1, *[1] * (x_seq.dim() - 1))
    sums = reach.cumsum(0) + CERTAINTY * unit * rounds * scale
    return h_seq, torch.where(bound.isfinite(), _twice(bound), sums)


class _Bounded(Symbol):
    """A value with its error inside a charge equation."""

    def __init__(self, value: torch.Tensor, error: torch.Tensor, unit: float) -> None:
        self.value, self.error, self.unit = value, error, unit

    def apply(self, op: str, *args: Any) -> _Bounded:
        """The operator's value, with the error that it carries on and its own rounding."""
        values = [a.value if isinstance(a, _Bounded) else a for a in args]
        errors = [a.error if isinstance(a, _Bounded) else 0.0 for a in args]
        function: Any = getattr(torch, op) if op in _FUNCTIONS else getattr(operator, op)
        value = function(*values)
        if op in ("ge", "gt"):
            return _Bounded(value.float(), _doubt(values[0], values[1], sum(errors)), self.unit)
        error = torch.zeros(())
        for sign in (1, -1):
            moved = [v + sign * e for v, e in zip(values, errors, strict=True)]
            error = torch.maximum(error, (function(*moved) - value).abs())
        if op in ("add", "sub", "neg"):
            error = torch.as_tensor(sum(errors)).expand_as(value)
        elif op == "mul":
            (a, b), (ea, eb) = values, errors
            error = abs(a) * eb + abs(b) * ea + ea * eb
        else:
            error = 2 * error
        return _Bounded(value, error + 2 * self.unit * value.abs(), self.unit)

    def instead(self, _: _Bounded) -> _Bounded:
        """Itself, whatever else there is."""
        return self

    @staticmethod
    def select(spikes: _Bounded, yes: Any, no: _Bounded) -> _Bounded:
        """``yes`` where there is a spike, else ``no``."""
        a, ea = (yes.value, yes.error) if isinstance(yes, _Bounded) else (yes, 0.0)
        fired = spikes.value != 0
        error = _selected((fired, a, no.value), (spikes.error, ea, no.error))
        return _Bounded(torch.where(fired, a, no.value), error, spikes.unit)
