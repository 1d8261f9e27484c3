"""Networks of snnTorch's tutorials, as benchmarks/tutorials.py builds them."""

from __future__ import annotations

import pytest

pytest.importorskip("snntorch")

import tutorials

pytestmark = pytest.mark.snntorch


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("population, 10", "ipu-sim"),
        ("regression 2", "lynxi-sim"),
        *(
            pytest.param(name, target, marks=pytest.mark.slow)
            for name in ("6 class, one step", "autoencoder", "forward-forward", "SConv2dLSTM")
            for target in ("onnx", "lynxi-sim", "ipu-sim")
        ),
    ],
)
def test_a_tutorial_computes_on_a_target_what_it_says(name: str, target: str) -> None:
    net, batch = tutorials.build(name)
    row = tutorials.convert(net, batch, 2, target)
    assert row.verdict.startswith("equal")
    assert int(row.verdict.rpartition("rank ")[2]) <= 4
    assert 0.01 < row.rate < 0.99
