"""Source against device: accuracy, agreement, and what differs by more than rounding explains."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..converters import sources
from ..converters.errors import UsageError
from ..converters.returned import tensors
from ..converters.verify import difference
from .judge import (
    ORIGIN,
    Divergence,
    Judge,
    LayerReport,
    OutputReport,
    Runs,
    largest_of,
    taken,
)
from .model import classes


@dataclass(frozen=True)
class Report:
    """What :func:`compare` found.

    Attributes:
        target: Name of the target.
        samples: Samples compared.
        source_accuracy: Fraction that the source classifies right.
        device_accuracy: Fraction that the device classifies right.
        agreement: Fraction where both predict the same.
        source_seconds: Time that the source took.
        device_seconds: Time that the device took.
        difference: Largest difference of an output's value.
        probed: Samples whose spikes and outputs were judged layer by layer.
        layers: The layers, in the order of execution; empty without probes.
        outputs: The outputs, likewise.
        divergence: The first spike that differs on the same input, or None.
        note: What else there is to say.
    """

    target: str
    samples: int
    source_accuracy: float
    device_accuracy: float
    agreement: float
    source_seconds: float
    device_seconds: float
    difference: float = 0.0
    probed: int = 0
    layers: tuple[LayerReport, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    divergence: Divergence | None = None
    note: str = ""
    disagreeing: tuple[int, ...] = field(default=(), repr=False)

    @property
    def explained(self) -> bool | None:
        """Whether rounding explains all that differs; None if no sample was judged."""
        if not self.probed:
            return None
        unexplained = [x.unexplained for x in self.layers] + [x.unexplained for x in self.outputs]
        return not any(unexplained)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        data: dict[str, Any] = pytree.tree_map(_in_json, asdict(self))
        return {**data, "explained": self.explained}

    def __str__(self) -> str:
        lines = [
            f"{self.samples} samples",
            f"  source accuracy  {self.source_accuracy:.2%}",
            f"  device accuracy  {self.device_accuracy:.2%}   ({self.target})",
            f"  agreement        {self.agreement:.2%}   "
            f"({round(self.samples * (1 - self.agreement))} predictions differ)",
            f"  outputs          differ by up to {self.difference:.3g}",
        ]
        if self.layers:
            lines.append(f"spikes that differ, by layer and time step, on {self.probed} samples:")
            width = max(len(layer.layer) for layer in self.layers)
            for layer in self.layers:
                rates = "  ".join(f"t={t} {d:.3%}" for t, d in enumerate(layer.differing))
                lines.append(f"  {layer.layer.ljust(width)}  {rates}")
            if self.divergence is None:
                lines.append("no spike differs")
            else:
                lines.append(f"first divergence: {self.divergence}")
        if self.explained is False:
            wrong = [(x.layer, "spikes", x.unexplained) for x in self.layers]
            wrong += [(x.output, "values", x.unexplained) for x in self.outputs]
            told = ", ".join(f"{name} ({n} {what})" for name, what, n in wrong if n)
            lines.append(f"NOT explained by rounding: {told}")
        elif self.divergence is not None:
            lines.append(
                "every spike that differs lies at the threshold within the device's rounding"
            )
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def compare(
    net: nn.Module,
    model: Runs,
    loader: Iterable[Any],
    *,
    layers: int = 64,
    progress: bool = False,
) -> Report:
    """Run a network and what was compiled from it on the same data.

    The source is evaluated in eval mode, each batch from the state before the first step.

    Args:
        net: The source network.
        model: The loaded artifact.
        loader: Batches (x, y), tensors or NumPy arrays: images [N, ...], or events [T, N, ...] if the
            network was converted for those, or a tuple of a network's several inputs; and labels [N],
            [N, 1] or one-hot [N, C]. N need not be the compiled batch.
        layers: On how many samples to judge every layer and output; 0 for none.
        progress: Whether to show a bar on a terminal.

    Raises:
        UsageError: The loader is empty or gives something else, its labels are not as many as its inputs,
            the outputs are no class scores, the artifact was compiled from another network, or ``layers``
            is below 0.
    """
    if layers < 0:
        raise UsageError(f"layers is {layers}; allowed: a number of samples, 0 for none")
    try:
        iter(loader)
    except TypeError as error:
        raise UsageError(f"the loader is {loader!r}; give an iterable of {_PAIRS}") from error
    right = torch.zeros(2, dtype=torch.int64)
    seconds = [0.0, 0.0]
    samples, disagreeing, off = 0, list[int](), 0.0
    judge = Judge(net, model)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with tqdm(unit=" samples", disable=None if progress else True) as bar, torch.no_grad():
            for part, labels in _parts(loader, model):
                start = time.perf_counter()
                given = model(*part)
                middle = time.perf_counter()
                expected = _source(net, part, model)
                seconds[0] += time.perf_counter() - middle
                seconds[1] += middle - start
                _check_outputs(expected, given)
                if samples < layers and model.has_probes:
                    judge.add(part, samples)
                ours, theirs = (_predicted(outputs, model) for outputs in (expected, given))
                off = max([off, *map(_largest, *map(tensors, (expected, given)))])
                if not len(ours) == len(theirs) == len(labels):
                    raise UsageError(
                        f"{len(labels)} samples, of which the source classifies {len(ours)} and the "
                        f"device {len(theirs)}; the first output has to have scores [N, C], "
                        "[T, N, C] or [N, T, C] of every sample"
                    )
                right += torch.stack([(p == labels).sum() for p in (ours, theirs)])
                wrong = (ours != theirs).nonzero().flatten() + samples
                disagreeing += wrong.tolist()
                samples += len(labels)
                bar.update(len(labels))
    finally:
        for module, training in modes:
            module.training = training
    if not samples:
        raise UsageError("the loader gives no batch; compare needs at least one sample")
    note = ""
    if not model.has_probes and layers:
        note = (
            "layers are not compared, so nothing says whether rounding explains what differs: the "
            "artifact has no probes (compile with probe=True)"
        )
    return Report(
        target=model.target,
        samples=samples,
        source_accuracy=right[0].item() / samples,
        device_accuracy=right[1].item() / samples,
        agreement=1 - len(disagreeing) / samples,
        source_seconds=seconds[0],
        device_seconds=seconds[1],
        difference=off,
        probed=judge.samples,
        layers=judge.layers(),
        outputs=judge.outputs(),
        divergence=judge.first,
        note=note,
        disagreeing=tuple(disagreeing),
    )


_PAIRS = (
    "pairs (x, y): x a tensor or a NumPy array, or a tuple of them if the network has several inputs, and "
    "as many labels y, classes [N] or [N, 1] or one-hot [N, C]"
)


def _parts(
    loader: Iterable[Any], model: Runs
) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """The inputs and labels [N] of each batch, in parts of up to the compiled batch."""
    dims = model.batch_dims
    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise UsageError(f"the loader gives a {_found(batch)}{count}; allowed: {_PAIRS}")
        x, labels = batch[0], _labels(batch[1])
        inputs = tuple(map(_input, x if isinstance(x, (tuple, list)) else (x,)))
        pairs = [*zip(inputs, dims, strict=False)]
        sized = [(x, d) for x, d in pairs if d is not None]
        if len(inputs) != len(dims) or not sized or any(x.dim() <= d for x, d in sized):
            yield inputs, labels  # the model says what is wrong, if anything is
            continue
        counts = sorted({x.shape[d] for x, d in sized})
        if counts != [len(labels)]:
            raise UsageError(
                f"a batch of {' and '.join(map(str, counts))} inputs and {len(labels)} labels"
            )
        first = 0
        for part in torch.split(labels, model.batch):
            now = (x if d is None else x.narrow(d, first, len(part)) for x, d in pairs)
            yield tuple(now), part
            first += len(part)


def _input(x: Any) -> torch.Tensor:
    if isinstance(x, np.ndarray):
        with suppress(TypeError, ValueError):  # objects, texts
            return torch.as_tensor(x)
    if not isinstance(x, torch.Tensor):
        raise UsageError(f"an input of the loader is a {_found(x)}; allowed: {_PAIRS}")
    return x


def _labels(y: Any) -> torch.Tensor:
    """Labels as classes [N], on the CPU."""
    found: torch.Tensor | None = None
    if isinstance(y, (torch.Tensor, np.ndarray, list, tuple)):
        with suppress(TypeError, ValueError, RuntimeError):  # texts, ragged lists
            found = torch.as_tensor(y).cpu()
    if found is not None and found.dim() == 2:
        hot = found != 0
        if found.shape[1] == 1:
            found = found[:, 0]
        elif (hot.sum(1) == 1).all():
            found = classes(hot)
    if found is None or found.dim() != 1 or (found != found.long()).any():
        raise UsageError(f"the labels of a batch are a {_found(y)}; allowed: {_PAIRS}")
    return found


def _found(value: Any) -> str:
    shape = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else ""
    return f"{type(value).__name__} {shape}".rstrip()


def predictions(
    outputs: Any,
    batch_dim: int | None = None,
    steps: int | None = None,
    time_dim: int | None = None,
) -> torch.Tensor:
    """The class of each sample, of the largest of the first output's scores; of their means over time.

    Args:
        outputs: The first is [N, C], [T, N, C], [N, T, C], or [N, C, T] with T == ``steps`` != C.
        batch_dim: Which of its dimensions is N; the one before the last unless given.
        steps: T, if it is known.
        time_dim: Which of its dimensions is T, if that is known.

    Raises:
        UsageError: The first output has another shape.
    """
    found = tensors(outputs)
    if not found:
        raise UsageError("the network returns no tensor, so there are no classes to read")
    scores = found[0]
    at = scores.dim() - 2 if batch_dim is None else batch_dim
    if scores.dim() == 3 and at < 2:
        if time_dim is None:
            time_dim = 2 if at == 0 and scores.shape[2] == steps != scores.shape[1] else 1 - at
        scores, at = scores.float().mean(time_dim), at - (time_dim < at)
    if scores.dim() != 2 or at != 0:
        samples = "" if batch_dim is None else f" with the samples in dimension {batch_dim}"
        raise UsageError(
            f"the first output has shape {list(scores.shape)}{samples}; classes are read from [N, C], "
            "[T, N, C], [N, T, C] or [N, C, T]"
        )
    return classes(scores)


def _predicted(outputs: Any, model: Runs) -> torch.Tensor:
    first = (model.output_dims[0], model.T, model.output_times[0])
    return predictions(outputs, *first).cpu()


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two outputs; those of other shapes are not compared."""
    return largest_of(difference(a.cpu(), b.cpu())) if a.shape == b.shape else 0.0


def _in_json(value: Any) -> Any:
    """A number as JSON has it, which knows no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _check_outputs(expected: Any, given: Any) -> None:
    """Make sure that network and artifact return tensors of the same kinds in the same places."""
    ours, theirs = (
        {pytree.keystr(place): _kind(y) for place, y in pytree.tree_flatten_with_path(outputs)[0]}
        for outputs in (expected, given)
    )
    differ = [
        f"output{place}: the network gives {ours.get(place, 'nothing')}, the artifact "
        f"{theirs.get(place, 'nothing')}"
        for place in {**ours, **theirs}
        if ours.get(place) != theirs.get(place)
    ]
    if not differ and [*ours] != [*theirs]:
        differ = [f"outputs {', '.join(ours)} in this order, the artifact's {', '.join(theirs)}"]
    if differ:
        raise UsageError(
            f"the artifact was compiled from another network: {'; '.join(differ)}; {ORIGIN}"
        )


def _kind(output: Any) -> str:
    if not isinstance(output, torch.Tensor):
        return repr(output)
    if output.is_floating_point():
        return "floating-point numbers"
    return "truth values" if output.dtype == torch.bool else "whole numbers"


def _source(net: nn.Module, inputs: Sequence[torch.Tensor], model: Runs) -> Any:
    sources.reset(net)
    try:
        result = net(*taken(net, inputs, model))
    except RuntimeError as error:
        raise UsageError(
            f"the network fails on inputs that the model takes: {error}; {ORIGIN}"
        ) from error
    sources.reset(net)
    return result
