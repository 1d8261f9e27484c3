"""The adapter: one code path, on the simulated SDK and on modules named like the vendor's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from spikeport import deploy, targets
from spikeport.converters.errors import (
    CompileError,
    DeviceError,
    TargetUnavailableError,
    UsageError,
)
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.converters.program import Program
from spikeport.targets.lynxi.simulator import install, options


class Net(nn.Module):
    """[T, N, 2, 8, 8] and a bias image [N, 3, 6, 6] -> firing rates and the spikes themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.first = LIFNode(v_reset=-0.25)
        self.fc = nn.Linear(108, 5)
        self.second = IFNode(v_reset=None)

    def forward(self, x: torch.Tensor, bias: torch.Tensor):
        T, N = x.shape[:2]
        y = self.conv(x.flatten(0, 1)).unflatten(0, (T, N)) * 4 + bias
        spikes = self.first(y)
        rates = self.second(self.fc(spikes.flatten(2))).mean(0)
        return {"rates": rates, "spikes": spikes}


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(4, 2, 2, 8, 8), torch.rand(2, 3, 6, 6)


@pytest.fixture
def program(inputs: tuple[torch.Tensor, torch.Tensor]) -> Program:
    torch.manual_seed(0)
    return deploy.convert(Net().eval(), inputs, target="lynxi-sim")


def _ports(program: Program):
    ins = [(s.graph_shape, program.dtype) for s in program.inputs]
    return ins, [(s.graph_shape, program.dtype) for s in program.outputs]


@pytest.mark.parametrize("model_type", ["Pytorch", "ONNX"])
def test_device_equals_program_bit_for_bit(program, inputs, tmp_path, model_type) -> None:
    target = targets.get("lynxi-sim")
    compiled = target.compile(program, tmp_path, {"model_type": model_type})
    assert "net_params.json" in compiled.files
    model = target.load(tmp_path, *_ports(program), device=2)
    found = program.nest(model.run(program.flat_inputs(inputs)))
    expected = program(*inputs)
    assert torch.equal(found["rates"], expected["rates"])
    assert torch.equal(found["spikes"], expected["spikes"])
    assert expected["spikes"].shape == (4, 2, 3, 6, 6)
    assert 0 < expected["spikes"].mean() < 1


class Events(nn.Module):
    """Events [T, N, 6] of any type -> spikes [T, N, 6] of the whole parts of what is weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.neuron = LIFNode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neuron((self.fc(x.float()) * 8).int().float() / 4 + 1)


@pytest.mark.parametrize(
    ("given", "dtype", "time", "model_type"),
    [
        (torch.uint8, "float16", "unrolled", "Pytorch"),
        (torch.bool, "float32", "stepped", "Pytorch"),
        (torch.int32, "float16", "stepped", "ONNX"),
    ],
)
def test_whole_numbers_go_in_as_they_are(tmp_path, given, dtype, time, model_type) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 2, (4, 3, 6)).to(given)
    program = deploy.convert(Events(), (x,), target="lynxi-sim", dtype=dtype, time=time)
    deploy.compile(program, tmp_path / "a", cache=False, model_type=model_type)
    spikes = deploy.load(tmp_path / "a")(x)
    assert torch.equal(spikes, program(x))
    assert 0 < spikes.mean() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_a_division_that_it_would_round_otherwise_is_refused(dtype: torch.dtype) -> None:
    """Lyngor takes the floor of the quotient: 3.5 / 0.7 is 5 there, and 3.5 // 0.7 is 4."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x // (0.7 if dtype.is_floating_point else 2)

    (floor,) = deploy.check(Net(), (torch.ones(4, 6, dtype=dtype),), ["lynxi-sim"]).errors
    assert floor.found == "aten.floor_divide"
    assert "torch.floor(x / y)" in floor.fix


def test_a_division_of_whole_numbers_towards_zero_is_refused() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.div(2, rounding_mode="trunc")

    (found,) = deploy.check(Net(), (torch.ones(4, dtype=torch.int32),), ["lynxi-sim"]).errors
    assert "torch.int32 towards zero" in found.found


def test_another_form_than_lyngor_is_given_is_refused(program, tmp_path) -> None:
    with pytest.raises(UsageError, match="model_type is 'Keras'; allowed: Pytorch, ONNX"):
        targets.get("lynxi-sim").compile(program, tmp_path, {"model_type": "Keras"})


def test_a_weight_and_a_part_of_it(tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.lif = nn.Parameter(torch.randn(6, 6)), LIFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lif(nn.functional.linear(x, self.weight) * self.weight[0])

    net, x = Parts().eval(), torch.randn(3, 2, 6)
    with options(storage="float32"), torch.no_grad():
        program = deploy.convert(net, (x,), "lynxi-sim", dtype="float32")
        deploy.compile(program, tmp_path / "parts", cache=False)
        with deploy.load(tmp_path / "parts") as model:
            assert torch.equal(model(x), net(x))


def test_results_survive_the_next_call(program, inputs, tmp_path) -> None:
    target = targets.get("lynxi-sim")
    target.compile(program, tmp_path, {})
    model = target.load(tmp_path, *_ports(program), device=0)
    first = model.run(program.flat_inputs(inputs))
    kept = [y.clone() for y in first]
    model.run(program.flat_inputs((torch.zeros_like(inputs[0]), inputs[1])))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_no_tensor_above_rank_4_and_no_write(program) -> None:
    ranks = {n.meta["val"].dim() for n in program.graph.nodes if n.op == "call_function"}
    assert max(ranks) <= 4
    assert not [
        n for n in program.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable
    ]


def test_without_the_sdk_the_error_names_the_simulator() -> None:
    with pytest.raises(TargetUnavailableError, match=r"lyngor.*Lynxi supplies it.*lynxi-sim"):
        targets.get("lynxi").sdk()


def test_the_real_target_runs_on_modules_of_the_vendors_names(program, inputs, tmp_path) -> None:
    """With lyngor and lynpy importable, ``lynxi`` takes them; nothing falls back."""
    target = targets.get("lynxi")
    with install():
        assert not target.sdk().simulated
        target.compile(program, tmp_path, {})
        model = target.load(tmp_path, *_ports(program), device=0)
        found = program.nest(model.run(program.flat_inputs(inputs)))
    assert torch.equal(found["rates"], program(*inputs)["rates"])
    assert "lyngor" not in sys.modules


def test_no_such_device(program, tmp_path) -> None:
    target = targets.get("lynxi-sim")
    target.compile(program, tmp_path, {})
    with pytest.raises(DeviceError, match=r"device 7.*0, 1, 2"):
        target.load(tmp_path, *_ports(program), device=7)


def test_an_unknown_option_lists_those_there_are(program, tmp_path) -> None:
    with pytest.raises(
        UsageError, match=r"no option batch_size; there are model_type, apu_only, build_mode"
    ):
        targets.get("lynxi-sim").compile(program, tmp_path, {"batch_size": 4})


def test_the_compilers_refusal_is_ours(program, tmp_path) -> None:
    with pytest.raises(CompileError, match=r"lyngor 1.1.0 refused the program: .*abc_map"):
        targets.get("lynxi-sim").compile(program, tmp_path, {"build_mode": "abc_only"})


def test_a_strict_simulator_takes_what_the_passes_make(program, tmp_path: Path) -> None:
    with options(strict=True):
        targets.get("lynxi-sim").compile(program, tmp_path, {"apu_only": True})


def test_names_near_a_target_are_suggested() -> None:
    with pytest.raises(UsageError, match="did you mean lynxi-sim"):
        targets.get("lynxi_sim")
