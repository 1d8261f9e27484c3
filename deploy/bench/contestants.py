"""Ways to run one layer of neurons over T steps, ours and others', under one signature."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...converters.surrogates import ATan
from ...targets.cuda import FusedNode, IFNode, LIFNode

#: The neurons, by the names of the tables.
NODES: dict[str, Callable[..., FusedNode]] = {"IF": IFNode, "LIF": LIFNode}
STEP_TORCH, STEP_FUSED = "step by step, torch", "step by step, fused"
LAYER_TORCH, LAYER_FUSED = "layer by layer, torch", "layer by layer, fused"
COMPILED = "torch.compile"
SPIKINGJELLY = "SpikingJelly"


@dataclass(frozen=True)
class Contestant:
    """One way to run a layer.

    Attributes:
        name: Its column in the tables.
        run: x_seq [T, N] -> spikes [T, N], each call from rest.
        ours: Whether a failure is ours; another's is reported in the tables.
    """

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    ours: bool = True


def patterns(kind: str, fused: bool) -> Iterator[Contestant]:
    """The forward patterns of this project; without ``fused``, those in torch alone."""
    yield Contestant(STEP_TORCH, _step_by_step(NODES[kind](backend="torch", step_mode="s")))
    if fused:
        yield Contestant(STEP_FUSED, _step_by_step(NODES[kind](backend="fused", step_mode="s")))
    yield Contestant(LAYER_TORCH, NODES[kind](backend="torch"))
    if fused:
        yield Contestant(LAYER_FUSED, NODES[kind](backend="fused"))


def _step_by_step(node: FusedNode) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x_seq: torch.Tensor) -> torch.Tensor:
        node.reset()
        return torch.stack([node(x) for x in x_seq])

    return run


def compiled(kind: str, **options: Any) -> Contestant:
    """``torch.compile`` of the plain loop over time; options are its own."""
    node = NODES[kind]()
    neuron, surrogate = node.neuron, node.surrogate

    def loop(x_seq: torch.Tensor) -> torch.Tensor:
        state, spikes = neuron.initial(x_seq[0]), []
        for t in range(x_seq.shape[0]):
            s, state, _ = neuron.train_step(state, x_seq[t], surrogate, False, t)
            spikes.append(s)
        return torch.stack(spikes)

    torch.compiler.reset()  # so that no cell counts against the limit of recompilations of another
    return Contestant(COMPILED, torch.compile(loop, dynamic=False, **options), ours=False)


def spikingjelly(kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Contestant]:
    """The ways through SpikingJelly 2.0 that there are for a dtype and device.

    Its node keeps the state in the dtype of x, and its kernels take a float32 state only: in float16 the
    node runs SpikingJelly's torch reference. Its kernels are reached there by its precision settings, or
    through its functional interface with a float32 state.

    Raises:
        ImportError: SpikingJelly 2.0, or something that it needs, is not installed.
    """
    sj = "spikingjelly.activation_based"
    neuron, functional, surrogate, precision = (
        importlib.import_module(f"{sj}.{n}")
        for n in ("neuron", "functional", "surrogate", "precision")
    )
    make = {"IF": neuron.IFNode, "LIF": neuron.LIFNode}[kind]
    implementation = functional.neuron_implementation(kind.lower(), device)["implementation"]
    float32 = dtype == torch.float32

    def contestant(way: str, backend: str, run: Callable[..., Any]) -> Contestant:
        return Contestant(f"{SPIKINGJELLY} {way} [{backend}]", run, ours=False)

    def node() -> Any:
        return make(surrogate_function=surrogate.ATan(ATan().parameters["alpha"]), step_mode="m")

    def from_rest(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_seq: torch.Tensor) -> torch.Tensor:
            module.reset()
            spikes: torch.Tensor = module(x_seq)
            return spikes

        return run

    yield contestant("node", implementation if float32 else "torch-reference", from_rest(node()))
    if device.type != "cuda":
        return
    mode = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    config = precision.PrecisionConfig(mode=mode, neuron_storage=mode)

    # The preparation is a part of the first call, so that its refusal is reported as any failure is.
    prepared: list[Any] = []

    def by_precision(x_seq: torch.Tensor) -> torch.Tensor:
        if not prepared:
            made = precision.prepare_model_for_precision(node(), device, config)
            prepared.append(from_rest(made.model))
        spikes: torch.Tensor = prepared[0](x_seq)
        return spikes

    yield contestant("precision", "triton", by_precision)
    if float32:
        return
    step = {"IF": functional.if_multi_step, "LIF": functional.lif_multi_step}[kind]
    options = {"tau": 2.0} if kind == "LIF" else {}
    options["surrogate_function"] = surrogate.ATan(ATan().parameters["alpha"])

    def by_function(x_seq: torch.Tensor) -> torch.Tensor:
        v = torch.zeros(x_seq.shape[1:], device=x_seq.device)
        spikes: torch.Tensor = step(x_seq, v, **options)[0]
        return spikes

    yield contestant("functional", implementation, by_function)
