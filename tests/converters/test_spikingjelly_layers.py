"""Every layer of the real SpikingJelly, 2.0.0 or 0.0.0.0.14: it converts, or is refused by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError
from spikeport.converters.passes import (
    decompose_operators,
    flatten_time,
    fold_constants,
    hoist_time_invariant,
    lower_neurons,
    merge_dimensions,
    reroll_time,
)
from spikeport.targets.lynxi.capabilities import CAPABILITIES

pytest.importorskip("spikingjelly")
functional = pytest.importorskip("spikingjelly.activation_based.functional")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

pytestmark = pytest.mark.spikingjelly
T, N = 4, 2
LINE, IMAGE, VOLUME = (T, N, 4, 9), (T, N, 4, 8, 8), (T, N, 4, 4, 6, 6)
ROW = (T, N, 8)
#: 0.0.0.0.14, all of whose layers are in one file.
OLD = layer.Conv2d.__module__.endswith(".layer")


def spike() -> nn.Module:
    return neuron.IFNode(step_mode="s")


#: What each is made with, and the shape of its input.
CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], tuple[int, ...]]] = {
    "Conv1d": (lambda: (4, 6, 3), LINE),
    "Conv2d": (lambda: (4, 6, 3, 1, 0, 1, 2), IMAGE),
    "Conv3d": (lambda: (4, 6, 3), VOLUME),
    "ConvTranspose1d": (lambda: (4, 6, 3, 2), LINE),
    "ConvTranspose2d": (lambda: (4, 6, 3, 2, 1, 1, 2), IMAGE),
    "ConvTranspose3d": (lambda: (4, 6, 3), VOLUME),
    "Upsample": (lambda: (None, 2), IMAGE),
    "BatchNorm1d": (lambda: (4,), LINE),
    "BatchNorm2d": (lambda: (4,), IMAGE),
    "BatchNorm3d": (lambda: (4,), VOLUME),
    "GroupNorm": (lambda: (2, 4), IMAGE),
    "MaxPool1d": (lambda: (2,), LINE),
    "MaxPool2d": (lambda: (3, 2, 1), IMAGE),
    "MaxPool3d": (lambda: (2,), VOLUME),
    "AvgPool1d": (lambda: (2,), LINE),
    "AvgPool2d": (lambda: (2,), IMAGE),
    "AvgPool3d": (lambda: (2,), VOLUME),
    "AdaptiveAvgPool1d": (lambda: (3,), LINE),
    "AdaptiveAvgPool2d": (lambda: (3,), IMAGE),
    "AdaptiveAvgPool3d": (lambda: (2,), VOLUME),
    "Linear": (lambda: (8, 5), ROW),
    "Flatten": (lambda: (), IMAGE),
    "WSConv2d": (lambda: (4, 6, 3), IMAGE),
    "WSLinear": (lambda: (8, 5), ROW),
    "Dropout": (lambda: (0.5,), IMAGE),
    "Dropout2d": (lambda: (0.5,), IMAGE),
    "NeuNorm": (lambda: (4, 8, 8), IMAGE),
    "SynapseFilter": (lambda: (2.5,), IMAGE),
    "Delay": (lambda: (2,), IMAGE),
    "ElementWiseRecurrentContainer": (lambda: (spike(), torch.add), ROW),
    "LinearRecurrentContainer": (lambda: (spike(), 8, 8), ROW),
    "MultiStepContainer": (lambda: (spike(),), ROW),
    "SeqToANNContainer": (lambda: (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), IMAGE),
    "StepModeContainer": (lambda: (False, *(() if OLD else "m"), nn.Conv2d(4, 6, 3)), IMAGE),
    "ThresholdDependentBatchNorm1d": (lambda: (1.0, 0.5, 4), LINE),
    "ThresholdDependentBatchNorm2d": (lambda: (1.0, 0.5, 4), IMAGE),
    "ThresholdDependentBatchNorm3d": (lambda: (1.0, 0.5, 4), VOLUME),
    "TemporalEffectiveBatchNorm1d": (lambda: (T, 4), LINE),
    "TemporalEffectiveBatchNorm2d": (lambda: (T, 4), IMAGE),
    "TemporalEffectiveBatchNorm3d": (lambda: (T, 4), VOLUME),
    "BatchNormThroughTime1d": (lambda: (T, 4), LINE),
    "BatchNormThroughTime2d": (lambda: (T, 4), IMAGE),
    "BatchNormThroughTime3d": (lambda: (T, 4), VOLUME),
    "TemporalWiseAttention": (lambda: (T, 2), IMAGE),
    "MultiDimensionalAttention": (lambda: (T, 4, 2, 2), IMAGE),
    "SpikingSelfAttention": (lambda: (8, 2), (T, N, 8, 9)),
    "TokenQKAttention": (lambda: (8, 2), (T, N, 8, 9)),
    "ChannelQKAttention": (lambda: (8, 2), (T, N, 8, 9)),
    "SpikeDrivenSelfAttention": (lambda: (8, 2), (T, N, 8, 3, 3)),
    "VotingLayer": (lambda: (2,), ROW),
    "PrintShapeModule": (lambda: (), ROW),
    "SpikeCountToBinary": (lambda: (3,), ROW),
    "TemporalBinSum": (lambda: (2,), ROW),
}
#: Refused by name, with the rule.
REFUSED = {
    "DropConnectLinear": ((lambda: (8, 5)), ROW, "unknown-neuron"),
    **(
        {
            name: (*CASES[name], "untraceable")
            for name in ("Delay", "ElementWiseRecurrentContainer", "SynapseFilter")
        }
        if OLD
        else {}
    ),
}
#: Parts of training or of another layer, layers of two inputs, and those that go through torch.vmap,
#: where torch.export does not follow.
NO_LAYERS = {
    "GradwithTrace",
    "OTTTSequential",
    "QKAttention",
    "ReplaceforGrad",
    "SpikeTraceOp",
    "TLastMultiStepContainer",
    "TLastSeqToANNContainer",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
}
#: What 0.0.0.0.14 itself cannot run.
BROKEN = {
    "MultiDimensionalAttention",
    "TemporalWiseAttention",
    "ThresholdDependentBatchNorm1d",
    "ThresholdDependentBatchNorm2d",
    "ThresholdDependentBatchNorm3d",
}


def layers() -> dict[str, type[nn.Module]]:
    found = inspect.getmembers(layer, inspect.isclass)
    return {
        name: kind
        for name, kind in found
        if kind.__module__.startswith("spikingjelly") and not name.startswith("_")
    }


def made(name: str, arguments: tuple[Any, ...]) -> nn.Module:
    torch.manual_seed(0)
    kind = layers()[name]
    net: nn.Module = kind(*arguments)
    if hasattr(net, "step_mode"):
        net.step_mode = "m"
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


def drive(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-8, 25, shape, generator=torch.Generator().manual_seed(0)) / 8


def test_every_layer_has_its_case() -> None:
    assert not set(layers()) - set(CASES) - set(REFUSED) - NO_LAYERS


class SideBySide(nn.Module):
    """Layers after spikes of an input of their own each: tracing them together costs a quarter."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(neuron.IFNode(step_mode="m"), made(name, CASES[name][0]()))
            for name in names
        )

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


#: 0.0.0.0.14 cannot run some, and others are refused there.
TAKEN = [n for n in layers() if n in CASES and not (OLD and n in (BROKEN | set(REFUSED)))]


@pytest.mark.parametrize("names", [TAKEN[i::6] for i in range(6)], ids="-".join)
def test_layers_convert(names: list[str]) -> None:
    net = SideBySide(names).eval()
    inputs = tuple(drive(CASES[name][1]) for name in names)
    with torch.no_grad():
        expected = copy.deepcopy(net)(*inputs)
    program = capture(net, inputs)
    assert all(map(torch.equal, program(*inputs), expected))
    for rewrite in (fold_constants, reroll_time, hoist_time_invariant, flatten_time):
        program = rewrite(program)
    for name, found, wanted in zip(names, program(*inputs), expected, strict=True):
        assert torch.equal(found, wanted), name
    for rewrite in (
        decompose_operators(CAPABILITIES.ops or ()),
        merge_dimensions(4),
        lower_neurons,
    ):
        program = rewrite(program)
    for name, found, wanted in zip(names, program(*inputs), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5), name
    ranks = [n.meta["val"].dim() for n in program.nodes("call_function")]
    assert max(ranks) <= 4


@pytest.mark.parametrize("name", [name for name in layers() if name in REFUSED])
def test_a_layer_is_refused_by_name(name: str) -> None:
    arguments, shape, rule = REFUSED[name]
    with pytest.raises(CaptureError) as caught:
        capture(nn.Sequential(nn.Identity(), made(name, arguments())), (drive(shape),))
    found = caught.value.findings[0]
    assert (found.rule, found.where) == (rule, "1")
    assert name in found.found
