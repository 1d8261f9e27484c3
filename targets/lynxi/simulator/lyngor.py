"""The simulated compiler, with the names and arguments of the vendor's ``lyngor``.

``lyngor.version`` is a string, the simulated version.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import compiled, devices
from .compiler import MAX_RUN_BATCH, compile_graph
from .graph import Graph, LyngorError
from .options import current

__all__ = ["Builder", "DLModel", "Engine", "LyngorError", "debug", "load", "version"]

version: str

_logger = logging.getLogger("lyngor")

_TYPES = ("float32", "float16", "uint8")
_REFUSED_TYPES = ("keras", "tensorflow", "caffe", "mxnet")
_INPUT_TYPES = {
    "float32": None,
    "float": None,
    "float16": None,
    "half": None,
    "long": torch.int64,
    "int64": torch.int64,
    "int": torch.int32,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bool": torch.bool,
}


def __getattr__(name: str) -> Any:
    if name == "version":
        return current().version
    raise AttributeError(f"the simulated lyngor has no {name!r}")


def debug() -> None:
    """Log what the compiler does in detail."""
    logging.basicConfig()
    _logger.setLevel(logging.DEBUG)


def _shapes(
    inputs_dict: Mapping[str, Any] | None,
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    if not inputs_dict:
        raise LyngorError("inputs_dict is missing; give {name: shape} for every input")
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name, value in inputs_dict.items():
        shape, dtype = value, "float32"
        if len(value) == 2 and isinstance(value[1], str):
            shape, dtype = value
        if dtype not in _INPUT_TYPES:
            raise LyngorError(
                f"inputs_dict[{name!r}] has type {dtype!r}; allowed: {', '.join(_INPUT_TYPES)}"
            )
        sizes = tuple(shape)
        if not all(isinstance(s, int) and s > 0 for s in sizes):
            raise LyngorError(
                f"inputs_dict[{name!r}] is {value!r}; every size must be a positive number, "
                "because shapes are static"
            )
        shapes[name] = (sizes, _INPUT_TYPES[dtype])
    return shapes


class DLModel:
    """A network read from a framework.

    Attributes:
        graph: The primitive graph; ``mod`` is the same.
        params: Its constants by name; ``param`` is the same.
    """

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.params: dict[str, Tensor] = {}

    @property
    def mod(self) -> Graph | None:
        """The primitive graph."""
        return self.graph

    @property
    def param(self) -> dict[str, Tensor]:
        """The constants by name."""
        return self.params

    def load(
        self,
        model: nn.Module | str | os.PathLike[str],
        model_type: str,
        inputs_dict: Mapping[str, Any] | None = None,
        outputs: Sequence[str] | None = None,
        in_type: str = "float32",
        out_type: str = "float32",
        **unused: Any,
    ) -> None:
        """Read a network.

        Args:
            model: A module, or the path of an .onnx file or a TorchScript .pt file.
            model_type: ``"Pytorch"`` or ``"ONNX"``, in any case.
            inputs_dict: Name and shape of each input, in the order of ``forward``; a value
                may be ``[shape, "long"]``. ONNX files know theirs.
            outputs: Names of the ONNX outputs to keep; None keeps all.
            in_type: Type of the floating inputs' buffers; the arithmetic does not change.
            out_type: Type of the floating outputs' buffers.
            **unused: What the vendor's compiler takes beyond this; refused unless None.

        Raises:
            LyngorError: The network cannot be read.
        """
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise LyngorError(
                f"the simulator does not have {', '.join(given)}; put it into the network"
            )
        for name, value in (("in_type", in_type), ("out_type", out_type)):
            if value not in _TYPES:
                raise LyngorError(f"{name} is {value!r}; allowed: {', '.join(_TYPES)}")
        kind = model_type.lower()
        if kind == "pytorch":
            from .from_torch import read_torch

            if not isinstance(model, nn.Module):
                model = _torchscript(Path(model))
            written = read_torch(model, _shapes(inputs_dict), (in_type, out_type))
        elif kind == "onnx":
            from .from_onnx import read_onnx

            if isinstance(model, nn.Module):
                raise LyngorError("model_type is 'ONNX' and the model is a module; give a path")
            sizes = _shapes(inputs_dict) if inputs_dict else {}
            written = read_onnx(Path(model), sizes, outputs, (in_type, out_type))
        elif kind in _REFUSED_TYPES:
            raise LyngorError(
                f"the simulator does not read {model_type} models; export the network to ONNX"
            )
        else:
            raise LyngorError(f"model_type is {model_type!r}; allowed: 'Pytorch', 'ONNX'")
        self.graph, self.params = written.graph, written.params
        _logger.debug("read %d nodes", len(written.graph.nodes))


def _torchscript(path: Path) -> nn.Module:
    if not path.exists():
        raise LyngorError(f"{path} does not exist")
    try:
        read: Any = torch.jit.load
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as such
            module = read(str(path), map_location="cpu")
    except RuntimeError as error:
        raise LyngorError(
            f"{path} is not a TorchScript file; load the checkpoint yourself and pass the module"
        ) from error
    assert isinstance(module, nn.Module)
    return module


class Builder:
    """The compiler.

    Args:
        target: ``"apu"``; ``"cpu"`` and ``"llvm"`` build for the host, without rounding.
        is_map: Whether to map onto the chip; recorded.
        cpu_arch: Host architecture; recorded.
        cc: Host compiler; recorded.

    Raises:
        LyngorError: No such target.
    """

    def __init__(
        self,
        target: str = "apu",
        is_map: bool = True,
        cpu_arch: str = "x86",
        cc: str = "g++",
    ) -> None:
        if target not in ("apu", "cpu", "llvm"):
            raise LyngorError(f"target is {target!r}; allowed: 'apu', 'cpu', 'llvm'")
        self.target, self.is_map, self.cpu_arch, self.cc = target, is_map, cpu_arch, cc

    def build(
        self,
        graph: Graph | None,
        params: Mapping[str, Tensor],
        opt_level: int = 3,
        out_path: str | os.PathLike[str] = "./",
        apu_only: bool = False,
        build_mode: str = "auto",
        version: int = 0,
        run_batch: int = 1,
        profiler: bool = False,
        save_graph: Any = None,
        serialize: Any = None,
        post_mode: Any = None,
        core_mem_mode: int = 0,
        lut_opt: int = 1,
        num_cores: int = 16,
        custom_opt: Sequence[Any] | None = None,
    ) -> str:
        """Compile and write a network.

        Args:
            graph: ``DLModel.graph``.
            params: ``DLModel.params``.
            opt_level: From 3 on, batch norms are folded into what they follow.
            out_path: Directory to write into.
            apu_only: Whether an operation that the chip lacks is an error.
            build_mode: ``"auto"``, ``"abc"`` (falls back to auto) or ``"abc_only"`` (fails).
            version: Recorded.
            run_batch: How many inputs one call takes, at most 10.
            profiler: Taken and unused, as are all that follow: they change the mapping only.

        Returns:
            ``out_path`` as text.

        Raises:
            LyngorError: Rules of the compiler or chip are broken, all in one text.
        """
        if graph is None:
            raise LyngorError("there is no graph; call DLModel.load first and pass its .graph")
        if not 1 <= run_batch <= MAX_RUN_BATCH:
            raise LyngorError(
                f"run_batch is {run_batch}; allowed: 1 to {MAX_RUN_BATCH}, the largest that the "
                "compiler has been seen to build"
            )
        if build_mode not in ("auto", "abc", "abc_only"):
            raise LyngorError(f"build_mode is {build_mode!r}; allowed: 'auto', 'abc', 'abc_only'")
        if build_mode == "abc_only":
            raise LyngorError(
                "abc_map is error, error num is -2; the simulator maps in auto mode only: use "
                "build_mode='auto'"
            )
        if build_mode == "abc":
            _logger.error("abc_map is error, error num is -2")
            print("INFO: build abc map failed, try to build by auto mode")
        options = current()
        if self.target != "apu":
            options = replace(options, storage="float32", accumulate="float32")
        compiled_graph, constants = compile_graph(
            graph,
            dict(params),
            options,
            target=self.target,
            apu_only=apu_only,
            opt_level=opt_level,
        )
        settings = {
            "version": str(version),
            "is_map": self.is_map,
            "cpu_arch": self.cpu_arch,
            "cc": self.cc,
        }
        compiled.write(
            compiled.Compiled(compiled_graph, constants, options, run_batch, self.target),
            Path(out_path),
            build_mode="auto",
            settings=settings,
        )
        _logger.info("simulated build of %d nodes in %s", len(compiled_graph.nodes), out_path)
        return str(out_path)


@dataclass
class _Slot:
    port: Any
    value: Tensor | None = None


class Engine:
    """A loaded network; :func:`load` makes it."""

    def __init__(self, network: compiled.Compiled) -> None:
        self._network = network
        self._engine = network.engine()
        self._slots = {p.name: _Slot(p) for p in network.graph.inputs}
        self._outputs: list[np.ndarray[Any, Any]] | None = None

    def set_input(self, name: str, value: np.ndarray[Any, Any]) -> None:
        """Give one input.

        Args:
            name: Its name.
            value: Its data, of the built shape and type, ``run_batch`` times along the first
                dimension.

        Raises:
            LyngorError: No such input, or another shape or type.
        """
        if name not in self._slots:
            raise LyngorError(f"no input {name!r}; the network has {', '.join(self._slots)}")
        port = self._slots[name].port
        data = np.asarray(value)
        shape = (port.shape[0] * self._network.run_batch, *port.shape[1:]) if port.shape else ()
        if data.shape != shape or str(data.dtype) != port.dtype:
            raise LyngorError(
                f"input {name!r} is {data.dtype} {list(data.shape)}; the network was built for "
                f"{port.dtype} {list(shape)}"
            )
        self._slots[name].value = torch.from_numpy(np.array(data))

    def run(self, data_format: str = "numpy", **inputs: np.ndarray[Any, Any]) -> None:
        """Run on the inputs given here and by :meth:`set_input`.

        Raises:
            LyngorError: An input is missing or of another shape or type.
        """
        _check_format(data_format)
        for name, value in inputs.items():
            self.set_input(name, value)
        missing = [name for name, slot in self._slots.items() if slot.value is None]
        if missing:
            raise LyngorError(f"inputs without data: {', '.join(missing)}")
        batch = self._network.run_batch
        pieces = [
            slot.value.chunk(batch) if batch > 1 else (slot.value,)
            for slot in self._slots.values()
            if slot.value is not None
        ]
        runs = [self._engine.run([p[i] for p in pieces]) for i in range(batch)]
        self._outputs = [
            torch.cat(parts).numpy() if batch > 1 else parts[0].numpy()
            for parts in zip(*runs, strict=True)
        ]

    def get_output(self, data_format: str = "numpy") -> list[np.ndarray[Any, Any]]:
        """The outputs of the last :meth:`run`.

        Raises:
            LyngorError: Nothing has run.
        """
        _check_format(data_format)
        if self._outputs is None:
            raise LyngorError("there is no output yet; call run first")
        return list(self._outputs)


def _check_format(data_format: str) -> None:
    if data_format != "numpy":
        raise LyngorError(f"data_format is {data_format!r}; the simulator has 'numpy'")


def load(path: str | os.PathLike[str], device: int = 0) -> Engine:
    """Load a compiled network onto a chip.

    Args:
        path: What ``Builder.build`` returned, or its ``Net_0``.
        device: Number of the chip.

    Raises:
        LyngorError: No such chip, or the files are missing or damaged.
    """
    problem = devices.problem(device)
    if problem:
        raise LyngorError(problem)
    try:
        return Engine(compiled.read(Path(path)))
    except compiled.CorruptError as error:
        raise LyngorError(str(error)) from error
