"""A loaded artifact that is wrong on purpose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Tampered:
    """A device that is wrong: it changes spikes, or outputs, on their way back."""

    model: Any
    layer: str = ""
    change: Any = None
    batch: int = field(init=False)

    def __post_init__(self) -> None:
        self.batch = self.model.batch

    @property
    def target(self) -> str:
        return str(self.model.target)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def inputs(self) -> Any:
        return self.model.inputs

    @property
    def batch_dims(self) -> Any:
        return self.model.batch_dims

    @property
    def output_dims(self) -> Any:
        return self.model.output_dims

    @property
    def output_times(self) -> Any:
        return self.model.output_times

    @property
    def T(self) -> Any:  # noqa: N802 -- as in Runs
        return self.model.T

    @property
    def time(self) -> str:
        return str(self.model.time)

    @property
    def has_probes(self) -> bool:
        return bool(self.model.has_probes)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        return self.model(*inputs)

    def probe(self, *inputs: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
        outputs, spikes = self.model.probe(*inputs)
        if self.layer:
            spikes = {**spikes, self.layer: self.change(spikes[self.layer])}
        return outputs, spikes
