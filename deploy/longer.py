"""Whether a stepped program is the same whatever the number of steps of its example.

What a forward makes of that number itself (``spikes / T`` inside a loop) is a constant to
``torch.export``, and a delay that is longer than the example is not there at all. So the network is
captured on a longer example too; where it has a number of steps of its own, with more of those. Where
neither is possible, what may follow from that number is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import fx, nn

from ..converters import ops
from ..converters.builder import same_bits
from ..converters.errors import Finding, SpikeportError, UnsupportedError
from ..converters.passes.step_time import HEADLINE
from ..converters.program import STATE, Program, short, where
from ..converters.watch import evaluation_copy
from .samples import inputs_like

#: What a network may raise that is not made for so many steps.
_FAILURES = (
    SpikeportError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SystemExit,
    TypeError,
    ValueError,
)
#: Modules of torch that others are made of; the rest have no time steps.
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: Attributes that are tried as the number of steps.
_MOST_NAMES = 6

Capture: TypeAlias = "Callable[[nn.Module, tuple[torch.Tensor, ...]], Program]"


def check_steps(
    program: Program, net: nn.Module, capture: Capture, rewrite: Callable[[Program], Program]
) -> None:
    """Make sure that a longer example would have given a program that computes the same.

    Args:
        program: A stepped program with ``examples``.
        net: The network that it was made from.
        capture: Gives a network as it is on some inputs.
        rewrite: What made the program of the captured one.

    Raises:
        UnsupportedError: It would not, or there is no longer example and there are doubts.
    """
    stepping = program.stepping
    if stepping is None or not program.examples:
        return
    example = program.examples[0]
    T = len(stepping.split(example))
    more = T + 8  # a delay may be longer than the example
    longer = tuple(
        x if d is None else torch.cat([x, *[x.narrow(d, -1, 1)] * more], d)
        for x, d in zip(example, stepping.inputs, strict=True)
    )
    # A network whose inputs have no time would be the same again.
    given = [net] if set(stepping.inputs) != {None} else []
    tried = itertools.chain(given, _with_more(net, T, more))
    captured = _captured(tried, longer, capture, T + more)
    if captured is None:
        if program.doubts:
            raise UnsupportedError(HEADLINE, program.doubts)
        return
    try:
        other = rewrite(captured)
    except UnsupportedError as error:
        findings = [
            replace(f, found=f"in an example of {T + more} time steps: {f.found}")
            for f in error.findings
        ]
        raise UnsupportedError(HEADLINE, findings) from error
    different = _different(program, other)
    if different is None:
        return
    # An input without time says nothing of how many steps there are.
    same = replace(program, stepping=replace(stepping, steps=T + more))
    if not _by_number(*different) and all(
        _agree(same, other, given) for given in inputs_like(longer)
    ):
        return
    raise UnsupportedError(HEADLINE, [_finding(program, other, different, (T, T + more))])


def _captured(
    tried: Iterable[nn.Module], longer: tuple[torch.Tensor, ...], capture: Capture, steps: int
) -> Program | None:
    """The first of these networks that takes so many steps."""
    for one in tried:
        with suppress(*_FAILURES):
            captured = capture(one, longer)
            if _steps(captured) == steps:
                return captured
    return None


def _with_more(net: nn.Module, T: int, more: int) -> Iterator[nn.Module]:
    """Copies of the network in which numbers of its own that are the number of steps are larger."""
    names: dict[str, None] = {}
    for module in net.modules():
        kinds = (k for k in type(module).__mro__ if k.__module__.startswith("torch.nn."))
        if all(kind in _CONTAINERS for kind in kinds):
            own = vars(module).items()
            names |= {k: None for k, v in own if type(v) is int and v == T}
    tried = [(name,) for name in itertools.islice(names, _MOST_NAMES)]
    for some in [*tried, *([tuple(names)] if len(names) > 1 else [])]:
        one = evaluation_copy(net)
        for module in one.modules():
            mine = vars(module)
            raised = {k: T + more for k in some if type(mine.get(k)) is int and mine[k] == T}
            mine.update(raised)
        yield one


def _steps(captured: Program) -> int:
    """Time steps that the layers run, those too of which potentials alone are read."""
    states = captured.graph.find_nodes(op="call_function", target=STATE)
    return max([*(site.T for site in captured.sites), *(n.args[4] for n in states)], default=0)


def _by_number(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes differ in a number that they compute with."""
    if a.op == b.op == "get_attr":
        return bool(a.meta["val"].shape == b.meta["val"].shape)
    return (
        a is not b
        and a.op == "call_function"
        and a.target == b.target
        and ops.is_pointwise(a.target)
    )


def _different(program: Program, other: Program) -> tuple[fx.Node, fx.Node] | None:
    """The first nodes that are not the same."""
    places: dict[fx.Node, str] = {}
    for i, (a, b) in enumerate(itertools.zip_longest(program.graph.nodes, other.graph.nodes)):
        if a is None or b is None:
            last = program.graph.output_node()
            return last, last
        places[a] = places[b] = f"%{i}"
        if a.op == b.op == "get_attr":
            same = same_bits(program.tensor(str(a.target)), other.tensor(str(b.target)))
        else:
            told = [str(fx.map_arg((n.args, n.kwargs), places.__getitem__)) for n in (a, b)]
            kinds = [n.target if n.op == "call_function" else n.op for n in (a, b)]
            same = told[0] == told[1] and kinds[0] == kinds[1]
        if not same:
            return a, b
    return None


def _agree(program: Program, other: Program, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether both give the same, but for what rounding explains of a graph in another order."""
    found = (p.whole(p.run(inputs)) for p in (program, other))
    return all(
        a.shape == b.shape
        and torch.isclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True).all()
        for a, b in zip(*found, strict=True)
    )


def _finding(
    program: Program, other: Program, nodes: tuple[fx.Node, fx.Node], steps: tuple[int, int]
) -> Finding:
    a, b = nodes
    few, many = steps
    if _by_number(a, b):
        constant = a.op == "get_attr"
        took = [
            _value(p.tensor(str(n.target))) if constant else _numbers(n)
            for p, n in ((program, a), (other, b))
        ]
        user = next(iter(a.users)) if constant and a.users else a
        found = (
            f"{short(user.target)} takes {took[0]} in an example of {few} time steps, and {took[1]} in "
            f"one of {many}"
        )
        return Finding(
            rule="time-steps",
            where=where(user),
            node=user.name,
            found=found,
            allowed="what does not follow from the number of time steps, and sums that are divided by it "
            "at the end",
            fix="divide the sum over all steps by T as the last operation, or leave that to what reads "
            "the output; or convert it unrolled",
        )
    return Finding(
        rule="time-steps",
        where="",
        found=f"an example of {few} time steps and one of {many} give programs that differ",
        allowed="an example that is longer than every delay of the network",
        fix="give a longer example; or convert it unrolled",
    )


def _value(tensor: torch.Tensor) -> str:
    return f"{tensor.item():g}" if tensor.numel() == 1 else f"{list(tensor.shape)}"


def _numbers(n: fx.Node) -> str:
    found = [a for a in (*n.args, *n.kwargs.values()) if isinstance(a, (int, float, list, tuple))]
    return ", ".join(map(str, found)) or "other values"
