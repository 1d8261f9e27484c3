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


def on_device(error: Exception, node: str) -> Error:
    """The error of a call that failed while a model ran, or while it was traced on example values.

    Args:
        error: Torch's error.
        node: The call, by its name in the graph.
    """
    text = f"{node}: {error}"
    if str(error).startswith(("Target", "index out of range in self")):
        text += (
            " A device takes a label or index out of range without a word and computes something "
            "else; the simulation stops."
        )
    return Error(text, "poptorch_cpp_error", node)


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
