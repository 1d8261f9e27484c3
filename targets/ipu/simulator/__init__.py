"""The Poplar SDK's PyTorch interface simulated: ``poptorch`` without the SDK or an IPU.

It tests whether a network compiles, what it learns there, and whether a program uses the interface
rightly. What it can and cannot say:

================================  ================================================================
Known, from public code           as simulated
================================  ================================================================
names, arguments, options         of ``poptorch`` 3.4, with its error texts where they are public
batches                           slices [D, G, R] of the combined batch, output modes, reduction
                                  of gradients, one optimizer step for each device iteration
tracing                           once; Python leaves no trace; reading a value is refused
gradients                         of the traced forward: ``torch.autograd.Function`` has none of
                                  its own, and a surrogate written so is refused
weights                           on the device; dirty on the host until they are touched there
types                             int64 within int32, float64 as float32; weights follow
                                  activations; int32 and float32 come back
pipelines                         least number of micro-batches, number of IPUs
processes                         as many as PopRun starts; here ``torchrun``, over gloo
================================  ================================================================
Not known                         assumed
================================  ================================================================
order of accumulation             the host's; float16 is rounded once after each operation
operators the compiler lacks      none: every torch function is taken
int64 inside a forward            stays int64 there, as torch's own functions need it
reading a buffer in Python        a warning; an error in strict mode (refused from SDK 3.0 on)
random numbers                    torch's generator on the host
stochastic rounding, recompute    no effect
custom operators                  as declared, not what writing in place may do to their gradient
an IPU's memory                   an estimate against 624 MB; see :mod:`.memory`
time                              none: neither compiling nor running takes what an IPU takes
executables                       JSON with the graph's text; no IPU can load them
its own words                     on pipelines, constants of optimizers, memory, labels out of range
================================  ================================================================

:class:`Settings` chooses among them, by :func:`settings` or the environment
(``SPIKEPORT_IPU_SIM_MEMORY_MB``, ``_STRICT``).
"""

from __future__ import annotations

from . import custom_ops, popart, poptorch
from .settings import Settings, SimulatorWarning, current, settings
from .simulate import install, run_script

__all__ = [
    "Settings",
    "SimulatorWarning",
    "current",
    "custom_ops",
    "install",
    "popart",
    "poptorch",
    "run_script",
    "settings",
]
