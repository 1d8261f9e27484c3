"""Slices, gradients, outputs and optimizers against plain torch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikeport.targets.ipu.simulator import SimulatorWarning, poptorch

BATCH, STEPS = 3, 20


class Net(nn.Module):
    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 7)
        self.fc2 = nn.Linear(7, 4)
        self.reduction = reduction

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.fc2(torch.tanh(self.fc1(x)))
        return out, F.cross_entropy(out, y, reduction=self.reduction)


def data(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, generator=generator)
    return x, torch.randint(0, 4, (size,), generator=generator)


def options(d: int = 1, g: int = 1, r: int = 1) -> poptorch.Options:
    made = poptorch.Options().deviceIterations(d).replicationFactor(r)
    made.Training.gradientAccumulation(g)
    return made


# All 27 of {1, 2, 4}^3: benchmarks/ipu.py replication.
@pytest.mark.parametrize(("d", "g", "r"), [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 4, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_are_those_of_one_plain_run(d: int, g: int, r: int, reduction: str) -> None:
    torch.manual_seed(0)
    net = Net(reduction)
    plain = copy.deepcopy(net)
    opts = options(d, g, r)
    kind = poptorch.ReductionType.Mean if reduction == "mean" else poptorch.ReductionType.Sum
    opts.Training.accumulationAndReplicationReductionType(kind)
    lr = 0.05 if reduction == "mean" else 0.05 / (BATCH * g * r)
    model = poptorch.trainingModel(
        net, opts, poptorch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=lr, momentum=0.9)
    x, y = data(BATCH * d * g * r)
    for _ in range(STEPS):
        model(x, y)
        for part, labels in zip(x.chunk(d), y.chunk(d), strict=True):
            optimizer.zero_grad()
            plain(part, labels)[1].backward()
            optimizer.step()
    for name, wanted in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], wanted, rtol=0, atol=1e-6)


OPTIMIZERS: list[tuple[Any, Any, dict[str, Any]]] = [
    (poptorch.optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    (poptorch.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (poptorch.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (poptorch.optim.Adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99)}),
    (poptorch.optim.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-5}),
    (poptorch.optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (poptorch.optim.RMSprop, torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9}),
    (poptorch.optim.RMSprop, torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("ours", "torchs", "arguments"), OPTIMIZERS)
def test_optimizers_are_torchs(ours: Any, torchs: Any, arguments: Any, scaled: bool) -> None:
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    extra = {"loss_scaling": 1024.0} if scaled else {}
    model = poptorch.trainingModel(net, None, ours(net.parameters(), **arguments, **extra))
    optimizer = torchs(plain.parameters(), **arguments)
    x, y = data(16)
    for _ in range(STEPS):
        model(x, y)
        optimizer.zero_grad()
        plain(x, y)[1].backward()
        optimizer.step()
    for name, wanted in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], wanted, rtol=1e-5, atol=2e-6)


class Scalar(nn.Module):
    """One weight whose gradient is the input."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start]))

    def forward(self, x: Tensor) -> Tensor:
        return poptorch.identity_loss(self.w * x, "sum")


def run_scalar(optimizer: Any, grads: list[float], **arguments: Any) -> float:
    net = Scalar()
    model = poptorch.trainingModel(net, None, optimizer(net.parameters(), **arguments))
    for grad in grads:
        model(torch.tensor([grad]))
    return float(net.w.detach())


def test_optimizer_variants_by_hand() -> None:
    # The velocity starts at zero, so that dampening holds from the first step on.
    assert run_scalar(
        poptorch.optim.SGD, [1.0], lr=0.1, momentum=0.9, dampening=0.5
    ) == pytest.approx(1 - 0.1 * 0.5)
    # Without bias correction the first step of Adam is (1 - b1) g / sqrt((1 - b2) g^2).
    assert run_scalar(
        poptorch.optim.AdamW, [2.0], lr=0.1, weight_decay=0.0, bias_correction=False
    ) == pytest.approx(1 - 0.1 * 0.1 / 0.001**0.5, rel=1e-5)
    # LAMB: the direction is m/sqrt(v) + wd w = 1 + 0.5, the trust ratio |w| / 1.5 = 1 / 1.5.
    assert run_scalar(poptorch.optim.LAMB, [2.0], lr=0.1, weight_decay=0.5) == pytest.approx(
        1 - 0.1, rel=1e-5
    )
    # TensorFlow's RMSprop: the mean square starts at one, and eps is inside the root.
    assert run_scalar(
        poptorch.optim.RMSprop, [2.0], lr=0.1, alpha=0.9, eps=0.5, use_tf_variant=True
    ) == pytest.approx(1 - 0.1 * 2 / (0.9 + 0.1 * 4 + 0.5) ** 0.5)
    assert run_scalar(poptorch.optim.SGD, [5.0], lr=0.1, max_grad_norm=2.0) == pytest.approx(0.8)


def test_state_is_rounded_to_its_type() -> None:
    coarse = run_scalar(
        poptorch.optim.Adam,
        [0.1, 0.3],
        lr=0.1,
        first_order_momentum_accum_type=torch.float16,
        second_order_momentum_accum_type=torch.float16,
    )
    fine = run_scalar(poptorch.optim.Adam, [0.1, 0.3], lr=0.1)
    m = 0.0
    v = 0.0
    w = 1.0
    for step, g in enumerate([0.1, 0.3], 1):
        m = float(torch.tensor(0.9 * m + 0.1 * g).half())
        wide = 0.999 * v + 0.001 * g * g
        # The update of a step uses the moments before they are rounded into the state.
        moments = (0.9 * (0 if step == 1 else 0.01000213623046875) + 0.1 * g, wide)
        w -= 0.1 * (moments[0] / (1 - 0.9**step)) / ((wide / (1 - 0.999**step)) ** 0.5 + 1e-8)
        v = float(torch.tensor(wide).half())
    assert coarse == pytest.approx(w, rel=1e-4)
    assert coarse != fine


class Echo(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.sum()


@pytest.mark.parametrize(
    ("mode", "period", "wanted"),
    [
        (poptorch.OutputMode.All, None, list(range(16))),
        (poptorch.OutputMode.Final, None, [14, 15]),
        (poptorch.OutputMode.EveryN, 2, [4, 5, 6, 7, 12, 13, 14, 15]),
        (poptorch.OutputMode.Sum, None, [sum(range(0, 16, 2)), sum(range(1, 16, 2))]),
    ],
)
def test_slices_of_outputs(mode: Any, period: int | None, wanted: list[int]) -> None:
    # D = 4, G = 2, R = 2 and one sample in a micro-batch: sample i is slice i, the replica fastest.
    class Marked(Echo):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, total = super().forward(x)
            return out, poptorch.identity_loss(total, "none")

    opts = options(4, 2, 2)
    opts.outputMode(mode, period)
    unused = poptorch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    model = poptorch.trainingModel(Marked(), opts, unused)
    out, total = model(torch.arange(16.0).reshape(16, 1))
    assert out.flatten().tolist() == wanted
    assert total.tolist() == wanted


def test_time_first_outputs_come_back_along_time() -> None:
    def steps(x: Tensor) -> Tensor:
        return torch.stack([x, x + 100])

    x = torch.tensor([[0.0], [1.0]])
    model = poptorch.inferenceModel(steps, poptorch.Options().deviceIterations(2))
    with pytest.warns(
        SimulatorWarning, match=r"shape \[2, 1, 1\] comes back 2 times.*return the batch"
    ):
        out = model(x)  # [T, B, C] of two iterations, concatenated on T
    assert out.flatten().tolist() == [0, 100, 1, 101]
    assert out.shape == (4, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poptorch.inferenceModel(steps)(x)
        poptorch.inferenceModel(
            lambda x: steps(x).transpose(0, 1), poptorch.Options().deviceIterations(2)
        )(x)


def test_default_modes() -> None:
    x, y = data(8)
    out, loss = poptorch.trainingModel(Net(), options(2, 2))(x, y)
    assert out.shape == (2, 4)
    assert loss.shape == ()
    assert poptorch.inferenceModel(Net(), options(4))(x, y)[0].shape == (8, 4)


def test_replicas_have_buffers_of_their_own() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return poptorch.identity_loss(self.bn(x), "sum")

    x = torch.tensor([[0.0, 0.0], [2.0, 2.0], [10.0, 10.0], [30.0, 30.0]])
    with pytest.raises(poptorch.Error, match=r"broadcasting buffers.*broadcastBuffers\(False\)"):
        poptorch.trainingModel(Norm(), options(r=2))(x)
    net = Norm()
    opts = options(r=2).broadcastBuffers(False)
    model = poptorch.trainingModel(net, opts)
    model(x)
    assert net.bn.running_mean is not None
    torch.testing.assert_close(net.bn.running_mean, torch.full((2,), 0.1 * 1.0))
    assert int(net.bn.num_batches_tracked or 0) == 1


def test_dropout_draws_anew_at_each_call() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=True)

    model = poptorch.inferenceModel(Noisy())
    x = torch.ones(64)
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    again = model(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_floating_point_exceptions() -> None:
    net = Scalar()
    opts = poptorch.Options()
    opts.Precision.enableFloatingPointExceptions(True)
    model = poptorch.trainingModel(net, opts)
    model(torch.ones(1))
    with pytest.raises(poptorch.Error, match="the loss is not finite"):
        model(torch.tensor([float("nan")]))
