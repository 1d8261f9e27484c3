"""The traced forward graph: calls of torch's own functions, in order, and how they are replayed.

A graph is replayed on other tensors by making the same calls again, composite ones (``linear``,
``cross_entropy``) included, so that a replay costs what the network's own Python loop costs, and
autograd differentiates exactly the calls that were traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import Error, on_device


@dataclass(frozen=True)
class Slot:
    """A value of the graph, by its place in the environment of a replay."""

    index: int


@dataclass
class Node:
    """One call.

    Attributes:
        name: Unique, such as ``"lif1/gt:2"``.
        func: What is called.
        args: Its arguments, every tensor being a :class:`Slot`.
        kwargs: Its keyword arguments, likewise.
        outs: Slots of the tensors of its result, in the order of :func:`tensors`.
        module: Path of the module in whose forward it was called.
        grad: Whether gradients were enabled.
        ipu: The IPU of its block.
        blocks: Whether a gradient that reaches its result cannot go on to its arguments.
        random: Whether it drew random numbers.
        mutates: Slots that it wrote into.
        place: File and line of the user's code that called it.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int, ...]
    module: str
    grad: bool = True
    ipu: int = 0
    blocks: bool = False
    random: bool = False
    mutates: tuple[int, ...] = ()
    place: str = ""
    free: tuple[int, ...] = ()

    @property
    def op(self) -> str:
        """Name of the function, as ATen spells it."""
        return function_name(self.func)

    @property
    def ins(self) -> tuple[int, ...]:
        """Slots of its arguments."""
        return tuple(s.index for s in slots((self.args, self.kwargs)))

    def __str__(self) -> str:
        args = ", ".join(
            [*map(_show, self.args), *(f"{k}={_show(v)}" for k, v in self.kwargs.items())]
        )
        return f"{', '.join(f'%{o}' for o in self.outs) or '()'} = {self.name}({args})"


@dataclass
class Graph:
    """What was traced.

    Attributes:
        nodes: The calls.
        inputs: Slots of the input tensors.
        weights: Slots of parameters and buffers, by name.
        constants: Tensors by slot.
        outputs: The structure that forward returned, with slots for its tensors.
        infos: Shape and dtype of every slot, as at the trace.
        written: Slots of inputs and weights that the graph writes into.
        fresh: Constants that the graph writes into: each replay starts from a copy.
        size: Number of slots.
    """

    nodes: list[Node] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    outputs: Any = None
    infos: dict[int, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    written: frozenset[int] = frozenset()
    fresh: frozenset[int] = frozenset()
    size: int = 0

    def bytes_of(self, slot: int) -> int:
        """Size of a value on the device, where int64 is int32 and float64 is float32."""
        shape, dtype = self.infos[slot]
        return shape.numel() * device_bytes(dtype)

    def producer(self) -> dict[int, Node]:
        """The node that gives each slot its value first."""
        found: dict[int, Node] = {}
        for node in self.nodes:
            for out in node.outs:
                found.setdefault(out, node)
        return found

    def plan(self, keep: Sequence[int]) -> None:
        """Drop what no result needs and note where each value is used last.

        Args:
            keep: Slots to return besides the outputs.
        """
        wanted = {*keep, *(s.index for s in slots(self.outputs))}
        needed, live = set(wanted), []
        for node in reversed(self.nodes):
            if node.mutates or node.random or needed.intersection(node.outs):
                needed.update(node.ins)
                live.append(node)
        self.nodes = live[::-1]
        held = wanted | set(self.inputs) | set(self.weights.values()) | set(self.constants)
        seen = set(held)
        for node in reversed(self.nodes):
            node.free = tuple({*node.ins, *node.outs} - seen)
            seen.update(node.free)

    def replay(self, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> list[Any]:
        """The environment after the calls were made on these inputs and weights.

        Raises:
            Error: A call failed; which, and where.
        """
        env: list[Any] = [None] * self.size
        for index, value in self.constants.items():
            env[index] = value.clone() if index in self.fresh else value
        for index, value in zip(self.inputs, inputs, strict=True):
            env[index] = value
        for name, index in self.weights.items():
            env[index] = weights[name]
        for node in self.nodes:
            args, kwargs = fill(node.args, env), fill(node.kwargs, env) if node.kwargs else {}
            try:
                if node.grad:
                    result = node.func(*args, **kwargs)
                else:
                    with torch.no_grad():
                        result = node.func(*args, **kwargs)
            except Error:
                raise
            except (IndexError, RuntimeError, ValueError) as error:
                raise on_device(error, node.name) from error
            if isinstance(result, Tensor):
                if node.outs:
                    env[node.outs[0]] = result
            elif node.outs:
                for index, value in zip(node.outs, tensors(result), strict=True):
                    env[index] = value
            for index in node.free:
                env[index] = None
        return env

    def __str__(self) -> str:
        return "\n".join(map(str, self.nodes))


def device_bytes(dtype: torch.dtype) -> int:
    """Bytes of one element on the device."""
    size = torch.empty((), dtype=dtype).element_size()
    return 4 if dtype in (torch.int64, torch.float64) else size


def function_name(func: Callable[..., Any]) -> str:
    """``add`` for ``Tensor.add``, ``T`` for the getter of ``Tensor.T``."""
    name = str(getattr(func, "__name__", type(func).__name__))
    if name == "__get__":
        owner = getattr(func, "__self__", None)
        return str(getattr(owner, "__name__", name))
    return name


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def slots(value: Any) -> Iterator[Slot]:
    """The slots in nested tuples, lists and dictionaries."""
    if isinstance(value, Slot):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from slots(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from slots(item)


def replace(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with ``change`` applied to everything that is no container."""
    if isinstance(value, Slot):
        return change(value)
    if isinstance(value, tuple):
        items = [replace(item, change) for item in value]
        if hasattr(value, "n_fields"):  # what torch.max and its kin return
            return type(value)(items)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [replace(item, change) for item in value]
    if isinstance(value, dict):
        return {key: replace(item, change) for key, item in value.items()}
    return change(value)


def fill(value: Any, env: Sequence[Any]) -> Any:
    """The structure with every slot replaced by its value."""
    kind = type(value)
    if kind is Slot:
        return env[value.index]
    if kind is tuple:
        return tuple([fill(item, env) for item in value])
    if kind is list:
        return [fill(item, env) for item in value]
    if kind is dict:
        return {key: fill(item, env) for key, item in value.items()}
    return value


def _show(value: Any) -> str:
    if isinstance(value, Slot):
        return f"%{value.index}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_show, value)) + "]"
    return repr(value)
