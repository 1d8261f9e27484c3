"""What a compile writes, what it takes from the cache, and what it does not compile."""

import copy
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from artifacts import BATCH, T, files
from safetensors.torch import load_file
from torch import nn

from spikeport import deploy, targets
from spikeport.converters import neurons

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


def test_an_option_may_be_a_number_of_numpy(program, tmp_path):
    made = [
        deploy.compile(program, tmp_path / type(level).__name__, probe=False, opt_level=level)
        for level in (2, np.int64(2))
    ]
    assert made[0].manifest["key"] == made[1].manifest["key"]


# What is refused


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
