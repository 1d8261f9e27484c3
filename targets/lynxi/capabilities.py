"""What Lynxi's compiler and chip take, as data.

From public code and tutorials (lyngor 1.1.0 to 1.22); an operator is here if it was seen lowered or
is the same primitive under another name.
"""

from __future__ import annotations

import torch

from ..base import Capabilities

_SEEN = (
    # Layers
    "conv1d conv2d linear matmul bmm batch_norm max_pool2d avg_pool2d adaptive_avg_pool2d"
    # Elementwise
    " add sub mul div pow neg maximum minimum clamp clamp_min clamp_max round relu sigmoid softmax"
    " exp sqrt rsqrt tanh"
    # Comparison and selection
    " gt ge lt le eq ne where logical_and logical_or logical_not _to_copy"
    # Shape
    " reshape permute transpose unsqueeze squeeze slice select split chunk cat stack expand repeat"
    " take index_select"
    # Reduction and resampling
    " mean sum upsample_nearest2d upsample_bilinear2d"
)

CAPABILITIES = Capabilities(
    ops=frozenset(f"aten.{name}" for name in _SEEN.split()),
    dtypes=frozenset(
        {torch.float16, torch.float32, torch.bool, torch.int8, torch.uint8, torch.int32}
    ),
    max_rank=4,
    in_place=False,
    arithmetic=torch.float16,
    memory=8 * 2**30,
    notes=(
        "arithmetic is float16 inside, whatever the type of inputs and outputs",
        "shapes are static, the batch of the example input is compiled in",
        "an in-place write is dropped by the compiler with no error",
    ),
)
