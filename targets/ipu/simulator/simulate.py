"""Lets scripts written for poptorch run on the simulation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ... import script
from . import popart, poptorch
from .libraries import placeholders
from .settings import current


@contextmanager
def install() -> Iterator[None]:
    """Make ``import poptorch`` and ``import popart`` find the simulation, inside the context.

    Whatever was importable under these names before is so again after it. Libraries of custom
    operators can be built and loaded, as placeholders.
    """
    home = poptorch.__name__
    modules = {
        "poptorch" + name.removeprefix(home): module
        for name, module in list(sys.modules.items())
        if name == home or name.startswith(f"{home}.")
    }
    with script.importable({**modules, "popart": popart}), placeholders():
        yield


def run_script(path: str | Path, args: Sequence[str] = ()) -> int:
    """Run a user's script as ``__main__``, its ``poptorch`` and ``popart`` being the simulation.

    Args:
        path: The script.
        args: Its arguments.

    Returns:
        The exit code; see :func:`spikeport.targets.script.run_script`.
    """
    current()  # a setting that cannot be used is said before the script runs
    sdk = f"Poplar SDK {poptorch.__version__.split('+')[0]} (poptorch)"
    return script.run_script(path, args, sdk, install())
