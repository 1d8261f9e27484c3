"""The model: an artifact's network on a device, called with the source network's tensors."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils import _pytree as pytree

from .. import targets as registry
from ..converters.errors import DeviceError, Finding, UnsupportedError, UsageError
from ..converters.program import Time, fold, unfold
from ..converters.returned import NONE, Nothing
from ..converters.stepping import COUNTER, State, Stepping
from ..targets import Loaded, Target
from .manifest import understood
from .ports import Port, dtype_name, dtype_named, in_call, pad

#: The file that holds the states before the first step.
STATES = "states.safetensors"
_logger = logging.getLogger(__name__)


def classes(scores: torch.Tensor) -> torch.Tensor:
    """The class [N] with the largest of the scores [N, C], booleans too."""
    return (scores.byte() if scores.dtype == torch.bool else scores).argmax(1)


def _is_count(value: torch.Tensor) -> bool:
    return bool((value.isfinite() & (value == value.abs().round())).all())


class Model:
    """A network on a device: torch tensors in, torch tensors out, as from the source network.

    Each call starts from v_0. A batch smaller than the compiled one is padded, the padding cut off; it is
    refused where the network computes samples together.

    A stepped network runs a call step by step, however many steps its inputs have; and :meth:`step` takes
    the next step of a stream without end, whose :attr:`state` no call touches. Threads take turns.

    Args:
        path: The artifact's directory.
        manifest: Its manifest.
        device: Id of the device.
        target: Another target than the artifact's, which loads its artifacts too.

    Attributes:
        manifest: The artifact's manifest.
        batch: The compiled batch size N.
        inputs: The inputs, in order; of one step if the network is stepped.
        outputs: The outputs, flat, likewise.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        device: int = 0,
        target: str | None = None,
    ) -> None:
        self.manifest, self._path, self._device = manifest, path, device
        with understood(path):
            self.batch = int(manifest["batch"])
            self.inputs = tuple(map(Port.from_dict, manifest["inputs"]))
            self.outputs = tuple(map(Port.from_dict, manifest["outputs"]))
            self._structure = _structure(manifest["structure"])
            self._stepping, self._states = _stepping(path, manifest)
            made, built = manifest["target"], {k: manifest["sdk"][k] for k in ("name", "version")}
        self._backend = registry.get(target or made)
        loads = {self._backend.name, *self._backend.capabilities.loads}
        if made not in loads:
            raise UsageError(
                f"{path} is compiled for {made}, and {target} loads artifacts for "
                f"{', '.join(sorted(loads))}; convert and compile for {target}"
            )
        found = self._backend.sdk()
        same = self._backend.name == made
        if same and (found.name, found.version) != (built["name"], built["version"]):
            _logger.warning(
                "%s was compiled with %s %s, this machine has %s %s; if in doubt, compile again",
                *(path, built["name"], built["version"], found.name, found.version),
            )
        #: A device's buffers are one, and so is the state of a stream.
        self._turn = threading.RLock()
        self._closed = False
        self._main = self._load("device", self.outputs)
        self._probe: Loaded | None = None
        self._state: list[torch.Tensor] = self._initial()
        self._samples: int | None = None

    def _load(self, part: str, outputs: Sequence[Port]) -> Loaded:
        given, taken = (*self.inputs, *self._states), (*outputs, *self._states)
        return load_onto(self._backend, self._path / part, given, taken, self._device)

    @property
    def time(self) -> Time:
        """Whether the device runs all time steps at once, or one."""
        return "unrolled" if self._stepping is None else "stepped"

    @property
    def T(self) -> int | None:  # noqa: N802 -- the field's name
        """Time steps of a call, if all neurons have the same number; None if it is stepped."""
        steps: int | None = self.manifest["T"]
        return steps

    @property
    def batch_dims(self) -> tuple[int | None, ...]:
        """Which dimension of each input of a call is the batch; None as in :class:`Port`."""
        return self._in_call(self.inputs, None if self._stepping is None else self._stepping.inputs)

    @property
    def output_dims(self) -> tuple[int | None, ...]:
        """The same of its outputs, flat."""
        return self._in_call(
            self.outputs, None if self._stepping is None else self._stepping.outputs
        )

    @property
    def output_times(self) -> tuple[int | None, ...]:
        """Which dimension of each output of a call is time; None where it is not known."""
        return (None,) * len(self.outputs) if self._stepping is None else self._stepping.outputs

    def _in_call(
        self, ports: Sequence[Port], times: Sequence[int | None] | None
    ) -> tuple[int | None, ...]:
        dims = [port.batch_dim for port in ports]
        pairs = zip(dims, times or [None] * len(dims), strict=True)
        return tuple(None if d is None else in_call(d, time) for d, time in pairs)

    @property
    def target(self) -> str:
        """Name of the target."""
        return self._backend.name

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the compiled graph."""
        return dtype_named(self.manifest["dtype"])

    @property
    def has_probes(self) -> bool:
        """Whether :meth:`probe` can be called."""
        return self.manifest["probe"] is not None or not self.manifest["neurons"]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The network's outputs for one batch of up to N samples.

        Raises:
            UsageError: The inputs have other shapes or dtypes; says which are allowed.
            DeviceError: The run failed.
        """
        return self._nest(self._whole(self._main, self.outputs, inputs))

    def _whole(
        self, loaded: Loaded, ports: Sequence[Port], inputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The outputs of a call, with those of a probe."""
        if self._stepping is None:
            return self._advance(loaded, ports, inputs, [])[0]
        self._check_types(inputs)
        extra = (0,) * (len(ports) - len(self.outputs))
        stepping = replace(self._stepping, outputs=(*self._stepping.outputs, *extra))
        steps, state, found = stepping.split(inputs), self._initial(), []
        self._check_length(0, len(steps))
        for now in steps:
            outputs, state = self._advance(loaded, ports, now, state)
            found.append(outputs)
        return stepping.gather(found)

    def _advance(
        self,
        loaded: Loaded,
        ports: Sequence[Port],
        inputs: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """One run of the graph: its outputs, and the state after it."""
        full, n = self._fill(inputs)
        with self._turn:
            if self._closed:
                raise DeviceError("the model is closed; load it again")
            found = loaded.run([*full, *state])
        return self._cut(ports, found[: len(ports)], n), found[len(ports) :]

    # A stream of steps

    def step(self, *inputs: torch.Tensor) -> Any:
        """The network's outputs at the next time step, and its state goes on.

        What the network sums up over time, or returns after its last step, is given as if this step were
        the last one of a call. A batch keeps its number of samples until :meth:`reset`.

        Args:
            inputs: One time step [N, ...] of each input; an image that the network itself repeats over
                time is the input of every step.

        Raises:
            UsageError: The network is not stepped; or inputs have a dimension for time, or other shapes
                or dtypes; or a running sum is at its end.
            DeviceError: The run failed; the state is as before.
        """
        stepping = self._stepped("step")
        self._check_types(inputs)
        whole = [
            f"input {p.spec.name} is {dtype_name(x.dtype)}{list(x.shape)}: one time step is "
            f"{p.with_batch('N')}"
            for p, x, d in zip(self.inputs, inputs, stepping.inputs, strict=False)
            if d is not None and x.dim() == len(p.spec.shape) + 1
        ]
        if whole:
            raise UsageError(
                f"{'; '.join(whole)}; give step one time step after the other, or call the model with all "
                "of them"
            )
        names = [port.spec.name for port in self._states]
        with self._turn:
            if COUNTER in names:
                self._check_length(round(self._state[names.index(COUNTER)].item()), 1)
            samples = self._fill(inputs)[1]
            if self._samples not in (None, samples):
                raise UsageError(
                    f"{samples} samples, where the steps before had {self._samples}; allowed: the same "
                    "samples at every step; call reset() before others"
                )
            outputs, self._state = self._advance(self._main, self.outputs, inputs, self._state)
            self._samples = samples
        return self._nest(outputs)

    def steps(self, *inputs: torch.Tensor) -> int:
        """How many steps a call with these inputs takes; 0 if the network is not stepped."""
        if self._stepping is None:
            return 0
        self._check_types(inputs)
        return len(self._stepping.split(inputs))

    def reset(self) -> None:
        """Go back to the state before the first step."""
        with self._turn:
            self._state, self._samples = self._initial(), None

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The state after the last :meth:`step`, by the layer's path and the state's name.

        A copy for the whole compiled batch; given back, it goes on from there, also in another process.
        Of how many samples it is, it does not say: those beyond them are as the last of them.

        Raises:
            UsageError: The network is not stepped; or what is set has other names, shapes or dtypes.
        """
        self._stepped("state")
        pairs = zip(self._states, self._state, strict=True)
        return {port.spec.name: value.clone().reshape(port.spec.shape) for port, value in pairs}

    @state.setter
    def state(self, state: Mapping[str, torch.Tensor]) -> None:
        self._stepped("state")
        names = [port.spec.name for port in self._states]
        if not isinstance(state, Mapping):
            raise UsageError(
                f"a state of type {type(state).__name__}, not a dict of tensors; the states are "
                f"{', '.join(names)}; set what model.state gave"
            )
        wrong = [f"no state {name!r}" for name in state if name not in names]
        for port in self._states:
            name, value = port.spec.name, state.get(port.spec.name)
            wanted = f"{dtype_name(port.graph_dtype)}{list(port.spec.shape)}"
            found = "missing"
            if isinstance(value, torch.Tensor):
                found = f"{dtype_name(value.dtype)}{list(value.shape)}"
            if found != wanted:
                wrong.append(f"{name} is {found}, wanted {wanted}")
            elif name == COUNTER and not _is_count(state[name]):
                wrong.append(f"{name} is {state[name].tolist()}, wanted a number of time steps")
        if wrong:
            raise UsageError(
                f"{'; '.join(wrong)}; the states are {', '.join(names)}; set what model.state gave"
            )
        given = ((state[port.spec.name], port.spec.graph_shape) for port in self._states)
        taken = [value.detach().cpu().clone().reshape(size) for value, size in given]
        with self._turn:
            self._state, self._samples = taken, None

    def _initial(self) -> list[torch.Tensor]:
        return [] if self._stepping is None else [s.initial.clone() for s in self._stepping.states]

    def _stepped(self, what: str) -> Stepping:
        if self._stepping is None:
            raise UsageError(
                f"{self._path} runs all {self.T} time steps in one call and has no {what}; call "
                'the model, or convert with time="stepped" (--time stepped)'
            )
        return self._stepping

    def _check_length(self, done: int, more: int) -> None:
        longest = None if self._stepping is None else self._stepping.longest
        if longest is not None and done + more > longest:
            raise UsageError(
                f"{done + more} time steps; {dtype_name(self.dtype)} counts a sum over time exactly up to "
                f"{longest}: call reset() before, convert with dtype float32, or let the network return "
                "every step"
            )

    def probe(self, *inputs: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
        """The network's outputs and the spikes [T, N, ...] of each neuron layer, by its site.

        A network without neurons has no spikes.

        Raises:
            UsageError: The artifact was compiled without a probe, or as for a call.
        """
        if not self.manifest["neurons"]:
            return self(*inputs), {}
        built = self.manifest["probe"]
        if built is None:
            raise UsageError(
                f"{self._path} was compiled without a probe; compile with probe=True (--probe)"
            )
        probes = tuple(map(Port.from_dict, built["outputs"]))
        outputs = (*self.outputs, *probes)
        if self._probe is None:
            self._probe = self._load("probe", outputs)
        values = self._whole(self._probe, outputs, inputs)
        spikes = iter(values[len(self.outputs) :])
        fired = {
            site["name"]: torch.stack([next(spikes) for _ in range(site["T"])])
            if site["layout"] == "steps"
            else next(spikes)
            for site in self.manifest["neurons"]
        }
        return self._nest(values[: len(self.outputs)]), fired

    def _nest(self, outputs: Sequence[torch.Tensor]) -> Any:
        return pytree.tree_unflatten(outputs, self._structure)

    def _fill(self, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        """The inputs as the graph takes them, padded, and how many samples they hold."""
        self._check_types(inputs)
        sizes = {
            x.shape[p.batch_dim]
            for p, x in zip(self.inputs, inputs, strict=False)
            if p.batch_dim is not None and x.dim() > p.batch_dim
        }
        n = min(sizes) if len(sizes) == 1 else self.batch
        wrong = [
            f"input {p.spec.name} is {dtype_name(x.dtype)}{list(x.shape)}"
            for p, x in zip(self.inputs, inputs, strict=False)
            if not p.takes(x, n)
        ]
        if len(inputs) != len(self.inputs):
            wrong.append(f"{len(inputs)} inputs given, {len(self.inputs)} wanted")
        if len(sizes) > 1 or not 1 <= n <= self.batch:
            wrong.append(f"batch {' and '.join(map(str, sorted(sizes)))}")
        if wrong:
            raise self._refused(wrong)
        if n < self.batch:
            self._check_padding(n)
        full = [
            pad(x.detach().resolve_neg(), p.batch_dim, self.batch)
            for p, x in zip(self.inputs, inputs, strict=True)
        ]
        folded = fold([p.spec for p in self.inputs], full, self.dtype)
        self._check_range(full, folded)
        return folded, n

    def _check_range(self, inputs: Sequence[torch.Tensor], folded: Sequence[torch.Tensor]) -> None:
        """Numbers that the graph's type makes infinite would come out as others, finite ones."""
        wrong = [
            f"input {port.spec.name} reaches {x[x.isfinite()].abs().max().item():.6g}, beyond "
            f"{dtype_name(y.dtype)}'s {torch.finfo(y.dtype).max:.6g}"
            for port, x, y in zip(self.inputs, inputs, folded, strict=True)
            if x.is_floating_point()
            and torch.finfo(x.dtype).max > torch.finfo(y.dtype).max
            and not torch.equal(x.isinf().sum(), y.isinf().sum())
        ]
        if wrong:
            raise UsageError(
                f"{'; '.join(wrong)}; scale the inputs down and the first layer's weights up, or convert "
                "with dtype float32"
            )

    def _check_types(self, inputs: Sequence[Any]) -> None:
        others = {type(x).__name__ for x in inputs if not isinstance(x, torch.Tensor)}
        others |= {
            f"Tensor ({'meta' if x.is_meta else str(x.layout).removeprefix('torch.')})"
            for x in inputs
            if isinstance(x, torch.Tensor) and (x.is_meta or x.layout != torch.strided)
        }
        if others:
            kinds = f"inputs of type {', '.join(sorted(others))}, not dense torch tensors"
            counted = f"{len(inputs)} inputs given, {len(self.inputs)} wanted"
            raise self._refused([kinds] + [counted] * (len(inputs) != len(self.inputs)))

    def _refused(self, wrong: Sequence[str]) -> UsageError:
        allowed = ", ".join(p.with_batch("N") for p in self.inputs)
        at = " at each time step" if self._stepping is not None else ""
        return UsageError(
            f"{'; '.join(wrong)}; allowed: {allowed}{at} with 1 <= N <= {self.batch}, the batch that the "
            "artifact was compiled for"
        )

    def _check_padding(self, n: int) -> None:
        # Artifacts written before do not say.
        if self.manifest.get("coupled"):
            raise UsageError(
                f"batch {n}: the network computes samples together, so that a sample's outputs depend on "
                f"the others of its batch or on its place among them, and samples that pad it would "
                f"change them; allowed: a batch of {self.batch}; give {self.batch} samples, or convert "
                f"and compile for a batch of {n}"
            )
        fixed = [f"output {p.spec}" for p in self.outputs if p.batch_dim is None]
        if fixed:
            raise UsageError(
                f"a batch smaller than {self.batch} cannot be padded: {', '.join(fixed)} has no "
                f"batch dimension, or one that cannot be told from the {self.T} time steps; give "
                f"{self.batch} samples, or compile for another batch size"
            )

    def _cut(
        self, ports: Sequence[Port], outputs: Sequence[torch.Tensor], n: int
    ) -> list[torch.Tensor]:
        values = unfold([p.spec for p in ports], outputs)
        if n == self.batch:
            return values
        return [
            y if p.batch_dim is None else y.narrow(p.batch_dim, 0, n)
            for p, y in zip(ports, values, strict=True)
        ]

    def close(self) -> None:
        """Free the device."""
        self._closed = True
        for loaded in (self._main, self._probe):
            if loaded is not None:
                loaded.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def structure_data(structure: pytree.TreeSpec) -> Any:
    """The nesting of the outputs as plain data.

    Raises:
        UnsupportedError: It has other containers than tuples, lists and dicts.
    """
    try:
        return json.loads(pytree.treespec_dumps(structure))
    except NotImplementedError as error:
        finding = Finding(
            rule="outputs",
            where="",
            found=f"the nesting of the outputs cannot be stored ({error})",
            allowed="a tensor, or tuples, lists and dicts of tensors",
            fix="return one of those from the network's forward",
        )
        raise UnsupportedError("the network cannot be compiled:", [finding]) from error


def _structure(data: Any) -> pytree.TreeSpec:
    """The nesting of the outputs, as torch writes it."""
    if hasattr(pytree, "treespec_loads"):
        return pytree.treespec_loads(json.dumps(data))
    return _older_structure(data[1])


def _older_structure(node: Any) -> pytree.TreeSpec:
    """The same for a torch that reads none."""
    if node["type"] is None:
        return pytree.LeafSpec()
    kinds = {"builtins.tuple": tuple, "builtins.list": list, "builtins.dict": dict}
    kind = {**kinds, NONE: Nothing}[node["type"]]
    parts = [_older_structure(part) for part in node["children_spec"]]
    return pytree.TreeSpec(kind, json.loads(node["context"]), parts)


def _stepping(path: Path, manifest: Mapping[str, Any]) -> tuple[Stepping | None, tuple[Port, ...]]:
    """How a stepped artifact's steps make up a call, and the ports of its states."""
    data = manifest.get("stepping")
    if data is None:
        return None, ()
    ports = tuple(map(Port.from_dict, data["states"]))
    initial = load_file(path / STATES)
    states = tuple(State(p.spec.name, initial[p.spec.name]) for p in ports)
    return Stepping(data["steps"], tuple(data["inputs"]), tuple(data["outputs"]), states), ports


def load_onto(
    target: Target, directory: Path, inputs: Sequence[Port], outputs: Sequence[Port], device: int
) -> Loaded:
    """A target's files in ``directory``, loaded for these ports."""
    taken, given = (
        [(p.spec.graph_shape, p.graph_dtype) for p in ports] for ports in (inputs, outputs)
    )
    return target.load(directory, taken, given, device)
