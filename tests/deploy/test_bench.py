"""``spikeport bench``: its tables and files, and what it does not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spikeport.converters.errors import DeviceError, UsageError
from spikeport.deploy.bench import neurons, report
from spikeport.deploy.cli import main

QUICK = ["bench", "neurons", "--device", "cpu", "--quick", "--neurons", "64", "--T", "2,4"]
KINDS = ("png", "svg")


def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--dtype", "float32", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "LIF, float32, N = 64: forward + backward, ms" in text
    assert "left out: the roofline and torch.compile: they are measured on a GPU" in text
    charts = [
        f"neurons_{name}.{kind}" for name in ("forward", "forward_backward") for kind in KINDS
    ]
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", *charts}
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [(c["neuron"], c["T"]) for c in cells] == [("IF", 2), ("IF", 4), ("LIF", 2), ("LIF", 4)]
    for entry in cells[-1]["entries"]:
        assert entry["forward"] > 0
        assert entry["first_s"] > 0
        assert entry["errors"]["differing"] == 0


def test_a_contestant_that_computes_something_else_is_seen() -> None:
    x, g = torch.rand(4, 64) * 2, torch.rand(4, 64)
    reference = neurons.Reference.of("LIF", x, g)
    late = torch.roll(reference.spikes, 1, 0)
    errors = reference.errors(late, reference.gradient * 1.5)
    assert errors.differing == int((late != reference.spikes).sum()) > 0
    assert errors.gradient == pytest.approx(0.5)


def test_an_interrupt_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = neurons.measure, []

    def interrupted(*args: Any) -> neurons.Cell:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(neurons, "measure", interrupted)
    results = neurons.run(neurons.Options("cpu", 64, (2, 4), ("float32",), quick=True))
    assert [(c.neuron, c.T) for c in results.cells] == [("IF", 2)]
    assert "all after IF, float32, T = 2: it was interrupted" in report.tables(results)


def test_every_option_that_cannot_be_used_is_named() -> None:
    options = neurons.Options("nowhere", 0, (4, 0), ("float64",))
    with pytest.raises(UsageError) as caught:
        options.resolve()
    for part in ("--dtype float64", "--T 0", "--neurons 0", "--device nowhere"):
        assert part in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(DeviceError, match=r"--device cuda:0: torch sees 0 CUDA device"):
        neurons.Options("cuda:0").resolve()
