"""Where an artifact may be written, and that nothing else is ever lost there."""

from pathlib import Path

import pytest
from artifacts import files

from spikeport import deploy, targets


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
