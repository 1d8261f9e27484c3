"""Neuron layers for training on a GPU: those of :mod:`spikeport.converters.neurons`, fused.

Each takes the arguments of its namesake there, and::

    backend      "torch", the declaration evaluated step by step, on any device and in any dtype;
                 "fused", one Triton kernel over all time steps; "auto", fused where it can be
    step_mode    "m": x_seq [T, N, ...] -> spikes [T, N, ...], each call from v_0;
                 "s": x [N, ...] -> spikes [N, ...], each call from where the last one ended
    keep_state   whether a multi-step call, too, goes on from where the last one ended
    store_v_seq  whether ``v_seq`` [T, N, ...] holds the membrane potentials after the last call

A state that is kept is part of the graph that gradients flow through, until :meth:`FusedNode.reset`
or :meth:`FusedNode.detach`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...converters import neurons, sources
from ...converters.errors import TargetUnavailableError, UsageError
from ...converters.neurons.layers import misfits
from ...converters.sources import Reading
from .codegen import Backward, Forward, backward_source, forward_source
from .kernels import DTYPES, Call, interpreted

Backend = Literal["torch", "fused", "auto"]


class FusedNode(neurons.Node):
    """What the layers of this module share, see there."""

    def __init__(
        self,
        *args: Any,
        backend: Backend = "auto",
        step_mode: Literal["m", "s"] = "m",
        keep_state: bool = False,
        store_v_seq: bool = False,
        **options: Any,
    ) -> None:
        for name, value, allowed in (
            ("backend", backend, ("torch", "fused", "auto")),
            ("step_mode", step_mode, ("m", "s")),
        ):
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        super().__init__(*args, **options)
        self._declaration = self._declared.to_json()
        self._names = tuple(self._declared.tensors())
        self.backend: Backend = backend
        self.step_mode = step_mode
        self.keep_state = keep_state
        self.store_v_seq = store_v_seq
        self.state: tuple[torch.Tensor, ...] | None = None
        self.v_seq: torch.Tensor | None = None

    @property
    def v(self) -> torch.Tensor | None:
        """The membrane potential [N, ...] after the last call, if it is kept."""
        return None if self.state is None else self.state[0]

    def reset(self) -> None:
        """Forget the state: the next call starts from v_0."""
        self.state = self.v_seq = None

    def detach(self) -> None:
        """Go on from the present state without a gradient into the past (truncated BPTT)."""
        if self.state is not None:
            self.state = tuple(part.detach() for part in self.state)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x_seq [T, N, ...] -> spikes [T, N, ...], or one step, as ``step_mode`` says.

        Raises:
            UsageError: The input, a parameter or a kept state does not fit.
            TargetUnavailableError: The fused backend was asked for and is not there.
        """
        if self.step_mode == "s":
            return self._run(x_seq.unsqueeze(0), keep=True).squeeze(0)
        return self._run(x_seq, keep=self.keep_state)

    def _run(self, x: torch.Tensor, keep: bool) -> torch.Tensor:
        state = self.state if keep else None
        if problems := _problems(self.tensors(), x, state):
            raise UsageError(f"{type(self).__name__}: " + "; ".join(problems))
        possible = fused_is_possible(x)
        if self.backend == "fused" and not possible:
            _refuse(x)
        if self.backend == "torch" or not possible:
            spikes, after, v_seq = self._torch(x, state, keep)
        else:
            initial = None if state is None else torch.stack([part.float() for part in state])
            spikes, last, v_seq = self.fused(x, [], initial, final=keep, v_seq=self.store_v_seq)
            after = last.unbind() if keep else ()
        if keep:
            self.state = after
        if self.store_v_seq:
            self.v_seq = v_seq
        return spikes

    def fused(
        self,
        x: torch.Tensor,
        norm: list[torch.Tensor],
        initial: torch.Tensor | None = None,
        *,
        batch_statistics: bool = False,
        final: bool = False,
        v_seq: bool = False,
        window: tuple[int, int] = (1, 1),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The operator of :mod:`.ops` with this layer's parameters."""
        from . import ops  # which a torch of before custom operators cannot import

        params = [*self.tensors().values()]
        inputs = [x, *norm, *params, *([] if initial is None else [initial])]
        checkpoints = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        spikes, last, v, _ = ops.run(
            x,
            norm,
            params,
            initial,
            self._declaration,
            self.surrogate.to_json(),
            self.detach_reset,
            batch_statistics,
            final,
            v_seq,
            checkpoints,
            window,
        )
        return spikes, last, v

    def _torch(
        self, x_seq: torch.Tensor, state: tuple[torch.Tensor, ...] | None, keep: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        neuron = self.neuron
        if not x_seq.shape[0]:
            last = neuron.initial(x_seq.new_empty(x_seq.shape[1:])) if state is None else state
            return torch.empty_like(x_seq), last, torch.empty_like(x_seq)
        if not (torch.is_grad_enabled() or self.store_v_seq):
            spikes, h, last = neuron.trace(x_seq, state, charged=False)
            return spikes, last, h
        first = 0 if state is None else 1
        state = neuron.initial(x_seq[0]) if state is None else state
        spikes_seq, v_seq = [], []
        for t, x in enumerate(x_seq):
            s, state, _ = neuron.train_step(state, x, self.surrogate, self.detach_reset, first + t)
            spikes_seq.append(s)
            v_seq.append(state[0])
        return torch.stack(spikes_seq), state, torch.stack(v_seq)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters that are tensors, by name, in the kernels' order."""
        return {name: getattr(self, name) for name in self._names}

    def __getstate__(self) -> dict[str, Any]:
        # A state inside a graph can neither be copied nor pickled; its values can.
        content = dict(self.__dict__)
        if self.state is not None:
            content["state"] = tuple(part.detach() for part in self.state)
        if self.v_seq is not None:
            content["v_seq"] = self.v_seq.detach()
        return content

    def _apply(self, fn: Any, *recurse: Any) -> Any:  # an older torch has no "recurse"
        if self.state is not None:
            self.state = tuple(fn(part) for part in self.state)
        return super()._apply(fn, *recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The declaration in one line, and how it is run."""
        return f"{super().extra_repr()}, backend={self.backend}, step_mode={self.step_mode}"


class Node(FusedNode):
    """A layer of neurons of any declared kind; arguments as in ``neurons.Node``."""


class IFNode(FusedNode, neurons.IFNode):
    """Integrate-and-fire neurons."""


class LIFNode(FusedNode, neurons.LIFNode):
    """Leaky integrate-and-fire neurons; arguments as in ``neurons.LIFNode``."""


class ParametricLIFNode(FusedNode, neurons.ParametricLIFNode):
    """LIF neurons with a learned time constant; arguments as in ``neurons.ParametricLIFNode``."""


def _read(module: nn.Module) -> Reading:
    assert isinstance(module, FusedNode)
    return Reading(module.neuron, "s" if module.step_mode == "s" else "m")


for _kind in (Node, IFNode, LIFNode, ParametricLIFNode):
    sources.register(_kind, _read)


def _problems(
    tensors: dict[str, torch.Tensor], x: torch.Tensor, state: tuple[torch.Tensor, ...] | None
) -> list[str]:
    """Why a layer cannot run on x [T, N, ...]."""
    found = misfits(tensors, x)
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            found.append(f"{name} is on {tensor.device}, the input on {x.device}; move one")
    for part in state or ():
        if part.shape != x.shape[1:] or part.device != x.device:
            found.append(
                f"the kept state is {list(part.shape)} on {part.device}, the input "
                f"{list(x.shape[1:])} on {x.device}; call reset() between sequences"
            )
            break
    return found


def fused_is_possible(x: torch.Tensor) -> bool:
    """Whether x can go through a fused kernel: where it lies, and its dtype."""
    return (x.is_cuda or interpreted()) and x.dtype in DTYPES


def _refuse(x: torch.Tensor) -> None:
    """Say why x cannot go through a fused kernel."""
    if x.dtype not in DTYPES:
        raise UsageError(
            f"a fused neuron layer takes {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, "
            f"not {str(x.dtype).removeprefix('torch.')}; cast the input, or use backend='torch'"
        )
    raise TargetUnavailableError(
        f"backend='fused' runs on a CUDA GPU, and the input is on {x.device}; move the network and its "
        "input to one, use backend='auto', which takes torch here, or for a test of the kernels set "
        "TRITON_INTERPRET=1 before Python starts"
    )


@dataclass(frozen=True)
class Kernel:
    """The kernels that a layer runs for one input.

    Attributes:
        forward: Source of the forward kernel.
        backward: Source of the backward kernel.
    """

    forward: str
    backward: str

    @property
    def source(self) -> str:
        """Both sources."""
        return f"{self.forward}\n\n{self.backward}"


def kernel(node: neurons.Node, x_seq: torch.Tensor) -> Kernel:
    """The kernels that a layer runs in training on x_seq [T, N, ...], as text."""
    neuron = node.neuron
    tensors = neuron.tensors()
    asked = ([*tensors.values()], neuron.to_json(), node.surrogate.to_json(), node.detach_reset)
    ahead, back = (Call.of(x_seq, [], *asked, backward=b) for b in (False, True))
    wrt = tuple(n for n, t in tensors.items() if t.requires_grad)
    return Kernel(
        forward_source(ahead.spec, Forward(checkpoints=ahead.spec.loop)),
        backward_source(back.spec, Backward(wrt=wrt)),
    )
