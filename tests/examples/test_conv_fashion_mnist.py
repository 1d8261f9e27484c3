"""The example network, its training, and the checkpoint that is shipped."""

import importlib.util
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spikeport.converters.errors import CheckpointError, SpikeportError, UsageError
from spikeport.deploy import data

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "conv_fashion_mnist.py"
CHECKPOINT = EXAMPLES / "checkpoints" / "csnn_c32_t4_half.pth"

_spec = importlib.util.spec_from_file_location("conv_fashion_mnist", SCRIPT)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def test_set() -> data.Dataset:
    return data.load(EXAMPLES / "data" / "fashion-mnist")


@pytest.fixture(scope="module")
def folder(test_set, tmp_path_factory) -> Path:
    """Both splits, from the images that are in the repository: 7680 to train, 1000 to test."""
    path = tmp_path_factory.mktemp("data")
    x, y = (test_set.x[:, 0] * 255).round().byte().numpy(), test_set.y.byte().numpy()
    for prefix, part in (("train", slice(7680)), ("t10k", slice(9000, None))):
        for kind, array in (("images-idx3", x[part]), ("labels-idx1", y[part])):
            header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
            (path / f"{prefix}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return path


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks here are so small that threads only slow them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FEW = ["-T", "2", "--channels", "4", "-b", "64", "--device", "cpu", "--no-tensorboard"]


def options(folder: Path, out_dir: Path, *more: str):
    few = [*FEW, "--epochs", "2", "--limit", "192"]
    return example.parser().parse_args(
        [*few, "--data", str(folder), "--out-dir", str(out_dir), *more]
    )


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


def test_state_dict_keys():
    bn = [f"conv_fc.{i}.{n}" for i in (1, 5) for n in ("weight", "bias", "running_mean")]
    bn += [f"conv_fc.{i}.{n}" for i in (1, 5) for n in ("running_var", "num_batches_tracked")]
    weights = [f"conv_fc.{i}.weight" for i in (0, 4, 9, 11)]
    assert sorted(example.CSNN(4, 8).state_dict()) == sorted(weights + bn)


def test_forward_is_the_step_by_step_network(test_set):
    """The network again, one time step after the other, with its neurons written out."""
    net = shipped_net().double().eval()
    net.T = 3
    x = test_set.x[:5].double()
    with torch.no_grad():
        layers, membrane, rate = net.conv_fc, {}, 0
        for _ in range(3):
            y = x
            for i in range(13):
                if i in (2, 6, 10, 12):
                    h = membrane.get(i, 0) + y
                    membrane[i], y = torch.where(h >= 1, 0, h), (h >= 1).double()
                else:
                    y = layers[i](y)
            rate += y / 3
        assert 0 < rate.mean() < 1
        torch.testing.assert_close(net(x), rate)


@pytest.mark.parametrize("precision", [[], ["--half"]])
def test_resume_continues_exactly(folder, tmp_path, precision):
    more = ["--crop", "2", "--flip", *precision]
    whole = list(example.train(options(folder, tmp_path / "whole", *more)))

    first = example.train(options(folder, tmp_path / "first", *more))
    results = [next(first)]
    first.close()
    latest = tmp_path / "first" / "checkpoint_latest.pth"
    results += example.train(
        options(folder, tmp_path / "rest", *more, "--resume", str(latest)),
    )

    speeds = ("train_speed", "test_speed", "seconds")
    for a, b in zip(whole, results, strict=True):
        assert {k: v for k, v in a.items() if k not in speeds} == {
            k: v for k, v in b.items() if k not in speeds
        }
    a, b = (load(tmp_path / run / "checkpoint_latest.pth") for run in ("whole", "rest"))
    del a["args"], b["args"]
    assert_same(a, b)
    assert a["epoch"] == 1
    assert not torch.equal(a["net"]["conv_fc.4.weight"], load(latest)["net"]["conv_fc.4.weight"])


def test_seed_decides(folder, tmp_path):
    nets = []
    for run, seed in enumerate("001"):
        next(example.train(options(folder, tmp_path / str(run), "--seed", seed)))
        nets.append(load(tmp_path / str(run) / "checkpoint_latest.pth")["net"])
    assert_same(nets[0], nets[1])
    assert not torch.equal(nets[0]["conv_fc.0.weight"], nets[2]["conv_fc.0.weight"])


def test_training_learns(folder, tmp_path):
    few = ["-b", "32", "--limit", "7680", "--epochs", "1", "--lr", "0.2", "-T", "4"]
    (result,) = example.train(options(folder, tmp_path, *few, "--channels", "8"))
    assert result["test_acc"] > 0.6
    best = load(tmp_path / "checkpoint_max.pth")
    assert best["max_test_acc"] == result["max_test_acc"] == result["test_acc"]
    net = example.CSNN(4, 8)
    net.load_state_dict(best["net"])
    test = data.load(folder)
    assert example.evaluate(net, test.x, test.y, 32)[1] == result["test_acc"]
    assert not list(tmp_path.glob("*.tmp"))


def test_half_and_amp_precisions(folder, tmp_path):
    for option, dtype in (("--half", torch.half), ("--amp", torch.float)):
        out = tmp_path / option
        next(example.train(options(folder, out, option)))
        assert load(out / "checkpoint_latest.pth")["net"]["conv_fc.9.weight"].dtype == dtype


def test_augment():
    rng = torch.Generator().manual_seed(0)
    x = torch.arange(1.0, 26).reshape(1, 1, 5, 5).repeat(400, 1, 1, 1)
    assert torch.equal(example.augment(x, 0, False, rng), x)
    padded = F.pad(x[0, 0], (1, 1, 1, 1))
    shifts = [padded[i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    allowed = {tuple(s.flatten().tolist()) for s in shifts}
    mirrored = {tuple(s.flip(1).flatten().tolist()) for s in shifts}
    seen = [tuple(s.flatten().tolist()) for s in example.augment(x, 1, False, rng)]
    assert set(seen) == allowed
    seen = [tuple(s.flatten().tolist()) for s in example.augment(x, 1, True, rng)]
    assert set(seen) == allowed | mirrored
    assert 150 < sum(s in allowed for s in seen) < 250


def test_divergence_is_noticed(folder, tmp_path):
    args = options(folder, tmp_path, "--half", "--momentum", "1e4")
    with pytest.raises(
        SpikeportError, match=r"diverged in epoch 0: conv_fc.* not finite; lower --l"
    ):
        list(example.train(args))


def test_resume_refuses(folder, tmp_path):
    latest = tmp_path / "checkpoint_latest.pth"
    list(example.train(options(folder, tmp_path)))

    def resume(path: Path, *more: str):
        list(example.train(options(folder, tmp_path / "rest", *more, "--resume", str(path))))

    with pytest.raises(UsageError, match="has all of its 2 epochs"):
        resume(latest)
    with pytest.raises(UsageError) as caught:
        resume(latest, "--channels", "8", "--lr", "0.5")
    assert "channels: 4 there, 8 here" in str(caught.value)
    assert "lr: 0.1 there, 0.5 here" in str(caught.value)
    with pytest.raises(CheckpointError, match="has no optimizer, lr_scheduler, scaler"):
        resume(CHECKPOINT)
    with pytest.raises(CheckpointError, match=r"missing\.pth cannot be loaded"):
        resume(tmp_path / "missing.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="has no net"):
        resume(tmp_path / "tensor.pth")
    (tmp_path / "cut.pth").write_bytes(latest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be loaded"):
        resume(tmp_path / "cut.pth")
    torch.save({"net": Path("x")}, tmp_path / "object.pth")
    with pytest.raises(CheckpointError, match=r"object\.pth cannot be loaded"):
        resume(tmp_path / "object.pth")


def test_an_interrupted_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    example.save({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        example.save({"epoch": 2, "unpicklable": lambda: None}, path)
    assert load(path) == {"epoch": 1}


def test_batch_larger_than_the_data(folder, tmp_path):
    with pytest.raises(UsageError, match="192 training images are no batch of 512"):
        next(example.train(options(folder, tmp_path, "-b", "512")))


def test_tensorboard_scalars(folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = options(folder, tmp_path)
    args.tensorboard = True
    results = list(example.train(args))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
        written = [(e.step, e.value) for e in events.Scalars(name)]
        assert written == [(r["epoch"], pytest.approx(r[name])) for r in results]


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'spikeport\[train\]', or --no-tensorboard"):
        example.summary_writer(tmp_path, 0)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(folder, tmp_path):
    done = run(
        *FEW, "--epochs", "1", "--limit", "128", "--data", str(folder), "--out-dir", str(tmp_path)
    )
    assert done.returncode == 0
    assert done.stderr == ""  # no progress bar where there is no terminal
    assert re.search(
        r"^epoch = 0, train_loss = 0\.\d{4}, .*, max_test_acc = 0\.", done.stdout, re.M
    )
    assert (tmp_path / "checkpoint_max.pth").is_file()


def test_command_line_errors():
    done = run("-T", "0", "--crop", "-1")
    assert done.returncode == 1
    assert done.stderr == "error: T must be at least 1; crop must be at least 0\n"


def shipped_net() -> torch.nn.Module:
    net = example.CSNN(4, 32)
    net.load_state_dict(load(CHECKPOINT)["net"])
    return net


def test_shipped_checkpoint_and_its_log():
    checkpoint = load(CHECKPOINT)
    assert CHECKPOINT.stat().st_size < 3e6
    assert {t.dtype for t in checkpoint["net"].values()} == {torch.half, torch.int64}
    log = CHECKPOINT.with_suffix(".log").read_text()
    command = log.splitlines()[0].split()
    assert command[:2] == ["python", "examples/conv_fashion_mnist.py"]
    trained_with = example.plain(example.parser().parse_args(command[2:])) | {"device": "cuda"}
    assert checkpoint["args"] == trained_with
    accuracies = re.findall(r"^epoch = (\d+), .*, test_acc = ([\d.]+), max_test", log, re.M)
    assert accuracies[checkpoint["epoch"]] == (
        str(checkpoint["epoch"]),
        f"{checkpoint['max_test_acc']:.4f}",
    )
    assert max(float(a) for _, a in accuracies) == checkpoint["max_test_acc"] >= 0.92


def test_shipped_checkpoint_in_float32(test_set):
    assert example.evaluate(shipped_net(), test_set.x[:1000], test_set.y[:1000])[1] > 0.91


@pytest.mark.slow
def test_shipped_checkpoint_on_all_images(test_set):
    assert example.evaluate(shipped_net(), test_set.x, test_set.y)[1] >= 0.92
