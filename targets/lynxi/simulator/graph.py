"""The simulator's primitive graph: static shapes, one result for each node, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .ops import OPS, Attrs

CONST = "const"
INPUT = "input"
FOREIGN = ("aten::", "refused::")
REFUSED = "refused::"


class LyngorError(RuntimeError):
    """The simulated compiler refuses the model or an argument."""


def kind_of(dtype: torch.dtype) -> str:
    """The graph's name of a type: every floating type is ``"float"``, the storage decides."""
    return "float" if dtype.is_floating_point else str(dtype).removeprefix("torch.")


def torch_type(kind: str) -> torch.dtype:
    """A torch type for a type of the graph."""
    dtype = torch.float32 if kind == "float" else getattr(torch, kind)
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by the number of the node that makes it."""

    id: int


@dataclass
class Node:
    """One primitive operation.

    Attributes:
        op: A key of ``OPS``, ``"const"``, ``"input"``, or the framework's own name
            (``"aten::sort"``) for an operation that no primitive stands for.
        inputs: Numbers of the nodes whose values are read.
        attrs: Plain JSON values.
        shape: Static shape of the result.
        dtype: ``"float"``, ``"bool"``, or the name of an integer type.
        scope: Path of the source module, ``"conv_fc.2"``.
        source: The framework's name of the operation.
        on_cpu: Whether the node is in the CPU part of a hybrid build.
    """

    op: str
    inputs: tuple[int, ...]
    attrs: Attrs
    shape: tuple[int, ...]
    dtype: str
    scope: str = ""
    source: str = ""
    on_cpu: bool = False

    def __str__(self) -> str:
        name = self.source or self.op
        return f"{name} -> {list(self.shape)} in {self.scope or 'the top module'}"


@dataclass
class Port:
    """One input or output of the whole network."""

    name: str
    value: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element in the I/O buffer."""
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the I/O buffer."""
        return int(torch.Size(self.shape).numel()) * self.itemsize


@dataclass
class Notes:
    """What the reader of a model saw that the builder must say or refuse.

    Attributes:
        dropped: In-place writes that the compiler drops.
        stale: In-place arithmetic whose target is read again through another name.
        refused: What no build takes.
    """

    dropped: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass
class Graph:
    """A network as primitives; a node's number is its place in ``nodes``."""

    nodes: list[Node] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)

    def uses(self) -> list[int]:
        """How often each value is read, by nodes and by the network's outputs."""
        count = [0] * len(self.nodes)
        for node in self.nodes:
            for i in node.inputs:
                count[i] += 1
        for port in self.outputs:
            count[port.value] += 1
        return count

    def to_dict(self) -> dict[str, Any]:
        """The graph as plain values, for JSON."""
        return {
            "nodes": [
                {key: value for key, value in vars(node).items() if value or key == "shape"}
                for node in self.nodes
            ],
            "inputs": [vars(port) for port in self.inputs],
            "outputs": [vars(port) for port in self.outputs],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Graph:
        """The graph that :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: The data is not a graph.
        """
        graph = cls()
        for i, raw in enumerate(data["nodes"]):
            node = Node(
                **{
                    "attrs": {},
                    "dtype": "float",
                    **raw,
                    "inputs": tuple(raw.get("inputs", ())),
                    "shape": tuple(raw["shape"]),
                }
            )
            if any(not 0 <= j < i for j in node.inputs):
                raise ValueError(f"node {i} reads a value that is not there yet")
            graph.nodes.append(node)
        for ports, name in ((graph.inputs, "inputs"), (graph.outputs, "outputs")):
            for raw in data[name]:
                if not 0 <= raw["value"] < len(graph.nodes):
                    raise ValueError(f"{name}: no value {raw['value']}")
                ports.append(Port(**{**raw, "shape": tuple(raw["shape"])}))
        return graph


class GraphWriter:
    """Writes a graph node by node; both front ends go through here.

    A value that is known while reading (a number, a weight, whatever is computed of those)
    stays a Python number or a tensor; it becomes a node when a node reads it.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.params: dict[str, Tensor] = {}
        self.scope = ""
        self.source = ""
        self._known: dict[tuple[Any, ...], int] = {}
        self._kept: list[Tensor] = []

    def input(self, name: str, shape: Sequence[int], kind: str, io_dtype: str) -> Ref:
        """Declare an input of the network."""
        node = Node(INPUT, (), {"name": name}, tuple(shape), kind, source=f"input {name!r}")
        self.graph.nodes.append(node)
        value = len(self.graph.nodes) - 1
        self.graph.inputs.append(Port(name, value, tuple(shape), io_dtype))
        return Ref(value)

    def output(self, value: Any, name: str, float_dtype: str) -> None:
        """Declare an output of the network."""
        ref = self.ref(value)
        node = self.graph.nodes[ref.id]
        io_dtype = {"float": float_dtype, "bool": "uint8"}.get(node.dtype, node.dtype)
        self.graph.outputs.append(Port(name, ref.id, node.shape, io_dtype))

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """Static shape of a value."""
        return self.graph.nodes[ref.id].shape

    def dtype(self, ref: Ref) -> str:
        """Type of a value."""
        return self.graph.nodes[ref.id].dtype

    def ref(self, value: Any) -> Ref:
        """The value as a node: a known number or tensor becomes a constant."""
        if isinstance(value, Ref):
            return value
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        return self._const(tensor.detach())

    def _const(self, tensor: Tensor) -> Ref:
        dtype = torch_type(kind_of(tensor.dtype))
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.dim() and identity in self._known:
            return Ref(self._known[identity])
        data = tensor.to("cpu", dtype).contiguous()
        digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        content = (digest, tuple(data.shape), data.dtype)
        if content not in self._known:
            name = f"p{len(self.params)}"
            self.params[name] = data
            node = Node(CONST, (), {"name": name}, tuple(data.shape), kind_of(dtype))
            node.scope, node.source = self.scope, "constant"
            self.graph.nodes.append(node)
            self._known[content] = len(self.graph.nodes) - 1
        if tensor.dim():
            self._known[identity] = self._known[content]
            self._kept.append(tensor)  # so that its address stays its own
        return Ref(self._known[content])

    def emit(self, op: str, *inputs: Any, **attrs: Any) -> Ref:
        """Add a primitive; its shape and type come of running it on tensors without data.

        Raises:
            LyngorError: The primitive does not take these inputs.
        """
        ids = tuple(self.ref(i).id for i in inputs)
        metas = [
            torch.empty(n.shape, dtype=torch_type(n.dtype), device="meta")
            for n in (self.graph.nodes[i] for i in ids)
        ]
        try:
            result = OPS[op].run(metas, attrs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(list(m.shape)) for m in metas)
            raise LyngorError(
                f"{self.source or op} in {self.scope or 'the top module'} cannot take inputs of "
                f"shape {shapes}: {error}"
            ) from error
        return self._append(op, ids, attrs, tuple(result.shape), kind_of(result.dtype))

    def foreign(
        self, op: str, inputs: Sequence[Any], attrs: Attrs, shape: Sequence[int], kind: str
    ) -> Ref:
        """Add an operation that no primitive stands for, under the framework's own name."""
        return self._append(op, tuple(self.ref(i).id for i in inputs), attrs, tuple(shape), kind)

    def _append(
        self, op: str, ids: tuple[int, ...], attrs: Attrs, shape: tuple[int, ...], kind: str
    ) -> Ref:
        node = Node(op, ids, attrs, shape, kind, self.scope, self.source or op)
        self.graph.nodes.append(node)
        return Ref(len(self.graph.nodes) - 1)
