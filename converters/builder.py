"""How a pass writes a new graph, and what it finds in one: the neurons' sites, their states."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .errors import CaptureError, Finding
from .neurons import Neuron
from .ops import RESHAPE, Node, aten
from .program import (
    NEURON,
    NEURON_STEP,
    Layout,
    PassReport,
    Program,
    Site,
    TensorSpec,
    where,
)


class Builder:
    """Emits a new graph for a program: nodes with shapes, module paths and names kept.

    Args:
        program: The program that is rewritten.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.tensors: dict[str, torch.Tensor] = {}
        self.terms = dict(program.terms)
        self._attrs: dict[str, fx.Node] = {}
        # What constants come before: the first call, once there is one.
        self._body = self.graph._root

    def placeholder(self, like: Node, value: torch.Tensor) -> fx.Node:
        """An input with the name of another."""
        node = self.graph.placeholder(like.target)
        node.meta = {"val": value.to("meta"), "path": ""}
        return node

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A weight or constant; the same name and value give the same node."""
        tries = itertools.count(2)
        given = name
        while (known := self.tensors.get(name)) is not None and not same_bits(known, value):
            name = f"{given}_{next(tries)}"
        if known is None:
            self.tensors[name] = value
            with self.graph.inserting_before(self._body):
                node = self.graph.get_attr(name)
            node.meta = {"val": value.to("meta"), "path": ""}
            self._attrs[name] = node
        return self._attrs[name]

    def call(self, target: Any, *args: Any, path: str, **kwargs: Any) -> fx.Node:
        """A call, with its shape worked out."""
        name = getattr(target, "_opname", None)
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        if self._body is self.graph._root:
            self._body = node
        values, options = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        try:
            value = target(*values, **options)
        except NotImplementedError as error:
            raise CaptureError(
                "an operator cannot be rewritten:", [_unknown(node, path)]
            ) from error
        node.meta = {"val": value, "path": path}
        return node

    def reshaped(self, node: Node, size: Sequence[int], path: str) -> Node:
        """A value in another shape; of a constant another constant, of a reshape another reshape."""
        if tuple(node.meta["val"].shape) == tuple(size):
            return node
        if node.op == "get_attr":
            name = f"{node.target}_{'x'.join(map(str, size))}"
            return self.constant(name, self.tensors[str(node.target)].reshape(*size))
        if node.target is RESHAPE:
            return self.reshaped(node.args[0], size, path)
        return self.call(RESHAPE, node, list(size), path=path)

    def copy(self, node: Node, env: Mapping[Node, Node]) -> fx.Node:
        """The same node over the new graph's values."""
        if node.op == "get_attr":
            return self.constant(node.target, self.program.tensor(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        return self.instead(node, *args, **kwargs)

    def instead(self, node: Node, *args: Any, **kwargs: Any) -> fx.Node:
        """The same operator with other arguments; neurons stay the layer that they are."""
        made = self.call(node.target, *args, path=where(node), **kwargs)
        if (site := node.meta.get("site")) is not None:
            made.meta["site"] = site
        return made

    def finish(
        self,
        results: Sequence[fx.Node],
        report: PassReport,
        sites: Sequence[Site] | None = None,
        **changes: Any,
    ) -> Program:
        """The new program; dead nodes and tensors that nothing uses are left out."""
        self.graph.output(tuple(results))
        return seal(
            self.program, self.graph, self.tensors, report, sites, terms=self.terms, **changes
        )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same, the sign of a zero and the kind of a NaN included."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*raw)


def _unknown(node: fx.Node, path: str) -> Finding:
    return Finding(
        rule="operator",
        where=path,
        node=node.name,
        found=f"{node.target}, of which torch cannot say the shape of its result without computing it",
        allowed="operators that torch runs on tensors of device meta",
        fix="write it in the network's forward in other operators, as its arithmetic",
    )


def seal(
    program: Program,
    graph: fx.Graph,
    tensors: Mapping[str, torch.Tensor],
    report: PassReport,
    sites: Sequence[Site] | None = None,
    **changes: Any,
) -> Program:
    """A program with another graph in place of its own, its neurons' sites found anew."""
    # What a site names stays, whether or not anything else uses it; a layer whose membranes alone are
    # used is a site all the same.
    named = {name for site in sites or () for name in (*site.drives, *site.spikes)}
    graph.eliminate_dead_code(
        lambda n: n.op in ("placeholder", "output") or n.name in named or _is_site(n)
    )
    graph.lint()
    used = {n.target: tensors[n.target] for n in graph.nodes if n.op == "get_attr"}
    module = fx.GraphModule(used, graph)
    found = neuron_sites(graph, tensors) if sites is None else tuple(sites)
    if sites is None:
        order = {site.name: i for i, site in enumerate(program.sites)}
        known = {site.name: site for site in program.sites}
        ordered = sorted(found, key=lambda site: order.get(site.name, len(order)))
        found = tuple(
            replace(site, scale=before.scale, sample=before.sample)
            if (before := known.get(site.name)) is not None
            else site
            for site in ordered
        )
    history = (*program.history, report)
    return replace(program, module=module, sites=found, history=history, **changes)


def neuron_sites(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> tuple[Site, ...]:
    """The sites of a graph whose neurons are still single nodes.

    The first graph names them, by the order in which they come; the nodes keep these names through all that
    is made of it, where the order may be another one.
    """
    sites: list[Site] = []
    uses: dict[str, int] = {}

    def site(
        n: fx.Node,
        params: Any,
        spec: str,
        T: int,
        layout: Layout,
        drives: Sequence[str],
        spikes: Sequence[str],
    ) -> None:
        path = where(n)
        uses[path] = uses.get(path, 0) + 1
        name = n.meta.setdefault("site", path if uses[path] == 1 else f"{path}#{uses[path]}")
        neuron = Neuron.from_json(spec, (tensors[p.target] for p in params))
        sites.append(Site(name, path, neuron, T, layout, tuple(drives), tuple(spikes)))

    for n in graph.nodes:
        if n.target is NEURON:
            x, params, spec, layout, T = n.args
            site(n, params, spec, T, layout, [x.name], [n.name])
        elif n.target is NEURON_STEP and n.args[4] == 0:
            calls = [n]
            while (after := _next_step(calls[-1])) is not None:
                calls.append(after)
            spikes = [u.name for c in calls for u in c.users if u.args[1] == 0]
            site(
                n,
                n.args[2],
                n.args[3],
                len(calls),
                "steps",
                [c.args[0].name for c in calls],
                spikes,
            )
    return tuple(sites)


def state_of(n: Node) -> fx.Node | None:
    """The call of a single-step neuron that a node takes one part of the state of."""
    state = n.args[0] if n.target is aten.select.int else None
    if not isinstance(state, fx.Node) or state.target is not operator.getitem:
        return None
    call = state.args[0]
    step = isinstance(call, fx.Node) and call.target is NEURON_STEP
    return call if step and n.args[1] == 0 and state.args[1] == 1 else None  # type: ignore[return-value]


def holds_state(n: Node) -> bool:
    """Whether a value is the state of neurons that are still operators."""
    if n.op == "placeholder":
        return bool(n.users) and all(
            u.target is aten.stack.default and holds_state(u) for u in n.users
        )
    if n.target is aten.stack.default:
        return bool(n.users) and all(u.target is NEURON_STEP and u.args[1] is n for u in n.users)
    if n.target is operator.getitem:
        return n.args[0].target is NEURON_STEP and n.args[1] == 1
    return state_of(n) is not None


def _is_site(n: Node) -> bool:
    """Whether a node is the spikes of a layer, or of one step of it."""
    source = n.args[0] if n.target is operator.getitem else None
    called = isinstance(source, fx.Node) and source.target is NEURON_STEP
    return n.target is NEURON or (called and bool(n.args[1] == 0))


def _next_step(call: fx.Node) -> fx.Node | None:
    """The call of a single-step neuron that goes on from the state after this one."""
    states = (u for u in call.users if u.target is operator.getitem and u.args[1] == 1)
    return next((u for s in states for u in s.users if u.target is NEURON_STEP), None)


def with_probes(program: Program) -> Program:
    """The program with the spikes of every site as extra outputs, ``spikes:<site>``, [T, N, ...]."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    results: Any = graph.graph_copy(program.graph, env)
    for old, new in env.items():
        new.meta, new.name = dict(old.meta), old.name
    by_name = {n.name: n for n in graph.nodes}
    extra, specs = [], []
    for site in program.sites:
        for t, name in enumerate(site.spikes):
            node = by_name[name]
            shape = tuple(node.meta["val"].shape)
            folded = site.layout in ("flat", "static")
            user = (site.T, shape[0] // site.T, *shape[1:]) if folded else shape
            rank = None
            if site.sample is not None:
                user, rank = (*user[: 2 if folded else 1], *site.sample), len(shape)
            label = f"spikes:{site.name}" + (f":{t}" if site.layout == "steps" else "")
            specs.append(TensorSpec(label, user, program.dtype, folded, rank=rank))
            extra.append(node)
    own = len(program.outputs)
    graph.output((*results[:own], *extra, *results[own:]))
    outputs = (*program.outputs, *specs)
    changes: dict[str, Any] = {
        "outputs": outputs,
        "structure": pytree.tree_structure(tuple(range(len(outputs)))),
    }
    if (stepping := program.stepping) is not None:
        times = (*stepping.outputs, *[0] * len(extra))
        changes["stepping"] = replace(stepping, outputs=times)
    report = PassReport("with_probes", (f"{len(extra)} extra outputs",))
    return seal(program, graph, program.tensors, report, program.sites, **changes)
