"""Layer by layer, a device against the source network, on what the device itself gave before.

A spike that differs changes all that follows from it, in later layers and steps and around every loop. So
each layer is judged on the device's own spikes: the source's neurons get what they would have got from
those, and every spike that is not theirs has to lie at the threshold within rounding, as does every
output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from .. import targets as registry
from ..converters.capture import capture
from ..converters.errors import UsageError
from ..converters.host import on_host
from ..converters.program import Program, Site, Time, paired
from ..converters.returned import tensors
from ..converters.rounding import Bounds, charged
from ..converters.verify import Trace, difference
from .pipeline import rewrite_for
from .ports import Port, pad

#: What to do about an artifact of another network.
ORIGIN = "compare the artifact with the network that it was compiled from, or compile this one"


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

    @property
    def output_times(self) -> Sequence[int | None]:
        """Which dimension of each output of a call is time; None where it is not known."""

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The outputs for one batch."""

    def probe(self, *inputs: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
        """The outputs, and the spikes [T, N, ...] of each neuron layer."""


@dataclass(frozen=True)
class Divergence:
    """One spike that the source would not have given on what the device's neuron received.

    Attributes:
        layer: The neuron layer.
        t: Time step.
        sample: Number of the sample.
        index: Index in the layer's output for one sample.
        source_spike: What the source does; the device did the other.
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
        did, other = ("fires", "did not") if self.source_spike else ("does not fire", "did")
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
        differing: Fraction of its spikes at each time step that are not those of the source's own run.
        flips: How many are not those of the source on what the device's neurons received.
        unexplained: How many of these lie beyond the reach of rounding.
    """

    layer: str
    differing: tuple[float, ...]
    flips: int
    unexplained: int


@dataclass(frozen=True)
class OutputReport:
    """One output, against the source's on the device's own spikes.

    Attributes:
        output: Its name.
        difference: Largest difference of a value.
        unexplained: How many values differ by more than rounding explains.
    """

    output: str
    difference: float
    unexplained: int


def taken(net: nn.Module, inputs: Sequence[torch.Tensor], model: Runs) -> tuple[torch.Tensor, ...]:
    """The inputs where the network is; numbers with a fraction in its dtype, as the model takes them."""
    floating = next((p for p in net.parameters() if p.is_floating_point()), None)
    found = []
    for x, port in zip(inputs, model.inputs, strict=True):
        dtype = port.spec.dtype if floating is None else floating.dtype
        x = x if floating is None else x.to(floating.device)
        found.append(x.to(dtype) if x.is_floating_point() else x)
    return tuple(found)


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
        after, before = moved.fired(site), spikes[site.name]
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
            f"{ORIGIN}"
        )


class Judge:
    """Judges a model's layers and outputs, batch by batch.

    Attributes:
        samples: How many were judged.
        first: The first spike that differs on the same input: of those that rounding does not explain,
            if there are any.
    """

    def __init__(self, net: nn.Module, model: Runs) -> None:
        self._net, self._model = net, model
        self._programs: tuple[Program, Program] | None = None
        self._dims: dict[str, int | None] | None = None
        self.samples = 0
        self.first: Divergence | None = None
        self._explained = True
        self._differing: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._flips: dict[str, int] = {}
        self._unexplained: dict[str, int] = {}
        self._outputs: dict[str, OutputReport] = {}

    def _prepare(self, inputs: Sequence[torch.Tensor]) -> tuple[Program, Program]:
        if self._programs is None:
            whole = capture(*on_host(self._net, inputs))
            program = rewrite_for(whole, self._model.target, self._model.dtype, self._model.time)
            captured = program.captured or whole
            # The device rounds to its own type, whatever the graph's is.
            arithmetic = registry.get(self._model.target).capabilities.arithmetic
            self._programs = captured, replace(program, dtype=arithmetic or program.dtype)
        return self._programs

    def add(self, inputs: Sequence[torch.Tensor], start: int) -> None:
        """Judge one batch, whose first sample has the number ``start``."""
        outputs, fired = self._model.probe(*inputs)
        dims, batch = self._model.batch_dims, self._model.batch
        count = next(
            (x.shape[d] for x, d in zip(inputs, dims, strict=True) if d is not None), batch
        )
        given = taken(self._net, inputs, self._model)
        padded = tuple(pad(x.cpu(), d, batch) for x, d in zip(given, dims, strict=True))
        captured, program = self._prepare(padded)
        free = Trace.of(captured, padded, drives=False)
        own = {site.name: free.fired(site) for site in captured.sites}
        _check_layers(own, fired, batch, count)
        if self._dims is None:
            self._dims = _sample_dims(captured, padded, dims, batch, own)
        theirs = {
            name: pad((spikes != 0).cpu(), self._dims[name], batch).to(program.dtype)
            for name, spikes in fired.items()
        }
        local = Trace.of(captured, padded, theirs)
        bounds = Bounds(program, padded, theirs)
        for site, mine in paired(captured, program):
            spikes, dim = theirs[site.name] != 0, self._dims[site.name]
            differing = _cut(spikes != own[site.name], dim, count)
            by_step = differing.flatten(1).double().sum(1)
            self._differing[site.name] = self._differing.get(site.name, 0) + by_step
            elements = differing[0].numel()
            self._counts[site.name] = self._counts.get(site.name, 0) + elements
            self._layer(
                site, local.drive(site), spikes, bounds.at(mine), program.dtype, dim, count, start
            )
        pairs = zip(tensors(outputs), self._model.output_dims, strict=True)
        for i, (output, dim) in enumerate(pairs):
            spec = captured.outputs[i]
            expected = _cut(local.outputs[i].reshape(spec.shape), dim, count)
            bound = _cut(bounds.result(i).reshape(spec.shape), dim, count)
            self._output(spec.name, output.cpu(), expected, bound)
        self.samples += count

    def _layer(
        self,
        site: Site,
        drive: torch.Tensor,
        spikes: torch.Tensor,
        reach: torch.Tensor,
        dtype: torch.dtype,
        dim: int | None,
        count: int,
        start: int,
    ) -> None:
        """Are the spikes what the source's neurons make of this drive, or is it at the threshold?"""
        neuron = site.neuron
        h, slack = charged(neuron, drive.float(), reach.float(), spikes, dtype)
        expected = neuron.fired(h)
        wrong = _cut(expected != spikes, dim, count)
        threshold = (
            torch.as_tensor(neuron.v_threshold, dtype=torch.float32).detach().expand(h.shape)
        )
        slack = slack + torch.finfo(dtype).eps * threshold.abs()
        # A bound that is infinite, where a potential has left all numbers, explains nothing.
        slack = torch.where(slack.isfinite(), slack, 0.0)
        distance = (h - threshold).abs().nan_to_num(nan=math.inf)
        outside = wrong & _cut(distance > slack, dim, count)
        self._flips[site.name] = self._flips.get(site.name, 0) + int(wrong.sum())
        self._unexplained[site.name] = self._unexplained.get(site.name, 0) + int(outside.sum())
        if (self.first is None and wrong.any()) or (self._explained and outside.any()):
            self._explained = not bool(outside.any())
            at = tuple((wrong if self._explained else outside).nonzero()[0].tolist())
            t, n, index = at[0], 0, at[1:]
            if dim is not None:
                n, index = at[dim], (*at[1:dim], *at[dim + 1 :])
            self.first = Divergence(
                layer=site.name,
                t=t,
                sample=start + n,
                index=index,
                source_spike=bool(expected[at]),
                h=h[at].item(),
                v_threshold=threshold[at].item(),
                bound=slack[at].item(),
            )

    def _output(
        self, name: str, output: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor
    ) -> None:
        if output.shape != expected.shape:
            raise UsageError(
                f"output {name} of the artifact is {list(output.shape)}, that of the network "
                f"{list(expected.shape)}; {ORIGIN}"
            )
        off = difference(output, expected)
        outside = int((~((off == 0) | (off <= bound))).sum())
        largest = largest_of(off)
        before = self._outputs.get(name, OutputReport(name, 0.0, 0))
        self._outputs[name] = OutputReport(
            name, max(before.difference, largest), before.unexplained + outside
        )

    def layers(self) -> tuple[LayerReport, ...]:
        """The layers in the order of execution."""
        return tuple(
            LayerReport(
                name,
                tuple((differing / self._counts[name]).tolist()),
                self._flips[name],
                self._unexplained[name],
            )
            for name, differing in self._differing.items()
        )

    def outputs(self) -> tuple[OutputReport, ...]:
        """The outputs in their order."""
        return tuple(self._outputs.values())


def largest_of(differences: torch.Tensor) -> float:
    """The largest; infinite where one side alone is no number."""
    return differences.nan_to_num(nan=math.inf).max().item() if differences.numel() else 0.0


def _cut(x: torch.Tensor, dim: int | None, count: int) -> torch.Tensor:
    """Without the samples that pad a batch."""
    return x if dim is None else x.narrow(dim, 0, count)
