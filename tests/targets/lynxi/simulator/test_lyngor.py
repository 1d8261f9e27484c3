"""The compiler's public API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spikeport.targets.lynxi.simulator import LyngorError, lyngor, lynpy, options


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + b.float(), a * 2


def load(net: nn.Module, inputs: Any, **kwargs: Any) -> lyngor.DLModel:
    model = lyngor.DLModel()
    model.load(net.eval(), "Pytorch", inputs, **kwargs)
    return model


def test_version_is_text_and_an_option() -> None:
    assert lyngor.version == lynpy.version == "1.1.0"
    with options(version="1.22.3"):
        assert lyngor.version == lynpy.version == "1.22.3"
    name = "nonsense"
    for module in (lyngor, lynpy):
        with pytest.raises(AttributeError, match="nonsense"):
            getattr(module, name)


def test_aliases_and_return_value(tmp_path: Path) -> None:
    model = load(nn.Linear(2, 2), {"x": (1, 2)})
    assert model.graph is model.mod
    assert model.params is model.param
    path = lyngor.Builder(target="apu", is_map=True).build(
        model.mod, model.param, out_path=str(tmp_path / "o"), apu_only=True
    )
    assert path == str(tmp_path / "o")
    lyngor.load(path=path, device=2)
    lyngor.load(path=path + "/Net_0")


@pytest.mark.parametrize("kind", ["Pytorch", "PYTORCH", "pytorch"])
@pytest.mark.parametrize("shape", [(1, 2), [1, 2], torch.Size([1, 2]), [(1, 2), "float32"]])
def test_ways_to_say_it(kind: str, shape: Any) -> None:
    lyngor.DLModel().load(nn.Linear(2, 2), model_type=kind, inputs_dict={"x": shape})


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"model_type": "Caffe"}, "does not read Caffe"),
        ({"model_type": "Torch"}, "allowed: 'Pytorch', 'ONNX'"),
        ({"inputs_dict": None}, "inputs_dict is missing"),
        ({"inputs_dict": {"x": (1, -1)}}, "shapes are static"),
        ({"inputs_dict": {"x": [(1, 2), "complex"]}}, "has type 'complex'"),
        ({"inputs_dict": {"x": (1, 2), "y": (1, 2)}}, "failed"),
        ({"in_type": "float64"}, "in_type is 'float64'"),
        ({"mean": (0.5,)}, "does not have mean"),
        ({"model": "no/such.pt"}, "does not exist"),
        ({"model": "no/such.onnx", "model_type": "ONNX"}, "does not exist"),
        ({"model_type": "ONNX"}, "give a path"),
    ],
)
def test_load_refuses(kwargs: dict[str, Any], text: str) -> None:
    given = {"model": nn.Linear(2, 2), "model_type": "Pytorch", "inputs_dict": {"x": (1, 2)}}
    with pytest.raises(LyngorError, match=text):
        lyngor.DLModel().load(**{**given, **kwargs})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_files(tmp_path: Path) -> None:
    net = nn.Linear(2, 2).eval()
    file = tmp_path / "net.pt"
    torch.jit.trace(net, torch.zeros(1, 2)).save(str(file))
    model = lyngor.DLModel()
    model.load(file, "Pytorch", {"x": (1, 2)})
    path = lyngor.Builder(target="cpu").build(model.graph, model.params, out_path=tmp_path / "o")
    engine = lyngor.load(path)
    engine.run(x=np.ones((1, 2), np.float32))
    wanted = net(torch.ones(1, 2)).detach().numpy()
    assert np.allclose(engine.get_output()[0], wanted, rtol=1e-6)
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(LyngorError, match="not a TorchScript file"):
        model.load(tmp_path / "bad.pt", "Pytorch", {"x": (1, 2)})


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"run_batch": 11}, "run_batch is 11; allowed: 1 to 10"),
        ({"run_batch": 0}, "run_batch is 0"),
        ({"build_mode": "fast"}, "'auto', 'abc', 'abc_only'"),
        ({"build_mode": "abc_only"}, "error num is -2"),
        ({"graph": None}, "call DLModel.load first"),
        ({"params": {}}, "params lacks"),
    ],
)
def test_build_refuses(kwargs: dict[str, Any], text: str, tmp_path: Path) -> None:
    model = load(nn.Linear(2, 2), {"x": (1, 2)})
    given = {"graph": model.graph, "params": model.params, "out_path": tmp_path}
    with pytest.raises(LyngorError, match=text):
        lyngor.Builder().build(**{**given, **kwargs})


def test_target_must_exist() -> None:
    with pytest.raises(LyngorError, match="'apu', 'cpu', 'llvm'"):
        lyngor.Builder(target="gpu")


def test_abc_falls_back(tmp_path: Path, capsys: Any) -> None:
    model = load(nn.Linear(2, 2), {"x": (1, 2)})
    lyngor.Builder().build(model.graph, model.params, out_path=tmp_path, build_mode="abc")
    assert "build abc map failed, try to build by auto mode" in capsys.readouterr().out


def test_engine_takes_names_and_gives_lists(tmp_path: Path) -> None:
    model = load(Pair(), {"a": (2, 3), "b": [(2, 3), "long"]})
    path = lyngor.Builder().build(model.graph, model.params, out_path=tmp_path)
    engine = lyngor.load(path)
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 4)
    with pytest.raises(LyngorError, match="call run first"):
        engine.get_output()
    engine.set_input("a", a)
    with pytest.raises(LyngorError, match="without data: b"):
        engine.run()
    engine.run(data_format="numpy", b=b)
    total, double = engine.get_output(data_format="numpy")
    assert (total == 5).all()
    assert (double == 2).all()
    with pytest.raises(LyngorError, match="no input 'c'; the network has a, b"):
        engine.set_input("c", a)
    with pytest.raises(LyngorError, match=r"built for float32 \[2, 3\]"):
        engine.set_input("a", a[:1])
    with pytest.raises(LyngorError, match="is float64"):
        engine.set_input("a", a.astype(np.float64))
    with pytest.raises(LyngorError, match="data_format"):
        engine.run(data_format="torch")


def test_run_batch_runs_each_part_alone(tmp_path: Path) -> None:
    class Centre(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean()

    model = load(Centre(), {"x": (2, 2)})
    path = lyngor.Builder().build(model.graph, model.params, out_path=tmp_path, run_batch=3)
    engine = lyngor.load(path)
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    engine.run(x=x)
    wanted = np.concatenate([p - p.mean() for p in np.split(x, 3)])
    assert np.array_equal(engine.get_output()[0], wanted)


def test_devices(tmp_path: Path) -> None:
    model = load(nn.Linear(2, 2), {"x": (1, 2)})
    path = lyngor.Builder().build(model.graph, model.params, out_path=tmp_path)
    with pytest.raises(LyngorError, match="no device 3; this machine's device ids are 0, 1, 2"):
        lyngor.load(path, device=3)
    with options(devices=4):
        lyngor.load(path, device=3)


def test_count_of_inputs_must_fit() -> None:
    class Default(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return x if y is None else x + y

    load(Default(), {"x": (1, 2)})
    load(Default(), {"x": (1, 2), "y": (1, 2)})
    with pytest.raises(LyngorError, match="failed"):
        load(Default(), {"x": (1, 2), "y": (1, 2), "z": (1, 2)})


def test_debug_sets_the_level() -> None:
    import logging

    logger = logging.getLogger("lyngor")
    before = logger.level
    lyngor.debug()
    assert logger.level == logging.DEBUG
    logger.setLevel(before)
