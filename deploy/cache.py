"""The cache: what was compiled on this machine, by its key; what was not used for longest leaves it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..converters.errors import ArtifactError, UsageError
from . import store
from .artifact import Artifact
from .manifest import MANIFEST

_LIMIT_GIB = 10
#: Seconds after which a directory that is no entry is what a killed process left.
_ABANDONED = 24 * 3600

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """Artifacts that :func:`compile` copies instead of compiling them again.

    Any number of processes may use it: an entry appears and leaves by being renamed, and one that leaves
    while it is copied is compiled again.

    Attributes:
        root: Their directory.
        limit: Most bytes that they take together.
    """

    root: Path
    limit: float

    @classmethod
    def of_user(cls) -> Cache:
        """That in ``$SPIKEPORT_CACHE`` or ``~/.cache/spikeport``, with ``$SPIKEPORT_CACHE_GIB`` or 10 GiB.

        Raises:
            UsageError: The limit is no number.
        """
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = os.environ.get("SPIKEPORT_CACHE") or Path(home) / "spikeport"
        given = os.environ.get("SPIKEPORT_CACHE_GIB") or _LIMIT_GIB
        try:
            limit = float(given)
        except ValueError:
            limit = -1.0
        if not limit >= 0:
            raise UsageError(
                f"SPIKEPORT_CACHE_GIB is {given!r}; allowed: how many GiB the cache may take, from 0 to inf"
            )
        return cls(Path(root) / "artifacts", limit * 2**30)

    def fetch(self, key: str, stage: Path) -> Artifact | None:
        """Copy the artifact of this key into the empty directory ``stage``, if it is there and whole."""
        entry = self.root / key
        if not entry.is_dir():
            return None
        with suppress(OSError):  # the cache may be another user's
            os.utime(entry)
        try:
            shutil.copytree(entry, stage, dirs_exist_ok=True)
            return Artifact.open(stage)
        except (ArtifactError, OSError) as error:
            _logger.warning("the cached artifact cannot be used, and is built anew: %s", error)
            if isinstance(error, ArtifactError):
                with suppress(OSError):
                    store.discard(entry)
            shutil.rmtree(stage)
            stage.mkdir()
            return None

    def add(self, key: str, path: Path) -> None:
        """Copy an artifact into the cache, in place of those not used for longest.

        One above the limit is left out; where the cache cannot be written there is a warning.
        """
        entry, size = self.root / key, _size(path)
        if size > self.limit:
            _logger.info(
                "the artifact is not cached: it has %.2f GiB, the cache takes %g (SPIKEPORT_CACHE_GIB)",
                size / 2**30,
                self.limit / 2**30,
            )
            return
        try:
            with store.staged(entry) as stage:
                shutil.copytree(path, stage, dirs_exist_ok=True)
                os.utime(stage)
                store.publish(stage, entry, MANIFEST)
            self._make_room(entry)
        except OSError as error:
            _logger.warning("the artifact is not cached: %s: %s", entry, error.strerror or error)

    def _make_room(self, newest: Path) -> None:
        """Remove other entries, the least recently used first, until all are within the limit."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if total <= self.limit:
                return
            if entry != newest:
                store.discard(entry)
                total -= size
                _logger.info("removed from the cache, for room: %s", entry)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(time of the last use, bytes, directory) of each; what killed processes left is removed."""
        for directory in self.root.iterdir():
            if not directory.is_dir():
                continue
            try:
                used, size = directory.stat().st_mtime, _size(directory)
            except FileNotFoundError:
                continue  # another process has removed it meanwhile
            if not directory.name.startswith("."):
                yield used, size, directory
            elif time.time() - used > _ABANDONED:
                shutil.rmtree(directory, ignore_errors=True)


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
