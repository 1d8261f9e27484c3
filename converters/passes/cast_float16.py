"""Store and compute everything in float16.

Weights and constants are rounded to the nearest float16; what overflows (above 65504) is refused with
its layer, what is flushed to zero is counted.

A threshold is rounded towards the side where nothing changes: for every float16 number h,
``h >= c`` holds exactly if ``h >= ceil(c)`` does, and ``h > c`` if ``h > floor(c)`` does, with ceil and
floor to the next float16. So it does for thresholds above all of them, of neurons that never fire.

A neuron that is still one operator computes in float32, so its parameters and states stay as they are.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import fx

from .. import ops
from ..builder import holds_state, seal
from ..errors import Finding, UnsupportedError
from ..ops import Node, aten
from ..program import NEURON, NEURON_STEP, STATE, PassReport, Program, short, where

_MAX = torch.finfo(torch.float16).max


def cast_float16(program: Program) -> Program:
    """Round every weight to float16 and set every dtype to it.

    Raises:
        UnsupportedError: A weight overflows float16; all of them are named.
    """
    graph = fx.Graph()
    env: dict[Node, Node] = {}
    output = graph.graph_copy(program.graph, env)
    tensors, done, findings = {}, [], []
    rounded, kept = set(), set()
    for old, n in env.items():
        n.meta = dict(old.meta)
        n.name = old.name
        if n.op == "get_attr":
            value = program.tensor(n.target)
            if _only_of_neurons(n):
                tensors[n.target] = value
                kept.add(n.target)
                continue
            if value.is_floating_point():
                findings += [] if _only_compared_with(n) else _overflow(n, value)
                half = value.to(torch.float16)
                if (half != value).any():
                    rounded.add(n.target)
                lost = int(((half == 0) & (value != 0)).sum())
                value = half
                if lost:
                    done.append(f"{n.target}: {lost} of {value.numel()} weights flushed to 0")
            tensors[n.target] = value
        findings += _overflowing_scalars(n)
        if n.kwargs.get("dtype") in (torch.float32, torch.float64):
            n.kwargs = {**n.kwargs, "dtype": torch.float16}
        if not holds_state(n):
            n.meta["val"] = _half(n.meta["val"])
    if findings:
        # One for each layer and number, not for each of its unrolled nodes.
        told = {(f.where, f.found): f for f in reversed(findings)}
        raise UnsupportedError("float16 cannot hold this network:", reversed(told.values()))
    for n in [n for n in env.values() if n.target in _TOWARDS]:
        _threshold(graph, n, program, tensors)
    graph.output(output)
    done.insert(
        0,
        f"{len(tensors) - len(kept)} weights and constants, {program.dtype} to torch.float16; "
        f"{len(tensors) - len(kept) - len(rounded)} of them exactly",
    )
    if kept:
        done.append(f"{len(kept)} parameters of neurons stay in {program.dtype}")
    report = PassReport("cast_float16", tuple(done))
    return seal(
        program,
        graph,
        tensors,
        report,
        program.sites,
        dtype=torch.float16,
        rounded=frozenset(rounded),
    )


def _only_of_neurons(n: Node) -> bool:
    """Whether a tensor is nothing but a parameter of neurons."""
    return all(u.target in (NEURON, NEURON_STEP, STATE) and u.args[0] is not n for u in n.users)


def _only_compared_with(n: Node) -> bool:
    """Whether a tensor is nothing but the second side of comparisons."""
    return all(u.target in _TOWARDS and u.args[0] is not n for u in n.users)


#: Where the second side of a comparison is rounded to: up, or down.
_TOWARDS = {
    aten.ge.Scalar: math.inf,
    aten.ge.Tensor: math.inf,
    aten.lt.Scalar: math.inf,
    aten.lt.Tensor: math.inf,
    aten.gt.Scalar: -math.inf,
    aten.gt.Tensor: -math.inf,
    aten.le.Scalar: -math.inf,
    aten.le.Tensor: -math.inf,
}


def _threshold(
    graph: fx.Graph, n: Node, program: Program, tensors: dict[str, torch.Tensor]
) -> None:
    """Round what a value is compared with, so that the comparison stays exact."""
    side, towards = n.args[1], _TOWARDS[n.target]
    if isinstance(side, (int, float)):
        n.args = (
            n.args[0],
            _directed(torch.tensor(float(side), dtype=program.dtype), towards).item(),
        )
    elif isinstance(side, fx.Node) and side.op == "get_attr":
        name = f"{side.target}_{'up' if towards > 0 else 'down'}"
        tensors[name] = _directed(program.tensor(str(side.target)), towards)
        with graph.inserting_before(side):
            rounded = graph.get_attr(name)
        rounded.meta = dict(side.meta)
        n.args = (n.args[0], rounded)


def _directed(value: torch.Tensor, towards: float) -> torch.Tensor:
    """The next float16 on this side, or the value itself if it is one."""
    exact = value.detach().double().numpy()
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    short = half < exact if towards > 0 else half > exact
    return torch.from_numpy(np.where(short, np.nextafter(half, np.float16(towards)), half))


def _half(value: object) -> object:
    # Narrower numbers, such as bfloat16, stay: what rounds to them is no float16.
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float64):
        return value.to(torch.float16)
    return value


def _overflow(n: Node, value: torch.Tensor) -> list[Finding]:
    finite = value[value.isfinite()]  # a mask's infinity is one in float16 too
    biggest = finite.abs().max().item() if finite.numel() else 0.0
    if biggest <= _MAX:
        return []
    users = sorted({where(u) for u in n.users} - {""})
    layer = ", ".join(users) or str(n.target).rpartition(".")[0]
    return [_too_big(n, layer, f"{n.target} reaches {biggest:.6g}")]


def _overflowing_scalars(n: Node) -> list[Finding]:
    """Constants of the node's own that are finite and no float16 is as large as.

    What a value is compared with may be larger than all float16 numbers: it then is on their other side.
    """
    value = n.meta["val"]
    if not hasattr(n.target, "_schema") or not isinstance(value, torch.Tensor):
        return []
    given = ops.arguments(n)
    # Those declared as integers are dimensions, sizes and places; the end of a slice is often 2^63 - 1.
    numbers = [a.name for a in n.target._schema.arguments if "int" not in str(a.type)]
    scalars = [given[name] for name in numbers if isinstance(given[name], (int, float))]
    big = [a for a in scalars if math.isfinite(a) and abs(a) > _MAX]
    floating = value.is_floating_point()
    return [_too_big(n, where(n), f"{short(n.target)} with {a:.6g}") for a in big if floating]


def _too_big(n: Node, layer: str, found: str) -> Finding:
    return Finding(
        rule="float16-overflow",
        where=layer,
        node=n.name,
        found=found,
        allowed=f"magnitudes up to {_MAX:.0f}",
        fix="scale the layer and its threshold down by the same factor, or convert with "
        'dtype="float32"',
    )
