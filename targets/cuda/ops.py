"""The fused neuron layer as an operator of torch, with its derivative.

``spikeport::fused_neuron`` runs a layer of neurons over all time steps, with the batch norm before it if
there is one, and ``spikeport::fused_neuron_backward`` its derivatives. The state and all arithmetic are
float32 whatever the dtype of x.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, List  # noqa: UP035

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from ...converters.equations import named
from ...converters.errors import TargetUnavailableError
from .codegen import NORM, Backward, Forward
from .kernels import Call, Layout, chunk, layout, memory_for
from .kernels import backward as run_backward
from .kernels import forward as run_forward

if not hasattr(torch.library, "custom_op"):
    raise TargetUnavailableError(
        f"fused neurons need torch 2.6 or later, and this is torch {torch.__version__}"
    )


@cache
def _states(neuron: str) -> int:
    return 1 + len(named(json.loads(neuron)["dynamics"]).states)


def _scaled(norm: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Mean, scale and shift of a batch norm given as mean, 1 / std, weight, bias; [] for none."""
    if not norm:
        return []
    mean, rstd, weight, bias = norm
    return [mean, rstd * weight, bias.float()]


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0)


def fused_neuron(
    x: torch.Tensor,
    norm: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    initial: torch.Tensor | None,
    neuron: str,
    surrogate: str,
    detach_reset: bool,
    batch_statistics: bool,
    final: bool,
    v_seq: bool,
    checkpoints: bool,
    window: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer of neurons over T steps.

    Args:
        x: Input [T, N, ...].
        norm: Empty, or mean, 1 / standard deviation, weight and bias, [C] each, of a batch norm that x
            still has to go through.
        params: The neuron's tensors.
        initial: State [states, N, ...] before the first step; None for the declared one.
        neuron: ``Neuron.to_json()``.
        surrogate: ``Surrogate.to_json()``.
        detach_reset: Whether the reset passes no gradient.
        batch_statistics: Whether mean and deviation are those of x, and pass gradients as such.
        final: Whether the last state is wanted.
        v_seq: Whether v after each step is wanted.
        checkpoints: Whether a backward pass will come.
        window: Height and width of the windows of a max pooling that the spikes go through; (1, 1) for
            none. ``kernels.pools`` says where that is possible.

    Returns:
        Spikes [T, N, ...] in the dtype of x; state [states, N, ...] in float32; v [T, N, ...] in the
        dtype of x; what the backward pass starts its chunks from. What was not asked for is empty.
    """
    height, width = window
    call = Call.of(x, _scaled(norm), params, neuron, surrogate, detach_reset, (height, width))
    return forward(call, initial, final, "v" if v_seq else "", checkpoints)


def forward(
    call: Call, initial: torch.Tensor | None, final: bool, sequence: str, checkpoints: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`fused_neuron` returns, with any part of the state in the place of v, by its name."""
    x, lay, states = call.x, call.lay, _states(call.spec.neuron)
    spikes = call.out.empty(x)
    values = lay.empty(x) if sequence else _nothing(x)
    last = lay.state(x, states) if final else _nothing(x)
    keep = checkpoints and call.spec.loop
    shape = _kept(lay, states, checkpoints)
    with memory_for(shape, torch.float32, x.device):
        kept = x.new_empty(shape, dtype=torch.float32)
    asked = Forward(initial is not None, final, sequence, keep)
    tensors = [spikes]
    tensors += [values] if sequence else []
    tensors += [lay.align_state(initial)] if initial is not None else []
    tensors += [last] if final else []
    tensors += [kept] if keep else []
    if x.numel():
        run_forward(call, asked, tensors)
    elif final and initial is not None:
        last.copy_(initial)
    return spikes, last, values, kept


_forward_op = torch.library.custom_op("spikeport::fused_neuron", mutates_args=())(fused_neuron)


@_forward_op.register_fake
def _(
    x: torch.Tensor,
    norm: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    initial: torch.Tensor | None,
    neuron: str,
    surrogate: str,
    detach_reset: bool,
    batch_statistics: bool,
    final: bool,
    v_seq: bool,
    checkpoints: bool,
    window: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, lay = layout(x)
    states = _states(neuron)
    height, width = window
    out = lay.windows((height, width))
    spikes = torch.empty_strided(out.shape, out.strides, dtype=x.dtype, device=x.device)
    shape = (states, *x.shape[1:])
    last = torch.empty_strided(
        shape, (lay.N, *lay.strides[1:]), dtype=torch.float32, device=x.device
    )
    return (
        spikes,
        last if final else _nothing(x),
        torch.empty_strided(x.shape, lay.strides, dtype=x.dtype, device=x.device)
        if v_seq
        else _nothing(x),
        x.new_empty(_kept(lay, states, checkpoints), dtype=torch.float32),
    )


def _kept(lay: Layout, states: int, checkpoints: bool) -> tuple[int, int, int]:
    """The shape of the states that the backward pass starts its chunks from, but the first chunk."""
    chunks = max(lay.T - 1, 0) // chunk(lay.T)
    return (chunks if checkpoints else 0, states, lay.N)


def fused_neuron_backward(
    x: torch.Tensor,
    norm: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    initial: torch.Tensor | None,
    checkpoints: torch.Tensor,
    g_spikes: torch.Tensor,
    g_final: torch.Tensor | None,
    g_v_seq: torch.Tensor | None,
    neuron: str,
    surrogate: str,
    detach_reset: bool,
    batch_statistics: bool,
    window: Sequence[int],
    wrt: Sequence[bool],
) -> List[torch.Tensor]:  # noqa: UP006 -- torch 2.6 knows no other name of it
    """Derivatives of :func:`fused_neuron`.

    ``wrt`` says for each of ``params`` whether its gradient is wanted. Returns the gradients of x, of
    initial (empty without one), of the norm's weight and bias if there is one, and of those params.
    """
    height, width = window
    how = (neuron, surrogate, detach_reset, (height, width))
    call = Call.of(x, _scaled(norm), params, *how, backward=True)
    lay = call.lay
    g_initial = lay.state(x, _states(neuron)) if initial is not None else _nothing(x)
    g_x = lay.empty(x)
    own = call.plan.names[len(NORM) if norm else 0 :]
    wanted = [n for n, w in zip(own, wrt, strict=True) if w]
    if not x.numel():
        zeros = [torch.zeros_like(p) for p, w in zip(params, wrt, strict=True) if w]
        return [g_x, g_initial.zero_(), *(torch.zeros_like(n) for n in norm[2:]), *zeros]
    given = [call.out.align(g_spikes)]
    given += [lay.align(g_v_seq)] if g_v_seq is not None else []
    given += [lay.align_state(g_final)] if g_final is not None else []
    given += [lay.align_state(initial)] if initial is not None else []
    given += [checkpoints] if call.spec.loop else []
    into_initial = [g_initial] if initial is not None else []
    flags = (initial is not None, g_final is not None, g_v_seq is not None)
    if not norm:
        sums = [_sums(call, n) for n in wanted]
        run_backward(call, Backward(*flags, "x", (*wanted,)), [*given, g_x, *into_initial, *sums])
        return [g_x, g_initial, *_totals(call, wanted, sums, params)]

    _, rstd, weight, bias = norm
    if not batch_statistics:
        wanted = ["norm_scale", "norm_shift", *wanted]
        sums = [_sums(call, n) for n in wanted]
        run_backward(call, Backward(*flags, "x", (*wanted,)), [*given, g_x, *into_initial, *sums])
        scale, shift, *rest = _totals(call, wanted, sums, params)
        return [g_x, g_initial, (scale * rstd).to(weight), shift.to(bias), *rest]
    # Ioffe and Szegedy 2015, arXiv:1502.03167: what the mean and the variance pass on needs sums over
    # all of a channel first. The recursion runs twice, which moves less than writing its result would.
    wanted = ["norm_scale", "norm_shift", *wanted]
    sums = [_sums(call, n) for n in wanted]
    run_backward(call, Backward(*flags, None, (*wanted,)), [*given, *into_initial, *sums])
    scale, shift, *rest = _totals(call, wanted, sums, params)
    count = lay.T * lay.N // lay.shape[2]
    minus = rstd * weight * shift / count
    slope = rstd * weight * scale * rstd.square() / count
    run_backward(call, Backward(*flags, "norm", ()), [*given, g_x, *into_initial, minus, slope])
    return [g_x, g_initial, (scale * rstd).to(weight), shift.to(bias), *rest]


def _sums(call: Call, name: str) -> torch.Tensor:
    """Where the kernel leaves a parameter's gradient, see ``codegen._store_parameter``."""
    kind, grid = dict(call.spec.reads)[name], call.plan.tile.grid
    if kind == "element":
        return call.x.new_empty(call.out.N, dtype=torch.float32)
    if kind == "scalar":
        return call.x.new_empty(grid, dtype=torch.float32)
    return call.x.new_empty((grid[0], call.plan.tile.sizes[1]), dtype=torch.float32)


def _totals(
    call: Call, names: Sequence[str], sums: Sequence[torch.Tensor], params: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The parameters' gradients in their own shapes; of the norm's parameters, [C]."""
    kinds, own = dict(call.spec.reads), call.plan.names[-len(params) :] if params else ()
    shapes = dict(zip(own, params, strict=True))
    totals = []
    for name, part in zip(names, sums, strict=True):
        like = shapes.get(name)
        if kinds[name] == "channel":
            total = part.sum(0)
            total = total if like is None else total.reshape(like.shape)
        elif kinds[name] == "scalar":
            total = part.sum().reshape(like.shape if like is not None else (1,))
        else:
            assert like is not None
            total = part.as_strided(call.out.shape[1:], call.out.strides[1:]).sum_to_size(
                like.shape
            )
        totals.append(total if like is None else total.to(like.dtype))
    return totals


_backward_op = torch.library.custom_op("spikeport::fused_neuron_backward", mutates_args=())(
    fused_neuron_backward
)


@_backward_op.register_fake
def _(
    x: torch.Tensor,
    norm: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    initial: torch.Tensor | None,
    checkpoints: torch.Tensor,
    g_spikes: torch.Tensor,
    g_final: torch.Tensor | None,
    g_v_seq: torch.Tensor | None,
    neuron: str,
    surrogate: str,
    detach_reset: bool,
    batch_statistics: bool,
    window: Sequence[int],
    wrt: Sequence[bool],
) -> list[torch.Tensor]:
    _, lay = layout(x)
    g_x = torch.empty_strided(x.shape, lay.strides, dtype=x.dtype, device=x.device)
    g_initial = x.new_empty(0)
    if initial is not None:
        strides = (lay.N, *lay.strides[1:])
        g_initial = torch.empty_strided(
            initial.shape, strides, dtype=torch.float32, device=x.device
        )
    wanted = [torch.empty_like(p) for p, w in zip(params, wrt, strict=True) if w]
    return [g_x, g_initial, *(torch.empty_like(n) for n in norm[2:]), *wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, norm, params, initial, *options = inputs
    _keep(ctx, x, norm, params, initial, options, output)
    ctx.run = torch.ops.spikeport.fused_neuron_backward


def _keep(
    ctx: Any,
    x: torch.Tensor,
    norm: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    initial: torch.Tensor | None,
    options: Sequence[Any],
    output: tuple[torch.Tensor, ...],
) -> None:
    """What the backward pass needs."""
    neuron, surrogate, detach_reset, batch_statistics, final, v_seq, _, window = options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[3], *norm, *params, *([] if initial is None else [initial]))
    ctx.counts, ctx.initial = (len(norm), len(params)), initial is not None
    ctx.options = (neuron, surrogate, detach_reset, batch_statistics, window)
    ctx.wrt = [p.requires_grad for p in params]
    ctx.final, ctx.v_seq, ctx.spikes = final, v_seq, output[0].shape


def _gradients(
    ctx: Any,
    g_spikes: torch.Tensor | None,
    g_final: torch.Tensor | None,
    g_v_seq: torch.Tensor | None,
) -> tuple[torch.Tensor, list[Any], list[Any], torch.Tensor | None]:
    """Of x, the norm's tensors, the parameters and the initial state."""
    x, checkpoints, *rest = ctx.saved_tensors
    a, b = ctx.counts
    norm, params = rest[:a], rest[a : a + b]
    initial = rest[-1] if ctx.initial else None
    if g_spikes is None:
        g_spikes = x.new_zeros(ctx.spikes)
    g_x, g_initial, *rest = ctx.run(
        x,
        norm,
        params,
        initial,
        checkpoints,
        g_spikes,
        g_final if ctx.final else None,
        g_v_seq if ctx.v_seq else None,
        *ctx.options,
        ctx.wrt,
    )
    found = iter(rest)
    into_norm = [None, None, next(found), next(found)] if norm else []
    g_params = [next(found) if w else None for w in ctx.wrt]
    return g_x, into_norm, g_params, g_initial if ctx.initial else None


def _backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
    return *_gradients(ctx, *gradients[:3]), *[None] * 8


_forward_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The operator where nothing is traced: several times less work for Python than an operator's."""

    @staticmethod
    def forward(
        ctx: Any, options: Sequence[Any], norms: int, x: Any, initial: Any, *tensors: Any
    ) -> Any:
        norm, params = tensors[:norms], tensors[norms:]
        output = fused_neuron(x, norm, params, initial, *options)
        _keep(ctx, x, norm, params, initial, options, output)
        ctx.run = fused_neuron_backward
        ctx.mark_non_differentiable(output[3])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        g_x, into_norm, g_params, g_initial = _gradients(ctx, *gradients[:3])
        return None, None, g_x, g_initial, *into_norm, *g_params


def run(
    x: torch.Tensor,
    norm: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    initial: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`fused_neuron` with its derivative: the operator where it is traced, else without one."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        traced: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
        traced = torch.ops.spikeport.fused_neuron(x, norm, params, initial, *options)
        return traced
    if not torch.is_grad_enabled():
        return fused_neuron(x, norm, params, initial, *options)
    eager: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    apply: Any = _Eager.apply
    eager = apply(options, len(norm), x, initial, *norm, *params)
    return eager
