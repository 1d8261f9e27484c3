"""Source against device: what differs, where first, and whether rounding explains it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tampered import Tampered
from torch import nn

from spikeport import deploy
from spikeport.converters.errors import UsageError
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.deploy.compare import compare, predictions

T, BATCH, CLASSES = 4, 4, 5


class Net(nn.Module):
    """A convolution, a norm, two kinds of neuron, on a static image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.spike1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), LIFNode()
        self.fc1, self.spike2 = nn.Linear(6 * 36, 32), IFNode()
        self.fc2, self.spike3 = nn.Linear(32, CLASSES), IFNode()
        self.scale = nn.Parameter(torch.ones(CLASSES))
        nn.init.uniform_(self.norm.weight, 1, 3)
        nn.init.uniform_(self.norm.running_var, 0.1, 0.5)
        with torch.no_grad():
            self.fc1.weight.mul_(3)
            self.fc2.weight.mul_(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).unsqueeze(0).repeat(T, 1, 1, 1, 1)
        x = self.spike2(self.fc1(self.spike1(x).flatten(2)))
        return self.spike3(self.fc2(x)).mean(0) * self.scale


def batches(*sizes: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 1, 8, 8, generator=generator) * 2,
            torch.randint(0, CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Net().eval()


def load(net: nn.Module, path: Path, dtype: str, probe: bool = True) -> Any:
    program = deploy.convert(net, (batches(BATCH)[0][0],), target="lynxi-sim", dtype=dtype)
    return deploy.load(deploy.compile(program, path, probe=probe).path, device=0)


@pytest.fixture(scope="module", params=["float32", "float16"])
def model(net: nn.Module, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("artifact") / request.param
    with load(net, path, request.param) as loaded:
        yield loaded


def expected_predictions(net: nn.Module, data: Sequence[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([net(x).argmax(1) for x, _ in data])


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 3), (1,), (10, 3), (2, 4, 1)])
def test_accuracy_and_agreement(net: nn.Module, model: Any, sizes: tuple[int, ...]) -> None:
    data = batches(*sizes)
    labels = torch.cat([y for _, y in data])
    source = expected_predictions(net, data)
    device = torch.cat([model(part).argmax(1) for x, _ in data for part in x.split(BATCH)])
    report = compare(net, model, data)
    assert report.samples == report.probed == sum(sizes)
    assert report.source_accuracy == pytest.approx((source == labels).double().mean().item())
    assert report.device_accuracy == pytest.approx((device == labels).double().mean().item())
    assert report.agreement == pytest.approx((source == device).double().mean().item())
    assert report.disagreeing == tuple((source != device).nonzero().flatten().tolist())
    assert report.target == "lynxi-sim"
    assert report.explained


def test_layers_in_their_order(net: nn.Module, model: Any) -> None:
    report = compare(net, model, batches(4, 2))
    assert [layer.layer for layer in report.layers] == ["spike1", "spike2", "spike3"]
    assert all(len(layer.differing) == T for layer in report.layers)
    assert sum(layer.unexplained for layer in report.layers) == 0
    assert [(x.output, x.unexplained) for x in report.outputs] == [("output", 0)]


@pytest.mark.parametrize("layer", ["spike1", "spike2", "spike3"])
def test_a_device_that_is_one_step_late(net: nn.Module, model: Any, layer: str) -> None:
    """What it gives for the layer is late; what follows from that is as it should be."""
    report = compare(net, Tampered(model, layer, lambda s: s.roll(1, 0)), batches(4, 3))
    assert report.explained is False
    unexplained = {x.layer: x.unexplained for x in report.layers}
    assert next(name for name, count in unexplained.items() if count) == layer
    assert report.divergence is not None
    assert report.divergence.layer == layer
    assert f"NOT explained by rounding: {layer} ({unexplained[layer]} spikes)" in str(report)


@pytest.mark.parametrize(
    ("change", "where", "dtype"),
    [
        (lambda n: setattr(n, "spike1", LIFNode(v_threshold=1.5)), "spike1", "float16"),
        (lambda n: setattr(n, "spike2", IFNode(v_reset=None)), "spike2", "float16"),
        (lambda n: n.fc2.weight.neg_(), "spike3", "float16"),
        (lambda n: n.fc2.bias.add_(1.0), "spike3", "float32"),
        (lambda n: n.scale.mul_(1.5), "output", "float16"),
        (lambda n: n.scale.neg_(), "output", "float32"),
    ],
    ids=["threshold", "reset", "weights", "bias", "scaled outputs", "negated outputs"],
)
def test_a_layer_that_is_another_is_the_only_one_named(
    change: Any, where: str, dtype: str, net: nn.Module, tmp_path: Path
) -> None:
    """Also behind layers of which rounding has flipped spikes in every sample."""
    other = Net().eval()
    with torch.no_grad():
        change(other)
    with load(other, tmp_path / "other", dtype) as model:
        report = compare(net, model, batches(4, 4, 4, 4))
    wrong = [x.layer for x in report.layers if x.unexplained]
    wrong += [x.output for x in report.outputs if x.unexplained]
    assert wrong == [where]
    assert f"NOT explained by rounding: {where} (" in str(report)


def test_a_device_that_permutes_channels(net: nn.Module, model: Any) -> None:
    report = compare(net, Tampered(model, "spike1", lambda s: s.roll(1, 2)), batches(4))
    assert not report.explained
    assert report.divergence is not None
    assert report.divergence.layer == "spike1"


def test_a_device_with_one_wrong_spike(net: nn.Module, model: Any) -> None:
    """One spike far from the threshold, in one sample of the second batch, which is smaller."""

    def flip(spikes: torch.Tensor) -> torch.Tensor:
        if spikes.shape[1] == BATCH:
            return spikes
        changed = spikes.clone()
        changed[2, 1, 7] = 1 - changed[2, 1, 7]
        return changed

    data = batches(4, 3)
    report = compare(net, Tampered(model, "spike2", flip), data)
    at = report.divergence
    assert not report.explained
    assert at is not None
    assert (at.layer, at.t, at.sample, at.index) == ("spike2", 2, 5, (7,))
    with torch.no_grad():
        x = data[1][0]
        repeated = net.norm(net.conv(x)).unsqueeze(0).repeat(T, 1, 1, 1, 1)
        drive = net.fc1(net.spike1(repeated).flatten(2))
        spikes, h, _ = net.spike2.neuron.trace(drive)
    assert at.h == pytest.approx(h[2, 1, 7].item(), abs=1e-5)
    assert at.source_spike == bool(spikes[2, 1, 7])
    assert at.v_threshold == 1.0
    assert abs(at.h - 1.0) > at.bound
    assert {x.layer: (x.flips, x.unexplained) for x in report.layers}["spike2"] == (1, 1)


def test_float32_differs_in_nothing(net: nn.Module, tmp_path: Path) -> None:
    """Dyadic weights and inputs: every sum is exact, whatever the order and the dtype."""
    exact = Net().eval()
    with torch.no_grad():
        for layer in (exact.conv, exact.fc1, exact.fc2):
            for p in layer.parameters():
                p.copy_((p * 8).round() / 8)
        exact.norm.weight.fill_(1.0)
        exact.norm.running_var.fill_(0.75)
        exact.norm.eps = 0.25
    data = [((x * 2).round() / 2, y) for x, y in batches(4, 4)]
    with load(exact, tmp_path / "exact", "float16") as model:
        report = compare(exact, model, data)
    assert report.agreement == 1.0
    assert report.divergence is None
    assert all(d == 0 for layer in report.layers for d in layer.differing)
    assert "no spike differs" in str(report)


def test_flips_of_float16_are_explained(tmp_path: Path) -> None:
    """A threshold in the middle of the drives: some lie within float16's rounding of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(1), nn.Linear(64, 2048), Repeat(), IFNode(), Mean()).eval()
    with load(net, tmp_path / "flips", "float16") as model:
        report = compare(net, model, batches(*[4] * 8))
    differing = sum(sum(layer.differing) for layer in report.layers)
    assert differing > 0
    assert report.explained
    assert report.divergence is not None
    assert abs(report.divergence.h - 1.0) <= report.divergence.bound
    assert "every spike that differs lies at the threshold" in str(report)
    assert f"rounding reaches {report.divergence.bound:.2g}" in str(report)


class Repeat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(0).repeat(T, 1, 1)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(0)


def test_without_probes(net: nn.Module, tmp_path: Path) -> None:
    with load(net, tmp_path / "bare", "float16", probe=False) as model:
        report = compare(net, model, batches(4, 1))
    assert report.layers == ()
    assert report.probed == 0
    assert report.explained is None
    assert 0 <= report.difference < 1
    assert "has no probes" in report.note
    assert report.note in str(report)


def test_layers_of_the_first_samples_only(net: nn.Module, model: Any) -> None:
    report = compare(net, model, batches(4, 4, 4), layers=5)
    assert (report.samples, report.probed) == (12, 8)
    assert compare(net, model, batches(4), layers=0).layers == ()
    with pytest.raises(UsageError, match="layers is -1; allowed"):
        compare(net, model, batches(4), layers=-1)


def test_the_report_as_data(net: nn.Module, model: Any) -> None:
    wrong = Tampered(model, "spike2", lambda s: s.roll(1, 0))
    data = json.loads(json.dumps(compare(net, wrong, batches(4)).to_dict()))
    assert data["samples"] == 4
    assert data["explained"] is False
    assert data["divergence"]["layer"] == "spike2"
    assert len(data["layers"]) == 3


def test_an_empty_loader(net: nn.Module, model: Any) -> None:
    with pytest.raises(UsageError, match="loader gives no batch"):
        compare(net, model, [])


def test_labels_of_another_number(net: nn.Module, model: Any) -> None:
    x, y = batches(4)[0]
    with pytest.raises(UsageError, match="4 inputs and 3 labels"):
        compare(net, model, [(x, y[:3])])


def test_the_network_is_left_as_it_was(model: Any) -> None:
    net = Net().train()
    net.norm.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    compare(net, model, batches(4))
    assert net.training
    assert net.conv.training
    assert not net.norm.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_training_mode_is_not_used(net: nn.Module, model: Any) -> None:
    trained = Net().train()
    assert compare(trained, model, batches(4)).source_accuracy == pytest.approx(
        compare(net, model, batches(4)).source_accuracy
    )


def test_predictions() -> None:
    scores = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert predictions(scores).tolist() == [1, 0]
    assert predictions((scores, scores.flip(1))).tolist() == [1, 0]
    assert predictions({"a": [scores]}).tolist() == [1, 0]
    assert predictions(torch.stack([scores, scores.flip(1) * 3])).tolist() == [0, 1]
    last = torch.stack([scores, scores.flip(1) * 3, scores * 0], 2)
    assert predictions(last, 0, steps=3).tolist() == [0, 1]
    assert predictions(last[..., :2], 0, steps=2).tolist() == [1, 1]  # [N, T, C] if both fit
    assert predictions(last[..., :2], 0, time_dim=2).tolist() == [0, 1]
    with pytest.raises(UsageError, match=r"shape \[2\]"):
        predictions(torch.zeros(2))
    with pytest.raises(UsageError, match="no tensor"):
        predictions(())


# What the loader gives


FORMS: dict[str, Any] = {
    "column": lambda x, y: (x, y.unsqueeze(1)),
    "one-hot": lambda x, y: (x, torch.nn.functional.one_hot(y, CLASSES)),
    "bool": lambda x, y: [x, torch.nn.functional.one_hot(y, CLASSES).bool()],
    "arrays": lambda x, y: (
        x.numpy(),
        torch.nn.functional.one_hot(y, CLASSES).float().numpy(),
    ),
    "list": lambda x, y: (x, y.tolist()),
    "tuple": lambda x, y: ((x,), y.float()),
    "float64": lambda x, y: (x.double(), y.numpy()),
}


def test_other_forms_of_inputs_and_labels(net: nn.Module, model: Any) -> None:
    data = batches(CLASSES, 3)  # as many samples as classes
    expected = compare(net, model, data, layers=CLASSES).to_dict()
    for form, change in FORMS.items():
        found = compare(net, model, [change(*batch) for batch in data], layers=CLASSES).to_dict()
        for name in ("samples", "source_accuracy", "device_accuracy", "agreement", "layers"):
            assert found[name] == expected[name], form


def test_inputs_of_half_precision_are_taken_as_the_model_takes_them(
    net: nn.Module, model: Any
) -> None:
    data = [(x.half(), y) for x, y in batches(4)]
    report = compare(net, model, data)
    assert report.explained
    assert (
        report.source_accuracy
        == compare(net, model, [(x.float(), y) for x, y in data]).source_accuracy
    )


X, Y = batches(4)[0]


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (None, "the loader is None"),
        ([X], r"gives a Tensor torch.float32\[4, 1, 8, 8\]; allowed: pairs \(x, y\)"),
        ([(X, Y, Y)], "gives a tuple of 3"),
        ([{"x": X, "y": Y}], "gives a dict"),
        ([(X, None)], "labels of a batch are a NoneType"),
        ([(X, ["a"] * 4)], "labels of a batch are a list"),
        ([(X, torch.rand(4, CLASSES))], r"labels of a batch are a Tensor torch.float32\[4, 5\]"),
        ([(X, Y + 0.5)], "labels of a batch are a Tensor"),
        ([(X, Y.reshape(2, 2))], r"labels of a batch are a Tensor torch.int64\[2, 2\]"),
        ([({"x": X}, Y)], "an input of the loader is a dict"),
        (
            [(X.numpy().astype(object), Y)],
            r"an input of the loader is a ndarray object\[4, 1, 8, 8\]",
        ),
        ([((X, X), Y)], "2 inputs given, 1 wanted"),
        ([(X[0, 0, 0, 0], Y)], r"input x is float32\[\]"),
    ],
)
def test_what_no_loader_should_give(net: nn.Module, model: Any, loader: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        compare(net, model, loader)
