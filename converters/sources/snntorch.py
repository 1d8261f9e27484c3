"""snnTorch 1.0 and 0.9 (``snntorch``): single-step neurons inside a loop over time.

Both releases compute the same. What sets their neurons apart: they fire above the threshold, not at
it; the reset belongs to the next step (``reset_delay``); ``reset_mechanism="zero"`` clears the
membrane of Leaky before that step's decay, and what Lapicque computed after it; and the state may be
kept on the module (``init_hidden``) or handed from call to call by the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from .. import neurons
from ..errors import Finding
from ..neurons import Neuron, ResetAt
from ..surrogates import KINDS, Surrogate
from .base import (
    Cell,
    Fires,
    Learning,
    Reading,
    comparison,
    look_alike,
    same_derivative,
    surrogate_output,
    unknown_surrogate,
)

_Value = Callable[[torch.Tensor], Any]
_LSTMS = ("SLSTM", "SConv2dLSTM")
_KNOWN = ("Leaky", "Lapicque", "Synaptic", "Alpha", "RLeaky", "RSynaptic", *_LSTMS)
#: Those whose potential is not only their neurons' own affair.
_RECURRENT = ("RLeaky", "RSynaptic", *_LSTMS)
#: What a neuron's state function, chosen when it was made, does at a reset.
_RESETS: dict[str, tuple[int, Literal["hard", "soft", "none"]]] = {
    "_base_sub": (0, "soft"),
    "_base_zero": (1, "hard"),
    "_base_int": (2, "none"),
}
#: Surrogates by the function that makes them: the declared kind, and its parameters' names there.
_SURROGATES: dict[str, tuple[str, dict[str, str]]] = {
    "atan": ("ATan", {"alpha": "alpha"}),
    "sigmoid": ("Sigmoid", {"alpha": "slope"}),
    "fast_sigmoid": ("FastSigmoid", {"slope": "slope"}),
    "straight_through_estimator": ("StraightThrough", {}),
    "heaviside": ("ReLU", {}),
    "triangular": ("Triangular", {"height": "threshold"}),
    "spike_rate_escape": ("SpikeRateEscape", {"beta": "beta", "slope": "slope"}),
    "SFS": ("SparseFastSigmoid", {"slope": "slope", "bound": "B"}),
}


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "snntorch"


def _is_neuron(kind: type) -> bool:
    return ".".join(kind.__module__.split(".")[:2]) == "snntorch._neurons"


class SnnTorch:
    """Reads the neurons of ``_KNOWN``; refuses every other neuron by name."""

    name = "snntorch"

    def read(self, module: nn.Module, path: str) -> Reading | list[Finding] | None:
        """The neuron, or why it cannot be read."""
        kind = type(module)
        bases = [k for k in kind.__mro__ if _is_neuron(k)]
        if not bases or kind.__name__ == "RecurrentOneToOne":
            return None
        if not _ours(kind):
            return [look_alike(module, path, f"{bases[0].__module__}.{bases[0].__qualname__}")]
        if kind.__name__ not in _KNOWN:
            return [
                Finding(
                    rule="unknown-neuron",
                    where=path,
                    found=f"{kind.__module__}.{kind.__qualname__}",
                    allowed=", ".join(_KNOWN),
                    fix="use one of those, or declare its dynamics "
                    "(spikeport.converters.neurons.dynamics) and make the class known "
                    "(spikeport.converters.sources.register)",
                )
            ]
        findings = list(_obstacles(module, path))
        return findings or _neuron(module)

    def learning(
        self, module: Any, path: str, surrogate: Surrogate | None = None
    ) -> Learning | list[Finding]:
        """By backpropagation through time; what an earlier spike resets passes no gradient."""
        if _kind(module) in _RECURRENT:
            return [_recurrent_gradient(module, path)]
        chosen = surrogate or _surrogate(module.spike_grad)
        if chosen is None:
            return [unknown_surrogate(module.spike_grad, path)]
        fires = comparison(module.spike_grad) or ">"
        live = partial(_declaration, value=_as_it_is, fires=fires)
        gain = None if _no_gain(module) else _gain
        return Learning(chosen, live, detach_past=True, gain=gain)

    def reset(self, module: nn.Module) -> None:
        """As the module's own ``reset_mem``."""
        if _is_neuron(type(module)) and type(module).__name__ in _KNOWN:
            module.reset_mem()  # type: ignore[operator]


@contextmanager
def isolated(net: nn.Module) -> Iterator[None]:
    """While a network runs, ``snntorch.utils.reset``, which clears every neuron ever made, reaches those
    of ``net`` alone, and what stands in their places.
    """
    roots = {k for m in net.modules() for k in type(m).__mro__ if _lists_instances(k)}
    kept = [(root, root.instances) for root in roots]  # type: ignore[attr-defined]
    for root in roots:
        root.instances = [  # type: ignore[attr-defined]
            m if _is_neuron(type(m)) else _Listed(m)
            for m in net.modules()
            if isinstance(m, root) and (_is_neuron(type(m)) or hasattr(type(m), "clear"))
        ]
    try:
        yield
    finally:
        for root, instances in kept:
            root.instances = instances  # type: ignore[attr-defined]


class _Listed:
    """Stands in snnTorch's list for what stands in a neuron's place: to set its states clears it."""

    def __init__(self, place: Any) -> None:
        self.__dict__["place"] = place

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # snnTorch asks isinstance
        return type(self.place)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("init_"):
            return lambda: tuple(torch.zeros(0) for _ in _STATES[_kind(self.place)])
        return torch.zeros(0)

    def __setattr__(self, name: str, value: Any) -> None:
        self.place.clear(name)


def _recurrent_gradient(module: Any, path: str) -> Finding:
    return Finding(
        rule="recurrent-gradient",
        where=path,
        found=f"{_kind(module)}, which learns through its own last output",
        allowed="neurons whose last output passes no gradient",
        fix="use Leaky or Synaptic, and add its last spikes to its input in the network's forward",
    )


def _lists_instances(kind: type) -> bool:
    return _is_neuron(kind) and "instances" in vars(kind)


def _neuron(module: Any) -> Reading:
    kind, fires = _kind(module), comparison(module.spike_grad) or ">"
    states = _STATES.get(kind, {"mem": 0})
    if kind in _LSTMS or getattr(module, "all_to_all", False):
        neuron = Neuron(
            neurons.Heaviside, v_threshold=_value(module.threshold), reset="none", fires=fires
        )
        return Reading(neuron, step_mode="s", states=states, cell=Cell(_cell, _fire))
    return Reading(
        _declaration(module, _value, fires),
        step_mode="s",
        states=states,
        returns_state=bool(module.output or not module.init_hidden),
        gain=None if _no_gain(module) else _gain(module).detach().float(),
        restart=("reset_mem", f"init_{kind.lower()}"),
    )


def _fire(module: Any, h: torch.Tensor) -> torch.Tensor:
    spikes: torch.Tensor = module.spike_grad(h - module.threshold)
    return spikes


def _cell(module: Any, fires: Fires) -> nn.Module:
    """The module with another way to fire, its states attributes where they were buffers."""
    traced: Any = type(type(module).__name__, (_Cell, type(module)), {})
    made = traced.__new__(traced)
    made.__dict__.update(module.__dict__)
    own = {*_STATES[_kind(module)], "reset_mechanism_val"}
    made._buffers = {n: b for n, b in module._buffers.items() if n not in own}
    made.reset_mechanism_val = int(module.reset_mechanism_val)
    made.state_function = getattr(made, module.state_function.__name__)
    made.fires, made.graded = fires, not _no_gain(module)
    return made  # type: ignore[no-any-return]


class _Cell(nn.Module):
    """What comes before the methods of a layer whose arithmetic traces as it is."""

    fires: Fires
    graded: bool
    #: The potential that it fired at last, and what it fired.
    fired: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def forward(self, *args: Any, **named: Any) -> Any:
        if self.fires.fresh:
            self._forget()
        return super().forward(*args, **named)

    def reset_mem(self) -> Any:
        self.fires.restart()
        self._forget()
        return super().reset_mem()  # type: ignore[misc]

    def clear(self, state: str) -> None:
        """Without this state, until the next call has one or is handed it."""
        setattr(self, state, torch.zeros(0))
        if state == "mem":
            self.fired = None, None

    def fire(self, mem: torch.Tensor) -> torch.Tensor:
        spikes = self.fires(mem)
        self.fired = mem, spikes
        return spikes * _gain(self) if self.graded else spikes

    def mem_reset(self, mem: torch.Tensor) -> torch.Tensor:
        """Where the last potential was above the threshold.

        A reset right after the spike leaves another potential, which is compared at every step.
        """
        at, spikes = self.fired
        if self.reset_mechanism_val == _RESETS["_base_int"][0]:
            return torch.zeros_like(mem)
        if at is None and getattr(self, "reset_delay", True):
            return self.fires.compared(mem)
        return spikes if mem is at else self.fires(mem, "reset")  # type: ignore[return-value]

    def _forget(self) -> None:
        self.fired = None, None
        for name in _STATES[_kind(self)]:
            setattr(self, name, torch.zeros(0))


def _kind(module: Any) -> str:
    """Name of the neuron's class, also where another class was derived from it."""
    return next(k.__name__ for k in type(module).__mro__ if _ours(k) and k.__name__ in _KNOWN)


def _declaration(module: Any, value: _Value, fires: Literal[">=", ">"]) -> Neuron:
    """The declaration, its parameters made of the module's tensors by ``value``."""
    kind = _kind(module)
    reset = _RESETS[module.state_function.__name__][1]
    reset_at: ResetAt = "next"
    if not getattr(module, "reset_delay", True):
        reset_at = "now" if reset == "hard" else "ahead"
    elif kind == "Leaky" and reset == "hard":
        reset_at = "before"
    if kind == "Alpha":
        reset = "none"
    return Neuron(
        getattr(neurons, kind),
        _PARAMETERS[kind](module, value),
        v_threshold=value(module.threshold),
        reset=reset,
        reset_at=reset_at,
        fires=fires,
    )


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _gain(module: Any) -> torch.Tensor:
    gain: torch.Tensor = module.graded_spikes_factor
    return gain


def _no_gain(module: Any) -> bool:
    """Whether the spikes are 0 and 1 now, and will be."""
    gain = _gain(module)
    return not gain.requires_grad and bool((gain == 1).all())


def _surrogate(function: Any) -> Surrogate | None:
    """The declared surrogate that a surrogate function is."""
    made_by = getattr(function, "__qualname__", "").split(".")[0]
    if made_by not in _SURROGATES or not _ours(function):
        return None
    name, parameters = _SURROGATES[made_by]
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    held = dict(zip(function.__code__.co_freevars, cells, strict=True))
    found = KINDS[name](**{ours: held[theirs] for ours, theirs in parameters.items()})
    return found if same_derivative(function, found) else None


#: The states that a call takes and returns, in order, with their places in the declared state.
_STATES = {
    "Synaptic": {"syn": 1, "mem": 0},
    "Alpha": {"syn_exc": 1, "syn_inh": 2, "mem": 0},
    "RLeaky": {"spk": 1, "mem": 0},
    "RSynaptic": {"spk": 2, "syn": 1, "mem": 0},
    **{name: {"syn": 1, "mem": 0} for name in _LSTMS},
}


def _leaky(module: Any, value: _Value) -> dict[str, Any]:
    return {"beta": value(module.beta.clamp(0, 1))}


def _lapicque(module: Any, value: _Value) -> dict[str, Any]:
    # Their products are taken in float32, as the module does, so they stay tensors.
    tensors = {"R": module.R, "C": module.C, "dt": module.time_step}
    return {name: tensor.float() for name, tensor in tensors.items()}


def _synaptic(module: Any, value: _Value) -> dict[str, Any]:
    return {"alpha": value(module.alpha.clamp(0, 1)), **_leaky(module, value)}


def _alpha(module: Any, value: _Value) -> dict[str, Any]:
    a, b = module.alpha.clamp(0, 1), module.beta.clamp(0, 1)
    name = module.state_function.__name__
    return {
        **_synaptic(module, value),
        "tau": value(torch.log(a) / (torch.log(b) - torch.log(a)) + 1),
        "jump": value(module.threshold),
        "zero": name == "_base_zero",
        "subtract": name == "_base_sub",
    }


def _rleaky(module: Any, value: _Value) -> dict[str, Any]:
    return {**_leaky(module, value), "V": value(module.recurrent.V)}


def _rsynaptic(module: Any, value: _Value) -> dict[str, Any]:
    return {**_synaptic(module, value), "V": value(module.recurrent.V)}


_PARAMETERS = {
    "Leaky": _leaky,
    "Lapicque": _lapicque,
    "Synaptic": _synaptic,
    "Alpha": _alpha,
    "RLeaky": _rleaky,
    "RSynaptic": _rsynaptic,
}


def _value(tensor: torch.Tensor) -> Any:
    """A parameter: a number, whose float32 value a float holds exactly, or a tensor."""
    tensor = tensor.detach().float()
    return tensor.item() if tensor.dim() == 0 else tensor


def _obstacles(module: Any, path: str) -> Iterator[Finding]:
    def finding(rule: str, found: str, allowed: str, fix: str) -> Finding:
        return Finding(rule=rule, where=path, found=found, allowed=allowed, fix=fix)

    if module.inhibition:
        yield finding(
            "inhibition",
            "inhibition=True, where one neuron's spike depends on all others' membranes",
            "inhibition=False",
            "compute the winner in the network's forward, from the spikes",
        )
    if module.state_quant:
        yield finding(
            "state-quant",
            f"state_quant={module.state_quant}, which quantizes the membrane at each step",
            "state_quant=False",
            "train without it, or declare the dynamics that you mean "
            "(spikeport.converters.neurons.dynamics)",
        )
    if comparison(module.spike_grad) is None:
        yield surrogate_output(module.spike_grad, path)
    if (module.threshold < 0).any():
        yield finding(
            "negative-threshold",
            f"a threshold of {module.threshold.min().item():.6g}, below which the membrane starts: "
            "snnTorch resets it before it has fired",
            "thresholds of at least 0",
            "clamp the threshold in training",
        )
    if (module.graded_spikes_factor == 0).any():
        yield finding(
            "graded-spikes",
            "a graded_spikes_factor of 0, which silences the neuron",
            "factors other than 0",
            "take the neuron out",
        )
    for name in ("alpha", "beta", "threshold", "graded_spikes_factor"):
        value = getattr(module, name, torch.zeros(()))
        if value.dim() and value.dtype != torch.float32:
            yield finding(
                "parameter-dtype",
                f"{name} of {value.dtype}, which changes the dtype of the membrane",
                "torch.float32",
                "call .float() on the network",
            )
    number = _RESETS[module.state_function.__name__][0]
    if int(module.reset_mechanism_val) != number:
        yield finding(
            "reset-mechanism",
            f"reset_mechanism={module.reset_mechanism!r}, set after the neuron was made, which goes on "
            "with the one that it was made with",
            "one reset mechanism",
            "make the neuron with that reset_mechanism",
        )
