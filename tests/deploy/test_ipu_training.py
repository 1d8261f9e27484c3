"""spikeport train --target: the IPU's simulation in the place of torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikeport.converters.errors import TargetUnavailableError, UnsupportedError, UsageError
from spikeport.deploy import cli, data, network
from spikeport.deploy.cli.train import trainer_for
from spikeport.deploy.options import Options
from spikeport.deploy.training import Epoch, Training

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the test set for both splits: 512 to train, 128 to test."""
    path = tmp_path_factory.mktemp("data")
    images = data.load(EXAMPLES / "data" / "fashion-mnist", limit=640)
    x, y = (images.x[:, 0] * 255).round().byte().numpy(), images.y.byte().numpy()
    for prefix, part in (("train", slice(512)), ("t10k", slice(512, None))):
        for kind, array in (("images-idx3", x[part]), ("labels-idx1", y[part])):
            header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
            content = header + array.astype(np.uint8).tobytes()
            (path / f"{prefix}-{kind}-ubyte").write_bytes(content)
    return path


def run(folder: Path, out: Path, net: str, arguments: tuple[str, ...], **more: Any) -> list[Epoch]:
    given: dict[str, Any] = {"epochs": 2, "batch_size": 64, "tensorboard": False, **more}
    described = network.description(net, arguments)
    options = Options(network=described, data=str(folder), out_dir=out, **given)
    made = Training(
        lambda: network.build(net, arguments), options, make_trainer=trainer_for(options)
    )
    return [*made.epochs()]


def losses(epochs: list[Epoch]) -> list[float]:
    return [value for e in epochs for value in (e.train_loss, e.train_acc, e.test_loss, e.test_acc)]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"device_iterations": 2, "gradient_accumulation": 2},
        {"loss": "ce_rate", "optimizer": "adam", "lr": 0.01},
    ],
)
def test_it_trains_as_torch_does(folder: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    net, arguments = "fc", ("T=4",)
    if "loss" in more:
        net, arguments = f"{Path(__file__).parent / 'spiking_net.py'}:Spiking", ()
    of_target = {
        n: more.pop(n) for n in ("device_iterations", "gradient_accumulation") if n in more
    }
    wanted = run(folder, tmp_path / "torch", net, arguments, **more)
    found = run(folder, tmp_path / "ipu", net, arguments, **more, **of_target, target="ipu-sim")
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-3, abs=2e-3)
    a, b = (
        torch.load(tmp_path / kind / "checkpoint_latest.pth", weights_only=True)["net"]
        for kind in ("torch", "ipu")
    )
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_resume_continues_exactly(folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"target": "ipu-sim", "optimizer": "adam", "lr": 0.01, "limit": 192}
    conv = ("T=2", "channels=2")
    whole = run(folder, tmp_path / "whole", "conv", conv, **given)
    latest = tmp_path / "whole" / "checkpoint_latest.pth"
    stopped = torch.load(latest, weights_only=True)
    with pytest.raises(UsageError, match="has all of its 2 epochs"):
        run(folder, tmp_path / "again", "conv", conv, **given, resume=latest)
    described = network.description("conv", conv)
    options = Options(
        network=described,
        data=str(folder),
        out_dir=tmp_path / "part",
        epochs=2,
        batch_size=64,
        tensorboard=False,
        **given,
    )
    begun = Training(
        lambda: network.build("conv", conv), options, make_trainer=trainer_for(options)
    ).epochs()
    first = next(begun)
    begun.close()
    rest = run(
        folder,
        tmp_path / "rest",
        "conv",
        conv,
        **given,
        resume=tmp_path / "part" / "checkpoint_latest.pth",
    )
    assert losses([first, *rest]) == losses(whole)
    resumed = torch.load(tmp_path / "rest" / "checkpoint_latest.pth", weights_only=True)["net"]
    assert all(torch.equal(v, stopped["net"][n]) for n, v in resumed.items())
    given = {**given, "target": None, "epochs": 3}
    with pytest.raises(
        UsageError, match="was trained on ipu-sim, and this is torch; give the same"
    ):
        run(folder, tmp_path / "other", "conv", conv, **given, resume=latest)


@pytest.mark.snntorch
def test_the_tutorials_network_from_the_shell(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("snntorch")
    recipe = [
        "--loss",
        "ce_count",
        "--optimizer",
        "adam",
        "--lr",
        "0.005",
        "--epochs",
        "3",
        "--json",
    ]
    small = ["--arg", "hidden=64", "-T", "8", "-b", "32", "--data", str(folder)]
    out = ["--out-dir", str(tmp_path / "out"), "--target", "ipu-sim"]
    assert cli.main(["train", "leaky", *recipe, *small, *out]) == cli.OK
    captured = capsys.readouterr()
    epochs = json.loads(captured.out)["epochs"]
    assert epochs[-1]["test_acc"] > 0.4
    assert "ipu-sim" in captured.err
    kinds = {p.name.split(".")[0] for p in (tmp_path / "out").iterdir()}
    assert kinds == {"checkpoint_latest", "checkpoint_max", "events"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"replicas": 2}, "replicas are of a target; give target ipu or ipu-sim"),
        ({"target": "ipu-sim", "amp": True}, "amp cannot be combined with target ipu-sim"),
        (
            {"target": "ipu-sim", "replicas": 3},
            "a batch of 128 does not divide into 3 micro-batches",
        ),
        ({"target": "tpu"}, "target is 'tpu'; allowed: None, ipu, ipu-sim"),
        ({"loss": "ce"}, "loss is 'ce'; allowed: ce_count"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; allowed: sgd, adam"),
        ({"target": "ipu", "device_iterations": 0}, "device_iterations must be at least 1"),
    ],
)
def test_options_that_cannot_be_used(more: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Options(**more)


def test_what_cannot_train(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetUnavailableError, match="Poplar SDK"):
        run(folder, tmp_path, "fc", (), target="ipu")
    with pytest.raises(UsageError, match=r"ce_count takes spikes \[T, N, C\]"):
        run(folder, tmp_path, "fc", (), target="ipu-sim", loss="ce_count")
    both = f"{Path(__file__).parent / 'spiking_net.py'}:KeptAndAsking"
    with pytest.raises(UnsupportedError) as refused:
        run(folder, tmp_path, both, (), target="ipu-sim")
    assert {f.rule for f in refused.value.findings} == {"kept-state", "value-in-python"}
