"""What the compiler refuses in a traced graph: losses, gradients, IPUs, pipelines."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from .errors import Error
from .graph import Graph, Node, slots
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
_ADVICE = (
    "The compiler differentiates the forward that it traces, so a spike needs its surrogate in "
    "differentiable forward operations, for instance heaviside(u).detach() + (sigma(u) - "
    "sigma(u).detach()): spikeport.targets.ipu.training_module rewrites a network so."
)
MAX_IPUS = 64


def final_loss(graph: Graph) -> int:
    """Slot of the one loss that no other loss consumes.

    Raises:
        Error: There is none, or more than one.
    """
    losses = [node for node in graph.nodes if node.op in _LOSSES and node.outs]
    if not losses:
        raise Error("Couldn't find a loss in graph!")
    final = []
    for loss in losses:
        after = _descendants(graph, loss.outs)
        if not any(other is not loss and set(other.ins) & after for other in losses):
            final.append(loss)
    if len(final) != 1:
        raise Error(
            "Multiple independent losses found in graph. Graph must have one final loss. Wrap final "
            "graph loss in poptorch.identity_loss."
        )
    return final[0].outs[0]


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
        Error: A surrogate gradient that the compiler does not see, or a step that lets no gradient
            through to a weight, all of them in one text.
    """
    graph = traced.graph
    found = [_surrogate(s) for s in traced.surrogates if s.blocks]
    for passing in (s for s in traced.surrogates if not s.blocks):
        warn(
            f"{passing.module or 'the model'}: the backward of torch.autograd.Function "
            f"{passing.name} is ignored; its forward is differentiated instead"
        )
    if found:
        raise Error("\n".join([*found, _ADVICE]))
    passing_slots = _reaching(graph, loss, traced.gradients)
    every = _reaching(graph, loss, None)
    steps: dict[str, list[str]] = {}
    for name in trainable:
        slot = graph.weights[name]
        if slot in passing_slots:
            continue
        blocked = _blocking(graph, slot, every)
        if any(node.op not in _LET_GO and node.grad for node in blocked):
            for node in blocked:
                if node.op not in _LET_GO and node.grad:
                    steps.setdefault(f"{node.module or 'the model'} ({node.name})", []).append(name)
        else:
            _logger.warning("%s does not reach the loss: it is not trained", name)
    if steps:
        lines = [
            f"{where}: the operation is a step, whose derivative is zero, and no other way leads "
            f"from the loss to {', '.join(names)}"
            for where, names in steps.items()
        ]
        raise Error("\n".join([*lines, _ADVICE]))


def _surrogate(found: Surrogate) -> str:
    return (
        f"{found.module or 'the model'}: the backward of torch.autograd.Function {found.name} is a "
        "surrogate gradient that the compiler does not see, and its forward has no derivative"
    )


def _reaching(graph: Graph, loss: int, through: set[int] | None) -> set[int]:
    """Slots from which the loss is reached, over slots in ``through`` alone if given."""
    found = {loss}
    for node in reversed(graph.nodes):
        results = {*node.outs, *node.mutates}
        if found & results and (through is None or through & results):
            found.update(s for s in node.ins if through is None or s in through)
    return found


def _blocking(graph: Graph, weight: int, every: set[int]) -> list[Node]:
    """Nodes between a weight and the loss where the gradient stops."""
    after, found = {weight}, []
    for node in graph.nodes:
        if after.intersection(node.ins):
            if node.blocks and every.intersection(node.outs):
                found.append(node)
            after.update(node.outs, node.mutates)
    return found


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
        Error: There is one.
    """
    used = {s for node in graph.nodes for s in (*node.ins, *node.outs)} | set(graph.inputs)
    for slot in sorted(used):
        shape, _ = graph.infos[slot]
        if shape.numel() == 0:
            raise Error(f"Zero-sized tensors are unsupported (Got shape {list(shape)})")


def ipus(traced: Traced, replicas: int, round_up: bool) -> int:
    """How many IPUs are reserved.

    Raises:
        Error: The number is no power of 2 and not to be rounded, or above 64.
    """
    used = set(traced.stages.values()) or {0}
    wanted = max(len(used), max(used) + 1) * replicas
    reserved = 1
    while reserved < wanted:
        reserved *= 2
    reason = ", because PopTorch must reserve a power of 2 or maximum of 64 IPUs per process"
    if reserved != wanted and not round_up:
        raise Error(
            f"The model specifies the use of {wanted} IPUs, however PopTorch must reserve a minimum of "
            f"{reserved} in order to allow the model to run{reason}. Please reconfigure your model "
            "to use a different number of IPUs or set poptorch.Options().autoRoundNumIPUs(True)."
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
        raise Error(f"The model needs {reserved} IPUs; a process has at most {MAX_IPUS}")
    return reserved


def pipeline(traced: Traced, training: bool, accumulation: int, iterations: int) -> None:
    """Refuse a pipeline that its micro-batches do not fill.

    Raises:
        Error: There are too few.
    """
    depth = len(traced.stages)
    if depth < 2:
        return
    if training and accumulation < 2 * depth - 1:
        raise Error(
            "For pipelining, depth (gradient accumulation factor) must equal at least "
            f"{2 * depth - 1} for {depth} pipeline stages; Options.Training.gradientAccumulation is "
            f"{accumulation}"
        )
    if not training and iterations < depth:
        raise Error(
            f"For pipelining, depth must equal at least the number of pipeline stages ({depth}); "
            f"Options.deviceIterations is {iterations}"
        )
