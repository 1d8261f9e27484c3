"""This project's own neurons, and the neuron classes that users made known."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import Finding
from ..neurons import Neuron, Node
from ..surrogates import Surrogate
from .base import Learning, Reading, look_alike

#: What decides a Node's output; a subclass that changes none of it is the neuron that it declares.
_DECIDES = ("forward", "neuron", "__call__", "__getattr__", "__getattribute__")


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
        if any(getattr(type(module), name) is not getattr(Node, name) for name in _DECIDES):
            return [look_alike(module, path, "spikeport.converters.neurons.Node")]
        return Reading(module.neuron)

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
        """A Node keeps no state from one call to the next; a class that was made known may."""
        if type(module) in self.readers and callable(reset := getattr(module, "reset", None)):
            reset()
