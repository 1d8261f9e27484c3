"""The manifest: what an artifact says of itself, with a hash of every other file and one of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from ..converters.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactVersionError,
)
from . import store

#: The newest format; what has all time steps in one call is still written in the first.
SCHEMA_VERSION = 2
MANIFEST = "manifest.json"

_REQUIRED = (
    *("digest", "files", "key", "source", "spikeport", "state", "target", "sdk"),
    *("T", "batch", "dtype", "inputs", "outputs", "structure", "neurons"),
    *("compile_options", "probe", "samples"),
)
_AGAIN = "compile again, or copy the artifact again"


def version() -> str:
    """The version of spikeport that runs."""
    return metadata.version("spikeport")


def read_manifest(path: Path) -> dict[str, Any]:
    """What the manifest of the artifact at ``path`` says.

    Raises:
        ArtifactError: There is none.
        ArtifactVersionError: It is written in a newer format.
        ArtifactCorruptError: It was changed or cut short.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} is no artifact: {MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactCorruptError(f"{file} is not JSON ({error}); {_AGAIN}") from error
    schema = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema < 1:  # True is an int too
        raise ArtifactCorruptError(f"{file} has no schema_version; {_AGAIN}")
    if schema > SCHEMA_VERSION:
        raise ArtifactVersionError(
            f"{path} is written in format {schema}, this spikeport {version()} reads up to "
            f"format {SCHEMA_VERSION}; update spikeport (pip install -U spikeport), or compile "
            "again with this one"
        )
    if missing := [key for key in _REQUIRED if key not in manifest]:
        raise ArtifactCorruptError(f"{file} lacks {', '.join(missing)}; {_AGAIN}")
    if manifest["digest"] != _digest(manifest):
        raise ArtifactCorruptError(f"{file} was changed; {_AGAIN}")
    return dict(manifest)


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """What a manifest of another form raises where it is read becomes an ArtifactCorruptError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ArtifactCorruptError(
            f"{path / MANIFEST} is malformed ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with its own hash."""
    whole = {**manifest, "digest": _digest(manifest)}
    text = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def _digest(manifest: Mapping[str, Any]) -> str:
    return store.digest({k: v for k, v in manifest.items() if k != "digest"})
