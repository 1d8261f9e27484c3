"""The example's network and SpikingJelly's are one: same keys, same outputs to the last bit."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from spikeport.deploy import data

pytest.importorskip("spikingjelly.activation_based")
from spikingjelly.activation_based import functional, layer, neuron, surrogate

EXAMPLES = Path(__file__).parents[2] / "examples"

_spec = importlib.util.spec_from_file_location(
    "conv_fashion_mnist", EXAMPLES / "conv_fashion_mnist.py"
)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


class SpikingJellyCSNN(nn.Module):
    """As in SpikingJelly's examples, whose own file needs torchvision."""

    def __init__(self, T: int, channels: int):
        super().__init__()
        self.T = T
        self.conv_fc = nn.Sequential(
            layer.Conv2d(1, channels, kernel_size=3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2, 2),
            layer.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2, 2),
            layer.Flatten(),
            layer.Linear(channels * 7 * 7, channels * 4 * 4, bias=False),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
            layer.Linear(channels * 4 * 4, 10, bias=False),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
        )
        functional.set_step_mode(self, step_mode="m")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_seq = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        rate = self.conv_fc(x_seq).mean(0)
        functional.reset_net(self)
        return rate


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    path = EXAMPLES / "checkpoints" / "csnn_c32_t4_half.pth"
    return torch.load(path, map_location="cpu", weights_only=True)["net"]


@pytest.fixture(scope="module")
def test_set() -> data.Dataset:
    return data.load(EXAMPLES / "data" / "fashion-mnist", limit=500)


def test_checkpoints_load_into_each_other():
    theirs, ours = SpikingJellyCSNN(4, 8), example.CSNN(4, 8)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_outputs_are_equal_to_the_last_bit(weights, test_set):
    theirs, ours = SpikingJellyCSNN(4, 32).eval(), example.CSNN(4, 32).eval()
    theirs.load_state_dict(weights)
    ours.load_state_dict(weights)
    with torch.no_grad():
        a, b = theirs(test_set.x), ours(test_set.x)
    assert (b.argmax(1) == test_set.y).float().mean() > 0.9
    assert torch.equal(a, b)


def test_gradients_are_equal(weights, test_set):
    theirs, ours = SpikingJellyCSNN(4, 32), example.CSNN(4, 32)
    for net in (theirs, ours):
        net.load_state_dict(weights)
        net(test_set.x[:32]).square().sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-3, atol=1e-4 * a.grad.abs().max().item(), msg=name
        )
