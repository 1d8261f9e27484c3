"""Equations as expressions: what a code generator reads, and their derivatives.

A neuron's charge and a surrogate are plain arithmetic on any kind of value. On :class:`Expr` they
write themselves down on a :class:`Tape`, each value once and in an order in which it can be computed;
:func:`backward` adds the derivatives by reverse-mode differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .equations import Symbol
from .surrogates import Surrogate


class Expr(Symbol):
    """One value on a tape.

    Attributes:
        op: ``const``, ``input``, an operation of :class:`~.equations.Symbol`, ``detach``, ``fire_ge``
            or ``fire_gt`` (1 where h crosses the threshold, of arguments h and threshold).
        args: Its arguments.
        value: The number of a ``const``, the name of an ``input``, or the surrogate of a ``fire``.
    """

    __slots__ = ("args", "index", "op", "tape", "value")

    def __init__(self, tape: Tape, op: str, args: tuple[Expr, ...], value: Any, index: int) -> None:
        self.tape, self.op, self.args, self.value, self.index = tape, op, args, value, index

    def apply(self, op: str, *args: Any) -> Expr:
        """The expression for an operation."""
        return self.tape.emit(op, *args)

    def detach(self) -> Expr:
        """The same value, through which no derivative passes."""
        return self.tape.emit("detach", self)

    def __repr__(self) -> str:
        inner = self.value if self.op in ("const", "input") else ", ".join(map(repr, self.args))
        return f"{self.op}({inner})"


_FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "abs": abs,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "exp": math.exp,
    "tanh": math.tanh,
    "relu": lambda a: max(a, 0.0),
}


class Tape:
    """Expressions in the order of their creation, equal ones being one."""

    def __init__(self) -> None:
        self.exprs: list[Expr] = []
        self._known: dict[Any, Expr] = {}

    def const(self, value: float) -> Expr:
        """A number."""
        return self._new("const", (), float(value))

    def input(self, name: str) -> Expr:
        """A value that is given."""
        return self._new("input", (), name)

    def lift(self, value: Any) -> Expr:
        """A number as an expression; an expression as it is."""
        return value if isinstance(value, Expr) else self.const(value)

    def fire(self, h: Expr, threshold: Any, fires: str, surrogate: Surrogate | None) -> Expr:
        """1 where h crosses the threshold, else 0; its derivative is the surrogate's."""
        op = "fire_ge" if fires == ">=" else "fire_gt"
        return self._new(op, (h, self.lift(threshold)), surrogate)

    def emit(self, op: str, *args: Any) -> Expr:
        """An operation on expressions and numbers; what changes no value is left out."""
        exprs = tuple(self.lift(a) for a in args)
        if op in _FOLD and all(e.op == "const" for e in exprs):
            return self.const(_FOLD[op](*(e.value for e in exprs)))
        if (same := _simpler(op, exprs)) is not None:
            return same
        if op == "mul" and any(e.op == "const" and e.value == 0 for e in exprs):
            return self.const(0.0)
        if op == "mul" and (minus := [e for e in exprs if e.op == "const" and e.value == -1]):
            return self.emit("neg", exprs[1] if minus[0] is exprs[0] else exprs[0])
        if op == "add" and (less := [e for e in exprs if e.op == "neg"]):
            return self.emit("sub", exprs[1] if less[0] is exprs[0] else exprs[0], less[0].args[0])
        if op == "sub" and exprs[1].op == "neg":
            return self.emit("add", exprs[0], exprs[1].args[0])
        if op == "sub" and exprs[0].op == "const" and exprs[0].value == 0:
            return self.emit("neg", exprs[1])
        if op == "pow" and exprs[1].value == 2:
            return self.emit("mul", exprs[0], exprs[0])
        if op == "div" and exprs[1].op == "const" and _power_of_two(exprs[1].value):
            return self.emit("mul", exprs[0], 1.0 / exprs[1].value)  # exact, and cheaper
        return self._new(op, exprs, None)

    def _new(self, op: str, args: tuple[Expr, ...], value: Any) -> Expr:
        shown = repr(value) if op == "const" else value if isinstance(value, str) else id(value)
        key = (op, tuple(a.index for a in args), shown)
        if key not in self._known:
            self._known[key] = Expr(self, op, args, value, len(self.exprs))
            self.exprs.append(self._known[key])
        return self._known[key]


def _simpler(op: str, args: tuple[Expr, ...]) -> Expr | None:
    """The argument that an operation gives back unchanged, if it does."""
    if op in ("add", "sub", "mul", "div", "pow"):
        a, b = args
        neutral = 0.0 if op in ("add", "sub") else 1.0
        if b.op == "const" and b.value == neutral:
            return a
        if op in ("add", "mul") and a.op == "const" and a.value == neutral:
            return b
    if op == "neg" and args[0].op == "neg":
        return args[0].args[0]
    if op == "detach" and args[0].op in ("const", "detach"):
        return args[0]
    if op == "where" and args[1] is args[2]:
        return args[1]
    return None


def _power_of_two(value: float) -> bool:
    return value != 0 and abs(math.frexp(value)[0]) == 0.5


def backward(
    tape: Tape,
    seeds: Mapping[Expr, Expr],
    wrt: Iterable[Expr],
    idle: Mapping[Expr, Expr] | None = None,
    finite: Callable[[Expr], Expr] = lambda factor: factor,
) -> list[Expr]:
    """The derivatives of the sum of ``seeds[y] * y`` in ``wrt``, as further expressions.

    A value that has a derivative for none of the seeds gets the constant 0. ``idle`` are further seeds,
    which are 0 where ``finite`` makes a factor finite: they then add nothing, not even 0 times infinity.
    """
    grads: dict[int, Expr] = {}
    live: set[int] = set()

    def add(to: Expr, grad: Expr, alive: bool) -> None:
        if not (grad.op == "const" and grad.value == 0):
            grads[to.index] = grads[to.index] + grad if to.index in grads else grad
            live.update((to.index,) if alive else ())

    for y, seed in seeds.items():
        add(y, seed, alive=True)
    for y, seed in (idle or {}).items():
        add(y, seed, alive=False)
    last = max((y.index for y in (*seeds, *(idle or ()))), default=-1)
    for e in reversed(tape.exprs[: last + 1]):
        if e.index in grads:
            alive = e.index in live
            partials = _partials(tape, e, grads[e.index], (lambda f: f) if alive else finite)
            for arg, grad in zip(e.args, partials, strict=True):
                if grad is not None:
                    add(arg, grad, alive)
    return [grads.get(w.index, tape.const(0.0)) for w in wrt]


def _partials(
    tape: Tape, e: Expr, g: Expr, finite: Callable[[Expr], Expr]
) -> tuple[Expr | None, ...]:
    """What the derivative g of a result gives each of its arguments, by factors that are made finite."""
    if not e.args:
        return ()
    a, b = (*e.args, *e.args)[:2]  # b is for operations of two arguments
    zero = tape.const(0.0)
    if e.op.startswith("fire") and e.value is not None:
        through = g * finite(e.value.derivative(a - b))
        return through, -through
    rules: dict[str, Callable[[], tuple[Any, ...]]] = {
        "add": lambda: (g, g),
        "sub": lambda: (g, -g),
        "mul": lambda: (g * finite(b), g * finite(a)),
        "div": lambda: (g / finite(b), -g * finite(e) / finite(b)),
        "pow": lambda: (g * (b * tape.emit("pow", finite(a), b.value - 1)), None),
        "neg": lambda: (-g,),
        # g times the sign, which is 0 for 0 and NaN: g - g, as infinity times 0 is no number.
        "abs": lambda: (tape.emit("where", a > 0, g, tape.emit("where", a < 0, -g, g - g)),),
        "sigmoid": lambda: (g * finite(e * (1 - e)),),
        "exp": lambda: (g * finite(e),),
        "tanh": lambda: (g * finite(1 - e * e),),
        "relu": lambda: (tape.emit("where", a <= 0, zero, g),),
        "where": lambda: (None, tape.emit("where", a, g, zero), tape.emit("where", a, zero, g)),
    }
    # Comparisons, and what is detached, pass nothing on.
    return rules[e.op]() if e.op in rules else (None,) * len(e.args)


def needed(results: Iterable[Expr]) -> list[Expr]:
    """What the results are computed from, in an order in which it can be computed."""
    found: dict[int, Expr] = {}
    stack = list(results)
    while stack:
        e = stack.pop()
        if e.index not in found:
            found[e.index] = e
            stack.extend(e.args)
    return [found[i] for i in sorted(found)]
