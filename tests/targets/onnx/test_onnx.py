"""The ONNX target: whole networks, every neuron, options, and what is missing or wrong."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from spikeport import deploy, targets
from spikeport.converters import neurons
from spikeport.converters.errors import DeviceError, TargetUnavailableError, UsageError
from spikeport.converters.probes import probe_inputs
from spikeport.targets.onnx import adapter, export


class Net(nn.Module):
    """Convolution, one layer used twice, neurons of several kinds; T = 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.tau = neurons.LIFNode(tau=torch.rand(8, 1, 1) + 1.5, v_threshold=0.3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.soft = neurons.IFNode(v_reset=None, fires=">", v_threshold=0.2)
        self.late = neurons.LIFNode(reset_at="next", v_reset=0.1, v_threshold=0.25)
        self.fc = nn.Linear(8 * 16, 10)
        self.stem[1].running_mean.normal_(0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).unsqueeze(0).expand(4, -1, -1, -1, -1)
        y = self.tau(y)
        y = y + self.soft(self.conv(y.flatten(0, 1)).unflatten(0, (4, -1)))
        y = self.late(self.conv(y.flatten(0, 1)).unflatten(0, (4, -1)))
        y = nn.functional.max_pool2d(y.flatten(0, 1), 2)
        return self.fc(y.flatten(1)).unflatten(0, (4, -1)).mean(0)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Net().eval()


X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def _model(path: Path) -> onnx.ModelProto:
    return onnx.load(path / "device/model.onnx")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_network(net: nn.Module, dtype: str, tmp_path: Path) -> None:
    program = deploy.convert(net, (X,), target="onnx", dtype=dtype)
    artifact = deploy.compile(program, tmp_path / "a", cache=False, probe=True)
    assert artifact.verify().equal
    with deploy.load(tmp_path / "a") as model:
        report = deploy.compare(net, model, [(X + 0.1, torch.zeros(6, dtype=torch.long))])
        assert report.explained
        with torch.no_grad():
            torch.testing.assert_close(
                model(X[:4]), net(X[:4]), rtol=0, atol=1e-5 if dtype == "float32" else 0.05
            )
        _, spikes = model.probe(X)
    assert all(0.02 < s.mean() < 0.9 for s in spikes.values())
    if dtype == "float32":
        assert sum(sum(layer.differing) for layer in report.layers) == 0


def test_every_neuron_spikes_as_declared(tmp_path: Path) -> None:
    """On inputs that hit the threshold exactly, per-channel parameters and scalar ones."""
    channels = torch.tensor([0.5, 1.0, 1.75]).reshape(3, 1)
    made = [
        neurons.Node(kind, v_reset=v_reset, fires=fires, reset_at=at, v_threshold=threshold, **rest)
        for v_reset, fires, at, threshold in itertools.product(
            (0.0, -0.25, None), (">=", ">"), ("now", "next"), (1.0, channels)
        )
        for kind, rest in (
            (neurons.IF, {}),
            (neurons.LIF, {"tau": 2.0, "v_rest": 0.125}),
            (neurons.LIF, {"tau": 1 + channels, "v_rest": 0.0, "decay_input": False}),
            (neurons.ParametricLIF, {"w": torch.tensor(0.3), "v_rest": 0.0}),
        )
    ]
    assert len(made) == 96
    drives = [probe_inputs(node.neuron, 6, (3, 5)) for node in made]

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes = nn.ModuleList(made)

        def forward(self, *drives: torch.Tensor) -> list[torch.Tensor]:
            return [node(x) for node, x in zip(self.nodes, drives, strict=True)]

    program = deploy.convert(All(), tuple(drives), target="onnx", verify=False)
    deploy.compile(program, tmp_path / "a", cache=False, probe=False)
    with deploy.load(tmp_path / "a") as model:
        found = model(*drives)
    for node, x, spikes in zip(made, drives, found, strict=True):
        expected = node.neuron.multi_step(x)
        assert 0 < expected.mean() < 1
        assert torch.equal(spikes, expected), node.neuron.describe()


def test_a_neuron_that_never_resets(tmp_path: Path) -> None:
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return neurons.Neuron(neurons.IF, reset="none", v_0=0.25).multi_step(x)

    x = torch.randint(-4, 8, (5, 2, 7)) / 8
    program = deploy.convert(Silent(), (x,), target="onnx")
    deploy.compile(program, tmp_path / "a", cache=False)
    with deploy.load(tmp_path / "a") as model:
        assert torch.equal(model(x), (x.cumsum(0) + 0.25 >= 1).float())


def test_the_file(net: nn.Module, tmp_path: Path) -> None:
    program = deploy.convert(net, (X,), target="onnx")
    for name in ("a", "b"):
        deploy.compile(program, tmp_path / name, cache=False, opset=15)
    first, second = ((tmp_path / n / "device/model.onnx").read_bytes() for n in ("a", "b"))
    assert first == second
    model = _model(tmp_path / "a")
    assert [o.version for o in model.opset_import] == [15]
    assert {n.domain for n in model.graph.node} == {""}
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    weights = Counter(tuple(t.dims) for t in model.graph.initializer)
    assert weights[8, 8, 3, 3] == 1  # of two uses
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    assert [n.doc_string for n in convolutions] == ["stem.0", "conv", "conv"]
    assert convolutions[0].name.startswith("/stem/0/")
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["neuron:soft"].startswith("IF(), fires at h > 0.2, soft reset")
    assert "BatchNormalization" not in {n.op_type for n in model.graph.node}
    shapes = {v.name: v.type.tensor_type for v in model.graph.value_info}
    values = {name for n in model.graph.node for name in n.output}
    assert values - set(shapes) == {o.name for o in model.graph.output}


@pytest.mark.parametrize("opset", [13, 14, 16, 18, 19, 20, 21, adapter._newest()[0]])
def test_opsets(net: nn.Module, opset: int, tmp_path: Path) -> None:
    program = deploy.convert(net, (X,), target="onnx", verify=False)
    deploy.compile(program, tmp_path / "a", cache=False, opset=opset)
    with deploy.load(tmp_path / "a") as model, torch.no_grad():
        torch.testing.assert_close(model(X), net(X))


def test_the_newest_opset_is_written(net: nn.Module, tmp_path: Path) -> None:
    program = deploy.convert(net, (X,), target="onnx", verify=False)
    newest = export.OPSETS[-1]
    (file,) = export.export(program, tmp_path / "model.onnx", newest)
    assert onnx.load(file).opset_import[0].version == newest


def test_an_opset_that_onnx_runtime_does_not_read_is_refused(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Older:
        __version__ = "1.16"
        SessionOptions = onnxruntime.SessionOptions

        @staticmethod
        def InferenceSession(model: bytes, *_: Any, **__: Any) -> None:  # noqa: N802
            if onnx.load_from_string(model).opset_import[0].version > 19:
                raise RuntimeError("Opset is under development")

    program = deploy.convert(net, (X,), target="onnx", verify=False)
    monkeypatch.setattr(adapter, "_runtime", lambda: Older)
    monkeypatch.setattr(adapter, "_newest", adapter._newest.__wrapped__)
    text = "opset is 20; allowed: 13 to 19, the newest of ONNX Runtime 1.16"
    with pytest.raises(UsageError, match=text):
        targets.get("onnx").compile(program, tmp_path, {"opset": 20})
    targets.get("onnx").compile(program, tmp_path, {"opset": 19})


def test_a_model_may_be_closed_twice_and_says_that_it_is(net: nn.Module, tmp_path: Path) -> None:
    program = deploy.convert(net, (X,), target="onnx", verify=False)
    deploy.compile(program, tmp_path / "a", cache=False)
    with deploy.load(tmp_path / "a") as model:
        model.close()
    with pytest.raises(DeviceError, match="the model is closed; load it again"):
        model(X)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"opset": 12}, "opset is 12; allowed: 13 to"),
        ({"opset": "17"}, "opset is '17'"),
        ({"opste": 17}, "no option opste; there are opset"),
    ],
)
def test_wrong_options(net: nn.Module, options: dict[str, Any], text: str, tmp_path: Path) -> None:
    program = deploy.convert(net, (X,), target="onnx", verify=False)
    with pytest.raises(UsageError, match=text):
        deploy.compile(program, tmp_path / "a", cache=False, **options)


def test_large_weights_lie_beside(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "EXTERNAL_ABOVE", 1000)
    program = deploy.convert(net, (X,), target="onnx", verify=False)
    deploy.compile(program, tmp_path / "a", cache=False)
    device = tmp_path / "a/device"
    assert {p.name for p in device.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (device / "model.onnx.data").stat().st_size > 4 * 10 * 128
    with deploy.load(tmp_path / "a") as model, torch.no_grad():
        torch.testing.assert_close(model(X), net(X))


def test_without_onnxruntime(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    program = deploy.convert(net, (X,), target="onnx", verify=False)
    artifact = deploy.compile(program, tmp_path / "a", cache=False)
    assert artifact.manifest["samples"]["source"] == "host"
    with pytest.raises(TargetUnavailableError, match=r"pip install 'spikeport\[ort\]'"):
        deploy.load(tmp_path / "a")


def test_other_devices_and_broken_files(net: nn.Module, tmp_path: Path) -> None:
    program = deploy.convert(net, (X,), target="onnx", verify=False)
    deploy.compile(program, tmp_path / "a", cache=False)
    with pytest.raises(DeviceError, match="no device 1"):
        deploy.load(tmp_path / "a", device=1)
    target = deploy.load(tmp_path / "a")._backend
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(DeviceError, match="ONNX Runtime refused"):
        target.load(tmp_path, [], [], 0)


class Before(nn.Module):
    """A function before neurons."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.neuron = function, neurons.LIFNode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neuron(self.function(x))


def test_what_the_cpu_lacks_in_half_precision_is_rounded_once(tmp_path: Path) -> None:
    net = Before(lambda x: nn.functional.local_response_norm(nn.functional.avg_pool3d(x * 5, 2), 2))
    x = torch.rand(4, 2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    program = deploy.convert(net, (x,), target="onnx", dtype="float16")
    deploy.compile(program, tmp_path / "a", cache=False)
    with deploy.load(tmp_path / "a") as model:
        assert torch.equal(model(x), net(x))
    assert 0 < net(x).mean() < 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float8_e4m3fn])
def test_narrower_numbers_are_refused(dtype: str, narrow: torch.dtype) -> None:
    net = Before(lambda x: (x * 3.3).to(narrow).float())
    with pytest.raises(
        deploy.UnsupportedError, match=rf"_to_copy gives {narrow}; allowed: .*float16"
    ):
        deploy.convert(net, (X,), target="onnx", dtype=dtype)


def test_an_operator_without_a_shape_is_refused_by_name() -> None:
    net = Before(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 127))
    with pytest.raises(deploy.CaptureError, match=r"aten.fake_quantize.*fix: write it in"):
        deploy.convert(net, (X,), target="onnx")
    assert deploy.check(net, (X,), targets=["onnx"]).errors
