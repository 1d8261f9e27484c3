"""Containers: time folded into the batch for stateless layers, step by step or layer by layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...converters.errors import UsageError
from .kernels import pools
from .nodes import FusedNode, fused_is_possible
from .statistics import mean_and_variance


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
    neuron, and a max pooling right after it, become part of its kernels. :meth:`step_by_step` takes the
    same sequence through the network one time step after another, with the same result in eval mode (in
    training mode a batch norm sees one time step at a time).
    """

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> y_seq [T, N, ...]."""
        x, layers = x_seq.flatten(0, 1), [*self, None, None]
        while layers[0] is not None:
            norm = layers[0] if isinstance(layers[0], _BatchNorm) else None
            node, after = layers[:2] if norm is None else layers[1:3]
            if not isinstance(node, FusedNode) or (norm is not None and not fuses(norm, node, x)):
                x = layers.pop(0)(x)
                continue
            x_seq = _unfold(x, x_seq)
            window = pooling_window(node, after, x_seq)
            if norm is not None:
                spikes = batch_norm_neuron(norm, node, x_seq, window)
            elif window != (1, 1):
                spikes = node.fused(x_seq, [], window=window)[0]
            else:
                spikes = node(x_seq)
            x = spikes.flatten(0, 1)
            layers = layers[1 + (norm is not None) + (window != (1, 1)) :]
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
        _only_spikes(node, x)
        and x.dim() >= 2
        and not _hooked(norm)
        and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    )


def pooling_window(
    node: FusedNode, after: nn.Module | None, x_seq: torch.Tensor
) -> tuple[int, int]:
    """The windows of the max pooling ``after`` if it and the neuron run as one kernel, else (1, 1)."""
    no = (1, 1)
    if type(after) is not nn.MaxPool2d or _hooked(after) or after.return_indices:
        return no
    window = _pair(after.kernel_size)
    plain = _pair(after.stride) == window and _pair(after.padding) == (0, 0)
    if not plain or _pair(after.dilation) != no or not _only_spikes(node, x_seq):
        return no
    return window if pools(x_seq, window, [*node.tensors().values()]) else no


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _only_spikes(node: FusedNode, x: torch.Tensor) -> bool:
    """Whether a call of a neuron on x [..., C, ...] gives spikes from a fused kernel and no more."""
    return (
        node.backend != "torch"
        and type(node).forward is FusedNode.forward  # not so where a network is captured
        and fused_is_possible(x)
        and x.numel() > 0
        and not _hooked(node)
        and not node.store_v_seq
        and not node.keep_state
        and node.step_mode == "m"
    )


def _hooked(module: nn.Module) -> bool:
    return any(
        (
            *(module._forward_hooks, module._forward_pre_hooks),
            *(module._backward_hooks, module._backward_pre_hooks),
        )
    )


def batch_norm_neuron(
    norm: _BatchNorm, node: FusedNode, x_seq: torch.Tensor, window: tuple[int, int] = (1, 1)
) -> torch.Tensor:
    """``node(norm(x_seq))`` for x_seq [T, N, C, ...], neither the normalised x nor h being stored.

    With a ``window`` the spikes go through max pooling, where :func:`pooling_window` allows it. Running
    statistics are updated as torch does.

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
    return node.fused(x_seq, norms, batch_statistics=batch_statistics, window=window)[0]


@torch.no_grad()
def _statistics(norm: _BatchNorm, x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance [C] of a batch in float32; running ones are moved towards them."""
    mean, var = mean_and_variance(x_seq)
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        count = x_seq.numel() / x_seq.shape[2]
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            if norm.momentum is None:
                running.lerp_(new.to(running), (1.0 / norm.num_batches_tracked).to(running))
            else:
                running.lerp_(new.to(running), norm.momentum)
    return mean, var
