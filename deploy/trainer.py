"""What trains a network, one batch after the other: here with torch, on a CPU or on GPUs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..converters import losses, sources
from ..converters.errors import UsageError
from .options import Backend, Options
from .ranks import ALONE, Ranks
from .replay import Replay


class Trainer(Protocol):
    """One network in training, on whatever trains it.

    Where several processes train together, each is given every batch whole and takes its share.
    """

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the optimizer on samples x [N, ...] of classes y [N].

        Returns:
            This process's part of the batch's mean loss, and how many of its samples it had right.
        """

    def end_epoch(self) -> None:
        """Move the learning rate on; every process has the same network then."""

    def evaluate(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        """Mean loss and accuracy on all of x [N, ...] and y [N], whichever process saw them."""

    def state(self) -> dict[str, Any]:
        """All that :meth:`load` needs to go on: ``net``, the network's state dict, and the rest."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`.

        Raises:
            RuntimeError, ValueError, KeyError: It is of another network.
        """

    def close(self) -> None:
        """Free what a step holds on the device; no step follows."""


class Float32Copies(nn.ParameterList):
    """What the optimizer moves in place of a float16 network's weights.

    Late in a training its steps are smaller than float16 resolves, and would be lost (Micikevicius et
    al. 2018, arXiv:1710.03740).
    """

    def __init__(self, net: nn.Module) -> None:
        self._weights = [p for p in net.parameters() if p.requires_grad]
        super().__init__(p.detach().float().clone() for p in self._weights)

    def take_gradients(self) -> None:
        """The network's gradients as the copies' own."""
        for mine, weight in zip(self, self._weights, strict=True):
            mine.grad = None if weight.grad is None else weight.grad.float()

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the copies into the network."""
        for mine, weight in zip(self, self._weights, strict=True):
            weight.copy_(mine)


class TorchTrainer:
    """Trains with torch, with a cosine learning rate.

    Args:
        net: Samples [N, ...] -> firing rates [N, classes], or spikes [T, N, classes].
        options: Those of the training.
        ranks: The processes that train together.
        classes: How many there are in the data.
    """

    def __init__(self, net: nn.Module, options: Options, ranks: Ranks, classes: int) -> None:
        device = options.torch_device
        if not hasattr(torch.amp, "GradScaler"):
            raise UsageError(
                f"training with torch needs torch 2.6 or later, and this is torch {torch.__version__}; "
                "beside an IPU's SDK train with --target ipu or ipu-sim"
            )
        if not any(p.requires_grad for p in net.parameters()):
            raise UsageError("the network has no parameters that learn; there is nothing to train")
        if options.backend is not None:
            _set_backend(net, options.backend)
        if ranks.size > 1 and options.sync_batch_norm:
            if device.type != "cuda":
                raise UsageError(
                    f"--sync-batch-norm is for GPUs, and the device is {device}; train there in one "
                    "process, or without it"
                )
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        self.net = net.to(device, options.dtype).train()
        if options.channels_last:
            from ..targets.graphs import channels_innermost

            channels_innermost(self.net)
        self._options, self._ranks, self._classes = options, ranks, classes
        self._copies = Float32Copies(self.net) if options.half else None
        weights = self._copies or self.net
        self._optimizer = _OPTIMIZERS[options.optimizer](weights.parameters(), options)
        self._loss = losses.named(options.loss)
        self._lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, options.epochs
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.amp or options.half)
        self._amp = torch.autocast(device.type, torch.half, enabled=options.amp)
        # DDP looks on for its first ten steps and then arranges its buckets.
        warm_up = 3 if ranks.size == 1 else 12
        self._replay = Replay(self._step, warm_up) if options.graph else None
        self._together = self.net
        if ranks.size > 1:
            with torch.cuda.stream(self._replay.stream) if self._replay else nullcontext():
                # Running statistics have no part in a step; an epoch's end spreads process 0's.
                self._together = DistributedDataParallel(
                    self.net, gradient_as_bucket_view=True, broadcast_buffers=False
                )

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step, see :class:`Trainer`."""
        return (self._replay or self._step)(x, y)

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        label = self._ranks.share(y)
        part = len(label) / len(y)
        self.net.zero_grad()
        with self._amp:
            spikes = self._together(self._ranks.share(x))
            check_outputs(spikes, len(label), self._classes)
            loss = self._loss(spikes, label)
        # DDP averages over processes, whose shares may differ in size.
        torch.autograd.backward(self._scaler.scale(loss * (part * self._ranks.size)))
        if self._copies:
            self._copies.take_gradients()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._copies:
            self._copies.give_weights()
        sources.reset(self.net)
        return loss.detach() * part, (losses.rates(spikes).argmax(1) == label).sum()

    def end_epoch(self) -> None:
        """Move the learning rate on, and take process 0's running statistics, as DDP does."""
        self._lr_scheduler.step()
        self._ranks.spread(self.net.buffers())

    def evaluate(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        """Mean loss and accuracy, see :class:`Trainer`, of a checkpoint's weights in float32.

        That is what a conversion is compared with, and how float16 rounds would be a matter of luck, of
        which the best of many epochs has most.
        """
        from ..targets.graphs import exact_sums

        net = copy.deepcopy(self.net).float() if self._options.half else self.net
        with exact_sums(self._options.torch_device):
            return evaluate(net, x, y, self._options.batch_size, self._ranks, self._loss)

    def state(self) -> dict[str, Any]:
        """State dicts of network, optimizer, learning rate and loss scale."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        on_gpu = self._options.torch_device.type == "cuda"
        for group in self._optimizer.param_groups:
            # The checkpoint may come from another device.
            group |= {name: on_gpu for name in ("fused", "capturable") if name in group}
            group["lr"] = _learning_rate(float(group["lr"]), self._options)

    def close(self) -> None:
        """Free the captured step and what holds the processes' group.

        NCCL does not end while a graph holds its kernels.
        """
        if self._replay:
            self._replay.close()
        self._together = self.net

    def _parts(self) -> dict[str, Any]:
        copies = {"float32": self._copies} if self._copies else {}
        return {
            "net": self.net,
            **copies,
            "optimizer": self._optimizer,
            "lr_scheduler": self._lr_scheduler,
            "scaler": self._scaler,
        }


def _learning_rate(lr: float, options: Options) -> float | torch.Tensor:
    """On a GPU a tensor, which a captured step reads anew at each replay."""
    device = options.torch_device
    return torch.tensor(lr, device=device) if device.type == "cuda" else lr


def _sgd(weights: Iterable[nn.Parameter], options: Options) -> torch.optim.Optimizer:
    weights, fused = [*weights], options.torch_device.type == "cuda"
    lr = _learning_rate(options.lr, options)
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=options.momentum, fused=fused)
    for p in weights if fused and options.momentum else ():
        # torch's fused kernel leaves a buffer uninitialised that it makes in a step that is skipped.
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _adam(weights: Iterable[nn.Parameter], options: Options) -> torch.optim.Optimizer:
    fused = options.torch_device.type == "cuda"
    lr = _learning_rate(options.lr, options)
    return torch.optim.Adam(weights, lr=lr, fused=fused, capturable=fused)


_OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], Options], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
}


def check_outputs(spikes: torch.Tensor, N: int, classes: int) -> None:
    """Refuse what is neither firing rates [N, classes] nor spikes [T, N, classes].

    Raises:
        UsageError: It is not.
    """
    shape = list(spikes.shape)
    if len(shape) not in (2, 3) or shape[-2] != N or shape[-1] < classes:
        raise UsageError(
            f"the network gives {shape} for {N} samples of {classes} classes; it must give firing "
            f"rates [{N}, {classes}] or spikes [T, {N}, {classes}]"
        )


@torch.no_grad()
def evaluate(
    net: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    batch_size: int = 128,
    ranks: Ranks = ALONE,
    loss: losses.Loss = losses.mse,
) -> tuple[float, float]:
    """Mean loss and accuracy of ``net`` on samples x [N, ...] of classes y [N]."""
    training = net.training
    net.eval()
    sums = torch.zeros(2, device=x.device, dtype=torch.double)
    for samples, label in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        samples, label = ranks.share(samples), ranks.share(label)
        if not len(label):
            continue  # fewer samples than processes
        spikes = net(samples)
        sums[0] += loss(spikes, label).double() * len(label)
        sums[1] += (losses.rates(spikes).argmax(1) == label).sum()
        sources.reset(net)
    net.train(training)
    mean, right = (ranks.total(sums) / len(y)).tolist()
    return mean, right


def separate_norms(net: nn.Module, options: Options, ranks: Ranks) -> int:
    """How many parts of a batch have batch norms take statistics of their own."""
    norms = any(isinstance(m, _BatchNorm) for m in net.modules())
    return ranks.size if norms and not options.sync_batch_norm else 1


def _set_backend(net: nn.Module, backend: Backend) -> None:
    from ..targets.cuda import FusedNode

    nodes = [m for m in net.modules() if isinstance(m, FusedNode)]
    if not nodes:
        raise UsageError(
            f"--backend {backend}: the network has no neuron layer of spikeport.targets.cuda, which "
            "the backend is of; use these layers, or leave --backend out"
        )
    for node in nodes:
        node.backend = backend
