"""float16: promotion as in torch, weights that follow activations, one rounding for each operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikeport.targets.ipu.simulator import poptorch


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(33, 5), (7, 33)),
    (nn.Conv1d(3, 4, 3), (2, 3, 9)),
    (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 6)),
    (nn.ConvTranspose2d(3, 4, 3), (2, 3, 6, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_a_layer_returns_its_activations_type(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    with pytest.raises(RuntimeError):
        layer(x.half())  # float32 weights: plain torch refuses what the device takes
    out = poptorch.inferenceModel(layer)(x.half())
    assert out.dtype == torch.float16
    assert torch.equal(out, layer(x.half().float()).detach().half())
    narrow = type(layer).__new__(type(layer))
    narrow.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters)}
    for name, value in layer._parameters.items():
        narrow._parameters[name] = (
            nn.Parameter(value.detach().half()) if value is not None else None
        )
    wide = poptorch.inferenceModel(narrow)(x)
    assert wide.dtype == torch.float32


@pytest.mark.parametrize(
    "mixed", [lambda a, b: a + b, lambda a, b: a * b, lambda a, b: torch.where(a > 0, a, b)]
)
def test_mixed_operands_follow_torch(mixed: Any) -> None:
    a, b = random(64).half(), random(64, seed=1)
    out = poptorch.inferenceModel(mixed)(a, b)
    assert out.dtype == mixed(a, b).dtype == torch.float32
    assert torch.equal(out, mixed(a.float(), b))


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.exp(),
        lambda x: x.tanh(),
        lambda x: x.softmax(-1),
        lambda x: x.sum(-1),
        lambda x: x.mean(-1),
        lambda x: F.layer_norm(x, (64,)),
    ],
)
def test_an_operation_is_rounded_once(op: Any) -> None:
    x = random(16, 64).half()
    out = poptorch.inferenceModel(op)(x)
    assert out.dtype == torch.float16
    assert torch.equal(out, op(x.float()).half())


def test_two_operations_are_rounded_twice() -> None:
    x = random(4096).half()
    out = poptorch.inferenceModel(lambda x: x * 1.1 + 0.3)(x)
    assert torch.equal(out, ((x.float() * 1.1).half().float() + 0.3).half())
    assert not torch.equal(out, (x.float() * 1.1 + 0.3).half())


def test_a_network_in_half_trains() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = self.fc(x)
            return out, F.cross_entropy(out.float(), y)

    torch.manual_seed(0)
    net = Net().half()
    wide = Net()
    wide.load_state_dict({k: v.float() for k, v in net.state_dict().items()})
    optimizer = poptorch.optim.SGD(net.parameters(), lr=0.5, loss_scaling=128.0)
    model = poptorch.trainingModel(net, None, optimizer)
    x, y = random(32, 8).half(), torch.arange(32) % 4
    plain = torch.optim.SGD(wide.parameters(), lr=0.5)
    for _ in range(20):
        out, loss = model(x, y)
        plain.zero_grad()
        wanted = wide(x.float(), y)[1]
        wanted.backward()
        plain.step()
    assert out.dtype == net.fc.weight.dtype == torch.float16
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=0.02)
    torch.testing.assert_close(
        net.fc.weight.detach().float(), wide.fc.weight.detach(), rtol=0, atol=0.01
    )


def test_gradients_are_accumulated_in_the_type_asked_for() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return poptorch.identity_loss(self.w * x, "sum")

    # In float16, 2048 + 1 is 2048.
    for kind, wanted in ((torch.float16, -2048.0), (torch.float32, -2052.0)):
        options = poptorch.Options()
        options.Training.gradientAccumulation(5)
        options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Sum)
        net = Scalar()
        optimizer = poptorch.optim.SGD(net.parameters(), lr=1.0, accum_type=kind)
        model = poptorch.trainingModel(net, options, optimizer)
        model(torch.tensor([2048.0, 1.0, 1.0, 1.0, 1.0]))
        assert float(net.w.detach()) == wanted
