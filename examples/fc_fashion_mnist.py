"""One layer of leaky integrate-and-fire neurons for Fashion-MNIST, and its training.

The network of SpikingJelly's ``lif_fc_mnist``, whose checkpoints it takes, with the image as a constant
current in the place of random spikes::

    python examples/fc_fashion_mnist.py -T 8 --epochs 8

which is ``spikeport train fc`` with these options; ``--help`` describes them.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from spikeport.converters.errors import UsageError
from spikeport.deploy import cli
from spikeport.targets import cuda


class FCSNN(nn.Module):
    """Images [N, 1, 28, 28] -> firing rates [N, 10] of the ten classes, over T time steps."""

    def __init__(self, T: int = 8, tau: float = 2.0) -> None:
        super().__init__()
        if T < 1:
            raise UsageError(f"T is {T}; it must be at least 1")
        self.T = T
        self.layer = cuda.LayerByLayer(
            nn.Flatten(),
            nn.Linear(28 * 28, 10, bias=False),
            cuda.LIFNode(tau=tau),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 1, 28, 28] -> firing rates [N, 10]."""
        return self.layer(x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)).mean(0)


if __name__ == "__main__":
    sys.exit(cli.main(["train", "fc", *sys.argv[1:]]))
