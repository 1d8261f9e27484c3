"""Networks over [T, N, C, D, H, W]: convolution and pooling in 3-D, neurons, states, on every target."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Net, rand
from torch import nn

from spikeport import deploy
from spikeport.converters import neurons
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.converters.program import Time
from spikeport.targets import cuda
from spikeport.targets.lynxi.simulator import options

T, N = 3, 2
SHAPE = (T, N, 2, 4, 6, 5)
#: Thresholds of a channel, of a row of all channels, of each neuron.
THRESHOLDS = {"channel": (4, 1, 1, 1), "row": (6, 1), "neuron": (4, 4, 6, 5)}


def over_images(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
    x = s.first(over_images(s.norm, over_images(s.conv, x)))
    x = s.second(over_images(s.down, over_images(s.pool, x)))
    return over_images(s.mean, x).flatten(2).mean(0)


@cache
def network(threshold: str) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm3d(4)
    norm.running_var.fill_(0.1)
    first = LIFNode(v_threshold=torch.rand(THRESHOLDS[threshold]) + 0.2)
    return Net(
        forward,
        conv=nn.Conv3d(2, 4, 3, padding=1),
        norm=norm,
        first=first,
        pool=nn.MaxPool3d((2, 1, 1)),
        down=nn.Conv3d(4, 3, 2, 2),
        second=IFNode(v_threshold=0.1),
        mean=nn.AdaptiveAvgPool3d(1),
    ).eval()


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["lynxi-sim", "onnx", "ipu-sim"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_volume_on_every_target(target: str, threshold: str, time: Time, tmp_path: Path) -> None:
    net, x = network(threshold), rand(*SHAPE, seed=1) * 2
    program = deploy.convert(net, (rand(*SHAPE),), target, time=time)
    deploy.compile(program, tmp_path / "net", cache=False, probe=True)
    with deploy.load(tmp_path / "net") as model:
        report = deploy.compare(net, model, [(x, torch.zeros(N, dtype=torch.long))], layers=N)
        assert report.explained
        _, spikes = model.probe(x)
    assert {name: tuple(s.shape) for name, s in spikes.items()} == {
        "first": (T, N, 4, 4, 6, 5),
        "second": (T, N, 3, 1, 3, 2),
    }
    assert all(0.05 < s.float().mean() < 0.95 for s in spikes.values())
    if target == "lynxi-sim":
        ranks = {n.meta["val"].dim() for n in program.graph.nodes if n.op != "output"}
        assert max(ranks) <= 4


def test_a_state_has_the_shape_of_its_layer(tmp_path: Path) -> None:
    """Wherever it is: a stream goes on from it, on another target too."""
    net, x = network("channel"), rand(*SHAPE, seed=1) * 2
    states = {}
    for target in ("lynxi-sim", "reference"):
        program = deploy.convert(net, (x,), target, dtype="float32", time="stepped")
        with options(storage="float32"):
            deploy.compile(program, tmp_path / target, cache=False)
            model = deploy.load(tmp_path / target)
            model.step(x[0])
            states[target] = model.state
            whole = model.step(x[1])
            model.state = states["lynxi-sim"]
            torch.testing.assert_close(model.step(x[1]), whole)
    assert states["lynxi-sim"]["first.v"].shape == (N, 4, 4, 6, 5)
    assert states["lynxi-sim"].keys() == states["reference"].keys()


class Loop(nn.Module):
    """Steps one by one; the spikes of a volume come back through a convolution, those of another alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.back = nn.Conv3d(2, 3, 3, padding=1), nn.Conv3d(3, 3, 1)
        weights = nn.Parameter(torch.rand(3, 1, 1, 1) + 0.1)
        self.first = cuda.Node(neurons.ParametricLIF, w=weights, v_rest=0.0, step_mode="s")
        self.second = cuda.LIFNode(step_mode="s", v_reset=None, v_threshold=0.3)

    def forward(self, x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.zeros(N, 3, 4, 6, 5)
        spikes = []
        for x_t in x_seq:
            x = self.first(self.conv(x_t) + self.back(x))
            spikes.append(self.second(x))
        return torch.stack(spikes), x


@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["reference", "lynxi-sim", "onnx"])
def test_spikes_of_a_volume_that_come_back(target: str, time: Time, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Loop().eval(), 4 * rand(*SHAPE, seed=1)
    program = deploy.convert(net, (4 * rand(*SHAPE),), target, time=time, dtype="float32")
    with options(storage="float32"):
        deploy.compile(program, tmp_path / "net", cache=False)
        with torch.no_grad(), deploy.load(tmp_path / "net") as model:
            for found, expected in zip(model(x), net(x), strict=True):
                assert 0.02 < expected.mean() < 0.98
                assert torch.equal(found, expected)
