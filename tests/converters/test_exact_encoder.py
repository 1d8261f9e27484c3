"""Encoders in float16: the spikes of float32, or the neurons as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SideBySide
from torch import nn

from spikeport import deploy
from spikeport.converters import neurons
from spikeport.converters.capture import capture
from spikeport.converters.neurons import IFNode, LIFNode, Neuron, Node, Readout
from spikeport.converters.passes.exact_encoder import levels
from spikeport.converters.program import Program, TensorSpec
from spikeport.deploy.pipeline import rewrite_for

N = 3
#: Bytes as float32, which float16 rounds.
IMAGES = torch.randint(0, 256, (N, 2, 12, 12), generator=torch.Generator().manual_seed(0)) / 255
CHANNELS = torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(4, 1, 1)


class Encoder(nn.Module):
    """A layer, and neurons that see what it gives at each of T steps; then more work than that."""

    def __init__(
        self, node: nn.Module, T: int = 4, layer: nn.Module | None = None, width: int = 400
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer or nn.Conv2d(2, 4, 3, padding=1)
        self.node, self.T = node, T
        self.work = nn.LazyLinear(width)
        features = {nn.Conv2d: nn.BatchNorm2d, nn.Conv1d: nn.BatchNorm1d, nn.Linear: nn.BatchNorm1d}
        size = self.layer.weight.shape[0]
        self.norm = features[type(self.layer)](size)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(1.5, 3, size) * (-1) ** torch.arange(size))
            self.norm.running_var.fill_(0.3)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        y = self.drive(x)
        spikes = self.node(y.unsqueeze(0).repeat(self.T, *[1] * y.dim()))
        return spikes, self.work(spikes.flatten(2))

    def drive(self, x: torch.Tensor) -> torch.Tensor:
        drive: torch.Tensor = self.norm(self.layer(x))
        return drive


def converted(net: nn.Module, *inputs: torch.Tensor, **options: Any) -> Program:
    net(*inputs)  # the width of its last layer
    return deploy.convert(net.eval(), inputs, "lynxi-sim", **options)


def report(program: Program) -> Any:
    return next(h for h in program.history if h.name == "exact_encoder")


def of(kind: Any, params: dict[str, Any] | None = None, **population: Any) -> nn.Module:
    return Node.of(Neuron(kind, params or {}, **population))


POPULATIONS = {
    "IF": IFNode(),
    "IF above": of(neurons.IF, fires=">"),
    "IF with thresholds": of(neurons.IF, v_threshold=CHANNELS),
    "LIF": LIFNode(v_threshold=0.5),
    "LIF of the whole input": of(
        neurons.LIF, {"tau": 1 + CHANNELS, "v_rest": 0.0, "decay_input": False}
    ),
    "Leaky": of(neurons.Leaky, {"beta": 0.9}, fires=">"),
    "to another potential": of(neurons.IF, v_reset=-0.25, v_0=-0.25),
}


def check(net: Encoder, x: torch.Tensor, artifact: Path | None = None) -> Program:
    """The encoder is one, and its spikes are the network's own; those of an artifact too."""
    program, expected = converted(net, x), net(x)[0]
    assert report(program).done == (f"layer and node: {net.T} comparisons of its drive",)
    assert 0.02 < expected.mean() < 0.98
    assert torch.equal(program(x)[0], expected)
    if artifact is not None:
        deploy.compile(program, artifact, cache=False)
        with deploy.load(artifact) as model:
            assert torch.equal(model(x)[0], expected)
            assert torch.equal(model(x[:1])[0], expected[:, :1])  # filled up to the batch
    return program


@pytest.mark.parametrize("T", [1, 4, 6, 16])
def test_spikes_are_those_of_float32(T: int) -> None:
    net = SideBySide({name: Encoder(node, T) for name, node in POPULATIONS.items()})
    images = [IMAGES] * len(POPULATIONS)
    program, expected = converted(net, *images), net(*images)
    found = program(*images)
    assert {*report(program).done} == {
        f"nets.{name}.layer and nets.{name}.node: {T} comparisons of its drive"
        for name in POPULATIONS
    }
    for name in POPULATIONS:
        assert 0.02 < expected[name][0].mean() < 0.98, name
        assert torch.equal(found[name][0], expected[name][0]), name


@pytest.mark.parametrize("fires", [">=", ">"])
def test_thresholds_that_are_hit_exactly(fires: str) -> None:
    layer, rng = nn.Linear(8, 16), torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-4, 5, (16, 8), generator=rng) / 4)
        layer.bias.copy_(torch.randint(-4, 5, (16,), generator=rng) / 4)
    net = Encoder(of(neurons.IF, fires=fires), 4, layer)
    with torch.no_grad():
        net.norm.weight.fill_(1.0)
        net.norm.running_var.fill_(0.75)
        net.norm.eps = 0.25
    x = torch.randint(-8, 9, (200, 8), generator=rng) / 4
    assert sum(int((net.drive(x) == 1 / k).sum()) for k in (1, 2, 4)) > 20
    check(net, x)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(32, 8), IMAGES.reshape(-1, 32)[:20]),
        (nn.Linear(32, 8, bias=False), IMAGES.reshape(-1, 32)[:20]),
        (nn.Conv1d(2, 4, 5, stride=2, padding=1, dilation=2), IMAGES.reshape(N, 2, 144)),
        (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0), bias=False), IMAGES),
    ],
)
def test_layers(layer: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    check(Encoder(IFNode(), 4, layer), x, tmp_path / "artifact")


def test_weights_that_float16_has_are_one_part() -> None:
    net = Encoder(IFNode())
    with torch.no_grad():
        net.layer.weight.copy_(net.layer.weight.half())
    channels = {}
    for one in (net, Encoder(IFNode())):
        program = check(one, IMAGES)
        conv = next(n for n in program.nodes("call_function") if "conv2d" in str(n.target))
        taken: Any = conv.args[0]
        channels[one] = taken.meta["val"].shape[1]
    assert [*channels.values()] == [2 * 2, 3 * 2]


def test_a_channel_that_computes_nothing() -> None:
    net = Encoder(IFNode(), T=1)
    with torch.no_grad():
        net.layer.weight[:2], net.layer.bias[:2] = 0.0, 0.0
        net.norm.bias[:2] = torch.tensor([1.0, 0.0])
    program = check(net, IMAGES)
    assert program(IMAGES)[0][:, :, :2].mean((0, 1, 3, 4)).tolist() == [1.0, 0.0]


def test_a_background_of_zeros_beside_a_norm_that_cancels() -> None:
    """The drive is the norm's shift there, which the network adds up from larger terms."""
    net = Encoder(IFNode(), layer=nn.Conv2d(2, 32, 3, padding=1))
    with torch.no_grad():
        net.norm.running_mean.copy_(torch.linspace(-3, 3, 32))
        net.norm.bias.copy_(torch.linspace(-16, 16, 32) * net.norm.weight.sign())
    x = torch.zeros(N, 2, 12, 12)
    x[:, :, 4:6] = IMAGES[:, :, 4:6]
    program = converted(net, x)
    assert report(program).done
    assert (program(x)[0] != net(x)[0]).float().mean() < 1e-4


def test_a_drive_of_something_computed() -> None:
    """Whose rounding is not taken back, so that some spikes may differ."""

    class Centered(Encoder):
        def drive(self, x: torch.Tensor) -> torch.Tensor:
            return super().drive((x - 0.2860) / 0.3530)

    net = Centered(IFNode())
    program = converted(net, IMAGES)
    assert report(program).done
    assert program.inputs[0].parts == 1
    assert (program(IMAGES)[0] != net(IMAGES)[0]).float().mean() < 0.002


def test_an_input_that_others_take_too() -> None:
    class Both(Encoder):
        def forward(self, x: torch.Tensor) -> Any:
            return *super().forward(x), x.mean((2, 3))

    net = Both(IFNode())
    check(net, IMAGES)
    mean = converted(net, IMAGES)(IMAGES)[2]
    torch.testing.assert_close(mean, IMAGES.mean((2, 3)), rtol=1e-3, atol=1e-3)


def test_a_compiler_that_takes_onnx(tmp_path: Path) -> None:
    net = Encoder(IFNode())
    program = converted(net, IMAGES)
    deploy.compile(program, tmp_path / "artifact", model_type="ONNX", cache=False)
    with deploy.load(tmp_path / "artifact") as model:
        assert torch.equal(model(IMAGES)[0], net(IMAGES)[0])


class Shared(Encoder):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.drive(x)
        return self.work(self.node(y.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)).flatten(2)), y


class Scaled(Encoder):
    def drive(self, x: torch.Tensor) -> torch.Tensor:
        return super().drive(x) * 3


EACH = torch.linspace(0.5, 1, 144).reshape(1, 12, 12)
STAYS: dict[str, tuple[nn.Module, str]] = {
    "soft": (Encoder(of(neurons.IF, reset="soft")), "its reset is not hard"),
    "v_0": (Encoder(of(neurons.IF, v_0=0.5)), "do not repeat at multiples of the first"),
    "work": (Encoder(IFNode(), width=10), "would add"),
    "groups": (Encoder(IFNode(), layer=nn.Conv2d(2, 4, 3, groups=2)), "layer has groups"),
    "used": (Shared(IFNode()), "not that of a layer of weights for it alone"),
    "factor": (Scaled(IFNode()), "not that of a layer of weights for it alone"),
    "each": (Encoder(of(neurons.IF, v_threshold=EACH)), "not one for each channel"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_as_it_is(name: str) -> None:
    net, reason = STAYS[name]
    net(IMAGES)  # the width of its last layer
    program = rewrite_for(capture(net, (IMAGES,)), "lynxi-sim", torch.float16)
    assert not report(program).done
    assert reason in report(program).skipped[0]
    assert program.inputs[0].parts == 1


def test_neurons_that_never_fire() -> None:
    neuron = Neuron(neurons.Lapicque, {"R": 1e-30, "C": 1.0, "dt": 1.0})
    assert levels(neuron, 4, (1,)) == "it fires, or does not, whatever its drive"


def test_one_step_at_a_time_has_no_encoder() -> None:
    program = converted(Encoder(IFNode()), IMAGES, time="stepped")
    assert "exact_encoder" not in {h.name for h in program.history}


def test_readouts_are_no_encoders() -> None:
    net = Encoder(Readout(neurons.LIF, tau=2.0, v_rest=0.0))
    assert not report(converted(net, IMAGES)).done


def test_a_value_in_two_parts() -> None:
    spec = TensorSpec("x", (2, 3), torch.float32, parts=2)
    x = torch.tensor([[1 / 3, 1e5, float("inf")], [-1 / 255, 0.0, 1e-3]])
    assert spec.graph_shape == (2, 6)
    high, low = spec.held(x).chunk(2, 1)
    assert torch.equal(high, x.half().float())
    assert torch.equal(low, low.half().float())
    finite = high.isfinite()
    torch.testing.assert_close((high + low)[finite], x[finite], rtol=2.0**-22, atol=2.0**-25)
    assert not low[~finite].any()
