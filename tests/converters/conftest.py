"""What the tests of converters share."""

from __future__ import annotations

import pytest
from capturing import SingleStepSource

from spikeport.converters import sources


@pytest.fixture
def single_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks may have a ``SingleStep``."""
    monkeypatch.setattr(sources, "SOURCES", (*sources.SOURCES, SingleStepSource()))
