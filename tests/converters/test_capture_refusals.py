"""What cannot become a graph is refused by name, all of it at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import SingleStep, captured, findings, rules
from networks import Net, rand
from torch import nn
from torch.export.graph_signature import ExportGraphSignature

from spikeport.converters import sources
from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError, UsageError
from spikeport.converters.neurons import IF, LIF, IFNode, LIFNode, Neuron, Node, ParametricLIFNode
from spikeport.converters.program import short
from spikeport.converters.sources import Reading

T, N = 4, 2

pytestmark = pytest.mark.usefixtures("single_step")


class Here(Net):
    """Its forward is in this file, which findings name."""

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


class ThresholdAdapts(LIFNode):
    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return super().forward(x_seq * 2)


class OnlyNamed(LIFNode):
    """A subclass that changes nothing."""


def test_a_look_alike() -> None:
    found = findings(nn.Sequential(nn.Linear(3, 3), ThresholdAdapts()), rand(T, N, 3))
    assert rules(found) == [("look-alike-neuron", "1")]
    assert "ThresholdAdapts" in found[0].found
    assert "converters.neurons.Node" in found[0].found


def test_a_subclass_that_changes_nothing_is_taken() -> None:
    captured(nn.Sequential(OnlyNamed()), rand(T, N, 3))


def test_a_subclass_that_changes_the_training_step_only_by_property() -> None:
    class Shifted(LIFNode):
        @property
        def neuron(self) -> Neuron:
            return Neuron(IF)

    assert rules(findings(nn.Sequential(Shifted()), rand(T, N, 3))) == [("look-alike-neuron", "0")]


def test_a_subclass_with_another_call() -> None:
    class Doubled(LIFNode):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x * 2)

    assert rules(findings(nn.Sequential(Doubled()), rand(T, N, 3))) == [("look-alike-neuron", "0")]


def test_an_instance_with_a_replaced_method() -> None:
    net = nn.Sequential(LIFNode(), LIFNode())
    net[1].forward = lambda x: x * 2
    found = findings(net, rand(T, N, 3))
    assert rules(found) == [("altered-neuron", "1")]
    assert "forward" in found[0].found


def test_a_forward_that_holds_the_network_it_replaces() -> None:
    def doubled(before: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: before(x * 2)

    net, other = nn.Sequential(LIFNode(), LIFNode()), nn.Sequential(LIFNode(), LIFNode())
    net.forward = doubled(net.forward)
    other.forward = eval("lambda x: before(x * 2)", {"before": other.forward})
    for replaced in (net, other):
        assert rules(findings(replaced, rand(T, N, 3))) == [("altered-module", "")]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_neuron_with_a_hook(hook: str) -> None:
    net = nn.Sequential(LIFNode())
    getattr(net[0], hook)(lambda *_: None)
    assert rules(findings(net, rand(T, N, 3))) == [("altered-neuron", "0")]


def test_a_parametrized_neuron() -> None:
    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w * 2

    net = nn.Sequential(ParametricLIFNode())
    nn.utils.parametrize.register_parametrization(net[0], "w", Double())
    assert "w" in captured(net, rand(T, N, 3)).sites[0].neuron.tensors()
    assert nn.utils.parametrize.is_parametrized(net[0])


def test_hooks_on_other_modules_are_traced() -> None:
    net = nn.Sequential(nn.Linear(3, 3), LIFNode())
    net[0].register_forward_hook(lambda m, x, y: y * 2)
    captured(net, rand(T, N, 3))


def test_a_time_loop_outside() -> None:
    found = findings(nn.Sequential(nn.Linear(3, 3), SingleStep()), rand(N, 3))
    assert rules(found) == [("time-loop-outside", "1")]


def test_a_neuron_called_in_another_way_than_with_one_tensor() -> None:
    net = Net(lambda s, x: s.spike(x_seq=x), spike=IFNode())
    assert rules(findings(net, rand(T, N, 3))) == [("neuron-input", "spike")]


@pytest.mark.parametrize("scale", [1.0, 1e-9], ids=["that shows", "that does not show"])
def test_a_random_forward(scale: float) -> None:
    net = Here(lambda s, x: s.spike(x + torch.rand_like(x) * scale + 100), spike=IFNode())
    found = findings(net, rand(T, N, 3))
    assert [f.rule for f in found] == ["random"]
    assert "rand_like at test_capture_refusals.py:" in found[0].found


def test_dropout_that_evaluation_does_not_turn_off() -> None:
    net = Net(lambda s, x: s.spike(F.dropout(s.fc(x))), spike=IFNode(), fc=nn.Linear(3, 3))
    assert [f.rule for f in findings(net, rand(T, N, 3))] == ["random"]


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.spike(x * 2) if x.sum() > 0 else s.spike(x),
        lambda s, x: s.spike(x * x.max().item()),
        lambda s, x: s.spike(x[:, : int(x[0, 0, 0] > 0) + 1]),
        lambda s, x: s.spike(x)[x > 0],
        lambda s, x: s.spike(x).nonzero(),
    ],
    ids=["branch", "item", "slice", "mask", "nonzero"],
)
def test_data_dependence(
    run: Callable[..., Any], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = findings(Here(run, spike=IFNode()), rand(T, N, 3))
    assert [f.rule for f in found] == ["data-dependent"]
    assert "test_capture_refusals.py:" in found[0].found
    assert capfd.readouterr().err == ""
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("value", [torch.tensor(2), torch.tensor(True)])
def test_a_branch_on_an_integer_kept_as_a_tensor(value: torch.Tensor) -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = value

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if self.up != 0 else x

    net, x = Choice(), torch.randn(3, 4)
    assert torch.equal(capture(net, (x,))(x), 2 * x)
    assert net.up is value


@pytest.mark.parametrize(
    ("run", "operators"),
    [
        (lambda x: x.max(2)[0], ["aten.amax"]),
        (lambda x: F.adaptive_max_pool2d(x, 1), ["aten.amax"]),
        (lambda x: F.adaptive_max_pool2d(x, (2, 3)), ["aten.max_pool2d"]),
        (lambda x: F.adaptive_max_pool1d(x[0], 3), ["aten.select", "aten.max_pool1d"]),
        (
            lambda x: F.avg_pool1d(x[0], 3, 2, 1, True),
            ["aten.select", "aten.unsqueeze", "aten.avg_pool2d", "aten.squeeze"],
        ),
        (
            lambda x: F.avg_pool1d(x[0], 2),
            ["aten.select", "aten.unsqueeze", "aten.avg_pool2d", "aten.squeeze"],
        ),
        (
            lambda x: F.max_pool1d(x[0, 0], 2),
            ["aten.select", "aten.select", "aten.unsqueeze", "aten.max_pool1d", "aten.squeeze"],
        ),
    ],
)
def test_pooling_that_targets_have(run: Callable[..., Any], operators: list[str]) -> None:
    class Pool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run(x)

    x = torch.randn(2, 4, 6, 9)
    program = capture(Pool(), (x,))
    assert [short(n.target) for n in program.nodes("call_function")] == operators
    assert torch.equal(program(x), run(x))


def test_a_branch_on_a_spike_count_between_neurons() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.a(x)
        if y.mean() > 0.5:
            y = y * 2
        return s.b(y)

    found = findings(Net(run, a=IFNode(), b=IFNode()), rand(T, N, 3))
    assert [f.rule for f in found] == ["data-dependent"]
    assert "test_capture_refusals.py:" in found[0].found


def test_a_forward_that_fails() -> None:
    found = findings(nn.Sequential(nn.Linear(4, 3), IFNode()), rand(T, N, 3))
    assert rules(found) == [("forward-fails", "")]
    assert "mat1 and mat2" in found[0].found
    assert "[4, 2, 3]" in found[0].allowed


def test_a_forward_that_fails_in_the_users_code_says_where() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("missing")

    found = findings(Net(run), rand(T, N, 3))
    assert "KeyError" in found[0].found
    assert "test_capture_refusals.py:" in found[0].found


def test_weights_that_are_not_finite() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3)), IFNode())
    with torch.no_grad():
        net[0].weight[1, 2] = float("nan")
        net[1][0].running_var[0] = float("inf")
    found = findings(net, rand(N, 3).unsqueeze(0).squeeze(0))
    assert set(rules(found)) >= {("non-finite-weight", "0"), ("non-finite-weight", "1.0")}
    assert "0.weight has 1 values" in found[0].found


def test_a_neurons_parameter_that_is_not_finite() -> None:
    net = nn.Sequential(LIFNode(v_threshold=nn.Parameter(torch.tensor([1.0, float("nan"), 1.0]))))
    assert rules(findings(net, rand(T, N, 3))) == [("non-finite-weight", "0")]


def test_neurons_that_there_cannot_be() -> None:
    """All of them are named, and with what is wrong elsewhere."""
    lif = {"v_rest": 0.0, "tau": torch.tensor([2.0, -1.0, 0.0])}
    sources.register(Odd, lambda module: Reading(Neuron(IF, v_threshold=float("nan"))))
    net = nn.Sequential(Node(LIF, **lif), nn.Linear(3, 3), LIFNode(tau=-2.0), IFNode(), Odd())
    with torch.no_grad():
        net[1].bias[0] = float("nan")
    found = findings(net, rand(T, N, 3))
    assert set(rules(found)) == {
        ("parameter", "0"),
        ("non-finite-weight", "1"),
        ("parameter", "2"),
        ("parameter", "4"),
    }
    text = "\n".join(map(str, found))
    assert "tau is -1 in this Node" in text
    assert "v_threshold is nan in this Odd" in text


class Odd(nn.Module):
    """A neuron whose declaration fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).float()


@pytest.mark.parametrize("shape", [(3,), ()])
def test_an_input_of_a_neuron_without_batch(shape: tuple[int, ...]) -> None:
    found = findings(nn.Sequential(IFNode()), rand(*shape))
    assert rules(found)[0] == ("neuron-input", "0")
    assert str(list(shape)) in found[0].found


def test_a_neuron_on_integers() -> None:
    found = findings(nn.Sequential(IFNode()), torch.ones(T, N, 3, dtype=torch.int64))
    assert rules(found) == [("neuron-input", "0")]


def test_everything_comes_at_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), ThresholdAdapts(), LIFNode(), IFNode(), nn.Linear(4, 3))
    net[2].forward = lambda x: x
    with torch.no_grad():
        net[0].bias[0] = float("inf")
    found = findings(net, rand(T, N, 3))
    assert set(rules(found)) == {
        ("non-finite-weight", "0"),
        ("look-alike-neuron", "1"),
        ("altered-neuron", "2"),
        ("forward-fails", ""),
    }


@pytest.mark.parametrize(
    "inputs", [(), (1.0,), ([torch.zeros(1)],), (torch.zeros(1), None)], ids=repr
)
def test_inputs_that_are_no_tensors(inputs: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError, match="give a tuple of tensors"):
        capture(nn.Sequential(IFNode()), inputs)


def test_a_bare_tensor_as_inputs() -> None:
    """Iterating over it would make an input of each of its rows."""
    with pytest.raises(UsageError, match="give a tuple of tensors"):
        capture(nn.Sequential(IFNode()), rand(T, N, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("constant", ["x.shape[1]", "1 / len(x)", "f'{len(x)} steps'", "7"])
def test_a_constant_among_the_outputs(constant: str) -> None:
    """Of a smaller last batch, or of other steps, it may be another one."""
    net = Net(lambda s, x: (s.spike(x), {"size": eval(constant)}), spike=IFNode())
    with pytest.raises(UsageError, match=r" at output\[1\]\['size'\].*leave it out of"):
        capture(net, (rand(T, N, 3),))


def test_a_weight_that_the_forward_writes() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            s.fc.weight.clamp_(-0.1, 0.1)
        spikes: torch.Tensor = s.spike(s.fc(x))
        return spikes

    told = hasattr(ExportGraphSignature, "parameters_to_mutate")  # of torch 2.6 not
    said = "fc: the forward writes to fc.weight" if told else "torch.export"
    with pytest.raises(CaptureError, match=said):
        capture(Net(run, fc=nn.Linear(3, 3), spike=IFNode()), (rand(T, N, 3),))


def test_outputs_without_a_tensor() -> None:
    with pytest.raises(UsageError, match="returns None; outputs must be tensors"):
        capture(Net(lambda s, x: [s.spike(x), None][1], spike=IFNode()), (rand(1, 1, 1),))


def test_a_single_neuron() -> None:
    with pytest.raises(UsageError, match="single neuron"):
        capture(IFNode(), (rand(T, N, 3),))


def test_something_else_than_a_network() -> None:
    with pytest.raises(UsageError, match="nn.Module"):
        capture(lambda x: x, (rand(T, N, 3),))  # type: ignore[arg-type]


def test_a_network_that_cannot_be_copied() -> None:
    net = nn.Sequential(nn.Linear(3, 3), IFNode())
    net.kept = net(rand(T, N, 3).requires_grad_())
    capture(net, (rand(T, N, 3),))
    net.kept = [net.kept]
    assert rules(findings(net, rand(T, N, 3))) == [("copy", "")]


def test_a_declaration_that_is_wrong_is_named() -> None:
    from spikeport.converters.errors import MismatchError

    class Mine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Neuron(IF, fires=">").multi_step(x)

    sources.register(Mine, lambda module: Reading(Neuron(IF)))
    grid = torch.randint(-8, 17, (T, N, 3), generator=torch.Generator().manual_seed(0)) / 8
    with pytest.raises(MismatchError, match="the first is 1: .* spikes differ, first at step"):
        capture(nn.Sequential(nn.Identity(), Mine(), nn.Linear(3, 3)), (grid * 2,))


def test_a_graph_module_with_neurons() -> None:
    """What torch.fx rewrites, as SpikingJelly's conversion of networks of rectifiers does."""

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, path: str) -> bool:
            return True

    made = nn.Sequential(nn.Linear(3, 4), IFNode(v_reset=None), nn.Linear(4, 2))
    captured(torch.fx.GraphModule(made, Leaf().trace(made)), rand(T, N, 3))
