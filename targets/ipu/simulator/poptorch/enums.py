"""The enumerations of the SDK, with its values."""

from __future__ import annotations

import enum
from typing import Any


class OutputMode(enum.IntEnum):
    """Which iterations' outputs come back; default All in inference, Final in training."""

    Final = 0
    EveryN = 1
    All = 2
    Sum = 3
    Default = 4


class DataLoaderMode(enum.IntEnum):
    """How the loader is run; in the simulation the data are the same in every mode."""

    Sync = 0
    Async = 1
    AsyncRebatched = 2


class SharingStrategy(enum.Enum):
    """How a loader's process hands over its tensors."""

    SharedMemory = "shared_memory"
    FileSystem = "file_system"
    Fork = "fork"
    ForkServer = "forkserver"


class ConnectionType(enum.IntEnum):
    """When to attach to the IPU."""

    Always = 0
    OnDemand = 1
    Never = 2


class HalfFloatCastingBehavior(enum.IntEnum):
    """Of no effect since SDK 3.0."""

    FloatDowncastToHalf = 0
    HalfUpcastToFloat = 1
    Default = 2


class ReductionType(enum.IntEnum):
    """How gradients of replicas and accumulated micro-batches are reduced."""

    Sum = 0
    Mean = 1
    NoReduction = 2


class MeanReductionStrategy(enum.IntEnum):
    """When the mean is divided: while accumulating, or once at the end."""

    Running = 0
    Post = 1


class SyncPattern(enum.IntEnum):
    """How the IPUs of a system synchronise."""

    Full = 0
    SinglePipeline = 1
    ReplicaAndLadder = 2


class Liveness(enum.IntEnum):
    """Which tensors stay on the chip between the phases of a phased execution."""

    AlwaysLive = 0
    OffChipAfterFwd = 1
    OffChipAfterFwdNoOverlap = 2
    OffChipAfterEachPhase = 3


class AutoStage(enum.IntEnum):
    """How blocks become stages where none are given."""

    SameAsIpu = 0
    AutoIncrement = 1


class CommGroupType(enum.IntEnum):
    """Which replicas share a weight."""

    All = 0
    Consecutive = 1
    Orthogonal = 2
    NoGrouping = 3


class VariableRetrievalMode(enum.IntEnum):
    """Which replicas' copies of a weight come back."""

    OnePerGroup = 0
    AllReplicas = 2


class MatMulSerializationMode(enum.Enum):
    """Which dimension a serialised matrix product is cut along."""

    InputChannels = "input_channels"
    ReducingDim = "reducing_dim"
    OutputChannels = "output_channels"
    Disabled = "none"


class MultiConvPlanType(enum.IntEnum):
    """How several convolutions are planned."""

    Parallel = 0
    Serial = 1


class OverlapMode(enum.Enum):
    """How much of the input and output overlaps the computation."""

    NoOverlap = "no_overlap"
    OverlapAccumulationLoop = "overlap_accumulation_loop"
    OverlapDeviceIterationLoop = "overlap_device_iteration_loop"


class Compiler(enum.IntEnum):
    """The compilers that the SDK has had."""

    PopART = 0
    MLIR = 1


def check(value: Any, kind: type[enum.Enum], name: str) -> None:
    """Assert that a setter got a member of its enumeration."""
    assert isinstance(value, kind), f"{name} must be a poptorch.{kind.__name__}, not {value!r}"
