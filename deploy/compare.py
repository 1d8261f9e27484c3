"""Source against device: accuracy, agreement, and where their spikes part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

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
    def batch_dim(self) -> int:
        """Which dimension of the first input is the batch."""

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
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    layers: int = 64,
    progress: bool = False,
) -> Report:
    """Run a network and what was compiled from it on the same data.

    The source is evaluated in eval mode, each batch from the state before the first step.

    Args:
        net: The source network.
        model: The loaded artifact.
        loader: Batches (x, y) of images [N, ...], or of events [T, N, ...] if the network was converted
            for those, and labels [N]; N need not be the compiled batch.
        layers: On how many samples to compare the spikes of every layer; 0 for none.
        progress: Whether to show a bar on a terminal.

    Raises:
        UsageError: The loader is empty or its labels are not as many as its inputs, or the outputs are
            no class scores.
    """
    right = torch.zeros(2, dtype=torch.int64)
    seconds = [0.0, 0.0]
    samples, disagreeing = 0, list[int]()
    spikes = _Spikes(net, model)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with tqdm(unit=" samples", disable=None if progress else True) as bar, torch.no_grad():
            for x, y in loader:
                count = x.shape[model.batch_dim]
                if count != len(y):
                    raise UsageError(f"a batch of {count} inputs and {len(y)} labels")
                parts = torch.split(x, model.batch, model.batch_dim)
                for part, labels in zip(parts, torch.split(y, model.batch), strict=True):
                    if samples < layers and model.has_probes:
                        spikes.compare(part, samples)
                    start = time.perf_counter()
                    ours = predictions(_source(net, part)).cpu()
                    middle = time.perf_counter()
                    theirs = predictions(model(part)).cpu()
                    seconds[1] += time.perf_counter() - middle
                    seconds[0] += middle - start
                    right += torch.stack([(p == labels.cpu()).sum() for p in (ours, theirs)])
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


def predictions(outputs: Any) -> torch.Tensor:
    """The class of each sample: the largest of the first output's scores [N, C], or rates of [T, N, C].

    Raises:
        UsageError: The first output has another rank.
    """
    found, _ = pytree.tree_flatten(outputs)
    if not found:
        raise UsageError("the network returns no tensor, so there are no classes to read")
    scores: torch.Tensor = found[0]
    if scores.dim() == 3:
        scores = scores.float().mean(0)
    if scores.dim() != 2:
        raise UsageError(
            f"the first output has shape {list(scores.shape)}; classes are read from [N, C] or "
            "[T, N, C]"
        )
    return scores.argmax(1)


def _source(net: nn.Module, x: torch.Tensor) -> Any:
    sources.reset(net)
    floating = [p for p in net.parameters() if p.is_floating_point()]
    result = net(x.to(floating[0].device, floating[0].dtype) if floating else x)
    sources.reset(net)
    return result


def _sample_dims(
    captured: Program, x: torch.Tensor, batch_dim: int, spikes: Mapping[str, torch.Tensor]
) -> dict[str, int | None]:
    """Along which dimension of each site's spikes the samples lie: None where they lie among others.

    It follows from the sizes. Where these leave a choice, it is where the spikes follow when the samples
    are moved on by one.
    """
    batch = x.shape[batch_dim]
    fits = {n: [d for d in range(1, s.dim()) if s.shape[d] == batch] for n, s in spikes.items()}
    found = {name: dims[0] if dims else None for name, dims in fits.items()}
    if all(len(dims) < 2 for dims in fits.values()) or batch == 1:
        return found
    moved = Trace.of(captured, (x.roll(1, batch_dim),))
    for site in captured.sites:
        after, before = moved.fired(site), spikes[site.name] != 0
        off = {d: (after != before.roll(1, d)).sum() for d in fits[site.name]}
        found[site.name] = min(off, key=lambda d: off[d], default=None)
    return found


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

    def _prepare(self, x: torch.Tensor) -> tuple[Program, Program]:
        if self._programs is None:
            whole = capture(*on_host(self._net, (x,)))
            program = rewrite_for(whole, self._model.target, self._model.dtype, self._model.time)
            captured = program.captured or whole
            # The device rounds to its own type, whatever the graph's is.
            arithmetic = registry.get(self._model.target).capabilities.arithmetic
            self._programs = captured, replace(program, dtype=arithmetic or program.dtype)
        return self._programs

    def compare(self, x: torch.Tensor, start: int) -> None:
        """Compare one batch, whose first sample has the number ``start``."""
        _, spikes = self._model.probe(x)
        x, spikes = x.cpu(), {name: s.cpu() for name, s in spikes.items()}
        at = self._model.batch_dim
        count = x.shape[at]
        last = x.narrow(at, count - 1, 1)
        padded = torch.cat([x, *[last] * (self._model.batch - count)], at)
        captured, program = self._prepare(padded)
        padded = padded.to(captured.inputs[0].dtype)
        source = Trace.of(captured, (padded,))
        own = {site.name: source.fired(site).to(program.dtype) for site in captured.sites}
        bounds = Bounds(program, (padded,), own)
        if self._dims is None:
            self._dims = _sample_dims(captured, padded, at, own)
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
