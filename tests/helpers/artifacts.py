"""A small network to compile, and what tests read and change of its artifact."""

import json
from pathlib import Path

import torch
from torch import nn

from spikeport.converters import neurons
from spikeport.deploy.manifest import write_manifest

T, BATCH = 3, 4


class Net(nn.Module):
    """x [N, 1, 8, 8] -> a dict of rates [N, 5] and, as a tuple, spikes [T, N, 5] and a sum [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fire = neurons.IFNode()
        self.fc = nn.Linear(4 * 16, 5)
        self.out = neurons.LIFNode(v_threshold=0.2)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = self.bn(self.conv(x)).unsqueeze(0).expand(T, -1, -1, -1, -1)
        y = nn.functional.max_pool2d(self.fire(y).flatten(0, 1), 2).flatten(1)
        spikes = self.out(self.fc(y).unflatten(0, (T, -1)))
        return {"rate": spikes.mean(0), "more": (spikes, spikes.sum((0, 2)))}


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    net.bn.running_mean.uniform_(-0.5, 0.5)
    net.conv.weight.data *= 4
    return net.eval()


def leaves(outputs: dict) -> list[torch.Tensor]:
    return [outputs["rate"], *outputs["more"]]


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def edit(path: Path, **changes: object) -> None:
    """Change the manifest as someone who knows the digest would."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    write_manifest(path, manifest)
