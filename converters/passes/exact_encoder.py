"""Encode an image into spikes as in float32, on a chip that computes in float16.

A layer of weights and the neurons after it that see the same drive y at every step are an encoder, and
most of what float16 changes in a network it changes there: the pixels, the weights, y and the membrane
are rounded, and of the spikes that flip all later layers see the consequences.

With a hard reset to where it started, such a neuron fires at each multiple of its first step k(y), and
k(y) <= k exactly if y reaches a number c_k. So spikes are comparisons with constants. With
g_k = [y >= c_k] and g_0 = 0, the step t has

    s_t = sum over the divisors k of t of (g_k - g_(k-1))

and y - c_k, which the layer computes with a bias of b - c_k, is small where its sign is in doubt, so that
rounding it to float16 leaves its sign alone. The c_k are those of the declaration in float32, found by
bisection. Pixels and weights go in as sums of two float16 numbers, the high and the low part, which have
22 bits together; sums are accumulated in float32. The layer gets T times the channels for this and up to
three times the inputs, which is little for an image's few channels; where it is not, neurons stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..builder import Builder
from ..neurons import Neuron
from ..ops import Node, aten, fan_in, shape
from ..program import NEURON, PassReport, Program, Site, where

#: How much of the network's sums of products may come on top.
MOST_WORK = 0.5
#: What the weights of a channel add up to, about, in magnitude: their low parts stay normal numbers, and
#: images of bytes do not overflow.
_SUM_OF_WEIGHTS = 16.0
#: The drives that fire are looked for up to this magnitude.
_FARTHEST = 2.0**100

_LAYERS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.linear.default})


def exact_encoder(program: Program) -> Program:
    """Replace every layer with neurons of a constant drive by comparisons of drives."""
    return _Encode(program).run()


@dataclass(frozen=True)
class _Encoder:
    """A layer and what its drives are compared with.

    Attributes:
        weight: [C, ...] in float32, scaled by a power of two for each channel.
        bias: [T, C] in float64, likewise, rounded to float16: of the drive less what it is compared with.
        rest: [T, C], likewise: what is left to compare with, the bias's rounding.
        terms: [T, C], likewise: how large the terms are that it is the sum of.
        offset: [C] in float64: the drive of the first comparison, less what the layer gives there, in the
            neuron's own scale.
        scale: [C]: the powers of two.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    rest: torch.Tensor
    terms: torch.Tensor
    offset: torch.Tensor
    scale: torch.Tensor


class _Encode(Builder):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.env: dict[Node, Node] = {}
        self.sites: dict[str, Site] = {}
        self.parts: dict[Node, tuple[Node, Node]] = {}
        self.work = sum(map(_work, program.nodes("call_function")))
        self.done: list[str] = []
        self.skipped: list[str] = []

    def run(self) -> Program:
        layers: dict[Node, _Encoder] = {}
        for n in self.program.nodes("call_function"):
            if n.target is NEURON and n.args[3] == "static":
                found = self._encoder(n)
                if isinstance(found, str):
                    self.skipped.append(f"{where(n)}: {found}")
                else:
                    layers[n] = found
        inputs = {n.args[0].args[0] for n in layers}
        specs = dict(zip(self.program.nodes("placeholder"), self.program.inputs, strict=True))
        for n in inputs & specs.keys():
            if specs[n].dtype.is_floating_point and specs[n].dtype != torch.float16:
                specs[n] = replace(specs[n], parts=2)
        drives = {n.args[0] for n in layers}
        for n in self.program.walk():
            if n.op == "placeholder":
                self._input(n, specs[n].parts == 2)
            elif n in layers:
                self._encode(n, layers[n])
            elif n.op == "get_attr" or (n.op == "call_function" and n not in drives):
                self.env[n] = self.copy(n, self.env)
        report = PassReport("exact_encoder", tuple(self.done), tuple(self.skipped))
        named = self.program.named()
        sites = [
            self.sites.get(site.name) or self._renamed(site, named) for site in self.program.sites
        ]
        results = [self.env[r] for r in self.program.results]
        return self.finish(results, report, sites, inputs=tuple(specs.values()))

    def _renamed(self, site: Site, named: Mapping[str, Node]) -> Site:
        drives, spikes = (
            tuple(self.env[named[n]].name for n in names) for names in (site.drives, site.spikes)
        )
        return replace(site, drives=drives, spikes=spikes)

    def _input(self, n: Node, split: bool) -> None:
        value = n.meta["val"]
        if not split:
            self.env[n] = self.placeholder(n, value)
            return
        both, size = self.placeholder(n, torch.cat([value, value], 1)), value.shape[1]
        high = self.call(aten.slice.Tensor, both, 1, 0, size, path="")
        low = self.call(aten.slice.Tensor, both, 1, size, 2 * size, path="")
        self.parts[n] = both, high
        self.env[n] = self.call(aten.add.Tensor, high, low, path="")  # for others that take it

    def _encoder(self, n: Node) -> _Encoder | str:
        """What a layer of neurons becomes, or why it stays."""
        layer, T = n.args[0], n.args[4]
        if layer.target not in _LAYERS or len(layer.users) > 1:
            return "its drive is not that of a layer of weights for it alone"
        weight, bias = layer.args[1], (*layer.args, None)[2]
        if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
            return f"the weights of {where(layer)} are computed"
        if layer.target is aten.linear.default and len(shape(layer)) != 2:
            return f"{where(layer)} has its features in another dimension than 1"
        if layer.target is not aten.linear.default and (*layer.args, 1)[6:7] not in ((), (1,)):
            return f"{where(layer)} has groups"
        if (share := (3 * T - 1) * _work(layer) / self.work) > MOST_WORK:
            return f"{where(layer)} would add {100 * share:.0f} % to the network's work"
        W = self.program.tensor(weight.target).double()
        C, features = W.shape[0], len(shape(layer)) - 2
        tensors = [self.program.tensor(p.target) for p in n.args[1]]
        if any(t.dim() and t.shape != (C, *[1] * features) for t in tensors):
            return "its parameters are not one for each channel"
        neuron = Neuron.from_json(n.args[2], tensors)
        found = levels(neuron, T, (C, *[1] * features))
        if isinstance(found, str):
            return found
        b = torch.zeros(C).double() if bias is None else self.program.tensor(bias.target).double()
        terms = b.abs() if bias is None else self.terms.get(str(bias.target), b.abs())
        compared = found.double().reshape(T, C)
        shift = b - compared
        magnitude = W.abs().flatten(1).sum(1).maximum(shift.abs().amax(0) / _SUM_OF_WEIGHTS)
        magnitude = magnitude.clamp(min=2.0**-20)  # a channel that computes nothing
        scale = torch.exp2((_SUM_OF_WEIGHTS / magnitude).log2().floor())
        weight = W * scale.reshape(-1, *[1] * (W.dim() - 1))
        rounded = (shift * scale).half().double()
        rest = (rounded - shift * scale).half()  # exact where it matters: 0 on a grid
        terms = (terms + compared.abs()) * scale
        return _Encoder(weight.float(), rounded, rest, terms, b - rounded[0] / scale, scale)

    def _encode(self, n: Node, encoder: _Encoder) -> None:
        layer, T, path = n.args[0], n.args[4], where(n)
        site = self.program.site(n)
        stem = f"{site.name.replace('#', '_')}.encoder"
        features = [1] * (len(shape(layer)) - 2)
        C = encoder.weight.shape[0]
        high = encoder.weight.half().float()
        low = (encoder.weight - high).half().float()
        x, weights = self._wide(layer, high, low)
        self.terms[f"{stem}_bias"] = encoder.terms.float().flatten()
        drives = self.call(
            layer.target,
            x,
            self.constant(f"{stem}_weight", weights.repeat(T, *[1] * (weights.dim() - 1))),
            self.constant(f"{stem}_bias", encoder.bias.float().flatten()),
            *layer.args[3:],
            path=where(layer),
        )
        fires = aten.ge.Tensor if site.neuron.fires == ">=" else aten.gt.Tensor
        rest = encoder.rest.float()
        parts, reached = list[Node](), list[Node]()
        for k in range(T):
            part = self.call(aten.slice.Tensor, drives, 1, k * C, (k + 1) * C, path=path)
            level = self.constant(f"{stem}_level_{k + 1}", rest[k].reshape(-1, *features))
            over = self.call(fires, part, level, path=path)
            parts.append(part)
            reached.append(self.call(aten._to_copy.default, over, dtype=torch.float32, path=path))
        steps = [self._step(t, reached, path) for t in range(1, T + 1)]
        spikes = steps[0] if T == 1 else self.call(aten.cat.default, steps, 0, path=path)
        self.env[n] = spikes
        self.sites[site.name] = self._site(site, parts[0], spikes, encoder, features)
        self.done.append(f"{where(layer)} and {site.name}: {T} comparisons of its drive")

    def _wide(
        self, layer: Node, high: torch.Tensor, low: torch.Tensor
    ) -> tuple[Node, torch.Tensor]:
        """What the layer takes now, and its weights for that: of both of their parts those not 0."""
        whole = self.env[layer.args[0]]
        both, first = self.parts.get(layer.args[0], (None, whole))
        inputs, weights = [whole if both is None else both], [high]
        if both is not None:
            weights.append(high)
        if low.any():
            inputs.append(first)
            weights.append(low)
        wide = inputs[0]
        if len(inputs) > 1:
            wide = self.call(aten.cat.default, inputs, 1, path=where(layer))
        return wide, torch.cat(weights, 1)

    def _step(self, t: int, reached: list[Node], path: str) -> Node:
        """Where the first step that fires divides t."""
        terms: list[tuple[int, int]] = []
        for k in (k for k in range(1, t + 1) if t % k == 0):
            if terms and terms[-1] == (1, k - 1):
                terms.pop()
            elif k > 1:
                terms.append((-1, k - 1))
            terms.append((1, k))
        ordered = sorted(terms, key=lambda term: term[0] < 0)
        total = reached[ordered[0][1] - 1]
        for sign, k in ordered[1:]:
            operator = aten.add.Tensor if sign > 0 else aten.sub.Tensor
            total = self.call(operator, total, reached[k - 1], path=path)
        return total

    @staticmethod
    def _site(
        site: Site, drive: Node, spikes: Node, encoder: _Encoder, features: list[int]
    ) -> Site:
        whole = torch.ones(()) if site.scale is None else site.scale
        offset, scale = (t.float().reshape(-1, *features) for t in (encoder.offset, encoder.scale))
        return replace(
            site,
            drives=(drive.name,),
            spikes=(spikes.name,),
            scale=whole / scale,
            offset=whole * offset,
        )


def _work(n: Node) -> int:
    """How many products a layer sums up."""
    terms = fan_in(n) if len(n.args) > 1 else 1
    return terms * math.prod(shape(n)) if terms > 1 else 0


def levels(neuron: Neuron, T: int, size: tuple[int, ...]) -> torch.Tensor | str:
    """What a constant drive has to reach for a spike within 1, 2, ... T steps, [T, *size]; or why not.

    It is reached at this number where the neuron fires at its threshold, and above it otherwise.
    """
    if neuron.reset != "hard":
        return "its reset is not hard, so that its spikes do not repeat"

    def spikes(drive: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return neuron.multi_step(drive.expand(T, *drive.shape))

    def fires_within(drive: torch.Tensor) -> torch.Tensor:
        fired = spikes(drive)
        return torch.stack([fired[: k + 1, k].any(0) for k in range(T)])

    least, most = (torch.full((T, *size), x) for x in (-_FARTHEST, _FARTHEST))
    if fires_within(least).any() or not fires_within(most).all():
        return "it fires, or does not, whatever its drive"
    low, high = _ordered(least), _ordered(most)
    for _ in range(33):
        middle = (low + high).div(2, rounding_mode="floor")
        fires = fires_within(_number(middle))
        low, high = torch.where(fires, low, middle), torch.where(fires, middle, high)
    found = _number(high if neuron.fires == ">=" else low)
    around = torch.cat([_number(_ordered(found) + i) for i in (-2, -1, 0, 1, 2)])
    between = torch.cat([found + (found.roll(1, 0) - found) * i / 7 for i in range(1, 7)])
    spread = torch.linspace(-2, 4, 601).reshape(-1, *[1] * len(size)) * found[:1].abs()
    drives = torch.cat([around, between, spread])
    if not torch.equal(_repeated(drives, found, neuron.fires), spikes(drives)):
        return "its spikes do not repeat at multiples of the first"
    return found


def _repeated(drive: torch.Tensor, levels: torch.Tensor, fires: str) -> torch.Tensor:
    """Spikes [T, N, ...] of a drive [N, ...]: at the multiples of the first step that has one."""
    T = len(levels)
    reached = torch.stack([drive >= c if fires == ">=" else drive > c for c in levels])
    first = torch.where(reached.any(0), reached.byte().argmax(0) + 1, T + 1)
    return torch.stack([(t % first == 0).to(drive.dtype) for t in range(1, T + 1)])


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of float32's numbers."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _number(order: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_ordered`."""
    bits = torch.where(order < 0, -order - 2**31, order)
    return bits.int().view(torch.float32)
