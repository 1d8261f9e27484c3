"""The conformance matrix: every source's neurons on every target, spike for spike, in float32.

    python benchmarks/conformance.py                        every source that is importable
    python benchmarks/conformance.py --source native nir    these alone
    python benchmarks/conformance.py --neuron QIFNode       these alone
    python benchmarks/conformance.py --keep cells.json      add to the cells of earlier runs
    python benchmarks/conformance.py --jobs 8               in as many processes; default: one a core

A cell is one neuron of one source (its reset, its parameters and how they are given, one value for all,
for each channel, or learned) in one time mode on one target. Each has its own input [T, N, ...], whose N
samples expose semantics: on a grid that hits thresholds exactly, chosen step by step to reach the
threshold exactly or stay right below, negative drive, zeros, multiples of the threshold, and noise. What
the target gives is compared with what the source's own module gives (for NIR, this project's reading of
it, which its tests hold against NIR's definitions). "equal": no spike differs. "refused": with its
reason, before anything runs. "explained": some spikes differ, and each parts from the source's where the
potential is within the reach of rounding of its threshold, by the bound that ``deploy.compare`` has: a
charge with an exponential is rounded in the last bit as each runtime's own does. "WRONG": any other
difference, or a failure; the exit code is 1.

The releases of a framework are tried one at a time: run with each on the path and ``--keep``. lynxi-sim
stores in float32 here. The target cuda runs on a GPU, or on the CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import importlib
import inspect
import itertools
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikeport import deploy
from spikeport import targets as registry
from spikeport.converters import neurons, sources
from spikeport.converters.capture import capture
from spikeport.converters.neurons import Neuron, Node
from spikeport.converters.probes import probe_inputs
from spikeport.converters.program import Program, Time
from spikeport.converters.sources import Reading
from spikeport.converters.sources.nir import NirNetwork
from spikeport.deploy.compare import _Spikes as SpikesCompared
from spikeport.deploy.pipeline import rewrite_for
from spikeport.targets.lynxi.simulator import options

TARGETS = ("reference", "lynxi-sim", "onnx", "nir", "cuda", "ipu-sim")
TIMES: tuple[Time, ...] = ("unrolled", "stepped")
STEPS, CHANNELS = 16, 12
#: Steps of the cells that look for what adds up over time.
LONG = 96
#: Neurons converted as one network, side by side.
TOGETHER = 24
VERDICTS = ("equal", "refused", "WRONG")
#: Some spikes differ, each of which parts where rounding can carry the potential over the threshold.
EXPLAINED = "explained"
#: What kind of probe the samples of an input are, in their order.
SAMPLES = ("grid", "exact", "negative", "zeros", "multiples", "noise")


@dataclass(frozen=True)
class Variant:
    """One neuron of one source.

    Attributes:
        source: Framework and release.
        neuron: Its class or kind.
        reset: What its reset is.
        params: How its parameters are given.
        make: Makes the module, [T, N, C] -> spikes [T, N, C].
        steps: Time steps.
    """

    source: str
    neuron: str
    reset: str
    params: str
    make: Callable[[], nn.Module]
    steps: int = STEPS


@dataclass
class Cell:
    """What came of one variant on one target."""

    source: str
    neuron: str
    reset: str
    params: str
    steps: int
    time: str
    target: str
    spikes: int = 0
    fired: int = 0
    differing: int = 0
    explained: bool = False
    refused: str = ""
    failed: str = ""

    @property
    def verdict(self) -> str:
        if self.failed or (self.differing and not self.explained):
            return "WRONG"
        if self.differing:
            return EXPLAINED
        return "refused" if self.refused else "equal"


# Sources


class Loop(nn.Module):
    """A single-step neuron in a loop over time; what it returns besides spikes is handed back.

    Neurons that hear spikes get these back too. ``size`` is that of one step of one sample.
    """

    def __init__(self, layer: nn.Module, size: Sequence[int] = (CHANNELS,)) -> None:
        super().__init__()
        self.layer, self.size = layer, size
        self.hears = hasattr(layer, "recurrent")

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        spikes, state = [], self._initial()
        for x in x_seq:
            out = self.layer(x, *state)
            first, *state = out if isinstance(out, tuple) else (out,)
            state = [first, *state] if self.hears and state else state
            spikes.append(first)
        return torch.stack(spikes)

    def _initial(self) -> Sequence[torch.Tensor]:
        if getattr(self.layer, "init_hidden", True):
            return ()
        state = getattr(self.layer, f"init_{type(self.layer).__name__.lower()}")()
        return state if isinstance(state, tuple) else (state,)


def per_channel(low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, CHANNELS)


def _spikingjelly() -> tuple[str, bool, Any]:
    """Its name and release, whether it is the first generation, and where its neurons are."""
    name = f"SpikingJelly {metadata.version('spikingjelly')}"
    old = name.endswith("0.0.0.0.12")
    package = "spikingjelly.clock_driven" if old else "spikingjelly.activation_based"
    return name, old, importlib.import_module(f"{package}.neuron")


def spikingjelly() -> Iterator[Variant]:
    """IF, LIF and ParametricLIF, step by step and over all steps, in whichever generation is there."""
    name, old, module = _spikingjelly()
    shapes: list[tuple[str, dict[str, Any]]] = [("IFNode", {})]
    for tau, decay in itertools.product((2.0, 3.0), (True, False)):
        shapes.append(("LIFNode", {"tau": tau, "decay_input": decay}))
        shapes.append(("ParametricLIFNode", {"init_tau": tau, "decay_input": decay}))
    for (kind, given), v_reset, v_threshold, step in itertools.product(
        shapes, (0.0, -0.3, 0.2, None), (1.0, 0.3), ("m", "s")
    ):

        def make(
            kind: str = kind,
            given: Mapping[str, Any] = given,
            v_reset: float | None = v_reset,
            v_threshold: float = v_threshold,
            step: str = step,
        ) -> nn.Module:
            given = {**given, "v_reset": v_reset, "v_threshold": v_threshold}
            if old:
                prefix = "MultiStep" if step == "m" else ""
                made = getattr(module, prefix + kind)(**given)
            else:
                made = getattr(module, kind)(**given, step_mode=step)
            return made if step == "m" else Loop(made)

        how = "learned" if kind == "ParametricLIFNode" else "scalar"
        told = ", ".join(f"{n}={v}" for n, v in given.items())
        params = f"{how}, {told + ', ' if told else ''}threshold {v_threshold}, step mode {step}"
        yield Variant(name, kind, _reset(v_reset), params, make)


#: SpikingJelly's other neurons, with what they are made of.
_OTHERS: dict[str, list[dict[str, Any]]] = {
    "SimpleIFNode": [{}],
    "SimpleLIFNode": [{"tau": 2.5, "decay_input": decay} for decay in (True, False)],
    "QIFNode": [{"tau": 2.5, "v_c": 0.7, "a0": 0.9}],
    "EIFNode": [{"tau": 2.5, "delta_T": 0.7}],
    "IzhikevichNode": [{"tau": 2.5, "a": 0.3, "b": 0.2, "tau_w": 3.0, "w_rest": 0.25}],
    "KLIFNode": [
        {"tau": 2.5, "decay_input": decay, "scale_reset": scale}
        for decay, scale in itertools.product((True, False), repeat=2)
    ],
    "ComplementaryLIFNode": [{"tau": 2.5}],
    "CUBALIFNode": [{"c_decay": 0.4, "v_decay": 0.7}],
    "RAFNode": [{}],
    "LIAFNode": [{"tau": 2.5, "act": torch.relu, "threshold_related": True}],
    "HalfThresholdIFNode": [{}],
    "OTTTLIFNode": [{"tau": 2.5, "decay_input": decay} for decay in (True, False)],
    "SLTTLIFNode": [{"tau": 2.5, "decay_input": decay} for decay in (True, False)],
    "TernaryIFNode": [{}],
    "TernaryLIFNode": [{"tau": 2.5, "decay_input": decay} for decay in (True, False)],
    "MPBNLIFNode": [{"out_features": CHANNELS, "learnable_vth": own} for own in (False, True)],
    "DSRIFNode": [{"v_threshold": 1.3}],
    "DSRLIFNode": [{"v_threshold": 0.7, "tau": 0.06}],
    "ILCIFNode": [{"act_dim": 3, "dec_pop_dim": 4}],
    "ILCLIFNode": [{"act_dim": 3, "dec_pop_dim": 4}],
    "ILCCUBALIFNode": [{"act_dim": 3, "dec_pop_dim": 4}],
    "NonSpikingIFNode": [{"decode": how} for how in ("max-mem", "last_mem")],
    "NonSpikingLIFNode": [{"tau": 2.5, "decode": how} for how in ("max-mem", "last_mem")],
}


#: Those that are read as their own arithmetic, step by step: many steps add nothing but time.
_TRACED = (
    "TernaryIFNode",
    "TernaryLIFNode",
    "MPBNLIFNode",
    "ILCIFNode",
    "ILCLIFNode",
    "ILCCUBALIFNode",
)


def spikingjelly_others() -> Iterator[Variant]:
    """Every other neuron that is read, in whichever generation is there."""
    name, old, module = _spikingjelly()
    for kind, v_reset, step in itertools.product(_OTHERS, (0.0, -0.3, None), ("m", "s")):
        made_by = getattr(module, f"MultiStep{kind}" if old and step == "m" else kind, None)
        if made_by is None:
            continue
        takes_reset = "v_reset" in inspect.signature(made_by.__init__).parameters
        if v_reset is not None and not takes_reset:
            continue
        for own in _OTHERS[kind]:
            given = {**own, "v_reset": v_reset} if takes_reset else own

            def make(
                made_by: Any = made_by, given: Mapping[str, Any] = given, step: str = step
            ) -> nn.Module:
                torch.manual_seed(0)
                made: nn.Module = made_by(**given)
                if not old and (step == "s" or hasattr(made, "step_mode")):
                    made.step_mode = step
                if made_by.__name__.startswith("ILC"):
                    made = nn.Sequential(Copied(), made)
                return made if step == "m" else Loop(made)

            if _runs(make):
                told = "".join(f"{n}={getattr(v, '__name__', v)}, " for n, v in own.items())
                yield Variant(name, kind, _reset(v_reset), f"scalar, {told}step mode {step}", make)


def _runs(make: Callable[[], nn.Module]) -> bool:
    """Whether the framework itself makes and computes it, which takes [T, N, C] as it is meant to."""
    try:
        y = make().eval()(torch.zeros(2, 1, CHANNELS))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(y, torch.Tensor)


class Copied(nn.Module):
    """Its input again, which the next layer may write to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.0


def _reset(v_reset: float | None) -> str:
    return "soft" if v_reset is None else f"hard to {v_reset}"


def snntorch() -> Iterator[Variant]:
    """Leaky, Lapicque, Synaptic and Alpha with every reset, delayed or not, hidden state or handed."""
    name = f"snnTorch {metadata.version('snntorch')}"
    snn = importlib.import_module("snntorch")
    kinds: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "Leaky": [
            ("scalar", {"beta": 0.9}),
            ("scalar", {"beta": 0.5}),
            ("learned", {"beta": 0.75, "learn_beta": True, "learn_threshold": True}),
            ("per channel", {"beta": per_channel(0.2, 0.95)}),
            ("per channel", {"beta": 0.8, "threshold": per_channel(0.3, 1.5)}),
        ],
        "Lapicque": [("scalar", {"beta": 0.9}), ("scalar", {"R": 2.0, "C": 3.0, "time_step": 1.0})],
        "Synaptic": [
            ("scalar", {"alpha": 0.5, "beta": 0.75}),
            ("learned", {"alpha": 0.9, "beta": 0.8, "learn_alpha": True, "learn_beta": True}),
            ("per channel", {"alpha": per_channel(0.1, 0.9), "beta": 0.5}),
        ],
        "Alpha": [
            ("scalar", {"alpha": 0.9, "beta": 0.5}),
            ("scalar", {"alpha": 0.8, "beta": 0.7}),
        ],
    }
    for kind, reset, delay, threshold, hidden in itertools.product(
        kinds, ("subtract", "zero", "none"), (True, False), (1.0, 0.5), (True, False)
    ):
        takes_delay = "reset_delay" in inspect.signature(getattr(snn, kind).__init__).parameters
        for how, own in kinds[kind]:
            given = {
                "threshold": threshold,
                "reset_mechanism": reset,
                "reset_delay": delay,
                "init_hidden": hidden,
                **own,
            }
            if threshold != 1.0 and (hidden or "threshold" in own):
                continue
            if not takes_delay:
                if not delay:
                    continue
                del given["reset_delay"]
            told = ", ".join(
                f"{n}={v}" for n, v in own.items() if not isinstance(v, (bool, torch.Tensor))
            )
            state = "hidden" if hidden else "handed"
            yield Variant(
                name,
                kind,
                f"{reset}{', delayed' if delay and reset != 'none' else ''}",
                f"{how}, {told}, threshold {threshold}, state {state}, delay {delay}",
                lambda kind=kind, given=given: Loop(getattr(snn, kind)(**given)),
            )


def snntorch_recurrent() -> Iterator[Variant]:
    """RLeaky and RSynaptic that hear all spikes of their layer, with the options of the others.

    The weights are on a grid, so that sums of spikes are exact in any order.
    """
    name = f"snnTorch {metadata.version('snntorch')}"
    snn = importlib.import_module("snntorch")
    maps = (3, 2, 2)
    connections: dict[str, tuple[Sequence[int], dict[str, Any]]] = {
        "linear": ((CHANNELS,), {"linear_features": CHANNELS}),
        "convolutional": (maps, {"conv2d_channels": maps[0], "kernel_size": 3}),
    }
    synapse: dict[str, dict[str, Any]] = {"RLeaky": {}, "RSynaptic": {"alpha": 0.5}}
    for kind, connection, how, reset, delay, (threshold, hidden) in itertools.product(
        synapse,
        connections,
        ("scalar", "learned", "per channel"),
        ("subtract", "zero", "none"),
        (True, False),
        ((1.0, True), (0.5, False)),
    ):
        if kind == "RSynaptic" and not delay:
            continue  # snnTorch's own forward fails there, in its first step
        size, recurrence = connections[connection]
        each = per_channel(0.2, 0.95).reshape(size)
        given = {
            "beta": each if how == "per channel" else 0.75,
            "threshold": threshold * each.flip(0) if how == "per channel" else threshold,
            "learn_beta": how == "learned",
            "learn_threshold": how == "learned",
            "reset_mechanism": reset,
            "init_hidden": hidden,
            "reset_delay": delay,
            **synapse[kind],
            **recurrence,
        }

        def make(
            kind: str = kind, given: Mapping[str, Any] = given, size: Sequence[int] = size
        ) -> nn.Module:
            layer = getattr(snn, kind)(**given)
            random = torch.Generator().manual_seed(0)
            for weight in layer.recurrent.parameters():
                weight.data = torch.randint(-3, 4, weight.shape, generator=random) / 8
            return Loop(layer, size)

        yield Variant(
            name,
            f"{kind}, {connection}",
            f"{reset}{', delayed' if delay and reset != 'none' else ''}",
            f"{how}, threshold {threshold}, state {'hidden' if hidden else 'handed'}, delay {delay}",
            make,
        )


def native() -> Iterator[Variant]:
    """Declared neurons with every reset, moment of reset, comparison, v_0 and form of parameters."""
    kinds: list[tuple[str, Any, str, dict[str, Any]]] = [
        ("IF", neurons.IF, "scalar", {}),
        ("LIF", neurons.LIF, "scalar", {"tau": 2.0, "v_rest": 0.0}),
        ("LIF", neurons.LIF, "scalar", {"tau": 3.0, "v_rest": -0.2, "decay_input": False}),
        ("LIF", neurons.LIF, "per channel", {"tau": per_channel(1.5, 9.0), "v_rest": 0.1}),
        ("LIF", neurons.LIF, "learned", {"tau": nn.Parameter(torch.tensor(2.5)), "v_rest": 0.0}),
        (
            "ParametricLIF",
            neurons.ParametricLIF,
            "learned",
            {"w": torch.tensor(-0.7), "v_rest": 0.0},
        ),
        ("Leaky", neurons.Leaky, "scalar", {"beta": 0.9}),
        ("Leaky", neurons.Leaky, "per channel", {"beta": per_channel(0.1, 1.0)}),
        ("Lapicque", neurons.Lapicque, "scalar", {"R": 2.0, "C": 3.0, "dt": 1.0}),
        ("Synaptic", neurons.Synaptic, "scalar", {"alpha": 0.8, "beta": 0.6}),
        (
            "CubaLIF",
            neurons.CubaLIF,
            "scalar",
            {"tau_syn": 2.0, "tau_mem": 5.0, "r": 1.5, "v_rest": 0.1},
        ),
    ]
    resets = [("none", "now")]
    resets += [("hard", at) for at in ("now", "next", "before")]
    resets += [("soft", at) for at in ("now", "next", "before", "ahead")]
    for (kind, charge, how, given), (reset, at), fires, thresholds in itertools.product(
        kinds, resets, (">=", ">"), ("scalar", "per channel")
    ):
        population: dict[str, Any] = {"reset": reset, "reset_at": at, "fires": fires}
        if thresholds == "per channel":
            population["v_threshold"] = torch.arange(2, 2 + CHANNELS) / 8
            population["v_0"] = 0.125
        else:
            population["v_threshold"] = 0.5
        if reset == "hard":
            population["v_reset"] = -0.25
        told = ", ".join(f"{n}={v}" for n, v in given.items() if not isinstance(v, torch.Tensor))
        yield Variant(
            "native",
            kind,
            f"{reset}, {at}" if reset != "none" else "none",
            f"{how}, {told}, {fires}, threshold {thresholds}",
            lambda c=charge, g=given, p=population: Node.of(Neuron(c, g, **p)),
        )


def nir_source() -> Iterator[Variant]:
    """NIR's neurons, one value for all or one for each, with gain, leak and reset potentials."""
    nir = importlib.import_module("nir")
    np = importlib.import_module("numpy")
    name, dt = f"NIR {metadata.version('nir')}", 1e-3

    def field(value: float, spread: float) -> Any:
        return value + spread * np.linspace(-1, 1, CHANNELS)

    kinds: dict[str, Callable[[float], dict[str, Any]]] = {
        "IF": lambda s: {"r": field(1 / dt, 300 * s)},
        "LIF": lambda s: {
            "tau": field(2.5 * dt, dt * s),
            "r": field(1.5, 0.5 * s),
            "v_leak": field(0.0, 0.2 * s),
        },
        "CubaLIF": lambda s: {
            "tau_syn": field(2 * dt, 0.5 * dt * s),
            "tau_mem": field(4 * dt, dt * s),
            "r": field(2.0, s),
            "v_leak": field(0.1, 0.1 * s),
            "w_in": field(2.0, 0.5 * s),
        },
        "Threshold": lambda s: {},
    }
    for kind, spread, v_reset, threshold in itertools.product(
        kinds, (0.0, 1.0), (0.0, -0.3, 0.2), (1.0, 0.3)
    ):
        if kind == "Threshold" and v_reset:
            continue

        def make(
            kind: str = kind, s: float = spread, v_reset: float = v_reset, v: float = threshold
        ) -> nn.Module:
            if kind == "Threshold":
                node = nir.Threshold(field(v, 0.1 * s))
            else:
                fields = {**kinds[kind](s), "v_threshold": field(v, 0.1 * s)}
                node = getattr(nir, kind)(**fields, v_reset=field(v_reset, 0.0))
            return NirNetwork(nir.NIRGraph.from_list(node), dt)

        how = "per channel" if spread else "scalar"
        yield Variant(name, kind, _reset(v_reset), f"{how}, threshold {threshold}", make)


SOURCES: dict[str, tuple[str, Callable[[], Iterator[Variant]]]] = {
    "spikingjelly": ("spikingjelly", spikingjelly),
    "spikingjelly-others": ("spikingjelly", spikingjelly_others),
    "snntorch": ("snntorch", snntorch),
    "snntorch-recurrent": ("snntorch", snntorch_recurrent),
    "native": ("torch", native),
    "nir": ("nir", nir_source),
}


def variants(names: Iterable[str], kinds: Sequence[str] = ()) -> list[Variant]:
    """All of these sources, and the first of each kind with each reset over many steps too.

    ``kinds`` are the neurons to take; all unless given.
    """
    found = [v for name in names for v in SOURCES[name][1]() if not kinds or v.neuron in kinds]
    firsts = {(v.source, v.neuron, v.reset): v for v in reversed(found)}
    return found + [
        Variant(v.source, v.neuron, v.reset, v.params, v.make, LONG)
        for v in reversed(firsts.values())
        if v.neuron not in _TRACED
    ]


# Cells


class Parallel(nn.Module):
    """Layers side by side, each with an input and an output of its own."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def drive(layer: nn.Module, steps: int) -> torch.Tensor:
    """The input [T, N, C], or maps of as many, of one neuron, N as in SAMPLES."""
    size = getattr(layer, "size", (CHANNELS,))
    readings = (r for _, _, r in sources.read_all(layer) if isinstance(r, Reading))
    neuron = next(readings, None)
    random = torch.Generator().manual_seed(0)
    grid = torch.randint(-8, 17, (steps, CHANNELS), generator=random) / 8
    threshold = torch.ones(()) if neuron is None else torch.as_tensor(neuron.neuron.v_threshold)
    threshold = threshold.detach().expand(size).flatten()
    exact = grid if neuron is None else probe_inputs(neuron.neuron, steps, size)[:, 0].flatten(1)
    choices = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0])
    factor = choices[torch.randint(0, 5, (steps, CHANNELS), generator=random)]
    negative = (
        torch.where(torch.rand(steps, CHANNELS, generator=random) < 0.2, 4.0, -1.0) * grid.abs()
    )
    noise = torch.randn(steps, CHANNELS, generator=random)
    rows = (grid, exact, negative, torch.zeros_like(grid), factor * threshold, noise)
    return torch.stack(rows, 1).float().unflatten(2, size)


def expected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the source's own module gives."""
    own = copy.deepcopy(layer)
    with torch.no_grad(), sources.isolated(own):
        y: torch.Tensor = own(x)
    return y


def cells(group: Sequence[Variant], targets: Sequence[str], mode: Time) -> list[Cell]:
    """Convert variants of as many steps as one network, and compare their spikes."""
    layers = [v.make().eval() for v in group]
    inputs = [drive(layer, v.steps) for layer, v in zip(layers, group, strict=True)]
    wanted = [expected(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    work = []
    for v, layer, x, y in zip(group, layers, inputs, wanted, strict=True):
        made = [Cell(v.source, v.neuron, v.reset, v.params, v.steps, mode, t) for t in targets]
        for cell in made:
            cell.spikes, cell.fired = y.numel(), int((y != 0).sum())
        work.append(Work(layer, x, y, dict(zip(targets, made, strict=True))))
    able = [t for t in targets if mode in registry.get(t).capabilities.times]
    for w in work:
        for target in {*targets} - {*able}:
            w.cells[target].refused = f"the target takes no {mode} programs"
    _fill(work, able, mode)
    return [cell for w in work for cell in w.cells.values()]


@dataclass
class Work:
    """A neuron, its input, the spikes expected, and its cell for each target."""

    layer: nn.Module
    x: torch.Tensor
    wanted: torch.Tensor
    cells: dict[str, Cell]


def _fill(work: list[Work], targets: Sequence[str], mode: Time) -> None:
    """Set what is refused and what differs; what is refused drops out, and the others go on."""
    if not work:
        return
    net = Parallel(copy.deepcopy([w.layer for w in work])).eval()
    inputs = tuple(w.x for w in work)
    try:
        captured = capture(net, inputs)
    except Exception as error:
        for rest in _without(work, targets, error):
            _fill(rest, targets, mode)
        return
    for target in targets:
        try:
            outputs = run(captured, inputs, target, mode)
        except Exception as error:
            for rest in _without(work, [target], error):
                _fill(rest, [target], mode)
            continue
        for w, found in zip(work, outputs, strict=True):
            cell = w.cells[target]
            cell.differing = int((found != w.wanted).sum())
            cell.explained = bool(cell.differing) and explained(w, target, mode)


def explained(work: Work, target: str, mode: Time) -> bool:
    """Whether every spike at which the target parts from the source is within the reach of rounding."""
    net = Parallel([copy.deepcopy(work.layer)]).eval()
    with tempfile.TemporaryDirectory() as folder, options(storage="float32"):
        program = rewrite_for(capture(net, (work.x,)), target, torch.float32, mode)
        deploy.compile(program, f"{folder}/artifact", cache=False, probe=True)
        with deploy.load(f"{folder}/artifact") as model:
            spikes = SpikesCompared(net, model)
            spikes.compare((work.x,), 0)
    layers = spikes.report()
    return any(layer.first for layer in layers) and not any(layer.unexplained for layer in layers)


def _without(work: list[Work], targets: Sequence[str], error: Exception) -> list[list[Work]]:
    """What is left to do after a refusal or a failure, which is noted where it names its layers."""
    refused = _places(error)
    if len(work) == 1:
        refused.setdefault(0, f"{type(error).__name__}: {error}")
    meant = isinstance(error, (deploy.FindingsError, deploy.UsageError))
    for (i, reason), target in itertools.product(refused.items(), targets):
        setattr(work[i].cells[target], "refused" if meant else "failed", reason)
    if refused:
        return [[w for i, w in enumerate(work) if i not in refused]]
    half = len(work) // 2  # it does not say which
    return [work[:half], work[half:]]


def _places(error: Exception) -> dict[int, str]:
    """The layers that the findings of an error name, with the first reason of each."""
    found: dict[int, str] = {}
    for f in getattr(error, "findings", ()):
        _, _, rest = f.where.partition("layers.")
        index = rest.split(".")[0]
        if index.isdigit() and f.severity == "error":
            found.setdefault(int(index), f"{f.rule}: {f.found}")
    return found


def run(
    captured: Program, inputs: Sequence[torch.Tensor], target: str, mode: Time
) -> tuple[torch.Tensor, ...]:
    """Rewrite, compile, load, run; not verified, so that nothing but the comparison here judges."""
    with tempfile.TemporaryDirectory() as folder, options(storage="float32"):
        program = rewrite_for(captured, target, torch.float32, mode)
        if errors := registry.check(program, registry.get(target)).errors:
            raise deploy.UnsupportedError(f"{target} refuses:", errors)
        deploy.compile(program, f"{folder}/artifact", cache=False, probe=False)
        with deploy.load(f"{folder}/artifact") as model:
            outputs: tuple[torch.Tensor, ...] = model(*inputs)
    return outputs


#: Variants of one kind that are converted together, as places in the list of all; targets; time mode.
Task = tuple[tuple[int, ...], tuple[str, ...], Time]
#: The list of all, in each process.
_chosen: list[Variant] = []


def tasks(chosen: Sequence[Variant], targets: Sequence[str], times: Sequence[Time]) -> list[Task]:
    """The work in pieces."""
    groups = collections.defaultdict(list)
    for i, v in enumerate(chosen):
        groups[v.source, v.neuron, v.steps].append(i)
    found: list[Task] = []
    for (_, _, steps), members in groups.items():
        size = max(1, TOGETHER * STEPS // steps)
        for mode, at in itertools.product(times, range(0, len(members), size)):
            found.append(((*members[at : at + size],), (*targets,), mode))
    return found


def matrix(
    names: Sequence[str],
    kinds: Sequence[str],
    every: int,
    targets: Sequence[str],
    times: Sequence[Time],
    jobs: int,
) -> Iterator[list[Cell]]:
    """The cells of each ``every``-th variant of these sources and neurons, some at a time."""
    work, start = tasks(variants(names, kinds)[::every], targets, times), time.perf_counter()
    # Variants hold functions, so each process makes its own list of them.
    with multiprocessing.get_context("spawn").Pool(jobs, _prepare, (names, kinds, every)) as pool:
        for done, found in enumerate(pool.imap(_cells, work), 1):
            yield found
            seconds = time.perf_counter() - start
            print(f"{done} of {len(work)}, {seconds:.0f} s: {found[0]}", file=sys.stderr)


def _prepare(names: Sequence[str], kinds: Sequence[str], every: int) -> None:
    torch.set_num_threads(1)  # the tensors are small
    logging.getLogger("spikeport").setLevel(logging.ERROR)  # what goes into metadata is no refusal
    _chosen.extend(variants(names, kinds)[::every])


def _cells(task: Task) -> list[Cell]:
    places, targets, mode = task
    return cells([_chosen[i] for i in places], targets, mode)


def runnable(targets: Iterable[str]) -> list[str]:
    """Those that run on this machine; of the others standard error says why not."""
    found = []
    for name in targets:
        try:
            registry.get(name).sdk()
            found.append(name)
        except deploy.TargetUnavailableError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


# The table


def table(found: Sequence[Cell]) -> str:
    """A line for each neuron and reset: cells equal, refused and wrong by target."""
    targets = [t for t in TARGETS if any(c.target == t for c in found)]
    ran = [c for c in found if not c.refused]
    lines = [
        f"{len(found)} cells: "
        + ", ".join(
            f"{count} {verdict}"
            for verdict in (*VERDICTS, EXPLAINED)
            if (count := sum(c.verdict == verdict for c in found)) or verdict == "WRONG"
        ),
        f"{sum(c.spikes for c in ran):,} outputs compared, {sum(c.fired for c in ran):,} of them "
        f"spikes, {sum(c.differing for c in found):,} differing",
        "",
        "equal / refused / wrong cells, by target; +n: as many that rounding explains",
        "",
    ]
    groups = collections.defaultdict(list)
    for c in found:
        how = c.params.partition(",")[0]
        groups[c.source, c.neuron, c.reset, how, f"T={c.steps}", c.time].append(c)
    head = ("source", "neuron", "reset", "parameters", "steps", "time", *targets)
    rows = [head]
    for key, members in groups.items():
        counts = []
        for t in targets:
            own = [c.verdict for c in members if c.target == t]
            shown = "/".join(str(own.count(v)) for v in VERDICTS)
            shown += f"+{own.count(EXPLAINED)}" if EXPLAINED in own else ""
            counts.append(shown if own else "-")
        rows.append((*key, *counts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += [
        "  ".join(p.ljust(w) for p, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    refused = [(c.target, c.neuron, c.refused.partition("; the neuron is")[0]) for c in found]
    reasons = collections.Counter(reason for reason in refused if reason[2])
    wrong = [c for c in found if c.verdict == "WRONG"]
    if wrong:
        lines += ["", "WRONG", *(f"  {c}" for c in wrong)]
    if reasons:
        lines += ["", "refused"]
        lines += [f"  {n:4}  {t}: {kind}: {why}" for (t, kind, why), n in sorted(reasons.items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", nargs="+", choices=SOURCES, help="default: all importable")
    parser.add_argument("--neuron", nargs="+", default=[], metavar="KIND", help="default: all")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), help="default: all")
    parser.add_argument(
        "--time", nargs="+", choices=TIMES, default=list(TIMES), help="default: all"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th neuron alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="cells of all runs, as JSON")
    args = parser.parse_args()
    there = [n for n, (m, _) in SOURCES.items() if importlib.util.find_spec(m) is not None]
    targets = runnable(args.target)
    chosen = args.source or there
    found: list[Cell] = []
    kept = []
    if args.keep and args.keep.is_file():
        kept = [Cell(**c) for c in json.loads(args.keep.read_text(encoding="utf-8"))]
    own = {(v.source, v.neuron) for v in variants(chosen, args.neuron)}
    anew = set(itertools.product(own, targets, args.time))
    kept = [c for c in kept if ((c.source, c.neuron), c.target, c.time) not in anew]
    for some in matrix(chosen, args.neuron, args.every, targets, args.time, args.jobs):
        found += some
        if args.keep:
            cells_so_far = json.dumps([asdict(c) for c in kept + found])
            args.keep.write_text(cells_so_far, encoding="utf-8")
    found = kept + found
    on = "interpreted on the CPU" if os.environ.get("TRITON_INTERPRET") == "1" else "on a GPU"
    print(f"python {platform.python_version()}, torch {torch.__version__}, float32; cuda {on}")
    print(table(found))
    return int(any(c.verdict == "WRONG" for c in found))


if __name__ == "__main__":
    sys.exit(main())
