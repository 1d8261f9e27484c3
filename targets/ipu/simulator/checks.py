"""What the compiler refuses in a traced graph: losses, gradients, IPUs, pipelines."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from . import problems
from .graph import Graph, Node, slots
from .problems import Problem, RefusedError, Rule
from .settings import warn
from .trace import Surrogate, Traced

_logger = logging.getLogger("poptorch")

_LOSSES = frozenset(
    (
        "identity_loss",
        "cross_entropy",
        "nll_loss",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "kl_div",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "poisson_nll_loss",
        "gaussian_nll_loss",
        "ctc_loss",
        "hinge_embedding_loss",
        "cosine_embedding_loss",
        "margin_ranking_loss",
        "soft_margin_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "multilabel_soft_margin_loss",
        "triplet_margin_loss",
    )
)
_LET_GO = ("detach", "data", "detach_")
MAX_IPUS = 64


def final_loss(graph: Graph) -> int:
    """Slot of the one loss that no other loss consumes.

    Raises:
        RefusedError: There is none, or more than one.
    """
    losses = [node for node in graph.nodes if node.op in _LOSSES and node.outs]
    if not losses:
        raise _refused(problems.LOSS, "Couldn't find a loss in graph!")
    final = []
    for loss in losses:
        after = _descendants(graph, loss.outs)
        if not any(other is not loss and set(other.ins) & after for other in losses):
            final.append(loss)
    if len(final) != 1:
        where = ", ".join(dict.fromkeys(loss.place for loss in final))
        raise _refused(
            problems.LOSS,
            "Multiple independent losses found in graph. Graph must have one final loss. Wrap final "
            f"graph loss in poptorch.identity_loss. ({where})",
        )
    return final[0].outs[0]


def _refused(rule: Rule, text: str) -> RefusedError:
    return RefusedError([Problem(rule, text)])


def _descendants(graph: Graph, start: Iterable[int]) -> set[int]:
    found = set(start)
    for node in graph.nodes:
        if found.intersection(node.ins):
            found.update(node.outs, node.mutates)
    return found


def gradients(traced: Traced, loss: int, trainable: Iterable[str]) -> None:
    """Refuse a network whose weights would be trained with zero or wrong gradients.

    Args:
        traced: The network.
        loss: Slot of its loss.
        trainable: Names of the weights that the optimizer updates.

    Raises:
        RefusedError: With every surrogate gradient that the compiler does not see, or every step that
            lets no gradient through to a weight.
    """
    graph = traced.graph
    found = [_surrogate(s) for s in traced.surrogates if s.blocks]
    for passing in (s for s in traced.surrogates if not s.blocks):
        warn(
            f"{passing.module or 'the model'}: the backward of torch.autograd.Function "
            f"{passing.name} is ignored; its forward is differentiated instead"
        )
    refused = {problem.module for problem in found}
    passing_slots = _reaching(graph, loss, traced.gradients)
    every = _reaching(graph, loss, None)
    steps: dict[tuple[str, str, str], list[str]] = {}
    for name in trainable:
        slot = graph.weights[name]
        if slot in passing_slots:
            continue
        cuts = _cuts(graph, slot, traced.gradients, every)
        for node in cuts:
            if node.module not in refused:
                steps.setdefault((node.module, node.name, node.place), []).append(name)
        if not cuts:
            _logger.warning("%s does not reach the loss: it is not trained", name)
    found += [
        Problem(
            problems.STEP,
            f"{module or 'the model'} ({name}, {place}): the operation is a step, whose derivative is "
            f"zero, and no other way leads from the loss to {', '.join(names)}",
            module,
        )
        for (module, name, place), names in steps.items()
    ]
    if found:
        raise RefusedError(found)


def _surrogate(found: Surrogate) -> Problem:
    return Problem(
        problems.SURROGATE,
        f"{found.module or 'the model'}: the backward of torch.autograd.Function {found.name} is a "
        "surrogate gradient that the compiler does not see, and its forward has no derivative"
        + (f" ({found.place})" if found.place else ""),
        found.module,
    )


def _reaching(graph: Graph, loss: int, through: set[int] | None) -> set[int]:
    """Slots from which the loss is reached, over slots in ``through`` alone if given."""
    found = {loss}
    for node in reversed(graph.nodes):
        results = {*node.outs, *node.mutates}
        if found & results and (through is None or through & results):
            found.update(s for s in node.ins if through is None or s in through)
    return found


def _cuts(graph: Graph, weight: int, gradients: set[int], every: set[int]) -> list[Node]:
    """Nodes that lead to the loss, from values of which no other way on has a gradient."""
    reached, users = {weight}, dict[int, list[Node]]()
    for node in graph.nodes:
        for slot in reached.intersection(node.ins) if every.intersection(node.outs) else ():
            users.setdefault(slot, []).append(node)
        if reached.intersection(node.ins):
            reached.update(gradients.intersection((*node.outs, *node.mutates)))
    return [
        node
        for slot, ahead in users.items()
        if not any(reached.intersection(node.outs) - {slot} for node in ahead)
        for node in ahead
        if node.blocks and node.grad and node.op not in _LET_GO
    ]


def outputs(graph: Graph, returned: int) -> None:
    """Warn of outputs that are concatenated along another dimension than the batch.

    Args:
        graph: The network, whose inputs begin with the batch dimension.
        returned: Micro-batches whose outputs are concatenated.
    """
    batches = {graph.infos[slot][0][0] for slot in graph.inputs if graph.infos[slot][0]}
    for slot in slots(graph.outputs) if returned > 1 else ():
        shape = list(graph.infos[slot.index][0])
        if shape and shape[0] not in batches and batches.intersection(shape[1:]):
            warn(
                f"an output of shape {shape} comes back {returned} times, concatenated along its first "
                f"dimension, which is not the batch but {shape[0]}, time perhaps: return the batch "
                "first, and turn it back on the host"
            )


def shapes(graph: Graph) -> None:
    """Refuse tensors without elements.

    Raises:
        RefusedError: There is one.
    """
    used = {s for node in graph.nodes for s in (*node.ins, *node.outs)} | set(graph.inputs)
    for slot in sorted(used):
        shape, _ = graph.infos[slot]
        if shape.numel() == 0:
            raise _refused(
                problems.EMPTY, f"Zero-sized tensors are unsupported (Got shape {list(shape)})"
            )


def ipus(traced: Traced, replicas: int, round_up: bool) -> int:
    """How many IPUs are reserved.

    Raises:
        RefusedError: The number is no power of 2 and not to be rounded, or above 64.
    """
    used = set(traced.stages.values()) or {0}
    wanted = max(len(used), max(used) + 1) * replicas
    reserved = 1
    while reserved < wanted:
        reserved *= 2
    reason = ", because PopTorch must reserve a power of 2 or maximum of 64 IPUs per process"
    if reserved != wanted and not round_up:
        raise _refused(
            problems.IPUS,
            f"The model specifies the use of {wanted} IPUs, however PopTorch must reserve a minimum of "
            f"{reserved} in order to allow the model to run{reason}. Please reconfigure your model "
            "to use a different number of IPUs or set poptorch.Options().autoRoundNumIPUs(True).",
        )
    if reserved != wanted:
        _logger.warning(
            "Reserving %d IPUs when the model specifices the use of only %d%s. %d will be reserved "
            "but not used.",
            reserved,
            wanted,
            reason,
            reserved - wanted,
        )
    if reserved > MAX_IPUS:
        raise _refused(
            problems.IPUS, f"The model needs {reserved} IPUs; a process has at most {MAX_IPUS}"
        )
    return reserved


def pipeline(traced: Traced, training: bool, accumulation: int, iterations: int) -> None:
    """Refuse a pipeline that its micro-batches do not fill.

    Raises:
        RefusedError: There are too few.
    """
    depth = len(traced.stages)
    if depth < 2:
        return
    if training and accumulation < 2 * depth - 1:
        raise _refused(
            problems.PIPELINE,
            "For pipelining, depth (gradient accumulation factor) must equal at least "
            f"{2 * depth - 1} for {depth} pipeline stages; Options.Training.gradientAccumulation is "
            f"{accumulation}",
        )
    if not training and iterations < depth:
        raise _refused(
            problems.PIPELINE,
            f"For pipelining, depth must equal at least the number of pipeline stages ({depth}); "
            f"Options.deviceIterations is {iterations}",
        )
