"""The arguments of a compiled model: bound to ``forward``, narrowed, cut, and compared with those compiled.

Tensors are what the model computes on; anything else is a constant of the compiled model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Error
from .graph import replace, tensors
from .settings import warn

_END = (
    "\nThis error occurred because the inputs passed at runtime don't match the inputs used to "
    "compile the model.\nTo recompile the model for the new inputs create a new inferenceModel / "
    "trainingModel wrapper or call destroy() on the current one and try again."
)
_NARROW = {torch.float64: torch.float32, torch.int64: torch.int32}


@dataclass(frozen=True)
class Arguments:
    """Arguments of one call.

    Attributes:
        args: By position.
        names: Their names.
        kwargs: By name.
    """

    args: tuple[Any, ...]
    names: tuple[str, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """The tensors, in order."""
        return list(tensors((self.args, self.kwargs)))

    def map(self, change: Callable[[Tensor], Any]) -> Arguments:
        """The same with every tensor changed."""

        def each(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Arguments(replace(self.args, each), self.names, replace(self.kwargs, each))

    def check(self, given: Arguments) -> None:
        """Refuse a call whose arguments are not those that were compiled.

        Raises:
            Error: Another number, type, shape, dtype or constant.
        """
        if len(given.args) != len(self.args):
            raise Error(
                f"Number of positional arguments mismatch: expected {len(self.args)} arguments but "
                f"got {len(given.args)}.{_END}"
            )
        for name, compiled, value in zip(self.names, self.args, given.args, strict=True):
            _check(name, compiled, value)
        _check("named arguments", self.kwargs, given.kwargs, named=True)


def _check(name: str, compiled: Any, given: Any, named: bool = False) -> None:
    kind, other = type(compiled), type(given)
    if isinstance(compiled, Tensor) and isinstance(given, Tensor):
        kind = other = Tensor
    if kind is not other:
        raise Error(f"Type mismatch for {name}: expected {kind} but got {other}.{_END}")
    if isinstance(compiled, Tensor):
        if compiled.dtype != given.dtype:
            raise Error(
                f"Data type mismatch for {name}: expected {compiled.dtype} but got {given.dtype}.{_END}"
            )
        if compiled.shape != given.shape:
            raise Error(
                f"Shape mismatch for {name}: expected {compiled.shape} but got {given.shape}.{_END}"
            )
    elif isinstance(compiled, (tuple, list)):
        if len(compiled) != len(given):
            raise Error(
                f"Length mismatch for {name}: expected {len(compiled)} elements but got "
                f"{len(given)}.{_END}"
            )
        for place, (a, b) in enumerate(zip(compiled, given, strict=True)):
            _check(f"{name}[{place}]", a, b)
    elif isinstance(compiled, dict):
        _check_keys(name, compiled, given)
        for key, value in compiled.items():
            _check(key if named else f"{name}[{key}]", value, given[key])
    elif compiled != given:
        raise Error(f"Value mismatch for {name}: expected {compiled} but got {given}.{_END}")


def _check_keys(name: str, compiled: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    extra, missing = set(given) - set(compiled), set(compiled) - set(given)
    details = []
    if extra:
        details.append("Unexpected arguments: " + ", ".join(sorted(extra)))
    if missing:
        details.append("Missing arguments: " + ", ".join(sorted(missing)))
    if details:
        raise Error(f"Keys mismatch for {name}: {'. '.join(details)}.{_END}")


class Parser:
    """Binds arguments to a forward.

    Args:
        forward: The forward, or any function.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._parameters = list(inspect.signature(forward).parameters.values())
        kinds = {p.kind for p in self._parameters}
        self._open = bool(kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments of a call, defaults filled in.

        Raises:
            AssertionError: Too many arguments, or one that is not known or given twice.
            Error: One is missing.
        """
        known = [p.name for p in self._parameters]
        assert self._open or len(args) + len(kwargs) <= len(known), (
            f"Too many arguments provided: expected {known} ({len(known)}) but got "
            f"{len(args) + len(kwargs)}"
        )
        for name in kwargs:
            assert self._open or name in known, (
                f"{name} is not a valid parameter. Allowed values are {known}"
            )
        values, names, by_name = list[Any](), list[str](), dict[str, Any]()
        positional = True
        for place, parameter in enumerate(self._parameters):
            name = parameter.name
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                by_name |= {k: v for k, v in kwargs.items() if k not in known}
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                values += args[place:]
                names += [f"*{name}[{i}]" for i in range(len(args) - place)]
                positional = False
            elif positional and place < len(args):
                assert name not in kwargs, f"Parameter {name} was passed more than once"
                values.append(args[place])
                names.append(name)
            elif name not in kwargs and parameter.default is inspect.Parameter.empty:
                raise Error(f"Mandatory parameter {name} missing")
            elif positional and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                values.append(kwargs.get(name, parameter.default))
                names.append(name)
            else:
                by_name[name] = kwargs.get(name, parameter.default)
        return Arguments(tuple(values), tuple(names), by_name)


def forward_of(model: nn.Module | Callable[..., Any]) -> Callable[..., Any]:
    """The function that a call of the model runs."""
    return model.forward if isinstance(model, nn.Module) else model


def narrow(value: Tensor) -> Tensor:
    """A tensor as the device takes it: float64 as float32; int64 within the range of int32."""
    if value.dtype == torch.float64:
        return value.float()
    if value.dtype == torch.int64 and value.numel():
        wrapped = value.int().long()
        if not torch.equal(wrapped, value):
            warn(
                "an int64 input has values outside of int32, which is all that the device has: they "
                "wrap around"
            )
            return wrapped
    return value


def returned(value: Tensor) -> Tensor:
    """A tensor as the device returns it: int64 as int32, float64 as float32."""
    return value.to(_NARROW.get(value.dtype, value.dtype))


def micro_batch(value: Tensor, iterations: int, accumulation: int, replicas: int) -> int:
    """Size of one micro-batch in a combined batch.

    Raises:
        AssertionError: The combined batch cannot be cut so.
    """
    combined = value.shape[0] if value.dim() else 1
    steps = iterations * accumulation * replicas
    assert combined % steps == 0, (
        f"Invalid batch dimension: In the input {value.shape}, the batch dimension ({combined}) must "
        f"be a multiple of Options.deviceIterations({iterations}) * "
        f"Options.replicationFactor({replicas}) * "
        f"Options.Training.gradientAccumulation({accumulation}) = {steps} because it is used to "
        "calculate the batch size which will be executed on the device in any given iteration. For "
        "a full explanation see the batching semantics page of the documentation."
    )
    return combined // steps
