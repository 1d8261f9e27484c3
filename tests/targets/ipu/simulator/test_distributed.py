"""Two processes that train one model, as PopRun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikeport.targets.ipu.simulator import poptorch

# Knows of processes what poptorch.Options reads from the environment; each has its own seed, and
# trains on its own half of the data.
SCRIPT = """\
import sys, torch, poptorch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, x, y):
        out = self.fc(x)
        return out, F.cross_entropy(out, y)

folder = sys.argv[1]
data = torch.utils.data.TensorDataset(*torch.load(f"{folder}/data.pt"))
for reduction in ("Mean", "Sum"):
    options = poptorch.Options().replicationFactor(2)
    options.Training.gradientAccumulation(2)
    kind = getattr(poptorch.ReductionType, reduction)
    options.Training.accumulationAndReplicationReductionType(kind)
    rank = options.Distributed.processId
    assert options.Distributed.numProcesses == 2
    torch.manual_seed(rank)
    net = Net()
    loader = poptorch.DataLoader(options, data, batch_size=3)
    optimizer = poptorch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model = poptorch.trainingModel(net, options, optimizer)
    for _ in range(5):
        for x, y in loader:
            model(x, y)
    torch.save(net.state_dict(), f"{folder}/{reduction}{rank}.pt")
"""


def spawn(script: Path, *args: str) -> None:
    """Run the simulation in two processes, with the environment that torchrun makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "spikeport.deploy", "simulate", "ipu", str(script), *args],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert said.startswith("simulation of the Poplar SDK 3.4.0")


@pytest.mark.slow
def test_two_processes_are_one_of_twice_the_batch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 5, generator=generator)
    y = torch.randint(0, 4, (48,), generator=generator)
    torch.save((x, y), tmp_path / "data.pt")
    (tmp_path / "train.py").write_text(SCRIPT)
    spawn(tmp_path / "train.py", str(tmp_path))
    # A micro-batch's loss is a mean over 3 samples, and a step adds up 8 of them.
    for reduction, factor in (("Mean", 1), ("Sum", 8)):
        wanted = plain(x, y, factor)
        for rank in range(2):
            found = torch.load(tmp_path / f"{reduction}{rank}.pt", weights_only=True)
            for name, value in wanted.items():
                torch.testing.assert_close(found[f"fc.{name}"], value, rtol=0, atol=1e-6)


def plain(x: Tensor, y: Tensor, factor: int) -> dict[str, Tensor]:
    """The same steps in one process."""
    torch.manual_seed(0)  # every process starts from the weights of the first
    fc = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for part in range(2):  # a step takes 12 samples of each process's 24
            rows = torch.cat([torch.arange(12) + 24 * rank + 12 * part for rank in range(2)])
            optimizer.zero_grad()
            (factor * F.cross_entropy(fc(x[rows]), y[rows])).backward()
            optimizer.step()
    return dict(fc.state_dict())


def test_a_process_that_finds_no_other_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return poptorch.identity_loss(self.w * x, "sum")

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    options = poptorch.Options()
    options.Distributed.configureProcessId(1, 2)
    with pytest.raises(poptorch.Error, match="process 1 of 2 cannot find the others.*MASTER_ADDR"):
        poptorch.trainingModel(Net(), options)(torch.ones(1))
