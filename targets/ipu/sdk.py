"""The SDK, or its simulation, imported when it is asked for, and its errors as ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ...converters.errors import (
    Finding,
    SpikeportError,
    TargetError,
    TargetUnavailableError,
    UnsupportedError,
)


def load(simulated: bool) -> Any:
    """``poptorch``, or the simulated one.

    Raises:
        TargetUnavailableError: It is not on this machine; says how to get it.
    """
    if simulated:
        return import_module(".simulator.poptorch", __package__)
    try:
        return import_module("poptorch")
    except ImportError as error:
        raise TargetUnavailableError(
            f"poptorch cannot be imported ({error}): the Poplar SDK is not on this machine. It is on no "
            "package index: Graphcore's Poplar SDK archive holds a wheel of poptorch, which needs the "
            "SDK's enable script to be sourced (poptorch 3.4 is for torch 2.0.1, on Ubuntu 22.04 for "
            "Python 3.10). The target ipu-sim (simulator=True) runs the same on a simulation."
        ) from error


def is_simulated(sdk: Any) -> bool:
    """Whether it is the simulated one."""
    return str(sdk.__name__).startswith(str(__package__))


def version(sdk: Any) -> str:
    """Its version."""
    return str(getattr(sdk, "__version__", "of an unknown version"))


@contextmanager
def errors(sdk: Any, kind: type[TargetError], what: str) -> Iterator[None]:
    """Raise what the SDK raises as a target's error that quotes it.

    Raises:
        UnsupportedError: The simulated compiler refused the network; with all of its findings.
    """
    try:
        yield
    except SpikeportError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        headline = f"poptorch {version(sdk)} {what}:"
        if found := _findings(error):
            raise UnsupportedError(headline, found) from error
        raise kind(f"{headline} {error}") from error


def _findings(error: Exception) -> list[Finding]:
    """What the simulated compiler says; the SDK's says one thing in one text."""
    return [
        Finding(
            rule=problem.rule.name,
            where=re.sub(r"^net(\.|$)", "", problem.module),  # TrainingModule.net
            found=" ".join(problem.text.splitlines()),
            allowed=problem.rule.allowed,
            fix=problem.rule.fix,
        )
        for problem in getattr(error, "problems", ())
    ]
