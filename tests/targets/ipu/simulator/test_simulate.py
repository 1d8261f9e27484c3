"""Scripts written for poptorch, unmodified, and the packages that they import."""

from __future__ import annotations

import ctypes
import gzip
import os
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

from spikeport.deploy import cli
from spikeport.targets.ipu.simulator import install, popart, poptorch
from spikeport.targets.ipu.simulator.settings import current, settings

ROOT = Path(__file__).resolve().parents[4]
EXAMPLE = ROOT / "examples" / "ipu_snntorch.py"


def test_the_modules_are_there_inside_the_context_alone() -> None:
    before = sys.modules.get("poptorch")
    with install():
        import popart as p
        import poptorch as pt
        import poptorch.optim as optim
        from poptorch.enums import OutputMode

        assert (p, pt, optim, OutputMode) == (popart, poptorch, poptorch.optim, poptorch.OutputMode)
        assert "simulated" in pt.__version__
    assert sys.modules.get("poptorch") is before


def test_a_script_runs_and_the_first_line_says_that_it_is_a_simulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, popart, poptorch\n"
        "model = poptorch.inferenceModel(torch.nn.ReLU())\n"
        "print(sys.argv[1:], model(torch.tensor([-1.0, 2.0])).tolist())\n"
        "sys.exit(3)\n"
    )
    assert cli.main(["simulate", "ipu", str(script), "--batch", "4"]) == 3
    first, second = capsys.readouterr().out.splitlines()
    assert first == "simulation of the Poplar SDK 3.4.0 (poptorch) by spikeport; no chip takes part"
    assert second == "['--batch', '4'] [0.0, 2.0]"


def test_what_popart_has_itself_is_not_simulated() -> None:
    assert popart.__version__.startswith("3.4.0")
    with pytest.raises(AttributeError, match="the simulated popart has no 'Builder'"):
        popart.Builder()


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEPORT_IPU_SIM_MEMORY_MB", "100")
    monkeypatch.setenv("SPIKEPORT_IPU_SIM_STRICT", "1")
    assert (current().memory_mb, current().strict) == (100, True)
    with settings(memory_mb=7):
        assert (current().memory_mb, current().strict) == (7, True)
    monkeypatch.setenv("SPIKEPORT_IPU_SIM_STRICT", "yes")
    with pytest.raises(ValueError, match="SPIKEPORT_IPU_SIM_STRICT='yes'; it must be a number"):
        current()
    monkeypatch.undo()
    with (
        pytest.raises(ValueError, match="memory_mb is 0; it must be at least 1"),
        settings(memory_mb=0),
    ):
        pass


def test_libraries_of_custom_operators_are_placeholders(tmp_path: Path) -> None:
    (tmp_path / "op.cpp").write_text("int main() { return 0; }\n")
    library = tmp_path / "op.so"
    command = ["g++", "-shared", "-lpopart", str(tmp_path / "op.cpp"), "-o", str(library)]
    with install():
        subprocess.run(command, check=True)
        assert library.exists()
        assert ctypes.cdll.LoadLibrary(str(library)) is None
        with pytest.raises(OSError, match="op.cpp"):
            ctypes.cdll.LoadLibrary(str(tmp_path / "op.cpp"))
    assert not library.exists()
    library.write_bytes(b"a real one")
    with install():
        subprocess.run(command, check=True)
    assert library.read_bytes() == b"a real one"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_the_compiler_is_left_everything_else() -> None:
    command = ["g++", "--version"]
    outside = subprocess.run(command, check=True, capture_output=True).stdout
    with install():
        assert subprocess.run(command, check=True, capture_output=True).stdout == outside


# snnTorch


def images(folder: Path, limit: int) -> Path:
    """The first test images of Fashion-MNIST, as training and as test split."""
    source = ROOT / "examples" / "data" / "fashion-mnist"
    for name, size, offset in (("images-idx3", 784, 16), ("labels-idx1", 1, 8)):
        with gzip.open(source / f"t10k-{name}-ubyte.gz") as file:
            content = file.read(offset + size * limit)
        for split in ("train", "t10k"):
            with gzip.open(folder / f"{split}-{name}-ubyte.gz", "wb") as file:
                file.write(content)
    return folder


def installed(name: str) -> str:
    """The folder of a distribution, to be found before others of the same module."""
    try:
        return str(metadata.distribution(name).locate_file(""))
    except metadata.PackageNotFoundError:
        return ""


@pytest.mark.snntorch_ipu
@pytest.mark.slow
def test_snntorch_ipu_learns(tmp_path: Path) -> None:
    found = installed("snntorch-ipu")
    if not found:
        pytest.skip("needs snntorch-ipu on PYTHONPATH; see Makefile")
    # A copy: its build writes into its own folder, and so would a second test at the same time.
    shutil.copytree(Path(found) / "snntorch", tmp_path / "site" / "snntorch")
    path = os.pathsep.join((str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")))
    arguments = (str(images(tmp_path, 1920)), "--epochs", "2", "--num-steps", "8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "spikeport.deploy",
            "simulate",
            "ipu",
            EXAMPLE,
            "--data",
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.startswith("simulation of the Poplar SDK 3.4.0 (poptorch) by spikeport")
    first, later = (float(said.split(f"epoch {e} step 0: loss ")[1].split(",")[0]) for e in (0, 1))
    assert later < 0.7 * first
    assert float(said.split("epoch 1: test accuracy ")[1].split()[0]) > 0.65
    assert not list((tmp_path / "site").rglob("*.so"))


@pytest.mark.spikingjelly
def test_stock_spikingjelly_is_refused() -> None:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 3)
            self.lif = neuron.LIFNode()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            spikes = self.lif(self.fc(x)) + self.lif(self.fc(x))
            return torch.nn.functional.cross_entropy(spikes, y)

    with pytest.raises(poptorch.Error, match=r"(?s)lif.*targets.ipu.training_module rewrites"):
        poptorch.trainingModel(Net())(torch.ones(2, 4), torch.tensor([0, 1]))


@pytest.mark.snntorch
def test_stock_snntorch_is_refused_and_each_module_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not util.find_spec("snntorch"):
        pytest.skip("needs snnTorch on PYTHONPATH; see Makefile")
    arguments = ("--data", str(images(tmp_path, 256)), "--num-steps", "2")
    assert cli.main(["simulate", "ipu", str(EXAMPLE), *arguments]) == 1
    said = capsys.readouterr().err
    if metadata.version("snntorch").startswith("1."):
        for name in ("lif1", "lif2"):
            assert (
                f"Buffer {name}.mem is reassigned within the model when calling the forward" in said
            )
    for name in ("lif1", "lif2"):
        assert (
            f"{name}: the backward of torch.autograd.Function ATan is a surrogate gradient" in said
        )
    assert "spikeport.targets.ipu.training_module rewrites" in said
