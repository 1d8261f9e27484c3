"""From an ``nn.Module`` to a :class:`Program`.

The network itself is run first, on a copy, and watched: everything that would make a graph of it say
something else is found there. Then every neuron of a fresh copy is replaced by a stand-in that calls
one operator, and ``torch.export`` traces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from . import sources
from .attributes import equal
from .canonical import moves_in_memory, to_program
from .errors import CaptureError, Finding, MismatchError, UsageError
from .exported import HEADLINE, export
from .program import Program
from .sources import Reading
from .stand_in import State, StateAccessError, wrap
from .survival import Tried, forgetting, surviving, try_out
from .watch import Watched, copies, evaluation_copy, undisturbed, watch


def capture(net: nn.Module, args: Sequence[torch.Tensor]) -> Program:
    """The network as a program, for inputs of these shapes, in eval mode.

    The captured program is run against the network itself, whose outputs it must equal bit for bit.

    Args:
        net: The network; it is copied, and left as it is.
        args: Example inputs, tensors.

    Raises:
        UsageError: The network is no module, the example inputs are no tensors, or torch is too old.
        CaptureError: With everything that stops the capture.
        MismatchError: The program computes something else than the network.
    """
    if not hasattr(torch.library, "custom_op"):
        raise UsageError(
            f"conversion needs torch 2.6 or later, and this is torch {torch.__version__}; convert on "
            "another machine: training, artifacts (compare with --layers 0) and bundles run beside an "
            "old SDK"
        )
    if not isinstance(net, nn.Module):
        raise UsageError(f"the network is {type(net).__name__}; give an nn.Module")
    scripted = [n for n, m in net.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UsageError(
            f"the network{' at ' + ', '.join(scripted) if scripted[0] else ''} is a ScriptModule, in which "
            "neurons cannot be found; give the nn.Module that it was made of"
        )
    given: Any = args
    kinds = [type(given).__name__] if isinstance(given, torch.Tensor) else []
    kinds += [type(a).__name__ for a in args if not isinstance(a, torch.Tensor)]
    if kinds or not len(args):
        raise UsageError(
            f"the example inputs are {', '.join(kinds) or 'nothing'}; give a tuple of tensors"
        )
    args = tuple(args)
    watched = watch(net, args)
    findings, tried = watched.findings, Tried()
    if watched.after:
        tried = try_out(net, args, watched)
        findings += tried.findings
    if findings:
        raise CaptureError(HEADLINE, findings)
    state = State()
    work = _traceable(net, watched, state)
    first = _outputs(work, args, state)
    # What that call has cached would be taken for a constant: a fresh copy is exported.
    fresh = _traceable(net, watched, state)
    forgetting(fresh, tried.written)
    state.clear()
    with undisturbed(fresh):
        exported = export(fresh, copies(args))
    program = to_program(exported, net, args)
    if not _repeats(first, work, args, state):
        raise CaptureError(HEADLINE, [surviving()])
    runs = [(args, first)]
    _check_declared(net, args, watched, watched.outputs, first)
    for given, expected in tried.lively:
        runs.append((given, _outputs(work, given, state)))
        _check_declared(net, given, watched, expected, runs[-1][1])
    if moves_in_memory(exported):
        # Torch may round otherwise for values that lie otherwise in memory; where it does, copies matter.
        with suppress(CaptureError):
            exact = to_program(exported, net, args, layouts=True)
            if not all(equal(_drives(program, x), _drives(exact, x)) for x, _ in runs):
                program = exact
    if not all(equal(outputs, program(*inputs)) for inputs, outputs in runs):
        raise MismatchError(
            "the exported graph gives other outputs than the network: its forward depends on "
            "something besides its inputs, such as time or a global"
        )
    return program


def _repeats(first: Any, net: nn.Module, args: Sequence[torch.Tensor], state: State) -> bool:
    """Whether the network's outputs are the same after the trace."""
    try:
        return equal(first, _outputs(net, args, state))
    except CaptureError:
        raise
    except Exception:
        # The trace has left a tensor without values where the network finds it again.
        return False


def _check_declared(
    net: nn.Module, args: Sequence[torch.Tensor], watched: Watched, own: Any, declared: Any
) -> None:
    """Hold the declared neurons' outputs against the network's own."""
    if not equal(own, declared):
        with undisturbed(fresh := evaluation_copy(net)):
            again = fresh(*copies(args))
        if not watched.calls or not equal(own, again):
            raise CaptureError(HEADLINE, [surviving()])
        raise MismatchError(
            "the declared neurons give other outputs than the network's own; "
            + _first_difference(net, args, watched.readings)
        )


def _drives(program: Program, inputs: Sequence[torch.Tensor]) -> list[Any]:
    """The inputs of every layer of neurons, and the outputs."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for s in program.sites for name in s.drives}
    outputs = program.run(inputs, observe=lambda n, x: seen.get(n.name, []).append(x))
    return [[seen[name] for name in site.drives] for site in program.sites] + outputs


def _traceable(net: nn.Module, watched: Watched, state: State) -> nn.Module:
    work = evaluation_copy(net)
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


def _outputs(net: nn.Module, args: Sequence[torch.Tensor], state: State) -> Any:
    state.clear()
    try:
        with undisturbed(net):
            return net(*copies(args))
    except StateAccessError as error:
        raise CaptureError(HEADLINE, [_touched(error)]) from error


def _touched(error: StateAccessError) -> Finding:
    return Finding(
        rule="neuron-state",
        where=error.path,
        found=error.did,
        allowed=error.allowed,
        fix=error.fix,
    )


def _first_difference(
    net: nn.Module, args: Sequence[torch.Tensor], readings: dict[str, Reading]
) -> str:
    """The first neuron whose own output is not what its declaration gives for its own input."""
    work, seen = evaluation_copy(net), list[str]()
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
    with undisturbed(work):
        work(*copies(args))
    for path in seen:
        if readings[path].cell is not None:
            continue  # its potential is not its input
        multi = readings[path].step_mode == "m"
        if not multi and len({x.shape for x in inputs[path]}) > 1:
            continue  # each shape has a state of its own
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
