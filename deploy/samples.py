"""Which dimension of a program's inputs and outputs is the batch, and whether its samples stand alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..converters.program import Program, TensorSpec
from ..converters.returned import tensors
from ..converters.verify import Trace
from .ports import in_call

#: Inputs on which the order shows: the example's, and noise of these scales.
_SCALES = (1.0, 4.0, 16.0, 64.0)
#: Scale of the noise that is to reach layers which the example leaves silent.
_LOUD = 16.0
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


def coupled(program: Program, inputs: Dims, outputs: Dims) -> bool:
    """Whether a sample's outputs depend on the other samples of its batch, or on its place among them.

    The captured program is run on the example, and with the last sample, then all others, replaced by
    their neighbours: what both change, of any layer's input or spikes, depends on several samples, and
    an output has to change where its sample is. Layers that nothing reached are tried with noise.

    Args:
        program: A program with ``captured`` and ``examples``; without them nothing is found.
        inputs: The batch dimension of each input, as :func:`batch_dims` gives them.
        outputs: The same of each output.
    """
    captured, N = program.captured, program.batch
    if captured is None or not program.examples or N == 1 or set(inputs) == {None}:
        return False
    if program.stepping is not None:
        times = program.stepping.inputs, program.stepping.outputs
        inputs, outputs = (
            [None if d is None else in_call(d, t) for d, t in zip(dims, of, strict=True)]
            for dims, of in zip((inputs, outputs), times, strict=True)
        )
    for example in inputs_like(program.examples[0], (_LOUD,)):
        moved = [x if d is None else x.roll(1, d) for x, d in zip(example, inputs, strict=True)]
        before = _values(captured, example)
        last, others = (
            [*map(_changed, before, _values(captured, given))]
            for given in (_joined(example, moved, inputs), _joined(moved, example, inputs))
        )
        if any((a & b).any() for a, b in zip(last, others, strict=True)):
            return True
        for d, a, b in zip(outputs, last, others, strict=False):
            if d is not None and (a.narrow(d, 0, N - 1).any() or b.select(d, N - 1).any()):
                return True
        if all(seen.any() for seen in (*last, *others)):
            break
    return False


def _joined(
    others: Sequence[torch.Tensor], last: Sequence[torch.Tensor], dims: Dims
) -> list[torch.Tensor]:
    """The last sample of ``last`` behind the others of ``others``."""
    return [
        x if d is None else torch.cat([x.narrow(d, 0, x.shape[d] - 1), y.narrow(d, -1, 1)], d)
        for x, y, d in zip(others, last, dims, strict=True)
    ]


def _values(program: Program, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs, then the neurons' inputs and spikes."""
    trace = Trace.of(program, inputs)
    return [*trace.outputs, *trace.values.values()]


def _changed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors differ, NaN equal to NaN."""
    return (a != b) & ~((a != a) & (b != b))


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
    for example in inputs_like(program.examples[0]):
        rolled = [x if d is None else x.roll(1, d) for x, d in zip(example, dims, strict=True)]
        with torch.no_grad():
            pair = [tensors(captured(*inputs)) for inputs in (example, rolled)]
        for left, before, after in zip(found, *pair, strict=True):
            left &= {d for d in (0, 1) if d < before.dim() and _alike(before.roll(1, d), after)}
        if all(len(left) < 2 for left in found):
            break
    return found


def inputs_like(
    example: Sequence[torch.Tensor], scales: Sequence[float] = _SCALES
) -> Iterator[list[torch.Tensor]]:
    """The example, and others like it."""
    yield [*example]
    generator = torch.Generator().manual_seed(0)
    for scale in scales:
        yield [_noise(x, scale, generator) for x in example]


def _noise(x: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Noise like x; integers, which may be indices, stay as they are unless all are 0."""
    if x.is_floating_point():
        return (torch.randn(x.shape, generator=generator) * scale).to(x.dtype)
    if x.dtype == torch.bool or not x.any():
        return torch.randint(0, 2, x.shape, generator=generator).to(x.dtype)
    return x


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    close = torch.isclose(a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
    return bool((~close).float().mean() <= _ROUNDED)
