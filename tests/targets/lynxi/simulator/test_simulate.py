"""Users' scripts on the simulation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikeport.targets.lynxi.simulator import install, lyngor, lynpy, run_script

LINE = "simulation of the Lynxi SDK 1.1.0 by spikeport; no chip takes part\n"


def python(script: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from spikeport.targets.lynxi.simulator import run_script; "
        "sys.exit(run_script(sys.argv[1], sys.argv[2:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(script), *args],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_install_is_undone() -> None:
    assert "lyngor" not in sys.modules
    with install():
        import lyngor as a
        import lynpy as b

        assert a is lyngor
        assert b is lynpy
        from lynpy import Tensor

        assert Tensor is lynpy.Tensor
    assert "lyngor" not in sys.modules
    assert "lynpy" not in sys.modules


def test_install_keeps_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = type(sys)("lyngor")
    monkeypatch.setitem(sys.modules, "lyngor", mine)

    def fail() -> None:
        with install():
            assert sys.modules["lyngor"] is lyngor
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sys.modules["lyngor"] is mine


def test_script_is_main_with_arguments_and_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("name = 'found'\n")
    script = tmp_path / "main.py"
    script.write_text(
        "import sys, os, lyngor, lynpy, neighbour\n"
        "print(__name__, sys.argv[1:], neighbour.name, lyngor.version)\n"
        "os.write(1, b'direct\\n')\n"
    )
    result = python(script, "-b", "16")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines(keepends=True)
    assert lines[0] == LINE
    assert set(lines[1:]) == {"direct\n", "__main__ ['-b', '16'] found 1.1.0\n"}


@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('told you')", 1, "told you\n"),
        ("pass", 0, ""),
    ],
)
def test_exit_codes(
    code: str,
    exit_code: int,
    stderr: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "main.py"
    script.write_text(code)
    assert run_script(script) == exit_code
    assert capsys.readouterr() == (LINE, stderr)


@pytest.mark.parametrize("code", ["def f():\n    1 / 0\nf()\n", "x = = 1\n"])
def test_tracebacks_are_pythons(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "main.py"
    script.write_text(code)
    own = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert run_script(script) == own.returncode == 1
    assert capsys.readouterr().err == own.stderr


def test_state_is_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "main.py"
    script.write_text("import sys\nsys.path.append('nowhere')\nsys.argv.append('x')\n")
    before = (list(sys.argv), list(sys.path))
    assert run_script(script) == 0
    assert (sys.argv, sys.path) == before
    assert capsys.readouterr().out == LINE
    assert run_script(tmp_path / "absent.py") == 2
    assert "no such file" in capsys.readouterr().err


TUTORIAL = """
import sys
import torch
from torch import nn
from spikingjelly.activation_based import functional, layer, lynxi_exchange, neuron

T, N, C = 4, 3, 4
torch.manual_seed(0)
net = nn.Sequential(
    layer.Conv2d(1, C, kernel_size=3, padding=1, bias=False),
    layer.BatchNorm2d(C),
    neuron.IFNode(),
    layer.MaxPool2d(2, 2),
    layer.Conv2d(C, C, kernel_size=3, padding=1, bias=False),
    layer.BatchNorm2d(C),
    neuron.LIFNode(),
    layer.MaxPool2d(2, 2),
    layer.Flatten(),
    layer.Linear(C * 7 * 7, 10, bias=False),
    neuron.IFNode(),
)
functional.set_step_mode(net, "m")
for m in net.modules():
    if isinstance(m, nn.BatchNorm2d):
        m.running_var.fill_(0.05)
    if isinstance(m, nn.Linear):
        m.weight.data.mul_(3)
for p in (*net.parameters(), *net.buffers()):
    if p.is_floating_point():
        p.data = (p.data * 64).round() / 64  # sums that no rounding touches
net.eval()


class InferenceNet(nn.Module):
    def __init__(self, T, modules):
        super().__init__()
        self.T = T
        self.module_list = nn.Sequential(*modules)

    def forward(self, x):
        x = x.repeat(self.T, 1, 1, 1)
        x = self.module_list(x)
        x = x.reshape(self.T, x.shape[0] // self.T, -1)
        return x.mean(0)


net = InferenceNet(T, lynxi_exchange.to_lynxi_supported_modules(net, T)).eval()
path = lynxi_exchange.compile_lynxi_model(
    sys.argv[1], net, in_data_type="float16", out_data_type="float16",
    input_shape_dict={"x": torch.Size([N, 1, 28, 28])},
)
chip = lynxi_exchange.load_lynxi_model(0, path)
agree, total = 0, 0
with torch.no_grad():
    for _ in range(4):
        x = (torch.rand(N, 1, 28, 28) * 8).round() / 8
        y = chip(lynxi_exchange.torch_tensor_to_lynxi(x.half(), 0))
        y = lynxi_exchange.lynxi_tensor_to_torch(y, shape=[N, 10], dtype="float16")
        wanted = net(x)
        agree += (y.float() == wanted).sum().item()
        total += wanted.numel()
        assert 0 < wanted.mean() < 1, wanted
print("agree", agree, "of", total)
assert agree >= 0.9 * total
"""


def test_tutorial_of_spikingjelly(tmp_path: Path) -> None:
    if importlib.util.find_spec("spikingjelly") is None:
        pytest.skip("spikingjelly is not installed")
    imports = "from spikingjelly.activation_based import layer, lynxi_exchange, neuron"
    tried = subprocess.run([sys.executable, "-c", imports], check=False, capture_output=True)
    if tried.returncode:
        pytest.skip("spikingjelly cannot be imported: " + tried.stderr.decode().splitlines()[-1])
    script = tmp_path / "tutorial.py"
    script.write_text(TUTORIAL)
    result = python(script, str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(LINE)
    assert "of 120" in result.stdout
    assert (tmp_path / "out/Net_0/top_graph.json").exists()
