"""From a program to an artifact."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from .. import targets as registry
from ..converters.builder import with_probes
from ..converters.errors import (
    ArtifactError,
    ArtifactExistsError,
    DeviceError,
    TargetUnavailableError,
    UsageError,
)
from ..converters.program import Program, TensorSpec
from ..targets import SDK, Loaded, Target
from ..targets.graphs import separate
from . import store
from .artifact import Artifact
from .cache import Cache
from .manifest import MANIFEST, SCHEMA_VERSION, read_manifest, version, write_manifest
from .model import STATES, load_onto, structure_data
from .ports import Port, dtype_name
from .samples import batch_dims, by_size, coupled

_MOST_SAMPLES = 4

_logger = logging.getLogger(__name__)


def compile(
    program: Program,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    cache: bool = True,
    probe: bool | None = None,
    **options: Any,
) -> Artifact:
    """Compile a program for its target into an artifact.

    The same graph, weights, options and SDK are compiled once: after that the artifact comes from
    the cache, ``$SPIKEPORT_CACHE`` or ``~/.cache/spikeport``, and its ``cached`` is True. What was not
    used for longest leaves the cache where it would take more than ``$SPIKEPORT_CACHE_GIB``, or 10.

    Args:
        program: What ``convert`` gave.
        path: Directory to write; it appears when it is whole.
        overwrite: Whether an artifact that is there already is replaced.
        cache: Whether the cache is used.
        probe: Whether each layer's spikes can be read too, at the cost of a second build; yes on a
            simulated SDK and no on a real one unless given.
        **options: Options of the target's compiler.

    Raises:
        ArtifactExistsError: ``path`` holds something else.
        ArtifactError: ``path`` cannot be written.
        TargetUnavailableError: The SDK is not on this machine.
        CompileError: The compiler refused or failed.
        UsageError: An option is unknown, or ``$SPIKEPORT_CACHE_GIB`` is no number.
        UnsupportedError: The outputs' nesting cannot be stored.
    """
    with store.writing(Path(path)):
        path = store.named(path)
    if not program.target:
        raise UsageError("the program is rewritten for no target yet; use convert(net, x, target)")
    user_cache = Cache.of_user() if cache else None
    target = registry.get(program.target)
    sdk = target.sdk()
    options = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
    wanted = {"options": options, "probe": sdk.simulated if probe is None else probe}
    manifest = _describe(program, sdk)  # first, for it may refuse
    manifest["key"] = key = _key(manifest, sdk, wanted)
    with store.writing(path):
        there = _existing(path, key, overwrite)
        if there is not None:
            _logger.info("%s holds this very artifact already", path)
            return there
        with store.staged(path) as stage:
            found = user_cache.fetch(key, stage) if user_cache else None
            if found is None:
                _build(program, target, sdk, manifest, wanted, stage)
            elif program.evidence:  # which the program that filled the cache may have lacked
                evidence = program.evidence.to_dict()
                write_manifest(stage, {**found.manifest, "evidence": evidence})
            store.publish(stage, path, MANIFEST)
    if user_cache and found is None:
        user_cache.add(key, path)
    return Artifact(path, read_manifest(path), cached=found is not None)


def _existing(path: Path, key: str, overwrite: bool) -> Artifact | None:
    """The artifact at ``path`` if it has this key; else the path must be free or to be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not path.is_dir():
        raise ArtifactExistsError(f"{path} is a file; choose another directory")
    try:
        found = Artifact.open(path)
        kind = f"another artifact ({found})"
        if found.manifest["key"] == key and not overwrite:
            return replace(found, cached=True)
    except ArtifactError as error:
        kind = f"something that is no whole artifact ({error})"
    foreign = _foreign(path)
    if foreign:
        raise ArtifactExistsError(
            f"{path} holds what spikeport did not write: {', '.join(foreign)}; choose another "
            "directory, or move that away: it is not overwritten"
        )
    if not overwrite:
        raise ArtifactExistsError(
            f"{path} holds {kind}; choose another directory, or replace it with overwrite=True "
            "(--force)"
        )
    return None


def _foreign(path: Path) -> list[str]:
    """A few of the files that no manifest there lists; all are foreign where there is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        ours = {MANIFEST, *manifest["files"]} if "spikeport" in manifest else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    there = (p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir())
    return sorted(set(there) - ours)[:5]


def _build(
    program: Program,
    target: Target,
    sdk: SDK,
    manifest: dict[str, Any],
    wanted: Mapping[str, Any],
    stage: Path,
) -> None:
    """Write everything into ``stage``, the manifest, which is completed, last."""
    (stage / "device").mkdir()
    compiled = target.compile(program, stage / "device", wanted["options"])
    manifest["compile_options"] = dict(compiled.options)
    if program.stepping is not None:
        manifest["stepping"]["state"] = compiled.state
        names = [state.name for state in program.stepping.states]
        _save(dict(zip(names, program.initial_state(), strict=True)), stage / STATES)
    if wanted["probe"] and program.sites:
        probed = with_probes(program)
        (stage / "probe").mkdir()
        target.compile(probed, stage / "probe", wanted["options"])
        ports = _ports(probed, probed.graph_outputs, probed.results)
        extra = slice(len(program.outputs), len(probed.outputs))
        manifest["probe"] = {"outputs": ports[extra]}
    _save(program.tensors, stage / "weights.safetensors")
    (stage / "program.txt").write_text(f"{program}\n", encoding="utf-8")
    manifest["samples"] = _record(program, target, sdk, manifest, stage)
    files = sorted(p for p in stage.rglob("*") if p.is_file())
    manifest["files"] = {
        p.relative_to(stage).as_posix(): {"sha256": store.file_sha256(p), "size": p.stat().st_size}
        for p in files
    }
    write_manifest(stage, manifest)


def _describe(program: Program, sdk: SDK) -> dict[str, Any]:
    """What the manifest says before anything is compiled."""
    inputs, outputs = batch_dims(program)
    placeholders = list(program.nodes("placeholder"))[: len(program.inputs)]
    results = program.results[: len(program.outputs)]
    return {
        "schema_version": 1 if program.stepping is None else SCHEMA_VERSION,
        "spikeport": version(),
        "source": {**program.source, "torch": str(torch.__version__)},
        "target": program.target,
        "sdk": {"name": sdk.name, "version": sdk.version, "simulated": sdk.simulated},
        "state": "each call starts from v_0"
        if program.stepping is None
        else "each call goes on from the state that the last one gave",
        "time": program.time,
        "stepping": _stepping(program),
        "graph": _graph_digest(program),
        "T": program.T if program.stepping is None else None,
        "batch": program.batch,
        "coupled": coupled(program, inputs, outputs),
        "dtype": dtype_name(program.dtype),
        "keeps_rounding": program.keeps_rounding,
        "inputs": _ports(program, program.inputs, placeholders, inputs),
        "outputs": _ports(program, program.outputs, results, outputs),
        "structure": structure_data(program.structure),
        "passes": [asdict(report) for report in program.history],
        "neurons": [
            {
                "name": site.name,
                "path": site.path,
                "T": site.T,
                "layout": site.layout,
                "neuron": json.loads(site.neuron.to_json()),
                "describe": site.neuron.describe(),
            }
            for site in program.sites
        ],
        "evidence": program.evidence.to_dict() if program.evidence else None,
        "probe": None,
    }


def _stepping(program: Program) -> dict[str, Any] | None:
    """How steps make up a call, as plain data."""
    stepping = program.stepping
    if stepping is None:
        return None
    ports = _ports(program, program.graph_inputs, program.nodes("placeholder"))
    return {
        "steps": stepping.steps,
        "inputs": list(stepping.inputs),
        "outputs": list(stepping.outputs),
        "states": ports[len(program.inputs) :],
    }


def _graph_digest(program: Program) -> str:
    """A hash of what the graph computes: its nodes, weights and initial states."""
    nodes = [f"{n.name} = {n.op} {n.target} {n.args} {n.kwargs}" for n in program.graph.nodes]
    weights = {name: store.tensor_sha256(tensor) for name, tensor in program.tensors.items()}
    initial = [store.tensor_sha256(state) for state in program.initial_state()]
    return store.digest({"graph": nodes, "weights": weights, "initial": initial})


def _ports(
    program: Program, specs: Sequence[TensorSpec], nodes: Any, dims: Sequence[int | None] = ()
) -> list[dict[str, Any]]:
    """Ports as plain data; their dimension of the batch is given, or follows from the sizes."""
    known = [*dims, *(by_size(program, spec) for spec in specs[len(dims) :])]
    return [Port.of(*port).to_dict() for port in zip(specs, nodes, known, strict=True)]


def _record(
    program: Program, target: Target, sdk: SDK, manifest: Mapping[str, Any], stage: Path
) -> dict[str, Any]:
    """Write a few inputs with the outputs expected for them, from the device if there is one."""
    calls = program.examples[:_MOST_SAMPLES]
    states = manifest["stepping"]["states"] if program.stepping else []
    ports = [
        tuple(map(Port.from_dict, [*manifest[side], *states])) for side in ("inputs", "outputs")
    ]
    device = sdk.devices[0] if sdk.devices else 0
    loaded: Loaded | None = None
    try:
        loaded = load_onto(target, stage / "device", ports[0], ports[1], device)
    except (DeviceError, TargetUnavailableError) as error:
        _logger.warning("the expected outputs are recorded on the host: %s", error)

    def device_run(_: int, given: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        assert loaded is not None
        return loaded.run(given)

    samples: dict[str, torch.Tensor] = {}
    try:
        for k, inputs in enumerate(calls):
            raw = program.run_by(device_run, inputs) if loaded else program.run(inputs)
            samples |= {f"{k}.input.{i}": x.detach() for i, x in enumerate(inputs)}
            outputs = enumerate(program.whole(raw))
            samples |= {f"{k}.output.{i}": y for i, y in outputs}
    finally:
        if loaded:
            loaded.close()
    _save(samples, stage / "samples.safetensors")
    return {"source": "device" if loaded else "host", "calls": len(calls)}


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write tensors as safetensors."""
    save_file(separate(tensors), file)
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors writes for the owner alone


def _key(manifest: Mapping[str, Any], sdk: SDK, wanted: Mapping[str, Any]) -> str:
    """What decides an artifact's content, as one hash."""
    machine = {k: v for k, v in asdict(sdk).items() if k != "devices"}
    described = {k: v for k, v in manifest.items() if k not in ("evidence", "passes")}
    source = {k: v for k, v in manifest["source"].items() if k != "torch"}
    content = {**described, **wanted, "source": source, "sdk": machine}
    if sdk.simulated:
        content["simulator"] = _simulator_code()
    try:
        return store.digest(content)
    except TypeError as error:
        raise UsageError(f"an option is no plain value: {error}") from error


def _simulator_code() -> str:
    """A hash of the targets' code: a simulator changes, the version that it imitates does not."""
    root = Path(registry.__file__).parent
    code = {
        p.relative_to(root).as_posix(): store.file_sha256(p) for p in sorted(root.rglob("*.py"))
    }
    return store.digest(code)
