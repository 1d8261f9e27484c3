"""The fully connected network of snnTorch's tutorials on Fashion-MNIST, and its training.

784-1000-10 leaky neurons over 25 time steps, as in "Accelerating snnTorch on IPUs", which trains it by
the cross-entropy of spike counts. snnTorch must be importable (``pip install snntorch``)::

    python examples/leaky_fashion_mnist.py --epochs 10
    python examples/leaky_fashion_mnist.py --epochs 10 --target ipu-sim

which is ``spikeport train leaky --loss ce_count --optimizer adam --lr 0.001`` with these options;
``--help`` describes them.
"""

from __future__ import annotations

import sys

import snntorch as snn
import torch
from torch import nn

from spikeport.converters.errors import UsageError
from spikeport.deploy import cli


class LeakySNN(nn.Module):
    """Images [N, 1, 28, 28] -> spikes [T, N, 10] of the ten classes."""

    def __init__(self, T: int = 25, beta: float = 0.9, hidden: int = 1000) -> None:
        super().__init__()
        if low := [f"{n} is {v}" for n, v in (("T", T), ("hidden", hidden)) if v < 1]:
            raise UsageError(f"{' and '.join(low)}; it must be at least 1")
        self.T = T
        self.fc1 = nn.Linear(28 * 28, hidden)
        self.lif1 = snn.Leaky(beta=beta)
        self.fc2 = nn.Linear(hidden, 10)
        self.lif2 = snn.Leaky(beta=beta)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 1, 28, 28] -> spikes [T, N, 10]."""
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spikes = []
        for _ in range(self.T):
            cur1 = self.fc1(x.flatten(1))
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spikes.append(spk2)
        return torch.stack(spikes)


if __name__ == "__main__":
    recipe = ["--loss", "ce_count", "--optimizer", "adam", "--lr", "0.001"]
    sys.exit(cli.main(["train", "leaky", *recipe, *sys.argv[1:]]))
