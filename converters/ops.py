"""What the passes know about ATen operators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import fx

#: A node of a graph. torch's own type makes each argument a union of two dozen kinds.
Node: TypeAlias = Any

aten = torch.ops.aten

#: Selection by a condition, with tensors or scalars on either side.
SELECT = (
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
)

#: Comparisons by size.
COMPARISONS = frozenset(
    getattr(getattr(aten, name), kind)
    for name in ("gt", "ge", "lt", "le")
    for kind in ("Scalar", "Tensor")
)

#: Pointwise operators that torch does not tag as such, in some release.
_UNTAGGED = frozenset(
    {
        *SELECT,
        aten._to_copy.default,
        aten.clone.default,
        aten.__and__.Scalar,
        aten.__or__.Scalar,
        aten.__xor__.Scalar,
        aten.floor_divide.default,
        aten.hardswish.default,
        aten.leaky_relu.default,
        aten.log_sigmoid.default,
    }
)


def is_pointwise(target: Any) -> bool:
    """Whether an operator computes every element alone, its tensors broadcast."""
    return target in _UNTAGGED or torch.Tag.pointwise in getattr(target, "tags", ())


#: The first input is [N, ...]; each of the N is computed alone, the other arguments are weights.
BATCHED = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.batch_norm.default,
        aten.group_norm.default,
        aten.instance_norm.default,
        aten.im2col.default,
        aten.col2im.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
        aten._adaptive_avg_pool2d.default,
        aten.adaptive_max_pool2d.default,
        aten.upsample_nearest1d.vec,
        aten.upsample_linear1d.vec,
        aten.upsample_nearest3d.vec,
        aten.upsample_trilinear3d.vec,
        aten.upsample_nearest2d.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.default,
        aten.upsample_bilinear2d.vec,
        aten.upsample_bicubic2d.vec,
        aten._upsample_nearest_exact1d.vec,
        aten._upsample_nearest_exact2d.vec,
        aten._upsample_nearest_exact3d.vec,
    }
)

#: The first input's last dimension is transformed, whatever stands before it.
TRAILING = frozenset({aten.linear.default, aten.layer_norm.default})

RESHAPE = aten.reshape.default


def slice_args(node: Node, given: int) -> tuple[int, Any, Any, int]:
    """dim, start, end, step of a slice whose arguments before them are ``given``."""
    defaults: list[Any] = [0, None, None, 1]
    named = list(node.args[given:])
    dim, start, end, step = named + defaults[len(named) :]
    return dim, start, end, step


def shape(node: Node) -> tuple[int, ...]:
    """The static shape of a node's value."""
    return tuple(node.meta["val"].shape)


def dim(node: Node, index: int) -> int:
    """A dimension argument, made non-negative for the node's value."""
    return index % max(len(shape(node)), 1)


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of a node by name, those that are left out by default."""
    schema = node.target._schema.arguments
    given = {a.name: value for a, value in zip(schema, node.args, strict=False)} | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def by_sizes(node: Node) -> bool:
    """Whether a resampling follows from its sizes: a factor that is no quotient of them counts itself."""
    given = arguments(node)
    factors = given.get("scale_factors") or [given.get("scales_h"), given.get("scales_w")]
    have, want = (shape(n)[-len(factors) :] for n in (node.args[0], node))
    return bool(given.get("align_corners")) or all(
        f is None or a * f == b for a, b, f in zip(have, want, factors, strict=True)
    )


def permutation(node: Node) -> list[int]:
    """The order of dimensions that a permute or transpose brings about."""
    if node.target is aten.permute.default:
        return [dim(node, d) for d in node.args[1]]
    order = [*range(len(shape(node)))]
    a, b = (dim(node, d) for d in node.args[1:3])
    order[a], order[b] = b, a
    return order


def fan_in(node: Node) -> int:
    """How many products are summed for one element of a convolution or matrix product."""
    weight: Any = node.args[1]
    if isinstance(weight, fx.Node) and node.target in (
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.linear.default,
    ):
        return int(torch.Size(shape(weight)[1:]).numel())
    if isinstance(weight, fx.Node) and "conv_transpose" in str(node.target):
        kernel = shape(weight)[2:]
        return int(shape(weight)[0] * torch.Size(kernel).numel())
    if node.target in (aten.matmul.default, aten.bmm.default):
        first: Any = node.args[0]
        return shape(first)[-1]
    return 1


def needed(nodes: Iterable[Node]) -> set[Node]:
    """Nodes with all that they follow from."""
    found, todo = set[Node](), [*nodes]
    while todo:
        if (n := todo.pop()) not in found:
            found.add(n)
            todo += n.all_input_nodes
    return found


def steps(x: torch.Tensor, layout: str, T: int) -> torch.Tensor:
    """A neuron's input in any layout as [T, N, ...]."""
    if layout == "stepped":
        return x
    if layout == "static":
        return x.unsqueeze(0).expand(T, *x.shape)
    return x.reshape(T, x.shape[0] // T, *x.shape[1:])
