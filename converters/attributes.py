"""What modules hold besides their weights, as it is now: to tell what a call has changed."""

from __future__ import annotations

import argparse
import copy
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

#: A value as it was, by the way from it to each of its parts: ``['l1'].mem``, or nothing for itself.
Parts: TypeAlias = "dict[str, Any]"
#: Those of all attributes and buffers, by the module's path and their names.
Snapshot: TypeAlias = "dict[str, dict[str, Parts]]"

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type, Enum),
    *(torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType),
)
#: Of the standard library's objects, which have lives of their own (a logger's cache, a lock), those
#: that only hold what they are given.
_HOLDERS = (types.SimpleNamespace, argparse.Namespace)
_OPAQUE = {*sys.stdlib_module_names, "torch", "numpy"}
#: Parts of one value that are looked at.
_MOST = 4096


def modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, the :func:`hidden` ones too."""
    yield from net.named_modules()
    for path, module, _ in hidden(net):
        yield from module.named_modules(prefix=path)


def hidden(net: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Modules that torch does not know of, and whether a container holds them, or a plain object."""
    registered = {id(m) for m in net.modules()}
    for path, module in net.named_modules():
        for name, value in held(module):
            for way, part in walk(value):
                if isinstance(part, nn.Module) and id(part) not in registered:
                    contained = isinstance(value, (list, tuple, set, frozenset, dict))
                    yield (f"{path}.{name}" if path else name) + way, part, contained


def snapshot(net: nn.Module) -> Snapshot:
    """Every module's attributes and buffers, as they are now."""
    return {
        path: {name: _parts(value) for name, value in held(module)} for path, module in modules(net)
    }


def changes(before: Snapshot, after: Snapshot) -> dict[str, set[str]]:
    """Names of the attributes that are others than before, by the module's path."""
    found = {}
    for path, values in after.items():
        earlier = before.get(path, {})
        names = {n for n, v in values.items() if n not in earlier or differing(earlier[n], v)}
        if names:
            found[path] = names
    return found


def differing(a: Parts | None, b: Parts | None) -> list[str]:
    """The ways to what differs between a value then and now."""
    a, b = a or {}, b or {}
    return [w for w in {**a, **b} if w not in a or w not in b or not _unchanged(a[w], b[w])]


def replaced(value: Any, by: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A deep copy with other tensors, which holds the same modules."""
    parts = [part for _, part in walk(value)]
    tensors = {id(part): by(part) for part in parts if isinstance(part, torch.Tensor)}
    same = {id(part): part for part in parts if isinstance(part, nn.Module)}
    return copy.deepcopy(value, {**tensors, **same})


def held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its attributes and buffers, by name, without what torch keeps."""
    for name, value in (*vars(module).items(), *module._buffers.items()):
        if name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
            yield name, value


def _parts(value: Any) -> Parts:
    return {way: _kept(part) for way, part in walk(value)}


def _kept(part: Any) -> Any:
    """A part, to be compared with later: of what holds others, or cannot be seen into, its class."""
    if isinstance(part, torch.Tensor):
        return part.detach().clone()
    return part if isinstance(part, _PLAIN) else type(part)


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """A value and all that it holds, with the way to each; what holds itself is not entered again."""
    todo, entered, count = [("", value)], set[int](), 0
    while todo and count < _MOST:
        way, part = todo.pop()
        count += 1
        yield way, part
        if not isinstance(part, (torch.Tensor, nn.Module, *_PLAIN)) and id(part) not in entered:
            entered.add(id(part))
            todo += [(way + step, item) for step, item in _inside(part)]


def _inside(part: Any) -> Iterator[tuple[str, Any]]:
    """What a container or a plain object holds."""
    if isinstance(part, dict):
        # How other keys are written differs from one copy of the network to the next.
        for i, (key, item) in enumerate(part.items()):
            yield f"[{key!r}]" if isinstance(key, _PLAIN) else f"[{i}]", item
    elif isinstance(part, (list, tuple, deque)):
        yield from ((f"[{i}]", item) for i, item in enumerate(part))
    elif isinstance(part, (set, frozenset)):
        yield from ((f"[{i}]", item) for i, item in enumerate(sorted(part, key=repr)))
    kind = type(part)
    if kind.__module__.partition(".")[0] not in _OPAQUE or isinstance(part, _HOLDERS):
        slots = [s for k in kind.__mro__ for s in getattr(k, "__slots__", ())]
        named = {s: getattr(part, s) for s in slots if hasattr(part, s)}
        named |= getattr(part, "__dict__", {})
        yield from ((f".{name}", item) for name, item in named.items())


def _unchanged(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and _same(a, b)
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def equal(a: Any, b: Any) -> bool:
    """Whether nested values are equal, tensors in every element, where NaN equals NaN."""
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(
        _same(x, y) if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor) else bool(x == y)
        for x, y in zip(left, right, strict=True)
    )


def _same(x: Any, y: Any) -> bool:
    """Two tensors, equal in every element, where NaN equals NaN."""
    return (
        isinstance(x, torch.Tensor)
        and isinstance(y, torch.Tensor)
        and x.shape == y.shape
        and (torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all()))
    )
