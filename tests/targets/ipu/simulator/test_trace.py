"""What is traced, what is refused, and what is differentiated."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikeport.targets.ipu.simulator import SimulatorWarning, poptorch, settings


class ATan(torch.autograd.Function):
    """A stock surrogate gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (u,) = ctx.saved_tensors
        return grads[0] / (1 + u * u)


class Split(torch.autograd.Function):
    """The newer form, with the context set up apart."""

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        return (u > 0).to(u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Double(torch.autograd.Function):
    """A differentiable forward with a backward that says something else."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return 2 * u

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 100 * grads[0]


kept_apply = ATan.apply  # as some frameworks keep it, looked up before the trace


def atan(u: Tensor) -> Tensor:
    return ATan.apply(u)


def split(u: Tensor) -> Tensor:
    return Split.apply(u)


def surrogate(u: Tensor) -> Tensor:
    s = torch.sigmoid(4 * u)
    return (u > 0).to(u.dtype).detach() + (s - s.detach())


class Neuron(nn.Module):
    def __init__(self, fire: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fire = fire

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(x - 0.5)


class SNN(nn.Module):
    def __init__(self, fire: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.lif = Neuron(fire)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.lif(self.fc(x))
        return out, F.cross_entropy(out, y)


# Kept: an operator whose library is gone breaks torch.export in later tests.
LIBRARY = torch.library.Library("spikeport_test", "DEF")
LIBRARY.define("twice(Tensor x) -> Tensor")
LIBRARY.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("fire", "name"),
    [(atan, "ATan"), (kept_apply, "ATan"), (split, "Split")],
)
def test_a_stock_surrogate_is_refused(fire: Any, name: str) -> None:
    model = poptorch.trainingModel(SNN(fire))
    with pytest.raises(poptorch.Error) as caught:
        model(X, Y)
    text = str(caught.value)
    assert f"lif: the backward of torch.autograd.Function {name} is a surrogate" in text
    assert "spikeport.targets.ipu.training_module" in text


def test_a_stock_surrogate_runs_in_inference() -> None:
    net = SNN(atan)
    out, _ = poptorch.inferenceModel(net)(X, Y)
    assert torch.equal(out, net(X, Y)[0])


def test_a_step_that_cuts_weights_off_is_refused() -> None:
    for fire in (lambda u: (u > 0).float(), lambda u: u.sign(), torch.round):
        with pytest.raises(
            poptorch.Error, match=r"lif \(lif/.*\): the operation is a step.*fc.weight"
        ):
            poptorch.trainingModel(SNN(fire))(X, Y)


def test_a_surrogate_in_the_forward_is_differentiated() -> None:
    torch.manual_seed(0)
    net = SNN(surrogate)
    before = net.fc.weight.detach().clone()
    wanted = torch.autograd.grad(net(X, Y)[1], net.fc.weight)[0]
    model = poptorch.trainingModel(net, None, torch.optim.SGD(net.parameters(), lr=1.0))
    model(X, Y)
    torch.testing.assert_close(before - net.fc.weight.detach(), wanted)
    assert wanted.abs().max() > 0


def test_the_traced_forward_is_differentiated_not_the_functions_backward() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return poptorch.identity_loss(Double.apply(self.w * x), "sum")

    net = Net()
    model = poptorch.trainingModel(net, None, torch.optim.SGD(net.parameters(), lr=1.0))
    with pytest.warns(
        SimulatorWarning, match="backward of torch.autograd.Function Double is ignored"
    ):
        model(torch.ones(1))
    assert float(net.w.detach()) == 1 - 2


def test_apply_is_torchs_own_after_a_trace() -> None:
    poptorch.inferenceModel(lambda x: x + 1)(torch.ones(2))
    u = torch.ones(1, requires_grad=True)
    Double.apply(u).backward()
    assert u.grad is not None
    assert float(u.grad) == 100
    assert "__getitem__" not in vars(Tensor)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * float(x[0, 0]),
        lambda x: x[: int(x.abs().sum())],
        lambda x: x + torch.tensor(x.sum().tolist()),
        lambda x: torch.full((2,), x.sum()),  # read inside of the function
        lambda x: x[: x.sum().int()],
    ],
)
def test_values_do_not_reach_python(read: Any) -> None:
    with pytest.raises(poptorch.Error, match=r"aten::\w+ is only supported in eager mode"):
        poptorch.inferenceModel(read)(X)


def test_reading_a_buffer_is_a_warning_or_an_error() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mode", torch.tensor(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if self.mode == 1 else x

    with pytest.warns(SimulatorWarning, match="buffer mode is read in Python") as caught:
        assert torch.equal(poptorch.inferenceModel(Net())(X), X + 1)
    assert caught[0].filename == __file__  # the line that reads it
    with settings(strict=True), pytest.raises(poptorch.Error, match="only supported in eager mode"):
        poptorch.inferenceModel(Net())(X)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.unique(x, sorted=True),
        lambda x: x[x > 0],
        lambda x: x[x[:, 0] > 0],
        lambda x: torch.where(x > 0),
        lambda x: x.repeat_interleave((x[:, 0] > 0).int(), 0),
        lambda x: F.one_hot((x[:, 0] > 0).long()),
    ],
)
def test_shapes_do_not_depend_on_data(op: Any) -> None:
    with pytest.raises(poptorch.Error, match="the shape of its result depends on the data"):
        poptorch.inferenceModel(op)(X)


def test_shapes_that_are_known() -> None:
    mask = torch.tensor([True, False, True, False])

    def forward(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        y = x.clone()
        y[y > 0] = 0
        chosen = torch.where(x > 0, x, y)
        return chosen, x[:, mask], x[i], F.one_hot(i, 6), x.repeat_interleave(2, 0)

    model = poptorch.inferenceModel(forward)
    i = torch.tensor([1, 0, 5])
    for x in (X, -X):
        for out, wanted in zip(model(x, i), forward(x, i), strict=True):
            assert torch.equal(out, wanted.to(out.dtype))


def test_buffers_are_not_reassigned() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mem", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.mem = self.mem + x.sum()
            return self.mem

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Inner(), Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    net = Net()
    before = net.a.mem
    with pytest.raises(poptorch.Error) as caught:
        poptorch.inferenceModel(net)(X)
    for name in ("a.mem", "b.mem"):
        assert f"Buffer {name} is reassigned within the model when calling the forward" in str(
            caught.value
        )
    assert net.a.mem is before


def test_state_that_an_earlier_call_left_behind() -> None:
    class Net(nn.Module):
        v: Any = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.v + self.fc(x)
            return self.v

    net = Net()
    model = poptorch.inferenceModel(net)
    torch.testing.assert_close(
        model(X), model(X)
    )  # compiled from a state of zero: as on the device
    with pytest.raises(poptorch.Error, match=r"state that an earlier call left in an attribute\?"):
        poptorch.inferenceModel(model._model)(X)
    net.v = 0.0
    poptorch.inferenceModel(net)(X)


def test_buffers_are_written_in_place() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + self.count

    net = Net()
    model = poptorch.inferenceModel(net)
    assert [float(model(torch.zeros(1))) for _ in range(3)] == [1, 2, 3]
    model.copyWeightsToHost()
    assert float(net.count) == 3


def test_python_runs_once() -> None:
    runs = []

    class Net(nn.Module):
        scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return x * self.scale

    net = Net()
    model = poptorch.inferenceModel(net)
    model(X)
    net.scale = 5.0
    assert torch.equal(model(X), 2 * X)
    assert len(runs) == 1


def test_constants_are_fresh_in_every_run() -> None:
    table = torch.zeros(6, 4)

    def forward(x: Tensor) -> Tensor:
        state = torch.zeros(6, 4)
        state[:, 0] = x[:, 0]
        state += 1
        return state.add_(x) + table

    model = poptorch.inferenceModel(forward)
    first = model(X)
    table += 1  # compiled in
    assert torch.equal(model(X), first)


def test_inputs_are_written_in_place_and_come_back() -> None:
    def forward(x: Tensor) -> Tensor:
        return x.add_(1)

    x = torch.zeros(4)
    model = poptorch.inferenceModel(forward, poptorch.Options().deviceIterations(2))
    model(x)
    assert x.tolist() == [1] * 4
    wide = torch.zeros(4, dtype=torch.float64)
    poptorch.inferenceModel(forward)(wide)
    assert wide.tolist() == [1] * 4


def test_no_grad_and_detach_hold_in_the_trace() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.full((1,), 3.0))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                scale = self.w * 2
            return poptorch.identity_loss(self.w * scale + (self.w * 5).detach() * x, "sum")

    net = Net()
    model = poptorch.trainingModel(net, None, torch.optim.SGD(net.parameters(), lr=1.0))
    model(torch.ones(1))
    assert float(net.w.detach()) == 3 - 6


def test_losses() -> None:
    def trained(forward: Callable[[nn.Module, Tensor], Any]) -> Any:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Any:
                return forward(self.fc, x)

        return poptorch.trainingModel(Net())(X)

    with pytest.raises(poptorch.Error, match="^Couldn't find a loss in graph!$"):
        trained(lambda fc, x: fc(x) * 12)
    with pytest.raises(poptorch.Error, match="^Multiple independent losses found in graph. Graph"):
        trained(lambda fc, x: (F.mse_loss(fc(x), x), F.l1_loss(fc(x), x)))
    loss = trained(
        lambda fc, x: poptorch.identity_loss(F.mse_loss(fc(x), x) + F.l1_loss(fc(x), x), "sum")
    )
    assert loss.shape == ()
    assert trained(lambda fc, x: poptorch.identity_loss(fc(x), "none")).shape == (6, 4)


def test_identity_loss_seeds_ones() -> None:
    for reduction, wanted in (("sum", 6.0), ("mean", 1.0), ("none", 6.0)):

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.zeros(1))

            def forward(self, x: Tensor, reduction: str = reduction) -> Tensor:
                return poptorch.identity_loss(self.w + x, reduction)

        net = Net()
        model = poptorch.trainingModel(net, None, torch.optim.SGD(net.parameters(), lr=1.0))
        model(X[:, 0])
        assert float(net.w.detach()) == pytest.approx(-wanted)


def test_subclasses_of_tensors_are_made_in_a_forward() -> None:
    class Flagged(Tensor):  # as snntorch-ipu's initial states
        flag = True

    def forward(x: Tensor) -> Tensor:
        return x + 1 if hasattr(Flagged(), "flag") else x

    assert torch.equal(poptorch.inferenceModel(forward)(X), X + 1)


def test_zero_sized_tensors() -> None:
    with pytest.raises(
        poptorch.Error, match=r"Zero-sized tensors are unsupported \(Got shape \[0\]"
    ):
        poptorch.inferenceModel(lambda x: torch.cat([x, torch.zeros(0) + x[:0]]))(torch.ones(3))


def test_torchscript_is_traced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)

        @torch.jit.script
        def leak(v: Tensor, x: Tensor) -> Tensor:
            return 0.5 * v + x

    model = poptorch.inferenceModel(lambda x: leak(leak(x, x), x))
    model(X)
    assert torch.equal(model(2 * X), 2 * (0.5 * (1.5 * X) + X))


def test_operators_of_others_are_refused() -> None:
    with pytest.raises(poptorch.Error, match=r"Unsupported ops found.*\[spikeport_test::twice\]"):
        poptorch.inferenceModel(torch.ops.spikeport_test.twice)(X)


def test_loops_and_conditions() -> None:
    model = poptorch.inferenceModel(lambda x: poptorch.for_loop(3, lambda v: [v * 2], [x])[0])
    assert torch.equal(model(X), 8 * X)

    def choose(flag: Tensor, x: Tensor) -> Tensor:
        return poptorch.cond(flag, lambda v: v + 1, [x], lambda v: v - 1, [x])[0]

    chosen = poptorch.inferenceModel(choose)
    assert torch.equal(chosen(torch.tensor([True]), X[:1]), X[:1] + 1)
    assert torch.equal(chosen(torch.tensor([False]), X[:1]), X[:1] - 1)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return poptorch.identity_loss(poptorch.for_loop(2, lambda v: v, [x])[0], "sum")

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(poptorch.Error, match=r"^poptorch.for_loop\(\) is only supported in inf"):
        poptorch.trainingModel(Net(), None, optimizer)(X)


def test_custom_operators() -> None:
    u = torch.tensor([-2.0, 0.0, 0.5])

    def op(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: poptorch.custom_op([x], name, "custom.ops", 1, example_outputs=[x])[0]

    class Net(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.w = nn.Parameter(u.clone())
            self.op = op(name)

        def forward(self) -> tuple[Tensor, Tensor]:
            out = self.op(self.w)
            return out, poptorch.identity_loss(out, "sum")

    for name, spikes, gradient in (
        ("Heaviside", [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]),
        ("StraightThroughEstimator", [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]),
        ("FastSigmoid", [0.0, 1.0, 1.0], [1 / 9, 1.0, 1 / 1.5**2]),
    ):
        net = Net(name)
        model = poptorch.trainingModel(net, None, torch.optim.SGD(net.parameters(), lr=1.0))
        out, _ = model()
        assert out.tolist() == spikes
        torch.testing.assert_close(u - net.w.detach(), torch.tensor(gradient))
        assert op(name)(u).tolist() == [0.0] * 3  # outside of a compilation
    with pytest.raises(poptorch.Error, match="custom operator custom.ops.Absent:1"):
        poptorch.inferenceModel(op("Absent"))(u)


def test_hints_change_nothing() -> None:
    def forward(x: Tensor) -> Tensor:
        with (
            poptorch.MultiConv().planType(poptorch.MultiConvPlanType.Serial),
            poptorch.NameScope("a"),
        ):
            x = poptorch.set_available_memory(poptorch.nop(x), 0.2)
        x = poptorch.recomputationCheckpoint(x)
        mode = poptorch.MatMulSerializationMode.ReducingDim
        return poptorch.serializedMatMul(x, x.T, mode, factor=2)

    torch.testing.assert_close(poptorch.inferenceModel(forward)(X), X @ X.T)


def test_backward_is_not_called_in_or_after_a_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            (self.w * x).sum().backward()
            return x

    with pytest.raises(poptorch.Error, match="backward.. cannot be called inside a model"):
        poptorch.inferenceModel(Net())(X)
    out = poptorch.inferenceModel(lambda x: x + 1)(X)
    with pytest.raises(poptorch.Error, match="cannot be called explicitly on outputs"):
        out.backward()
