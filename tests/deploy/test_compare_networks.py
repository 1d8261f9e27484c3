"""Networks of other forms than images to scores, compared: where samples, steps and classes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tampered import Tampered
from torch import nn

from spikeport import deploy
from spikeport.converters.errors import UsageError
from spikeport.converters.neurons import LIF, LIFNode, Neuron
from spikeport.converters.program import Time
from spikeport.converters.sources.nir.layers import Cell
from spikeport.deploy.compare import compare

T, BATCH, CLASSES = 4, 4, 5


class Spectrum(nn.Module):
    """Sound [N, 1, T, F], whose neurons see [T, C, N, F]: the channels before the samples."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.spike, self.fc = LIFNode(), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = self.spike(self.conv(x).transpose(0, 2) * 3)
        return self.fc(spikes).mean((0, 1))


@pytest.mark.parametrize("channels", [7, BATCH])
def test_channels_before_the_samples(channels: int, tmp_path: Path) -> None:
    net = Spectrum(channels).eval()
    x = torch.randn(BATCH, 1, 9, 6, generator=torch.Generator().manual_seed(0))
    program = deploy.convert(net, (x,), "reference", dtype="float32")
    assert program.batch == BATCH

    def flip(spikes: torch.Tensor) -> torch.Tensor:
        changed = spikes.clone()
        changed[2, 1, 3, 5] = 1 - changed[2, 1, 3, 5]
        return changed

    labels = torch.zeros(BATCH, dtype=torch.int64)
    with deploy.load(deploy.compile(program, tmp_path / "artifact", probe=True).path) as model:
        assert compare(net, model, [(x, labels)]).divergence is None
        assert torch.allclose(model(x[:3]), net(x[:3]))
        at = compare(net, Tampered(model, "spike", flip), [(x, labels)]).divergence
    assert at is not None
    assert (at.t, at.sample, at.index) == (2, 3, (1, 5))


class Windows(nn.Module):
    """Samples [N, 6, 8] whose windows the neurons take for samples: [T, 6 N, 8]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.spike, self.fc2 = nn.Linear(8, 8), LIFNode(), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drive = self.fc1(x).flatten(0, 1) * 3
        spikes = self.spike(drive.unsqueeze(0).repeat(T, 1, 1))
        return self.fc2(spikes.mean(0).unflatten(0, (-1, 6)).mean(1))


@pytest.mark.parametrize("batch", [T, 5])
def test_neurons_that_take_more_than_samples(batch: int, tmp_path: Path) -> None:
    net = Windows().eval()
    x = torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(0))
    program = deploy.convert(net, (x,), "reference", dtype="float32")
    assert program.batch == batch

    def flip(spikes: torch.Tensor) -> torch.Tensor:
        changed = spikes.clone()
        changed[2, 7, 5] = 1 - changed[2, 7, 5]
        return changed

    labels = torch.zeros(batch, dtype=torch.int64)
    with deploy.load(deploy.compile(program, tmp_path / "artifact", probe=True).path) as model:
        assert torch.allclose(model(x[:3]), net(x[:3]))
        for n in (3, batch):
            report = compare(net, model, [(x[:n], labels[:n])])
            assert report.divergence is None
            assert report.samples == n
        report = compare(net, Tampered(model, "spike", flip), [(x, labels)])
    assert report.divergence is not None
    assert (report.divergence.t, report.divergence.index) == (2, (7, 5))
    assert not report.explained


def test_a_network_without_neurons(tmp_path: Path) -> None:
    """Such as SpikingJelly's SpikingLSTM, over time steps that come first."""

    class Steps(nn.Module):
        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            return (x_seq > 0).to(x_seq).mean(0)

    x = torch.randn(6, BATCH, CLASSES)
    program = deploy.convert(Steps(), (x,), "lynxi-sim", dtype="float32")
    assert program.batch == BATCH
    with deploy.load(deploy.compile(program, tmp_path / "artifact", probe=True).path) as model:
        outputs, spikes = model.probe(x)
        assert not spikes
        assert torch.allclose(outputs, Steps()(x), atol=1e-2)
        report = compare(Steps(), model, [(x, torch.zeros(BATCH, dtype=torch.int64))])
    assert report.samples == BATCH
    assert not report.layers
    assert not report.note


def test_a_layer_whose_last_spikes_nothing_hears(tmp_path: Path) -> None:
    """Its last step is no part of the artifact, nor of what that is compared with."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            neuron = Neuron(LIF, {"tau": 2.0, "v_rest": 0.0})
            self.spike1, self.spike2 = Cell(neuron, True), Cell(neuron, True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            last, total = torch.zeros(x.shape[1], CLASSES), torch.zeros(x.shape[1], CLASSES)
            for now in x:
                total = total + self.spike2(last)
                last = self.spike1(now)
            return total

    x = torch.randn(T, BATCH, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
    net = Late().eval()
    for time in get_args(Time):
        program = deploy.convert(net, (x,), "reference", time=time)
        with deploy.load(deploy.compile(program, tmp_path / time, probe=True).path) as model:
            report = compare(net, model, [(x, torch.zeros(BATCH, dtype=torch.int64))])
        found = {layer.layer: layer.differing for layer in report.layers}
        assert found == {"spike1": (0.0,) * (T - (time == "unrolled")), "spike2": (0.0,) * T}


class Lines(nn.Module):
    """Two inputs [T, N, 6] and [N, 6] -> whatever ``read`` makes of spikes [T, N, 5]."""

    def __init__(self, read: Any, features: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.spike, self.read = nn.Linear(6, features), LIFNode(), read

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.read(self.spike(self.fc(x + z) * 4))
        return y


def lines(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(T, n, 6, generator=generator), torch.randn(n, 6, generator=generator)


def made(net: nn.Module, folder: Path, n: int = BATCH, time: Any = "unrolled") -> Any:
    program = deploy.convert(net.eval(), lines(n), "reference", time=time)
    return deploy.compile(program, folder / "lines", probe=True, cache=False)


@pytest.mark.parametrize(
    ("read", "time"),
    [
        (lambda s: s.transpose(0, 1), "unrolled"),
        (lambda s: s.transpose(0, 1), "stepped"),
        (lambda s: s.sum(0) > 1, "unrolled"),
    ],
    ids=["batch first", "stepped", "booleans"],
)
@pytest.mark.parametrize("n", [T, 3])
def test_classes_of_outputs_of_other_forms(read: Any, time: Any, n: int, tmp_path: Path) -> None:
    net = Lines(read)
    inputs = lines(n)
    with torch.no_grad():
        scores = net(*inputs).float()
    expected = (scores.mean(1) if scores.dim() == 3 else scores).argmax(1)
    artifact = made(net, tmp_path, n, time)
    assert artifact.verify().ok
    with artifact.load() as model:
        report = compare(net, model, [(inputs, expected)])
        assert (report.samples, report.probed) == (n, n)
        assert (report.source_accuracy, report.device_accuracy) == (1.0, 1.0)


@pytest.mark.parametrize("time", get_args(Time))
def test_classes_before_time_steps(time: Time, tmp_path: Path) -> None:
    net = Lines(lambda s: s.permute(1, 2, 0))  # [N, C, T]
    inputs = lines(BATCH)
    with torch.no_grad():
        expected = net(*inputs).mean(2).argmax(1)
    with made(net, tmp_path, BATCH, time).load() as model:
        report = compare(net, model, [(inputs, expected)])
    assert (report.source_accuracy, report.device_accuracy) == (1.0, 1.0)


class Loop(nn.Module):
    """Neurons that hear one another a step later, on a static input [N, 64]."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.back, self.out = (nn.Linear(*size) for size in ((64, 80), (80, 80), (80, 5)))
        self.spike, self.sign = Cell(Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}), True), sign
        with torch.no_grad():
            self.fc.weight.mul_(6)
            self.back.weight.mul_(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes, total = torch.zeros(len(x), 80), torch.zeros(len(x), CLASSES)
        for _ in range(10):
            spikes = self.spike(self.fc(x) + self.sign * self.back(spikes))
            total = total + self.out(spikes)
        return total


def test_a_flip_that_others_hear_is_told_from_a_wrong_loop(tmp_path: Path) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    data = [(x.roll(i, 0) * (1 + i / 9), torch.zeros(8, dtype=torch.int64)) for i in range(8)]
    net = Loop().eval()
    found = {}
    for sign in (1.0, -1.0):
        program = deploy.convert(Loop(sign).eval(), (x,), "lynxi-sim", dtype="float16")
        artifact = deploy.compile(program, tmp_path / f"{sign:g}", probe=True)
        with artifact.load() as model:
            found[sign] = compare(net, model, data)
    right, wrong = (found[sign].layers[0] for sign in (1.0, -1.0))
    assert found[1.0].explained
    assert 0 < right.flips < sum(right.differing) * 64 * 80
    assert wrong.unexplained > 100


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (
            lambda y: (y, y),
            lambda y: (y,),
            r"output\[1\]: the network gives floating-point numbers",
        ),
        (
            lambda y: (y,),
            lambda y: (y, y),
            r"output\[1\]: the network gives nothing, the artifact fl",
        ),
        (
            lambda y: {"a": y, "b": y},
            lambda y: {"b": y, "a": y},
            r"outputs \['a'\], \['b'\] in this",
        ),
        (
            lambda y: (y, None),
            lambda y: (y, y),
            "the network gives None, the artifact floating-point",
        ),
        (
            lambda y: y > 0,
            lambda y: y,
            "the network gives truth values, the artifact floating-point",
        ),
    ],
    ids=["fewer", "more", "other order", "None", "other numbers"],
)
def test_outputs_of_another_network(ours: Any, theirs: Any, said: str, tmp_path: Path) -> None:
    data = [(lines(BATCH), torch.zeros(BATCH))]
    with (
        made(Lines(lambda s: theirs(s.mean(0))), tmp_path).load() as model,
        pytest.raises(UsageError, match=f"compiled from another network: .*{said}"),
    ):
        compare(Lines(lambda s: ours(s.mean(0))).eval(), model, data, layers=0)


def test_no_number_differs_from_one_by_infinity(tmp_path: Path) -> None:
    data = [(lines(BATCH), torch.zeros(BATCH))]
    with made(Lines(lambda s: s.mean(0)), tmp_path).load() as model:
        report = compare(Lines(lambda s: s.mean(0) * torch.nan).eval(), model, data)
    assert report.explained is False
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (told["difference"], told["outputs"][0]["difference"]) == ("inf", "inf")


class Ahead(nn.Module):
    """Neurons whose reset is taken at the next step, and ahead of it; a constant drive."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)
        neuron = Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}, reset="soft", reset_at="ahead")
        self.spike = Cell(neuron, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.spike(1.5 + 0 * self.fc(now)) for now in x]).mean(0)


@pytest.mark.parametrize("time", get_args(Time))
def test_a_reset_ahead_of_its_step(time: Time, tmp_path: Path) -> None:
    net, x = Ahead().eval(), torch.rand(12, BATCH, 6)
    program = deploy.convert(net, (x,), "reference", time=time)
    with deploy.compile(program, tmp_path / "ahead", probe=True).load() as model:
        report = compare(net, model, [(x, torch.zeros(BATCH))])
        fired = model.probe(x)[1]["spike"].mean()
    assert 0 < fired < 1
    assert [(layer.flips, layer.unexplained) for layer in report.layers] == [(0, 0)]


def test_outputs_without_the_scores_of_a_sample_are_refused(tmp_path: Path) -> None:
    net = Lines(lambda s: s.sum(2))  # [T, N]
    with (
        made(net, tmp_path, 3).load() as model,
        pytest.raises(UsageError, match=r"\[4, 3\] with the samples in dimension 1; classes are"),
    ):
        compare(net, model, [(lines(3), torch.zeros(3))])


@pytest.mark.parametrize("layers", [0, 64])
def test_another_network_than_the_artifact_s(layers: int, tmp_path: Path) -> None:
    class Renamed(Lines):
        def __init__(self, read: Any) -> None:
            super().__init__(read)
            self.fire = self.__dict__["_modules"].pop("spike")

        @property
        def spike(self) -> Any:
            return self.fire

    def rate(s: torch.Tensor) -> torch.Tensor:
        return s.mean(0)

    data = [(lines(BATCH), torch.zeros(BATCH))]
    with made(Lines(rate), tmp_path).load() as model:
        wider = Lines(rate, CLASSES + 1)
        renamed = Renamed(rate)
        if layers:
            said = (
                r"another network.*spike: the network has \[4, 4, 6\], the artifact has \[4, 4, 5\]"
            )
            with pytest.raises(UsageError, match=said):
                compare(wider, model, data)
            with pytest.raises(
                UsageError, match="fire: .*no such layer; spike: the network has no such"
            ):
                compare(renamed, model, data)
        wider.fc = nn.Linear(7, CLASSES)
        with pytest.raises((UsageError, deploy.CaptureError), match="mat1 and mat2"):
            compare(wider, model, data, layers=layers)
