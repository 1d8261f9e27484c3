"""Lines of "asked / measured / ok"."""

from __future__ import annotations


class Table:
    """Prints a line for each number as it is known, and counts what is not met."""

    def __init__(self, title: str) -> None:
        self.failed = 0
        print(f"{title:<72} {'asked':>10} {'measured':>12}")

    def at_least(self, what: str, asked: float, measured: float | None) -> None:
        self._line(what, f">= {asked:g}", measured, measured is not None and measured >= asked)

    def at_most(self, what: str, asked: float, measured: float | None) -> None:
        self._line(what, f"<= {asked:g}", measured, measured is not None and measured <= asked)

    def note(self, what: str, measured: str) -> None:
        """What is measured and not asked."""
        print(f"{what:<72} {'-':>10} {measured:>12}", flush=True)

    def verdict(self) -> int:
        """The exit code: 1 if something asked is not met."""
        print(f"{self.failed} not met" if self.failed else "all met")
        return int(bool(self.failed))

    def _line(self, what: str, asked: str, measured: float | None, ok: bool) -> None:
        self.failed += not ok
        shown = "none" if measured is None else f"{measured:.4g}"
        print(f"{what:<72} {asked:>10} {shown:>12}  {'ok' if ok else 'NOT MET'}", flush=True)
