"""snnTorch on Graphcore IPUs, as its tutorial does it: 784-1000-10 leaky neurons over 25 time steps.

A script for poptorch, which knows nothing of spikeport. It needs ``pip install --no-deps
snntorch-ipu==0.5.18`` and the Poplar SDK, or instead of the SDK::

    spikeport simulate ipu examples/ipu_snntorch.py --epochs 1

(That package reads buffers in Python, which SDKs from 3.0 on refuse; the simulation warns.) The loss
counts spikes here; the tutorial gives it membrane potentials, and its spikes' accuracy falls again.
The images are Fashion-MNIST's, from a folder of IDX files (``apt install dataset-fashion-mnist``).
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import poptorch
import snntorch as snn
import snntorch.functional as SF
import torch
from torch import nn
from torch.utils.data import TensorDataset

NUM_INPUTS, NUM_HIDDEN, NUM_OUTPUTS = 28 * 28, 1000, 10


class Model(nn.Module):
    """Images [B, 1, 28, 28] -> spikes [T, B, 10], and the loss while training."""

    def __init__(self, num_steps: int, beta: float = 0.9) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.fc1 = nn.Linear(NUM_INPUTS, NUM_HIDDEN)
        self.lif1 = snn.Leaky(beta=beta)
        self.fc2 = nn.Linear(NUM_HIDDEN, NUM_OUTPUTS)
        self.lif2 = snn.Leaky(beta=beta)
        self.loss_fn = SF.ce_count_loss()

    def forward(self, x, labels=None):
        """The loss is part of the model: the IPU runs forward, backward and update in one call."""
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec = []
        for _ in range(self.num_steps):
            cur1 = self.fc1(x.flatten(1))
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
        spk2_rec = torch.stack(spk2_rec)
        if not self.training:
            return spk2_rec
        loss = self.loss_fn(spk2_rec, labels)
        return spk2_rec, poptorch.identity_loss(loss, "none")


def read(folder: Path, split: str, limit: int | None) -> TensorDataset:
    """Images in [0, 1] and their labels."""
    arrays = []
    for name, offset in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(folder / f"{split}-{name}-ubyte.gz") as file:
            arrays.append(np.frombuffer(file.read(), np.uint8, offset=offset))
    x = torch.from_numpy(arrays[0].reshape(-1, 1, 28, 28) / np.float32(255))
    y = torch.from_numpy(arrays[1].astype(np.int64))
    return TensorDataset(x[:limit], y[:limit])


def correct(spikes: torch.Tensor, labels: torch.Tensor) -> int:
    """How many images have the most spikes in the output of their class."""
    return int((spikes.sum(0).argmax(1) == labels).sum())


def main() -> None:
    """Train, and test after each epoch."""
    parser = argparse.ArgumentParser(description="snnTorch's IPU tutorial on Fashion-MNIST")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-steps", type=int, default=25)
    parser.add_argument("--limit", type=int, help="take so many images of each split")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    opts = poptorch.Options()
    opts.Precision.halfFloatCasting(poptorch.HalfFloatCastingBehavior.HalfUpcastToFloat)
    loaders = {
        split: poptorch.DataLoader(
            opts, read(args.data, split, args.limit), args.batch_size, shuffle=split == "train"
        )
        for split in ("train", "t10k")
    }

    net = Model(args.num_steps)
    optimizer = poptorch.optim.Adam(net.parameters(), lr=0.001, betas=(0.9, 0.999))
    trainer = poptorch.trainingModel(net, options=opts, optimizer=optimizer)
    tester = poptorch.inferenceModel(Model(args.num_steps).eval(), options=opts)

    for epoch in range(args.epochs):
        hits = seen = 0
        for i, (data, labels) in enumerate(loaders["train"]):
            output, loss = trainer(data, labels)
            hits, seen = hits + correct(output, labels), seen + len(labels)
            if i % 100 == 0:
                print(f"epoch {epoch} step {i}: loss {loss.item():.4f}, accuracy {hits / seen:.4f}")
        tester.load_state_dict(net.state_dict())
        hits = sum(correct(tester(data), labels) for data, labels in loaders["t10k"])
        print(f"epoch {epoch}: test accuracy {hits / len(loaders['t10k']) / args.batch_size:.4f}")


if __name__ == "__main__":
    main()
