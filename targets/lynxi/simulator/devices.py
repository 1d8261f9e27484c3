"""Which chips the simulated machine has."""

from __future__ import annotations

from .options import current


def problem(device: int) -> str | None:
    """Why there is no such chip, or None if there is."""
    count = current().devices
    if isinstance(device, int) and 0 <= device < count:
        return None
    ids = ", ".join(map(str, range(count)))
    return f"no device {device!r}; this machine's device ids are {ids}"
