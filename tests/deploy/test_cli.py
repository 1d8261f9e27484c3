"""The command line, in this process and in its own."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from spikeport import deploy, targets
from spikeport.deploy import cli, network

SOURCE = """
import torch
from torch import nn
from spikeport.converters import neurons

class Net(nn.Module):
    def __init__(self, T=3, classes=4, look_alike=False):
        super().__init__()
        self.T = T
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.bn = nn.BatchNorm2d(2)
        self.fire = Leaky() if look_alike else neurons.IFNode(v_threshold=0.1)
        self.fc = nn.Linear(2 * 16, classes)
        self.out = neurons.IFNode(v_threshold=0.1)

    def forward(self, x):
        y = self.bn(self.conv(x)).unsqueeze(0).expand(self.T, -1, -1, -1, -1)
        y = nn.functional.max_pool2d(self.fire(y).flatten(0, 1), 2).flatten(1)
        return self.out(self.fc(y).unflatten(0, (self.T, -1))).mean(0)

class Leaky(neurons.IFNode):
    def forward(self, x):
        return super().forward(x * 0.5)

class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
"""
INPUT = ("--input", "4,1,8,8")
SIM = ("--target", "lynxi-sim")


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    def call(*argv: object) -> Result:
        capsys.readouterr()
        try:
            code = cli.main([*map(str, argv)])
        except SystemExit as left:
            code = left.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network's file, a checkpoint, data, a cache, and an artifact that is not changed."""
    root = tmp_path_factory.mktemp("cli")
    (root / "net_cli.py").write_text(SOURCE)
    path = sys.path[:]
    torch.manual_seed(3)
    net = network.build(f"{root / 'net_cli.py'}:Net")
    sys.path[:] = path
    torch.save({"net": net.state_dict(), "epoch": 3}, root / "checkpoint.pth")
    random = np.random.default_rng(0)
    x = random.random((10, 1, 8, 8), np.float32)
    with torch.no_grad():
        y = net(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(root / "data.npz", x=x, y=y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKEPORT_CACHE", str(root / "cache"))
        cli.main(["compile", *map(str, net_of(root)), *SIM, *INPUT, "-o", str(root / "made")])
    return root


@pytest.fixture(autouse=True)
def environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("SPIKEPORT_CACHE", str(folder / "cache"))


def net_of(root: Path) -> tuple[object, ...]:
    return f"{root / 'net_cli.py'}:Net", "--checkpoint", root / "checkpoint.pth", "--key", "net"


# The job, command by command


def test_targets_lists_sdks_and_says_what_is_missing(run):
    found = run("targets")
    assert found.code == 0
    assert "lynxi-sim: lyngor 1.1.0 (simulated, devices: 0, 1, 2)" in found.out
    document = {entry["name"]: entry for entry in run("targets", "--json").json["targets"]}
    assert document.keys() == targets.TARGETS.keys()
    assert document["lynxi-sim"]["simulated"] is True
    assert document["lynxi-sim"]["max_rank"] == 4
    assert "aten.conv2d" in document["lynxi-sim"]["ops"]
    assert "float16" in document["lynxi-sim"]["dtypes"]


def test_check_finds_nothing_wrong(run, folder):
    found = run("check", *net_of(folder), *INPUT, "--target", "lynxi", "--target", "lynxi-sim")
    assert (found.code, found.out) == (0, "no findings\n")
    assert run("check", *net_of(folder), *INPUT, *SIM, "--json").json == {
        "ok": True,
        "findings": [],
    }


def test_check_prints_all_findings_and_exits_with_1(run, folder):
    net = f"{folder / 'net_cli.py'}:Net"
    found = run("check", net, "--arg", "look_alike=True", *INPUT, *SIM)
    assert found.code == 1
    assert "fire" in found.out
    assert "fix:" in found.out
    document = run("check", net, "--arg", "look_alike=True", *INPUT, *SIM, "--json").json
    assert document["ok"] is False
    assert {"rule", "where", "found", "allowed", "fix"} <= document["findings"][0].keys()


def test_show_prints_the_capture_the_passes_and_the_result(run, folder):
    passes = [rewrite.__name__ for rewrite in targets.get("lynxi-sim").passes(torch.float16)]
    found = run("show", *net_of(folder), *SIM, *INPUT)
    assert found.code == 0
    heads = [line.split(":")[0] for line in found.out.splitlines() if " not applied" in line]
    assert heads == ["capture", *passes]
    assert "spikeport.neuron" in found.out
    assert found.out.count("program for") == 2
    one = run("show", *net_of(folder), *SIM, *INPUT, "--pass", passes[1])
    assert one.out.startswith(f"{passes[1]}: ")
    assert one.out.count("program for lynxi-sim") == 1
    steps = run("show", *net_of(folder), *SIM, *INPUT, "--json").json["steps"]
    assert [step["name"] for step in steps] == ["capture", *passes]
    kept = run("show", *net_of(folder), *SIM, *INPUT, "--dtype", "float32", "--json").json["steps"]
    assert "float16" not in kept[-1]["graph"]
    assert "float16" in steps[-1]["graph"]
    wrong = run("show", *net_of(folder), *SIM, *INPUT, "--pass", "fold")
    assert wrong.code == 2
    assert passes[0] in wrong.err


def test_compile_writes_an_artifact_and_says_what_was_verified(run, folder, tmp_path):
    command = ("compile", *net_of(folder), *SIM, *INPUT, "-o", tmp_path / "out")
    found = run(*command, "--no-cache", "--option", "opt_level=2", "--no-probe")
    assert found.code == 0
    assert "net_cli.Net for lynxi-sim" in found.out
    assert "verified in float16" in found.err
    manifest = deploy.Artifact.open(tmp_path / "out").manifest
    assert manifest["compile_options"]["opt_level"] == 2
    assert manifest["probe"] is None
    assert manifest["evidence"] is not None
    there = run(*command)
    assert there.code == 4
    assert "--force" in there.err
    replaced = run(*command, "--force", "--no-verify", "--dtype", "float32", "--json")
    assert replaced.code == 0
    assert replaced.json["manifest"]["dtype"] == "float32"
    assert replaced.json["manifest"]["evidence"] is None
    again = run(*command, "--dtype", "float32", "--no-verify")
    assert "compiled before" in again.out


def test_compile_takes_what_the_cache_has(run, folder, tmp_path):
    found = run("compile", *net_of(folder), *SIM, *INPUT, "-o", tmp_path / "out", "--json")
    assert found.json["cached"] is True


def test_run_gives_accuracy_and_throughput_and_pads_the_last_batch(run, folder, tmp_path):
    command = ("run", folder / "made", "--data", folder / "data.npz")
    found = run(*command, "--save", tmp_path / "predictions.npz", "--verify")
    assert found.code == 0
    assert "verified: 1 calls recorded on the device, equal bit for bit" in found.out
    assert "of 10 right" in found.out
    assert "the simulator's speed on this machine, not the chip's" in found.out
    saved = np.load(tmp_path / "predictions.npz")
    data = np.load(folder / "data.npz")
    assert np.array_equal(saved["labels"], data["y"])
    document = run(*command, "--json").json
    assert document["predictions"] == saved["predictions"].tolist()
    assert document["accuracy"] == np.mean(saved["predictions"] == data["y"])
    assert document["accuracy"] >= 0.9  # the labels are the source's own predictions
    assert document["simulated"] is True
    limited = run(*command, "--limit", 3, "--json").json
    assert limited["predictions"] == document["predictions"][:3]


def test_run_verify_needs_no_data_and_fails_on_another_device_output(
    run, folder, tmp_path, monkeypatch
):
    good = run("run", folder / "made", "--verify", "--json")
    assert good.code == 0
    assert good.json["verification"]["ok"] is True
    run_graph = targets.lynxi.adapter._Model.run
    monkeypatch.setattr(
        targets.lynxi.adapter._Model,
        "run",
        lambda self, inputs: [y + 2**-11 for y in run_graph(self, inputs)],
    )
    bad = run("run", folder / "made", "--verify")
    assert bad.code == 1
    assert "VERIFICATION FAILED" in bad.out


def test_compare_gives_agreement_and_exits_with_1_below_the_limit(run, folder):
    data = ("--data", folder / "data.npz")
    found = run("compare", folder / "made", *net_of(folder), *data)
    assert found.code == 0
    assert "agreement" in found.out
    document = run("compare", folder / "made", *net_of(folder), *data, "--json").json
    assert document["samples"] == 10
    assert document["source_accuracy"] == 1.0
    assert document["ok"] is True
    # Other weights are another network.
    other = run("compare", folder / "made", net_of(folder)[0], *data, "--json")
    assert other.code == 1
    assert other.json["ok"] is False


def test_without_a_checkpoint_the_same_network_is_built_each_time(run, folder, tmp_path):
    net = net_of(folder)[0]
    made = run("compile", net, *SIM, *INPUT, "-o", tmp_path / "fresh")
    assert "no --checkpoint" in made.err
    data = ("--data", folder / "data.npz", "--json")
    assert run("compare", tmp_path / "fresh", net, *data).json["agreement"] >= 0.9


def test_simulate_passes_everything_after_the_script_on(run, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, lyngor\nprint(sys.argv[1:], lyngor.version)\nsys.exit(len(sys.argv))\n"
    )
    arguments = ("--json", "-o", "x", "--help", "--", "last")
    found = run("simulate", "lynxi", script, *arguments)
    assert found.code == 1 + len(arguments)
    assert "simulation" in found.out.splitlines()[0]
    assert f"{list(arguments)} 1.1.0" in found.out
    document = run("simulate", "--json", "lynxi", script, "a")
    assert document.json == {"script": str(script), "exit_code": 2}
    assert "['a'] 1.1.0" in document.err
    assert run("simulate", "lynxi", tmp_path / "none.py").code == 2


# Bad input: the exit code, what it says, and nothing left behind


def wrong(folder: Path) -> dict[str, tuple[tuple[object, ...], int, str]]:
    net, out = net_of(folder), ("-o", folder / "never")
    source = folder / "net_cli.py"
    build = ("compile", *net, *out)
    missing = folder / "missing"
    agree = ("compare", folder / "made", *net, "--data", folder / "data.npz", "--min-agreement")
    return {
        "target": ((*build, *INPUT, "--target", "lynxi-sm"), 2, "did you mean lynxi-sim?"),
        "no target": ((*build, *INPUT), 2, "--target"),
        "no input": ((*build, *SIM), 2, "--input"),
        "input": ((*build, *SIM, "--input", "4x1"), 2, "16,1,28,28"),
        "input shape": ((*build, *SIM, "--input", "4,2,8,8"), 1, "forward-fails"),
        "arg": ((*build, *SIM, *INPUT, "--arg", "t=4"), 2, "it takes (T=3, classes=4"),
        "arg form": ((*build, *SIM, *INPUT, "--arg", "T"), 2, "name=value"),
        "misfit": ((*build, *SIM, *INPUT, "--arg", "classes=5"), 4, "fc.weight"),
        "option": ((*build, *SIM, *INPUT, "--option", "speed=9"), 2, "no option speed"),
        "own option": (
            (*build, *SIM, *INPUT, "--option", "probe=False"),
            2,
            "--option probe: no option of a target's compiler; this command has --output",
        ),
        "dtype": ((*build, *SIM, *INPUT, "--dtype", "int8"), 2, "float16"),
        "class": (("compile", f"{source}:Ne", *out, *SIM, *INPUT), 2, "did you mean Net?"),
        "file": (("compile", f"{missing}.py:Net", *out, *SIM, *INPUT), 2, "no such file"),
        "branch": (("compile", f"{source}:Branch", *out, *SIM, *INPUT), 1, "error["),
        "key": (
            ("compile", f"{source}:Net", "--key", "net", *out, *SIM, *INPUT),
            2,
            "--checkpoint",
        ),
        "checkpoint": (
            ("compile", f"{source}:Net", "--checkpoint", missing, *out, *SIM, *INPUT),
            4,
            "no such file",
        ),
        "sdk": ((*build, *INPUT, "--target", "lynxi"), 3, "lynxi-sim"),
        "unwritable": ((*build[:-1], "/proc/out", *SIM, *INPUT), 4, "cannot be written"),
        "artifact": (("run", missing, "--verify"), 4, "is no artifact"),
        "device": (("run", folder / "made", "--verify", "--device", 9), 3, "0, 1, 2"),
        "data": (("run", folder / "made", "--data", "fashion_mnist"), 4, "did you mean"),
        "limit": (
            ("run", folder / "made", "--data", folder / "data.npz", "--limit", 0),
            2,
            "limit",
        ),
        "nothing": (("run", folder / "made"), 2, "--data"),
        "save alone": (("run", folder / "made", "--verify", "--save", "p.npz"), 2, "--data"),
        "save": (
            ("run", folder / "made", "--data", folder / "data.npz", "--save", missing / "p.npz"),
            2,
            "no directory",
        ),
        "agreement": ((*agree, "2"), 2, "--min-agreement is 2; allowed: a fraction"),
        "no agreement": ((*agree, "nan"), 2, "--min-agreement is nan"),
        "nir": (("check", f"{missing}.nir", *INPUT, *SIM), 2, "missing.nir: no such file"),
        "vendor": (("simulate", "graphcore", "x.py"), 2, "lynxi"),
        "command": (("complie",), 2, "compile"),
        "none": ((), 2, "COMMAND"),
    }


CASES = list(wrong(Path()))


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_has_its_exit_code_and_says_what_is_allowed(run, folder, case):
    argv, code, said = wrong(folder)[case]
    before = sorted(p.name for p in folder.iterdir())
    found = run(*argv)
    assert found.code == code
    assert said in found.err
    assert found.out == ""
    assert "Traceback" not in found.err
    assert sorted(p.name for p in folder.iterdir()) == before


def test_an_error_is_one_json_document_too(run, folder):
    found = run("compile", f"{folder / 'net_cli.py'}:Branch", "-o", "x", *SIM, *INPUT, "--json")
    assert found.code == 1
    assert found.json["error"] == "CaptureError"
    assert found.json["findings"][0]["fix"]
    assert found.json["message"] in found.err
    for argv in (["complie"], ["check"], ["compile", "NET", *SIM, "-o", "x", "--dtype", "int8"]):
        found = run(*argv, "--json")
        assert (found.code, found.json["error"], found.json["findings"]) == (2, "UsageError", [])
        assert found.json["message"] in found.err


def test_traceback_shows_where_an_error_arose(run, folder):
    assert "Traceback" in run("run", folder / "missing", "--verify", "--traceback").err


def test_a_malicious_checkpoint_is_refused_unless_trusted(run, folder, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    (tmp_path / "c.pth").write_bytes(pickle.dumps({"net": Malicious()}))
    net = (f"{folder / 'net_cli.py'}:Net", "--checkpoint", tmp_path / "c.pth")
    found = run("check", *net, *SIM, *INPUT)
    assert found.code == 4
    assert "mkdir" in found.err
    assert "--trust-pickle" in found.err
    assert not (tmp_path / "marker").exists()
    assert run("check", *net, *SIM, *INPUT, "--trust-pickle").code == 4  # holds no tensors
    assert (tmp_path / "marker").exists()


def test_ctrl_c_is_130_and_leaves_nothing(run, folder, tmp_path, monkeypatch):
    def interrupted(self, program, directory, options):
        (directory / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(targets.lynxi.adapter.Lynxi, "compile", interrupted)
    out = tmp_path / "here" / "out"
    found = run("compile", *net_of(folder), *SIM, *INPUT, "-o", out, "--no-cache", "--no-verify")
    assert found.code == 130
    assert "interrupted" in found.err
    assert "Traceback" not in found.err
    assert list(out.parent.iterdir()) == []


# As a process


def test_help_version_and_usage_import_no_torch():
    script = (
        "import sys; from spikeport.deploy import cli\n"
        "for argv in (['--help'], ['--version'], ['compile', '--help'], ['frobnicate']):\n"
        "    try: print('left with', cli.main(argv))\n"
        "    except SystemExit as left: print('left with', left.code)\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False False"
    assert [line for line in done.stdout.splitlines() if line.startswith("left")] == [
        *["left with 0"] * 3,
        "left with 2",
    ]
    assert "130  interrupted" in done.stdout


def test_standard_output_holds_the_result_alone(folder):
    argv = ("run", folder / "made", "--data", folder / "data.npz", "--verify", "--json")
    command = [sys.executable, "-m", "spikeport.deploy", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["samples"] == 10
    assert done.stderr == ""  # no bar where there is no terminal


@pytest.mark.skipif(os.name != "posix", reason="a signal of POSIX")
def test_ctrl_c_ends_a_real_process_without_a_trace(folder, tmp_path):
    """The interrupt comes while the compiler writes, as soon as the directory is there."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import signal, sys, time\n"
        "from spikeport.deploy import cli\n"
        "from spikeport.targets.lynxi.adapter import Lynxi\n"
        # A shell's background job ignores the signal, and its children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def compile(self, program, directory, options):\n"
        "    (directory / 'half').write_text('half')\n"
        "    time.sleep(60)\n"
        "Lynxi.compile = compile\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    here = tmp_path / "here"
    argv = (
        "compile",
        *net_of(folder),
        *SIM,
        *INPUT,
        "-o",
        here / "out",
        "--no-cache",
        "--no-verify",
    )
    command = [sys.executable, str(slow), *map(str, argv)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(here.glob(".out.partial-*/device/half")):
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < end, "it did not come to compile"
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=30)
    assert (started.returncode, "Traceback" in said) == (130, False), said
    assert list(here.iterdir()) == []
