"""Operators that move values, as slices, concatenations and selections by index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from . import ops
from .builder import Builder
from .ops import Node, aten, shape

#: Runs of an index that are taken out as slices; more than these as a selection.
_MOST_RUNS = 8
#: Sums to one place that are written one after the other, where there is an operator for all of them.
_MOST_TURNS = 64


def moved(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node | None:
    """What an operator gives in those terms; None if it is another, or its index is not known.

    Args:
        build: Where it is emitted.
        n: The operator; its ``meta["val"]`` tells the shape.
        args: Its arguments in the new graph.
        path: Of its module.
    """
    rule = _RULES.get(n.target)
    return None if rule is None else rule(build, n, args, path)


def known(build: Builder, n: Node) -> torch.Tensor | None:
    """The value of what follows from constants alone, which are folded once the graph is there."""
    if n.op == "get_attr":
        return build.tensors[str(n.target)]
    if getattr(n.target, "namespace", "") != "aten" or not n.all_input_nodes:
        return None
    values: dict[Node, torch.Tensor] = {}
    for a in n.all_input_nodes:
        if (value := known(build, a)) is None:
            return None
        values[a] = value
    args, kwargs = fx.map_arg((n.args, n.kwargs), values.__getitem__)
    with torch.no_grad():
        made: Any = n.target(*args, **kwargs)
    return made if isinstance(made, torch.Tensor) else None


def pieces(build: Builder, x: Node, dim: int, start: int, end: int, path: str) -> list[Node]:
    """What to put together for x[start:end] along a dimension: parts of x, where it was put together."""
    if start >= end:
        return []
    if start == 0 and end == shape(x)[dim] and x.target is not aten.cat.default:
        return [x]
    if x.target is aten.slice.Tensor:
        at, first, _, step = ops.slice_args(x, 1)
        if ops.dim(x, at) == dim and step == 1 and (first or 0) >= 0:
            begin = first or 0
            return pieces(build, x.args[0], dim, start + begin, end + begin, path)
    if x.target is aten.cat.default and ops.dim(x, (*x.args, 0)[1]) == dim:
        found, before = [], 0
        for part in x.args[0]:
            size = shape(part)[dim]
            inside = max(start - before, 0), min(end - before, size)
            found += pieces(build, part, dim, *inside, path)
            before += size
        return found
    return [build.call(aten.slice.Tensor, x, dim, start, end, path=path)]


def _taken(build: Builder, x: Node, dim: int, index: Sequence[int], path: str) -> Node:
    """The entries of x along a dimension, in the order of the index."""
    if list(index) == list(range(shape(x)[dim])):
        return x
    runs: list[list[int]] = []
    for i in index:
        if runs and runs[-1][1] == i:
            runs[-1][1] += 1
        else:
            runs.append([i, i + 1])
    if not 0 < len(runs) <= _MOST_RUNS:
        constant = build.constant("moved_index", torch.tensor(list(index), dtype=torch.int64))
        return build.call(aten.index_select.default, x, dim, constant, path=path)
    parts = [build.call(aten.slice.Tensor, x, dim, *run, path=path) for run in runs]
    return parts[0] if len(parts) == 1 else build.call(aten.cat.default, parts, dim, path=path)


def _roll(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node:
    x, shifts, *dims = args
    whole = shape(x)
    if not dims or not dims[0]:
        x, dims = build.call(ops.RESHAPE, x, [-1], path=path), [[0]]
    for shift, d in zip(shifts, dims[0], strict=True):
        at = ops.dim(x, d)
        size = shape(x)[at]
        x = _taken(build, x, at, [(i - shift) % size for i in range(size)], path)
    return x if shape(x) == whole else build.call(ops.RESHAPE, x, list(whole), path=path)


def _flip(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node:
    x, dims = args
    for d in dims:
        at = ops.dim(x, d)
        x = _taken(build, x, at, range(shape(x)[at])[::-1], path)
    return x


def _padded(place: Callable[[int, int], int]) -> Callable[..., Node]:
    """Padding by the values at other places."""

    def pad(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node:
        x, amounts = args
        for i in range(len(amounts) // 2):
            at = len(shape(x)) - 1 - i
            size, (before, after) = shape(x)[at], amounts[2 * i : 2 * i + 2]
            x = _taken(build, x, at, [place(j, size) for j in range(-before, size + after)], path)
        return x

    return pad


def _index(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node | None:
    x, indices = args
    given = [(d, index) for d, index in enumerate(indices) if index is not None]
    if len(given) != 1 or (places := known(build, given[0][1])) is None:
        return None
    at = given[0][0]
    if places.dtype == torch.bool:
        return None
    rows = [i % shape(x)[at] for i in places.flatten().tolist()]
    x = _taken(build, x, at, rows, path)
    if places.dim() == 1:
        return x
    sizes = (*shape(x)[:at], *places.shape, *shape(x)[at + 1 :])
    return build.call(ops.RESHAPE, x, list(sizes), path=path)


def _index_select(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node | None:
    x, at, index = args
    if (places := known(build, index)) is None:
        return None
    return _taken(build, x, ops.dim(x, at), places.flatten().tolist(), path)


def _embedding(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node:
    weight, index = args[:2]
    flat = build.call(ops.RESHAPE, index, [-1], path=path)
    rows = build.call(aten.index_select.default, weight, 0, flat, path=path)
    return build.call(ops.RESHAPE, rows, [*shape(index), shape(weight)[1]], path=path)


def _windows(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node:
    """Windows that slide along a dimension, each of which becomes the last dimension."""
    x, dim, size, step = args
    at, rank = ops.dim(x, dim), len(shape(x))
    count = shape(n)[at]
    x = _taken(build, x, at, [i * step + k for i in range(count) for k in range(size)], path)
    apart = [*shape(x)[:at], count, size, *shape(x)[at + 1 :]]
    x = build.call(ops.RESHAPE, x, apart, path=path)
    if at == rank - 1:
        return x
    order = [*(d for d in range(rank + 1) if d != at + 1), at + 1]
    return build.call(aten.permute.default, x, order, path=path)


def _diagonal(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node:
    """Every W + 1st of the values of a matrix [H, W] as a row, from where the diagonal begins."""
    given = [*args, *(0, 0, 1)[len(args) - 1 :]]
    x, offset, first, second = given
    rank = len(shape(x))
    first, second = ops.dim(x, first), ops.dim(x, second)
    rest = [d for d in range(rank) if d not in (first, second)]
    if (order := [*rest, first, second]) != [*range(rank)]:
        x = build.call(aten.permute.default, x, order, path=path)
    H, W = shape(x)[-2:]
    x = build.call(ops.RESHAPE, x, [*shape(x)[:-2], H * W], path=path)
    start = offset if offset >= 0 else -offset * W
    index = [start + i * (W + 1) for i in range(shape(n)[-1])]
    return _taken(build, x, rank - 2, index, path)


_Write = Callable[[Builder, fx.Node, Node, int, list[int], Any, str], Node]


def _numbered(write: _Write) -> Callable[..., Node | None]:
    """What writes to the places of a constant index along a dimension."""

    def rule(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node | None:
        x, dim, index, new = args
        if (places := known(build, index)) is None:
            return None
        dim = ops.dim(x, dim)
        rows = [int(i) % shape(x)[dim] for i in places.flatten()]
        return write(build, n, x, dim, rows, new, path)

    return rule


def _index_put(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node | None:
    """Writes of one value where a mask is true, and of rows to the places of a constant index."""
    x, indices, new, *rest = args
    given = [(d, index) for d, index in enumerate(indices) if index is not None]
    accumulates = bool(rest and rest[0])
    if len(given) != 1 or n.meta["val"].dtype == torch.bool:
        return None
    at, index = given[0]
    if index.meta["val"].dtype == torch.bool:
        return _masked(build, x, at, index, new, accumulates, path)
    if (places := known(build, index)) is None:
        return None
    size = shape(x)
    rows = [int(i) % size[at] for i in places.flatten()]
    if accumulates and _turns(rows) > _MOST_TURNS:
        return None
    whole = [*size[:at], *places.shape, *size[at + 1 :]]
    if list(shape(new)) != whole:
        new = build.call(aten.expand.default, new, whole, path=path)
    new = build.reshaped(new, [*size[:at], len(rows), *size[at + 1 :]], path)
    return (_add_rows if accumulates else _copy_rows)(build, n, x, at, rows, new, path)


def _masked(
    build: Builder, x: Node, at: int, mask: Node, new: Node, accumulates: bool, path: str
) -> Node | None:
    if new.meta["val"].numel() != 1:
        return None
    behind = len(shape(x)) - at - len(shape(mask))
    mask = build.reshaped(mask, [*shape(mask), *[1] * behind], path)
    value: Any = known(build, new)
    other: Any = build.call(aten.add.Tensor, x, new, path=path) if accumulates else value
    if isinstance(other, torch.Tensor):
        chosen: Node = build.call(aten.where.ScalarSelf, mask, other.item(), x, path=path)
        return chosen
    other = build.reshaped(new, [], path) if other is None else other
    return build.call(aten.where.self, mask, other, x, path=path)


def _scatter_add(build: Builder, n: fx.Node, args: Sequence[Any], path: str) -> Node | None:
    """Sums to the places of a constant index that is the same for all rows, as one of places alone."""
    x, dim, index, source = args
    dim = ops.dim(x, dim)
    if (places := known(build, index)) is None or places.shape != source.meta["val"].shape:
        return None
    others = [d for d in range(places.dim()) if d != dim]
    first = places
    for d in others:
        first = first.narrow(d, 0, 1)
    whole = all(places.shape[d] == shape(x)[d] for d in others)
    if not whole or not torch.equal(first.expand_as(places), places):
        return None
    rows = [int(i) for i in first.flatten()]
    if _turns(rows) > _MOST_TURNS:
        return None
    return _add_rows(build, n, x, dim, rows, source, path)


def _turns(rows: Sequence[int]) -> int:
    """How many sums there are to a place at most."""
    return max(Counter(rows).values(), default=0)


def _copy_rows(
    build: Builder, n: fx.Node, x: Node, dim: int, places: list[int], source: Any, path: str
) -> Node:
    size = shape(x)[dim]
    rows = {place: size + j for j, place in enumerate(places)}
    both = build.call(aten.cat.default, [x, source], dim, path=path)
    return _taken(build, both, dim, [rows.get(i, i) for i in range(size)], path)


def _add_rows(
    build: Builder, n: fx.Node, x: Node, dim: int, places: list[int], source: Any, path: str
) -> Node:
    """One sum for each time that a place comes in the index, in whose order torch adds too."""
    if (alpha := n.kwargs.get("alpha", 1)) != 1:
        source = build.call(aten.mul.Tensor, source, alpha, path=path)
    size = [*shape(x)[:dim], 1, *shape(x)[dim + 1 :]]
    nothing = torch.zeros(size, dtype=x.meta["val"].dtype)
    zeros = build.constant("moved_zeros", nothing)
    both = build.call(aten.cat.default, [source, zeros], dim, path=path)
    turns: list[dict[int, int]] = []
    for j, place in enumerate(places):
        turn = sum(place in rows for rows in turns)
        if turn == len(turns):
            turns.append({})
        turns[turn][place] = j
    for rows in turns:
        taken = [rows.get(i, len(places)) for i in range(shape(x)[dim])]
        x = build.call(aten.add.Tensor, x, _taken(build, both, dim, taken, path), path=path)
    return x


def _fill_rows(
    build: Builder, n: fx.Node, x: Node, dim: int, places: list[int], value: Any, path: str
) -> Node:
    chosen = torch.zeros(shape(x)[dim], dtype=torch.bool)
    chosen[places] = True
    mask = chosen.reshape(-1, *[1] * (len(shape(x)) - dim - 1))
    where = build.constant("moved_mask", mask)
    made: Node = build.call(aten.where.ScalarSelf, where, value, x, path=path)
    return made


_circular = _padded(lambda i, size: i % size)
_reflected = _padded(lambda i, size: size - 1 - abs(size - 1 - abs(i)))
_replicated = _padded(lambda i, size: min(max(i, 0), size - 1))

_RULES: dict[Any, Callable[..., Node | None]] = {
    aten.roll.default: _roll,
    aten.flip.default: _flip,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.index_add.default: _numbered(_add_rows),
    aten.index_copy.default: _numbered(_copy_rows),
    aten.index_fill.int_Scalar: _numbered(_fill_rows),
    aten.index_put.default: _index_put,
    aten.scatter_add.default: _scatter_add,
    aten.diagonal.default: _diagonal,
    aten.embedding.default: _embedding,
    aten.unfold.default: _windows,
    aten._pad_circular.default: _circular,
    **{getattr(aten, f"reflection_pad{d}d").default: _reflected for d in (1, 2, 3)},
    **{getattr(aten, f"replication_pad{d}d").default: _replicated for d in (1, 2, 3)},
}
