"""A network with its loss inside, as poptorch trains it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ...converters import losses, sources
from ...converters.errors import UsageError
from ...converters.losses import Loss
from ...converters.surrogates import Surrogate
from .lowering import Lowered, lower


class TrainingModule(nn.Module):
    """Samples x [N, ...] and labels [N] -> (spikes, loss); without labels, or in eval mode, spikes.

    Spikes come out batch first, [N, T, C], so that micro-batches are concatenated along the batch; a
    firing rate [N, C] as it is. Its state dict is the network's.

    Attributes:
        net: The rewritten network.
        loss: The loss, of spikes [T, N, C] or rates [N, C] and labels.
        sdk: Name of the module that marks the loss; None for a ``poptorch`` that was imported, if any.
    """

    def __init__(self, net: nn.Module, loss: Loss, output: int) -> None:
        super().__init__()
        self.net = net
        self.sdk: str | None = None
        self.loss, self._output = loss, output

    def forward(self, x: torch.Tensor, label: torch.Tensor | None = None) -> Any:
        """See the class.

        Raises:
            UsageError: What the network returns holds no spikes [T, N, C] and no rates [N, C].
        """
        for module in self.net.modules():
            if isinstance(module, Lowered):
                module.reset()
        try:
            with sources.isolated(self.net):
                spikes = self._spikes(self.net(x), x.shape[0])
        finally:
            for module in self.net.modules():
                if isinstance(module, Lowered):
                    module.reset()  # lets the trace's tensors go
        first = spikes.transpose(0, 1) if spikes.dim() > 2 else spikes
        if label is None or not self.training:
            return first
        return first, self._marked(self.loss(spikes.float(), label))

    def _spikes(self, outputs: Any, N: int) -> torch.Tensor:
        several = isinstance(outputs, (tuple, list))
        spikes = outputs[self._output] if several and len(outputs) > self._output else outputs
        if not isinstance(spikes, torch.Tensor) or spikes.dim() < 2:
            kinds = [type(o).__name__ for o in outputs] if several else [type(outputs).__name__]
            raise UsageError(
                f"the network returns {', '.join(kinds)}; allowed: spikes [T, N, C] or firing rates "
                "[N, C], in a tuple at the place that training_module(output=...) says"
            )
        if spikes.shape[0 if spikes.dim() == 2 else 1] != N:
            raise UsageError(
                f"the network returns {list(spikes.shape)} for {N} samples; allowed: spikes "
                f"[T, {N}, C] or firing rates [{N}, C]"
            )
        return spikes

    def _marked(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, marked for poptorch; as it is where there is none."""
        poptorch: Any = sys.modules.get("poptorch") if self.sdk is None else import_module(self.sdk)
        if poptorch is None:
            return loss
        marked: torch.Tensor = poptorch.identity_loss(loss, "mean")
        return marked

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's."""
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's."""
        return self.net.load_state_dict(*args, **kwargs)


def training_module(
    net: nn.Module,
    loss: str | Loss = "ce_count",
    *,
    output: int = 0,
    surrogates: Mapping[str, Surrogate] | None = None,
) -> TrainingModule:
    """A copy of the network that poptorch can train, with the loss inside.

    Args:
        net: Samples [N, ...] -> spikes [T, N, C] or firing rates [N, C], or a tuple with one of them.
            It is left as it is, and a state dict of either loads into the other.
        loss: Name of one of :data:`spikeport.converters.losses.LOSSES`, or a function of spikes (or
            rates) and labels [N] to one number.
        output: Which of several outputs the loss is of.
        surrogates: Surrogate gradients by module path, in place of the modules' own.

    Raises:
        UsageError: There is no such loss, or the network is none.
        UnsupportedError: With everything that cannot be rewritten.
    """
    if isinstance(net, TrainingModule):
        raise UsageError(
            "the network is a training_module already, whose loss is inside; give it to ipu.trainer, "
            "or the original network to training_module"
        )
    if not isinstance(net, nn.Module):
        raise UsageError(f"the network is {type(net).__name__}; give an nn.Module")
    if not callable(loss):
        loss = losses.named(loss)
    return TrainingModule(lower(net, surrogates), loss, output)
