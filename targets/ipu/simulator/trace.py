"""Runs a network's forward once and records what it does.

A torch function mode sees every call of a torch function before it is decomposed. Python itself
leaves no trace: attributes and branches are what they were at that time. A
``torch.autograd.Function`` leaves its forward alone, because that is all that the SDK sees of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import problems
from .errors import on_device
from .graph import Graph, Node, Slot, device_bytes, function_name, replace, tensors
from .precision import in_device_precision
from .problems import Problem, Rule
from .settings import current, place, warn

if TYPE_CHECKING:
    from .poptorch.strategies import ExecutionStrategy

# Reads that hand the value of a tensor to Python.
_READS = {
    "item": "aten::item",
    "tolist": "aten::item",
    "numpy": "aten::numpy_T",
    "__bool__": "aten::is_nonzero",
    "is_nonzero": "aten::is_nonzero",
    "__int__": "aten::Int",
    "__index__": "aten::Int",
    "__float__": "aten::Float",
    "__complex__": "aten::Complex",
    "__contains__": "aten::item",
    "__array__": "aten::numpy_T",
    "equal": "aten::equal",
    "allclose": "aten::allclose",
}
# Results whose shape depends on the data; see also _shaping.
_DYNAMIC = ("nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "argwhere")
# Functions that read values only to check them, where the host does.
_CHECKING = ("one_hot", "gaussian_nll_loss", "multinomial")
_GRADIENTS = ("backward", "grad")
# Functions whose derivative is zero almost everywhere, although autograd lets a gradient pass.
_STEPS = ("sign", "sgn", "floor", "ceil", "round", "trunc", "fix", "heaviside", "frac_")
# Indexing goes past function modes before torch 2.1, TorchScript in every release.
_UNCALLED: tuple[tuple[Any, str], ...] = (
    (Tensor, "__getitem__"),
    (torch._C.ScriptFunction, "__call__"),
    (torch._C.ScriptMethod, "__call__"),
)
_UNSEEN = ("_set_grad_enabled", "__repr__", "__format__", "__hash__", "__str__", "__deepcopy__")


@dataclass(frozen=True)
class Surrogate:
    """A ``torch.autograd.Function`` whose backward the device does not know.

    Attributes:
        name: Its name.
        module: Path of the module that applied it.
        blocks: Whether no gradient passes through its forward either.
        place: File and line that applied it.
    """

    name: str
    module: str
    blocks: bool
    place: str = ""


@dataclass
class Traced:
    """What a trace found.

    Attributes:
        graph: The calls.
        surrogates: Functions with a backward of their own.
        problems: What the SDK refuses.
        saved: Bytes kept for the backward pass, by IPU and module.
        stages: IPU of each pipeline stage.
        gradients: Slots that depend differentiably on a weight.
    """

    graph: Graph
    surrogates: list[Surrogate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    saved: dict[tuple[int, str], int] = field(default_factory=dict)
    stages: dict[int, int] = field(default_factory=dict)
    gradients: set[int] = field(default_factory=set)


_active: list[Tracer] = []


def active() -> Tracer | None:
    """The trace in progress."""
    return _active[-1] if _active else None


class Tracer(TorchFunctionMode):
    """Records calls as long as it is entered."""

    def __init__(
        self, training: bool, modules: Mapping[int, str], strategy: ExecutionStrategy | None = None
    ) -> None:
        super().__init__()
        self.training = training
        self.strategy = strategy
        self.found = Traced(Graph())
        self.ipu, self.stage = 0, -1
        self.depth = 0
        self._modules = modules
        self._path: list[str] = []
        self._slots: dict[int, int] = {}
        self._storages: dict[int, int] = {}  # of each slot
        self._keep: list[Tensor] = []
        self._dynamic: set[int] = set()  # slots whose value is not known at compile time
        self._buffers: dict[int, str] = {}  # slots that hang on the value of a buffer alone
        self._replaced: dict[int, Tensor] = {}
        self._written: set[int] = set()  # storages
        self._given: list[Tensor] = []  # of the call under way
        self._names: dict[str, int] = {}
        self._modules_of: dict[int, str] = {}  # in which a slot was made

    # What the graph starts from

    def input(self, value: Tensor) -> None:
        """Declare an input."""
        slot = self._new(value)
        self._dynamic.add(slot)
        self.found.graph.inputs.append(slot)

    def weight(self, name: str, value: Tensor, original: Tensor) -> None:
        """Declare a parameter or buffer, and what forward may hold in its place."""
        slot = self._slots.get(id(value))
        if slot is None:
            slot = self._new(value)
            if value.requires_grad:
                self._dynamic.add(slot)
                self.found.gradients.add(slot)
            else:
                self._buffers[slot] = name
            self.found.graph.weights[name] = slot
        self._replaced[id(original)] = value

    def begin_block(self, user_id: str | None, ipu_id: int | None) -> None:
        """What follows runs on another stage."""
        if self.strategy is not None:
            self.stage, self.ipu = self.strategy.begin(user_id, ipu_id)
            self.found.stages[self.stage] = self.ipu

    # The calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.depth += 1
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return self._call(func, tuple(args), dict(kwargs or {}))
        finally:
            self.depth -= 1

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = function_name(func)
        if name in _UNSEEN:
            return func(*args, **kwargs)
        args, kwargs = replace((args, kwargs), self._original)
        given = list(tensors((args, kwargs)))
        if name in _READS:
            self._read(_READS[name], given)
            return func(*args, **kwargs)
        if name in _GRADIENTS and (given or func is torch.autograd.grad):
            self._problem(
                problems.BACKWARD,
                f"{name}() cannot be called inside a model: the compiler differentiates it",
            )
        operator = _operator(func)
        if operator and not operator.startswith("aten::"):
            self._problem(
                problems.OPERATOR,
                f"Unsupported ops found in compiled model: [{operator}]. Not all operations are "
                "supported yet by Graphcore's PyTorch compiler.",
            )
        versions = [t._version for t in given]
        # Norms write their statistics without a trace in the version.
        buffers = [(t, t.detach().clone()) for t in given if self._is_buffer(t)]
        before = torch.get_rng_state()
        self._given = [] if name in _CHECKING else given
        try:
            # Not around all of forward: constructors of tensor subclasses cannot run in such a mode.
            with _HiddenReads(self):
                func, result = in_device_precision(func, args, kwargs, name)
        except IndexError as error:
            raise on_device(error, self._qualified(name)) from error
        made = list(tensors(result))
        mutated = [t for t, v in zip(given, versions, strict=True) if t._version != v]
        mutated += [
            t
            for t, old in buffers
            if not torch.equal(t, old) and not any(t is other for other in mutated)
        ]
        if not made and not mutated:
            return result
        if any(self._is_dynamic(t) for t in _shaping(name, args, kwargs)):
            self._problem(
                problems.SHAPE,
                f"aten::{name}: the shape of its result depends on the data, and shapes are static",
            )
        random = not torch.equal(before, torch.get_rng_state())
        self._record(name, func, args, kwargs, given, made, mutated, random)
        return result

    def _record(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
        mutated: list[Tensor],
        random: bool,
    ) -> None:
        graph = self.found.graph
        packed_args, packed_kwargs = replace((args, kwargs), self._pack)
        ins = [self._slots_of(t) for t in given]
        outs = tuple(self._out(t) for t in made)
        wrote = tuple(self._slots_of(t) for t in mutated)
        self._written.update(self._storages[s] for s in wrote)
        if random or any(s in self._dynamic for s in ins):
            self._dynamic.update(outs, wrote)
            for slot in wrote:
                self._taint_storage(self._storages[slot])
        else:
            for slot in ins:
                if slot in self._buffers:
                    self._buffers.update(dict.fromkeys(outs, self._buffers[slot]))
        module, unique = self._module(), self._qualified(name)
        self._names[unique] = count = self._names.get(unique, -1) + 1
        reached = any(s in self.found.gradients for s in ins)
        passes = [t.requires_grad and name not in _STEPS for t in made]
        for slot, on in zip(outs, passes, strict=True):
            if reached and on:
                self.found.gradients.add(slot)
        self._check_backward(given)
        self._modules_of.update(dict.fromkeys(outs, module))
        graph.nodes.append(
            Node(
                name=f"{unique}:{count}" if count else unique,
                func=func,
                args=packed_args,
                kwargs=packed_kwargs,
                outs=outs,
                module=module,
                grad=torch.is_grad_enabled(),
                ipu=self.ipu,
                blocks=reached and bool(made) and not any(passes),
                random=random,
                mutates=wrote,
                place=place(),
            )
        )

    def _module(self) -> str:
        """Path of the module whose forward runs."""
        return self._path[-1] if self._path else ""

    def _qualified(self, name: str) -> str:
        return f"{self._module()}/{name}" if self._module() else name

    # torch.autograd.Function

    def apply(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward of an autograd function as the plain Python that it is."""
        context = _Context(tuple(isinstance(a, Tensor) and a.requires_grad for a in args))
        base = torch.autograd.function._SingleLevelFunction.setup_context
        separate = getattr(function.setup_context, "__func__", function.setup_context) is not base
        given = [t for t in tensors(args) if self._differentiable(t)]
        result = function.forward(*args) if separate else function.forward(context, *args, **kwargs)
        if separate:
            function.setup_context(context, args, result)
        made = [t for t in tensors(result) if not any(t is d for d in context.constant)]
        if given and made:
            blocks = not any(self._differentiable(t) for t in made)
            self._surrogate(Surrogate(function.__name__, self._module(), blocks, place()))
        return result

    def _differentiable(self, value: Tensor) -> bool:
        return self._slots.get(id(value)) in self.found.gradients

    def _check_backward(self, given: Iterable[Tensor]) -> None:
        """Find functions whose ``apply`` was taken out of the class before the trace."""
        for t in given:
            if _has_own_backward(t):
                name = type(t.grad_fn).__name__.removesuffix("Backward")
                if not name.startswith("_Simulated"):
                    module = self._modules_of.get(self._slots[id(t)], "")
                    self._surrogate(Surrogate(name, module, True))

    def _surrogate(self, found: Surrogate) -> None:
        known = {(s.name, s.module) for s in self.found.surrogates}
        if (found.name, found.module) not in known:
            self.found.surrogates.append(found)

    # Reads

    def read_inside(self, value: Tensor) -> None:
        """A function reads the value of a tensor, as ``torch.full`` that of its fill value."""
        given = [value] if any(value is t for t in self._given) else self._given
        self._read("aten::_local_scalar_dense", given)

    def _read(self, aten: str, given: list[Tensor]) -> None:
        where = f" in {self._module()}" if self._module() else ""
        mode = "training" if self.training else "inference"
        text = (
            f"{aten} is only supported in eager mode, but was used in a model passed to "
            f"poptorch.{mode}Model"
        )
        for t in given:
            slot = self._slots.get(id(t))
            if slot is None:
                continue
            if slot in self._dynamic:
                self._problem(problems.READ, text)
            elif slot in self._buffers:
                if current().strict:
                    self._problem(problems.READ, text)
                else:
                    warn(
                        f"buffer {self._buffers[slot]} is read in Python{where} and becomes a "
                        f"constant; an SDK from 3.0 on refuses it: {aten} is only supported in "
                        "eager mode"
                    )

    def _problem(self, rule: Rule, text: str) -> None:
        where = ", ".join(filter(None, (self._module(), place())))
        self.found.problems.append(Problem(rule, f"{text} ({where})", self._module()))

    # Slots

    def _new(self, value: Tensor) -> int:
        graph = self.found.graph
        slot = graph.size
        graph.size += 1
        graph.infos[slot] = (value.shape, value.dtype)
        self._slots[id(value)] = slot
        self._storages[slot] = _storage(value)
        self._keep.append(value)
        return slot

    def _slots_of(self, value: Tensor) -> int:
        slot = self._slots.get(id(value))
        if slot is None:
            slot = self._new(value)
            if _has_own_backward(value):
                self._dynamic.add(slot)
            elif value.grad_fn is not None:
                self._problem(
                    problems.EARLIER,
                    f"{self._module() or 'the model'} uses a tensor of shape {list(value.shape)} that "
                    f"no torch function of this call made ({value.grad_fn.name()}): state that an "
                    "earlier call left in an attribute?",
                )
            self.found.graph.constants[slot] = value.detach().clone()
        return slot

    def _out(self, value: Tensor) -> int:
        slot = self._slots.get(id(value))
        return self._new(value) if slot is None else slot

    def _pack(self, value: Any) -> Any:
        return Slot(self._slots_of(value)) if isinstance(value, Tensor) else value

    def _original(self, value: Any) -> Any:
        return self._replaced.get(id(value), value) if isinstance(value, Tensor) else value

    def _is_buffer(self, value: Tensor) -> bool:
        slot = self._slots.get(id(value))
        return slot in self._buffers and slot in self.found.graph.weights.values()

    def _is_dynamic(self, value: Tensor) -> bool:
        return self._slots.get(id(value)) in self._dynamic

    def _taint_storage(self, storage: int) -> None:
        self._dynamic.update(s for s, of in self._storages.items() if of == storage)

    def slot(self, value: Any) -> Any:
        """The slot of an output."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            self._problem(problems.OUTPUT, f"Unsupported output type {type(value).__name__}")
            return None
        return Slot(self._slots_of(self._original(value)))

    def finish(self, outputs: Any) -> Traced:
        """Fold what is constant; the graph is then complete."""
        graph = self.found.graph
        graph.outputs = replace(outputs, self.slot)
        self._check_backward(tensors(outputs))
        by_slot = {self._slots[id(t)]: t for t in self._keep}
        remaining = []
        for node in graph.nodes:
            known = not (node.random or node.mutates or set(node.ins) & self._dynamic)
            known = known and not set(node.ins) & set(graph.weights.values())
            known = known and all(s in graph.constants for s in node.ins)
            if known and not any(self._storages[o] in self._written for o in node.outs):
                for out in node.outs:
                    graph.constants[out] = by_slot[out].detach()
            else:
                remaining.append(node)
        graph.nodes = remaining
        held = {*graph.inputs, *graph.weights.values()}
        graph.written = frozenset(s for s in held if self._storages[s] in self._written)
        graph.fresh = frozenset(s for s in graph.constants if self._storages[s] in self._written)
        return self.found

    # Modules, memory

    def enter_module(self, module: nn.Module, _: Any) -> None:
        """A forward begins."""
        self._path.append(self._modules.get(id(module), self._module()))

    def leave_module(self, module: nn.Module, _: Any, __: Any) -> None:
        """A forward ends."""
        self._path.pop()

    def save(self, value: Tensor) -> Tensor:
        """Count a tensor that autograd keeps for the backward pass, once for each storage."""
        storage = _storage(value)
        if storage not in self._counted:
            self._counted.add(storage)
            key = (self.ipu, self._module())
            size = value.untyped_storage().nbytes() // value.element_size()
            size *= device_bytes(value.dtype)
            self.found.saved[key] = self.found.saved.get(key, 0) + size
        return value

    @contextmanager
    def _seeing(self, holder: Any, attribute: str) -> Iterator[None]:
        """Record calls of a method that torch function modes are not told of."""
        own, original = attribute in vars(holder), getattr(holder, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return original(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                return self.__torch_function__(original, (), args, kwargs)

        setattr(holder, attribute, call)
        try:
            yield
        finally:
            if own:
                setattr(holder, attribute, original)
            else:
                delattr(holder, attribute)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record, with every hook in place."""
        self._counted = {self._storages[s] for s in self.found.graph.weights.values()}
        original = torch.autograd.Function.__dict__["apply"]

        def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return original.__get__(None, function)(*args, **kwargs)
            return self.apply(function, args, kwargs)

        hooks = torch.nn.modules.module
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            _active.append(self)
            stack.callback(_active.pop)
            torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
            stack.callback(setattr, torch.autograd.Function, "apply", original)
            for hook in (
                hooks.register_module_forward_pre_hook(self.enter_module),
                hooks.register_module_forward_hook(self.leave_module),
            ):
                stack.callback(hook.remove)
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(self.save, lambda value: value)
            )
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self)
            for holder, attribute in _UNCALLED:
                stack.enter_context(self._seeing(holder, attribute))
            yield


class _HiddenReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a tracer of values that functions read where Python does not see it."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._tracer.read_inside(args[0])
        return func(*args, **(kwargs or {}))


class _Context:
    """What an autograd function's forward may do with its context."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.constant: tuple[Tensor, ...] = ()
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *values: Tensor) -> None:
        self.saved_tensors = values

    def save_for_forward(self, *values: Tensor) -> None:
        pass

    def mark_dirty(self, *values: Tensor) -> None:
        pass

    def mark_non_differentiable(self, *values: Tensor) -> None:
        self.constant = values

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _shaping(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors on whose values the shape of a call's result depends."""
    if name in _DYNAMIC or (name == "where" and len(args) + len(kwargs) == 1):
        yield from tensors((args, kwargs))
    elif name == "__getitem__":
        yield from (t for t in tensors(args[1:]) if t.dtype in (torch.bool, torch.uint8))
    elif name == "one_hot" and (args[1:] or (kwargs.get("num_classes", -1),)) == (-1,):
        yield from tensors(args)
    elif name == "repeat_interleave" and "output_size" not in kwargs:
        yield from tensors((args[1:], kwargs.get("repeats")))


def _operator(func: Any) -> str:
    """The qualified name of an operator that is called as such."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func._schema.name)
    return str(getattr(func, "_qualified_op_name", ""))


def _has_own_backward(value: Tensor) -> bool:
    """Whether a ``torch.autograd.Function`` made it."""
    maker: Any = value.grad_fn
    return isinstance(maker, torch.autograd.function.BackwardCFunction)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
