"""What makes the nodes of NIR for an operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ...converters.neurons import Neuron
from ...converters.ops import RESHAPE, Node, aten, dim, permutation, shape, slice_args
from ...converters.passes.fold_batch_norm import affine
from ...converters.program import NEURON, STATE
from .export import Exporter, NotInNir, Signal


def _same(export: Exporter, n: Node) -> Signal:
    if n.meta["val"].dtype != n.args[0].meta["val"].dtype:
        raise NotInNir(f"a conversion to {n.meta['val'].dtype}")
    return export.signal(n.args[0])


def _neuron(export: Exporter, n: Node) -> Signal | None:
    if not n.users:  # a layer by its states alone, each of which is a node of its own
        return None
    x = export.signal(n.args[0])
    signal = export.population(x, _declaration(export, n), fires=True)
    return replace(signal, layout=_after(n), binary=True)


def _readout(export: Exporter, n: Node) -> Signal:
    x = export.signal(n.args[0])
    return replace(export.readout(x, _declaration(export, n), n.args[5]), layout=_after(n))


def _declaration(export: Exporter, n: Node) -> Neuron:
    params = [export.program.tensor(p.target) for p in n.args[1]]
    return Neuron.from_json(n.args[2], params)


def _after(n: Node) -> str:
    return "stepped" if n.args[3] == "stepped" else "flat"


def _conv(export: Exporter, n: Node) -> Signal:
    x = export.signal(n.args[0])
    weight = export.tensor(n.args[1])
    if weight is None:
        raise NotInNir("a weight that is computed")
    given = [*n.args[2:], *[None, 1, 0, 1, 1][len(n.args) - 2 :]]
    bias = export.tensor(given[0])
    dims = weight.dim() - 2
    if x.layout == "stepped" or len(x.shape) != dims + 1:
        raise NotInNir(f"a convolution over {list(x.shape)}")
    zeros = torch.zeros(weight.shape[0]) if bias is None else bias
    return _convolution(export, x, _shape_after(n, x), weight, zeros, *given[1:])


def _convolution(
    export: Exporter,
    x: Signal,
    size: tuple[int, ...],
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Signal:
    dims = weight.dim() - 2
    if groups > 1:
        weight = _dense(weight, groups)
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    spread = {name: _sizes(value, dims) for name, value in sizes.items()}
    return export.add(
        f"Conv{dims}d",
        x,
        size,
        input_shape=x.shape[1] if dims == 1 else tuple(x.shape[1:]),
        weight=_numpy(weight),
        bias=_numpy(bias),
        groups=1,
        **{name: value[0] if dims == 1 else value for name, value in spread.items()},
    )


def _dense(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """A grouped weight among zeros: the nir package itself reads no grouped convolution back."""
    out, inputs = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], inputs * groups, *weight.shape[2:])
    for g in range(groups):
        rows, columns = (slice(g * size, (g + 1) * size) for size in (out, inputs))
        full[rows, columns] = weight[rows]
    return full


def _linear(export: Exporter, n: Node) -> Signal:
    x = export.signal(n.args[0])
    weight = export.tensor(n.args[1])
    bias = export.tensor(n.args[2]) if len(n.args) > 2 else None
    if weight is None or len(x.shape) != 1:
        raise NotInNir(
            f"a matrix product over the last dimension of {list(x.shape)}",
            "flatten before it, so that it takes a vector at each step",
        )
    size = (weight.shape[0],)
    if bias is None:
        return export.add("Linear", x, size, weight=_numpy(weight))
    return export.add("Affine", x, size, weight=_numpy(weight), bias=_numpy(bias))


def _avg_pool(export: Exporter, n: Node) -> Signal:
    x = export.signal(n.args[0])
    kernel, stride, padding, ceil, counted, divisor = _pool(n, 6)
    if ceil or divisor is not None or (any(padding) and counted is False):
        raise NotInNir("average pooling with ceil_mode, divisor_override, or padding not counted")
    return _pooled(export, "AvgPool2d", x, n, kernel, stride, padding)


def _adaptive_avg_pool(export: Exporter, n: Node) -> Signal:
    x = export.signal(n.args[0])
    sizes, wanted = x.shape[-2:], shape(n)[-2:]
    if any(a % b for a, b in zip(sizes, wanted, strict=True)):
        raise NotInNir(f"adaptive pooling of {list(sizes)} to {list(wanted)}, windows of two sizes")
    kernel = tuple(a // b for a, b in zip(sizes, wanted, strict=True))
    return _pooled(export, "AvgPool2d", x, n, kernel, kernel, (0, 0))


def _max_pool(export: Exporter, n: Node) -> Signal:
    x = export.signal(n.args[0])
    kernel, stride, padding, dilation, ceil = _pool(n, 5)
    if not x.binary:
        raise NotInNir(
            "max pooling of values other than spikes of 0 and 1",
            "pool after the neurons, or use average pooling",
        )
    if ceil or _sizes(dilation or 1, 2) != (1, 1):
        raise NotInNir("max pooling with ceil_mode or dilation")
    return _above(export, _pooled(export, "SumPool2d", x, n, kernel, stride, padding), 0.5)


def _pool(n: Node, count: int) -> list[Any]:
    given: list[Any] = [*n.args[1:], *[None] * (count - len(n.args) + 1)]
    given += [None] * (count - len(given))
    kernel = _sizes(given[0], 2)
    return [kernel, _sizes(given[1] or kernel, 2), _sizes(given[2] or 0, 2), *given[3:count]]


def _pooled(
    export: Exporter, kind: str, x: Signal, n: Node, kernel: Any, stride: Any, padding: Any
) -> Signal:
    if x.layout == "stepped" or len(x.shape) != 3:
        raise NotInNir(f"pooling over {list(x.shape)}")
    sizes = {"kernel_size": kernel, "stride": stride, "padding": padding}
    arrays = {name: np.array(size) for name, size in sizes.items()}
    return export.add(kind, x, _shape_after(n, x), **arrays)


def _above(export: Exporter, x: Signal, threshold: float) -> Signal:
    signal = export.add("Threshold", x, x.shape, threshold=np.full(x.shape, threshold))
    return replace(signal, binary=True)


def _reshape(export: Exporter, n: Node) -> Signal:
    held, size = export.signals.get(n.args[0]), shape(n)
    if held is not None and held.part is not None:
        count, N = held.part[1] - held.part[0], export.batch
        for way, rows in (("stepped", [count, N]), ("flat", [count * N])):
            if size == (*rows, *held.shape):
                return replace(held, layout=way)
    x = export.given(n.args[0])
    if x.layout == "reduced":  # what runs the graph puts its outputs into shape
        return x
    if x.layout == "samples":
        if size == (*export.lead("samples"), *x.shape):
            return x
        raise NotInNir(f"reshaping {list(shape(n.args[0]))} to {list(size)}")
    whole = export.batch * math.prod(x.shape)
    if export.batch > 1 and size == (export.steps, whole) and x.layout in ("flat", "stepped"):
        return replace(x, layout="merged")
    if x.layout == "merged":
        for layout in ("flat", "stepped"):
            if size == (*export.lead(layout), *x.shape):
                return replace(x, layout=layout)
    layouts = (x.layout,) if x.layout in ("static", "step") else ("flat", "stepped")
    fits = []
    for layout in layouts:
        lead = export.lead(layout)
        if size[: len(lead)] == lead and math.prod(size[len(lead) :]) == math.prod(x.shape):
            fits.append((layout, size[len(lead) :]))
    for layout, rest in fits:
        if rest == x.shape:
            return replace(x, layout=layout)
    for layout, rest in fits:
        for start in range(len(x.shape)):
            for end in range(start + 1, len(x.shape)):
                merged = math.prod(x.shape[start : end + 1])
                if (*x.shape[:start], merged, *x.shape[end + 1 :]) == rest:
                    signal = export.add(
                        "Flatten",
                        x,
                        rest,
                        input_type=np.array(x.shape),
                        start_dim=start,
                        end_dim=end,
                    )
                    return replace(signal, layout=layout, binary=x.binary)
    raise NotInNir(f"reshaping {list(shape(n.args[0]))} to {list(size)}")


def _swap(export: Exporter, n: Node) -> Signal:
    """Time before samples, or after."""
    x, order = export.given(n.args[0]), permutation(n)
    swapped = {"stepped": "samples", "samples": "stepped"}.get(x.layout)
    if swapped is None or x.over_time != "steps" or order != [1, 0, *range(2, len(order))]:
        raise NotInNir(f"dimensions in the order {order}")
    if shape(n.args[0]) != (*export.lead(x.layout), *x.shape):
        raise NotInNir(f"dimensions of {list(shape(n.args[0]))} in another order")
    return replace(x, layout=swapped)


def _repeat_first(export: Exporter, n: Node) -> Signal:
    """A static value put before time, to be repeated there."""
    x = export.signal(n.args[0])
    if n.target is aten.unsqueeze.default and n.args[1] == 0 and x.layout == "static":
        return replace(x, layout="alone")
    raise NotInNir(f"reshaping {list(shape(n.args[0]))} to {list(shape(n))}")


def _expand(export: Exporter, n: Node) -> Signal:
    x = export.signal(n.args[0])
    for layout in ("stepped", "flat"):
        if x.layout in ("alone", "static") and shape(n) == (*export.lead(layout), *x.shape):
            return replace(x, layout=layout)
    raise NotInNir(f"expanding {list(shape(n.args[0]))} to {list(shape(n))}")


def _batch_norm(export: Exporter, n: Node) -> Signal:
    """A norm that no layer before it takes in, such as one of the input."""
    x = export.signal(n.args[0])
    scale, shift = affine(n, export.program)
    return _by_channel(export, x, scale.float(), shift.float())


def _by_channel(export: Exporter, x: Signal, scale: torch.Tensor, shift: torch.Tensor) -> Signal:
    """scale * x + shift, one of each for a channel: a diagonal Affine, or a depthwise convolution."""
    if not 1 <= len(x.shape) <= 3:
        raise NotInNir(f"a scale and shift of {list(x.shape)}")
    dims, C = len(x.shape) - 1, x.shape[0]
    scale, shift = scale.expand(C), shift.expand(C)
    if dims == 0:
        weight = torch.diag(scale)
        return export.add("Affine", x, x.shape, weight=_numpy(weight), bias=_numpy(shift))
    return _pointwise(export, x, scale.reshape(C, *[1] * (dims + 1)), shift, groups=C)


def _pointwise(
    export: Exporter, x: Signal, weight: torch.Tensor, bias: torch.Tensor, groups: int
) -> Signal:
    """A convolution whose kernel has size 1."""
    size = (weight.shape[0], *x.shape[1:])
    return _convolution(export, x, size, weight, bias, 1, 0, 1, groups)


def _cat(export: Exporter, n: Node) -> Signal:
    """Channels as a sum, each part put into its place among zeros; one value at every step; or a delay."""
    if (delayed := _delayed(export, n)) is not None:
        return delayed
    parts = [export.signal(a) for a in n.args[0]]
    along, size = dim(n, (*n.args, 0)[1]), shape(n)
    if along == 0 and n.args[0] == [n.args[0][0]] * export.steps and parts[0].layout == "static":
        return replace(parts[0], layout="flat")
    rank = len(parts[0].shape)
    if along != len(size) - rank or rank > 3 or len({x.layout for x in parts}) > 1:
        raise NotInNir(
            f"a concatenation of {[list(shape(a)) for a in n.args[0]]} over dimension {along}",
            "concatenate channels",
        )
    start, sources = 0, list[str]()
    for x in parts:
        weight = torch.from_numpy(np.eye(size[along], x.shape[0], -start, dtype=np.float32))
        start += x.shape[0]
        if rank == 1:
            placed = export.add("Linear", x, size[along:], weight=_numpy(weight))
        else:
            weight = weight.reshape(*weight.shape, *[1] * (rank - 1))
            placed = _pointwise(export, x, weight, torch.zeros(size[along]), groups=1)
        sources += placed.sources
    binary = all(x.binary for x in parts)
    return replace(parts[0], sources=tuple(sources), shape=size[along:], binary=binary)


def _stack(export: Exporter, n: Node) -> Signal:
    if (delayed := _delayed(export, n)) is None:
        raise NotInNir("values put together that are no delay of a signal")
    return delayed


def _delayed(export: Exporter, n: Node) -> Signal | None:
    """Zeros for the first time steps, then the first steps of a signal."""
    if dim(n, (*n.args, 0)[1]) != 0:
        return None
    held = [export.tensor(part) for part in n.args[0]]
    k = next((i for i, value in enumerate(held) if value is None), len(held))
    zeros = [value for value in held[:k] if value is not None]
    steps = [export.signals.get(part) for part in n.args[0][k:]]
    if not zeros or not steps or steps[0] is None or any(value.any() for value in zeros):
        return None
    x, done = replace(steps[0], part=None), 0
    for step in steps:
        if step is None or step.part is None or replace(step, part=None) != x:
            return None
        if step.part[0] != done:
            return None
        done = step.part[1]
    late = export.steps - done
    layout = "stepped" if len(shape(n)) == len(x.shape) + 2 else "flat"
    rows = len(zeros) if n.target is aten.stack.default else sum(map(len, zeros))
    if rows != late * (1 if layout == "stepped" else export.batch):
        return None
    delay = np.full(x.shape, late * export.dt)
    signal = export.add("Delay", x, x.shape, delay=delay)
    return replace(signal, binary=x.binary, layout=layout)


def _add(export: Exporter, n: Node) -> Signal:
    a, b = n.args
    if n.kwargs.get("alpha", 1) != 1:
        raise NotInNir("a sum with alpha")
    if isinstance(b, fx.Node) and export.tensor(a) is not None:
        a, b = b, a
    x, shift = export.signal(a), _constant(export, b)
    if shift is None:
        return _summed(export, x, export.signal(b))
    return _shifted(export, x, shift)


def _sub(export: Exporter, n: Node) -> Signal:
    a, b = n.args
    if n.kwargs.get("alpha", 1) != 1:
        raise NotInNir("a difference with alpha")
    if (shift := _constant(export, b)) is not None:
        return _shifted(export, export.signal(a), -shift)
    if (start := _constant(export, a)) is not None:
        return _less(export, start, export.signal(b))
    return _summed(export, export.signal(a), _scaled(export, export.signal(b), -1.0))


def _rsub(export: Exporter, n: Node) -> Signal:
    b, a = n.args
    if n.kwargs.get("alpha", 1) != 1:
        raise NotInNir("a difference with alpha")
    return _less(export, torch.tensor(float(a)), export.signal(b))


def _less(export: Exporter, start: torch.Tensor, x: Signal) -> Signal:
    """A constant less a signal; 1 less a spike is one where there was none."""
    signal = _shifted(export, _scaled(export, x, -1.0), start)
    return replace(signal, binary=x.binary and bool((start == 1).all()))


def _constant(export: Exporter, value: Any) -> torch.Tensor | None:
    """A number or a weight; None for a value that is computed."""
    return export.tensor(value) if isinstance(value, fx.Node) else torch.tensor(float(value))


def _shifted(export: Exporter, x: Signal, shift: torch.Tensor) -> Signal:
    """A signal plus a constant, which a bias adds."""
    each = np.broadcast_to(_of_one_step(shift, x), x.shape)
    channels = each.reshape(x.shape[0], -1) if x.shape else each
    if (channels != channels[..., :1]).any():
        raise NotInNir(
            f"a sum with a constant that differs within a channel of {list(x.shape)}",
            "add one number for each channel, as a convolution's bias does",
        )
    bias = torch.from_numpy(np.array(channels[..., 0], dtype=np.float32))
    return _by_channel(export, x, torch.ones(1), bias)


def _summed(export: Exporter, a: Signal, b: Signal) -> Signal:
    if a.shape != b.shape or a.layout != b.layout:
        raise NotInNir(f"a sum of signals {list(a.shape)} and {list(b.shape)}, broadcast")
    # Sums are taken from the left: one of the two stays a single edge, and no edge comes twice.
    if (len(a.sources) > 1 and len(b.sources) > 1) or {*a.sources} & {*b.sources}:
        b = _scaled(export, b, 1.0)
    first, second = (a, b) if len(b.sources) == 1 else (b, a)
    return replace(a, sources=(*first.sources, *second.sources), binary=False)


def _mul(export: Exporter, n: Node) -> Signal:
    a, b = n.args
    if isinstance(b, fx.Node) and export.tensor(a) is not None:
        a, b = b, a
    x = export.signal(a)
    if not isinstance(b, fx.Node):
        return _scaled(export, x, b)
    factor = export.tensor(b)
    if factor is not None:
        return _scaled(export, x, _of_one_step(factor, x))
    y = export.signal(b)
    if not (x.binary and y.binary):
        raise NotInNir("a product of two signals that are not both spikes of 0 and 1")
    return _above(export, _summed(export, x, y), 1.5)


def _of_one_step(factor: torch.Tensor, x: Signal) -> np.ndarray[Any, Any]:
    """A factor without the dimensions of time and batch."""
    extra = max(factor.dim() - len(x.shape), 0)
    if set(factor.shape[:extra]) - {1}:
        raise NotInNir("a constant that changes with time or sample")
    return _numpy(factor.reshape(factor.shape[extra:]))


def _div(export: Exporter, n: Node) -> Signal:
    summed = export.given(n.args[0])
    if summed.over_time == "sum" and divides(n, export.steps):
        return replace(summed, over_time="mean")
    x, divisor = export.signal(n.args[0]), n.args[1]
    by = export.tensor(divisor) if isinstance(divisor, fx.Node) else torch.tensor(float(divisor))
    if by is None or not bool((torch.frexp(by).mantissa == 0.5).all()):
        raise NotInNir(
            f"a division by {divisor}, which no factor gives bit for bit",
            "multiply by the reciprocal",
        )
    return x if bool((by == 1).all()) else _scaled(export, x, _of_one_step(1 / by, x))


def divides(n: Node, steps: int) -> bool:
    """Whether a node divides by the number of time steps, which makes a sum over them a mean."""
    return n.target is aten.div.Tensor and not isinstance(n.args[1], fx.Node) and n.args[1] == steps


def _neg(export: Exporter, n: Node) -> Signal:
    return _scaled(export, export.signal(n.args[0]), -1.0)


def _scaled(export: Exporter, x: Signal, factor: Any) -> Signal:
    scale = np.broadcast_to(np.asarray(factor, dtype=np.float32), x.shape)
    return export.add("Scale", x, x.shape, scale=np.ascontiguousarray(scale))


def _over_time(how: str) -> Callable[[Exporter, Node], Signal]:
    def reduce(export: Exporter, n: Node) -> Signal:
        x = export.signal(n.args[0])
        first = x.layout in ("stepped", "merged") or (x.layout == "flat" and export.batch == 1)
        if not first or [dim(n.args[0], d) for d in n.args[1]] != [0]:
            raise NotInNir(f"the {how} over dimensions {n.args[1]}")
        return replace(x, layout="reduced", over_time=how)

    return reduce


def _select(export: Exporter, n: Node) -> Signal:
    x, first, end = _held(export, n.args[0])
    if x.layout != "stepped" or n.args[1] != 0:
        raise NotInNir(f"element {n.args[2]} of dimension {n.args[1]}")
    t = first + n.args[2] % (end - first)
    if t == export.steps - 1:
        return replace(x, layout="reduced", over_time="last")
    return replace(x, part=(t, t + 1))


def _held(export: Exporter, n: Node) -> tuple[Signal, int, int]:
    """The signal of an argument, and which time steps are held: the first, and that after the last."""
    held = export.signals.get(n)
    if held is None or held.part is None:
        return export.signal(n), 0, export.steps
    return replace(held, part=None), *held.part


def _slice(export: Exporter, n: Node) -> Signal:
    x, first, end = _held(export, n.args[0])
    along, start, stop, step = slice_args(n, 1)
    length = shape(n.args[0])[along]
    rows = range(length)[start:stop:step]
    whole = end == export.steps
    if whole and along == 0 and x.layout == "flat" and rows == range(length - export.batch, length):
        return replace(x, layout="reduced", over_time="last")
    each = {"stepped": 1, "flat": export.batch}.get(x.layout, 0)
    if along == 0 and each and step == 1 and not (rows.start % each or rows.stop % each):
        return replace(x, part=(first + rows.start // each, first + rows.stop // each))
    raise NotInNir(f"elements {rows.start} to {rows.stop} of dimension {along}")


def _shape_after(n: Node, x: Signal) -> tuple[int, ...]:
    return shape(n)[1:]


def _sizes(value: Any, count: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * count if len(given) == 1 else given


def _numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().contiguous().numpy()


#: What makes the nodes of NIR for an operator.
OPERATORS: Mapping[Any, Callable[[Exporter, Node], Signal | None]] = {
    NEURON: _neuron,
    STATE: _readout,
    RESHAPE: _reshape,
    aten.batch_norm.default: _batch_norm,
    aten.cat.default: _cat,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.linear.default: _linear,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.max_pool2d.default: _max_pool,
    aten.transpose.int: _swap,
    aten.permute.default: _swap,
    aten.unsqueeze.default: _repeat_first,
    aten.expand.default: _expand,
    aten.repeat.default: _expand,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.rsub.Scalar: _rsub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.neg.default: _neg,
    aten.mean.dim: _over_time("mean"),
    aten.sum.dim_IntList: _over_time("sum"),
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.stack.default: _stack,
    aten.clone.default: _same,
    aten._to_copy.default: _same,
    aten.alias.default: _same,
}
