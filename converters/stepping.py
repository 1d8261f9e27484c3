"""A program that computes one time step: how its calls make up a call of the source network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .errors import UsageError

#: The state that counts the steps which a running sum or mean has seen.
COUNTER = "steps"


@dataclass(frozen=True)
class State:
    """A tensor that a step takes and gives back for the next one.

    Attributes:
        name: The layer's path and the state's own name, as ``conv.2.v``.
        initial: Its values before the first step.
        shape: Its shape, where the graph holds its last dimensions as one.
    """

    name: str
    initial: torch.Tensor
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Stepping:
    """How steps make up a whole call.

    Attributes:
        steps: Time steps of a call whose inputs have none, such as images.
        inputs: Of each input of the source network the dimension that is time, which a step's lacks;
            None if the input is given to every step as it is.
        outputs: The same of each output; None if the output of the last step is that of the call.
        states: What goes from step to step, in the graph's order.
    """

    steps: int
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    states: tuple[State, ...] = ()

    @property
    def longest(self) -> int | None:
        """Steps after which a running sum would stop to count exactly; None without one."""
        counters = [s.initial.dtype for s in self.states if s.name == COUNTER]
        return round(2 / torch.finfo(counters[0]).eps) if counters else None

    def split(self, inputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """The inputs of each step out of those of a call.

        Raises:
            UsageError: Their numbers of steps differ, or are 0; or they are not as many as they should be.
        """
        if len(inputs) != len(self.inputs):
            raise UsageError(f"{len(inputs)} inputs given, {len(self.inputs)} wanted")
        pairs = list(zip(inputs, self.inputs, strict=True))
        counts = {x.shape[d] for x, d in pairs if d is not None and x.dim() > d}
        if len(counts) > 1 or 0 in counts:
            raise UsageError(
                f"inputs of {' and '.join(map(str, sorted(counts)))} time steps; allowed: the same "
                "number, at least 1, in all"
            )
        T = counts.pop() if counts else self.steps
        return [
            tuple(x if d is None or x.dim() <= d else x.select(d, t) for x, d in pairs)
            for t in range(T)
        ]

    def gather(self, steps: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """The outputs of a call out of those of its steps."""
        return [self.join(i, parts) for i, parts in enumerate(zip(*steps, strict=True))]

    def join(self, index: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """One output of a call out of those of its steps."""
        d = self.outputs[index]
        return parts[-1] if d is None else torch.stack(list(parts), d)

    def cast(self, dtypes: Sequence[torch.dtype]) -> Stepping:
        """The same with its states in these dtypes."""
        pairs = zip(self.states, dtypes, strict=True)
        states = tuple(replace(s, initial=s.initial.to(dtype)) for s, dtype in pairs)
        return replace(self, states=states)
