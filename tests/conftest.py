"""One thread for torch, its numbers, a cache of its own; tests that need a GPU only where there is one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import equal
from torch import nn
from torch.export import exported_program

from spikeport.converters.program import Program
from spikeport.deploy import pipeline


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: handing them from thread to thread costs more than computing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine has compiled before is nothing that a test should find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKEPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def listed_once() -> Iterator[None]:
    """At each export torch lists all of its operators anew, a third of the time of a small capture."""
    with pytest.MonkeyPatch.context() as patch:
        listed = exported_program._collect_all_valid_cia_ops
        patch.setattr(exported_program, "_collect_all_valid_cia_ops", functools.cache(listed))
        yield


@pytest.fixture(scope="module")
def captures() -> list[tuple[nn.Module, tuple[torch.Tensor, ...], Program]]:
    """What :func:`captured_once` has captured for the tests of a module."""
    return []


@pytest.fixture
def captured_once(captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions of one network for several targets share its captures, that of a longer example too.

    For tests that keep a network, and leave it as it is.
    """
    captured = pipeline.captured

    def shared(net: nn.Module, args: tuple[torch.Tensor, ...]) -> Program:
        for known, inputs, program in captures:
            if known is net and equal(inputs, args):
                return program
        program = captured(net, args)
        captures.append((net, args, program))
        return program

    monkeypatch.setattr(pipeline, "captured", shared)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws when it is imported does not depend on the modules before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw does not depend on the tests that this process ran before."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; torch sees none on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
