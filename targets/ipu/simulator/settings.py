"""What the simulated machine is like."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_PREFIX = "SPIKEPORT_IPU_SIM_"


class SimulatorWarning(UserWarning):
    """Something that a real SDK would refuse, or do without a word, and that matters."""


_INSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def warn(text: str) -> None:
    """Issue a :class:`SimulatorWarning` at the user's line."""
    level, _ = _users()
    warnings.warn(text, SimulatorWarning, stacklevel=level)


def place() -> str:
    """File and line of the user's code that is running, such as ``net.py:12``."""
    _, frame = _users()
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


def _users() -> tuple[int, FrameType | None]:
    """The first frame outside of here and of torch, and its level above the caller."""
    level, frame = 2, sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level, frame


@dataclass(frozen=True)
class Settings:
    """How the simulated IPUs and their compiler behave.

    Attributes:
        memory_mb: Megabytes (10^6 bytes) of one IPU that weights, optimizer state and stored
            activations may take.
        strict: Whether what only some releases of the SDK refuse is refused.
    """

    memory_mb: int = 624
    strict: bool = False

    def __post_init__(self) -> None:
        if self.memory_mb < 1:
            raise ValueError(f"Settings.memory_mb is {self.memory_mb}; it must be at least 1")


_chosen: ContextVar[Settings | None] = ContextVar("ipu_simulator_settings", default=None)


def current() -> Settings:
    """The settings in force: :func:`settings`, else ``SPIKEPORT_IPU_SIM_*``, else the defaults."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    found: dict[str, Any] = {}
    for field in fields(Settings):
        text = os.environ.get(_PREFIX + field.name.upper())
        if text is None:
            continue
        if not text.isdigit():
            raise ValueError(f"{_PREFIX}{field.name.upper()}={text!r}; it must be a number")
        found[field.name] = bool(int(text)) if isinstance(field.default, bool) else int(text)
    return Settings(**found)


@contextmanager
def settings(**changes: Any) -> Iterator[Settings]:
    """Put other settings in force, for this thread and as long as the context is open."""
    chosen = replace(current(), **changes)
    token = _chosen.set(chosen)
    try:
        yield chosen
    finally:
        _chosen.reset(token)
