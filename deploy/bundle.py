"""The bundle: an ONNX artifact for a machine that has an old SDK and cannot have spikeport.

::

    model.onnx       the network (and model.onnx.data, where its weights exceed 2 GiB)
    manifest.json    what it is; inputs and outputs of the graph; sha256 of every other file
    samples.npz      recorded inputs and the outputs expected for them, as the graph has them; of a stepped
                     network those of all steps, and its states before the first one
    run.py           compiles with the Lynxi SDK, runs the recorded inputs, says what differs
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.torch import load_file

from .. import targets
from ..converters.errors import ArtifactExistsError, Finding, UnsupportedError, UsageError
from ..targets import lynxi
from ..targets.lynxi.simulator.compiler import lacking, live
from ..targets.lynxi.simulator.from_onnx import read_onnx
from ..targets.lynxi.simulator.onnx_ops import LOWERINGS
from . import store
from .artifact import Artifact
from .manifest import MANIFEST
from .model import STATES
from .ports import Port

_MODELS = ("model.onnx", "model.onnx.data")


def bundle(artifact: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write an artifact of the target ``onnx`` as a bundle for Lynxi, and give its directory.

    Args:
        artifact: Directory of the artifact; compile it with dtype ``"float16"`` for the chip's own
            arithmetic.
        path: Directory to write; it appears when it is whole.

    Raises:
        UsageError: The artifact is of another target, or has no recorded inputs; or ``path`` lies in it.
        UnsupportedError: The model breaks rules of the chip.
        ArtifactExistsError: ``path`` holds something.
        ArtifactError: The artifact is missing or damaged, or ``path`` cannot be written.
    """
    source = Artifact.open(artifact)
    with store.writing(Path(path)):
        path = store.named(path)
        inside = source.path.resolve() in (path.resolve(), *path.resolve().parents)
    manifest = source.manifest
    if manifest["target"] != "onnx":
        raise UsageError(
            f"{source.path} is compiled for {manifest['target']}; a bundle is made of an artifact for "
            "onnx: compile with target onnx"
        )
    if not manifest["samples"]["calls"]:
        raise UsageError(f"{source.path} has no recorded inputs; convert from example inputs")
    if inside:
        raise UsageError(
            f"{path} lies in the artifact {source.path}, which would be damaged; choose another directory"
        )
    with store.writing(path):
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if taken:
        raise ArtifactExistsError(f"{path} holds something already; choose another directory")
    findings = list(_violations(source.path / "device" / _MODELS[0]))
    if findings:
        raise UnsupportedError("the Lynxi SDK cannot take this model:", findings)
    with store.writing(path), store.staged(path) as stage:
        for name in _MODELS:
            if (source.path / "device" / name).exists():
                shutil.copyfile(source.path / "device" / name, stage / name)
        np.savez(stage / "samples.npz", **_samples(source))
        script = resources.files(lynxi).joinpath("run_bundle.py")
        (stage / "run.py").write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
        written = {p.name: store.file_sha256(p) for p in sorted(stage.iterdir())}
        said = _manifest(manifest, written)
        text = json.dumps({**said, "digest": store.digest(said)}, indent=2, sort_keys=True)
        (stage / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
        store.publish(stage, path, MANIFEST)
    return path


def _violations(file: Path) -> Iterator[Finding]:
    """Ranks above the chip's, and operators that its compiler has not been seen to take."""
    most = targets.get("lynxi").capabilities.max_rank
    graph = onnx.load(file, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if most is not None and len(sizes) > most:
            node = makers.get(value.name)
            yield Finding(
                rule="rank",
                where=node.doc_string if node else "",
                node=value.name,
                target="lynxi",
                found=f"{node.op_type if node else 'an input'} of shape {sizes}",
                allowed=f"rank up to {most}",
                fix="merge dimensions before this operator in the network's forward",
            )
    # What is computed of constants alone is computed when the model is built.
    computed = {value.name for value in graph.input}
    for node in graph.node:
        if computed.isdisjoint(node.input):
            continue
        computed.update(node.output)
        if node.op_type not in LOWERINGS:
            yield _operator(node.doc_string, node.output[0], node.op_type, sorted(LOWERINGS))
    read = live(read_onnx(file, {}, None, ("float16", "float16")).graph)
    for text in read.notes.refused:
        name, _, place = text.partition(" in ")
        path, _, reason = place.partition(": ")
        if name in LOWERINGS:
            yield _operator(path, name, name, [reason.removeprefix("allowed: ")])
    for lacked in lacking(read):
        yield _operator(lacked.scope, lacked.source, lacked.source, ["operators of the APU"])


def _operator(where: str, node: str, found: str, allowed: Iterable[str]) -> Finding:
    return Finding(
        rule="operator",
        where=where,
        node=node,
        target="lynxi",
        found=found,
        allowed=", ".join(allowed),
        fix="leave it out of the network, and apply it to what the model returns, or write it in "
        "operators that are allowed",
    )


def _ports(manifest: Any, side: str) -> list[Port]:
    return [Port.from_dict(data) for data in manifest[side]]


def _samples(source: Artifact) -> dict[str, Any]:
    """The recorded tensors in the graph's own shapes and dtypes."""
    recorded = load_file(source.path / "samples.safetensors")
    stepped = source.manifest.get("stepping")
    samples = {}
    if stepped is not None:
        initial = load_file(source.path / STATES)
        for i, port in enumerate(stepped["states"]):
            samples[f"state.{i}"] = initial[port["name"]].numpy()
    for side in ("input", "output"):
        for i, port in enumerate(_ports(source.manifest, f"{side}s")):
            for call in range(source.manifest["samples"]["calls"]):
                name = f"{call}.{side}.{i}"
                tensor = recorded[name]
                if stepped is None:
                    tensor = port.spec.held(tensor)
                samples[name] = tensor.to(port.graph_dtype).numpy()
    return samples


def _manifest(manifest: Any, files: dict[str, str]) -> dict[str, Any]:
    def described(data: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": port.spec.name,
                "shape": list(port.spec.graph_shape),
                "dtype": port.to_dict()["graph_dtype"],
            }
            for port in map(Port.from_dict, data)
        ]

    stepping = manifest.get("stepping")
    if stepping is not None:
        stepping = {**stepping, "states": described(stepping["states"])}
    kept = ("spikeport", "source", "state", "T", "batch", "dtype", "neurons", "compile_options")
    return {
        **{name: manifest[name] for name in kept},
        "inputs": described(manifest["inputs"]),
        "outputs": described(manifest["outputs"]),
        "stepping": stepping,
        "calls": manifest["samples"]["calls"],
        "files": files,
    }
