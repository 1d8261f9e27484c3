"""``spikeport run``: an artifact on data."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...converters.errors import UsageError
from .arguments import DATA, artifact_arguments
from .console import FOUND, OK, Command, answer, progress

if TYPE_CHECKING:
    import torch

    from ..artifact import Artifact


def _arguments(parser: argparse.ArgumentParser) -> None:
    artifact_arguments(parser)
    parser.add_argument("--data", metavar="DATA", help=DATA)
    parser.add_argument("--verify", action="store_true", help="replay the recorded inputs")
    parser.add_argument(
        "--save", type=Path, metavar="FILE.npz", help="write predictions and labels"
    )


def _run(args: argparse.Namespace) -> int:
    from ..artifact import Artifact

    if args.data is None and not args.verify:
        raise UsageError(f"nothing to run: give --data ({DATA}), --verify, or both")
    if args.data is None and args.save is not None:
        raise UsageError("--save writes predictions: give --data")
    if args.save is not None and not args.save.parent.is_dir():
        raise UsageError(f"--save {args.save}: there is no directory {args.save.parent}")
    found = Artifact.open(args.artifact)
    lines, ok = [str(found)], True
    document: dict[str, Any] = {"artifact": str(found.path)}
    if args.verify:
        verification = found.verify(args.device, args.target)
        lines.append(str(verification))
        document["verification"] = verification.to_dict()
        ok = verification.ok
    if args.data is not None:
        result = _predict(found, args)
        lines += result.pop("lines")
        document |= result
    answer(args, "\n".join(lines), document)
    return OK if ok else FOUND


def _predict(found: Artifact, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .. import data
    from ..compare import predictions

    dataset = data.load(args.data, limit=args.limit)
    parts, seconds, steps = [], 0.0, 0
    with found.load(args.device, args.target) as model, progress(len(dataset), "sample") as bar:
        for x, _ in dataset.loader(model.batch):
            start = time.perf_counter()
            outputs = model(x)
            seconds += time.perf_counter() - start
            steps += model.steps(x)
            parts.append(predictions(outputs, model.output_dims[0], model.T, model.output_times[0]))
            bar.update(len(x))
    predicted = torch.cat(parts)
    right = int((predicted == dataset.y).sum())
    own = args.target in (None, found.manifest["target"])
    simulated = own and bool(found.manifest["sdk"]["simulated"])
    speed = len(dataset) / seconds
    whose = " (the simulator's speed on this machine, not the chip's)" if simulated else ""
    lines = [
        f"{dataset.name}: {right} of {len(dataset)} right, accuracy {right / len(dataset):.2%}",
        f"throughput: {speed:.1f} samples/s{whose}",
    ]
    if steps:
        lines.append(f"stepped: {1000 * seconds / steps:.3f} ms a step{whose}")
    if args.save is not None:
        _save(args.save, predicted, dataset.y)
        lines.append(f"predictions: {args.save}")
    return {
        "lines": lines,
        "data": dataset.name,
        "samples": len(dataset),
        "accuracy": right / len(dataset),
        "throughput": speed,
        "step_seconds": seconds / steps if steps else None,
        "simulated": simulated,
        "predictions": predicted.tolist(),
    }


def _save(path: Path, predicted: torch.Tensor, labels: torch.Tensor) -> None:
    import numpy as np

    try:
        with path.open("wb") as file:
            np.savez(file, predictions=predicted.numpy(), labels=labels.numpy())
    except OSError as error:
        raise UsageError(f"--save {path} cannot be written: {error.strerror}") from error


COMMAND = Command(
    "run", "predictions, accuracy and throughput of an artifact on data", _run, _arguments
)
