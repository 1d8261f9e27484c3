"""Operators that a user's C++ library adds to the SDK, here in Python.

Those of ``snntorch-ipu`` 0.5.18 are provided. What they compute is read from that package's
operators: forward and gradient are taken as declared, on the operator's input. (As written there, the
forward runs in place, so that on the device the gradient may see spikes instead of potentials.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import Error

Forward = Callable[..., Sequence[Tensor]]
Gradient = Callable[..., Sequence["Tensor | None"]]


@dataclass(frozen=True)
class Operator:
    """A custom operator.

    Attributes:
        forward: From the input tensors, and the attributes as keywords, to the output tensors.
        gradient: From the outputs' gradients and the input tensors to the inputs' gradients; None
            where the operator cannot be differentiated.
    """

    forward: Forward
    gradient: Gradient | None = None


_operators: dict[tuple[str, str, int], Operator] = {}


def register(
    name: str, domain: str, version: int, forward: Forward, gradient: Gradient | None = None
) -> None:
    """Provide a custom operator to :func:`poptorch.custom_op`."""
    _operators[name, domain, version] = Operator(forward, gradient)


def run(
    inputs: Sequence[Tensor], name: str, domain: str, version: int, attributes: dict[str, Any]
) -> list[Tensor]:
    """Compute a custom operator.

    Raises:
        Error: It is not registered.
    """
    operator = _operators.get((name, domain, version))
    if operator is None:
        known = ", ".join(f"{d}.{n}:{v}" for n, d, v in sorted(_operators)) or "none"
        raise Error(
            f"Could not find a definition of the custom operator {domain}.{name}:{version}. The "
            f"simulation cannot load its C++ library; it has {known}. Provide it in Python with "
            "spikeport.targets.ipu.simulator.custom_ops.register(name, domain, version, forward, "
            "gradient)."
        )
    apply: Any = _SimulatedOperator.apply
    return list(apply(operator, attributes, *inputs))


class _SimulatedOperator(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: Operator, attributes: dict[str, Any], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.operator = operator
        ctx.save_for_backward(*inputs)
        outputs = tuple(operator.forward(*inputs, **attributes))
        if operator.gradient is None:
            ctx.mark_non_differentiable(*outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, None, *ctx.operator.gradient(*grads, *ctx.saved_tensors))


def _heaviside(x: Tensor) -> list[Tensor]:
    return [(x >= 0).to(x.dtype)]


def _step(x: Tensor) -> list[Tensor]:
    return [(x > 0).to(x.dtype)]


register("Heaviside", "custom.ops", 1, _heaviside, lambda grad, x: [grad * (x >= 0).to(x.dtype)])
register("StraightThroughEstimator", "custom.ops", 1, _step, lambda grad, x: [grad])
register("FastSigmoid", "custom.ops", 1, _heaviside, lambda grad, x: [grad / (x.abs() + 1) ** 2])
