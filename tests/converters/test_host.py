"""Networks that lie elsewhere than on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from spikeport import deploy
from spikeport.converters import neurons
from spikeport.converters.errors import CaptureError
from spikeport.converters.host import on_host
from spikeport.targets import ipu

GPU = torch.device("cuda")


class Net(nn.Module):
    """Weights, a buffer, a learned neuron, and a tensor that is neither, which a call leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 36, 5)
        self.spike, self.last = neurons.ParametricLIFNode(), neurons.IFNode()
        self.register_buffer("scale", torch.tensor(1.5))
        self.kept = [torch.ones(3)]
        self.tied = self.fc.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x) * self.scale
        s = self.spike(h.unsqueeze(0).repeat(4, 1, 1, 1, 1))
        return self.last(self.fc(s.flatten(2))).mean(0)


def image(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def test_what_lies_on_the_cpu_is_not_copied() -> None:
    net, x = Net(), image()
    same, (given,) = on_host(net, (x,))
    assert same is net
    assert given is x


def test_tensors_without_values_are_named_all_at_once() -> None:
    net = Net()
    net.fc.to("meta")
    net.kept[0] = net.kept[0].to("meta")
    with pytest.raises(CaptureError) as error:
        deploy.convert(net, (image().to("meta"),), target="onnx")
    assert [(f.rule, f.where, f.found.split()[0]) for f in error.value.findings] == [
        ("no-values", "fc", "fc.weight"),
        ("no-values", "fc", "fc.bias"),
        ("no-values", "", "kept"),
        ("no-values", "", "input"),
    ]
    assert [*deploy.check(net, (image().to("meta"),), ["lynxi"])] == [*error.value.findings]
    assert [f.rule for f in ipu.check(net, image())] == ["no-values"] * 3


@pytest.mark.gpu
def test_a_network_on_a_gpu_is_read_on_the_cpu_and_left_there() -> None:
    net = Net().to(GPU)
    net.kept = [net.kept[0].to(GPU)]
    copy, (x,) = on_host(net, (image().to(GPU),))
    held = [*copy.parameters(), *copy.buffers(), *copy.kept, x]
    assert {t.device.type for t in held} == {"cpu"}
    assert (copy.tied is copy.fc.weight) == (net.tied is net.fc.weight)
    assert all(t.device.type == GPU.type for t in (*net.parameters(), *net.buffers(), *net.kept))
    assert torch.equal(copy.conv.weight, net.conv.weight.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["reference", "lynxi-sim", "onnx", "ipu-sim", "cuda"])
def test_a_network_on_a_gpu_goes_the_whole_way(target: str, time: str, tmp_path: Path) -> None:
    net, x = Net().eval(), image()
    expected = deploy.convert(net, (x,), target=target, time=time)
    net.to(GPU)
    assert not deploy.check(net, (x.to(GPU),), [target], time=time).errors
    program = deploy.convert(net, (x.to(GPU),), target=target, time=time)
    assert str(program) == str(expected)
    assert torch.equal(program(x.to(GPU)), expected(x))
    deploy.compile(program, tmp_path / "artifact", cache=False)
    with deploy.load(tmp_path / "artifact") as model:
        assert torch.equal(model(x.to(GPU)).cpu(), model(x).cpu())
        loader = [(image(3), torch.zeros(3, dtype=torch.int64))]
        on_gpu = [tuple(part.to(GPU) for part in batch) for batch in loader]
        for batches in (loader, on_gpu):
            assert deploy.compare(net, model, batches).samples == 3


@pytest.mark.gpu
def test_a_network_on_a_gpu_is_trained_on_an_ipu() -> None:
    net = Net().to(GPU)
    assert not ipu.check(net, image().to(GPU), loss="mse").errors
    assert {p.device.type for p in ipu.training_module(net, "mse").parameters()} == {"cpu"}
