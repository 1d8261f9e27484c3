"""Reads an .onnx file: its nodes one by one, through the same lowering as torch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from .graph import LyngorError, Ref
from .lowering import Lowering
from .onnx_ops import LOWERINGS, Node, kind_of_onnx

OPSETS = range(11, 22)

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]


def _torch(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(array))


class OnnxReader:
    """Turns one ONNX model into primitives."""

    def __init__(self, model: onnx.ModelProto, shapes: Shapes, io: tuple[str, str]) -> None:
        self.model = model
        self.shapes = shapes
        self.io = io
        self.out = Lowering()
        self.values: dict[str, Any] = {"": None}
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))

    def read(self, outputs: Sequence[str] | None) -> Lowering:
        """Read the whole graph.

        Raises:
            LyngorError: Names that do not fit, shapes that are not static.
        """
        if self.opset not in OPSETS:
            raise LyngorError(
                f"the file has opset {self.opset}; allowed: {OPSETS[0]} to {OPSETS[-1]}"
            )
        graph = self.model.graph
        for constant in graph.initializer:
            self.values[constant.name] = _torch(numpy_helper.to_array(constant))
        ports = [v for v in graph.input if v.name not in self.values]
        names = [v.name for v in ports]
        unknown = sorted(set(self.shapes) - set(names))
        if unknown:
            raise LyngorError(
                f"inputs_dict names {', '.join(unknown)}; the file's inputs are {', '.join(names)}"
            )
        for port in ports:
            self._input(port)
        refused = []
        for node in graph.node:
            try:
                self._node(node)
            except LyngorError as error:
                refused.append(f"{node.op_type} in {self.out.scope or 'the graph'}: {error}")
                self._stand_in(node, [])
        self.out.graph.notes.refused += refused
        there = [v.name for v in graph.output]
        wanted = list(outputs) if outputs else there
        absent = sorted(set(wanted) - set(there))
        if absent:
            raise LyngorError(
                f"outputs names {', '.join(absent)}; the file's outputs are {', '.join(there)}"
            )
        self.out.source = "output"
        for i, name in enumerate(wanted):
            self.out.output(self.values[name], f"apu_0:{i}", self.io[1])
        return self.out

    def _input(self, port: Any) -> None:
        tensor = port.type.tensor_type
        kind = kind_of_onnx(tensor.elem_type)
        if port.name in self.shapes:
            shape = self.shapes[port.name][0]
        else:
            sizes = [d.dim_value for d in tensor.shape.dim]
            if not all(sizes):
                raise LyngorError(
                    f"input {port.name!r} has the shape {sizes} with unknown sizes (0); give it in "
                    "inputs_dict, because shapes are static"
                )
            shape = tuple(sizes)
        io_dtype = self.io[0] if kind == "float" else kind
        self.values[port.name] = self.out.input(port.name, shape, kind, io_dtype)

    def _node(self, raw: Any) -> None:
        args = [self.values[name] for name in raw.input]
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in raw.attribute}
        self.out.scope = raw.name.rsplit("/", 1)[0].strip("/").replace("/", ".")
        self.out.source = raw.op_type
        node = Node(args, attrs, self.opset, len(raw.output))
        result: Any
        if raw.op_type == "Constant":
            result = _constant(attrs)
        elif raw.op_type == "Shape" and isinstance(args[0], Ref):
            shape = self.out.shape(args[0])
            result = torch.tensor(shape[attrs.get("start", 0) : attrs.get("end")])
        elif not any(isinstance(a, Ref) for a in args):
            result = self._fold(raw, args)
        elif raw.op_type in LOWERINGS:
            result = LOWERINGS[raw.op_type](self.out, node)
        else:
            self._stand_in(raw, args)
            return
        results = result if isinstance(result, list) else [result]
        for name, value in zip(raw.output, results, strict=False):
            self.values[name] = value

    def _fold(self, raw: Any, args: list[Any]) -> Any:
        """Compute at once what does not depend on an input."""
        from onnx.reference import ReferenceEvaluator

        names = [name for name in raw.input if name]
        graph = onnx.helper.make_graph(
            [raw],
            "fold",
            [onnx.helper.make_tensor_value_info(n, 0, None) for n in dict.fromkeys(names)],
            [onnx.helper.make_tensor_value_info(n, 0, None) for n in raw.output],
        )
        model = onnx.helper.make_model(graph, opset_imports=self.model.opset_import)
        feeds = {n: a.numpy() for n, a in zip(raw.input, args, strict=True) if n}
        try:
            results = ReferenceEvaluator(model).run(None, feeds)
        except Exception as error:
            raise LyngorError(f"cannot be computed at build time: {error}") from error
        return [_torch(np.asarray(r)) for r in results]

    def _stand_in(self, raw: Any, args: list[Any]) -> None:
        """Note an operation without a primitive: there is nothing here to run it with."""
        shapes = {v.name: v for v in (*self.model.graph.value_info, *self.model.graph.output)}
        place = self.out.scope or "the graph"
        if args:
            self.out.graph.notes.refused.append(f"{raw.op_type} in {place}: no such operation")
        for name in raw.output:
            info = shapes.get(name)
            sizes = [d.dim_value for d in info.type.tensor_type.shape.dim] if info else [1]
            self.values[name] = self.out.full([s or 1 for s in sizes], 0.0, "float")


def _constant(attrs: Mapping[str, Any]) -> Tensor:
    (name, value), *_ = attrs.items()
    if name == "value":
        return _torch(numpy_helper.to_array(value))
    return torch.tensor(value)


def read_onnx(
    path: Path, shapes: Shapes, outputs: Sequence[str] | None, io: tuple[str, str]
) -> Lowering:
    """Read an ONNX file into primitives.

    Args:
        path: The file; its tensors may lie in files beside it.
        shapes: Shapes of inputs by name, for those that the file leaves open.
        outputs: Names of the outputs to keep; None keeps all.
        io: Types of the floating inputs and outputs.

    Raises:
        LyngorError: The file cannot be read.
    """
    if not path.exists():
        raise LyngorError(f"{path} does not exist")
    try:
        model = onnx.load(str(path))
        fixed = _fix_shapes(model, shapes)
        inferred = onnx.shape_inference.infer_shapes(fixed)
    except Exception as error:
        raise LyngorError(f"{path} is not a readable ONNX file: {error}") from error
    return OnnxReader(inferred, shapes, io).read(outputs)


def _fix_shapes(model: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    """Write the given sizes into the model, so that the sizes behind them are inferred."""
    for port in model.graph.input:
        if port.name in shapes:
            dims = port.type.tensor_type.shape.dim
            given = shapes[port.name][0]
            if len(dims) == len(given):
                for dim, size in zip(dims, given, strict=True):
                    dim.dim_value = size
    return model
