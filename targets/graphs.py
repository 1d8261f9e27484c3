"""What the targets that torch itself runs share: a program as files, and the way it is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

from ..converters.ops import aten
from ..converters.program import Program
from ..converters.serial import graph_from_data, graph_to_data

_GRAPH, _WEIGHTS = "graph.json", "weights.safetensors"
_SPATIAL = frozenset({aten.conv2d.default, aten.max_pool2d.default, aten.avg_pool2d.default})


def write(program: Program, directory: Path) -> tuple[str, ...]:
    """Write a program's graph and weights; the names of the files."""
    graph = json.dumps(graph_to_data(program.graph), indent=1)
    (directory / _GRAPH).write_text(graph, encoding="utf-8")
    save_file(separate(program.tensors), directory / _WEIGHTS)
    return _GRAPH, _WEIGHTS


def separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as safetensors takes them: contiguous, none a part of another."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


def read(directory: Path) -> fx.GraphModule:
    """What :func:`write` wrote."""
    graph = graph_from_data(json.loads((directory / _GRAPH).read_text(encoding="utf-8")))
    # In memory of torch's own: the order in which a library adds up follows the alignment.
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / _WEIGHTS).items()}
    return fx.GraphModule(tensors, graph)


def channels_innermost(net: nn.Module) -> nn.Module:
    """The network with the weights of its 2-D convolutions in torch's format channels_last.

    That of a convolution of one channel is channels_last and contiguous at once, and cuDNN then computes
    with channels outermost; its strides are written so that only one reading is left.
    """
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for p in net.parameters():
        if p.dim() == 4 and p.shape[1] == 1:
            p.data = one_channel_innermost(p.data)
    return net


def one_channel_innermost(weight: torch.Tensor) -> torch.Tensor:
    """A dense weight [O, 1, H, W] with the strides of channels_last."""
    _, _, H, W = weight.shape
    return weight.contiguous().as_strided(weight.shape, (H * W, 1, W, 1))


class ChannelsInnermost(fx.Interpreter):
    """Runs a graph with channels innermost wherever an operator is faster so."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        for n in module.graph.nodes:
            if n.op == "get_attr" and any(u.target is aten.conv2d.default for u in n.users):
                weight = self.fetch_attr(n.target)
                if weight.dim() == 4:
                    weight.data = weight.contiguous(memory_format=torch.channels_last)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operator on inputs in its faster layout."""
        if target in _SPATIAL and args[0].dim() == 4:
            args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
        return super().call_function(target, args, kwargs)


@contextmanager
def exact_sums(device: torch.device) -> Iterator[None]:
    """Products are summed in float32 and never rounded to TF32, as the verification's bounds allow.

    Algorithms are deterministic, so that an artifact's recorded outputs come again bit for bit.
    """
    if device.type == "cpu":
        yield
        return
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    for name in names:
        setattr(matmul, name, False)
    try:
        with (
            torch.cuda.device(device),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
