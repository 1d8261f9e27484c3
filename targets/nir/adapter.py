"""The NIR target: written with the ``nir`` package, run by this project's own reader of NIR."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...converters.errors import (
    CompileError,
    Finding,
    SpikeportError,
    TargetUnavailableError,
    UnsupportedError,
    UsageError,
)
from ...converters.passes import Pass, drop_unused_steps, sum_over_time
from ...converters.program import Program, short
from ...converters.sources.nir import NirNetwork, Unit
from ..base import SDK, Capabilities, Compiled, Loaded, chosen, only_device, rewrites
from .cycles import export
from .operators import OPERATORS

_FILE = "model.nir"
#: The time step for which time constants are written unless the user says another.
DEFAULT_DT = 1e-4

_ROUNDING = Finding(
    rule="rounding",
    where="",
    target="nir",
    found="keep_rounding",
    allowed="a NIR graph states equations; how they round is up to the tool that computes them",
    fix="convert without keep_rounding",
)

_logger = logging.getLogger(__name__)


class Nir:
    """One .nir file; it runs here in torch, as NIR's equations by forward Euler."""

    name = "nir"
    capabilities = Capabilities(
        ops=None,  # its own inspection says more of an operator than that it is missing
        dtypes=None,
        in_place=False,
        times=frozenset({"unrolled"}),  # a graph in continuous time serves both
        notes=(
            f"time constants for dt = {DEFAULT_DT} unless the option dt says another",
            "what NIR does not say stands in metadata; the option strict refuses it",
            f"operators: {', '.join(sorted({short(target) for target in OPERATORS}))}",
        ),
    )

    def default_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def passes(self, dtype: torch.dtype) -> tuple[Pass, ...]:
        """The rewrites in order; float32 only.

        Raises:
            UsageError: Another dtype was asked for.
        """
        if dtype != torch.float32:
            raise UsageError("the nir target writes float32; leave dtype out")
        # A graph for any number of steps has a layer's last ones, used or not.
        return tuple(p for p in rewrites(dtype, sum_over_time) if p is not drop_unused_steps)

    def sdk(self) -> SDK:
        """The nir package."""
        return SDK("nir", str(_nir().version), simulated=False, devices=(0,))

    def inspect(self, program: Program) -> list[Finding]:
        """What of the program NIR cannot say, and what metadata have to say in its place."""
        if program.keeps_rounding:
            return [_ROUNDING]
        return export(program, DEFAULT_DT).findings

    def compile(self, program: Program, directory: Path, options: Mapping[str, Any]) -> Compiled:
        """Write ``model.nir``; the option ``dt`` is the time step, ``strict`` refuses metadata."""
        dt, strict = _options(options)
        nir = _nir()
        done = export(program, dt)
        wrong = [
            replace(f, severity="error") for f in done.findings if strict or f.severity == "error"
        ]
        if wrong:
            raise UnsupportedError("NIR cannot say this network:", wrong)
        for finding in done.findings:
            _logger.warning("%s", finding)
        said = {"dt": dt, "T": done.steps, "generator": "spikeport"}
        try:
            nodes = {name: _node(nir, unit) for name, unit in done.units.items()}
            graph = nir.NIRGraph(nodes, done.edges, said, type_check=False)
            nir.write(directory / _FILE, graph)
            network = NirNetwork(directory / _FILE)
        except (SpikeportError, AssertionError, ValueError) as error:
            raise CompileError(f"nir {nir.version}: {error}") from error
        _compare(program, network)
        return Compiled({"dt": dt, "strict": strict}, (_FILE,))

    def load(
        self,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> Loaded:
        """Read the file as any .nir file is read."""
        only_device(self.name, device)
        return _Model(NirNetwork(directory / _FILE), [shape for shape, _ in outputs])


def _options(options: Mapping[str, Any]) -> tuple[float, bool]:
    dt, strict = chosen("nir", options, {"dt": DEFAULT_DT, "strict": False}).values()
    number = isinstance(dt, (int, float)) and not isinstance(dt, bool)
    if not number or not (math.isfinite(dt) and dt > 0):
        raise UsageError(f"dt is {dt!r}; allowed: a time above 0, such as 1e-4")
    if not isinstance(strict, bool):
        raise UsageError(f"strict is {strict!r}; allowed: True, False")
    return float(dt), strict


def _nir() -> Any:
    try:
        return importlib.import_module("nir")
    except ImportError as error:
        raise TargetUnavailableError(
            f"nir cannot be imported ({error}); install it: pip install 'spikeport[nir]'"
        ) from error


def _node(nir: Any, unit: Unit) -> Any:
    fields = dict(unit.fields)
    if unit.kind in ("Input", "Output"):
        fields = {f"{unit.kind.lower()}_type": fields["shape"]}
    return getattr(nir, unit.kind)(**fields, metadata=dict(unit.metadata))


def _compare(program: Program, network: NirNetwork) -> None:
    """The file, read again, must declare the neurons that the program has."""
    read = sorted(n.to_json() for n in network.declarations())
    written = sorted(site.neuron.to_json() for site in program.sites)
    if missing := [spec for spec in written if spec not in read]:
        raise CompileError(
            f"read again, the file declares other neurons: {missing[0]} is not there"
        )


class _Model:
    """A NIR network behind the ports of the program."""

    def __init__(self, network: NirNetwork, outputs: Sequence[Sequence[int]]) -> None:
        self._network, self._shapes = network, outputs
        units = network.graph.units
        self._inputs = [units[name] for name in network.graph.inputs]
        self._outputs = [units[name] for name in network.graph.outputs]
        self._steps = int(network.graph.metadata["T"])

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs."""
        with torch.no_grad():
            given = [self._over_time(u, inputs[int(u.metadata["position"])]) for u in self._inputs]
            found = self._network(*given)
        found = found if isinstance(found, tuple) else (found,)
        results = [torch.empty(0)] * len(found)
        for unit, y in zip(self._outputs, found, strict=True):
            at = int(unit.metadata["position"])
            y = _reduced(y, str(unit.metadata["over_time"]))
            y = y.transpose(0, 1) if unit.metadata.get("batch_first", False) else y
            results[at] = y.reshape(self._shapes[at]).clone()
        return results

    def _over_time(self, unit: Unit, x: torch.Tensor) -> torch.Tensor:
        """An input of the program as [T, N, ...]."""
        x = x.cpu()
        if unit.metadata["over_time"] == "same":
            return x.unsqueeze(0).expand(self._steps, *x.shape)
        assert unit.shape is not None
        if unit.metadata.get("batch_first", False):
            return x.reshape(-1, self._steps, *unit.shape).transpose(0, 1)
        return x.reshape(self._steps, -1, *unit.shape)

    def close(self) -> None:
        """Nothing to free."""


def _reduced(y: torch.Tensor, how: str) -> torch.Tensor:
    if how == "mean":
        return y.mean(0)
    if how == "sum":
        return y.sum(0)
    return y[-1] if how == "last" else y
