"""Surrogate gradients: what stands in for the derivative of the spike's step, in training only.

Each is declared once, as the derivative that it gives the step at ``u = h - v_threshold``, in plain
arithmetic: the torch path evaluates it on tensors, a target that generates code on symbols. One of
your own takes a function and one line::

    @surrogate
    def Triangle(u, *, width=1.0):
        return where(abs(u) < width, (width - abs(u)) / width**2, 0.0)

    node = IFNode(surrogate=Triangle(width=0.5))
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .equations import Symbol, constant, exp, sigmoid, where
from .errors import UsageError


@dataclass(frozen=True)
class Kind:
    """One kind of surrogate gradient; called with its parameters it gives a :class:`Surrogate`.

    Attributes:
        name: Its name in the field, unique.
        equation: ``equation(u, **parameters)``, the derivative at u.
        defaults: Its parameters with their values.
    """

    name: str
    equation: Callable[..., Any]
    defaults: Mapping[str, float]

    def __call__(self, *values: float, **parameters: float) -> Surrogate:
        """The surrogate with these parameters, the others at their defaults.

        Raises:
            UsageError: A parameter is unknown or no finite number.
        """
        given = dict(zip(self.defaults, values, strict=False)) | parameters
        if len(values) > len(self.defaults) or not given.keys() <= self.defaults.keys():
            raise UsageError(
                f"surrogate {self.name}: got {(*values, *parameters)}; its parameters are "
                f"{', '.join(self.defaults) or 'none'}"
            )
        for name, value in given.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UsageError(f"surrogate {self.name}: {name} is {value!r}; give a number")
        return Surrogate(self, {n: float(given.get(n, v)) for n, v in self.defaults.items()})

    def __reduce__(self) -> Any:
        return named, (self.name,)


@dataclass(frozen=True)
class Surrogate:
    """A surrogate gradient.

    Attributes:
        kind: Its kind.
        parameters: Values of its parameters.
    """

    kind: Kind
    parameters: Mapping[str, float]

    @property
    def name(self) -> str:
        """Its name in the field."""
        return self.kind.name

    def derivative(self, u: Any) -> Any:
        """What stands for the step's derivative at u, a tensor of any shape or a symbol."""
        return self.kind.equation(u, **self.parameters)

    def to_json(self) -> str:
        """One line of JSON; the inverse of :meth:`from_json`."""
        # Without the json module, which torch.compile does not trace.
        values = "".join(f', "{n}": {v!r}' for n, v in self.parameters.items())
        return f'{{"surrogate": "{self.name}"{values}}}'

    @classmethod
    def from_json(cls, text: str) -> Surrogate:
        """The surrogate of :meth:`to_json`.

        Raises:
            UsageError: No surrogate of this name is declared.
        """
        fields: dict[str, Any] = json.loads(text)
        name = fields.pop("surrogate")
        return named(name)(**fields)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{n}={v}' for n, v in self.parameters.items())})"


#: Every surrogate that is declared, by name.
KINDS: dict[str, Kind] = {}


def named(name: str) -> Kind:
    """The surrogate declared under this name."""
    if name not in KINDS:
        raise UsageError(f"no surrogate {name!r} is declared; there are {', '.join(KINDS)}")
    return KINDS[name]


def checked(surrogate: Any) -> Surrogate:
    """This surrogate.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(surrogate, Surrogate):
        given = f"the kind {surrogate.name}" if isinstance(surrogate, Kind) else repr(surrogate)
        raise UsageError(
            f"surrogate is {given}; allowed: a surrogate of spikeport.converters.surrogates with its "
            f"parameters, such as ATan(alpha=2.0); there are {', '.join(KINDS)}"
        )
    return surrogate


class _Probe(Symbol):
    """Any value of the shape of u."""

    def apply(self, op: str, *args: Any) -> Any:
        return self


def surrogate(equation: Callable[..., Any]) -> Kind:
    """Declare a surrogate gradient from its derivative ``equation(u, *, parameters=defaults)``.

    Raises:
        UsageError: The signature is another, the name is taken, or the equation is not plain arithmetic.
    """
    name = equation.__name__
    first, *rest = inspect.signature(equation).parameters.values()
    if first.name != "u" or any(p.kind is not p.KEYWORD_ONLY or p.default is p.empty for p in rest):
        raise UsageError(
            f"surrogate {name}: the signature is {inspect.signature(equation)}; write "
            f"def {name}(u, *, alpha=2.0): u, then keyword-only parameters with their defaults"
        )
    if name in KINDS and KINDS[name].equation.__code__.co_code != equation.__code__.co_code:
        raise UsageError(f"surrogate {name} is declared already; rename one")
    kind = Kind(name, equation, {p.name: float(p.default) for p in rest})
    u = torch.linspace(-2, 2, 5)
    try:
        value = kind().derivative(u)
        kind().derivative(_Probe())
    except Exception as error:
        raise UsageError(
            f"surrogate {name}: the equation must be plain arithmetic (+ - * / **, abs, comparisons "
            f"with where, exp, sigmoid, tanh): {error}"
        ) from error
    if not isinstance(value, torch.Tensor) or value.shape != u.shape:
        raise UsageError(f"surrogate {name}: the equation must keep the shape of u")
    KINDS[name] = kind
    return kind


@surrogate
def ATan(u: Any, *, alpha: float = 2.0) -> Any:  # noqa: N802 -- a kind, named as in the field
    """``alpha / 2 / (1 + (pi / 2 alpha u)^2)``, Fang et al. 2021, arXiv:2007.05785."""
    return alpha / 2 / (1 + (math.pi / 2 * alpha * u) ** 2)


@surrogate
def Sigmoid(u: Any, *, alpha: float = 4.0) -> Any:  # noqa: N802
    """``alpha sigmoid(alpha u) (1 - sigmoid(alpha u))``."""
    s = sigmoid(alpha * u)
    return alpha * s * (1 - s)


@surrogate
def FastSigmoid(u: Any, *, slope: float = 25.0) -> Any:  # noqa: N802
    """``1 / (1 + slope |u|)^2``, SuperSpike, Zenke and Ganguli 2018, arXiv:1705.11146."""
    return 1 / (1 + slope * abs(u)) ** 2


@surrogate
def SoftSign(u: Any, *, alpha: float = 2.0) -> Any:  # noqa: N802
    """``alpha / (2 (1 + |alpha u|)^2)``."""
    return alpha / 2 / (1 + abs(alpha * u)) ** 2


@surrogate
def StraightThrough(u: Any) -> Any:  # noqa: N802
    """1, Bengio et al. 2013, arXiv:1308.3432."""
    return constant(u, 1.0)


@surrogate
def Rectangle(u: Any, *, alpha: float = 1.0) -> Any:  # noqa: N802
    """``alpha`` where ``|u| < 1 / (2 alpha)``, else 0, Wu et al. 2018, arXiv:1706.02609, eq. 24."""
    return where(abs(u) < 0.5 / alpha, alpha, constant(u, 0.0))


@surrogate
def PiecewiseQuadratic(u: Any, *, alpha: float = 1.0) -> Any:  # noqa: N802
    """A triangle: ``alpha - alpha^2 |u|`` where that is positive, Esser et al. 2016."""
    height = alpha - alpha**2 * abs(u)
    return where(height > 0, height, 0.0)


@surrogate
def PiecewiseExp(u: Any, *, alpha: float = 1.0) -> Any:  # noqa: N802
    """``alpha / 2 exp(-alpha |u|)``, Shrestha and Orchard 2018, arXiv:1810.08646."""
    return alpha / 2 * exp(-alpha * abs(u))


@surrogate
def Gaussian(u: Any, *, alpha: float = 2.0) -> Any:  # noqa: N802
    """``alpha / sqrt(pi) exp(-(alpha u)^2)``, the derivative of an error function."""
    return alpha / math.sqrt(math.pi) * exp(-((alpha * u) ** 2))


@surrogate
def PiecewiseLeakyReLU(u: Any, *, w: float = 1.0, c: float = 0.01) -> Any:  # noqa: N802
    """``1 / w`` where ``|u| < w``, else ``c``."""
    return where(abs(u) < w, 1 / w, constant(u, c))


@surrogate
def Window(u: Any, *, w: float = 1.0, height: float = 0.5, c: float = 0.01) -> Any:  # noqa: N802
    """``height`` where ``|u| < w``, else ``c``."""
    return where(abs(u) < w, height, constant(u, c))


@surrogate
def LeakyKReLU(u: Any, *, leak: float = 0.0, k: float = 1.0) -> Any:  # noqa: N802
    """``k`` where ``u >= 0``, else ``leak``."""
    return where(u >= 0, k, constant(u, leak))


@surrogate
def LogTailedReLU(u: Any, *, alpha: float = 0.0) -> Any:  # noqa: N802
    """``alpha`` below 0, 1 up to 1, ``1 / u`` above, Cai et al. 2017, arXiv:1702.00953."""
    tail = where(u > 1, 1 / where(u > 1, u, 1.0), 1.0)
    return where(u > 0, tail, alpha)


@surrogate
def ReLU(u: Any) -> Any:  # noqa: N802
    """1 where ``u > 0``, else 0: where there is a spike."""
    return where(u > 0, 1.0, constant(u, 0.0))


@surrogate
def Triangular(u: Any, *, height: float = 1.0) -> Any:  # noqa: N802
    """``height`` where ``u < 0``, else ``-height``, as snnTorch defines it."""
    return where(u < 0, height, constant(u, -height))


@surrogate
def SpikeRateEscape(u: Any, *, beta: float = 1.0, slope: float = 25.0) -> Any:  # noqa: N802
    """``slope exp(-beta |u - 1|)``, Gerstner and Kistler 2002, Spiking neuron models."""
    return slope * exp(-beta * abs(u - 1.0))


@surrogate
def SparseFastSigmoid(u: Any, *, slope: float = 25.0, bound: float = 1.0) -> Any:  # noqa: N802
    """:func:`FastSigmoid` where ``u > bound``, else 0, Perez-Nieves and Goodman, arXiv:2105.08810."""
    return where(u > bound, 1 / (1 + slope * abs(u)) ** 2, 0.0)


@surrogate
def SuperSpike(u: Any, *, alpha: float = 1.0) -> Any:  # noqa: N802
    """``alpha / (1 + |u|)^2``, Zenke and Ganguli 2018, arXiv:1705.11146."""
    return alpha / (1 + abs(u)) ** 2


@surrogate
def NonzeroSignLogAbs(u: Any, *, alpha: float = 1.0) -> Any:  # noqa: N802
    """``1 / (1 / alpha + |u|)``."""
    return 1 / (1 / alpha + abs(u))


@surrogate
def S2NN(u: Any, *, alpha: float = 4.0, beta: float = 1.0) -> Any:  # noqa: N802
    """:func:`Sigmoid` below 0, ``beta / (u + 1)`` from 0 on, Suetake et al. 2022, arXiv:2201.10879."""
    s = sigmoid(alpha * u)
    return where(u < 0, alpha * s * (1 - s), beta / (where(u < 0, 0.0, u) + 1.0))


@surrogate
def QPseudoSpike(u: Any, *, alpha: float = 2.0) -> Any:  # noqa: N802
    """``(1 + 2 |u| / (alpha - 1))^-alpha``, Herranz-Celotti and Rouat 2022, arXiv:2202.00282."""
    return (1 + 2 / (alpha - 1) * abs(u)) ** -alpha


class _Fire(torch.autograd.Function):
    """Forward: the spikes as given. Backward: the surrogate's derivative at u."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, fired: torch.Tensor, surrogate: Surrogate) -> Any:
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        return fired.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (u,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.derivative(u), None, None


def fire(u: torch.Tensor, fired: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:
    """Spikes of u's dtype where ``fired``, differentiable in ``u`` through the surrogate."""
    apply: Any = _Fire.apply
    spikes: torch.Tensor = apply(u, fired, surrogate)
    return spikes
