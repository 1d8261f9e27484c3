"""``spikeport train``: a network on Fashion-MNIST."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import net_argument
from .console import OK, Command, emit

if TYPE_CHECKING:
    from ..options import Options
    from ..training import MakeTrainer

_EPILOG = """\
checkpoint_max.pth (the best on the test set), checkpoint_latest.pth (for --resume) and TensorBoard's
scalars go to --out-dir. On K GPUs of one machine, each taking its share of every batch:
  torchrun --nproc-per-node K -m spikeport.deploy train conv --amp

"""


def _arguments(parser: argparse.ArgumentParser) -> None:
    net_argument(parser)
    option = parser.add_argument
    option("-T", type=int, help="time steps, as --arg T=... (the network's default)")
    option("--channels", type=int, help="as --arg channels=... (the network's default)")
    option("--epochs", type=int, default=64, help="epochs (64)")
    option("-b", "--batch-size", type=int, default=128, help="images in a batch, of all GPUs (128)")
    option("--lr", type=float, default=0.1, help="first learning rate of the cosine (0.1)")
    option("--momentum", type=float, default=0.9, help="momentum of SGD (0.9)")
    option("--loss", default="mse", help="mse (of firing rates), ce_count, ce_rate, ... (mse)")
    option("--optimizer", choices=["sgd", "adam"], default="sgd", help="sgd or adam (sgd)")
    option("--target", choices=["ipu", "ipu-sim"], help="train there instead of with torch")
    option("--device-iterations", type=int, default=1, metavar="D", help="batches in one call (1)")
    option(
        "--gradient-accumulation",
        type=int,
        default=1,
        metavar="G",
        help="parts of a batch that a device takes one after the other (1)",
    )
    option("--replicas", type=int, default=1, metavar="R", help="copies of the network (1)")
    option("--crop", type=int, default=0, help="shift images by up to so many pixels (0)")
    option("--flip", action="store_true", help="mirror half of the images")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--half",
        action="store_true",
        help="weights and all else in float16; the optimizer moves float32 copies",
    )
    precision.add_argument("--amp", action="store_true", help="float16 autocast, float32 weights")
    option("--seed", type=int, default=0, help="of weights and of the order of images (0)")
    option(
        "--backend",
        choices=["torch", "fused", "auto"],
        help="of spikeport.targets.cuda's neurons (the network's own choice)",
    )
    option("--channels-last", action="store_true", help="memory format of weights and images")
    option(
        "--sync-batch-norm",
        action="store_true",
        help="statistics over the batches of all GPUs together; keeps batch norms out of the fused "
        "kernels",
    )
    option(
        "--graph",
        action="store_true",
        help="replay every step as one CUDA graph: several times faster where Python is the limit; "
        "the network must do the same in each step",
    )
    option("--device", help="such as cuda:0 or cpu (cuda where there is one)")
    option(
        "--data",
        metavar="DATA",
        default="fashion-mnist",
        help="or a folder with its four IDX files",
    )
    option("--limit", type=int, metavar="N", help="only so many images of each split, for a trial")
    option("--out-dir", type=Path, metavar="DIR", help="default: logs/ and the options' values")
    option("--resume", type=Path, metavar="FILE", help="go on from this checkpoint_latest.pth")
    option("--no-tensorboard", dest="tensorboard", action="store_false", help="no scalars")


def _run(args: argparse.Namespace) -> int:
    from dataclasses import asdict, fields

    import torch

    from .. import ranks
    from ..network import build, description
    from ..options import Options
    from ..trainer import separate_norms
    from ..training import Training

    given = {"T": args.T, "channels": args.channels}
    arguments = [*args.arg, *(f"{n}={v}" for n, v in given.items() if v is not None)]
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() and args.target is None else "cpu"
    named = {f.name: getattr(args, f.name) for f in fields(Options) if hasattr(args, f.name)}
    options = Options(network=description(args.net, arguments), **named)
    epochs = []
    with ranks.join(options.torch_device) as (joined, device):
        options = replace(options, device=str(device))

        def say(*lines: object) -> None:
            if joined.first:
                print(*lines, sep="\n", file=sys.stderr if args.json else sys.stdout, flush=True)

        on_gpu = device.type == "cuda"
        kind = torch.cuda.get_device_name(device) if on_gpu else args.target or device
        training = Training(
            lambda: build(args.net, arguments), options, joined, trainer_for(options)
        )
        together = f", {joined.size} processes" if joined.size > 1 else ""
        if separate_norms(training.net, options, joined) > 1:
            together += ", each with batch norm statistics of its own share"
        versions = f"torch {torch.__version__}, {kind}{together}"
        say(f"spikeport {shlex.join(args.argv)}", versions, training.net)
        for epoch in training.epochs():
            left = (options.epochs - 1 - epoch.epoch) * epoch.seconds
            end = datetime.datetime.now() + datetime.timedelta(seconds=left)
            say(
                epoch,
                f"train speed = {epoch.train_speed:.0f} images/s, test speed = "
                f"{epoch.test_speed:.0f} images/s, expected end = {end:%Y-%m-%d %H:%M:%S}",
            )
            epochs.append(asdict(epoch))
    if args.json and joined.first:
        emit({"folder": str(options.folder), "options": options.plain(), "epochs": epochs})
    return OK


def trainer_for(options: Options) -> MakeTrainer:
    """What makes the trainer, imported for the target alone: beside an SDK torch may be old."""
    if options.target is None:
        from ..trainer import TorchTrainer

        return TorchTrainer
    from ..ipu_trainer import IpuTrainer

    return IpuTrainer


COMMAND = Command("train", "train a network on Fashion-MNIST", _run, _arguments, _EPILOG)
