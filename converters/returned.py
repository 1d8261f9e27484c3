"""What a network returns: tensors, nested, and None between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

#: The name of None in an artifact.
NONE = "spikeport.none"


class Nothing:
    """A container of nothing in a nesting, which None takes the place of."""


def _flatten(_: Nothing) -> tuple[list[Any], None]:
    return [], None


def _unflatten(_: Any, __: None) -> None:
    return None


if hasattr(pytree, "register_pytree_node"):
    pytree.register_pytree_node(
        Nothing,
        _flatten,
        _unflatten,
        serialized_type_name=NONE,
        to_dumpable_context=json.dumps,
        from_dumpable_context=json.loads,
    )
else:  # beside an old SDK
    pytree._register_pytree_node(Nothing, _flatten, _unflatten)


def tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of what a network returns, in order."""
    return [y for y in pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor)]


def nesting(structure: pytree.TreeSpec, results: Sequence[Any]) -> pytree.TreeSpec:
    """The nesting of those results that are nodes of a graph, with None in the places of the others."""
    leaves = [r if isinstance(r, fx.Node) else Nothing() for r in results]
    return pytree.tree_structure(pytree.tree_unflatten(leaves, structure))


def refused(structure: pytree.TreeSpec, results: Sequence[Any]) -> str | None:
    """Why results cannot be returned, and what to do; None if they can."""
    if not any(isinstance(r, fx.Node) for r in results):
        given = ", ".join(map(repr, results)) or "nothing"
        return f"the network returns {given}; outputs must be tensors, one at least"
    numbered = pytree.tree_unflatten([*range(len(results))], structure)
    places, _ = pytree.tree_flatten_with_path(numbered)
    wrong = [
        f"{results[i]!r} at output{pytree.keystr(place)}"
        for place, i in places
        if not isinstance(results[i], fx.Node) and results[i] is not None
    ]
    if not wrong:
        return None
    return (
        f"the network returns {', '.join(wrong)}, which may follow from the sizes of the example inputs; "
        "outputs must be tensors or None: leave it out of what forward returns"
    )
