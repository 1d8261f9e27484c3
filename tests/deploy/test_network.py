"""Networks by name, their arguments, inputs and checkpoints."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spikeport.converters.errors import CheckpointError, UsageError
from spikeport.deploy import network

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
import {neighbour}

@dataclass
class Options:
    width: int

class Net(nn.Module):
    def __init__(self, width=3, bias: bool = True, name=None):
        super().__init__()
        if width < 1:
            raise ValueError(f"width {{width}} is not positive")
        self.options = Options(width)
        self.name = name
        self.fc = nn.Linear(2, width, bias=bias)

    def forward(self, x):
        return self.fc(x) * {neighbour}.SCALE

    @classmethod
    def wide(cls, factor):
        return cls(width=100 * factor)

def factory(**kwargs):
    return Net(**kwargs)

def number():
    return 3

ready = Net()

if __name__ == "__main__":
    raise SystemExit("the main block ran")
"""


@pytest.fixture(autouse=True)
def imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test imports is forgotten after it."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.startswith(("net_", "neighbour_", "package_")):
            del sys.modules[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    (folder / "neighbour_one.py").write_text("SCALE = 2.0\n")
    path = folder / "net_one.py"
    path.write_text(SOURCE.format(neighbour="neighbour_one"))
    return path


@pytest.fixture
def net(file: Path) -> nn.Module:
    return network.build(f"{file}:Net")


# Code


def test_a_class_a_factory_and_a_class_method_make_networks(file):
    assert network.build(f"{file}:Net").fc.out_features == 3
    assert network.build(f"{file}:factory", ["width=4"]).fc.out_features == 4
    assert network.build(f"{file}:Net.wide", ["factor=2"]).fc.out_features == 200
    assert not network.build(f"{file}:Net").training


def test_a_file_imports_its_neighbours_and_runs_no_main_block(file):
    x = torch.ones(1, 2)
    net = network.build(f"{file}:Net")
    assert torch.equal(net(x), net.fc(x) * 2)


def test_a_relative_path_and_a_module_path_work(file, monkeypatch):
    monkeypatch.chdir(file.parent.parent)
    assert network.build("somewhere/net_one.py:Net").fc.out_features == 3
    (file.parent / "package_one").mkdir()
    (file.parent / "package_one" / "__init__.py").write_text("")
    (file.parent / "package_one" / "inner.py").write_text(
        "from torch import nn\nclass Net(nn.Identity):\n    pass\n"
    )
    monkeypatch.chdir(file.parent)
    assert type(network.build("package_one.inner:Net")).__module__ == "package_one.inner"


def test_files_of_one_name_are_told_apart(tmp_path):
    for width in (1, 2):
        folder = tmp_path / str(width)
        folder.mkdir()
        text = f"from torch import nn\ndef make():\n    return nn.Linear(1, {width})\n"
        (folder / "net_two.py").write_text(text)
    made = [network.build(f"{tmp_path}/{width}/net_two.py:make") for width in (1, 2)]
    assert [net.out_features for net in made] == [1, 2]


def test_arguments_are_literals_or_else_text(file):
    net = network.build(f"{file}:Net", ["width=5", "bias=False", "name=ann"])
    assert (net.options.width, net.fc.bias, net.name) == (5, None, "ann")
    parsed = network.parse_arguments(["a=1", "b=1e-3", "c=None", "d=True", "e=x=y", "f=", "g=(1,)"])
    assert parsed == {"a": 1, "b": 1e-3, "c": None, "d": True, "e": "x=y", "f": "", "g": (1,)}


@pytest.mark.parametrize(
    ("text", "said"),
    [("width", "name=value"), ("=3", "name=value"), ("a b=3", "name=value")],
)
def test_an_argument_of_another_form_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        network.parse_arguments([text])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["depth=3"], r"'depth'.*given: depth=3; it takes \(width=3, bias"),
        (["width=1", "width=2"], "given twice"),
        (["width=-1"], r"width=-1.*ValueError: width -1 is not positive \(net_one.py, line 16\)"),
        (["width=x"], r"width='x'.*TypeError"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_taken(file, arguments, said):
    with pytest.raises(UsageError, match=said):
        network.build(f"{file}:Net", arguments)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "names no network"),
        (":Nett", r"has no 'Nett'; it has Net, factory, number; did you mean Net\?"),
        (":Net.narrow", "has no 'Net.narrow'"),
        (":ready", "is a Net; it must be a class or a function"),
        (":__name__", "is a str; it must be a class or a function"),
        (":number", r"gives a int; it must give an nn\.Module"),
    ],
)
def test_a_name_that_is_no_network_is_refused(file, name, said):
    with pytest.raises(UsageError, match=said):
        network.build(f"{file}{name}")


def test_missing_and_broken_code_is_named(tmp_path):
    broken = {
        "net_syntax.py": ("def f(:\n", r"SyntaxError: .*net_syntax\.py, line 1"),
        "net_import.py": ("import torch\nimport nowhere\n", r"nowhere.*net_import\.py, line 2"),
        "net_exit.py": ("import sys\nsys.exit(3)\n", r"SystemExit: 3"),
        "net_raise.py": ("1 / 0\n", "ZeroDivisionError"),
    }
    for name, (text, said) in broken.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=said):
            network.build(f"{tmp_path / name}:Net")
        assert name.removesuffix(".py") not in sys.modules
    for net, said in {
        f"{tmp_path}/none.py:Net": "no such file",
        "no_such_package.net:Net": "no module 'no_such_package'",
        "spikeport.no_such:Net": "no module 'spikeport.no_such'",
        "Net": "names no network; write path/to/file.py:Class",
    }.items():
        with pytest.raises(UsageError, match=said):
            network.build(net)


# Example inputs


def test_example_inputs_have_the_shapes_and_dtypes_asked_for():
    a, b, c = network.example_inputs(["16,1,28,28", "3,2:float16", "5:int64"])
    assert (a.shape, a.dtype) == ((16, 1, 28, 28), torch.float32)
    assert (b.shape, b.dtype) == ((3, 2), torch.float16)
    assert (c.shape, c.dtype) == ((5,), torch.int64)
    assert 0 <= a.min() < 0.01
    assert 0.99 < a.max() < 1
    assert torch.equal(a, network.example_inputs(["16,1,28,28"])[0])


@pytest.mark.parametrize(
    "text", ["", "16x1", "16,,1", "0,3", "-1,3", "1.5", "3:float99", "3:Tensor"]
)
def test_a_wrong_input_is_refused_with_the_form(text):
    with pytest.raises(UsageError, match=r"16,1,28,28:float16.*float32, float16"):
        network.example_inputs([text])


def test_no_input_is_refused():
    with pytest.raises(UsageError, match="--input"):
        network.example_inputs([])


# Checkpoints


def other(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(value, 0.25) for name, value in net.state_dict().items()}


def assert_loaded(net: nn.Module) -> None:
    assert all((value == 0.25).all() for value in net.state_dict().values())


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda s: s, None),
        (lambda s: {"net": s, "epoch": 3, "optimizer": {"a": 1}}, None),
        (lambda s: {"net": s, "epoch": 3}, "net"),
        (lambda s: {"state_dict": s, "ema": {"shadow": s}}, "ema.shadow"),
        (lambda s: {"best.net": s, "epoch": 3}, "best.net"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, None),
        (lambda s: {"model": {f"module.{k}": v.half() for k, v in s.items()}}, None),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_a_state_dict_is_loaded_from_where_it_lies(net, tmp_path, wrap, key, new):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap(other(net)), path, _use_new_zipfile_serialization=new)
    network.load_checkpoint(net, path, key)
    assert_loaded(net)
    assert net.fc.weight.dtype == torch.float32


def test_the_key_that_was_found_is_said(net, tmp_path, caplog):
    torch.save({"net": other(net), "epoch": 1}, tmp_path / "c.pth")
    with caplog.at_level(logging.INFO):
        network.load_checkpoint(net, tmp_path / "c.pth")
    assert "under the key 'net' is taken" in caplog.text


def test_safetensors_are_loaded(net, tmp_path):
    save_file(other(net), tmp_path / "c.safetensors")
    network.load_checkpoint(net, tmp_path / "c.safetensors")
    assert_loaded(net)
    (tmp_path / "c.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="no whole safetensors"):
        network.load_checkpoint(net, tmp_path / "c.safetensors")


def test_all_keys_that_do_not_fit_are_named(tmp_path):
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = other(net)
    state["3.weight"] = state.pop("0.weight")
    state["extra"] = state.pop("1.bias")
    state["2.weight"] = torch.ones(7, 4)
    state["2.bias"] = torch.ones(7)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(CheckpointError) as caught:
        network.load_checkpoint(net, tmp_path / "c.pth")
    said = str(caught.value)
    for name in (
        "0.weight",
        "1.bias",
        "3.weight",
        "extra",
        "2.weight",
        "2.bias",
        "[7, 4]",
        "[5, 4]",
    ):
        assert name in said
    assert "--arg" in said
    assert before.keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        ([torch.ones(1)], None, "holds a list"),
        ({"epoch": 3}, None, "no state dict of tensors; its keys are epoch.*--key"),
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, None, "state dicts under a, b"),
        ({"net": {"w": torch.ones(1)}, "model": {"w": torch.ones(1)}}, None, "net, model.*--key"),
        ({"net": {"w": torch.ones(1)}}, "nett", "no key 'nett'.*its keys are net"),
        ({"net": {"w": torch.ones(1)}}, "net.w.x", "no key 'net.w.x': 'x' is missing; a Tensor"),
        ({"net": {"w": torch.ones(1)}, "epoch": 3}, "epoch", "is a int, no state dict"),
        ({}, None, "it is empty"),
    ],
)
def test_a_state_dict_that_is_not_there_is_an_error_with_what_is(net, tmp_path, content, key, said):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=said):
        network.load_checkpoint(net, tmp_path / "c.pth", key)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write(kind: str, content: object, path: Path) -> None:
    if kind == "plain":
        path.write_bytes(pickle.dumps(content))
    elif kind == "protocol 0":
        path.write_bytes(pickle.dumps(content, protocol=0))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "protocol 0"])
def test_a_malicious_pickle_is_refused_and_not_run(net, tmp_path, kind):
    marker, path = tmp_path / "marker", tmp_path / "c.pth"
    write(kind, {"net": Malicious(marker)}, path)
    with pytest.raises(CheckpointError, match=r"(posix|nt)\.mkdir.*--trust-pickle"):
        network.load_checkpoint(net, path)
    assert not marker.exists()
    # The file does what it threatens, so that the line above means something.
    with pytest.raises(CheckpointError, match="no state dict"):
        network.load_checkpoint(net, path, trust_pickle=True)
    assert marker.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickled_network_loads_on_request_alone(tmp_path, kind):
    net, path = nn.Linear(2, 3), tmp_path / "c.pth"
    trained = nn.Linear(2, 3)
    trained.load_state_dict(other(trained))
    write(kind, trained, path)
    with pytest.raises(
        CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*--trust-pickle"
    ):
        network.load_checkpoint(net, path)
    network.load_checkpoint(net, path, trust_pickle=True)
    assert_loaded(net)


def test_a_plain_pickle_of_tensors_loads_on_request_alone(net, tmp_path):
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps({"net": other(net)}))
    with pytest.raises(CheckpointError, match=r"plain pickle.*--trust-pickle"):
        network.load_checkpoint(net, path)
    network.load_checkpoint(net, path, trust_pickle=True)
    assert_loaded(net)


@pytest.mark.parametrize("trust", [False, True])
def test_what_is_no_checkpoint_is_an_error(net, tmp_path, trust):
    whole = tmp_path / "whole.pth"
    torch.save(other(net), whole)
    contents = {
        "cut.pth": whole.read_bytes()[:-200],
        "empty.pth": b"",
        "text.pth": b"hello world, this is text",
        "zeros.pth": bytes(1000),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is no checkpoint"):
            network.load_checkpoint(net, tmp_path / name, trust_pickle=trust)
    with pytest.raises(CheckpointError, match="no such file"):
        network.load_checkpoint(net, tmp_path / "none.pth", trust_pickle=trust)
    with pytest.raises(CheckpointError, match="not a file"):
        network.load_checkpoint(net, tmp_path, trust_pickle=trust)


def test_a_checkpoint_of_another_process_loads(net, tmp_path):
    """As written by a script whose classes are not importable here."""
    script = (
        "import torch; from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.fc = nn.Linear(2, 3)\n"
        f"torch.save(Net(), r'{tmp_path / 'net.pth'}')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(CheckpointError, match=r"__main__\.Net.*--trust-pickle"):
        network.load_checkpoint(net, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        network.load_checkpoint(net, tmp_path / "net.pth", trust_pickle=True)
