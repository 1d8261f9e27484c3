"""The trainer on the simulated device, against plain torch."""

from __future__ import annotations

import copy
import inspect
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from spikeport.converters import losses, neurons
from spikeport.converters.errors import (
    CheckpointError,
    SpikeportError,
    TargetUnavailableError,
    UnsupportedError,
    UsageError,
)
from spikeport.targets import cuda, ipu
from spikeport.targets.ipu import simulator
from spikeport.targets.script import importable

T, C = 6, 4


class Net(nn.Module):
    """Samples [N, 8] -> spikes [T, N, 4]."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.bn = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.lif1 = neurons.LIFNode(detach_reset=True)
        self.fc2 = nn.Linear(16, C)
        self.lif2 = neurons.LIFNode(v_reset=None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn(self.fc1(x)).unsqueeze(0).repeat(T, 1, 1)
        return self.lif2(self.fc2(self.lif1(2 * hidden)))


def data(N: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(C, (N,), generator=generator)
    return torch.randn(N, 8, generator=generator) + nn.functional.one_hot(y, 8) * 3.0, y


def net(norm: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(norm)


def trainer(given: nn.Module | None = None, loss: Any = "ce_count", **options: Any) -> ipu.Trainer:
    module = ipu.training_module(given or net(), loss)
    return ipu.trainer(module, **{"optimizer": "sgd", "lr": 0.1, "simulator": True, **options})


@pytest.mark.parametrize(("D", "G", "R"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_steps_are_those_of_plain_torch(D: int, G: int, R: int) -> None:
    plain = net()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01, betas=(0.8, 0.99))
    x, y = data(8 * D * G * R)
    device = trainer(
        optimizer="adam",
        lr=0.01,
        betas=(0.8, 0.99),
        device_iterations=D,
        gradient_accumulation=G,
        replicas=R,
    )
    for _ in range(5):
        spikes, loss = device.step(x, y)
        parts = []
        for part, label in zip(x.chunk(D), y.chunk(D), strict=True):
            optimizer.zero_grad()
            parts.append(plain(part))
            wanted = losses.ce_count(parts[-1], label)
            wanted.backward()
            optimizer.step()
        assert torch.equal(spikes, torch.cat(parts, 1))  # [T, N, C], along the batch
        assert loss.dim() == 0
    state = device.state()["net"]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=2e-6)


def test_it_learns_and_evaluates_what_is_left_over() -> None:
    device = trainer(optimizer="adam", lr=0.02, device_iterations=2)
    x, y = data(203)
    batches = device.loader(TensorDataset(x, y), batch_size=25)
    for _ in range(8):
        for batch, label in batches:
            assert len(batch) == 50
            device.step(batch, label)
    loss, accuracy = device.evaluate(x, y, batch_size=64)  # 203 = 3 x 64 + 11
    plain = net()
    plain.load_state_dict(device.state()["net"])
    with torch.no_grad():
        spikes = plain(x)
    assert loss == pytest.approx(losses.ce_count(spikes, y).item(), rel=1e-5)
    assert accuracy == int((spikes.sum(0).argmax(1) == y).sum()) / 203
    assert accuracy > 0.8
    device.step(*data(50))  # goes on after an evaluation


def test_what_a_loader_leaves_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "spikeport"):
        assert len(trainer().loader(TensorDataset(*data(21)), batch_size=8)) == 2
    assert "5 of 21 samples are no whole batch of 8" in caplog.text
    with pytest.raises(UsageError, match=r"21 samples are no batch of 32 = device_iterations 4 x"):
        trainer(device_iterations=4).loader(TensorDataset(*data(21)), batch_size=8)
    with pytest.raises(UsageError, match="is not divisible by the number of elements"):
        trainer().loader(TensorDataset(*data(21)), batch_size=8, drop_last=False)


def test_batch_norm_is_trained_and_evaluated_in_its_modes() -> None:
    device = trainer(net(norm=True), replicas=2)
    x, y = data(16)
    before = device.state()["net"]["bn.running_mean"]
    device.step(x, y)
    moved = device.state()["net"]["bn.running_mean"]
    assert not torch.equal(before, moved)
    first, second = (device.evaluate(x[:n], y[:n], 8)[0] for n in (8, 8))
    assert first == second
    assert torch.equal(device.state()["net"]["bn.running_mean"], moved)


@pytest.mark.skipif(torch.__version__.startswith("2.0."), reason="has no float16 on a CPU")
def test_half() -> None:
    device = trainer(half=True, loss_scaling=128.0)
    spikes, loss = device.step(*data(16))
    assert spikes.dtype == torch.half
    assert loss.dtype == torch.float32
    assert device.state()["net"]["fc1.weight"].dtype == torch.half


def test_the_learning_rate_changes() -> None:
    device = trainer()
    x, y = data(8)
    device.step(x, y)
    before = device.state()["net"]
    device.set_lr(0.0)
    device.step(x, y)
    after = device.state()["net"]
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_checkpoint_goes_on_exactly(tmp_path: Path) -> None:
    x, y = data(16)

    def run(device: ipu.Trainer, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            device.step(x, y)
        state: dict[str, Tensor] = device.state()["net"]
        return state

    whole = run(trainer(optimizer="adam", lr=0.01), 6)
    first = trainer(optimizer="adam", lr=0.01)
    run(first, 3)
    first.save(tmp_path / "checkpoint.pth")
    second = trainer(optimizer="adam", lr=0.01)
    second.load(tmp_path / "checkpoint.pth")
    resumed = run(second, 3)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    first.load(tmp_path / "checkpoint.pth")  # also into one that has compiled
    again = run(first, 3)
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    plain = net()
    plain.load_state_dict(torch.load(tmp_path / "checkpoint.pth", weights_only=True)["net"])


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        trainer().load(path)
    torch.save({"net": nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(CheckpointError, match="of another network"):
        trainer().load(path)


def test_executables_are_kept(tmp_path: Path) -> None:
    trainer(executable_cache=tmp_path).step(*data(8))
    assert [p.suffix for p in tmp_path.iterdir()] == [".popef"]


def test_blocks() -> None:
    blocks = {"fc1": 0, "fc2": 1}
    plain, split = trainer(), trainer(blocks=blocks, gradient_accumulation=3)
    x, y = data(8)
    plain.step(x, y)
    split.step(x.repeat(3, 1), y.repeat(3))
    for name, value in plain.state()["net"].items():
        torch.testing.assert_close(split.state()["net"][name], value)
    with pytest.raises(UnsupportedError, match="poptorch 3.4.0.* refused the model"):
        trainer(blocks=blocks).step(x, y)  # a pipeline of 2 needs 3 micro-batches
    trainer(blocks=blocks, execution="sharded").step(x, y)
    with pytest.raises(UsageError, match=r"no module 'fc3' to begin a block at; there are fc1"):
        trainer(blocks={"fc3": 1})


def test_a_loop_over_time_is_no_pipeline() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, C)
            self.lif1, self.lif2 = cuda.LIFNode(step_mode="s"), cuda.LIFNode(step_mode="s")

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.lif2(self.fc2(self.lif1(self.fc1(3 * x)))) for _ in range(T)])

    x, y = data(24)
    with pytest.raises(
        UsageError, match=r"calls fc1 6 times, fc2 6 times; take execution='sharded'"
    ):
        trainer(Loop(), blocks={"fc1": 0, "fc2": 1}, gradient_accumulation=3).step(x, y)
    trainer(Loop(), blocks={"fc1": 0, "fc2": 1}, execution="sharded").step(x, y)


# Bad input


def test_no_sdk() -> None:
    with pytest.raises(TargetUnavailableError, match=r"Poplar SDK.*ipu-sim \(simulator=True\)"):
        trainer(simulator=False)


def test_an_sdk_is_rehearsed_on_the_simulation() -> None:
    installed = types.ModuleType("poptorch")  # the same functions, as another module
    vars(installed).update(
        {n: v for n, v in vars(simulator.poptorch).items() if not n.startswith("__")}
    )
    compiled = []

    def wrap(*args: Any) -> Any:
        compiled.append(args)
        return simulator.poptorch.trainingModel(*args)

    installed.trainingModel = wrap  # type: ignore[attr-defined]

    class Reading(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * x.mean().item())

    with importable({"poptorch": installed}):
        with pytest.raises(UnsupportedError, match="aten::item is only supported in eager mode"):
            trainer(Reading(), simulator=False).step(*data(8))
        assert not compiled
        trainer(simulator=False).step(*data(8))
        assert compiled


def test_wrong_arguments_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        trainer(optimizer="adm", device_iterations=0, replicas=1.5, execution="x")
    for text in (
        "no optimizer 'adm'",
        "device_iterations is 0",
        "replicas is 1.5",
        "execution is 'x'",
    ):
        assert text in str(caught.value)
    with pytest.raises(UsageError, match="optimizer sgd: .*beta"):
        trainer(betas=(0.9, 0.9))
    with pytest.raises(UsageError, match=r"the model is a Net; give ipu.training_module\(net"):
        ipu.trainer(net())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no parameters that learn"):
        trainer(nn.Sequential(neurons.IFNode()))


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (torch.zeros(9, 8), torch.zeros(9).long(), r"9 samples do not divide into 2 micro-batches"),
        (torch.zeros(0, 8), torch.zeros(0).long(), "there are no samples"),
        (torch.zeros(8, 8), torch.zeros(7).long(), "x has 8 samples and y 7"),
        (torch.zeros(8, 8).double(), torch.zeros(8).long(), "x is float64, which the device does"),
        (torch.zeros(8, 8), torch.zeros(8), r"y is torch.float32 \[8\]; allowed: classes"),
        (torch.zeros(8, 8), torch.full((8,), C), "classes 4 to 4, and the network has 4 outputs"),
        (torch.zeros(8, 8), torch.full((8,), -1), "classes -1 to -1"),
    ],
)
def test_batches_that_do_not_fit(x: Tensor, y: Tensor, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        trainer(gradient_accumulation=2).step(x, y)


def test_evaluation_takes_what_training_takes() -> None:
    x, y = data(8)
    for samples, label, text in (
        (x[:0], y[:0], "there are no samples"),
        (x.double(), y, "x is float64"),
        (x, y + C, "and the network has 4 outputs"),
    ):
        with pytest.raises(UsageError, match=text):
            trainer().evaluate(samples, label)


def test_a_last_partial_batch() -> None:
    device = trainer()
    device.step(*data(8))
    with pytest.raises(
        UsageError, match=r"x is \[7, 8\], and the model was compiled for \[8, 8\]; leave a"
    ):
        device.step(*data(7))
    device.close()
    device.step(*data(7))


def test_a_loss_that_is_not_finite_is_named_with_its_step() -> None:
    device = trainer(device_iterations=2)
    x, y = data(16)
    device.step(x, y)
    x[9] = float("nan")
    with pytest.raises(
        SpikeportError, match="the loss is nan in step 2, micro-batch 2 of 2: the tr"
    ):
        device.step(x, y)


class Step(torch.autograd.Function):
    """A surrogate gradient as frameworks write it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return (u > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Stateful(nn.Module):
    """A neuron of which no source knows, whose state is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + x
        fired: Tensor = Step.apply(self.v - 1)
        return fired


class Refused(Net):
    """Breaks every rule of a forward at once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.first = nn.Linear(8, 8), Stateful()
        self.readout = cuda.IFNode(keep_state=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.mean().item()
        if x.sum() > 0:
            x = x + 1
        return super().forward(self.first(self.fc0(x + x[x > 0].mean())))


def line(text: str, found: Callable[..., Any]) -> str:
    """File and line of the code in a function that begins so."""
    lines, start = inspect.getsourcelines(found)
    place = next(i for i, code in enumerate(lines) if code.strip().startswith(text))
    return f"{Path(__file__).name}:{start + place}"


def test_all_that_the_compiler_refuses_is_found_at_once_by_module_and_line() -> None:
    refused = Refused()
    refused.fc2.double()
    x, y = data(8)

    def loss(spikes: Tensor, label: Tensor) -> Tensor:
        return (spikes > 0).float().sum()

    found = ipu.check(refused, x.double(), y, loss)
    expected = {
        ("kept-state", "readout"): "keep_state=True",
        ("float64", "fc2"): "weight, bias of float64",
        ("float64", ""): "samples of float64",
        ("value-in-python", ""): line("if x.sum", Refused.forward),
        ("dynamic-shape", ""): line("return super().forward(self.first", Refused.forward),
        ("reassigned-buffer", "first"): line("self.v =", Stateful.forward),
        ("stock-surrogate", "first"): line("fired:", Stateful.forward),
        ("zero-gradient", ""): line("return (spikes", loss),
    }
    texts = {(f.rule, f.where): f.found for f in found}
    assert texts.keys() == expected.keys()
    assert all(text in texts[key] for key, text in expected.items())
    reads = [f.found for f in found if f.rule == "value-in-python"]
    assert "aten::item is only supported in eager mode" in reads[0]
    assert line("x = x * x.mean", Refused.forward) in reads[0]
    assert len(reads) == 2
    assert all(f.fix and f.allowed for f in found)


def test_a_network_that_trains_has_no_findings() -> None:
    x, y = data(8)
    assert not ipu.check(net(), x)
    assert not ipu.check(net(), x, y, "mse")
    (wrong,) = ipu.check(net(), x[:, 1:])
    assert wrong.rule == "forward-fails"
    with pytest.raises(UsageError, match="no loss 'ce'"):
        ipu.check(net(), x, y, "ce")


def test_a_step_raises_the_compilers_findings() -> None:
    refused = Refused()
    del refused.readout
    with pytest.raises(UnsupportedError) as caught:
        trainer(refused).step(*data(8))
    rules = {f.rule for f in caught.value.findings}
    assert rules == {"value-in-python", "dynamic-shape", "reassigned-buffer", "stock-surrogate"}


def test_a_model_in_two_trainers() -> None:
    module = ipu.training_module(net())
    first, second = (ipu.trainer(module, simulator=True) for _ in range(2))
    first.step(*data(8))
    with pytest.raises(UsageError, match="already been wrapped in 'poptorch.trainingModel'"):
        second.step(*data(8))
    first.close()
    second.step(*data(8))


def test_out_of_memory_by_the_estimate() -> None:
    with (
        simulator.settings(memory_mb=1),
        pytest.raises(UnsupportedError, match="(?s)Out of memory.*most: net.lif1"),
    ):
        trainer().step(*data(4000))


def test_the_network_is_left_as_it_is() -> None:
    original = net()
    before = copy.deepcopy(original.state_dict())
    trainer(original).step(*data(8))
    assert type(original.lif1) is neurons.LIFNode
    assert all(torch.equal(v, before[n]) for n, v in original.state_dict().items())
