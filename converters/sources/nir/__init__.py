"""NIR 1.0, the Neuromorphic Intermediate Representation: its graphs as torch networks."""

from typing import Any

from .. import register
from ..base import Reading
from .graph import Graph, Unit, read
from .layers import Cell
from .network import NirNetwork

__all__ = ["Graph", "NirNetwork", "Unit", "read"]


def _read(cell: Any) -> Reading:
    reading: Reading = cell.reading
    return reading


register(Cell, _read)
