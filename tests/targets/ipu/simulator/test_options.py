"""Options: typed, chained, frozen by use, read from files and the environment."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from spikeport.targets.ipu.simulator import poptorch


def frozen(options: Any) -> None:
    with pytest.raises(AttributeError, match="^Can't modify frozen Options$"):
        options.deviceIterations(2)
    with pytest.raises(AttributeError, match="^Can't modify frozen Options$"):
        options.Training.gradientAccumulation(2)
    with pytest.raises(AttributeError, match="^Can't modify frozen Options$"):
        options.Precision.enableStochasticRounding(True)
    with pytest.raises(AttributeError, match="^Can't modify frozen Options$"):
        options._Popart.set("anything", 1)


def test_a_model_freezes_them_and_a_clone_is_free() -> None:
    options = poptorch.Options()
    model = poptorch.inferenceModel(torch.nn.Identity(), options)
    frozen(options)
    frozen(model.options)
    assert options.clone().deviceIterations(3).device_iterations == 3


def test_a_loader_freezes_them() -> None:
    options = poptorch.Options()
    poptorch.DataLoader(options, torch.utils.data.TensorDataset(torch.zeros(4)))
    frozen(options)


def test_setters_chain_and_check_types() -> None:
    options = poptorch.Options().deviceIterations(2).replicationFactor(4).autoRoundNumIPUs()
    options.Training.gradientAccumulation(8)
    assert (options.device_iterations, options.replication_factor) == (2, 4)
    with pytest.raises(
        AssertionError, match="Unexpected type <class 'float'> for option device_iter"
    ):
        options.deviceIterations(2.0)
    with pytest.raises(
        AssertionError, match="Unexpected type <class 'bool'> for option device_iter"
    ):
        options.deviceIterations(True)
    with pytest.raises(AssertionError, match="Invalid option nothing, valid options are"):
        options.set(nothing=1)
    with pytest.raises(AssertionError, match="EveryN output must have output_return_period"):
        options.outputMode(poptorch.OutputMode.EveryN)
    with pytest.raises(AssertionError, match="even integer between 32 and 192"):
        options.TensorLocations.numIOTiles(33)


def test_what_is_deprecated_warns_and_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    options = poptorch.Options()
    before = options._Popart.options.copy()
    with caplog.at_level(logging.WARNING, "poptorch"):
        options.Precision.halfFloatCasting(poptorch.HalfFloatCastingBehavior.HalfUpcastToFloat)
        options.Precision.runningStatisticsAlwaysFloat(True)
        options.Jit.traceModel(False)
    assert [r.message.split(" is ")[0] for r in caplog.records] == [
        "poptorch.Options.Precision.halfFloatCasting",
        "poptorch.Options.Precision.runningStatisticsAlwaysFloat",
        "poptorch.Options.Jit.traceModel",
    ]
    assert options._Popart.options == before
    with pytest.raises(ValueError, match="no longer supported"):
        options.Jit.traceModel(True)


def test_they_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "options"
    path.write_text(
        "deviceIterations(2)\n\n# a comment\nTraining.gradientAccumulation(3)\n"
        "outputMode(poptorch.OutputMode.EveryN, output_return_period=2)\n"
        "Precision.setPartialsType(torch.half)\n"
    )
    options = poptorch.Options().loadFromFile(str(path))
    assert options.device_iterations == 2
    assert options.Training.gradient_accumulation == 3
    assert (options.output_mode, options.output_return_period) == (1, 2)
    assert options._Popart.options["partialsTypeMatMuls"] == "half"
    for line in ("deviceIterations(open('x'))", "nothing(1)", "deviceIterations", "import os"):
        path.write_text(f"autoRoundNumIPUs()\n{line}\n")
        with pytest.raises(poptorch.options.ConfigFileError, match="at line 2 of"):
            poptorch.Options().loadFromFile(str(path))


def test_they_are_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "options").write_text("deviceIterations(5)\n")
    monkeypatch.setenv("POPTORCH_DEFAULT_OPTIONS", str(tmp_path / "options"))
    monkeypatch.setenv("POPTORCH_CACHE_DIR", str(tmp_path))
    options = poptorch.Options()
    assert options.device_iterations == 5
    assert options._Popart.options["cachePath"] == str(tmp_path)


@pytest.mark.parametrize(
    ("size", "rank"), [("WORLD_SIZE", "RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")]
)
def test_processes_are_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, size: str, rank: str
) -> None:
    assert poptorch.Options().Distributed.numProcesses == 1
    monkeypatch.setenv(size, "4")
    monkeypatch.setenv(rank, "3")
    found = poptorch.Options().Distributed
    assert (found.processId, found.numProcesses) == (3, 4)
    assert found.disable().numProcesses == 1


def test_replicas_that_share_an_input_are_refused() -> None:
    options = poptorch.Options().replicationFactor(2)
    options.inputReplicaGrouping(2, poptorch.CommGroupType.Consecutive)
    with pytest.raises(poptorch.Error, match="inputReplicaGrouping is 2 and must be 1"):
        poptorch.inferenceModel(torch.nn.Identity(), options)(torch.zeros(2))
