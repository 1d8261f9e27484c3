"""Work on a GPU as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ...converters.errors import SpikeportError

Outputs = TypeVar("Outputs")


def captured(
    work: Callable[[], Outputs],
    stream: torch.cuda.Stream,
    refused: Callable[[str], SpikeportError],
) -> tuple[torch.cuda.CUDAGraph, Outputs]:
    """The graph of what ``work`` launches, and the outputs that every replay writes again.

    Args:
        work: What to capture; it has run on the stream before.
        stream: Where it is captured.
        refused: From torch's reason, the error that is raised where it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a data loader's or NCCL's, may go on using the GPU meanwhile.
    mode = "thread_local"
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
            outputs = work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Leaving a broken capture raises once more; the first error is the reason.
        raise refused(str(error.__context__ or error).partition("\n")[0]) from error
    return graph, outputs
