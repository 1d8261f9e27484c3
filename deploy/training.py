"""The training of a network on labelled images: epochs, checkpoints, and going on from one.

Every epoch's order of images comes from the seed and the epoch alone, so that a resumed training, and
one of several processes, see the batches that one process in one go does.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..converters.errors import CheckpointError, SpikeportError, UsageError
from . import data
from .options import Options, differences
from .ranks import ALONE, Ranks
from .trainer import TorchTrainer, Trainer, separate_norms

#: Makes what trains a network, from it, the options, the processes and the number of classes.
MakeTrainer = Callable[[nn.Module, Options, Ranks, int], Trainer]


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave; losses are means, accuracies fractions, speeds images a second."""

    epoch: int
    train_loss: float
    train_acc: float
    test_loss: float
    test_acc: float
    max_test_acc: float
    train_speed: float
    test_speed: float
    seconds: float

    def __str__(self) -> str:
        names = ("train_loss", "train_acc", "test_loss", "test_acc", "max_test_acc")
        return f"epoch = {self.epoch}, " + ", ".join(f"{n} = {getattr(self, n):.4f}" for n in names)


class Training:
    """A network in training.

    ``checkpoint_max.pth`` (the best on the test set), ``checkpoint_latest.pth`` (to resume from) and
    TensorBoard's scalars go to ``options.folder``; process 0 writes them.

    Args:
        make_net: Makes the network, images [N, 1, H, W] -> firing rates [N, classes] or spikes
            [T, N, classes]; called once the seed is set.
        options: How.
        ranks: The processes that train together, each with the same arguments.
        make_trainer: Makes what takes the steps.

    Raises:
        UsageError: The options fit neither the data nor the checkpoint to resume from.
        DataError: The data are missing or malformed.
        CheckpointError: The checkpoint to resume from is none, or of another network.
    """

    def __init__(
        self,
        make_net: Callable[[], nn.Module],
        options: Options,
        ranks: Ranks = ALONE,
        make_trainer: MakeTrainer = TorchTrainer,
    ) -> None:
        self._options, self._ranks = options, ranks
        train_set = data.load(options.data, split="train", limit=options.limit)
        test_set = data.load(options.data, split="test", limit=options.limit)
        _check_batches(len(train_set), options, ranks)
        classes = 1 + int(max(train_set.y.max(), test_set.y.max()))
        device = options.torch_device
        self._train = train_set.x.to(device, options.dtype), train_set.y.to(device)
        self._test = test_set.x.to(device), test_set.y.to(device)
        torch.manual_seed(options.seed)
        self.net = make_net()
        self._plain = options.plain() | {"separate_norms": separate_norms(self.net, options, ranks)}
        self._trainer = make_trainer(self.net, options, ranks, classes)
        self._first, self._max_test_acc = 0, -1.0
        if options.resume is not None:
            self._first, self._max_test_acc = _resume(options.resume, self._trainer, self._plain)

    def epochs(self) -> Iterator[Epoch]:
        """Train; yields each epoch's results once its checkpoint is on disk.

        Raises:
            UsageError: The folder cannot be written.
            SpikeportError: The training diverged.
        """
        writer = None
        if self._ranks.first:
            _make(self._options.folder)
            if self._options.tensorboard:
                writer = summary_writer(self._options.folder, self._first)
        try:
            for epoch in range(self._first, self._options.epochs):
                result = self._epoch(epoch)
                if writer:
                    for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
                        writer.add_scalar(name, getattr(result, name), epoch)
                    writer.flush()
                yield result
        finally:
            self._trainer.close()
            if writer:
                writer.close()

    def _epoch(self, epoch: int) -> Epoch:
        start = time.perf_counter()
        train_loss, train_acc, seen = self._steps(epoch)
        trained = time.perf_counter()
        state = self._trainer.state()
        # The loss cannot tell: a NaN potential is not above the threshold, so its rate is 0.
        if wrong := [name for name, p in state["net"].items() if not p.isfinite().all()]:
            raise SpikeportError(
                f"training diverged in epoch {epoch}: {', '.join(wrong)} not finite; lower --lr"
            )
        test_loss, test_acc = self._trainer.evaluate(*self._test)
        tested = time.perf_counter()
        best = test_acc > self._max_test_acc
        self._max_test_acc = max(test_acc, self._max_test_acc)
        if self._ranks.first:
            own = {"epoch": epoch, "max_test_acc": self._max_test_acc, "args": self._plain}
            for name in ("latest", "max") if best else ("latest",):
                save({**state, **own}, self._options.folder / f"checkpoint_{name}.pth")
        return Epoch(
            epoch=epoch,
            train_loss=train_loss,
            train_acc=train_acc,
            test_loss=test_loss,
            test_acc=test_acc,
            max_test_acc=self._max_test_acc,
            train_speed=seen / (trained - start),
            test_speed=len(self._test[1]) / (tested - trained),
            seconds=time.perf_counter() - start,
        )

    def _steps(self, epoch: int) -> tuple[float, float, int]:
        """One epoch's steps: their mean loss and accuracy, and how many images they saw."""
        (x, y), size, ranks = self._train, self._options.call_size, self._ranks
        # Seeded for each epoch, so that a resumed run sees the same order of images.
        seed = self._options.seed * 100_000 + epoch
        torch.manual_seed(seed * ranks.size + ranks.rank)  # for layers that draw, such as dropout
        rng = torch.Generator().manual_seed(seed)
        images = augment(x, self._options.crop, self._options.flip, rng)
        order = torch.randperm(len(y), generator=rng).to(y.device)
        batches = torch.split(order, size)[: len(order) // size]  # no partial one
        sums = torch.zeros(2, device=y.device, dtype=torch.double)
        hidden = None if ranks.first else True
        for batch in tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=hidden):
            loss, right = self._trainer.step(images[batch], y[batch])
            sums[0] += loss
            sums[1] += right
        self._trainer.end_epoch()
        loss_sum, right_sum = ranks.total(sums).tolist()
        seen = len(batches) * size
        return loss_sum / len(batches), right_sum / seen, seen


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made: {error.strerror}; give another --out-dir"
        ) from error


def _check_batches(images: int, options: Options, ranks: Ranks) -> None:
    problems = []
    if images < options.call_size:
        problems.append(f"{images} training images are no batch of {options.call_size}")
    if options.batch_size < ranks.size:
        problems.append(
            f"a batch of {options.batch_size} is too small for {ranks.size} processes, each of which "
            "takes a share"
        )
    if problems:
        raise UsageError("; ".join(problems) + "; give another --batch-size")


def augment(x: torch.Tensor, pad: int, flip: bool, rng: torch.Generator) -> torch.Tensor:
    """Shift each of x [N, 1, H, W] by up to ``pad`` pixels, and mirror half of them if ``flip``."""
    N, _, H, W = x.shape
    if pad:
        top, left = torch.randint(2 * pad + 1, (2, N, 1), generator=rng).to(x.device)
        rows = (top + torch.arange(H, device=x.device))[:, :, None]
        columns = (left + torch.arange(W, device=x.device))[:, None, :]
        sample = torch.arange(N, device=x.device)[:, None, None]
        x = F.pad(x, (pad, pad, pad, pad))[sample, 0, rows, columns][:, None]
    if flip:
        mirrored = torch.rand(N, 1, 1, 1, generator=rng).to(x.device) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
    return x


def _resume(path: Path, trainer: Trainer, plain: dict[str, Any]) -> tuple[int, float]:
    """Load a checkpoint into the trainer; the next epoch and the best accuracy so far."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    present = checkpoint if isinstance(checkpoint, dict) else {}
    theirs, ours = present.get("args", {}).get("target"), plain["target"]
    if "args" in present and theirs != ours:  # whose optimizers keep another state
        raise UsageError(
            f"{path} was trained on {theirs or 'torch'}, and this is {ours or 'torch'}; give the same "
            "--target"
        )
    needed = (*trainer.state(), "epoch", "max_test_acc", "args")
    if missing := [n for n in needed if n not in present]:
        raise CheckpointError(
            f"{path} has no {', '.join(missing)}; resume from a checkpoint_latest.pth that spikeport "
            "train wrote"
        )
    if differ := differences(checkpoint["args"], plain):
        lines = "".join(f"\n  {line}" for line in differ)
        raise UsageError(f"{path} was trained with other options; give the same:{lines}")
    if checkpoint["epoch"] + 1 >= plain["epochs"]:
        raise UsageError(
            f"{path} has all of its {plain['epochs']} epochs; nothing is left to train"
        )
    try:
        trainer.load(checkpoint)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is of another network: {error}") from error
    return checkpoint["epoch"] + 1, checkpoint["max_test_acc"]


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write the whole file or none of it."""
    unfinished = path.with_suffix(".tmp")
    torch.save(checkpoint, unfinished)
    os.replace(unfinished, path)


def summary_writer(folder: Path, start_epoch: int) -> Any:
    """TensorBoard's writer, which is an optional dependency."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard is not installed: pip install 'spikeport[train]', or --no-tensorboard"
        ) from error
    return SummaryWriter(folder, purge_step=start_epoch)
