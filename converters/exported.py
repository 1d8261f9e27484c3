"""``torch.export`` of a network, and what keeps its graph from saying what the network does."""

from __future__ import annotations

import io
import keyword
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import ops
from .errors import CaptureError, Finding
from .ops import Node, aten
from .program import NEURON_STEP, short
from .stand_in import StateAccessError

HEADLINE = "the network cannot be captured:"


def export(net: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
    """The exported network, decomposed to functional ATen.

    Raises:
        CaptureError: It cannot be exported, or its graph would not follow from its inputs alone.
    """
    try:
        # Without gradients a forward's torch.no_grad() changes nothing, and leaves no trace.
        with _quiet(), torch.no_grad():
            exported = torch.export.export(net, args, strict=False)
            findings = [*_lower_precision(exported.graph_module)]
            program = exported.run_decompositions(_simpler())
    except StateAccessError:
        raise
    except SyntaxError as error:
        raise CaptureError(
            HEADLINE, [*map(_keyword, _keywords(net))] or [_failed(error)]
        ) from error
    except Exception as error:
        raise CaptureError(HEADLINE, [_failed(error)]) from error
    signature = program.graph_signature
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    # Older releases of torch take no parameter for something that is written.
    mutated += [*getattr(signature, "parameters_to_mutate", {}).values()]
    findings += [_written(name) for name in mutated]
    findings += list(_undetermined(program.graph))
    if findings:
        raise CaptureError(HEADLINE, findings)
    return program


#: What torch says of a failure besides its error, and the level from which it may: torch 2.6 logs errors.
_LOGS = {
    "torch.fx.experimental.symbolic_shapes": logging.ERROR,
    "torch.fx.experimental.recording": logging.CRITICAL,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch writes of a failure besides its error: the graph so far, its symbols."""
    logs = {logging.getLogger(name): level for name, level in _LOGS.items()}
    before = {log: log.level for log in logs}
    for log, level in logs.items():
        log.setLevel(level)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in before.items():
            log.setLevel(level)


#: Operators that torch computes by others, or that only move values: in those they have one spelling.
_COMPOSED = (
    "all all.dim aminmax argsort argsort.stable atleast_1d.Sequence atleast_2d.Sequence "
    "atleast_3d.Sequence broadcast_tensors chain_matmul channel_shuffle clamp_min.Tensor column_stack "
    "cosine_similarity count_nonzero count_nonzero.dim_IntList cross diff dstack einsum frac ger "
    "gru_cell hstack inner isclose isfinite kron linalg_cross linalg_multi_dot lstm_cell "
    "masked_fill.Scalar masked_fill.Tensor meshgrid meshgrid.indexing msort norm.ScalarOpt_dim "
    "one_hot outer pad pairwise_distance pixel_shuffle pixel_unshuffle prelu "
    "repeat_interleave.self_int rnn_relu_cell rnn_tanh_cell rot90 take_along_dim tensordot tile tril "
    "triu type_as vstack"
)


@cache
def _simpler() -> dict[Any, Any]:
    """Decompositions of :data:`_COMPOSED`, those that this torch has."""
    known = torch.export.default_decompositions()
    overloads = (
        operator.attrgetter(f"{name}.default" if "." not in name else name)(aten)
        for name in _COMPOSED.split()
    )
    return {o: known[o] for o in overloads if o in known}


def place(error: BaseException) -> str:
    """File and line of the user's code that an error came from."""
    skip = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(skip)
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "inside torch"


def _failed(error: Exception) -> Finding:
    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    name = type(error).__name__
    if "DataDependent" in name or "data-dependent" in str(error):
        return _data_dependent("", place(error))
    return Finding(
        rule="export",
        where="",
        found=f"torch.export: {name}: {text} ({place(error)})",
        allowed="what torch.export can trace",
        fix="rewrite that line with tensor operations",
    )


def _keywords(net: nn.Module) -> list[str]:
    """What is named as no Python name is: torch writes the graph as Python."""
    named = (net.named_modules(), net.named_parameters(), net.named_buffers())
    paths = dict.fromkeys(path for some in named for path, _ in some)
    return [path for path in paths if keyword.iskeyword(path.rpartition(".")[2])]


def _keyword(path: str) -> Finding:
    return Finding(
        rule="export",
        where=path,
        found=f"the name {path.rpartition('.')[2]!r}, a word of Python's",
        allowed="names that torch.export can write as Python",
        fix="rename it",
    )


def _data_dependent(where: str, line: str) -> Finding:
    return Finding(
        rule="data-dependent",
        where=where,
        found=f"control flow or a shape that depends on a tensor's value, at {line}",
        allowed="a forward whose operations follow from the inputs' shapes",
        fix="compute both branches and choose with torch.where, or take the decision out of the "
        "network; of a fixed mask keep the places (mask.nonzero().flatten()) as a buffer",
    )


def _lower_precision(graph: fx.GraphModule) -> Iterator[Finding]:
    """Regions in which torch.autocast lowers the precision of operators on the CPU."""
    for n in graph.graph.nodes:
        if str(n.target) == "wrap_with_autocast" and n.args[0] == "cpu" and n.args[2]:
            yield Finding(
                rule="autocast",
                where=path_of(n),
                found=f"torch.autocast to {n.args[1]} inside the forward",
                allowed="a forward that computes in the dtype of its inputs and weights",
                fix="put autocast around the training's call of the network; convert takes a dtype",
            )
    for child in graph.children():
        if isinstance(child, fx.GraphModule):
            yield from _lower_precision(child)


def _written(name: str) -> Finding:
    return Finding(
        rule="surviving-state",
        where=name.rpartition(".")[0],
        found=f"the forward writes to {name}, which survives the call",
        allowed="a forward that writes only to its own variables",
        fix="write to a copy (x = x.clone()), or declare the state as a neuron's",
    )


def live(graph: fx.Graph) -> set[Node]:
    """What the outputs follow from, and the further steps of the neurons in it."""
    found = ops.needed([graph.output_node()])
    steps = {n: _step_before(n) for n in graph.nodes if n.target is NEURON_STEP}
    followed = {before for n, before in steps.items() if n in found}
    for n, before in steps.items():
        if n not in found and before in found and before not in followed:
            found |= ops.needed([n])
            followed.add(before)
    return found


def _step_before(step: Node) -> Node | None:
    """The call of the same neuron that a state comes from."""
    todo, seen = [step.args[1]], set[Node]()
    while todo:
        n = todo.pop()
        if n.target is NEURON_STEP:
            if n.args[2:4] == step.args[2:4]:
                return n
        elif n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return None


def _undetermined(graph: fx.Graph) -> Iterator[Finding]:
    """Nodes whose value or shape does not follow from the inputs' shapes and values."""
    told = set[tuple[str, str]]()
    used = live(graph)
    for n in graph.nodes:
        path, line = path_of(n), _line(n)
        # Several nodes come of one line, and those without one follow from another.
        seen = (path, line) in told or (told and not line)
        if n.op != "call_function" or n not in used or seen:
            continue
        if any(_symbolic(v) for v in pytree.tree_leaves(n.meta.get("val"))):
            told.add((path, line))
            yield _data_dependent(path, line or f"node {n.name}")
        elif torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) and _draws(n):
            told.add((path, line))
            yield Finding(
                rule="random",
                where=path,
                found=f"{short(n.target)} at {line or f'node {n.name}'}",
                allowed="a network whose outputs follow from its inputs",
                fix="take randomness out of the forward, or draw it once into a buffer",
            )


def _symbolic(value: Any) -> bool:
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(s, (torch.SymInt, torch.SymFloat, torch.SymBool)) for s in sizes)


def _draws(n: Node) -> bool:
    """Whether an operator that can draw random numbers does so with its arguments."""
    values = ops.arguments(n)
    share = {"p", "dropout", "dropout_p"} & {*values}
    switch = {"train", "training"} & {*values}
    return not (any(values[s] == 0 for s in share) or any(values[s] is False for s in switch))


def idle(n: fx.Node) -> bool:
    """A dropout that drops nothing."""
    return n.target in _DROPOUT and not n.args[2]


def _line(n: fx.Node) -> str:
    """File and line of the user's code that a node came from, or nothing."""
    # torch writes the names of its own files in full or from its root.
    skip = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "torch/")
    lines = re.findall(r'File "([^"]+)", line (\d+)', n.meta.get("stack_trace") or "")
    lines = [f"{Path(name).name}:{line}" for name, line in lines if not name.startswith(skip)]
    return lines[-1] if lines else ""


_DROPOUT = frozenset(
    {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
)


def path_of(n: fx.Node) -> str:
    """The module's path that an exported node came from."""
    stack = n.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return re.sub(r"@\d+", "", path)
