"""Networks as they come: wrapped, normalised, pruned, without a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from capturing import captured, findings
from networks import Net, SideBySide, different, rand
from torch import nn
from torch.nn.utils import prune

from spikeport import deploy
from spikeport.converters.capture import capture
from spikeport.converters.errors import UsageError
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.converters.program import Time

T, N = 4, 2


def snn() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), IFNode(), nn.Linear(6, 3), LIFNode())


class Within(nn.Module):
    """A network that runs inside a setting of torch's."""

    def __init__(self, region: Callable[[], Any]) -> None:
        super().__init__()
        self.net, self.region = snn(), region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.region():
            spikes: torch.Tensor = self.net(x)
            return spikes


@pytest.mark.parametrize(
    "region",
    [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cuda", dtype=torch.float16),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=False),
    ],
    ids=["no_grad", "enable_grad", "inference_mode", "autocast of a GPU", "no autocast"],
)
def test_a_forward_with_settings_of_torch(region: Callable[[], Any]) -> None:
    program = captured(Within(region), rand(T, N, 5))
    assert [s.path for s in program.sites] == ["net.1", "net.3"]


def test_autocast_inside_the_forward() -> None:
    found = findings(Within(lambda: torch.autocast("cpu", dtype=torch.bfloat16)), rand(T, N, 5))
    assert [f.rule for f in found] == ["autocast"]
    assert "torch.bfloat16" in found[0].found


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: prune.random_unstructured(
            prune.l1_unstructured(layer, "weight", 0.3), "weight", 0.2
        ),
    ],
    ids=[
        *("weight_norm", "spectral_norm", "parametrized weight_norm"),
        *("parametrized spectral_norm", "pruned", "pruned twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_weights_that_are_computed(change: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    net = snn()
    change(net[0])
    net(rand(T, N, 5)).sum().backward()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    x = rand(T, N, 5, seed=1)
    program = capture(net, (rand(T, N, 5),))
    with torch.no_grad():
        assert torch.equal(program(x), net.eval()(x))
    assert not [n for n in program.nodes("call_function") if "linear" not in str(n.target)][2:]
    assert kept.keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in kept.items())


def test_a_network_that_is_scripted() -> None:
    scripted = torch.jit.script(nn.Linear(5, 3))
    for net, where in ((scripted, "network is"), (nn.Sequential(scripted), "network at 0 is")):
        with pytest.raises(UsageError, match=f"the {where} a ScriptModule"):
            capture(net, (rand(T, N, 5),))


def test_a_network_in_a_wrapper(tmp_path: Path) -> None:
    net, x = snn(), rand(T, N, 5)
    expected = deploy.convert(net, (x,), target="onnx")
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        both = torch.compile(nn.DataParallel(net))
        for wrapper in (wrapped, nn.DataParallel(net), torch.compile(net), both):
            program = deploy.convert(wrapper, (x,), target="onnx")
            assert torch.equal(program(x), expected(x))
            assert [s.path for s in program.sites] == ["1", "3"]
        del wrapped, wrapper
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_neuron_inside() -> None:
    net, x = snn(), rand(T, N, 5)
    expected = deploy.convert(net, (x,), target="reference")
    net[1], net[2] = torch.compile(net[1]), torch.compile(nn.DataParallel(net[2]))
    program = deploy.convert(net, (x,), target="reference")
    assert torch.equal(program(x), expected(x))
    assert [s.path for s in program.sites] == ["1", "3"]
    assert type(net[1]).__name__ == "OptimizedModule"


class Attentive(nn.Module):
    """torch's attention, which in evaluation takes a path of its own that is not exported."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.fc, self.lif, self.attention = nn.Linear(5, 8), LIFNode(), attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lif(self.fc(x)).transpose(0, 1)
        if isinstance(self.attention, nn.MultiheadAttention):
            late = torch.ones(T, T, dtype=torch.bool).triu(1)
            return self.attention(y, y, y, attn_mask=late, need_weights=False)[0]
        return self.attention(y)


@pytest.mark.parametrize("target", ["onnx", "lynxi-sim"])
@pytest.mark.parametrize(
    "made",
    [
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ],
)
def test_attention_in_evaluation(made: Any, target: str) -> None:
    torch.manual_seed(0)
    net, x = Attentive(made()).eval(), rand(T, N, 5)
    program = deploy.convert(net, (x,), target=target)
    tolerance = 1e-5 if target == "onnx" else 0.05
    assert torch.allclose(program(x).float(), net(x), atol=tolerance)
    assert torch.backends.mha.get_fastpath_enabled()


class Image(nn.Module):
    """Without a batch all the way: [T, C, H, W] -> [T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 36, 3)
        self.spike, self.last = IFNode(), LIFNode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes: torch.Tensor = self.last(self.fc(self.spike(self.conv(x)).flatten(1)))
        return spikes


#: Networks that have the same time steps.
UNBATCHED: dict[str, dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "four steps": {"linear": (snn, (T, 5)), "image": (Image, (T, 1, 6, 6))},
    "two steps": {"linear": (snn, (2, 5))},
}


@cache
def unbatched(steps: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Networks side by side, and their inputs."""
    nets: dict[str, nn.Module] = {}
    for name, (make, _) in UNBATCHED[steps].items():
        torch.manual_seed(0)
        nets[name] = make()
        for weight in nets[name].parameters():
            weight.data = weight.abs() * 2  # untrained layers hardly fire
    inputs = tuple(rand(*shape).abs() for _, shape in UNBATCHED[steps].values())
    return SideBySide(nets).eval(), inputs


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["reference", "lynxi-sim", "onnx", "ipu-sim", "cuda"])
@pytest.mark.parametrize("steps", UNBATCHED)
def test_without_a_batch(steps: str, target: str, time: Time) -> None:
    net, inputs = unbatched(steps)
    program = deploy.convert(net, inputs, target=target, time=time)
    with torch.no_grad():
        expected, found = net(*inputs), program(*inputs)
    for name in UNBATCHED[steps]:
        assert expected[name].any(), name
        assert torch.equal(found[name].float(), expected[name]), name


# Numbers of several types


def gain(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.lif(x * net.gain.float())


def exact(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.lif((x >= 2).float())


BELOW = torch.full((T, N, 5), 1.9999)  # 2 in half precision


TYPES: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "parameter": (gain, (BELOW,)),
    "last input": (lambda net, x, y: net.lif(x + y.float() * 0), (BELOW, BELOW.half())),
    "first input": (lambda net, x, y: net.lif(x.float() + y * 0), (BELOW.half(), BELOW)),
    "doubles": (exact, (torch.full((T, N, 5), 2 - 1e-9, dtype=torch.float64),)),
    "unused parameter": (lambda net, x: net.lif(x), (BELOW,)),
}


@cache
def of_types(name: str) -> nn.Module:
    net = Net(TYPES[name][0], lif=LIFNode(v_threshold=1.0)).eval()
    net.gain = nn.Parameter(torch.ones(5, dtype=torch.float16))
    return net


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["reference", "onnx", "ipu-sim"])
@pytest.mark.parametrize("name", TYPES)
def test_numbers_keep_their_types(name: str, target: str, time: Time) -> None:
    if name == "doubles" and target == "ipu-sim":
        pytest.skip("it has no doubles")
    net, inputs = of_types(name), TYPES[name][1]
    example = tuple(rand(*x.shape).to(x.dtype) for x in inputs)
    program = deploy.convert(net, example, target, dtype="float32", time=time)
    assert program.dtype == (torch.float64 if name == "doubles" else torch.float32)
    with torch.no_grad():
        assert torch.equal(program(*inputs), net(*inputs))


WRITTEN: dict[str, tuple[torch.dtype, Callable[[torch.Tensor, torch.Tensor], Any]]] = {
    "column": (torch.int32, lambda o, x: o.__setitem__((slice(None), 0), x[:, 0] * 3)),
    "number": (torch.int32, lambda o, x: o.fill_(torch.tensor(1.7))),
    "copy": (torch.int32, lambda o, x: o.copy_(x[0] * 2)),
    "slice of truth values": (torch.bool, lambda o, x: o.__setitem__(slice(1, 2), x[1:2])),
    "truth values": (torch.bool, lambda o, x: o.__setitem__(1, x[1])),
    "halves": (torch.half, lambda o, x: o.__setitem__(slice(1, None), x[1:] / 3)),
}


class Writes(nn.Module):
    """Neurons after an input and what was written of it into a tensor of another type."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lif, (self.dtype, self.write) = LIFNode(), WRITTEN[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        written = torch.zeros(x.shape, dtype=self.dtype)
        self.write(written, x)
        spikes: torch.Tensor = self.lif(x + written.float())
        return spikes


@pytest.mark.parametrize("target", ["reference", "onnx", "lynxi-sim"])
def test_what_is_written_takes_the_type_of_what_it_is_written_into(target: str) -> None:
    net = SideBySide({name: Writes(name) for name in WRITTEN}).eval()
    inputs = [3 * rand(T, N, 5)] * len(WRITTEN)
    program = deploy.convert(net, inputs, target, dtype="float32")
    assert not different(program(*inputs), net(*inputs))


def test_a_word_of_python_as_a_name() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"class": nn.Linear(5, 5), "if": LIFNode()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers["if"](self.layers["class"](x))

    found = findings(Words(), rand(T, N, 5))
    assert [(f.where, f.fix) for f in found] == [
        ("layers.class", "rename it"),
        ("layers.if", "rename it"),
    ]
