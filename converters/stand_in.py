"""What stands where a neuron was while a network is traced: it calls one operator."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .equations import SPIKES
from .errors import UsageError
from .neuron_ops import located
from .neurons import Neuron
from .program import NEURON, NEURON_STEP, STATE
from .sources import Reading


class State:
    """States of neurons during one forward, by path; each forward starts without.

    Attributes:
        v: Of single-step neurons, each with the number of steps that led to it, and its parts as they
            were returned.
        x: What led to those of multi-step neurons, [T, N, ...].
        read: What the forward has read of those, by path and name: the same tensor each time, as it may
            write to it.
        cleared: Those that start anew unless their next call is handed a state.
    """

    def __init__(self) -> None:
        self.v: dict[str, tuple[torch.Tensor, int, dict[str, torch.Tensor]]] = {}
        self.x: dict[str, torch.Tensor] = {}
        self.read: dict[str, dict[str, torch.Tensor]] = {}
        self.cleared: set[str] = set()

    def clear(self) -> None:
        """Begin a forward."""
        self.v.clear()
        self.x.clear()
        self.read.clear()
        self.cleared.clear()


class StateAccessError(Exception):
    """The network's own code touched a neuron's state."""

    allowed = "a state that is read after a call has set it, and never set by the forward"
    fix = (
        "read v after the layer was called (v_seq with store_v_seq=True), and compute the rest from "
        "what it returns"
    )

    def __init__(self, path: str, did: str) -> None:
        super().__init__(path, did)
        self.path, self.did = path, did


class OtherSpikesError(StateAccessError):
    """Other spikes were handed to a neuron than its last ones."""

    allowed = (
        "its own last spikes, which follow from the rest of its state, zeros before the first step"
    )
    fix = (
        "hand back what it returned, and compute another feedback in the forward, from the spikes to the "
        "input of a neuron without one"
    )


class OtherStartError(StateAccessError):
    """A neuron starts anew from another potential than v_0."""

    allowed = (
        "one shape, or a v_0 that is the reset potential, from which it starts at each other shape"
    )
    fix = "give each place in the network a neuron of its own"


class StandIn(nn.Module):
    """Stands where a neuron was; its tensors keep their names, and what is set on it is refused.

    It is made as an instance of the neuron's class too (:meth:`of`), because networks ask
    ``isinstance(layer, neuron.BaseNode)``.
    """

    @classmethod
    def of(
        cls,
        path: str,
        reading: Reading,
        state: State,
        original: nn.Module,
        memories: Collection[str],
    ) -> StandIn:
        """A stand-in that passes for the original's class.

        Args:
            path: Path of the neuron.
            reading: What it was read as.
            state: Where single-step membranes are kept.
            original: The neuron.
            memories: Names of its attributes that change when it is called.
        """
        kind = type(original)
        restart = dict.fromkeys(reading.restart, cls.restart)
        made: type[StandIn] = type(kind.__name__, (cls, kind), restart)
        return made(path, reading, state, original, memories)

    def __init__(
        self,
        path: str,
        reading: Reading,
        state: State,
        original: nn.Module,
        memories: Collection[str],
    ) -> None:
        nn.Module.__init__(self)
        tensors = reading.neuron.tensors()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach())
        if reading.gain is not None:
            self.register_buffer("gain", reading.gain)
        self._path, self._reading, self._steps = path, reading, state
        self._names = list(tensors)
        self._spec = reading.neuron.to_json()
        self._located = located(self._spec, path)
        self._original = (original,)
        self._hidden = frozenset({*memories, *getattr(original, "_memories", ()), "v_seq"})
        self._sealed = True

    def forward(self, x: torch.Tensor, *given: Any, **named: Any) -> Any:
        """The operator that the neuron is in the graph; ``given`` is the membrane, handed back."""
        params, readout = self._params(), self._reading.readout
        if self._reading.step_mode == "m":
            self._steps.x[self._path] = x
            self._steps.read[self._path] = {}
            if readout is not None:
                return readout(self._states(x, self._reading.state))
            return self._scaled(NEURON(x, params, self._located, "stepped", x.shape[0]))
        neuron = Neuron.from_json(self._spec, params)
        initial = neuron.initial(x)
        state, t, returned = self._steps.v.get(self._path) or (torch.stack(initial), 0, {})
        places = self._reading.states
        handed = {**dict(zip(places, given, strict=False)), **named}
        handed = {name: part for name, part in handed.items() if part is not None}
        if self._path in self._steps.cleared:
            self._steps.cleared.discard(self._path)
            if not handed:
                state, t, returned = torch.stack(initial), 0, {}
        if state.shape[1:] != x.shape:
            self._refuse_another_start(neuron)
            state, t = torch.stack(initial), 0
        if any(part is not returned.get(name) for name, part in handed.items()):
            parts = list(state.unbind()) if t else list(initial)
            self._refuse_other_spikes(handed, parts)
            for name, part in handed.items():
                parts[places[name]] = part if part.shape == x.shape else initial[places[name]]
            if SPIKES in neuron.dynamics.states:
                at = 1 + [*neuron.dynamics.states].index(SPIKES)
                parts[at] = neuron.fired(parts[0]).to(x.dtype)
            # Whether it is the first step shows in the graph, by where the state comes from.
            state, t = torch.stack(parts), 1
        spikes, state = NEURON_STEP(x, state, params, self._located, t)
        # Where the last spikes are a state, they are what the caller hands back.
        last = {name: i for i, name in enumerate(neuron.dynamics.states, 1)}.get(SPIKES)
        # No views, which a network could not detach in place.
        returned = {name: spikes if i == last else state[i].clone() for name, i in places.items()}
        self._steps.v[self._path] = (state, t + 1, returned)
        if readout is not None:
            return readout(state[self._reading.state])
        spikes = self._scaled(spikes)
        if not self._reading.returns_state:
            return spikes
        first = () if last in places.values() else (spikes,)
        return (*first, *returned.values())

    def _refuse_other_spikes(
        self, handed: Mapping[str, torch.Tensor], parts: Sequence[torch.Tensor]
    ) -> None:
        """Its last spikes follow from the rest of its state: others cannot be handed to it."""
        states = self._reading.neuron.dynamics.states
        places = {i: name for name, i in self._reading.states.items()}
        at = 1 + [*states].index(SPIKES) if SPIKES in states else -1
        name = places.get(at, "")
        # Of a traced tensor nothing can be asked; the run before the trace has asked.
        if type(handed.get(name)) is torch.Tensor:
            given, expected = handed[name], parts[at]
            if given.shape == expected.shape and not torch.equal(given, expected):
                did = f"the {name} that is handed to it is not what its last call returned"
                raise OtherSpikesError(self._path, did)

    def _refuse_another_start(self, neuron: Neuron) -> None:
        """Between inputs of two shapes frameworks start anew from v_reset, whatever v_0 is."""
        again = neuron.v_reset if neuron.reset == "hard" else 0.0
        if not bool((torch.as_tensor(neuron.v_0) == torch.as_tensor(again)).all()):
            raise OtherStartError(self._path, "the forward calls it with inputs of several shapes")

    def detach(self) -> None:
        """As the original's: nothing is differentiated here."""

    def clear(self, _: str) -> None:
        """Start anew at the next call, unless that is handed a state."""
        self._steps.cleared.add(self._path)

    def restart(self) -> Any:
        """As the methods of the original that return the state to start from."""
        self.reset()
        empty = tuple(torch.zeros(0) for _ in self._reading.states)
        return empty if len(empty) > 1 else empty[0]

    def reset(self) -> None:
        """As the original's, for a forward that resets its neurons itself."""
        self._steps.v.pop(self._path, None)
        self._steps.x.pop(self._path, None)

    def _scaled(self, spikes: torch.Tensor) -> torch.Tensor:
        return spikes if self._reading.gain is None else spikes * self.gain

    def _params(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self._names]

    def _states(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """What the steps of a multi-step call end with in one of the states, [T, N, ...]."""
        after: torch.Tensor = STATE(x, self._params(), self._located, "stepped", x.shape[0], index)
        return after

    def _remembered(self, name: str) -> torch.Tensor | None:
        """What the last call left in a state, if there was one and the name is a state's."""
        neuron, original = self._reading.neuron, self._original[0]
        names = ["v", *neuron.dynamics.states]
        places = {**{name: i for i, name in enumerate(names)}, **self._reading.states}
        x, kept = self._steps.x.get(self._path), self._steps.v.get(self._path)
        sequence = name == "v_seq" and getattr(original, "store_v_seq", False) and x is not None
        if name not in places and not sequence:
            return None
        if x is not None:
            read = self._steps.read[self._path]
            if name not in read:
                read[name] = self._states(x, 0 if sequence else places[name])
                read[name] = read[name] if sequence else read[name][-1]
            return read[name]
        return None if kept is None else kept[0][places[name]]

    @property
    def v(self) -> Any:
        """The membrane potential after the last call, also where the original's is a property."""
        return self.__getattr__("v")

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("_original")
        if original is None or name in self._buffers:
            return super().__getattr__(name)
        if (state := self._remembered(name)) is not None:
            return state
        value = getattr(original[0], name)
        if name in self._hidden:
            raise StateAccessError(self._path, f"the forward reads its {name}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_sealed"):
            raise StateAccessError(self._path, f"the forward sets its {name}")
        super().__setattr__(name, value)


class Fired:
    """Fires neurons without a memory for a module that traces as it is: one operator a step.

    Args:
        path: Path of the module.
        neuron: The neurons.
        state: Where it is kept how far they are.
    """

    def __init__(self, path: str, neuron: Neuron, state: State) -> None:
        self._path, self._neuron, self._steps = path, neuron, state

    @property
    def fresh(self) -> bool:
        """Whether it has not fired since the forward, or the last restart, began."""
        return self._path not in self._steps.v

    def __call__(self, h: torch.Tensor, use: str = "") -> torch.Tensor:
        """The spikes at a potential [N, ...]; each ``use`` has steps of its own."""
        key = f"{self._path}:{use}" if use else self._path
        state, t, _ = self._steps.v.get(key) or (torch.stack(self._neuron.initial(h)), 0, {})
        params = [*self._neuron.tensors().values()]
        spikes: torch.Tensor
        spec = located(self._neuron.to_json(), self._path)
        spikes, state = NEURON_STEP(h, state, params, spec, t)
        self._steps.v[key] = (state, t + 1, {})
        return spikes

    def compared(self, h: torch.Tensor) -> torch.Tensor:
        """The same for a potential that the layer starts from, which is no step of it."""
        fired: torch.Tensor = self._neuron.fired(h).to(h.dtype)
        return fired

    def restart(self) -> None:
        """Begin anew."""
        for key in [k for k in self._steps.v if k.partition(":")[0] == self._path]:
            del self._steps.v[key]


def _in_place(
    path: str, reading: Reading, state: State, module: nn.Module, memories: Collection[str]
) -> nn.Module:
    """What stands in a neuron's place."""
    if reading.cell is not None:
        return reading.cell.trace(module, Fired(path, reading.neuron, state))
    return StandIn.of(path, reading, state, module, memories)


def wrap(
    net: nn.Module,
    readings: Mapping[str, Reading],
    memories: Mapping[str, Collection[str]],
    state: State,
) -> None:
    """Put a stand-in in every neuron's place, under all names that it has."""
    stand_ins = {
        id(module): _in_place(path, readings[path], state, module, memories.get(path, ()))
        for path, module in net.named_modules()
        if path in readings
    }
    if id(net) in stand_ins:
        raise UsageError(
            "the network is a single neuron; put it into a module, such as nn.Sequential"
        )
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if id(child) in stand_ins:
                module._modules[name] = stand_ins[id(child)]
