"""An artifact to read, to run and to damage, on the simulated Lynxi SDK."""

import shutil
from pathlib import Path

import pytest
import torch
from artifacts import BATCH, Net, build

from spikeport import deploy


@pytest.fixture(scope="session")
def net() -> Net:
    return build()


@pytest.fixture(scope="session")
def program(net: Net) -> deploy.Program:
    return deploy.convert(net, (torch.rand(BATCH, 1, 8, 8),), "lynxi-sim")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPIKEPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
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
