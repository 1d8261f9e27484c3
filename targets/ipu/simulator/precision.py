"""float16 as the IPU computes it: operands widened, one rounding of the result.

A linear or convolution layer returns its activation's type whatever the weight's is; everything
else follows torch's promotion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .graph import replace, tensors

_CONTRACTIONS = frozenset(
    ["linear", "bilinear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"]
    + [f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)]
)


class Widened:
    """A function on float16 tensors, computed in float32 and rounded once.

    Args:
        func: The function.
        dtypes: What its results are rounded to.
    """

    def __init__(self, func: Callable[..., Any], dtypes: list[torch.dtype]) -> None:
        self.func = func
        self.dtypes = dtypes
        self.__name__ = str(getattr(func, "__name__", "widened"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        args, kwargs = replace((args, kwargs), _widen)
        dtypes = iter(self.dtypes)
        return replace(
            self.func(*args, **kwargs),
            lambda value: value.to(next(dtypes)) if isinstance(value, Tensor) else value,
        )


def in_device_precision(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> tuple[Callable[..., Any], Any]:
    """Call a function as the device would.

    Returns:
        What was called, which a replay calls again, and its result.
    """
    floats = [t for t in tensors((args, kwargs)) if t.is_floating_point()]
    if not any(t.dtype == torch.float16 for t in floats):
        return func, func(*args, **kwargs)
    if name in _CONTRACTIONS:
        widened = Widened(func, [floats[0].dtype])
        return widened, widened(*args, **kwargs)
    try:
        result = func(*args, **kwargs)
    except RuntimeError as error:
        if "not implemented for 'Half'" not in str(error):
            raise
        narrow = all(t.dtype == torch.float16 for t in floats)
        probe = func(*replace(args, _widen), **replace(kwargs, _widen))
        made = [_narrowed(t.dtype, narrow) for t in tensors(probe)]
    else:
        made = [t.dtype for t in tensors(result)]
        places = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        aliases = any(t.untyped_storage().data_ptr() in places for t in tensors(result))
        if not made or aliases or torch.float16 not in made:
            return func, result
    widened = Widened(func, made)
    return widened, widened(*args, **kwargs)


def _narrowed(dtype: torch.dtype, narrow: bool) -> torch.dtype:
    return torch.float16 if narrow and dtype == torch.float32 else dtype


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float16:
        return value.float()
    return value
