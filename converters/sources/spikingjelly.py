"""SpikingJelly 2.0.0 and 0.0.0.0.14 (``spikingjelly.activation_based``), 0.0.0.0.12 (``clock_driven``).

Its stateless layers and containers trace as they are; only neurons and other keepers of state need
reading. The generations compute the same equations in other orders of rounding, which the declaration
tells apart: 0.0.0.0.14 is the one of ``activation_based`` whose neurons have a ``backend``, and in
``clock_driven`` the multi-step neurons are classes of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from .. import neurons
from ..equations import Dynamics
from ..errors import Finding, UsageError
from ..neurons import Neuron
from ..surrogates import KINDS, Surrogate, Window
from .base import (
    Cell,
    Fires,
    Learning,
    Memory,
    Read,
    Reading,
    comparison,
    look_alike,
    same_derivative,
    surrogate_output,
    unknown_surrogate,
)

_ONLINE = ("OTTTLIFNode", "SLTTLIFNode")
#: Surrogates that are declared under another name; the rest keep theirs.
_SURROGATES = {"Erf": "Gaussian", "Rect": "Rectangle", "DeterministicPass": "StraightThrough"}
_STATELESS_IN_EVAL = ("Dropout", "Dropout2d", "MultiStepDropout", "MultiStepDropout2d")
#: Layers whose state is plain arithmetic on what came before.
_MEMORIES = (
    "BatchNormThroughTime1d",
    "BatchNormThroughTime2d",
    "BatchNormThroughTime3d",
    "Delay",
    "ElementWiseRecurrentContainer",
    "LinearRecurrentContainer",
    "NeuNorm",
    "SynapseFilter",
)
#: Those whose first step, in 0.0.0.0.14, is made of ``x.data``.
_FROM_DATA = ("Delay", "ElementWiseRecurrentContainer", "SynapseFilter")


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "spikingjelly"


def _clock_driven(kind: type) -> bool:
    return kind.__module__.startswith("spikingjelly.clock_driven.")


def _old(module: nn.Module) -> bool:
    """Whether it is a neuron of 0.0.0.0.14 or 0.0.0.0.12."""
    return _clock_driven(type(module)) or hasattr(module, "backend")


class SpikingJelly:
    """Reads the neurons of ``_KNOWN``; refuses every other keeper of state by name."""

    name = "spikingjelly"

    def read(self, module: nn.Module, path: str) -> Read | None:
        """The neuron or the memory, or why it cannot be read."""
        kind = type(module)
        bases = [k for k in kind.__mro__ if _ours(k)]
        if not any(k.__name__ in _KEEPERS for k in bases):
            return None
        if not _ours(kind):
            return [look_alike(module, path, f"{bases[0].__module__}.{bases[0].__qualname__}")]
        name = kind.__name__
        if name in _STATELESS_IN_EVAL:
            return None
        if name in _MEMORIES and kind.__module__.split(".")[2] == "layer":
            early = kind.__module__.endswith(".layer") and name in _FROM_DATA
            return [_from_data(kind, path)] if early else Memory(_step_mode(module))
        known = _KNOWN.get(name.removeprefix("MultiStep") if _clock_driven(kind) else name)
        home = _HOMES.get(name, ("neuron",))
        if known is None or kind.__module__.split(".")[2 : 2 + len(home)] != list(home):
            shown = f"{kind.__module__}.{name}" if name in _KNOWN else name
            return [
                Finding(
                    rule="unknown-neuron",
                    where=path,
                    found=f"{shown}, with {_WHY.get(name, 'state that it keeps from step to step')}",
                    allowed=", ".join(_KNOWN),
                    fix=_ENCODE if ".encoding" in kind.__module__ else _DECLARE,
                )
            ]
        return list(_obstacles(module, path)) or known(module)

    def learning(
        self, module: Any, path: str, surrogate: Surrogate | None = None
    ) -> Learning | list[Finding]:
        """By backpropagation through time, as its ``detach_reset`` and surrogate function say."""
        if type(module).__name__ in _ONLINE:
            return [
                Finding(
                    rule="online-neuron",
                    where=path,
                    found=f"{type(module).__name__}, which learns online",
                    allowed="neurons that learn by backpropagation through time",
                    fix="use a LIFNode",
                )
            ]
        reading = self.read(module, path)
        assert isinstance(reading, Reading)
        if reading.cell is not None or not hasattr(module, "surrogate_function"):
            return [_untaught(module, path)]
        chosen = surrogate or _surrogate(module.surrogate_function)
        if chosen is None:
            return [unknown_surrogate(module.surrogate_function, path)]
        if derived := [n for n in reading.neuron.tensors() if not hasattr(module, n)]:
            return [
                Finding(
                    rule="derived-parameter",
                    where=path,
                    found=f"{type(module).__name__}, whose {', '.join(derived)} follows from others",
                    allowed="neurons that learn the parameters of their declaration",
                    fix="train it where it was made, or declare a neuron of these parameters",
                )
            ]
        return Learning(chosen, partial(_live, reading.neuron), module.detach_reset)

    def reset(self, module: nn.Module) -> None:
        """As ``functional.reset_net``."""
        if any(_ours(k) and k.__name__ == "MemoryModule" for k in type(module).__mro__):
            module.reset()  # type: ignore[operator]


_DECLARE = (
    "use one of those, or declare its dynamics (spikeport.converters.neurons.dynamics) and make the class "
    "known (spikeport.converters.sources.register)"
)
_ENCODE = "encode outside the network, and give it the spikes [T, N, ...]"


def _untaught(module: nn.Module, path: str) -> Finding:
    return Finding(
        rule="inference-neuron",
        where=path,
        found=f"{type(module).__name__}, which is read for inference alone",
        allowed="neurons that fire, and learn by a surrogate gradient, as they are declared",
        fix="train it where it was made, or use one of those",
    )


def _live(neuron: Neuron, module: Any) -> Neuron:
    return neuron.replace_tensors({name: getattr(module, name) for name in neuron.tensors()})


def _surrogate(function: Any) -> Surrogate | None:
    """The declared surrogate that a surrogate function is."""
    kind = KINDS.get(_SURROGATES.get(type(function).__name__, type(function).__name__))
    if kind is None or any(not hasattr(function, name) for name in kind.defaults):
        return None
    found = [kind(**{name: getattr(function, name) for name in kind.defaults})]
    if kind.name == "PiecewiseLeakyReLU":  # of half the height since 2.0.0
        found.append(Window(w=function.w, height=1 / (2 * function.w), c=function.c))
    return next((s for s in found if same_derivative(function, s)), None)


#: Classes whose descendants keep state.
_KEEPERS = (
    "MemoryModule",
    "NonSpikingBaseNode",
    "ILCBaseNode",
    "NoisyBaseNode",
    "NoisyNonSpikingBaseNode",
    "PSN",
)


def _from_data(kind: type, path: str) -> Finding:
    name, release = kind.__name__, "0.0.0.0.12" if _clock_driven(kind) else "0.0.0.0.14"
    return Finding(
        rule="untraceable",
        where=path,
        found=f"{name} of {release}, which starts from x.data, where torch.export loses the trace",
        allowed=f"{name} of 2.0.0",
        fix="load the network in SpikingJelly 2.0.0",
    )


# Each kind of neuron as it is read


def _rest(module: Any) -> float:
    return 0.0 if module.v_reset is None else float(module.v_reset)


def _fires(module: Any) -> Literal[">=", ">"] | None:
    """How it fires at the threshold; None if its surrogate is no step."""
    surrogate, kind = module.surrogate_function, type(module)
    if not getattr(surrogate, "spiking", True):
        return None
    early = _old(module) and not _clock_driven(kind)
    if kind.__name__ in _AT_THRESHOLD or (early and kind.__name__ in ("IFNode", "LIFNode")):
        return ">="
    return comparison(surrogate)


#: In eval mode these fire at the threshold, whatever the surrogate; IF and LIF of 0.0.0.0.14 do too.
_AT_THRESHOLD = ("OTTTLIFNode", "SLTTLIFNode", "ComplementaryLIFNode")


def _population(
    module: Any, dynamics: Dynamics, params: dict[str, Any], resets: bool = True
) -> Neuron:
    reset: Literal["hard", "soft"] = "soft" if module.v_reset is None else "hard"
    return Neuron(
        dynamics,
        params,
        v_threshold=module.v_threshold,
        v_reset=_rest(module),
        reset=reset if resets else "none",
        fires=_fires(module) or ">=",
        v_0=module._memories_rv["v"],
    )


def _step_mode(module: Any) -> Literal["s", "m"]:
    if _clock_driven(type(module)):
        return "m" if type(module).__name__.startswith("MultiStep") else "s"
    mode: Literal["s", "m"] = module.step_mode
    return mode


def _leak(module: Any) -> dict[str, Any]:
    return {"v_rest": _rest(module), "decay_input": module.decay_input}


def _if(module: Any) -> Reading:
    return Reading(_population(module, neurons.IF, {}), _step_mode(module))


def _lif(module: Any) -> Reading:
    unrested = _rest(module) == 0.0 if _clock_driven(type(module)) else module.v_reset is None
    factored = _old(module) and not module.decay_input and unrested
    params = {**_leak(module), "tau": module.tau, "factored": factored}
    return Reading(_population(module, neurons.LIF, params), _step_mode(module))


def _plif(module: Any) -> Reading:
    factored = _old(module) and not module.decay_input and _rest(module) == 0.0
    params = {**_leak(module), "w": module.w, "factored": factored}
    return Reading(_population(module, neurons.ParametricLIF, params), _step_mode(module))


def _quadratic(module: Any) -> dict[str, Any]:
    return {"tau": module.tau, "v_rest": module.v_rest, "v_c": module.v_c, "a_0": module.a0}


def _qif(module: Any) -> Reading:
    return Reading(_population(module, neurons.QIF, _quadratic(module)), _step_mode(module))


def _eif(module: Any) -> Reading:
    params = {name: getattr(module, name) for name in neurons.EIF.parameters}
    return Reading(_population(module, neurons.EIF, params), _step_mode(module))


def _izhikevich(module: Any) -> Reading:
    own = {name: getattr(module, name) for name in ("tau_w", "a", "b")}
    own |= {"w_rest": module._memories_rv["w"], "factored": _old(module)}
    params = {**_quadratic(module), **own}
    return Reading(_population(module, neurons.Izhikevich, params), _step_mode(module))


def _klif(module: Any) -> Reading:
    params = {**_leak(module), "tau": module.tau, "k": module.k}
    if not module.scale_reset:
        return Reading(_population(module, neurons.KLIF, params), _step_mode(module))
    params |= {"jump": module.v_threshold, "soft": module.v_reset is None}
    neuron = _population(module, neurons.RescaledKLIF, params, resets=False)
    return Reading(neuron, _step_mode(module))


def _clif(module: Any) -> Reading:
    params = {"tau": module.tau, "jump": module.v_threshold}
    neuron = _population(module, neurons.CLIF, params, resets=False)
    return Reading(neuron, _step_mode(module))


def _cuba(module: Any) -> Reading:
    params = {"alpha": module.c_decay, "beta": module.v_decay}
    return Reading(_population(module, neurons.Synaptic, params), _step_mode(module))


def _raf(module: Any) -> Reading:
    angle, decay = module.omega * module.dt, math.exp(module.b * module.dt)
    params = {"decay": decay, "cos": math.cos(angle), "sin": math.sin(angle)}
    return Reading(_population(module, neurons.RAF, params), _step_mode(module))


def _liaf(module: Any) -> Reading:
    mode = _step_mode(module)
    if mode == "m" and not (module.store_v_seq and hasattr(module, "materialize_states")):
        return _lif(module)  # whose forward over all steps it inherits
    below = module.v_threshold if module.threshold_related else 0.0

    def analog(h: torch.Tensor) -> Any:
        return module.act(h - below if below else h)

    def each(h_seq: torch.Tensor) -> torch.Tensor:
        return torch.stack([analog(h) for h in h_seq.unbind()])

    neuron = _population(module, neurons.LIAF, {**_leak(module), "tau": module.tau})
    return Reading(neuron, mode, readout=analog if mode == "s" else each, state=1)


def _psn(module: Any) -> Reading:
    """A linear map over time, which traces as it is, and a step."""
    neuron = Neuron(neurons.Heaviside, v_threshold=0.0, reset="none", fires=_fires(module) or ">=")
    return Reading(neuron, part="surrogate_function")


def _dsr_if(module: Any) -> Reading:
    return _represented(module, neurons.DSRIF, {}, 1.0)


def _dsr_lif(module: Any) -> Reading:
    if not module.tau > 0:
        raise UsageError(f"tau is {module.tau:g}; allowed: time constants above 0")
    decay = math.exp(-module.delta_t / module.tau)
    return _represented(module, neurons.DSRLIF, {"decay": decay, "gain": 1 - decay}, module.delta_t)


def _represented(module: Any, kind: Dynamics, params: dict[str, Any], duration: float) -> Reading:
    """Neurons whose spikes are as high as what they subtract, per unit of time."""
    height = module.v_threshold.detach().clamp(min=module.v_threshold_lower_bound)
    threshold = (module.alpha * height).item()
    neuron = Neuron(kind, {**params, "jump": height.item()}, v_threshold=threshold, reset="none")
    return Reading(neuron, gain=height / duration)


def _arithmetic(module: Any, *uses: str) -> Reading:
    """Neurons whose charge and reset trace as they are, and which fire by their surrogate function.

    ``uses`` tells its calls of one step apart, where there are several.
    """
    neuron = Neuron(neurons.Heaviside, v_threshold=0.0, reset="none", fires=_fires(module) or ">=")
    mode: Literal["s", "m"] = getattr(module, "step_mode", "m")
    return Reading(neuron, mode, cell=Cell(partial(_traced, uses or ("",)), _spikes))


def _ternary(module: Any) -> Reading:
    return _arithmetic(module, "", "below")


def _spikes(module: Any, u: torch.Tensor) -> torch.Tensor:
    spikes: torch.Tensor = module.surrogate_function(u)
    return spikes


class _Step(nn.Module):
    """Fires in the place of a surrogate function."""

    def __init__(self, uses: tuple[str, ...], fires: Fires) -> None:
        super().__init__()
        self._uses, self._fires = itertools.cycle(uses), fires

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return self._fires(u, next(self._uses))


class _Remembering(nn.Module):
    """What comes before the methods of neurons that keep values on themselves, and trace as they are."""

    fires: Fires

    def forward(self, *args: Any) -> Any:
        if self.fires.fresh:
            super().reset()  # type: ignore[misc]
        return super().forward(*args)

    def reset(self) -> None:
        self.fires.restart()
        super().reset()  # type: ignore[misc]


class _Starting(nn.Module):
    """What comes before the methods of neurons whose state begins in the shape of ``x.data``."""

    def init_tensor(self, data: torch.Tensor) -> None:
        # torch.export loses the trace of data, of which nothing but the shape is asked.
        shaped = torch.zeros(data.shape, dtype=data.dtype, device=data.device)
        super().init_tensor(shaped)  # type: ignore[misc]


def _traced(uses: tuple[str, ...], module: Any, fires: Fires) -> nn.Module:
    kind = type(module)
    module.surrogate_function = _Step(uses, fires)
    if hasattr(kind, "reset"):
        module.fires = fires
        module.__class__ = type(kind.__name__, (_Remembering, kind), {})
    elif hasattr(kind, "init_tensor"):
        module.__class__ = type(kind.__name__, (_Starting, kind), {})
    made: nn.Module = module
    return made


def _integrator(module: Any) -> Reading:
    """Neurons that do not fire, each call of which starts anew."""
    tau = getattr(module, "tau", None)
    kind = neurons.IF if tau is None else neurons.LIF
    params = {} if tau is None else {"tau": tau, "v_rest": 0.0}
    return Reading(Neuron(kind, params, reset="none"), readout=_DECODERS.get(module.decode, _each))


def _each(v_seq: torch.Tensor) -> list[torch.Tensor]:
    return list(v_seq.unbind())


def _farthest(v_seq: torch.Tensor) -> torch.Tensor:
    highest, lowest = v_seq.amax(0), v_seq.amin(0)
    above = highest.abs() > lowest.abs()
    return highest * above + lowest * ~above


#: What an integrator returns of its potentials, by the value of ``decode``.
_DECODERS: dict[str | None, Callable[[torch.Tensor], Any]] = {
    "max-mem": lambda v_seq: v_seq.amax(0),
    "max-abs-mem": _farthest,
    "mean-mem": lambda v_seq: v_seq.mean(0),
    "last_mem": lambda v_seq: v_seq[-1],
}

_KNOWN: dict[str, Callable[[Any], Reading | Memory]] = {
    "IFNode": _if,
    "SimpleIFNode": _if,
    "HalfThresholdIFNode": _if,
    "LIFNode": _lif,
    "SimpleLIFNode": _lif,
    "OTTTLIFNode": _lif,
    "SLTTLIFNode": _lif,
    "save_v_LIFNode": _lif,
    "ParametricLIFNode": _plif,
    "QIFNode": _qif,
    "EIFNode": _eif,
    "IzhikevichNode": _izhikevich,
    "KLIFNode": _klif,
    "ComplementaryLIFNode": _clif,
    "CUBALIFNode": _cuba,
    "RAFNode": _raf,
    "LIAFNode": _liaf,
    "PSN": _psn,
    "SlidingPSN": _psn,
    "NonSpikingIFNode": _integrator,
    "NonSpikingLIFNode": _integrator,
    "DSRIFNode": _dsr_if,
    "DSRLIFNode": _dsr_lif,
    "GatedLIFNode": _arithmetic,
    "MPBNLIFNode": _arithmetic,
    "TernaryIFNode": _ternary,
    "TernaryLIFNode": _ternary,
    "ILCIFNode": _arithmetic,
    "ILCLIFNode": _arithmetic,
    "ILCCUBALIFNode": _arithmetic,
    "NoisyCUBALIFNode": _arithmetic,
    "NoisyILCCUBALIFNode": _arithmetic,
    "NoisyNonSpikingIFNode": lambda _: Memory(),
}
#: The modules of the package in which those are defined that are not in ``neuron``.
_HOMES = {"save_v_LIFNode": ("model", "spike_dhs")}

#: Why others are not declared.
_WHY = {
    "STBIFNode": "spikes of both signs, by what it has fired before",
    "ILIFNode": "several spikes at a step",
    "MaskedPSN": "a mask over time that the value of a buffer chooses",
}

#: Of 0.0.0.0.14, those whose other backends are for training alone.
_TORCH_IN_EVAL = ("IFNode", "LIFNode")


def _obstacles(module: Any, path: str) -> Iterator[Finding]:
    def finding(rule: str, found: str, allowed: str, fix: str) -> Finding:
        return Finding(rule=rule, where=path, found=found, allowed=allowed, fix=fix)

    name = type(module).__name__
    if hasattr(module, "surrogate_function") and _fires(module) is None:
        yield surrogate_output(module.surrogate_function, path)
    old = _clock_driven(type(module))
    if getattr(module, "backend", "torch") != "torch" and (old or name not in _TORCH_IN_EVAL):
        how = "" if old else ": functional.set_backend(net, 'torch')"
        yield finding(
            "neuron-backend",
            f"backend={module.backend!r}, whose kernels round in another order",
            "backend='torch'",
            f"set the neuron's backend to 'torch' before the conversion{how}",
        )
    starts = getattr(module, "_memories_rv", {})
    shaped = {n: v for n, v in starts.items() if isinstance(v, torch.Tensor) and v.dim()}
    if shaped and not _old(module):
        named = ", ".join(f"{n} {list(v.shape)}" for n, v in shaped.items())
        yield finding(
            "start-value",
            f"a tensor to start from, {named}, which SpikingJelly 2.0 takes for inputs of that shape alone "
            "and passes over for others",
            "a number to start from",
            f"set it to a number (set_reset_value({next(iter(shaped))!r}, 0.5))",
        )
    if getattr(module, "_neuron_precision", None) is not None:
        yield finding(
            "neuron-precision",
            "an explicit neuron precision, which runs on CUDA only",
            "a neuron that computes in its input's dtype",
            "clear the neuron precision before the conversion",
        )
    if getattr(module, "is_training", False):
        yield finding(
            "noise",
            "is_training=True, with which it adds noise to its input and its spikes",
            "is_training=False",
            "make the network with is_training=False for what it computes without noise",
        )
    if name == "SlidingPSN" and _step_mode(module) == "s":
        yield finding(
            "step-mode",
            f"{name} step by step",
            "step_mode='m'",
            "set step_mode='m' (functional.set_step_mode(net, 'm')) and give [T, N, ...]",
        )
