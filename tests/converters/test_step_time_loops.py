"""Loops over time become their body: one step of them computes what all of them did."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
from networks import Net, rand
from steps import assert_steps_equal_the_call, findings, layer, rewritten
from torch import nn
from torch.utils import _pytree as pytree

from spikeport.converters.capture import capture
from spikeport.converters.errors import UnsupportedError
from spikeport.converters.neurons import LIF, Leaky, LIFNode, Neuron, Node
from spikeport.converters.passes import drop_unused_steps
from spikeport.converters.program import short
from spikeport.converters.sources.nir.layers import Cell

T, N = 4, 3


class Loop(nn.Module):
    """Written step by step, with a recurrent layer, a trace, and everything that loops return."""

    def __init__(self, recurrent: bool = True) -> None:
        super().__init__()
        self.fc, self.rec, self.out = layer(6, 5), layer(5, 5, 2), layer(5, 2, 4)
        self.lif, self.lif2 = LIFNode(), Node(Leaky, beta=0.8, v_reset=None)
        self.recurrent = recurrent

    def forward(self, x: torch.Tensor) -> Any:
        spikes = self.lif(self.fc(x))
        trace, first, count = torch.zeros(x.shape[1], 5), None, 0.0
        back, seen = torch.zeros(x.shape[1], 5), []
        for t in range(x.shape[0]):
            now = spikes[t] + (self.rec(back) if self.recurrent else 0.0)
            trace = trace * 0.5 + now
            back = (trace > 1).to(x.dtype)
            first = back if first is None else first + back
            count = count + back
            seen.append(trace)
        out = self.lif2(self.out(torch.stack(seen)))
        return out, trace, first, count / x.shape[0], torch.stack(seen), back


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_number_of_steps_in_the_example_does_not_matter(recurrent):
    net = Loop(recurrent=recurrent)
    a, b = (rewritten(net, rand(steps, N, 6)) for steps in (3, 8))
    assert str(a.graph) == str(b.graph)
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(v, b.tensors[name]) for name, v in a.tensors.items())
    x = rand(8, N, 6, seed=1)
    for p, q in zip(pytree.tree_leaves(a(x)), pytree.tree_leaves(b(x)), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_loop_becomes_its_body(recurrent):
    program = assert_steps_equal_the_call(Loop(recurrent), rand(T, N, 6))
    assert sum(short(n.target) == "aten.linear" for n in program.nodes("call_function")) == (
        3 if recurrent else 2
    )
    assert program.stepping.outputs == (0, None, None, None, 0, None)


def test_extremes_and_rows_that_a_loop_gathers():
    def run(n: Any, x: torch.Tensor) -> Any:
        trace, rows = torch.zeros(x.shape[1], 5), torch.tensor([])
        high = low = None
        for now in n.lif(n.fc(x)):
            trace = trace * 0.5 - now
            high = trace if high is None else torch.maximum(high, trace)
            low = trace if low is None else torch.minimum(trace, low)
            rows = torch.cat([rows, trace.unsqueeze(0)])
        return high, low, rows

    program = assert_steps_equal_the_call(Net(run, fc=layer(6, 5), lif=LIFNode()), rand(T, N, 6))
    assert program.stepping.outputs == (None, None, 0)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32])
def test_extremes_of_whole_numbers_and_truth_values(kind):
    def run(n: Any, x: torch.Tensor) -> Any:
        seen = [s.to(kind) for s in n.lif(n.fc(x))]
        whole = torch.stack(seen)
        loops = reduce(torch.maximum, seen), reduce(torch.minimum, seen)
        return *loops, whole.amax(0), whole.amin(0)

    net = Net(run, fc=layer(6, 5), lif=LIFNode()).eval()
    program, x = rewritten(net, rand(T, N, 6)), 3 * rand(9, N, 6, seed=1)
    for steps in (1, 2, T, 9):
        for found, expected in zip(program(x[:steps]), net(x[:steps]), strict=True):
            assert found.dtype == kind
            assert torch.equal(found, expected)


def changes(x: torch.Tensor) -> torch.Tensor:
    return x - torch.cat([torch.zeros(1, *x.shape[1:]), x[:-1]])


@pytest.mark.parametrize(
    ("use", "end"),
    [
        (lambda n, x, d, last: n.lif(n.fc(d)), lambda d: d),
        (lambda n, x, d, last: n.lif(n.fc(x)) * d.sum(1, keepdim=True), lambda d: d * 2),
        (lambda n, x, d, last: torch.cat([n.lif(n.fc(x)), d + last], 1), lambda d: d[0].sum()),
    ],
    ids=["drive", "factor", "delayed"],
)
@pytest.mark.parametrize("batch", [1, N])
def test_one_step_of_a_sequence_has_no_dimension_for_time(use, end, batch):
    def run(n: Any, x: torch.Tensor) -> Any:
        n.lif.reset()
        last, seen = torch.zeros(x.shape[1:]), []
        for x_t, d_t in zip(x, changes(x), strict=True):
            seen.append(use(n, x_t, d_t, last))
            last = d_t
        return torch.stack(seen), end(last)

    cell = Cell(Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}), True)
    net, stream = Net(run, fc=layer(6, 5), lif=cell), 3 * rand(9, batch, 6, seed=1)
    program = assert_steps_equal_the_call(net, rand(T, batch, 6))
    with torch.no_grad():
        for steps in (1, 2, 9):
            for y, expected in zip(program(stream[:steps]), net(stream[:steps]), strict=True):
                assert y.shape == expected.shape
                assert torch.allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells(cell):
    def run(n: Any, x: torch.Tensor) -> torch.Tensor:
        h, seen = torch.zeros(x.shape[1], 5), []
        state = (h, h) if cell is nn.LSTMCell else h
        for now in x:
            state = n.cell(now, state)
            seen.append(state[0] if cell is nn.LSTMCell else state)
        return n.lif(torch.stack(seen) * 3)

    torch.manual_seed(0)
    assert_steps_equal_the_call(Net(run, cell=cell(6, 5), lif=LIFNode()), rand(T, N, 6))


def test_a_loop_that_writes_each_step_to_its_place():
    def run(n: Any, x: torch.Tensor) -> Any:
        spikes, seen = n.lif(n.fc(x)), torch.zeros(x.shape[1], T, 5)
        trace = torch.zeros(x.shape[1], 5)
        for t in range(T):
            trace = trace * 0.5 + spikes[t]
            seen[:, t] = trace
        return seen, n.lif2(seen.transpose(0, 1))

    net = Net(run, fc=layer(6, 5), lif=LIFNode(), lif2=LIFNode())
    program = assert_steps_equal_the_call(net, rand(T, N, 6))
    assert program.stepping.outputs == (1, 0)


def _loop(step: Any, end: Any) -> Net:
    """Traces a and b of spikes, and the spikes s, through one step after the other."""

    def run(n: Any, x: torch.Tensor) -> Any:
        spikes, seen = n.lif(n.fc(x)), []
        a = b = torch.zeros(x.shape[1], 5)
        for s in spikes:
            a, b = step(s, a, b)
            seen.append(a)
        return end(spikes, a, b, torch.stack(seen))

    return Net(run, fc=layer(6, 5), lif=LIFNode())


@pytest.mark.parametrize(
    "end",
    [
        lambda s, a, b, seen: (a + s[-1], a),
        lambda s, a, b, seen: (a.sum(1), a + b),
        lambda s, a, b, seen: (a * 2 + a, a),
        lambda s, a, b, seen: (a + s.mean(0), seen[-1], seen.sum(2)[-1]),
        lambda s, a, b, seen: (seen.sum(), seen.mean(), s[-1].sum(1)),
    ],
)
@pytest.mark.parametrize(
    "step",
    [lambda s, a, b: (a + s, b * 0.5 + s), lambda s, a, b: ((a * 0.5 + b) + s, b * 0.25 + s)],
)
def test_what_is_made_of_the_last_step_is_no_step_of_the_loop(step, end):
    net, stream = _loop(step, end), rand(9, N, 6, seed=1)
    program = assert_steps_equal_the_call(net, rand(T, N, 6))
    with torch.no_grad():
        for y, expected in zip(program(stream), net(stream), strict=True):
            assert torch.allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("end", [lambda s, a, b: (s, b), lambda s, a, b: (b, s, a)])
def test_what_the_last_step_leaves_of_another_state_is_given(end):
    def run(n: Any, x: torch.Tensor) -> Any:
        n.lif.reset()
        a = b = torch.zeros(x.shape[1], 5)
        seen = []
        for x_t in x:
            spikes = n.lif(n.fc(x_t) + b)
            a, b = b * 0.9 + spikes, a * 0.5
            seen.append(spikes + a)
        return end(torch.stack(seen), a, b)

    cell = Cell(Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}), True)
    net, stream = Net(run, fc=layer(6, 5), lif=cell), rand(9, N, 6, seed=1)
    program = assert_steps_equal_the_call(net, rand(6, N, 6))
    for steps in (1, 2, 9):
        with torch.no_grad():
            for y, expected in zip(program(stream[:steps]), net(stream[:steps]), strict=True):
                assert torch.allclose(y, expected, atol=1e-5)


def test_layers_that_hear_each_other_give_the_sum_of_their_last_spikes():
    """One spike of the last step is both returned and heard by the other layer."""

    def run(n: Any, x: torch.Tensor) -> torch.Tensor:
        n.a.reset()
        n.b.reset()
        b = torch.zeros(x.shape[1], 5)
        for x_t in x:
            a = n.a(n.fc(x_t) + 0.5 * b)
            b = n.b(a + x_t[:, :5])
        return a + b

    neuron = Neuron(LIF, {"tau": 2.0, "v_rest": 0.0})
    net = Net(run, fc=layer(6, 5), a=Cell(neuron, True), b=Cell(neuron, True))
    assert_steps_equal_the_call(net, rand(T, N, 6))


def inhibited(n: Any, x: torch.Tensor) -> torch.Tensor:
    back, seen = torch.zeros(x.shape[1], 5), []
    for x_t in x:
        spikes = n.a(n.fc(x_t) - 0.5 * back)
        back = n.b(spikes + x_t[:, :5])
        seen.append(spikes)
    return torch.stack(seen)


def late(n: Any, x: torch.Tensor) -> torch.Tensor:
    last, seen = torch.zeros(x.shape[1], 5), []
    for x_t in x:
        seen.append(n.b(last))
        last = n.a(n.fc(x_t))
    return torch.stack(seen)


def late_output(n: Any, x: torch.Tensor) -> torch.Tensor:
    last, seen = torch.zeros(x.shape[1], 5), []
    for x_t in x:
        seen.append(last)
        n.b(last)  # a layer that leads nowhere is no layer
        last = n.a(n.fc(x_t))
    return torch.stack(seen)


@pytest.mark.parametrize(
    ("run", "layers"),
    [
        (inhibited, {"a": T, "b": T - 1}),
        (late, {"a": T - 1, "b": T}),
        (late_output, {"a": T - 1}),
    ],
)
def test_a_layer_whose_last_spikes_nothing_hears_has_all_steps(run, layers):
    neuron = Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}, v_threshold=0.3)
    net = Net(run, fc=layer(6, 5), a=Cell(neuron, True), b=Cell(neuron, True)).eval()
    x = rand(T, N, 6)
    program = assert_steps_equal_the_call(net, x)
    assert {site.name for site in program.sites} == {*layers}
    captured = capture(net, (x,))
    unrolled = drop_unused_steps(replace(captured, captured=captured))
    for one in (unrolled, unrolled.captured):
        assert {site.name: site.T for site in one.sites} == layers
    with torch.no_grad():
        assert torch.equal(unrolled(x), net(x))


def test_a_layer_that_is_there_for_the_shape_of_its_spikes():
    def run(n: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([n.a(n.fc(x_t) + torch.zeros_like(n.b(n.fc(x_t)))) for x_t in x])

    neuron = Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}, v_threshold=0.3)
    net = Net(run, fc=layer(6, 5), a=Cell(neuron, True), b=Cell(neuron, True)).eval()
    program = drop_unused_steps(capture(net, (rand(T, N, 6),)))
    assert [site.name for site in program.sites] == ["a"]
    with torch.no_grad():
        x = rand(T, N, 6, seed=1)
        assert torch.equal(program(x), net(x))


@pytest.mark.parametrize(
    ("step", "end", "node"),
    [
        (lambda s, a, b: (a + s, b), lambda s, a, b, seen: a, "add"),
        (lambda s, a, b: (a * 0.5 + b, b * 0.5 + s), lambda s, a, b, seen: seen, "add_1"),
        (lambda s, a, b: (s, a), lambda s, a, b, seen: a + b, "neuron"),
    ],
    ids=["sum", "one-after-the-other", "neighbours"],
)
def test_two_steps_do_not_show_how_a_loop_goes_on(step, end, node):
    assert findings(_loop(step, end), rand(2, N, 6)) == [("time-steps", node)]


def test_a_step_before_the_last_is_refused_by_its_number():
    net = _loop(lambda s, a, b: (a * 0.5 + s, b), lambda s, a, b, seen: seen[-2])
    with pytest.raises(UnsupportedError, match="step 2, and not from the last, 3") as caught:
        rewritten(net, rand(T, N, 6))
    assert [f.rule for f in caught.value.findings] == ["output"]
