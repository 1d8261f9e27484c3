"""This project's own neurons, and the neuron classes that users made known."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import Finding
from ..neurons import Node
from .base import Reading, look_alike


class Native:
    """Reads :class:`spikeport.converters.neurons.Node` and registered classes."""

    name = "torch"

    def __init__(self) -> None:
        self.readers: dict[type[nn.Module], Callable[[nn.Module], Reading]] = {}

    def read(self, module: nn.Module, path: str) -> Reading | list[Finding] | None:
        """The declaration that the module carries."""
        if (reader := self.readers.get(type(module))) is not None:
            return reader(module)
        if not isinstance(module, Node):
            return None
        if type(module).forward is not Node.forward or type(module).neuron is not Node.neuron:
            return [look_alike(module, path, "spikeport.converters.neurons.Node")]
        return Reading(module.neuron)

    def reset(self, module: nn.Module) -> None:
        """A Node keeps no state from one call to the next."""
