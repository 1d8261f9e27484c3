"""``poptorch.Options``: chainable, type-checked, frozen once a model or a loader uses them."""

from __future__ import annotations

import ast
import copy
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from . import enums
from .strategies import ExecutionStrategy, PipelinedExecution

_logger = logging.getLogger("poptorch")


class ConfigFileError(Exception):
    """A file of options that cannot be read."""


class OptionsDict:
    """Options that may be set to a value of the type of their default, until they are frozen."""

    def __init__(self, **defaults: Any) -> None:
        self.__dict__["_values"] = defaults
        self.__dict__["_is_frozen"] = False

    def set(self, **values: Any) -> None:
        """Change options.

        Raises:
            AssertionError: There is no such option, or the value is of another type.
            AttributeError: The options are frozen.
        """
        self._check_unfrozen()
        for option, value in values.items():
            assert self.exists(option), (
                f"Invalid option {option}, valid options are {self._values.keys()}"
            )
            wanted = type(self._values[option])
            fits = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
            assert fits, f"Unexpected type {type(value)} for option {option}. Expected {wanted}"
            self._values[option] = value

    def createOrSet(self, **values: Any) -> None:
        """Change options, or create them."""
        self._check_unfrozen()
        for option, value in values.items():
            if self.exists(option):
                self.set(**{option: value})
            else:
                self._values[option] = value

    def exists(self, option: str) -> bool:
        """Whether there is such an option."""
        return option in self._values

    def deleteIfExists(self, option: str) -> None:
        """Remove an option."""
        self._check_unfrozen()
        self._values.pop(option, None)

    def toDict(self) -> dict[str, Any]:
        """The options as plain values."""
        return dict(self._values)

    def _freeze(self) -> None:
        self.__dict__["_is_frozen"] = True

    def _unfreeze(self) -> None:
        self.__dict__["_is_frozen"] = False

    def _check_unfrozen(self) -> None:
        if self._is_frozen:
            raise AttributeError("Can't modify frozen Options")

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_unfrozen()
        self.__dict__[name] = value

    def __getattr__(self, option: str) -> Any:
        if option.startswith("__") or "_values" not in self.__dict__:
            raise AttributeError(option)
        values = self.__dict__["_values"]
        assert option in values, f"Invalid option {option}, valid options are {values.keys()}"
        return values[option]

    def __call__(self, option: str) -> Any:  # noqa: D102
        return getattr(self, option)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]


def _deprecated(what: str, instead: str) -> None:
    _logger.warning("%s is deprecated and has no effect: %s", what, instead)


class _JitOptions(OptionsDict):
    """``Options.Jit``: what is left of tracing by ``torch.jit.trace``."""

    def traceModel(self, trace_model: bool) -> _JitOptions:
        """Of no effect; networks are traced by the dispatcher."""
        if trace_model:
            raise ValueError(
                "Tracing with torch.jit.trace is no longer supported: remove the call of "
                "poptorch.Options.Jit.traceModel"
            )
        _deprecated("poptorch.Options.Jit.traceModel", "the dispatcher is always used")
        return self


class _PrecisionOptions(OptionsDict):
    """``Options.Precision``."""

    def __init__(self, popart: _PopartOptions) -> None:
        super().__init__()
        self._popart = popart

    def autocastEnabled(self, autocast_enabled: bool) -> _PrecisionOptions:
        """Of no effect since SDK 3.0."""
        if not isinstance(autocast_enabled, bool):
            raise ValueError("autocastEnabled must be set to either True or False")
        _deprecated("poptorch.Options.Precision.autocastEnabled", "cast in the network")
        return self

    def halfFloatCasting(
        self, half_float_casting: enums.HalfFloatCastingBehavior
    ) -> _PrecisionOptions:
        """Of no effect: mixed operands follow torch, except that weights follow activations."""
        if not isinstance(half_float_casting, enums.HalfFloatCastingBehavior):
            raise ValueError(
                "halfFloatCasting must be set to "
                "poptorch.HalfFloatCastingBehavior.FloatDowncastToHalf or "
                "poptorch.HalfFloatCastingBehavior.HalfUpcastToFloat"
            )
        _deprecated("poptorch.Options.Precision.halfFloatCasting", "casts follow PyTorch's rules")
        return self

    def runningStatisticsAlwaysFloat(self, value: bool) -> _PrecisionOptions:
        """Of no effect since SDK 3.0."""
        if not isinstance(value, bool):
            raise ValueError("runningStatisticsAlwaysFloat needs to be set to a bool")
        _deprecated(
            "poptorch.Options.Precision.runningStatisticsAlwaysFloat",
            "cast the running statistics in the network",
        )
        return self

    def enableFloatingPointExceptions(self, enabled: bool) -> _PrecisionOptions:
        """Whether an overflow, an invalid operation or a division by zero stops the run."""
        assert isinstance(enabled, bool), "enableFloatingPointExceptions needs to be set to a bool"
        self._popart.set("enableFloatingPointChecks", enabled)
        return self

    def enableStochasticRounding(self, enabled: bool) -> _PrecisionOptions:
        """Whether float16 results are rounded up or down at random."""
        self._popart.set("enableStochasticRounding", enabled)
        return self

    def setPartialsType(self, dtype: torch.dtype) -> _PrecisionOptions:
        """The type of partial sums: float32 or float16."""
        names = {torch.float32: "float", torch.float16: "half"}
        if dtype not in names:
            raise ValueError(
                "parameter to setPartialsType should be either torch.float or torch.half"
            )
        self._popart.set("partialsTypeMatMuls", names[dtype])
        self._popart.set("convolutionOptions", {"partialsType": names[dtype]})
        return self


class _TrainingOptions(OptionsDict):
    """``Options.Training``."""

    def __init__(self, popart: _PopartOptions) -> None:
        super().__init__(
            gradient_accumulation=1,
            accumulation_and_replication_reduction_type=enums.ReductionType.Mean,
            mean_reduction_strategy=enums.MeanReductionStrategy.Post,
        )
        self._popart = popart

    def gradientAccumulation(self, gradient_accumulation: int) -> _TrainingOptions:
        """How many micro-batches give one optimizer step."""
        self.set(gradient_accumulation=gradient_accumulation)
        return self

    def accumulationAndReplicationReductionType(
        self, reduction_type: enums.ReductionType
    ) -> _TrainingOptions:
        """Whether the gradients of micro-batches and replicas are averaged or added."""
        if (
            not isinstance(reduction_type, enums.ReductionType)
            or reduction_type == enums.ReductionType.NoReduction
        ):
            raise ValueError(
                "accumulationAndReplicationReductionType must be set to "
                "poptorch.ReductionType.Mean or poptorch.ReductionType.Sum"
            )
        self.set(accumulation_and_replication_reduction_type=reduction_type)
        return self

    def setMeanAccumulationAndReplicationReductionStrategy(
        self, mean_reduction_strategy: enums.MeanReductionStrategy
    ) -> _TrainingOptions:
        """When a mean is divided; the arithmetic of the simulation is ``Post``'s."""
        self.set(mean_reduction_strategy=mean_reduction_strategy)
        return self

    def setAutomaticLossScaling(self, enabled: bool) -> _TrainingOptions:
        """Taken, and without effect in the simulation: a loss scale does not change a step."""
        self._popart.set("automaticLossScalingSettings.enabled", enabled)
        return self

    def setConvolutionDithering(self, enabled: bool) -> _TrainingOptions:
        """Where on the chip convolutions lie; without effect in the simulation."""
        self._popart.set("convolutionDithering", enabled)
        return self


class _PopartOptions:
    """``Options._Popart``: any key."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {"rearrangeAnchorsOnHost": False}
        self._is_frozen = False

    def checkIsFrozen(self) -> None:
        """Raise if the options are frozen."""
        if self._is_frozen:
            raise AttributeError("Can't modify frozen Options")

    def set(self, key: str, value: Any) -> _PopartOptions:
        """Set an option of the compiler below."""
        self.checkIsFrozen()
        self.options[key] = value
        return self

    def setPatterns(self, patterns: Mapping[str, bool], level: int = 2) -> _PopartOptions:
        """Switch rewrites of the compiler on and off; without effect in the simulation."""
        self.checkIsFrozen()
        assert isinstance(level, int)
        assert isinstance(patterns, dict)
        self.options["patterns_level"] = level
        self.options["patterns"] = patterns
        return self

    def setEngineOptions(self, engine_options: Mapping[str, str]) -> _PopartOptions:
        """Options of the Poplar engine; without effect in the simulation."""
        return self.set("engineOptions", dict(engine_options))


class _DistributedOptions(OptionsDict):
    """``Options.Distributed``: which process of how many this is.

    Read from the environment of ``mpirun``, as PopRun sets it, or else of ``torchrun``, which stands
    in for PopRun here.
    """

    def __init__(self) -> None:
        super().__init__(num_distributed_processes=1, distributed_process_id=0, ipuof_configs={})
        mpi = "OMPI_COMM_WORLD_SIZE" in os.environ
        self.setEnvVarNames(
            *(("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK") if mpi else ("WORLD_SIZE", "RANK"))
        )

    def disable(self) -> _DistributedOptions:
        """One process, whatever the environment says."""
        return self.configureProcessId(0, 1)

    def setEnvVarNames(self, var_num_processes: str, var_process_id: str) -> _DistributedOptions:
        """Read the process's number and their count from these environment variables."""
        return self.configureProcessId(
            int(os.environ.get(var_process_id, "0")), int(os.environ.get(var_num_processes, "1"))
        )

    def configureProcessId(self, process_id: int, num_processes: int) -> _DistributedOptions:
        """Say which process of how many this is."""
        self.set(distributed_process_id=process_id, num_distributed_processes=num_processes)
        return self

    @property
    def processId(self) -> int:
        """The number of this process."""
        return int(self.distributed_process_id)

    @property
    def numProcesses(self) -> int:
        """How many processes there are."""
        return int(self.num_distributed_processes)


class TensorLocationSettings(OptionsDict):
    """Where a kind of tensor is kept."""

    def minElementsForOffChip(self, min_elements: int) -> TensorLocationSettings:
        """Below so many elements a tensor stays on the chip."""
        return self._put("minElementsForOffChip", min_elements, int)

    def minElementsForReplicatedTensorSharding(self, min_elements: int) -> TensorLocationSettings:
        """Below so many elements a tensor is not sharded over the replicas."""
        return self._put("minElementsForReplicatedTensorSharding", min_elements, int)

    def useOnChipStorage(self, use: bool | None = True) -> TensorLocationSettings:
        """On the chip, or in the host's streaming memory; None leaves it open."""
        if use is None:
            self.deleteIfExists("onChip")
            return self
        return self._put("onChip", use, bool)

    def useReplicatedTensorSharding(self, use: bool = True) -> TensorLocationSettings:
        """Whether the replicas share out the tensor."""
        return self._put("useReplicatedTensorSharding", use, bool)

    def useIOTilesToLoad(self, use: bool = True) -> TensorLocationSettings:
        """Whether the tensor is loaded through tiles kept for input and output."""
        return self._put("useIOTilesToLoad", use, bool)

    def useIOTilesToStore(self, use: bool = True) -> TensorLocationSettings:
        """Whether the tensor is stored through tiles kept for input and output."""
        return self._put("useIOTilesToStore", use, bool)

    def _put(self, key: str, value: int, kind: type) -> TensorLocationSettings:
        assert isinstance(value, kind), f"{key} must be {kind.__name__}, not {value!r}"
        self.createOrSet(**{key: int(value)})
        return self


class _TensorLocationOptions(OptionsDict):
    """``Options.TensorLocations``."""

    def __init__(self) -> None:
        super().__init__()

    def numIOTiles(self, num_tiles: int) -> _TensorLocationOptions:
        """Tiles kept for input and output: an even number from 32 to 192."""
        assert num_tiles in range(32, 193, 2), (
            "numIOTiles must be an even integer between 32 and 192."
        )
        self.createOrSet(numIOTiles=num_tiles)
        return self

    def setActivationLocation(self, location: TensorLocationSettings) -> _TensorLocationOptions:
        """Where stored activations are kept."""
        return self._put("location_activation", location)

    def setWeightLocation(self, location: TensorLocationSettings) -> _TensorLocationOptions:
        """Where weights are kept."""
        return self._put("location_weight", location)

    def setOptimizerLocation(self, location: TensorLocationSettings) -> _TensorLocationOptions:
        """Where the optimizer's state is kept."""
        return self._put("location_optimizer", location)

    def setAccumulatorLocation(self, location: TensorLocationSettings) -> _TensorLocationOptions:
        """Where accumulated gradients are kept."""
        return self._put("location_accumulator", location)

    def on_chip(self, kind: str) -> bool:
        """Whether tensors of a kind (``"weight"``, ``"activation"``, ...) lie on the chip."""
        settings = self._values.get(f"location_{kind}", {})
        return bool(settings.get("onChip", 1))

    def _put(self, key: str, location: TensorLocationSettings) -> _TensorLocationOptions:
        assert isinstance(location, TensorLocationSettings)
        self.createOrSet(**{key: location.toDict()})
        return self


class Options(OptionsDict):
    """How a model is compiled and run."""

    def __init__(self) -> None:
        super().__init__(
            replication_factor=1,
            broadcast_buffers=True,
            device_iterations=1,
            input_group_size=1,
            log_dir=".",
            auto_round_num_ipus=False,
            output_mode=enums.OutputMode.Default.value,
            output_return_period=1,
            connection_type=enums.ConnectionType.Always.value,
            sync_pattern=enums.SyncPattern.Full.value,
            available_memory_proportion={},
        )
        self.anchored_tensors: dict[str, list[Any]] = {}
        self._popart = _PopartOptions()
        self._jit = _JitOptions()
        self._precision = _PrecisionOptions(self._popart)
        self._training = _TrainingOptions(self._popart)
        self._distributed = _DistributedOptions()
        self._tensor_locations = _TensorLocationOptions()
        self._execution_strategy: ExecutionStrategy = PipelinedExecution()
        self._relax_optimizer_checks = False
        cache = os.environ.get("POPTORCH_CACHE_DIR", "")
        if cache:
            _logger.info("POPTORCH_CACHE_DIR is set: setting cache path to %s", cache)
            self.enableExecutableCaching(cache)
        if os.environ.get("POPTORCH_IPU_MODEL", "0") not in ("", "0"):
            self.useIpuModel(True)
        defaults = os.environ.get("POPTORCH_DEFAULT_OPTIONS", "")
        if defaults:
            self.loadFromFile(defaults)

    @property
    def TensorLocations(self) -> _TensorLocationOptions:
        """Where tensors are kept."""
        return self._tensor_locations

    @property
    def Distributed(self) -> _DistributedOptions:
        """Which process of how many this is."""
        return self._distributed

    @property
    def Jit(self) -> _JitOptions:
        """What is left of tracing by ``torch.jit.trace``."""
        return self._jit

    @property
    def Precision(self) -> _PrecisionOptions:
        """Number formats."""
        return self._precision

    @property
    def Training(self) -> _TrainingOptions:
        """Options of training alone."""
        return self._training

    @property
    def _Popart(self) -> _PopartOptions:
        return self._popart

    def clone(self) -> Options:
        """A copy that may be changed."""
        made = copy.deepcopy(self)
        made._for_each("_unfreeze")
        return made

    def _freeze(self) -> None:
        self._for_each("_freeze")

    def _for_each(self, action: str) -> None:
        parts = (self._jit, self._precision, self._training, self._distributed)
        for part in (*parts, self._tensor_locations):
            getattr(OptionsDict, action)(part)
        self._popart._is_frozen = action == "_freeze"
        getattr(OptionsDict, action)(self)

    def loadFromFile(self, filepath: str) -> Options:
        """Apply a file with one setter a line, as ``Training.gradientAccumulation(2)``.

        Raises:
            ConfigFileError: A line is no call of a setter with plain arguments.
        """
        with open(filepath, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
        for number, line in enumerate(lines, 1):
            if line and not line.startswith("#"):
                try:
                    self._apply(line)
                except (SyntaxError, ValueError, AttributeError, AssertionError) as error:
                    raise ConfigFileError(
                        f'Error setting option at line {number} of {filepath}: "{line}": {error}'
                    ) from error
        return self

    def _apply(self, line: str) -> None:
        call = ast.parse(line, mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("not a call")
        setter = _attribute(self, call.func)
        setter(
            *(_plain(argument) for argument in call.args),
            **{keyword.arg or "": _plain(keyword.value) for keyword in call.keywords},
        )

    def showCompilationProgressBar(self, show: bool = True) -> Options:
        """Of no effect: the simulation compiles without a bar."""
        self._check_unfrozen()
        return self

    def sourceLocationExcludes(self, excludes: list[str]) -> Options:
        """Of no effect in the simulation."""
        self._check_unfrozen()
        return self

    def appendToLocationExcludes(self, *excludes: str) -> Options:
        """Of no effect in the simulation."""
        self._check_unfrozen()
        return self

    def disableModuleNamescope(self) -> Options:
        """Of no effect: tensors are always named after their modules."""
        self._check_unfrozen()
        return self

    def relaxOptimizerAttributesChecks(self, relax: bool = True) -> Options:
        """Whether unknown attributes of an optimizer go unmentioned."""
        self._relax_optimizer_checks = relax
        return self

    def autoRoundNumIPUs(self, auto_round_num_ipus: bool = True) -> Options:
        """Whether a number of IPUs that is no power of 2 is rounded up."""
        self.set(auto_round_num_ipus=auto_round_num_ipus)
        return self

    def deviceIterations(self, device_iterations: int) -> Options:
        """How many iterations one call runs on the device."""
        self.set(device_iterations=device_iterations)
        return self

    def setExecutionStrategy(self, strategy: ExecutionStrategy) -> Options:
        """How blocks become stages."""
        assert isinstance(strategy, ExecutionStrategy)
        self._execution_strategy = strategy
        return self

    def setAvailableMemoryProportion(
        self, available_memory_proportion: Mapping[str, float]
    ) -> Options:
        """Memory for temporaries, for each IPU as ``{"IPU0": 0.5}``; no effect in the simulation."""
        for key in available_memory_proportion:
            assert key.startswith("IPU"), (
                'Available memory proportions are expected to be in a dictionary of {"IPU0": 0.5} '
                f"where the 0 in IPU is the index of the IPU. Invalid key: {key}"
            )
        self.set(
            available_memory_proportion={
                int(key[3:]): share for key, share in available_memory_proportion.items()
            }
        )
        return self

    def replicationFactor(self, replication_factor: int) -> Options:
        """How many replicas run."""
        self.set(replication_factor=replication_factor)
        return self

    def inputReplicaGrouping(
        self, input_group_size: int, input_group_type: enums.CommGroupType
    ) -> Options:
        """How many replicas share an input."""
        enums.check(input_group_type, enums.CommGroupType, "input_group_type")
        self.set(input_group_size=input_group_size)
        return self

    def broadcastBuffers(self, broadcast_buffers: bool = True) -> Options:
        """Whether replicas share buffers; only False works where a buffer is written."""
        self.set(broadcast_buffers=broadcast_buffers)
        return self

    def logDir(self, log_dir: str) -> Options:
        """Where log files go; the simulation writes none."""
        self.set(log_dir=log_dir)
        return self

    def modelName(self, name: str) -> Options:
        """The model's name in profiles."""
        self.createOrSet(model_name=name)
        return self

    def enableProfiling(self, profile_dir: str | None = None) -> Options:
        """Of no effect: the simulation has no profile."""
        self._check_unfrozen()
        _logger.warning("enableProfiling has no effect: the simulation has no profile")
        return self

    def enableExecutableCaching(self, path: str | None) -> Options:
        """Keep executables in this directory; None keeps none."""
        if path is not None:
            self._popart.set("cachePath", path)
        self._popart.set("enableEngineCaching", path is not None)
        return self

    def useIpuModel(self, use_model: bool) -> Options:
        """The SDK's own emulator or hardware; the simulation is neither and takes both."""
        self.createOrSet(use_model=use_model)
        return self

    def connectionType(self, connection_type: enums.ConnectionType) -> Options:
        """When to attach to the IPU."""
        assert isinstance(connection_type, enums.ConnectionType)
        self.set(connection_type=connection_type.value)
        return self

    def syncPattern(self, sync_pattern: enums.SyncPattern) -> Options:
        """How IPUs synchronise; without effect in the simulation."""
        assert isinstance(sync_pattern, enums.SyncPattern)
        self.set(sync_pattern=sync_pattern.value)
        return self

    def useIpuId(self, ipu_id: int) -> Options:
        """Which device to attach to; the simulation has any."""
        assert isinstance(ipu_id, int)
        self.createOrSet(ipu_id=ipu_id)
        return self

    def useOfflineIpuTarget(self, ipu_version: int = 2) -> Options:
        """Compile without a device."""
        self.connectionType(enums.ConnectionType.Never)
        self.createOrSet(ipu_version=ipu_version)
        return self

    def anchorTensor(
        self,
        short_name: str,
        long_name: str,
        output_mode: enums.OutputMode | None = None,
        output_return_period: int | None = 1,
    ) -> None:
        """Have an inner tensor brought back, for ``getAnchoredTensor(short_name)``.

        Args:
            short_name: What the user calls it.
            long_name: One of ``getTensorNames()``.
            output_mode: Which iterations come back; as for the outputs if None.
            output_return_period: N of ``EveryN``.
        """
        self._check_unfrozen()
        self.anchored_tensors[short_name] = [long_name, output_mode, output_return_period or 1]

    def outputMode(
        self, output_mode: enums.OutputMode, output_return_period: int | None = None
    ) -> Options:
        """Which iterations' outputs come back.

        Args:
            output_mode: All, Final, Sum or EveryN.
            output_return_period: N of EveryN.
        """
        assert isinstance(output_mode, enums.OutputMode)
        if output_mode == enums.OutputMode.EveryN:
            assert (output_return_period or 0) > 0, (
                "EveryN output must have output_return_period set to valid positive integer"
            )
        elif output_return_period:
            _logger.info("Output return period argument ignored with output_mode %s", output_mode)
        self.set(output_mode=output_mode.value, output_return_period=output_return_period or 1)
        return self

    def defaultOutputMode(self) -> bool:
        """Whether :meth:`outputMode` is still to be chosen."""
        return bool(self.output_mode == enums.OutputMode.Default)

    def randomSeed(self, random_seed: int) -> Options:
        """Seed the random numbers of host and device."""
        assert isinstance(random_seed, int)
        torch.manual_seed(random_seed)
        self.createOrSet(random_seed=random_seed)
        return self

    def enableStableNorm(self, enabled: bool) -> Options:
        """Whether norms are computed in the slower, more accurate way; the simulation's is."""
        self._popart.set("enableStableNorm", enabled)
        return self

    def enableSyntheticData(self, enabled: bool) -> Options:
        """Whether inputs are replaced by random numbers on the device."""
        self._popart.set("syntheticDataMode", 2 if enabled else 0)
        return self

    def logCycleCount(self, log_cycle_count: bool) -> Options:
        """Whether cycles are counted; the simulation has none to count."""
        self._popart.set("instrumentWithHardwareCycleCounter", log_cycle_count)
        return self

    def toDict(self) -> dict[str, Any]:
        """All options in one dictionary."""
        assert not self.defaultOutputMode(), "An output mode must be picked before serialisation"
        return {
            **super().toDict(),
            **self._popart.options,
            **self._training.toDict(),
            **self._distributed.toDict(),
            **self._tensor_locations.toDict(),
        }


def _attribute(options: Options, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return getattr(options, node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_attribute(options, node.value), node.attr)
    raise ValueError("not a setter of poptorch.Options")


def _plain(node: ast.expr) -> Any:
    """A literal, or a member of an enumeration such as ``poptorch.OutputMode.All``."""
    if isinstance(node, ast.Attribute):
        names = ast.unparse(node).removeprefix("poptorch.").split(".")
        if len(names) == 2 and hasattr(enums, names[0]):
            return getattr(getattr(enums, names[0]), names[1])
        if names[0] == "torch" and len(names) == 2:
            return getattr(torch, names[1])
    return ast.literal_eval(node)
