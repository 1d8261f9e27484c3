"""Every error that spikeport raises on purpose, and the finding that they carry.

The tree::

    SpikeportError
    ├── UsageError                  an argument that cannot be used as given
    ├── CheckpointError             a checkpoint that cannot be loaded into its network
    ├── DataError                   a data set that is missing or malformed
    ├── FindingsError               carries findings, all of them
    │   ├── CaptureError            the network cannot become a graph
    │   └── UnsupportedError        the graph breaks rules of the target
    ├── MismatchError               source and converted network differ, and rounding does not explain it
    ├── TargetError
    │   ├── TargetUnavailableError  the vendor's SDK is not on this machine
    │   ├── CompileError            the vendor's compiler refused or failed
    │   └── DeviceError             no such device, or the run on it failed
    └── ArtifactError
        ├── ArtifactExistsError     the output directory holds something else
        ├── ArtifactVersionError    written by another version of the format
        └── ArtifactCorruptError    a file is missing, cut short or changed
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, overload

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One reason why a network does not, or may not, run on a target.

    Attributes:
        rule: Short stable name of the rule, such as ``"rank"`` or ``"unknown-neuron"``.
        where: Path of the source module (``"conv_fc.2"``), or ``""`` for the whole network.
        found: What is there.
        allowed: What the target or the converter takes instead.
        fix: What to do about it.
        node: Name of the graph's node, if there is one.
        target: Name of the target whose rule this is, ``""`` for rules of every target.
        severity: ``"error"`` stops the conversion, ``"warning"`` does not.
    """

    rule: str
    where: str
    found: str
    allowed: str
    fix: str
    node: str = ""
    target: str = ""
    severity: Severity = "error"

    def to_dict(self) -> dict[str, str]:
        """The finding as plain strings, for JSON."""
        return dict(asdict(self))

    def __str__(self) -> str:
        place = self.where or "the network"
        if self.node:
            place += f" (node {self.node})"
        head = f"{self.severity}[{self.rule}]" + (f" {self.target}" if self.target else "")
        return f"{head}: {place}: {self.found}; allowed: {self.allowed}; fix: {self.fix}"


class Findings(Sequence[Finding]):
    """An immutable list of findings that prints one a line."""

    def __init__(self, findings: Iterable[Finding] = ()) -> None:
        self._findings = tuple(findings)

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> Findings: ...
    def __getitem__(self, index: int | slice) -> Finding | Findings:
        if isinstance(index, slice):
            return Findings(self._findings[index])
        return self._findings[index]

    def __len__(self) -> int:
        return len(self._findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings)

    def __add__(self, other: Iterable[Finding]) -> Findings:
        return Findings((*self._findings, *other))

    @property
    def errors(self) -> Findings:
        """The findings that stop a conversion."""
        return Findings(f for f in self._findings if f.severity == "error")

    def __repr__(self) -> str:
        return f"Findings({list(self._findings)!r})"

    def __str__(self) -> str:
        return "\n".join(map(str, self._findings)) or "no findings"


class SpikeportError(Exception):
    """The root of every error that spikeport raises on purpose."""


class UsageError(SpikeportError, ValueError):
    """An argument that cannot be used as given."""


class CheckpointError(SpikeportError):
    """A checkpoint that cannot be loaded into its network."""


class DataError(SpikeportError):
    """A data set that is missing or malformed."""


class FindingsError(SpikeportError):
    """Carries every finding that stops the work, in ``findings``."""

    def __init__(self, headline: str, findings: Iterable[Finding]) -> None:
        self.headline = headline
        self.findings = Findings(findings)
        super().__init__(headline, self.findings)

    def __str__(self) -> str:
        return "\n  ".join([self.headline, *map(str, self.findings)])


class CaptureError(FindingsError):
    """The network cannot become a graph."""


class UnsupportedError(FindingsError):
    """The graph breaks rules of the target."""


class MismatchError(SpikeportError):
    """Source and converted network differ, and rounding does not explain it."""


class TargetError(SpikeportError):
    """A target cannot do what was asked."""


class TargetUnavailableError(TargetError):
    """The vendor's SDK is not on this machine."""


class CompileError(TargetError):
    """The vendor's compiler refused the graph or failed."""


class DeviceError(TargetError):
    """There is no such device, or the run on it failed."""


class ArtifactError(SpikeportError):
    """An artifact directory cannot be read or written."""


class ArtifactExistsError(ArtifactError):
    """The output directory holds something else."""


class ArtifactVersionError(ArtifactError):
    """The artifact was written by another version of the format."""


class ArtifactCorruptError(ArtifactError):
    """A file of the artifact is missing, cut short or changed."""
