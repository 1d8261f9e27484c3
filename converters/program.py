"""The graph that every conversion works on, and how it is run.

A :class:`Program` is a ``torch.fx`` graph of plain ATen calls plus this project's own operators:
``spikeport::neuron`` is a layer of neurons over all time steps, ``spikeport::neuron_step`` one step of
it, and ``spikeport::state`` a state, such as v, of a layer whose spikes are a ``neuron``. Each node
carries the path of the module that it came from. It is callable after every pass.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .errors import Finding, UsageError
from .neurons import Neuron
from .ops import Node, aten, steps
from .stepping import Stepping

if TYPE_CHECKING or hasattr(torch.library, "custom_op"):
    from .neuron_ops import NEURON as NEURON
    from .neuron_ops import NEURON_STEP as NEURON_STEP
    from .neuron_ops import STATE as STATE
else:  # beside an old SDK, where programs whose neurons are lowered are read and run
    NEURON = NEURON_STEP = STATE = None

Layout: TypeAlias = Literal["stepped", "flat", "static", "steps", "step"]
Time: TypeAlias = Literal["unrolled", "stepped"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as the user sees it.

    Attributes:
        name: Its name.
        shape: Its shape, static.
        dtype: Its dtype in the source network.
        folded: Whether the graph holds it as [TN, ...] where the user's is [T, N, ...].
        parts: As the sum of how many float16 numbers the graph holds it, one after the other in
            dimension 1.
        rank: How many dimensions the graph holds it in at most, the last ones as one; None for as many
            as there are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    folded: bool = False
    parts: int = 1
    rank: int | None = None

    @property
    def graph_shape(self) -> tuple[int, ...]:
        """The shape inside the graph."""
        size = self.shape
        if self.folded:
            size = (size[0] * size[1], *size[2:])
        elif self.parts > 1:
            size = (size[0], self.parts * size[1], *size[2:])
        return size if self.rank is None else merged(size, self.rank)

    def held(self, x: torch.Tensor) -> torch.Tensor:
        """A value of this shape as the graph holds it."""
        found, rest = [], x
        for _ in range(self.parts - 1):
            found.append(rest.half().to(x.dtype))
            rest = torch.where(found[-1].isfinite(), rest - found[-1], 0)
        whole = torch.cat([*found, rest.half().to(x.dtype)], 1) if found else x
        return whole.reshape(self.graph_shape)

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def merged(size: Sequence[int], rank: int) -> tuple[int, ...]:
    """A shape of at most so many dimensions, the last ones as one."""
    if len(size) <= rank:
        return tuple(size)
    return (*size[: rank - 1], math.prod(size[rank - 1 :]))


def fold(
    specs: Sequence[TensorSpec], inputs: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The user's inputs as a graph of floating-point type ``dtype`` takes them.

    Raises:
        UsageError: The number of inputs or a shape is another than that of ``specs``.
    """
    wrong = [
        f"input {spec}: got {list(x.shape)}"
        for spec, x in zip(specs, inputs, strict=False)
        if tuple(x.shape) != spec.shape
    ]
    if len(inputs) != len(specs):
        wrong.append(f"{len(inputs)} inputs given, {len(specs)} wanted")
    if wrong:
        raise UsageError("; ".join(wrong) + "; shapes are static, convert again for others")
    return [
        spec.held(x.to(spec.dtype)).to(dtype)
        if x.is_floating_point() and spec.dtype.is_floating_point
        else spec.held(x)
        for spec, x in zip(specs, inputs, strict=True)
    ]


def unfold(specs: Sequence[TensorSpec], outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs in the shapes and dtypes of the source network, flat."""
    return [y.reshape(s.shape).to(s.dtype) for y, s in zip(outputs, specs, strict=True)]


@dataclass(frozen=True)
class Site:
    """One use of one neuron layer in the graph.

    Attributes:
        name: Unique; the module's path, with ``#2`` and so on for a module that is used again.
        path: Path of the source module.
        neuron: The neuron.
        T: Time steps.
        layout: Layout of its input in the graph; ``"steps"`` for one node a step, each [N, ...];
            ``"step"`` for the one step [N, ...] that a stepped program computes.
        drives: Names of the nodes that are its input.
        spikes: Names of the nodes that are its output, [T, N, ...], [TN, ...], or one a step.
        scale: What its drive was divided by, with the neuron's potentials, a value a channel; None
            if nothing was.
        offset: What was taken from its drive before that, likewise.
        sample: The shape of a sample, where the graph holds its last dimensions as one.
    """

    name: str
    path: str
    neuron: Neuron
    T: int
    layout: Layout
    drives: tuple[str, ...]
    spikes: tuple[str, ...]
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    sample: tuple[int, ...] | None = None

    def drive(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Its input [T, N, ...] out of a run's values by node name, in the source's scale.

        The values of a stepped program are the stacks of those of its steps.
        """
        drive = self.error(values)
        return drive if self.offset is None else drive + self.offset

    def error(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The same of errors of its input."""
        error = self._gather([values[n] for n in self.drives], self.layout)
        return error if self.scale is None else error.float() * self.scale

    def fired(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Its spikes [T, N, ...] out of a run's values by node name."""
        layout = "flat" if self.layout == "static" else self.layout
        return self._gather([values[n] for n in self.spikes], layout)

    def _gather(self, parts: Sequence[torch.Tensor], layout: str) -> torch.Tensor:
        if layout == "step":
            whole = parts[0]
        elif layout == "steps":
            whole = torch.stack(list(parts))
        else:
            whole = steps(parts[0], layout, self.T)
        return whole if self.sample is None else whole.reshape(*whole.shape[:2], *self.sample)

    def scatter(self, spikes: torch.Tensor, like: torch.Tensor, node: str) -> torch.Tensor:
        """Spikes [T, N, ...], or [N, ...] of the step, as one of its output nodes holds them."""
        if self.layout == "steps":
            spikes = spikes[self.spikes.index(node)]
        return spikes.reshape(like.shape).to(like.dtype)


@dataclass(frozen=True)
class PassReport:
    """What one pass did, and where it did not apply, why."""

    name: str
    done: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.done)} done, {len(self.skipped)} not applied"]
        lines += [f"  + {line}" for line in self.done] + [f"  - {line}" for line in self.skipped]
        return "\n".join(lines)


class Executor(fx.Interpreter):
    """Runs a program node by node, so that a run can be watched and steered.

    In half precision, convolutions and matrix products accumulate in float32 and are rounded once, and so
    is whatever torch's CPU lacks in half precision.
    """

    _ACCUMULATE = frozenset(
        {
            aten.conv1d.default,
            aten.conv2d.default,
            aten.linear.default,
            aten.matmul.default,
            aten.conv_transpose2d.input,
        }
    )

    def __init__(
        self,
        program: Program,
        substitute: Mapping[str, torch.Tensor] | None = None,
        observe: Callable[[fx.Node, Any], None] | None = None,
    ) -> None:
        super().__init__(program.module)
        self._sites = {node: site for site in program.sites for node in site.spikes}
        self._substitute = substitute
        self._observe = observe

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, or the spikes that ``substitute`` has for its site."""
        value = super().run_node(n)
        if self._observe is not None:
            self._observe(n, value)
        if self._substitute is not None and (site := self._sites.get(n.name)) is not None:
            value = site.scatter(self._substitute[site.name], value, n.name)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operator's value, with float32 accumulation where it accumulates."""
        if target in self._ACCUMULATE and args[0].dtype == torch.float16:
            return self._wide(target, args, kwargs)
        try:
            return super().call_function(target, args, kwargs)
        except RuntimeError as error:  # in newer releases of torch a NotImplementedError
            if "not implemented for 'Half'" not in str(error):
                raise
            return self._wide(target, args, kwargs)

    def _wide(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operator's value, computed in float32 and rounded once."""

        def cast(values: Any, given: torch.dtype, wanted: torch.dtype) -> Any:
            def one(x: torch.Tensor) -> torch.Tensor:
                return x.to(wanted) if x.dtype == given else x

            return pytree.tree_map_only(torch.Tensor, one, values)

        wide = cast((args, kwargs), torch.float16, torch.float32)
        return cast(super().call_function(target, *wide), torch.float32, torch.float16)


class Evidence(Protocol):
    """What a verification found."""

    def to_dict(self) -> dict[str, Any]:
        """The evidence as plain data, for JSON."""


@dataclass
class Program:
    """A network as a graph with static shapes, callable and printable.

    Attributes:
        module: The graph and its tensors.
        inputs: The inputs, in order; of one step where the program is stepped.
        outputs: The outputs, flat, likewise.
        structure: How the outputs are nested.
        sites: Every use of a neuron layer, in the order of execution.
        source: What it was made from: class, framework.
        target: Name of the target that it was rewritten for, or ``""``.
        dtype: Floating-point type of the graph.
        history: What each pass did.
        captured: The program as it was captured, before any pass.
        rounded: Names of the weights that a cast changed; None before any cast.
        terms: How large the terms are that a constant is the sum of, by its name: the network itself
            adds them up one by one.
        examples: Inputs that the conversion was verified on.
        evidence: What the verification found.
        stepping: How its steps make up a call, if it computes one step; its graph then has the states
            as further inputs and outputs.
        keeps_rounding: Whether its layers are to round as those of the network do.
        doubts: What would stop a stepped program that no longer example confirms.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    structure: pytree.TreeSpec
    sites: tuple[Site, ...] = ()
    source: dict[str, str] = field(default_factory=dict)
    target: str = ""
    dtype: torch.dtype = torch.float32
    history: tuple[PassReport, ...] = ()
    captured: Program | None = None
    rounded: frozenset[str] | None = None
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    examples: tuple[tuple[torch.Tensor, ...], ...] = ()
    evidence: Evidence | None = None
    stepping: Stepping | None = None
    keeps_rounding: bool = False
    doubts: tuple[Finding, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.module.graph

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every weight and constant, by name."""
        names = [str(n.target) for n in self.nodes("get_attr")]
        return {name: self.tensor(name) for name in names}

    def tensor(self, name: str) -> torch.Tensor:
        """One weight or constant."""
        value: torch.Tensor = operator.attrgetter(name)(self.module)
        return value

    @property
    def time(self) -> Time:
        """Whether a call of the graph is a call of the network, or one step of it."""
        return "unrolled" if self.stepping is None else "stepped"

    @property
    def graph_inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph takes: the inputs, then the states."""
        return (*self.inputs, *self._states("placeholder"))

    @property
    def graph_outputs(self) -> tuple[TensorSpec, ...]:
        """What the graph gives: the outputs, then the states for the next step."""
        return (*self.outputs, *self._states("output"))

    def _states(self, side: str) -> list[TensorSpec]:
        if self.stepping is None:
            return []
        after = "" if side == "placeholder" else ".next"
        nodes = list(self.nodes("placeholder"))[len(self.inputs) :]
        return [
            TensorSpec(
                state.name + after,
                state.shape or tuple(state.initial.shape),
                n.meta["val"].dtype,
                rank=None if state.shape is None else state.initial.dim(),
            )
            for state, n in zip(self.stepping.states, nodes, strict=True)
        ]

    @property
    def T(self) -> int | None:  # noqa: N802 -- the field's name
        """Time steps of a call of the graph, if all neurons have the same number."""
        found = {site.T for site in self.sites}
        return found.pop() if len(found) == 1 else None

    @property
    def batch(self) -> int:
        """Batch size N: what the neurons, or the outputs, and the inputs have in common."""
        given, result = self.inputs[0].shape, self.outputs[0].shape
        leading = {size for spec in self.inputs for size in spec.shape[:2]}
        for site in self.sites[:1]:
            shape = self.shape(site.drives[0])
            flat = {"stepped": shape[1:2], "flat": (shape[0] // site.T,)}
            found = flat.get(site.layout, shape)[0]
            if found in leading:
                return found
            # Some layers put their channels before the samples, or more than samples in their place.
            timed = len(given) > 1 and given[0] == site.T
            scores = result[:1] == given[:1] and result[1:2] != given[1:2]
            return given[1] if timed and not scores else given[0]
        return result[0] if result and result[0] in given[:2] else given[0]

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that the graph returns."""
        results: Any = self.graph.output_node().args[0]
        return list(results)

    def walk(self) -> list[Node]:
        """The nodes in order."""
        return list(self.graph.nodes)

    def site(self, spikes: fx.Node) -> Site:
        """The site that a node is the spikes of."""
        return next(s for s in self.sites if spikes.name in s.spikes)

    def named(self) -> dict[str, fx.Node]:
        """The nodes by name."""
        return {n.name: n for n in self.walk()}

    def node(self, name: str) -> fx.Node:
        """The node of this name."""
        node: fx.Node = next(n for n in self.walk() if n.name == name)
        return node

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a node's value."""
        return tuple(self.node(name).meta["val"].shape)

    def nodes(self, op: str) -> Iterator[fx.Node]:
        """The nodes of one kind: placeholder, get_attr, call_function."""
        return (n for n in self.graph.nodes if n.op == op)

    def flat_inputs(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The user's inputs as the graph takes them: checked, folded, cast to the graph's dtype.

        Raises:
            UsageError: The number of inputs or a shape is another than the program's.
        """
        return fold(self.inputs, inputs, self.dtype)

    def whole(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What :meth:`run` gives in the shapes and dtypes of the source network, flat."""
        if self.stepping is None:
            return unfold(self.outputs, outputs)
        return [y.to(spec.dtype) for y, spec in zip(outputs, self.outputs, strict=True)]

    def nest(self, outputs: Sequence[torch.Tensor]) -> Any:
        """What :meth:`run` gives as the source network gives it: shapes, dtypes, nesting."""
        return pytree.tree_unflatten(self.whole(outputs), self.structure)

    def initial_state(self) -> list[torch.Tensor]:
        """The states before the first step, in the graph's dtypes."""
        if self.stepping is None:
            return []
        dtypes = [spec.dtype for spec in self._states("placeholder")]
        return [state.initial for state in self.stepping.cast(dtypes).states]

    def run(
        self,
        inputs: Sequence[torch.Tensor],
        substitute: Mapping[str, torch.Tensor] | None = None,
        observe: Callable[[fx.Node, Any], None] | None = None,
    ) -> list[torch.Tensor]:
        """The graph's own outputs for one call of the network, flat; each call starts from v_0.

        A stepped program runs step after step, its outputs put together.

        Args:
            inputs: The user's inputs.
            substitute: Spikes [T, N, ...] by site, to go on with in place of those computed.
            observe: Called with each node and its value, at every step.
        """
        stepped = self.stepping is not None

        def run(t: int, given: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            spikes = substitute
            if spikes is not None and stepped:
                spikes = {name: s[t] for name, s in spikes.items()}
            with torch.no_grad():
                return list(Executor(self, spikes, observe).run(*given))

        return self.run_by(run, inputs)

    def run_by(
        self,
        run: Callable[[int, Sequence[torch.Tensor]], Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """As :meth:`run`, by a function that runs the graph: of (t, its inputs) to its outputs."""
        if self.stepping is None:
            return list(run(0, self.flat_inputs(inputs)))
        state: Sequence[torch.Tensor] = self.initial_state()
        found = []
        for t, now in enumerate(self.stepping.split(inputs)):
            results = run(t, [*self.flat_inputs(now), *state])
            found.append(results[: len(self.outputs)])
            state = results[len(self.outputs) :]
        return self.stepping.gather(found)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The network's outputs for one batch, on the CPU; each call starts from v_0."""
        return self.nest(self.run([x.cpu() for x in inputs]))

    def to(self, dtype: torch.dtype) -> Program:
        """A copy with every floating-point tensor in another dtype, for reference runs."""
        module = copy.deepcopy(self.module).to(dtype)
        return replace(self, module=module, dtype=dtype)

    def __str__(self) -> str:
        return describe(self)


def paired(captured: Program, program: Program) -> list[tuple[Site, Site]]:
    """Each layer of a captured program, and what it is in one that was made of it."""
    own = {site.name: site for site in program.sites}
    return [(site, own[site.name]) for site in captured.sites]


def where(node: fx.Node) -> str:
    """Path of the source module that a node came from."""
    path: str = node.meta.get("path", "")
    return path


def short(target: Any) -> str:
    """An operator's short name: ``aten.conv2d``, ``spikeport.neuron``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).replace("::", ".")
    return getattr(target, "__name__", str(target))


def describe(program: Program) -> str:
    """The graph as a table: one node a line with shape, dtype and source module."""
    rows = [("node", "operator", "from", "shape", "module")]
    for n in program.graph.nodes:
        if n.op == "output":
            continue
        value = n.meta["val"]
        shape = (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            if isinstance(value, torch.Tensor)
            else "(several)"
        )
        op = (
            short(n.target)
            if n.op == "call_function"
            else {"get_attr": "weight"}.get(n.op, "input")
        )
        sources = ", ".join(a.name for a in n.all_input_nodes if a.op != "get_attr")
        rows.append(
            (n.name, op, sources, shape, where(n) or (n.target if n.op == "get_attr" else ""))
        )
    rows = [r for r in rows if r[1] != "weight"]
    widths = [min(max(len(r[i]) for r in rows), 44) for i in range(4)]
    lines = [
        f"program for {program.target or 'no target yet'}: "
        + ("one step" if program.stepping else f"T={program.T}")
        + f", batch={program.batch}"
    ]
    lines += [f"  in   {spec}" for spec in program.graph_inputs]
    lines += [f"  out  {spec}" for spec in program.graph_outputs]
    lines += [f"  neuron {s.name}: {s.neuron.describe()}" for s in program.sites]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  " + "  ".join([*cells, row[4]]).rstrip())
    return "\n".join(lines)
