"""A convolutional spiking network for Fashion-MNIST, and its training.

The network of SpikingJelly's example of the same name, in plain torch and spikeport's neurons; a
checkpoint of either loads into the other. The training set comes with ``apt install
dataset-fashion-mnist``, or give its folder with ``--data``. Trained in float16, for a chip that
computes in it::

    python examples/conv_fashion_mnist.py -T 4 --channels 32 --half --epochs 64 --lr 0.1

writes ``checkpoint_max.pth`` (the best on the test set), ``checkpoint_latest.pth`` (for
``--resume``) and TensorBoard's scalars below ``logs/``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pickle
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from spikeport.converters import neurons
from spikeport.converters.errors import CheckpointError, SpikeportError, UsageError
from spikeport.deploy import data

# What may differ between a run and the one that it resumes; all else decides the result.
NOT_RESULT = ("device", "data", "out_dir", "resume", "tensorboard")


class CSNN(nn.Module):
    """Images [N, 1, 28, 28] -> firing rates [N, 10] of the ten classes, over T time steps."""

    def __init__(self, T: int = 4, channels: int = 128) -> None:
        super().__init__()
        self.T = T
        self.conv_fc = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            neurons.IFNode(surrogate=neurons.ATan()),
            nn.MaxPool2d(2, 2),  # 14 x 14
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            neurons.IFNode(surrogate=neurons.ATan()),
            nn.MaxPool2d(2, 2),  # 7 x 7
            nn.Flatten(),
            nn.Linear(channels * 7 * 7, channels * 4 * 4, bias=False),
            neurons.IFNode(surrogate=neurons.ATan()),
            nn.Linear(channels * 4 * 4, 10, bias=False),
            neurons.IFNode(surrogate=neurons.ATan()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 1, 28, 28] -> firing rates [N, 10]."""
        x = x.repeat(self.T, 1, 1, 1)  # [TN, 1, 28, 28], which stateless layers take as a batch
        for layer in self.conv_fc:
            if isinstance(layer, neurons.Node):
                x = layer(x.unflatten(0, (self.T, -1))).flatten(0, 1)  # by way of [T, N, ...]
            else:
                x = layer(x)
        return x.unflatten(0, (self.T, -1)).mean(0)


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


def train(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Train as :func:`parser` describes; yields each epoch's results once it is on disk."""
    train_set = data.load(args.data, split="train", limit=args.limit)
    test_set = data.load(args.data, split="test", limit=args.limit)
    if len(train_set) < args.batch_size:
        raise UsageError(f"{len(train_set)} training images are no batch of {args.batch_size}")
    device, dtype = torch.device(args.device), torch.half if args.half else torch.float
    train_x, train_y = train_set.x.to(device, dtype), train_set.y.to(device)
    test_x, test_y = test_set.x.to(device, dtype), test_set.y.to(device)

    torch.manual_seed(args.seed)
    net = CSNN(args.T, args.channels).to(device, dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp)
    amp = torch.autocast(device.type, torch.half, enabled=args.amp)
    parts = {"net": net, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "scaler": scaler}
    start_epoch, max_test_acc = 0, -1.0
    if args.resume:
        start_epoch, max_test_acc = resume(args, parts)

    args.out_dir.mkdir(parents=True, exist_ok=True)
    writer = summary_writer(args.out_dir, start_epoch) if args.tensorboard else None
    for epoch in range(start_epoch, args.epochs):
        start = time.perf_counter()
        # Seeded for each epoch, so that a resumed run sees the same order of images.
        rng = torch.Generator().manual_seed(args.seed * 100_000 + epoch)
        images = augment(train_x, args.crop, args.flip, rng)
        order = torch.randperm(len(train_y), generator=rng).to(device)
        batches = order.split(args.batch_size)[: len(order) // args.batch_size]  # no partial one
        loss_sum, correct = torch.zeros(2, device=device, dtype=torch.double)
        net.train()
        for batch in tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=None):
            label = train_y[batch]
            optimizer.zero_grad()
            with amp:
                firing_rate = net(images[batch])
                loss = F.mse_loss(firing_rate, F.one_hot(label, 10).to(firing_rate.dtype))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss_sum += loss.detach()
            correct += (firing_rate.argmax(1) == label).sum()
        lr_scheduler.step()
        result = {
            "train_loss": loss_sum.item() / len(batches),
            "train_acc": correct.item() / (len(batches) * args.batch_size),
        }
        trained = time.perf_counter()
        result["train_speed"] = len(batches) * args.batch_size / (trained - start)
        # The loss cannot tell: a NaN potential is not above the threshold, so its rate is 0.
        if wrong := [name for name, p in net.state_dict().items() if not p.isfinite().all()]:
            raise SpikeportError(
                f"training diverged in epoch {epoch}: {', '.join(wrong)} not finite; lower --lr"
            )
        with amp:
            result["test_loss"], result["test_acc"] = evaluate(net, test_x, test_y, args.batch_size)
        result["test_speed"] = len(test_y) / (time.perf_counter() - trained)
        best = result["test_acc"] > max_test_acc
        max_test_acc = max(result["test_acc"], max_test_acc)

        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint |= {"epoch": epoch, "max_test_acc": max_test_acc, "args": plain(args)}
        for name in ("latest", "max") if best else ("latest",):
            save(checkpoint, args.out_dir / f"checkpoint_{name}.pth")
        if writer:
            for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
                writer.add_scalar(name, result[name], epoch)
            writer.flush()
        seconds = time.perf_counter() - start
        yield {"epoch": epoch, **result, "max_test_acc": max_test_acc, "seconds": seconds}
    if writer:
        writer.close()


@torch.no_grad()
def evaluate(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int = 128
) -> tuple[float, float]:
    """Mean loss and accuracy of ``net`` on images x [N, 1, 28, 28] of classes y [N]."""
    net.eval()
    loss_sum, correct = 0.0, 0
    for images, label in zip(x.split(batch_size), y.split(batch_size), strict=True):
        firing_rate = net(images)
        target = F.one_hot(label, 10).to(firing_rate.dtype)
        loss_sum += F.mse_loss(firing_rate, target).item() * len(label)
        correct += int((firing_rate.argmax(1) == label).sum())
    return loss_sum / len(y), correct / len(y)


def resume(args: argparse.Namespace, parts: dict[str, Any]) -> tuple[int, float]:
    """Load ``args.resume`` into ``parts``; the next epoch and the best accuracy so far."""
    path = args.resume
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    present = checkpoint if isinstance(checkpoint, dict) else {}
    if missing := [n for n in (*parts, "epoch", "max_test_acc", "args") if n not in present]:
        raise CheckpointError(
            f"{path} has no {', '.join(missing)}; resume from this script's checkpoint_latest.pth"
        )
    theirs, ours = checkpoint["args"], plain(args)
    if differ := [n for n in ours if n not in NOT_RESULT and ours[n] != theirs.get(n)]:
        lines = "".join(f"\n  {n}: {theirs.get(n)} there, {ours[n]} here" for n in differ)
        raise UsageError(f"{path} was trained with other options; give the same:{lines}")
    if checkpoint["epoch"] + 1 >= args.epochs:
        raise UsageError(f"{path} has all of its {args.epochs} epochs; nothing is left to train")
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["epoch"] + 1, checkpoint["max_test_acc"]


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The options as numbers and strings, which load without unpickling objects."""
    return {n: str(v) if isinstance(v, Path) else v for n, v in vars(args).items()}


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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Train the CSNN on Fashion-MNIST")
    cuda = torch.cuda.is_available()
    p.add_argument("-T", type=int, default=4, help="time steps (4)")
    p.add_argument("--channels", type=int, default=128, help="channels of the convolutions (128)")
    p.add_argument("--epochs", type=int, default=64, help="epochs (64)")
    p.add_argument("-b", "--batch-size", type=int, default=128, help="images in a batch (128)")
    p.add_argument("--lr", type=float, default=0.1, help="first learning rate of the cosine (0.1)")
    p.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD (0.9)")
    p.add_argument("--crop", type=int, default=0, help="shift images by up to so many pixels (0)")
    p.add_argument("--flip", action="store_true", help="mirror half of the images")
    precision = p.add_mutually_exclusive_group()
    precision.add_argument("--half", action="store_true", help="weights and all else in float16")
    precision.add_argument("--amp", action="store_true", help="float16 autocast, float32 weights")
    p.add_argument("--seed", type=int, default=0, help="of weights and of the order of images (0)")
    p.add_argument("--device", default="cuda" if cuda else "cpu", help="such as cuda:0 or cpu")
    p.add_argument("--data", default="fashion-mnist", help="or a folder with its four IDX files")
    p.add_argument("--limit", type=int, help="only so many images of each split, for a trial")
    p.add_argument("--out-dir", type=Path, help="default: logs/ and the options' values")
    p.add_argument("--resume", type=Path, help="go on from this checkpoint_latest.pth")
    p.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", help="no scalars")
    return p


def main(argv: list[str] | None = None) -> None:
    """Train, and print each epoch's results."""
    args = parser().parse_args(argv)
    least = {"T": 1, "channels": 1, "epochs": 1, "batch_size": 1, "crop": 0}
    if low := [n for n in least if getattr(args, n) < least[n]]:
        raise UsageError("; ".join(f"{n} must be at least {least[n]}" for n in low))
    if args.out_dir is None:
        precision = "_half" if args.half else "_amp" if args.amp else ""
        options = f"T{args.T}_b{args.batch_size}_lr{args.lr}_c{args.channels}{precision}"
        args.out_dir = Path("logs") / options
    on_gpu = torch.device(args.device).type == "cuda"
    print("python", shlex.join(sys.argv if argv is None else [sys.argv[0], *argv]))
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else args.device}")
    print(CSNN(args.T, args.channels), flush=True)
    for r in train(args):
        left = (args.epochs - 1 - r["epoch"]) * r["seconds"]
        end = datetime.datetime.now() + datetime.timedelta(seconds=left)
        names = ("train_loss", "train_acc", "test_loss", "test_acc", "max_test_acc")
        print(f"epoch = {r['epoch']}, " + ", ".join(f"{n} = {r[n]:.4f}" for n in names))
        print(
            f"train speed = {r['train_speed']:.0f} images/s, test speed = {r['test_speed']:.0f} "
            f"images/s, expected end = {end:%Y-%m-%d %H:%M:%S}",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except SpikeportError as error:
        sys.exit(f"error: {error}")
