"""Two GPUs against one: images/s of ``spikeport train`` at the same batch for each GPU.

    python benchmarks/cuda_two_gpus.py

The seed's net (128 channels, T = 4), 128 images for each GPU, float16 and autocast, with CUDA graphs.
Takes the median epoch but for the first, in which kernels are compiled. Exit code 1 if something asked
is not met.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile

import torch
from asked import Table

EPOCHS, BATCH = 6, 128


def images_per_second(processes: int, *options: str) -> float:
    train = ["spikeport.deploy", "train", "conv", "-T", "4", "--graph", "--channels-last"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", *train, *options),
            *("--epochs", str(EPOCHS), "--batch-size", str(BATCH * processes)),
            *("--out-dir", folder, "--no-tensorboard"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    speeds = [float(s) for s in re.findall(r"train speed = (\d+)", done.stdout)]
    return statistics.median(speeds[1:])


def main() -> int:
    if torch.cuda.device_count() < 2:
        sys.exit(f"needs two CUDA GPUs: torch sees {torch.cuda.device_count()}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    table = Table(f"spikeport train conv, T = 4, batch {BATCH} for each GPU")
    for name, option in (("float16", "--half"), ("autocast", "--amp")):
        one, two = (images_per_second(n, option) for n in (1, 2))
        table.note(f"{name}: one GPU: images/s", f"{one:.0f}")
        table.note(f"{name}: two GPUs: images/s", f"{two:.0f}")
        table.at_least(f"{name}: two GPUs / one: images/s", 1.8, two / one)
    return table.verdict()


if __name__ == "__main__":
    sys.exit(main())
