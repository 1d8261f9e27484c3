"""Which values of a TorchScript graph share memory: what in-place operations reach."""

from __future__ import annotations

from collections.abc import Sequence

# Writes into memory: the compiler's importer has no memory, so it loses them.
DROPPED = frozenset(
    (
        "copy_",
        "fill_",
        "zero_",
        "index_put_",
        "_index_put_impl_",
        "index_copy_",
        "index_fill_",
        "index_add_",
        "scatter_",
        "scatter_add_",
        "masked_fill_",
        "masked_scatter_",
        "put_",
        "fill_diagonal_",
        "set_",
        "resize_",
    )
)

# Results that may share memory with the first argument.
VIEWS = frozenset(
    (
        "view",
        "reshape",
        "select",
        "slice",
        "narrow",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "movedim",
        "swapaxes",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "detach",
        "alias",
        "contiguous",
        "to",
        "type_as",
        "diagonal",
        "numpy_T",
        "_unsafe_view",
    )
)


class Memory:
    """Names that share memory, and those of them whose value was overwritten."""

    def __init__(self) -> None:
        self._root: dict[str, str] = {}
        self._group: dict[str, list[str]] = {}
        self._written: dict[str, list[str]] = {}

    def share(self, source: str, view: str) -> None:
        """Note that ``view`` lies in the memory of ``source``."""
        root = self._root.get(source, source)
        self._root[view] = root
        self._group.setdefault(root, [root]).append(view)

    def track(self, name: str, place: str, target: str, result: str) -> None:
        """Note what an operation does to memory.

        Args:
            name: Its ATen name.
            place: The source module.
            target: Its first argument.
            result: Its result.
        """
        if name.endswith("_") and not name.endswith("__") and name not in DROPPED:
            root = self._root.get(target, target)
            for relative in self._group.get(root, [root]):
                self._written.setdefault(relative, []).append(f"aten::{name} in {place}")
            self.share(target, result)
        elif name in VIEWS or name in DROPPED:
            self.share(target, result)

    def stale(self, names: Sequence[str]) -> list[str]:
        """In-place operations whose effect is lost when these names are read; each once."""
        return [write for name in names for write in self._written.pop(name, [])]
