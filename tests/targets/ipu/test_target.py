"""Converted networks on the simulated device."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spikeport import deploy
from spikeport.converters import neurons
from spikeport.targets import get
from spikeport.targets.ipu import simulator
from spikeport.targets.script import importable


class Net(nn.Module):
    """Images [N, 1, 8, 8] -> spikes [T, N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.lif1 = neurons.LIFNode(v_reset=None)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(4 * 16, 5)
        self.lif2 = neurons.ParametricLIFNode()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn(self.conv(x)).unsqueeze(0).repeat(3, 1, 1, 1, 1)
        spikes = self.lif1(3 * hidden).flatten(0, 1)
        return self.lif2(self.fc(self.pool(spikes).flatten(1)).reshape(3, -1, 5))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_network_runs_and_its_artifact_replays(dtype: str | None, tmp_path: Path) -> None:
    source = net()
    program = deploy.convert(source, (X,), target="ipu-sim", dtype=dtype)
    artifact = deploy.compile(program, tmp_path / "a")
    assert (tmp_path / "a" / "device" / "model.simulated").is_file()
    with deploy.load(tmp_path / "a") as model:
        spikes = model(X[:3])  # a batch that is padded
        if dtype is None:
            assert torch.equal(spikes, source(X[:3]).detach())
        _, layers = model.probe(X)
        assert [*layers] == ["lif1", "lif2"]
    assert artifact.verify(0).ok


def test_the_device_compiles_what_was_converted_for_the_simulation(tmp_path: Path) -> None:
    source = net()
    artifact = deploy.compile(deploy.convert(source, (X,), target="ipu-sim"), tmp_path / "a")
    with pytest.raises(deploy.TargetUnavailableError, match="Poplar SDK"):
        artifact.load(target="ipu")
    with pytest.raises(
        deploy.UsageError, match="for ipu-sim, and onnx loads artifacts for onnx; conv"
    ):
        artifact.load(target="onnx")
    installed = types.ModuleType("poptorch")  # the same functions, as another module
    vars(installed).update(
        {n: v for n, v in vars(simulator.poptorch).items() if not n.startswith("__")}
    )
    with importable({"poptorch": installed}):
        with deploy.load(tmp_path / "a", target="ipu") as model:
            assert model.target == "ipu"
            assert torch.equal(model(X), source(X).detach())
        assert artifact.verify(target="ipu").ok


def test_what_the_compiler_refuses(tmp_path: Path) -> None:
    program = deploy.convert(net(), (X,), target="ipu-sim")
    refused = r"(?s)poptorch 3.4.0.* refused the program:.*Out of memory"
    big = deploy.convert(net(), (X.repeat(200, 1, 1, 1),), target="ipu-sim", verify=False)
    with simulator.settings(memory_mb=1), pytest.raises(deploy.UnsupportedError, match=refused):
        deploy.compile(big, tmp_path / "big")
    with pytest.raises(deploy.UsageError, match="ipu-sim has no option speed; it has none"):
        deploy.compile(program, tmp_path / "a", speed=2)


def test_no_sdk_and_no_such_device(tmp_path: Path) -> None:
    with pytest.raises(deploy.TargetUnavailableError, match="Poplar SDK.*target ipu-sim"):
        get("ipu").sdk()
    deploy.compile(deploy.convert(net(), (X,), target="ipu-sim"), tmp_path / "a")
    with pytest.raises(deploy.DeviceError, match="no device 3"):
        deploy.load(tmp_path / "a", device=3)


def test_an_executable_of_another_network(tmp_path: Path) -> None:
    program = deploy.convert(net(), (X,), target="ipu-sim")
    deploy.compile(program, tmp_path / "a", probe=False)
    device = tmp_path / "a" / "device"
    (device / "model.simulated").write_text("{}")
    with pytest.raises(deploy.DeviceError, match="refused model.simulated.*is not a PopTorch file"):
        get("ipu-sim").load(device, [], [], 0)
