"""NIR's definitions in NumPy, step by step and sample by sample, written from its documentation alone.

Pedersen et al. 2024, Nature Communications 15:8122, and the docstrings of the ``nir`` package. The
differential equations by forward Euler, in float64, the current of a Cuba neuron before its membrane.
"""

# Methods are called as the nodes are.
# ruff: noqa: N802

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def interpret(graph: Any, dt: float, *inputs: Array) -> list[Array]:
    """Inputs [T, N, ...] by name of the Input nodes -> outputs [T, N, ...] by name of the Output nodes."""
    kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
    given = dict(zip(sorted(n for n, k in kinds.items() if k == "Input"), inputs, strict=True))
    wanted = sorted(n for n, k in kinds.items() if k == "Output")
    found = {name: np.empty((*inputs[0].shape[:2],), dtype=object) for name in wanted}
    steps, batch = inputs[0].shape[:2]
    for sample in range(batch):
        run = _Run(graph, dt, {name: x[:, sample] for name, x in given.items()})
        for t in range(steps):
            for name in wanted:
                found[name][t, sample] = run.out(name, t)
    return [np.array(found[name].tolist()) for name in wanted]


class _Run:
    """One sample through a graph without subgraphs."""

    def __init__(self, graph: Any, dt: float, given: dict[str, Array]) -> None:
        self.graph, self.dt, self.given = graph, dt, given
        self.known: dict[tuple[str, int], Array] = {}
        self.running: set[tuple[str, int]] = set()
        self.state: dict[tuple[str, str], Array] = {}

    def out(self, name: str, t: int) -> Array:
        """What a node gives at step t; 0 before the first."""
        if (name, t) in self.known:
            return self.known[name, t]
        node = self.graph.nodes[name]
        if t < 0:
            return np.zeros(np.shape(node.r))
        if (name, t) in self.running:
            return self.out(name, t - 1)  # around a cycle: what the neuron gave before
        kind = type(node).__name__
        if kind == "Input" and name in self.given:
            return self.given[name][t].astype(np.float64)
        if kind == "Delay":
            return self._delayed(name, node, t)
        if kind in ("IF", "LIF", "CubaLIF", "I", "LI", "CubaLI"):
            self.running.add((name, t))
        x = self._into(name, t)
        y = getattr(self, f"_{kind}")(node, x, name)
        self.running.discard((name, t))
        self.known[name, t] = y
        return y

    def _into(self, name: str, t: int) -> Array:
        return np.sum([self.out(a, t) for a, b in self.graph.edges if b == name], axis=0)

    def _delayed(self, name: str, node: Any, t: int) -> Array:
        lags = np.rint(node.delay / self.dt).astype(int)
        past = {lag: self._into(name, t - lag) for lag in set(lags.flat) if t >= lag}
        y = np.zeros(lags.shape)
        for lag, x in past.items():
            y[lags == lag] = x[lags == lag]
        return y

    def _kept(self, name: str, variable: str, like: Array) -> Array:
        return self.state.get((name, variable), np.zeros_like(like))

    # Neurons

    def _membrane(self, node: Any, drive: Array, name: str, tau: Any = None) -> Array:
        v = self._kept(name, "v", drive)
        if tau is None:
            v = v + self.dt * node.r * drive
        else:
            v = v + self.dt / tau * ((node.v_leak - v) + node.r * drive)
        self.state[name, "v"] = v
        return v

    def _current(self, node: Any, x: Array, name: str) -> Array:
        i = self._kept(name, "i", x)
        i = i + self.dt / node.tau_syn * (-i + node.w_in * x)
        self.state[name, "i"] = i
        return i

    def _fire(self, node: Any, v: Array, name: str) -> Array:
        z = v > node.v_threshold
        self.state[name, "v"] = np.where(z, node.v_reset, v)
        return z.astype(np.float64)

    def _I(self, node: Any, x: Array, name: str) -> Array:
        return self._membrane(node, x, name)

    def _IF(self, node: Any, x: Array, name: str) -> Array:
        return self._fire(node, self._membrane(node, x, name), name)

    def _LI(self, node: Any, x: Array, name: str) -> Array:
        return self._membrane(node, x, name, node.tau)

    def _LIF(self, node: Any, x: Array, name: str) -> Array:
        return self._fire(node, self._membrane(node, x, name, node.tau), name)

    def _CubaLI(self, node: Any, x: Array, name: str) -> Array:
        return self._membrane(node, self._current(node, x, name), name, node.tau_mem)

    def _CubaLIF(self, node: Any, x: Array, name: str) -> Array:
        return self._fire(node, self._CubaLI(node, x, name), name)

    # Nodes without memory

    def _Input(self, node: Any, x: Array, name: str) -> Array:
        return x

    _Output = _Input

    def _Affine(self, node: Any, x: Array, name: str) -> Array:
        return node.weight.astype(np.float64) @ x + node.bias

    def _Linear(self, node: Any, x: Array, name: str) -> Array:
        return node.weight.astype(np.float64) @ x

    def _Scale(self, node: Any, x: Array, name: str) -> Array:
        return x * node.scale

    def _Threshold(self, node: Any, x: Array, name: str) -> Array:
        return (x > node.threshold).astype(np.float64)

    def _Flatten(self, node: Any, x: Array, name: str) -> Array:
        end = node.end_dim % x.ndim
        return x.reshape(*x.shape[: node.start_dim], -1, *x.shape[end + 1 :])

    def _Conv1d(self, node: Any, x: Array, name: str) -> Array:
        pairs = (node.stride, node.padding, node.dilation)
        return _convolve(x, node.weight, node.bias, *map(np.atleast_1d, pairs), node.groups)

    def _Conv2d(self, node: Any, x: Array, name: str) -> Array:
        pairs = (node.stride, node.padding, node.dilation)
        return _convolve(x, node.weight, node.bias, *pairs, node.groups)

    def _SumPool2d(self, node: Any, x: Array, name: str) -> Array:
        ones = np.ones((len(x), 1, *node.kernel_size))
        return _convolve(x, ones, np.zeros(len(x)), node.stride, node.padding, (1, 1), len(x))

    def _AvgPool2d(self, node: Any, x: Array, name: str) -> Array:
        return self._SumPool2d(node, x, name) / np.prod(node.kernel_size)


def _convolve(
    x: Array, weight: Array, bias: Array, stride: Any, padding: Any, dilation: Any, groups: int
) -> Array:
    """x [C, ...], weight [K, C / groups, ...] -> [K, ...], window by window."""
    kernel = weight.shape[2:]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        pads = [(n // 2, n - n // 2) if padding == "same" else (0, 0) for n in reach]
    else:
        pads = [(p, p) for p in padding]
    x = np.pad(x, [(0, 0), *pads])
    sizes = [
        (n - r - 1) // s + 1
        for n, r, s in zip(x.shape[1:], reach, np.atleast_1d(stride), strict=True)
    ]
    out = np.empty((len(weight), *sizes))
    inner, outer = len(x) // groups, len(weight) // groups
    for at in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(p * s, p * s + r + 1, d)
            for p, s, r, d in zip(at, np.atleast_1d(stride), reach, dilation, strict=True)
        )
        for k in range(len(weight)):
            g = k // outer
            part = x[(slice(g * inner, (g + 1) * inner), *window)]
            out[(k, *at)] = (part * weight[k]).sum() + bias[k]
    return out
