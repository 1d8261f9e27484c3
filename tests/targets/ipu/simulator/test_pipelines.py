"""Blocks on IPUs: stages, how many micro-batches fill a pipeline, how much memory there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikeport.targets.ipu.simulator import current, poptorch, settings


class Chain(nn.Module):
    """As many linear layers as IPUs, and a loss in training."""

    def __init__(self, ipus: int, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            poptorch.BeginBlock(nn.Linear(width, width), f"B{i}", ipu_id=i) for i in range(ipus)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return poptorch.identity_loss(x, "sum") if self.training else x


def accumulating(g: int) -> poptorch.Options:
    options = poptorch.Options().autoRoundNumIPUs()
    options.Training.gradientAccumulation(g)
    return options


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_pipeline_in_training_wants_two_n_minus_one_micro_batches(stages: int) -> None:
    need = 2 * stages - 1
    poptorch.trainingModel(Chain(stages), accumulating(need))(torch.ones(need, 4))
    with pytest.raises(
        poptorch.Error, match=f"must equal at least {need} for {stages} pipeline stages"
    ):
        poptorch.trainingModel(Chain(stages), accumulating(need - 1))(torch.ones(need - 1, 4))


@pytest.mark.parametrize("stages", [2, 4])
def test_a_pipeline_in_inference_wants_n_iterations(stages: int) -> None:
    net = Chain(stages).eval()
    x = torch.ones(stages, 4)
    model = poptorch.inferenceModel(net, poptorch.Options().deviceIterations(stages))
    torch.testing.assert_close(model(x), net(x))
    short = poptorch.inferenceModel(net, poptorch.Options().deviceIterations(stages - 1))
    with pytest.raises(poptorch.Error, match=rf"number of pipeline stages \({stages}\)"):
        short(x[1:])


def test_shards_work_one_after_the_other() -> None:
    options = poptorch.Options().setExecutionStrategy(poptorch.ShardedExecution())
    poptorch.trainingModel(Chain(2), options)(torch.ones(1, 4))


def test_how_many_ipus_are_reserved(caplog: pytest.LogCaptureFixture) -> None:
    three = accumulating(5).autoRoundNumIPUs(False)
    with pytest.raises(poptorch.Error, match="the use of 3 IPUs, however.*a minimum of 4 in order"):
        poptorch.trainingModel(Chain(3), three)(torch.ones(5, 4))
    poptorch.trainingModel(Chain(3), accumulating(5))(torch.ones(5, 4))
    assert "1 will be reserved but not used" in caplog.text
    many = poptorch.Options().replicationFactor(128)
    with pytest.raises(poptorch.Error, match="needs 128 IPUs; a process has at most 64"):
        poptorch.inferenceModel(nn.Identity(), many)(torch.ones(128))


def test_stages_are_named_and_placed() -> None:
    def strategy(*blocks: Any) -> poptorch.Options:
        return accumulating(5).setExecutionStrategy(poptorch.PipelinedExecution(*blocks))

    x = torch.ones(5, 4)
    poptorch.trainingModel(Chain(3), strategy("B0", ["B1", "B2"]))(x)
    moved = strategy(poptorch.Stage("B0").ipu(1), poptorch.Stage("B1", "B2").ipu(0))
    poptorch.trainingModel(Chain(3), moved)(x)
    with pytest.raises(AssertionError, match="Unknown Block 'B2' list of expected Blocks"):
        poptorch.trainingModel(Chain(3), strategy("B0", "B1"))(x)
    with pytest.raises(AssertionError, match="B0 associated with more than one stage"):
        strategy("B0", ["B0", "B1"])
    automatic = accumulating(5)
    automatic.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement))
    poptorch.trainingModel(Chain(3), automatic)(x)


def test_blocks_begin_once() -> None:
    net = Chain(2)
    with pytest.raises(poptorch.Error, match="already been assigned to a block"):
        poptorch.BeginBlock(net.layers[0], ipu_id=1)
    poptorch.removeBlocks(net)
    poptorch.trainingModel(net)(torch.ones(1, 4))


# Memory


class Wide(nn.Module):
    """A layer of 10^6 weights, run over T steps."""

    def __init__(self, steps: int = 1) -> None:
        super().__init__()
        self.fc = nn.Linear(1000, 1000, bias=False)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = torch.sigmoid(self.fc(x))
        return poptorch.identity_loss(x, "sum") if self.training else x


def needed(call: Any) -> tuple[float, str]:
    """Megabytes of the estimate, and its text."""
    with settings(memory_mb=1), pytest.raises(poptorch.Error) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("Out of memory: Cannot fit all variable data onto one or more tiles.")
    return float(text.split("estimated ")[1].split(" MB")[0]), text


def test_the_estimate_counts_weights_state_and_activations_of_all_steps() -> None:
    def train(steps: int, optimizer: Any = poptorch.optim.SGD, g: int = 1, batch: int = 100) -> Any:
        net = Wide(steps)
        options = accumulating(g)
        model = poptorch.trainingModel(net, options, optimizer(net.parameters(), lr=0.1))
        return needed(lambda: model.compile(torch.ones(batch * g, 1000)))

    # 4 MB of weights; a step keeps its input and the sigmoid's output, which is the next one's
    # input: T + 1 values of 100 x 1000 floats, 0.4 MB each.
    assert train(1)[0] == pytest.approx(4 + 2 * 0.4, abs=0.05)
    assert train(25)[0] == pytest.approx(4 + 26 * 0.4, abs=0.05)
    assert train(25, poptorch.optim.Adam)[0] == pytest.approx(4 + 8 + 26 * 0.4, abs=0.05)
    assert train(25, g=2)[0] == pytest.approx(4 + 4 + 26 * 0.4, abs=0.05)
    text = train(25, poptorch.optim.Adam)[1]
    assert "weights 4.0 MB, optimizer state 8.0 MB, activations 10.4 MB" in text
    assert "most: forward 10.0 MB, fc 0.4 MB" in text
    assert "an IPU takes 1 MB" in text


def test_inference_keeps_nothing_for_a_backward_pass() -> None:
    model = poptorch.inferenceModel(Wide(25).eval())
    found, _ = needed(lambda: model.compile(torch.ones(100, 1000)))
    assert found == pytest.approx(4 + 2 * 0.4, abs=0.05)


def test_an_ipu_has_624_megabytes_unless_the_settings_say_else() -> None:
    class Table(nn.Module):
        def __init__(self, megabytes: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(megabytes * 250_000), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.table[0] + x

    assert current().memory_mb == 624
    with settings(memory_mb=8):
        poptorch.inferenceModel(Table(7)).compile(torch.ones(1))
        with pytest.raises(poptorch.Error, match=r"estimated 9\.0 MB .* an IPU takes 8 MB"):
            poptorch.inferenceModel(Table(9)).compile(torch.ones(1))


def test_float16_and_other_memory_take_less() -> None:
    half = poptorch.inferenceModel(Wide().eval().half())
    assert needed(lambda: half.compile(torch.ones(100, 1000).half()))[0] == pytest.approx(
        2.4, abs=0.1
    )
    options = poptorch.Options()
    away = poptorch.TensorLocationSettings().useOnChipStorage(False)
    options.TensorLocations.setWeightLocation(away)
    with settings(memory_mb=1):
        poptorch.inferenceModel(Wide().eval(), options).compile(torch.ones(100, 1000))


def test_a_pipeline_keeps_the_activations_under_way() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = poptorch.BeginBlock(nn.Linear(1000, 1000, bias=False), ipu_id=0)
            self.b = poptorch.BeginBlock(nn.Linear(1000, 1000, bias=False), ipu_id=1)

        def forward(self, x: Tensor) -> Tensor:
            return poptorch.identity_loss(self.b(F.relu(self.a(x))), "sum")

    model = poptorch.trainingModel(Two(), accumulating(3))
    _, text = needed(lambda: model.compile(torch.ones(300, 1000)))
    # The first of two stages has three micro-batches under way, each keeping the input and the relu.
    assert "IPU 0: estimated 10.4 MB (weights 4.0 MB, gradients 4.0 MB, activations 2.4 MB)" in text
    assert "IPU 1: estimated 8." in text
