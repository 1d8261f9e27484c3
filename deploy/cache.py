"""The cache: every artifact that was compiled on this machine, by its key."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..converters.errors import ArtifactError
from . import store
from .artifact import Artifact

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """Artifacts that :func:`compile` copies instead of compiling them again.

    Attributes:
        root: Their directory.
    """

    root: Path

    @classmethod
    def of_user(cls) -> Cache:
        """That in ``$SPIKEPORT_CACHE``, or ``~/.cache/spikeport``."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = os.environ.get("SPIKEPORT_CACHE") or Path(home) / "spikeport"
        return cls(Path(root) / "artifacts")

    def fetch(self, key: str, stage: Path) -> Artifact | None:
        """Copy the artifact of this key into the empty directory ``stage``, if it is there and whole."""
        entry = self.root / key
        if not entry.is_dir():
            return None
        try:
            shutil.copytree(entry, stage, dirs_exist_ok=True)
            return Artifact.open(stage)
        except (ArtifactError, OSError) as error:
            _logger.warning("the cached artifact cannot be used, and is built anew: %s", error)
            if isinstance(error, ArtifactError):
                shutil.rmtree(entry, ignore_errors=True)
            shutil.rmtree(stage)
            stage.mkdir()
            return None

    def add(self, key: str, path: Path) -> None:
        """Copy an artifact into the cache; where that fails there is a warning."""
        entry = self.root / key
        try:
            with store.staged(entry) as stage:
                shutil.copytree(path, stage, dirs_exist_ok=True)
                store.publish(stage, entry)
        except OSError as error:
            _logger.warning("the artifact is not cached: %s: %s", entry, error.strerror)
