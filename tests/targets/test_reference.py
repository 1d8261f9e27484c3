"""The CPU target: the same numbers as the network, from files that hold data only."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from spikeport import deploy
from spikeport.converters.errors import DeviceError, UsageError
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.converters.serial import graph_from_data, graph_to_data


def _net() -> nn.Module:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.spikes = LIFNode(tau=torch.tensor([2.0, 3.0, 4.0, 5.0]).reshape(4, 1, 1))
            self.pool, self.fc, self.out = nn.MaxPool2d(2), nn.Linear(64, 3), IFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.conv(x.repeat(5, 1, 1, 1))).unflatten(0, (5, -1))
            y = self.pool(self.spikes(3 * y).flatten(0, 1)).flatten(1)
            return self.out(self.fc(y).unflatten(0, (5, -1))).mean(0)

    net = Net().eval()
    net.norm.running_mean.normal_(0, 0.3)
    return net


def test_layers_share_a_tensor(tmp_path) -> None:
    threshold = torch.tensor([0.5, 1.0, 0.25])
    net = nn.Sequential(IFNode(v_threshold=threshold), LIFNode(v_threshold=threshold[:1]))
    x = torch.rand(4, 2, 3)
    program = deploy.convert(net, (x,), target="reference")
    deploy.compile(program, tmp_path / "artifact", cache=False)
    assert torch.equal(deploy.load(tmp_path / "artifact")(x), net(x))


def test_it_computes_what_the_network_computes(tmp_path) -> None:
    net, x = _net(), torch.rand(6, 1, 8, 8)
    program = deploy.convert(net, (x,), target="reference")
    deploy.compile(program, tmp_path / "artifact", cache=False)
    with deploy.load(tmp_path / "artifact") as model, torch.no_grad():
        assert torch.equal(model(x), net(x))
        assert torch.equal(model(x[:2]), net(x)[:2])
    assert net(x).mean() > 0


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_are_rounded_as_in_the_network(narrow: torch.dtype, tmp_path) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = LIFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.neuron((x * 3.3).to(narrow).float())

    x = torch.rand(4, 2, 6)
    program = deploy.convert(Rounded(), (x,), target="reference")
    deploy.compile(program, tmp_path / "artifact", cache=False)
    assert torch.equal(deploy.load(tmp_path / "artifact")(x), Rounded()(x))


def test_a_graph_survives_as_json() -> None:
    program = deploy.convert(_net(), (torch.rand(2, 1, 8, 8),), target="lynxi-sim")
    data = json.loads(json.dumps(graph_to_data(program.graph)))
    again = graph_from_data(data)
    assert graph_to_data(again) == data
    module = torch.fx.GraphModule(program.tensors, again)
    inputs = program.flat_inputs((torch.rand(2, 1, 8, 8),))
    assert torch.equal(module(*inputs)[0], program.module(*inputs)[0])


def test_a_file_can_call_nothing_but_tensor_operators() -> None:
    evil = {"name": "a", "op": "call_function", "target": "os.system", "args": ["true"]}
    with pytest.raises(UsageError, match=r"operator 'os.system' is not known"):
        graph_from_data([{**evil, "kwargs": {}, "path": ""}])


def test_float16_and_other_devices_are_refused(tmp_path) -> None:
    net, x = _net(), torch.rand(2, 1, 8, 8)
    with pytest.raises(UsageError, match="float32"):
        deploy.convert(net, (x,), target="reference", dtype="float16")
    deploy.compile(deploy.convert(net, (x,), target="reference"), tmp_path / "a", cache=False)
    with pytest.raises(DeviceError, match="no device 1"):
        deploy.load(tmp_path / "a", device=1)
