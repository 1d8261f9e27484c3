"""The runtime: bytes, buffers, and the traps that the vendor's has."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spikeport.targets.lynxi.simulator import SimulatorWarning, lyngor, lynpy, options


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + 1, (b * 2).sum(1)


def compile_net(net: nn.Module, inputs: Any, path: Path, run_batch: int = 1, **io: str) -> str:
    model = lyngor.DLModel()
    model.load(net.eval(), "Pytorch", inputs, **io)
    return lyngor.Builder().build(
        model.graph, model.params, out_path=path, apu_only=True, run_batch=run_batch
    )


@pytest.fixture
def pair(tmp_path: Path) -> str:
    # The second tensor starts at byte 6, no multiple of its four bytes.
    inputs = {"a": [(3,), "float16"], "b": (2, 2)}
    return compile_net(Pair(), inputs, tmp_path / "o", in_type="float16", out_type="float32")


def tensor(array: np.ndarray[Any, Any]) -> lynpy.Tensor:
    return lynpy.Tensor(0, array.nbytes).from_numpy(array).apu()


def test_buffers_are_flat_and_concatenated(pair: str) -> None:
    model = lynpy.Model(dev_id=0, path=pair)
    assert (model.batch_size, model.input_size, model.output_size) == (1, 14, 20)
    both = np.array([1, 2, 3, 1, 2, 3, 4], np.float16)
    out = model(tensor(both)).cpu()
    flat = out.numpy()
    assert flat.dtype == np.uint8
    assert flat.shape == (20,)
    assert flat.view(np.float32).tolist() == [2, 3, 4, 6, 14]
    a, b = out.split([12, 8])
    assert a.view_as([3], "float32").numpy().tolist() == [2, 3, 4]
    assert b.view_as((2,)).numpy().tolist() == [6, 14]


def test_only_bytes_are_checked(pair: str) -> None:
    model = lynpy.Model(0, pair)
    same_bytes = np.zeros(14, np.int8)
    model(tensor(same_bytes))
    with pytest.raises(AssertionError, match=r"16 bytes and the model takes 14.*a float16 \[3\]"):
        model(tensor(np.zeros(8, np.float16)))
    with pytest.raises(AssertionError, match="has 8 bytes and the model fills 20"):
        model(tensor(same_bytes), lynpy.Tensor(0, 8))
    with pytest.raises(AssertionError, match="the array has 8 bytes"):
        lynpy.Tensor(0, 4).from_numpy(np.zeros(2, np.float32))


def test_the_output_buffer_is_reused(pair: str) -> None:
    model = lynpy.Model(0, pair)
    first = model(tensor(np.zeros(7, np.float16)))
    seen = first.cpu().numpy().view(np.float32)
    assert seen[0] == 1
    second = model(tensor(np.ones(7, np.float16)))
    assert second is first
    assert seen[0] == 1  # fetched data stays until the next fetch
    second.cpu()
    assert seen[0] == 2
    own = model.output_tensor()
    assert model.infer(tensor(np.zeros(7, np.float16)), own) is own
    assert second.cpu().numpy().view(np.float32)[0] == 2


def test_host_data_must_be_sent(pair: str) -> None:
    model = lynpy.Model(0, pair)
    forgotten = lynpy.Tensor(0, 14).from_numpy(np.ones(7, np.float16))
    with pytest.warns(SimulatorWarning, match=r"call .apu\(\)"):
        out = model(forgotten)
    assert out.cpu().numpy().view(np.float32)[0] == 1  # 0 + 1: zeros were on the device
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(forgotten.apu())
    nowhere = lynpy.Tensor(0, 14, allocate=False).from_numpy(np.ones(7, np.float16))
    assert nowhere.devptr is None
    with pytest.raises(AssertionError, match="no memory on the device"):
        model(nowhere)


def test_tensor_attributes_and_reinterpretation() -> None:
    t = lynpy.Tensor(dev_id=1, size=16)
    assert t.devptr is not None
    assert (t.data_size, t.size, t.itemsize, t.shape, t.dtype) == (16, 16, 1, None, "uint8")
    assert t.from_numpy(np.arange(4, dtype=np.float32)) is t
    assert t.apu() is t
    assert t.cpu() is t
    assert (t.size, t.itemsize, t.shape, t.dtype) == (4, 4, (4,), "float32")
    assert t.view_as([2, 4], "float16") is t
    assert t.numpy().shape == (2, 4)
    assert t.view_as((2, 2)).numpy().tolist() == [[0, 1], [2, 3]]
    with pytest.raises(AssertionError, match=r"float32 \[3\] takes 12 bytes and the tensor has 16"):
        t.view_as([3])
    with pytest.raises(AssertionError, match="dtype is 'float64'"):
        t.view_as([2], "float64")
    with pytest.raises(AssertionError, match="24 and the tensor has 16"):
        t.split([8, 16])


def test_numpy_needs_a_fetch() -> None:
    with pytest.raises(AssertionError, match=r"call cpu\(\) first"):
        lynpy.Tensor(0, 4).numpy()
    with pytest.raises(AssertionError, match="call from_numpy first"):
        lynpy.Tensor(0, 4).apu()
    with pytest.raises(AssertionError, match="no memory on the device"):
        lynpy.Tensor(0, 4, allocate=False).cpu()


def test_split_shares_memory_and_copy_to_does_not() -> None:
    whole = tensor(np.arange(4, dtype=np.int32))
    parts = whole.split([4, 12])
    tensor(np.array([9], np.int32)).copy_to(parts[0])
    assert whole.cpu().numpy().tolist() == [9, 1, 2, 3]
    copy = lynpy.Tensor(0, 16)
    assert whole.copy_to(copy) is copy
    assert copy.cpu().view_as([4], "int32").numpy().tolist() == [9, 1, 2, 3]
    with pytest.raises(AssertionError, match="16 bytes cannot be copied into 4"):
        whole.copy_to(parts[0])
    with pytest.raises(AssertionError, match="other tensor"):
        whole.copy_to(lynpy.Tensor(0, 16, allocate=False))


def test_lists_have_shapes(pair: str) -> None:
    model = lynpy.Model(0, pair)
    a, b = model.input_list()
    assert (a.shape, a.dtype, a.data_size) == ((3,), "float16", 6)
    assert (b.shape, b.dtype) == ((2, 2), "float16")
    assert [t.shape for t in model.output_list()] == [(3,), (2,)]
    assert model.input_tensor().data_size == 14
    model.synchronize()
    model.unload()
    with pytest.raises(AssertionError, match="no model is loaded"):
        model.input_tensor()


def test_run_batch(tmp_path: Path) -> None:
    path = compile_net(nn.Flatten(), {"x": (2, 1, 2)}, tmp_path, run_batch=3)
    model = lynpy.Model(0, path)
    assert (model.batch_size, model.input_size) == (3, 16)
    x = np.arange(12, dtype=np.float32)
    out = model(tensor(x))
    assert out.cpu().numpy().view(np.float32).tolist() == x.tolist()
    assert model.input_list()[0].shape == (6, 1, 2)


def test_uint8_input(tmp_path: Path) -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    path = compile_net(Half(), {"x": (4,)}, tmp_path, in_type="uint8", out_type="float16")
    model = lynpy.Model(0, path)
    out = model(tensor(np.array([0, 1, 3, 255], np.uint8)))
    assert out.cpu().view_as([4], "float16").numpy().tolist() == [0, 0.5, 1.5, 127.5]


@pytest.mark.parametrize("make", [lynpy.Tensor, lynpy.Model])
def test_devices(make: Any) -> None:
    with pytest.raises(AssertionError, match="no device 3; this machine's device ids are 0, 1, 2"):
        make(dev_id=3)
    with options(devices=1), pytest.raises(AssertionError, match=r"device ids are 0$"):
        make(dev_id=1)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not exist"):
        lynpy.Model(0, tmp_path / "nothing")


@pytest.mark.parametrize("name", ["apu_0/prim_graph.json", "apu_0/params.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "change", "remove"])
def test_damaged_files(name: str, damage: str, tmp_path: Path) -> None:
    file = Path(compile_net(nn.Linear(4, 4), {"x": (1, 4)}, tmp_path)) / "Net_0" / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data if damage == "change" else data[:-4])
    with pytest.raises(AssertionError, match=r"does not exist|is not what was built"):
        lynpy.Model(0, tmp_path)
    with pytest.raises(lyngor.LyngorError, match=r"does not exist|is not what was built"):
        lyngor.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not hold a compiled network"),
        ("{}", "does not hold a compiled network"),
        ("[1]", "does not hold a compiled network"),
        (json.dumps({"simulator": {"format": 99}}), "format 99"),
    ],
)
def test_damaged_top_graph(text: str, message: str, tmp_path: Path) -> None:
    path = Path(compile_net(nn.Linear(4, 4), {"x": (1, 4)}, tmp_path))
    (path / "Net_0/top_graph.json").write_text(text)
    with pytest.raises(AssertionError, match=message):
        lynpy.Model(0, path)


def test_vendor_files_without_our_mark_are_refused(tmp_path: Path) -> None:
    (tmp_path / "Net_0").mkdir()
    (tmp_path / "Net_0/top_graph.json").write_text('{"main": {}, "apu_0": {}}')
    with pytest.raises(AssertionError, match="does not hold a compiled network"):
        lynpy.Model(0, tmp_path / "Net_0")


def test_files_are_deterministic_and_say_what_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    trees = []
    for name in ("one", "two"):
        root = Path(compile_net(net, {"x": (1, 1, 4, 4)}, tmp_path / name))
        files = sorted(p for p in root.rglob("*") if p.is_file())
        trees.append({str(p.relative_to(root)): p.read_bytes() for p in files})
        for file in files:
            if file.suffix == ".json":
                note = json.loads(file.read_text())["simulator"]["note"]
                assert "simulation" in note
    assert trees[0] == trees[1]
    assert {"net_params.json", "Net_0/top_graph.json"} <= set(trees[0])


def test_options_of_the_build_hold_at_load(tmp_path: Path) -> None:
    class Third(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 3

    with options(storage="float32"):
        path = compile_net(Third(), {"x": (1,)}, tmp_path)
    out = lynpy.Model(0, path)(tensor(np.ones(1, np.float32)))
    assert out.cpu().numpy().view(np.float32)[0] == np.float32(1) / np.float32(3)
