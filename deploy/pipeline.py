"""From a network to a program that a target takes: check and convert."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import targets as registry
from ..converters.capture import capture
from ..converters.errors import Finding, Findings, FindingsError, UnsupportedError, UsageError
from ..converters.host import on_host
from ..converters.passes import Pass, keeping_rounding, reroll_time, stepped
from ..converters.passes.step_time import HEADLINE
from ..converters.program import Program, Time
from ..converters.sources.nir import NirNetwork
from ..converters.verify import verify as verify_program
from ..targets import Target
from .longer import check_steps
from .model import structure_data

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def check(
    net: Any,
    args: Sequence[torch.Tensor],
    targets: Sequence[str],
    dtype: str | None = None,
    *,
    time: Time = "unrolled",
    keep_rounding: bool = False,
    dt: float | None = None,
) -> Findings:
    """Everything that would stop the network on these targets; nothing is compiled.

    Args:
        net: The network, as for :func:`convert`.
        args: Example inputs; their shapes, batch included, are those of the conversion.
        targets: Names of targets.
        dtype: ``"float16"`` or ``"float32"``; the target's own unless given.
        time: ``"unrolled"`` or ``"stepped"``, as in :func:`convert`.
        keep_rounding: As in :func:`convert`.
        dt: Time step of a NIR graph.
    """
    if isinstance(targets, str):
        raise UsageError(f"targets is a name; give a list of names: targets=[{targets!r}]")
    chosen = [registry.get(name) for name in targets]
    try:
        net, args = _network(net, args, dt)
        program = captured(net, args)
    except FindingsError as error:
        return error.findings
    found: list[Finding] = []
    for target in chosen:
        try:
            rewritten = _rewrite(program, target, _dtype(target, dtype), time, keep_rounding)
            _check_delays(net, rewritten.program)
            found += rewritten.findings
        except FindingsError as error:
            found += [replace(f, target=target.name) for f in error.findings]
    return Findings(found)


def convert(
    net: Any,
    args: Sequence[torch.Tensor],
    target: str,
    *,
    dtype: str | None = None,
    time: Time = "unrolled",
    keep_rounding: bool = False,
    verify: bool = True,
    dt: float | None = None,
) -> Program:
    """The network, rewritten for a target and verified against itself.

    Args:
        net: The network, an ``nn.Module``; it is copied, evaluated in eval mode, and left as it is. Or a
            NIR graph, a .nir file or an ``nir.NIRGraph``.
        args: Example inputs; their shapes, batch included, become the program's.
        target: Name of the target.
        dtype: ``"float16"`` or ``"float32"``; the target's own unless given.
        time: ``"unrolled"``: a call of the result is a call of the network, all time steps from v_0; or
            ``"stepped"``: it is one step, with every state as a further input and output.
        keep_rounding: Whether layers round as the network's own do: batch norms stay operators instead of
            going into weights, and no layer is computed on other rows than there. Slower; float32 only.
        verify: Whether source and result are run and compared.
        dt: Time step of a NIR graph, in the unit of its time constants; the one that its metadata say
            unless given.

    Raises:
        CaptureError: The network cannot become a graph.
        UnsupportedError: The rewritten graph breaks rules of the target, or the outputs' nesting cannot be
            stored.
        MismatchError: They differ, and rounding does not explain it.
        UsageError: The target has no such dtype or time, or the dtype cannot keep the rounding.
    """
    chosen = registry.get(target)
    net, args = _network(net, args, dt)
    program = captured(net, args)
    return converted(program, net, chosen, _dtype(chosen, dtype), time, keep_rounding, verify)


def converted(
    program: Program,
    net: nn.Module,
    target: Target,
    dtype: torch.dtype,
    time: Time = "unrolled",
    keep_rounding: bool = False,
    verify: bool = True,
) -> Program:
    """What :func:`convert` makes of a network, of which :func:`captured` gave the program."""
    how = target, dtype, time, keep_rounding
    rewritten = _rewrite(program, *how)
    _check_delays(net, rewritten.program)
    if errors := rewritten.findings.errors:
        raise UnsupportedError(f"{target.name} cannot run this network:", errors)
    if not verify:
        return rewritten.program
    program = verify_program(rewritten.program, net, rewritten.uncast)
    if time == "stepped":
        check_steps(program, net, captured, lambda p: _rewrite(p, *how).program)
    return program


def _network(net: Any, args: Any, dt: float | None) -> tuple[nn.Module, Any]:
    """The network as a module, and its inputs, on the CPU; what is neither, as it is."""
    if isinstance(net, nn.Module) and dt is not None:
        raise UsageError("dt is the time step of a NIR graph; a network of torch has its own")
    nir = isinstance(net, (str, os.PathLike)) or type(net).__name__ == "NIRGraph"
    net = NirNetwork(net, dt) if nir else net
    fit = isinstance(args, (tuple, list)) and all(isinstance(x, torch.Tensor) for x in args)
    return on_host(net, args) if fit and isinstance(net, nn.Module) else (net, args)


def captured(net: nn.Module, args: Any) -> Program:
    """The captured program, whose outputs an artifact can give back."""
    program = capture(net, args)
    structure_data(program.structure)
    program.examples = (tuple(x.detach().clone() for x in args),)
    return program


def _check_delays(net: nn.Module, program: Program) -> None:
    """Make sure that the delays of a NIR graph end within the example, or its graph would lack them."""
    if program.stepping is None or not isinstance(net, NirNetwork):
        return
    T, delay = program.stepping.steps, net.longest_delay
    if delay >= T:
        finding = Finding(
            rule="time-steps",
            where="",
            found=f"a Delay of {delay} time steps, in an example of {T}",
            allowed="delays shorter than the example",
            fix=f"give an example input of at least {delay + 2} time steps; the result does not depend "
            "on their number",
        )
        raise UnsupportedError(HEADLINE, [finding])


def _dtype(target: Target, name: str | None) -> torch.dtype:
    if name is None:
        return target.default_dtype()
    if name not in _DTYPES:
        raise UsageError(f"dtype is {name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def passes(
    target: Target, dtype: torch.dtype, time: Time, keep_rounding: bool = False
) -> tuple[Pass, ...]:
    """The rewrites that a target needs for all time steps or for one.

    Raises:
        UsageError: ``time`` is neither, or the target does not take it, or ``dtype`` rounds otherwise.
    """
    if time not in target.capabilities.times:
        allowed = ", ".join(sorted(target.capabilities.times))
        raise UsageError(f"time is {time!r}; allowed for {target.name}: {allowed}")
    if keep_rounding and dtype != torch.float32:
        raise UsageError(
            f"keep_rounding keeps that of float32, and in {dtype} every value is rounded once more; "
            'convert with dtype="float32" (--dtype float32), or without keep_rounding'
        )
    own = target.passes(dtype)
    own = stepped(own) if time == "stepped" else own
    return keeping_rounding(own) if keep_rounding else own


@dataclass(frozen=True)
class _Rewritten:
    """A program for a target.

    Attributes:
        program: The program.
        uncast: What it was before a cast, if there was one.
        findings: The target's rules that it breaks.
    """

    program: Program
    uncast: Program | None
    findings: Findings


def _rewrite(
    captured: Program, target: Target, dtype: torch.dtype, time: Time, keep_rounding: bool = False
) -> _Rewritten:
    start = replace(captured, target=target.name, captured=captured, keeps_rounding=keep_rounding)
    chosen = passes(target, dtype, time, keep_rounding)
    rewritten: _Rewritten | None = None
    refused: UnsupportedError | None = None
    try:
        rewritten = _through(chosen, start, target)
    except UnsupportedError as error:
        refused = error
    if rewritten is not None and not rewritten.findings.errors:
        return rewritten
    if reroll_time in chosen:
        # Steps that re-rolling has put together may go with those before them: a delay in a loop does.
        with suppress(UnsupportedError):
            alone = _through([one for one in chosen if one is not reroll_time], start, target)
            if not alone.findings.errors:
                return alone
    if rewritten is None:
        assert refused is not None
        raise refused
    return rewritten


def _through(chosen: Sequence[Pass], program: Program, target: Target) -> _Rewritten:
    uncast = None
    for rewrite in chosen:
        before, program = program, rewrite(program)
        if program.dtype != before.dtype:
            uncast = before
    return _Rewritten(program, uncast, registry.check(program, target))


def rewrite_for(
    captured: Program, target: str, dtype: torch.dtype, time: Time = "unrolled"
) -> Program:
    """A captured program, rewritten for a target and not verified."""
    return _rewrite(captured, registry.get(target), dtype, time).program
