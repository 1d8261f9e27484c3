"""Graphcore IPUs, through ``poptorch`` or the simulated SDK.

>>> from spikeport.targets import ipu
>>> trainer = ipu.trainer(ipu.training_module(net, loss="ce_count"), optimizer="adam", simulator=True)

Everything that training needs runs beside the SDK, on Python 3.10 and torch 2.0.
"""

from .training_module import TrainingModule, training_module

__all__ = ["TrainingModule", "training_module"]
