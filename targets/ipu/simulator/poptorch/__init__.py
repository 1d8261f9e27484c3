"""``poptorch`` 3.4 as the simulation provides it."""

from __future__ import annotations

import logging

from ..errors import Error, RecoverableError, UnrecoverableError
from ..trace import active
from . import enums, optim, options
from .dataloader import AsynchronousDataAccessor, DataLoader
from .enums import (
    AutoStage,
    CommGroupType,
    Compiler,
    ConnectionType,
    DataLoaderMode,
    HalfFloatCastingBehavior,
    Liveness,
    MatMulSerializationMode,
    MeanReductionStrategy,
    MultiConvPlanType,
    OutputMode,
    OverlapMode,
    ReductionType,
    SharingStrategy,
    SyncPattern,
    VariableRetrievalMode,
)
from .executor import VERSION, PoplarExecutor, inferenceModel, trainingModel
from .ops import (
    CPU,
    Attribute,
    BeginBlock,
    Block,
    BlockFunction,
    MultiConv,
    NameScope,
    cond,
    custom_op,
    dynamic_slice,
    for_loop,
    identity_loss,
    ipu_print_tensor,
    nop,
    recomputationCheckpoint,
    removeBlocks,
    serializedMatMul,
    set_available_memory,
    set_overlap_for_input,
    set_overlap_for_output,
)
from .options import Options, TensorLocationSettings
from .strategies import (
    ParallelPhasedExecution,
    Phase,
    PipelinedExecution,
    SerialPhasedExecution,
    ShardedExecution,
    Stage,
)

__version__ = f"{VERSION}+simulated"

_LEVELS = {
    "TRACE": logging.DEBUG,
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERR": logging.ERROR,
    "OFF": logging.CRITICAL + 1,
}

__all__ = [
    "CPU",
    "AsynchronousDataAccessor",
    "Attribute",
    "AutoStage",
    "BeginBlock",
    "Block",
    "BlockFunction",
    "CommGroupType",
    "Compiler",
    "ConnectionType",
    "DataLoader",
    "DataLoaderMode",
    "Error",
    "HalfFloatCastingBehavior",
    "Liveness",
    "MatMulSerializationMode",
    "MeanReductionStrategy",
    "MultiConv",
    "MultiConvPlanType",
    "NameScope",
    "Options",
    "OutputMode",
    "OverlapMode",
    "ParallelPhasedExecution",
    "Phase",
    "PipelinedExecution",
    "PoplarExecutor",
    "RecoverableError",
    "ReductionType",
    "SerialPhasedExecution",
    "ShardedExecution",
    "SharingStrategy",
    "Stage",
    "SyncPattern",
    "TensorLocationSettings",
    "UnrecoverableError",
    "VariableRetrievalMode",
    "cond",
    "custom_op",
    "dynamic_slice",
    "enums",
    "for_loop",
    "identity_loss",
    "inferenceModel",
    "ipuHardwareIsAvailable",
    "ipuHardwareVersion",
    "ipu_print_tensor",
    "isRunningOnIpu",
    "nop",
    "optim",
    "options",
    "recomputationCheckpoint",
    "removeBlocks",
    "serializedMatMul",
    "setLogLevel",
    "set_available_memory",
    "set_overlap_for_input",
    "set_overlap_for_output",
    "trainingModel",
]


def ipuHardwareIsAvailable(num_ipus: int = 1) -> bool:
    """Whether there are so many IPUs: the simulation has none."""
    return False


def ipuHardwareVersion() -> int:
    """The generation of the IPU that is simulated: 2, a GC200."""
    return 2


def isRunningOnIpu() -> bool:
    """Whether the code that asks is being compiled for the IPU."""
    return active() is not None


def setLogLevel(level: str) -> None:
    """Choose what is logged: TRACE, DEBUG, INFO, WARN, ERR or OFF."""
    if level not in _LEVELS:
        raise ValueError(f"Unknown log level {level}: expected one of {list(_LEVELS)}")
    logging.getLogger("poptorch").setLevel(_LEVELS[level])
