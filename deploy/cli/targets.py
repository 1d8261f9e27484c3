"""``spikeport targets``: what is on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from .console import OK, Command, answer


def _run(args: argparse.Namespace) -> int:
    from ...converters.errors import TargetUnavailableError
    from ...targets import TARGETS, get

    lines, found = [], []
    for name in TARGETS:
        entry: dict[str, Any] = {"name": name}
        try:
            target = get(name)
            entry |= {k: _plain(value) for k, value in vars(target.capabilities).items()}
            sdk = target.sdk()
        except TargetUnavailableError as error:
            entry |= {"available": False, "reason": str(error)}
            lines.append(f"{name}: not available: {error}")
        else:
            entry |= {
                "available": True,
                "sdk": sdk.name,
                "version": sdk.version,
                "simulated": sdk.simulated,
                "devices": list(sdk.devices),
            }
            kind = "simulated, " if sdk.simulated else ""
            devices = ", ".join(map(str, sdk.devices)) or "none seen"
            lines.append(f"{name}: {sdk.name} {sdk.version} ({kind}devices: {devices})")
        found.append(entry)
    answer(args, "\n".join(lines), {"targets": found})
    return OK


def _plain(value: Any) -> Any:
    """A capability for JSON."""
    if isinstance(value, (frozenset, tuple)):
        members = [_plain(member) for member in value]
        return sorted(members) if isinstance(value, frozenset) else members
    return value if isinstance(value, (int, str, type(None))) else str(value).removeprefix("torch.")


COMMAND = Command("targets", "what is on this machine: SDKs, versions, devices, simulators", _run)
