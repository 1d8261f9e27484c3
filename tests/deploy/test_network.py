"""Networks by name, their arguments and inputs."""

import sys
from pathlib import Path

import pytest
import torch

from spikeport.converters.errors import UsageError
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
        "net_import.py": (
            "import torch\nimport nowhere\n",
            r"nowhere.*net_import\.py, line 2.*; install",
        ),
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
