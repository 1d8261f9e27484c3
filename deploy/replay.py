"""A training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..converters.errors import UsageError
from ..targets.cuda.capture import captured

Step = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Replay:
    """A step that runs as it is for the first calls, then is captured once and replayed.

    Kernels are launched as one graph, so that a small network is no longer as slow as Python. Whatever
    Python does in the step, it does while capturing only; batches of another shape run as they are.

    Args:
        step: Samples [N, ...] and classes [N] on a GPU -> two tensors.
        warm_up: Calls before the capture, in which libraries choose their algorithms and the optimizer
            makes its states.
    """

    def __init__(self, step: Step, warm_up: int) -> None:
        self._step, self._left = step, warm_up
        #: Where the step runs. What binds itself to a stream, as DDP does, has to be made on it.
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step on x [N, ...] and y [N].

        Raises:
            UsageError: The step cannot be captured.
        """
        if self._left > 0:
            self._left -= 1
            return self._aside(x, y)
        if self._graph is None:
            self._capture(x, y)
        elif (x.shape, y.shape) != (self._x.shape, self._y.shape):
            return self._aside(x, y)
        assert self._graph is not None
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()
        a, b = self._outputs
        return a.clone(), b.clone()

    def close(self) -> None:
        """Free the graph and its memory."""
        self._graph = None

    def _aside(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step as it is, on the stream that it is captured on: autograd keeps to a stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self._step(x, y)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def _capture(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._x, self._y = x.clone(), y.clone()
        self._graph, self._outputs = captured(
            lambda: self._step(self._x, self._y),
            self.stream,
            lambda reason: UsageError(
                f"a training step of this network cannot be captured as a CUDA graph: {reason}. Leave "
                "--graph out"
            ),
        )
