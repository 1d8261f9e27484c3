"""Processes that train one network together, as ``torchrun`` starts them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..converters.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone unless :func:`join` says otherwise.

    Attributes:
        rank: Its number; 0 writes and prints.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's samples of a batch [N, ...]; shares differ by one sample at most."""
        return batch if self.size == 1 else batch.tensor_split(self.size)[self.rank]

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every process's ``part``."""
        if self.size > 1:
            dist.all_reduce(part)
        return part

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give each process the values that process 0 has."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


ALONE = Ranks()


@contextmanager
def join(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Meet the other processes of ``torchrun``, and give each its own device.

    Raises:
        UsageError: There are more processes than GPUs, or they were given one and the same.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if str(device) != "cuda":
            raise UsageError(
                f"{size} processes were given one GPU, {device}; give --device cuda, and each takes "
                "its own"
            )
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}; give torchrun --nproc-per-node as many or fewer"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, size), device
    finally:
        # What still holds the group would keep Gloo's threads, and these may end the interpreter's exit
        # with an abort (pytorch/pytorch#190489).
        gc.collect()
        dist.destroy_process_group()
