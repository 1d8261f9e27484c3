"""The cast to float16: what overflows, what it flushes, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Net, rand, reference
from rewriting import EXACT, report, shapes_are_true
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.errors import UnsupportedError
from spikeport.converters.neurons import IF, IFNode, Node
from spikeport.converters.passes import cast_float16
from spikeport.converters.program import Program

T, N = 4, 2


def lowered(net: nn.Module, *inputs: torch.Tensor) -> Program:
    program = capture(net, inputs)
    for rewrite in EXACT:
        program = rewrite(program)
    return program


def test_the_cast_names_every_layer_that_overflows() -> None:
    net = nn.Sequential(nn.Linear(3, 3), IFNode(), nn.Sequential(nn.Linear(3, 2, bias=False)))
    with torch.no_grad():
        net[0].bias[1] = 1e5
        net[2][0].weight[0, 0] = -7e4
    with pytest.raises(UnsupportedError) as caught:
        cast_float16(lowered(net, rand(T, N, 3)))
    found = [(f.rule, f.where) for f in caught.value.findings]
    assert found == [("float16-overflow", "0"), ("float16-overflow", "2.0")]
    assert "0.bias reaches 100000" in caught.value.findings[0].found


def test_the_cast_refuses_a_scalar_that_overflows() -> None:
    net = nn.Sequential(nn.Linear(3, 3), IFNode(v_threshold=1e5, v_reset=None))
    with pytest.raises(UnsupportedError) as caught:
        cast_float16(lowered(net, rand(T, N, 3)))
    assert [(f.rule, f.where) for f in caught.value.findings] == [("float16-overflow", "1")]


@pytest.mark.parametrize("threshold", [1e9, torch.tensor([1e9, 0.5, 1e5])])
@pytest.mark.parametrize("fires", [">=", ">"])
def test_a_threshold_that_no_potential_reaches(fires: Any, threshold: Any) -> None:
    """As for neurons that never fire, of which the potential is read; a hard reset takes nothing off."""
    net = nn.Sequential(nn.Linear(3, 3), Node(IF, v_threshold=threshold, fires=fires))
    x = rand(T, N, 3) * 1000
    spikes = cast_float16(lowered(net, x))(x)
    assert torch.equal(spikes, net(x))
    assert spikes.any() == isinstance(threshold, torch.Tensor)


def test_the_cast_takes_no_place_or_size_for_a_value() -> None:
    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., 1:]

    program = capture(nn.Sequential(nn.Linear(3, 3), Last()), (rand(T, N, 3),))
    assert any(2**63 - 1 in n.args for n in program.graph.nodes)
    assert cast_float16(program).dtype == torch.float16


def test_the_cast_counts_what_it_flushes() -> None:
    net = nn.Sequential(nn.Linear(3, 3), IFNode())
    with torch.no_grad():
        net[0].weight[0] = 1e-9
    program = cast_float16(lowered(net, rand(T, N, 3)))
    assert "0.weight: 3 of 9 weights flushed to 0" in report(program, "cast_float16").done
    assert program.dtype == torch.float16
    kinds = {n.meta["val"].dtype for n in program.graph.nodes if "val" in n.meta}
    assert kinds == {torch.float16, torch.bool}
    assert shapes_are_true(program, (rand(T, N, 3),))


@pytest.mark.parametrize("fires", [">=", ">"])
@pytest.mark.parametrize("threshold", [1.0, 0.1, 1 / 3, torch.tensor([0.1, 0.7, 1.3])])
def test_the_cast_keeps_every_comparison(fires: Any, threshold: Any) -> None:
    """On float16 membranes around the threshold, it fires where the float32 threshold says so."""
    net = nn.Sequential(IFNode(v_threshold=threshold, fires=fires))
    base = torch.as_tensor(threshold).half()
    ulp = (torch.nextafter(base, base * 2) - base).float()
    x = torch.stack([base.float() + k * ulp for k in range(-3, 4)]).reshape(1, 7, -1)
    program = cast_float16(lowered(net, x))
    assert torch.equal(program(x), reference(net, x))


def test_the_cast_keeps_integers() -> None:
    net = Net(lambda s, i: s.spike(s.table(i)), table=nn.Embedding(5, 3), spike=IFNode())
    x = torch.arange(T * N).reshape(T, N) % 5
    program = cast_float16(lowered(net, x))
    assert program.inputs[0].dtype == torch.int64
    assert program(x).shape == (T, N, 3)
