"""Layers of neurons as operators of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from .neurons import Neuron
from .ops import steps


@torch.library.custom_op("spikeport::neuron", mutates_args=())
def neuron_op(
    x: torch.Tensor, params: Sequence[torch.Tensor], spec: str, layout: str, T: int
) -> torch.Tensor:
    """A layer of neurons over T steps, from v_0.

    ``layout`` says what x is: ``"stepped"`` [T, N, ...], ``"flat"`` [TN, ...], or ``"static"``
    [N, ...], the same at every step. Spikes come back as [T, N, ...], or else as [TN, ...]. State and
    arithmetic are float32 where x is in half precision.
    """
    spikes = _neuron(spec, params).multi_step(steps(_wide(x), layout, T)).to(x.dtype)
    return spikes if layout == "stepped" else spikes.flatten(0, 1)


@torch.library.custom_op("spikeport::state", mutates_args=())
def state_op(
    x: torch.Tensor, params: Sequence[torch.Tensor], spec: str, layout: str, T: int, index: int
) -> torch.Tensor:
    """What the steps of ``spikeport::neuron`` end with in one of its states, in its layouts."""
    kept = _neuron(spec, params).states(steps(_wide(x), layout, T), index).to(x.dtype)
    return kept if layout == "stepped" else kept.flatten(0, 1)


@neuron_op.register_fake
@state_op.register_fake
def _(
    x: torch.Tensor,
    params: Sequence[torch.Tensor],
    spec: str,
    layout: str,
    T: int,
    index: int = 0,
) -> torch.Tensor:
    if layout == "static":
        return x.new_empty((T * x.shape[0], *x.shape[1:]))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("spikeport::neuron_step", mutates_args=())
def neuron_step_op(
    x: torch.Tensor, state: torch.Tensor, params: Sequence[torch.Tensor], spec: str, t: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step t of a layer of neurons: x [N, ...], state [states, N, ...] -> spikes [N, ...], state.

    Step 0 starts from the declared state. State and arithmetic as in :func:`neuron_op`.
    """
    neuron, wide = _neuron(spec, params), _wide(x)
    before = neuron.initial(wide) if t == 0 else state.unbind()
    spikes, after = neuron.single_step(wide, before, t)
    return spikes.to(x.dtype), torch.stack(after)


@neuron_step_op.register_fake
def _(
    x: torch.Tensor, state: torch.Tensor, params: Sequence[torch.Tensor], spec: str, t: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(state, dtype=_wide(x).dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def located(spec: str, path: str) -> str:
    """A declaration with the path of its module, for an operator that is traced.

    torch forgets the modules of operators inside ``torch.autocast`` and the like.
    """
    return f"{path}\n{spec}"


def path_and_spec(spec: str) -> tuple[str, str]:
    """What :func:`located` put together."""
    path, _, own = spec.rpartition("\n")
    return path, own


def _neuron(spec: str, params: Sequence[torch.Tensor]) -> Neuron:
    return Neuron.from_json(path_and_spec(spec)[1], map(_wide, params))


NEURON = torch.ops.spikeport.neuron.default
STATE = torch.ops.spikeport.state.default
NEURON_STEP = torch.ops.spikeport.neuron_step.default
# torch drops what nothing uses, and a layer whose last spikes nothing hears would have fewer steps.
fx.node.has_side_effect(NEURON_STEP)
