"""Networks of the real SpikingJelly, 2.0.0 and 0.0.0.0.14, whichever is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from activation_based import converted, lowered, make, reference
from networks import grid, rand, refused
from torch import nn

from spikeport import deploy
from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError
from spikeport.converters.passes import flatten_time, fold_batch_norm

pytest.importorskip("spikingjelly")
functional = pytest.importorskip("spikingjelly.activation_based.functional")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")

pytestmark = pytest.mark.spikingjelly
T, N = 4, 2


def test_state_that_is_left_from_a_run() -> None:
    net = nn.Sequential(layer.Linear(5, 6, step_mode="m"), make("LIFNode", 0.0, 2.0, True))
    with torch.no_grad():
        net(rand(T, N, 5, seed=9))
    left = net[1].v.clone()
    converted(net, rand(T, N, 5))
    assert torch.equal(net[1].v, left)


def test_a_network_in_training_mode_with_gradients_left() -> None:
    net = nn.Sequential(layer.Linear(5, 6, step_mode="m"), make("LIFNode", 0.0, 2.0, True)).train()
    net(rand(T, N, 5)).sum().backward()
    if refusal := _refusal_or_none(net, rand(T, N, 5)):
        assert refusal == [("copy", "")]
    functional.reset_net(net)
    converted(net, rand(T, N, 5))
    assert net.training


def _refusal_or_none(net: nn.Module, x: torch.Tensor) -> list[tuple[str, str]]:
    try:
        capture(net, (x,))
    except CaptureError as error:
        return [(f.rule, f.where) for f in error.findings]
    return []


@pytest.mark.parametrize("reach", [1, 2, 3])
def test_spikes_of_steps_before_go_in_step_by_step(reach: int) -> None:
    """Layer by layer the steps are slices of one another; one at a time they come from states."""

    class Window(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(6, 5), neuron.LIFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            past, sums = [torch.zeros(x.shape[1], 5)] * reach, []
            for now in x:
                past = [*past, self.lif(self.fc(now))]
                sums.append(past[0] + past[-1])
                past = past[1:]
            return torch.stack(sums)

    torch.manual_seed(0)
    net = Window()
    program = deploy.convert(net, (rand(6, N, 6),), "reference", time="stepped")
    x = rand(9, N, 6, seed=1)
    assert torch.equal(program(x), reference(net, x))


class Twice(nn.Module):
    """One layer of neurons in two places, reset between them or not."""

    def __init__(self, resets: bool) -> None:
        super().__init__()
        self.fc, self.lif, self.resets = nn.Linear(6, 6), neuron.LIFNode(step_mode="m"), resets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.lif(self.fc(x))
        if self.resets:
            self.lif.reset()
        return first + self.lif(self.fc(x))


def test_a_layer_of_neurons_in_two_places() -> None:
    x = torch.zeros(T, N, 6)  # on which nothing fires, so that only the calls tell
    net = Twice(resets=False)
    assert refused(net, x) == [("neuron-called-again", "lif")]
    with pytest.raises(CaptureError, match="calls 2 times"):
        capture(net, (x,))
    converted(Twice(resets=True), grid(T, N, 6))


def test_a_network_that_resets_itself() -> None:
    class Resets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(layer.Linear(5, 5), make("LIFNode", 0.0, 2.0, True))
            functional.set_step_mode(self.body, "m")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            functional.reset_net(self.body)
            y = self.body(x)
            functional.reset_net(self.body)
            return y + self.body(x)

    converted(Resets(), rand(T, N, 5))


@pytest.mark.parametrize("name", ["SeqToANNContainer", "MultiStepContainer"])
def test_containers(name: str) -> None:
    torch.manual_seed(0)
    container = getattr(layer, name)
    inner = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2))
    if name == "MultiStepContainer":
        inner.append(make("LIFNode", None, 2.0, True, step_mode="s"))
    net = nn.Sequential(container(*inner), make("IFNode", 0.0, 2.0, True))
    program = converted(net, rand(T, N, 2, 8, 8))
    assert program.sites[-1].path == "1"


class CSNN(nn.Module):
    """SpikingJelly's tutorial network, in both of its step modes."""

    def __init__(self, step_mode: str) -> None:
        super().__init__()
        self.step_mode = step_mode
        self.conv_fc = nn.Sequential(
            layer.Conv2d(1, 4, 3, padding=1, bias=False),
            layer.BatchNorm2d(4),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2, 2),
            layer.Conv2d(4, 4, 3, padding=1, bias=False),
            layer.BatchNorm2d(4),
            neuron.LIFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2, 2),
            layer.Flatten(),
            layer.Dropout(0.5),
            layer.Linear(4 * 4, 10, bias=False),
            neuron.ParametricLIFNode(surrogate_function=surrogate.ATan()),
        )
        functional.set_step_mode(self.conv_fc, step_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.step_mode == "m":
            return self.conv_fc(x.unsqueeze(0).repeat(T, 1, 1, 1, 1)).mean(0)
        return sum(self.conv_fc(x) for _ in range(T)) / T


def awake(net: CSNN) -> CSNN:
    """With weights that make every layer fire."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 2, 4)
            nn.init.uniform_(module.bias, 0, 1)
    with torch.no_grad():
        net.conv_fc[10].weight.mul_(10)
    return net


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_convolutional_network_the_whole_way(step_mode: str, dtype: str) -> None:
    from spikeport.deploy.pipeline import convert

    torch.manual_seed(0)
    net = awake(CSNN(step_mode))
    x = rand(N, 1, 8, 8).abs() * 4
    program = convert(net, (x,), "lynxi-sim", dtype=dtype)
    assert [s.path for s in program.sites] == ["conv_fc.2", "conv_fc.6", "conv_fc.11"]
    assert [s.T for s in program.sites] == [T] * 3
    assert reference(net, x).abs().sum() > 0


def test_both_step_modes_compute_the_same() -> None:
    torch.manual_seed(0)
    multi = awake(CSNN("m"))
    single = CSNN("s")
    single.load_state_dict(multi.state_dict())
    x = rand(N, 1, 8, 8).abs() * 4
    a, b = (lowered(capture(net, (x,))) for net in (multi, single))
    assert torch.allclose(a(x), b(x))
    assert a(x).sum() > 0


class SEWBlock(nn.Module):
    """Fang et al. 2021, Deep Residual Learning in Spiking Neural Networks."""

    def __init__(self, channels: int, join: str) -> None:
        super().__init__()
        self.join = join
        self.conv = nn.Sequential(
            layer.Conv2d(channels, channels, 3, padding=1),
            layer.BatchNorm2d(channels),
            neuron.IFNode(),
            layer.Conv2d(channels, channels, 3, padding=1),
            layer.GroupNorm(1, channels),
            neuron.ParametricLIFNode(v_reset=None),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return {
            "ADD": lambda: x + y,
            "AND": lambda: x * y,
            "IAND": lambda: x * (1.0 - y),
            "CAT": lambda: torch.cat([x, y], dim=2),
        }[self.join]()


@pytest.mark.parametrize("join", ["ADD", "AND", "IAND", "CAT"])
def test_residual_blocks(join: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        neuron.LIFNode(decay_input=False),
        SEWBlock(4, join),
        layer.AvgPool2d(2),
        layer.ConvTranspose2d(8 if join == "CAT" else 4, 2, 2, stride=2),
        neuron.IFNode(),
    )
    functional.set_step_mode(net, "m")
    program = converted(net, rand(T, N, 2, 6, 6) * 2)
    assert (
        max(len(n.meta["val"].shape) for n in lowered(program).graph.nodes if "val" in n.meta) <= 4
    )
    assert fold_batch_norm(flatten_time(program)).history[-1].done


def test_a_forward_that_asks_for_the_neurons_class() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 5), make("LIFNode", 0.0, 2.0, True)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for each in self.layers:
                x = each(x) * 2 if isinstance(each, neuron.LIFNode) else each(x)
            return x

    converted(Asks(), rand(T, N, 5))


def test_half_precision_networks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(5, 6), neuron.LIFNode(tau=3.0, v_reset=-0.3))
    functional.set_step_mode(net, "m")
    net = net.half()
    x = rand(T, N, 5).half()
    assert torch.equal(capture(net, (x,))(x), reference(net, x))


def test_neurons_that_never_fire() -> None:
    """As StereoSpike's readout, of which the potential is read; what the refusal advises converts."""

    class Readout(nn.Module):
        def __init__(self, threshold: float) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)
            self.integrate = neuron.IFNode(v_threshold=threshold, step_mode="m")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.integrate(self.fc(x))
            return self.integrate.v  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="such as 1e9, for neurons that never fire"):
        capture(Readout(float("inf")), (rand(T, N, 5),))
    net = Readout(1e9)
    for dtype in ("float32", "float16"):
        program = deploy.convert(net, (rand(T, N, 5),), "lynxi-sim", dtype=dtype)
        expected = reference(net, rand(T, N, 5, seed=1))
        torch.testing.assert_close(program(rand(T, N, 5, seed=1)), expected, rtol=0, atol=2e-2)


def test_converters_never_import_spikingjelly() -> None:
    code = (
        "import sys; sys.modules['spikingjelly'] = None\n"
        "import torch\n"
        "from torch import nn\n"
        "from spikeport.converters.neurons import LIFNode\n"
        "from spikeport.converters.capture import capture\n"
        "from spikeport.deploy.pipeline import convert\n"
        "x = torch.rand(4, 2, 5)\n"
        "print(convert(nn.Sequential(nn.Linear(5, 5), LIFNode()), (x,), 'lynxi-sim').T)\n"
        "assert not any(name.startswith('spikingjelly.') for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "4", done.stderr
