"""Absorb an evaluated batch norm into the neuron after it and the layer before it, weights exact.

Folding a norm into float16 weights rounds every weight. A neuron whose charge is homogeneous in its
potentials, charge(a v, a x) = a charge(v, x), does not care for the scale of its input as long as its
potentials have the same, so the scale goes there instead. With the norm's output written as

    y = s 2^e sign(gamma) (W x) + shift,    1 <= s < 2

the layer gets 2^e sign(gamma) W, which is exact in binary, and the bias shift / s; the neuron gets
v_threshold / s, v_reset / s and so on, one value a channel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..builder import Builder
from ..neurons import Neuron
from ..ops import Node, aten
from ..program import NEURON, PassReport, Program, where
from .fold_batch_norm import affine, into_layer, obstacle


def absorb_batch_norm(program: Program) -> Program:
    """Absorb every batch norm that lies between a layer of weights and a homogeneous neuron."""
    build = Builder(program)
    env: dict[Node, Node] = {}
    absorbed: dict[Node, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    done, skipped = [], []
    for n in program.walk():
        if n.op == "placeholder":
            env[n] = build.placeholder(n, n.meta["val"])
        elif n.op == "call_function" and n.target is aten.batch_norm.default:
            reason = obstacle(n) or _neuron_obstacle(n, program)
            if reason is None:
                env[n], absorbed[n] = _scaled_layer(program, build, n, env)
                done.append(f"{where(n)} into {where(n.args[0])} and {where(next(iter(n.users)))}")
            else:
                env[n] = build.copy(n, env)
                skipped.append(f"{where(n)}: {reason}")
        elif n.op == "call_function" and n.target is NEURON and n.args[0] in absorbed:
            site = program.site(n)
            env[n] = _scaled_neuron(build, n, site.neuron, absorbed[n.args[0]], env)
            scales[site.name] = absorbed[n.args[0]]
        elif n.op != "output":
            env[n] = build.copy(n, env)
    report = PassReport("absorb_batch_norm", tuple(done), tuple(skipped))
    result = build.finish([env[r] for r in program.results], report)
    sites = [replace(s, scale=scales.get(s.name)) for s in result.sites]
    return replace(result, sites=tuple(sites))


def _neuron_obstacle(norm: Node, program: Program) -> str | None:
    users = list(norm.users)
    if len(users) != 1 or users[0].target is not NEURON:
        return "what comes after it is not one neuron"
    neuron = program.site(users[0]).neuron
    if not neuron.dynamics.homogeneous:
        return f"the charge of {neuron.dynamics.name} is not declared homogeneous in its potentials"
    shapes = [t.dim() for name, t in neuron.tensors().items() if name in _potentials(neuron)]
    if any(shapes):
        return "the neuron's potentials are not scalars"
    if (affine(norm, program)[0] == 0).any():
        return "gamma is 0 in a channel"
    return None


def _potentials(neuron: Neuron) -> tuple[str, ...]:
    return ("v_threshold", "v_reset", "v_0", *neuron.dynamics.potentials)


def _scaled_layer(
    program: Program, build: Builder, norm: Node, env: dict[Node, Node]
) -> tuple[Node, torch.Tensor]:
    """The layer whose output times s [C] is the norm's, and s."""
    layer: Any = norm.args[0]
    x, weight = layer.args[:2]
    W = program.tensor(weight.target)
    scale, shift, terms = into_layer(norm, program)
    mantissa, exponent = torch.frexp(scale.abs())
    s = 2 * mantissa
    factor = torch.sign(scale) * torch.exp2(exponent.double() - 1)
    stem = f"{weight.target.rpartition('.')[0]}.absorbed_{where(norm).replace('.', '_')}"
    scaled = W.double() * factor.reshape(-1, *[1] * (W.dim() - 1))
    build.terms[f"{stem}_bias"] = (terms / s).float()
    node = build.call(
        layer.target,
        env[x],
        build.constant(f"{stem}_weight", scaled.to(W.dtype)),
        build.constant(f"{stem}_bias", (shift / s).to(W.dtype)),
        *layer.args[3:],
        path=where(layer),
    )
    features = node.meta["val"].dim() - 2
    return node, s.reshape(-1, *[1] * features).to(W.dtype)


def _scaled_neuron(
    build: Builder, n: Node, neuron: Neuron, s: torch.Tensor, env: dict[Node, Node]
) -> Node:
    def scaled(value: Any) -> Any:
        # 0 stays a scalar: it has no scale.
        if not isinstance(value, torch.Tensor) and value == 0:
            return value
        return (torch.as_tensor(value, dtype=torch.float64).detach() / s.double()).to(s.dtype)

    names = neuron.dynamics.potentials
    params = {k: scaled(v) if k in names else v for k, v in neuron.params.items()}
    rest = {k: scaled(getattr(neuron, k)) for k in ("v_threshold", "v_reset", "v_0")}
    changed = replace(neuron, params=params, **rest)
    tensors = [
        build.constant(f"{where(n)}.absorbed_{name}", tensor)
        for name, tensor in changed.tensors().items()
    ]
    x, _, _, layout, T = n.args
    return build.instead(n, env[x], tensors, changed.to_json(), layout, T)
