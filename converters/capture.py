"""From an ``nn.Module`` to a :class:`Program`.

The network itself is run first, on a copy, and watched: everything that would make a graph of it say
something else is found there. Then every neuron of a fresh copy is replaced by a stand-in that calls
one operator, and ``torch.export`` traces it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from . import sources
from .errors import CaptureError, Finding, MismatchError, UsageError
from .exported import export, place, to_program
from .program import Program
from .sources import Memory, Reading
from .stand_in import State, StateAccessError, wrap

_HEADLINE = "the network cannot be captured:"


def capture(net: nn.Module, args: Sequence[torch.Tensor]) -> Program:
    """The network as a program, for inputs of these shapes, in eval mode.

    The captured program is run against the network itself, whose outputs it must equal bit for bit.

    Args:
        net: The network; it is copied, and left as it is.
        args: Example inputs, tensors.

    Raises:
        UsageError: The network is no module, or the example inputs are no tensors.
        CaptureError: With everything that stops the capture.
        MismatchError: The program computes something else than the network.
    """
    if not isinstance(net, nn.Module):
        raise UsageError(f"the network is {type(net).__name__}; give an nn.Module")
    given: Any = args
    kinds = [type(given).__name__] if isinstance(given, torch.Tensor) else []
    kinds += [type(a).__name__ for a in args if not isinstance(a, torch.Tensor)]
    if kinds or not len(args):
        raise UsageError(
            f"the example inputs are {', '.join(kinds) or 'nothing'}; give a tuple of tensors"
        )
    args = tuple(args)
    watched = _watch(net, args)
    if watched.findings:
        raise CaptureError(_HEADLINE, watched.findings)
    state = State()
    work = _traceable(net, watched, state)
    first = _outputs(work, args, state)
    # What that call has cached would be taken for a constant: a fresh copy is exported.
    fresh = _traceable(net, watched, state)
    state.v.clear()
    with sources.isolated(fresh):
        exported = export(fresh, _fresh(args))
    program = to_program(exported, net, args)
    if not _equal(first, _outputs(work, args, state)):
        raise CaptureError(_HEADLINE, [_surviving()])
    if not _equal(watched.outputs, first):
        raise MismatchError(
            "the declared neurons give other outputs than the network's own; "
            + _first_difference(net, args, watched.readings)
        )
    if not _equal(first, program(*args)):
        raise MismatchError(
            "the exported graph gives other outputs than the network: its forward depends on "
            "something besides its inputs, such as time or a global"
        )
    return program


def _copy(net: nn.Module) -> nn.Module:
    """A copy in eval mode, its states reset and its parametrizations computed."""
    try:
        work = sources.copied(net)
    except Exception as error:
        raise CaptureError(
            _HEADLINE,
            [sources.not_copied(error)],
        ) from error
    work.eval()
    for module in list(work.modules()):
        if parametrize.is_parametrized(module):
            _compute_parametrizations(module)
    work.requires_grad_(False)
    sources.reset(work)
    return work


def _compute_parametrizations(module: nn.Module) -> None:
    """Put the computed value in the place of each parametrized weight.

    torch's own remove_parametrizations takes the property from a class that copies share.
    """
    names: Any = module._modules["parametrizations"]
    values = {name: getattr(module, name).detach() for name in names}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _fresh(args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The inputs, copied: a forward may write to them."""
    return tuple(a.detach().clone() for a in args)


def _traceable(net: nn.Module, watched: _Watched, state: State) -> nn.Module:
    work = _copy(net)
    _numbers(work)
    wrap(work, watched.readings, watched.memories, state)
    if watched.kept:
        _forget(work)
    return work


def _forget(net: nn.Module) -> None:
    """Let each forward leave the network's state as it was before the first step."""
    kind = type(net)

    def forward(self: nn.Module, *args: Any) -> Any:
        outputs = kind.forward(self, *args)
        sources.reset(self)
        return outputs

    net.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _numbers(net: nn.Module) -> None:
    """Make plain integers of those that are tensors but no buffers: control flow may ask them."""
    for module in net.modules():
        for name, value in vars(module).items():
            if (
                isinstance(value, torch.Tensor)
                and value.dim() == 0
                and not value.is_floating_point()
            ):
                vars(module)[name] = value.item()


# The network's own run, watched


@dataclass
class _Watched:
    """What was seen of a network while it ran.

    Attributes:
        outputs: Its outputs.
        findings: What stops the capture.
        readings: Its neurons, by path.
        calls: How often each was called.
        memories: Names of the attributes of each that changed.
        handed: Those that were handed their state by the network.
        kept: Its other layers with a state, by path.
    """

    outputs: Any = None
    findings: list[Finding] = field(default_factory=list)
    readings: dict[str, Reading] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    memories: dict[str, set[str]] = field(default_factory=dict)
    handed: set[str] = field(default_factory=set)
    kept: dict[str, Memory] = field(default_factory=dict)


def _watch(net: nn.Module, args: tuple[torch.Tensor, ...]) -> _Watched:
    seen = _Watched()
    work = _copy(net)
    seen.findings += _weights(work)
    ids = set[int]()
    for path, module, reading in sources.read_all(work):
        ids.add(id(module))
        if isinstance(reading, Reading):
            seen.readings[path] = reading
            module.register_forward_pre_hook(_count(path, reading, seen), with_kwargs=True)
        elif isinstance(reading, Memory):
            seen.kept[path] = reading
            module.register_forward_pre_hook(_tally(path, seen))
        else:
            seen.findings += reading
    for path, module in _hidden(work):
        module.register_forward_pre_hook(_tell_hidden(path, seen))
    before, inputs = _snapshot(work), _fresh(args)
    try:
        with torch.no_grad(), sources.isolated(work):
            seen.outputs = work(*inputs)
    except Exception as error:
        seen.findings.append(_failed(error, args))
        return seen
    seen.findings += [
        _written(i) for i, (a, b) in enumerate(zip(args, inputs, strict=True)) if not _equal(a, b)
    ]
    changes = _changes(before, _snapshot(work))
    for path, module in work.named_modules():
        if path in changes and id(module) in ids:
            if path in seen.readings:
                seen.memories[path] = changes[path]
        elif path in changes:
            seen.findings.append(_kept(path, changes[path]))
    stateful: dict[str, Reading | Memory] = {**seen.readings, **seen.kept}
    once = [
        path
        for path, reading in stateful.items()
        if reading.step_mode == "s" and seen.calls.get(path) == 1 and path not in seen.handed
    ]
    if once and not seen.findings:
        restarted = _restarted(work, args, before, seen)
        seen.findings += [_outer_loop(path) for path in once if path not in restarted]
    return seen


def _restarted(
    work: nn.Module,
    args: Sequence[torch.Tensor],
    before: dict[str, dict[str, Any]],
    seen: _Watched,
) -> set[str]:
    """Neurons whose state the forward itself puts back before it calls them, seen in a second run."""
    found = set[str]()

    def look(path: str, names: set[str]) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            now = _snapshot(module)[""]
            if names and not any(_moved(before[path][n], now[n]) for n in names):
                found.add(path)

        return hook

    for path, module in work.named_modules():
        if path in seen.readings:
            names = seen.memories.get(path, set())
            states = seen.readings[path].states
            module.register_forward_pre_hook(look(path, names & states.keys() if states else names))
    with torch.no_grad(), sources.isolated(work):
        work(*_fresh(args))
    return found


def _moved(start: Any, now: Any) -> bool:
    """Whether a state is another than at the start, where zeros of any shape are alike."""
    tensors = isinstance(start, torch.Tensor) and isinstance(now, torch.Tensor)
    return bool(now.any()) if tensors and not start.any() else _differs(start, now)


def _weights(net: nn.Module) -> list[Finding]:
    """Weights that are not finite."""
    return [
        Finding(
            rule="non-finite-weight",
            where=name.rpartition(".")[0],
            found=f"{name} has {int((~torch.isfinite(value)).sum())} values that are NaN or infinite",
            allowed="finite weights",
            fix="look at the training run: the checkpoint was saved after it diverged",
        )
        for name, value in (*net.named_parameters(), *net.named_buffers())
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]


def _count(path: str, reading: Reading, seen: _Watched) -> Callable[..., None]:
    """A hook that counts a neuron's calls and looks at its inputs."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls[path] = seen.calls.get(path, 0) + 1
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            seen.handed.add(path)
        shape = "[T, N, ...]" if reading.step_mode == "m" else "[N, ...]"
        wrong = ""
        if (
            not args
            or len(args) + len(kwargs) > 1 + len(reading.states)
            or not kwargs.keys() <= reading.states.keys()
            or not isinstance(args[0], torch.Tensor)
        ):
            wrong = f"called with {len(args)} positional and {len(kwargs)} keyword arguments"
        elif not args[0].is_floating_point():
            wrong = f"called with {args[0].dtype}"
        elif args[0].dim() < (2 if reading.step_mode == "m" else 1) or 0 in args[0].shape[:2]:
            wrong = f"called with {list(args[0].shape)}"
        if wrong and not any(f.rule == "neuron-input" and f.where == path for f in seen.findings):
            seen.findings.append(
                Finding(
                    rule="neuron-input",
                    where=path,
                    found=wrong,
                    allowed=f"one floating-point tensor {shape}"
                    + "".join(f", {name}" for name in reading.states),
                    fix="give it time and batch as leading dimensions, as floating-point numbers",
                )
            )

    return hook


def _tally(path: str, seen: _Watched) -> Callable[..., None]:
    """A hook that counts a layer's calls."""

    def hook(*_: Any) -> None:
        seen.calls[path] = seen.calls.get(path, 0) + 1

    return hook


def _hidden(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules in plain lists, tuples, sets and dicts, which torch does not know of."""
    registered = {id(m) for m in net.modules()}

    def inside(value: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(value, nn.Module):
            if id(value) not in registered:
                yield path, value
        elif isinstance(value, (list, tuple, set, frozenset)):
            for i, item in enumerate(value):
                yield from inside(item, f"{path}[{i}]")
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from inside(item, f"{path}[{key!r}]")

    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
                yield from inside(value, f"{path}.{name}" if path else name)


def _tell_hidden(path: str, seen: _Watched) -> Callable[..., None]:
    def hook(module: nn.Module, _: Any) -> None:
        if not any(f.rule == "hidden-module" and f.where == path for f in seen.findings):
            seen.findings.append(
                Finding(
                    rule="hidden-module",
                    where=path,
                    found=f"a {type(module).__name__} in a plain Python container, which eval(), "
                    "state_dict() and this capture do not see",
                    allowed="registered modules",
                    fix="use nn.ModuleList or nn.ModuleDict",
                )
            )

    return hook


def _failed(error: Exception, args: Sequence[torch.Tensor]) -> Finding:
    return Finding(
        rule="forward-fails",
        where="",
        found=f"{type(error).__name__}: {error} ({place(error)})",
        allowed="a network that runs on the example inputs "
        f"{', '.join(str(list(a.shape)) for a in args)}",
        fix="give inputs of the shapes that it takes, or mend its forward",
    )


def _written(index: int) -> Finding:
    return Finding(
        rule="input-written",
        where="",
        found=f"the forward writes to its input {index}",
        allowed="a forward that writes only to its own variables",
        fix="write to a copy (x = x.clone())",
    )


def _snapshot(net: nn.Module) -> dict[str, dict[str, Any]]:
    """Every module's attributes and buffers, as they are now."""
    return {
        path: {
            name: value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)
            for name, value in (*vars(module).items(), *module._buffers.items())
            if name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks")
        }
        for path, module in net.named_modules()
    }


def _changes(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]
) -> dict[str, set[str]]:
    """Names of the attributes that are others than before, by the module's path."""
    found = {}
    for path, values in after.items():
        names = {
            n for n, v in values.items() if n not in before[path] or _differs(before[path][n], v)
        }
        if names:
            found[path] = names
    return found


def _differs(a: Any, b: Any) -> bool:
    if a is b:
        return False
    try:
        return type(a) is not type(b) or not _equal(a, b)
    except Exception:
        # What cannot be compared cannot be told to have changed either.
        return False


def _kept(path: str, names: set[str]) -> Finding:
    return Finding(
        rule="surviving-state",
        where=path,
        found=f"the forward writes to {', '.join(f'self.{n}' for n in sorted(names))}, which survives "
        "the call",
        allowed="a forward that keeps nothing on self",
        fix="use a variable of the forward, return it, or declare the state as a neuron's "
        "(spikeport.converters.neurons.dynamics)",
    )


def _outer_loop(path: str) -> Finding:
    return Finding(
        rule="time-loop-outside",
        where=path,
        found="a single-step layer that the forward calls once: its time loop lies outside the "
        "network, and its state would survive from one call to the next",
        allowed="all time steps inside one call; a single step where the forward resets the neuron",
        fix="set step_mode='m' (SpikingJelly: functional.set_step_mode(net, 'm')) and give "
        "[T, N, ...], or put the loop over time into a module's forward",
    )


# The stand-ins' run


def _outputs(net: nn.Module, args: Sequence[torch.Tensor], state: State) -> Any:
    state.v.clear()
    try:
        with torch.no_grad(), sources.isolated(net):
            return net(*_fresh(args))
    except StateAccessError as error:
        raise CaptureError(_HEADLINE, [_touched(error)]) from error


def _touched(error: StateAccessError) -> Finding:
    return Finding(
        rule="neuron-state",
        where=error.path,
        found=error.did,
        allowed="neurons that are only called; their state is not part of the graph",
        fix="compute what you need from the spikes, or read the membrane after the conversion "
        "(deploy.compare)",
    )


def _surviving() -> Finding:
    return Finding(
        rule="surviving-state",
        where="",
        found="two calls with the same inputs give other outputs: state survives from one call to the "
        "next outside the network, or the forward is random outside torch",
        allowed="a network whose outputs follow from its inputs",
        fix="keep state in the forward's own variables, and take randomness out of it",
    )


def _equal(a: Any, b: Any) -> bool:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(
        _same(x, y) if isinstance(x, torch.Tensor) else bool(x == y)
        for x, y in zip(left, right, strict=True)
    )


def _same(x: torch.Tensor, y: Any) -> bool:
    """Equal in every element, where NaN equals NaN."""
    return isinstance(y, torch.Tensor) and (
        torch.equal(x, y) or (x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()))
    )


def _first_difference(
    net: nn.Module, args: Sequence[torch.Tensor], readings: dict[str, Reading]
) -> str:
    """The first neuron whose own output is not what its declaration gives for its own input."""
    work, seen = _copy(net), list[str]()
    inputs: dict[str, list[torch.Tensor]] = {}
    outputs: dict[str, list[torch.Tensor]] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, x: tuple[torch.Tensor, ...], y: Any) -> None:
            if path not in seen:
                seen.append(path)
            inputs.setdefault(path, []).append(x[0].clone())
            outputs.setdefault(path, []).append(readings[path].spikes(y).clone())

        return hook

    for path, module in work.named_modules():
        if path in readings:
            module.register_forward_hook(record(path))
    with torch.no_grad(), sources.isolated(work):
        work(*_fresh(args))
    for path in seen:
        if readings[path].cell is not None:
            continue  # its potential is not its input
        multi = readings[path].step_mode == "m"
        x = inputs[path][0] if multi else torch.stack(inputs[path])
        y = outputs[path][0] if multi else torch.stack(outputs[path])
        spikes, h, _ = readings[path].neuron.trace(x)
        wrong = (spikes != y).nonzero()
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            return (
                f"the first is {path}: {len(wrong)} of {y.numel()} spikes differ, first at step "
                f"{at[0]}, index {list(at[1:])}, where the declaration has h = {h[at].item():.6g} "
                f"({readings[path].neuron.describe()})"
            )
    return (
        "every neuron agrees on its own input, so the forward uses more of them than their spikes"
    )
