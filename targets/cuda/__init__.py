"""CUDA, the training source: neuron layers with kernels generated from their declaration.

>>> from spikeport.targets import cuda
>>> net = cuda.LayerByLayer(nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64), cuda.LIFNode(tau=2.0))
"""

from .layers import LayerByLayer, SeqToANN, batch_norm_neuron
from .nodes import FusedNode, IFNode, Kernel, LIFNode, Node, ParametricLIFNode, kernel

__all__ = [
    "FusedNode",
    "IFNode",
    "Kernel",
    "LIFNode",
    "LayerByLayer",
    "Node",
    "ParametricLIFNode",
    "SeqToANN",
    "batch_norm_neuron",
    "kernel",
]
