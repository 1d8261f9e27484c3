"""What every source of networks offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from ..errors import Finding
from ..neurons import Neuron


@dataclass(frozen=True)
class Reading:
    """What a module was read as.

    Attributes:
        neuron: Its declaration.
        step_mode: ``"m"`` if a call takes x_seq [T, N, ...], ``"s"`` if it takes x [N, ...].
    """

    neuron: Neuron
    step_mode: Literal["s", "m"] = "m"


class Source(Protocol):
    """One framework."""

    name: str

    def read(self, module: nn.Module, path: str) -> Reading | list[Finding] | None:
        """The neuron; or what stops it; or None for a module that is no neuron of this source."""

    def reset(self, module: nn.Module) -> None:
        """Put the module's own state back to its value before the first step."""


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
