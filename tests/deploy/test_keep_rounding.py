"""Programs that keep the network's rounding: equal bit for bit where folding is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from networks import equal
from random_networks import RANDOM, stacks
from torch import nn

from spikeport import deploy
from spikeport.converters.neurons import IF, IFNode, Node
from spikeport.converters.verify import Trace
from spikeport.deploy import cli
from spikeport.targets.lynxi.simulator import options

T, N, C = 3, 2, 32
TARGETS = ("reference", "lynxi-sim", "ipu-sim")


class Residual(nn.Module):
    """Images [N, 3, 8, 8], repeated -> spikes [T, N, C, 8, 8] after a residual block, scores [N, 10].

    Thresholds lie exactly at the first drive of the first sample: whatever rounds a drive otherwise
    flips spikes.
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, C, 3, padding=1, bias=bias), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=bias), nn.BatchNorm2d(C)
        self.fc, self.bn3 = nn.Linear(C * 64, 10, bias=bias), nn.BatchNorm1d(10)
        for norm in (self.bn, self.bn2, self.bn3):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
        self.first = self.second = IFNode()
        self.eval()
        with torch.no_grad():
            self.first = Node(IF, v_threshold=self._drive(images())[0, 0].clone())
            _, drive = self._block(images())
            self.second = Node(IF, v_threshold=drive[0, 0].clone())

    def _drive(self, x: torch.Tensor) -> torch.Tensor:
        x = x.expand(T, *x.shape).flatten(0, 1)
        return self.bn(self.conv(x)).unflatten(0, (T, -1))

    def _block(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spikes = self.first(self._drive(x))
        return spikes, self.bn2(self.conv2(spikes.flatten(0, 1))).unflatten(0, (T, -1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        before, drive = self._block(x)
        spikes = before + self.second(drive)
        scores = self.bn3(self.fc(spikes.flatten(2).flatten(0, 1)))
        return {"spikes": spikes, "scores": scores.unflatten(0, (T, -1)).mean(0)}


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEPORT_CACHE", str(tmp_path / "cache"))


def outputs(program: deploy.Program, folder: Path) -> dict[str, torch.Tensor]:
    with options(storage="float32"):
        deploy.compile(program, folder, probe=False)
        with deploy.load(folder) as model:
            return model(images())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_equal_bit_for_bit_and_not_without(target: str, bias: bool, tmp_path: Path) -> None:
    net = Residual(bias)
    with torch.no_grad():
        expected = net(images())
    found = {}
    for keep in (True, False):
        program = deploy.convert(
            net, (images(1),), target, dtype="float32", keep_rounding=keep, verify=keep
        )
        found[keep] = outputs(program, tmp_path / str(keep))
        assert program.evidence is None or not any(
            layer.drive_difference for layer in program.evidence.layers
        )
    for name, value in expected.items():
        assert torch.equal(found[True][name], value), name
        assert not torch.equal(found[False][name], value), name


class Loop(nn.Module):
    """[T, N, 64] -> scores [T, N, 10] of a network that is written step by step."""

    def __init__(self) -> None:
        super().__init__()
        snntorch = pytest.importorskip("snntorch")
        torch.manual_seed(0)
        self.fc, self.bn, self.out = nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Linear(256, 10)
        self.bn.running_mean.uniform_(-0.5, 0.5)
        self.bn.running_var.uniform_(0.05, 0.2)
        self.lif = snntorch.Leaky(beta=0.9)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem, scores = self.lif.init_leaky(), []
        for step in x:
            drive = self.bn(self.fc(step))
            spikes, mem = self.lif(drive, mem)
            scores.append(self.out(spikes) + drive.mean())
        return torch.stack(scores)


@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_loop_over_time_rounds_step_by_step(target: str, time: Any, tmp_path: Path) -> None:
    net, x = Loop(), torch.rand(4, 1, 64, generator=torch.Generator().manual_seed(0))
    program = deploy.convert(
        net, (x,), target, dtype="float32", time=time, keep_rounding=True, verify=False
    )
    with options(storage="float32"), torch.no_grad():
        deploy.compile(program, tmp_path / "made", probe=False)
        with deploy.load(tmp_path / "made") as model:
            assert torch.equal(model(x), net(x))


class Moved(nn.Module):
    """[T, N, C, 6, 6] -> spikes, and the drives of a norm that has the channels first, as MS-ResNet's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.neuron = nn.BatchNorm3d(16), IFNode(v_threshold=0.5)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.3, 1.3)
        nn.init.uniform_(self.bn.weight, 0.7, 1.7)
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.transpose(0, 2).contiguous().transpose(0, 1).contiguous()
        x = self.bn(x).transpose(0, 1).contiguous().transpose(0, 2)
        return self.neuron(x), x


@pytest.mark.parametrize("returned", [slice(0, 2), slice(0, 1)], ids=["drives", "spikes"])
@pytest.mark.parametrize("target", [*TARGETS, "onnx"])
def test_what_rounds_as_it_lies_in_memory(target: str, returned: slice, tmp_path: Path) -> None:
    """torch's batch norm rounds otherwise where the copies are left out, which each target may."""

    class Net(Moved):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return super().forward(x)[returned]

    generator = torch.Generator().manual_seed(0)
    net, x = Net(), torch.randn(4, N, 16, 6, 6, generator=generator)
    for keep in (False, True):
        program = deploy.convert(net, (x,), target, dtype="float32", keep_rounding=keep)
        assert program.captured is not None
        with options(storage="float32"), torch.no_grad():
            drive = Trace.of(program.captured, (x,)).drive(program.captured.sites[0])
            assert torch.equal(drive, Moved.forward(net, x)[1])
            deploy.compile(program, tmp_path / str(keep), probe=False)
            with deploy.load(tmp_path / str(keep)) as model:
                made = model(x)
        tolerance = 0.0 if keep and target in TARGETS else 1e-5
        torch.testing.assert_close(made, net(x), rtol=tolerance, atol=tolerance)


def test_the_manifest_and_the_cache_tell_them_apart(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), IFNode()), (torch.rand(T, N, 4),)  # the same graph
    made = {}
    for keep in (False, True):
        program = deploy.convert(net, x, "ipu-sim", keep_rounding=keep, verify=False)
        made[keep] = deploy.compile(program, tmp_path / str(keep))
        assert not made[keep].cached
        assert made[keep].manifest["keeps_rounding"] is keep
        assert deploy.compile(program, tmp_path / f"{keep} again").cached
    assert made[True].manifest["graph"] == made[False].manifest["graph"]
    assert made[True].manifest["key"] != made[False].manifest["key"]
    assert "the network's rounding kept" in str(made[True])


def test_float16_cannot_keep_it() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), IFNode()), (torch.rand(T, N, 4),)
    with pytest.raises(deploy.UsageError, match='float16 every value.* dtype="float32"'):
        deploy.convert(net, x, "lynxi-sim", keep_rounding=True)
    with pytest.raises(deploy.UsageError, match="without keep_rounding"):
        deploy.check(net, x, ["lynxi-sim"], keep_rounding=True)


def test_nir_leaves_rounding_to_others() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), IFNode()), (torch.rand(T, N, 4),)
    (finding,) = deploy.check(net, x, ["nir"], keep_rounding=True)
    assert (finding.rule, finding.fix) == ("rounding", "convert without keep_rounding")


@pytest.mark.slow
def test_50_random_networks_bit_for_bit(tmp_path: Path) -> None:
    @settings(RANDOM, max_examples=50)
    @given(stack=stacks())
    def every(stack: tuple[nn.Module, tuple[torch.Tensor, ...]]) -> None:
        net, inputs = stack
        with torch.no_grad():
            expected = net(*inputs)
        for target in TARGETS:
            program = deploy.convert(net, inputs, target, dtype="float32", keep_rounding=True)
            with options(storage="float32"):
                deploy.compile(program, tmp_path / target, cache=False, probe=False, overwrite=True)
                with deploy.load(tmp_path / target) as model:
                    assert equal(model(*inputs), expected), target

    every()


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = (f"{__file__}:Residual", "--input", "2,3,8,8", "--target", "ipu-sim", "--keep-rounding")
    assert cli.main(["show", *net, "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    names = [step["name"] for step in steps]
    assert names[:2] == ["capture", "drop_unused_steps"]
    assert names[2:] == ["fold_constants", "flatten_time", "lower_neurons"]
    assert "aten.batch_norm" in steps[-1]["graph"]
    assert cli.main(["check", *net]) == 0
    assert cli.main(["compile", *net, "--no-verify", "--no-probe", "-o", str(tmp_path / "a")]) == 0
    assert deploy.Artifact.open(tmp_path / "a").manifest["keeps_rounding"] is True
