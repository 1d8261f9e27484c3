"""Fold an evaluated batch norm into the convolution or linear layer before it.

With s = gamma / sqrt(var + eps)::

    (W x + b - mean) s + beta = (s W) x + ((b - mean) s + beta)

computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import fx

from ..builder import Builder
from ..ops import Node, aten
from ..program import PassReport, Program, where

_LAYERS = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
)


def fold_batch_norm(program: Program) -> Program:
    """Fold every batch norm whose only input is a layer of weights that nothing else uses."""
    build = Builder(program)
    env: dict[Node, Node] = {}
    done, skipped = [], []
    for n in program.walk():
        if n.op == "placeholder":
            env[n] = build.placeholder(n, n.meta["val"])
        elif n.op == "get_attr":
            env[n] = build.copy(n, env)
        elif n.op == "call_function" and n.target is aten.batch_norm.default:
            reason = obstacle(n)
            if reason is None:
                env[n] = _fold(program, build, n, env)
                done.append(f"{where(n)} into {where(n.args[0])}")
            else:
                env[n] = build.copy(n, env)
                skipped.append(f"{where(n)}: {reason}")
        elif n.op == "call_function":
            env[n] = build.copy(n, env)
    report = PassReport("fold_batch_norm", tuple(done), tuple(skipped))
    return build.finish([env[r] for r in program.results], report)


def obstacle(norm: Node) -> str | None:
    """Why a batch norm cannot go into what comes before it, or None."""
    layer: Node = norm.args[0]
    if not isinstance(layer, fx.Node) or layer.target not in _LAYERS:
        return "no convolution or linear layer comes right before it"
    if len(layer.users) > 1:
        return f"{where(layer)} is used elsewhere too"
    weight: Node = layer.args[1]
    if weight.op != "get_attr":
        return f"the weight of {where(layer)} is computed"
    if layer.target is aten.linear.default and len(layer.meta["val"].shape) != 2:
        return f"{where(layer)} has its features in another dimension than the norm's"
    return None


def affine(norm: Node, program: Program) -> tuple[torch.Tensor, torch.Tensor]:
    """scale, shift in float64, [C]: the norm is scale * x + shift."""
    gamma, beta, mean, var = (
        None if p is None else program.tensor(p.target).double() for p in norm.args[1:5]
    )
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + norm.args[7])
    scale = scale if gamma is None else gamma * scale
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta


def into_layer(norm: Node, program: Program) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale, shift, [C], of a norm and the layer before it: scale * W x + shift.

    And how large the terms of the shift are, which the network adds up in the dtype that it has.
    """
    layer: Node = norm.args[0]
    scale, shift = affine(norm, program)
    mean, beta = (
        program.tensor(p.target).double() if p else scale * 0 for p in (norm.args[3], norm.args[2])
    )
    terms = (scale * mean).abs() + beta.abs()
    if len(layer.args) > 2 and layer.args[2] is not None:
        bias = scale * program.tensor(layer.args[2].target).double()
        shift, terms = shift + bias, terms + bias.abs()
    return scale, shift, terms


def _fold(program: Program, build: Builder, norm: Node, env: dict[Node, Node]) -> Node:
    layer = norm.args[0]
    x, weight = layer.args[:2]
    W = program.tensor(weight.target)
    scale, shift, terms = into_layer(norm, program)
    folded = W.double() * scale.reshape(-1, *[1] * (W.dim() - 1))
    stem = f"{weight.target.rpartition('.')[0]}.folded_{where(norm).replace('.', '_')}"
    build.terms[f"{stem}_bias"] = terms.float()
    return build.call(
        layer.target,
        env[x],
        build.constant(f"{stem}_weight", folded.to(W.dtype)),
        build.constant(f"{stem}_bias", shift.to(W.dtype)),
        *layer.args[3:],
        path=where(layer),
    )
