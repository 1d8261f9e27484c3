"""SpikingJelly 2.0.0 and 0.0.0.0.14 (``spikingjelly.activation_based``), 0.0.0.0.12 (``clock_driven``).

Its stateless layers and containers trace as they are; only neurons and other keepers of state need
reading. The generations compute the same equations in other orders of rounding, which the declaration
tells apart: 0.0.0.0.14 is the one of ``activation_based`` whose neurons have a ``backend``, and in
``clock_driven`` the multi-step neurons are classes of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from .. import neurons
from ..errors import Finding
from ..neurons import Neuron
from .base import Reading, comparison, look_alike, surrogate_output

#: Names of the neurons that are read, with the modules of the package that they are defined in.
_KNOWN = {
    "IFNode": ("neuron",),
    "LIFNode": ("neuron",),
    "ParametricLIFNode": ("neuron",),
    # LIF whose training is online; in eval mode they fire at the threshold, whatever the surrogate.
    "OTTTLIFNode": ("neuron",),
    "SLTTLIFNode": ("neuron",),
    # LIF that remembers the mean of its potential for the search of an architecture.
    "save_v_LIFNode": ("model", "spike_dhs"),
}
#: Neurons that do not fire, each call of which starts anew (2.0.0).
_READOUTS = ("NonSpikingIFNode", "NonSpikingLIFNode")
_ONLINE = ("OTTTLIFNode", "SLTTLIFNode")
_NOT_LIF = ("IFNode", "ParametricLIFNode")
_STATELESS_IN_EVAL = ("Dropout", "Dropout2d", "MultiStepDropout", "MultiStepDropout2d")


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "spikingjelly"


def _clock_driven(kind: type) -> bool:
    return kind.__module__.startswith("spikingjelly.clock_driven.")


class SpikingJelly:
    """Reads the neurons above; refuses every other keeper of state by name."""

    name = "spikingjelly"

    def read(self, module: nn.Module, path: str) -> Reading | list[Finding] | None:
        """The neuron, or why it cannot be read."""
        kind = type(module)
        bases = [k for k in kind.__mro__ if _ours(k)]
        if kind.__name__ in _READOUTS and _ours(kind):
            return _readout(module)
        if not any(k.__name__ in ("MemoryModule", "NonSpikingBaseNode") for k in bases):
            return None
        if not _ours(kind):
            return [look_alike(module, path, f"{bases[0].__module__}.{bases[0].__qualname__}")]
        if kind.__name__ in _STATELESS_IN_EVAL:
            return None
        name = kind.__name__
        home = _KNOWN.get(name.removeprefix("MultiStep") if _clock_driven(kind) else name, ())
        if not home or list(home) != kind.__module__.split(".")[2 : 2 + len(home)]:
            return [
                Finding(
                    rule="unknown-neuron",
                    where=path,
                    found=f"{name}, which keeps state from step to step",
                    allowed=", ".join(_KNOWN),
                    fix="use one of those, or declare its dynamics "
                    "(spikeport.converters.neurons.dynamics) and make the class known "
                    "(spikeport.converters.sources.register)",
                )
            ]
        return self._neuron(module, path)

    def _neuron(self, module: Any, path: str) -> Reading | list[Finding]:
        clock_driven, name = _clock_driven(type(module)), type(module).__name__
        kind = name.removeprefix("MultiStep")
        old = clock_driven or hasattr(module, "backend")
        # 0.0.0.0.14 asks the surrogate of IFNode and LIFNode in training only.
        ignored = kind in _ONLINE or (old and not clock_driven and kind != "ParametricLIFNode")
        fires = ">=" if ignored else comparison(module.surrogate_function)
        if fires is None or not getattr(module.surrogate_function, "spiking", True):
            return [surrogate_output(module.surrogate_function, path)]
        if clock_driven and getattr(module, "backend", "torch") != "torch":
            return [
                Finding(
                    rule="neuron-backend",
                    where=path,
                    found=f"backend={module.backend!r}, whose kernels round in another order",
                    allowed="backend='torch'",
                    fix="set the neuron's backend to 'torch' before the conversion",
                )
            ]
        if getattr(module, "_neuron_precision", None) is not None:
            return [
                Finding(
                    rule="neuron-precision",
                    where=path,
                    found="an explicit neuron precision, which runs on CUDA only",
                    allowed="a neuron that computes in its input's dtype",
                    fix="clear the neuron precision before the conversion",
                )
            ]
        hard = module.v_reset is not None
        reset: Literal["hard", "soft"] = "hard" if hard else "soft"
        v_reset = module.v_reset if hard else 0.0
        dynamics, params = neurons.IF, dict[str, Any]()
        if kind != "IFNode":
            plain = old and not module.decay_input
            params = {"decay_input": module.decay_input, "v_rest": v_reset}
        if kind not in _NOT_LIF:
            dynamics, params["tau"] = neurons.LIF, module.tau
            params["factored"] = plain and (v_reset == 0.0 if clock_driven else not hard)
        elif kind == "ParametricLIFNode":
            dynamics, params["w"] = neurons.ParametricLIF, module.w
            params["factored"] = plain and v_reset == 0.0
        neuron = Neuron(
            dynamics,
            params,
            v_threshold=module.v_threshold,
            v_reset=v_reset,
            reset=reset,
            fires=fires,
            v_0=module._memories_rv["v"],
        )
        if clock_driven:
            return Reading(neuron, "s" if name == kind else "m")
        return Reading(neuron, module.step_mode)

    def reset(self, module: nn.Module) -> None:
        """As ``functional.reset_net``."""
        if any(_ours(k) and k.__name__ == "MemoryModule" for k in type(module).__mro__):
            module.reset()  # type: ignore[operator]


def _readout(module: Any) -> Reading:
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


#: What a readout makes of its potentials, by the value of ``decode``.
_DECODERS: dict[str | None, Callable[[torch.Tensor], Any]] = {
    "max-mem": lambda v_seq: v_seq.amax(0),
    "max-abs-mem": _farthest,
    "mean-mem": lambda v_seq: v_seq.mean(0),
    "last_mem": lambda v_seq: v_seq[-1],
}
