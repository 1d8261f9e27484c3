"""Artifacts, compiled and run on the simulated Lynxi SDK."""

import copy
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spikeport import deploy, targets
from spikeport.converters import neurons
from spikeport.converters.program import TensorSpec
from spikeport.deploy import store
from spikeport.deploy.manifest import write_manifest
from spikeport.deploy.model import Port
from spikeport.deploy.samples import by_size

T, BATCH = 3, 4


class Net(nn.Module):
    """x [N, 1, 8, 8] -> a dict of rates [N, 5] and, as a tuple, spikes [T, N, 5] and a sum [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fire = neurons.IFNode()
        self.fc = nn.Linear(4 * 16, 5)
        self.out = neurons.LIFNode(v_threshold=0.2)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = self.bn(self.conv(x)).unsqueeze(0).expand(T, -1, -1, -1, -1)
        y = nn.functional.max_pool2d(self.fire(y).flatten(0, 1), 2).flatten(1)
        spikes = self.out(self.fc(y).unflatten(0, (T, -1)))
        return {"rate": spikes.mean(0), "more": (spikes, spikes.sum((0, 2)))}


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    net.bn.running_mean.uniform_(-0.5, 0.5)
    net.conv.weight.data *= 4
    return net.eval()


@pytest.fixture(scope="module")
def net() -> Net:
    return build()


@pytest.fixture(scope="module")
def program(net: Net) -> deploy.Program:
    return deploy.convert(net, (torch.rand(BATCH, 1, 8, 8),), "lynxi-sim")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPIKEPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def compiled(program: deploy.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an artifact and the cache that its compile filled."""
    root = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKEPORT_CACHE", str(root / "cache"))
        deploy.compile(program, root / "made")
    return root


@pytest.fixture
def made(compiled: Path, tmp_path: Path, cache: Path) -> deploy.Artifact:
    """An artifact to damage, as if it had just been compiled."""
    shutil.copytree(compiled, tmp_path, dirs_exist_ok=True)
    return deploy.Artifact.open(tmp_path / "made")


def leaves(outputs: dict) -> list[torch.Tensor]:
    return [outputs["rate"], *outputs["more"]]


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def edit(path: Path, **changes: object) -> None:
    """Change the manifest as someone who knows the digest would."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    write_manifest(path, manifest)


# What is written


def test_the_directory_holds_what_the_docstring_lists(made, program):
    names = set(files(made.path))
    assert {"manifest.json", "weights.safetensors", "program.txt", "samples.safetensors"} < names
    assert {name.split("/")[0] for name in names if "/" in name} == {"device", "probe"}
    weights = load_file(made.path / "weights.safetensors")
    assert weights.keys() == program.tensors.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in program.tensors.items())
    assert (made.path / "program.txt").read_text() == f"{program}\n"


def test_the_manifest_says_what_was_compiled(made, program):
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["target"] == "lynxi-sim"
    assert manifest["sdk"] == {"name": "lyngor", "version": "1.1.0", "simulated": True}
    assert (manifest["T"], manifest["batch"], manifest["dtype"]) == (T, BATCH, "float16")
    assert manifest["source"]["class"].endswith(".Net")
    assert manifest["source"]["torch"] == torch.__version__
    assert manifest["state"] == "each call starts from v_0"
    assert manifest["samples"] == {"source": "device", "calls": 1}
    assert [n["path"] for n in manifest["neurons"]] == ["fire", "out"]
    assert manifest["neurons"][1]["neuron"]["v_threshold"] == 0.2
    assert manifest["evidence"]["examples"] >= 1
    assert [(p["name"], p["done"]) for p in manifest["passes"]] == [
        (report.name, list(report.done)) for report in program.history
    ]
    assert [(p["shape"], p["batch_dim"]) for p in manifest["outputs"]] == [
        ([BATCH, 5], 0),
        ([T, BATCH, 5], 1),
        ([BATCH], 0),
    ]
    assert set(manifest["files"]) == set(files(made.path)) - {"manifest.json"}


def test_the_same_program_gives_the_same_bytes(program, made, tmp_path):
    again = deploy.compile(program, tmp_path / "again", cache=False)
    assert not again.cached
    assert files(again.path) == files(made.path)


def test_everyone_who_may_read_the_directory_may_read_the_files(made):
    folder = made.path.stat().st_mode & 0o444
    modes = {p.name: p.stat().st_mode & 0o444 for p in made.path.iterdir() if p.is_file()}
    assert modes == dict.fromkeys(modes, folder)


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
        ((np.zeros((BATCH, 1, 8, 8)),), "inputs of type ndarray, not torch tensors"),
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


# The cache


def test_compiling_again_takes_the_cached_artifact(program, made, tmp_path, monkeypatch):
    monkeypatch.setattr(targets.lynxi.adapter.Lynxi, "compile", None)
    again = deploy.compile(program, tmp_path / "again")
    assert again.cached
    assert "compiled before" in str(again)
    assert files(again.path) == files(made.path)


def test_the_same_artifact_at_the_same_place_stays(program, made):
    before = (made.path / "manifest.json").stat().st_mtime_ns
    again = deploy.compile(program, made.path)
    assert again.cached
    assert (made.path / "manifest.json").stat().st_mtime_ns == before


def test_evidence_that_comes_later_gets_into_the_cached_artifact(net, program, tmp_path):
    bare = deploy.convert(net, program.examples[0], "lynxi-sim", verify=False)
    first = deploy.compile(bare, tmp_path / "bare")
    assert first.manifest["evidence"] is None
    second = deploy.compile(program, tmp_path / "verified")
    assert second.cached
    assert second.manifest["evidence"] == json.loads(json.dumps(program.evidence.to_dict()))


def test_whatever_decides_the_content_decides_the_key(net, program, made, tmp_path, monkeypatch):
    def key(name: str, what: deploy.Program = program, **options: object) -> str:
        return deploy.compile(what, tmp_path / name, **options).manifest["key"]

    other = copy.deepcopy(net)
    other.fc.bias.data[0] += 0.25
    x = program.examples[0]
    keys = [
        made.manifest["key"],
        key("weights", deploy.convert(other, x, "lynxi-sim", verify=False)),
        key("dtype", deploy.convert(net, x, "lynxi-sim", dtype="float32", verify=False)),
        key("batch", deploy.convert(net, (x[0][:2],), "lynxi-sim", verify=False)),
        key("options", opt_level=2),
        key("probe", probe=False),
    ]
    monkeypatch.setenv("SPIKEPORT_LYNXI_SIM_VERSION", "1.17.0")
    keys.append(key("sdk"))
    assert len(set(keys)) == len(keys)


def test_a_corrupt_cache_entry_is_thrown_away_and_built_anew(
    program, made, cache, tmp_path, caplog
):
    entry = cache / "artifacts" / made.manifest["key"]
    weights = entry / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    again = deploy.compile(program, tmp_path / "again")
    assert not again.cached
    assert "weights.safetensors was changed" in caplog.text
    assert files(again.path) == files(made.path)
    assert files(entry) == files(made.path)
    assert deploy.compile(program, tmp_path / "third").cached


def test_no_cache_neither_reads_nor_writes_it(program, cache, tmp_path):
    deploy.compile(program, tmp_path / "first", cache=False)
    assert not cache.exists()
    deploy.compile(program, tmp_path / "second")
    assert not deploy.compile(program, tmp_path / "third", cache=False).cached


def test_a_cache_that_cannot_be_written_is_a_warning(program, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIKEPORT_CACHE", str(tmp_path / "file" / "cache"))
    made = deploy.compile(program, tmp_path / "made")
    assert made.verify().ok
    assert "not cached" in caplog.text


def test_the_cache_lies_where_xdg_says(program, made, tmp_path, monkeypatch):
    monkeypatch.delenv("SPIKEPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    deploy.compile(program, tmp_path / "second")
    assert (tmp_path / "xdg/spikeport/artifacts" / made.manifest["key"] / "manifest.json").exists()


# The output directory


def test_another_artifact_is_replaced_only_on_request(program, made):
    with pytest.raises(deploy.ArtifactExistsError, match=r"another artifact.*overwrite=True"):
        deploy.compile(program, made.path, probe=False)
    assert made.verify().ok
    replaced = deploy.compile(program, made.path, probe=False, overwrite=True)
    assert not (replaced.path / "probe").exists()
    assert replaced.verify().ok
    assert [p.name for p in made.path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_damaged_artifact_is_replaced_on_request(program, made):
    (made.path / "weights.safetensors").unlink()
    with pytest.raises(deploy.ArtifactExistsError, match=r"weights\.safetensors is missing"):
        deploy.compile(program, made.path)
    assert deploy.compile(program, made.path, overwrite=True).verify().ok


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_spikeport_did_not_write_is_never_overwritten(program, made, tmp_path, overwrite):
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_text("meow")
    (made.path / "notes.txt").write_text("mine")
    for path, name in ((other, "cat.png"), (made.path, "notes.txt")):
        with pytest.raises(deploy.ArtifactExistsError, match=name):
            deploy.compile(program, path, overwrite=overwrite, probe=False)
        assert (path / name).exists()
    file = tmp_path / "file"
    file.write_text("data")
    with pytest.raises(deploy.ArtifactExistsError, match="is a file"):
        deploy.compile(program, file, overwrite=overwrite)
    assert file.read_text() == "data"


def test_the_current_directory_is_used_if_it_is_empty(program, tmp_path, monkeypatch):
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inner")
    made = deploy.compile(program, ".")
    assert (made.path, deploy.Artifact.open(".").verify().ok) == (Path.cwd(), True)
    assert deploy.compile(program, ".").cached
    with pytest.raises(deploy.ArtifactError, match="is the current directory"):
        deploy.compile(program, ".", probe=False, overwrite=True)
    assert deploy.Artifact.open(".").verify().ok
    with pytest.raises(deploy.ArtifactExistsError, match="inner/manifest.json"):
        deploy.compile(program, "..")
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["here"]


def test_an_empty_directory_and_a_new_path_are_used(program, tmp_path):
    (tmp_path / "empty").mkdir()
    assert deploy.compile(program, tmp_path / "empty").verify().ok
    assert deploy.compile(program, tmp_path / "a" / "b" / "c").verify().ok


def test_a_directory_that_cannot_be_written_is_an_error(program, tmp_path):
    (tmp_path / "file").write_text("")
    # /proc refuses root too, and a name has up to 255 characters.
    for path in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(deploy.ArtifactError, match=r"cannot be written.*choose another"):
            deploy.compile(program, path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("builds", [0, 1])
def test_an_interrupted_compile_leaves_nothing(program, tmp_path, monkeypatch, error, builds):
    """Ctrl-C while the vendor's compiler writes, in the first or in the second build."""
    real, calls = targets.lynxi.adapter.Lynxi.compile, []

    def interrupted(self, what, directory, options):
        calls.append(directory)
        if len(calls) <= builds:
            return real(self, what, directory, options)
        (directory / "half").write_text("half")
        raise error

    monkeypatch.setattr(targets.lynxi.adapter.Lynxi, "compile", interrupted)
    raised = deploy.ArtifactError if error is OSError else error
    with pytest.raises(raised):
        deploy.compile(program, tmp_path / "here" / "out")
    assert len(calls) == builds + 1
    assert list((tmp_path / "here").iterdir()) == []
    monkeypatch.undo()


def test_an_interrupted_replacement_keeps_the_old_artifact(program, made, monkeypatch):
    before, real = files(made.path), Path.rename

    def interrupted(self, target):
        if "partial" in self.name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deploy.compile(program, made.path, overwrite=True, cache=False, probe=False)
    assert files(made.path) == before
    assert [p.name for p in made.path.parent.iterdir() if p.name.startswith(".")] == []


# Damage


def kinds(made: deploy.Artifact) -> list[str]:
    return sorted(files(made.path))


def test_a_changed_byte_in_any_file_is_found(made):
    for name in kinds(made):
        file = made.path / name
        good = file.read_bytes()
        for at in {0, len(good) // 2, len(good) - 2}:
            flipped = bytes([good[at] ^ 1])
            file.write_bytes(good[:at] + flipped + good[at + 1 :])
            with pytest.raises(deploy.ArtifactError, match=name.replace(".", r"\.")):
                deploy.load(made.path)
        file.write_bytes(good)
    deploy.load(made.path).close()


def test_a_truncated_file_is_found_and_all_are_named(made):
    cut = [name for name in kinds(made) if name != "manifest.json"]
    for name in cut[1:]:
        os.truncate(made.path / name, (made.path / name).stat().st_size // 2)
    (made.path / cut[0]).unlink()
    with pytest.raises(deploy.ArtifactCorruptError) as caught:
        deploy.load(made.path)
    assert f"{cut[0]} is missing" in str(caught.value)
    assert all(f"{name} has " in str(caught.value) for name in cut[1:])


def test_a_truncated_manifest_is_found(made):
    file = made.path / "manifest.json"
    good = file.read_bytes()
    for size in (0, 1, len(good) // 2, len(good) - 3):
        file.write_bytes(good[:size])
        with pytest.raises(deploy.ArtifactCorruptError, match="not JSON"):
            deploy.load(made.path)
    other = ["[]", "3", "{}", "[" * 200_000, '{"schema_version": 1}']
    other += [f'{{"schema_version": {n}}}' for n in ('"1"', "true", "0", "-1")]
    for text in other:
        file.write_text(text)
        with pytest.raises(
            deploy.ArtifactCorruptError, match=r"schema_version|lacks digest|not JSON"
        ):
            deploy.load(made.path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"program.txt": {"sha256": ""}}},
        {"batch": "x"},
        {"inputs": [{}]},
        {"inputs": 3},
        {"structure": []},
        {"sdk": {}},
        "foo",
    ],
    ids=str,
)
def test_a_manifest_of_another_form_is_corrupt_though_its_digest_is_right(made, change):
    if change == "foo":
        change = {"outputs": [{**made.manifest["outputs"][0], "dtype": "foo"}]}
    edit(made.path, **change)
    with pytest.raises(deploy.ArtifactCorruptError, match="malformed.*compile again"):
        deploy.load(made.path)


def test_an_edited_manifest_is_found(made):
    file = made.path / "manifest.json"
    file.write_text(file.read_text().replace('"batch": 4', '"batch": 8'))
    with pytest.raises(deploy.ArtifactCorruptError, match="was changed"):
        deploy.load(made.path)


def test_an_artifact_of_a_newer_version_is_refused_with_both_versions(made):
    edit(made.path, schema_version=7)
    with pytest.raises(deploy.ArtifactVersionError, match=r"format 7.*up to format 2.*update"):
        deploy.load(made.path)


def test_no_artifact_is_told_from_a_damaged_one(tmp_path):
    with pytest.raises(deploy.ArtifactError, match="is no artifact") as caught:
        deploy.load(tmp_path / "nothing")
    assert type(caught.value) is deploy.ArtifactError


def test_an_artifact_moves(made, tmp_path):
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(made.path, moved)
    shutil.rmtree(made.path)
    assert deploy.Artifact.open(moved).verify().ok


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


def test_an_option_may_be_a_number_of_numpy(program, tmp_path):
    made = [
        deploy.compile(program, tmp_path / type(level).__name__, probe=False, opt_level=level)
        for level in (2, np.int64(2))
    ]
    assert made[0].manifest["key"] == made[1].manifest["key"]


class Pair(NamedTuple):
    spikes: torch.Tensor
    rate: torch.Tensor


class Named(nn.Module):
    """Spikes [T, N, 5] and their rates as a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.out = neurons.IFNode()

    def forward(self, x: torch.Tensor) -> Pair:
        spikes = self.out(x)
        return Pair(spikes, spikes.mean(0))


def test_outputs_whose_nesting_cannot_be_stored_are_a_finding():
    x = (torch.rand(T, BATCH, 5),)
    (finding,) = deploy.check(Named(), x, ["reference", "lynxi-sim"])
    assert (finding.rule, finding.severity) == ("outputs", "error")
    with pytest.raises(deploy.UnsupportedError, match="tuples, lists and dicts"):
        deploy.convert(Named(), x, "reference")


def test_what_cannot_be_compiled_is_refused(net, program, tmp_path):
    with pytest.raises(deploy.UsageError, match="no option optlevel"):
        deploy.compile(program, tmp_path / "option", optlevel=3)
    with pytest.raises(deploy.UsageError, match="plain value"):
        deploy.compile(program, tmp_path / "option", opt_level=np)
    with pytest.raises(deploy.UsageError, match="no target yet"):
        deploy.compile(program.captured, tmp_path / "captured")
    assert not (tmp_path / "option").exists()


def test_the_public_names_are_there_and_compare_is_a_function():
    import spikeport.deploy.compare  # noqa: F401 -- which must not take the name

    assert all(hasattr(deploy, name) for name in deploy.__all__)
    assert callable(deploy.compare)
    tree = [value for value in vars(deploy).values() if isinstance(value, type)]
    errors = {cls.__name__ for cls in tree if issubclass(cls, deploy.SpikeportError)}
    assert errors <= set(deploy.__all__)
