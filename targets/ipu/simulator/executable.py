"""A compiled model on the simulated device: its graph, its weights, and how a call runs.

A combined batch is cut into slices [D, G, R]: device iterations, accumulated micro-batches,
replicas, the replica changing fastest. Each device iteration makes one optimizer step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import returned
from .errors import Error
from .graph import Graph, Slot, replace, slots
from .settings import warn
from .updates import Updater

FINAL, EVERY_N, ALL, SUM = range(4)


@dataclass(frozen=True)
class Schedule:
    """How a combined batch runs.

    Attributes:
        iterations: Device iterations, D.
        accumulation: Micro-batches of an optimizer step, G.
        replicas: Replicas, R.
        mean: Whether gradients are averaged over G and R rather than added.
        output_mode: Which outputs come back.
        period: N of the mode EveryN.
    """

    iterations: int = 1
    accumulation: int = 1
    replicas: int = 1
    mean: bool = True
    output_mode: int = FINAL
    period: int = 1

    @property
    def slices(self) -> int:
        """Micro-batches of a combined batch."""
        return self.iterations * self.accumulation * self.replicas

    @property
    def returned(self) -> int:
        """Micro-batches whose outputs come back, concatenated."""
        if self.output_mode == ALL:
            return self.slices
        if self.output_mode == EVERY_N:
            return self.slices // self.iterations * (self.iterations // self.period)
        return self.replicas


@dataclass(frozen=True)
class Training:
    """What a trained model has besides.

    Attributes:
        loss: Slot of its loss.
        trained: Names of the weights that get a gradient.
        updater: The optimizer on the device.
        reduce: Adds gradients of other processes, in place; how many processes there are.
    """

    loss: int
    trained: tuple[str, ...]
    updater: Updater
    reduce: tuple[Callable[[Tensor], None], int] | None = None


class Executable:
    """A compiled model.

    Args:
        graph: The traced model, planned.
        weights: Its parameters and buffers on the device.
        schedule: How a combined batch runs.
        training: What training needs; None in inference.
        anchors: Slot, output mode and period of inner tensors that come back.
        check_floats: Whether a number that is not finite is an error.
    """

    def __init__(
        self,
        graph: Graph,
        weights: dict[str, Tensor],
        schedule: Schedule,
        training: Training | None = None,
        anchors: Mapping[str, tuple[int, int, int]] | None = None,
        check_floats: bool = False,
    ) -> None:
        self.graph = graph
        self.weights = weights
        self.schedule = schedule
        self.training = training
        self._anchors = dict(anchors or {})
        self._check_floats = check_floats
        self._warned = False
        self.anchored: dict[str, Tensor] = {}
        self._outputs = tuple(dict.fromkeys(s.index for s in slots(graph.outputs)))
        written = {name for name, slot in graph.weights.items() if slot in graph.written}
        self._replicas = [weights] + [  # each replica writes its own buffers
            {n: t.clone() if n in written else t for n, t in weights.items()}
            for _ in range(schedule.replicas - 1)
        ]

    def reload_buffers(self) -> None:
        """Give every replica the buffers of the first."""
        for replica in self._replicas[1:]:
            for name, value in replica.items():
                if value is not self.weights[name]:
                    value.copy_(self.weights[name])

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """One call.

        Args:
            inputs: The combined batch.

        Returns:
            The outputs, in the structure that forward returns.
        """
        plan = self.schedule
        sizes = [t.shape[0] // plan.slices if t.dim() else 0 for t in inputs]
        wanted = {(slot, plan.output_mode, plan.period) for slot in self._outputs}
        wanted.update(self._anchors.values())
        collected: dict[tuple[int, int, int], list[list[Tensor]]] = {key: [] for key in wanted}
        place = 0
        for iteration in range(plan.iterations):
            gradients: dict[str, Tensor] = {}
            for accumulated in range(plan.accumulation):
                last = (iteration, accumulated) == (plan.iterations - 1, plan.accumulation - 1)
                row: dict[int, list[Tensor]] = {slot: [] for slot, _, _ in wanted}
                for replica in range(plan.replicas):
                    part = [
                        t.narrow(0, place * size, size) if size else t
                        for t, size in zip(inputs, sizes, strict=True)
                    ]
                    env = self._micro_batch(part, self._replicas[replica], gradients)
                    for slot, values in row.items():
                        values.append(env[slot].detach())
                    place += 1
                for key, rows in collected.items():
                    _collect(rows, row[key[0]], key[1], (iteration + 1) % key[2] == 0, last)
            if self.training is not None:
                self._update(gradients)
        for name, key in self._anchors.items():
            self.anchored[name] = returned(_joined(collected[key]))
        results = {
            slot: returned(_joined(collected[slot, plan.output_mode, plan.period]))
            for slot in self._outputs
        }
        return replace(self.graph.outputs, lambda v: results[v.index] if isinstance(v, Slot) else v)

    def _micro_batch(
        self, inputs: Sequence[Tensor], weights: Mapping[str, Tensor], gradients: dict[str, Tensor]
    ) -> list[Any]:
        training = self.training
        if training is None:
            with torch.no_grad():
                return self.graph.replay(inputs, weights)
        with torch.enable_grad():
            env = self.graph.replay(inputs, weights)
        loss = env[training.loss]
        self._check_loss(loss)
        scale = training.updater.recipe.shared["loss_scaling"]
        leaves = [weights[name] for name in training.trained]
        if not leaves:
            return env
        made: Sequence[Tensor | None] = torch.autograd.grad(
            loss, leaves, torch.full_like(loss, scale), allow_unused=True
        )
        kind = training.updater.recipe.shared["accum_type"]
        for name, grad in zip(training.trained, made, strict=True):
            if grad is None:
                continue
            if name in gradients:
                gradients[name] += grad
            else:
                gradients[name] = grad.to(kind) if self.schedule.accumulation > 1 else grad
        return env

    def _update(self, gradients: dict[str, Tensor]) -> None:
        assert self.training is not None
        processes = 1
        if self.training.reduce is not None:
            reduce, processes = self.training.reduce
            for name in sorted(gradients):
                reduce(gradients[name])
        divisor = self.training.updater.recipe.shared["loss_scaling"]
        if self.schedule.mean:
            divisor *= self.schedule.accumulation * self.schedule.replicas * processes
        if divisor != 1:
            gradients = {name: grad.float() / divisor for name, grad in gradients.items()}
        for name, grad in gradients.items():
            self._check_finite(f"the gradient of {name}", grad)
        self.training.updater.step(gradients)

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not self._check_floats or bool(torch.isfinite(value).all()):
            return
        raise Error(
            f"Floating point exception on the device: {what} is not finite in optimizer step "
            f"{self._step}",
            "poplar_application_runtime_error",
        )

    def _check_loss(self, loss: Tensor) -> None:
        self._check_finite("the loss", loss)
        if self._warned or bool(torch.isfinite(loss).all()):
            return
        self._warned = True
        warn(
            f"the loss is not finite in optimizer step {self._step}. A device trains on without a "
            "word, unless Options.Precision.enableFloatingPointExceptions(True) stops it."
        )

    @property
    def _step(self) -> int:
        """Number of the optimizer step under way, from 1 on."""
        assert self.training is not None
        return self.training.updater.steps + 1

    def digest(self) -> str:
        """What tells this executable from another: its graph, shapes, types and schedule."""
        text = "\n".join(
            [str(self.graph), repr(sorted(self.graph.infos.items())), repr(self.schedule)]
            + ([repr(self.training.updater.recipe.kind)] if self.training is not None else [])
        )
        return hashlib.sha256(text.encode()).hexdigest()


def _collect(
    rows: list[list[Tensor]], row: list[Tensor], mode: int, period: bool, last: bool
) -> None:
    """Take in the outputs [R] of one micro-batch."""
    if mode == ALL or (mode == EVERY_N and period) or (mode == FINAL and last):
        rows.append([value.clone() for value in row])
    elif mode == SUM:
        if rows:
            rows[0] = [a + b for a, b in zip(rows[0], row, strict=True)]
        else:
            rows.append([value.clone() for value in row])


def _joined(rows: list[list[Tensor]]) -> Tensor:
    """[D, G, R] outputs concatenated along dimension 0; scalars become a vector."""
    values = [value for row in rows for value in row]
    if len(values) == 1:
        return values[0]
    return torch.stack(values) if values[0].dim() == 0 else torch.cat(values)
