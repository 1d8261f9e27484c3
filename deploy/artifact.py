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

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..converters.attributes import equal
from ..converters.errors import ArtifactCorruptError, ArtifactError
from ..converters.returned import tensors
from ..converters.verify import difference
from . import store
from .manifest import read_manifest, understood
from .model import Model, classes

#: Fraction of predictions that must agree where the samples were recorded off the device.
_LEAST_AGREEMENT = 0.9


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
        manifest = read_manifest(path)
        with understood(path):
            files = {n: (e["size"], e["sha256"]) for n, e in sorted(manifest["files"].items())}
        wrong = []
        for name, (size, sha256) in files.items():
            file = path / name
            if not file.is_file():
                wrong.append(f"{name} is missing")
            elif (found := file.stat().st_size) != size:
                wrong.append(f"{name} has {found} bytes of {size}")
            elif store.file_sha256(file) != sha256:
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
        same, largest, agreeing, rows = True, 0.0, 0, 0
        with self.load(device, target) as model:
            for k in range(recorded["calls"]):
                inputs = _numbered(samples, f"{k}.input", len(model.inputs))
                expected = _numbered(samples, f"{k}.output", len(model.outputs))
                found = tensors(model(*inputs))
                for a, b in zip(found, expected, strict=True):
                    same = same and equal(a, b)
                    off = difference(a, b)
                    largest = max(largest, off.max().item() if off.numel() else 0.0)
                if found[0].dim() == 2:
                    agreeing += int((classes(found[0]) == classes(expected[0])).sum())
                    rows += len(found[0])
        agreement = agreeing / rows if rows else None
        return Verification(recorded["source"], recorded["calls"], same, largest, agreement)

    def __str__(self) -> str:
        m = self.manifest
        sdk = f"{m['sdk']['name']} {m['sdk']['version']}"
        sdk += " (simulated)" if m["sdk"]["simulated"] else ""
        found = "; compiled before, taken as it is" if self.cached else ""
        return (
            f"{self.path}: {m['source']['class']} for {m['target']}, {sdk}, "
            + ("stepped, " if m.get("stepping") else f"T={m['T']}, ")
            + f"batch={m['batch']}, {m['dtype']}"
            + (", the network's rounding kept" if m.get("keeps_rounding") else "")
            + found
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
