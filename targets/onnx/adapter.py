"""The ONNX target: written with the onnx package, run by ONNX Runtime, which is imported to run only."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from ...converters.errors import DeviceError, Finding, TargetUnavailableError, UsageError
from ...converters.ops import aten
from ...converters.passes import Pass, decompose_operators, lower_neurons
from ...converters.program import Program, short, where
from ..base import SDK, Capabilities, Compiled, Loaded, chosen, only_device, rewrites
from .export import DEFAULT_OPSET, NUMBERS, OPSETS, export, numpy_dtype, of_opset, refused
from .operators import OPERATORS

_FILE = "model.onnx"


class Onnx:
    """One .onnx file, unrolled over time, on this machine's CPU through ONNX Runtime."""

    name = "onnx"
    capabilities = Capabilities(
        ops=frozenset(short(target) for target in OPERATORS),
        dtypes=frozenset(NUMBERS),
        in_place=False,
        notes=(
            f"standard operators, opset {DEFAULT_OPSET} unless the option opset says another, from "
            f"{OPSETS[0]} to the newest that onnx writes and ONNX Runtime reads",
        ),
    )

    def default_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def passes(self, dtype: torch.dtype) -> tuple[Pass, ...]:
        """The rewrites in order; for float16 batch norms are absorbed, so that weights stay exact."""
        return rewrites(dtype, decompose_operators({*map(short, OPERATORS)}), lower_neurons)

    def inspect(self, program: Program) -> Iterator[Finding]:
        """Forms of operators that no exporter knows; places of equal values, which torch leaves open."""
        for n in program.nodes("call_function"):
            if n.target not in OPERATORS and short(n.target) in (self.capabilities.ops or ()):
                yield refused(n, f"{n.target}: no exporter knows this form of the operator")
        for n in program.graph.find_nodes(op="call_function", target=aten.topk.default):
            if any(user.args[1] == 1 for user in n.users):
                yield Finding(
                    rule="ties",
                    where=where(n),
                    node=n.name,
                    target=self.name,
                    found="the places of aten.topk are used, and torch leaves open which of equal values, "
                    "such as firing rates, comes first",
                    allowed="ONNX gives the first of them",
                    fix="x.sort(-1, descending=True, stable=True), which says so, or none where no two are "
                    "equal",
                    severity="warning",
                )

    def sdk(self) -> SDK:
        """The onnx package, which compiles; ONNX Runtime, which runs, may be missing."""
        try:
            runtime = _runtime().__version__
        except TargetUnavailableError:
            runtime = None
        devices = () if runtime is None else (0,)
        return SDK("onnx", onnx.__version__, False, devices, {"onnxruntime": runtime})

    def compile(self, program: Program, directory: Path, options: Mapping[str, Any]) -> Compiled:
        """Write ``model.onnx``; the option ``opset`` chooses the opset."""
        opset = chosen(self.name, options, {"opset": DEFAULT_OPSET})["opset"]
        newest, reader = _newest()
        if opset not in OPSETS or opset > newest:
            raise UsageError(
                f"opset is {opset!r}; allowed: {OPSETS[0]} to {newest}, the newest of {reader}"
            )
        files = export(program, directory / _FILE, opset)
        return Compiled({"opset": opset}, tuple(f.name for f in files))

    def load(
        self,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> Loaded:
        """Load with ONNX Runtime."""
        runtime = _runtime()
        only_device(self.name, device)
        return _Model(runtime, directory / _FILE, [dtype for _, dtype in inputs])


def _runtime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise TargetUnavailableError(
            f"onnxruntime cannot be imported ({error}); install it: pip install 'spikeport[ort]'. The "
            "model itself is written without it, for whatever else reads ONNX."
        ) from error


@cache
def _newest() -> tuple[int, str]:
    """The newest opset that is written and, where ONNX Runtime is there, read; and whose limit it is."""
    newest, writer = OPSETS[-1], f"onnx {onnx.__version__}"
    try:
        runtime = _runtime()
    except TargetUnavailableError:
        return newest, writer
    # It says nowhere what it reads.
    if _reads(runtime, newest):
        return newest, writer
    read = next(opset for opset in reversed(OPSETS) if _reads(runtime, opset))
    return read, f"ONNX Runtime {runtime.__version__}"


def _reads(runtime: Any, opset: int) -> bool:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", [x], [y])
    try:
        _session(runtime, of_opset(graph, opset).SerializeToString())
    except DeviceError:
        return False
    return True


def _session(runtime: Any, model: str | bytes) -> Any:
    """A session of a file, or of a model's bytes."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; a constant that is folded twice is none
    try:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        named = model if isinstance(model, str) else "a model"
        raise DeviceError(f"ONNX Runtime refused {named}: {error}") from error


class _Model:
    """An ONNX Runtime session between torch tensors."""

    def __init__(self, runtime: Any, file: Path, dtypes: Sequence[torch.dtype]) -> None:
        self._session: Any = _session(runtime, str(file))
        self._names = [port.name for port in self._session.get_inputs()]
        self._dtypes = [numpy_dtype(dtype) for dtype in dtypes]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs."""
        if self._session is None:
            raise DeviceError("the model is closed; load it again")
        arrays = (x.cpu().contiguous().numpy() for x in inputs)
        feeds = {
            name: array.astype(dtype, copy=False)
            for name, array, dtype in zip(self._names, arrays, self._dtypes, strict=True)
        }
        try:
            return [torch.from_numpy(y) for y in self._session.run(None, feeds)]
        except Exception as error:
            raise DeviceError(f"the run failed: {error}") from error

    def close(self) -> None:
        """Free the session; a second time there is nothing to free."""
        self._session = None
