"""``popart``, of which scripts for poptorch use a version and a few numbers."""

from __future__ import annotations

import enum
import logging
from typing import Any

__version__ = "3.4.0+simulated"


class SyntheticDataMode(enum.IntEnum):
    """Where inputs come from."""

    Off = 0
    Zeros = 1
    RandomNormal = 2
    RandomUniform = 3


class RecomputationType(enum.IntEnum):
    """What is computed again in the backward pass instead of kept."""

    None_ = 0
    Standard = 1
    NormOnly = 2
    Pipeline = 3
    RecomputeAll = 4


class MergeVarUpdateType(enum.IntEnum):
    """Which weight updates are merged."""

    None_ = 0
    All = 1
    AutoLoose = 2
    AutoTight = 3


class Instrumentation(enum.IntEnum):
    """Which cycles are counted."""

    Outer = 0
    Inner = 1


def getLogger(name: str = "all") -> Any:
    """A logger of the compiler."""
    return logging.getLogger(f"popart.{name}")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(
        f"the simulated popart has no {name!r}: it stands in for poptorch's use of popart, not for "
        "programs written for popart itself"
    )
