"""Graphcore IPUs, through ``poptorch`` or the simulated SDK."""
