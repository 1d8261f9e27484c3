"""From a network and example arguments to an executable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, memory
from .arguments import Arguments
from .errors import Error
from .executable import Executable, Schedule, Training
from .trace import Traced, Tracer
from .updates import Recipe, Updater

_logger = logging.getLogger("poptorch")


_STATE = (
    "State that begins anew in every call belongs into local variables of forward: "
    "spikeport.targets.ipu.training_module rewrites the neurons of SpikingJelly and snnTorch so."
)


@dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
        model: A module, or a function.
        arguments: Those of one micro-batch.
        schedule: How a combined batch runs.
        options: ``poptorch.Options``.
        recipe: The optimizer; None in inference.
        anchors: Name, output mode and period of inner tensors, by the user's name.
        reduce: See :class:`Training`.
    """

    model: nn.Module | Callable[..., Any]
    arguments: Arguments
    schedule: Schedule
    options: Any
    recipe: Recipe | None
    anchors: Mapping[str, tuple[str, int, int]]
    reduce: tuple[Callable[[Tensor], None], int] | None = None


def compile_model(request: Request) -> Executable:
    """Trace, check and plan a model.

    Raises:
        Error: What the SDK refuses, everything that one trace shows in one text.
        AssertionError: A block that the execution strategy does not know.
    """
    options, recipe = request.options, request.recipe
    weights = device_weights(request.model)
    traced, problems = _trace(request, weights)
    graph = traced.graph
    loss, trained = -1, tuple[str, ...]()
    originals = dict(_named(request.model))
    members = {} if recipe is None else recipe.members
    if recipe is not None:
        group_of = {n: members[id(p)] for n, p in originals.items() if id(p) in members}
        wanted = [n for n in group_of if n in graph.weights and weights[n].requires_grad]
        try:
            loss = checks.final_loss(graph)
            checks.gradients(traced, loss, wanted)
        except Error as error:
            problems.append(error.message)
        trained = tuple(wanted)
    if problems:
        raise Error("\n".join(problems))
    anchors = {
        short: (_slot_named(traced, name), mode, period)
        for short, (name, mode, period) in request.anchors.items()
    }
    graph.plan(
        [*([loss] if recipe is not None else []), *(slot for slot, _, _ in anchors.values())]
    )
    checks.shapes(graph)
    checks.outputs(graph, request.schedule.returned)
    _check_buffers(traced, weights, request)
    checks.ipus(traced, request.schedule.replicas, options.auto_round_num_ipus)
    pipelined = options._execution_strategy.pipelined
    if pipelined:
        checks.pipeline(
            traced, recipe is not None, request.schedule.accumulation, request.schedule.iterations
        )
    training = None
    if recipe is not None:
        updater = Updater(recipe, {n: weights[n] for n in trained}, group_of)
        training = Training(loss, trained, updater, request.reduce)
    _check_memory(traced, training, request.schedule.accumulation, options, pipelined)
    checking = bool(options._Popart.options.get("enableFloatingPointChecks", False))
    return Executable(graph, weights, request.schedule, training, anchors, checking)


def _named(model: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, nn.Module):
        yield from model.named_parameters()
        yield from model.named_buffers()


def device_weights(model: Any) -> dict[str, Tensor]:
    """Copies of parameters and buffers as the device keeps them, float64 as float32."""
    made: dict[str, Tensor] = {}
    for name, value in _named(model):
        copy = value.detach().clone()
        if copy.dtype == torch.float64:
            copy = copy.float()
        made[name] = nn.Parameter(copy, value.requires_grad) if _is_parameter(value) else copy
    return made


def _is_parameter(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter)


def _trace(request: Request, weights: Mapping[str, Tensor]) -> tuple[Traced, list[str]]:
    model, arguments = request.model, request.arguments
    modules = list(model.named_modules()) if isinstance(model, nn.Module) else []
    strategy = request.options._execution_strategy
    strategy.restart()
    tracer = Tracer(request.recipe is not None, {id(m): name for name, m in modules}, strategy)
    local = arguments.map(lambda t: t.detach().clone())
    for value in local.tensors():
        tracer.input(value)
    for name, original in _named(model):
        tracer.weight(name, weights[name], original)
    before = {name: value.detach().clone() for name, value in weights.items()}
    with _on_device(model, weights) as problems, tracer.recording():
        try:
            outputs = model(*local.args, **local.kwargs)
        except TypeError as error:
            if "poptorch" in str(error):
                raise Error(str(error)) from error
            raise
    try:
        traced = tracer.finish(outputs)
    except TypeError as error:
        raise Error(str(error)) from error
    with torch.no_grad():
        for name, value in weights.items():  # what the trace wrote was no run
            value.copy_(before[name])
    return traced, [*traced.problems, *problems]


@contextmanager
def _on_device(model: Any, weights: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Let the modules hold the device's tensors; what they reassign is a problem."""
    problems: list[str] = []
    if not isinstance(model, nn.Module):
        yield problems
        return
    held = {id(original): weights[name] for name, original in _named(model)}
    places = [
        (kind, f"{path}.{key}" if path else key, store, key, value)
        for path, module in model.named_modules(remove_duplicate=True)
        for kind, store in (("Buffer", module._buffers), ("Parameter", module._parameters))
        for key, value in store.items()
        if value is not None
    ]
    lists = [(m, m._flat_weights) for m in model.modules() if hasattr(m, "_flat_weights")]
    for _, _, store, key, value in places:
        store[key] = held[id(value)]
    for module, flat in lists:
        module._flat_weights = [held.get(id(w), w) for w in flat]  # type: ignore[assignment, union-attr]
    try:
        yield problems
        for kind, name, store, key, value in places:
            if key not in store:
                problems.append(
                    f"{kind} {name} is removed from the model when calling the forward method."
                )
            elif store[key] is not held[id(value)]:
                problems.append(
                    f"{kind} {name} is reassigned within the model when calling the forward method. "
                    f"This is not supported. Consider using self.{name}.copy_(src) to copy data from "
                    "a source tensor, where src is the name of the source tensor."
                )
        if problems:
            problems.append(_STATE)
    finally:
        for _, _, store, key, value in places:
            store[key] = value
        for module, flat in lists:
            module._flat_weights = flat


def _slot_named(traced: Traced, name: str) -> int:
    found = tensor_names(traced.graph)
    if name not in found:
        raise Error(f"No tensor with name {name} found; getTensorNames() lists them")
    return found[name]


def tensor_names(graph: Any) -> dict[str, int]:
    """Slot of every tensor of a graph, by name."""
    found = {f"input_{i}": slot for i, slot in enumerate(graph.inputs)}
    found.update(graph.weights)
    for node in graph.nodes:
        for place, out in enumerate(node.outs):
            found[node.name if len(node.outs) == 1 else f"{node.name}[{place}]"] = out
    return found


def _check_buffers(traced: Traced, weights: Mapping[str, Tensor], request: Request) -> None:
    graph = traced.graph
    written = [n for n, s in graph.weights.items() if s in graph.written]
    if written and request.schedule.replicas > 1 and request.options.broadcast_buffers:
        raise Error(
            "PopTorch does not support broadcasting buffers. If your model is able to tolerate buffers "
            "becoming out of sync between replicas, you can disable buffer broadcasting using "
            f"poptorch.Options.broadcastBuffers(False). (Written: {', '.join(written)})"
        )


def _check_memory(
    traced: Traced, training: Training | None, accumulation: int, options: Any, pipelined: bool
) -> None:
    kinds = {
        "weights": "weight",
        "activations": "activation",
        "optimizer state": "optimizer",
        "gradients": "accumulator",
    }
    off = frozenset(k for k, kind in kinds.items() if not options.TensorLocations.on_chip(kind))
    state: dict[str, int] = {}
    if training is not None:
        for name in training.trained:
            values = training.updater.state[name].values()
            state[name] = sum(t.numel() * t.element_size() for t in values)
    found = memory.estimate(traced, state, training is not None, accumulation, pipelined, off)
    for ipu, estimate in sorted(found.items()):
        _logger.info("IPU %d: estimated %s", ipu, estimate)
    memory.check(found)
