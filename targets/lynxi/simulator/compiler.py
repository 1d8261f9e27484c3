"""What the simulated compiler does with a graph: the chip's rules, folding, partition, rounding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .graph import CONST, FOREIGN, INPUT, REFUSED, Graph, LyngorError, Node
from .ops import OPS
from .options import Options, SimulatorWarning

MAX_RANK = 4
MAX_RUN_BATCH = 10

Params = dict[str, Tensor]


def _listed(title: str, items: Sequence[str]) -> str:
    return "\n".join([title, *(f"  - {item}" for item in items)])


def _lives_on_cpu(node: Node) -> bool:
    return node.op.startswith(FOREIGN) or (node.op in OPS and not OPS[node.op].apu)


def lacking(graph: Graph) -> list[Node]:
    """The nodes that the APU does not have."""
    return [n for n in graph.nodes if _lives_on_cpu(n) and not n.op.startswith(REFUSED)]


def rank_findings(graph: Graph, options: Options) -> list[str]:
    """Every node that reads or makes a tensor above the rank that the SDK version takes."""
    newer = options.version_tuple >= (1, 17)
    found = []
    for node in graph.nodes:
        ranks = [len(node.shape)]
        if node.op not in (INPUT, CONST):
            ranks += [len(graph.nodes[i].shape) for i in node.inputs]
        excused = newer and (node.op in (INPUT, CONST) or OPS.get(node.op, OPS["add"]).rank5)
        if max(ranks) > (MAX_RANK + 1 if excused else MAX_RANK):
            read = [list(graph.nodes[i].shape) for i in node.inputs]
            made = f", reading {', '.join(map(str, read))}" if read else ""
            found.append(f"{node}{made}")
    return found


def check(graph: Graph, options: Options, *, apu_only: bool, target: str) -> None:
    """Refuse what the compiler refuses, everything at once, and warn of what it loses.

    Raises:
        LyngorError: A rule of the compiler or chip is broken.
    """
    problems = []
    if graph.notes.refused:
        problems.append(_listed("operations that the compiler cannot take:", graph.notes.refused))
    high = rank_findings(graph, options)
    if high:
        allowed = (
            "rank 4; rank 5 in reshape, stack, index, cat and mean"
            if options.version_tuple >= (1, 17)
            else "rank 4"
        )
        problems.append(
            _listed(f"tensors above {allowed} (lyngor {options.version}); reshape before:", high)
        )
    missing = [*map(str, lacking(graph))]
    if missing and apu_only:
        problems.append(
            _listed(
                "operations that the APU does not have (apu_only=True); build with "
                "apu_only=False or replace them:",
                missing,
            )
        )
    notes = graph.notes
    dropped = _listed(
        "in-place writes that the compiler drops without a word, so that what was written is "
        "lost; build the tensor with torch.stack or torch.cat:",
        notes.dropped,
    )
    stale = _listed(
        "in-place arithmetic on a tensor that is read again through another name, which keeps "
        "the old value; use the returned value:",
        notes.stale,
    )
    if options.strict:
        problems += [
            text for text, items in ((dropped, notes.dropped), (stale, notes.stale)) if items
        ]
    if problems:
        raise LyngorError("build failed: " + "\n".join(problems))
    if notes.dropped:
        warnings.warn(dropped, SimulatorWarning, stacklevel=4)
    if notes.stale:
        warnings.warn(stale, SimulatorWarning, stacklevel=4)
    if missing and target == "apu":
        text = _listed("a hybrid CPU and APU build; these run in float32 on the CPU:", missing)
        warnings.warn(text, SimulatorWarning, stacklevel=4)


def live(graph: Graph) -> Graph:
    """The graph without nodes whose value nobody reads; inputs stay."""
    needed = [False] * len(graph.nodes)
    for port in graph.outputs:
        needed[port.value] = True
    for i in reversed(range(len(graph.nodes))):
        if graph.nodes[i].op == INPUT:
            needed[i] = True
        if needed[i]:
            for j in graph.nodes[i].inputs:
                needed[j] = True
    place: dict[int, int] = {}
    result = Graph(notes=graph.notes)
    for i, node in enumerate(graph.nodes):
        if needed[i]:
            place[i] = len(result.nodes)
            result.nodes.append(replace(node, inputs=tuple(place[j] for j in node.inputs)))
    result.inputs = [replace(p, value=place[p.value]) for p in graph.inputs]
    result.outputs = [replace(p, value=place[p.value]) for p in graph.outputs]
    return result


def _scale_and_shift(norm: Node, graph: Graph, params: Params) -> tuple[Tensor, Tensor]:
    """A batch norm as ``x * scale + shift``, [C], in float64."""
    mean, variance, weight, bias = (
        params[graph.nodes[j].attrs["name"]].double() for j in norm.inputs[1:]
    )
    scale = weight * (variance + norm.attrs["eps"]).rsqrt()
    return scale, bias - mean * scale


def fold_batch_norm(graph: Graph, params: Params) -> tuple[Graph, Params]:
    """Fold ``scale`` and ``shift`` of a batch norm into the convolution or dense before it.

    ``W x * scale + shift`` becomes ``(scale W) x + shift``, where only the norm reads the result
    and the weight is known; optimisation level 3 of the vendor's compiler.
    """
    nodes, params = [replace(n) for n in graph.nodes], dict(params)
    uses = graph.uses()
    for i, norm in enumerate(graph.nodes):
        if norm.op != "batch_norm":
            continue
        b = norm.inputs[0]
        base = graph.nodes[b]
        if base.op not in ("conv", "dense") or uses[b] != 1:
            continue
        if any(graph.nodes[j].op != CONST for j in base.inputs[1:]):
            continue
        weight, *old = [params[graph.nodes[j].attrs["name"]].double() for j in base.inputs[1:]]
        scale, shift = _scale_and_shift(norm, graph, params)
        w_name, b_name = f"{base.scope or 'top'}.{i}.weight", f"{base.scope or 'top'}.{i}.bias"
        params[w_name] = (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).float()
        params[b_name] = (old[0] * scale + shift if old else shift).float()
        w_node = Node(CONST, (), {"name": w_name}, tuple(weight.shape), "float", base.scope)
        b_node = Node(CONST, (), {"name": b_name}, tuple(shift.shape), "float", base.scope)
        nodes[i] = replace(base, inputs=(base.inputs[0], len(nodes), len(nodes) + 1))
        nodes += [w_node, b_node]
    return ordered(Graph(nodes, graph.inputs, graph.outputs, graph.notes)), params


def split_batch_norm(graph: Graph, params: Params) -> tuple[Graph, Params]:
    """A multiplication and an addition for each batch norm: the chip rounds after both."""
    result, params = Graph([], [], [], graph.notes), dict(params)
    place: list[int] = []

    def add(node: Node) -> int:
        result.nodes.append(node)
        return len(result.nodes) - 1

    for i, node in enumerate(graph.nodes):
        if node.op != "batch_norm":
            place.append(add(replace(node, inputs=tuple(place[j] for j in node.inputs))))
            continue
        at = place[node.inputs[0]]
        affine = _scale_and_shift(node, graph, params)
        for op, value in zip(("mul", "add"), affine, strict=True):
            name = f"{node.scope or 'top'}.{i}.{op}"
            params[name] = value.float().reshape(-1, *[1] * (len(node.shape) - 2))
            shape = tuple(params[name].shape)
            constant = add(Node(CONST, (), {"name": name}, shape, "float", node.scope))
            at = add(replace(node, op=op, inputs=(at, constant), attrs={}))
        place.append(at)
    result.inputs = [replace(p, value=place[p.value]) for p in graph.inputs]
    result.outputs = [replace(p, value=place[p.value]) for p in graph.outputs]
    return result, params


def ordered(graph: Graph) -> Graph:
    """The live nodes in an order in which every value is made before it is read."""
    order: list[int] = [p.value for p in graph.inputs]
    order += [i for i, n in enumerate(graph.nodes) if n.op == CONST]
    order += [i for i, n in enumerate(graph.nodes) if n.op not in (CONST, INPUT)]
    place = {old: new for new, old in enumerate(order)}
    nodes = [
        replace(graph.nodes[i], inputs=tuple(place[j] for j in graph.nodes[i].inputs))
        for i in order
    ]
    return live(
        Graph(
            nodes,
            [replace(p, value=place[p.value]) for p in graph.inputs],
            [replace(p, value=place[p.value]) for p in graph.outputs],
            graph.notes,
        )
    )


def partition(graph: Graph, *, everything_on_cpu: bool) -> None:
    """Decide which nodes run on the CPU; constants follow their readers."""
    for node in graph.nodes:
        node.on_cpu = everything_on_cpu or _lives_on_cpu(node)
    readers: dict[int, list[bool]] = {}
    for node in graph.nodes:
        for i in node.inputs:
            readers.setdefault(i, []).append(node.on_cpu)
    for i, node in enumerate(graph.nodes):
        if node.op in (CONST, INPUT):
            node.on_cpu = everything_on_cpu or (i in readers and all(readers[i]))


def compile_graph(
    graph: Graph,
    params: Params,
    options: Options,
    *,
    target: str,
    apu_only: bool,
    opt_level: int,
) -> tuple[Graph, Params]:
    """Check, fold, partition and round.

    Returns:
        The graph that runs, and exactly its constants, contiguous.

    Raises:
        LyngorError: A rule is broken; every breach is in the text.
    """
    missing = sorted({n.attrs["name"] for n in graph.nodes if n.op == CONST} - set(params))
    if missing:
        raise LyngorError(f"params lacks {', '.join(missing)}; pass the .params of the same load")
    graph = live(graph)
    check(graph, options, apu_only=apu_only, target=target)
    if opt_level >= 3:
        graph, params = fold_batch_norm(graph, params)
    if options.storage == "float16":
        graph, params = split_batch_norm(graph, params)
    graph = ordered(graph)
    partition(graph, everything_on_cpu=target != "apu")
    used: Params = {}
    storages = set[int]()
    for node in graph.nodes:
        if node.op != CONST:
            continue
        value = params[node.attrs["name"]]
        if value.is_floating_point():
            half = options.storage == "float16" and not node.on_cpu
            value = value.to(torch.float16 if half else torch.float32)
        value = value.contiguous()
        # The file of them holds none that is a part of another.
        storage = value.untyped_storage().data_ptr()
        used[node.attrs["name"]] = value.clone() if storage in storages else value
        storages.add(storage)
    return graph, used
