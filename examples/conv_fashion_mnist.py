"""A convolutional spiking network for Fashion-MNIST, and its training.

The network of SpikingJelly's example of the same name; a checkpoint of either loads into the other.
The training set comes with ``apt install dataset-fashion-mnist``, or give its folder with ``--data``.
Trained in float16, for a chip that computes in it::

    python examples/conv_fashion_mnist.py -T 4 --channels 32 --half --epochs 64 --lr 0.1

which is ``spikeport train conv`` with these options; ``--help`` describes them.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from spikeport.converters.errors import UsageError
from spikeport.deploy import cli
from spikeport.targets import cuda


class CSNN(nn.Module):
    """Images [N, 1, 28, 28] -> firing rates [N, 10] of the ten classes, over T time steps."""

    def __init__(self, T: int = 4, channels: int = 128) -> None:
        super().__init__()
        if low := [f"{n} is {v}" for n, v in (("T", T), ("channels", channels)) if v < 1]:
            raise UsageError(f"{' and '.join(low)}; it must be at least 1")
        self.T = T
        self.conv_fc = cuda.LayerByLayer(
            nn.Conv2d(1, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            cuda.IFNode(),
            nn.MaxPool2d(2, 2),  # 14 x 14
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            cuda.IFNode(),
            nn.MaxPool2d(2, 2),  # 7 x 7
            nn.Flatten(),
            nn.Linear(channels * 7 * 7, channels * 4 * 4, bias=False),
            cuda.IFNode(),
            nn.Linear(channels * 4 * 4, 10, bias=False),
            cuda.IFNode(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 1, 28, 28] -> firing rates [N, 10]."""
        return self.conv_fc(x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)).mean(0)


if __name__ == "__main__":
    sys.exit(cli.main(["train", "conv", *sys.argv[1:]]))
