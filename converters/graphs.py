"""Strongly connected components."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TypeVar

V = TypeVar("V", bound=Hashable)


def components(needs: Mapping[V, Collection[V]]) -> list[list[V]]:
    """The strongly connected components of a graph, by Tarjan's algorithm (1972), not recursive."""
    index: dict[V, int] = {}
    low: dict[V, int] = {}
    stack: list[V] = []
    waiting = set[V]()
    found: list[list[V]] = []

    def enter(v: V) -> tuple[V, Iterator[V]]:
        index[v] = low[v] = len(index)
        stack.append(v)
        waiting.add(v)
        return v, iter(needs[v])

    for root in needs:
        if root in index:
            continue
        path = [enter(root)]
        while path:
            v, rest = path[-1]
            for w in rest:
                if w not in index:
                    path.append(enter(w))
                    break
                if w in waiting:
                    low[v] = min(low[v], index[w])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[v])
                if low[v] == index[v]:
                    at = len(stack) - 1
                    while stack[at] != v:
                        at -= 1
                    found.append(stack[at:])
                    waiting.difference_update(stack[at:])
                    del stack[at:]
    return found
