"""Charge equations: how a kind of neuron is declared, checked and found again by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
relu = _unary("relu", lambda a: max(a, 0.0))


def where(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` where the condition holds, else ``no``, element by element; for surrogates."""
    if isinstance(condition, Symbol):
        return condition.apply("where", condition, yes, no)
    return torch.where(condition, yes, no)


def constant(like: Any, value: float) -> Any:
    """``value`` in the shape and dtype of ``like``, whatever that holds; for surrogates."""
    return 0.0 * like + value if isinstance(like, Symbol) else torch.full_like(like, value)


#: The previous step's spikes, as the name of a state.
SPIKES = "s"


class Symbol:
    """A value inside a charge equation that is not a number yet: arithmetic on it calls ``apply``."""

    def apply(self, op: str, *args: Any) -> Any:
        """The symbol for ``op`` of args.

        In a charge equation add, sub, mul, div, pow, neg, abs, relu, sigmoid, exp or tanh; in a surrogate
        lt, le, gt, ge and where too.
        """
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

    def __lt__(self, other: Any) -> Any:
        return self.apply("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return self.apply("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return self.apply("gt", self, other)

    def __ge__(self, other: Any) -> Any:
        return self.apply("ge", self, other)

    def relu(self) -> Any:
        """It where it is above 0, else 0."""
        return self.apply("relu", self)

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
        raise TypeError("the equation decides on the value of v or x, which has no derivative")

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
        if op in ("lt", "le", "gt", "ge", "where"):
            raise TypeError("the equation decides on the value of v or x, which has no derivative")
        if op == "pow" and not isinstance(args[1], (int, float)):
            raise TypeError("an exponent is a number")
        return self


@dataclass(frozen=True)
class Dynamics:
    """One kind of neuron.

    Attributes:
        name: Its name in the field, unique.
        charge: ``charge(v, *states, x, **parameters)`` -> h, or (h, *states) where there are any;
            plain arithmetic and the functions of this module.
        parameters: Names of the parameters of ``charge``.
        defaults: Values of those that have one.
        states: What a neuron keeps besides v, with the values before the first step: numbers, or
            names of parameters. ``s`` is the spikes of the step before, which the charge takes and does
            not give.
        potentials: Those of the parameters that are potentials, in the unit of v and x.
        homogeneous: Whether scaling v, x and the potentials scales the charge alike.
    """

    name: str
    charge: Callable[..., Any]
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any]
    states: Mapping[str, float | str] = field(default_factory=dict)
    potentials: tuple[str, ...] = ()
    homogeneous: bool = False

    def __call__(
        self, state: tuple[Any, ...], x: Any, params: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The state (v, *states) after charging; v as h, and ``s`` as it was."""
        h = self.charge(*state, x, **params)
        if not self.states:
            return (h,)
        charged = list(h if isinstance(h, tuple) else (h,))
        if SPIKES in self.states:
            at = 1 + [*self.states].index(SPIKES)
            charged.insert(at, state[at])
        return tuple(charged)

    def __reduce__(self) -> Any:
        # A charge equation is found by name, also where it was declared inside a function.
        return named, (self.name,)


_REGISTRY: dict[str, Dynamics] = {}


@overload
def dynamics(charge: Callable[..., Any]) -> Dynamics: ...
@overload
def dynamics(
    *,
    states: Mapping[str, float | str] = ...,
    potentials: tuple[str, ...] | None = ...,
) -> Callable[[Callable[..., Any]], Dynamics]: ...
def dynamics(
    charge: Callable[..., Any] | None = None,
    *,
    states: Mapping[str, float | str] | None = None,
    potentials: tuple[str, ...] | None = None,
) -> Dynamics | Callable[[Callable[..., Any]], Dynamics]:
    """Declare a kind of neuron from its charge equation ``charge(v, x, *, parameters...)``.

    Used as ``@dynamics``, or with more said:

    - ``@dynamics(potentials=("v_rest",))``: the charge is homogeneous, that is, scaling v, x and those
      parameters scales it alike, so that the scale of a batch norm can be absorbed. That is checked on
      the spot.
    - ``@dynamics(states={"w": 0.0})``: a neuron keeps w besides v, from 0 on, or from its parameter
      w_rest on with ``"w_rest"``: ``charge(v, w, x, *, ...) -> (h, w)``. A state called ``s`` is the
      spikes of the step before, which the charge takes and does not give: ``w + b * s`` is a jump of w
      at each spike.

    The positional arguments are the membrane potential, the states and the input, [N, ...]; the rest are
    keyword-only parameters: numbers, tensors that broadcast against x[t], or flags (bool), which may
    choose between forms of the equation.

    Raises:
        UsageError: The signature is another, a name is taken, or the equation is not plain arithmetic.
    """
    if charge is None:
        return lambda equation: _declare(equation, dict(states or {}), potentials)
    return _declare(charge, {}, None)


def _declare(
    charge: Callable[..., Any], states: dict[str, float | str], potentials: tuple[str, ...] | None
) -> Dynamics:
    name = charge.__name__
    signature = inspect.signature(charge).parameters.values()
    positional = [p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [p for p in signature if p.kind is p.KEYWORD_ONLY]
    wanted = ["v", *states, "x"]
    if positional != wanted or len(positional) + len(keyword) != len(signature):
        raise UsageError(
            f"dynamics {name}: the signature is {inspect.signature(charge)}; write "
            f"def {name}({', '.join(wanted)}, *, tau, ...): membrane potential, "
            f"{'states, ' if states else ''}input, then keyword-only parameters"
        )
    if taken := [n for n in (*states, *(p.name for p in keyword)) if n in POPULATION]:
        raise UsageError(
            f"dynamics {name}: {', '.join(taken)} belong to the population, not to the charge "
            "equation; a leak towards a potential is called v_rest"
        )
    names = tuple(p.name for p in keyword)
    known = (*names, *(value for value in states.values() if isinstance(value, (int, float))))
    if wrong := [n for n, value in states.items() if value not in known]:
        raise UsageError(
            f"dynamics {name}: {', '.join(wrong)} must start from a number or a parameter"
        )
    if states.get(SPIKES, 0.0) != 0.0:
        raise UsageError(
            f"dynamics {name}: before the first step there is no spike; start s from 0"
        )
    if name in _REGISTRY and _source(_REGISTRY[name].charge) != _source(charge):
        raise UsageError(f"dynamics {name} is declared already, with another equation; rename one")
    defaults = {p.name: p.default for p in keyword if p.default is not p.empty}
    if unknown := set(potentials or ()) - set(names):
        raise UsageError(
            f"dynamics {name}: {', '.join(sorted(unknown))} is no parameter; "
            f"there are {', '.join(names) or 'none'}"
        )
    homogeneous = potentials is not None
    declared = Dynamics(name, charge, names, defaults, states, potentials or (), homogeneous)
    _probe(declared)
    return registered(declared)


def registered(declared: Dynamics) -> Dynamics:
    """This kind, which :func:`named` finds from now on."""
    _REGISTRY[declared.name] = declared
    return declared


def _source(function: Callable[..., Any]) -> tuple[Any, ...]:
    """All that decides what a function computes; equal for one that is defined anew."""
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return (code.co_code, code.co_consts, code.co_names, function.__kwdefaults__, cells)


_ARITHMETIC = "plain arithmetic (+ - * / **, abs, and neurons.exp, relu, sigmoid, tanh)"


def _probe(declared: Dynamics) -> None:
    """Evaluate the equation on tensors and on symbols, so that a wrong one is reported here."""
    name, count = declared.name, 1 + len(declared.states)
    x, state = torch.full((2, 3), 0.5), tuple(torch.zeros(2, 3) for _ in range(count))
    given = {n: declared.defaults.get(n, 2.0) for n in declared.parameters}
    try:
        result = declared.charge(*state, x, **given)
        charged = declared(state, x, given)
    except Exception as error:
        raise UsageError(
            f"dynamics {name}: the equation fails: {error}; allowed: {_ARITHMETIC} on its arguments, "
            "and no branch on their values"
        ) from error
    gives = ["h", *(n for n in declared.states if n != SPIKES)]
    if len(charged) != count or (len(gives) > 1) != isinstance(result, tuple):
        raise UsageError(
            f"dynamics {name}: the equation gives "
            f"{len(result) if isinstance(result, tuple) else 'one'} value(s); it must give "
            f"{', '.join(gives)}"
        )
    for part in charged:
        if not isinstance(part, torch.Tensor) or part.shape != x.shape:
            raise UsageError(
                f"dynamics {name}: the equation gives {type(part).__name__} of shape "
                f"{tuple(getattr(part, 'shape', ()))} for v and x of shape (2, 3); it must keep the "
                "shape"
            )
    try:
        # The first step starts from constants, the others from symbols.
        starts = (state, tuple(_Probe() for _ in range(count)))
        results = [declared(start, _Probe(), given)[0] for start in starts]
    except Exception as error:
        raise UsageError(
            f"dynamics {name}: the equation must be {_ARITHMETIC}, which every target has and which has a "
            f"derivative: {str(error).splitlines()[0]}"
        ) from error
    if not all(isinstance(result, Symbol) for result in results):
        raise UsageError(f"dynamics {name}: the equation does not use the input x")
    if declared.homogeneous:
        _probe_homogeneous(declared, given)


def _probe_homogeneous(declared: Dynamics, given: Mapping[str, Any]) -> None:
    """Check that scaling v, the states, x and the potentials scales the charge alike."""
    x = torch.full((2, 3), 0.5)
    state = [
        torch.linspace(-1, 1, 6).reshape(2, 3) * (i + 1) for i in range(1 + len(declared.states))
    ]
    names = ("v", *declared.states)
    scaled = [part if n == SPIKES else 2 * part for n, part in zip(names, state, strict=True)]
    doubled = {k: 2 * p if k in declared.potentials else p for k, p in given.items()}
    once, twice = declared(tuple(state), x, given), declared(tuple(scaled), 2 * x, doubled)
    alike = all(
        n == SPIKES or torch.allclose(2 * a, b) for n, a, b in zip(names, once, twice, strict=True)
    )
    starts = {value for value in declared.states.values() if value not in declared.potentials}
    if not alike or any(starts):
        raise UsageError(
            f"dynamics {declared.name}: the charge is not homogeneous in v, its states, x and "
            f"{', '.join(declared.potentials) or 'no parameter'}; name all its potentials, or "
            "declare it without"
        )


def named(name: str) -> Dynamics:
    """The dynamics declared under this name."""
    if name not in _REGISTRY:
        raise UsageError(f"no dynamics {name!r} is declared; there are {', '.join(_REGISTRY)}")
    return _REGISTRY[name]
