"""Spiking neurons, each defined once.

A :class:`Dynamics` is one kind of neuron: its charge equation, written as plain arithmetic. A
:class:`Neuron` is a population of that kind: the dynamics with everything else that decides its
spikes, that is, parameters, comparison, reset kind and timing, and v_0. All that spikeport does with
a neuron comes from these two: the reference in torch, training, and the lowering to each target.

One step, with h the membrane potential after charging and s the spikes::

    v[t-1] = reset(v[t-1], r[t])             only if reset_at is "before"
    h[t] = charge(v[t-1], x[t])              with other states, h[t], w[t] = charge(v[t-1], w[t-1], x[t])
    h[t] = reset(h[t], r[t])                 only if reset_at is "next" or "ahead"
    s[t] = h[t] >= v_threshold               or >, as `fires` says
    v[t] = reset(h[t], s[t])                 if reset_at is "now", else h[t]
    v[t] = h[t] - (s[t] - r[t]) v_threshold  if reset_at is "ahead"

    r[t] = v[t-1] >= v_threshold             or >; the reset that is still to come; none at t = 0
    reset(h, s) = v_reset where s, else h    hard
                  h - v_threshold where s    soft
                  h                          none

A new kind takes a function and one line::

    @neurons.dynamics
    def QIF(v, x, *, tau, v_rest, v_c, a_0):
        return v + (x + a_0 * (v - v_rest) * (v - v_c)) / tau

    node = neurons.Node(QIF, tau=2.0, v_rest=0.0, v_c=0.8, a_0=1.0, v_threshold=1.0, v_reset=-0.1)
"""

from ..equations import Dynamics, dynamics, exp, named, relu, sigmoid, tanh
from .kinds import (
    CLIF,
    DSRIF,
    DSRLIF,
    EIF,
    IF,
    KLIF,
    LIAF,
    LIF,
    QIF,
    RAF,
    Alpha,
    CubaLIF,
    Heaviside,
    Izhikevich,
    Lapicque,
    Leaky,
    ParametricLIF,
    RescaledKLIF,
    RLeaky,
    RSynaptic,
    Synaptic,
)
from .layers import IFNode, LIFNode, Node, ParametricLIFNode, Readout
from .neuron import Neuron, ResetAt

__all__ = [
    "CLIF",
    "DSRIF",
    "DSRLIF",
    "EIF",
    "IF",
    "KLIF",
    "LIAF",
    "LIF",
    "QIF",
    "RAF",
    "Alpha",
    "CubaLIF",
    "Dynamics",
    "Heaviside",
    "IFNode",
    "Izhikevich",
    "LIFNode",
    "Lapicque",
    "Leaky",
    "Neuron",
    "Node",
    "ParametricLIF",
    "ParametricLIFNode",
    "RLeaky",
    "RSynaptic",
    "Readout",
    "RescaledKLIF",
    "ResetAt",
    "Synaptic",
    "dynamics",
    "exp",
    "named",
    "relu",
    "sigmoid",
    "tanh",
]
