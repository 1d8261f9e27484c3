"""Damaged artifacts are found, and told from what is no artifact."""

import os
import shutil

import pytest
from artifacts import edit, files

from spikeport import deploy


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
