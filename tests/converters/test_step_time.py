"""One step after another computes what all steps at once do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import Net, rand
from steps import (
    assert_steps_equal_the_call,
    feed_forward,
    findings,
    layer,
    names,
    one_step,
    rewritten,
)
from torch import fx, nn
from torch.utils import _pytree as pytree

from spikeport import targets
from spikeport.converters.builder import Builder
from spikeport.converters.capture import capture
from spikeport.converters.errors import MismatchError, UnsupportedError
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
    ParametricLIF,
    Synaptic,
)
from spikeport.converters.passes import (
    cast_float16,
    lower_neurons,
    step_time,
    stepped,
    unroll_recurrences,
)
from spikeport.converters.probes import probe_inputs
from spikeport.converters.program import NEURON, NEURON_STEP, PassReport, Program, TensorSpec
from spikeport.converters.stepping import State, Stepping
from spikeport.converters.verify import verify

T, N = 4, 3


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


# The pass


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
