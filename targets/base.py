"""What a target is: capabilities as data, passes in order, and compile and load.

A target never falls back to another: where its SDK is missing it says so and names the simulator.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch

from ..converters.errors import DeviceError, Finding, Findings, UsageError
from ..converters.jumps import undeclared
from ..converters.passes import (
    Pass,
    absorb_batch_norm,
    cast_float16,
    drop_copies,
    drop_unused_steps,
    flatten_time,
    fold_batch_norm,
    fold_constants,
    hoist_time_invariant,
    reroll_time,
)
from ..converters.precompute import functions
from ..converters.program import NEURON, NEURON_STEP, STATE, Program, Time, short, where


@dataclass(frozen=True)
class Capabilities:
    """What a target takes; each rule is data.

    Attributes:
        ops: Short names of the operators that it has, such as ``"aten.conv2d"``; None for all.
        dtypes: Dtypes of values that it has; None for all.
        max_rank: Highest rank of a tensor, or None.
        in_place: Whether it honours in-place writes.
        max_batch: Largest batch of one call, or None.
        arithmetic: Floating-point type that it computes in whatever the graph's is, or None.
        memory: Bytes that weights and live activations of one call may take, or None.
        times: Whether it takes programs of all time steps, of one, or both.
        loads: Other targets whose artifacts it loads, and compiles itself.
        torch_functions: Whether its exponential and the like are torch's, in the last bit too.
        notes: What else is known, for people.
    """

    ops: frozenset[str] | None
    dtypes: frozenset[torch.dtype] | None
    max_rank: int | None = None
    in_place: bool = True
    max_batch: int | None = None
    arithmetic: torch.dtype | None = None
    memory: int | None = None
    times: frozenset[Time] = frozenset(get_args(Time))
    loads: frozenset[str] = frozenset()
    torch_functions: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SDK:
    """An SDK as found on this machine.

    Attributes:
        name: Its name.
        version: Its version.
        simulated: Whether a simulator stands in.
        devices: Ids of the devices that it can see.
        settings: What else decides what a build computes, such as a simulator's options.
    """

    name: str
    version: str
    simulated: bool
    devices: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What a compile leaves in its directory.

    Attributes:
        options: Options that it was compiled with, after defaults.
        files: Paths of the vendor's files, relative to the directory.
        state: Who carries a stepped program's states from step to step: the ``"host"``, as further
            inputs and outputs of each call, or the ``"device"``.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    state: Literal["host", "device"] = "host"


class Loaded(Protocol):
    """A compiled graph on a device."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs for the graph's inputs, in shapes and dtypes of the graph.

        Inputs may lie on any device of torch.
        """

    def close(self) -> None:
        """Free the device."""


class Target(Protocol):
    """A machine that programs run on."""

    name: str
    capabilities: Capabilities

    def passes(self, dtype: torch.dtype) -> tuple[Pass, ...]:
        """The rewrites that it needs, in order, for arithmetic in ``dtype``."""

    def default_dtype(self) -> torch.dtype:
        """The floating-point type that it is converted to unless the user says otherwise."""

    def sdk(self) -> SDK:
        """The SDK on this machine.

        Raises:
            TargetUnavailableError: It is missing; the error says how to get it.
        """

    def compile(self, program: Program, directory: Path, options: Mapping[str, Any]) -> Compiled:
        """Compile a program into files in ``directory``, which exists and is empty.

        Raises:
            CompileError: The compiler refused or failed.
        """

    def load(
        self,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> Loaded:
        """Load what :meth:`compile` wrote, given the graph's input and output shapes and dtypes.

        Raises:
            DeviceError: There is no such device, or it refused the program.
        """


def rewrites(dtype: torch.dtype, *lowering: Pass) -> tuple[Pass, ...]:
    """The rewrites that targets share, in order, with what a target does to operators and neurons.

    For float16 a batch norm is absorbed rather than folded where that is possible, because folding rounds
    the weights once more, and the cast comes last.
    """
    first = (drop_copies, drop_unused_steps, fold_constants)
    layout = (*first, reroll_time, hoist_time_invariant, flatten_time)
    if dtype == torch.float16:
        return (*layout, absorb_batch_norm, fold_batch_norm, *lowering, cast_float16)
    return (*layout, fold_batch_norm, *lowering)


def chosen(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A target's options, the defaults where none is given.

    Raises:
        UsageError: It has no such option.
    """
    if unknown := sorted(set(given) - set(defaults)):
        there = f"there are {', '.join(defaults)}" if defaults else "it has none"
        raise UsageError(f"{name} has no option {', '.join(unknown)}; {there}")
    return {**defaults, **given}


def only_device(name: str, device: int, what: str = "the CPU") -> None:
    """Refuse a device other than 0, where there is but one.

    Raises:
        DeviceError: It is another.
    """
    if device != 0:
        raise DeviceError(f"no device {device}; the target {name} has device 0, {what}")


@runtime_checkable
class Inspects(Protocol):
    """A target with rules that capabilities do not say."""

    def inspect(self, program: Program) -> Iterable[Finding]:
        """What else it has to say about a program that is rewritten for it."""


def check(program: Program, target: Target) -> Findings:
    """Every rule of the target that the graph breaks."""
    found = Findings(_violations(program, target.name, target.capabilities))
    return found + target.inspect(program) if isinstance(target, Inspects) else found


def _violations(program: Program, target: str, can: Capabilities) -> Iterator[Finding]:
    if can.max_batch is not None and program.batch > can.max_batch:
        yield Finding(
            rule="batch",
            where="",
            target=target,
            found=f"a batch of {program.batch}",
            allowed=f"up to {can.max_batch}",
            fix="convert with a smaller example input",
        )
    if can.arithmetic is not None and program.dtype != can.arithmetic:
        yield Finding(
            rule="arithmetic",
            where="",
            target=target,
            found=f"a graph in {program.dtype}",
            allowed=f"the device computes in {can.arithmetic} whatever the graph's type is",
            fix="convert without dtype, so that the verification rounds as the device does",
            severity="warning",
        )
    for site in program.sites:
        if not can.torch_functions and (used := functions(site.neuron)):
            yield Finding(
                rule="last-bit",
                where=site.path,
                target=target,
                found=f"{', '.join(used)} in the charge of {site.neuron.dynamics.name}, whose last bit is "
                "each runtime's own",
                allowed="spikes that differ where the potential is within rounding of the threshold",
                fix="run deploy.compare, which says which differ and whether rounding explains it",
                severity="warning",
            )
    if program.dtype == torch.float16 and program.captured is not None:
        places = {where(n) for n in undeclared(program.captured)}
        for path in sorted(places):
            yield Finding(
                rule="undeclared-neuron",
                where=path,
                target=target,
                found="a comparison of its own decides over 0 and 1, of which no step is proved in float16",
                allowed="neurons whose dynamics are declared",
                fix="declare it (spikeport.converters.neurons.dynamics), or convert with "
                'dtype="float32"',
                severity="warning",
            )
    if can.memory is not None and (need := memory(program)) > can.memory:
        yield Finding(
            rule="memory",
            where="",
            target=target,
            found=f"{need / 2**30:.1f} GiB of weights and live activations for a batch of "
            f"{program.batch}",
            allowed=f"{can.memory / 2**30:.0f} GiB",
            fix="convert with a smaller example input",
        )
    # A message for each layer and fault, not for each of its hundred unrolled nodes.
    told: set[tuple[str, str, str]] = set()
    for n in program.graph.nodes:
        if n.op == "output":
            continue
        for rule, found, allowed, fix in _node_violations(n, can):
            if (where(n), rule, found) not in told:
                told.add((where(n), rule, found))
                yield Finding(rule, where(n), found, allowed, fix, node=n.name, target=target)


#: What to do about an operator that a target lacks and that has no other form there.
_INSTEAD = {
    "aten.floor_divide": "write torch.floor(x / y), which is another number only where the quotient rounds "
    "up to a whole one; floor division by 2 and other powers of 2 is taken as it is",
    "aten.gelu": "train with nn.GELU(approximate='tanh'), which is computed from tanh",
    **dict.fromkeys(
        ("aten.log_softmax", "aten.argmax", "aten.topk", "aten.sort", "aten.argsort"),
        "leave it out of the network, and apply it to what the model returns",
    ),
}


def memory(program: Program) -> int:
    """Bytes of the weights and of the largest set of activations alive at once."""
    weights = sum(t.numel() * t.element_size() for t in program.tensors.values())
    last = {a: n for n in program.graph.nodes for a in n.all_input_nodes}
    live = peak = 0
    for n in program.graph.nodes:
        if n.op in ("output", "get_attr"):
            continue
        live += _bytes(n)
        peak = max(peak, live)
        live -= sum(_bytes(a) for a in n.all_input_nodes if last[a] is n and a.op != "get_attr")
    return weights + peak


def _bytes(n: Any) -> int:
    values = n.meta["val"]
    values = values if isinstance(values, (tuple, list)) else (values,)
    return sum(v.numel() * v.element_size() for v in values)


def _node_violations(n: Any, can: Capabilities) -> Iterator[tuple[str, str, str, str]]:
    """(rule, found, allowed, fix) for each rule that one node breaks."""
    value = n.meta["val"]
    op = short(n.target) if n.op == "call_function" else ""
    for one in value if isinstance(value, (tuple, list)) else (value,):
        if can.max_rank is not None and one.dim() > can.max_rank:
            yield (
                "rank",
                f"{op or n.op} of shape {list(one.shape)}, rank {one.dim()}",
                f"rank up to {can.max_rank}",
                "merge dimensions before this operator, or use one over fewer, such as conv2d on steps "
                "that are folded into the batch",
            )
        if can.dtypes is not None and one.dtype not in can.dtypes:
            yield (
                "dtype",
                f"{op or n.op} gives {one.dtype}",
                ", ".join(sorted(str(d) for d in can.dtypes)),
                "convert the value in the network's forward",
            )
        if 0 in one.shape:
            yield (
                "empty",
                f"{op or n.op} of shape {list(one.shape)}",
                "tensors with at least one element",
                "take the operator out",
            )
    if not op:
        return
    if n.target is operator.getitem:
        return  # a part of an operator's results; that operator is judged itself
    if can.ops is not None and op not in can.ops:
        if n.target in (NEURON, NEURON_STEP, STATE):
            yield "operator", op, "primitive operators", "lower the neurons first"
        else:
            yield (
                "operator",
                op,
                "the operators that the target has (spikeport targets --json lists them)",
                _INSTEAD.get(op, "replace it in the network's forward by one of those"),
            )
    schema = getattr(n.target, "_schema", None)
    if not can.in_place and schema is not None and schema.is_mutable:
        yield "in-place", f"{op} writes in place", "functional operators", "use its functional form"
