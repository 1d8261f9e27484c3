"""Calls PyTorch's own operations by the names that TorchScript gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def signature(schema: str) -> tuple[str, list[str]]:
    """Overload and keyword-only arguments of a schema, ``"aten::gelu(Tensor self, *, ...)"``."""
    parse: Any = torch._C.parse_schema
    parsed = parse(schema)
    return parsed.overload_name or "default", [a.name for a in parsed.arguments if a.kwarg_only]


def call(name: str, overload: str, keywords: Sequence[str], args: Sequence[Any]) -> Any:
    """Call an operation.

    Args:
        name: Its name without ``aten::``.
        overload: Its overload, ``"default"`` if it has none.
        keywords: Names of the last arguments, which it takes by keyword only.
        args: All arguments, in the order of the schema.
    """
    function = getattr(getattr(torch.ops.aten, name), overload)
    split = len(args) - len(keywords)
    return function(*args[:split], **dict(zip(keywords, args[split:], strict=True)))
