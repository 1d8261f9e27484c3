"""Which dimension is the batch: what a smaller batch comes back as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Net, rand
from torch import nn

from spikeport import deploy
from spikeport.converters.errors import UsageError
from spikeport.converters.neurons import LIFNode
from spikeport.deploy.manifest import write_manifest

T = 4


def model(net: Net, folder: Path, *shapes: tuple[int, ...]) -> Any:
    program = deploy.convert(net.eval(), tuple(rand(*s) for s in shapes), "reference")
    deploy.compile(program, folder / "a", cache=False)
    return deploy.load(folder / "a")


def halved(x: torch.Tensor) -> torch.Tensor:
    """[T, N, F] -> [T / 2, N, F]."""
    return F.avg_pool1d(x.permute(1, 2, 0), 2).permute(2, 0, 1)


@pytest.mark.parametrize("N", [2, 3, 5])
def test_time_steps_that_are_as_many_as_samples_are_told_from_them(N: int, tmp_path: Path) -> None:
    """T / 2 steps come out, and as many samples where N is 2; N scores where N is 5."""
    net = Net(
        lambda s, x: (halved(s.lif(s.fc(x) * 4)), s.lif2(s.fc(x) * 4).mean(0)), fc=nn.Linear(32, 5)
    )
    net.lif, net.lif2 = LIFNode(), LIFNode()
    with model(net, tmp_path, (T, N, 32)) as loaded, torch.no_grad():
        x = rand(T, N, 32, seed=1)
        for n in range(1, N + 1):
            for found, expected in zip(loaded(x[:, :n]), net(x[:, :n]), strict=True):
                assert torch.equal(found, expected)


def test_outputs_that_do_not_tell_are_not_cut(tmp_path: Path) -> None:
    net = Net(lambda s, x: s.lif(x.abs() * 0)[:2], lif=LIFNode())
    with (
        model(net, tmp_path, (T, 2, 6)) as loaded,
        pytest.raises(UsageError, match="cannot be padded"),
    ):
        loaded(rand(T, 1, 6))


def test_time_steps_are_not_padded_as_if_they_were_samples(tmp_path: Path) -> None:
    """A loop without a declared neuron, whose batch nothing tells."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        v, spikes = torch.zeros(x.shape[1:]), []
        for now in x:
            v = v * 0.75 + now
            spikes.append((v > 1).float())
            v = v - spikes[-1]
        return torch.stack(spikes).mean(0)

    net = Net(run)
    with model(net, tmp_path, (T, 2, 6)) as loaded:
        x = rand(T, 2, 6, seed=1)
        assert torch.equal(loaded(x), net(x))
        with pytest.raises(UsageError, match=r"input inputs_0 is float32\[3, 2, 6\]"):
            loaded(x[:3])


def test_samples_of_a_network_without_neurons(tmp_path: Path) -> None:
    net = Net(lambda s, x: s.fc(x).relu(), fc=nn.Linear(6, 5))
    with model(net, tmp_path, (4, 6)) as loaded, torch.no_grad():
        x = rand(4, 6, seed=1)
        assert torch.allclose(loaded(x[:3]), net(x[:3]))


def test_an_input_whose_batch_comes_first_is_taken_as_it_was_given(tmp_path: Path) -> None:
    conv = nn.Conv3d(3, 4, (1, 3, 3))
    net = Net(lambda s, x: s.lif(s.conv(x).permute(2, 0, 1, 3, 4)), conv=conv, lif=LIFNode())
    x = rand(2, 3, T, 7, 5)
    deploy.compile(deploy.convert(net, (x,), "reference"), tmp_path / "a", cache=False)
    with deploy.load(tmp_path / "a") as model, torch.no_grad():
        assert torch.equal(model(x), net(x))


@pytest.mark.parametrize("shape", [(T, T, 8), (T, T, 2, 2, 2)])
@pytest.mark.parametrize("first", ["time", "batch"])
def test_as_many_steps_as_samples(first: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Which of them an input has first shows where samples come in another order."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1) if first == "batch" else x
        y: torch.Tensor = s.fc(s.lif(s.fc1(x.flatten(2)) * 4)).mean(0)
        return y

    net = Net(run, fc1=nn.Linear(8, 12), lif=LIFNode(), fc=nn.Linear(12, 5))
    with model(net, tmp_path, shape) as loaded, torch.no_grad():
        x = rand(*shape, seed=1)
        fewer = x[:, :3] if first == "time" else x[:3]
        assert torch.equal(loaded(fewer), net(fewer))
        with pytest.raises(UsageError, match="allowed: "):
            loaded(x[:3] if first == "time" else x[:, :3])


#: Networks [T, N, F] -> [T, N, F] whose samples depend on each other, by what couples them.
COUPLED: dict[str, Any] = {
    "order": lambda s, x: s.lif(x.flip(1)),
    "shift": lambda s, x: s.lif(x.roll(1, 1)),
    "mean": lambda s, x: s.lif(x - x.mean(1, keepdim=True)),
    "softmax": lambda s, x: s.lif(3 * x.softmax(1)),
    "norm": lambda s, x: s.lif(s.norm(x.flatten(0, 1)).unflatten(0, (T, -1))),
    "spikes": lambda s, x: s.lif2((y := s.lif(x)) - y.mean(1, keepdim=True)),
}


def coupled_net(run: Any) -> Net:
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    return Net(run, lif=LIFNode(), lif2=LIFNode(), norm=norm)


def eighths(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 25, shape, generator=torch.Generator().manual_seed(0)) / 8


def converted(net: Net, x: torch.Tensor, folder: Path, time: Any = "unrolled") -> Any:
    program = deploy.convert(net.eval(), (x,), "reference", time=time)
    return deploy.compile(program, folder / "a", cache=False)


@pytest.mark.parametrize(
    ("by", "time"),
    # The norm's statistics are those of all steps.
    [
        (by, time)
        for by in COUPLED
        for time in ("unrolled", "stepped")
        if (by, time) != ("norm", "stepped")
    ],
)
def test_samples_that_are_computed_together_are_not_padded(
    by: str, time: str, tmp_path: Path
) -> None:
    x = eighths(T, 3, 6)
    net = coupled_net(COUPLED[by])
    with converted(net, x, tmp_path, time).load() as loaded:
        assert torch.equal(loaded(x), net(x))
        refused = r"batch 2: the network computes samples together.*allowed: a batch of 3"
        with pytest.raises(UsageError, match=refused):
            loaded(x[:, :2])
        if time == "stepped":
            with pytest.raises(UsageError, match="computes samples together"):
                loaded.step(x[0, :2])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(T, 3, 6),
        torch.ones(T, 3, 6) / 8,
        torch.zeros(T, 3, 6, dtype=torch.uint8),
        torch.zeros(T, 3, 6, dtype=torch.bool),
    ],
    ids=["zeros", "constant", "integers", "booleans"],
)
def test_an_example_on_which_nothing_shows_is_no_proof(x: torch.Tensor, tmp_path: Path) -> None:
    net = coupled_net(lambda s, x: s.lif2(s.lif(3.0 * x).mean(1, keepdim=True) * 3 + x))
    assert converted(net, x, tmp_path).manifest["coupled"]
    apart = coupled_net(lambda s, x: s.lif2(s.lif(3.0 * x) * 3 + x))
    assert not converted(apart, x, tmp_path / "apart").manifest["coupled"]


def test_a_batch_of_one_has_nothing_to_pad(tmp_path: Path) -> None:
    x = eighths(T, 1, 6)
    net = coupled_net(COUPLED["softmax"])
    made = converted(net, x, tmp_path)
    assert not made.manifest["coupled"]
    assert torch.equal(made.load()(x), net(x))


def test_an_artifact_that_does_not_say_is_padded_as_before(tmp_path: Path) -> None:
    made = converted(coupled_net(COUPLED["mean"]), eighths(T, 3, 6), tmp_path)
    write_manifest(made.path, {k: v for k, v in made.manifest.items() if k != "coupled"})
    assert deploy.load(made.path)(eighths(T, 2, 6)).shape == (T, 2, 6)
