"""Checkpoints of every form into a network, and none that runs code unasked."""

import logging
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spikeport.converters.errors import CheckpointError
from spikeport.deploy.checkpoint import load_checkpoint


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(OrderedDict(fc=nn.Linear(2, 3)))


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
    load_checkpoint(net, path, key)
    assert_loaded(net)
    assert net.fc.weight.dtype == torch.float32


def test_the_key_that_was_found_is_said(net, tmp_path, caplog):
    torch.save({"net": other(net), "epoch": 1}, tmp_path / "c.pth")
    with caplog.at_level(logging.INFO):
        load_checkpoint(net, tmp_path / "c.pth")
    assert "under the key 'net' is taken" in caplog.text


def test_safetensors_are_loaded(net, tmp_path):
    save_file(other(net), tmp_path / "c.safetensors")
    load_checkpoint(net, tmp_path / "c.safetensors")
    assert_loaded(net)
    (tmp_path / "c.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="no whole safetensors"):
        load_checkpoint(net, tmp_path / "c.safetensors")


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
        load_checkpoint(net, tmp_path / "c.pth")
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
        load_checkpoint(net, tmp_path / "c.pth", key)


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
        load_checkpoint(net, path)
    assert not marker.exists()
    # The file does what it threatens, so that the line above means something.
    with pytest.raises(CheckpointError, match="no state dict"):
        load_checkpoint(net, path, trust_pickle=True)
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
        load_checkpoint(net, path)
    load_checkpoint(net, path, trust_pickle=True)
    assert_loaded(net)


def test_a_plain_pickle_of_tensors_loads_on_request_alone(net, tmp_path):
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps({"net": other(net)}))
    with pytest.raises(CheckpointError, match=r"plain pickle.*--trust-pickle"):
        load_checkpoint(net, path)
    load_checkpoint(net, path, trust_pickle=True)
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
            load_checkpoint(net, tmp_path / name, trust_pickle=trust)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(net, tmp_path / "none.pth", trust_pickle=trust)
    with pytest.raises(CheckpointError, match="not a file"):
        load_checkpoint(net, tmp_path, trust_pickle=trust)


@pytest.mark.slow
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
        load_checkpoint(net, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        load_checkpoint(net, tmp_path / "net.pth", trust_pickle=True)
