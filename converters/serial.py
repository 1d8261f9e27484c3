"""A program's graph as plain data, and back.

Only ATen operators and this project's own are read back, so that a file cannot call anything else.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .errors import UsageError
from .program import short, where

_NAMESPACES = ("aten", "spikeport")
_KINDS = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def graph_to_data(graph: fx.Graph) -> list[dict[str, Any]]:
    """Every node in order: name, kind, operator, arguments, source module."""
    nodes = []
    for n in graph.nodes:
        target = n.target
        if n.op == "call_function":
            overload = getattr(target, "_overloadname", "")
            target = f"{short(target)}.{overload}" if overload else short(target)
        args = [_encode(a) for a in n.args]
        kwargs = {k: _encode(v) for k, v in n.kwargs.items() if not isinstance(v, torch.device)}
        nodes.append(
            {
                "name": n.name,
                "op": n.op,
                "target": target,
                "args": args,
                "kwargs": kwargs,
                "path": where(n),
            }
        )
    return nodes


def graph_from_data(nodes: list[dict[str, Any]]) -> fx.Graph:
    """The inverse of :func:`graph_to_data`; nodes carry no shapes.

    Raises:
        UsageError: An operator is none of ATen's or this project's, or torch has it no more.
    """
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    for data in nodes:
        target: Any = data["target"]
        if data["op"] == "call_function":
            target = _operator(target)
        args = tuple(_decode(a, env) for a in data["args"])
        kwargs = {k: _decode(v, env) for k, v in data["kwargs"].items()}
        node = graph.create_node(data["op"], target, args, kwargs, name=data["name"])
        node.meta["path"] = data["path"]
        env[data["name"]] = node
    return graph


def _operator(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = None
    if namespace in _NAMESPACES:
        found = getattr(getattr(torch.ops, namespace), packet, None)
        found = getattr(found, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise UsageError(
            f"operator {name!r} is not known to torch {torch.__version__}; a program has operators of "
            f"{' and '.join(_NAMESPACES)} only"
        )
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    for kind, cls in _KINDS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    return value


def _decode(value: Any, env: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, env) for v in value]
    if isinstance(value, dict):
        ((kind, name),) = value.items()
        return env[name] if kind == "node" else getattr(torch, name)
    return value
