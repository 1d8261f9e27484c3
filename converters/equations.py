"""Charge equations: how a kind of neuron is declared, checked and found again by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch

from .errors import UsageError

#: What belongs to a population, so that no parameter of a charge equation may be called so.
POPULATION = ("v_threshold", "v_reset", "reset", "reset_at", "fires", "v_0")


# What a charge equation may call besides + - * / ** and abs. Each takes floats, tensors, or the
# symbols of a lowering, which bring these functions as methods, as tensors do.
def _unary(name: str, scalar: Callable[[float], float]) -> Callable[[Any], Any]:
    def apply(a: Any) -> Any:
        return scalar(a) if isinstance(a, (int, float)) else getattr(a, name)()

    apply.__name__ = name
    apply.__doc__ = f"``{name}(a)``, element by element."
    return apply


sigmoid = _unary("sigmoid", lambda a: 1 / (1 + math.exp(-a)))
exp = _unary("exp", math.exp)
tanh = _unary("tanh", math.tanh)


class Symbol:
    """A value inside a charge equation that is not a number yet: arithmetic on it calls ``apply``."""

    def apply(self, op: str, *args: Any) -> Any:
        """The symbol for ``op`` (add, sub, mul, div, pow, neg, abs, sigmoid, exp, tanh) of args."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return self.apply("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return self.apply("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return self.apply("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.apply("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return self.apply("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self.apply("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self.apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self.apply("div", other, self)

    def __pow__(self, other: float) -> Any:
        return self.apply("pow", self, other)

    def __neg__(self) -> Any:
        return self.apply("neg", self)

    def __abs__(self) -> Any:
        return self.apply("abs", self)

    abs = __abs__

    def sigmoid(self) -> Any:
        """The logistic function."""
        return self.apply("sigmoid", self)

    def exp(self) -> Any:
        """e to the power of it."""
        return self.apply("exp", self)

    def tanh(self) -> Any:
        """The hyperbolic tangent."""
        return self.apply("tanh", self)

    def __bool__(self) -> bool:
        raise TypeError("the equation decides on the value of v or x")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Arithmetic between a tensor and a symbol, the tensor on the left."""
        reflected = {
            torch.Tensor.add: cls.__radd__,
            torch.Tensor.sub: cls.__rsub__,
            torch.Tensor.mul: cls.__rmul__,
            torch.Tensor.div: cls.__rtruediv__,
            torch.Tensor.__add__: cls.__radd__,
            torch.Tensor.__sub__: cls.__rsub__,
            torch.Tensor.__mul__: cls.__rmul__,
            torch.Tensor.__truediv__: cls.__rtruediv__,
        }.get(func)
        if reflected is None or isinstance(args[0], Symbol):
            return NotImplemented
        return reflected(args[1], args[0])


class _Probe(Symbol):
    """Any value of the shape of x."""

    def apply(self, op: str, *args: Any) -> Any:
        if op == "pow" and not isinstance(args[1], (int, float)):
            raise TypeError("an exponent is a number")
        return self


@dataclass(frozen=True)
class Dynamics:
    """One kind of neuron.

    Attributes:
        name: Its name in the field, unique.
        charge: ``charge(v, x, **parameters) -> h``, plain arithmetic and the functions of this module.
        parameters: Names of the parameters of ``charge``.
        defaults: Values of those that have one.
        potentials: Those of the parameters that are potentials, in the unit of v and x.
        homogeneous: Whether scaling v, x and the potentials scales the charge alike.
    """

    name: str
    charge: Callable[..., Any]
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any]
    potentials: tuple[str, ...] = ()
    homogeneous: bool = False


_REGISTRY: dict[str, Dynamics] = {}


@overload
def dynamics(charge: Callable[..., Any]) -> Dynamics: ...
@overload
def dynamics(
    *, potentials: tuple[str, ...], homogeneous: bool = ...
) -> Callable[[Callable[..., Any]], Dynamics]: ...
def dynamics(
    charge: Callable[..., Any] | None = None,
    *,
    potentials: tuple[str, ...] = (),
    homogeneous: bool = True,
) -> Dynamics | Callable[[Callable[..., Any]], Dynamics]:
    """Declare a kind of neuron from its charge equation ``charge(v, x, *, parameters...)``.

    Used as ``@dynamics``, or as ``@dynamics(potentials=("v_rest",))`` to say further that the charge
    is homogeneous: scaling v, x and those parameters scales it alike, so that the scale of a batch norm
    can be absorbed. That is checked on the spot.

    The first two arguments are the membrane potential and the input, [N, ...]; the rest are
    keyword-only parameters: numbers, tensors that broadcast against x[t], or flags (bool), which may
    choose between forms of the equation.

    Raises:
        UsageError: The signature is another, a name is taken, or the equation is not plain arithmetic.
    """
    if charge is None:
        return lambda equation: _declare(equation, potentials, homogeneous)
    return _declare(charge, (), homogeneous=False)


def _declare(
    charge: Callable[..., Any], potentials: tuple[str, ...], homogeneous: bool
) -> Dynamics:
    name = charge.__name__
    signature = inspect.signature(charge).parameters.values()
    state = [p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [p for p in signature if p.kind is p.KEYWORD_ONLY]
    if state != ["v", "x"] or len(state) + len(keyword) != len(signature):
        raise UsageError(
            f"dynamics {name}: the signature is {inspect.signature(charge)}; write "
            f"def {name}(v, x, *, tau, ...): membrane potential, input, then keyword-only parameters"
        )
    if taken := [p.name for p in keyword if p.name in POPULATION]:
        raise UsageError(
            f"dynamics {name}: {', '.join(taken)} belong to the population, not to the charge "
            "equation; a leak towards a potential is called v_rest"
        )
    if name in _REGISTRY and _source(_REGISTRY[name].charge) != _source(charge):
        raise UsageError(f"dynamics {name} is declared already, with another equation; rename one")
    defaults = {p.name: p.default for p in keyword if p.default is not p.empty}
    names = tuple(p.name for p in keyword)
    if unknown := set(potentials) - set(names):
        raise UsageError(
            f"dynamics {name}: {', '.join(sorted(unknown))} is no parameter; "
            f"there are {', '.join(names) or 'none'}"
        )
    declared = Dynamics(name, charge, names, defaults, tuple(potentials), homogeneous)
    _probe(declared)
    _REGISTRY[name] = declared
    return declared


def _source(function: Callable[..., Any]) -> tuple[Any, ...]:
    """All that decides what a function computes; equal for one that is defined anew."""
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return (code.co_code, code.co_consts, code.co_names, function.__kwdefaults__, cells)


def _probe(declared: Dynamics) -> None:
    """Evaluate the equation on tensors and on symbols, so that a wrong one is reported here."""
    x, v = torch.full((2, 3), 0.5), torch.zeros(2, 3)
    given = {name: declared.defaults.get(name, 2.0) for name in declared.parameters}
    try:
        h = declared.charge(v, x, **given)
    except Exception as error:
        raise UsageError(f"dynamics {declared.name}: the equation fails: {error}") from error
    if not isinstance(h, torch.Tensor) or h.shape != x.shape:
        raise UsageError(
            f"dynamics {declared.name}: the equation gives {type(h).__name__} of shape "
            f"{tuple(getattr(h, 'shape', ()))} for v and x of shape (2, 3); it must keep the shape"
        )
    try:
        # The first step starts from a constant, the others from a symbol.
        results = [declared.charge(start, _Probe(), **given) for start in (v, _Probe())]
    except Exception as error:
        raise UsageError(
            f"dynamics {declared.name}: the equation must be plain arithmetic (+ - * / **, abs, and "
            f"neurons.exp, sigmoid, tanh), which every target has: {error}"
        ) from error
    if not all(isinstance(result, Symbol) for result in results):
        raise UsageError(f"dynamics {declared.name}: the equation does not use the input x")
    if declared.homogeneous:
        v = torch.linspace(-1, 1, 6).reshape(2, 3)
        doubled = {k: 2 * p if k in declared.potentials else p for k, p in given.items()}
        once, twice = declared.charge(v, x, **given), declared.charge(2 * v, 2 * x, **doubled)
        if not torch.allclose(2 * once, twice):
            raise UsageError(
                f"dynamics {declared.name}: the charge is not homogeneous in v, x and "
                f"{', '.join(declared.potentials) or 'no parameter'}; name all its potentials, or "
                "declare it without"
            )


def named(name: str) -> Dynamics:
    """The dynamics declared under this name."""
    if name not in _REGISTRY:
        raise UsageError(f"no dynamics {name!r} is declared; there are {', '.join(_REGISTRY)}")
    return _REGISTRY[name]
