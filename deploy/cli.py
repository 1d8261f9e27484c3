"""The command line ``spikeport``. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..converters.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    FindingsError,
    SpikeportError,
    TargetError,
    UsageError,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .options import Options
    from .training import MakeTrainer

OK, FOUND, USAGE, TARGET, FILES, INTERRUPTED = 0, 1, 2, 3, 4, 130

_EPILOG = """\
exit codes:
  0    done
  1    the network cannot run there (findings), it computes something else, or a verification failed
  2    an argument that cannot be used
  3    the target's SDK or the device is missing, or failed
  4    an artifact, data or a checkpoint that is missing, damaged or does not fit
  130  interrupted

Results go to standard output, all else to standard error. With --json there is one JSON document on
standard output, also for an error: {"error": its kind, "message": ..., "findings": [...]}.
"""
_NET_EPILOG = """\
NET is path/to/file.py:Class or package.module:Class (a function that returns the network will do), or
path/to/file.nir; conv, fc and leaky are those in examples/:
  spikeport check examples/conv_fashion_mnist.py:CSNN --arg T=4 --arg channels=32 \\
      --checkpoint checkpoint_max.pth --key net --input 16,1,28,28 --target lynxi

"""
_TRAIN_EPILOG = """\
checkpoint_max.pth (the best on the test set), checkpoint_latest.pth (for --resume) and TensorBoard's
scalars go to --out-dir. On K GPUs of one machine, each taking its share of every batch:
  torchrun --nproc-per-node K -m spikeport.deploy train conv --amp

"""
_logger = logging.getLogger(__name__)
_DATA = "fashion-mnist, a folder of IDX files, or an .npz with x and y"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its arguments; those of the process unless given.

    Returns:
        The exit code, as ``spikeport --help`` lists them.
    """
    args = _parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else [*argv]
    with _diagnostics():
        try:
            code: int = args.run(args)
            sys.stdout.flush()
        except SpikeportError as error:
            return _fail(error, args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `spikeport show ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
    return code


def _fail(error: SpikeportError, args: argparse.Namespace) -> int:
    if args.traceback:
        traceback.print_exception(error)
    if args.json:
        findings = error.findings if isinstance(error, FindingsError) else ()
        _emit(
            {
                "error": type(error).__name__,
                "message": str(error),
                "findings": [f.to_dict() for f in findings],
            }
        )
    print(f"error: {error}", file=sys.stderr)
    codes: tuple[tuple[type[SpikeportError], int], ...] = (
        (UsageError, USAGE),
        (TargetError, TARGET),
        (ArtifactError, FILES),
        (DataError, FILES),
        (CheckpointError, FILES),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), FOUND)


@contextmanager
def _diagnostics() -> Iterator[None]:
    """What the library logs goes to standard error, as plain text."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("spikeport")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _emit(document: Any) -> None:
    print(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False))


def _report(args: argparse.Namespace, text: object, document: Any) -> None:
    if args.json:
        _emit(document)
    else:
        print(text)


# The commands


def _targets(args: argparse.Namespace) -> int:
    from ..converters.errors import TargetUnavailableError
    from ..targets import TARGETS, get

    lines, found = [], []
    for name in TARGETS:
        entry: dict[str, Any] = {"name": name}
        try:
            target = get(name)
            entry |= {k: _plain(value) for k, value in vars(target.capabilities).items()}
            sdk = target.sdk()
        except TargetUnavailableError as error:
            entry |= {"available": False, "reason": str(error)}
            lines.append(f"{name}: not available: {error}")
        else:
            entry |= {
                "available": True,
                "sdk": sdk.name,
                "version": sdk.version,
                "simulated": sdk.simulated,
                "devices": list(sdk.devices),
            }
            kind = "simulated, " if sdk.simulated else ""
            devices = ", ".join(map(str, sdk.devices)) or "none seen"
            lines.append(f"{name}: {sdk.name} {sdk.version} ({kind}devices: {devices})")
        found.append(entry)
    _report(args, "\n".join(lines), {"targets": found})
    return OK


def _plain(value: Any) -> Any:
    """A capability for JSON."""
    if isinstance(value, (frozenset, tuple)):
        members = [_plain(member) for member in value]
        return sorted(members) if isinstance(value, frozenset) else members
    return value if isinstance(value, (int, str, type(None))) else str(value).removeprefix("torch.")


def _check(args: argparse.Namespace) -> int:
    from .pipeline import check

    net, inputs = _network(args)
    findings = check(net, inputs, args.target, args.dtype, time=args.time)
    document = {"ok": not findings.errors, "findings": [f.to_dict() for f in findings]}
    _report(args, findings, document)
    return FOUND if findings.errors else OK


def _show(args: argparse.Namespace) -> int:
    import torch

    from .show import steps

    net, inputs = _network(args)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    found = steps(net, inputs, args.target, dtype, args.time)
    names = [step.report.name for step in found]
    if args.only is not None:
        if args.only not in names:
            raise UsageError(f"{args.target} has no pass {args.only!r}; it has {', '.join(names)}")
        found = [step for step in found if step.report.name == args.only]
        text = "\n\n".join(map(str, found))
    else:
        reports = (str(step.report) for step in found[1:])
        text = "\n\n".join([str(found[0]), *reports, str(found[-1].program)])
    _report(args, text, {"target": args.target, "steps": [step.to_dict() for step in found]})
    return OK


def _compile(args: argparse.Namespace) -> int:
    from . import artifact
    from .network import parse_arguments
    from .pipeline import convert

    options = parse_arguments(args.option)
    net, inputs = _network(args)
    with _progress(total=2, unit="step") as bar:
        bar.set_description("convert and verify" if args.verify else "convert")
        program = convert(
            net, inputs, args.target, dtype=args.dtype, time=args.time, verify=args.verify
        )
        bar.update()
        bar.set_description("compile")
        made = artifact.compile(
            program,
            args.output,
            overwrite=args.force,
            cache=args.cache,
            probe=args.probe,
            **options,
        )
        bar.update()
    if program.evidence is not None:
        print(program.evidence, file=sys.stderr)
    document = {"path": str(made.path), "cached": made.cached, "manifest": made.manifest}
    _report(args, made, document)
    return OK


def _run(args: argparse.Namespace) -> int:
    from .artifact import Artifact

    if args.data is None and not args.verify:
        raise UsageError(f"nothing to run: give --data ({_DATA}), --verify, or both")
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
    _report(args, "\n".join(lines), document)
    return OK if ok else FOUND


def _predict(found: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from . import data
    from .compare import predictions

    dataset = data.load(args.data, limit=args.limit)
    parts, seconds, steps = [], 0.0, 0
    with found.load(args.device, args.target) as model, _progress(len(dataset), "sample") as bar:
        for x, _ in dataset.loader(model.batch):
            start = time.perf_counter()
            outputs = model(x)
            seconds += time.perf_counter() - start
            steps += model.steps(x)
            parts.append(predictions(outputs))
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


def _compare(args: argparse.Namespace) -> int:
    from . import data
    from .artifact import load
    from .compare import compare

    dataset = data.load(args.data, limit=args.limit)
    net = _build(args)
    with load(args.artifact, args.device, args.target) as model:
        loader = dataset.loader(model.batch)
        report = compare(net, model, loader, layers=args.layers, progress=True)
    ok = report.explained and report.agreement >= args.min_agreement
    lines = [f"{dataset.name}: {report}"]
    if report.agreement < args.min_agreement:
        lines.append(f"the agreement is below the limit of {args.min_agreement:.2%}")
    _report(args, "\n".join(lines), {"data": dataset.name, "ok": ok, **report.to_dict()})
    return OK if ok else FOUND


def _train(args: argparse.Namespace) -> int:
    from dataclasses import asdict, fields

    import torch

    from . import ranks
    from .network import build, description
    from .options import Options
    from .trainer import separate_norms
    from .training import Training

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
        training = Training(lambda: build(args.net, arguments), options, joined, _trainer(options))
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
        _emit({"folder": str(options.folder), "options": options.plain(), "epochs": epochs})
    return OK


def _trainer(options: Options) -> MakeTrainer:
    """What makes the trainer, imported for the target alone: beside an SDK torch may be old."""
    if options.target is None:
        from .trainer import TorchTrainer

        return TorchTrainer
    from .ipu_trainer import IpuTrainer

    return IpuTrainer


def _bundle(args: argparse.Namespace) -> int:
    from .bundle import bundle

    path = bundle(args.artifact, args.output)
    text = f"{path}: run.py there needs the Lynxi SDK, NumPy and Python 3.8"
    _report(args, text, {"path": str(path), "files": sorted(p.name for p in path.iterdir())})
    return OK


def _simulate(args: argparse.Namespace) -> int:
    from importlib import import_module

    simulator = import_module(f"..targets.{args.vendor}.simulator.simulate", __package__)
    run_script: Callable[..., int] = simulator.run_script
    if not args.json:
        return run_script(args.script, args.args)
    with redirect_stdout(sys.stderr):  # so that standard output holds the document alone
        code = run_script(args.script, args.args)
    _emit({"script": args.script, "exit_code": code})
    return code


def _bench(args: argparse.Namespace) -> int:
    from .bench import neurons, report

    report.prepare(args.out)
    options = neurons.Options(
        args.device,
        args.neurons,
        args.T or neurons.Options.T,
        tuple(args.dtype or neurons.Options.dtypes),
        args.quick,
    )
    results = neurons.run(options, progress=_logger.info)
    files = report.write(results, args.out)
    text = "\n\n".join([report.tables(results), "\n".join(f"written: {file}" for file in files)])
    _report(args, text, {**results.to_dict(), "files": [str(file) for file in files]})
    return OK


# Shared by commands


def _build(args: argparse.Namespace) -> nn.Module:
    import torch

    from .network import build, load_checkpoint

    if args.checkpoint is None and (args.key is not None or args.trust_pickle):
        raise UsageError("--key and --trust-pickle are about a checkpoint: give --checkpoint FILE")
    torch.manual_seed(0)  # compile and compare build the same network where there is no checkpoint
    net = build(args.net, args.arg)
    if args.checkpoint is None:
        _logger.info("no --checkpoint: the weights are those of a fresh network, seeded with 0")
    else:
        load_checkpoint(net, args.checkpoint, args.key, trust_pickle=args.trust_pickle)
    return net


def _network(args: argparse.Namespace) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from ..targets import get
    from .network import example_inputs

    # What costs least is checked first.
    for name in [args.target] if isinstance(args.target, str) else args.target:
        get(name)
    inputs = example_inputs(args.input)
    return _build(args), inputs


def _progress(total: int, unit: str) -> Any:
    """A bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}s", disable=None, leave=False)


# The parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikeport",
        description="Trained spiking networks onto accelerators, proved to compute the same.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog + _EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="one JSON document")
        made.add_argument("--traceback", action="store_true", help="show where an error arose")
        return made

    command("targets", _targets, "what is on this machine: SDKs, versions, devices, simulators")

    check = command("check", _check, "all findings that stop a network on targets", _NET_EPILOG)
    _net_arguments(check, inputs=True)
    check.add_argument(
        "--target", action="append", required=True, metavar="NAME", help="may be repeated"
    )

    show = command("show", _show, "the graph before and after, pass by pass", _NET_EPILOG)
    _net_arguments(show, inputs=True)
    show.add_argument("--target", required=True, metavar="NAME", help="see spikeport targets")
    show.add_argument("--pass", dest="only", metavar="NAME", help="this pass alone, and its graph")

    build = command("compile", _compile, "convert, verify and compile a network", _NET_EPILOG)
    _net_arguments(build, inputs=True)
    build.add_argument("--target", required=True, metavar="NAME", help="see spikeport targets")
    build.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="the artifact to write"
    )
    build.add_argument("--force", action="store_true", help="replace an artifact that is there")
    build.add_argument("--no-cache", dest="cache", action="store_false", help="compile anew")
    build.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="a second build that gives each layer's spikes; default: if the SDK is simulated",
    )
    build.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not run source and result"
    )
    build.add_argument(
        "--option", action="append", default=[], metavar="K=V", help="of the target's compiler"
    )

    run = command("run", _run, "predictions, accuracy and throughput of an artifact on data")
    _artifact_arguments(run)
    run.add_argument("--data", metavar="DATA", help=_DATA)
    run.add_argument("--verify", action="store_true", help="replay the recorded inputs")
    run.add_argument("--save", type=Path, metavar="FILE.npz", help="write predictions and labels")

    against = command("compare", _compare, "a source network against its artifact", _NET_EPILOG)
    _artifact_arguments(against)
    _net_arguments(against, inputs=False)
    against.add_argument("--data", required=True, metavar="DATA", help=_DATA)
    against.add_argument(
        "--layers", type=int, default=64, metavar="N", help="samples whose spikes are compared (64)"
    )
    against.add_argument(
        "--min-agreement",
        type=float,
        default=0.98,
        metavar="FRACTION",
        help="least fraction of equal predictions (0.98)",
    )

    train = command("train", _train, "train a network on Fashion-MNIST", _TRAIN_EPILOG)
    _train_arguments(train)

    bundled = command("bundle", _bundle, "an onnx artifact for a machine with an old Lynxi SDK")
    bundled.add_argument("artifact", type=Path, metavar="DIR", help="an artifact compiled for onnx")
    bundled.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="the bundle to write"
    )

    simulate = command("simulate", _simulate, "a script written for an SDK, on the simulated SDK")
    simulate.add_argument("vendor", choices=["ipu", "lynxi"], help="whose SDK")
    simulate.add_argument("script", metavar="SCRIPT", help="a Python file")
    simulate.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="go to the script")

    bench = command("bench", _bench, "how fast the neurons' kernels are, beside other frameworks")
    bench.add_argument("what", choices=["neurons"], help="what is measured")
    bench.add_argument("--device", metavar="NAME", help="such as cuda:1 or cpu; default: a GPU")
    bench.add_argument(
        "--neurons",
        type=int,
        metavar="N",
        help="neurons of the layer (2^20 on a GPU, 2^12 on a CPU)",
    )
    bench.add_argument("--T", type=_numbers, metavar="T,T,...", help="time steps (8,16,32,64,128)")
    bench.add_argument(
        "--dtype",
        action="append",
        choices=["float32", "float16", "bfloat16"],
        help="may be repeated (float32 and float16)",
    )
    bench.add_argument(
        "--out", type=Path, default=Path("build/bench"), metavar="DIR", help="for JSON and charts"
    )
    bench.add_argument("--quick", action="store_true", help="few repeats, for a trial")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(int(part) for part in text.split(","))


def _net_argument(parser: argparse.ArgumentParser) -> None:
    forms = "file.py:Class, package.module:Class, conv, fc or leaky"
    parser.add_argument("net", metavar="NET", help=forms)
    parser.add_argument(
        "--arg", action="append", default=[], metavar="K=V", help="for the class; may be repeated"
    )


def _net_arguments(parser: argparse.ArgumentParser, inputs: bool) -> None:
    _net_argument(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights")
    parser.add_argument("--key", metavar="KEY", help="where the state dict lies in the checkpoint")
    parser.add_argument(
        "--trust-pickle", action="store_true", help="a checkpoint may run code when it is read"
    )
    if inputs:
        parser.add_argument(
            "--input",
            action="append",
            default=[],
            metavar="SHAPE",
            help="shape of an input, batch first, as 16,1,28,28 or 16,1,28,28:float16; repeat it "
            "for several",
        )
        parser.add_argument(
            "--dtype", choices=["float16", "float32"], help="default: the target's own"
        )
        parser.add_argument(
            "--time",
            choices=["unrolled", "stepped"],
            default="unrolled",
            help="all time steps in one call (unrolled), or one step with its states as further inputs "
            "and outputs (stepped)",
        )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _net_argument(parser)
    add = parser.add_argument
    add("-T", type=int, help="time steps, as --arg T=... (the network's default)")
    add("--channels", type=int, help="as --arg channels=... (the network's default)")
    add("--epochs", type=int, default=64, help="epochs (64)")
    add("-b", "--batch-size", type=int, default=128, help="images in a batch, of all GPUs (128)")
    add("--lr", type=float, default=0.1, help="first learning rate of the cosine (0.1)")
    add("--momentum", type=float, default=0.9, help="momentum of SGD (0.9)")
    add("--loss", default="mse", help="mse (of firing rates), ce_count, ce_rate, ... (mse)")
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="sgd or adam (sgd)")
    add("--target", choices=["ipu", "ipu-sim"], help="train there instead of with torch")
    add("--device-iterations", type=int, default=1, metavar="D", help="batches in one call (1)")
    add(
        "--gradient-accumulation",
        type=int,
        default=1,
        metavar="G",
        help="parts of a batch that a device takes one after the other (1)",
    )
    add("--replicas", type=int, default=1, metavar="R", help="copies of the network (1)")
    add("--crop", type=int, default=0, help="shift images by up to so many pixels (0)")
    add("--flip", action="store_true", help="mirror half of the images")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--half",
        action="store_true",
        help="weights and all else in float16; the optimizer moves float32 copies",
    )
    precision.add_argument("--amp", action="store_true", help="float16 autocast, float32 weights")
    add("--seed", type=int, default=0, help="of weights and of the order of images (0)")
    add(
        "--backend",
        choices=["torch", "fused", "auto"],
        help="of spikeport.targets.cuda's neurons (the network's own choice)",
    )
    add("--channels-last", action="store_true", help="memory format of weights and images")
    add(
        "--sync-batch-norm",
        action="store_true",
        help="statistics over the batches of all GPUs together; keeps batch norms out of the fused "
        "kernels",
    )
    add(
        "--graph",
        action="store_true",
        help="replay every step as one CUDA graph: several times faster where Python is the limit; "
        "the network must do the same in each step",
    )
    add("--device", help="such as cuda:0 or cpu (cuda where there is one)")
    add(
        "--data",
        metavar="DATA",
        default="fashion-mnist",
        help="or a folder with its four IDX files",
    )
    add("--limit", type=int, metavar="N", help="only so many images of each split, for a trial")
    add("--out-dir", type=Path, metavar="DIR", help="default: logs/ and the options' values")
    add("--resume", type=Path, metavar="FILE", help="go on from this checkpoint_latest.pth")
    add("--no-tensorboard", dest="tensorboard", action="store_false", help="no scalars")


def _artifact_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="DIR", help="what spikeport compile wrote")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples")
    parser.add_argument("--device", type=int, default=0, metavar="ID", help="device id (0)")
    parser.add_argument("--target", help="another target that loads it: ipu one for ipu-sim")


class _Version(argparse.Action):
    """Reads the version when it is asked for: looking it up takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        parser.exit(OK, f"spikeport {version('spikeport')}\n")
