"""The Lynxi SDK simulated: ``lyngor`` compiles and ``lynpy`` runs, without the SDK or a chip.

It tests whether a network is legal for the compiler, what its float16 arithmetic does to the
results, and whether a program uses the SDK rightly. What it can and cannot say:

================================  ================================================================
Known, from public code and logs  as simulated
================================  ================================================================
names and arguments               ``lyngor`` and ``lynpy`` as users' code calls them
buffers                           flat, concatenated, fixed size; only bytes are checked; a model's
                                  output buffer is reused by every call; ``assert`` on errors
rank                              nothing above 4; from 1.17 on 5 in reshape, stack, index, cat,
                                  mean
in-place writes                   dropped; here with a warning, or an error in strict mode
shapes, batch                     static; ``run_batch`` at most 10; ``"abc"`` falls back to auto
operations                        what has been seen compiled, and what that plainly needs; others
                                  run on the CPU, or fail with ``apu_only=True``
arithmetic                        float16, also behind float32 inputs and outputs
================================  ================================================================
Not known                         assumed
================================  ================================================================
where the chip rounds             after every operation of the graph; a bias is added before
width of the accumulator          float32, in the host's order; float16 on demand, in index order
exp, sigmoid, sqrt, ...           float32 rounded once; the chip's tables have errors of their own
zeros, NaN, subnormals            IEEE; a zero from max, min and pooling is +0
what is folded                    batch norms, from ``opt_level`` 3, computed in float64; those that
                                  stay are a multiplication and an addition
partition                         node by node, in runs of one side; CPU parts in float32
limits of memory and cores        none: a network may build here and be too large for the chip
time                              none: neither building nor running takes what the chip takes
``run_batch`` in buffers          whole inputs one after the other; ``input_size`` is that of one
``view_as``, ``numpy``            change and show the tensor itself, not a copy
``.cpu()`` into a host copy       overwrites it, so earlier ``numpy()`` results change
bool and int64 buffers            uint8 and int64; other integers their own types, which
                                  ``inputs_dict`` names for inputs as it does ``"long"``
state kept on the chip            none: the compiled network is a function of its inputs
``mean``, ``transpose_axis``, ..  refused
SDK files                         the layout's names; no chip can load them, nor this theirs
================================  ================================================================

:class:`Options` chooses among them, by :func:`options` or the environment
(``SPIKEPORT_LYNXI_SIM_STORAGE``, ``_ACCUMULATE``, ``_STRICT``, ``_VERSION``, ``_DEVICES``,
``_OPTIMISE``).
"""

from __future__ import annotations

from . import lyngor, lynpy
from .graph import LyngorError
from .options import Options, SimulatorWarning, current, options
from .simulate import install, run_script

__all__ = [
    "LyngorError",
    "Options",
    "SimulatorWarning",
    "current",
    "install",
    "lyngor",
    "lynpy",
    "options",
    "run_script",
]
