"""Plain PyTorch on this machine's CPU: what every other target is held against.

Neurons stay single operators, run by the reference of their declaration. It is fast as well: what
does not depend on time is computed once, batch norms are folded, and convolutions and pooling run with
channels innermost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx

from ..converters.errors import DeviceError, UsageError
from ..converters.ops import aten
from ..converters.passes import (
    Pass,
    flatten_time,
    fold_batch_norm,
    fold_constants,
    hoist_time_invariant,
    reroll_time,
)
from ..converters.program import Program
from ..converters.serial import graph_from_data, graph_to_data
from .base import SDK, Capabilities, Compiled, Loaded

_SPATIAL = frozenset({aten.conv2d.default, aten.max_pool2d.default, aten.avg_pool2d.default})


class Reference:
    """The CPU, through PyTorch."""

    name = "reference"
    capabilities = Capabilities(ops=None, dtypes=None, notes=("runs what torch runs",))

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
        layout = (fold_constants, reroll_time, hoist_time_invariant, flatten_time)
        return *layout, fold_batch_norm

    def sdk(self) -> SDK:
        """PyTorch itself."""
        return SDK("torch", torch.__version__, simulated=False, devices=(0,))

    def compile(self, program: Program, directory: Path, options: Mapping[str, Any]) -> Compiled:
        """Write the graph and its weights."""
        if options:
            raise UsageError(f"the reference target has no options; got {', '.join(options)}")
        graph = json.dumps(graph_to_data(program.graph), indent=1)
        (directory / "graph.json").write_text(graph, encoding="utf-8")
        tensors = {name: t.contiguous() for name, t in program.tensors.items()}
        save_file(tensors, directory / "weights.safetensors")
        return Compiled({}, ("graph.json", "weights.safetensors"))

    def load(
        self,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> Loaded:
        """Read the graph and its weights."""
        if device != 0:
            raise DeviceError(f"no device {device}; the reference target has device 0, the CPU")
        graph = graph_from_data(json.loads((directory / "graph.json").read_text(encoding="utf-8")))
        tensors = load_file(directory / "weights.safetensors")
        return _Model(fx.GraphModule(tensors, graph))


class _Model:
    """A graph and what runs it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._executor = _ChannelsInnermost(module)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs."""
        with torch.inference_mode():
            return [y.clone() for y in self._executor.run(*inputs)]

    def close(self) -> None:
        """Nothing to free."""


class _ChannelsInnermost(fx.Interpreter):
    """Runs a graph with channels innermost wherever an operator is faster so."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        for n in module.graph.nodes:
            if n.op == "get_attr" and any(u.target is aten.conv2d.default for u in n.users):
                weight = self.fetch_attr(n.target)
                if weight.dim() == 4:
                    weight.data = weight.contiguous(memory_format=torch.channels_last)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operator on inputs in its faster layout."""
        if target in _SPATIAL and args[0].dim() == 4:
            args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
        return super().call_function(target, args, kwargs)
