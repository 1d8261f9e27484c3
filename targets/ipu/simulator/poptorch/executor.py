"""``trainingModel`` and ``inferenceModel``: a model that is compiled once and runs on the device."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed, updates, wrapping
from ..arguments import Arguments, Parser, forward_of, micro_batch, narrow
from ..compiler import Request, compile_model, tensor_names
from ..errors import Error
from ..executable import Executable, Schedule
from ..graph import tensors
from . import enums
from .optim import Optimizer
from .options import Options

_logger = logging.getLogger("poptorch")
_NO_EXECUTABLE = "Model has not been compiled or has been destroyed."
VERSION = "3.4.0"


class PoplarExecutor:
    """A wrapped model; :func:`trainingModel` and :func:`inferenceModel` make it."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        options: Options | None,
        training: bool,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        given = Options() if options is None else options
        given._freeze()
        self._options = given.clone()
        if given.defaultOutputMode():
            mode = enums.OutputMode.Final if training else enums.OutputMode.All
            self._options.outputMode(mode)
        self._options._freeze()
        self._training = training
        self._user_model = model
        # Flags such as training are its own; parameters are not.
        self._model = copy.copy(model) if isinstance(model, nn.Module) else model
        self._executable: Executable | None = None
        self._compiled: Arguments | None = None
        self._attached = False
        self._dirty = False
        self._version = 0  # of the weights on the host
        self._seen: tuple[int, int] | None = None
        self._recipe: updates.Recipe | None = None
        self._pending: updates.Recipe | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        if training:
            assert isinstance(model, nn.Module), "Only a torch.nn.Module can be trained"
            self.setOptimizer(optimizer or torch.optim.SGD(model.parameters(), lr=0.01))
        else:
            assert self._options.Training.gradient_accumulation == 1, (
                "Gradient accumulation should be left to its default value (1) for inference"
            )
        self._parser = Parser(forward_of(self._model))
        if training and isinstance(model, nn.Module):
            wrapping.wrap(model, self)

    # The model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_user_model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._user_model, name)

    @property
    def model(self) -> Any:
        """The model that was wrapped."""
        return self._user_model

    @property
    def options(self) -> Options:
        """The options, frozen."""
        return self._options

    def train(self, mode: bool = True) -> PoplarExecutor:
        """Set the training flag; a compiled model keeps what it was compiled with."""
        for part in (self._user_model, self._model):
            if isinstance(part, nn.Module):
                part.train(mode)
        return self

    def eval(self) -> PoplarExecutor:
        """Clear the training flag; see :meth:`train`."""
        return self.train(False)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
        """Load into the model, and onto the device if it is attached."""
        result = self._user_model.load_state_dict(state_dict, strict)  # type: ignore[union-attr]
        if self._attached:
            self.copyWeightsToDevice()
        return result

    # Weights

    def sync(self) -> bool:
        """Bring the weights to the host if they are newer on the device; whether they were."""
        if not self._dirty:
            return False
        self._dirty = False
        self.copyWeightsToHost()
        return True

    def copyWeightsToHost(self) -> None:
        """Bring the weights to the host.

        Raises:
            Error: The model is not compiled.
        """
        executable = self._ready()
        self._dirty = False
        with torch.no_grad():
            for name, value in self._host_weights():
                value.copy_(executable.weights[name])
        self._version += 1

    def copyWeightsToDevice(self) -> None:
        """Take the weights of the host.

        Raises:
            Error: The model is not compiled.
        """
        executable = self._ready()
        self._dirty = False
        with torch.no_grad():
            for name, value in self._host_weights():
                executable.weights[name].copy_(value)
        executable.reload_buffers()

    def _host_weights(self) -> list[tuple[str, Tensor]]:
        if not isinstance(self._model, nn.Module):
            return []
        return [*self._model.named_parameters(), *self._model.named_buffers()]

    def _ready(self) -> Executable:
        if self._executable is None:
            raise Error(_NO_EXECUTABLE)
        return self._executable

    # The optimizer

    def setOptimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Take this optimizer's hyper-parameters from the next call on.

        Raises:
            Error: A constant of the compiled model is another.
            ValueError: The device has no such optimizer.
        """
        recipe = updates.read(optimizer)
        if self._executable is not None and self._recipe is not None:
            recipe.check_replacement(self._recipe)
            self._pending = recipe
        else:
            self._recipe = recipe
        before = self._optimizer
        self._optimizer = optimizer
        if before is optimizer or self._executable is None:
            return
        if isinstance(before, Optimizer):
            before._loaded, before._read_state = self._read_state(), None
        self._exchange_state()

    def _exchange_state(self) -> None:
        """Give the device a checkpoint's state, and let the optimizer read the device's."""
        if not isinstance(self._optimizer, Optimizer):
            return
        updater = self._updater()
        if self._optimizer._loaded is not None:
            for name, state in self._optimizer._loaded["state"].items():
                for key, value in state.items():
                    updater.state[name][key].copy_(value)
            updater.steps = self._optimizer._loaded["steps"]
            self._optimizer._loaded = None
        self._optimizer._read_state = self._read_state

    def _updater(self) -> updates.Updater:
        training = self._ready().training
        assert training is not None
        return training.updater

    def _read_state(self) -> dict[str, Any]:
        updater = self._updater()
        state = {n: {k: t.clone() for k, t in s.items()} for n, s in updater.state.items()}
        return {"steps": updater.steps, "state": state}

    # Compiling

    def isCompiled(self) -> bool:
        """Whether the model is compiled."""
        return self._executable is not None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Trace and compile the model for arguments like these.

        Raises:
            Error: The device cannot run it.
        """
        if self._executable is not None:
            _logger.warning("Call to compile() ignored: the executable is already compiled")
            return
        self._compile(self._parser(args, kwargs))

    def _compile(self, given: Arguments) -> None:
        if wrapping.is_wrapped(self._user_model) and not self._training:
            self._seen = self._trainer_version()
        options = self._options
        if options.input_group_size != 1:
            raise Error(
                "The simulation has no replicas that share an input: Options.inputReplicaGrouping is "
                f"{options.input_group_size} and must be 1"
            )
        replicas = options.replication_factor
        schedule = Schedule(
            iterations=options.device_iterations,
            accumulation=options.Training.gradient_accumulation,
            replicas=replicas,
            mean=options.Training.accumulation_and_replication_reduction_type
            == enums.ReductionType.Mean,
            output_mode=int(options.output_mode),
            period=options.output_return_period,
        )

        def first(value: Tensor) -> Tensor:
            size = micro_batch(value, schedule.iterations, schedule.accumulation, replicas)
            return value.narrow(0, 0, size) if value.dim() else value

        if any(t.requires_grad for t in given.tensors()):
            _logger.warning(
                "Input tensor has requires_grad=True set. This tensor will be detached."
            )
        processes = distributed.join(
            options.Distributed.processId, options.Distributed.numProcesses
        )
        self._executable = compile_model(
            Request(
                model=self._model,
                arguments=given.map(narrow).map(first),
                schedule=schedule,
                options=options,
                recipe=self._recipe if self._training else None,
                anchors={
                    short: (
                        name,
                        int(options.output_mode if mode is None else mode),
                        options.output_return_period if mode is None else period,
                    )
                    for short, (name, mode, period) in options.anchored_tensors.items()
                },
                reduce=processes,
            )
        )
        if processes is not None:
            distributed.broadcast(self._executable.weights)
        self._compiled = given.map(lambda t: torch.empty_like(t, device="meta"))
        self._use_cache()
        self._attached = options.connection_type != enums.ConnectionType.Never
        if self._training:
            self._exchange_state()

    def _use_cache(self) -> None:
        popart = self._options._Popart.options
        if not popart.get("enableEngineCaching"):
            return
        executable = self._ready()
        path = Path(popart["cachePath"]) / f"{executable.digest()}.popef"
        if path.exists():
            _logger.info("Loaded the executable from the cache %s", path)
        else:
            self._write(path)
            _logger.info("Saved the executable to the cache %s", path)

    def compileAndExport(
        self, filename: str, *args: Any, export_model: bool = True, **kwargs: Any
    ) -> None:
        """Compile for arguments like these and write the executable.

        Args:
            filename: File to write, or a directory for ``model.poptorch``.
            *args: Arguments of the model.
            export_model: Not supported: it would pickle the model; pass False.
            **kwargs: Arguments of the model.
        """
        if export_model:
            raise Error(
                "The simulation does not write models into executables: pass export_model=False, and "
                "wrap the model again before loadExecutable"
            )
        self._compile(self._parser(args, kwargs))
        self.save(filename, export_model=False)

    def save(self, filename: str, export_model: bool = True, save_rng_state: bool = True) -> None:
        """Write the executable; see :meth:`compileAndExport`."""
        if export_model:
            raise Error("The simulation does not write models into executables: export_model=False")
        path = Path(filename)
        self._write(path / "model.poptorch" if path.is_dir() else path)

    def _write(self, path: Path) -> None:
        executable = self._ready()
        assert self._compiled is not None
        values = [
            {"dtype": str(v.dtype).removeprefix("torch."), "shape": list(v.shape)}
            if isinstance(v, Tensor)
            else {"value": v}
            for v in self._compiled.args
        ]
        document = {
            "simulated": True,
            "poptorch": VERSION,
            "digest": executable.digest(),
            "graph": str(executable.graph).splitlines(),
            "arguments": values,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(document, indent=1, default=repr), encoding="utf-8")
        part.replace(path)

    def loadExecutable(self, filename: str) -> None:
        """Take an executable that was written for this model.

        Raises:
            Error: The file is no executable, or another model's.
        """
        try:
            document = json.loads(Path(filename).read_text(encoding="utf-8"))
            arguments = [
                torch.zeros(v["shape"], dtype=getattr(torch, v["dtype"]))
                if "shape" in v
                else v["value"]
                for v in document["arguments"]
            ]
            digest = document["digest"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Error(f"{filename} is not a PopTorch file: {error}") from error
        self._compile(self._parser(arguments, {}))
        if self._ready().digest() != digest:
            self._executable = None
            raise Error(f"{filename} was compiled from another model, or with other options")

    # Running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the first call compiles it.

        Raises:
            Error: The arguments are not like those that were compiled, or the model is refused.
        """
        assert self._options.connection_type != enums.ConnectionType.Never, (
            "Trying to run a model on an offline device (ConnectionType.Never): use "
            "model.compile(inputs) instead of model(inputs)"
        )
        given = self._parser(args, kwargs)
        if self._executable is None:
            self._compile(given)
        executable = self._ready()
        if not self._attached:
            self.attachToDevice()
        assert self._compiled is not None
        self._compiled.check(given)
        if not self._training:
            self._follow_trainer()
        if self._pending is not None:
            self._updater().recipe = self._recipe = self._pending
            self._pending = None
        originals = given.tensors()
        inputs = [narrow(t.detach()) for t in originals]
        if self._options._Popart.options.get("syntheticDataMode"):
            inputs = [torch.randn_like(t) if t.is_floating_point() else t for t in inputs]
        outputs = executable.run(inputs)
        for original, slot, value in zip(originals, executable.graph.inputs, inputs, strict=True):
            if slot in executable.graph.written and value.data_ptr() != original.data_ptr():
                with torch.no_grad():
                    original.copy_(value)
        if self._training or executable.graph.written - set(executable.graph.inputs):
            self._dirty = True
        for output in tensors(outputs):
            output.backward = _refuse_backward  # type: ignore[method-assign]
        return outputs

    def _trainer_version(self) -> tuple[int, int] | None:
        """Which executor trains the model, and how often it has written the host's weights."""
        model: Any = self._user_model
        model.copyWeightsToHostIfNeeded()
        found = wrapping.owner(model)
        return None if found is None else (id(found), found._version)

    def _follow_trainer(self) -> None:
        """Take the weights of an executor that trains the same model."""
        if not wrapping.is_wrapped(self._user_model):
            return
        version = self._trainer_version()
        if version != self._seen:
            self._seen = version
            self.copyWeightsToDevice()

    def isAttachedToDevice(self) -> bool:
        """Whether the model holds a device."""
        return self._executable is not None and self._attached

    def detachFromDevice(self) -> None:
        """Let the device go; the weights come back first.

        Raises:
            Error: The model is not compiled, or holds none.
        """
        self._ready()
        if not self._attached:
            raise Error("The device has already been detached")
        self.sync()
        self._attached = False

    def attachToDevice(self) -> None:
        """Take a device, and load the weights of the host.

        Raises:
            Error: The model is not compiled, or holds one.
        """
        self._ready()
        if self._attached:
            raise Error("The device is already attached")
        self._attached = True
        self.copyWeightsToDevice()

    def destroy(self) -> None:
        """Let the model go: weights to the host, executable and device away."""
        if self._executable is not None:
            self.sync()
            if isinstance(self._optimizer, Optimizer):
                self._optimizer._loaded = self._read_state()
                self._optimizer._read_state = None
        self._executable = None
        self._attached = False
        if self._training and isinstance(self._user_model, nn.Module):
            wrapping.unwrap(self._user_model)

    # Inspection

    def getTensorNames(self) -> list[str]:
        """Names of the tensors of the compiled graph, for ``Options.anchorTensor``."""
        assert self._executable is not None, "Model must be compiled before calling getTensorNames"
        return list(tensor_names(self._executable.graph))

    def getAnchoredTensor(self, short_name: str) -> Tensor:
        """An inner tensor of the last call."""
        anchored = self._ready().anchored
        assert short_name in anchored, f"No tensor with name {short_name} found."
        return anchored[short_name]

    def cycleCount(self) -> int:
        """Not known, like every latency: the simulation has no clock.

        Raises:
            Error: Always.
        """
        raise Error("The simulation has no clock: it counts neither cycles nor latencies")

    getPerfCounters = getLatency = getComputeLatency = cycleCount
    getHostIpuLatency = getIpuHostLatency = cycleCount

    @property
    def rng_state(self) -> list[int]:
        """The state of the device's random numbers, which are the host's."""
        return [int(v) for v in torch.get_rng_state()]

    @rng_state.setter
    def rng_state(self, state: list[int]) -> None:
        torch.set_rng_state(torch.tensor(state, dtype=torch.uint8))


def _refuse_backward(*_: Any, **__: Any) -> None:
    raise Error(
        "backward() cannot be called explicitly on outputs of a PopTorch model. If you're using a "
        "trainingModel, the backwards pass is performed automatically when invoking the model. If "
        "you're using an inferenceModel, you should use a trainingModel instead."
    )


def trainingModel(
    model: nn.Module | PoplarExecutor,
    options: Options | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> PoplarExecutor:
    """Wrap a model for training; its loss is computed in ``forward``.

    Args:
        model: The model.
        options: How it is compiled; frozen by this.
        optimizer: Applied on the device; SGD with a learning rate of 0.01 unless given.

    Raises:
        RuntimeError: The model is wrapped already.
    """
    if isinstance(model, PoplarExecutor):
        model = model.model
    if wrapping.is_wrapped(model):
        raise RuntimeError(
            "Model has already been wrapped in 'poptorch.trainingModel'. Call model.destroy() on the "
            "model to unwrap before wrapping again."
        )
    return PoplarExecutor(model, options, True, optimizer)


def inferenceModel(
    model: nn.Module | Callable[..., Any] | PoplarExecutor, options: Options | None = None
) -> PoplarExecutor:
    """Wrap a model, or a function, for inference.

    Args:
        model: The model; it may be in training at the same time.
        options: How it is compiled; frozen by this.
    """
    return PoplarExecutor(
        model.model if isinstance(model, PoplarExecutor) else model, options, False
    )
