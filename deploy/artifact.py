"""The artifact: a compiled network as a directory of data, written whole or not at all.

::

    manifest.json         what it is; sha256 and size of every other file
    weights.safetensors   the rewritten graph's weights
    program.txt           the rewritten graph, for people
    samples.safetensors   recorded inputs and the outputs expected for them
    states.safetensors    of a stepped network, what its states are before the first step
    device/               the vendor's files
    probe/                a second build, whose further outputs are each layer's spikes; optional
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from .. import targets as registry
from ..converters.builder import with_probes
from ..converters.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactExistsError,
    ArtifactVersionError,
    DeviceError,
    TargetUnavailableError,
    UsageError,
)
from ..converters.program import Program, TensorSpec
from ..targets import SDK, Loaded, Target
from ..targets.graphs import separate
from . import store
from .model import STATES, Model, Port, dtype_name, load_onto

#: The newest format; what has all time steps in one call is still written in the first.
SCHEMA_VERSION = 2
MANIFEST = "manifest.json"

_REQUIRED = (
    *("digest", "files", "key", "source", "spikeport", "state", "target", "sdk"),
    *("T", "batch", "dtype", "inputs", "outputs", "structure", "neurons"),
    *("compile_options", "probe", "samples"),
)
_MOST_SAMPLES = 4
#: Fraction of predictions that must agree where the samples were recorded off the device.
_LEAST_AGREEMENT = 0.9

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verification:
    """What came of replaying an artifact's recorded inputs.

    Attributes:
        source: ``"device"`` if the outputs were recorded on the device, which must give them again
            bit for bit; ``"host"`` if they come from the rewritten graph in torch.
        samples: Number of recorded calls.
        equal: Whether all outputs are equal bit for bit.
        largest_difference: Largest difference of an output.
        agreement: Fraction of equal predictions (argmax of the first output [N, classes]), or None.
    """

    source: str
    samples: int
    equal: bool
    largest_difference: float
    agreement: float | None

    @property
    def ok(self) -> bool:
        """Whether the device computes what was recorded."""
        if self.source == "device" or self.agreement is None:
            return self.equal
        return self.agreement >= _LEAST_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """The verification as plain data."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        verdict = "verified" if self.ok else "VERIFICATION FAILED"
        found = (
            "equal bit for bit"
            if self.equal
            else f"outputs differ by up to {self.largest_difference:.3g}"
        )
        if self.agreement is not None:
            found += f", {self.agreement:.2%} of the predictions agree"
        return f"{verdict}: {self.samples} calls recorded on the {self.source}, {found}"


@dataclass(frozen=True)
class Artifact:
    """A compiled network on disk.

    Attributes:
        path: Its directory.
        manifest: What ``manifest.json`` says.
        cached: Whether :func:`compile` found it compiled already.
    """

    path: Path
    manifest: Mapping[str, Any]
    cached: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Artifact:
        """An artifact whose every file is as it was written.

        Raises:
            ArtifactError: There is none.
            ArtifactVersionError: It was written in a newer format.
            ArtifactCorruptError: Files are missing, cut short or changed; all are named.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        wrong = []
        for name, entry in sorted(manifest["files"].items()):
            file = path / name
            if not file.is_file():
                wrong.append(f"{name} is missing")
            elif (size := file.stat().st_size) != entry["size"]:
                wrong.append(f"{name} has {size} bytes of {entry['size']}")
            elif store.file_sha256(file) != entry["sha256"]:
                wrong.append(f"{name} was changed")
        if wrong:
            raise ArtifactCorruptError(
                f"{path}: {'; '.join(wrong)}; compile again, or copy the artifact again"
            )
        return cls(path, manifest)

    def load(self, device: int = 0, target: str | None = None) -> Model:
        """Load it onto a device; see :func:`load`."""
        return Model(self.path, self.manifest, device, target)

    def verify(self, device: int = 0, target: str | None = None) -> Verification:
        """Replay the recorded inputs on a device; see :func:`load`."""
        samples = load_file(str(self.path / "samples.safetensors"))
        recorded = self.manifest["samples"]
        if not recorded["calls"]:
            raise ArtifactError(f"{self.path} has no recorded inputs; convert from example inputs")
        equal, largest, agreeing, rows = True, 0.0, 0, 0
        with self.load(device, target) as model:
            for k in range(recorded["calls"]):
                inputs = _numbered(samples, f"{k}.input", len(model.inputs))
                expected = _numbered(samples, f"{k}.output", len(model.outputs))
                found, _ = pytree.tree_flatten(model(*inputs))
                for a, b in zip(found, expected, strict=True):
                    equal = equal and torch.equal(a, b)
                    largest = max(largest, (a.double() - b.double()).abs().max().item())
                if found[0].dim() == 2:
                    agreeing += int((found[0].argmax(1) == expected[0].argmax(1)).sum())
                    rows += len(found[0])
        agreement = agreeing / rows if rows else None
        return Verification(recorded["source"], recorded["calls"], equal, largest, agreement)

    def __str__(self) -> str:
        m = self.manifest
        sdk = f"{m['sdk']['name']} {m['sdk']['version']}"
        sdk += " (simulated)" if m["sdk"]["simulated"] else ""
        found = "; compiled before, taken as it is" if self.cached else ""
        return (
            f"{self.path}: {m['source']['class']} for {m['target']}, {sdk}, "
            + ("stepped, " if m.get("stepping") else f"T={m['T']}, ")
            + f"batch={m['batch']}, {m['dtype']}{found}"
        )


def load(path: str | os.PathLike[str], device: int = 0, target: str | None = None) -> Model:
    """The artifact's network on a device, after every file has been checked.

    Args:
        path: The artifact.
        device: Id of the device.
        target: Another target than the artifact's that loads it too: ``"ipu"`` compiles an artifact for
            ``"ipu-sim"``, since its SDK is for a torch that cannot convert.

    Raises:
        UsageError: The target does not load artifacts for the artifact's.
        ArtifactError: There is none, it is damaged, or its format is newer (the subclasses say).
        TargetUnavailableError: The SDK that it was compiled for is not on this machine.
        DeviceError: There is no such device, or it refused the program.
    """
    return Artifact.open(path).load(device, target)


def _numbered(samples: Mapping[str, torch.Tensor], prefix: str, count: int) -> list[torch.Tensor]:
    return [samples[f"{prefix}.{i}"] for i in range(count)]


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    again = "compile again, or copy the artifact again"
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} is no artifact: {MANIFEST}: {error.strerror}") from error
    except ValueError as error:
        raise ArtifactCorruptError(f"{file} is not JSON ({error}); {again}") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ArtifactCorruptError(f"{file} has no schema_version; {again}")
    if version > SCHEMA_VERSION:
        raise ArtifactVersionError(
            f"{path} is written in format {version}, this spikeport {_version()} reads up to "
            f"format {SCHEMA_VERSION}; update spikeport (pip install -U spikeport), or compile "
            "again with this one"
        )
    if missing := [key for key in _REQUIRED if key not in manifest]:
        raise ArtifactCorruptError(f"{file} lacks {', '.join(missing)}; {again}")
    if manifest["digest"] != _manifest_digest(manifest):
        raise ArtifactCorruptError(f"{file} was changed; {again}")
    return dict(manifest)


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
    the cache, ``$SPIKEPORT_CACHE`` or ``~/.cache/spikeport``, and its ``cached`` is True.

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
        UsageError: An option is unknown, or the outputs' nesting cannot be stored.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    if not program.target:
        raise UsageError("the program is rewritten for no target yet; use convert(net, x, target)")
    target = registry.get(program.target)
    sdk = target.sdk()
    wanted = {"options": options, "probe": sdk.simulated if probe is None else probe}
    key = _key(program, sdk, wanted)
    with store.writing(path):
        there = _existing(path, key, overwrite)
        if there is not None:
            _logger.info("%s holds this very artifact already", path)
            return there
        with store.staged(path) as stage:
            cached = cache and _from_cache(key, stage, program)
            if not cached:
                _build(program, target, sdk, key, wanted, stage)
            store.publish(stage, path)
    if cache and not cached:
        _to_cache(key, path)
    return Artifact(path, _read_manifest(path), cached)


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


def _from_cache(key: str, stage: Path, program: Program) -> bool:
    """Copy the cached artifact into ``stage``, if there is one and it is whole."""
    entry = store.cache_entry(key)
    if not entry.is_dir():
        return False
    try:
        shutil.copytree(entry, stage, dirs_exist_ok=True)
        manifest = dict(Artifact.open(stage).manifest)
    except (ArtifactError, OSError) as error:
        _logger.warning("the cached artifact cannot be used, and is built anew: %s", error)
        if isinstance(error, ArtifactError):
            shutil.rmtree(entry, ignore_errors=True)
        shutil.rmtree(stage)
        stage.mkdir()
        return False
    if program.evidence:  # which the program that filled the cache may have lacked
        manifest["evidence"] = program.evidence.to_dict()
    _write_manifest(stage, manifest)
    return True


def _to_cache(key: str, path: Path) -> None:
    entry = store.cache_entry(key)
    try:
        with store.staged(entry) as stage:
            shutil.copytree(path, stage, dirs_exist_ok=True)
            store.publish(stage, entry)
    except OSError as error:
        _logger.warning("the artifact is not cached: %s: %s", entry, error.strerror)


def _build(
    program: Program, target: Target, sdk: SDK, key: str, wanted: Mapping[str, Any], stage: Path
) -> None:
    """Write everything into ``stage``, the manifest last."""
    manifest = _describe(program, sdk, key)  # first, for it may refuse
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
    _write_manifest(stage, manifest)


def _describe(program: Program, sdk: SDK, key: str) -> dict[str, Any]:
    """What the manifest says before anything is compiled."""
    return {
        "schema_version": 1 if program.stepping is None else SCHEMA_VERSION,
        "spikeport": _version(),
        "key": key,
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
        "dtype": dtype_name(program.dtype),
        "inputs": _ports(program, program.graph_inputs, program.nodes("placeholder"))[
            : len(program.inputs)
        ],
        "outputs": _ports(program, program.graph_outputs, program.results)[: len(program.outputs)],
        "structure": _structure(program.structure),
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


def _ports(program: Program, specs: Sequence[TensorSpec], nodes: Any) -> list[dict[str, Any]]:
    return [Port.of(s, n, program).to_dict() for s, n in zip(specs, nodes, strict=True)]


def _structure(structure: pytree.TreeSpec) -> Any:
    try:
        return json.loads(pytree.treespec_dumps(structure))
    except NotImplementedError as error:
        raise UsageError(
            f"the nesting of the network's outputs cannot be stored ({error}); allowed: a tensor, "
            "or tuples, lists and dicts of tensors"
        ) from error


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


def _write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    whole = {**manifest, "digest": _manifest_digest(manifest)}
    text = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def _key(program: Program, sdk: SDK, wanted: Mapping[str, Any]) -> str:
    """What decides an artifact's content, as one hash."""
    machine = {k: v for k, v in asdict(sdk).items() if k != "devices"}
    described = _describe(program, sdk, "")
    del described["evidence"], described["passes"], described["source"]["torch"]
    content = {**described, **wanted, "sdk": machine}
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


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return store.digest({k: v for k, v in manifest.items() if k != "digest"})


def _version() -> str:
    return metadata.version("spikeport")
