"""Networks as NIR graphs: layers, delays, constants, time, and what a graph cannot say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import pytest
import torch
from networks import Net
from nir_files import GENERATOR, GRID, N, T, compiled, exact, file
from torch import nn

from spikeport import deploy
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.converters.sources.nir import NirNetwork


class Events(nn.Module):
    """Convolutions, batch norm, both poolings, sums, gates, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.group = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=2, bias=False)
        self.a, self.b, self.c = IFNode(v_threshold=0.5), LIFNode(v_threshold=0.25), LIFNode()
        self.fc, self.out = nn.Linear(64, 5), IFNode(v_reset=None, v_threshold=0.5)
        self.register_buffer("four", torch.tensor(4.0))

    def forward(self, x: torch.Tensor) -> Any:
        def over(layer: Any, seq: torch.Tensor) -> torch.Tensor:
            return layer(seq.flatten(0, 1)).unflatten(0, seq.shape[:2])

        a = self.a(over(lambda y: self.norm(self.conv(y)), x))
        b = self.b(over(self.group, a) * 1.5 - a / self.four)
        gate = a * b
        pooled = over(lambda y: nn.functional.max_pool2d(y, 2), gate)
        mean = over(lambda y: nn.functional.avg_pool2d(y, 2), a + b + a)
        c = self.c(pooled + mean)
        out = self.out(self.fc(c.flatten(2)))
        return {"rate": out.mean(0), "out": out, "last": out[-1], "sum": c.sum(0)}


EVENTS = torch.rand(4, 3, 2, 8, 8, generator=GENERATOR).round()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_of_all_that_nir_can_say(batch: int, tmp_path: Path) -> None:
    net, x = Events().eval(), EVENTS[:, :batch]
    path = compiled(net, (x,), tmp_path)
    graph = nir.read(file(path), type_check=False)  # nir knows square kernels alone
    kinds = {type(node).__name__ for node in graph.nodes.values()}
    assert {"SumPool2d", "AvgPool2d", "Threshold", "Scale", "Flatten", "Affine"} <= kinds
    with torch.no_grad():
        expected = net(x)
    with deploy.load(path) as model:
        found = model(x)
        report = deploy.Artifact.open(path).verify()
    assert expected["rate"].any()
    assert all(torch.equal(found[name], y) for name, y in expected.items())
    assert report.ok
    assert report.equal


def test_convolutions_in_groups_are_read_with_nirs_own_checks(tmp_path: Path) -> None:
    """A norm of spikes, and what a residual makes of them, are convolutions of one channel each."""
    torch.manual_seed(0)
    net = nn.Sequential(
        Flat(nn.Conv2d(2, 4, 3, padding=1, groups=2)),
        IFNode(v_threshold=0.25),
        Flat(nn.BatchNorm2d(4)),
        Flat(nn.Conv2d(4, 8, 1, groups=4)),
        IFNode(v_threshold=0.5),
    ).eval()
    path = compiled(net, (EVENTS,), tmp_path)
    graph = nir.read(file(path))
    assert {node.groups for node in graph.nodes.values() if isinstance(node, nir.Conv2d)} == {1}
    again = NirNetwork(graph)
    assert {m.groups for m in again.modules() if isinstance(m, nn.Conv2d)} == {2, 4}
    with torch.no_grad():
        assert torch.equal(again(EVENTS), net(EVENTS))


class Late(nn.Module):
    """Neurons that hear others some steps later."""

    def __init__(self, delay: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.a, self.b = nn.Linear(6, 8), IFNode(v_threshold=0.5), IFNode()
        self.delay = delay

    def forward(self, x: torch.Tensor) -> Any:
        late = self.delay(self.a(self.fc(x)))
        return self.b(late) if isinstance(late, torch.Tensor) else late


SILENT = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("delay", "steps"),
    [
        (lambda z: torch.cat([SILENT, z[:-2]]), 2),
        (lambda z: torch.stack([SILENT[0], *z[:-1]]), 1),
        (lambda z: torch.cat([SILENT[0], SILENT[1], *z[:-2]]).unflatten(0, (5, 3)), 2),
    ],
)
def test_a_delay_between_layers(delay: Any, steps: int, tmp_path: Path) -> None:
    net, x = Late(delay), torch.rand(5, 3, 6, generator=GENERATOR)
    path = compiled(net, (x,), tmp_path, dt=0.25)
    (found,) = (n for n in nir.read(file(path)).nodes.values() if isinstance(n, nir.Delay))
    assert (found.delay == steps * 0.25).all()
    again = compiled(NirNetwork(file(path)), (x,), tmp_path / "again", dt=0.25)
    with torch.no_grad(), deploy.load(again) as model:
        assert net(x).any()
        assert torch.equal(model(x), net(x))


@pytest.mark.parametrize(
    ("delay", "found"),
    [
        (lambda z: torch.cat([SILENT + 1, z[:-2]]), "a constant where a signal"),
        (lambda z: torch.cat([SILENT[:1], z[:-2], SILENT[:1]]), "a constant where a signal"),
        (lambda z: torch.cat([SILENT, z[:-2] * 2]), "time steps 0 to 2 alone"),
        (lambda z: (z, z[:-2]), "time steps 0 to 2 alone"),
    ],
)
def test_what_only_looks_like_a_delay(delay: Any, found: str) -> None:
    findings = deploy.check(Late(delay), (torch.rand(5, 3, 6),), targets=["nir"])
    assert any(found in f.found for f in findings)


class Flat(nn.Module):
    """A layer over time and batch together."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.layer(x.flatten(0, 1))
        return flat.unflatten(0, x.shape[:2])


def norm(layer: nn.Module) -> nn.Module:
    """With statistics on a grid, so that any way to compute it is exact."""
    with torch.no_grad():
        for tensor, span in ((layer.weight, 4), (layer.bias, 4), (layer.running_mean, 8)):
            tensor.copy_(torch.randint(1, 1 + span, tensor.shape, generator=GENERATOR) / 4)
        layer.running_var.fill_(0.125)
    layer.eps = 0.125
    return layer.eval()


@pytest.mark.parametrize(
    ("size", "layers"),
    [
        ((5,), {"norm": nn.BatchNorm1d(5), "after": nn.Linear(13, 4)}),
        ((2, 6), {"norm": nn.BatchNorm1d(2), "after": nn.Conv1d(7, 4, 3)}),
        ((2, 4, 4), {"norm": nn.BatchNorm2d(2), "after": nn.Conv2d(7, 4, 3)}),
    ],
)
def test_concatenated_channels_norms_and_constants(
    size: tuple[int, ...], layers: dict[str, nn.Module], tmp_path: Path
) -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        flat = s.norm(x.flatten(0, 1))
        spikes = s.lif((flat * 2 + s.bias).unflatten(0, x.shape[:2])).flatten(0, 1)
        parts = torch.cat(
            [spikes, (1 - spikes) * s.other(x).flatten(0, 1), s.narrow(flat - 0.5)], 1
        )
        fired: torch.Tensor = s.out(s.after(parts).unflatten(0, x.shape[:2]))
        return fired

    C, features = size[0], len(size) - 1
    kinds = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}
    narrow = kinds[features](C, 3, *[1] * (features > 0))
    net = Net(
        run, lif=LIFNode(), other=IFNode(), out=IFNode(v_threshold=0.25), narrow=narrow, **layers
    )
    norm(layers["norm"])
    net.bias = nn.Parameter(torch.arange(C).reshape(C, *[1] * features) / 8)
    for layer in (narrow, layers["after"]):
        for p in layer.parameters():
            with torch.no_grad():
                p.copy_(torch.randint(-4, 5, p.shape, generator=GENERATOR) / 8)
    x = torch.randint(-8, 9, (T, N, *size), generator=GENERATOR) / 8
    with deploy.load(compiled(net, (x,), tmp_path)) as model:
        expected = net(x)
        assert 0.05 < expected.mean() < 0.95
        assert torch.equal(model(x), expected)


def test_constants_that_no_bias_adds() -> None:
    def run(s: Any, x: torch.Tensor) -> Any:
        maps = s.lif(x)
        return s.a(maps + s.each), s.b(torch.cat([maps, maps], 3))

    net = Net(run, lif=LIFNode(), a=LIFNode(), b=LIFNode())
    net.each = nn.Parameter(torch.rand(2, 4, 4))
    found = deploy.check(net, (torch.rand(T, N, 2, 4, 4),), ["nir"])
    assert "a constant that differs within a channel of [2, 4, 4]" in str(found)
    assert "concatenate channels" in str(found)


def test_an_image_is_the_same_at_every_step(tmp_path: Path) -> None:
    layers = {"fc": nn.Linear(5, 4), "spike": LIFNode(v_threshold=0.1)}

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.spike(s.fc(x).unsqueeze(0).repeat(4, 1, 1)).mean(0)

    net, image = Net(run, **layers), torch.rand(N, 5, generator=GENERATOR)
    path = compiled(net, (image,), tmp_path)
    (port,) = nir.read(file(path)).inputs.values()
    assert port.metadata["over_time"] == "same"
    assert torch.equal(deploy.load(path)(image), net(image))


def test_the_file_alone_is_the_network(tmp_path: Path) -> None:
    net = nn.Sequential(exact(), LIFNode(tau=2.0, v_threshold=0.5), exact(), IFNode())
    artifact = compiled(net, (GRID,), tmp_path, dt=1e-3)
    again = deploy.convert(str(file(artifact)), (GRID,), target="reference")
    assert torch.equal(again(GRID), net(GRID))
    metadata = nir.read(file(artifact)).metadata
    assert (float(metadata["dt"]), int(metadata["T"])) == (1e-3, T)


def test_all_that_nir_cannot_say_is_found_at_once() -> None:
    def run(s: Any, x: torch.Tensor, image: torch.Tensor) -> Any:
        a = s.a(x)
        return (
            a.mean(0) * 2,
            torch.cat([a, a], 1),
            s.b(a.unflatten(2, (1, 5)).transpose(2, 3)),
            s.pool(image.flatten(0, 1)),
            a / 3,
            x * a,
            a[2],
            torch.relu(x),
        )

    net = Net(run, a=IFNode(), b=IFNode(), pool=nn.MaxPool2d(1))
    found = deploy.check(net, (GRID, torch.rand(T, N, 2, 4, 4)), ["nir"])
    assert {f.target for f in found} == {"nir"}
    text = str(found)
    for part in (
        "after the mean over time, NIR has no step to compute it at",
        "aten.cat",
        "max pooling of values other than spikes of 0 and 1",
        "a division by 3",
        "a product of two signals that are not both spikes",
        "time step 2 alone",
        "aten.relu",
    ):
        assert part in text, text


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 2, 6, 6)])
def test_samples_before_time_steps(shape: tuple[int, ...], tmp_path: Path) -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        y = s.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        spikes: torch.Tensor = s.lif(y * 4).transpose(0, 1)
        return spikes

    torch.manual_seed(0)
    layer = nn.Linear(5, 6) if len(shape) == 3 else nn.Conv2d(2, 3, 3)
    net = Net(run, layer=layer, lif=LIFNode())
    with deploy.load(compiled(net, (torch.rand(shape),), tmp_path)) as model:
        x = torch.rand(shape, generator=GENERATOR)
        expected = net(x)
        assert 0.05 < expected.mean() < 0.95
        assert torch.equal(model(x), expected)
    # Where there are as many of one as of the other, nothing tells them apart.
    (found,) = deploy.check(net, (torch.rand(4, 4, *shape[2:]),), ["nir"]).errors
    assert "aten.reshape" in found.found


def test_inputs_and_outputs_that_have_nothing_to_do_with_each_other() -> None:
    def run(s: Any, x: torch.Tensor, unused: torch.Tensor) -> Any:
        return s.spike(x), s.constant

    net = Net(run, spike=IFNode())
    net.constant = nn.Parameter(torch.ones(3))
    found = deploy.check(net, (GRID, GRID), ["nir"]).errors
    assert ["nothing is computed from" in f.found for f in found] == [True, False]
    assert "is a constant" in found[1].found
