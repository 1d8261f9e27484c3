"""The CUDA target: inference on a GPU with fused neurons, replayed as one CUDA graph.

Under ``TRITON_INTERPRET=1`` the same kernels run on the CPU, without CUDA graphs, for tests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from ...converters.equations import named
from ...converters.errors import DeviceError, Finding, TargetUnavailableError, UsageError
from ...converters.neurons import Neuron
from ...converters.ops import RESHAPE, aten, steps
from ...converters.passes import Pass
from ...converters.precompute import precomputed
from ...converters.program import NEURON, NEURON_STEP, STATE, Program
from ...converters.surrogates import ATan
from .. import graphs
from ..base import SDK, Capabilities, Compiled, Loaded, chosen, memory, rewrites
from . import kernels, ops
from .capture import captured
from .codegen import Forward, Spec, forward_source
from .kernels import Call

_SETTINGS = "settings.json"
#: Options that a user may set, with their defaults.
_OPTIONS = {"graph": True}
#: What max_pool2d's arguments after the first are by default.
_POOLING = (None, (), (0, 0), (1, 1), False)
#: Libraries choose their algorithms and set up their workspaces in the first runs.
_WARM_UP = 3
#: Part of a kernel's declaration, of no effect without a backward pass.
_SURROGATE = ATan().to_json()
#: How a parameter is read has no part in whether a kernel can be written.
_ANY_READ: Literal["scalar"] = "scalar"
_CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})

CAPABILITIES = Capabilities(
    ops=None,
    dtypes=frozenset(
        {torch.float16, torch.float32, torch.bool, torch.uint8}
        | {torch.int8, torch.int16, torch.int32, torch.int64}
    ),
    notes=(
        "neurons run as one kernel each over all time steps, in float32 whatever the graph's type is",
        "no TF32 and no float16 accumulation, whatever torch is set to",
        "shapes are static: the batch of the example input is captured in a CUDA graph",
    ),
)


class Cuda:
    """GPUs, through PyTorch and Triton."""

    name = "cuda"
    capabilities = CAPABILITIES

    def default_dtype(self) -> torch.dtype:
        """float32, as networks are trained."""
        return torch.float32

    def passes(self, dtype: torch.dtype) -> tuple[Pass, ...]:
        """The rewrites in order; neurons stay single operators.

        Raises:
            UsageError: Another dtype than float32 and float16 was asked for.
        """
        if dtype not in (torch.float16, torch.float32):
            raise UsageError(f"the cuda target computes in float32 or float16, not in {dtype}")
        return rewrites(dtype)

    def inspect(self, program: Program) -> Iterator[Finding]:
        """The neurons for which no kernel can be written."""
        for site in program.sites:
            reads = tuple((name, _ANY_READ) for name in site.neuron.tensors())
            spec = Spec(site.neuron.to_json(), reads, _SURROGATE, detach_reset=False, steps=1)
            try:
                forward_source(spec, Forward())
            except UsageError as error:
                yield Finding(
                    rule="kernel",
                    where=site.name,
                    target=self.name,
                    found=f"{site.neuron.describe()}: {error}",
                    allowed="equations of plain arithmetic, exp, tanh and sigmoid",
                    fix="write the equation with those, or use the target reference",
                )

    def sdk(self) -> SDK:
        """PyTorch with its CUDA version; the device ids are those of torch."""
        if kernels.interpreted():
            triton = kernels.triton().__version__
            settings = {"triton": triton, "kernels": "interpreted on the CPU, no CUDA graphs"}
            return SDK("torch", torch.__version__, True, (0,), settings)
        if not torch.cuda.is_available() or torch.version.cuda is None:
            found = (
                f"torch {torch.__version__} is a build without CUDA; install one with it"
                if torch.version.cuda is None
                else f"torch {torch.__version__} sees none; see nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
            raise TargetUnavailableError(
                f"no CUDA GPU: {found}. The target reference runs on the CPU; to test the kernels "
                "there, set TRITON_INTERPRET=1 before Python starts"
            )
        devices = tuple(range(torch.cuda.device_count()))
        settings = {
            "triton": kernels.triton().__version__,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "gpus": [torch.cuda.get_device_name(i) for i in devices],
        }
        version = f"{torch.__version__}, CUDA {torch.version.cuda}"
        return SDK("torch", version, False, devices, settings)

    def compile(self, program: Program, directory: Path, options: Mapping[str, Any]) -> Compiled:
        """Write the graph and its weights; GPU code is made when they are loaded.

        Args:
            program: The program.
            directory: Where to.
            options: ``graph``: whether a run replays a CUDA graph (True), or launches one kernel after
                another.
        """
        taken = chosen(self.name, options, _OPTIONS)
        if not isinstance(taken["graph"], bool):
            raise UsageError(f"graph is {taken['graph']!r}; allowed: True, False")
        settings = json.dumps({**taken, "memory": memory(program)})
        (directory / _SETTINGS).write_text(settings, encoding="utf-8")
        return Compiled(taken, (*graphs.write(program, directory), _SETTINGS))

    def load(
        self,
        directory: Path,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: int,
    ) -> Loaded:
        """Move the weights to a GPU, compile the kernels, and capture the CUDA graph."""
        devices = self.sdk().devices
        if device not in devices:
            there = ", ".join(f"{i} ({_describe(_device(i))})" for i in devices)
            raise DeviceError(f"no device {device}; there are {there}")
        settings = json.loads((directory / _SETTINGS).read_text(encoding="utf-8"))
        module, on = graphs.read(directory), _device(device)
        if on.type == "cpu" or not settings["graph"]:
            return _Launched(module, on, settings["memory"])
        return _Captured(module, on, settings["memory"], inputs)


def _device(number: int) -> torch.device:
    return torch.device("cpu") if kernels.interpreted() else torch.device("cuda", number)


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return "the CPU, where Triton interprets its kernels"
    return torch.cuda.get_device_name(device)


class _Executor(graphs.ChannelsInnermost):
    """Runs a graph with fused neurons; its tensors move to the device."""

    extra_traceback = False  # a node's text would go into the middle of an error's

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        _precompute(module)
        super().__init__(module.to(device))
        for n in module.graph.find_nodes(op="call_function", target=aten.conv2d.default):
            at = n.args[1]
            if isinstance(at, fx.Node) and at.op == "get_attr":
                weight = self.fetch_attr(str(at.target))
                if weight.shape[1] == 1:
                    weight.data = graphs.one_channel_innermost(weight)
        for n in module.graph.nodes:
            # What makes a tensor from nothing is told where.
            schema = getattr(n.target, "_schema", None)
            takes = {a.name for a in schema.arguments} if schema is not None else set()
            if "device" in takes and not n.all_input_nodes:
                n.kwargs = {**n.kwargs, "device": device}

        neurons = module.graph.find_nodes(op="call_function", target=NEURON)
        #: Layers of which a state is read as well, by the node of that, each the other's: one kernel.
        self._twins: dict[fx.Node, fx.Node] = {}
        layers = {_layer(n): n for n in neurons}
        for n in module.graph.find_nodes(op="call_function", target=STATE):
            if (twin := layers.pop(_layer(n), None)) is not None:
                self._twins |= {n: twin, twin: n}
        #: Neurons that only a max pooling reads, which their kernels may do as well, with its node.
        self._pooled = {
            n: next(iter(n.users))
            for n in neurons
            if n not in self._twins
            and len(n.users) == 1
            and _window(next(iter(n.users))) is not None
        }
        #: As a norm that the kernel applies, the bias of the convolution before a neuron: cuDNN would
        #: leave it to a pass of its own.
        self._norms = {n: norm for n in neurons if (norm := self._take_bias(n)) is not None}
        self._done: dict[fx.Node, Any] = {}

    def _take_bias(self, neuron: fx.Node) -> list[torch.Tensor] | None:
        """Mean, 1 / deviation, weight and bias that add, from now on, what its convolution added."""
        x, layout = neuron.args[0], neuron.args[3]
        if not isinstance(x, fx.Node) or x.target not in _CONVOLUTIONS or len(x.users) > 1:
            return None
        bias = x.args[2] if len(x.args) > 2 else None
        if layout == "stepped" or not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return None
        x.update_arg(2, None)
        taken: torch.Tensor = self.fetch_attr(str(bias.target)).float()
        return [torch.zeros_like(taken), *[torch.ones_like(taken)] * 2, taken]

    def run(self, *inputs: Any, **options: Any) -> Any:
        """The graph's outputs; what a run that failed has left is forgotten."""
        self._done.clear()
        return super().run(*inputs, **options)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; a neuron's kernel does what it can of the nodes around it."""
        if n in self._done:
            return self._done.pop(n)
        if n.target not in (NEURON, STATE):
            return super().run_node(n)
        x, params, spec, layout, T = self.fetch_args_kwargs_from_env(n)[0][:5]
        x, twin = steps(x, layout, T), self._twins.get(n)
        if (state := n if n.target is STATE else twin) is not None:
            index: Any = state.args[5]
            both = _with_state(x, params, spec, index)
            spikes, values = both if layout == "stepped" else (y.flatten(0, 1) for y in both)
            if twin is not None:
                self._done[twin] = spikes if state is n else values
            return values if state is n else spikes
        pooling, whole = self._pooled.get(n), (1, 1)
        window = _window(pooling) if pooling is not None and layout != "stepped" else None
        if window is not None and kernels.pools(x, window, params):
            whole = window
        spikes, _ = _neuron(x, params, None, spec, window=whole, norm=self._norms.get(n, ()))
        spikes = spikes if layout == "stepped" else spikes.flatten(0, 1)
        if pooling is not None and whole != (1, 1):
            self._done[pooling] = spikes
        return spikes

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operator's value, that of a neuron's step from its kernel."""
        if target is NEURON_STEP:
            x, state, params, spec, t = args
            spikes, after = _neuron(x.unsqueeze(0), params, state if t else None, spec, final=True)
            return spikes.squeeze(0), after
        return super().call_function(target, args, kwargs)


def _precompute(module: fx.GraphModule) -> None:
    """Give the neurons what they would compute of their parameters alone."""
    computed: dict[tuple[Any, ...], tuple[list[fx.Node], str]] = {}
    for n in module.graph.nodes:
        if n.target not in (NEURON, STATE, NEURON_STEP):
            continue
        at = 3 if n.target is NEURON_STEP else 2
        given = (*n.args[at - 1], n.args[at])
        if given in computed:
            n.args = (*n.args[: at - 1], *computed[given], *n.args[at + 1 :])
            continue
        tensors = (attrgetter(p.target)(module) for p in n.args[at - 1])
        neuron = Neuron.from_json(n.args[at], tensors)
        if (known := precomputed(neuron)) is neuron:
            continue
        params = []
        for name, value in known.tensors().items():
            module.register_buffer(f"{n.name}_{name}", value)
            with module.graph.inserting_before(n):
                params.append(module.graph.get_attr(f"{n.name}_{name}"))
        computed[given] = params, known.to_json()
        n.args = (*n.args[: at - 1], *computed[given], *n.args[at + 1 :])


def _layer(n: fx.Node) -> tuple[Any, ...]:
    """What tells the layer that a node computes from others."""
    x, params, *rest = n.args[:5]
    if isinstance(x, fx.Node) and x.target is RESHAPE:
        x, size = x.args
        return x, str(size), str(params), *rest
    return x, str(params), *rest


def _window(node: fx.Node) -> tuple[int, int] | None:
    """The windows of a max pooling that a neuron's kernel may do; None for every other node."""
    if node.target is not aten.max_pool2d.default or node.kwargs:
        return None
    given: tuple[Any, ...] = (*node.args[1:], *_POOLING[len(node.args) - 1 :])
    (height, width), stride, padding, dilation = given[:4]
    plain = tuple(stride) in ((), (height, width)) and not given[4]
    return (height, width) if plain and not any(padding) and set(dilation) == {1} else None


def _neuron(
    x: torch.Tensor,
    params: Sequence[torch.Tensor],
    initial: torch.Tensor | None,
    spec: str,
    final: bool = False,
    window: tuple[int, int] = (1, 1),
    norm: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes [T, N, ...] of x [T, N, ...], pooled over windows, and the last state if ``final``."""
    spikes, last, _, _ = ops.fused_neuron(
        x,
        norm=norm,
        params=params,
        initial=initial,
        neuron=spec,
        surrogate=_SURROGATE,
        detach_reset=False,
        batch_statistics=False,
        final=final,
        v_seq=False,
        checkpoints=False,
        window=window,
    )
    return spikes, last


def _with_state(
    x: torch.Tensor, params: Sequence[torch.Tensor], spec: str, index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes [T, N, ...] of x [T, N, ...], and one of the states [T, N, ...] after each step."""
    states = ("v", *named(json.loads(spec)["dynamics"]).states)
    call = Call.of(x, [], params, spec, _SURROGATE, detach_reset=False)
    spikes, _, values, _ = ops.forward(call, None, final=False, sequence=states[index])
    return spikes, values


class _Launched:
    """A graph on a device, one kernel launched after another."""

    def __init__(self, module: fx.GraphModule, device: torch.device, need: int) -> None:
        self._device, self._need = device, need
        with _device_errors(device, need):
            self._executor = _Executor(module, device)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs, where the first input lies."""
        device = self._device
        with _device_errors(device, self._need), graphs.exact_sums(device), torch.no_grad():
            outputs = self._executor.run(*(x.to(device) for x in inputs))
            return [y.to(inputs[0].device, copy=True) for y in outputs]

    def close(self) -> None:
        """Free the device's memory."""
        self._executor.module.to("meta")


class _Captured:
    """A graph on a GPU, captured once and replayed on the caller's stream."""

    def __init__(
        self,
        module: fx.GraphModule,
        device: torch.device,
        need: int,
        inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        self._device, self._need = device, need
        # The buffers are one: calls take turns, also from several threads or streams.
        self._turn = threading.Lock()
        with _device_errors(device, need):
            self._executor = _Executor(module, device)
        with _device_errors(device, need), graphs.exact_sums(device), torch.no_grad():
            # A stream of its own: libraries keep a workspace for each, which a graph goes on using.
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._inputs = [torch.zeros(s, dtype=dtype, device=device) for s, dtype in inputs]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._executor.run(*self._inputs)
            self._graph, self._outputs = captured(
                lambda: list(self._executor.run(*self._inputs)),
                stream,
                lambda reason: DeviceError(
                    f"the program cannot be captured as a CUDA graph: {reason}. Compile it with "
                    "graph=False (--option graph=False), which launches its kernels one by one"
                ),
            )

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs, where the first input lies."""
        on = torch.cuda.device(self._device)
        with self._turn, _device_errors(self._device, self._need), on, torch.no_grad():
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            for mine, x in zip(self._inputs, inputs, strict=True):
                mine.copy_(x, non_blocking=True)
            self._graph.replay()
            outputs = [y.to(inputs[0].device, copy=True) for y in self._outputs]
            self._done.record(stream)
            return outputs

    def close(self) -> None:
        """Free the device's memory, once no run is using it."""
        self._done.synchronize()
        self._graph.reset()
        self._inputs, self._outputs = [], []
        self._executor.module.to("meta")


@contextmanager
def _device_errors(device: torch.device, need: int) -> Iterator[None]:
    """What torch raises on the device as a DeviceError; ``need`` is in bytes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise DeviceError(
            f"{device} ({_describe(device)}) has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, the "
            f"program takes {need / 2**30:.1f} GiB for weights and live activations; convert with a "
            "smaller example input, or free the device"
        ) from error
    except RuntimeError as error:
        raise DeviceError(f"{device} ({_describe(device)}) failed: {error}") from error
