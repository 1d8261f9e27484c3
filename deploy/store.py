"""Directories that appear whole or not at all, and what is in them as hashes."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..converters.errors import ArtifactError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the file system inside become an ArtifactError that names ``path``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(
            f"{path} cannot be written: {reason}; choose another directory, or see to the rights "
            "and the space of this one"
        ) from error


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new directory beside ``path``; it is gone afterwards, unless :func:`publish` renamed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = _beside(path, "partial")
    try:
        stage.mkdir()
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, path: Path, last: str) -> None:
    """Rename ``stage`` to ``path``, in place of the directory there; all of it is on disk then.

    An empty one that the process works in stays, since whoever works in it would see nothing of another:
    the entries of ``stage`` are moved, that of the name ``last`` in the end.

    Raises:
        ArtifactError: The process works in ``path``, and something is there.
    """
    for entry in (*stage.rglob("*"), stage):
        _sync(entry)
    if path.exists() and path.samefile("."):
        if any(path.iterdir()):
            raise ArtifactError(
                f"{path} is the current directory, which is not replaced while somebody works in it; go to "
                "another directory, or choose one"
            )
        for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == last):
            entry.rename(path / entry.name)
        _sync(path)
        return
    if path.exists() and any(path.iterdir()):
        old = _beside(path, "old")
        path.rename(old)
        try:
            stage.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        stage.rename(path)
    _sync(path.parent)


def discard(path: Path) -> None:
    """Remove a directory, all of it at once for whoever looks for it; another process may be first."""
    old = _beside(path, "old")
    with suppress(FileNotFoundError):
        path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def named(path: str | os.PathLike[str]) -> Path:
    """A path whose last part is the directory's own name: neither ``.`` nor a link."""
    path = Path(path)
    return path.resolve() if path.name in ("", "..") or path.is_symlink() else path


def _beside(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}-{secrets.token_hex(4)}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's dtype, shape and values."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    content = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    content.update(raw.data)
    return content.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            content.update(chunk)
    return content.hexdigest()
