"""Lets scripts written for the vendor's SDK run on the simulation."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import lyngor, lynpy
from .options import current

_MODULES = {"lyngor": lyngor, "lynpy": lynpy}


@contextmanager
def install() -> Iterator[None]:
    """Make ``import lyngor`` and ``import lynpy`` find the simulation, inside the context.

    Whatever was importable under these names before is so again after it.
    """
    before = {name: sys.modules.get(name) for name in _MODULES}
    sys.modules.update(_MODULES)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def run_script(path: str | Path, args: Sequence[str] = ()) -> int:
    """Run a user's script as ``__main__``, its ``lyngor`` and ``lynpy`` being the simulation.

    The first line of standard output says that this is a simulation, and of which version.

    Args:
        path: The script.
        args: Its arguments.

    Returns:
        The exit code that ``python path args...`` would have; 1 for an uncaught exception,
        whose traceback goes to standard error.
    """
    print(
        f"simulation of the Lynxi SDK {current().version} by spikeport; no chip takes part",
        flush=True,
    )
    script = Path(path)
    if not script.is_file():
        print(f"cannot open {script}: no such file", file=sys.stderr)
        return 2
    argv, search = sys.argv, sys.path[:]
    sys.argv = [str(path), *args]
    sys.path[:1] = [str(script.resolve().parent)]
    try:
        with install():
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        return _exit_code(error)
    except BaseException as error:
        _print_traceback(error)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.argv, sys.path[:] = argv, search
        sys.stdout.flush()
    return 0


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    print(error.code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    """As python prints it: from the script's own frame on, none for a script it cannot parse."""
    frames = error.__traceback__
    while frames is not None and (
        frames.tb_frame.f_code.co_filename == __file__
        or "runpy" in frames.tb_frame.f_code.co_filename
    ):
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)
