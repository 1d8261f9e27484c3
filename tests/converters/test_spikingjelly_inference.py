"""Neurons of SpikingJelly 2.0 that are read for inference, and run as their own arithmetic or rate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import equal, grid, rand, refused
from torch import nn

pytest.importorskip("spikingjelly.activation_based.neuron.dsr", reason="needs SpikingJelly 2.0.0")
from spikingjelly.activation_based import functional, neuron

from spikeport import deploy, targets
from spikeport.converters import verify
from spikeport.converters.capture import capture
from spikeport.converters.passes import flatten_time, lower_neurons
from spikeport.converters.program import Program, Time
from spikeport.deploy import pipeline
from spikeport.targets.ipu.model import training_module

pytestmark = pytest.mark.spikingjelly
T, N = 4, 2


def converted(net: nn.Module, x: torch.Tensor) -> Program:
    """The captured network, checked bit for bit with its lowered form."""
    program = pipeline.captured(net, (x,))
    for form in (program, lower_neurons(flatten_time(program))):
        assert equal(form(x), reference(net, x))
    return program


def reference(net: nn.Module, x: torch.Tensor) -> Any:
    work = copy.deepcopy(net).eval()
    functional.reset_net(work)
    with torch.no_grad():
        return work(x.clone())


#: Neurons that run over all steps alone, with the size of one step.
WHOLE = {
    "DSRIFNode": ((5,), {"v_threshold": 1.3}),
    "DSRLIFNode": ((5,), {"v_threshold": 0.7, "tau": 0.06}),
    "GatedLIFNode": ((6, 2, 2), {"T": T, "inplane": 6}),
    "ILCIFNode": ((6,), {"act_dim": 2, "dec_pop_dim": 3}),
    "ILCLIFNode": ((6,), {"act_dim": 2, "dec_pop_dim": 3, "v_threshold": 0.3}),
    "ILCCUBALIFNode": ((6,), {"act_dim": 2, "dec_pop_dim": 3}),
    "NoisyCUBALIFNode": ((6,), {"num_node": 6, "T": T, "is_training": False}),
    "NoisyILCCUBALIFNode": (
        (6,),
        {"act_dim": 2, "dec_pop_dim": 3, "T": T, "is_training": False},
    ),
}


class Copied(nn.Module):
    """Its input again, which the next layer may write to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.0


@pytest.mark.parametrize("name", WHOLE)
def test_neurons_that_run_over_all_steps(name: str, tmp_path: Path) -> None:
    size, given = WHOLE[name]
    net = nn.Sequential(Copied(), getattr(neuron, name)(**given)).eval()
    program = converted(net, grid(T, N, *size))
    x = grid(T, N, *size, seed=7)
    for time in ("unrolled", "stepped"):
        assert verify._probe_neurons(program, net, time)
        low = pipeline.converted(program, net, targets.get("reference"), torch.float32, time)
        deploy.compile(low, tmp_path / time, cache=False)
        with deploy.load(tmp_path / time) as model:
            spikes = model(x)
        assert torch.equal(spikes, reference(net, x))
        assert spikes.any()


def test_the_threshold_that_a_batch_norm_in_the_charge_becomes() -> None:
    node = neuron.MPBNLIFNode(out_features=5, step_mode="m").eval()
    for tensor in (node.vbn.running_var, node.vbn.weight, node.vbn.running_mean):
        nn.init.uniform_(tensor, 0.5, 2.0)
    node.re_parameterize_v_threshold()
    converted(nn.Sequential(nn.Identity(), node), rand(T, N, 5))


def test_an_integrator_of_populations() -> None:
    readout = neuron.NoisyNonSpikingIFNode(5, T=T, is_training=False, decode="max-mem")
    converted(nn.Sequential(nn.Identity(), readout), grid(T, N, 5))


class Potentials(nn.Module):
    """Layers of which nothing but potentials is read."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = neuron.NonSpikingLIFNode(tau=2.5, decode="mean-mem")
        self.analog = neuron.LIAFNode(
            tau=2.5, act=torch.sigmoid, threshold_related=True, step_mode="m", store_v_seq=True
        )
        self.lif = neuron.LIFNode(step_mode="m", store_v_seq=True)

    def forward(self, x: torch.Tensor) -> Any:
        analog = self.analog(x)
        self.lif(x)
        return self.mean(x), analog, self.analog.v_seq, self.lif.v_seq


@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["reference", "onnx", "ipu-sim"])
def test_layers_of_which_potentials_alone_are_read(target: str, time: Time) -> None:
    net, x = Potentials().eval(), 3 * rand(T, N, 5)
    program = deploy.convert(net, (x,), target, dtype="float32", time=time)
    for found, expected in zip(program(x), reference(net, x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["NoisyCUBALIFNode", "NoisyNonSpikingIFNode"])
def test_noise_is_refused(name: str) -> None:
    net = nn.Sequential(nn.Identity(), getattr(neuron, name)(5, T=T))
    assert ("noise", "1") in refused(net, rand(T, N, 5))


def test_a_time_constant_that_is_none() -> None:
    net = nn.Sequential(nn.Identity(), neuron.DSRLIFNode(tau=-2.0))
    assert refused(net, rand(T, N, 5)) == [("parameter", "1")]


@pytest.mark.parametrize("name", ["TernaryIFNode", "DSRIFNode"])
def test_neurons_for_inference_alone(name: str) -> None:
    net = nn.Sequential(nn.Linear(5, 5), getattr(neuron, name)())
    with pytest.raises(deploy.UnsupportedError) as caught:
        training_module(net)
    assert [(f.rule, f.where) for f in caught.value.findings] == [("inference-neuron", "1")]


@pytest.mark.parametrize("shape", [(1, 8), (8,), (N, 8)])
def test_a_tensor_to_start_from_is_refused(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(6, 8), neuron.IFNode(step_mode="m"))
    net[1].set_reset_value("v", torch.full(shape, 0.5))
    functional.reset_net(net)
    assert refused(net, rand(T, N, 6)) == [("start-value", "1")]


class Shared(nn.Module):
    """One neuron between layers of two sizes, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.lif = nn.Linear(6, 8), nn.Linear(8, 5), neuron.IFNode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functional.detach_net(self)
        return torch.stack([self.lif(self.b(self.lif(self.a(step)))) for step in x])


def test_a_neuron_that_starts_anew_between_shapes() -> None:
    net, x = Shared(), grid(T, N, 6)
    assert equal(capture(net, (x,))(x), reference(net, x))
    net.lif.set_reset_value("v", 0.5)
    functional.reset_net(net)
    assert refused(net, torch.zeros_like(x)) == [("neuron-state", "lif")]


class Rated(nn.Module):
    """A converted ANN, its output averaged over time."""

    def __init__(self, body: nn.Module, steps: int, mode: str) -> None:
        super().__init__()
        self.body, self.steps, self.mode = body, steps, mode
        functional.set_step_mode(body, mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "m":
            return self.body(x.repeat(self.steps, 1, 1, 1, 1)).mean(0)
        functional.reset_net(self.body)
        return sum(self.body(x) for _ in range(self.steps)) / self.steps


@pytest.mark.parametrize(
    ("mode", "pool", "target", "time"),
    [("s", nn.AvgPool2d, "onnx", "unrolled"), ("m", nn.MaxPool2d, "ipu-sim", "stepped")],
)
def test_networks_that_ann2snn_made(
    mode: str, pool: type[nn.Module], target: str, time: Time, tmp_path: Path
) -> None:
    ann2snn = pytest.importorskip("spikingjelly.activation_based.ann2snn", reason="needs requests")
    torch.manual_seed(0)
    ann = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), pool(2)),
        *(nn.Flatten(), nn.Linear(36, 5), nn.ReLU()),
    ).eval()
    samples = [(torch.rand(4, 1, 6, 6), torch.zeros(4)) for _ in range(3)]
    recipe = ann2snn.RateCodingRecipe(samples, mode="Max")
    net = Rated(ann2snn.Converter(recipe).convert(ann), 4, mode).eval()
    x = torch.rand(N, 1, 6, 6)
    program = deploy.convert(net, (x,), target, dtype="float32", time=time)
    deploy.compile(program, tmp_path / "made", cache=False, probe=True)
    with deploy.load(tmp_path / "made") as model:
        report = deploy.compare(net, model, [(x, torch.zeros(N, dtype=torch.long))])
    assert "no spike differs" in str(report)
