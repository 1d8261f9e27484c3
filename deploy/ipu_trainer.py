"""Training on the IPU, or its simulation, as :class:`~.training.Training` asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..converters.errors import UnsupportedError, UsageError
from ..converters.losses import rates
from ..targets import ipu
from . import data
from .options import Options
from .ranks import Ranks
from .trainer import check_outputs


class IpuTrainer:
    """Trains through poptorch, with a cosine learning rate.

    Args:
        net: Samples [N, ...] -> firing rates [N, classes], or spikes [T, N, classes]; it is copied.
        options: Those of the training.
        ranks: This process alone.
        classes: How many there are in the data.

    Raises:
        UnsupportedError: With everything in the network that cannot be rewritten.
        TargetUnavailableError: There is no SDK.
    """

    def __init__(self, net: nn.Module, options: Options, ranks: Ranks, classes: int) -> None:
        if ranks.size > 1:
            raise UsageError(
                f"{ranks.size} processes of torchrun cannot share an IPU; give --replicas"
            )
        parameters: dict[str, Any] = (
            {"momentum": options.momentum} if options.optimizer == "sgd" else {}
        )
        try:
            module = ipu.training_module(net, options.loss)
        except UnsupportedError as error:
            # What the trace would refuse at the first step, so that all is said at once.
            sample = data.load(options.data, split="train", limit=options.batch_size)
            findings = ipu.check(net, sample.x, sample.y, options.loss)
            raise UnsupportedError(error.headline, findings) from error
        self._trainer = ipu.trainer(
            module,
            options.optimizer,
            options.lr,
            device_iterations=options.device_iterations,
            gradient_accumulation=options.gradient_accumulation,
            replicas=options.replicas,
            half=options.half,
            simulator=options.target == "ipu-sim",
            seed=options.seed,
            **parameters,
        )
        self._options, self._classes, self._epochs = options, classes, 0

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step, see :class:`~.trainer.Trainer`."""
        spikes, loss = self._trainer.step(x, y)
        check_outputs(spikes, len(y), self._classes)
        return loss, (rates(spikes.float()).argmax(1) == y).sum()

    def end_epoch(self) -> None:
        """Move the learning rate on."""
        self._epochs += 1
        self._set_lr()

    def _set_lr(self) -> None:
        done = self._epochs / self._options.epochs
        self._trainer.set_lr(self._options.lr * (1 + math.cos(math.pi * done)) / 2)

    def evaluate(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        """Mean loss and accuracy, see :class:`~.trainer.Trainer`."""
        return self._trainer.evaluate(x.to(self._options.dtype), y, self._options.batch_size)

    def state(self) -> dict[str, Any]:
        """State dicts of network and optimizer, and the epochs that are done."""
        return {**self._trainer.state(), "epochs_done": self._epochs}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._trainer.load_state(state)
        self._epochs = state["epochs_done"]
        self._set_lr()

    def close(self) -> None:
        """Free the device."""
        self._trainer.close()
