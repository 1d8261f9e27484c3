"""Lets scripts written for the vendor's SDK run on the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ... import script
from . import lyngor, lynpy
from .options import current


def install() -> AbstractContextManager[None]:
    """Make ``import lyngor`` and ``import lynpy`` find the simulation, inside the context.

    Whatever was importable under these names before is so again after it.
    """
    return script.importable({"lyngor": lyngor, "lynpy": lynpy})


def run_script(path: str | Path, args: Sequence[str] = ()) -> int:
    """Run a user's script as ``__main__``, its ``lyngor`` and ``lynpy`` being the simulation.

    Args:
        path: The script.
        args: Its arguments.

    Returns:
        The exit code; see :func:`spikeport.targets.script.run_script`.
    """
    return script.run_script(path, args, f"Lynxi SDK {current().version}", install())
