"""How long a call takes on a device, and how that compares with a copy of its operands."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: Words an element that have to move: read x and write the spikes; then read x and the gradient of the
#: spikes and write the gradient of x. A copy moves two.
FORWARD_WORDS, FORWARD_BACKWARD_WORDS, COPY_WORDS = 2, 5, 2
_FLUSH_BYTES, _FLUSHES = 2**30, 4


@dataclass(frozen=True)
class Timer:
    """Medians of single calls.

    On a GPU each call is timed by CUDA events, behind writes of 4 GiB: no operand is in the L2 cache,
    and the host, which runs ahead meanwhile, is waited for only where it launches more slowly than that.

    Attributes:
        device: Where the calls run.
        seconds: Time to spend on one median.
        repeats: The fewest and the most calls that it is taken of.
    """

    device: torch.device
    seconds: float = 0.5
    repeats: tuple[int, int] = (5, 50)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """The median time of ``call``, after two calls that warm it up."""
        call()
        first = self._samples(call, 1)[0]
        low, high = self.repeats
        count = min(max(int(self.seconds * 1e3 / max(first, 1e-6)), low), high)
        return statistics.median(self._samples(call, count))

    def copy(self, like: torch.Tensor) -> float:
        """The median time in ms of a copy of ``like`` within the device."""
        out = torch.empty_like(like)
        return self.milliseconds(lambda: out.copy_(like))

    def _samples(self, call: Callable[[], Any], count: int) -> list[float]:
        if self.device.type != "cuda":
            samples = []
            for _ in range(count):
                start = time.perf_counter()
                call()
                samples.append((time.perf_counter() - start) * 1e3)
            return samples
        with torch.cuda.device(self.device):
            flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
            event: Any = torch.cuda.Event
            events = []
            for _ in range(count):
                start_event = event(enable_timing=True)
                end_event = event(enable_timing=True)
                for _ in range(_FLUSHES):
                    flush.zero_()
                start_event.record()
                call()
                end_event.record()
                events.append((start_event, end_event))
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in events]


def roofline(copy_ms: float, words: int) -> float:
    """The least time in ms for ``words`` an element, from a copy of as many elements."""
    return copy_ms * words / COPY_WORDS
