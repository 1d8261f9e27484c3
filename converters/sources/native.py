"""This project's own neurons, and the neuron classes that users made known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import Finding
from ..neurons import Neuron, Node, Readout
from ..surrogates import Surrogate
from .base import Learning, Reading, look_alike

#: What decides a layer's output; a subclass that changes none of it is the neuron that it declares.
_DECIDES = ("forward", "neuron", "__call__", "__getattr__", "__getattribute__")


class Native:
    """Reads ``Node`` and ``Readout`` of :mod:`spikeport.converters.neurons`, and registered classes."""

    name = "torch"

    def __init__(self) -> None:
        self.readers: dict[type[nn.Module], Callable[[nn.Module], Reading]] = {}

    def read(self, module: nn.Module, path: str) -> Reading | list[Finding] | None:
        """The declaration that the module carries."""
        if (reader := self.readers.get(type(module))) is not None:
            return reader(module)
        if not isinstance(module, (Node, Readout)):
            return None
        known = Node if isinstance(module, Node) else Readout
        if any(getattr(type(module), name) is not getattr(known, name) for name in _DECIDES):
            return [look_alike(module, path, f"spikeport.converters.neurons.{known.__name__}")]
        return Reading(module.neuron, readout=None if known is Node else _membranes)

    def learning(
        self, module: nn.Module, path: str, surrogate: Surrogate | None = None
    ) -> Learning | list[Finding]:
        """As the Node says; a class that was made known says it with the same attributes."""
        own = getattr(module, "surrogate", None)
        chosen = surrogate or (own if isinstance(own, Surrogate) else None)
        if chosen is None:
            return [
                Finding(
                    rule="unknown-surrogate",
                    where=path,
                    found=f"{type(module).__name__}, which has no surrogate gradient",
                    allowed="an attribute surrogate of spikeport.converters.surrogates",
                    fix="give it one, or name one for this module: surrogates={path: ...}",
                )
            ]
        return Learning(chosen, self._neuron, bool(getattr(module, "detach_reset", False)))

    def _neuron(self, module: nn.Module) -> Neuron:
        if isinstance(module, Node):
            return module.neuron
        kinds = [kind for kind in type(module).__mro__ if kind in self.readers]
        return self.readers[kinds[0]](module).neuron

    def reset(self, module: nn.Module) -> None:
        """A layer keeps no state from one call to the next; a class that was made known may."""
        if type(module) in self.readers and callable(reset := getattr(module, "reset", None)):
            reset()


def _membranes(v_seq: torch.Tensor) -> torch.Tensor:
    return v_seq
