"""The same draws in each test, whichever ran before it."""

from __future__ import annotations

import pytest
from nir_files import GENERATOR


@pytest.fixture(autouse=True)
def _same_draws_in_any_order() -> None:
    GENERATOR.manual_seed(0)
