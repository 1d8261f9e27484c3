"""What the simulated chip is like: rounding, SDK version, number of devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

Precision = Literal["float16", "float32"]

_PREFIX = "SPIKEPORT_LYNXI_SIM_"


class SimulatorWarning(UserWarning):
    """Something that the real SDK does without a word and that changes what is computed."""


@dataclass(frozen=True)
class Options:
    """How the simulated compiler and chip behave.

    Attributes:
        storage: What every result, weight, constant and input is rounded to. With ``"float32"``, which
            is no chip's, convolutions and batch norms are torch's own, bit for bit.
        accumulate: What the partial sums of convolution, dense, matmul, sum, mean and average
            pooling are rounded to. ``"float16"`` rounds each product and each sum, in the order
            of the reduction (and is slow).
        strict: Whether what the SDK drops silently (in-place writes) is an error.
        version: The simulated SDK version: what ``lyngor.version`` says, and the rank rule
            (nothing above rank 4; from 1.17 on rank 5 in reshape, stack, index, cat, mean).
        devices: Number of chips on the simulated machine. An HP300 card has 3.
        optimise: Whether the fast engine runs; ``False`` runs the plain one, node by node.
            The bits are the same.
    """

    storage: Precision = "float16"
    accumulate: Precision = "float32"
    strict: bool = False
    version: str = "1.1.0"
    devices: int = 3
    optimise: bool = True

    def __post_init__(self) -> None:
        for name in ("storage", "accumulate"):
            if getattr(self, name) not in get_args(Precision):
                raise ValueError(
                    f"Options.{name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(map(repr, get_args(Precision)))}"
                )
        if not all(part.isdigit() for part in self.version.split(".")):
            raise ValueError(f"Options.version is {self.version!r}; it must be like '1.17.0'")
        if self.devices < 1:
            raise ValueError(f"Options.devices is {self.devices}; it must be at least 1")

    @property
    def version_tuple(self) -> tuple[int, ...]:
        """The version as numbers, for comparisons."""
        return tuple(map(int, self.version.split(".")))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for JSON."""
        return asdict(self)


_override: ContextVar[dict[str, Any] | None] = ContextVar("lynxi_simulator_options", default=None)


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(Options):
        text = os.environ.get(_PREFIX + field.name.upper())
        if text is None:
            continue
        if isinstance(field.default, bool):
            if text.lower() not in ("0", "1", "true", "false"):
                raise ValueError(f"{_PREFIX}{field.name.upper()}={text!r}; it must be 0 or 1")
            found[field.name] = text.lower() in ("1", "true")
        elif isinstance(field.default, int):
            if not text.isdigit():
                raise ValueError(f"{_PREFIX}{field.name.upper()}={text!r}; it must be a number")
            found[field.name] = int(text)
        else:
            found[field.name] = text
    return found


def current() -> Options:
    """The options in force: :func:`options`, else ``SPIKEPORT_LYNXI_SIM_*``, else the defaults."""
    return Options(**{**_from_environment(), **(_override.get() or {})})


@contextmanager
def options(base: Options | None = None, **changes: Any) -> Iterator[Options]:
    """Put other options in force, for this thread and as long as the context is open.

    Args:
        base: Options to start from, instead of those in force.
        **changes: Fields of :class:`Options` to change.
    """
    chosen = replace(current() if base is None else base, **changes)
    token = _override.set(chosen.to_dict())
    try:
        yield chosen
    finally:
        _override.reset(token)
