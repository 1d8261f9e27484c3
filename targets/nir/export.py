"""A program as a NIR graph.

A value of the program is a signal over time: [T, N, ...], [TN, ...], or [N, ...] where it is the same at
every step. NIR knows neither T nor N. Sums need no node: a node takes the sum of the edges into it. Of
signals that are 0 and 1, a maximum is a sum above 1/2 and a product a sum above 3/2, so that max pooling
and gates are a SumPool2d or a sum, and a Threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ...converters.errors import Finding, UsageError
from ...converters.neurons import Neuron
from ...converters.ops import BATCHED, RESHAPE, Node, aten, permutation, shape
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
        part: The time steps that are held, if not all: a first one, and the one after the last.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    layout: str
    binary: bool = False
    over_time: str = "steps"
    part: tuple[int, int] | None = None


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
            if n in self.signals:
                self._guarded(n, functools.partial(self._output, n, spec.name, i))
            elif n.op == "get_attr":
                self._guarded(n, functools.partial(self._constant, spec.name))
        return self.done

    def _output(self, n: Node, name: str, position: int) -> None:
        self.output(self.given(n), name, position)

    def _constant(self, name: str) -> None:
        raise NotInNir(
            f"the output {name} is a constant, which no input leads to",
            "leave it out of what the forward returns",
        )

    def emit(self, n: Node) -> Signal | None:
        """The signal of a call; None for what no other node takes."""
        from .operators import OPERATORS

        if n.target not in OPERATORS:
            raise NotInNir("no node computes it")
        return OPERATORS[n.target](self, n)

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
        signal = self.signals[n]
        if signal.part is not None:
            first, end = signal.part
            which = f"step {first}" if end == first + 1 else f"steps {first} to {end - 1}"
            raise NotInNir(
                f"time {which} alone",
                "let it take all time steps; zeros and then the first steps of a signal are a delay",
            )
        return signal

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
        if not n.users:
            raise NotInNir("an input that nothing is computed from", "leave it out of the forward")
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
            value = stack.pop()
            for user in value.users:
                if user.target in (NEURON, STATE) and user.args[3] == "static":
                    return "static"
                if user.target in BATCHED and shape(value) == self._spec(n).shape:
                    return "static"  # such a layer takes samples first, and time is not among them
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
