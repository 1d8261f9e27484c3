"""From a network and example arguments to an executable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, memory, problems
from .arguments import Arguments
from .errors import Error
from .executable import Executable, Schedule, Training
from .problems import Problem, Problems, RefusedError
from .settings import place
from .trace import Traced, Tracer
from .updates import Recipe, Updater

_logger = logging.getLogger("poptorch")


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
        RefusedError: With everything that the SDK refuses and one trace shows.
        AssertionError: A block that the execution strategy does not know.
    """
    options, recipe = request.options, request.recipe
    weights = device_weights(request.model)
    traced, found = _trace(request, weights)
    graph = traced.graph
    loss, trained = -1, tuple[str, ...]()
    originals = dict(_named(request.model))
    members = {} if recipe is None else recipe.members
    if recipe is not None:
        group_of = {n: members[id(p)] for n, p in originals.items() if id(p) in members}
        wanted = [n for n in group_of if n in graph.weights and weights[n].requires_grad]
        with found.collecting():
            loss = checks.final_loss(graph)
            checks.gradients(traced, loss, wanted)
        trained = tuple(wanted)
    if found:
        raise RefusedError(found)
    anchors = {
        short: (_slot_named(traced, name), mode, period)
        for short, (name, mode, period) in request.anchors.items()
    }
    graph.plan(
        [*([loss] if recipe is not None else []), *(slot for slot, _, _ in anchors.values())]
    )
    pipelined = options._execution_strategy.pipelined
    with found.collecting():
        checks.shapes(graph)
    with found.collecting():
        _check_buffers(traced, request)
    with found.collecting():
        checks.ipus(traced, request.schedule.replicas, options.auto_round_num_ipus)
    if pipelined:
        with found.collecting():
            checks.pipeline(
                traced,
                recipe is not None,
                request.schedule.accumulation,
                request.schedule.iterations,
            )
    training = None
    if recipe is not None:
        updater = Updater(recipe, {n: weights[n] for n in trained}, group_of)
        training = Training(loss, trained, updater, request.reduce)
    with found.collecting():
        _check_memory(traced, training, request.schedule.accumulation, options, pipelined)
    if found:
        raise RefusedError(found)
    checks.outputs(graph, request.schedule.returned)
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


def _trace(request: Request, weights: Mapping[str, Tensor]) -> tuple[Traced, Problems]:
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
    with _on_device(model, weights) as reassigned, tracer.recording():
        try:
            outputs = model(*local.args, **local.kwargs)
        except TypeError as error:
            if "poptorch" in str(error):
                raise Error(str(error)) from error
            raise
    traced = tracer.finish(outputs)
    with torch.no_grad():
        for name, value in weights.items():  # what the trace wrote was no run
            value.copy_(before[name])
    return traced, Problems([*traced.problems, *reassigned])


class _Store(dict[str, Tensor | None]):
    """A module's buffers or parameters, and the user's line that reassigned each."""

    def __init__(self, held: Mapping[str, Tensor | None]) -> None:
        super().__init__(held)
        self.places: dict[str, str] = {}

    def __setitem__(self, key: str, value: Tensor | None) -> None:
        self.places.setdefault(key, place())
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.places.setdefault(key, place())
        super().__delitem__(key)


@contextmanager
def _on_device(model: Any, weights: Mapping[str, Tensor]) -> Iterator[list[Problem]]:
    """Let the modules hold the device's tensors; what they reassign is a problem."""
    found: list[Problem] = []
    if not isinstance(model, nn.Module):
        yield found
        return
    held = {id(original): weights[name] for name, original in _named(model)}
    stores = [
        (path, module, attribute, vars(module)[attribute])
        for path, module in model.named_modules()
        for attribute in ("_buffers", "_parameters")
    ]
    lists = [(m, m._flat_weights) for m in model.modules() if hasattr(m, "_flat_weights")]
    for _, module, attribute, store in stores:
        placed = {k: None if v is None else held[id(v)] for k, v in store.items()}
        vars(module)[attribute] = _Store(placed)
    for module, flat in lists:
        module._flat_weights = [held.get(id(w), w) for w in flat]  # type: ignore[assignment, union-attr]
    try:
        yield found
        for path, module, attribute, store in stores:
            for key, value in store.items():
                if value is not None:
                    found += _reassigned(path, key, held[id(value)], vars(module)[attribute])
    finally:
        for _, module, attribute, store in stores:
            vars(module)[attribute] = store
        for module, flat in lists:
            module._flat_weights = flat


def _reassigned(path: str, key: str, held: Tensor, now: _Store) -> Iterator[Problem]:
    kind = "Parameter" if isinstance(held, nn.Parameter) else "Buffer"
    name = f"{path}.{key}" if path else key
    if key not in now:
        text = f"{kind} {name} is removed from the model when calling the forward method."
    elif now[key] is not held:
        text = (
            f"{kind} {name} is reassigned within the model when calling the forward method. This is "
            f"not supported. Consider using self.{name}.copy_(src) to copy data from a source tensor, "
            "where src is the name of the source tensor."
        )
    else:
        return
    yield Problem(problems.REASSIGNED, f"{text} ({now.places[key]})", path)


def _slot_named(traced: Traced, name: str) -> int:
    found = tensor_names(traced.graph)
    if name not in found:
        text = f"No tensor with name {name} found; getTensorNames() lists them"
        raise RefusedError([Problem(problems.NAME, text)])
    return found[name]


def tensor_names(graph: Any) -> dict[str, int]:
    """Slot of every tensor of a graph, by name."""
    found = {f"input_{i}": slot for i, slot in enumerate(graph.inputs)}
    found.update(graph.weights)
    for node in graph.nodes:
        for i, out in enumerate(node.outs):
            found[node.name if len(node.outs) == 1 else f"{node.name}[{i}]"] = out
    return found


def _check_buffers(traced: Traced, request: Request) -> None:
    graph = traced.graph
    written = [n for n, s in graph.weights.items() if s in graph.written]
    if written and request.schedule.replicas > 1 and request.options.broadcast_buffers:
        text = (
            "PopTorch does not support broadcasting buffers. If your model is able to tolerate buffers "
            "becoming out of sync between replicas, you can disable buffer broadcasting using "
            f"poptorch.Options.broadcastBuffers(False). (Written: {', '.join(written)})"
        )
        raise RefusedError([Problem(problems.BUFFERS, text)])


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
