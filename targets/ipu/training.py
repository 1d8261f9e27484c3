"""Trains a :class:`~.model.TrainingModule` through ``poptorch``.

A call takes D x G x R micro-batches: D optimizer steps (``device_iterations``), each from G accumulated
micro-batches (``gradient_accumulation``) on each of R replicas. Gradients are means over G and R, so
that a step is that of one batch of all their samples.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...converters.errors import (
    CheckpointError,
    CompileError,
    DeviceError,
    SpikeportError,
    UsageError,
)
from ...converters.losses import rates
from . import sdk as poplar
from .checking import rehearse
from .model import TrainingModule

_OPTIMIZERS = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "lamb": "LAMB",
}
_COUNTS = ("device_iterations", "gradient_accumulation", "replicas")
_logger = logging.getLogger(__name__)


class Trainer:
    """A model in training on the device; :func:`trainer` describes the arguments.

    Attributes:
        model: The model; its weights are the device's whenever they are looked at.
        steps: How many calls of :meth:`step` there were.
    """

    def __init__(
        self,
        model: TrainingModule,
        sdk: Any,
        options: Any,
        optimizer: Any,
        counts: tuple[int, int, int],
        pipelined: frozenset[str],
    ) -> None:
        self.model, self.steps = model, 0
        self._sdk, self._options, self._optimizer = sdk, options, optimizer
        self._counts, self._pipelined = counts, pipelined
        self._executor: Any = None
        self._inference: dict[torch.Size, Any] = {}
        self._shape: torch.Size | None = None
        self._classes = 0

    @property
    def slices(self) -> int:
        """Micro-batches in one call."""
        D, G, R = self._counts
        return D * G * R

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of what goes in."""
        return next(self.model.parameters()).dtype

    def loader(self, dataset: Any, batch_size: int, *, shuffle: bool = True, **options: Any) -> Any:
        """Batches (x, y) for :meth:`step`, each of D x G x R x ``batch_size`` samples.

        What is left at the end of an epoch is no batch, and left out.

        Args:
            dataset: Samples and classes.
            batch_size: Samples of a micro-batch.
            shuffle: Whether the order is random.
            **options: Of ``poptorch.DataLoader``.

        Raises:
            UsageError: The data are no batch, or an option is refused.
        """
        if batch_size < 1:
            raise UsageError(f"the batch size is {batch_size}; it must be at least 1")
        combined = batch_size * self.slices
        if len(dataset) < combined:
            D, G, R = self._counts
            raise UsageError(
                f"{len(dataset)} samples are no batch of {combined} = device_iterations {D} x "
                f"gradient_accumulation {G} x replicas {R} x batch_size {batch_size}; lower one"
            )
        if left := len(dataset) % combined:
            _logger.info(
                "%d of %d samples are no whole batch of %d and are left out of each epoch",
                *(left, len(dataset), combined),
            )
        try:
            return self._sdk.DataLoader(
                self._options,
                dataset,
                batch_size=batch_size,
                shuffle=shuffle,
                drop_last=options.pop("drop_last", True),
                **options,
            )
        except (AssertionError, TypeError, ValueError) as error:
            raise UsageError(f"poptorch.DataLoader: {error}") from error

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """D steps of the optimizer on samples x [N, ...] of classes y [N]; the first call compiles.

        Returns:
            Spikes [T, N, C], or firing rates [N, C], and the mean loss.

        Raises:
            UsageError: x and y do not fit each other, the model, or the number of micro-batches.
            UnsupportedError: With everything in the model that cannot be compiled.
            CompileError: The compiler failed.
            DeviceError: The run failed.
            SpikeportError: The loss is not finite.
        """
        self._check(x, y)
        x = x.to(self.dtype) if x.is_floating_point() else x
        if self._executor is None:
            self._compile(x, y)
        _check_labels(y, self._classes)
        if not self._executor.isAttachedToDevice():
            self._executor.attachToDevice()
        with poplar.errors(self._sdk, DeviceError, "failed in a training step"):
            spikes, loss = self._executor(x, y)
        self.steps += 1
        if wrong := [i for i, finite in enumerate(torch.isfinite(loss.flatten())) if not finite]:
            raise SpikeportError(
                f"the loss is {loss.flatten()[wrong[0]].item()} in step {self.steps}, micro-batch "
                f"{wrong[0] + 1} of {self.slices}: the training diverged; lower lr"
                + (", or give loss_scaling" if self.dtype == torch.half else "")
            )
        return _time_first(spikes), loss.float().mean()

    def evaluate(
        self, x: torch.Tensor, y: torch.Tensor, batch_size: int = 128
    ) -> tuple[float, float]:
        """Mean loss and accuracy on samples x [N, ...] of classes y [N], in eval mode.

        The last batch is padded to ``batch_size``, and the padding cut off.

        Raises:
            UsageError: x and y do not fit each other or the model, or there are none.
            UnsupportedError, CompileError, DeviceError: As in :meth:`step`.
        """
        if problems := _problems(x, y):
            raise UsageError("; ".join(problems))
        batch_size = min(batch_size, len(x))
        self._release()
        executor = self._inference_model(x[:batch_size].to(self.dtype))
        loss, right = 0.0, 0
        for samples, label in zip(
            torch.split(x, batch_size), torch.split(y, batch_size), strict=True
        ):
            N = len(label)
            fill = samples[-1:].expand(batch_size - N, *samples.shape[1:])
            with poplar.errors(self._sdk, DeviceError, "failed in an evaluation"):
                spikes = executor(torch.cat([samples, fill]).to(self.dtype))
            spikes = _time_first(spikes[:N].float())
            _check_labels(label, spikes.shape[-1])
            loss += float(self.model.loss(spikes, label)) * N
            right += int((rates(spikes).argmax(1) == label).sum())
        executor.detachFromDevice()
        return loss / len(y), right / len(y)

    def set_lr(self, lr: float) -> None:
        """Take another learning rate from the next step on."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._executor is not None:
            self._executor.setOptimizer(self._optimizer)

    def state(self) -> dict[str, Any]:
        """All that :meth:`load_state` needs: ``net``, the network's state dict, and ``optimizer``."""
        net = {n: v.detach().clone() for n, v in self.model.state_dict().items()}
        return {"net": net, "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`; without ``optimizer``, from its weights.

        Raises:
            RuntimeError, ValueError, KeyError: It is of another network.
        """
        self.close()
        self.model.load_state_dict(state["net"])
        if "optimizer" in state:
            self._optimizer.load_state_dict(state["optimizer"])

    def save(self, path: str | Path) -> None:
        """Write :meth:`state`; ``net`` in it loads into the network on every target."""
        torch.save(self.state(), path)

    def load(self, path: str | Path) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            CheckpointError: It is none, or of another network.
        """
        try:
            self.load_state(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is of another network: {error}") from error

    def close(self) -> None:
        """Free the device; the model keeps its weights, and the next step compiles again."""
        for executor in (self._executor, *self._inference.values()):
            if executor is not None:
                executor.destroy()
        self._executor, self._inference = None, {}

    # The device

    def _compile(self, x: torch.Tensor, y: torch.Tensor) -> None:
        size = len(x) // self.slices
        self._look(x[:size])
        _check_labels(y, self._classes)
        self.model.train()
        if not poplar.is_simulated(self._sdk):  # let the simulation say all at once
            rehearse(self.model, x[:size], y[:size], unlimited=True)
        try:
            executor = self._sdk.trainingModel(self.model, self._options, self._optimizer)
        except RuntimeError as error:
            raise UsageError(f"the model is being trained already: {error}") from error
        try:
            with poplar.errors(self._sdk, CompileError, "refused the model"):
                executor.compile(x, y)
        except BaseException:
            executor.destroy()
            raise
        self._executor, self._shape = executor, x.shape

    def _look(self, x: torch.Tensor) -> None:
        """Run one micro-batch on the host: how many classes there are, and what is called how often."""
        calls: dict[str, int] = {}

        def count(path: str) -> Any:
            def hook(*_: Any) -> None:
                calls[path] = calls.get(path, 0) + 1

            return hook

        hooks = [
            self.model.net.get_submodule(path).register_forward_pre_hook(count(path))
            for path in self._pipelined
        ]
        self.model.eval()
        with torch.no_grad():
            if x.dtype == torch.half:  # which an older torch cannot compute on a host
                spikes = copy.deepcopy(self.model).float()(x.float())
            else:
                spikes = self.model(x)
        for hook in hooks:
            hook.remove()
        if again := [f"{path} {n} times" for path, n in sorted(calls.items()) if n > 1]:
            raise UsageError(
                f"a stage of a pipeline is entered once in a forward, and the network calls "
                f"{', '.join(again)}; take execution='sharded', or a network that computes a layer for "
                "all time steps at once"
            )
        self._classes = spikes.shape[-1]

    def _inference_model(self, x: torch.Tensor) -> Any:
        executor = self._inference.get(x.shape)
        if executor is None:
            self.model.eval()
            executor = self._sdk.inferenceModel(self.model, self._sdk.Options())
            with poplar.errors(self._sdk, CompileError, "refused the model in eval mode"):
                executor.compile(x)
            self.model.train()
            self._inference[x.shape] = executor
        elif not executor.isAttachedToDevice():
            executor.attachToDevice()
        return executor

    def _release(self) -> None:
        """Let the training's device go, its weights to the host."""
        if self._executor is not None and self._executor.isAttachedToDevice():
            self._executor.detachFromDevice()

    # What is given

    def _check(self, x: torch.Tensor, y: torch.Tensor) -> None:
        D, G, R = self._counts
        problems = _problems(x, y)
        if len(x) % self.slices:
            problems.append(
                f"{len(x)} samples do not divide into {self.slices} micro-batches = "
                f"device_iterations {D} x gradient_accumulation {G} x replicas {R}"
            )
        if self._shape is not None and self._executor is not None and x.shape != self._shape:
            problems.append(
                f"x is {list(x.shape)}, and the model was compiled for {list(self._shape)}; leave a "
                "last partial batch out, as loader() does, or close() the trainer first"
            )
        if problems:
            raise UsageError("; ".join(problems))


def _problems(x: torch.Tensor, y: torch.Tensor) -> list[str]:
    """Why samples and classes are none that a network learns from."""
    problems = []
    if not len(x):
        problems.append("there are no samples")
    if len(x) != len(y):
        problems.append(f"x has {len(x)} samples and y {len(y)}")
    if x.dtype == torch.float64:
        problems.append("x is float64, which the device does not have; give float32")
    if y.dim() != 1 or y.is_floating_point():
        problems.append(f"y is {y.dtype} {list(y.shape)}; allowed: classes [N]")
    return problems


def _check_labels(y: torch.Tensor, classes: int) -> None:
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"classes {low} to {high}, and the network has {classes} outputs; allowed: 0 to "
            f"{classes - 1}"
        )


def trainer(
    model: TrainingModule,
    optimizer: str = "adam",
    lr: float = 1e-3,
    *,
    device_iterations: int = 1,
    gradient_accumulation: int = 1,
    replicas: int = 1,
    half: bool = False,
    simulator: bool = False,
    executable_cache: str | Path | None = None,
    blocks: Mapping[str, int] | None = None,
    execution: Literal["pipelined", "sharded"] = "pipelined",
    seed: int | None = None,
    **parameters: Any,
) -> Trainer:
    """A trainer of a model on the IPU, or on its simulation.

    Args:
        model: What :func:`~.model.training_module` gives.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"rmsprop"`` or ``"lamb"``, poptorch's.
        lr: Learning rate.
        device_iterations: Steps of the optimizer in one call.
        gradient_accumulation: Micro-batches that give one step.
        replicas: Copies of the model that work on different micro-batches. Batch norms take the
            statistics of their own replica's.
        half: Whether weights and activations are float16; the loss is float32.
        simulator: Whether the simulated SDK stands in.
        executable_cache: Directory for compiled executables.
        blocks: IPU of the layers from each module path on.
        execution: How IPUs work on these blocks: on several micro-batches at a time, or in turn.
        seed: Of random numbers, on the host too.
        **parameters: Of the optimizer, such as betas, momentum, weight_decay and loss_scaling.

    Raises:
        UsageError: With everything that cannot be used.
        TargetUnavailableError: There is no SDK; says how to get it.
    """
    if not isinstance(model, TrainingModule):
        raise UsageError(
            f"the model is a {type(model).__name__}; give ipu.training_module(net, loss=...), which "
            "rewrites the network so that the device can train it"
        )
    counts = (device_iterations, gradient_accumulation, replicas)
    paths = dict(model.net.named_modules())
    problems = [
        f"{name} is {value!r}; it must be a whole number, at least 1"
        for name, value in zip(_COUNTS, counts, strict=True)
        if not isinstance(value, int) or value < 1
    ]
    if optimizer not in _OPTIMIZERS:
        problems.append(f"no optimizer {optimizer!r}; there are {', '.join(_OPTIMIZERS)}")
    if execution not in ("pipelined", "sharded"):
        problems.append(f"execution is {execution!r}; allowed: pipelined, sharded")
    if unknown := [path for path in blocks or {} if path not in paths or not path]:
        problems.append(
            f"no module {', '.join(map(repr, unknown))} to begin a block at; there are "
            f"{', '.join(filter(None, paths))}"
        )
    if not any(p.requires_grad for p in model.parameters()):
        problems.append("the network has no parameters that learn; there is nothing to train")
    if problems:
        raise UsageError("; ".join(problems))
    sdk = poplar.load(simulator)
    model.sdk = sdk.__name__
    if half:
        model.half()
    options = sdk.Options()
    options.deviceIterations(device_iterations).replicationFactor(replicas)
    options.Training.gradientAccumulation(gradient_accumulation)
    options.outputMode(sdk.OutputMode.All)
    if replicas > 1 and any(isinstance(m, _BatchNorm) for m in paths.values()):
        options.broadcastBuffers(False)
    if seed is not None:
        options.randomSeed(seed)
    if executable_cache is not None:
        options.enableExecutableCaching(str(executable_cache))
    if blocks:
        _begin_blocks(sdk, paths, blocks)
        strategy = sdk.PipelinedExecution if execution == "pipelined" else sdk.ShardedExecution
        options.setExecutionStrategy(strategy(sdk.AutoStage.SameAsIpu))
    made = getattr(sdk.optim, _OPTIMIZERS[optimizer])
    try:
        chosen = made(model.parameters(), lr=lr, **parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {optimizer}: {error}") from error
    pipelined = frozenset(blocks or ()) if execution == "pipelined" else frozenset()
    return Trainer(model, sdk, options, chosen, counts, pipelined)


def _begin_blocks(sdk: Any, paths: Mapping[str, nn.Module], blocks: Mapping[str, int]) -> None:
    sdk.removeBlocks(paths[""])
    for path, ipu in blocks.items():
        sdk.BeginBlock(paths[path], user_id=path, ipu_id=ipu)


def _time_first(spikes: torch.Tensor) -> torch.Tensor:
    """[T, N, C] of [N, T, C]; firing rates [N, C] as they are."""
    return spikes.transpose(0, 1) if spikes.dim() > 2 else spikes
