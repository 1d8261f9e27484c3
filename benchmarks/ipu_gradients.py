"""Networks rewritten for the IPU, and their gradients against those of the source's own autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spikeport.converters import neurons, surrogates
from spikeport.targets import ipu

T, N, F = 8, 6, 12


@dataclass(frozen=True)
class Case:
    """Two layers of one kind of neuron, as a source makes them.

    Attributes:
        source: The framework.
        neuron: The kind.
        reset: Its reset.
        surrogate: Its surrogate gradient.
        make: Makes a layer.
    """

    source: str
    neuron: str
    reset: str
    surrogate: str
    make: Callable[[], nn.Module]


class Layers(nn.Module):
    """x [T, N, F] -> spikes [T, N, F]; single-step neurons in a loop, their state handed on."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(F, F) for _ in range(2))
        self.neurons = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: Any = self.neurons[0]
        if not (hasattr(first, "reset_mem") or getattr(first, "step_mode", "m") == "s"):
            for fc, neuron in zip(self.fc, self.neurons, strict=True):
                x = neuron(fc(x))
            return x
        states = [
            neuron.reset_mem() if hasattr(neuron, "reset_mem") else () for neuron in self.neurons
        ]
        states = [s if isinstance(s, tuple) else (s,) for s in states]
        steps = []
        for step in x:
            for i, (fc, neuron) in enumerate(zip(self.fc, self.neurons, strict=True)):
                out = neuron(fc(step), *states[i])
                step, *states[i] = out if isinstance(out, tuple) else (out,)
            steps.append(step)
        return torch.stack(steps)


def cases() -> Iterator[Case]:
    """Every source, neuron, reset and surrogate."""
    yield from _spikingjelly()
    yield from _snntorch()
    yield from _native()


def _spikingjelly() -> Iterator[Case]:
    from spikingjelly.activation_based import neuron
    from spikingjelly.activation_based import surrogate as theirs

    kinds = {
        "IF": (neuron.IFNode, {}),
        "LIF": (neuron.LIFNode, {}),
        "LIF, decay_input=False": (neuron.LIFNode, {"decay_input": False}),
        "ParametricLIF": (neuron.ParametricLIFNode, {}),
        "ParametricLIF, decay_input=False": (neuron.ParametricLIFNode, {"decay_input": False}),
    }
    names = (
        *("ATan", "Sigmoid", "SoftSign", "SuperSpike", "PiecewiseQuadratic", "PiecewiseExp"),
        *("NonzeroSignLogAbs", "Erf", "PiecewiseLeakyReLU", "S2NN", "QPseudoSpike", "LeakyKReLU"),
        *("LogTailedReLU", "DeterministicPass", "Rect"),
    )
    resets = {"hard": 0.0, "hard, v_reset = -0.2": -0.2, "soft": None}
    for (name, (kind, given)), (reset, v_reset), detach, mode, surrogate in itertools.product(
        kinds.items(), resets.items(), (False, True), "sm", names
    ):

        def make(
            kind: Any = kind,
            given: Any = given,
            v_reset: Any = v_reset,
            detach: bool = detach,
            mode: str = mode,
            surrogate: str = surrogate,
        ) -> nn.Module:
            function = getattr(theirs, surrogate)()
            made: nn.Module = kind(
                v_reset=v_reset,
                detach_reset=detach,
                step_mode=mode,
                surrogate_function=function,
                **given,
            )
            return made

        yield Case("SpikingJelly", name, reset + ", detached" * detach, surrogate, make)


def _snntorch() -> Iterator[Case]:
    import snntorch as snn
    from snntorch import surrogate as theirs

    kinds: dict[str, tuple[Any, dict[str, Any], tuple[bool, ...]]] = {
        "Leaky": (snn.Leaky, {"beta": 0.9, "learn_beta": True}, (True, False)),
        "Synaptic": (
            snn.Synaptic,
            {"alpha": 0.6, "beta": 0.8, "learn_alpha": True, "learn_threshold": True},
            (True, False),
        ),
        "Alpha": (snn.Alpha, {"alpha": 0.7, "beta": 0.5}, ()),
        "Lapicque": (snn.Lapicque, {"beta": 0.8, "threshold": 0.3}, ()),
    }
    names = (
        *("atan", "sigmoid", "fast_sigmoid", "straight_through_estimator", "heaviside"),
        *("triangular", "spike_rate_escape", "SFS"),
    )
    for name, (kind, given, delays) in kinds.items():
        choices = itertools.product(("subtract", "zero", "none"), delays or (None,), names)
        for reset, delay, surrogate in choices:
            # snnTorch's sigmoid overflows, and gives NaN, where slope u < -88.
            slope = [2] if surrogate == "sigmoid" else []

            def make(
                kind: Any = kind,
                given: Any = given,
                slope: Any = slope,
                reset: str = reset,
                delay: bool | None = delay,
                surrogate: str = surrogate,
            ) -> nn.Module:
                more = {} if delay is None else {"reset_delay": delay}
                made: nn.Module = kind(
                    **given,
                    **more,
                    reset_mechanism=reset,
                    spike_grad=getattr(theirs, surrogate)(*slope),
                )
                return made

            late = "" if delay is not False else ", reset_delay=False"
            yield Case("snnTorch", name, reset + late, surrogate, make)


def _native() -> Iterator[Case]:
    kinds: dict[str, tuple[neurons.Dynamics, dict[str, Any]]] = {
        "IF": (neurons.IF, {}),
        "LIF": (neurons.LIF, {"tau": 2.0, "v_rest": 0.0}),
        "LIF, decay_input=False": (neurons.LIF, {"tau": 2.0, "v_rest": 0.0, "decay_input": False}),
        "ParametricLIF": (neurons.ParametricLIF, {"v_rest": 0.0, "w": 0.3}),
        "Leaky": (neurons.Leaky, {"beta": 0.9}),
        "Synaptic": (neurons.Synaptic, {"alpha": 0.6, "beta": 0.8}),
        "Alpha": (neurons.Alpha, {"alpha": 0.7, "beta": 0.5, "tau": 2.1, "zero": True}),
        "Lapicque": (neurons.Lapicque, {"R": 5.0, "C": 1.0, "dt": 1.0}),
        "Adaptive": (adaptive(), {"tau": 2.0, "tau_w": 20.0, "a": 0.1, "b": 0.2}),
    }
    resets = {
        "hard": {"v_reset": 0.0},
        "hard, v_reset = -0.2": {"v_reset": -0.2},
        "soft": {"v_reset": None},
        "hard, next step": {"v_reset": 0.0, "reset_at": "next"},
        "soft, next step": {"v_reset": None, "reset_at": "next", "fires": ">"},
        "hard, before": {"v_reset": 0.0, "reset_at": "before"},
        "soft, ahead": {"v_reset": None, "reset_at": "ahead"},
    }
    for (name, (kind, given)), (reset, more), detach, surrogate in itertools.product(
        kinds.items(), resets.items(), (False, True), surrogates.KINDS.values()
    ):

        def make(
            kind: Any = kind,
            given: Any = given,
            more: Any = more,
            detach: bool = detach,
            surrogate: Any = surrogate,
        ) -> nn.Module:
            learned = {
                n: nn.Parameter(torch.tensor(v)) if n in ("w", "beta", "tau_w") else v
                for n, v in given.items()
            }
            return neurons.Node(kind, **learned, **more, detach_reset=detach, surrogate=surrogate())

        yield Case("spikeport", name, reset + ", detached" * detach, surrogate.name, make)


def adaptive() -> neurons.Dynamics:
    """A neuron of one's own, with an adaptation current that follows v and jumps at a spike."""

    @neurons.dynamics(states={"w": 0.0, "s": 0.0})
    def Adaptive(v: Any, w: Any, s: Any, x: Any, *, tau: Any, tau_w: Any, a: Any, b: Any) -> Any:  # noqa: N802
        w = w + (a * v - w) / tau_w + b * s
        return v + (x - w - v) / tau, w

    return Adaptive


def difference(case: Case) -> tuple[int, int, float, float]:
    """Spikes that differ, spikes in all, and the largest errors of gradients.

    Those of the layers' weights relative to each one's norm; those of the neurons' own parameters, single
    numbers that are sums of terms which cancel, relative to the norm of the whole gradient.
    """
    torch.manual_seed(0)
    net = Layers(case.make)
    for fc in net.fc:
        nn.init.normal_(fc.weight, std=0.6)  # so that both layers fire
    x, weights = torch.randn(T, N, F) * 1.5 + 0.5, torch.randn(T, N, F)
    model = ipu.training_module(net, loss=lambda spikes, label: (spikes * weights).sum())
    spikes, ours = net(x), model.net(x)
    (spikes * weights).sum().backward()
    (ours * weights).sum().backward()
    theirs = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    whole = torch.cat([g.flatten().double() for g in theirs.values()]).norm()
    assert whole.isfinite(), case
    errors = {"fc": 0.0, "neurons": 0.0}
    for name, p in model.net.named_parameters():
        wanted, kind = theirs.get(name), name.split(".")[0]
        if wanted is None or p.grad is None:
            assert wanted is None or not wanted.any(), (case, name)
            continue
        norm = wanted.double().norm() if kind == "fc" else whole
        error = float((p.grad - wanted).double().norm())
        errors[kind] = max(errors[kind], error / float(norm) if error else 0.0)
    return int((ours != spikes).sum()), spikes.numel(), errors["fc"], errors["neurons"]
