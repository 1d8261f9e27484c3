"""The kernels run on a GPU where there is one, else on the CPU through Triton's interpreter."""

import os

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


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    return "cuda" if ON_GPU else "cpu"
