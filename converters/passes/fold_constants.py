"""Compute what follows from weights alone, such as a standardised weight, once and for all.

The same computation out of the same weights, as in each step of a loop over time, gives one constant.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

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
                known[key] = build.constant(f"folded.{n.name}", folded.contiguous())
                done[where(n) or "the network's own forward"] = None
            env[n] = known[key]
            values[n] = build.tensors[str(known[key].target)]
        elif n.op == "call_function":
            env[n] = build.copy(n, env)
    report = PassReport("fold_constants", tuple(done))
    return build.finish([env[r] for r in program.results], report)


def _constant(n: Node, values: dict[Node, torch.Tensor]) -> bool:
    given = n.all_input_nodes
    single = isinstance(n.meta["val"], torch.Tensor) and n.target not in (NEURON, NEURON_STEP)
    return bool(given) and single and all(a in values for a in given)


def _key(arguments: Any, env: dict[Node, Node]) -> Hashable:
    leaves, structure = pytree.tree_flatten(arguments)
    named = (env[a].name if isinstance(a, fx.Node) else (type(a), a) for a in leaves)
    return (*named, str(structure))
