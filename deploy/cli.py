"""The command line ``spikeport``. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
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
NET is path/to/file.py:Class or package.module:Class; a function that returns the network will do:
  spikeport check examples/conv_fashion_mnist.py:CSNN --arg T=4 --arg channels=32 \\
      --checkpoint checkpoint_max.pth --key net --input 16,1,28,28 --target lynxi

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
        target = get(name)
        can = {k: _plain(value) for k, value in vars(target.capabilities).items()}
        entry: dict[str, Any] = {"name": name, **can}
        try:
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
    findings = check(net, inputs, args.target, args.dtype)
    document = {"ok": not findings.errors, "findings": [f.to_dict() for f in findings]}
    _report(args, findings, document)
    return FOUND if findings.errors else OK


def _show(args: argparse.Namespace) -> int:
    import torch

    from .show import steps

    net, inputs = _network(args)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    found = steps(net, inputs, args.target, dtype)
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
        program = convert(net, inputs, args.target, dtype=args.dtype, verify=args.verify)
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
        verification = found.verify(args.device)
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
    parts, seconds = [], 0.0
    with found.load(args.device) as model, _progress(len(dataset), "sample") as bar:
        for x, _ in dataset.loader(model.batch):
            start = time.perf_counter()
            outputs = model(x)
            seconds += time.perf_counter() - start
            parts.append(predictions(outputs))
            bar.update(len(x))
    predicted = torch.cat(parts)
    right = int((predicted == dataset.y).sum())
    simulated = bool(found.manifest["sdk"]["simulated"])
    speed = len(dataset) / seconds
    whose = " (the simulator's speed on this machine, not the chip's)" if simulated else ""
    lines = [
        f"{dataset.name}: {right} of {len(dataset)} right, accuracy {right / len(dataset):.2%}",
        f"throughput: {speed:.1f} samples/s{whose}",
    ]
    if args.save is not None:
        _save(args.save, predicted, dataset.y)
        lines.append(f"predictions: {args.save}")
    return {
        "lines": lines,
        "data": dataset.name,
        "samples": len(dataset),
        "accuracy": right / len(dataset),
        "throughput": speed,
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
    with load(args.artifact, args.device) as model:
        loader = dataset.loader(model.batch)
        report = compare(net, model, loader, layers=args.layers, progress=True)
    ok = report.explained and report.agreement >= args.min_agreement
    lines = [f"{dataset.name}: {report}"]
    if report.agreement < args.min_agreement:
        lines.append(f"the agreement is below the limit of {args.min_agreement:.2%}")
    _report(args, "\n".join(lines), {"data": dataset.name, "ok": ok, **report.to_dict()})
    return OK if ok else FOUND


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

    simulate = command("simulate", _simulate, "a script written for an SDK, on the simulated SDK")
    simulate.add_argument("vendor", choices=["ipu", "lynxi"], help="whose SDK")
    simulate.add_argument("script", metavar="SCRIPT", help="a Python file")
    simulate.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="go to the script")
    return parser


def _net_arguments(parser: argparse.ArgumentParser, inputs: bool) -> None:
    parser.add_argument("net", metavar="NET", help="file.py:Class or package.module:Class")
    parser.add_argument(
        "--arg", action="append", default=[], metavar="K=V", help="for the class; may be repeated"
    )
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


def _artifact_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="DIR", help="what spikeport compile wrote")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples")
    parser.add_argument("--device", type=int, default=0, metavar="ID", help="device id (0)")


class _Version(argparse.Action):
    """Reads the version when it is asked for: looking it up takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        parser.exit(OK, f"spikeport {version('spikeport')}\n")
