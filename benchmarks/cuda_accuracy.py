"""The accuracy that training on a GPU reaches, and what is left of it on the simulated chip.

    python benchmarks/cuda_accuracy.py --out build/accuracy

The seed's recipe: 64 epochs, 128 channels, T = 4, batches of 128, SGD with momentum 0.9, a cosine from
0.1, three random seeds, in float16 and with autocast; as many trainings at a time as there are GPUs. The
best epoch counts, as in the seed. Then each best checkpoint is converted for ``lynxi-sim`` and run on
all test images; beside it stands what it reaches in float32 on the target ``reference``. Writes each
training's log, ``accuracy.csv`` and its curves. Exit code 1 if something asked is not met.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import torch
from asked import Table

SEEDS = 3
ASKED = {"half": 0.933, "amp": 0.9346}
CHIP, LOST_ON_CHIP = "lynxi-sim", 0.0014
THREADS = max(1, (os.cpu_count() or 1) // (SEEDS * len(ASKED)))


@dataclass(frozen=True)
class Trained:
    """A training: accuracy after each epoch, wall-clock seconds, and the best epoch on each target."""

    precision: str
    seed: int
    accuracy: list[float]
    seconds: float
    on: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.precision}, seed {self.seed}"


def train(precision: str, seed: int, epochs: int, out: Path, gpus: Queue[str]) -> Trained:
    name, gpu = f"{precision}_seed{seed}", gpus.get()
    start = time.perf_counter()
    try:
        said = run(
            *("train", "conv", "-T", "4", f"--{precision}", "--graph", "--channels-last"),
            *("--epochs", str(epochs), "--seed", str(seed), "--no-tensorboard"),
            *("--out-dir", str(out / name)),
            gpu=gpu,
        )
    finally:
        gpus.put(gpu)
    seconds = time.perf_counter() - start
    (out / f"{name}.log").write_text(said)
    of_net = ["conv", "--arg", "T=4", "--arg", "channels=128", "--key", "net"]
    best = ["--checkpoint", str(out / name / "checkpoint_max.pth"), "--input", "100,1,28,28"]
    on = {}
    for target in ("reference", CHIP):
        artifact = str(out / f"{name}_{target}")
        run("compile", *of_net, *best, "--target", target, "-o", artifact, "--no-cache")
        on[target] = json.loads(run("run", artifact, "--data", "fashion-mnist", "--json"))[
            "accuracy"
        ]
    return Trained(
        precision,
        seed,
        [float(a) for a in re.findall(r"test_acc = ([\d.]+), max", said)],
        seconds,
        on,
    )


def run(*arguments: str, gpu: str = "") -> str:
    command = [sys.executable, "-m", "spikeport.deploy", *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(THREADS)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def plot(found: list[Trained], out: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for i, precision in enumerate(ASKED):
        for one in (f for f in found if f.precision == precision):
            label = precision if one.seed == 0 else None
            axes.plot([100 * a for a in one.accuracy], color=f"C{i}", linewidth=0.8, label=label)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(88, 94))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "accuracy.svg")


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy over seeds, and on the simulated chip")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="logs and curves")
    parser.add_argument("--epochs", type=int, default=64, help="epochs (64)")
    parser.add_argument(
        "--precision", action="append", choices=[*ASKED], help="only this one; may be repeated"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"random seeds ({SEEDS})")
    args = parser.parse_args()
    precisions = args.precision or [*ASKED]
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA GPU: torch sees none")
    args.out.mkdir(parents=True, exist_ok=True)
    gpus: Queue[str] = Queue()
    for i in range(torch.cuda.device_count()):
        gpus.put(str(i))
    cells = [(precision, seed) for seed in range(args.seeds) for precision in precisions]
    with ThreadPoolExecutor(len(cells)) as pool:
        found = list(pool.map(lambda c: train(*c, args.epochs, args.out, gpus), cells))
    found.sort(key=lambda f: (f.precision != "half", f.seed))
    with (args.out / "accuracy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *(f.name for f in found)])
        writer.writerows(
            [i, *row] for i, row in enumerate(zip(*(f.accuracy for f in found), strict=True))
        )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    table = Table("spikeport train conv, 128 channels, T = 4")
    for f in found:
        best = max(f.accuracy)
        table.note(f"{f.name}: last epoch", f"{f.accuracy[-1]:.4f}")
        table.note(f"{f.name}: seconds of the whole command", f"{f.seconds:.1f}")
        for target, accuracy in f.on.items():
            table.note(f"{f.name}: on {target}", f"{accuracy:.4f}")
        table.at_most(f"{f.name}: lost on {CHIP}", LOST_ON_CHIP, abs(best - f.on[CHIP]))
    for f in found:
        table.at_least(f"{f.name}: best epoch", ASKED[f.precision], max(f.accuracy))
    for precision in precisions:
        of_seeds = [max(f.accuracy) for f in found if f.precision == precision]
        spread = statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0
        table.note(f"{precision}: best epoch, mean", f"{statistics.mean(of_seeds):.4f}")
        table.note(f"{precision}: standard deviation of the seeds", f"{spread:.4f}")
    try:
        plot(found, args.out)
    except ImportError:
        print("matplotlib is not installed: no curves drawn")
    return table.verdict()


if __name__ == "__main__":
    sys.exit(main())
