"""Whether a stepped program is the same whatever the number of steps of its example.

What a forward makes of that number itself (``spikes / T`` inside a loop) is a constant to
``torch.export``, and a delay that is longer than the example is not there at all. So the network is
captured on a longer example too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import fx

from ..converters import ops
from ..converters.builder import same_bits
from ..converters.errors import Finding, SpikeportError, UnsupportedError
from ..converters.passes.step_time import HEADLINE
from ..converters.program import STATE, Program, short, where
from .samples import inputs_like

#: Steps of the longer example besides those of the given one.
_MORE = 3


def check_steps(
    program: Program,
    capture: Callable[[tuple[torch.Tensor, ...]], Program],
    rewrite: Callable[[Program], Program],
) -> None:
    """Make sure that a longer example would have given a program that computes the same.

    Networks that run a number of steps of their own are left, as are those whose inputs have no time.

    Args:
        program: A stepped program with ``examples``.
        capture: Gives the network as it is on other inputs.
        rewrite: What made the program of the captured one.

    Raises:
        UnsupportedError: It would not.
    """
    stepping = program.stepping
    if stepping is None or not program.examples or set(stepping.inputs) == {None}:
        return
    example = program.examples[0]
    longer = tuple(
        x if d is None else torch.cat([x, *[x.narrow(d, -1, 1)] * _MORE], d)
        for x, d in zip(example, stepping.inputs, strict=True)
    )
    T = len(stepping.split(example))
    try:
        captured = capture(longer)
    except (SpikeportError, ValueError, IndexError, RuntimeError):
        return
    if _steps(captured) <= T:
        return
    try:
        other = rewrite(captured)
    except UnsupportedError as error:
        findings = [
            replace(f, found=f"in an example of {T + _MORE} time steps: {f.found}")
            for f in error.findings
        ]
        raise UnsupportedError(HEADLINE, findings) from error
    different = _different(program, other)
    if different is None:
        return
    if not _by_number(*different) and all(
        _agree(program, other, given) for given in inputs_like(longer)
    ):
        return
    raise UnsupportedError(HEADLINE, [_finding(program, other, different, T)])


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
    for i, (a, b) in enumerate(zip_longest(program.graph.nodes, other.graph.nodes)):
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


def _finding(program: Program, other: Program, nodes: tuple[fx.Node, fx.Node], T: int) -> Finding:
    a, b = nodes
    if _by_number(a, b):
        constant = a.op == "get_attr"
        took = [
            _value(p.tensor(str(n.target))) if constant else _numbers(n)
            for p, n in ((program, a), (other, b))
        ]
        user = next(iter(a.users)) if constant and a.users else a
        found = (
            f"{short(user.target)} takes {took[0]} in an example of {T} time steps, and {took[1]} in one "
            f"of {T + _MORE}"
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
        found=f"an example of {T} time steps and one of {T + _MORE} give programs that differ",
        allowed="an example that is longer than every delay of the network",
        fix="give a longer example; or convert it unrolled",
    )


def _value(tensor: torch.Tensor) -> str:
    return f"{tensor.item():g}" if tensor.numel() == 1 else f"{list(tensor.shape)}"


def _numbers(n: fx.Node) -> str:
    found = [a for a in (*n.args, *n.kwargs.values()) if isinstance(a, (int, float, list, tuple))]
    return ", ".join(map(str, found)) or "other values"
