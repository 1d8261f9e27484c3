"""The IPU as a target of conversion: a program through ``poptorch.inferenceModel``.

The SDK and its simulation go through one code path. Conversion needs a newer torch than the SDK takes: an
artifact for the simulated target, made on another machine, is compiled where the device is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...converters.errors import CompileError, DeviceError
from ...converters.passes import Pass, lower_neurons
from ...converters.program import Program
from .. import graphs
from ..base import SDK, Capabilities, Compiled, Loaded, chosen, only_device, rewrites
from . import sdk as poplar

_CAPABILITIES = Capabilities(
    ops=None,
    dtypes=frozenset({torch.float16, torch.float32, torch.bool, torch.int32, torch.int64}),
    notes=(
        "shapes are static, the batch of the example input is compiled in",
        "operators that poptorch lacks are found when it compiles",
        "int64 is int32 on the device",
    ),
)


class Ipu:
    """One IPU.

    Args:
        simulated: Whether the simulated SDK stands in for the vendor's.
    """

    def __init__(self, simulated: bool) -> None:
        self.simulated = simulated
        self.name = "ipu-sim" if simulated else "ipu"
        self.capabilities: Capabilities = _CAPABILITIES
        self._executable = "model.poptorch"
        if simulated:
            self._executable = "model.simulated"
        else:
            self.capabilities = replace(_CAPABILITIES, loads=frozenset({"ipu-sim"}))

    def default_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def passes(self, dtype: torch.dtype) -> tuple[Pass, ...]:
        """The rewrites in order; for float16 batch norms are absorbed, so that weights stay exact."""
        return rewrites(dtype, lower_neurons)

    def sdk(self) -> SDK:
        """poptorch's version."""
        poptorch = poplar.load(self.simulated)
        available = self.simulated or poptorch.ipuHardwareIsAvailable()
        devices = (0,) if available else ()
        return SDK("poptorch", poplar.version(poptorch), self.simulated, devices)

    def compile(self, program: Program, directory: Path, options: Mapping[str, Any]) -> Compiled:
        """Compile with poptorch, and write the executable beside the graph and its weights."""
        chosen(self.name, options, {})
        poptorch = poplar.load(self.simulated)
        files = graphs.write(program, directory)
        values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
        inputs = [torch.zeros(value.shape, dtype=value.dtype) for value in values]
        model = poptorch.inferenceModel(graphs.read(directory), poptorch.Options())
        with poplar.errors(poptorch, CompileError, "refused the program"):
            model.compileAndExport(str(directory / self._executable), *inputs, export_model=False)
        model.destroy()
        return Compiled({}, (*files, self._executable))

    def load(
        self,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> Loaded:
        """Load the executable; where there is none of this SDK, compile."""
        poptorch = poplar.load(self.simulated)
        only_device(self.name, device, "the IPU that poptorch chooses")
        model = poptorch.inferenceModel(graphs.read(directory), poptorch.Options())
        file = directory / self._executable
        with poplar.errors(poptorch, DeviceError, f"refused {file.name}"):
            if file.exists():
                model.loadExecutable(str(file))
            else:
                model.compile(*(torch.zeros(shape, dtype=dtype) for shape, dtype in inputs))
        return _Model(poptorch, model, [dtype for _, dtype in outputs])


class _Model:
    """An executor between torch tensors."""

    def __init__(self, poptorch: Any, model: Any, dtypes: Sequence[torch.dtype]) -> None:
        self._poptorch, self._model, self._dtypes = poptorch, model, dtypes

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs."""
        with poplar.errors(self._poptorch, DeviceError, "failed"):
            outputs = self._model(*(x.cpu() for x in inputs))
        flat = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        return [y.to(dtype, copy=True) for y, dtype in zip(flat, self._dtypes, strict=True)]

    def close(self) -> None:
        """Free the device."""
        self._model.destroy()
