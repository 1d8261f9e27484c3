"""Store and compute everything in float16.

Weights and constants are rounded to the nearest float16; what overflows (above 65504) is refused with
its layer, what is flushed to zero is counted.
"""

from __future__ import annotations

import copy

import torch
from torch import fx

from ..errors import Finding, UnsupportedError
from ..program import PassReport, Program, seal, where

_MAX = torch.finfo(torch.float16).max


def cast_float16(program: Program) -> Program:
    """Round every weight to float16 and set every dtype to it.

    Raises:
        UnsupportedError: A weight overflows float16; all of them are named.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, env)
    tensors, done, findings = {}, [], []
    for old, n in env.items():
        n.meta = dict(old.meta)
        n.name = old.name
        if n.op == "get_attr":
            value = program.tensor(n.target)
            if value.is_floating_point():
                findings += _overflow(n, value)
                value, lost = _round(value)
                if lost:
                    done.append(f"{n.target}: {lost} of {value.numel()} weights flushed to 0")
            tensors[n.target] = value
        if n.kwargs.get("dtype") in (torch.float32, torch.float64):
            n.kwargs = {**n.kwargs, "dtype": torch.float16}
        n.meta["val"] = _half(n.meta["val"])
    if findings:
        raise UnsupportedError("float16 cannot hold this network:", findings)
    graph.output(output)
    done.insert(0, f"{len(tensors)} weights and constants, {program.dtype} to torch.float16")
    report = PassReport("cast_float16", tuple(done))
    return seal(
        program, graph, tensors, report, copy.copy(program.sites), dtype=torch.float16
    )


def _half(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.float16)
    return value


def _round(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    half = value.to(torch.float16)
    return half, int(((half == 0) & (value != 0)).sum())


def _overflow(n: fx.Node, value: torch.Tensor) -> list[Finding]:
    biggest = value.abs().max().item() if value.numel() else 0.0
    if biggest <= _MAX:
        return []
    users = sorted({where(u) for u in n.users} - {""})
    return [
        Finding(
            rule="float16-overflow",
            where=", ".join(users) or str(n.target).rpartition(".")[0],
            node=n.name,
            found=f"{n.target} reaches {biggest:.6g}",
            allowed=f"magnitudes up to {_MAX:.0f}",
            fix="scale the layer and its threshold down by the same factor, or convert with "
            'dtype="float32"',
        )
    ]
