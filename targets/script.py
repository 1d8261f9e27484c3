"""Runs scripts that were written for a vendor's SDK, on a simulation of it."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def importable(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Make these names import these modules, inside the context.

    Whatever was importable under the names before is so again after it.
    """
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def run_script(
    path: str | Path, args: Sequence[str], sdk: str, installed: AbstractContextManager[None]
) -> int:
    """Run a script as ``__main__`` with a simulation in place of its SDK.

    The first line of standard output says that this is a simulation.

    Args:
        path: The script.
        args: Its arguments.
        sdk: Name and version of the SDK.
        installed: Makes the simulation importable.

    Returns:
        The exit code that ``python path args...`` would have; 1 for an uncaught exception,
        whose traceback goes to standard error.
    """
    print(f"simulation of the {sdk} by spikeport; no chip takes part", flush=True)
    script = Path(path)
    if not script.is_file():
        print(f"cannot open {script}: no such file", file=sys.stderr)
        return 2
    argv, search = sys.argv, sys.path[:]
    sys.argv = [str(path), *args]
    sys.path[:1] = [str(script.resolve().parent)]
    try:
        with installed:
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
