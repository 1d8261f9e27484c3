"""Where networks come from: one file a framework, each reading that framework's neurons.

A source recognises a neuron by its exact class and reads it by attribute, so that the framework
itself is not needed here. Whatever only resembles a known neuron is reported, never guessed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import Finding, UsageError
from ..neurons import Alpha
from ..neurons.neuron import ParameterError
from ..surrogates import Surrogate
from .base import Cell, Fires, Learning, Memory, Read, Reading, Source
from .native import Native
from .snntorch import SnnTorch, isolated
from .spikingjelly import SpikingJelly

__all__ = [
    "SOURCES",
    "Cell",
    "Fires",
    "Learning",
    "Memory",
    "Reading",
    "Source",
    "copied",
    "framework",
    "isolated",
    "learning",
    "read_all",
    "register",
    "reset",
]

_NATIVE = Native()
SOURCES: tuple[Source, ...] = (_NATIVE, SpikingJelly(), SnnTorch())


def register(kind: type[nn.Module], read: Callable[[nn.Module], Reading]) -> None:
    """Make a user's neuron class known: ``read(module)`` says what it computes."""
    _NATIVE.readers[kind] = read


def read_all(net: nn.Module) -> Iterator[tuple[str, nn.Module, Read]]:
    """Every module of the network that a source has something to say about."""
    for path, module in net.named_modules():
        for source in SOURCES:
            if (reading := _read(source, module, path)) is not None:
                part = reading.part if isinstance(reading, Reading) else ""
                if part:
                    path, module = f"{path}.{part}" if path else part, module.get_submodule(part)
                yield path, module, _altered(module, path) or reading
                break


def _read(source: Source, module: nn.Module, path: str) -> Read | None:
    """What a source has to say, where values that no neuron can have are findings too."""
    try:
        reading = source.read(module, path)
    except UsageError as error:
        found, _, allowed = str(error).partition("; allowed: ")
        cause = (error.name, error.value) if isinstance(error, ParameterError) else None
        fix = _SILENT if cause == ("v_threshold", math.inf) else _LOOK
        return [_parameter(module, path, found, allowed or "what its declaration takes", fix)]
    if not isinstance(reading, Reading) or reading.neuron.dynamics is Alpha:
        return reading  # Alpha's tau is a factor
    times = {n: v for n, v in reading.neuron.params.items() if n == "tau" or n.startswith("tau_")}
    wrong = {n: t.min().item() for n, v in times.items() if ((t := torch.as_tensor(v)) <= 0).any()}
    return [
        _parameter(module, path, f"{name} is {value:g}", "time constants above 0")
        for name, value in wrong.items()
    ] or reading


_LOOK = "look at what set it: the network's code, or a training run that diverged"
_SILENT = (
    "take a threshold that it does not reach, such as 1e9, for neurons that never fire; for float16 with a "
    "hard reset (v_reset=0.0), since a soft one takes the threshold off the potential"
)


def _parameter(module: nn.Module, path: str, found: str, allowed: str, fix: str = _LOOK) -> Finding:
    return Finding(
        rule="parameter",
        where=path,
        found=f"{found} in this {type(module).__name__}",
        allowed=allowed,
        fix=fix,
    )


def learning(
    module: nn.Module, path: str, surrogate: Surrogate | None = None
) -> Learning | list[Finding]:
    """How a neuron that :func:`read_all` gives learns, or what stops it.

    ``surrogate`` takes the place of the module's own.
    """
    source = next(s for s in SOURCES if s.read(module, path) is not None)
    return source.learning(module, path, surrogate)


def _altered(module: nn.Module, path: str) -> list[Finding]:
    """What was attached to one neuron, and would be lost with the module that it is attached to."""
    methods = [
        n for n, value in vars(module).items() if callable(value) and hasattr(type(module), n)
    ]
    hooks = [n for n in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, n)]
    return [
        Finding(
            rule="altered-neuron",
            where=path,
            found=f"this {type(module).__name__} has its own {', '.join(methods + hooks)}",
            allowed="a neuron that computes what its class declares",
            fix="remove the hook or the replaced method, or declare the dynamics that you mean",
        )
    ] * bool(methods or hooks)


def reset(net: nn.Module) -> None:
    """Put every state of a network back to its value before the first step."""
    for module in net.modules():
        for source in SOURCES:
            source.reset(module)


def copied(net: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy, in which no module's tensor has a history; torch copies none that has one.

    ``memo`` says by ``id`` what takes the place of an object, as in ``copy.deepcopy``.
    """
    states = {
        id(value): value.detach().clone()
        for module in net.modules()
        for value in (*vars(module).values(), *module._buffers.values())
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    return copy.deepcopy(net, {**states, **(memo or {})})


def not_copied(error: Exception) -> Finding:
    """Why :func:`copied` failed."""
    return Finding(
        rule="copy",
        where="",
        found=f"the network cannot be copied ({error})",
        allowed="a network of what copy.deepcopy copies, which no container with tensors of an earlier "
        "training step is",
        fix="take that out of the network, or reset it first (SpikingJelly: functional.reset_net(net), "
        "snnTorch: utils.reset(net))",
    )


def framework(net: nn.Module) -> str:
    """Name of the framework whose modules the network uses."""
    used = {type(m).__module__.split(".")[0] for m in net.modules()}
    names = [source.name for source in SOURCES if source.name in used - {_NATIVE.name}]
    return ", ".join(names) or _NATIVE.name
