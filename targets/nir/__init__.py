"""NIR 1.0 as a target: one .nir file, which opens the machines that read it through their own tools."""

from .adapter import Nir

__all__ = ["Nir"]
