"""Proof that a rewritten program computes what the network computes.

The comparison goes layer by layer, each on the network's own spikes, so that a difference is seen
where it arises and nowhere else:

1. Every neuron alone, on inputs that hit its threshold exactly: the network's module, the declaration
   and the lowered form must give the same spikes, all of them.
2. Every layer's drive (the input of its neurons) on the network's own spikes. It may differ by what
   rounding explains (:mod:`.rounding`), accumulated over the operators since the last neuron.
3. Every layer's spikes, given its drive: the declaration's own in float32, without exception; in
   float16 another spike only where h lies at the threshold within rounding.

So whatever differs end to end follows from rounding, and its first site is known. A stepped program is
compared over all steps of the same call, its states carried from one to the next.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import sources
from .builder import Builder
from .errors import Finding, MismatchError, UnsupportedError
from .ops import COMPARISONS
from .passes.lower_neurons import lower_neurons
from .passes.step_time import step_time
from .probes import probe_inputs
from .program import NEURON, PassReport, Program, Site, TensorSpec, Time, paired, short, where
from .rounding import CERTAINTY, Bounds
from .sources import Reading


@dataclass(frozen=True)
class LayerEvidence:
    """What was found at one neuron layer, on the network's own spikes.

    Attributes:
        site: The layer.
        probe_spikes: Spikes compared on inputs that hit the threshold exactly; all were equal.
        spikes: Spikes compared on the examples.
        flips: How many of them differ because the drive was rounded otherwise.
        drive_difference: Largest difference of its drive.
        drive_bound: Largest difference that rounding explains.
    """

    site: str
    probe_spikes: int
    spikes: int
    flips: int
    drive_difference: float
    drive_bound: float


@dataclass(frozen=True)
class VerificationEvidence:
    """What the verification of a program found; it holds, or there is an error instead.

    Attributes:
        dtype: Floating-point type of the program.
        examples: Inputs that source and program were run on.
        layers: Each neuron layer by itself.
        end_to_end_flips: Spikes that differ when the program runs freely, by layer.
        output_difference: Largest difference of an output then.
        before_cast: The same before the weights were cast, where bounds are tighter.
    """

    dtype: str
    examples: int
    layers: tuple[LayerEvidence, ...]
    end_to_end_flips: dict[str, int]
    output_difference: float
    before_cast: VerificationEvidence | None = None

    def to_dict(self) -> dict[str, Any]:
        """The evidence as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"verified in {self.dtype} on {self.examples} inputs, layer by layer:"]
        lines += [
            f"  {layer.site}: {layer.probe_spikes} probe spikes equal; {layer.flips} of "
            f"{layer.spikes} spikes at the threshold flipped by rounding; drive within "
            f"{layer.drive_difference:.2g} of {layer.drive_bound:.2g} allowed"
            for layer in self.layers
        ]
        total = sum(self.end_to_end_flips.values())
        spikes = f"{total} spikes differ" if self.layers else "no layer of declared neurons"
        lines.append(f"  end to end: {spikes}, outputs by up to {self.output_difference:.3g}")
        if self.before_cast is not None:
            lines = [str(self.before_cast), *lines]
        return "\n".join(lines)


def verify(program: Program, net: nn.Module, uncast: Program | None = None) -> Program:
    """The program with its evidence.

    Args:
        program: A rewritten program with ``captured`` and ``examples``.
        net: The network that it was captured from.
        uncast: The program before its weights were cast to another dtype, verified first.

    Raises:
        MismatchError: A layer differs by more than rounding explains; it is named.
        UnsupportedError: Activations overflow the program's dtype; the layers are named.
    """
    captured = program.captured
    assert captured is not None
    counts = _probe_neurons(captured, net, program.time)
    before = None if uncast is None else _verify(uncast, counts)
    return replace(program, evidence=replace(_verify(program, counts), before_cast=before))


def _verify(program: Program, counts: Mapping[str, int]) -> VerificationEvidence:
    captured = program.captured
    assert captured is not None
    layers: dict[str, list[LayerEvidence]] = {site.name: [] for site in captured.sites}
    flips = dict.fromkeys(layers, 0)
    difference = 0.0
    inputs = [i for example in program.examples for i in (example, _on_grid(example))]
    for example in inputs:
        source = Trace.of(captured, example)
        free = Trace.of(program, example, drives=False)
        _check_finite(program, source, free)
        for site, mine in paired(captured, program):
            flips[site.name] += _differing(source.fired(site), free.fired(mine))
        difference = max([difference, *map(_largest, source.outputs, free.outputs)])
        del free  # its spikes are as many as those of the runs to come
        _compare_layers(program, source, example, counts, layers)
    return VerificationEvidence(
        dtype=str(program.dtype).removeprefix("torch."),
        examples=len(inputs),
        layers=tuple(_merge(found) for found in layers.values()),
        end_to_end_flips=flips,
        output_difference=difference,
    )


def _on_grid(example: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The inputs on a coarse grid, where sums hit thresholds exactly more often."""
    return tuple((x * 4).round() / 4 if x.is_floating_point() else x for x in example)


def _merge(found: Sequence[LayerEvidence]) -> LayerEvidence:
    return LayerEvidence(
        found[0].site,
        found[0].probe_spikes,
        sum(f.spikes for f in found),
        sum(f.flips for f in found),
        max(f.drive_difference for f in found),
        max(f.drive_bound for f in found),
    )


def _finite(x: torch.Tensor) -> bool:
    """Whether all values are: the extremes tell, NaN among them, a tenth of isfinite's time."""
    x = x.float() if x.itemsize == 1 else x  # torch has no extremes of float8
    return not x.numel() or all(math.isfinite(extreme.item()) for extreme in x.aminmax())


def _differing(a: torch.Tensor, b: torch.Tensor) -> int:
    return int(torch.count_nonzero(a != b))


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.numel():
        return 0.0
    return float((a.float().flatten() - b.float().flatten()).abs().max())


@dataclass(frozen=True)
class Trace:
    """Values of one run.

    Attributes:
        values: The neurons' drives, and their spikes as booleans, by name of node; of a stepped
            program the stacks of those of its steps.
        outputs: The graph's outputs.
        overflowed: How many values are not finite, by name of node.
    """

    values: Mapping[str, torch.Tensor]
    outputs: Sequence[torch.Tensor]
    overflowed: Mapping[str, int]

    @classmethod
    def of(
        cls,
        program: Program,
        inputs: Sequence[torch.Tensor],
        spikes: Mapping[str, torch.Tensor] | None = None,
        drives: bool = True,
    ) -> Trace:
        """Run a program, on given spikes [T, N, ...] by site or freely."""
        stacked = program.stepping is not None
        driving = {name for site in program.sites for name in site.drives} if drives else set()
        firing = {name for site in program.sites for name in site.spikes}
        seen: dict[str, list[torch.Tensor]] = defaultdict(list)
        overflowed: dict[str, int] = {}

        def observe(n: fx.Node, value: Any) -> None:
            if n.name in firing:
                seen[n.name].append(value != 0)
            elif n.name in driving:
                seen[n.name].append(value)
            if (
                n.op == "call_function"
                and isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and not _finite(value)
            ):
                count = int((~torch.isfinite(value)).sum())
                overflowed[n.name] = overflowed.get(n.name, 0) + count

        outputs = program.run(inputs, spikes, observe)
        values = {n: torch.stack(found) if stacked else found[0] for n, found in seen.items()}
        return cls(values, outputs, overflowed)

    def drive(self, site: Site) -> torch.Tensor:
        """A site's input, [T, N, ...]."""
        return site.drive(self.values)

    def fired(self, site: Site) -> torch.Tensor:
        """A site's spikes, [T, N, ...], of bool."""
        return site.fired(self.values)


def _check_finite(program: Program, source: Trace, free: Trace) -> None:
    if source.overflowed:
        return
    findings: dict[str, Finding] = {}
    half = program.dtype == torch.float16
    drives = {name for site in program.sites for name in site.drives}
    for n in program.graph.nodes:
        if n.name not in free.overflowed:
            continue
        if n.name not in drives and all(map(_asks_for_sign, n.users)):
            continue  # infinity has the sign of what it stands for, as 1 / -0 has
        layer = where(n)
        findings.setdefault(
            layer,
            Finding(
                rule="float16-overflow" if half else "overflow",
                where=layer,
                node=n.name,
                found=f"{short(n.target)} gives {free.overflowed[n.name]} values that are "
                f"not finite in {program.dtype}, finite in the source",
                allowed=f"magnitudes up to {torch.finfo(program.dtype).max:.6g}",
                fix="scale the layer and its threshold down by the same factor"
                + (', or convert with dtype="float32"' if half else ""),
            ),
        )
    if findings:
        raise UnsupportedError("activations overflow:", findings.values())


def _asks_for_sign(n: fx.Node) -> bool:
    return n.target in COMPARISONS and bool(n.args[1] == 0)


# 1. Neurons alone


def _probe_neurons(captured: Program, net: nn.Module, time: Time) -> dict[str, int]:
    """Spikes compared for each site; every one of them was equal."""
    modules = dict(net.named_modules(remove_duplicate=False))
    readings = {id(module): reading for _, module, reading in sources.read_all(net)}
    nodes = captured.named()
    probed: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    counts = {}
    for site in captured.sites:
        drive = nodes[site.drives[0]].meta["val"]
        shape, dtype = tuple(drive.shape), drive.dtype
        features = shape[2:] if site.layout == "stepped" else shape[1:]
        tensors = [(t.dtype, t.shape, str(t.tolist())) for t in site.neuron.tensors().values()]
        key = (
            site.neuron.to_json(),
            *tensors,
            site.T,
            features,
            dtype,
        )  # most layers' neurons are alike
        if key not in probed:
            probed[key] = _probed(site, features, dtype, time)
        x, expected = probed[key]
        module = modules[site.path]
        reading = readings[id(module)]
        assert isinstance(reading, Reading)
        if (readout := reading.readout) is not None:
            expected = torch.stack([*map(readout, site.neuron.states(x, reading.state))])
        if reading.cell is not None:
            own = reading.cell.fire(module, x)
        else:
            own = _own_spikes(module, reading, x.clone())  # it may write to it
        if not torch.equal(expected, own):
            raise MismatchError(_differs(site, "the network's own module", own, expected, x))
        counts[site.name] = expected.numel()
    return counts


def _probed(
    site: Site, features: tuple[int, ...], dtype: torch.dtype, time: Time
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that hit the threshold and the declaration's spikes, which the lowered form gives too."""
    x = probe_inputs(site.neuron, site.T, features, dtype)
    expected, lowered = site.neuron.multi_step(x), _lowered(site, x, time)
    if not torch.equal(expected, lowered):
        raise MismatchError(_differs(site, "the lowered form", lowered, expected, x))
    return x, expected


def _lowered(site: Site, x: torch.Tensor, time: Time) -> torch.Tensor:
    """The site's neuron by itself, lowered and run, at once or step by step."""
    graph = fx.Graph()
    spec = TensorSpec("x", tuple(x.shape), x.dtype, folded=True)
    empty = Program(fx.GraphModule({}, graph), (spec,), (spec,), _LEAF, dtype=x.dtype)
    build = Builder(empty)
    node = build.graph.placeholder("x")
    flat = x.flatten(0, 1)
    node.meta = {"val": flat.to("meta"), "path": ""}
    tensors = site.neuron.tensors()
    params = [build.constant(f"probe.{name}", t.detach()) for name, t in tensors.items()]
    spikes = build.call(NEURON, node, params, site.neuron.to_json(), "flat", site.T, path=site.path)
    program = build.finish([spikes], PassReport("probe"))
    if time == "stepped":
        program = step_time(program)
    (result,) = lower_neurons(program).run([x])
    return result.reshape(x.shape)


def _own_spikes(module: nn.Module, reading: Reading, x: torch.Tensor) -> torch.Tensor:
    """The network's own neuron, a copy of it, on x [T, 1, ...] from before its first step."""
    module = sources.copied(module).eval()
    sources.reset(module)
    with torch.no_grad():
        if reading.step_mode == "s":
            spikes = torch.stack([reading.spikes(module(step)) for step in x])
        else:
            spikes = reading.spikes(module(x))
    return spikes


def _differs(
    site: Site, who: str, found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor
) -> str:
    wrong = (found != expected).nonzero()
    at = tuple(int(i) for i in wrong[0])
    h = site.neuron.trace(x)[1][at].item()
    return (
        f"{site.name}: on inputs that hit the threshold exactly, {who} and the declaration differ in "
        f"{len(wrong)} of {expected.numel()} spikes, first at step {at[0]}, index {list(at[1:])}, "
        f"where the declaration has h = {h:.9g} ({site.neuron.describe()})"
    )


# 2 and 3. Layers


def _compare_layers(
    program: Program,
    source: Trace,
    example: Sequence[torch.Tensor],
    counts: Mapping[str, int],
    layers: dict[str, list[LayerEvidence]],
) -> None:
    captured = program.captured
    assert captured is not None
    pairs = paired(captured, program)
    spikes = {mine.name: source.fired(theirs).to(program.dtype) for theirs, mine in pairs}
    local = Trace.of(program, example, spikes)
    bounds = Bounds(program, example, spikes)
    wrong: list[str] = []
    for theirs, mine in pairs:
        bound = bounds.at(mine)
        theirs_drive, mine_drive = source.drive(theirs), local.drive(mine)
        off = difference(theirs_drive, mine_drive)
        outside = ~_explained(off, bound)
        if outside.any():
            wrong.append(
                f"{mine.name}: its drive differs by up to {off.max().item():.3g} in "
                f"{int(outside.sum())} of {outside.numel()} places, where rounding explains "
                f"{bound[outside].max().item():.3g}"
            )
        wrong += _unexplained(program, theirs, mine, mine_drive, local.fired(mine))
        flipped = _differing(source.fired(theirs), local.fired(mine))
        layers[theirs.name].append(
            LayerEvidence(
                theirs.name,
                counts[theirs.name],
                theirs_drive.numel(),
                flipped,
                off.max().item(),
                bound.max().item(),
            )
        )
    results = program.results[: len(program.outputs)]
    for i, n in enumerate(results):
        off = difference(source.outputs[i].flatten(), local.outputs[i].flatten())
        bound = bounds.result(i).flatten()
        if not _explained(off, bound).all():
            wrong.append(
                f"output {n.name} ({where(n) or 'the network'}): differs by up to "
                f"{off.max().item():.3g}, where rounding explains {bound.max().item():.3g}"
            )
    if wrong:
        raise MismatchError(
            "the rewritten program computes something else than the network:\n  "
            + "\n  ".join(wrong)
        )


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b|, 0 where both are the same infinity or NaN; NaN explains nothing."""
    a, b = a.float(), b.float()
    difference = (a - b).abs()
    if _finite(difference):
        return difference
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, difference)


def _explained(difference: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Where there is no difference, or rounding explains it; a bound that is NaN explains none."""
    return (difference == 0) | (difference <= bound)


def _unexplained(
    program: Program, site: Site, mine: Site, drive: torch.Tensor, fired: torch.Tensor
) -> list[str]:
    """Spikes that the declaration does not give for this drive, rounding at the threshold aside."""
    exact, h, _ = site.neuron.trace(drive.float())
    wrong = (exact != 0) != fired
    neurons = wrong.any(0)
    if not neurons.any():
        return []
    # Once a neuron has fired otherwise its membrane is another one: only its first flip is judged.
    first = first_flips(wrong[:, neurons])
    if program.dtype == torch.float16 or mine.scale is not None:
        distance, slack = to_threshold(site, neurons, h, drive, program.dtype)
        first &= distance > slack
    if not first.any():
        return []
    t, which = (int(i) for i in first.nonzero()[0])
    index = neurons.nonzero()[which].tolist()
    return [
        f"{site.name}: {int(first.sum())} spikes are not the declaration's, first at step {t}, index "
        f"{index}, h = {h[:, neurons][t, which].item():.9g} ({site.neuron.describe()})"
    ]


def first_flips(wrong: torch.Tensor) -> torch.Tensor:
    """Of each neuron's wrong spikes [T, ...] the first."""
    return wrong & (wrong.cumsum(0) == 1)


def to_threshold(
    site: Site,
    neurons: torch.Tensor,
    h: torch.Tensor,
    drive: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far h is from the threshold, and how far rounding can carry it.

    Args:
        site: The neuron layer.
        neurons: Which of its neurons [N, ...] to look at, k of them.
        h: Membrane potential [T, N, ...].
        drive: Its input [T, N, ...].
        dtype: The arithmetic.

    Returns:
        |h - v_threshold| and the reach of rounding, both [T, k].
    """
    threshold = torch.as_tensor(site.neuron.v_threshold, dtype=torch.float32).detach()
    threshold = threshold.expand(h.shape[1:])[neurons]
    h, drive = h[:, neurons], drive.float()[:, neurons]
    unit = torch.finfo(dtype).eps / 2
    scale = torch.maximum(h.abs(), drive.abs()).cummax(0).values
    steps = torch.arange(1, site.T + 1).reshape(-1, 1)
    slack = CERTAINTY * unit * steps * torch.maximum(scale, threshold.abs())
    # A bound that is infinite, where a potential has left all numbers, explains nothing.
    slack = torch.where(slack.isfinite(), slack, 0.0)
    return (h - threshold).abs().nan_to_num(nan=math.inf), slack


_, _LEAF = pytree.tree_flatten((0,))
