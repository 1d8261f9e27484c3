"""The conversion step by step: what each pass did, and the graph after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import targets as registry
from ..converters.capture import capture
from ..converters.program import PassReport, Program, Time
from .pipeline import passes


@dataclass(frozen=True)
class Step:
    """The capture or one pass.

    Attributes:
        report: What it did, and where it did not apply, why.
        program: The program after it.
    """

    report: PassReport
    program: Program

    def to_dict(self) -> dict[str, Any]:
        """The step as plain data."""
        return {
            "name": self.report.name,
            "done": list(self.report.done),
            "skipped": list(self.report.skipped),
            "graph": str(self.program),
        }

    def __str__(self) -> str:
        return f"{self.report}\n{self.program}"


def steps(
    net: nn.Module,
    args: Sequence[torch.Tensor],
    target: str,
    dtype: torch.dtype | None = None,
    time: Time = "unrolled",
    keep_rounding: bool = False,
) -> list[Step]:
    """The capture and each pass of a target, in order.

    Raises:
        CaptureError: The network cannot become a graph.
        UnsupportedError: It cannot be run step by step, if that is asked.
        UsageError: The target has no such dtype or time, or the dtype cannot keep the rounding.
    """
    chosen = registry.get(target)
    program = capture(net, args)
    found = [Step(program.history[-1], program)]
    program = replace(program, target=target)
    for rewrite in passes(chosen, dtype or chosen.default_dtype(), time, keep_rounding):
        program = rewrite(program)
        found.append(Step(program.history[-1], program))
    return found
