"""The same draws in each test, whichever ran before it."""

from __future__ import annotations

import numpy as np
import pytest
from nir_graphs import RANDOM


@pytest.fixture(autouse=True)
def drawn_anew() -> None:
    """Each test has the same numbers, whichever ran before it."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state
