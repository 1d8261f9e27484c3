"""Elementwise operators as formulas of simpler ones, for targets that lack them.

Where an exponential is taken, it is of what is not above 0: float16 ends at exp(11).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..equations import Symbol
from ..ops import Node, aten


class Emitter(Protocol):
    """What writes a formula into a graph."""

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call of an operator."""

    def constant(self, name: str, value: torch.Tensor) -> Node:
        """A constant of the graph."""


class Term(Symbol):
    """A value of a graph inside a formula: arithmetic on it emits nodes."""

    def __init__(self, emitter: Emitter, node: Node) -> None:
        self.emitter, self.node = emitter, node

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype

    def apply(self, op: str, *args: Any) -> Term:
        """The operator's node."""
        if op in ("add", "mul") and not isinstance(args[0], Term):
            args = args[::-1]
        elif op == "sub" and not isinstance(args[0], Term):
            return self.apply("add", self.apply("neg", args[1]), args[0])
        elif op == "div" and not isinstance(args[0], Term):
            name = f"number_{args[0]}_{self.dtype}".replace(".", "_")
            number = self.emitter.constant(name, torch.tensor(args[0], dtype=self.dtype))
            args = (Term(self.emitter, number), args[1])
        return self.emit(_overload(op, args), *args)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Term:
        """A call of any operator."""
        given = (a.node if isinstance(a, Term) else a for a in args)
        return Term(self.emitter, self.emitter.emit(target, *given, **kwargs))

    def clamp(self, low: float | None, high: float | None) -> Term:
        """It within bounds, each of them or None."""
        return self.emit(aten.clamp.default, self, low, high)

    def round(self) -> Term:
        """The nearest whole number, of two the even one."""
        return self.emit(aten.round.default, self)

    def like(self, x: Term) -> Term:
        """A condition as 0 and 1 of the type of another value."""
        return self.emit(aten._to_copy.default, self, dtype=x.dtype)


def _overload(op: str, args: tuple[Any, ...]) -> Any:
    """The ATen operator for terms and numbers in these places."""
    number = not isinstance(args[-1], Term)
    if op == "where":
        overloads = {
            (False, False): "self",
            (True, False): "ScalarSelf",
            (False, True): "ScalarOther",
        }
        return getattr(aten.where, overloads[not isinstance(args[1], Term), number])
    if op in ("lt", "le", "gt", "ge", "eq"):
        return getattr(getattr(aten, op), "Scalar" if number else "Tensor")
    return getattr(aten, op).default if len(args) == 1 else getattr(aten, op).Tensor


def where(condition: Term, yes: Term | float, no: Term | float) -> Term:
    """One of two by a condition, one of which is a term at least."""
    return condition.apply("where", condition, yes, no)


def elu(x: Term, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Any:
    """Clevert et al. 2015, arXiv:1511.07289."""
    below = ((x.clamp(None, 0.0) * inner).exp() - 1.0) * (alpha * scale)
    return where(x > 0.0, x * scale, below)


def gelu(x: Term, approximate: str = "none") -> Any:
    """Hendrycks and Gimpel 2016, arXiv:1606.08415, in its form with tanh alone."""
    if approximate != "tanh":
        return None
    inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
    return x * 0.5 * (inner.tanh() + 1.0)


def mish(x: Term) -> Any:
    """Misra 2019, arXiv:1908.08681: x tanh(log(1 + exp x)), without the logarithm."""
    e = (-abs(x)).exp()
    above, below = e * 2.0 + 1.0, (e + 2.0) * e
    return x * where(x > 0.0, above / (above + e * e * 2.0), below / (below + 2.0))


def rrelu(x: Term, lower: float, upper: float, training: bool, _: Any) -> Any:
    """Xu et al. 2015, arXiv:1505.00853, in evaluation."""
    return None if training else leaky_relu(x, (lower + upper) / 2)


def leaky_relu(x: Term, slope: float) -> Any:
    """x where it is above 0, else slope x."""
    return where(x > 0.0, x, x * slope)


def floor(x: Term) -> Any:
    """The largest whole number that is not above x."""
    nearest = x.round()
    return nearest - (nearest > x).like(x)


def ceil(x: Term) -> Any:
    """The smallest whole number that is not below x."""
    nearest = x.round()
    return nearest + (nearest < x).like(x)


def floor_divide(x: Term, y: Term | float) -> Any:
    """The floor of x / y where that division is exact: by a power of 2.

    Other quotients may round up to a whole number that x / y is below. Of infinity it is NaN.
    """
    if isinstance(y, Term) or abs(math.frexp(y)[0]) != 0.5:
        return None
    if isinstance(y, int) and not x.dtype.is_floating_point:
        return None
    return floor(x / float(y)) - (x - x)


def lerp(x: Term, y: Term, weight: Term | float) -> Any:
    """x + weight (y - x), from the nearer end as torch computes it."""
    from_x, from_y = x + (y - x) * weight, y - (y - x) * (1.0 - weight)
    if isinstance(weight, Term):
        return where(abs(weight) < 0.5, from_x, from_y)
    return from_x if abs(weight) < 0.5 else from_y


def hypot(x: Term, y: Term) -> Any:
    """The root of the sum of squares, none of which is larger than 1."""
    above = abs(x) > abs(y)
    large, small = where(above, abs(x), abs(y)), where(above, abs(y), abs(x))
    ratio = small / large
    square = ratio * ratio + 1.0
    whole = large * square.emit(aten.sqrt.default, square)
    return where(large.apply("eq", large, large * 2.0), large, whole)  # 0 and infinity


def copysign(x: Term, y: Term | float) -> Any:
    """The magnitude of x with the sign of y, that of -0 too."""
    size = abs(x)
    if not isinstance(y, Term):
        return size if math.copysign(1.0, y) > 0 else -size
    return where(y.emit(aten.logical_or.default, y < 0.0, 1.0 / y < 0.0), -size, size)


def logaddexp(x: Term, y: Term) -> Any:
    """log(exp x + exp y), from the larger; of equal ones, which may be infinite, one log 2 above."""
    larger = x.emit(aten.maximum.default, x, y)
    rest = x.emit(aten.softplus.default, -abs(x - y))
    return where(x.apply("eq", x, y), x + math.log(2), larger + rest)


def _missing(x: Term) -> Term:
    """Whether it is NaN."""
    return x.emit(aten.ne.Tensor, x, x)


def _either(target: Any) -> Callable[[Term, Term], Term]:
    """The larger or smaller of two, and of a number and NaN the number."""

    def write(x: Term, y: Term) -> Term:
        return where(_missing(x), y, where(_missing(y), x, x.emit(target, x, y)))

    return write


def round_decimals(x: Term, decimals: int) -> Any:
    """The nearest multiple of a power of ten, through the power itself as torch computes it."""
    if decimals == 0:
        return x.round()
    ten = 10.0 ** abs(decimals)
    return (x * ten).round() / ten if decimals > 0 else (x / ten).round() * ten


#: The formula of an operator's arguments, in the order of its schema; None where there is none for them.
FORMULAS: dict[Any, Callable[..., Term | None]] = {
    aten.silu.default: lambda x: x * x.sigmoid(),
    aten.gelu.default: gelu,
    aten.elu.default: elu,
    aten.celu.default: lambda x, alpha: elu(x, alpha, 1.0, 1 / alpha),
    # Klambauer et al. 2017, arXiv:1706.02515
    aten.selu.default: lambda x: elu(x, 1.6732632423543772, 1.0507009873554805),
    aten.mish.default: mish,
    aten.leaky_relu.default: leaky_relu,
    aten.rrelu.default: rrelu,
    aten.hardtanh.default: Term.clamp,
    aten.relu6.default: lambda x: x.clamp(0.0, 6.0),
    aten.clip.default: Term.clamp,
    aten.hardsigmoid.default: lambda x: (x + 3.0).clamp(0.0, 6.0) / 6.0,
    aten.hardswish.default: lambda x: x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
    aten.threshold.default: lambda x, threshold, value: where(x <= threshold, value, x),
    aten.square.default: lambda x: x * x,
    aten.reciprocal.default: lambda x: 1.0 / x,
    aten.exp2.default: lambda x: (x * math.log(2)).exp(),
    aten.expm1.default: lambda x: x.exp() - 1.0,
    aten.log_sigmoid.default: lambda x: -x.emit(aten.softplus.default, -x),
    aten.heaviside.default: lambda x, at_0: where(x.apply("eq", x, 0.0), at_0, (x > 0.0).like(x)),
    aten.sign.default: lambda x: (x > 0.0).like(x) - (x < 0.0).like(x),
    aten.floor.default: floor,
    aten.ceil.default: ceil,
    aten.trunc.default: lambda x: where(x < 0.0, ceil(x), floor(x)),
    aten.floor_divide.default: floor_divide,
    aten.lerp.Scalar: lerp,
    aten.lerp.Tensor: lerp,
    aten.addcmul.default: lambda x, a, b, value: x + a * b * value,
    aten.addcdiv.default: lambda x, a, b, value: x + a / b * value,
    aten.copysign.Tensor: copysign,
    aten.copysign.Scalar: copysign,
    aten.hypot.default: hypot,
    aten.isnan.default: _missing,
    aten.isinf.default: lambda x: x.apply("eq", abs(x), math.inf),
    aten.isposinf.default: lambda x: x.apply("eq", x, math.inf),
    aten.isneginf.default: lambda x: x.apply("eq", x, -math.inf),
    aten.log2.default: lambda x: x.emit(aten.log.default, x) * (1 / math.log(2)),
    aten.log10.default: lambda x: x.emit(aten.log.default, x) * (1 / math.log(10)),
    aten.erfc.default: lambda x: 1.0 - x.emit(aten.erf.default, x),
    aten.logaddexp.default: logaddexp,
    aten.fmax.default: _either(aten.maximum.default),
    aten.fmin.default: _either(aten.minimum.default),
    aten.round.decimals: round_decimals,
}
