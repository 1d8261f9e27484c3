"""A wrapped model: its arguments, its weights, its optimizer, its device."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeport.targets.ipu.simulator import SimulatorWarning, poptorch


class Line(nn.Module):
    """y = w x, whose loss is y: the gradient of w is the sum of x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.w * x
        return poptorch.identity_loss(y, "sum") if self.training else y


def trainer(net: nn.Module, lr: float = 1.0, options: Any = None, **extra: Any) -> Any:
    optimizer = poptorch.optim.SGD(net.parameters(), lr=lr, **extra)
    return poptorch.trainingModel(net, options, optimizer)


END = (
    "\nThis error occurred because the inputs passed at runtime don't match the inputs used to compile "
    "the model.\n"
)


def two(x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
    return x * scale + y


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            (torch.ones(3), torch.ones(2)),
            "Shape mismatch for x: expected torch.Size([2]) but got torch.Size([3]).",
        ),
        (
            (torch.ones(2), torch.ones(2).int()),
            "Data type mismatch for y: expected torch.float32 but got torch.int32.",
        ),
        (
            (torch.ones(2), 1.0),
            "Type mismatch for y: expected <class 'torch.Tensor'> but got <class 'float'>.",
        ),
        (
            (torch.ones(2), torch.ones(2), 3.0),
            "Value mismatch for scale: expected 2.0 but got 3.0.",
        ),
    ],
)
def test_arguments_are_those_that_were_compiled(call: tuple[Any, ...], text: str) -> None:
    model = poptorch.inferenceModel(two)
    assert torch.equal(model(torch.ones(2), torch.ones(2)), torch.full((2,), 3.0))
    with pytest.raises(poptorch.Error) as caught:
        model(*call)
    assert str(caught.value).startswith(text + END)


def test_arguments_by_name_and_in_structures() -> None:
    def forward(pair: tuple[Tensor, Tensor], *, shift: Tensor, **more: Tensor) -> dict[str, Any]:
        return {"sum": pair[0] + pair[1] + shift, "more": [more["a"], None]}

    model = poptorch.inferenceModel(forward)
    x = torch.ones(2)
    out = model((x, x), shift=x, a=x)
    assert torch.equal(out["sum"], 3 * x)
    assert torch.equal(out["more"][0], x)
    assert out["more"][1] is None
    with pytest.raises(
        poptorch.Error, match=r"Length mismatch for pair: expected 2 elements but got 3"
    ):
        model((x, x, x), shift=x, a=x)
    with pytest.raises(
        poptorch.Error, match="Keys mismatch.*Unexpected arguments: b. Missing arguments: a"
    ):
        model((x, x), shift=x, b=x)
    with pytest.raises(poptorch.Error, match="^Mandatory parameter y missing$"):
        poptorch.inferenceModel(two)(x)
    with pytest.raises(
        AssertionError, match=r"Too many arguments provided: expected .* \(3\) but got 4"
    ):
        poptorch.inferenceModel(two)(x, x, 1.0, 1.0)


def test_a_batch_that_does_not_divide() -> None:
    options = poptorch.Options().deviceIterations(2).replicationFactor(3)
    with pytest.raises(AssertionError) as caught:
        poptorch.inferenceModel(nn.Identity(), options)(torch.ones(8, 1))
    text = str(caught.value)
    assert text.startswith(
        "Invalid batch dimension: In the input torch.Size([8, 1]), the batch dimension (8)"
    )
    assert "Options.deviceIterations(2) * Options.replicationFactor(3)" in text


def test_a_partial_last_batch_is_another_shape() -> None:
    model = poptorch.inferenceModel(nn.Identity())
    batches = torch.utils.data.DataLoader(torch.zeros(10, 2), batch_size=4)
    with pytest.raises(
        poptorch.Error, match=r"Shape mismatch for input: expected .*4, 2.* but got .*2, 2"
    ):
        [model(x) for x in batches]


def test_labels_out_of_range() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.head(x), y)

    net, x = Net(), torch.ones(2, 2)
    model = trainer(net)
    with pytest.raises(
        poptorch.Error, match=r"^cross_entropy: Target 3 is out of bounds\..*without a word"
    ):
        model(x, torch.tensor([0, 3]))
    model(x, torch.tensor([0, 2]))
    with pytest.raises(poptorch.Error, match=r"^cross_entropy: Target 7 is out of bounds"):
        model(x, torch.tensor([7, 2]))


def test_a_loss_that_is_not_finite_is_named_with_its_step() -> None:
    net = Line()
    model = trainer(net, 1e-3)
    model(torch.ones(1))
    with pytest.warns(SimulatorWarning, match="the loss is not finite in optimizer step 2"):
        model(torch.full((1,), float("inf")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1))  # once is enough
    options = poptorch.Options()
    options.Precision.enableFloatingPointExceptions(True)
    strict = trainer(Line(), options=options)
    with pytest.raises(poptorch.Error, match="the loss is not finite in optimizer step 1"):
        strict(torch.full((1,), float("nan")))


def test_types_are_the_devices() -> None:
    seen = []

    def forward(x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x.dtype)
        return x * 2, i + 1

    x, i = torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([2**31 - 2])
    out, index = poptorch.inferenceModel(forward)(x, i)
    assert seen == [torch.float32]
    assert (out.dtype, index.dtype) == (torch.float32, torch.int32)
    assert float(out) == float(2 * x.float())
    with pytest.warns(SimulatorWarning, match="outside of int32"):
        _, index = poptorch.inferenceModel(forward)(x, torch.tensor([2**32 + 5]))
    assert int(index) == 6


def test_weights_of_float64_are_float32_on_the_device() -> None:
    net = Line().double()
    model = trainer(net, 1 / 3)
    model(torch.ones(1))
    assert net.w.dtype == torch.float64
    assert float(net.w.detach()) == float(torch.tensor(1.0) - torch.tensor(1 / 3))


# Weights on the host and on the device


@pytest.mark.parametrize(
    "touch",
    [
        lambda net: net.w,
        lambda net: next(net.parameters()),
        lambda net: net.state_dict()["w"],
        lambda net: dict(net.named_parameters())["w"],
        lambda net: torch.equal(net.w, net.w) and net.w,
        lambda net: copy.deepcopy(net).w,
        lambda net: pickle.loads(pickle.dumps(net)).w,
        lambda net: torch.load(_saved(net), weights_only=True)["w"],
    ],
)
def test_touching_a_weight_brings_it_back(touch: Callable[[nn.Module], Tensor]) -> None:
    net = Line()
    model = trainer(net)
    for step in range(1, 3):
        model(torch.ones(1))
        assert float(touch(net).detach()) == 1 - step
    assert float(net.calls) == 2


def _saved(net: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    return file


def test_a_parameter_kept_from_before_follows_too() -> None:
    net = Line()
    kept, calls = net.w, net.calls
    trainer_ = trainer(net)
    trainer_(torch.ones(1))
    assert kept.tolist() == [0.0]
    assert calls.tolist() == [1.0]


def test_what_the_host_writes_needs_a_copy_to_the_device() -> None:
    net = Line()
    model = trainer(net)
    model(torch.ones(1))
    with torch.no_grad():
        net.w.fill_(10.0)
    model(torch.ones(1))
    assert float(net.w.detach()) == -1  # the device had kept its own
    with torch.no_grad():
        net.w.fill_(10.0)
    model.copyWeightsToDevice()
    model(torch.ones(1))
    assert float(net.w.detach()) == 9
    model.load_state_dict({"w": torch.tensor([5.0]), "calls": torch.zeros(1)})
    model(torch.ones(1))
    assert float(net.w.detach()) == 4


def test_inference_follows_training() -> None:
    net = Line()
    train = trainer(net)
    evaluate = poptorch.inferenceModel(net)
    evaluate.eval()
    train.train()
    assert evaluate(torch.ones(1)).tolist() == [1.0]
    train(torch.ones(1))
    assert evaluate(torch.ones(1)).tolist() == [0.0]


def test_flags_do_not_change_a_compiled_model() -> None:
    net = Line()
    model = trainer(net)
    loss = model(torch.ones(2))
    net.eval()
    assert model(torch.ones(2)).shape == loss.shape == ()


def test_a_model_is_wrapped_once() -> None:
    net = Line()
    model = trainer(net)
    with pytest.raises(
        RuntimeError, match=r"^Model has already been wrapped in 'poptorch.trainingModel'"
    ):
        trainer(net)
    model(torch.ones(1))
    model.destroy()
    assert type(net) is Line
    assert type(net.w) is nn.Parameter
    assert type(net.calls) is Tensor
    again = trainer(net)
    again(torch.ones(1))
    assert net.w.tolist() == [-1.0]
    net.destroy()
    with pytest.raises(
        poptorch.Error, match="^Model has not been compiled or has been destroyed.$"
    ):
        again.copyWeightsToHost()


def test_devices_are_let_go_and_taken() -> None:
    net = Line()
    model = trainer(net)
    model(torch.ones(1))
    model.detachFromDevice()
    assert not model.isAttachedToDevice()
    with torch.no_grad():
        net.w.fill_(3.0)
    with pytest.raises(poptorch.Error, match="already been detached"):
        model.detachFromDevice()
    model(torch.ones(1))  # attaches, and takes the host's weights
    assert model.isAttachedToDevice()
    assert net.w.tolist() == [2.0]
    offline = poptorch.inferenceModel(two, poptorch.Options().useOfflineIpuTarget())
    offline.compile(torch.ones(1), torch.ones(1))
    with pytest.raises(AssertionError, match="offline device"):
        offline(torch.ones(1), torch.ones(1))


def test_inference_does_not_accumulate_gradients() -> None:
    options = poptorch.Options()
    options.Training.gradientAccumulation(2)
    with pytest.raises(AssertionError, match="Gradient accumulation should be left to its default"):
        poptorch.inferenceModel(two, options)


# The optimizer


def test_an_optimizer_is_read_when_it_is_set() -> None:
    net = Line()
    optimizer = poptorch.optim.SGD(net.parameters(), lr=1.0)
    model = poptorch.trainingModel(net, None, optimizer)
    model(torch.ones(1))
    optimizer.param_groups[0]["lr"] = 0.25
    model(torch.ones(1))
    assert net.w.tolist() == [-1.0]
    model.setOptimizer(optimizer)
    model(torch.ones(1))
    assert net.w.tolist() == [-1.25]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.125)
    model.setOptimizer(optimizer)
    model(torch.ones(1))
    assert net.w.tolist() == [-1.28125]  # lr * 0.125


def test_what_is_passed_to_the_constructor_is_variable() -> None:
    net = Line()
    model = trainer(net, momentum=0.5)
    model(torch.ones(1))  # velocity 1
    model.setOptimizer(poptorch.optim.SGD(net.parameters(), lr=0.5, momentum=0.25))
    model(torch.ones(1))  # velocity 1.25
    assert net.w.tolist() == [1 - 1 - 0.5 * 1.25]


def test_constants_of_the_compiled_model() -> None:
    net = Line()
    model = trainer(net)
    model(torch.ones(1))
    changed = poptorch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.1, loss_scaling=2.0)
    with pytest.raises(poptorch.Error) as caught:
        model.setOptimizer(changed)
    assert "weight_decay (group 0): 0" in str(caught.value)
    assert "loss_scaling: 1.0 to 2.0" in str(caught.value)
    with pytest.raises(poptorch.Error, match="compiled with SGD, and this is Adam"):
        model.setOptimizer(poptorch.optim.Adam(net.parameters(), lr=1.0))
    marked = poptorch.optim.SGD(net.parameters(), lr=1.0)
    marked.variable_attrs.markAsVariable("weight_decay")
    model.destroy()
    again = poptorch.trainingModel(net, None, marked)
    again(torch.ones(1))
    marked.param_groups[0]["weight_decay"] = 0.1
    again.setOptimizer(marked)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: poptorch.optim.Adam(p, amsgrad=True), "Only non-amsgrad Adam/AdamW"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "Only non-amsgrad Adam/AdamW"),
        (torch.optim.Adagrad, "Unsupported optimizer type Adagrad"),
        (
            lambda p: poptorch.optim.Adam(p, accum_type=torch.float64),
            "either torch.float16 or torch.f",
        ),
        (lambda p: poptorch.optim.SGD(p, velocity_scaling=2.0), "only available with use_combined"),
        (
            lambda p: poptorch.optim.SGD(p, use_combined_accum=True, accum_type=torch.float16),
            "must not be set with use_combined_accum",
        ),
    ],
)
def test_optimizers_that_the_device_does_not_have(make: Any, text: str) -> None:
    net = Line()
    with pytest.raises(ValueError, match=text):
        poptorch.trainingModel(net, None, make(net.parameters()))


def test_the_default_optimizer_is_sgd() -> None:
    net = Line()
    model = poptorch.trainingModel(net)
    model(torch.ones(1))
    assert float(net.w.detach()) == pytest.approx(0.99)


def test_the_state_of_an_optimizer_is_the_devices() -> None:
    def run(net: nn.Module, optimizer: Any, grads: list[float]) -> None:
        model = poptorch.trainingModel(net, None, optimizer)
        for grad in grads:
            model(torch.tensor([grad]))
        model.destroy()

    whole, parts = Line(), Line()
    run(whole, poptorch.optim.Adam(whole.parameters(), lr=0.1), [1.0, 2.0, -3.0, 0.5])
    first = poptorch.optim.Adam(parts.parameters(), lr=0.1)
    run(parts, first, [1.0, 2.0])
    second = poptorch.optim.Adam(parts.parameters(), lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(parts, second, [-3.0, 0.5])
    assert torch.equal(whole.w, parts.w)
    with pytest.raises(RuntimeError, match="calling the poptorch.trainingModel runs"):
        second.step()


# Executables


def test_the_cache_holds_one_executable_for_each_graph(tmp_path: Path) -> None:
    options = poptorch.Options().enableExecutableCaching(str(tmp_path))
    for size in (2, 2, 3):
        poptorch.inferenceModel(two, options.clone())(torch.ones(size), torch.ones(size))
    assert len(list(tmp_path.iterdir())) == 2
    document = json.loads(next(tmp_path.iterdir()).read_text())
    assert document["simulated"] is True
    assert any("mul" in line for line in document["graph"])


def test_executables_are_exported_and_loaded(tmp_path: Path) -> None:
    x, path = torch.ones(2), str(tmp_path / "two.poptorch")
    poptorch.inferenceModel(two).compileAndExport(path, x, x, export_model=False)
    model = poptorch.inferenceModel(two)
    model.loadExecutable(path)
    assert model.isCompiled()
    assert torch.equal(model(x, x), 3 * x)
    with pytest.raises(poptorch.Error, match="compiled from another model"):
        poptorch.inferenceModel(lambda x, y, scale: x - y).loadExecutable(path)
    (tmp_path / "cut").write_text(Path(path).read_text()[:50])
    with pytest.raises(poptorch.Error, match="is not a PopTorch file"):
        model.loadExecutable(str(tmp_path / "cut"))


def test_inner_tensors_come_back() -> None:
    def forward(x: Tensor) -> Tensor:
        return (x * 2).sum().reshape(1)

    model = poptorch.inferenceModel(forward)
    model(torch.ones(2))
    assert {"input_0", "mul", "sum"} <= set(model.getTensorNames())
    options = poptorch.Options().deviceIterations(2)
    options.anchorTensor("twice", "mul")
    anchored = poptorch.inferenceModel(forward, options)
    anchored(torch.arange(4.0))
    assert anchored.getAnchoredTensor("twice").tolist() == [0, 2, 4, 6]
    with pytest.raises(AssertionError, match="No tensor with name other found"):
        anchored.getAnchoredTensor("other")
    unknown = poptorch.Options()
    unknown.anchorTensor("twice", "nothing")
    with pytest.raises(poptorch.Error, match="No tensor with name nothing found"):
        poptorch.inferenceModel(forward, unknown)(torch.ones(2))


def test_there_is_no_clock() -> None:
    model = poptorch.inferenceModel(two)
    for read in (model.cycleCount, model.getLatency, model.getPerfCounters):
        with pytest.raises(poptorch.Error, match="neither cycles nor latencies"):
            read()
