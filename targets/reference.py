"""Plain PyTorch on this machine's CPU: what every other target is held against.

Neurons stay single operators, run by the reference of their declaration. It is fast as well: what
does not depend on time is computed once, batch norms are folded, and convolutions and pooling run with
channels innermost. A program that keeps the network's rounding runs as torch runs the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..converters.errors import UsageError
from ..converters.passes import Pass
from ..converters.program import Program
from . import graphs
from .base import SDK, Capabilities, Compiled, Loaded, chosen, only_device, rewrites

_SETTINGS = "settings.json"


class Reference:
    """The CPU, through PyTorch."""

    name = "reference"
    capabilities = Capabilities(
        ops=None, dtypes=None, torch_functions=True, notes=("runs what torch runs",)
    )

    def default_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def passes(self, dtype: torch.dtype) -> tuple[Pass, ...]:
        """The rewrites that make it fast; float32 only.

        Raises:
            UsageError: Another dtype was asked for.
        """
        if dtype != torch.float32:
            raise UsageError("the reference target computes in float32; leave dtype out")
        return rewrites(dtype)

    def sdk(self) -> SDK:
        """PyTorch itself."""
        return SDK("torch", torch.__version__, simulated=False, devices=(0,))

    def compile(self, program: Program, directory: Path, options: Mapping[str, Any]) -> Compiled:
        """Write the graph and its weights."""
        chosen(self.name, options, {})
        settings = json.dumps({"channels_innermost": not program.keeps_rounding})
        (directory / _SETTINGS).write_text(settings, encoding="utf-8")
        return Compiled({}, (*graphs.write(program, directory), _SETTINGS))

    def load(
        self,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> Loaded:
        """Read the graph and its weights."""
        only_device(self.name, device)
        file, module = directory / _SETTINGS, graphs.read(directory)
        # Artifacts of before there was a choice have no such file.
        faster = not file.exists() or json.loads(file.read_bytes())["channels_innermost"]
        return _Model(graphs.ChannelsInnermost(module) if faster else fx.Interpreter(module))


class _Model:
    """A graph on the CPU."""

    def __init__(self, executor: fx.Interpreter) -> None:
        self._executor = executor

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs."""
        with torch.no_grad():
            return [y.clone() for y in self._executor.run(*(x.cpu() for x in inputs))]

    def close(self) -> None:
        """Nothing to free."""
