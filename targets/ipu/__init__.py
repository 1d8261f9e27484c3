"""Graphcore IPUs, through ``poptorch`` or the simulated SDK.

>>> from spikeport.targets import ipu
>>> trainer = ipu.trainer(ipu.training_module(net, loss="ce_count"), optimizer="adam", simulator=True)

Everything that training needs runs beside the SDK, on Python 3.10 and torch 2.0.
"""

from .checking import check
from .model import TrainingModule, training_module
from .training import Trainer, trainer

__all__ = ["Trainer", "TrainingModule", "check", "trainer", "training_module"]
