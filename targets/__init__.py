"""The table of targets, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ..converters.errors import UsageError
from .base import SDK, Capabilities, Compiled, Loaded, Target, check
from .cuda.target import Cuda
from .lynxi import Lynxi
from .nir import Nir
from .onnx import Onnx
from .reference import Reference

__all__ = ["SDK", "TARGETS", "Capabilities", "Compiled", "Loaded", "Target", "check", "get"]

TARGETS: dict[str, Callable[[], Target]] = {
    "cuda": Cuda,
    "lynxi": lambda: Lynxi(simulated=False),
    "lynxi-sim": lambda: Lynxi(simulated=True),
    "nir": Nir,
    "onnx": Onnx,
    "reference": Reference,
}


def get(name: str) -> Target:
    """The target of this name.

    Raises:
        UsageError: There is none; the error names those there are.
    """
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"no target {name!r}; there are {', '.join(TARGETS)}{hint}")
    return TARGETS[name]()
