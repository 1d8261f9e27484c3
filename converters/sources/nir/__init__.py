"""NIR 1.0, the Neuromorphic Intermediate Representation: its graphs as torch networks."""

from .. import register
from .graph import Graph, Unit, read
from .layers import Cell
from .network import NirNetwork

__all__ = ["Graph", "NirNetwork", "Unit", "read"]

register(Cell, Cell.read)
