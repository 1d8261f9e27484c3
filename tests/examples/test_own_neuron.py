"""The example of a neuron of one's own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "own_neuron.py"


def test_it_prints_kernels_and_errors() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], check=True, stdout=subprocess.PIPE, text=True
    )
    assert "def forward(x_ptr" in done.stdout
    assert "def backward(x_ptr" in done.stdout
    errors = re.findall(r"max error of (\S+): (\S+), of values up to (\S+)", done.stdout)
    assert [name for name, *_ in errors] == ["spikes", "x.grad", "tau.grad"]
    assert all(float(error) <= 1e-6 * float(largest) for _, error, largest in errors)
