"""Networks of every shape become graphs; how they are left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import SingleStep, captured, findings, rules
from networks import Net, equal, rand, reference
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.errors import UsageError
from spikeport.converters.neurons import (
    IFNode,
    LIFNode,
    ParametricLIFNode,
)
from spikeport.converters.program import short

T, N = 4, 2

pytestmark = pytest.mark.usefixtures("single_step")


# Topology


def test_paths_T_and_names() -> None:  # noqa: N802
    net = nn.Sequential(nn.Linear(5, 6), nn.Sequential(IFNode(), nn.Linear(6, 3)), LIFNode())
    program = captured(net, rand(T, N, 5))
    assert [s.name for s in program.sites] == ["1.0", "2"]
    assert [s.path for s in program.sites] == ["1.0", "2"]
    assert (program.T, program.batch) == (T, N)
    assert [str(s) for s in program.inputs] == [f"input float32[{T}, {N}, 5]"]
    assert program.source["class"].endswith("Sequential")
    assert {n.meta["path"] for n in program.nodes("call_function")} == {"0", "1.0", "1.1", "2"}


def test_residual_addition() -> None:
    net = Net(
        lambda s, x: s.spike2(s.conv2(s.spike1(s.conv1(x.flatten(0, 1)).unflatten(0, (T, N)))
                                      .flatten(0, 1)).unflatten(0, (T, N))) + x,
        conv1=nn.Conv2d(3, 3, 3, padding=1), spike1=IFNode(),
        conv2=nn.Conv2d(3, 3, 3, padding=1), spike2=IFNode(),
    )  # fmt: skip
    program = captured(net, rand(T, N, 3, 6, 6))
    assert [s.path for s in program.sites] == ["spike1", "spike2"]


def test_functional_calls_and_constants() -> None:
    offset = torch.linspace(-1, 1, 5)

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.linear(x, s.first.weight)) + offset
        x = torch.cat([s.spike(x), torch.ones_like(x)], dim=-1)
        return F.avg_pool1d(x.flatten(0, 1), 2).mean(0)

    captured(Net(run, first=nn.Linear(5, 5), spike=LIFNode()), rand(T, N, 5))


def test_several_inputs_and_outputs() -> None:
    def run(s: Any, events: torch.Tensor, image: torch.Tensor) -> dict[str, Any]:
        x = s.spike(s.a(events) + s.b(image))
        return {"spikes": x, "rate": (x.mean(0), x.sum(0)), "list": [image * 2]}

    net = Net(run, a=nn.Linear(5, 4), b=nn.Linear(3, 4), spike=IFNode())
    program = captured(net, rand(T, N, 5), rand(N, 3, seed=1))
    assert [s.name for s in program.outputs] == [f"output_{i}" for i in range(4)]
    result = program(rand(T, N, 5), rand(N, 3))
    assert set(result) == {"spikes", "rate", "list"}
    assert isinstance(result["rate"], tuple)
    with pytest.raises(UsageError, match=r"input .*: got \[1, 5\].*static"):
        program(rand(1, 5), rand(N, 3))
    with pytest.raises(UsageError, match="1 inputs given, 2 wanted"):
        program(rand(T, N, 5))


def test_an_input_that_is_returned() -> None:
    captured(Net(lambda s, x: (x, s.spike(x)), spike=IFNode()), rand(T, N, 3))


def test_an_input_that_is_not_used() -> None:
    captured(Net(lambda s, x, y: s.spike(x), spike=IFNode()), rand(T, N, 3), rand(N, seed=2))


def test_an_output_twice() -> None:
    def run(s: Any, x: torch.Tensor) -> Any:
        y = s.spike(x)
        return y, y

    captured(Net(run, spike=IFNode()), rand(T, N, 3))


def test_a_shared_neuron_is_two_sites() -> None:
    net = Net(lambda s, x: s.spike(s.fc(s.spike(x))), fc=nn.Linear(3, 3), spike=LIFNode())
    program = captured(net, rand(T, N, 3))
    assert [(s.name, s.path) for s in program.sites] == [("spike", "spike"), ("spike#2", "spike")]


def test_one_module_under_two_names() -> None:
    spike = LIFNode()
    net = nn.Sequential(spike, nn.Linear(3, 3), spike)
    program = captured(net, rand(T, N, 3))
    assert [s.path for s in program.sites] == ["0", "2"]


def test_a_shared_layer_keeps_one_weight() -> None:
    net = Net(lambda s, x: s.fc(s.spike(s.fc(x))), fc=nn.Linear(3, 3), spike=IFNode())
    assert set(captured(net, rand(T, N, 3)).tensors) == {"fc.weight", "fc.bias"}


def test_a_time_loop_over_single_steps() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        return sum(s.b(s.fc(s.a(x))) for _ in range(T)) / T

    net = Net(run, fc=nn.Linear(3, 3), a=SingleStep(), b=SingleStep())
    program = captured(net, rand(N, 3))
    assert [(s.name, s.T, s.layout) for s in program.sites] == [
        ("a", T, "steps"),
        ("b", T, "steps"),
    ]


def test_a_time_loop_with_in_place_writes() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for t in range(T):
            y[t] = s.spike(x[t])
            y[t, :, 0] += 1
        y += 0.5
        return y

    net = Net(run, spike=SingleStep())
    program = captured(net, rand(T, N, 3))
    assert not any(n.target._schema.is_mutable for n in program.nodes("call_function")
                   if hasattr(n.target, "_schema"))  # fmt: skip


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x[1:3].zero_(),
        lambda x: x[:, :, 1:2].mul_(2),
        lambda x: x[-1].add_(1),
        lambda x: x[:, 0].fill_(3),
        lambda x: x[::2].neg_(),
        lambda x: x.select(2, -1).add_(x.select(2, 0)),
        lambda x: x.copy_(x.flip(0)),
        lambda x: x[:-1].copy_(x[1:].clone()),
        lambda x: x.relu_(),
        lambda x: x.clamp_(0, 1),
        lambda x: x[..., 2].fill_(1.5),
        lambda x: x[T - 1 : T].zero_(),
        lambda x: x[5:].zero_(),
        lambda x: x[:-1, 1:].add_(1),
    ],
    ids=range(14),
)
def test_in_place_writes(write: Callable[[torch.Tensor], Any]) -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = s.fc(x)
        write(x)
        return s.spike(x)

    captured(Net(run, fc=nn.Linear(3, 3), spike=IFNode()), rand(T, N, 3))


def test_an_in_place_neuron_loop_over_lists() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        rows = [s.spike(s.fc(x[t])) for t in range(T)]
        return torch.stack(rows[::-1], dim=1)

    captured(Net(run, fc=nn.Linear(3, 3), spike=SingleStep()), rand(T, N, 3))


def test_T_comes_from_the_neurons_input() -> None:  # noqa: N802
    net = Net(lambda s, x: s.spike(x.unsqueeze(0).repeat(6, 1, 1)).mean(0), spike=IFNode())
    assert capture(net, (rand(N, 3),)).T == 6


def test_layers_of_different_T() -> None:  # noqa: N802
    net = Net(lambda s, x: s.b(s.a(x)[::2]), a=IFNode(), b=IFNode())
    program = captured(net, rand(T, N, 3))
    assert [s.T for s in program.sites] == [4, 2]
    assert program.T is None


def test_permuted_drives() -> None:
    net = Net(lambda s, x: s.b(s.a(x.permute(1, 0, 2)).transpose(0, 1)), a=IFNode(), b=LIFNode())
    captured(net, rand(3, 3, 3))


def test_a_step_taken_out_of_a_stack_is_that_step() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        spikes = torch.stack([self.spike(x[t]) for t in range(T)], dim=-1)
        return spikes[..., -1], spikes[0]

    program = captured(Net(run, spike=SingleStep()), rand(T, N, 3))
    selected = [
        n.args[0].op for n in program.nodes("call_function") if short(n.target) == "aten.select"
    ]
    assert selected.count("placeholder") == T
    assert len(selected) == T + 1


def test_dropout_and_batch_norm_evaluate() -> None:
    net = nn.Sequential(
        nn.Flatten(2), nn.Linear(6, 4), nn.Dropout(0.5), IFNode(), nn.Flatten(0, 1),
        nn.BatchNorm1d(4),
    )  # fmt: skip
    with torch.no_grad():
        net(rand(T, N, 2, 3, seed=3))
    program = captured(net.train(), rand(T, N, 2, 3))
    assert "aten.dropout" not in str(program)


def test_learned_parameters_are_weights_of_the_graph() -> None:
    program = captured(nn.Sequential(ParametricLIFNode(init_tau=3.0)), rand(T, N, 3))
    assert set(program.tensors) == {"0.w"}
    assert torch.is_tensor(program.sites[0].neuron.params["w"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 3), LIFNode(), nn.Linear(3, 2)).to(dtype)
    program = capture(net, (rand(T, N, 3).to(dtype),))
    assert program.dtype == dtype
    assert equal(program(rand(T, N, 3).to(dtype)), reference(net, rand(T, N, 3).to(dtype)))


def test_integer_inputs() -> None:
    net = Net(lambda s, x: s.spike(s.embed(x)), embed=nn.Embedding(10, 3), spike=IFNode())
    x = torch.arange(T * N).reshape(T, N)
    program = capture(net, (x,))
    assert program.dtype == torch.float32
    assert equal(program(x), reference(net, x))


def test_a_network_without_neurons() -> None:
    program = captured(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), rand(N, 3))
    assert program.sites == ()
    assert program.T is None


@pytest.mark.parametrize("kind", ["channels_last", "strided", "expanded"])
def test_memory_layout_of_the_inputs(kind: str) -> None:
    x = rand(N, 4, 6, 6)
    x = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "strided": rand(N, 4, 6, 12)[..., ::2],
        "expanded": rand(1, 4, 6, 6).expand(N, 4, 6, 6),
    }[kind]

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.conv(x)
        y = s.spike(y.unsqueeze(0).repeat(T, 1, 1, 1, 1))
        return s.fc(y.flatten(2)).mean(0)

    net = Net(run, conv=nn.Conv2d(4, 4, 3), spike=LIFNode(), fc=nn.Linear(64, 3))
    captured(net, x)
    captured(net.to(memory_format=torch.channels_last), x)


# What the network is left as


def test_the_network_is_left_as_it_was() -> None:
    calls: list[int] = []
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), SingleStep())
    net = Net(
        lambda s, x: torch.stack([s.body(x[t]) for t in range(T)]), body=net, multi=LIFNode()
    ).train()
    net.body[2].v = torch.ones(N, 3)
    net.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(net.state_dict())
    modules = [id(m) for m in net.modules()]
    capture(net, (rand(T, N, 3),))
    assert [id(m) for m in net.modules()] == modules
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(net.body[2].v, torch.ones(N, 3))
    assert len(net._forward_hooks) == 1
    assert [len(m._forward_hooks) for m in net.children()] == [0, 0]


def test_state_that_is_left_over_is_not_taken() -> None:
    net = Net(lambda s, x: torch.stack([s.spike(x[t]) for t in range(T)]), spike=SingleStep())
    x = rand(T, N, 3)
    expected = reference(net, x)
    net.spike.v = torch.full((N, 3), 0.9)
    assert equal(capture(net, (x,))(x), expected)


def test_the_inputs_are_left_as_they_were() -> None:
    x = rand(T, N, 3)
    before = x.clone()
    found = findings(Net(lambda s, x: s.spike(x.add_(1)), spike=IFNode()), x)
    assert rules(found) == [("input-written", "")]
    assert torch.equal(x, before)
