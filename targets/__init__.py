"""The table of targets, by name.

What a target needs is imported when it is asked for, so that a part of the package that runs beside
an old SDK, with its old torch, does not import what needs a newer one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..converters.errors import UsageError

if TYPE_CHECKING:
    from .base import SDK, Capabilities, Compiled, Loaded, Target, check

__all__ = ["SDK", "TARGETS", "Capabilities", "Compiled", "Loaded", "Target", "check", "get"]


def _made(module: str, name: str, **arguments: Any) -> Callable[[], Target]:
    def make() -> Target:
        target: Target = getattr(import_module(module, __name__), name)(**arguments)
        return target

    return make


TARGETS: dict[str, Callable[[], Target]] = {
    "cuda": _made(".cuda.target", "Cuda"),
    "ipu": _made(".ipu.target", "Ipu", simulated=False),
    "ipu-sim": _made(".ipu.target", "Ipu", simulated=True),
    "lynxi": _made(".lynxi", "Lynxi", simulated=False),
    "lynxi-sim": _made(".lynxi", "Lynxi", simulated=True),
    "nir": _made(".nir", "Nir"),
    "onnx": _made(".onnx", "Onnx"),
    "reference": _made(".reference", "Reference"),
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
