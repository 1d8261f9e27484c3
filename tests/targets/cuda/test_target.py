"""The CUDA target, interpreted on a CPU; the tests marked ``gpu`` need the device itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spikeport import deploy
from spikeport.converters.errors import (
    DeviceError,
    TargetUnavailableError,
    UnsupportedError,
    UsageError,
)
from spikeport.converters.neurons import IFNode, LIFNode, Neuron, Node, dynamics
from spikeport.converters.ops import aten
from spikeport.targets import cuda, get, graphs
from spikeport.targets.cuda import kernels

T, N = 5, 4


class Net(nn.Module):
    """A static image over T steps; its sums are exact in any order, so results are equal or wrong."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.spikes = LIFNode(tau=torch.tensor([2.0, 4.0, 8.0, 2.0]).reshape(4, 1, 1), v_reset=None)
        self.pool, self.fc, self.out = nn.MaxPool2d(2), nn.Linear(36, 3), IFNode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x.repeat(T, 1, 1, 1))).unflatten(0, (T, -1))
        y = self.pool(self.spikes(y).flatten(0, 1)).flatten(1)
        return self.out(self.fc(y).unflatten(0, (T, -1))).sum(0)


class Loop(nn.Module):
    """A sequence, one step after another, with a reset at the next step and a start of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.spikes = cuda.LIFNode(tau=2.0, step_mode="s", reset_at="next", v_0=1.25)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.spikes(self.fc(x)) for x in x_seq])


class Rolling(nn.Module):
    """A loop whose layer is fed its own spikes of the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.back = nn.Linear(6, 8), nn.Linear(8, 8)
        self.spikes = cuda.LIFNode(tau=2.0, step_mode="s")

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        found = [torch.zeros(x_seq.shape[1], 8)]
        for x in x_seq:
            found.append(self.spikes(self.fc(x) + self.back(found[-1])))
        return torch.stack(found[1:]).mean(0)


def _on_a_grid(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randint(-8, 9, p.shape, generator=generator) / 8
    return net.eval()


def _image(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 9, (N, 1, 6, 6), generator=torch.Generator().manual_seed(seed)) / 8


def _normalised() -> nn.Module:
    net = _on_a_grid(Net(norm=True))
    net.norm.running_mean.normal_(0, 0.3)
    net.norm.running_var.uniform_(0.5, 2)
    return net


def _compiled(net: nn.Module, x: torch.Tensor, path: Path, **options: Any) -> Path:
    dtype = options.pop("dtype", None)
    program = deploy.convert(net, (x,), target="cuda", dtype=dtype)
    deploy.compile(program, path, cache=False, probe=True, **options)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(_on_a_grid(Net()), _image(), tmp_path_factory.mktemp("cuda") / "artifact")


@pytest.fixture(scope="module")
def model(artifact: Path) -> deploy.Model:
    return deploy.load(artifact)


def test_outputs_and_spikes_are_those_of_the_reference(model, tmp_path) -> None:
    net, x = _on_a_grid(Net()), _image(1)
    program = deploy.convert(net, (_image(),), target="reference")
    deploy.compile(program, tmp_path / "reference", cache=False, probe=True)
    with deploy.load(tmp_path / "reference") as reference, torch.no_grad():
        expected, fired = reference.probe(x)
        found, ours = model.probe(x)
        assert torch.equal(found, expected)
        assert torch.equal(model(x), net(x))
        assert ours.keys() == fired.keys() == {"spikes", "out"}
        for name in fired:
            assert torch.equal(ours[name], fired[name])
            assert 0.05 < fired[name].mean() < 0.9
        assert torch.equal(model(x[:2]), expected[:2])


def test_recorded_outputs_come_again_bit_for_bit(artifact) -> None:
    verification = deploy.Artifact.open(artifact).verify()
    assert verification.ok
    assert verification.source == "device"


def test_neurons_stay_whole_and_a_static_drive_is_not_repeated() -> None:
    program = deploy.convert(_normalised(), (_image(),), target="cuda", verify=False)
    assert [s.layout for s in program.sites] == ["static", "flat"]
    assert program.shape(program.sites[0].drives[0]) == (N, 4, 6, 6)
    assert "batch_norm" not in str(program)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
def test_a_layout_keeps_a_repeat_over_time(order) -> None:
    base = torch.rand(8, 6, 10)[::2, ::2, ::2].permute(order)
    x, lay = kernels.layout(base.expand(T, *base.shape))
    assert x.stride(0) == 0
    assert torch.equal(x, base.expand(T, *base.shape))
    assert lay.strides[0] == base.numel()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_step_by_step_networks(dtype, tmp_path) -> None:
    net = _on_a_grid(Loop())
    x = torch.randint(-4, 9, (T, N, 6), generator=torch.Generator().manual_seed(2)) / 8
    _compiled(net, x, tmp_path / "loop", dtype=dtype)
    with deploy.load(tmp_path / "loop") as model, torch.no_grad():
        found, fired = model.probe(x)
        expected = net.spikes.neuron.multi_step(net.fc(x))
        assert torch.equal(found, expected)
        assert torch.equal(fired["spikes"], expected)
        assert 0.1 < expected.mean() < 0.9


def test_float16_rounds_weights_once_and_neurons_not_at_all(tmp_path) -> None:
    net, x = _normalised(), _image(3)
    program = deploy.convert(net, (x,), target="cuda", dtype="float16")
    assert {p.name for p in program.history if p.done} >= {"absorb_batch_norm", "cast_float16"}
    assert {t.dtype for s in program.sites for t in s.neuron.tensors().values()} == {torch.float32}
    assert program.rounded <= {"conv.absorbed_norm_bias", "fc.weight", "fc.bias"}
    deploy.compile(program, tmp_path / "half", cache=False, probe=True)
    with deploy.load(tmp_path / "half") as model:
        report = deploy.compare(net, model, [(x, torch.zeros(N, dtype=torch.int64))])
        assert report.explained, str(report)
        assert report.probed == N
        assert model.dtype == torch.float16


def test_the_graph_in_torch_computes_in_float16_as_the_kernels_do(tmp_path) -> None:
    net, x = _on_a_grid(Net()), _image(4)
    net.spikes.tau.copy_(torch.tensor([2.1, 3.3, 5.7, 9.9]).reshape(4, 1, 1))
    program = deploy.convert(net, (x,), target="cuda", dtype="float16")
    deploy.compile(program, tmp_path / "half", cache=False)
    with deploy.load(tmp_path / "half") as model, torch.no_grad():
        assert torch.equal(model(x), program(x))


def test_a_tensor_made_in_the_graph_is_made_on_the_device(tmp_path) -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spikes = IFNode()

        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            return self.spikes(x_seq) + torch.arange(3.0)

    x = torch.rand(T, N, 3)
    _compiled(Offset(), x, tmp_path / "offset")
    with deploy.load(tmp_path / "offset") as model:
        assert torch.equal(model(x), Offset()(x))


def test_options(artifact, tmp_path) -> None:
    program = deploy.convert(_on_a_grid(Net()), (_image(),), target="cuda", verify=False)
    with pytest.raises(UsageError, match="cuda has no option grahp; there are graph"):
        deploy.compile(program, tmp_path / "a", cache=False, grahp=False)
    with pytest.raises(UsageError, match="graph is 'no'; allowed: True, False"):
        deploy.compile(program, tmp_path / "a", cache=False, graph="no")
    for dtype in ("bfloat16", "float64"):
        with pytest.raises(UsageError, match="allowed: float16, float32"):
            deploy.convert(_on_a_grid(Net()), (_image(),), target="cuda", dtype=dtype)
    with pytest.raises(UsageError, match=r"float32 or float16, not in torch.bfloat16"):
        get("cuda").passes(torch.bfloat16)


def test_without_a_graph_it_computes_the_same(model, tmp_path) -> None:
    path = _compiled(_on_a_grid(Net()), _image(), tmp_path / "launched", graph=False)
    with deploy.load(path) as launched:
        assert launched.manifest["compile_options"] == {"graph": False}
        assert torch.equal(launched(_image(5)), model(_image(5)))


def test_a_device_that_is_not_there(artifact) -> None:
    with pytest.raises(DeviceError, match=r"no device 99; there are 0 \("):
        deploy.load(artifact, device=99)


def test_a_neuron_without_a_kernel_is_named() -> None:
    @dynamics
    def Cubed(v: Any, x: Any) -> Any:  # noqa: N802
        return v + (x * x + 1.0) ** 1.5

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Node(Cubed), Node(Cubed)

        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x_seq))

    x = torch.rand(T, N, 3)
    found = deploy.check(Odd(), (x,), ["cuda"])
    assert [f.where for f in found.errors] == ["first", "second"]
    assert "Cubed" in found.errors[0].found
    assert "powers" in found.errors[0].found
    with pytest.raises(UnsupportedError, match=r"(?s)first.*Cubed.*powers.*second.*Cubed"):
        deploy.convert(Odd(), (x,), target="cuda")


def test_no_gpu(artifact, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetUnavailableError, match=r"no CUDA GPU: torch .*TRITON_INTERPRET=1"):
        deploy.load(artifact)
    assert not deploy.check(_on_a_grid(Net()), (_image(),), ["cuda"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is used")
def test_the_interpreter_is_named() -> None:
    sdk = get("cuda").sdk()
    assert sdk.simulated
    assert sdk.settings["kernels"] == "interpreted on the CPU, no CUDA graphs"


def test_pooling_and_bias_are_part_of_the_neurons_kernel(artifact, monkeypatch) -> None:
    called: dict[Any, Any] = {}
    call = graphs.ChannelsInnermost.call_function

    def spy(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        called[target] = args
        return call(self, target, args, kwargs)

    monkeypatch.setattr(graphs.ChannelsInnermost, "call_function", spy)
    with deploy.load(artifact) as model, torch.no_grad():
        assert torch.equal(model(_image(8)), _on_a_grid(Net())(_image(8)))
    assert aten.max_pool2d.default not in called
    assert called[aten.conv2d.default][2] is None
    assert _on_a_grid(Net()).conv.bias.abs().min() > 0


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("kind", ["LIF", "learned"])
def test_potentials_come_from_the_kernel_that_gives_the_spikes(
    kind, step_mode, tmp_path, monkeypatch
) -> None:
    """torch multiplies by 1 / tau on a GPU, by which spikes and potentials would be of two layers."""
    made = {
        "LIF": lambda: cuda.LIFNode(tau=2.5, **how),
        "learned": lambda: cuda.ParametricLIFNode(init_tau=2.7, **how),
    }
    how = {"backend": "torch", "step_mode": step_mode, "store_v_seq": step_mode == "m"}

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spikes = made[kind]()

        def forward(self, x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if step_mode == "m":
                return self.spikes(x_seq), self.spikes.v_seq
            steps = [(self.spikes(x), self.spikes.v) for x in x_seq]
            return torch.stack([spikes for spikes, _ in steps]), torch.stack([v for _, v in steps])

    net = Both().eval()
    x = 2 * torch.rand(T, N, 6, generator=torch.Generator().manual_seed(3))
    artifact, launched = _compiled(net, x, tmp_path / "both", graph=False), list[str]()
    launch = kernels.Call.launch

    def spy(call: Any, source: str, name: str, tensors: Any) -> None:
        launched.append(name)
        launch(call, source, name, tensors)

    monkeypatch.setattr(kernels.Call, "launch", spy)
    monkeypatch.setattr(Neuron, "states", None)
    with deploy.load(artifact) as model, torch.no_grad():
        for found, expected in zip(model(x), net(x), strict=True):
            assert torch.equal(found, expected)
            assert expected.any()
    assert launched == ["forward"]


# On a GPU


@pytest.mark.gpu
def test_a_replay_computes_anew_and_leaves_earlier_results_alone(model) -> None:
    net = _on_a_grid(Net())
    with torch.no_grad():
        first, second = model(_image(6)), model(_image(7))
        assert torch.equal(first, net(_image(6)))
        assert torch.equal(second, net(_image(7)))
    assert not torch.equal(first, second)


@pytest.mark.gpu
def test_inputs_on_the_gpu_give_outputs_there(model) -> None:
    x = [_image(seed).cuda() for seed in range(20)]
    found = [model(each) for each in x]
    assert {y.device.type for y in found} == {"cuda"}
    with torch.no_grad():
        for each, y in zip(x, found, strict=True):
            assert torch.equal(y.cpu(), _on_a_grid(Net())(each.cpu()))


@pytest.mark.gpu
def test_calls_on_several_streams_do_not_overwrite_each_other(model) -> None:
    x = [_image(seed).cuda() for seed in range(20)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    for i, each in enumerate(x):
        with torch.cuda.stream(streams[i % 3]):
            found.append(model(each))
    torch.cuda.synchronize()
    with torch.no_grad():
        for each, y in zip(x, found, strict=True):
            assert torch.equal(y.cpu(), _on_a_grid(Net())(each.cpu()))


@pytest.mark.gpu
def test_several_models_at_once(artifact, tmp_path) -> None:
    half = _compiled(_on_a_grid(Net()), _image(), tmp_path / "half", dtype="float16")
    models = [deploy.load(path) for path in (artifact, half, artifact)]
    with torch.no_grad():
        for seed in range(4):
            expected = _on_a_grid(Net())(_image(seed))
            for each in models:
                assert torch.equal(each(_image(seed)), expected)
    models.pop().close()
    with torch.no_grad():
        assert torch.equal(models[0](_image(9)), _on_a_grid(Net())(_image(9)))


@pytest.mark.gpu
def test_settings_of_torch_are_left_as_they_were(artifact) -> None:
    # matmul's settings are no attributes that monkeypatch could put back: it would delete them.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        before = (matmul.allow_fp16_reduced_precision_reduction, cudnn.allow_tf32)
        with deploy.load(artifact) as model:
            model(_image())
        assert matmul.allow_tf32
        assert (matmul.allow_fp16_reduced_precision_reduction, cudnn.allow_tf32) == before
        assert not cudnn.deterministic
    finally:
        matmul.allow_tf32 = allowed


@pytest.mark.gpu
def test_what_cannot_be_captured_is_refused_and_runs_without_a_graph(tmp_path) -> None:
    target, x = get("cuda"), torch.tensor([-1.0, 2.0, 3.0])
    program = deploy.convert(nn.ReLU(), (x,), target="cuda", verify=False)

    def written(name: str, graph: bool) -> Path:
        path = tmp_path / name
        path.mkdir()
        target.compile(program, path, {"graph": graph})
        file = path / "graph.json"
        nodes = json.loads(file.read_text())
        call = next(n for n in nodes if n["op"] == "call_function")
        call["target"] = "aten.nonzero.default"  # waits for the device, which a capture cannot
        file.write_text(json.dumps(nodes))
        return path

    ports = [((3,), torch.float32)]
    with pytest.raises(DeviceError, match=r"cannot be captured.*graph=False"):
        target.load(written("graph", graph=True), ports, ports, 0)
    loaded = target.load(written("launched", graph=False), ports, ports, 0)
    assert loaded.run([x])[0].flatten().tolist() == [0, 1, 2]


@pytest.mark.gpu
def test_too_large_for_the_device(artifact) -> None:
    huge = [((1 << 44,), torch.float32)]
    with pytest.raises(DeviceError, match=r"GiB free.*smaller example input"):
        get("cuda").load(artifact / "device", huge, huge, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("kind", "shape"), [(Net, (N, 1, 6, 6)), (Rolling, (T, N, 6))])
def test_all_steps_equal_one_call(kind, shape, dtype, tmp_path):
    net, x = _on_a_grid(kind()), torch.randint(-4, 5, shape) / 4
    found = []
    for time in ("unrolled", "stepped"):
        program = deploy.convert(net, (x,), target="cuda", dtype=dtype, time=time, verify=False)
        deploy.compile(program, tmp_path / time, cache=False)
        with deploy.load(tmp_path / time) as model:
            found.append(model(x))
            if time == "stepped":
                steps = [model.step(now) for now in (x if kind is Rolling else [x] * T)]
                assert torch.equal(steps[-1], found[-1])
                assert model.state["spikes.v"].dtype == torch.float32
    assert torch.equal(*found)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_what_a_neuron_computes_of_its_parameters_is_computed_here(
    step_mode, tmp_path, monkeypatch
) -> None:
    """A GPU's sigmoid is another in the last bit; on this grid that would cost spikes."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spikes = cuda.ParametricLIFNode(init_tau=2.7, step_mode=step_mode, backend="torch")

        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            if step_mode == "m":
                return self.spikes(x_seq)
            return torch.stack([self.spikes(x) for x in x_seq])

    net = Learned().eval()
    x = torch.randint(-4, 20, (T, N, 6), generator=torch.Generator().manual_seed(2)) / 8
    artifact, sources = _compiled(net, x, tmp_path / "learned"), list[str]()
    compiled = kernels.compiled

    def spy(source: str, name: str) -> Any:
        sources.append(source)
        return compiled(source, name)

    monkeypatch.setattr(kernels, "compiled", spy)
    with deploy.load(artifact) as model, torch.no_grad():
        assert torch.equal(model(x), net(x))
    assert sources
    assert not [s for s in sources if "sigmoid" in s]
