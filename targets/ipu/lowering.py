"""Neurons as modules that a compiler takes which traces a forward once and differentiates what it saw.

Every step is made from the neuron's one declaration. The state lives in attributes during one forward,
never in buffers, and the surrogate gradient is part of the forward::

    u = h - v_threshold
    s = fires(u) + (u - detach(u)) surrogate'(detach(u))

whose value is the step's and whose derivative in u is the surrogate's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from ...converters import sources
from ...converters.equations import SPIKES
from ...converters.errors import Finding, UnsupportedError, UsageError
from ...converters.host import on_host
from ...converters.neurons import Neuron, Node
from ...converters.sources import Learning, Memory, Reading
from ...converters.surrogates import Surrogate

HEADLINE = "the network cannot be rewritten for the IPU:"


class _Run:
    """One neuron's module in one forward of the network.

    Attributes:
        state: (v, *states); None before the first step.
        steps: How many steps led to it.
    """

    def __init__(self, module: nn.Module, reading: Reading, learning: Learning) -> None:
        self._learning, self._places = learning, reading.states
        self._neuron = learning.neuron(module)
        self.state: tuple[torch.Tensor, ...] | None = None
        self.steps = 0

    def hand(self, given: Mapping[str, torch.Tensor], x: torch.Tensor) -> None:
        """Go on from what the caller hands; for a part of another shape than x, from its start."""
        neuron = self._neuron
        parts = list(self.state or neuron.initial(x))
        for name, part in given.items():
            place = self._places[name]
            if part is parts[place]:
                continue
            if part.shape == x.shape:
                parts[place], self.steps = part, max(self.steps, 1)
            else:
                parts[place] = neuron.initial(x)[place]
            if place == 0 and SPIKES in neuron.dynamics.states:
                parts[_place_of_spikes(neuron)] = neuron.fired(parts[0]).to(x.dtype)
        self.state = tuple(parts)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, ...] -> spikes [N, ...], by one step from the state."""
        neuron, learning = self._neuron, self._learning
        if self.state is None or self.state[0].shape != x.shape:
            self.state, self.steps = neuron.initial(x), 0
        state = self.state
        if learning.detach_past and SPIKES in neuron.dynamics.states:
            at = _place_of_spikes(neuron)
            state = (*state[:at], state[at].detach(), *state[at + 1 :])
        due = neuron.fired if learning.detach_past or learning.detach_reset else None
        spikes: torch.Tensor
        spikes, self.state, _ = neuron.step(state, x, self._fire, self._select, self.steps, due)
        self.steps += 1
        return spikes

    def _fire(self, h: torch.Tensor) -> torch.Tensor:
        u = h - self._neuron.v_threshold
        fixed = u.detach()
        derivative: torch.Tensor = self._learning.surrogate.derivative(fixed)
        spikes: torch.Tensor = self._neuron.fired(h).to(h.dtype)
        return spikes + (u - fixed) * derivative

    def _select(self, s: torch.Tensor, yes: Any, no: torch.Tensor) -> torch.Tensor:
        number = not isinstance(yes, torch.Tensor)
        if self._learning.detach_reset and s.dtype != torch.bool:
            s = s.detach() > 0.5
        if s.dtype == torch.bool:
            return no.masked_fill(s, yes) if number else torch.where(s, yes, no)
        rest: torch.Tensor = (1.0 - s) * no
        return rest if number and yes == 0 else s * yes + rest


class Lowered(nn.Module):
    """What a neuron's module becomes: an instance of its own class too, with the same tensors.

    A call, the state's names and the methods that return the state to start from are as before.
    """

    _lowered: tuple[Reading, Learning]
    _run: _Run | None

    @staticmethod
    def take(module: nn.Module, reading: Reading, learning: Learning) -> None:
        """Turn a module into its lowered form, in place."""
        kind = type(module)
        members: dict[str, Any] = dict.fromkeys(reading.restart, Lowered.restart)
        names = reading.states or {"v": 0}
        members.update({name: _state(place) for name, place in names.items()})
        members["__module__"] = kind.__module__
        held = vars(module)
        for name in list(module._non_persistent_buffers_set):
            del module._buffers[name]  # a state
        module._non_persistent_buffers_set.clear()
        if "_memories" in held:
            held["_memories"] = {}
        for name in [n for n, value in held.items() if isinstance(value, torch.Tensor)]:
            del held[name]
        held |= {"_lowered": (reading, learning), "_run": None}
        module.__class__ = type(kind.__name__, (Lowered, kind), members)

    def reset(self) -> None:
        """Start from v_0 again."""
        vars(self)["_run"] = None

    def restart(self) -> Any:
        """As the methods of the original that return the state to start from: zeros of any shape."""
        self.reset()
        zeros = tuple(torch.zeros(()) for _ in self._lowered[0].states)
        return zeros if len(zeros) > 1 else zeros[0]

    def forward(self, x: torch.Tensor, *given: Any, **named: Any) -> Any:
        """As the original's; the state is that of this forward of the network."""
        reading, learning = self._lowered
        if reading.step_mode == "m" and isinstance(self, Node):
            self.reset()  # other sources' neurons go on where the last call ended
        if self._run is None:
            vars(self)["_run"] = _Run(self, reading, learning)
        run = self._run
        assert run is not None
        if reading.step_mode == "m":
            return torch.stack([run.step(one) for one in x.unbind()])
        handed = {**dict(zip(reading.states, given, strict=False)), **named}
        run.hand({name: part for name, part in handed.items() if part is not None}, x)
        spikes = run.step(x)
        if learning.gain is not None:
            spikes = spikes * learning.gain(self)
        if not reading.returns_state:
            return spikes
        assert run.state is not None
        return (spikes, *(run.state[place] for place in reading.states.values()))


def _state(place: int) -> property:
    """A part of the state under the name that it has in the original."""

    def get(self: Any) -> torch.Tensor:
        run: _Run | None = self._run
        return torch.zeros(()) if run is None or run.state is None else run.state[place]

    def put(self: Any, value: torch.Tensor) -> None:
        run: _Run | None = self._run
        if run is None or run.state is None or value.shape != run.state[0].shape:
            self.reset()
        else:
            run.state = (*run.state[:place], value, *run.state[place + 1 :])

    return property(get, put)


def _place_of_spikes(neuron: Neuron) -> int:
    return 1 + [*neuron.dynamics.states].index(SPIKES)


Plan: TypeAlias = tuple[Reading, Learning]


def lower(net: nn.Module, surrogates: Mapping[str, Surrogate] | None = None) -> nn.Module:
    """A copy of the network with every neuron lowered.

    Args:
        net: The network; it is left as it is.
        surrogates: Surrogate gradients by module path, in place of the modules' own.

    Raises:
        UsageError: There is no neuron at a path of ``surrogates``.
        UnsupportedError: With everything that cannot be rewritten.
        CaptureError: As in ``on_host``.
    """
    net, _ = on_host(net)
    plans, findings = plan(net, surrogates)
    if findings:
        raise UnsupportedError(HEADLINE, findings)
    return rewritten(net, plans)


def plan(
    net: nn.Module, surrogates: Mapping[str, Surrogate] | None = None
) -> tuple[dict[str, Plan], list[Finding]]:
    """How to lower each neuron, by its path, and what cannot be.

    Raises:
        UsageError: There is no neuron at a path of ``surrogates``.
    """
    given = dict(surrogates or {})
    plans: dict[str, Plan] = {}
    findings = list(_obstacles(net))
    for path, module, reading in sources.read_all(net):
        if isinstance(module, Lowered):
            continue  # said already
        if isinstance(reading, Memory) or (
            isinstance(reading, Reading) and (reading.readout or reading.part)
        ):
            findings.append(_no_neuron(path, module))
            continue
        if not isinstance(reading, Reading):
            findings += reading
            continue
        learning = sources.learning(module, path, given.pop(path, None))
        if isinstance(learning, Learning):
            plans[path] = (reading, learning)
        else:
            findings += learning
    if given:
        raise UsageError(
            f"surrogates names {', '.join(given)}, where there is no neuron; there are "
            f"{', '.join(plans) or 'none'}"
        )
    return plans, findings


def rewritten(net: nn.Module, plans: Mapping[str, Plan]) -> nn.Module:
    """A copy of the network with these neurons lowered.

    Raises:
        UnsupportedError: It cannot be copied.
    """
    try:
        work = sources.copied(net)
    except Exception as error:
        raise UnsupportedError(HEADLINE, [sources.not_copied(error)]) from error
    sources.reset(work)
    for path, (reading, learning) in plans.items():
        Lowered.take(work.get_submodule(path), reading, learning)
    return work


def _no_neuron(path: str, module: nn.Module) -> Finding:
    return Finding(
        rule="no-spiking-neuron",
        where=path,
        found=f"{type(module).__name__}, which keeps a state and does not fire",
        allowed="neurons that fire; snnTorch's give their membrane potential besides",
        fix="read out the spikes, or a neuron's returned membrane potential",
    )


def _obstacles(net: nn.Module) -> Iterator[Finding]:
    """What the device cannot have: wide numbers, and state that outlives a call."""
    for path, module in net.named_modules():
        wide = [n for n, p in module.named_parameters(recurse=False) if p.dtype == torch.float64]
        if wide:
            yield Finding(
                rule="float64",
                where=path,
                found=f"{', '.join(wide)} of float64",
                allowed="float32; float16 by ipu.trainer(half=True)",
                fix="call net.float()",
            )
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
