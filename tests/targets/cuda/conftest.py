"""The kernels run on a GPU where there is one, else on the CPU through Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

ON_GPU = torch.cuda.is_available()

if not ON_GPU:
    # Triton's own functions are made for the interpreter, or not, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture
def device() -> str:
    return "cuda" if ON_GPU else "cpu"
