"""Containers: time folded into the batch for stateless layers, step by step or layer by layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...converters.errors import UsageError
from .nodes import FusedNode, fused_is_possible


class SeqToANN(nn.Sequential):
    """Stateless layers on a sequence: x_seq [T, N, ...] is taken as a batch [TN, ...]."""

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> y_seq [T, N, ...]."""
        x = x_seq.flatten(0, 1)
        for layer in self:
            x = layer(x)
        return _unfold(x, x_seq)


def _unfold(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[TN, ...] as [T, N, ...], T and N as those of ``like``."""
    return x.reshape(*like.shape[:2], *x.shape[1:])


class LayerByLayer(nn.Sequential):
    """Layers and neurons in a row; names and state dict are those of ``nn.Sequential``.

    As long as every neuron's ``step_mode`` is "m", a call takes x_seq [T, N, ...] through one layer
    after another, stateless layers with time folded into the batch; a batch norm right before a fused
    neuron becomes part of its kernel. :meth:`step_by_step` takes the same sequence through the network
    one time step after another, with the same result in eval mode (in training mode a batch norm sees
    one time step at a time).
    """

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> y_seq [T, N, ...]."""
        x, layers = x_seq.flatten(0, 1), [*self]
        i = 0
        while i < len(layers):
            layer = layers[i]
            after = layers[i + 1] if i + 1 < len(layers) else None
            if (
                isinstance(layer, _BatchNorm)
                and isinstance(after, FusedNode)
                and fuses(layer, after, x)
            ):
                x = batch_norm_neuron(layer, after, _unfold(x, x_seq)).flatten(0, 1)
                i += 1
            elif isinstance(layer, FusedNode):
                x = layer(_unfold(x, x_seq)).flatten(0, 1)
            else:
                x = layer(x)
            i += 1
        return _unfold(x, x_seq)

    def step_by_step(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> y_seq [T, N, ...], every layer called T times."""
        nodes = [m for m in self.modules() if isinstance(m, FusedNode)]
        before = [(m.step_mode, m.state) for m in nodes]
        try:
            for m in nodes:
                m.step_mode, m.state = "s", m.state if m.keep_state else None
            steps = []
            for x in x_seq:
                for layer in self:
                    x = layer(x)
                steps.append(x)
            return torch.stack(steps)
        finally:
            for m, (mode, state) in zip(nodes, before, strict=True):
                m.step_mode = mode
                m.state = m.state if m.keep_state else state


def fuses(norm: _BatchNorm, node: FusedNode, x: torch.Tensor) -> bool:
    """Whether a batch norm and the neuron after it run as one kernel on x [TN, C, ...]."""
    return (
        node.backend != "torch"
        and type(node).forward is FusedNode.forward  # not so where a network is captured
        and fused_is_possible(x)
        and x.dim() >= 2
        and x.numel() > 0
        and not (norm._forward_hooks or norm._forward_pre_hooks or node._forward_hooks)
        and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        and not node.store_v_seq
        and not node.keep_state
        and node.step_mode == "m"
    )


def batch_norm_neuron(norm: _BatchNorm, node: FusedNode, x_seq: torch.Tensor) -> torch.Tensor:
    """``node(norm(x_seq))`` for x_seq [T, N, C, ...], neither the normalised x nor h being stored.

    Running statistics are updated as torch does.

    Raises:
        UsageError: x has another number of channels than the norm.
    """
    if x_seq.shape[2] != norm.num_features:
        raise UsageError(
            f"a batch norm of {norm.num_features} channels got x_seq {list(x_seq.shape)}; allowed: "
            "[T, N, C, ...]"
        )
    batch_statistics = norm.training or norm.running_mean is None
    if batch_statistics:
        mean, var = _statistics(norm, x_seq)
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = norm.running_mean.float(), norm.running_var.float()
    rstd = torch.rsqrt(var + norm.eps)
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
    norms = [mean, rstd, weight, bias]
    return node.fused(x_seq, norms, batch_statistics=batch_statistics)[0]


@torch.no_grad()
def _statistics(norm: _BatchNorm, x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance [C] of a batch in float32; running ones are moved towards them."""
    dims = [d for d in range(x_seq.dim()) if d != 2]
    var, mean = torch.var_mean(x_seq.float() if not x_seq.is_cuda else x_seq, dims, correction=0)
    mean, var = mean.float(), var.float()
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        count = x_seq.numel() / x_seq.shape[2]
        momentum = norm.momentum
        part = 1.0 / norm.num_batches_tracked if momentum is None else torch.tensor(momentum)
        part = part.to(mean.device)
        norm.running_mean.lerp_(mean.to(norm.running_mean), part.to(norm.running_mean))
        unbiased = var * (count / max(count - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var), part.to(norm.running_var))
    return mean, var
