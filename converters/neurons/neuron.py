"""A population of neurons: its step on values of any kind, and the reference in torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import torch

from .. import surrogates
from ..equations import POPULATION, SPIKES, Dynamics, Symbol, named
from ..errors import UsageError
from ..surrogates import Surrogate

Parameter: TypeAlias = "float | torch.Tensor"
ResetAt: TypeAlias = Literal["now", "next", "before", "ahead"]


def _select(s: torch.Tensor, yes: Any, no: torch.Tensor) -> torch.Tensor:
    """torch.where by arithmetic: exact for finite values, and several times faster on a CPU."""
    rest = torch.addcmul(no, s, no, value=-1)
    if isinstance(yes, torch.Tensor):
        return rest.addcmul_(s, yes)
    return rest.add_(s, alpha=yes) if yes else rest


def _lower(s: torch.Tensor, h: torch.Tensor, by: Any) -> torch.Tensor:
    """h less ``by`` where there is a spike, also where h is infinite."""
    return torch.addcmul(h, s, by, value=-1) if isinstance(by, torch.Tensor) else h.sub(s, alpha=by)


class ParameterError(UsageError):
    """A parameter has a value that no neuron can compute with."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value
        super().__init__(f"{name} is {value!r}; allowed: a finite number or a tensor")


def _number(name: str, value: Any) -> Any:
    """A parameter's value as a float, a flag or a tensor, or a symbol for one."""
    if isinstance(value, (bool, torch.Tensor, Symbol)):
        return value
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise ParameterError(name, value)


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
        lower: Callable[[Any, Any, Any], Any] | None = None,
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
            lower: ``(spikes, h, by) -> h - by where there is a spike, else h``; by ``select`` unless given.
        """

        def after(h: Any, spikes: Any) -> Any:
            if self.reset == "none":
                return h
            if self.reset == "soft" and lower is not None:
                return lower(spikes, h, self.v_threshold)
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
        spikes, state, _ = self.step(
            state, x, lambda h: self.fired(h).to(x.dtype), _select, t, lower=_lower
        )
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
            _, state, h = self.step(state, x, into(spikes[t]), _select, first + t, lower=_lower)
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

        def lower(s: torch.Tensor, h: torch.Tensor, by: Any) -> torch.Tensor:
            after: torch.Tensor = h - (s.detach() if detach_reset else s) * by
            return after

        return self.step(state, x, fire, select, t, lower=lower)

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
