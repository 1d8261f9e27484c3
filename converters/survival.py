"""Whether anything of one call lasts to the next: one copy of a network, run on several inputs.

An attribute that each forward sets anew, such as the spikes for a log or the membrane that a loop starts
with, is nothing that survives: whatever came before, a call gives the same outputs and leaves the same
attribute. All else that a forward writes survives, whether its outputs have shown it yet or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from . import sources
from .attributes import Snapshot, changes, differing, equal, modules, replaced, snapshot
from .errors import Finding
from .watch import Watched, copies, evaluation_copy, undisturbed


@dataclass
class Tried:
    """What runs on several inputs have shown.

    Attributes:
        findings: What survives a call.
        written: Names of the attributes that calls write, by the module's path.
        lively: Random inputs and the network's own outputs for them, up to the one at
            which all its neurons had fired.
    """

    findings: list[Finding] = field(default_factory=list)
    written: dict[str, set[str]] = field(default_factory=dict)
    lively: list[tuple[tuple[torch.Tensor, ...], Any]] = field(default_factory=list)


@dataclass
class _Run:
    """One call: its inputs and outputs, what it changed, and all attributes after it."""

    given: tuple[torch.Tensor, ...]
    outputs: Any
    changed: dict[str, set[str]]
    after: Snapshot


def try_out(net: nn.Module, args: tuple[torch.Tensor, ...], watched: Watched) -> Tried:
    """Run a copy of the network on random inputs and on the example again, one after the other."""
    work = evaluation_copy(net)
    # What the example leaves behind is there for the others to find.
    start = [_attempt(work, args, watched)] if watched.written else []
    random, lively = _random_runs(work, args, watched)
    others: Sequence[_Run | None] = random or [
        _attempt(work, tuple(map(_backwards, args)), watched)
    ]
    again = _attempt(work, args, watched)
    runs = [run for run in (*start, *others, again) if run is not None]
    tried = Tried(lively=[(run.given, run.outputs) for run in random[:lively]])
    for names in (watched.written, *(run.changed for run in runs)):
        for path in names:
            tried.written.setdefault(path, set()).update(names[path])
    if tried.written:
        tried.findings = _survivors(net, work, args, watched, runs, tried.written)
    elif not watched.findings and not (again and equal(again.outputs, watched.outputs)):
        tried.findings = [surviving()]
    return tried


def _survivors(
    net: nn.Module,
    work: nn.Module,
    args: tuple[torch.Tensor, ...],
    watched: Watched,
    runs: Sequence[_Run],
    written: Mapping[str, set[str]],
) -> list[Finding]:
    """What of the attributes written survives: each run is held against that of a fresh copy."""
    first = _Run(args, watched.outputs, {}, watched.after)
    alone = [
        first if run.given is args else _attempt(evaluation_copy(net), run.given, watched)
        for run in runs
    ]
    fails = not runs or runs[-1].given is not args
    depends = fails or any(not _alike(run, fresh) for run, fresh in zip(runs, alone, strict=True))
    found = _apart(zip(runs, alone, strict=True), written)
    others = [i for i, run in enumerate(runs) if run.given is not args]
    if others and not depends:
        # A few spikes may hide that an earlier value is read: others in its place would show.
        given, fresh = runs[others[-1]].given, alone[others[-1]]
        varying = found or _apart(((other, alone[0]) for other in alone), written)
        for value in (torch.nan, torch.inf, -torch.inf) if varying else ():
            _overwrite(work, varying, value)
            run = _attempt(work, given, watched)
            depends |= not _alike(run, fresh)
            if depends or _apart([(run, fresh)], varying):
                found = varying
    if not found and (depends or not others):
        found = {path: {name: [""] for name in names} for path, names in written.items()}
    return [_kept(path, names, depends) for path, names in found.items()]


def _alike(a: _Run | None, b: _Run | None) -> bool:
    """Whether two calls gave the same outputs."""
    return a is not None and b is not None and equal(a.outputs, b.outputs)


def _apart(
    pairs: Iterable[tuple[_Run | None, _Run | None]], written: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, list[str]]]:
    """Which of the attributes two calls left otherwise, by path and name, with the ways to what differs."""
    found: dict[str, dict[str, list[str]]] = {}
    for a, b in pairs:
        if a is None or b is None:
            continue
        for path, names in written.items():
            then, now = a.after.get(path, {}), b.after.get(path, {})
            for name in names:
                if ways := differing(then.get(name), now.get(name)):
                    found.setdefault(path, {}).setdefault(name, ways)
    return found


def _overwrite(net: nn.Module, written: Mapping[str, Iterable[str]], value: float) -> None:
    """Put other tensors into attributes: full of the value, or, of integers, others than there are."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.full_like(tensor, value)
        return tensor == 0 if tensor.dtype is torch.bool else tensor + 1

    for holder, name, _ in _places(net, written):
        holder[name] = replaced(holder[name], other)


def _places(
    net: nn.Module, written: Mapping[str, Iterable[str]]
) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """The dictionaries that hold the attributes now, and whose they are."""
    known = dict(modules(net))
    for path, names in written.items():
        # A declared neuron's own parts are gone where a stand-in is in its place.
        module: nn.Module | None = known.get(path)
        if module is None:
            continue
        for name in names:
            for holder in (vars(module), module._buffers):
                if name in holder:
                    yield holder, name, module


def _random_runs(
    work: nn.Module, args: tuple[torch.Tensor, ...], watched: Watched
) -> tuple[list[_Run], int]:
    """Two runs at least, and how many it takes for all neurons to fire: an example may make none fire.

    Inputs that the network does not take, or makes no finite numbers of, are left out.
    """
    fired, every = _firing(work, watched), watched.calls.keys() & watched.readings.keys()
    runs: list[_Run] = []
    lively = 0
    for given in _others(args):
        run = _attempt(work, given, watched)
        leaves = pytree.tree_leaves(run.outputs) if run else []
        if not all(bool(y.isfinite().all()) for y in leaves if isinstance(y, torch.Tensor)):
            break
        if run:
            runs.append(run)
            lively = lively or len(runs) * (fired >= every)
        if lively and len(runs) > 1:
            break
    return runs, lively or len(runs)


#: Sizes of the random inputs.
_SIZES = (1.0, 4.0, 16.0)


def _others(args: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Random inputs of growing size; those that are no floating-point numbers keep the example's values."""
    for seed, size in enumerate(_SIZES):
        generator = torch.Generator().manual_seed(seed)
        yield tuple(
            (torch.rand(a.shape, generator=generator) * 3 - 1).mul(size).to(a.dtype)
            if a.is_floating_point()
            else _backwards(a)
            if seed % 2
            else a.clone()
            for a in args
        )


def _backwards(x: torch.Tensor) -> torch.Tensor:
    return x.flip([*range(x.dim())])


def _firing(net: nn.Module, watched: Watched) -> set[str]:
    """Paths of the neurons that have fired, now and whenever the network is called."""
    fired = set[str]()

    def look(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, x: Any, y: Any) -> None:
            given = pytree.tree_leaves(watched.readings[path].spikes(y))
            if any(isinstance(part, torch.Tensor) and bool(part.any()) for part in given):
                fired.add(path)

        return hook

    for path, module in net.named_modules():
        if path in watched.readings:
            module.register_forward_hook(look(path))
    return fired


def _attempt(net: nn.Module, given: tuple[torch.Tensor, ...], watched: Watched) -> _Run | None:
    """A call with the declared neurons reset, or nothing where the network fails."""
    sources.reset(net)
    before = snapshot(net)
    try:
        with undisturbed(net):
            outputs = net(*copies(given))
    except Exception:
        return None
    after = snapshot(net)
    changed = {p: n for p, n in changes(before, after).items() if p not in watched.known}
    return _Run(given, outputs, changed, after)


def forgetting(net: nn.Module, written: Mapping[str, set[str]]) -> None:
    """Let each call write these attributes on copies, and leave them as they were.

    torch.export takes no attribute for a value that a forward sets, nor a buffer that it writes.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []

    def before(*_: Any) -> None:
        for holder, name, module in [*_places(net, written)]:
            kept.append((holder, name, holder.pop(name)))
            vars(module)[name] = replaced(kept[-1][-1], torch.clone)

    def after(*_: Any) -> None:
        for holder, name, _module in [*_places(net, written)]:
            del holder[name]
        for holder, name, value in kept:
            holder[name] = value
        kept.clear()

    if written:
        net.register_forward_pre_hook(before, prepend=True)
        net.register_forward_hook(after, always_call=True)


def surviving() -> Finding:
    """Of what lies outside the network."""
    return Finding(
        rule="surviving-state",
        where="",
        found="a call gives other outputs after calls before it: state survives from one call to the "
        "next outside the network, as in a global, or the forward is random outside torch",
        allowed="a network whose outputs follow from its inputs",
        fix="keep state in the forward's own variables, and take randomness out of it",
    )


_DECLARE = "declare the state as a neuron's (spikeport.converters.neurons.dynamics)"


def _kept(path: str, names: Mapping[str, Sequence[str]], depends: bool) -> Finding:
    """``depends``: the outputs of a later call were seen to follow from it."""
    ways = sorted(f"self.{name}{way}" for name, ways in names.items() for way in ways)
    more = f" and {len(ways) - 4} more" if len(ways) > 4 else ""
    return Finding(
        rule="surviving-state",
        where=path,
        found=f"the forward writes to {', '.join(ways[:4])}{more}, which survives the call"
        + (" and changes the outputs of the next" if depends else "; no output was seen to change"),
        allowed="a forward that keeps nothing on self but what each call sets anew",
        fix=f"use a variable of the forward, return it, or {_DECLARE}"
        if depends
        else f"return a state, or {_DECLARE}; take what is merely kept, as a count or a log, out of the "
        "forward, or set it anew in each call",
    )
