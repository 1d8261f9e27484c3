"""Compile this bundle with the Lynxi SDK, run its recorded inputs on a chip, and say what differs.

Copied into every bundle as run.py. It needs the SDK (lyngor, lynpy), NumPy and Python 3.8, nothing else:

    python run.py                     builds into build/, which a later run takes as it is
    python run.py --device 1          on another chip

Exit code 0: the chip computes what was recorded; 1: it does not; 2: the bundle is damaged; 3: the SDK
is missing. The chip rounds to float16, so single values may differ; predictions must agree in nine of
ten samples, and where outputs are no predictions [N, classes], values within a twentieth of the largest.

The model of a stepped network computes one time step. It takes its states as further inputs and gives
them as further outputs, which this script carries from step to step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

LEAST_AGREEMENT = 0.9
LARGEST_DIFFERENCE = 0.05


def read(folder: Path) -> dict[str, Any]:
    """The manifest, or nothing if it is damaged; its digest is that of all else that it says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        digest = manifest.pop("digest")
    except (OSError, ValueError, AttributeError, KeyError):
        return {}
    said = json.dumps(manifest, sort_keys=True).encode()
    return manifest if hashlib.sha256(said).hexdigest() == digest else {}


def damaged(folder: Path, files: dict[str, str]) -> list[str]:
    """What is wrong with the files, whose sha256 the manifest has."""
    problems = []
    for name, digest in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            problems.append(f"{name} was changed or cut short")
    return problems


def build(folder: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Compile model.onnx with lyngor, unless it was compiled into ``out`` before."""
    import lyngor

    stamp = out / "bundle.txt"
    model_files = sorted(name for name in manifest["files"] if name.startswith("model.onnx"))
    hashes = " ".join(manifest["files"][name] for name in model_files)
    built = f"{hashes} lyngor {lyngor.version}\n"
    if stamp.is_file() and stamp.read_text() == built:
        print(f"{out} holds this model already, built by lyngor {lyngor.version}")
        return
    out.mkdir(parents=True, exist_ok=True)
    shapes = {port["name"]: port["shape"] for port in manifest["inputs"] + states(manifest)}
    model = lyngor.DLModel()
    model.load(
        str(folder / "model.onnx"),
        model_type="ONNX",
        inputs_dict=shapes,
        in_type=manifest["dtype"],
        out_type=manifest["dtype"],
    )
    builder = lyngor.Builder(target="apu", is_map=True)
    builder.build(model.graph, model.params, out_path=str(out), apu_only=True)
    stamp.write_text(built)
    print(f"built by lyngor {lyngor.version} into {out}")


def run(model: Any, device: int, inputs: list[Any], ports: list[Any]) -> list[Any]:
    """The model's outputs for one call, in the shapes and types of ``ports``."""
    import lynpy

    raw = np.concatenate([np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in inputs])
    given = lynpy.Tensor(dev_id=device, size=raw.size)
    given.from_numpy(raw)
    found = np.asarray(model(given.apu()).cpu().numpy()).reshape(-1).view(np.uint8)
    outputs, at = [], 0
    for port in ports:
        size = int(np.prod(port["shape"])) * np.dtype(port["dtype"]).itemsize
        part = found[at : at + size].copy().view(port["dtype"])
        outputs.append(part.reshape(port["shape"]))
        at += size
    return outputs


def states(manifest: dict[str, Any]) -> list[Any]:
    """The states of a stepped network; none of another."""
    return manifest["stepping"]["states"] if manifest["stepping"] else []


def run_call(
    model: Any, device: int, inputs: list[Any], manifest: dict[str, Any], state: list[Any]
) -> list[Any]:
    """The outputs of one call, step after step if the network is stepped."""
    ports, stepping = manifest["outputs"] + states(manifest), manifest["stepping"]
    if not stepping:
        return run(model, device, inputs, ports)
    times = stepping["inputs"]
    counts = [inputs[i].shape[d] for i, d in enumerate(times) if d is not None]
    found = []
    for t in range(counts[0] if counts else stepping["steps"]):
        now = [inputs[i] if d is None else inputs[i].take(t, d) for i, d in enumerate(times)]
        results = run(model, device, now + state, ports)
        found.append(results)
        state = results[len(manifest["outputs"]) :]
    return [
        found[-1][i] if d is None else np.stack([results[i] for results in found], d)
        for i, d in enumerate(stepping["outputs"])
    ]


def compare(call: int, name: str, expected: Any, found: Any) -> bool:
    """Say how one output differs from what was recorded; whether that is rounding."""
    place = f"call {call}, output {name} {list(expected.shape)}"
    a, b = expected.astype(np.float64), found.astype(np.float64)
    wrong = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    if not wrong.any():
        print(f"{place}: equal bit for bit")
        return True
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    off = np.abs(a - b)[wrong]
    print(
        f"{place}: {int(wrong.sum())} of {a.size} values differ, by up to {np.max(off):.4g}; first at "
        f"{list(first)}: recorded {a[first]:.6g}, found {b[first]:.6g}"
    )
    if not np.isfinite(b).all() and np.isfinite(a).all():
        print(f"{place}: {int((~np.isfinite(b)).sum())} values are not finite")
        return False
    if a.ndim == 2:
        agreeing = float((a.argmax(1) == b.argmax(1)).mean())
        print(f"{place}: {agreeing:.2%} of the predictions agree")
        return agreeing >= LEAST_AGREEMENT
    return bool(np.max(off) <= LARGEST_DIFFERENCE * np.abs(a).max())


def main() -> int:
    """Build, run, compare."""
    folder = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=folder / "build", help="where to build")
    parser.add_argument("--device", type=int, default=0, help="id of the chip (0)")
    args = parser.parse_args()
    manifest = read(folder)
    problems = damaged(folder, manifest["files"]) if manifest else ["manifest.json was changed"]
    if problems:
        print(f"the bundle is damaged, copy it again: {'; '.join(problems)}", file=sys.stderr)
        return 2
    try:
        import lyngor  # noqa: F401 -- build() says what it takes of it
        import lynpy
    except ImportError as error:
        print(f"the Lynxi SDK (lyngor, lynpy) cannot be imported: {error}", file=sys.stderr)
        return 3
    build(folder, args.build, manifest)
    samples = np.load(str(folder / "samples.npz"))
    model = lynpy.Model(dev_id=args.device, path=str(args.build))
    verdicts = []
    for call in range(manifest["calls"]):
        inputs = [samples[f"{call}.input.{i}"] for i in range(len(manifest["inputs"]))]
        state = [samples[f"state.{i}"] for i in range(len(states(manifest)))]
        found = run_call(model, args.device, inputs, manifest, state)
        for i, port in enumerate(manifest["outputs"]):
            verdicts.append(compare(call, port["name"], samples[f"{call}.output.{i}"], found[i]))
    right = all(verdicts)
    print("the chip computes what was recorded" if right else "the chip computes SOMETHING ELSE")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
