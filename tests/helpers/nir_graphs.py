"""NIR graphs, what drives them, and networks of them against NIR's definitions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
from nir_equations import interpret

from spikeport.converters.errors import CaptureError, Finding
from spikeport.converters.sources.nir import NirNetwork

DT = 0.25
RANDOM = np.random.default_rng(0)


def eighths(*shape: int, low: int = -8, high: int = 8) -> Any:
    """Values on a grid on which sums are exact in float32."""
    return RANDOM.integers(low, high + 1, shape).astype(np.float32) / 8


def full(value: Any, *shape: int) -> Any:
    return np.full(shape, value, dtype=np.float64)


def lif(*shape: int, tau: float = 2 * DT, v_reset: float = 0.0, **fields: Any) -> nir.LIF:
    given = {"r": 1.0, "v_leak": 0.0, "v_threshold": 0.5, **fields}
    return nir.LIF(full(tau, *shape), v_reset=full(v_reset, *shape), **_wide(given, shape))


def cuba(*shape: int, kind: Any = nir.CubaLIF, **fields: Any) -> Any:
    given = {"tau_syn": 2 * DT, "tau_mem": 4 * DT, "r": 2.0, "v_leak": 0.25, "w_in": 4.0, **fields}
    if kind is nir.CubaLIF:
        given |= {"v_threshold": 0.75, "v_reset": -0.25}
    return kind(**_wide(given, shape))


def _wide(fields: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    return {n: full(v, *shape) if isinstance(v, (int, float)) else v for n, v in fields.items()}


def graph(edges: str | list[tuple[str, str]], **nodes: Any) -> nir.NIRGraph:
    """A graph; edges as ``"input a b output"`` for a chain."""
    if isinstance(edges, str):
        names = edges.split()
        edges = list(itertools.pairwise(names))
    return nir.NIRGraph({n: nodes[n] for n in sorted(nodes)}, edges, type_check=False)


def chain(size: tuple[int, ...], after: tuple[int, ...], *nodes: nir.NIRNode) -> nir.NIRGraph:
    names = [f"n{i}" for i in range(len(nodes))]
    ports = {"input": nir.Input(np.array(size)), "output": nir.Output(np.array(after))}
    named = dict(zip(names, nodes, strict=True))
    return graph(" ".join(["input", *names, "output"]), **named, **ports)


def saved(g: nir.NIRGraph, tmp_path: Path) -> Path:
    file = tmp_path / "net.nir"
    nir.write(file, g)
    return file


CHAINS: dict[str, Callable[[], nir.NIRGraph]] = {
    "affine": lambda: chain((4,), (3,), nir.Affine(eighths(3, 4), eighths(3)), lif(3)),
    "linear": lambda: chain((4,), (3,), nir.Linear(eighths(3, 4)), lif(3, v_reset=-0.25)),
    "scale": lambda: chain((3,), (3,), nir.Scale(eighths(3)), nir.Threshold(eighths(3))),
    "conv1d": lambda: chain(
        (4, 9), (6, 4), nir.Conv1d(9, eighths(6, 2, 3), 2, 1, 2, 2, eighths(6)), lif(6, 4)
    ),
    "conv2d": lambda: chain(
        (2, 7, 6),
        (4, 3, 6),
        nir.Conv2d((7, 6), eighths(4, 1, 3, 2), (2, 1), (1, 0), (1, 0 + 1), 2, eighths(4)),
        nir.Threshold(full(0.25, 4, 4, 5)),
        nir.Conv2d((4, 5), eighths(4, 4, 2, 2), 1, (0, 1), 1, 1, eighths(4)),
    ),
    "same": lambda: chain(
        (2, 5, 6), (3, 5, 6), nir.Conv2d((5, 6), eighths(3, 2, 3, 2), 1, "same", 1, 1, eighths(3))
    ),
    "valid": lambda: chain(
        (2, 5, 6), (3, 3, 4), nir.Conv2d((5, 6), eighths(3, 2, 3, 3), 1, "valid", 1, 1, eighths(3))
    ),
    "pools": lambda: chain(
        (2, 9, 8),
        (2, 2, 2),
        nir.SumPool2d(np.array([3, 2]), np.array([2, 2]), np.array([1, 0])),
        nir.Threshold(full(0.5, 2, 5, 4)),
        nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
    ),
    "flatten": lambda: chain(
        (2, 3, 2),
        (2, 6),
        nir.Flatten(np.array([2, 3, 2]), 1, 2),
        lif(2, 6, v_threshold=eighths(2, 6, low=1)),
    ),
    "integrator": lambda: chain((3,), (3,), nir.I(full(2.0, 3))),
    "if": lambda: chain(
        (3,), (3,), nir.IF(np.array([4.0, 2.0, 1.0]), full(0.5, 3), np.array([0.0, -0.5, 0.25]))
    ),
    "li": lambda: chain((3,), (3,), nir.LI(full(4 * DT, 3), eighths(3), eighths(3))),
    "cuba_li": lambda: chain((3,), (3,), cuba(3, kind=nir.CubaLI, w_in=eighths(3))),
    "cuba_lif": lambda: chain((3,), (3,), cuba(3)),
    "delay": lambda: chain((3,), (3,), nir.Delay(np.array([0.0, DT, 3 * DT])), lif(3)),
    "late": lambda: chain((3,), (3,), nir.Delay(full(9 * DT, 3)), lif(3)),
    "leak": lambda: chain((3,), (3,), lif(3, v_leak=1.0, v_threshold=np.array([0.5, 0.75, 2.0]))),
}


def self_loop() -> nir.NIRGraph:
    return graph(
        [("input", "a"), ("a", "w"), ("w", "a"), ("a", "output")],
        input=nir.Input(np.array([3])),
        a=lif(3, v_reset=-0.25),
        w=nir.Affine(eighths(3, 3), eighths(3)),
        output=nir.Output(np.array([3])),
    )


def drive(g: nir.NIRGraph, steps: int = 6, batch: int = 2) -> list[torch.Tensor]:
    inputs = sorted(n for n, node in g.nodes.items() if isinstance(node, nir.Input))
    shapes = [g.nodes[n].input_type["input"] for n in inputs]
    return [torch.from_numpy(eighths(steps, batch, *shape)) for shape in shapes]


def equals(net: NirNetwork, g: nir.NIRGraph, x: list[torch.Tensor]) -> None:
    found = net(*x)
    expected = interpret(g, DT, *(part.numpy() for part in x))
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(expected)
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape
        assert np.array_equal(y.numpy(), z.astype(np.float32))


def findings(source: Any, dt: float = DT) -> list[Finding]:
    with pytest.raises(CaptureError) as caught:
        NirNetwork(source, dt)
    return [*caught.value.findings]
