"""An estimate of what a model takes of an IPU's memory.

Counted: weights, accumulated gradients, the optimizer's state, and what the traced forward keeps for
the backward pass (all time steps of an unrolled network; for each stage of a pipeline, as many
micro-batches as are under way). In inference instead, the largest sum of values alive at a time.
Not counted: code, exchange buffers, temporaries of an operation, padding. A GC200 has 1472 tiles of
624 KiB, 897 MiB in all; the default limit of 624 MB leaves what is not counted the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .graph import Graph
from .problems import MEMORY, Problem, RefusedError
from .settings import current
from .trace import Traced

_MEGA = 10**6


@dataclass
class Estimate:
    """Bytes on one IPU, by kind; activations also by module."""

    kinds: dict[str, int] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.kinds.values())

    def add(self, kind: str, size: int, module: str = "") -> None:
        """Count bytes of a kind."""
        self.kinds[kind] = self.kinds.get(kind, 0) + size
        if kind == "activations":
            self.modules[module] = self.modules.get(module, 0) + size

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {size / _MEGA:.1f} MB" for kind, size in self.kinds.items())
        return f"{self.total / _MEGA:.1f} MB ({kinds})"


def estimate(
    traced: Traced,
    state: Mapping[str, int],
    training: bool,
    accumulation: int,
    pipelined: bool,
    off_chip: frozenset[str] = frozenset(),
) -> dict[int, Estimate]:
    """The estimate of each IPU of one replica.

    Args:
        traced: The model.
        state: Bytes of optimizer state of each trained weight.
        training: Whether it is trained.
        accumulation: Micro-batches that give one update.
        pipelined: Whether its stages overlap.
        off_chip: Kinds that lie in streaming memory: ``"weights"``, ``"activations"``,
            ``"optimizer state"``, ``"gradients"``.
    """
    graph = traced.graph
    home: dict[int, int] = {}
    for node in graph.nodes:
        for slot in node.ins:
            home.setdefault(slot, node.ipu)
    made: dict[int, Estimate] = {ipu: Estimate() for ipu in {0, *traced.stages.values()}}

    def count(ipu: int, kind: str, size: int, module: str = "") -> None:
        if kind not in off_chip and size:
            made.setdefault(ipu, Estimate()).add(kind, size, module)

    for name, slot in graph.weights.items():
        ipu = home.get(slot, 0)
        count(ipu, "weights", graph.bytes_of(slot))
        if name in state:
            count(ipu, "optimizer state", state[name])
            if accumulation > 1:
                count(ipu, "gradients", graph.bytes_of(slot))
    if training:
        order = sorted(traced.stages.items())
        under_way = {ipu: 2 * (len(order) - 1 - place) + 1 for place, (_, ipu) in enumerate(order)}
        for (ipu, module), size in traced.saved.items():
            count(ipu, "activations", size * (under_way.get(ipu, 1) if pipelined else 1), module)
    else:
        for ipu, (size, module) in _alive(graph).items():
            count(ipu, "activations", size, module)
    return made


def _alive(graph: Graph) -> dict[int, tuple[int, str]]:
    """The most bytes alive at a time on each IPU, and the module in which that is."""
    alive: dict[int, int] = {}
    peak: dict[int, tuple[int, str]] = {}
    place: dict[int, int] = {}
    for node in graph.nodes:
        for out in node.outs:
            if out not in place:
                place[out] = node.ipu
                alive[node.ipu] = alive.get(node.ipu, 0) + graph.bytes_of(out)
        if alive.get(node.ipu, 0) > peak.get(node.ipu, (0, ""))[0]:
            peak[node.ipu] = (alive[node.ipu], node.module)
        for slot in node.free:
            if slot in place:
                alive[place[slot]] -= graph.bytes_of(slot)
    return peak


def check(estimates: Mapping[int, Estimate]) -> None:
    """Refuse a model that is too large.

    Raises:
        RefusedError: An IPU's estimate is above the limit.
    """
    limit = current().memory_mb
    over = {ipu: e for ipu, e in estimates.items() if e.total > limit * _MEGA}
    if not over:
        return
    lines = ["Out of memory: Cannot fit all variable data onto one or more tiles."]
    for ipu, found in over.items():
        largest = sorted(found.modules.items(), key=lambda item: -item[1])[:5]
        most = ", ".join(f"{name or 'forward'} {size / _MEGA:.1f} MB" for name, size in largest)
        lines.append(f"IPU {ipu}: estimated {found}, and an IPU takes {limit} MB; most: {most}")
    raise RefusedError([Problem(MEMORY, "\n".join(lines))])
