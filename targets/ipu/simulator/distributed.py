"""Several processes that train one model, as PopRun starts them, over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch import Tensor

from .errors import Error


def join(rank: int, processes: int) -> tuple[Callable[[Tensor], None], int] | None:
    """Join the group of processes.

    Args:
        rank: Number of this process.
        processes: How many there are.

    Returns:
        What adds a tensor over all of them, and how many they are; None if this is the only one.

    Raises:
        Error: The group cannot be joined.
    """
    if processes == 1:
        return None
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo", rank=rank, world_size=processes)
        except (ValueError, RuntimeError) as error:
            raise Error(
                f"process {rank} of {processes} cannot find the others: {error}; set MASTER_ADDR and "
                "MASTER_PORT, or call torch.distributed.init_process_group first"
            ) from error
    return dist.all_reduce, dist.get_world_size()


def broadcast(weights: Mapping[str, Tensor]) -> None:
    """Give every process the weights of the first."""
    for name in sorted(weights):
        dist.broadcast(weights[name].data, 0)
