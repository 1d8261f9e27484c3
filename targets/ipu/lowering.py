"""Neurons as modules that a compiler takes which traces a forward once and differentiates what it saw.

Every step is made from the neuron's one declaration. The state lives in attributes during one forward,
never in buffers, and the surrogate gradient is part of the forward::

    u = h - v_threshold
    s = fires(u) + (u - detach(u)) surrogate'(detach(u))

whose value is the step's and whose derivative in u is the surrogate's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...converters import sources
from ...converters.equations import SPIKES
from ...converters.errors import Finding, UnsupportedError, UsageError
from ...converters.neurons import Neuron
from ...converters.sources import Learning, Reading
from ...converters.surrogates import Surrogate

_HEADLINE = "the network cannot be rewritten for the IPU:"


@dataclass(frozen=True)
class _Plan:
    """What a neuron's module was read as, and how it learns."""

    reading: Reading
    learning: Learning


class Lowered(nn.Module):
    """What a neuron's module becomes: an instance of its own class too, with the same tensors.

    A call, the state's names and the methods that return the state to start from are as before.
    """

    _plan: _Plan

    @staticmethod
    def take(module: nn.Module, plan: _Plan) -> None:
        """Turn a module into its lowered form, in place."""
        kind = type(module)
        members: dict[str, Any] = dict.fromkeys(plan.reading.restart, Lowered.restart)
        names = plan.reading.states or {"v": 0}
        members.update({name: _state(place) for name, place in names.items()})
        members["__module__"] = kind.__module__
        held = vars(module)
        for name in list(module._non_persistent_buffers_set):
            del module._buffers[name]  # a state
        module._non_persistent_buffers_set.clear()
        held.pop("_memories", None)
        for name in [n for n, value in held.items() if isinstance(value, torch.Tensor)]:
            del held[name]
        held["_plan"] = plan
        module.__class__ = type(kind.__name__, (Lowered, kind), members)
        module.reset()  # type: ignore[operator]

    def reset(self) -> None:
        """Start from v_0 again."""
        vars(self).update(_neuron=None, _state=None, _steps=0)

    def restart(self) -> Any:
        """As the methods of the original that return the state to start from: zeros of any shape."""
        self.reset()
        zeros = tuple(torch.zeros(()) for _ in self._plan.reading.states)
        return zeros if len(zeros) > 1 else zeros[0]

    def forward(self, x: torch.Tensor, *given: Any, **named: Any) -> Any:
        """As the original's; the state is that of this forward of the network."""
        reading, gain = self._plan.reading, self._plan.learning.gain
        if reading.step_mode == "m":
            vars(self).update(_state=None, _steps=0)
            return torch.stack([self._step(one) for one in x.unbind()])
        handed = {**dict(zip(reading.states, given, strict=False)), **named}
        for name, part in handed.items():
            if part is not None:
                self._hand(reading.states[name], part, x)
        spikes = self._step(x)
        if gain is not None:
            spikes = spikes * gain(self)
        if not reading.returns_state:
            return spikes
        return (spikes, *(self._state[place] for place in reading.states.values()))

    def _hand(self, place: int, part: torch.Tensor, x: torch.Tensor) -> None:
        """Go on from a part of the state that the caller hands; of another shape, from the start."""
        neuron = self._declared()
        state = self._state or neuron.initial(x)
        if part is state[place]:
            return
        if part.shape != x.shape:
            part = neuron.initial(x)[place]
            steps = self._steps
        else:
            steps = max(self._steps, 1)
        parts = [*state]
        parts[place] = part
        if place == 0 and SPIKES in neuron.dynamics.states:
            parts[_place_of_spikes(neuron)] = neuron.fired(part).to(x.dtype)
        vars(self).update(_state=tuple(parts), _steps=steps)

    def _declared(self) -> Neuron:
        """The declaration, its parameters taken from the module once a forward."""
        if self._neuron is None:
            vars(self)["_neuron"] = self._plan.learning.neuron(self)
        neuron: Neuron = self._neuron
        return neuron

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        neuron, learning = self._declared(), self._plan.learning
        state = self._state
        if state is None or state[0].shape != x.shape:
            state, steps = neuron.initial(x), 0
        else:
            steps = self._steps
        if learning.detach_past and SPIKES in neuron.dynamics.states:
            at = _place_of_spikes(neuron)
            state = (*state[:at], state[at].detach(), *state[at + 1 :])

        def fire(h: torch.Tensor) -> torch.Tensor:
            u = h - neuron.v_threshold
            fixed = u.detach()
            spikes = neuron.fired(h).to(h.dtype)
            return spikes + (u - fixed) * learning.surrogate.derivative(fixed)

        def select(s: torch.Tensor, yes: Any, no: torch.Tensor) -> torch.Tensor:
            if s.dtype == torch.bool:
                return torch.where(s, yes, no) if _is_tensor(yes) else no.masked_fill(s, yes)
            if learning.detach_reset:
                return select(s.detach() > 0.5, yes, no)
            rest = (1.0 - s) * no
            return rest if not _is_tensor(yes) and yes == 0 else s * yes + rest

        due = neuron.fired if learning.detach_past or learning.detach_reset else None
        spikes, after, _ = neuron.step(state, x, fire, select, steps, due)
        vars(self).update(_state=after, _steps=steps + 1)
        return spikes


def _state(place: int) -> property:
    """A part of the state under the name that it has in the original."""

    def get(self: Any) -> torch.Tensor:
        part: torch.Tensor = torch.zeros(()) if self._state is None else self._state[place]
        return part

    def put(self: Any, value: torch.Tensor) -> None:
        if self._state is None or value.shape != self._state[0].shape:
            self.reset()
        else:
            state = (*self._state[:place], value, *self._state[place + 1 :])
            vars(self).update(_state=state)

    return property(get, put)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _place_of_spikes(neuron: Neuron) -> int:
    return 1 + [*neuron.dynamics.states].index(SPIKES)


def lower(net: nn.Module, surrogates: Mapping[str, Surrogate] | None = None) -> nn.Module:
    """A copy of the network with every neuron lowered.

    Args:
        net: The network; it is left as it is.
        surrogates: Surrogate gradients by module path, in place of the modules' own.

    Raises:
        UsageError: There is no neuron at a path of ``surrogates``.
        UnsupportedError: With everything that cannot be rewritten.
    """
    given = dict(surrogates or {})
    plans: dict[str, _Plan] = {}
    findings = list(_obstacles(net))
    for path, module, reading in sources.read_all(net):
        if isinstance(module, Lowered):
            continue  # said already
        if not isinstance(reading, Reading):
            findings += reading
            continue
        learning = sources.learning(module, path, given.pop(path, None))
        if isinstance(learning, Learning):
            plans[path] = _Plan(reading, learning)
        else:
            findings += learning
    if given:
        raise UsageError(
            f"surrogates names {', '.join(given)}, where there is no neuron; there are "
            f"{', '.join(plans) or 'none'}"
        )
    if findings:
        raise UnsupportedError(_HEADLINE, findings)
    try:
        work = sources.copied(net)
    except Exception as error:
        raise UnsupportedError(
            _HEADLINE,
            [
                Finding(
                    rule="copy",
                    where="",
                    found=f"the network cannot be copied ({error})",
                    allowed="a network that keeps no tensor of an earlier training step",
                    fix="reset it first (SpikingJelly: functional.reset_net(net), snnTorch: "
                    "utils.reset(net))",
                )
            ],
        ) from error
    sources.reset(work)
    for path, plan in plans.items():
        Lowered.take(work.get_submodule(path), plan)
    return work


def _obstacles(net: nn.Module) -> Iterator[Finding]:
    """What keeps a state that training would need and the device cannot have."""
    for path, module in net.named_modules():
        if isinstance(module, Lowered):
            yield Finding(
                rule="lowered-twice",
                where=path,
                found="a neuron that was rewritten for the IPU already",
                allowed="the network as its framework made it",
                fix="give training_module the original network; weights go from one to the other by "
                "state_dict",
            )
        elif getattr(module, "keep_state", False):
            yield Finding(
                rule="kept-state",
                where=path,
                found="keep_state=True: each call goes on from where the last one ended",
                allowed="a state that begins anew at each call of the network",
                fix="set keep_state=False, or hand the state in and out of the network's forward",
            )
        elif hasattr(module, "mask") and "Dropout" in type(module).__name__:
            yield Finding(
                rule="kept-mask",
                where=path,
                found=f"{type(module).__name__}, which keeps its mask from step to step",
                allowed="layers that keep nothing but neurons' states",
                fix="use torch's nn.Dropout",
            )
