"""Elementwise ATen operators in ONNX, one small function each.

An exporter takes the emitter and a node and gives the name of the node's value, or those of its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...converters import ops
from ...converters.ops import Node, aten
from .export import Emitter, NotInOnnx

#: Of an operator with one result.
One = Callable[[Emitter, Node], str]
Exporter = One | Callable[[Emitter, Node], list[str]]


def dtype_of(n: Node) -> torch.dtype:
    """Of the elements of a node's value."""
    dtype: torch.dtype = n.meta["val"].dtype
    return dtype


def argument(n: Node, index: int, name: str, default: Any) -> Any:
    """An argument given by position or by name."""
    return n.args[index] if len(n.args) > index else n.kwargs.get(name, default)


def arguments(n: Node, required: int, *defaults: Any) -> list[Any]:
    """All of a node's arguments, those that are left out by default."""
    given = list(n.args)
    return [*given, *defaults[len(given) - required :]]


def each(value: Any, count: int) -> list[int]:
    """A number, or a list of one, for each of the spatial dimensions."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values


def _unary(op: str) -> Exporter:
    return lambda e, n: e(op, e.value(n.args[0], dtype_of(n)))


def _binary(op: str) -> One:
    return lambda e, n: e(op, *(e.value(a, dtype_of(n)) for a in n.args[:2]))


def _sum_with(op: str) -> Exporter:
    """Add or sub, whose second operand has a factor."""

    def emit(e: Emitter, n: Node) -> str:
        a, b = (e.value(x, dtype_of(n)) for x in n.args[:2])
        alpha = n.kwargs.get("alpha", 1)
        return e(op, a, b if alpha == 1 else e("Mul", b, e.value(alpha, dtype_of(n))))

    return emit


def _reversed_sub(e: Emitter, n: Node) -> str:
    if n.kwargs.get("alpha", 1) != 1 or len(n.args) > 2:
        raise NotInOnnx("rsub with alpha")
    return e("Sub", e.value(n.args[1], dtype_of(n)), e.value(n.args[0], dtype_of(n)))


def _floor_division(e: Emitter, n: Node) -> str:
    """floor(a / b) as torch computes it: from a less its remainder, which a multiple of b divides."""
    dtype = dtype_of(n)
    if not dtype.is_floating_point:
        return _whole_floor(e, n)
    a, b = (e.value(x, dtype) for x in n.args[:2])
    rest = _modulus(e, n)
    quotient = e("Div", e("Sub", a, rest), b)
    one, half = e.value(1, dtype), e.value(0.5, dtype)
    quotient = e("Where", _opposite(e, rest, b, dtype), e("Sub", quotient, one), quotient)
    floor = e("Floor", quotient)
    floor = e("Where", e("Greater", e("Sub", quotient, floor), half), e("Add", floor, one), floor)
    return e("Where", e("Equal", b, e.value(0, dtype)), e("Div", a, b), floor)


def _whole_floor(e: Emitter, n: Node) -> str:
    """floor(a / b) of whole numbers, which ONNX's own division rounds towards zero."""
    a, b, wide = _whole_operands(e, n)
    opposite = _opposite(e, e("Mod", a, b, fmod=1), b, wide)
    quotient = e("Sub", e("Div", a, b), e.cast(opposite, torch.bool, wide))
    return e.cast(quotient, wide, dtype_of(n))


def _whole_quotient(e: Emitter, n: Node) -> str:
    """a / b of whole numbers towards zero; any other rounding has another spelling."""
    a, b, wide = _whole_operands(e, n)
    return e.cast(e("Div", a, b), wide, dtype_of(n))


def _whole_operands(e: Emitter, n: Node) -> tuple[str, str, torch.dtype]:
    """A whole number and a divisor that is known not to be 0, and their type."""
    divisor = n.args[1]
    known = e.tensor(divisor) if isinstance(divisor, fx.Node) else torch.tensor(divisor)
    if known is None or not known.all():
        raise NotInOnnx("division of whole numbers by what is computed, and may be 0")
    wide = torch.int64 if dtype_of(n) == torch.int64 else torch.int32
    a, b = (e.value(x, wide) for x in n.args[:2])
    return a, b, wide


def _opposite(e: Emitter, rest: str, divisor: str, dtype: torch.dtype) -> str:
    """Where a remainder that is not 0 has another sign than the divisor."""
    zero = e.value(0, dtype)
    differs = e("Xor", e("Less", rest, zero), e("Less", divisor, zero))
    return e("And", differs, e("Not", e("Equal", rest, zero)))


def _towards_zero(e: Emitter, x: str) -> str:
    return e("Mul", e("Sign", x), e("Floor", e("Abs", x)))


def _truncation(e: Emitter, n: Node) -> str:
    return _towards_zero(e, e.value(n.args[0], dtype_of(n)))


def _modulus(e: Emitter, n: Node) -> str:
    """The remainder with the sign of the dividend, as C's fmod."""
    return e("Mod", *(e.value(a, dtype_of(n)) for a in n.args[:2]), fmod=1)


def _remainder(e: Emitter, n: Node) -> str:
    """The remainder with the sign of the divisor, as Python's %."""
    dtype = dtype_of(n)
    divisor, rest = e.value(n.args[1], dtype), _modulus(e, n)
    return e("Where", _opposite(e, rest, divisor, dtype), e("Add", rest, divisor), rest)


def _compare(op: str, negated: bool = False) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        dtype = torch.result_type(
            *(a.meta["val"] if isinstance(a, fx.Node) else a for a in n.args[:2])
        )
        if dtype == torch.bool and op != "Equal":
            dtype = torch.int32
        result = e(op, *(e.value(a, dtype) for a in n.args[:2]))
        return e("Not", result) if negated else result

    return emit


def _logical(op: str) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        return e(op, *(e.value(a, torch.bool) for a in n.args))

    return emit


def _where(e: Emitter, n: Node) -> str:
    condition, *sides = n.args
    return e("Where", condition, *(e.value(a, dtype_of(n)) for a in sides))


def _cast(e: Emitter, n: Node) -> str:
    x = n.args[0]
    return e.cast(e.value(x), dtype_of(x), dtype_of(n))


def _power(e: Emitter, n: Node) -> str:
    x, exponent = n.args
    if exponent == 2:
        return e("Mul", e.value(x, dtype_of(n)), e.value(x, dtype_of(n)))
    return _binary("Pow")(e, n)


def _clip(low: int | None, high: int | None) -> Exporter:
    """Clamp between arguments of these numbers."""

    def emit(e: Emitter, n: Node) -> str:
        def bound(index: int | None, name: str) -> Any:
            return None if index is None else argument(n, index, name, None)

        result = e.value(n.args[0], dtype_of(n))
        for op, given in (("Max", bound(low, "min")), ("Min", bound(high, "max"))):
            if given is not None:
                result = e(op, result, e.value(given, dtype_of(n)))
        return result

    return emit


def _reciprocal_root(e: Emitter, n: Node) -> str:
    return e("Reciprocal", e("Sqrt", n.args[0]))


def _gelu(e: Emitter, n: Node) -> str:
    x, dtype = n.args[0], dtype_of(n)
    if n.kwargs.get("approximate", "none") == "tanh":
        cube = e("Mul", e("Mul", x, x), e("Mul", x, e.value(0.044715, dtype)))
        scaled = e("Mul", e("Add", x, cube), e.value(math.sqrt(2 / math.pi), dtype))
        inner = e("Tanh", scaled)
    else:
        inner = e("Erf", e("Mul", x, e.value(math.sqrt(0.5), dtype)))
    half = e("Mul", x, e.value(0.5, dtype))
    return e("Mul", half, e("Add", inner, e.value(1.0, dtype)))


def _leaky_relu(e: Emitter, n: Node) -> str:
    return e("LeakyRelu", n.args[0], alpha=float(argument(n, 1, "negative_slope", 0.01)))


def _elu(e: Emitter, n: Node) -> str:
    alpha, scale, input_scale = arguments(n, 1, 1, 1, 1)[1:]
    if scale != 1 or input_scale != 1:
        raise NotInOnnx("elu with other factors than alpha")
    return e("Elu", n.args[0], alpha=float(alpha))


def _softplus(e: Emitter, n: Node) -> str:
    x, beta, threshold = arguments(n, 1, 1, 20)
    dtype = dtype_of(n)
    scaled = x if beta == 1 else e("Mul", x, e.value(beta, dtype))
    result = e("Softplus", scaled)
    result = result if beta == 1 else e("Div", result, e.value(beta, dtype))
    if threshold >= 20:  # above it float32 rounds to x itself
        return result
    return e("Where", e("Greater", scaled, e.value(threshold, dtype)), x, result)


def _mish(e: Emitter, n: Node) -> str:
    return e("Mul", n.args[0], e("Tanh", e("Softplus", n.args[0])))


POINTWISE: dict[Any, Exporter] = {
    aten.add.Tensor: _sum_with("Add"),
    aten.add.Scalar: _sum_with("Add"),
    aten.sub.Tensor: _sum_with("Sub"),
    aten.sub.Scalar: _sum_with("Sub"),
    aten.rsub.Scalar: _reversed_sub,
    aten.rsub.Tensor: _reversed_sub,
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.div.Scalar: _binary("Div"),
    aten.div.Tensor_mode: _whole_quotient,
    aten.floor_divide.default: _floor_division,
    aten.fmod.Scalar: _modulus,
    aten.fmod.Tensor: _modulus,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.pow.Scalar: _binary("Pow"),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.neg.default: _unary("Neg"),
    aten.abs.default: _unary("Abs"),
    aten.sign.default: _unary("Sign"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.rsqrt.default: _reciprocal_root,
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.sin.default: _unary("Sin"),
    aten.cos.default: _unary("Cos"),
    aten.tan.default: _unary("Tan"),
    aten.asin.default: _unary("Asin"),
    aten.acos.default: _unary("Acos"),
    aten.atan.default: _unary("Atan"),
    aten.sinh.default: _unary("Sinh"),
    aten.cosh.default: _unary("Cosh"),
    aten.asinh.default: _unary("Asinh"),
    aten.acosh.default: _unary("Acosh"),
    aten.atanh.default: _unary("Atanh"),
    aten.erf.default: _unary("Erf"),
    aten.floor.default: _unary("Floor"),
    aten.ceil.default: _unary("Ceil"),
    aten.round.default: _unary("Round"),
    aten.trunc.default: _truncation,
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.tanh.default: _unary("Tanh"),
    aten.relu.default: _unary("Relu"),
    aten.leaky_relu.default: _leaky_relu,
    aten.elu.default: _elu,
    aten.softplus.default: _softplus,
    aten.mish.default: _mish,
    aten.gelu.default: _gelu,
    aten.hardtanh.default: _clip(1, 2),
    aten.clamp.default: _clip(1, 2),
    aten.clamp.Tensor: _clip(1, 2),
    aten.clamp_min.default: _clip(1, None),
    aten.clamp_max.default: _clip(None, 1),
    aten._to_copy.default: _cast,
    # Comparison and selection
    aten.ge.Scalar: _compare("GreaterOrEqual"),
    aten.ge.Tensor: _compare("GreaterOrEqual"),
    aten.gt.Scalar: _compare("Greater"),
    aten.gt.Tensor: _compare("Greater"),
    aten.le.Scalar: _compare("LessOrEqual"),
    aten.le.Tensor: _compare("LessOrEqual"),
    aten.lt.Scalar: _compare("Less"),
    aten.lt.Tensor: _compare("Less"),
    aten.eq.Scalar: _compare("Equal"),
    aten.eq.Tensor: _compare("Equal"),
    aten.ne.Scalar: _compare("Equal", negated=True),
    aten.ne.Tensor: _compare("Equal", negated=True),
    aten.logical_and.default: _logical("And"),
    aten.logical_or.default: _logical("Or"),
    aten.logical_xor.default: _logical("Xor"),
    aten.logical_not.default: _logical("Not"),
    **dict.fromkeys(ops.SELECT, _where),
}
