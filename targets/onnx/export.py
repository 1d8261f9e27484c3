"""A program as an ONNX model: static shapes, standard operators, the same bytes each time."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from ...converters.errors import CompileError, Finding, UnsupportedError
from ...converters.ops import Node, shape
from ...converters.program import Program, short, where
from .parts import in_parts

#: Opset of a model unless the user says otherwise: what compilers of the last years read.
DEFAULT_OPSET = 17
#: From the first in which all that is needed has its present form to the newest that onnx has.
OPSETS = range(13, onnx.defs.onnx_opset_version() + 1)
#: Bytes of weights above which they lie in a file of their own: protobuf ends at 2 GiB.
EXTERNAL_ABOVE = 2**31 - 2**24

#: ONNX's names of the types of numbers that ONNX Runtime computes in.
NUMBERS = {
    torch.float16: TensorProto.FLOAT16,
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.bool: TensorProto.BOOL,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int16: TensorProto.INT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}


class NotInOnnx(Exception):  # noqa: N818 -- it never leaves this package
    """A form of an operator that standard ONNX operators do not give."""


class Emitter:
    """Emits ONNX nodes for the nodes of a graph, one after the other.

    Args:
        program: The program.
        opset: The opset.
    """

    def __init__(self, program: Program, opset: int) -> None:
        self.program, self.opset = program, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.bytes = 0
        # Of an operator with several results the list of them.
        self._values: dict[Node, Any] = {}
        self._by_content: dict[tuple[Any, ...], str] = {}
        self._names: set[str] = set()
        self._node: Node = None

    # What the exporters of operators call

    def __call__(self, op: str, *inputs: Any, **attributes: Any) -> str:
        """Emit one ONNX node and give its output's name; attributes that are None are left out."""
        return self.several(1, op, *inputs, **attributes)[0]

    def several(self, count: int, op: str, *inputs: Any, **attributes: Any) -> list[str]:
        """The same for a node with several outputs."""
        names = [self._unique(self._node.name) for _ in range(count)]
        path = where(self._node)
        scope = path.replace(".", "/")
        node = helper.make_node(
            op,
            [self._input(i) for i in inputs],
            names,
            name=f"/{scope}/{names[0]}" if scope else f"/{names[0]}",
            doc_string=path,
            **{k: v for k, v in attributes.items() if v is not None},
        )
        self.nodes.append(node)
        return names

    def value(self, x: Any, dtype: torch.dtype | None = None) -> str:
        """A graph node's value, or a number, in this dtype."""
        if not isinstance(x, fx.Node):
            return self.constant(torch.tensor(x, dtype=dtype))
        name: str = self._values[x]
        return name if dtype is None else self.cast(name, x.meta["val"].dtype, dtype)

    def cast(self, name: str, given: torch.dtype, wanted: torch.dtype) -> str:
        """A value in another dtype."""
        return name if given == wanted else self("Cast", name, to=NUMBERS[wanted])

    def constant(self, value: torch.Tensor, name: str = "") -> str:
        """A tensor of the model; equal tensors are stored once."""
        array = value.detach().cpu().contiguous().numpy()
        data = array.tobytes()
        content = (array.dtype.str, array.shape, hashlib.sha256(data).digest())
        if content not in self._by_content:
            unique = self._unique(name or f"constant_{len(self.constants)}")
            self.constants[unique] = numpy_helper.from_array(array, unique)
            self._by_content[content] = unique
            self.bytes += len(data)
        return self._by_content[content]

    def ints(self, values: Sequence[int]) -> str:
        """Sizes or dimensions as an input."""
        return self.constant(torch.tensor([int(v) for v in values], dtype=torch.int64))

    def tensor(self, x: Any) -> torch.Tensor | None:
        """The tensor behind a weight's node, or None where it is computed."""
        known = isinstance(x, fx.Node) and x.op == "get_attr"
        return self.program.tensor(str(x.target)) if known else None

    def _input(self, given: Any) -> str:
        return "" if given is None else given if isinstance(given, str) else self.value(given)

    def _unique(self, name: str) -> str:
        k, unique = 0, name
        while unique in self._names:
            k, unique = k + 1, f"{name}_{k + 1}"
        self._names.add(unique)
        return unique

    # The whole graph

    def run(self) -> onnx.GraphProto:
        """The graph.

        Raises:
            UnsupportedError: Operators that ONNX does not have; all are named.
        """
        from .operators import OPERATORS

        program = self.program
        ports = [spec.name for spec in (*program.graph_inputs, *program.graph_outputs)]
        self._names.update(ports)
        inputs = [
            helper.make_tensor_value_info(s.name, NUMBERS[n.meta["val"].dtype], shape(n))
            for s, n in zip(program.graph_inputs, program.nodes("placeholder"), strict=True)
        ]
        specs = iter(program.graph_inputs)
        findings: dict[tuple[str, str], Finding] = {}
        for n in program.walk():
            self._node = n
            if n.op == "placeholder":
                self._values[n] = next(specs).name
            elif n.op == "get_attr":
                self._values[n] = self.constant(program.tensor(n.target), n.target)
            elif n.target is operator.getitem:
                held = self._values[n.args[0]]
                # A node that is refused has one name, whatever it gives.
                self._values[n] = held[n.args[1]] if isinstance(held, list) else held
            elif n.op == "call_function":
                try:
                    if n.target not in OPERATORS:
                        raise NotInOnnx("no exporter knows this form of the operator")
                    self._values[n] = OPERATORS[n.target](self, n)
                except NotInOnnx as error:
                    found = f"{n.target}: {error}"
                    findings.setdefault((where(n), found), refused(n, found))
                    self._values[n] = self(short(n.target), *n.all_input_nodes)
        if findings:
            raise UnsupportedError("ONNX cannot say this network:", findings.values())
        outputs = []
        for spec, n in zip(program.graph_outputs, program.results, strict=True):
            self._node = n
            self._publish(n, spec.name, ports)
            number = NUMBERS[n.meta["val"].dtype]
            outputs.append(helper.make_tensor_value_info(spec.name, number, shape(n)))
        name = program.source.get("class", "program").rpartition(".")[2]
        return helper.make_graph(
            self.nodes, name, inputs, outputs, initializer=list(self.constants.values())
        )

    def _publish(self, n: Node, name: str, ports: Sequence[str]) -> None:
        """Let a value have an output's name."""
        value: str = self._values[n]
        made = [node for node in self.nodes if value in node.output]
        if not made or value in ports:
            self.nodes.append(helper.make_node("Identity", [value], [name], name=f"/{name}"))
            return
        for node in self.nodes:
            for side in (node.input, node.output):
                for i, other in enumerate(side):
                    side[i] = name if other == value else other
        for k, held in self._values.items():
            if isinstance(held, list):
                self._values[k] = [name if v == value else v for v in held]
            elif held == value:
                self._values[k] = name

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What each value that stands for a node of the program must be."""
        return {
            value: (n.meta["val"].dtype, shape(n))
            for n, value in self._values.items()
            if n.op == "call_function" and isinstance(value, str)
        }


def refused(n: Node, found: str) -> Finding:
    """The finding that an operator cannot be said in ONNX."""
    return Finding(
        rule="operator",
        where=where(n),
        node=n.name,
        target="onnx",
        found=found,
        allowed="operators of standard ONNX",
        fix="replace it in the network's forward",
    )


def export(program: Program, file: Path, opset: int) -> tuple[Path, ...]:
    """Write a program as an ONNX file, checked, and give the files written.

    Above 2 GiB the weights lie in a second file beside it.

    Raises:
        UnsupportedError: Operators that ONNX does not have.
        CompileError: The onnx package finds the model wrong.
    """
    emitter = Emitter(in_parts(program), opset)
    graph = emitter.run()
    model = of_opset(graph, opset)
    state = "each call starts from v_0"
    if program.stepping is not None:
        state = "each call is one time step; an output <name>.next goes into the input <name>"
    neurons = {f"neuron:{site.name}": site.neuron.describe() for site in program.sites}
    helper.set_model_props(model, {**neurons, "state": state})
    files = [file]
    if emitter.bytes > EXTERNAL_ABOVE:
        files.append(file.with_name(f"{file.name}.data"))
        onnx.save(model, file, save_as_external_data=True, location=files[1].name)
    else:
        onnx.save(model, file)
    try:
        onnx.checker.check_model(str(file), full_check=True)
        onnx.shape_inference.infer_shapes_path(str(file), strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CompileError(f"onnx {onnx.__version__} finds the model wrong: {error}") from error
    _compare_shapes(onnx.load(file, load_external_data=False), emitter)
    return tuple(files)


def of_opset(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    """A graph as a model of the oldest format that has this opset."""
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="spikeport",
    )


def _compare_shapes(model: onnx.ModelProto, emitter: Emitter) -> None:
    """What onnx infers must be what the program has, value by value."""
    inferred = {
        v.name: (
            v.type.tensor_type.elem_type,
            tuple(d.dim_value for d in v.type.tensor_type.shape.dim),
        )
        for v in (*model.graph.value_info, *model.graph.output)
    }
    wrong = [
        f"{name} is {inferred.get(name)}, in the program {(NUMBERS[dtype], size)}"
        for name, (dtype, size) in emitter.shapes().items()
        if name not in emitter.constants and inferred.get(name) != (NUMBERS[dtype], size)
    ]
    if wrong:
        raise CompileError(f"onnx infers other types and shapes: {'; '.join(wrong)}")


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """NumPy's name for a dtype."""
    return torch.empty(0, dtype=dtype).numpy().dtype
