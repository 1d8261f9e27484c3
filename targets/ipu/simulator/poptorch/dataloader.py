"""The loader: batches of the combined size that one call of a model takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from . import enums
from .options import Options

_logger = logging.getLogger("poptorch")


class DataLoader(torch.utils.data.DataLoader[Any]):
    """Torch's loader, whose batches are combined.

    Args:
        options: Those of the model; frozen by this.
        dataset: The data.
        batch_size: Size of a micro-batch; None leaves batching to the data.
        shuffle: Whether the data are shuffled.
        num_workers: How many processes read.
        drop_last: Whether an incomplete last batch is left out.
        persistent_workers: Whether the processes live on between epochs; default: if there are any.
        auto_distributed_partitioning: Whether each of several processes gets its part of the data.
        mode: Sync, Async or AsyncRebatched; the simulation loads alike in all of them.
        async_options: Options of the asynchronous modes.
        rebatched_worker_size: Size of a worker's batch in AsyncRebatched.
        batch_sampler: Not supported together with ``batch_size``.
        **kwargs: Of torch's loader.

    Raises:
        AssertionError: The data do not divide, and ``drop_last`` is False.
    """

    def __init__(
        self,
        options: Options,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        num_workers: int = 0,
        drop_last: bool = True,
        persistent_workers: bool | None = None,
        auto_distributed_partitioning: bool = True,
        mode: enums.DataLoaderMode = enums.DataLoaderMode.Sync,
        async_options: dict[str, Any] | None = None,
        rebatched_worker_size: int | None = None,
        batch_sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        assert isinstance(options, Options)
        enums.check(mode, enums.DataLoaderMode, "mode")
        options._freeze()
        self._poptorch_options = options
        processes = options.Distributed.numProcesses
        iterable = isinstance(dataset, IterableDataset)
        self._combined_batch_size: int | None = None
        if batch_size is not None:
            self._combined_batch_size = (
                batch_size
                * options.device_iterations
                * (options.replication_factor // options.input_group_size)
                * options.Training.gradient_accumulation
            )
        if iterable:
            _check_iterable(processes, num_workers, kwargs)
        elif self._combined_batch_size is not None:
            elements = len(dataset)  # type: ignore[arg-type]
            step = self._combined_batch_size * processes
            assert drop_last or elements % step == 0, (
                f"The number of elements in the dataset ({elements}) is not divisible by the number "
                f"of elements processed per step ({step}) and drop_last=False. Switch to "
                "drop_last=True."
            )
            if elements < step:
                _logger.warning(
                    "The dataset has %d elements and one step takes %d: there is no batch",
                    elements,
                    step,
                )
            if processes > 1 and auto_distributed_partitioning:
                assert not shuffle or options.exists("random_seed"), (
                    "When using distributed execution you must set poptorch.Options.randomSeed()"
                )
                dataset = _part(dataset, options, self._combined_batch_size)
        workers_stay = num_workers > 0 if persistent_workers is None else persistent_workers
        arguments: dict[str, Any] = {"persistent_workers": workers_stay, **kwargs}
        if batch_sampler is not None:
            arguments["batch_sampler"] = batch_sampler
        else:
            arguments |= {"batch_size": self._combined_batch_size, "shuffle": shuffle}
            arguments["drop_last"] = drop_last and self._combined_batch_size is not None
        super().__init__(dataset, num_workers=num_workers, **arguments)

    @property
    def combinedBatchSize(self) -> int | None:
        """How many samples one call of a model takes."""
        return self._combined_batch_size

    @property
    def options(self) -> Options:
        """The options, frozen."""
        return self._poptorch_options

    def terminate(self) -> None:
        """End the asynchronous loading; there is none to end."""


def _check_iterable(processes: int, workers: int, kwargs: dict[str, Any]) -> None:
    assert processes == 1, "IterableDatasets not supported for distributed execution"
    if workers > 1 and "worker_init_fn" not in kwargs:
        _logger.warning(
            "IterableDataset used with num_workers=%d but no worker_init_fn specified: as a result "
            "the DataLoader will return %d times each element in the dataset",
            workers,
            workers,
        )


def _part(dataset: Any, options: Options, step: int) -> Dataset[Any]:
    """This process's part: whole steps, the same number for each process."""
    processes = options.Distributed.numProcesses
    size = step * (len(dataset) // (step * processes))
    start = options.Distributed.processId * size
    return Subset(dataset, range(start, start + size))


class AsynchronousDataAccessor:
    """Loads ahead in a process of its own; here it passes the data on.

    Args:
        dataset: Any iterable.
        buffer_size: Taken and unused, as are all that follow.
        miss_sleep_time_in_ms: See ``buffer_size``.
        load_indefinitely: Whether the data begin again at their end.
        early_preload: See ``buffer_size``.
        sharing_strategy: See ``buffer_size``.
        rebatched_size: See ``buffer_size``.
    """

    def __init__(
        self,
        dataset: Any,
        buffer_size: int = 3,
        miss_sleep_time_in_ms: float = 0.1,
        load_indefinitely: bool = True,
        early_preload: bool = False,
        sharing_strategy: enums.SharingStrategy = enums.SharingStrategy.FileSystem,
        rebatched_size: int | None = None,
    ) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset)

    def terminate(self) -> None:
        """End the loading; there is none to end."""
