"""The cache of compiled artifacts: its bound, and many that use it at once."""

from __future__ import annotations

import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from spikeport.deploy import Artifact, UsageError, store
from spikeport.deploy.cache import Cache
from spikeport.deploy.manifest import SCHEMA_VERSION, write_manifest

KIB = 1 << 10
HOUR = 3600


def artifact(path: Path, kib: int) -> Path:
    """An artifact of a little more than this size, whole as far as its manifest says."""
    (path / "device").mkdir(parents=True)
    file = path / "device" / "model.bin"
    file.write_bytes(os.urandom(kib * KIB))
    entry = {"sha256": store.file_sha256(file), "size": kib * KIB}
    rest = "key source spikeport state target sdk T batch dtype inputs outputs structure neurons"
    rest += " compile_options probe samples"
    manifest = {"schema_version": SCHEMA_VERSION, **dict.fromkeys(rest.split())}
    write_manifest(path, {**manifest, "files": {"device/model.bin": entry}})
    return path


def fetched(cache: Cache, key: str, path: Path) -> bool:
    path.mkdir(parents=True)
    found = cache.fetch(key, path)
    assert (found is not None) == any(path.iterdir())
    shutil.rmtree(path)
    return found is not None


def unused_for(cache: Cache, name: str, seconds: float) -> Path:
    at = time.time() - seconds
    os.utime(cache.root / name, (at, at))
    return cache.root / name


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Room for three artifacts of 10 KiB, which it holds: a, b and c, used in this order."""
    made = Cache(tmp_path / "cache", limit=39 * KIB)
    for hours, key in ((3, "a"), (2, "b"), (1, "c")):
        made.add(key, artifact(tmp_path / key, 10))
        unused_for(made, key, hours * HOUR)
    return made


def keys(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.root.iterdir())


def test_what_was_not_used_for_longest_makes_room(cache, tmp_path, caplog):
    caplog.set_level(logging.INFO, "spikeport")
    assert keys(cache) == ["a", "b", "c"]
    assert fetched(cache, "a", tmp_path / "copy")
    cache.add("d", artifact(tmp_path / "d", 10))
    assert keys(cache) == ["a", "c", "d"]
    assert f"removed from the cache, for room: {cache.root / 'b'}" in caplog.text
    cache.add("e", artifact(tmp_path / "e", 20))
    assert keys(cache) == ["d", "e"]
    assert not fetched(cache, "b", tmp_path / "copy")


def test_an_artifact_above_the_limit_is_left_out_and_nothing_makes_room(cache, tmp_path, caplog):
    caplog.set_level(logging.INFO, "spikeport")
    cache.add("huge", artifact(tmp_path / "huge", 40))
    assert keys(cache) == ["a", "b", "c"]
    assert "not cached" in caplog.text
    assert "SPIKEPORT_CACHE_GIB" in caplog.text


def test_what_killed_processes_left_is_removed_after_a_day(cache, tmp_path):
    for hours, name in ((25, ".x.partial-1"), (30, ".x.old-2"), (1, ".y.partial-3")):
        (cache.root / name).mkdir()
        unused_for(cache, name, hours * HOUR)
    cache.add("a", tmp_path / "a")
    assert keys(cache) == [".y.partial-3", "a", "b", "c"]


@pytest.mark.parametrize(
    ("given", "limit"), [(None, 10 * 2**30), ("0.5", 2**29), ("inf", float("inf"))]
)
def test_the_limit_is_given_in_gib(given, limit, monkeypatch):
    monkeypatch.delenv("SPIKEPORT_CACHE_GIB", raising=False)
    if given:
        monkeypatch.setenv("SPIKEPORT_CACHE_GIB", given)
    assert Cache.of_user().limit == limit


@pytest.mark.parametrize("given", ["10GB", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(given, monkeypatch):
    monkeypatch.setenv("SPIKEPORT_CACHE_GIB", given)
    with pytest.raises(UsageError, match=f"SPIKEPORT_CACHE_GIB is '{given}'; allowed: how many"):
        Cache.of_user()


def test_many_use_it_at_once_and_never_see_half_an_artifact(tmp_path, caplog):
    sources = [artifact(tmp_path / "made" / str(key), 10) for key in range(5)]
    cache = Cache(tmp_path / "cache", limit=26 * KIB)  # two of the five

    def compile_often(who: int) -> int:
        random, hits = Random(who), 0
        for turn in range(50):
            key = random.randrange(5)
            if fetched(cache, str(key), tmp_path / f"{who}-{turn}"):
                hits += 1
            else:
                cache.add(str(key), sources[key])
        return hits

    with ThreadPoolExecutor(4) as pool:
        assert 0 < sum(pool.map(compile_often, range(4))) < 4 * 50
    for wrong in ("is missing", "bytes of", "was changed", "is no artifact"):
        assert wrong not in caplog.text
    entries = [path for path in cache.root.iterdir() if not path.name.startswith(".")]
    assert 1 <= len(entries) <= 2
    for entry in entries:
        assert Artifact.open(entry).manifest == Artifact.open(sources[int(entry.name)]).manifest
