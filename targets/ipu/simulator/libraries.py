"""Satisfies packages that build C++ operators for popart, with ``make``, when they are imported.

The compilers on PATH are replaced by a program that writes a placeholder for what links against
popart or poplar and hands everything else on; loading a placeholder loads nothing, because
the operators are those of :mod:`.custom_ops`. Placeholders go when the simulation ends.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_MARK = b"placeholder of the spikeport IPU simulation: no operators inside\n"
_COMPILERS = ("g++", "c++", "clang++")
_COMPILER = """\
#!{python}
import os, sys
arguments = sys.argv[1:]
if not {{"-lpopart", "-lpoplar", "-lpopops"}} & set(arguments) or "-o" not in arguments:
    os.environ["PATH"] = {path!r}
    os.execvp({name!r}, [{name!r}, *arguments])
output = arguments[arguments.index("-o") + 1]
if os.path.exists(output):  # a real one
    sys.exit(0)
with open(output, "wb") as file:
    file.write({mark!r})
with open({made!r}, "a") as file:
    print(os.path.abspath(output), file=file)
"""


@contextmanager
def placeholders() -> Iterator[None]:
    """Let libraries of custom operators be built and loaded as placeholders, inside the context."""
    before, load = os.environ.get("PATH", os.defpath), ctypes.cdll.LoadLibrary
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = directory / "made"
        for name in _COMPILERS:
            program = directory / name
            program.write_text(
                _COMPILER.format(
                    python=sys.executable, path=before, name=name, mark=_MARK, made=str(made)
                )
            )
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

        def load_library(name: Any) -> Any:
            return None if _is_placeholder(name) else load(name)

        os.environ["PATH"] = f"{directory}{os.pathsep}{before}"
        stack.callback(os.environ.__setitem__, "PATH", before)
        ctypes.cdll.LoadLibrary = load_library  # type: ignore[method-assign]
        stack.callback(delattr, ctypes.cdll, "LoadLibrary")
        stack.callback(_remove, made)
        yield


def _is_placeholder(name: Any) -> bool:
    try:
        with open(name, "rb") as file:
            return file.read(len(_MARK)) == _MARK
    except (OSError, TypeError):
        return False


def _remove(made: Path) -> None:
    lines = made.read_text().splitlines() if made.exists() else []
    for line in dict.fromkeys(lines):
        if _is_placeholder(line):
            Path(line).unlink()
