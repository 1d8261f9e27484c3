"""Compute what follows from weights alone, such as a standardised weight, once and for all.

The same computation out of the same weights, as in each step of a loop over time, gives one constant. Whole
numbers that meet floating-point ones are such, as torch would make them: chips have none of 64 bits.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .. import ops
from ..builder import Builder
from ..ops import Node
from ..program import NEURON, NEURON_STEP, PassReport, Program, where


def fold_constants(program: Program) -> Program:
    """Replace every operator whose inputs are all constants by a constant."""
    build = Builder(program)
    env: dict[Node, Node] = {}
    values: dict[Node, torch.Tensor] = {}
    known: dict[Hashable, Node] = {}
    done: dict[str, None] = {}
    for n in program.walk():
        if n.op == "placeholder":
            env[n] = build.placeholder(n, n.meta["val"])
        elif n.op == "get_attr":
            env[n], values[n] = build.copy(n, env), program.tensor(n.target)
        elif n.op == "call_function" and _constant(n, values):
            args, kwargs = fx.map_arg((n.args, n.kwargs), values.__getitem__)
            key = (n.target, _key((n.args, n.kwargs), env))
            if key not in known:
                with torch.no_grad():
                    folded: torch.Tensor = n.target(*args, **kwargs)
                known[key] = build.constant(f"folded_{n.name}", folded.contiguous())
                done[where(n) or "the network's own forward"] = None
            env[n] = known[key]
            values[n] = build.tensors[str(known[key].target)]
        elif n.op == "call_function":
            env[n] = build.copy(n, env | _promoted(build, n, env, values))
    report = PassReport("fold_constants", tuple(done))
    return build.finish([env[r] for r in program.results], report)


def _constant(n: Node, values: dict[Node, torch.Tensor]) -> bool:
    given = n.all_input_nodes
    single = isinstance(n.meta["val"], torch.Tensor) and n.target not in (NEURON, NEURON_STEP)
    return bool(given) and single and all(a in values for a in given)


def _promoted(
    build: Builder, n: Node, env: dict[Node, Node], values: dict[Node, torch.Tensor]
) -> dict[Node, Node]:
    """Constants of whole numbers as an operator computes with them."""
    if not ops.is_pointwise(n.target):
        return {}
    dtypes = {a: a.meta["val"].dtype for a in n.all_input_nodes}
    floating = next((dtype for dtype in dtypes.values() if dtype.is_floating_point), None)
    if floating is None:
        return {}
    name = str(floating).removeprefix("torch.")
    return {
        a: build.constant(f"{env[a].target}_{name}", values[a].to(floating))
        for a, dtype in dtypes.items()
        if a in values and not dtype.is_floating_point and dtype != torch.bool
    }


def _key(arguments: Any, env: dict[Node, Node]) -> Hashable:
    leaves, structure = pytree.tree_flatten(arguments)
    named = (env[a].name if isinstance(a, fx.Node) else (type(a), a) for a in leaves)
    return (*named, str(structure))
