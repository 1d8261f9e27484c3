"""The Lynxi target: one code path on the vendor's SDK and on the simulated one.

``lyngor`` and ``lynpy`` are imported when something is compiled or run, never before.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ...converters import ops
from ...converters.builder import Builder
from ...converters.errors import (
    CompileError,
    DeviceError,
    Finding,
    TargetUnavailableError,
    UsageError,
)
from ...converters.ops import Node, aten
from ...converters.passes import (
    Pass,
    decompose_operators,
    exact_encoder,
    lower_neurons,
    merge_dimensions,
)
from ...converters.program import PassReport, Program, where
from ..base import SDK, Capabilities, Compiled, Loaded, chosen, rewrites
from ..onnx.export import DEFAULT_OPSET, export
from .capabilities import CAPABILITIES

#: What a user may set, with this project's defaults: the form in which lyngor is given the network
#: (``"Pytorch"``, or ``"ONNX"`` where its PyTorch is too old for the module), and arguments of its
#: ``Builder.build``, which folds batch norms from ``opt_level`` 3 on.
_OPTIONS: dict[str, Any] = {
    "model_type": "Pytorch",
    "apu_only": True,
    "build_mode": "auto",
    "opt_level": 3,
    "core_mem_mode": 0,
    "lut_opt": 1,
    "num_cores": 16,
}


class Lynxi:
    """HP300 and KA200 chips.

    Args:
        simulated: Whether the simulated SDK stands in for the vendor's.
    """

    def __init__(self, simulated: bool) -> None:
        self.simulated = simulated
        self.name = "lynxi-sim" if simulated else "lynxi"
        self.capabilities: Capabilities = CAPABILITIES

    def default_dtype(self) -> torch.dtype:
        """float16, since the chip computes in it."""
        return torch.float16

    def passes(self, dtype: torch.dtype) -> tuple[Pass, ...]:
        """The rewrites in order."""
        can = CAPABILITIES
        decompose = decompose_operators(can.ops or ())
        encode = (exact_encoder,) if dtype == torch.float16 else ()
        merge = merge_dimensions(can.max_rank or 4)
        return rewrites(dtype, decompose, merge, *encode, lower_neurons)

    def inspect(self, program: Program) -> Iterator[Finding]:
        """Division of whole numbers, which shares its name with that of others."""
        for n in program.graph.find_nodes(op="call_function", target=aten.div.Tensor_mode):
            yield Finding(
                rule="operator",
                where=where(n),
                node=n.name,
                target=self.name,
                found=f"a division of {n.meta['val'].dtype} towards zero",
                allowed="division of floating-point numbers",
                fix="divide floating-point numbers: torch.div(x.float(), y, rounding_mode='trunc')",
            )

    def _import(self, name: str) -> Any:
        if self.simulated:
            return importlib.import_module(f"..simulator.{name}", __name__)
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise TargetUnavailableError(
                f"{name} cannot be imported ({error}): the Lynxi SDK is not on this machine. It is on "
                "no package index; Lynxi supplies it with the card (lyngor compiles, lynpy runs). "
                "The target lynxi-sim computes as the chip does, on the simulated SDK."
            ) from error

    def sdk(self) -> SDK:
        """lyngor's version and the device ids."""
        lyngor = self._import("lyngor")
        self._import("lynpy")
        settings = asdict(self._options()) if self.simulated else {}
        return SDK("lyngor", str(lyngor.version), self.simulated, self._devices(), settings)

    @staticmethod
    def _options() -> Any:
        return importlib.import_module("..simulator.options", __name__).current()

    def _devices(self) -> tuple[int, ...]:
        if self.simulated:
            return tuple(range(self._options().devices))
        try:
            count, failed = importlib.import_module("pylynchipsdk").lyn_get_device_count()
        except (ImportError, AttributeError):
            return ()
        return () if failed else tuple(range(count))

    def compile(self, program: Program, directory: Path, options: Mapping[str, Any]) -> Compiled:
        """Build with lyngor into ``directory``."""
        level = {"opt_level": 2} if program.keeps_rounding else {}
        taken = chosen(self.name, options, {**_OPTIONS, **level})
        building = dict(taken)
        if (kind := building.pop("model_type")) not in ("Pytorch", "ONNX"):
            raise UsageError(f"model_type is {kind!r}; allowed: Pytorch, ONNX")
        lyngor = self._import("lyngor")
        buffers = "float16" if program.dtype == torch.float16 else "float32"
        shapes = _shapes(program)
        try:
            model = lyngor.DLModel()
            with _importable(program, kind) as importable:
                model.load(
                    importable,
                    model_type=kind,
                    inputs_dict=shapes,
                    in_type=buffers,
                    out_type=buffers,
                )
            builder = lyngor.Builder(target="apu", is_map=True)
            builder.build(model.graph, model.params, out_path=str(directory), **building)
        except Exception as error:
            raise CompileError(f"lyngor {lyngor.version} refused the program: {error}") from error
        files = sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())
        return Compiled(taken, tuple(map(Path.as_posix, files)))

    def load(
        self,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> Loaded:
        """Load with lynpy."""
        return _Model(self._import("lynpy"), directory, inputs, outputs, device)


class _Model:
    """A lynpy.Model between torch tensors: one flat buffer in, one flat buffer out."""

    def __init__(
        self,
        lynpy: Any,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> None:
        self._outputs = [(shape, _numpy_dtype(dtype)) for shape, dtype in outputs]
        self._dtypes = [dtype for _, dtype in inputs]
        try:
            self._model = lynpy.Model(dev_id=device, path=str(directory))
            size = sum(torch.Size(s).numel() * d.itemsize for s, d in inputs)
            self._input = lynpy.Tensor(dev_id=device, size=size)
        except (AssertionError, RuntimeError, OSError) as error:
            raise DeviceError(f"device {device} refused the program: {error}") from error

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, copied out of the buffer that the next call overwrites."""
        parts = [
            x.to(dtype).cpu().contiguous().numpy().reshape(-1).view(np.uint8)
            for x, dtype in zip(inputs, self._dtypes, strict=True)
        ]
        try:
            self._input.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
            raw = self._model(self._input.apu()).cpu().numpy()
        except (AssertionError, RuntimeError) as error:
            raise DeviceError(f"the run on the device failed: {error}") from error
        flat, at, results = np.asarray(raw).reshape(-1).view(np.uint8), 0, []
        for shape, dtype in self._outputs:
            size = int(np.prod(shape)) * dtype.itemsize
            part = flat[at : at + size].copy().view(dtype).reshape(shape)
            results.append(torch.from_numpy(part))
            at += size
        return results

    def close(self) -> None:
        """Unload the program."""
        self._model.unload()


def _shapes(program: Program) -> dict[str, Any]:
    """``inputs_dict``: shapes, and of inputs that are no floating-point numbers their types too."""
    given = zip(program.graph_inputs, program.nodes("placeholder"), strict=True)
    dtypes = {spec.name: (list(spec.graph_shape), n.meta["val"].dtype) for spec, n in given}
    return {
        name: shape if dtype.is_floating_point else [shape, str(dtype).removeprefix("torch.")]
        for name, (shape, dtype) in dtypes.items()
    }


@contextmanager
def _importable(program: Program, kind: str) -> Iterator[nn.Module | str]:
    """The program as lyngor takes it: a module, or the path of an ONNX file."""
    if kind == "Pytorch":
        yield _module(program)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(export(program, Path(folder) / "model.onnx", DEFAULT_OPSET)[0])


def _module(program: Program) -> nn.Module:
    """The graph in the spelling of torch.jit.trace, which the compiler's importer knows.

    A cast is ``aten::to``, and a selection has tensors on both sides.
    """
    build = Builder(program)
    env: dict[Node, Node] = {}

    def tensor(value: Any, dtype: torch.dtype) -> Node:
        if isinstance(value, fx.Node):
            return env[value]
        name = f"scalar_{str(float(value)).translate(str.maketrans('.-+', '_mp'))}"
        return build.constant(name, torch.tensor(float(value), dtype=dtype))

    for n in program.walk():
        if n.op == "placeholder":
            env[n] = build.placeholder(n, n.meta["val"])
        elif n.op == "call_function" and n.target is aten._to_copy.default:
            dtype = n.kwargs["dtype"]
            env[n] = build.call(aten.to.dtype, env[n.args[0]], dtype, path=where(n))
        elif n.op == "call_function" and n.target in ops.SELECT:
            chosen = [tensor(a, n.meta["val"].dtype) for a in n.args[1:]]
            env[n] = build.call(aten.where.self, env[n.args[0]], *chosen, path=where(n))
        elif n.op != "output":
            env[n] = build.copy(n, env)
    results = [env[r] for r in program.results]
    return build.finish(results, PassReport("importable"), program.sites).module.eval()


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
