"""A program as a NIR graph.

A value of the program is a signal over time: [T, N, ...], [TN, ...], or [N, ...] where it is the same at
every step. NIR knows neither T nor N. Sums need no node: a node takes the sum of the edges into it. Of
signals that are 0 and 1, a maximum is a sum above 1/2 and a product a sum above 3/2, so that max pooling
and gates are a SumPool2d or a sum, and a Threshold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ...converters.errors import Finding, UsageError
from ...converters.neurons import Neuron
from ...converters.ops import RESHAPE, Node, aten, dim, permutation, shape, slice_args
from ...converters.program import NEURON, STATE, Program, TensorSpec, short, where
from ...converters.sources.nir import Unit
from ...converters.sources.nir.neurons import continuous, heard, metadata

#: What is done with a readout over time, which is outside of NIR and stands in the Output's metadata.
OVER_TIME = ("steps", "mean", "sum", "last")


class NotInNir(Exception):  # noqa: N818 -- it never leaves this package
    """A form of an operator that no node of NIR has."""

    def __init__(self, found: str, fix: str = "replace it in the network's forward") -> None:
        super().__init__(found)
        self.fix = fix


@dataclass(frozen=True)
class Signal:
    """A value of the program in NIR.

    Attributes:
        sources: The nodes whose sum it is, in order.
        shape: Its shape at one step, of one sample.
        layout: How the program holds it: ``"stepped"`` [T, N, ...], ``"flat"`` [TN, ...], ``"static"``
            [N, ...], ``"step"`` likewise, other at each step, ``"alone"`` [1, N, ...]; ``"merged"``
            [T, all the rest]; ``"samples"`` [N, T, ...] or [NT, ...]; after a reduction over time
            ``"reduced"`` [N, ...] or all of it in one dimension.
        binary: Whether it is 0 and 1 only.
        over_time: What is done with its steps.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    layout: str
    binary: bool = False
    over_time: str = "steps"


@dataclass
class Exported:
    """A graph for NIR, or what keeps the program from being one.

    Attributes:
        units: Nodes by name.
        edges: (from, to).
        findings: What NIR cannot say: errors, and warnings for what metadata say in its place.
        steps: Time steps of the program.
    """

    units: dict[str, Unit] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    steps: int = 0


class Exporter:
    """Makes the nodes for the nodes of a program, one after the other.

    Args:
        program: The program.
        dt: Time step, in the unit of the file's time constants.
    """

    def __init__(self, program: Program, dt: float) -> None:
        self.program, self.dt = program, dt
        self.steps, self.batch = _extent(program)
        self.done = Exported(steps=self.steps)
        self.signals: dict[Node, Signal] = {}
        self._node: Node = None
        self._told: set[tuple[str, str]] = set()

    def run(self) -> Exported:
        """The graph, whole if there is no finding that is an error."""
        if self.steps == 0:
            self.tell(
                "steps",
                "no layer of neurons, or several with other numbers of time steps",
                "one number of time steps",
                "give all layers of neurons the same number of steps",
            )
            return self.done
        inputs = self.program.nodes("placeholder")
        for i, (spec, n) in enumerate(zip(self.program.inputs, inputs, strict=False)):
            self._guarded(n, functools.partial(self.input, n, spec.name, i))
        for n in self.program.nodes("call_function"):
            # What depends on something refused is no finding itself.
            if all(a.op == "get_attr" or a in self.signals for a in self.wanted(n)):
                self._guarded(n, functools.partial(self.emit, n))
        for i, (spec, n) in enumerate(
            zip(self.program.outputs, self.program.results, strict=False)
        ):
            if (signal := self.signals.get(n)) is not None:
                self._guarded(n, functools.partial(self.output, signal, spec.name, i))
        return self.done

    def emit(self, n: Node) -> Signal | None:
        """The signal of a call; None for what no other node takes."""
        return OPERATORS.get(n.target, _unknown)(self, n)

    def wanted(self, n: Node) -> list[Node]:
        """What a call takes."""
        return n.all_input_nodes  # type: ignore[no-any-return]

    def _guarded(self, n: Node, make: Callable[[], Signal | None]) -> None:
        self._node = n
        try:
            if (signal := make()) is not None:
                self.signals[n] = signal
        except NotInNir as error:
            what = short(n.target) if n.op == "call_function" else str(n.target)
            self.tell("operator", f"{what}: {error}", "what a node of NIR computes", error.fix)

    # What the exporters of operators call

    def add(self, kind: str, x: Signal, shape: Sequence[int], **fields: Any) -> Signal:
        """A node that takes a signal; what it gives."""
        return self.add_unit(Unit(kind, fields), x, shape)

    def add_unit(self, unit: Unit, x: Signal, shape: Sequence[int], name: str = "") -> Signal:
        """The same of a node that is made already."""
        if not x.shape:
            raise NotInNir("a signal of one number for each sample", "keep a dimension of size 1")
        name = self.unique(name or where(self._node) or self._node.name)
        self.done.units[name] = unit
        self.done.edges += [(source, name) for source in x.sources]
        return replace(x, sources=(name,), shape=tuple(shape), binary=False)

    def given(self, n: Any) -> Signal:
        """The signal of an argument, whether or not time is gone from it."""
        if not isinstance(n, fx.Node) or n not in self.signals:
            raise NotInNir("a constant where a signal is wanted")
        return self.signals[n]

    def signal(self, n: Any) -> Signal:
        """The signal of an argument, over time."""
        signal = self.given(n)
        if signal.layout == "samples":
            raise NotInNir(
                "samples before time steps",
                "transpose to [T, N, ...] right after the input, and back right before the output",
            )
        if signal.over_time != "steps":
            raise NotInNir(
                f"after the {signal.over_time} over time, NIR has no step to compute it at",
                "return the spikes, and compute from them outside of the network",
            )
        return signal

    def tensor(self, n: Any) -> torch.Tensor | None:
        """A weight, or None for a value that is computed."""
        known = isinstance(n, fx.Node) and n.op == "get_attr"
        return self.program.tensor(str(n.target)) if known else None

    def population(self, x: Signal, neuron: Neuron, fires: bool) -> Signal:
        """The node of a layer of neurons; what it gives."""
        try:
            node = continuous(neuron, x.shape, self.dt, fires)
        except (UsageError, ValueError) as error:
            raise NotInNir(
                f"{error}; the neuron is {neuron.describe()}",
                "use a neuron that NIR has, or another target",
            ) from error
        for reason in node.unsaid:
            self.warn(
                "metadata",
                f"{reason}; the node's metadata say it",
                "tools that read the metadata; others compute another neuron",
                "train with what NIR says, or see that the reader takes the metadata",
            )
        name = self.unique(where(self._node) or self._node.name)
        scale = heard(neuron)
        loop = "" if scale is None else self.unique(f"{name}.hears")
        unit = Unit(node.kind, node.fields, metadata(neuron, node.unsaid, loop))
        signal = self.add_unit(unit, x, x.shape, name)
        if scale is not None:
            wide = np.ascontiguousarray(np.broadcast_to(scale, x.shape), dtype=np.float32)
            self.done.units[loop] = Unit("Scale", {"scale": wide})
            self.done.edges += [(name, loop), (loop, name)]
        return signal

    def readout(self, x: Signal, neuron: Neuron, index: int) -> Signal:
        """The node of a layer whose state of this index is read; what it gives."""
        if neuron.reset != "none" or index != 0:
            raise NotInNir(
                "the state of a neuron that fires and resets",
                "return its spikes alone, or read the membrane of neurons that do not fire",
            )
        return self.population(x, neuron, fires=False)

    def warn(self, rule: str, found: str, allowed: str, fix: str) -> None:
        """Say what only the metadata hold."""
        self.tell(rule, found, allowed, fix, "warning")

    def lead(self, layout: str) -> tuple[int, ...]:
        """The leading dimensions of a value in a layout."""
        T, N = self.steps, self.batch
        leads: dict[str, tuple[int, ...]]
        leads = {"stepped": (T, N), "samples": (N, T), "flat": (T * N,)}
        return leads.get(layout, (N,))

    # Ports

    def input(self, n: Node, name: str, position: int) -> Signal:
        """An Input."""
        layout, spec = self._layout_of_input(n), self._spec(n)
        size = spec.shape[len(self.lead(layout)) :]
        if layout == "stepped" and spec.folded:
            layout = "flat"
        name = self.unique(name)
        said = {"position": position, "over_time": "same" if layout == "static" else "steps"}
        said |= {"batch_first": layout == "samples"}
        self.done.units[name] = Unit("Input", {"shape": np.array(size)}, said)
        return Signal((name,), size, layout)

    def _spec(self, n: Node) -> TensorSpec:
        return dict(zip(self.program.nodes("placeholder"), self.program.inputs, strict=True))[n]

    def _layout_of_input(self, n: Node) -> str:
        """Whether an input has time steps, and where: the neurons that it comes to know."""
        size = self._spec(n).shape[:2]
        if size == self.lead("samples") != self.lead("stepped") and _is_swapped(n):
            return "samples"
        if self._spec(n).folded:
            return "stepped"
        stack, seen = [n], set[Node]()
        while stack:
            for user in stack.pop().users:
                if user.target in (NEURON, STATE) and user.args[3] == "static":
                    return "static"
                if user not in seen and user.target not in (NEURON, STATE):
                    seen.add(user)
                    stack.append(user)
        return "stepped" if size == self.lead("stepped") else "static"

    def output(self, signal: Signal, name: str, position: int) -> None:
        """An Output."""
        name = self.unique(name)
        said: dict[str, Any] = {"position": position, "over_time": signal.over_time}
        said["batch_first"] = signal.layout == "samples"
        if signal.layout == "static":
            said["over_time"] = "last"
        self.done.units[name] = Unit("Output", {"shape": np.array(signal.shape)}, said)
        self.done.edges += [(source, name) for source in signal.sources]

    def unique(self, name: str) -> str:
        """A name that no node has yet."""
        name = name.replace("/", "_")  # which would be a group inside a group of the file
        k, unique = 1, name
        while unique in self.done.units:
            k, unique = k + 1, f"{name}_{k + 1}"
        return unique

    def tell(
        self,
        rule: str,
        found: str,
        allowed: str,
        fix: str,
        severity: Any = "error",
        place: str | None = None,
    ) -> None:
        """Note a finding once, at the present node unless there is a ``place``."""
        n = self._node if place is None else None
        path = place or ("" if n is None else where(n))
        node = "" if n is None else n.name
        if (path, found) not in self._told:
            self._told.add((path, found))
            self.done.findings.append(
                Finding(rule, path, found, allowed, fix, node, target="nir", severity=severity)
            )


def _extent(program: Program) -> tuple[int, int]:
    """Time steps and batch, from the layers of neurons; 0 steps where these do not agree."""
    found = set[tuple[int, ...]]()
    for n in program.nodes("call_function"):
        if n.target in (NEURON, STATE):
            node: Node = n
            layout, steps, size = node.args[3], node.args[4], shape(node.args[0])
            batches = {"stepped": size[1:2], "flat": (size[0] // steps,)}
            found.add((steps, *batches.get(layout, size[:1])))
    (extent,) = found if len(found) == 1 else [(0, 0)]
    return extent[0], extent[1]


def _is_swapped(n: Node) -> bool:
    """Whether the first thing that is done to a value is that its first dimensions trade places."""
    users = [u for user in n.users for u in (user.users if user.target is RESHAPE else [user])]
    moves = [u for u in users if u.target in (aten.transpose.int, aten.permute.default)]
    return any(permutation(u)[:2] == [1, 0] for u in moves)


# Operators


def _same(export: Exporter, n: Node) -> Signal:
    if n.meta["val"].dtype != n.args[0].meta["val"].dtype:
        raise NotInNir(f"a conversion to {n.meta['val'].dtype}")
    return export.signal(n.args[0])


def _neuron(export: Exporter, n: Node) -> Signal:
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


def _unknown(export: Exporter, n: Node) -> Signal:
    raise NotInNir("no node computes it")


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
    stride, padding, dilation = (_sizes(v, dims) for v in given[1:4])
    zeros = torch.zeros(weight.shape[0]) if bias is None else bias
    return export.add(
        f"Conv{dims}d",
        x,
        _shape_after(n, x),
        input_shape=x.shape[1] if dims == 1 else tuple(x.shape[1:]),
        weight=_numpy(weight),
        stride=stride[0] if dims == 1 else stride,
        padding=padding[0] if dims == 1 else padding,
        dilation=dilation[0] if dims == 1 else dilation,
        groups=int(given[4]),
        bias=_numpy(zeros),
    )


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
    x, size = export.given(n.args[0]), shape(n)
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


def _add(export: Exporter, n: Node) -> Signal:
    a, b = n.args
    if n.kwargs.get("alpha", 1) != 1:
        raise NotInNir("a sum with alpha")
    return _summed(export, export.signal(a), export.signal(b))


def _sub(export: Exporter, n: Node) -> Signal:
    a, b = n.args
    if n.kwargs.get("alpha", 1) != 1:
        raise NotInNir("a difference with alpha")
    return _summed(export, export.signal(a), _scaled(export, export.signal(b), -1.0))


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
        raise NotInNir("a factor that changes with time or sample")
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
    x = export.signal(n.args[0])
    last = n.args[2] in (-1, export.steps - 1)
    if x.layout != "stepped" or n.args[1] != 0 or not last:
        raise NotInNir(f"element {n.args[2]} of dimension {n.args[1]}")
    return replace(x, layout="reduced", over_time="last")


def _slice(export: Exporter, n: Node) -> Signal:
    x = export.signal(n.args[0])
    along, start, end, step = slice_args(n, 1)
    length = shape(n.args[0])[along]
    rows = range(length)[start:end:step]
    if along == 0 and x.layout == "flat" and rows == range(length - export.batch, length):
        return replace(x, layout="reduced", over_time="last")
    raise NotInNir(f"elements {rows.start} to {rows.stop} of dimension {along}")


def _shape_after(n: Node, x: Signal) -> tuple[int, ...]:
    return shape(n)[1:]


def _sizes(value: Any, count: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * count if len(given) == 1 else given


def _numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().contiguous().numpy()


#: What makes the nodes of NIR for an operator.
OPERATORS: Mapping[Any, Callable[[Exporter, Node], Signal]] = {
    NEURON: _neuron,
    STATE: _readout,
    RESHAPE: _reshape,
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
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.neg.default: _neg,
    aten.mean.dim: _over_time("mean"),
    aten.sum.dim_IntList: _over_time("sum"),
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.clone.default: _same,
    aten._to_copy.default: _same,
    aten.alias.default: _same,
}
