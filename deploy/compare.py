"""Source against device: accuracy, agreement, and where their spikes part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from .. import targets as registry
from ..converters import sources
from ..converters.capture import capture
from ..converters.errors import UsageError
from ..converters.host import on_host
from ..converters.program import Program, Site, Time
from ..converters.rounding import Bounds
from ..converters.verify import Trace, first_flips, to_threshold
from .model import Port, classes, pad
from .pipeline import rewrite_for


class Runs(Protocol):
    """What is compared: a loaded model, with the batch that it was compiled for."""

    batch: int

    @property
    def target(self) -> str:
        """Name of the target."""

    @property
    def time(self) -> Time:
        """Whether the device runs all time steps at once, or one."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the compiled graph."""

    @property
    def has_probes(self) -> bool:
        """Whether the layers' spikes can be read."""

    @property
    def inputs(self) -> Sequence[Port]:
        """The inputs, in order."""

    @property
    def T(self) -> int | None:  # noqa: N802 -- the field's name
        """Time steps of a call, if they are known."""

    @property
    def batch_dims(self) -> Sequence[int | None]:
        """Which dimension of each input of a call is the batch."""

    @property
    def output_dims(self) -> Sequence[int | None]:
        """Which dimension of each output of a call is the batch."""

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The outputs for one batch."""

    def probe(self, *inputs: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
        """The outputs, and the spikes [T, N, ...] of each neuron layer."""


@dataclass(frozen=True)
class Divergence:
    """One spike that differs where everything before it is equal.

    Attributes:
        layer: The neuron layer.
        t: Time step.
        sample: Number of the sample.
        index: Index in the layer's output for one sample.
        source_spike: What the source did; the device did the other.
        h: Membrane potential after charging, in the source.
        v_threshold: Threshold.
        bound: How far rounding on the device can move h.
    """

    layer: str
    t: int
    sample: int
    index: tuple[int, ...]
    source_spike: bool
    h: float
    v_threshold: float
    bound: float

    def __str__(self) -> str:
        did, other = ("fired", "did not") if self.source_spike else ("did not fire", "did")
        return (
            f"{self.layer}, t={self.t}, sample {self.sample}, index {list(self.index)}: the source "
            f"{did} at h = {self.h:.6f} against {self.v_threshold:g}, the device {other}; "
            f"|h - threshold| = {abs(self.h - self.v_threshold):.2g}, rounding reaches {self.bound:.2g}"
        )


@dataclass(frozen=True)
class LayerReport:
    """One neuron layer.

    Attributes:
        layer: Its name.
        differing: Fraction of differing spikes at each time step.
        first: Samples whose spikes part in this layer first.
        unexplained: How many of the spikes where they part lie beyond the reach of rounding.
    """

    layer: str
    differing: tuple[float, ...]
    first: int
    unexplained: int


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
        probed: Samples whose spikes were compared.
        layers: The layers, in the order of execution; empty without probes.
        divergence: The first site where spikes part, or None.
        note: What else there is to say.
    """

    target: str
    samples: int
    source_accuracy: float
    device_accuracy: float
    agreement: float
    source_seconds: float
    device_seconds: float
    probed: int = 0
    layers: tuple[LayerReport, ...] = ()
    divergence: Divergence | None = None
    note: str = ""
    disagreeing: tuple[int, ...] = field(default=(), repr=False)

    @property
    def explained(self) -> bool:
        """Whether rounding explains every divergence that was looked at."""
        return not any(layer.unexplained for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {**asdict(self), "explained": self.explained}

    def __str__(self) -> str:
        lines = [
            f"{self.samples} samples",
            f"  source accuracy  {self.source_accuracy:.2%}",
            f"  device accuracy  {self.device_accuracy:.2%}   ({self.target})",
            f"  agreement        {self.agreement:.2%}   "
            f"({round(self.samples * (1 - self.agreement))} predictions differ)",
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
                lines.append(
                    "every first divergence lies at the threshold within the device's rounding"
                    if self.explained
                    else "NOT explained by rounding: "
                    + ", ".join(
                        f"{x.layer} ({x.unexplained})" for x in self.layers if x.unexplained
                    )
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
        layers: On how many samples to compare the spikes of every layer; 0 for none.
        progress: Whether to show a bar on a terminal.

    Raises:
        UsageError: The loader is empty or gives something else, its labels are not as many as its inputs,
            the outputs are no class scores, or the artifact was compiled from another network.
    """
    try:
        iter(loader)
    except TypeError as error:
        raise UsageError(f"the loader is {loader!r}; give an iterable of {_PAIRS}") from error
    right = torch.zeros(2, dtype=torch.int64)
    seconds = [0.0, 0.0]
    samples, disagreeing = 0, list[int]()
    spikes = _Spikes(net, model)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with tqdm(unit=" samples", disable=None if progress else True) as bar, torch.no_grad():
            for part, labels in _parts(loader, model):
                if samples < layers and model.has_probes:
                    spikes.compare(part, samples)
                start = time.perf_counter()
                theirs = predictions(model(*part), model.output_dims[0], model.T).cpu()
                middle = time.perf_counter()
                ours = predictions(_source(net, part, model), model.output_dims[0], model.T).cpu()
                seconds[0] += time.perf_counter() - middle
                seconds[1] += middle - start
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
        note = "layers are not compared: the artifact has no probes (compile with probe=True)"
    return Report(
        target=model.target,
        samples=samples,
        source_accuracy=right[0].item() / samples,
        device_accuracy=right[1].item() / samples,
        agreement=1 - len(disagreeing) / samples,
        source_seconds=seconds[0],
        device_seconds=seconds[1],
        probed=spikes.samples,
        layers=spikes.report(),
        divergence=spikes.first,
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
    outputs: Any, batch_dim: int | None = None, steps: int | None = None
) -> torch.Tensor:
    """The class of each sample, of the largest of the first output's scores; of their means over time.

    Args:
        outputs: The first is [N, C], [T, N, C], [N, T, C], or [N, C, T] with T == ``steps`` != C.
        batch_dim: Which of its dimensions is N; the one before the last unless given.
        steps: T, if it is known.

    Raises:
        UsageError: The first output has another shape.
    """
    found, _ = pytree.tree_flatten(outputs)
    if not found:
        raise UsageError("the network returns no tensor, so there are no classes to read")
    scores: torch.Tensor = found[0]
    at = scores.dim() - 2 if batch_dim is None else batch_dim
    if scores.dim() == 3 and at < 2:
        last = at == 0 and scores.shape[2] == steps != scores.shape[1]
        scores, at = scores.float().mean(2 if last else 1 - at), 0
    if scores.dim() != 2 or at != 0:
        samples = "" if batch_dim is None else f" with the samples in dimension {batch_dim}"
        raise UsageError(
            f"the first output has shape {list(scores.shape)}{samples}; classes are read from [N, C], "
            "[T, N, C], [N, T, C] or [N, C, T]"
        )
    return classes(scores)


def _source(net: nn.Module, inputs: Sequence[torch.Tensor], model: Runs) -> Any:
    sources.reset(net)
    try:
        result = net(*_taken(net, inputs, model))
    except RuntimeError as error:
        raise UsageError(
            f"the network fails on inputs that the model takes: {error}; {_ORIGIN}"
        ) from error
    sources.reset(net)
    return result


def _taken(net: nn.Module, inputs: Sequence[torch.Tensor], model: Runs) -> tuple[torch.Tensor, ...]:
    """The inputs where the network is; numbers with a fraction in its dtype, as the model takes them."""
    floating = next((p for p in net.parameters() if p.is_floating_point()), None)
    found = []
    for x, port in zip(inputs, model.inputs, strict=True):
        dtype = port.spec.dtype if floating is None else floating.dtype
        x = x if floating is None else x.to(floating.device)
        found.append(x.to(dtype) if x.is_floating_point() else x)
    return tuple(found)


_ORIGIN = "compare the artifact with the network that it was compiled from, or compile this one"


def _sample_dims(
    captured: Program,
    inputs: Sequence[torch.Tensor],
    batch_dims: Sequence[int | None],
    batch: int,
    spikes: Mapping[str, torch.Tensor],
) -> dict[str, int | None]:
    """Along which dimension of each site's spikes the samples lie: None where they lie among others.

    It follows from the sizes. Where these leave a choice, it is where the spikes follow when the samples
    are moved on by one.
    """
    fits = {n: [d for d in range(1, s.dim()) if s.shape[d] == batch] for n, s in spikes.items()}
    found = {name: dims[0] if dims else None for name, dims in fits.items()}
    if all(len(dims) < 2 for dims in fits.values()) or batch == 1:
        return found
    pairs = zip(inputs, batch_dims, strict=True)
    moved = Trace.of(captured, [x if d is None else x.roll(1, d) for x, d in pairs])
    for site in captured.sites:
        after, before = moved.fired(site), spikes[site.name] != 0
        off = {d: (after != before.roll(1, d)).sum() for d in fits[site.name]}
        found[site.name] = min(off, key=lambda d: off[d], default=None)
    return found


def _check_layers(
    own: Mapping[str, torch.Tensor], device: Mapping[str, torch.Tensor], batch: int, count: int
) -> None:
    """Make sure that the artifact has the network's layers; it gives ``count`` of ``batch`` samples."""

    def said(spikes: Mapping[str, torch.Tensor], name: str) -> str:
        return f"has {list(spikes[name].shape)}" if name in spikes else "has no such layer"

    differ = [
        f"{name}: the network {said(own, name)}, the artifact {said(device, name)}"
        for name in {**own, **device}
        if not (name in own and name in device)
        or own[name].dim() != device[name].dim()
        or any(
            a != b and (a, b) != (batch, count)
            for a, b in zip(own[name].shape, device[name].shape, strict=True)
        )
    ]
    if differ:
        raise UsageError(
            f"the artifact was compiled from another network, spikes [T, N, ...]: {'; '.join(differ)}; "
            f"{_ORIGIN}"
        )


class _Spikes:
    """Layer by layer, the source's spikes against the device's."""

    def __init__(self, net: nn.Module, model: Runs) -> None:
        self._net, self._model = net, model
        self._programs: tuple[Program, Program] | None = None
        self._dims: dict[str, int | None] | None = None
        self.samples = 0
        self.first: Divergence | None = None
        self._differing: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._unexplained: dict[str, int] = {}

    def _prepare(self, inputs: Sequence[torch.Tensor]) -> tuple[Program, Program]:
        if self._programs is None:
            whole = capture(*on_host(self._net, inputs))
            program = rewrite_for(whole, self._model.target, self._model.dtype, self._model.time)
            captured = program.captured or whole
            # The device rounds to its own type, whatever the graph's is.
            arithmetic = registry.get(self._model.target).capabilities.arithmetic
            self._programs = captured, replace(program, dtype=arithmetic or program.dtype)
        return self._programs

    def compare(self, inputs: Sequence[torch.Tensor], start: int) -> None:
        """Compare one batch, whose first sample has the number ``start``."""
        _, spikes = self._model.probe(*inputs)
        spikes = {name: s.cpu() for name, s in spikes.items()}
        dims, batch = self._model.batch_dims, self._model.batch
        count = next(
            (x.shape[d] for x, d in zip(inputs, dims, strict=True) if d is not None), batch
        )
        taken = _taken(self._net, inputs, self._model)
        padded = tuple(pad(x.cpu(), d, batch) for x, d in zip(taken, dims, strict=True))
        captured, program = self._prepare(padded)
        source = Trace.of(captured, padded)
        own = {site.name: source.fired(site).to(program.dtype) for site in captured.sites}
        _check_layers(own, spikes, batch, count)
        bounds = Bounds(program, padded, own)
        if self._dims is None:
            self._dims = _sample_dims(captured, padded, dims, batch, own)
        parted = torch.zeros(count, dtype=torch.bool)
        for theirs, mine in zip(captured.sites, program.sites, strict=True):
            dim = self._dims[theirs.name]

            def given(x: torch.Tensor, dim: int | None = dim) -> torch.Tensor:
                return x if dim is None else x.narrow(dim, 0, count)

            expected = given(own[theirs.name]) != 0
            differs = expected != (given(spikes[theirs.name]) != 0)
            by_step = differs.flatten(1).double().sum(1)
            self._differing[theirs.name] = self._differing.get(theirs.name, 0) + by_step
            elements = differs[0].numel()
            self._counts[theirs.name] = self._counts.get(theirs.name, 0) + elements
            if dim is None:  # one sample's difference is any other's
                here = (differs.any() & ~parted.any()).expand(count)
            else:
                here = differs.movedim(dim, 0).flatten(1).any(1) & ~parted
            if here.any():
                drive, reach = given(source.drive(theirs)), given(bounds.at(mine))
                self._part(theirs, drive, expected, differs, here, dim, reach, start, program.dtype)
            parted = parted | here
        self.samples += count

    def _part(
        self,
        site: Site,
        drive: torch.Tensor,
        expected: torch.Tensor,
        differs: torch.Tensor,
        here: torch.Tensor,
        dim: int | None,
        reach: torch.Tensor,
        start: int,
        dtype: torch.dtype,
    ) -> None:
        """Samples whose first difference lies in this layer: is it at the threshold?"""
        if dim is not None:
            differs = differs & here.reshape(-1, *[1] * (differs.dim() - 1)).movedim(0, dim)
        _, h, _ = site.neuron.trace(drive.float())
        neurons = differs.any(0)
        reach = reach[:, neurons].cumsum(0)
        first, outside = torch.zeros_like(differs), torch.zeros_like(differs)
        first[:, neurons] = first_flips(differs[:, neurons])
        distance, slack = to_threshold(site, neurons, h, drive, dtype, reach)
        outside[:, neurons] = first[:, neurons] & (distance > slack)
        self._first[site.name] = self._first.get(site.name, 0) + int(here.sum())
        self._unexplained[site.name] = self._unexplained.get(site.name, 0) + int(outside.sum())
        if self.first is None or outside.any():
            at = tuple((outside if outside.any() else first).nonzero()[0].tolist())
            t, n, index = at[0], 0, at[1:]
            if dim is not None:
                n, index = at[dim], (*at[1:dim], *at[dim + 1 :])
            which = int((neurons.nonzero() == torch.tensor(at[1:])).all(1).nonzero()[0])
            threshold = torch.as_tensor(site.neuron.v_threshold, dtype=torch.float32).detach()
            self.first = Divergence(
                layer=site.name,
                t=t,
                sample=start + n,
                index=index,
                source_spike=bool(expected[at]),
                h=h[at].item(),
                v_threshold=threshold.expand(h.shape)[at].item(),
                bound=slack[t, which].item(),
            )

    def report(self) -> tuple[LayerReport, ...]:
        """The layers in the order of execution."""
        return tuple(
            LayerReport(
                name,
                tuple((differing / self._counts[name]).tolist()),
                self._first.get(name, 0),
                self._unexplained.get(name, 0),
            )
            for name, differing in self._differing.items()
        )
