"""Spiking neurons, each defined once.

A :class:`Dynamics` is one kind of neuron: its charge equation, written as plain arithmetic. A
:class:`Neuron` is a population of that kind: the dynamics with everything else that decides its
spikes, that is, parameters, comparison, reset kind and timing, and v_0. All that spikeport does with
a neuron comes from these two: the reference in torch, training, and the lowering to each target.

One step, with h the membrane potential after charging and s the spikes::

    v[t-1] = reset(v[t-1], r[t])             only if reset_at is "before"
    h[t] = charge(v[t-1], x[t])              with other states, h[t], w[t] = charge(v[t-1], w[t-1], x[t])
    h[t] = reset(h[t], r[t])                 only if reset_at is "next" or "ahead"
    s[t] = h[t] >= v_threshold               or >, as `fires` says
    v[t] = reset(h[t], s[t])                 if reset_at is "now", else h[t]
    v[t] = h[t] - (s[t] - r[t]) v_threshold  if reset_at is "ahead"

    r[t] = v[t-1] >= v_threshold             or >; the reset that is still to come; none at t = 0
    reset(h, s) = v_reset where s, else h    hard
                  h - v_threshold where s    soft
                  h                          none

A new kind takes a function and one line::

    @neurons.dynamics
    def QIF(v, x, *, tau, v_rest, v_c, a_0):
        return v + (x + a_0 * (v - v_rest) * (v - v_c)) / tau

    node = neurons.Node(QIF, tau=2.0, v_rest=0.0, v_c=0.8, a_0=1.0, v_threshold=1.0, v_reset=-0.1)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from . import surrogates
from .equations import (
    POPULATION,
    SPIKES,
    Dynamics,
    Symbol,
    dynamics,
    exp,
    named,
    relu,
    sigmoid,
    tanh,
)
from .errors import UsageError
from .surrogates import Surrogate

__all__ = [
    "CLIF",
    "EIF",
    "IF",
    "KLIF",
    "LIAF",
    "LIF",
    "QIF",
    "RAF",
    "Alpha",
    "CubaLIF",
    "Dynamics",
    "Heaviside",
    "IFNode",
    "Izhikevich",
    "LIFNode",
    "Lapicque",
    "Leaky",
    "Neuron",
    "Node",
    "ParametricLIF",
    "ParametricLIFNode",
    "RLeaky",
    "RSynaptic",
    "Readout",
    "RescaledKLIF",
    "Synaptic",
    "dynamics",
    "exp",
    "named",
    "relu",
    "sigmoid",
    "tanh",
]

Parameter: TypeAlias = "float | torch.Tensor"
ResetAt: TypeAlias = Literal["now", "next", "before", "ahead"]


@dynamics(potentials=())
def IF(v: Any, x: Any) -> Any:  # noqa: N802 -- the field's name
    """Integrate-and-fire: h = v + x."""
    return v + x


@dynamics(potentials=("v_rest",))
def LIF(  # noqa: N802
    v: Any, x: Any, *, tau: Any, v_rest: Any, decay_input: bool = True, factored: bool = False
) -> Any:
    """Leaky integrate-and-fire with membrane time constant tau, in time steps.

    Gerstner et al., Neuronal Dynamics, eq. 1.5, by forward Euler with a step of 1; without
    decay_input, x is a jump of the potential. ``factored`` is the same equation for v_rest = 0 in
    the order of rounding of SpikingJelly 0.0.0.0.14.
    """
    if decay_input:
        return v + (x - (v - v_rest)) / tau
    if factored:
        return v * (1.0 - 1.0 / tau) + x
    return v - (v - v_rest) / tau + x


@dynamics(potentials=("v_rest",))
def ParametricLIF(  # noqa: N802
    v: Any, x: Any, *, w: Any, v_rest: Any, decay_input: bool = True, factored: bool = False
) -> Any:
    """LIF with a learned 1 / tau = sigmoid(w), Fang et al. 2021, arXiv:2007.05785, eq. 10."""
    if decay_input:
        return v + (x - (v - v_rest)) * sigmoid(w)
    if factored:
        return v * (1.0 - sigmoid(w)) + x
    return v - (v - v_rest) * sigmoid(w) + x


@dynamics(potentials=())
def Leaky(v: Any, x: Any, *, beta: Any) -> Any:  # noqa: N802
    """LIF with decay rate beta: h = beta v + x, Eshraghian et al. 2023, arXiv:2109.12894, eq. 4."""
    return beta * v + x


@dynamics(potentials=())
def Lapicque(v: Any, x: Any, *, R: Any, C: Any, dt: Any) -> Any:  # noqa: N802
    """RC circuit, forward Euler: h = (dt / RC) R x + (1 - dt / RC) v; dt in the unit of RC.

    Lapicque's model as in Eshraghian et al. 2023, arXiv:2109.12894, eq. 2, in snnTorch's order of
    rounding.
    """
    return x * R * (1 / (R * C)) * dt + (1 - dt / (R * C)) * v


@dynamics(states={"syn": 0.0}, potentials=())
def Synaptic(v: Any, syn: Any, x: Any, *, alpha: Any, beta: Any) -> Any:  # noqa: N802
    """Leaky with a synaptic current that decays at rate alpha: syn = alpha syn + x, h = beta v + syn."""
    syn = alpha * syn + x
    return beta * v + syn, syn


@dynamics(states={"s": 0.0})
def RLeaky(v: Any, s: Any, x: Any, *, beta: Any, V: Any) -> Any:  # noqa: N802
    """Leaky that hears its own last spike, V times; in snnTorch's order of rounding."""
    return beta * v + x + s * V


@dynamics(states={"syn": 0.0, "s": 0.0})
def RSynaptic(  # noqa: N802
    v: Any,
    syn: Any,
    s: Any,
    x: Any,
    *,
    alpha: Any,
    beta: Any,
    V: Any,
) -> Any:
    """Synaptic whose current hears the neuron's own last spike, V times."""
    syn = alpha * syn + x + s * V
    return beta * v + syn, syn


@dynamics(states={"syn_exc": 0.0, "syn_inh": 0.0, "s": 0.0})
def Alpha(  # noqa: N802
    v: Any,
    syn_exc: Any,
    syn_inh: Any,
    s: Any,
    x: Any,
    *,
    alpha: Any,
    beta: Any,
    tau: Any,
    jump: Any = 0.0,
    zero: bool = False,
    subtract: bool = False,
) -> Any:
    """The membrane is the difference of a slower and a faster current, tau (syn_exc + syn_inh).

    A reset acts on the currents too, so it is part of the charge: to zero, or, as snnTorch subtracts,
    by ``jump``, its threshold.
    """
    exc, inh = alpha * syn_exc + x, beta * syn_inh - x
    h = tau * (exc + inh)
    if zero:
        return h - h * s, exc - exc * s, inh - inh * s
    if subtract:
        return h + syn_inh * s, exc - jump * s, inh - inh * s
    return h, exc, inh


@dynamics(states={"syn": 0.0}, potentials=("v_rest",))
def CubaLIF(  # noqa: N802
    v: Any, syn: Any, x: Any, *, tau_syn: Any, tau_mem: Any, r: Any, v_rest: Any
) -> Any:
    """LIF driven through a resistance r by a current that decays, time constants in time steps.

    NIR's equation, Pedersen et al. 2024, Nature Communications 15:8122, by forward Euler with a step
    of 1, the current first.
    """
    syn = syn + (x - syn) / tau_syn
    return v + (r * syn - (v - v_rest)) / tau_mem, syn


@dynamics
def QIF(  # noqa: N802
    v: Any, x: Any, *, tau: Any, v_rest: Any, v_c: Any, a_0: Any
) -> Any:
    """Quadratic integrate-and-fire, Gerstner et al., Neuronal Dynamics, eq. 5.2."""
    return v + (x + a_0 * (v - v_rest) * (v - v_c)) / tau


@dynamics
def EIF(  # noqa: N802
    v: Any, x: Any, *, tau: Any, v_rest: Any, theta_rh: Any, delta_T: Any
) -> Any:
    """Exponential integrate-and-fire, Gerstner et al., Neuronal Dynamics, eq. 5.6."""
    return v + (x + v_rest - v + delta_T * exp((v - theta_rh) / delta_T)) / tau


@dynamics(states={"w": "w_rest", "s": 0.0})
def Izhikevich(  # noqa: N802
    v: Any,
    w: Any,
    s: Any,
    x: Any,
    *,
    tau: Any,
    v_rest: Any,
    v_c: Any,
    a_0: Any,
    w_rest: Any,
    tau_w: Any,
    a: Any,
    b: Any,
    factored: bool = False,
) -> Any:
    """QIF with an adaptation current w, which jumps by b at a spike.

    Gerstner et al., Neuronal Dynamics, eq. 6.1 and 6.2 with 5.2; w follows the charged potential.
    ``factored`` is the order of rounding of SpikingJelly 0.0.0.0.14.
    """
    w = w + b * s
    h = v + (x + a_0 * (v - v_rest) * (v - v_c) - w) / tau
    change = a * (h - v_rest) - w
    return h, w + (1.0 / tau_w * change if factored else change / tau_w)


@dynamics
def KLIF(  # noqa: N802
    v: Any, x: Any, *, k: Any, tau: Any, v_rest: Any, decay_input: bool = True
) -> Any:
    """LIF whose charge is scaled by a learned k and rectified, Jiang and Zhang 2023, arXiv:2302.09238."""
    return relu(k * LIF.charge(v, x, tau=tau, v_rest=v_rest, decay_input=decay_input))


@dynamics(states={"u": "v_rest", "s": 0.0})
def RescaledKLIF(  # noqa: N802
    v: Any,
    u: Any,
    s: Any,
    x: Any,
    *,
    k: Any,
    tau: Any,
    v_rest: Any,
    jump: Any,
    decay_input: bool = True,
    soft: bool = False,
) -> Any:
    """KLIF that takes k out of the potential again after firing; u is that potential before the reset.

    The reset is part of the charge: to v_rest, or by ``jump``, the threshold, over k.
    """
    before = u - s * (jump / k) if soft else s * v_rest + (1.0 - s) * u
    h = relu(k * LIF.charge(before, x, tau=tau, v_rest=v_rest, decay_input=decay_input))
    return h, h / k


@dynamics(states={"m": 0.0, "s": 0.0})
def CLIF(v: Any, m: Any, s: Any, x: Any, *, tau: Any, jump: Any) -> Any:  # noqa: N802
    """LIF whose soft reset grows with its recent firing, Huang et al. 2024, PMLR 235, eq. 6 to 9.

    The reset, by ``jump``, the threshold, and by the complementary potential's sigmoid, is part of the
    charge.
    """
    m = m + s
    before = v - s * (jump + sigmoid(m))
    h = before - before / tau + x
    return h, m * sigmoid(h / tau)


@dynamics(states={"u": 0.0})
def RAF(v: Any, u: Any, x: Any, *, decay: Any, cos: Any, sin: Any) -> Any:  # noqa: N802
    """Resonate-and-fire, Izhikevich 2001, Neural Networks 14, eq. 4: v + iu turns and decays.

    x goes into u, which v follows at the next step; 0 x lets v have the input's shape at once.
    """
    charged = decay * (u * cos - v * sin) + x
    return decay * (u * sin + v * cos) + 0.0 * x, charged


@dynamics(states={"charged": 0.0})
def LIAF(  # noqa: N802
    v: Any, charged: Any, x: Any, *, tau: Any, v_rest: Any, decay_input: bool = True
) -> Any:
    """LIF that keeps its potential before the reset, for what fires it in analog, arXiv:2011.06176."""
    h = LIF.charge(v, x, tau=tau, v_rest=v_rest, decay_input=decay_input)
    return h, h


@dynamics(potentials=())
def Heaviside(v: Any, x: Any) -> Any:  # noqa: N802
    """No memory at all: h = x."""
    return x


def _select(s: torch.Tensor, yes: Any, no: torch.Tensor) -> torch.Tensor:
    """torch.where by arithmetic: exact for finite values, and several times faster on a CPU."""
    rest = torch.addcmul(no, s, no, value=-1)
    if isinstance(yes, torch.Tensor):
        return rest.addcmul_(s, yes)
    return rest.add_(s, alpha=yes) if yes else rest


def _number(name: str, value: Any) -> Any:
    """A parameter's value as a float, a flag or a tensor, or a symbol for one."""
    if isinstance(value, (bool, torch.Tensor, Symbol)):
        return value
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise UsageError(f"{name} is {value!r}; allowed: a finite number or a tensor")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.item():.4g}" if value.numel() == 1 else f"{list(value.shape)}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, eq=False)
class Neuron:
    """A population of one kind of neuron: all that decides its spikes.

    Attributes:
        dynamics: The kind.
        params: Values of the charge's parameters: floats, flags, or tensors that broadcast against
            x[t], [N, ...].
        v_threshold: The threshold, scalar or tensor likewise.
        v_reset: The potential after a spike; used by a hard reset.
        reset: ``"hard"``, ``"soft"`` or ``"none"``.
        reset_at: ``"now"``; or ``"next"``: after the charge of the next step; or ``"before"``: before
            that charge, but after the step's potential has been read; or ``"ahead"``: as next, with
            what that reset will change applied at once (soft only).
        fires: ``">="`` or ``">"``.
        v_0: The membrane potential before the first step of each call.

    Raises:
        UsageError: A parameter is missing or unknown, or a value is not one of those above.
    """

    dynamics: Dynamics
    params: Mapping[str, Any] = field(default_factory=dict)
    v_threshold: Parameter = 1.0
    v_reset: Parameter = 0.0
    reset: Literal["hard", "soft", "none"] = "hard"
    reset_at: ResetAt = "now"
    fires: Literal[">=", ">"] = ">="
    v_0: Parameter = 0.0

    def __post_init__(self) -> None:
        wanted = set(self.dynamics.parameters)
        params = {**self.dynamics.defaults, **self.params}
        if wrong := wanted ^ set(params):
            missing, unknown = wrong & wanted, wrong - wanted
            raise UsageError(
                f"{self.dynamics.name}: "
                + (f"missing {', '.join(sorted(missing))}; " if missing else "")
                + (f"unknown {', '.join(sorted(unknown))}; " if unknown else "")
                + f"its parameters are {', '.join(self.dynamics.parameters) or 'none'}"
            )
        params = {name: _number(name, params[name]) for name in self.dynamics.parameters}
        object.__setattr__(self, "params", params)
        for name in ("v_threshold", "v_reset", "v_0"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name, value, allowed in (
            ("reset", self.reset, ("hard", "soft", "none")),
            ("reset_at", self.reset_at, get_args(ResetAt)),
            ("fires", self.fires, (">=", ">")),
        ):
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.reset_at == "ahead" and self.reset == "hard":
            raise UsageError("a hard reset is ahead of nothing; reset_at is now, next or before")

    def __copy__(self) -> Neuron:
        return self  # it is frozen

    def charge(self, state: tuple[Any, ...], x: Any) -> tuple[Any, ...]:
        """The state after charging, v as h."""
        return self.dynamics(state, x, self.params)

    def fired(self, h: Any) -> Any:
        """Where h crosses the threshold, as booleans."""
        return h >= self.v_threshold if self.fires == ">=" else h > self.v_threshold

    def step(
        self,
        state: tuple[Any, ...],
        x: Any,
        fire: Callable[[Any], Any],
        select: Callable[[Any, Any, Any], Any],
        t: int = 1,
        due: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, tuple[Any, ...], Any]:
        """One time step on values of any kind: (spikes, state, h).

        Args:
            state: (v, *states) before the step.
            x: Input.
            fire: ``h -> spikes``, in whatever form ``select`` takes.
            select: ``(spikes, a, b) -> a where there is a spike, else b``.
            t: 0 says that v is v_0, before which there is no spike to reset for.
            due: As ``fire``, for the spikes of the step before, whose reset is still to come; they go
                to ``select`` alone. ``fire`` itself unless given.
        """

        def after(h: Any, spikes: Any) -> Any:
            if self.reset == "none":
                return h
            return select(spikes, self.v_reset if self.reset == "hard" else h - self.v_threshold, h)

        late = self.reset_at != "now" and t > 0 and self.reset != "none"
        spiked = (due or fire)(state[0]) if late else None
        if late and self.reset_at == "before":
            state = (after(state[0], spiked), *state[1:])
        h, *others = self.charge(state, x)
        if late and self.reset_at != "before":
            h = after(h, spiked)
        ahead = self.reset_at == "ahead" and self.reset != "none"
        silent, again = h, h - self.v_threshold if ahead else None
        if ahead and late:
            # The reset that was due is taken already: it is not taken twice, and given back if the
            # membrane stayed silent after it.
            silent, again = select(spiked, h + self.v_threshold, h), select(spiked, h, again)
        spikes = fire(h)
        v = select(spikes, again, silent) if ahead else h
        if self.reset_at == "now":
            v = after(h, spikes)
        for i, name in enumerate(self.dynamics.states):
            if name == SPIKES:
                others[i] = spikes
        return spikes, (v, *others), h

    def single_step(
        self, x: torch.Tensor, state: tuple[torch.Tensor, ...], t: int = 1
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Reference of one step: x and each of the state [N, ...] -> spikes, state [N, ...]."""
        spikes, state, _ = self.step(state, x, lambda h: self.fired(h).to(x.dtype), _select, t)
        return spikes, state

    def multi_step(
        self, x_seq: torch.Tensor, state: tuple[torch.Tensor, ...] | None = None
    ) -> torch.Tensor:
        """Reference: x_seq [T, N, ...] -> spikes [T, N, ...], from a state or the initial one."""
        return self.trace(x_seq, state, charged=False)[0]

    def states(self, x_seq: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Reference: x_seq [T, N, ...] -> the state of this index that each step ends with, likewise."""
        state, kept = self.initial(x_seq[0]), torch.empty_like(x_seq)
        for t, x in enumerate(x_seq):
            _, state = self.single_step(x, state, t)
            kept[t] = state[index]
        return kept

    def trace(
        self,
        x_seq: torch.Tensor,
        state: tuple[torch.Tensor, ...] | None = None,
        charged: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """As :meth:`multi_step`, with the membrane: spikes, h [T, N, ...], last state, each [N, ...].

        Without ``charged``, h is left out (an empty tensor).
        """
        first = 0 if state is None else 1
        state = self.initial(x_seq[0]) if state is None else state
        spikes = torch.empty_like(x_seq)
        h_seq = torch.empty_like(x_seq) if charged else x_seq.new_empty(0)
        compare: Any = torch.ge if self.fires == ">=" else torch.gt

        def into(out: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
            # A comparison straight into the spikes' dtype: on a CPU the detour over bool costs more
            # than the rest of the step.
            return partial(compare, other=self.v_threshold, out=out)

        for t, x in enumerate(x_seq):
            _, state, h = self.step(state, x, into(spikes[t]), _select, first + t)
            if charged:
                h_seq[t] = h
        return spikes, h_seq, state

    @property
    def starts(self) -> tuple[Any, ...]:
        """The values of (v, *states) before the first step."""
        declared = self.dynamics.states.values()
        return (self.v_0, *(self.params[n] if isinstance(n, str) else n for n in declared))

    def initial(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state before the first step, each part in the shape of x [N, ...]."""
        return tuple(
            value.to(x).expand_as(x)
            if isinstance(value, torch.Tensor)
            else torch.full_like(x, value)
            for value in self.starts
        )

    def train_step(
        self,
        state: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        surrogate: Surrogate,
        detach_reset: bool,
        t: int = 1,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        """As :meth:`step`, with gradients: through h as it is, through the step as declared.

        ``detach_reset`` keeps the gradient from flowing through the reset.
        """

        def fire(h: torch.Tensor) -> torch.Tensor:
            return surrogates.fire(h - self.v_threshold, self.fired(h), surrogate)

        def select(s: torch.Tensor, yes: Any, no: torch.Tensor) -> torch.Tensor:
            s = s.detach() if detach_reset else s
            after: torch.Tensor = s * yes + (1.0 - s) * no
            return after

        return self.step(state, x, fire, select, t)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those parameters that are tensors, by name."""
        values = {**self.params, **{n: getattr(self, n) for n in ("v_threshold", "v_reset", "v_0")}}
        return {n: value for n, value in values.items() if isinstance(value, torch.Tensor)}

    def replace_tensors(self, tensors: Mapping[str, Any]) -> Neuron:
        """The same neuron with other values in place of :meth:`tensors`, by name."""
        params = {n: tensors.get(n, value) for n, value in self.params.items()}
        rest: dict[str, Any] = {
            n: tensors.get(n, getattr(self, n)) for n in ("v_threshold", "v_reset", "v_0")
        }
        return Neuron(
            self.dynamics,
            params,
            reset=self.reset,
            reset_at=self.reset_at,
            fires=self.fires,
            **rest,
        )

    def to_json(self) -> str:
        """All but the tensors' values, as one line of JSON; the inverse of :meth:`from_json`."""
        tensors = self.tensors()
        scalars: dict[str, Any] = {n: v for n, v in self.params.items() if n not in tensors}
        population = {n: getattr(self, n) for n in POPULATION if n not in tensors}
        return json.dumps(
            {
                "dynamics": self.dynamics.name,
                "params": scalars,
                **population,
                "tensors": [*tensors],
            },
        )

    @classmethod
    def from_json(cls, spec: str, tensors: Iterable[Any]) -> Neuron:
        """The neuron of :meth:`to_json` with its tensors, in their order."""
        fields: dict[str, Any] = json.loads(spec)
        kind, params = named(fields.pop("dynamics")), fields.pop("params")
        for name, tensor in zip(fields.pop("tensors"), tensors, strict=True):
            (params if name in kind.parameters else fields)[name] = tensor
        return cls(kind, params, **fields)

    def describe_charge(self) -> str:
        """The dynamics and its parameters, for people."""
        parts = [f"{n}={_shown(v)}" for n, v in self.params.items() if v is not False]
        return f"{self.dynamics.name}({', '.join(parts)})"

    def describe(self) -> str:
        """One line for people."""
        resets = {
            "hard": f"hard reset to {_shown(self.v_reset)}",
            "soft": "soft reset",
            "none": "no reset",
        }[self.reset]
        late = {
            "now": "",
            "next": ", at the next step",
            "before": ", before the next step",
            "ahead": ", at the next step and ahead of it",
        }[self.reset_at if self.reset != "none" else "now"]
        return (
            f"{self.describe_charge()}, fires at h {self.fires} {_shown(self.v_threshold)}, "
            f"{resets}{late}, v_0={_shown(self.v_0)}"
        )


class _Layer(nn.Module):
    """A declaration with the tensors that it is made of."""

    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self._declared = neuron
        for name, tensor in neuron.tensors().items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    @property
    def neuron(self) -> Neuron:
        """The declaration with the present values of its parameters."""
        names = self._declared.tensors()
        return self._declared.replace_tensors({n: getattr(self, n) for n in names})


class Node(_Layer):
    """A layer of neurons, multi-step: x_seq [T, N, ...] -> spikes [T, N, ...].

    Every call starts from v_0. A parameter given as an ``nn.Parameter`` is learned, as a tensor is a
    buffer (say [C, 1, 1] for one value a channel), as a float is a constant.

    Args:
        kind: The dynamics.
        v_threshold: The threshold.
        v_reset: The potential after a spike; None for a soft reset.
        reset_at: ``"now"``, ``"next"``, ``"before"`` or ``"ahead"``, as in :class:`Neuron`.
        fires: ``">="`` or ``">"``.
        v_0: Potential before the first step; v_reset, or 0 for a soft reset, unless given.
        surrogate: Surrogate gradient for training.
        detach_reset: Whether gradients are kept from flowing through the reset.
        **params: Parameters of the charge.
    """

    def __init__(
        self,
        kind: Dynamics,
        *,
        v_threshold: Parameter = 1.0,
        v_reset: Parameter | None = 0.0,
        reset_at: ResetAt = "now",
        fires: Literal[">=", ">"] = ">=",
        v_0: Parameter | None = None,
        surrogate: Surrogate | None = None,
        detach_reset: bool = False,
        **params: Any,
    ) -> None:
        hard = v_reset is not None
        rest: Parameter = 0.0 if v_reset is None else v_reset
        super().__init__(
            Neuron(
                kind,
                params,
                v_threshold=v_threshold,
                v_reset=rest,
                reset="hard" if hard else "soft",
                reset_at=reset_at,
                fires=fires,
                v_0=rest if v_0 is None else v_0,
            )
        )
        self.surrogate = ATan() if surrogate is None else surrogate
        self.detach_reset = detach_reset

    @classmethod
    def of(cls, neuron: Neuron) -> Node:
        """A layer of a population that is declared already."""
        node = Node.__new__(Node)
        _Layer.__init__(node, neuron)
        node.surrogate, node.detach_reset = ATan(), False
        return node

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> spikes [T, N, ...]."""
        neuron = self.neuron
        if not torch.is_grad_enabled():
            return neuron.multi_step(x_seq)
        state, spikes = neuron.initial(x_seq[0]), []
        for t, x in enumerate(x_seq):
            s, state, _ = neuron.train_step(state, x, self.surrogate, self.detach_reset, t)
            spikes.append(s)
        return torch.stack(spikes)

    def extra_repr(self) -> str:
        """The declaration in one line."""
        return self.neuron.describe()


class Readout(_Layer):
    """Neurons that do not fire, multi-step: x_seq [T, N, ...] -> membrane potentials [T, N, ...].

    Of kind LIF or Leaky it is a leaky integrator. Every call starts from v_0; parameters are given as
    in :class:`Node`.
    """

    def __init__(self, kind: Dynamics, *, v_0: Parameter = 0.0, **params: Any) -> None:
        super().__init__(Neuron(kind, params, reset="none", v_0=v_0))

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> the potential that each step ends with, [T, N, ...]."""
        neuron = self.neuron
        state, kept = neuron.initial(x_seq[0]), []
        for x in x_seq:
            state = neuron.charge(state, x)
            kept.append(state[0])
        return torch.stack(kept)

    def extra_repr(self) -> str:
        """The charge in one line."""
        return f"{self.neuron.describe_charge()}, does not fire"


ATan = surrogates.ATan


class IFNode(Node):
    """Integrate-and-fire neurons; arguments as in :class:`Node`."""

    def __init__(self, **population: Any) -> None:
        super().__init__(IF, **population)


class LIFNode(Node):
    """Leaky integrate-and-fire neurons that leak towards v_reset, or 0 for a soft reset."""

    def __init__(
        self,
        tau: Parameter = 2.0,
        decay_input: bool = True,
        *,
        v_reset: Parameter | None = 0.0,
        **population: Any,
    ) -> None:
        rest = 0.0 if v_reset is None else v_reset
        super().__init__(
            LIF, tau=tau, v_rest=rest, decay_input=decay_input, v_reset=v_reset, **population
        )


class ParametricLIFNode(Node):
    """LIF neurons with a learned time constant, which starts at ``init_tau``."""

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        *,
        v_reset: Parameter | None = 0.0,
        **population: Any,
    ) -> None:
        if init_tau <= 1:
            raise UsageError(f"init_tau is {init_tau}; it must be above 1: 1 / tau is a sigmoid")
        rest = 0.0 if v_reset is None else v_reset
        w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))
        super().__init__(
            ParametricLIF, w=w, v_rest=rest, decay_input=decay_input, v_reset=v_reset, **population
        )
