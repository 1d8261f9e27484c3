"""What artifacts run: the network's numbers, shapes, their verification, devices and SDKs."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from artifacts import BATCH, T, edit, leaves
from safetensors.torch import load_file, save_file
from torch import nn

from spikeport import deploy, targets
from spikeport.converters import neurons
from spikeport.converters.program import TensorSpec
from spikeport.deploy import store
from spikeport.deploy.ports import Port
from spikeport.deploy.samples import by_size

# What runs


def test_the_model_gives_what_the_source_network_gives(net, made):
    x = torch.rand(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with deploy.load(made.path) as model:
        found = model(x)
        assert (model.T, model.batch, model.target) == (T, BATCH, "lynxi-sim")
    with torch.no_grad():
        expected = net(x)
    assert found.keys() == expected.keys()
    assert isinstance(found["more"], tuple)
    assert [y.shape for y in leaves(found)] == [y.shape for y in leaves(expected)]
    assert [y.dtype for y in leaves(found)] == [torch.float32] * 3
    assert (found["more"][0] != expected["more"][0]).float().mean() < 0.02
    assert found["more"][0].any()


def test_a_converted_network_equals_the_device_bit_for_bit(program, made):
    x = torch.rand(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    with deploy.load(made.path) as model:
        assert all(map(torch.equal, leaves(model(x)), leaves(program(x))))


@pytest.mark.parametrize("n", [1, 3])
def test_a_smaller_batch_gives_the_same_samples(made, n):
    x = torch.rand(BATCH, 1, 8, 8)
    with deploy.load(made.path) as model:
        full, part = model(x), model(x[:n])
        _, spikes = model.probe(x)
        _, fewer = model.probe(x[:n])
    assert torch.equal(part["rate"], full["rate"][:n])
    assert torch.equal(part["more"][0], full["more"][0][:, :n])
    assert torch.equal(part["more"][1], full["more"][1][:n])
    assert all(torch.equal(fewer[site], spikes[site][:, :n]) for site in spikes)


@pytest.mark.parametrize("target", ["reference", "lynxi-sim"])
def test_threads_take_turns(net, target, tmp_path):
    inputs = [
        torch.rand(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    artifact = deploy.compile(deploy.convert(net, (inputs[0],), target), tmp_path / "shared")
    with artifact.load() as model, ThreadPoolExecutor(2) as threads:
        expected = [leaves(model(x)) for x in inputs]
        for found in threads.map(lambda i: [leaves(model(inputs[i])) for _ in range(40)], (0, 1)):
            wanted = expected[[torch.equal(found[0][0], y[0]) for y in expected].index(True)]
            assert all(all(map(torch.equal, wanted, outputs)) for outputs in found)


def test_numbers_beyond_those_of_the_graph_are_refused(made):
    x = torch.rand(BATCH, 1, 8, 8)
    x[0, 0, 0, :2] = torch.tensor([torch.inf, 7e4])
    with (
        deploy.load(made.path) as model,
        pytest.raises(
            deploy.UsageError, match="input x reaches 70000, beyond float16's 65504; scale"
        ),
    ):
        model(x)


def test_negated_views_and_infinities_go_in_as_they_are(program, made):
    x = torch.rand(BATCH, 1, 8, 8)
    with deploy.load(made.path) as model:
        assert all(map(torch.equal, leaves(model(torch._neg_view(-x))), leaves(model(x))))
        model(x.index_fill(0, torch.tensor([1]), torch.inf))


def test_a_closed_model_runs_no_more(made):
    model = deploy.load(made.path)
    model.close()
    for use in (model, model.probe):
        with pytest.raises(deploy.DeviceError, match="the model is closed; load it again"):
            use(torch.rand(BATCH, 1, 8, 8))


def test_no_number_is_equal_to_itself(tmp_path):
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.fire = neurons.IFNode()

        def forward(self, x):
            rates = self.fire(x).mean(0)
            return rates / rates.sum(1, keepdim=True)

    x = torch.rand(T, BATCH, 5).index_fill(1, torch.tensor([2]), 0.0)
    program = deploy.convert(Normalised(), (x,), "reference")
    assert program(x).isnan().any()
    found = deploy.compile(program, tmp_path / "made").verify()
    assert (found.ok, found.equal, found.largest_difference) == (True, True, 0.0)


def test_calls_start_from_v_0(made):
    x = torch.rand(BATCH, 1, 8, 8)
    with deploy.load(made.path) as model:
        first = model(x)
        model(torch.ones_like(x))
        assert all(map(torch.equal, leaves(first), leaves(model(x))))


def test_results_outlive_the_next_call(made):
    with deploy.load(made.path) as model:
        first = model(torch.rand(BATCH, 1, 8, 8))
        before = [y.clone() for y in leaves(first)]
        model(torch.zeros(BATCH, 1, 8, 8))
    assert all(map(torch.equal, leaves(first), before))


def test_the_probe_gives_the_spikes_of_every_layer(made, program):
    x = torch.rand(BATCH, 1, 8, 8)
    with deploy.load(made.path) as model:
        outputs, spikes = model.probe(x)
        assert all(map(torch.equal, leaves(outputs), leaves(model(x))))
    assert {site: tuple(s.shape) for site, s in spikes.items()} == {
        "fire": (T, BATCH, 4, 8, 8),
        "out": (T, BATCH, 5),
    }
    values = {}
    program.run((x,), observe=lambda node, value: values.update({node.name: value}))
    for site in program.sites:
        assert torch.equal(spikes[site.name], site.fired(values))
    assert torch.equal(spikes["out"].float(), outputs["more"][0])


def test_without_a_probe_the_error_says_how_to_get_one(program, tmp_path):
    plain = deploy.compile(program, tmp_path / "plain", probe=False)
    assert not (plain.path / "probe").exists()
    with deploy.load(plain.path) as model:
        assert not model.has_probes
        with pytest.raises(deploy.UsageError, match=r"probe=True"):
            model.probe(torch.rand(BATCH, 1, 8, 8))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((torch.rand(BATCH + 1, 1, 8, 8),), "batch 5"),
        ((torch.rand(0, 1, 8, 8),), "batch 0"),
        ((torch.rand(BATCH, 1, 8, 7),), "[4, 1, 8, 7]"),
        ((torch.rand(BATCH, 8, 8),), "[4, 8, 8]"),
        ((torch.tensor(1.0),), "float32[]"),
        ((torch.ones(BATCH, 1, 8, 8, dtype=torch.uint8),), "uint8"),
        ((), "0 inputs given, 1 wanted"),
        ((np.zeros((BATCH, 1, 8, 8)),), "inputs of type ndarray, not dense torch tensors"),
        (
            (torch.rand(BATCH, 1, 8, 8).to_sparse(),),
            "inputs of type Tensor (sparse_coo), not dense",
        ),
        ((torch.rand(BATCH, 1, 8, 8).to("meta"),), "inputs of type Tensor (meta), not dense"),
        ((torch.rand(BATCH, 1, 8, 8),) * 2, "2 inputs given, 1 wanted"),
    ],
)
def test_other_shapes_are_refused_with_those_allowed(made, inputs, said):
    with deploy.load(made.path) as model, pytest.raises(deploy.UsageError) as caught:
        model(*inputs)
    assert said in str(caught.value)
    assert "x float32[N, 1, 8, 8] with 1 <= N <= 4" in str(caught.value)


def test_batches_of_two_inputs_must_be_equal(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = neurons.IFNode(v_threshold=0.5)

        def forward(self, a, b):
            return self.out(a + b).sum(0)

    a, b = (torch.randint(0, 8, shape) / 8 for shape in ((T, BATCH, 6), (BATCH, 6)))
    two = deploy.compile(deploy.convert(Two(), (a, b), "lynxi-sim"), tmp_path / "two")
    with two.load() as model:
        assert torch.equal(model(a, b), Two()(a, b))
        assert torch.equal(model(a[:, :3], b[:3]), Two()(a, b)[:3])
        with pytest.raises(deploy.UsageError, match="batch 3 and 4"):
            model(a, b[:3])


@pytest.mark.parametrize(
    ("shape", "folded", "steps", "batch", "dim"),
    [
        ((16, 10), False, 4, 16, 0),
        ((4, 16, 10), False, 4, 16, 1),
        ((4, 16, 10), True, 4, 16, 1),
        ((4, 4, 10), True, 4, 4, 1),
        ((4, 4, 10), False, 4, 4, None),  # either may be the batch
        ((4, 1, 10), False, 4, 4, 0),
        ((1, 16, 10), False, 1, 16, 1),
        ((7, 16), False, 4, 16, None),
        ((), False, 4, 16, None),
        ((64, 10), False, 4, 16, None),
    ],
)
def test_which_dimension_is_the_batch(shape, folded, steps, batch, dim):
    program = SimpleNamespace(T=steps, batch=batch, stepping=None)
    assert by_size(program, TensorSpec("y", shape, torch.float32, folded)) == dim


def test_where_sizes_do_not_tell_the_batch_from_time_the_order_of_samples_does(tmp_path):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = neurons.IFNode(v_threshold=0.5)

        def forward(self, x):
            return self.out(x.expand(T, -1, -1)).transpose(0, 1).transpose(0, 2).sum(0)

    x = torch.randint(0, 8, (T, 6)) / 8  # as many samples as time steps
    made = deploy.compile(deploy.convert(Transposed(), (x,), "lynxi-sim"), tmp_path / "square")
    assert made.manifest["outputs"][0]["shape"] == [T, T]
    with made.load() as model:
        assert torch.equal(model(x), Transposed()(x))
        assert torch.equal(model(x[:2]), Transposed()(x[:2]))


def test_a_port_survives_json():
    port = Port(TensorSpec("y", (4, 16, 10), torch.int32, True), 1, torch.float16)
    assert Port.from_dict(json.loads(json.dumps(port.to_dict()))) == port


# Verification


def test_verify_replays_the_recorded_inputs(made):
    found = made.verify(device=2)
    assert found.ok
    assert found.equal
    assert (found.source, found.samples, found.largest_difference) == ("device", 1, 0.0)
    assert "equal bit for bit" in str(found)


def record_anew(made: deploy.Artifact, source: str, by: float) -> deploy.Artifact:
    """The artifact as if another output had been recorded, its hashes right."""
    file = made.path / "samples.safetensors"
    samples = load_file(file)
    samples["0.output.0"] = samples["0.output.0"] + by * torch.arange(5)
    save_file(samples, file)
    entries = dict(made.manifest["files"])
    entries[file.name] = {
        "sha256": store.file_sha256(file),
        "size": file.stat().st_size,
    }
    edit(made.path, files=entries, samples={"source": source, "calls": 1})
    return deploy.Artifact.open(made.path)


def test_a_bit_that_differs_from_the_device_recording_fails(made):
    found = record_anew(made, "device", by=2**-12).verify()
    assert not found.ok
    assert found.largest_difference == pytest.approx(4 * 2**-12)
    assert str(found).startswith("VERIFICATION FAILED")


def test_what_the_host_recorded_may_differ_by_rounding_and_not_by_class(made):
    near = record_anew(made, "host", by=1e-6).verify()
    assert near.ok
    assert not near.equal
    far = record_anew(made, "host", by=-100.0).verify()
    assert far.agreement is not None
    assert not far.ok


def test_where_no_device_is_there_the_host_records(program, tmp_path, monkeypatch, caplog):
    def none(*_: object) -> None:
        raise deploy.DeviceError("no device")

    monkeypatch.setattr(targets.lynxi.adapter.Lynxi, "load", none)
    made = deploy.compile(program, tmp_path / "made")
    assert made.manifest["samples"] == {"source": "host", "calls": 1}
    assert "no device" in caplog.text
    monkeypatch.undo()
    assert made.verify().agreement == 1.0


# Devices and SDKs


def test_a_device_that_is_not_there_is_an_error_with_those_there(made):
    with pytest.raises(deploy.DeviceError, match=r"7.*0, 1, 2"):
        deploy.load(made.path, device=7)


def test_the_real_sdk_is_never_replaced_by_the_simulated_one(made):
    edit(made.path, target="lynxi")
    with pytest.raises(deploy.TargetUnavailableError, match="lynxi-sim"):
        deploy.load(made.path)


def test_another_sdk_version_is_a_warning(made, monkeypatch, caplog):
    monkeypatch.setenv("SPIKEPORT_LYNXI_SIM_VERSION", "1.17.0")
    with caplog.at_level(logging.WARNING), deploy.load(made.path):
        pass
    assert "lyngor 1.1.0" in caplog.text
    assert "lyngor 1.17.0" in caplog.text
