"""One step after another computes what all steps at once do, or there is a reason why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import Net, rand
from torch import fx, nn
from torch.utils import _pytree as pytree

from spikeport import targets
from spikeport.converters.builder import Builder
from spikeport.converters.capture import capture
from spikeport.converters.errors import MismatchError, UnsupportedError, UsageError
from spikeport.converters.neurons import (
    IF,
    LIF,
    Alpha,
    Dynamics,
    IFNode,
    Lapicque,
    Leaky,
    LIFNode,
    Neuron,
    Node,
    ParametricLIF,
    Synaptic,
)
from spikeport.converters.passes import (
    cast_float16,
    drop_unused_steps,
    lower_neurons,
    step_time,
    stepped,
    unroll_recurrences,
)
from spikeport.converters.probes import probe_inputs
from spikeport.converters.program import NEURON, NEURON_STEP, PassReport, Program, TensorSpec, short
from spikeport.converters.sources.nir.layers import Cell
from spikeport.converters.stepping import State, Stepping
from spikeport.converters.verify import verify

T, N = 4, 3


def layer(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    made.weight.data, made.bias.data = (
        rand(outputs, inputs, seed=seed),
        rand(outputs, seed=seed + 1),
    )
    return made


def rewritten(net: nn.Module, *x: torch.Tensor) -> Program:
    """The network of one step, its neurons taken apart."""
    return one_step(capture(net, x), "onnx")


def one_step(program: Program, target: str) -> Program:
    """As a target takes it: onnx takes neurons apart, the reference does not."""
    program = replace(program, captured=program)
    for rewrite in stepped(targets.get(target).passes(torch.float32)):
        program = rewrite(program)
    return program


def findings(net: nn.Module, *x: torch.Tensor) -> list[tuple[str, str]]:
    with pytest.raises(UnsupportedError) as caught:
        rewritten(net, *x)
    assert all(f.found and f.allowed and f.fix for f in caught.value.findings)
    return [(f.rule, f.node) for f in caught.value.findings]


def assert_steps_equal_the_call(net: nn.Module, *x: torch.Tensor) -> Program:
    """All steps against the network's own call, neurons taken apart and not."""
    net.eval()
    with torch.no_grad():
        expected = pytree.tree_leaves(net(*x))
    captured = capture(net, x)
    for target in ("reference", "lynxi-sim", "onnx"):
        program = one_step(captured, target)
        found = pytree.tree_leaves(program(*x))
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            spikes = set(b.unique().tolist()) <= {0.0, 1.0}
            assert torch.equal(a, b) if spikes else torch.allclose(a, b, atol=1e-5)
    return program


def names(program: Program) -> list[str]:
    assert program.stepping is not None
    return [state.name for state in program.stepping.states]


# Neurons

KINDS: list[tuple[Dynamics, dict[str, Any]]] = [
    (IF, {}),
    (LIF, {"tau": 2.0, "v_rest": 0.1}),
    (LIF, {"tau": 3.0, "v_rest": 0.0, "decay_input": False}),
    (ParametricLIF, {"w": torch.tensor(0.3), "v_rest": 0.0}),
    (Leaky, {"beta": torch.tensor([0.9, 0.5, 0.8, 0.7, 0.99])}),
    (Lapicque, {"R": 5.0, "C": 0.5, "dt": 0.1}),
    (Synaptic, {"alpha": 0.9, "beta": 0.8}),
    (Alpha, {"alpha": 0.9, "beta": 0.8, "tau": 1.5}),
    (Alpha, {"alpha": 0.9, "beta": 0.8, "tau": 1.5, "subtract": True, "jump": 1.0}),
]
RESETS = [
    {"reset": reset, "reset_at": at}
    for reset, at in itertools.product(("hard", "soft", "none"), ("now", "next", "before", "ahead"))
    if (reset, at) != ("hard", "ahead") and (reset, at) != ("none", "ahead")
]


def alone(neuron: Neuron, x: torch.Tensor) -> Program:
    """A program of nothing but one layer of neurons, x [T, N, ...] to spikes."""
    port = TensorSpec("x", tuple(x.shape), x.dtype)
    structure = pytree.tree_structure(0)
    empty = Program(fx.GraphModule({}, fx.Graph()), (port,), (port,), structure, dtype=x.dtype)
    build = Builder(empty)
    node = build.graph.placeholder("x")
    node.meta = {"val": x.to("meta"), "path": ""}
    tensors = [build.constant(name, t) for name, t in neuron.tensors().items()]
    spikes = build.call(NEURON, node, tensors, neuron.to_json(), "stepped", len(x), path="node")
    return build.finish([spikes], PassReport("alone"))


@pytest.mark.parametrize(
    ("kind", "params"), KINDS, ids=lambda v: v.name if isinstance(v, Dynamics) else ""
)
def test_every_neuron_and_reset_gives_the_same_spikes_step_by_step(kind, params):
    for i, reset in enumerate(RESETS):
        fires, v_0 = ((">=", 0.0), (">", -0.2))[i % 2]
        neuron = Neuron(kind, params, v_reset=-0.3, v_0=v_0, fires=fires, **reset)
        x = probe_inputs(neuron, 8, (5,)).expand(8, N, 5)
        expected = neuron.multi_step(x)
        program = step_time(alone(neuron, x))
        assert torch.equal(program(x), expected), neuron.describe()
        assert torch.equal(lower_neurons(program)(x), expected), neuron.describe()
        assert names(program) == [f"node.{s}" for s in ("v", *kind.states)]


def test_a_late_reset_from_the_threshold_is_refused():
    neuron = Neuron(IF, v_0=1.0, reset="soft", reset_at="next")
    with pytest.raises(UnsupportedError, match="node .node neuron.: v_0 lies at the threshold"):
        step_time(alone(neuron, rand(T, N, 5)))


def test_states_start_from_v_0():
    neuron = Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}, v_0=torch.tensor([0.5, -0.5]))
    program = step_time(alone(neuron, rand(T, N, 2)))
    assert torch.equal(program.initial_state()[0], torch.tensor([[0.5, -0.5]] * N))


# What a step is


def feed_forward() -> Net:
    return Net(lambda n, x: n.lif(n.fc(x)), fc=layer(6, 5), lif=LIFNode())


def test_one_step_has_no_time_and_every_state_as_input_and_output():
    program = rewritten(feed_forward(), rand(T, N, 6))
    assert [(str(s)) for s in program.graph_inputs] == [
        "inputs_0 float32[3, 6]",
        "lif.v float32[3, 5]",
    ]
    assert [s.name for s in program.graph_outputs] == ["output", "lif.v.next"]
    assert all(T not in tuple(n.meta["val"].shape) for n in program.nodes("call_function"))
    assert program.time == "stepped"
    assert program.stepping == Stepping(T, (0,), (0,), program.stepping.states)


def test_a_stream_has_as_many_steps_as_it_likes():
    net, x = feed_forward(), rand(9, N, 6)
    program = rewritten(net, x[:2])
    with torch.no_grad():
        assert torch.equal(program(x), net(x))
        assert torch.equal(program(x[:1]), net(x[:1]))


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


def test_an_image_is_given_to_every_step_even_where_batch_and_time_are_as_many():
    conv, bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
    bn.running_var.fill_(2.0)
    net = Net(
        lambda n, x: n.lif(n.bn(n.conv(x)).unsqueeze(0).repeat(T, 1, 1, 1, 1)).mean(0),
        conv=conv,
        bn=bn,
        lif=IFNode(),
    )
    program = assert_steps_equal_the_call(net, rand(T, 1, 8, 8))
    assert program.stepping.inputs == (None,)
    assert program.stepping.outputs == (None,)


@pytest.mark.parametrize("batch", [1, N, T])
def test_events_go_through_layers_that_fold_time_into_the_batch(batch):
    net = Net(
        lambda n, x: n.lif(n.pool(n.conv(x.flatten(0, 1))).unflatten(0, (T, -1))).flatten(2),
        conv=nn.Conv2d(2, 4, 3),
        pool=nn.AvgPool2d(2),
        lif=LIFNode(),
    )
    program = assert_steps_equal_the_call(net, rand(T, batch, 2, 8, 8))
    assert program.inputs[0].shape == (batch, 2, 8, 8)


def test_batch_may_come_before_time():
    net = Net(
        lambda n, x: n.lif(n.fc(x.transpose(0, 1))).transpose(0, 1), fc=layer(6, 5), lif=IFNode()
    )
    program = assert_steps_equal_the_call(net, rand(N, T, 6))
    assert (program.stepping.inputs, program.stepping.outputs) == ((1,), (1,))


@pytest.mark.parametrize(
    ("run", "size", "time"),
    [
        (lambda n, x: n.lif(n.fc(x.permute(2, 0, 1))).permute(1, 2, 0), (N, 6, T), (2, 2)),
        (lambda n, x: n.lif(torch.stack([n.fc(v) for v in x.unbind(-1)])), (N, 6, T), (2, 0)),
        (lambda n, x: n.lif(n.fc(x[..., 0, :].permute(3, 0, 1, 2))), (N, T, 6, 1, T), (4, 0)),
    ],
)
def test_time_may_come_further_back(run, size, time):
    net = Net(run, fc=layer(6, 5), lif=LIFNode())
    program = assert_steps_equal_the_call(net, rand(*size))
    assert (program.stepping.inputs, program.stepping.outputs) == ((time[0],), (time[1],))


def test_two_inputs_one_of_them_without_time():
    net = Net(lambda n, x, bias: n.lif(n.fc(x) + bias), fc=layer(6, 5), lif=LIFNode())
    program = assert_steps_equal_the_call(net, rand(T, N, 6), rand(N, 5))
    assert program.stepping.inputs == (0, None)


def test_attention_and_what_else_acts_on_each_step_alone():
    def run(n: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = n.qkv(x).reshape(T, N, 4, 3, 8).permute(3, 0, 1, 2, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        pooled = torch.cat([mixed, n.norm(mixed)], dim=-1)
        return n.lif(pooled.mean(2)) + x.sum(2).clamp(max=1.0)

    net = Net(run, qkv=layer(16, 24), norm=nn.LayerNorm(8), lif=LIFNode())
    assert_steps_equal_the_call(net, rand(T, N, 4, 16) / 8)


_APART = torch.arange(5) / 16  # no two of equal size


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda s: (s + _APART).topk(2)[0], id="top"),
        pytest.param(
            lambda s: torch.zeros_like(s).scatter(-1, (s + _APART).topk(2)[1], 1.0), id="winners"
        ),
        pytest.param(lambda s: s * (s + _APART).sort(-1, descending=True)[1], id="order"),
        pytest.param(lambda s: (s + _APART).gather(1, (s > 0).long()), id="gather"),
        pytest.param(lambda s: s.scatter_add(-1, (s > 0).long(), s - 0.5), id="scatter_add"),
        pytest.param(lambda s: (s + _APART).median(-1, keepdim=True)[0] * s, id="median"),
        pytest.param(lambda s: s.unfold(-1, 3, 1).sum(-1), id="windows"),
        pytest.param(lambda s: nn.functional.adaptive_max_pool1d(s, 3), id="bins"),
        pytest.param(lambda s: s.amax(1) - s.aminmax(dim=-1)[0].amin(1, True), id="extremes"),
        pytest.param(lambda s: torch.var_mean(s, (1, 2))[0], id="spread"),
        pytest.param(nn.functional.logsigmoid, id="pointwise"),
    ],
)
def test_operators_along_features_act_on_each_step_alone(act):
    net = Net(lambda n, x: act(n.lif(n.fc(x))), fc=layer(6, 5), lif=LIFNode())
    assert names(assert_steps_equal_the_call(net, rand(T, N, 6))) == ["lif.v"]


_PAIR, _WEIGHT = torch.tensor([0, 2]), torch.arange(20.0).reshape(5, 4) / 16


@pytest.mark.parametrize(
    "act",
    [
        lambda s: nn.functional.glu(s[..., :4]),
        lambda s: nn.functional.rms_norm(s, (5,)),
        lambda s: torch.addmm(_WEIGHT[0], s.flatten(0, 1), _WEIGHT).unflatten(0, (T, N)),
        lambda s: torch.baddbmm(s[:, :, :1], s, s.mT),
        lambda s: nn.functional.bilinear(s, s, _WEIGHT.T.reshape(2, 2, 5).repeat(1, 3, 1)[:, :5]),
        lambda s: s.index_add(-1, _PAIR, s[..., 1:3]).index_copy(-1, _PAIR, s[..., :2]),
        lambda s: s.index_fill(-1, _PAIR, 0.5) + (s + _APART).argmin(-1, True),
        lambda s: s.unflatten(-1, (1, 5)).diagonal(0, -2, -1),
        lambda s: nn.functional.interpolate(s, scale_factor=2, mode="nearest-exact"),
        lambda s: (s.int() & 1).float(),
    ],
)
def test_operators_that_the_reference_computes_as_they_are(act):
    net = Net(lambda n, x: act(n.lif(n.fc(x)) + x[..., :5] / 4), fc=layer(6, 5), lif=LIFNode())
    net, x = net.eval(), rand(T, N, 6)
    with torch.no_grad():
        assert torch.equal(one_step(capture(net, (x,)), "reference")(x), net(x))


@pytest.mark.parametrize(
    ("act", "node"),
    [
        (lambda s: s.sort(0)[0], "sort"),
        (lambda s: s.gather(0, (s > 0).long()), "gather"),
        (lambda s: s.gather(2, (s[:2] > 0).long()), "gather"),
        (lambda s: s.cummax(0)[0], "cummax"),
        (lambda s: s.median(0)[0], "median"),
    ],
)
def test_the_same_operators_along_time_are_refused(act, node):
    net = Net(lambda n, x: act(n.lif(n.fc(x))), fc=layer(6, 5), lif=LIFNode())
    assert findings(net, rand(T, N, 6)) == [("mixes-time", node)]


def test_a_layer_that_hears_the_same_twice_is_one():
    net = Net(lambda n, x: n.lif(x) + n.lif(x).flip(-1), lif=LIFNode())
    assert names(assert_steps_equal_the_call(net, rand(T, N, 5))) == ["lif.v"]


# Over time


@pytest.mark.parametrize(
    ("reduce", "states"),
    [
        (lambda s: s.mean(0), ["forward.mean", "steps"]),
        (lambda s: s.sum(0), ["forward.sum", "steps"]),
        (lambda s: s.sum(0) / T, ["forward.sum", "steps"]),
        (lambda s: s.sum(0) * (1 / T), ["forward.sum", "steps"]),
        (lambda s: s.amax(0), ["forward.amax"]),
        (lambda s: s.amin((0, 2)), ["forward.amin"]),
        (lambda s: (s > 0).all(0), ["forward.amax"]),
        (lambda s: s.mean((0, 2)), ["forward.mean", "steps"]),
        (lambda s: s.mean(0, keepdim=True).softmax(-1), ["forward.mean", "steps"]),
        (lambda s: s[-1], []),
    ],
)
def test_what_is_taken_over_time_is_taken_over_the_steps_so_far(reduce, states):
    net = Net(lambda n, x: reduce(n.lif(n.fc(x))), fc=layer(6, 5), lif=LIFNode())
    x = rand(T, N, 6)
    program = assert_steps_equal_the_call(net, x)
    assert names(program) == ["lif.v", *states]


def test_a_mean_after_k_steps_is_the_mean_of_k():
    mean = Net(lambda n, x: n.lif(n.fc(x)).mean(0), fc=layer(6, 5), lif=LIFNode())
    total = Net(lambda n, x: n.lif(n.fc(x)).sum(0) / T, fc=layer(6, 5), lif=LIFNode())
    x = rand(T, N, 6)
    for net in (mean, total):
        program = rewritten(net, x)
        for k in range(1, T + 1):
            with torch.no_grad():
                assert torch.equal(program(x[:k]), mean(x[:k]))


def test_a_delay_is_a_state():
    net = Net(lambda n, x: n.lif(torch.cat([torch.zeros(1, N, 5), x[:-1]]) + x), lif=LIFNode())
    program = assert_steps_equal_the_call(net, rand(T, N, 5))
    assert len(names(program)) == 2


def test_a_delay_that_the_example_does_not_outlast_is_refused():
    def late(n, x):
        steps = [*[torch.ones_like(x[0])] * 2, *x.unbind()][: len(x)]
        return n.lif(torch.stack(steps) + x)

    net = Net(late, lif=LIFNode())
    assert findings(net, rand(2, N, 5)) == [("time-steps", "stack")]
    assert_steps_equal_the_call(net, rand(4, N, 5))


def test_steps_that_go_before_a_sequence_are_refused():
    net = Net(lambda n, x: n.lif(torch.cat([torch.ones(2, N, 5), x])[: len(x)]), lif=LIFNode())
    assert ("mixes-time", "cat") in findings(net, rand(3, N, 5))


def test_a_convolution_over_past_steps_keeps_them():
    conv = nn.Conv1d(5, 4, 3, padding=4, dilation=2)
    net = Net(
        lambda n, x: n.lif(n.conv(x.permute(1, 2, 0))[:, :, : x.shape[0]].permute(2, 0, 1)),
        conv=conv,
        lif=LIFNode(),
    )
    program = assert_steps_equal_the_call(net, rand(6, N, 5))
    assert names(program) == ["conv.past", "lif.v"]
    ahead = Net(
        lambda n, x: n.lif(n.conv(x.permute(1, 2, 0)).permute(2, 0, 1)),
        conv=nn.Conv1d(5, 4, 3, padding=1),
        lif=LIFNode(),
    )
    assert ("mixes-time", "conv1d") in findings(ahead, rand(T, N, 5))


# Loops


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


# What has no steps


def test_everything_that_no_step_can_compute_is_told_at_once():
    def run(n: Any, x: torch.Tensor) -> Any:
        seen = n.lif(n.fc(x))
        centred = n.lif2(seen - seen.mean(0))  # needs steps that are still to come
        weighted = n.lif3(seen * torch.arange(1.0, T + 1).reshape(T, 1, 1))
        return centred, weighted, seen.flip(0), seen[1]

    net = Net(run, fc=layer(6, 5), lif=LIFNode(), lif2=LIFNode(), lif3=LIFNode())
    found = findings(net, rand(T, N, 6))
    assert [rule for rule, _ in found] == ["mixes-time", "time-varying", "steps-differ", "output"]


def test_control_flow_that_depends_on_time_is_named_with_the_step():
    def run(n: Any, x: torch.Tensor) -> torch.Tensor:
        spikes, back, seen = n.lif(x), torch.zeros(N, 5), []
        for t in range(x.shape[0]):
            back = back * 0.5 + spikes[t] if t != 2 else back - spikes[t]
            seen.append(back)
        return torch.stack(seen)

    net = Net(run, lif=LIFNode())
    with pytest.raises(UnsupportedError, match="step 2 computes something else") as caught:
        rewritten(net, rand(T, N, 5))
    assert [f.rule for f in caught.value.findings] == ["steps-differ"]


def test_a_state_that_starts_from_the_input_is_refused():
    def run(n: Any, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        spikes, back, seen = n.lif(x), start, []
        for t in range(x.shape[0]):
            back = back * 0.5 + spikes[t]
            seen.append(back)
        return torch.stack(seen)

    found = findings(Net(run, lif=LIFNode()), rand(T, N, 5), rand(N, 5))
    assert found[0][0] == "state-init"


@pytest.mark.parametrize(
    ("run", "x", "said"),
    [
        (lambda n, x: n.lif(x), rand(1, N, 5), "the network: 1 time step; .* 2 time steps or more"),
        (lambda n, x: x * 2, rand(T, N, 5), "no declared neuron; .*dynamics"),
        (lambda n, x: n.lif(n.lif(x)[::2]), rand(T, N, 5), "lif, lif#2: 2 and 4 time steps"),
        (
            lambda n, x: torch.cat([n.lif(x[t : t + 1]) for t in range(T)]),
            rand(T, N, 5),
            "lif: several calls, .* that starts anew",
        ),
    ],
)
def test_programs_without_steps_in_common_are_refused(run, x, said):
    with pytest.raises(UnsupportedError, match=said):
        rewritten(Net(run, lif=LIFNode()), x)


@pytest.mark.parametrize(
    ("drive", "size", "rule", "said"),
    [
        (
            lambda x: torch.stack([x // t for t in (1, 2, 3, 4)]),
            (N, 5),
            "time-varying",
            "of its own",
        ),
        (lambda x: x.logcumsumexp(-1), (T, N, 5), "mixes-time", "is not known step by step"),
        (lambda x: x.cumsum(0), (T, N, 5), "mixes-time", "over the time steps together"),
    ],
)
def test_the_reason_is_the_true_one(drive, size, rule, said):
    net = Net(lambda n, x: n.lif(drive(x)), lif=LIFNode())
    with pytest.raises(UnsupportedError, match=said) as caught:
        step_time(capture(net, (rand(*size),)))
    assert {f.rule for f in caught.value.findings} == {rule}


def test_inputs_with_other_numbers_of_steps_are_refused():
    net = Net(lambda n, x, y: n.lif(x + y), lif=LIFNode())
    program = rewritten(net, rand(T, N, 5), rand(T, N, 5))
    with pytest.raises(UsageError, match="2 and 4 time steps"):
        program(rand(4, N, 5), rand(2, N, 5))
    with pytest.raises(UsageError, match="1 inputs given, 2 wanted"):
        program(rand(4, N, 5))


def test_neurons_that_stay_operators_keep_their_states_in_float32():
    program = capture(feed_forward(), (rand(T, N, 6),))
    for rewrite in stepped((*targets.get("reference").passes(torch.float32), cast_float16)):
        program = rewrite(program)
    assert any(n.target is NEURON_STEP for n in program.nodes("call_function"))
    assert [s.dtype for s in program.graph_inputs] == [torch.float32, torch.float32]
    assert program.dtype == torch.float16
    lowered = rewritten(feed_forward(), rand(T, N, 6))
    assert cast_float16(lowered).graph_inputs[1].dtype == torch.float16


def test_the_pass_stands_before_neurons_are_taken_apart():
    stepping = (unroll_recurrences, step_time)
    assert stepped((lower_neurons, cast_float16)) == (*stepping, lower_neurons, cast_float16)
    assert stepped((cast_float16,)) == (*stepping, cast_float16)
    assert stepped(()) == stepping


# Verification


def proved(net: nn.Module, x: torch.Tensor, change: Callable[[Program], Program]) -> Program:
    """The stepped program after a change, verified against the network."""
    captured = capture(net, (x,))
    program = replace(captured, captured=captured, examples=((x,),))
    return verify(change(one_step(program, "onnx")), net)


def forgetful(program: Program) -> Program:
    """The first state stays as it came in."""
    results = program.results
    results[len(program.outputs)] = list(program.nodes("placeholder"))[len(program.inputs)]
    program.graph.output_node().args = (tuple(results),)
    program.module.recompile()
    return program


def otherwise(program: Program) -> Program:
    """The first state starts from other values."""
    stepping = program.stepping
    assert stepping is not None
    first, *rest = stepping.states
    states = (State(first.name, first.initial + 5.0), *rest)
    return replace(program, stepping=replace(stepping, states=states))


@pytest.mark.parametrize("sabotage", [forgetful, otherwise])
def test_states_that_are_carried_wrongly_are_found_with_their_layer(sabotage):
    net, x = feed_forward(), rand(T, N, 6)
    evidence = proved(net, x, lambda program: program).evidence
    assert evidence is not None
    assert evidence.to_dict()["end_to_end_flips"] == {"lif": 0}
    with pytest.raises(MismatchError, match="lif: .* spikes are not the declaration's"):
        proved(net, x, sabotage)
