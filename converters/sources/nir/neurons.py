"""NIR's neurons in discrete time, and declared neurons in NIR: the two directions side by side.

NIR states differential equations. They are read by forward Euler with the time step dt, as the
importers of snnTorch and SpikingJelly read them (``import_from_nir`` of both), the current of a CubaLIF
or CubaLI before the membrane that it drives::

    I                    v[t] = v[t-1] + dt r x[t]
    IF                   as I
    LI, LIF              v[t] = v[t-1] + dt/tau (v_leak - v[t-1] + r x[t])
    CubaLI, CubaLIF      i[t] = i[t-1] + dt/tau_syn (w_in x[t] - i[t-1])
                         v[t] = v[t-1] + dt/tau_mem (v_leak - v[t-1] + r i[t])
    IF, LIF, CubaLIF     z[t] = v[t] > v_threshold,  v[t] = v_reset where z[t]
    all                  v[-1] = 0, i[-1] = 0

What a declaration says and these do not (:attr:`Nodes.unsaid`) goes into the node's metadata, with the
declaration itself, from which a node that was written here is read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ... import neurons
from ...errors import Finding, UsageError
from ...neurons import Neuron
from .graph import Graph, UnbuildableError, Unit, finding

#: Where the declaration of a node lies in its metadata.
KEY = "spikeport"


@dataclass(frozen=True)
class Discrete:
    """A node of NIR in discrete time.

    Attributes:
        neuron: The declaration.
        gain: What its input is multiplied by before, a number or a tensor; 1.0 for nothing.
        fires: Whether its output is spikes, else its membrane potential.
    """

    neuron: Neuron
    gain: Any = 1.0
    fires: bool = True


def discrete(unit: Unit, dt: float) -> Discrete:
    """The neuron that a node is at time step dt, by its metadata or else by NIR's equations."""
    own = _by_equation(unit, dt)
    entry = unit.metadata.get(KEY)
    if entry is None:
        return own
    declared = _declared(entry)
    node = continuous(declared, unit.shape or (), dt, own.fires)
    if node.kind != unit.kind or not _same(node.fields, unit.fields):
        raise UnbuildableError(
            f"its metadata declare another neuron than its parameters at a time step of {dt:g}",
            "parameters and a time step that its metadata follow from",
            f"take the dt that it was written with, or remove {KEY!r} from its metadata",
        )
    return Discrete(declared, 1.0, own.fires)


def _by_equation(unit: Unit, dt: float) -> Discrete:
    f = {name: np.asarray(value, dtype=np.float64) for name, value in unit.fields.items()}
    if unit.kind == "Threshold":
        neuron = Neuron(neurons.Heaviside, {}, _value(f["threshold"]), reset="none", fires=">")
        return Discrete(neuron)
    fires = unit.kind.endswith("IF")
    kind, params, gain = neurons.IF, dict[str, Any](), f["r"]
    if unit.kind in ("I", "IF"):
        gain = f["r"] * dt
    elif unit.kind in ("LI", "LIF"):
        kind, params = neurons.LIF, {"tau": _value(f["tau"] / dt), "v_rest": _value(f["v_leak"])}
    else:
        kind, gain = neurons.CubaLIF, f.get("w_in", np.ones(()))
        params = {
            "tau_syn": _value(f["tau_syn"] / dt),
            "tau_mem": _value(f["tau_mem"] / dt),
            "r": _value(f["r"]),
            "v_rest": _value(f["v_leak"]),
        }
    neuron = Neuron(
        kind,
        params,
        v_threshold=_value(f["v_threshold"]) if fires else 1.0,
        v_reset=_value(f["v_reset"]) if "v_reset" in f else 0.0,
        reset="hard" if fires else "none",
        fires=">",
    )
    return Discrete(neuron, _value(gain), fires)


def _value(array: np.ndarray[Any, Any]) -> Any:
    """A parameter in float32: a number where all are the same, so that less is computed."""
    narrow = array.astype(np.float32)
    if (narrow == narrow.flat[0]).all():
        return float(narrow.flat[0])
    return torch.from_numpy(narrow.copy())


# From a declaration to NIR


@dataclass(frozen=True)
class Continuous:
    """A declared neuron as a node of NIR.

    Attributes:
        kind: Type of the node.
        fields: Its parameters, of the neurons' shape.
        unsaid: What the declaration says and NIR's equation does not.
    """

    kind: str
    fields: Mapping[str, np.ndarray[Any, Any]]
    unsaid: tuple[str, ...]


def continuous(neuron: Neuron, shape: tuple[int, ...], dt: float, fires: bool = True) -> Continuous:
    """The node that gives this neuron at time step dt, for a signal of this shape.

    Raises:
        UsageError: NIR has no node with such dynamics, or no constants give them.
    """
    name = neuron.dynamics.name
    unsaid: list[str] = []
    if neuron.dynamics is neurons.Heaviside:
        kind, fields = "Threshold", {"threshold": _exceeded(neuron)}
    elif name not in _CHARGES:
        raise UsageError(f"NIR has no node of the dynamics {name}; it has {', '.join(_CHARGES)}")
    else:
        kind, fields = _CHARGES[name]({n: _array(v) for n, v in neuron.params.items()}, dt)
        if fires:
            kind += "F"
            fields["v_threshold"] = _exceeded(neuron)
            fields["v_reset"] = _array(neuron.v_reset if neuron.reset == "hard" else 0.0)
            unsaid += _unsaid_of_reset(neuron)
        if heard(neuron) is not None:
            unsaid.append(
                "what it hears of its own last spikes is added last; NIR's sums come before"
            )
        if (_array(neuron.v_0) != 0).any():
            unsaid.append("v_0 is not 0; NIR does not say where v starts")
    wide = {n: np.ascontiguousarray(np.broadcast_to(v, shape)) for n, v in fields.items()}
    return Continuous(kind, wide, tuple(unsaid))


def heard(neuron: Neuron) -> np.ndarray[Any, Any] | None:
    """What a neuron's own last spikes are multiplied by before they are added to its input."""
    recurrent = neuron.dynamics in (neurons.RLeaky, neurons.RSynaptic)
    return _array(neuron.params["V"]) if recurrent else None


def without_own_loops(graph: Graph) -> tuple[Graph, list[Finding]]:
    """The graph without the loops that their neurons' metadata have already; and what is wrong."""
    findings, dropped = list[Finding](), set[str]()
    for name, unit in graph.units.items():
        entry = unit.metadata.get(KEY)
        if not isinstance(entry, Mapping) or (loop := entry.get("hears")) is None:
            continue
        own = graph.units.get(loop)
        scale = heard(_declared(entry))
        if (
            own is None
            or own.kind != "Scale"
            or (graph.into(loop), graph.after(loop)) != ([name], [name])
            or scale is None
            or not np.allclose(own.fields["scale"], scale, rtol=1e-6, atol=0)
        ):
            findings.append(
                finding(
                    "loop",
                    name,
                    f"its metadata declare a neuron that hears itself through {loop}, and the graph says "
                    "something else",
                    "a Scale of the declared factor, from its output to its input",
                    "write the graph again, or take the declaration out of its metadata",
                )
            )
        dropped.add(loop)
    units = {name: unit for name, unit in graph.units.items() if name not in dropped}
    edges = tuple(edge for edge in graph.edges if not dropped & {*edge})
    return replace(graph, units=units, edges=edges), findings


def _exceeded(neuron: Neuron) -> np.ndarray[Any, Any]:
    """What h must exceed: in float32, h >= threshold and h > the float32 below it are the same."""
    threshold = _array(neuron.v_threshold)
    if neuron.fires == ">":
        return threshold
    below: np.ndarray[Any, Any] = np.nextafter(threshold.astype(np.float32), np.float32(-np.inf))
    return below.astype(np.float64)


def _unsaid_of_reset(neuron: Neuron) -> list[str]:
    if neuron.reset != "hard":
        return [f"reset is {neuron.reset}; NIR's is to v_reset"]
    return [f"reset_at is {neuron.reset_at}; NIR's is now"] * (neuron.reset_at != "now")


def metadata(neuron: Neuron, unsaid: tuple[str, ...], hears: str = "") -> dict[str, Any]:
    """What goes with a node so that it is read again as it was declared.

    ``hears`` names the node through which it hears its own spikes.
    """
    tensors = {n: t.item() if t.dim() == 0 else t.numpy() for n, t in neuron.tensors().items()}
    entry = {"declaration": neuron.to_json(), "describe": neuron.describe()}
    if hears:
        entry["hears"] = hears
    return {
        KEY: {**entry, "unsaid": "; ".join(unsaid), **({"tensors": tensors} if tensors else {})}
    }


def _declared(entry: Mapping[str, Any]) -> Neuron:
    try:
        spec = entry["declaration"]
        names = json.loads(spec)["tensors"]
        arrays = [np.asarray(entry["tensors"][name], dtype=np.float32) for name in names]
        tensors = [torch.from_numpy(array.copy()) for array in arrays]
        return Neuron.from_json(spec, tensors)
    except (LookupError, ValueError, TypeError) as error:
        raise UnbuildableError(
            f"its metadata are no declaration: {error!r}",
            "what this package writes",
            f"remove {KEY!r} from its metadata, or write the graph again",
        ) from error


def _array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, torch.Tensor):
        return value.detach().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[n], b[n], rtol=1e-6, atol=0) for n in a)


def _if(p: Mapping[str, Any], dt: float) -> tuple[str, dict[str, Any]]:
    return "I", {"r": np.asarray(1 / dt)}


def _lif(p: Mapping[str, Any], dt: float) -> tuple[str, dict[str, Any]]:
    return _leaky_integrator(p["tau"], p["v_rest"], bool(p["decay_input"]), dt)


def _parametric_lif(p: Mapping[str, Any], dt: float) -> tuple[str, dict[str, Any]]:
    return _leaky_integrator(1 + np.exp(-p["w"]), p["v_rest"], bool(p["decay_input"]), dt)


def _leaky(p: Mapping[str, Any], dt: float) -> tuple[str, dict[str, Any]]:
    if (p["beta"] == 1).all():
        return "I", {"r": np.asarray(1 / dt)}
    return _leaky_integrator(_time_constant(p["beta"]), np.zeros(()), False, dt)


def _lapicque(p: Mapping[str, Any], dt: float) -> tuple[str, dict[str, Any]]:
    kind, fields = _leaky_integrator(p["R"] * p["C"] / p["dt"], np.zeros(()), True, dt)
    return kind, {**fields, "r": p["R"]}


def _synaptic(p: Mapping[str, Any], dt: float) -> tuple[str, dict[str, Any]]:
    syn, mem = _time_constant(p["alpha"]), _time_constant(p["beta"])
    times = {"tau_syn": syn * dt, "tau_mem": mem * dt}
    return "CubaLI", {**times, "r": mem, "w_in": syn, "v_leak": np.zeros(())}


def _cuba(p: Mapping[str, Any], dt: float) -> tuple[str, dict[str, Any]]:
    times = {"tau_syn": p["tau_syn"] * dt, "tau_mem": p["tau_mem"] * dt}
    return "CubaLI", {**times, "r": p["r"], "w_in": np.ones(()), "v_leak": p["v_rest"]}


def _leaky_integrator(
    tau: Any, v_rest: Any, decay_input: bool, dt: float
) -> tuple[str, dict[str, Any]]:
    """LI or LIF with tau in time steps."""
    if (tau < 1).any():
        raise UsageError(
            f"tau is {tau.min():.6g} time steps; NIR's time constants are at least one"
        )
    r = np.ones(()) if decay_input else tau
    return "LI", {"tau": tau * dt, "r": r, "v_leak": v_rest}


def _time_constant(decay: Any) -> Any:
    """The time constant in time steps of a decay to this fraction at each step."""
    if (decay >= 1).any() or (decay < 0).any():
        raise UsageError(
            f"a decay rate of {decay.max():.6g}, which no time constant gives; allowed: from 0 to "
            "below 1"
        )
    return 1 / (1 - decay)


#: The node without its spikes, and its parameters, of each of the dynamics that NIR has.
_CHARGES: dict[str, Callable[[Mapping[str, Any], float], tuple[str, dict[str, Any]]]] = {
    "IF": _if,
    "LIF": _lif,
    "ParametricLIF": _parametric_lif,
    "Leaky": _leaky,
    "Lapicque": _lapicque,
    "RLeaky": _leaky,
    "Synaptic": _synaptic,
    "RSynaptic": _synaptic,
    "CubaLIF": _cuba,
}
