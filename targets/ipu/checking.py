"""Everything that stops the training of a network, found on the simulation before anything compiles."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn

from ...converters import losses
from ...converters.errors import (
    CaptureError,
    CompileError,
    Finding,
    Findings,
    FindingsError,
    SpikeportError,
)
from ...converters.host import on_host
from ...converters.losses import Loss
from ...converters.surrogates import Surrogate
from . import sdk as poplar
from .lowering import plan, rewritten
from .model import TrainingModule


def check(
    net: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    loss: str | Loss = "ce_count",
    *,
    output: int = 0,
    surrogates: Mapping[str, Surrogate] | None = None,
) -> Findings:
    """All that :func:`~.model.training_module` and the compiler would refuse.

    Args:
        net: The network, as for ``training_module``.
        x: A micro-batch of samples [N, ...].
        y: Their classes [N]; zeros unless given.
        loss: As for ``training_module``, like what follows.
        output: Which of several outputs the loss is of.
        surrogates: Surrogate gradients by module path.

    Raises:
        UsageError: There is no such loss, or no neuron at a path of ``surrogates``.
    """
    loss = loss if callable(loss) else losses.named(loss)
    label = torch.zeros(len(x), dtype=torch.long) if y is None else y
    try:
        net, (x, label) = on_host(net, (x, label))
    except CaptureError as error:
        return error.findings
    plans, findings = plan(net, surrogates)
    neurons = {f.where for f in findings if f.rule != "float64"}
    if x.dtype == torch.float64:
        findings.append(_wide())
        x = x.float()
    traced: list[Finding] = []
    try:
        rehearse(TrainingModule(rewritten(net, plans), loss, output).train(), x, label)
    except FindingsError as error:
        traced = [f for f in error.findings if not f.where or f.where not in neurons]
    except SpikeportError as error:
        traced = [] if neurons else [_fails(error)]  # what a neuron left as it is may do
    return Findings([*findings, *traced])


def rehearse(
    model: TrainingModule, x: torch.Tensor, y: torch.Tensor, *, unlimited: bool = False
) -> None:
    """Compile a model in train mode for a micro-batch on the simulation.

    Args:
        model: The model.
        x: Samples [N, ...].
        y: Their classes [N].
        unlimited: Whether the estimate of memory may be any.

    Raises:
        UnsupportedError: With everything that the compiler would refuse.
        CompileError: Its forward fails.
    """
    simulator = importlib.import_module(".simulator", __package__)
    name, model.sdk = model.sdk, simulator.poptorch.__name__
    executor = simulator.poptorch.trainingModel(model)
    with ExitStack() as stack:
        stack.callback(setattr, model, "sdk", name)
        stack.callback(executor.destroy)
        if unlimited:
            stack.enter_context(simulator.settings(memory_mb=10**9))
        with poplar.errors(simulator.poptorch, CompileError, "refused the model"):
            executor.compile(x, y)


def _wide() -> Finding:
    return Finding(
        rule="float64",
        where="",
        found="samples of float64",
        allowed="float32",
        fix="call x.float()",
    )


def _fails(error: SpikeportError) -> Finding:
    return Finding(
        rule="forward-fails",
        where="",
        found=str(error),
        allowed="a network and a loss that run on the example",
        fix="give samples of the shape that it takes, or mend its forward",
    )
