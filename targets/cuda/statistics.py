"""Mean and variance of each channel, in one pass over a batch."""

from __future__ import annotations

import math
from typing import Literal

import torch

from .kernels import compiled, interpreted, layout, power_of_two

#: Programs that share the work; a few on each multiprocessor keep its memory busy.
_PROGRAMS = 1024
_BLOCK, _WARPS = 2048, 4

# Each place of a tile keeps count, mean and sum of squared deviations of its own (Welford 1962), and
# they are merged at the end (Chan, Golub and LeVeque 1979): a mean far from zero costs no precision.
_SOURCE = """\
def moments(x_ptr, partial_ptr, rows, C, inner, TILES: tl.constexpr, BLOCK_R: tl.constexpr, \
BLOCK_C: tl.constexpr):
    program, column = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1)
    programs = tl.num_programs(0)
    across = tl.arange(0, BLOCK_C)[None, :]
    {place}
    count = tl.full([BLOCK_R, BLOCK_C], 0.0, tl.float32)
    mean, square = count, count
    for i in range(TILES):
        row = (group + i * groups) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        within = (row < rows) & inside
        x = tl.load(x_ptr + {address}, mask=within, other=0.0).to(tl.float32)
        apart = x - mean
        count = tl.where(within, i + 1.0, count)
        mean = tl.where(within, mean + apart * (1.0 / (i + 1.0)), mean)
        square = tl.where(within, square + apart * (x - mean), square)
    total = {sum_count}
    middle = {sum_mean} / tl.maximum(total, 1.0)
    apart = mean - middle
    squares = {sum_square}
    at = partial_ptr + program * C + {channel}
    tl.store(at, total, mask={channel} < C)
    tl.store(at + programs * C, middle, mask={channel} < C)
    tl.store(at + 2 * programs * C, squares, mask={channel} < C)
"""


def _source(tile: Literal["rows", "planes"]) -> str:
    """The kernel for channels that lie innermost, or each in planes of its own."""
    sums = {
        "count": "count",
        "mean": "count * mean",
        "square": "square + count * apart * apart",
    }
    if tile == "rows":
        return _SOURCE.format(
            place="channel, inside, group, groups = column * BLOCK_C + across, "
            "column * BLOCK_C + across < C, program, programs",
            address="row * C + channel",
            channel="channel",
            **{f"sum_{n}": f"tl.sum({v}, 0)[None, :]" for n, v in sums.items()},
        )
    return _SOURCE.format(
        place="""blocks = tl.cdiv(inner, BLOCK_C)
    group, groups = program // blocks, programs // blocks
    across = (program % blocks) * BLOCK_C + across
    inside = across < inner""",
        address="(row * C + column) * inner + across",
        channel="column",
        **{f"sum_{n}": f"tl.sum({v})" for n, v in sums.items()},
    )


def mean_and_variance(x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x_seq [T, N, C, ...] over all but C: mean and biased variance [C], float32."""
    x, lay = layout(x_seq)
    if lay.strided is not None or not (x.is_cuda or interpreted()):
        dims = [d for d in range(x.dim()) if d != 2]
        var, mean = torch.var_mean(x if x.is_cuda else x.float(), dims, correction=0)
        return mean.float(), var.float()
    C = x.shape[2]
    inner = lay.strides[2] if C > 1 else math.prod(x.shape[3:])
    rows = x.numel() // (C * inner)
    kind: Literal["rows", "planes"] = "rows" if inner == 1 else "planes"
    columns = min(power_of_two(C if inner == 1 else inner), 256 if inner == 1 else _BLOCK)
    per = max(_BLOCK // columns, 1)
    tiles = -(-rows // per)
    if kind == "rows":
        blocks, others = 1, -(-C // columns)
    else:
        blocks, others = -(-inner // columns), C
    groups = min(tiles, max(1, _PROGRAMS // (blocks * others)))
    partial = x.new_empty((3, groups * blocks, C), dtype=torch.float32)
    compiled(_source(kind), "moments")[groups * blocks, others](
        x, partial, rows, C, inner, -(-tiles // groups), per, columns, num_warps=_WARPS
    )
    count, mean, square = partial
    middle = (count * mean).sum(0) / (rows * inner)
    return middle, (square + count * (mean - middle).square()).sum(0) / (rows * inner)
