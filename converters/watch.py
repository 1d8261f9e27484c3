"""A network's own run, watched for everything that would make a graph of it say something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import sources
from .attributes import Parts, Snapshot, changes, differing, equal, hidden, modules, snapshot
from .errors import CaptureError, Finding, SpikeportError
from .exported import HEADLINE, place
from .sources import Memory, Reading


@dataclass
class Watched:
    """What was seen of a network while it ran.

    Attributes:
        outputs: Its outputs.
        findings: What stops the capture.
        readings: Its neurons, by path.
        calls: How often each was called.
        memories: Names of the attributes of each that changed.
        handed: Those that were handed their state by the network.
        kept: Its other layers with a state, by path.
        known: Paths of all modules that a source has something to say about.
        written: Names of the attributes that it wrote on other modules, by path.
        after: All modules' attributes after the call, if it came to its end.
    """

    outputs: Any = None
    findings: list[Finding] = field(default_factory=list)
    readings: dict[str, Reading] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    memories: dict[str, set[str]] = field(default_factory=dict)
    handed: set[str] = field(default_factory=set)
    kept: dict[str, Memory] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    written: dict[str, set[str]] = field(default_factory=dict)
    after: Snapshot = field(default_factory=dict)


def watch(net: nn.Module, args: tuple[torch.Tensor, ...]) -> Watched:
    """Run a copy of the network once, or twice, and look at all that it does."""
    seen = Watched()
    seen.findings += _held_by_functions(net)
    if seen.findings:
        return seen
    work = evaluation_copy(net)
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
    for path, module, contained in hidden(work):
        # A plain object may hold an activation, or weights, which trace as they are.
        if contained or [*sources.read_all(module)]:
            module.register_forward_pre_hook(_tell_hidden(path, seen))
            ids |= {id(m) for m in module.modules()}
    before, inputs = snapshot(work), copies(args)
    try:
        with undisturbed(work):
            seen.outputs = work(*inputs)
    except Exception as error:
        seen.findings.append(_failed(error, args))
        return seen
    seen.findings += [
        _written(i) for i, (a, b) in enumerate(zip(args, inputs, strict=True)) if not equal(a, b)
    ]
    seen.after = snapshot(work)
    seen.known = {path for path, module in modules(work) if id(module) in ids}
    # What was not there before the first call is nothing that a call starts from.
    starts: dict[str, set[str]] = {}
    for path, names in changes(before, seen.after).items():
        if path in seen.readings:
            seen.memories[path] = names
            starts[path] = names & before[path].keys()
        elif path not in seen.known:
            seen.written[path] = names
    stateful: dict[str, Reading | Memory] = {**seen.readings, **seen.kept}
    again = {
        path: seen.calls[path]
        for path, reading in seen.readings.items()
        if reading.step_mode == "m" and seen.calls.get(path, 0) > 1 and starts.get(path)
    }
    once = [
        path
        for path, reading in stateful.items()
        if reading.step_mode == "s" and seen.calls.get(path) == 1 and path not in seen.handed
    ]
    if once and not seen.findings:
        restarted = _restarted(work, args, before, seen)
        seen.findings += [_outer_loop(path) for path in once if path not in restarted]
    if again and not seen.findings:
        sources.reset(work)
        restarted = _restarted(work, args, before, seen)
        seen.findings += [_called_again(p, n) for p, n in again.items() if p not in restarted]
    return seen


def _restarted(
    work: nn.Module,
    args: Sequence[torch.Tensor],
    before: Snapshot,
    seen: Watched,
) -> set[str]:
    """Neurons that are as at the start whenever another run of the forward calls them."""
    found, moved = set[str](), set[str]()

    def look(path: str, names: set[str]) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            now = snapshot(module)[""]
            started = names and not any(_moved(before[path].get(n), now.get(n)) for n in names)
            (found if started else moved).add(path)

        return hook

    for path, module in work.named_modules():
        if path in seen.readings:
            names = seen.memories.get(path, set())
            states = seen.readings[path].states
            module.register_forward_pre_hook(look(path, names & states.keys() if states else names))
    with undisturbed(work):
        work(*copies(args))
    return found - moved


def _moved(start: Parts | None, now: Parts | None) -> bool:
    """Whether a state is another than at the start, where zeros of any shape are alike."""
    if start is None or now is None:
        return start is not now
    a, b = start[""], now[""]
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return bool(b.any()) if tensors and not a.any() else bool(differing(start, now))


def _held_by_functions(net: nn.Module) -> list[Finding]:
    """Methods that were replaced by functions which hold modules: a copy would call the originals."""
    found = []
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if not isinstance(value, FunctionType) or not hasattr(type(module), name):
                continue
            used = [c.cell_contents for c in value.__closure__ or ()]
            used += [value.__globals__.get(n) for n in value.__code__.co_names]
            if any(isinstance(getattr(u, "__self__", u), nn.Module) for u in used):
                found.append(
                    Finding(
                        rule="altered-module",
                        where=path,
                        found=f"its {name} is a function that holds modules of its own, which no copy "
                        "of the network replaces",
                        allowed="methods of the class, which reach modules through self",
                        fix=f"write {name} in a subclass, or bind it with types.MethodType",
                    )
                )
    return found


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


def _count(path: str, reading: Reading, seen: Watched) -> Callable[..., None]:
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


def _tally(path: str, seen: Watched) -> Callable[..., None]:
    """A hook that counts a layer's calls."""

    def hook(*_: Any) -> None:
        seen.calls[path] = seen.calls.get(path, 0) + 1

    return hook


def _tell_hidden(path: str, seen: Watched) -> Callable[..., None]:
    def hook(module: nn.Module, _: Any) -> None:
        if not any(f.rule == "hidden-module" and f.where == path for f in seen.findings):
            seen.findings.append(
                Finding(
                    rule="hidden-module",
                    where=path,
                    found=f"a {type(module).__name__} in a plain Python container or object, which eval(), "
                    "state_dict() and this capture do not see",
                    allowed="registered modules",
                    fix="use nn.ModuleList or nn.ModuleDict",
                )
            )

    return hook


def _failed(error: Exception, args: Sequence[torch.Tensor]) -> Finding:
    own = isinstance(error, SpikeportError)
    return Finding(
        rule="forward-fails",
        where="",
        found=str(error) if own else f"{type(error).__name__}: {error} ({place(error)})",
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


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """While a network runs for its outputs: as it is exported, without gradients.

    torch's fast path through attention layers, which rounds otherwise, is not exported. Random numbers
    are the same in each run: where they matter the graph shows it.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sources.isolated(net), torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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


def _called_again(path: str, calls: int) -> Finding:
    return Finding(
        rule="neuron-called-again",
        where=path,
        found=f"a multi-step layer that the forward calls {calls} times: what one call leaves of its "
        "membrane the next one starts from",
        allowed="one call of [T, N, ...] for each layer of neurons, or a reset before each",
        fix="give each place in the network neurons of its own (two calls of one layer share a "
        "membrane, which is seldom meant), call it once with all time steps (without "
        "chunk_multi_step_forward), or reset it before each call",
    )


def evaluation_copy(net: nn.Module) -> nn.Module:
    """A copy in eval mode, its states reset and its parametrizations computed."""
    try:
        work = sources.copied(net)
    except Exception as error:
        raise CaptureError(HEADLINE, [sources.not_copied(error)]) from error
    work.eval()
    for module in list(work.modules()):
        if parametrize.is_parametrized(module):
            _compute_parametrizations(module)
        _compute_by_hooks(module)
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


def _compute_by_hooks(module: nn.Module) -> None:
    """The same for weights that a hook computes before each call."""
    for hook in [*module._forward_pre_hooks.values()]:
        if isinstance(hook, WeightNorm):
            nn.utils.remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            nn.utils.remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]


def copies(args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The inputs, copied: a forward may write to them."""
    return tuple(a.detach().clone() for a in args)
