"""Networks are read, rewritten and verified on the CPU, wherever they were trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from . import sources
from .errors import CaptureError, Finding

_HEADLINE = "the network cannot be read:"


def on_host(net: nn.Module, args: Sequence[torch.Tensor] = ()) -> tuple[nn.Module, Any]:
    """A network and its inputs on the CPU: copies of what lies elsewhere, all else itself.

    Of a wrapper for several devices or processes, or of ``torch.compile``, it is what is wrapped, inside
    the network too: a compiled neuron could not be found.

    Raises:
        CaptureError: With every tensor that has no values, or the network cannot be copied.
    """
    while (wrapped := _wrapped(net)) is not None:
        net = wrapped
    held = [*_held(net)]
    findings = [_lazy(path, name) for path, name, value in held if is_lazy(value)]
    held = [(path, name, value) for path, name, value in held if not is_lazy(value)]
    findings += [_on_meta(path, name) for path, name, value in held if value.is_meta]
    findings += [_on_meta("", f"input {i}") for i, x in enumerate(args) if x.is_meta]
    if findings:
        raise CaptureError(_HEADLINE, findings)
    elsewhere: dict[int, Any] = {
        id(value): _moved(value) for *_, value in held if value.device.type != "cpu"
    }
    inside = {id(m): _wrapped(m) for m in net.modules() if m is not net}
    unwrapped = {key: module for key, module in inside.items() if module is not None}
    if elsewhere or unwrapped:
        # What a wrapper holds may be wrapped itself; the outermost is met first.
        for key, module in [*unwrapped.items()][::-1]:
            while (inner := _wrapped(module)) is not None:
                module = inner
            elsewhere[key] = sources.copied(module, elsewhere)
        try:
            net = sources.copied(net, elsewhere)
        except Exception as error:
            raise CaptureError(_HEADLINE, [sources.not_copied(error)]) from error
    return net, tuple(x.cpu() for x in args)


def _wrapped(net: nn.Module) -> nn.Module | None:
    if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return net.get_submodule("module")
    # By name, since torch._dynamo takes a second to import.
    return net.get_submodule("_orig_mod") if type(net).__name__ == "OptimizedModule" else None


def _moved(value: torch.Tensor) -> torch.Tensor:
    moved = value.detach().cpu()
    learned = isinstance(value, nn.Parameter)
    return nn.Parameter(moved, requires_grad=value.requires_grad) if learned else moved


def _held(net: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Module path, name and value of each tensor that the network's modules hold, states among them."""
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        yield name.rpartition(".")[0], name, value
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for part in pytree.tree_flatten(value)[0]:
                    if isinstance(part, torch.Tensor):
                        yield path, f"{path}.{name}".lstrip("."), part


def _lazy(path: str, name: str) -> Finding:
    return _no_values(
        path,
        f"{name} of a lazy module, which no input has given its shape",
        "call the network once on an example, and load its checkpoint",
    )


def _on_meta(path: str, name: str) -> Finding:
    return _no_values(
        path,
        f"{name} is on the meta device, where tensors have no values",
        "make the network on the CPU or a GPU and load its checkpoint",
    )


def _no_values(where: str, found: str, fix: str) -> Finding:
    return Finding("no-values", where, found, "tensors with values", fix)
