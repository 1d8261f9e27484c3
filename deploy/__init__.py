"""What a user calls: check, convert, compile, load, compare.

Everything is imported when it is first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from ..converters.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactExistsError,
    ArtifactVersionError,
    CaptureError,
    CheckpointError,
    CompileError,
    DataError,
    DeviceError,
    Finding,
    Findings,
    FindingsError,
    MismatchError,
    SpikeportError,
    TargetError,
    TargetUnavailableError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from ..converters.program import Program
    from .artifact import Artifact, Verification, load
    from .bundle import bundle
    from .compare import Report, compare
    from .compile import compile
    from .model import Model
    from .pipeline import check, convert

__all__ = [
    "Artifact",
    "ArtifactCorruptError",
    "ArtifactError",
    "ArtifactExistsError",
    "ArtifactVersionError",
    "CaptureError",
    "CheckpointError",
    "CompileError",
    "DataError",
    "DeviceError",
    "Finding",
    "Findings",
    "FindingsError",
    "MismatchError",
    "Model",
    "Program",
    "Report",
    "SpikeportError",
    "TargetError",
    "TargetUnavailableError",
    "UnsupportedError",
    "UsageError",
    "Verification",
    "bundle",
    "check",
    "compare",
    "compile",
    "convert",
    "load",
]

_HOMES = {
    "Program": "..converters.program",
    "Artifact": ".artifact",
    "Verification": ".artifact",
    "compile": ".compile",
    "load": ".artifact",
    "bundle": ".bundle",
    "Report": ".compare",
    "compare": ".compare",
    "Model": ".model",
    "check": ".pipeline",
    "convert": ".pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps a function's name for it, as ``compare``: importing the file compare.py would take it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
