"""The conformance matrix's sources: every neuron of each framework, with its resets and parameters."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from spikeport.converters import neurons
from spikeport.converters.neurons import Neuron, Node
from spikeport.converters.sources.nir import NirNetwork

STEPS, CHANNELS = 16, 12
#: Steps of the cells that look for what adds up over time.
LONG = 96


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
