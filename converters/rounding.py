"""What rounding explains: a running error analysis of a program on one input.

Each value carries a bound of its error (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
ed., section 3.3). With u the unit roundoff of what is stored, U that of what sums are accumulated in
and K the number of terms of a sum, a layer y = W x + b has

    e(y) = |W| e(x) + e(W) |x| + e(b) + c sqrt(K) U (|W| |x| + |b|) + u |y|

where sqrt(K) instead of K is the probabilistic bound of Higham and Mary (2019, SIAM J. Sci. Comput.
41(5), doi:10.1137/18M1226312), and c makes a miss unlikely. Spikes are given, so they have no error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import ops
from .ops import Node, aten
from .program import Program, Site

#: The c above; a wrong conversion is off by orders of magnitude more.
CERTAINTY = 4.0
_ACCUMULATOR = torch.finfo(torch.float32).eps / 2

#: Operators that move values or take the largest, which rounds nothing.
_EXACT = frozenset(
    {
        ops.RESHAPE,
        aten.slice.Tensor,
        aten.cat.default,
        aten.stack.default,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.permute.default,
        aten.transpose.int,
        aten.amax.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten._to_copy.default,
    }
)
_SUMS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
    }
)
_LAYERS = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.linear.default,
    }
)
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})

_Pair = tuple[torch.Tensor, torch.Tensor]


class Bounds(fx.Interpreter):
    """Bounds at every drive and output, on given spikes; values are pairs (value, error).

    Args:
        program: The program.
        example: The user's inputs.
        spikes: Spikes [T, N, ...] by site.
    """

    def __init__(
        self, program: Program, example: Sequence[torch.Tensor], spikes: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(program.module)
        self._spikes = {
            node: site.scatter(spikes[site.name], program.node(node).meta["val"], node).float()
            for site in program.sites
            for node in site.spikes
        }
        self._unit = torch.finfo(program.dtype).eps / 2
        self._least = torch.finfo(program.dtype).smallest_normal * self._unit
        self._rounded = program.rounded
        self._kept = {d for site in program.sites for d in site.drives}
        self._kept |= {n.name for n in program.results}
        self._wanted = self._ancestors(program)
        self._found: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            self.run(*(x.float() for x in program.flat_inputs(example)))

    def _ancestors(self, program: Program) -> set[str]:
        """Nodes that drives and outputs depend on, up to the neurons before them."""
        todo = list(map(program.node, self._kept))
        seen: set[str] = set()
        while todo:
            n = todo.pop()
            if n.name not in seen:
                seen.add(n.name)
                if n.name not in self._spikes:
                    todo += n.all_input_nodes
        return seen

    def of(self, node: str) -> torch.Tensor:
        """How far a node's value may be from the network's own, of its shape."""
        # Twice, for the network's own rounding is none of the program's.
        return 2 * self._found[node] + torch.finfo(torch.float32).tiny

    def at(self, site: Site) -> torch.Tensor:
        """The same for a site's drive, [T, N, ...], in the source's scale."""
        return site.drive({d: self.of(d) for d in site.drives})

    def run_node(self, n: Node) -> Any:
        """The node's value and error; nothing where no drive or output depends on it."""
        if n.op == "output" or n.name not in self._wanted:
            return None
        if n.name in self._spikes:
            spikes = self._spikes[n.name]
            pair = (spikes, torch.zeros(()).expand_as(spikes))
        elif n.op == "get_attr":
            value = super().run_node(n).float()
            exact = self._rounded is not None and n.target not in self._rounded
            pair = (value, torch.zeros_like(value) if exact else self._stored(value))
        elif n.op == "placeholder":
            value = super().run_node(n)
            pair = (value, self._stored(value))
        else:
            value, error = self._call(n)
            pair = (value.float(), error.float())
        if n.name in self._kept:
            self._found[n.name] = pair[1]
        return pair

    def _call(self, n: Node) -> _Pair:
        target: Any = n.target
        pairs = [self.env[a] for a in n.all_input_nodes]
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: self.env[a][0])
        errors, _ = fx.map_arg((n.args, n.kwargs), lambda a: self.env[a][1])
        value = target(*args, **kwargs)
        stored = self._stored(value.float())
        if target in _EXACT:
            return value, target(*errors, **kwargs)
        if target in _LAYERS:
            return value, self._layer(target, args, errors, kwargs, ops.fan_in(n)) + stored
        if target in _PRODUCTS:
            (a, b), (ea, eb) = args, errors
            sums = target(a.abs(), eb) + target(ea, b.abs())
            return value, sums + self._sum(target(a.abs(), b.abs()), ops.fan_in(n)) + stored
        if target in _SUMS:
            x: Any = n.args[0]
            terms = x.meta["val"].numel() / max(n.meta["val"].numel(), 1)
            magnitude = target(args[0].abs(), *args[1:], **kwargs)
            error = target(errors[0], *args[1:], **kwargs)
            return value, error + self._sum(magnitude, terms) + stored
        if target in (aten.add.Tensor, aten.sub.Tensor):
            error = sum((p[1] for p in pairs), torch.zeros(()))
            return value, error.expand_as(value) + stored
        if target is aten.mul.Tensor:
            return value, self._factor(args, errors) + stored
        if target is aten.batch_norm.default:
            return value, self._batch_norm(args, errors) + 4 * stored
        return value, self._perturbed(target, args, errors, kwargs, value) + 4 * stored

    def _stored(self, value: torch.Tensor) -> torch.Tensor:
        """u |y|, or half of the smallest number's distance to 0 where y is below normal numbers."""
        return (self._unit * value.abs()).clamp(min=self._least)

    def _sum(self, magnitude: torch.Tensor, terms: float) -> torch.Tensor:
        return CERTAINTY * math.sqrt(terms) * _ACCUMULATOR * magnitude

    def _layer(self, target: Any, args: Any, errors: Any, kwargs: Any, terms: int) -> torch.Tensor:
        x, W, *rest = args
        b, geometry = (rest[0], rest[1:]) if rest else (None, [])

        def apply(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            given = () if b is None and not geometry else (b, *geometry)
            result: torch.Tensor = target(x, W, *given, **kwargs)
            return result

        error = self._sum(apply(x.abs(), W.abs(), None if b is None else b.abs()), terms)
        if errors[0].any():
            error = error + apply(errors[0], W.abs(), None)
        bias = None if b is None else errors[2]
        if errors[1].any() or (bias is not None and bias.any()):
            error = error + apply(x.abs(), errors[1], bias)
        return error

    @staticmethod
    def _factor(args: Any, errors: Any) -> torch.Tensor:
        (a, b), (ea, eb) = args, errors
        error = torch.zeros(())
        if isinstance(a, torch.Tensor):
            error = error + ea * (b.abs() if isinstance(b, torch.Tensor) else abs(b))
        if isinstance(b, torch.Tensor):
            error = error + eb * (a.abs() if isinstance(a, torch.Tensor) else abs(a))
        return error

    def _batch_norm(self, args: Any, errors: Any) -> torch.Tensor:
        x, weight, bias, mean, var, *rest = args

        def positive(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.abs()

        norm: Callable[..., torch.Tensor] = aten.batch_norm.default
        magnitude = norm(x.abs(), positive(weight), positive(bias), -mean.abs(), var, *rest)
        carried = norm(errors[0], positive(weight), None, torch.zeros_like(mean), var, *rest)
        return carried + 4 * self._unit * magnitude

    @staticmethod
    def _perturbed(
        target: Any, args: Any, errors: Any, kwargs: Any, value: torch.Tensor
    ) -> torch.Tensor:
        """An operator without a rule of its own: its answer to its inputs' errors, doubled."""
        if not value.is_floating_point():
            return torch.zeros_like(value, dtype=torch.float32)

        def moved(sign: int) -> torch.Tensor:
            given = [
                a + sign * e if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a, e in zip(args, errors, strict=True)
            ]
            answer: torch.Tensor = target(*given, **kwargs)
            return (answer - value).abs()

        return 2 * torch.maximum(moved(1), moved(-1))
