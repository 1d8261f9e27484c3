"""What a network may say to the compiler: losses, blocks, loops, custom operators, hints.

Outside of a compilation these do on the CPU what the SDK's do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from .. import custom_ops, trace
from ..errors import Error
from . import enums

_T = TypeVar("_T")


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """One call of the graph, instead of what the function is made of."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(call, args, *args, **kwargs)
        return function(*args, **kwargs)

    call.__name__ = function.__name__.removeprefix("_")
    return call


def _check_tensor(value: Any, text: str) -> None:
    if not isinstance(value, Tensor):
        raise Error(f"{text} {type(value)} is not supported.")


def _check_inference(name: str) -> None:
    tracer = trace.active()
    if tracer is not None and tracer.training:
        raise Error(f"poptorch.{name}() is only supported in inference.")


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "none": lambda x: x.clone(),
}


@_recorded
def _identity_loss(x: Tensor, reduction: str) -> Tensor:
    return _REDUCTIONS[reduction](x)


def identity_loss(x: Tensor, reduction: str) -> Tensor:
    """Mark the loss; its gradient is seeded with ones.

    Args:
        x: The loss, of any shape.
        reduction: ``"sum"``, ``"mean"`` or ``"none"``.
    """
    assert reduction in _REDUCTIONS, "Unsupported reduction type!"
    result: Tensor = _identity_loss(x, reduction)
    return result


@_recorded
def _custom_op(
    inputs: Sequence[Tensor], name: str, domain: str, version: int, attributes: dict[str, Any]
) -> list[Tensor]:
    return custom_ops.run(inputs, name, domain, version, attributes)


def custom_op(
    inputs: Sequence[Tensor],
    name: str,
    domain: str,
    domain_version: int,
    example_outputs: Sequence[Tensor],
    attributes: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """An operator of a custom library; zeros outside of a compilation.

    Args:
        inputs: Its inputs.
        name: Its name.
        domain: Its domain.
        domain_version: Version of the domain.
        example_outputs: Tensors of the outputs' shapes and types.
        attributes: Numbers, strings, and lists of one of these.

    Raises:
        Error: The simulation does not have it, or its outputs are not as the examples.
        ValueError: An attribute of another type.
    """
    for key, value in (attributes or {}).items():
        _check_attribute(key, value)
    if trace.active() is None:
        return [torch.zeros_like(output) for output in example_outputs]
    made: list[Tensor] = _custom_op(
        list(inputs), name, domain, domain_version, dict(attributes or {})
    )
    for out, example in zip(made, example_outputs, strict=True):
        if out.shape != example.shape or out.dtype != example.dtype:
            raise Error(
                f"custom_op {domain}.{name}: an output is {out.dtype} {list(out.shape)}, its example "
                f"{example.dtype} {list(example.shape)}"
            )
    return made


def _check_attribute(key: Any, value: Any) -> None:
    if not isinstance(key, str):
        raise ValueError("All attribute keys must be strings.")
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, (float, int, str)) for item in items):
        raise ValueError(
            "Attribute values must be floats, ints, strings or a list/tuple of float, ints of strings."
        )
    if len({type(item) for item in items}) > 1:
        raise ValueError("The types in a list/tuple attribute must all be the same.")
    for text in (key, *items):
        if isinstance(text, str) and not text.isascii():
            raise ValueError(f"{text} contains non-ASCII characters.")


@_recorded
def _nop(tensor: Tensor) -> Tensor:
    return tensor.clone()


def nop(tensor: Tensor) -> Tensor:
    """The tensor itself, in a node that no rewrite removes."""
    _check_tensor(tensor, "nop must take a torch.tensor argument.")
    result: Tensor = _nop(tensor)
    return result


@_recorded
def _ipu_print_tensor(tensor: Tensor, title: str) -> Tensor:
    print(f"{title or 'print_tensor'}: {tensor.detach()}")
    result = tensor.clone()
    if result.requires_grad:
        result.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: print(f"{title or 'print_tensor'}_gradient: {grad}")
        )
    return result


def ipu_print_tensor(tensor: Tensor, title: str = "") -> Tensor:
    """The tensor itself, printed at each run, and its gradient in the backward pass."""
    _check_tensor(tensor, "ipu print tensor must take a torch.tensor argument.")
    result: Tensor = _ipu_print_tensor(tensor, title)
    return result


def recomputationCheckpoint(*tensors: Any) -> Any:
    """The tensors themselves, kept instead of recomputed."""
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        return type(tensors[0])(recomputationCheckpoint(*tensors[0]))
    if not all(isinstance(t, Tensor) for t in tensors):
        raise ValueError("All inputs must be tensors")
    kept = tuple(_nop(t) for t in tensors)
    return kept[0] if len(kept) == 1 else kept


def set_available_memory(tensor: Tensor, available_memory_proportion: float) -> Tensor:
    """The tensor itself; how much memory its operation may take does not change it."""
    _check_tensor(tensor, "You may only set available memory for torch.tensor values.")
    result: Tensor = _nop(tensor)
    return result


def set_overlap_for_input(input_tensors: _T, mode: enums.OverlapMode) -> _T:
    """The tensors themselves; how their transfer overlaps does not change them."""
    enums.check(mode, enums.OverlapMode, "mode")
    return input_tensors


def set_overlap_for_output(output_tensors: _T, mode: enums.OverlapMode) -> _T:
    """The tensors themselves; how their transfer overlaps does not change them."""
    enums.check(mode, enums.OverlapMode, "mode")
    return output_tensors


def serializedMatMul(
    lhs: Tensor,
    rhs: Tensor,
    mode: enums.MatMulSerializationMode,
    factor: int = 0,
    keep_precision: bool = False,
) -> Tensor:
    """A matrix product computed in pieces; the pieces do not change it."""
    assert isinstance(keep_precision, bool)
    assert isinstance(factor, int)
    assert isinstance(mode, enums.MatMulSerializationMode)
    sizes = {
        enums.MatMulSerializationMode.InputChannels: lhs.shape[-2],
        enums.MatMulSerializationMode.ReducingDim: lhs.shape[-1],
        enums.MatMulSerializationMode.OutputChannels: rhs.shape[-1],
    }
    size = sizes.get(mode)
    if size is not None and (factor < 1 or size % factor):
        raise Error(
            f"serializedMatMul: the dimension for {mode.name} is {size}, and the factor {factor} "
            "does not divide it"
        )
    return torch.matmul(lhs, rhs)


def dynamic_slice(tensor: Tensor, dim: int, start: Tensor, size: int, step: int) -> Tensor:
    """``size // step`` elements along a dimension, from a place known on the device alone."""
    _check_tensor(tensor, "dynamic_slice must take a torch.tensor input.")
    _check_tensor(start, "Slice start argument to dynamic_slice must be a torch.tensor.")
    for name, value in (("Dimension", dim), ("Size", size), ("Step", step)):
        if not isinstance(value, int):
            raise Error(f"{name} must be an integer.")
    index = start.reshape(1) + torch.arange(0, size, step)
    return tensor.index_select(dim, index)


def for_loop(
    count: int, body: Callable[..., Any], inputs: list[Tensor]
) -> list[Tensor] | tuple[Tensor, ...]:
    """Apply ``body`` to the tensors ``count`` times.

    Raises:
        Error: In training.
        ValueError: The inputs are no list of tensors.
    """
    if not isinstance(inputs, list):
        raise ValueError(
            "poptorch.for_loop expects input tensors (inputs) to be a list of tensors. (Object is "
            "not list)"
        )
    for place, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            raise ValueError(
                "poptorch.for_loop expects input tensors (inputs) to be a list of tensors. (Object "
                f"contained in list at index {place} is not torch.tensor)"
            )
    _check_inference("for_loop")
    values: Any = [t.clone() for t in inputs]  # passed by value
    for _ in range(count):
        before = values
        values = body(*values)
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        _check_same("for_loop", before, values)
    return list(values)


def cond(
    condition: Tensor,
    then_body: Callable[..., Any],
    then_inputs: list[Tensor],
    else_body: Callable[..., Any],
    else_inputs: list[Tensor],
) -> list[Tensor]:
    """The one or the other, as a tensor on the device decides.

    Raises:
        Error: In training, or the two do not return the same shapes and types.
    """
    _check_inference("cond")
    results = []
    for body, inputs in ((then_body, then_inputs), (else_body, else_inputs)):
        made = body(*[t.clone() for t in inputs])
        results.append(list(made) if isinstance(made, (list, tuple)) else [made])
    _check_same("cond", *results)
    chosen = condition.bool().reshape(())
    return [torch.where(chosen, a, b) for a, b in zip(*results, strict=True)]


def _check_same(name: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    kinds = [[(t.dtype, tuple(t.shape)) for t in values] for values in (first, second)]
    if kinds[0] != kinds[1]:
        raise Error(f"poptorch.{name}: types and shapes must agree, not {kinds[0]} and {kinds[1]}")


class CPU:
    """A function that runs on the host in the middle of an inference graph.

    Args:
        layer_to_call: The function.
        ID: Its name.
    """

    def __init__(self, layer_to_call: Callable[..., Any], ID: str) -> None:
        self._layer = layer_to_call
        if isinstance(layer_to_call, nn.Module):
            layer_to_call.requires_grad_(False)
        self.name = ID
        self._call = _recorded(self._run)

    def _run(self, *inputs: Tensor) -> Any:
        return self._layer(*inputs)

    def __call__(self, *inputs: Tensor) -> Any:  # noqa: D102
        _check_inference("CPU")
        return self._call(*inputs)


class Block(nn.Module):
    """``with poptorch.Block("encoder", ipu_id=0):`` puts what is inside onto a stage."""

    def __init__(self, user_id: str | None = None, ipu_id: int | None = None) -> None:
        super().__init__()
        self._user_id, self._ipu_id = user_id, ipu_id
        self._before = (0, -1)

    @staticmethod
    def useAutoId() -> None:
        """Number the blocks without a name from 0 on, in this forward."""
        tracer = trace.active()
        if tracer is not None and tracer.strategy is not None:
            tracer.strategy.reset_auto_ids()

    @staticmethod
    def start(user_id: str | None = None, ipu_id: int | None = None) -> None:
        """Begin a block that lasts until the next."""
        tracer = trace.active()
        if tracer is not None:
            tracer.begin_block(user_id, ipu_id)

    def __enter__(self) -> None:
        tracer = trace.active()
        if tracer is not None:
            self._before = (tracer.ipu, tracer.stage)
        Block.start(self._user_id, self._ipu_id)

    def __exit__(self, *_: object) -> None:
        tracer = trace.active()
        if tracer is not None:
            tracer.ipu, tracer.stage = self._before


class _BlockHook:
    def __init__(self, user_id: str | None, ipu_id: int | None) -> None:
        self._user_id, self._ipu_id = user_id, ipu_id

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        Block.start(self._user_id, self._ipu_id)

    def __repr__(self) -> str:
        return f"BeginBlock(user_id={self._user_id}, ipu_id={self._ipu_id})"


def BeginBlock(layer_to_call: Any, user_id: str | None = None, ipu_id: int | None = None) -> Any:
    """Begin a block at a layer; it lasts until the next.

    Raises:
        Error: Not a module or function, or the module begins a block already.
    """
    if not isinstance(layer_to_call, nn.Module):
        if not callable(layer_to_call):
            raise Error("module is not an instance of torch.nn.Module or function.")

        def call(*args: Any, **kwargs: Any) -> Any:
            Block.start(user_id, ipu_id)
            return layer_to_call(*args, **kwargs)

        return call
    if any(isinstance(h, _BlockHook) for h in layer_to_call._forward_pre_hooks.values()):
        raise Error("module has already been assigned to a block.")
    layer_to_call.register_forward_pre_hook(_BlockHook(user_id, ipu_id))
    return layer_to_call


def BlockFunction(
    user_id: str | None = None, ipu_id: int | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that puts a function into a block."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with Block(user_id, ipu_id):
                return function(*args, **kwargs)

        return call

    return decorate


def removeBlocks(module: nn.Module) -> None:
    """Take every :func:`BeginBlock` off a module."""
    assert isinstance(module, nn.Module)
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, _BlockHook):
                del part._forward_pre_hooks[key]


class _Scope:
    """A context that tells the compiler something that changes no result."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class NameScope(_Scope):
    """Prefixes names in the SDK's graph; in the simulation names follow modules."""

    def __init__(self, name: str) -> None:
        assert isinstance(name, str), "Parameter to NameScope must be a string"
        self.name = name


class Attribute(_Scope):
    """Sets attributes of operators in the SDK's graph."""

    def __init__(self, **attributes: Any) -> None:
        self.attributes = attributes


class MultiConv(_Scope):
    """Computes independent convolutions at the same time."""

    def availableMemoryProportions(self, value: float | Sequence[float]) -> MultiConv:
        """Memory for temporaries, for each convolution."""
        values = value if isinstance(value, (list, tuple)) else [value]
        valid = bool(values) and all(isinstance(v, float) for v in values)
        assert valid, "Invalid available memory proportion!"
        return self

    def partialsTypes(self, value: torch.dtype | Sequence[torch.dtype]) -> MultiConv:
        """The type of partial sums, for each convolution."""
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(v in (torch.float32, torch.float16) for v in values):
            raise ValueError("Invalid partials types. Expecting torch.float or torch.half")
        return self

    def enableConvDithering(self, value: bool | Sequence[bool]) -> MultiConv:
        """Where on the chip the convolutions lie."""
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(v, bool) for v in values):
            raise ValueError("value must be bool or list of bools")
        return self

    def planType(self, value: enums.MultiConvPlanType | None) -> MultiConv:
        """Whether they run in parallel."""
        assert value is None or isinstance(value, enums.MultiConvPlanType), "Invalid plan type!"
        return self

    def perConvReservedTiles(self, value: int) -> MultiConv:
        """Tiles for each convolution."""
        assert isinstance(value, int)
        return self

    def cycleBackOff(self, value: float) -> MultiConv:
        """How much slower a plan may be."""
        assert isinstance(value, float)
        return self
