"""The exceptions of the SDK: what failed, of which kind, and what would help."""

from __future__ import annotations


class Error(RuntimeError):
    """An error of the compiler or the device.

    Attributes:
        type: Its kind, such as ``"poptorch_py_error"``.
        message: What happened.
        location: Where in the compiler, or in the network.
    """

    def __init__(self, message: str, type: str = "poptorch_py_error", location: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.location = location

    def __str__(self) -> str:
        return self.message


class RecoverableError(Error):
    """An error after which the device can be used again.

    Attributes:
        recovery_action: ``"IPU_RESET"``, ``"PARTITION_RESET"`` or ``"FULL_RESET"``.
    """

    def __init__(
        self, message: str, recovery_action: str = "IPU_RESET", location: str = ""
    ) -> None:
        super().__init__(message, "poplar_recoverable_runtime_error", location)
        self.recovery_action = recovery_action


class UnrecoverableError(Error):
    """An error after which the system needs an administrator."""

    def __init__(self, message: str, location: str = "") -> None:
        super().__init__(message, "poplar_unrecoverable_runtime_error", location)
