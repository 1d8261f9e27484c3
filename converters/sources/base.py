"""What every source of networks offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import nn

from ..errors import Finding
from ..neurons import Neuron
from ..surrogates import KINDS, Surrogate


@dataclass(frozen=True)
class Cell:
    """How a layer is traced whose neurons fire on what plain arithmetic makes of its input and its past.

    Attributes:
        trace: Makes, of the module and of what fires in its place, one that traces as it is.
        fire: The module's own spikes at a potential.
    """

    trace: Callable[[nn.Module, Fires], nn.Module]
    fire: Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Fires(Protocol):
    """Fires a layer's neurons, a step at each call."""

    @property
    def fresh(self) -> bool:
        """Whether it has not fired since the forward, or the last restart, began."""

    def __call__(self, h: torch.Tensor, use: str = "") -> torch.Tensor:
        """The spikes at a potential [N, ...]; each ``use`` has steps of its own."""

    def compared(self, h: torch.Tensor) -> torch.Tensor:
        """The same for a potential that the layer starts from, which is no step of it."""

    def restart(self) -> None:
        """Begin anew."""


@dataclass(frozen=True)
class Reading:
    """What a module was read as.

    Attributes:
        neuron: Its declaration.
        step_mode: ``"m"`` if a call takes x_seq [T, N, ...], ``"s"`` if it takes x [N, ...].
        states: Names of the arguments by which a caller may hand its state back, in their order, with
            their places in the declared state (v, ...); its last spikes may be one of them.
        returns_state: Whether a call returns these after the spikes.
        gain: What its spikes are multiplied by, or None for spikes of 0 and 1.
        restart: Names of its methods that return what to start from.
        readout: For neurons that give no spikes: what a call returns of a state, [T, N, ...] or [N, ...].
        state: Place of that state in the declared ones; the membrane potential is the first.
        part: Name of the module's child that is the neuron, where the rest of it is plain arithmetic.
        cell: For a neuron without a memory on top of a module that has one: how that is traced. The
            places in ``states`` have no meaning then.
    """

    neuron: Neuron
    step_mode: Literal["s", "m"] = "m"
    states: Mapping[str, int] = field(default_factory=dict)
    returns_state: bool = False
    gain: torch.Tensor | None = None
    restart: tuple[str, ...] = ()
    readout: Callable[[torch.Tensor], Any] | None = None
    state: int = 0
    part: str = ""
    cell: Cell | None = None

    def spikes(self, output: Any) -> torch.Tensor:
        """The spikes, 0 and 1, in what a call returns."""
        spikes: torch.Tensor = output[0] if self.returns_state else output
        return spikes if self.gain is None else spikes / self.gain


@dataclass(frozen=True)
class Learning:
    """How a neuron that was read learns, which its declaration does not say.

    Attributes:
        surrogate: What stands for the derivative of its step.
        neuron: Reads the declaration of a module again, its parameters with their histories.
        detach_reset: Whether no gradient passes through resets.
        detach_past: Whether none passes through what a spike of an earlier step does.
        gain: Reads what the spikes of a module are multiplied by, if anything, likewise.
    """

    surrogate: Surrogate
    neuron: Callable[[Any], Neuron]
    detach_reset: bool = False
    detach_past: bool = False
    gain: Callable[[Any], torch.Tensor] | None = None


@dataclass(frozen=True)
class Memory:
    """A layer that is no neuron and keeps values from step to step, which trace as they are.

    Attributes:
        step_mode: As in :class:`Reading`.
    """

    step_mode: Literal["s", "m"] = "m"


#: What a source has to say about a module: what it is, or what stops it.
Read: TypeAlias = "Reading | Memory | list[Finding]"


class Source(Protocol):
    """One framework."""

    name: str

    def read(self, module: nn.Module, path: str) -> Read | None:
        """The neuron or the memory; or what stops it; or None for a module that keeps no state."""

    def learning(
        self, module: nn.Module, path: str, surrogate: Surrogate | None = None
    ) -> Learning | list[Finding]:
        """How a module that :meth:`read` knows learns, or what stops it.

        ``surrogate`` takes the place of the module's own.
        """

    def reset(self, module: nn.Module) -> None:
        """Put the module's own state back to its value before the first step."""


def comparison(surrogate: Any) -> Literal[">=", ">"] | None:
    """How a surrogate function fires at the threshold itself, seen from its output."""
    tiny = torch.finfo(torch.float32).tiny
    u = torch.tensor([-1.0, -tiny, 0.0, tiny, 1.0])
    with torch.no_grad():
        spikes = surrogate(u)
    if torch.equal(spikes, (u >= 0).float()):
        return ">="
    return ">" if torch.equal(spikes, (u > 0).float()) else None


def same_derivative(function: Any, declared: Surrogate) -> bool:
    """Whether a surrogate function's gradient is what a declared one gives."""
    u = torch.cat([torch.linspace(-2.5, 2.5, 251), torch.zeros(1)]).requires_grad_()
    try:
        with torch.enable_grad():
            (theirs,) = torch.autograd.grad(function(u).sum(), u)
    except RuntimeError:
        return False  # it has no gradient, or a broken one
    ours = declared.derivative(u.detach())
    return bool(torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5 * float(ours.abs().max())))


def unknown_surrogate(function: Any, path: str) -> Finding:
    """The finding for a surrogate gradient that is not declared."""
    name = getattr(function, "__qualname__", type(function).__qualname__).split(".<locals>")[0]
    return Finding(
        rule="unknown-surrogate",
        where=path,
        found=f"the surrogate gradient {name}, which is not declared or gives another gradient than "
        "the declared one",
        allowed=", ".join(KINDS),
        fix="declare its derivative (spikeport.converters.surrogates.surrogate), and name it for this "
        "module: surrogates={path: ...}",
    )


def surrogate_output(surrogate: Any, path: str) -> Finding:
    """The finding for a surrogate function whose output is no step."""
    return Finding(
        rule="surrogate-output",
        where=path,
        found=f"{surrogate} gives other values than spikes of 0 and 1",
        allowed="a surrogate function whose output is a step at 0",
        fix="use one whose forward is a step (SpikingJelly: spiking=True), or declare the dynamics "
        "that you mean (spikeport.converters.neurons.dynamics)",
    )


def look_alike(module: nn.Module, path: str, known: str) -> Finding:
    """The finding for a module that derives from a known neuron but is not it."""
    kind = type(module)
    return Finding(
        rule="look-alike-neuron",
        where=path,
        found=f"{kind.__module__}.{kind.__qualname__}, a subclass of {known}",
        allowed="a neuron whose dynamics are declared; a subclass may compute something else",
        fix="declare its dynamics (spikeport.converters.neurons.dynamics) and make the class known "
        "(spikeport.converters.sources.register), or use the base class",
    )
