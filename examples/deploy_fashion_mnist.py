"""The main job: a trained checkpoint onto Lynxi HP300, and proof that the chip computes it.

python examples/deploy_fashion_mnist.py                       on the simulated chip
python examples/deploy_fashion_mnist.py --target lynxi        on a card
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from conv_fashion_mnist import CSNN

from spikeport import deploy
from spikeport.deploy import data

HERE = Path(__file__).parent


def main() -> None:
    """Convert, compile, load, run all test images, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="lynxi-sim")
    trained = HERE / "checkpoints/csnn_c32_t4_half.pth"
    parser.add_argument("--checkpoint", type=Path, default=trained)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("build/csnn"))
    parser.add_argument("--limit", type=int, help="run on the first images only")
    args = parser.parse_args()

    checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    net = CSNN(T=checkpoint["args"]["T"], channels=checkpoint["args"]["channels"])
    net.load_state_dict(checkpoint["net"])
    net.eval()
    test = data.load("fashion-mnist", limit=args.limit)

    start = time.perf_counter()
    program = deploy.convert(net, (test.x[: args.batch],), target=args.target)
    for report in program.history:
        print(report)
    print(program.evidence)
    artifact = deploy.compile(program, args.out, overwrite=True)
    found = "taken from the cache" if artifact.cached else "compiled"
    print(f"\n{found} in {time.perf_counter() - start:.1f} s, conversion included\n")

    with deploy.load(args.out, device=0) as model:
        report = deploy.compare(net, model, test.loader(args.batch), layers=500, progress=True)
    path = args.out.with_name(args.out.name + "-report.json")
    path.write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    print(report)
    print(f"\nartifact {args.out}\nreport   {path}")


if __name__ == "__main__":
    main()
