"""The bundle for machines with an old SDK, its script run on the simulated SDK."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spikeport import deploy
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.deploy import store
from spikeport.deploy.cli import main
from spikeport.targets.lynxi import simulator


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.spike, self.fc, self.out = LIFNode(v_threshold=0.3), nn.Linear(64, 5), IFNode()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        T, N = x.shape[:2]
        spikes = self.spike(self.norm(self.conv(x.flatten(0, 1))).unflatten(0, (T, N)))
        pooled = nn.functional.max_pool2d(spikes.flatten(0, 1), 2)
        rates = self.out(3 * self.fc(pooled.flatten(1)).unflatten(0, (T, N))).mean(0)
        return rates, spikes


EVENTS = torch.rand(3, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).round()


@pytest.fixture(scope="module", params=["float32", "float16"])
def artifact(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "onnx"
    program = deploy.convert(Net().eval(), (EVENTS,), target="onnx", dtype=request.param)
    return deploy.compile(program, path, cache=False).path


@pytest.fixture
def bundle(artifact: Path, tmp_path: Path) -> Path:
    return deploy.bundle(artifact, tmp_path / "bundle")


def simulate(bundle: Path, *args: str) -> int:
    return simulator.run_script(bundle / "run.py", args)


def test_the_script_runs_on_the_simulated_sdk(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {p.name for p in bundle.iterdir()} == {
        "model.onnx",
        "manifest.json",
        "samples.npz",
        "run.py",
    }
    assert simulate(bundle) == 0
    first = capsys.readouterr().out
    assert "built by lyngor 1.1.0" in first
    assert "output output_0 [4, 5]" in first
    assert "output output_1 [12, 4, 8, 8]: equal bit for bit" in first
    assert first.endswith("the chip computes what was recorded\n")
    assert simulate(bundle, "--device", "2") == 0
    assert "holds this model already" in capsys.readouterr().out


def test_it_finds_what_differs(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = dict(np.load(bundle / "samples.npz"))
    flipped = samples["0.output.1"]
    flipped[2, 1, 3, 4] = 1 - flipped[2, 1, 3, 4]
    samples["0.output.0"] = np.roll(samples["0.output.0"], 1, axis=1)
    np.savez(bundle / "samples.npz", **samples)
    assert simulate(bundle) == 2
    assert "samples.npz was changed" in capsys.readouterr().err
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["samples.npz"], manifest["digest"]
    manifest["digest"] = store.digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert simulate(bundle) == 1
    out = capsys.readouterr().out
    assert "1 of 3072 values differ, by up to 1; first at [2, 1, 3, 4]" in out
    assert "% of the predictions agree" in out
    assert out.endswith("the chip computes SOMETHING ELSE\n")


@pytest.mark.parametrize("damage", ["cut short", "emptied", "missing", "another batch"])
def test_a_manifest_that_is_damaged(
    damage: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bundle / "manifest.json"
    text = file.read_text()
    if damage == "missing":
        file.unlink()
    else:
        changed = {
            "cut short": text[:99],
            "emptied": "",
            "another batch": text.replace("4", "5", 1),
        }
        file.write_text(changed[damage])
    assert simulate(bundle) == 2
    assert "copy it again: manifest.json was changed" in capsys.readouterr().err


def run_bare(bundle: Path) -> Any:
    """Run its script outside of this project: neither torch nor spikeport can be imported."""
    site = str(Path(np.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-S", "-c", _BARE, str(bundle / "run.py"), site],
        check=False,
        capture_output=True,
        text=True,
    )


def test_without_the_sdk_it_says_so(bundle: Path) -> None:
    found = run_bare(bundle)
    assert (found.returncode, found.stderr.split(":")[0]) == (
        3,
        "the Lynxi SDK (lyngor, lynpy) cannot be imported",
    )


def test_it_needs_nothing_but_the_sdk_and_numpy(bundle: Path) -> None:
    tree = ast.parse((bundle / "run.py").read_text(), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    theirs = {"lyngor", "lynpy", "numpy"}
    assert imported - theirs <= sys.stdlib_module_names | {"__future__"}
    (bundle / "model.onnx").unlink()
    found = run_bare(bundle)
    assert (found.returncode, found.stderr.split(":")[0]) == (
        2,
        "the bundle is damaged, copy it again",
    )


_BARE = """
import runpy, sys
script, site = sys.argv[1:]
sys.path.append(site)
import numpy
sys.path.remove(site)
sys.argv = [script]
runpy.run_path(script, run_name="__main__")
"""


def test_from_the_shell(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", str(artifact), "-o", str(tmp_path / "b"), "--json"]) == 0
    assert "run.py" in json.loads(capsys.readouterr().out)["files"]
    assert main(["bundle", str(artifact), "-o", str(tmp_path / "b")]) == 4
    assert "holds something already" in capsys.readouterr().err
    for inside in (artifact, artifact / "device" / "b"):
        assert main(["bundle", str(artifact), "-o", str(inside)]) == 2
        assert "lies in the artifact" in capsys.readouterr().err
    assert main(["bundle", str(artifact), "-o", str(tmp_path / ("x" * 300))]) == 4
    assert "cannot be written: File name too long" in capsys.readouterr().err


def test_other_artifacts_are_refused(tmp_path: Path) -> None:
    x = torch.rand(2, 3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(0, (1, 2)), IFNode())
    program = deploy.convert(net, (x,), target="reference")
    deploy.compile(program, tmp_path / "a", cache=False)
    with pytest.raises(deploy.UsageError, match="is compiled for reference"):
        deploy.bundle(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(deploy.ArtifactError):
        deploy.bundle(tmp_path / "a", tmp_path / "b")


def test_an_operator_that_the_chip_lacks_is_refused(tmp_path: Path) -> None:
    class Classes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1).argmax(1)

    program = deploy.convert(Classes(), (torch.rand(2, 3),), target="onnx")
    deploy.compile(program, tmp_path / "a", cache=False)
    with pytest.raises(deploy.UnsupportedError, match=r"ArgMax; allowed: .*apply it to what"):
        deploy.bundle(tmp_path / "a", tmp_path / "b")


def test_what_its_compiler_would_refuse_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.ReLU()).eval()
    program = deploy.convert(net, (torch.rand(2, 2, 4, 4),), target="onnx")
    deploy.compile(program, tmp_path / "a", cache=False)
    with pytest.raises(deploy.UnsupportedError, match=r" 0 .*ConvTranspose; allowed: .* APU"):
        deploy.bundle(tmp_path / "a", tmp_path / "b")


def test_a_rank_that_the_chip_lacks_is_refused(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv3d(x.unsqueeze(1), torch.ones(1, 1, 2, 2, 2)).sum(1)

    program = deploy.convert(Deep(), (torch.rand(2, 3, 4, 4),), target="onnx")
    deploy.compile(program, tmp_path / "a", cache=False)
    with pytest.raises(
        deploy.UnsupportedError, match=r"Conv of shape \[2, 1, 2, 3, 3\]; allowed: rank"
    ):
        deploy.bundle(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
