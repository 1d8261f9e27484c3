"""Layers of neurons, as modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..equations import Dynamics
from ..errors import UsageError
from ..surrogates import ATan, Surrogate, checked
from .kinds import IF, LIF, ParametricLIF
from .neuron import Neuron, Parameter, ResetAt


def misfits(tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> list[str]:
    """Why a layer with these parameters, by name, cannot run on x [T, N, ...]."""
    if x.dim() < 2:
        return [f"the input has shape {list(x.shape)}; allowed: [T, N, ...]"]
    found = []
    for name, tensor in tensors.items():
        pairs = zip(reversed(tensor.shape), reversed(x.shape[1:]), strict=False)
        if tensor.dim() >= x.dim() or any(a not in (1, b) for a, b in pairs):
            found.append(
                f"{name} has shape {list(tensor.shape)}, which does not broadcast against "
                f"{list(x.shape[1:])}; one value a channel is [C, 1, 1]"
            )
    return found


class _Layer(nn.Module):
    """A declaration with the tensors that it is made of."""

    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self._declared = neuron
        for name, tensor in neuron.tensors().items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    @property
    def neuron(self) -> Neuron:
        """The declaration with the present values of its parameters."""
        names = self._declared.tensors()
        return self._declared.replace_tensors({n: getattr(self, n) for n in names})

    def _fitting(self, x: torch.Tensor) -> Neuron:
        """The declaration, for x [T, N, ...], which its parameters must broadcast against."""
        neuron = self.neuron
        if problems := misfits(neuron.tensors(), x):
            raise UsageError(f"{type(self).__name__}: " + "; ".join(problems))
        return neuron


class Node(_Layer):
    """A layer of neurons, multi-step: x_seq [T, N, ...] -> spikes [T, N, ...].

    Every call starts from v_0. A parameter given as an ``nn.Parameter`` is learned, as a tensor is a
    buffer (say [C, 1, 1] for one value a channel), as a float is a constant.

    Args:
        kind: The dynamics.
        v_threshold: The threshold.
        v_reset: The potential after a spike; None for a soft reset.
        reset_at: ``"now"``, ``"next"``, ``"before"`` or ``"ahead"``, as in :class:`Neuron`.
        fires: ``">="`` or ``">"``.
        v_0: Potential before the first step; v_reset, or 0 for a soft reset, unless given.
        surrogate: Surrogate gradient for training.
        detach_reset: Whether gradients are kept from flowing through the reset.
        **params: Parameters of the charge.
    """

    def __init__(
        self,
        kind: Dynamics,
        *,
        v_threshold: Parameter = 1.0,
        v_reset: Parameter | None = 0.0,
        reset_at: ResetAt = "now",
        fires: Literal[">=", ">"] = ">=",
        v_0: Parameter | None = None,
        surrogate: Surrogate | None = None,
        detach_reset: bool = False,
        **params: Any,
    ) -> None:
        hard = v_reset is not None
        rest: Parameter = 0.0 if v_reset is None else v_reset
        super().__init__(
            Neuron(
                kind,
                params,
                v_threshold=v_threshold,
                v_reset=rest,
                reset="hard" if hard else "soft",
                reset_at=reset_at,
                fires=fires,
                v_0=rest if v_0 is None else v_0,
            )
        )
        self.surrogate = ATan() if surrogate is None else checked(surrogate)
        self.detach_reset = detach_reset

    @classmethod
    def of(cls, neuron: Neuron) -> Node:
        """A layer of a population that is declared already."""
        node = Node.__new__(Node)
        _Layer.__init__(node, neuron)
        node.surrogate, node.detach_reset = ATan(), False
        return node

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> spikes [T, N, ...].

        Raises:
            UsageError: The input has not these dimensions, or a parameter does not broadcast against it.
        """
        neuron = self._fitting(x_seq)
        if not torch.is_grad_enabled():
            return neuron.multi_step(x_seq)
        state, spikes = neuron.initial(x_seq[0]), []
        for t, x in enumerate(x_seq):
            s, state, _ = neuron.train_step(state, x, self.surrogate, self.detach_reset, t)
            spikes.append(s)
        return torch.stack(spikes)

    def extra_repr(self) -> str:
        """The declaration in one line."""
        return self.neuron.describe()


class Readout(_Layer):
    """Neurons that do not fire, multi-step: x_seq [T, N, ...] -> membrane potentials [T, N, ...].

    Of kind LIF or Leaky it is a leaky integrator. Every call starts from v_0; parameters are given as
    in :class:`Node`.
    """

    def __init__(self, kind: Dynamics, *, v_0: Parameter = 0.0, **params: Any) -> None:
        super().__init__(Neuron(kind, params, reset="none", v_0=v_0))

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> the potential that each step ends with, [T, N, ...].

        Raises:
            UsageError: As for :class:`Node`.
        """
        neuron = self._fitting(x_seq)
        state, kept = neuron.initial(x_seq[0]), []
        for x in x_seq:
            state = neuron.charge(state, x)
            kept.append(state[0])
        return torch.stack(kept)

    def extra_repr(self) -> str:
        """The charge in one line."""
        return f"{self.neuron.describe_charge()}, does not fire"


class IFNode(Node):
    """Integrate-and-fire neurons; arguments as in :class:`Node`."""

    def __init__(self, **population: Any) -> None:
        super().__init__(IF, **population)


class LIFNode(Node):
    """Leaky integrate-and-fire neurons that leak towards v_reset, or 0 for a soft reset."""

    def __init__(
        self,
        tau: Parameter = 2.0,
        decay_input: bool = True,
        *,
        v_reset: Parameter | None = 0.0,
        **population: Any,
    ) -> None:
        rest = 0.0 if v_reset is None else v_reset
        super().__init__(
            LIF, tau=tau, v_rest=rest, decay_input=decay_input, v_reset=v_reset, **population
        )


class ParametricLIFNode(Node):
    """LIF neurons with a learned time constant, which starts at ``init_tau``."""

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        *,
        v_reset: Parameter | None = 0.0,
        **population: Any,
    ) -> None:
        if init_tau <= 1:
            raise UsageError(f"init_tau is {init_tau}; it must be above 1: 1 / tau is a sigmoid")
        rest = 0.0 if v_reset is None else v_reset
        w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))
        super().__init__(
            ParametricLIF, w=w, v_rest=rest, decay_input=decay_input, v_reset=v_reset, **population
        )
