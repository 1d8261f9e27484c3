"""Batches of the combined size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from spikeport.targets.ipu.simulator import poptorch


def options(d: int = 1, g: int = 1, r: int = 1) -> poptorch.Options:
    made = poptorch.Options().deviceIterations(d).replicationFactor(r)
    made.Training.gradientAccumulation(g)
    return made


DATA = TensorDataset(torch.arange(100))


def test_the_combined_batch() -> None:
    loader = poptorch.DataLoader(options(2, 3, 4), DATA, batch_size=2)
    assert loader.combinedBatchSize == 2 * 2 * 3 * 4
    assert [len(x) for (x,) in loader] == [48, 48]  # the partial batch is dropped
    assert len(loader) == 2


def test_a_partial_last_batch_is_kept_only_where_there_is_none() -> None:
    poptorch.DataLoader(options(2), DATA, batch_size=25, drop_last=False)
    with pytest.raises(AssertionError) as caught:
        poptorch.DataLoader(options(2), DATA, batch_size=16, drop_last=False)
    assert str(caught.value) == (
        "The number of elements in the dataset (100) is not divisible by the number of elements "
        "processed per step (32) and drop_last=False. Switch to drop_last=True."
    )


def test_a_batch_larger_than_the_data_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert list(poptorch.DataLoader(options(), DATA, batch_size=101)) == []
    assert "has 100 elements and one step takes 101" in caplog.text


def test_processes_take_their_parts() -> None:
    parts = []
    for rank in range(3):
        opts = options(2)
        opts.Distributed.configureProcessId(rank, 3)
        parts.append([x.tolist() for (x,) in poptorch.DataLoader(opts, DATA, batch_size=8)])
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sorted(i for part in parts for x in part for i in x) == list(range(96))
    with pytest.raises(AssertionError, match=r"you must set poptorch.Options.randomSeed\(\)"):
        poptorch.DataLoader(opts, DATA, batch_size=8, shuffle=True)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.arange(10.0))


def test_iterable_data() -> None:
    assert [len(x) for x in poptorch.DataLoader(options(2), Stream(), batch_size=2)] == [4, 4]
    opts = options()
    opts.Distributed.configureProcessId(0, 2)
    with pytest.raises(AssertionError, match="IterableDatasets not supported for distributed"):
        poptorch.DataLoader(opts, Stream(), batch_size=2)


def test_asynchronous_access_passes_the_data_on() -> None:
    loader = poptorch.DataLoader(
        options(), DATA, batch_size=50, mode=poptorch.DataLoaderMode.AsyncRebatched
    )
    accessor = poptorch.AsynchronousDataAccessor(loader)
    assert len(accessor) == 2
    assert torch.cat([x for (x,) in accessor]).tolist() == list(range(100))
    accessor.terminate()
