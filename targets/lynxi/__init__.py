"""Lynxi HP300 and KA200, through ``lyngor`` and ``lynpy``, or through the simulated SDK."""

from .adapter import Lynxi

__all__ = ["Lynxi"]
