"""Reads a network as the vendor does: ``torch.jit.trace``, then its graph node by node."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import aten
from .graph import REFUSED, LyngorError, Ref, kind_of
from .lowering import Lowering
from .memory import DROPPED, Memory
from .ops import Attrs
from .torch_ops import LOWERINGS, RANDOM, SHAPES

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]


def trace(model: nn.Module, shapes: Shapes) -> Any:
    """Trace a network on zeros of the given shapes.

    Raises:
        LyngorError: The network does not run on them.
    """
    float_type = next(
        (p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()),
        torch.float32,
    )
    examples = tuple(
        torch.zeros(shape, dtype=dtype or float_type) for shape, dtype in shapes.values()
    )
    if isinstance(model, torch.jit.ScriptModule):
        return model
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # What the tracer says about itself; whatever goes wrong is an exception.
            warnings.simplefilter("ignore")
            run: Any = torch.jit.trace
            return run(model, examples, check_trace=False)
    except Exception as error:
        sizes = ", ".join(f"{name}: {list(shape)}" for name, (shape, _) in shapes.items())
        raise LyngorError(
            f"torch.jit.trace of {type(model).__name__} on zeros of shape {{{sizes}}} failed: "
            f"{type(error).__name__}: {error}"
        ) from error


class TorchReader:
    """Turns one traced network into primitives."""

    def __init__(self, traced: Any, shapes: Shapes, io: tuple[str, str]) -> None:
        self.traced = traced
        self.shapes = shapes
        self.io = io
        self.out = Lowering()
        self.values: dict[str, Any] = {}
        self.memory = Memory()

    def read(self) -> Lowering:
        """Read the whole graph.

        Raises:
            LyngorError: A count of inputs or an operation that cannot be read.
        """
        graph = self.traced.inlined_graph
        self_value, *inputs = list(graph.inputs())
        self.values[self_value.debugName()] = self.traced
        if len(inputs) != len(self.shapes):
            raise LyngorError(
                f"inputs_dict names {len(self.shapes)} inputs ({', '.join(self.shapes)}) and the "
                f"network's forward takes {len(inputs)}"
            )
        for value, (name, (shape, dtype)) in zip(inputs, self.shapes.items(), strict=True):
            kind = "float" if dtype is None else kind_of(dtype)
            io_dtype = self.io[0] if kind == "float" else kind
            ref = self.out.input(name, shape, kind, io_dtype)
            self.values[value.debugName()] = ref
        refused: list[str] = []
        for node in graph.nodes():
            try:
                self._node(node)
            except LyngorError as error:
                place = self._place()
                refused.append(f"{node.kind()} in {place}: {error}")
                read = _refs([self.values[v.debugName()] for v in node.inputs()])
                for result in node.outputs():
                    self._stand_in(result, REFUSED + node.kind(), read)
        self.out.graph.notes.refused += refused
        flat: list[Any] = []
        for value in graph.outputs():
            _flatten(self.values[value.debugName()], flat)
        for i, item in enumerate(flat):
            self.out.source = "output"
            self.out.output(item, f"apu_0:{i}", self.io[1])
        return self.out

    def _place(self) -> str:
        return self.out.scope or "the top module"

    def _node(self, node: Any) -> None:
        kind = node.kind()
        outputs = list(node.outputs())
        self.out.scope = _scope(node)
        self.out.source = kind
        if kind.startswith("prim::") and self._structure(node, kind, outputs):
            return
        names = [v.debugName() for v in node.inputs()]
        args = [self.values[n] for n in names]
        if kind.removeprefix("aten::") not in SHAPES:
            self.out.graph.notes.stale += [
                f"{write}: {kind} in {self._place()} reads the old value"
                for write in self.memory.stale(names)
            ]
        if not kind.startswith("aten::"):
            self._refuse(node, kind, args)
            return
        name = kind.removeprefix("aten::")
        result = self._apply(node, name, args)
        results = list(result) if len(outputs) > 1 else [result]
        for value, item in zip(outputs, results, strict=True):
            self.values[value.debugName()] = item
        if isinstance(args[0] if args else None, Ref):
            self.memory.track(name, self._place(), names[0], outputs[0].debugName())

    def _apply(self, node: Any, name: str, args: list[Any]) -> Any:
        if name in SHAPES and isinstance(args[0], Ref):
            return SHAPES[name](self.out, args)
        if name in DROPPED:
            if isinstance(args[0], Ref) or _has_ref(args):
                self.out.graph.notes.dropped.append(
                    f"{node.kind()} in {self._place()}{_line(node)}"
                )
                return args[0]
            return self._fold(node, name, args)
        pure = name if name.endswith("__") else name.removesuffix("_")
        lowering = LOWERINGS.get(pure)
        if lowering is not None and (_has_ref(args) or pure in ("zeros", "ones", "full", "empty")):
            return lowering(self.out, args)
        if not _has_ref(args) and pure not in RANDOM:
            return self._fold(node, name, args)
        return self._foreign(node, args)

    def _fold(self, node: Any, name: str, args: list[Any]) -> Any:
        """Compute at once what does not depend on an input."""
        copies = [a.clone() if isinstance(a, Tensor) and name.endswith("_") else a for a in args]
        try:
            with torch.no_grad():
                return aten.call(name, *aten.signature(node.schema()), copies)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise LyngorError(f"cannot be computed at build time: {error}") from error

    def _foreign(self, node: Any, args: list[Any]) -> Any:
        """Keep an operation without a primitive, for the CPU part of a hybrid build."""
        refs: list[Any] = []
        template = [_template(a, refs) for a in args]
        overload, keywords = aten.signature(node.schema())
        attrs = {"args": template, "overload": overload, "keywords": keywords}
        results = [
            self._stand_in(value, node.kind(), refs, {**attrs, "index": index})
            for index, value in enumerate(node.outputs())
        ]
        return results[0] if len(results) == 1 else results

    def _stand_in(
        self, value: Any, op: str, refs: Sequence[Any] = (), attrs: Attrs | None = None
    ) -> Any:
        """A node of the traced shape; None for what is no tensor."""
        sizes = None
        if value.type().kind() == "TensorType":
            sizes = value.type().sizes()
        if sizes is None:
            self.values[value.debugName()] = None
            return None
        dtype = value.type().dtype() or torch.float32
        ref = self.out.foreign(op, refs, attrs or {}, sizes, kind_of(dtype))
        self.values[value.debugName()] = ref
        return ref

    def _refuse(self, node: Any, kind: str, args: list[Any]) -> None:
        name = f"autograd.Function {node.pyname()}" if kind == "prim::PythonOp" else kind
        place = self._place()
        self.out.graph.notes.refused.append(f"{name} in {place}: not supported by the compiler")
        for value in node.outputs():
            self._stand_in(value, REFUSED + kind, _refs(args))

    def _structure(self, node: Any, kind: str, outputs: list[Any]) -> bool:
        """Lists, tuples, attributes and constants; False for anything else."""
        args = [self.values[v.debugName()] for v in node.inputs()]
        result: Any
        if kind == "prim::Constant":
            result = outputs[0].toIValue()
        elif kind == "prim::GetAttr":
            result = getattr(args[0], node.s("name"))
        elif kind in ("prim::ListConstruct", "prim::TupleConstruct"):
            result = args
        elif kind in ("prim::ListUnpack", "prim::TupleUnpack"):
            for value, item in zip(outputs, args[0], strict=True):
                self.values[value.debugName()] = item
                self.memory.share(next(iter(node.inputs())).debugName(), value.debugName())
            return True
        elif kind == "prim::NumToTensor":
            result = torch.tensor(args[0])
        elif kind == "prim::device":
            result = torch.device("cpu")
        elif kind == "prim::dtype":
            result = torch.float32
        else:
            return False
        self.values[outputs[0].debugName()] = result
        return True


def _flatten(value: Any, into: list[Any]) -> None:
    if isinstance(value, (list, tuple)):
        for item in value:
            _flatten(item, into)
    else:
        into.append(value)


def _refs(value: Any) -> list[Ref]:
    flat: list[Any] = []
    _flatten(value, flat)
    return [v for v in flat if isinstance(v, Ref)]


def _has_ref(value: Any) -> bool:
    return bool(_refs(value))


def _template(value: Any, refs: list[Any]) -> Any:
    """An argument as JSON, with tensors as places in ``refs``."""
    if isinstance(value, (list, tuple)):
        return [_template(v, refs) for v in value]
    if isinstance(value, (Ref, Tensor)):
        refs.append(value)
        return {"ref": len(refs) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return None


def _scope(node: Any) -> str:
    """``__module.conv_fc/__module.conv_fc.0`` as ``conv_fc.0``."""
    last = str(node.scopeName()).rsplit("/", 1)[-1]
    return last.removeprefix("__module.") if last != "__module" else ""


def _line(node: Any) -> str:
    """The line of the user's source, where torch kept it."""
    first = str(node.sourceRange()).strip().splitlines()[:1]
    return f" ({first[0].split('): ')[0]}))" if first and ".py(" in first[0] else ""


def read_torch(model: nn.Module, shapes: Shapes, io: tuple[str, str]) -> Lowering:
    """Read a network into primitives.

    Args:
        model: The network, in evaluation mode.
        shapes: For each input of ``forward``, in order: shape, and type unless floating.
        io: Types of the floating inputs and outputs, ``("float16", "float32")``.

    Raises:
        LyngorError: The network cannot be traced or read.
    """
    return TorchReader(trace(model, shapes), shapes, io).read()
