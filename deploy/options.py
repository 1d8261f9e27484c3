"""The options of a training, and which of them decide its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..converters.errors import DeviceError, UsageError
from ..converters.losses import LOSSES

Backend = Literal["torch", "fused", "auto"]
Optimizer = Literal["sgd", "adam"]
Target = Literal["ipu", "ipu-sim"]
#: What may differ between a training and one that it resumes; all else decides the result.
_NOT_RESULT = frozenset(
    {
        *("device", "data", "out_dir", "resume", "tensorboard", "backend", "channels_last"),
        "graph",
        "sync_batch_norm",  # decides by way of separate_norms
    }
)
_LEAST = {
    **{"epochs": 1, "batch_size": 1, "crop": 0},
    **{"device_iterations": 1, "gradient_accumulation": 1, "replicas": 1},
}
#: What belongs to a target, and what it cannot be combined with.
_OF_TARGET = ("device_iterations", "gradient_accumulation", "replicas")
_NOT_OF_TARGET = ("amp", "backend", "channels_last", "sync_batch_norm")
#: What checkpoints of before these could be chosen do not hold.
_OF_OLD = {
    **{"net": "CSNN", "separate_norms": 1, "loss": "mse", "optimizer": "sgd", "target": None},
    **{"device_iterations": 1, "gradient_accumulation": 1, "replicas": 1},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a network is trained; ``spikeport train --help`` describes each.

    Attributes:
        network: Its name and what it is constructed with, as numbers and strings.

    Raises:
        UsageError: With everything that cannot be used.
        DeviceError: There is no such device.
    """

    network: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 64
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    loss: str = "mse"
    optimizer: Optimizer = "sgd"
    crop: int = 0
    flip: bool = False
    half: bool = False
    amp: bool = False
    seed: int = 0
    limit: int | None = None
    backend: Backend | None = None
    channels_last: bool = False
    sync_batch_norm: bool = False
    graph: bool = False
    target: Target | None = None
    device_iterations: int = 1
    gradient_accumulation: int = 1
    replicas: int = 1
    device: str = "cpu"
    data: str = "fashion-mnist"
    out_dir: Path | None = None
    resume: Path | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}"
            for name, least in _LEAST.items()
            if getattr(self, name) < least
        ]
        if not self.lr > 0:
            problems.append("lr must be above 0")
        if self.backend not in (None, *get_args(Backend)):
            problems.append(f"backend is {self.backend!r}; allowed: {', '.join(get_args(Backend))}")
        if self.half and self.amp:
            problems.append("half and amp exclude each other")
        if self.graph and not self.device.startswith("cuda"):
            problems.append(f"graph is a CUDA graph, and the device is {self.device}")
        for name, value, allowed in (
            ("loss", self.loss, tuple(LOSSES)),
            ("optimizer", self.optimizer, get_args(Optimizer)),
            ("target", self.target, (None, *get_args(Target))),
        ):
            if value not in allowed:
                problems.append(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
        problems += self._combinations()
        if problems:
            raise UsageError("; ".join(problems))
        _check_device(self.device)

    def _combinations(self) -> Iterator[str]:
        if self.target is None:
            if given := [n for n in _OF_TARGET if getattr(self, n) != 1]:
                yield f"{', '.join(given)} are of a target; give target ipu or ipu-sim"
            return
        if given := [n for n in _NOT_OF_TARGET if getattr(self, n)]:
            yield f"{', '.join(given)} cannot be combined with target {self.target}"
        if self.device != "cpu":
            yield f"device is {self.device!r}; the host of target {self.target} is cpu"
        slices = self.gradient_accumulation * self.replicas
        if slices > 0 and self.batch_size % slices:
            yield (
                f"a batch of {self.batch_size} does not divide into {slices} micro-batches = "
                f"gradient_accumulation {self.gradient_accumulation} x replicas {self.replicas}"
            )

    @property
    def call_size(self) -> int:
        """Images that one step of the trainer takes: a batch for each device iteration."""
        return self.batch_size * self.device_iterations

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images."""
        return torch.half if self.half else torch.float

    @property
    def folder(self) -> Path:
        """Where checkpoints and scalars go; named after the options unless it was given."""
        if self.out_dir is not None:
            return self.out_dir
        numbers = [f"{k}{v}" for k, v in self.network.items() if isinstance(v, (int, float))]
        own = [f"b{self.batch_size}", f"lr{self.lr}", *["half"] * self.half, *["amp"] * self.amp]
        own += [self.target] if self.target else []
        return Path("logs") / "_".join([self.network.get("net", "net"), *numbers, *own])

    def plain(self) -> dict[str, Any]:
        """As numbers and strings, which load without unpickling objects."""
        own = {n: str(v) if isinstance(v, Path) else v for n, v in asdict(self).items()}
        del own["network"]
        of_net = {f"net.{n}" if n in own else n: v for n, v in self.network.items()}
        return {**of_net, **own}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What in two trainings' plain options makes their results differ, a line for each."""
    theirs = {**_OF_OLD, **theirs}
    names = [n for n in ours if n not in _NOT_RESULT and ours[n] != theirs.get(n)]
    return [f"{n}: {theirs.get(n)} there, {ours[n]} here" for n in names]


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device is {name!r}; allowed: cpu, cuda, cuda:0, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {name!r}; allowed: cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"there is no device {name}: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs; give --device cpu or one of these"
        )
