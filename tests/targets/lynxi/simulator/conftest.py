from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from spikeport.targets.lynxi.simulator import lyngor, options
from spikeport.targets.lynxi.simulator.compiled import read
from spikeport.targets.lynxi.simulator.engine import Engine

Build = Callable[..., Engine]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a module for given example inputs and load what was written."""

    def run(
        net: nn.Module,
        inputs: Sequence[Tensor],
        *,
        io: str = "float32",
        target: str = "apu",
        opt_level: int = 3,
        apu_only: bool = True,
        **changes: Any,
    ) -> Engine:
        with options(**changes):
            model = lyngor.DLModel()
            names = {f"x{i}": _spec(x) for i, x in enumerate(inputs)}
            model.load(net.eval(), "Pytorch", names, in_type=io, out_type=io)
            path = lyngor.Builder(target=target).build(
                model.graph,
                model.params,
                opt_level=opt_level,
                out_path=tmp_path / "out",
                apu_only=apu_only,
            )
            return read(Path(path)).engine()

    return run


def _spec(x: Tensor) -> Any:
    kind = str(x.dtype).removeprefix("torch.")
    return tuple(x.shape) if x.is_floating_point() else [tuple(x.shape), kind]
