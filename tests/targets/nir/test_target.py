"""NIR as a target: options, the command line, and files that contradict themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import nir
import numpy as np
import pytest
from nir_files import DT, GRID, compiled, exact, file
from torch import nn

from spikeport import deploy
from spikeport.converters.errors import (
    CaptureError,
    CompileError,
    TargetUnavailableError,
    UsageError,
)
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.converters.sources.nir import NirNetwork
from spikeport.deploy.cli import main


def test_options_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(exact(), IFNode())
    program = deploy.convert(net, (GRID,), target="nir", verify=False)
    for wrong in ({"dt": 0}, {"dt": "1"}, {"strict": 1}, {"step": 1}):
        with pytest.raises(UsageError, match=r"allowed|has no option"):
            deploy.compile(program, tmp_path / "a", cache=False, **wrong)
    with pytest.raises(UsageError, match="leave dtype out"):
        deploy.convert(net, (GRID,), target="nir", dtype="float16")
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(TargetUnavailableError, match=r"pip install 'spikeport\[nir\]'"):
        deploy.compile(program, tmp_path / "a", cache=False)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"pip install 'spikeport\[nir\]'"):
        NirNetwork(__file__)


def test_metadata_that_contradict_the_parameters(tmp_path: Path) -> None:
    path = file(compiled(nn.Sequential(exact(), LIFNode()), (GRID,), tmp_path))
    graph = nir.read(path)
    graph.nodes["1"].tau *= 2
    with pytest.raises(CaptureError, match="metadata declare another neuron") as caught:
        NirNetwork(graph)
    assert [f.where for f in caught.value.findings] == ["1"]
    graph.nodes["1"].metadata["spikeport"]["declaration"] = "{}"
    with pytest.raises(CaptureError, match="metadata are no declaration"):
        NirNetwork(graph)


def test_a_file_that_reads_as_other_neurons_is_no_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = deploy.convert(nn.Sequential(exact(), IFNode()), (GRID,), "nir", verify=False)
    monkeypatch.setattr("spikeport.targets.nir.export.metadata", lambda *_: {})
    with pytest.raises(CompileError, match="declares other neurons"):
        deploy.compile(program, tmp_path / "a", cache=False)


def test_the_command_line_takes_and_gives_nir(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = tmp_path / "net.nir"
    ports = {"input": nir.Input(np.array([5])), "output": nir.Output(np.array([5]))}
    spike = nir.IF(np.full(5, 1 / DT), np.full(5, 0.5), np.zeros(5))
    edges = [("input", "spike"), ("spike", "output")]
    nir.write(net, nir.NIRGraph({**ports, "spike": spike}, edges))
    arguments = [str(net), "--input", "4,2,5", "--target", "nir", "--arg"]
    out = ["-o", str(tmp_path / "out"), "--option", "dt=0.5"]
    assert main(["compile", *arguments, f"dt={DT}", *out]) == 0
    assert "no --checkpoint" not in capsys.readouterr().err  # the file has the weights
    assert float(nir.read(file(tmp_path / "out")).metadata["dt"]) == 0.5
    assert main(["check", *arguments, "dt=-1"]) == 2
    assert "allowed: a time above 0" in capsys.readouterr().err
    net.write_bytes(net.read_bytes()[:200])
    assert main(["check", *arguments, "dt=1"]) == 1
    assert "no whole HDF5 file" in "".join(capsys.readouterr())
