"""Which dimension of a program's inputs and outputs is the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils import _pytree as pytree

from ..converters.program import Program, TensorSpec

#: Inputs on which the order shows: the example's, and noise of these scales.
_SCALES = (1.0, 4.0, 16.0, 64.0)
#: Share of the values of an output that rounding may change where samples change places.
_ROUNDED = 0.01

Dims = list[int | None]


def batch_dims(program: Program) -> tuple[Dims, Dims]:
    """The dimension of each input and of each output; None where there is none, or it cannot be told.

    It follows from the sizes. Where these leave a choice, the program is run on the samples in another
    order: along the batch the outputs then have that order too.
    """
    given = [_by_size(program, spec) for spec in program.inputs]
    found = [_by_size(program, spec) for spec in program.outputs]
    inputs = [_only(dims) for dims in given]
    clear = [_is_clear(program, *pair) for pair in zip(program.outputs, found, strict=True)]
    told = all(len(dims) < 2 for dims in given)
    if (program.sites and told and all(clear)) or program.batch == 1:
        return inputs, [*map(_only, found)]
    if not told:  # as many steps as samples: time first, or else the batch
        clear = [False] * len(clear)
    for choice in (-1,) if told else (-1, 0):
        tried = [dims[choice] if dims else None for dims in given]
        moved = _moved(program, tried)
        seen = [[d for d in dims if d in moves] for dims, moves in zip(found, moved, strict=True)]
        if any(seen):
            inputs = tried
            break
    else:
        if not program.sites:  # the first dimension may be anything then
            inputs = [None] * len(inputs)
            clear = [False] * len(clear)
    pairs = zip(found, seen, clear, strict=True)
    return inputs, [_only(dims if sure else moves) for dims, moves, sure in pairs]


def by_size(program: Program, spec: TensorSpec) -> int | None:
    """The dimension that the sizes alone tell, of spikes and states: time, folded, comes first there."""
    dims = _by_size(program, spec)
    dims = [d for d in dims if d > 0] if spec.folded else dims
    if not dims:  # some layers put their channels before the samples
        dims = [d for d, size in enumerate(spec.shape) if size == program.batch and d > 0]
    return _only(dims) if _is_clear(program, spec, dims) else None


def _only(dims: Sequence[int]) -> int | None:
    return dims[0] if len(dims) == 1 else None


def _by_size(program: Program, spec: TensorSpec) -> list[int]:
    leading = spec.shape[: 2 if program.stepping is None else 1]
    return [d for d, size in enumerate(leading) if size == program.batch]


def _is_clear(program: Program, spec: TensorSpec, dims: Sequence[int]) -> bool:
    """Whether [N, ...] or [T, N, ...] is all that the sizes can mean."""
    T = program.T if program.stepping is None else None
    return len(dims) < 2 and (spec.folded or dims != [1] or spec.shape[0] == T)


def _moved(program: Program, dims: Dims) -> list[set[int]]:
    """Along which dimensions each output follows when the inputs' samples are moved on by one."""
    captured = program.captured
    if captured is None or not program.examples:
        return [set() for _ in program.outputs]
    found = [{0, 1} for _ in program.outputs]
    for example in _inputs(program.examples[0]):
        rolled = [x if d is None else x.roll(1, d) for x, d in zip(example, dims, strict=True)]
        with torch.no_grad():
            pair = [pytree.tree_leaves(captured(*inputs)) for inputs in (example, rolled)]
        for left, before, after in zip(found, *pair, strict=True):
            left &= {d for d in (0, 1) if d < before.dim() and _alike(before.roll(1, d), after)}
        if all(len(left) < 2 for left in found):
            break
    return found


def _inputs(example: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The example, and others like it."""
    yield [*example]
    generator = torch.Generator().manual_seed(0)
    for scale in _SCALES:
        yield [
            (torch.randn(x.shape, generator=generator) * scale).to(x.dtype)
            if x.is_floating_point()
            else x
            for x in example
        ]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    close = torch.isclose(a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
    return bool((~close).float().mean() <= _ROUNDED)
