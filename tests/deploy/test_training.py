"""Training: the loop, its checkpoints, going on from one, several processes, and what is refused."""

import copy
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikeport.converters.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    SpikeportError,
    TargetUnavailableError,
    UsageError,
)
from spikeport.deploy import cli, data, network, training
from spikeport.deploy.checkpoint import load_checkpoint
from spikeport.deploy.options import Options, differences
from spikeport.deploy.ranks import Ranks, join
from spikeport.deploy.trainer import TorchTrainer, evaluate
from spikeport.deploy.training import Epoch, Training

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "checkpoints" / "csnn_c32_t4_half.pth"
SMALL = ("T=2", "channels=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both splits, from the images that are in the repository: 7680 to train, 1000 to test."""
    path = tmp_path_factory.mktemp("data")
    test_set = data.load(EXAMPLES / "data" / "fashion-mnist")
    x, y = (test_set.x[:, 0] * 255).round().byte().numpy(), test_set.y.byte().numpy()
    for prefix, part in (("train", slice(7680)), ("t10k", slice(9000, None))):
        for kind, array in (("images-idx3", x[part]), ("labels-idx1", y[part])):
            header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
            (path / f"{prefix}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return path


@pytest.fixture
def make(folder, tmp_path):
    """A training of a small network in tmp_path / out, two epochs of three batches."""

    def of(out: str = "out", net: str = "conv", arguments=SMALL, **more) -> Training:
        given = {"epochs": 2, "limit": 192, "batch_size": 64, "tensorboard": False} | more
        described = network.description(net, arguments)
        given = {"data": str(folder), "out_dir": tmp_path / out} | given
        return Training(lambda: network.build(net, arguments), Options(network=described, **given))

    return of


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


def results(epochs: list[Epoch]) -> list[dict]:
    speeds = ("train_speed", "test_speed", "seconds")
    return [{k: v for k, v in vars(e).items() if k not in speeds} for e in epochs]


# The loop


@pytest.mark.parametrize("precision", [{}, {"half": True}])
def test_resume_continues_exactly(make, tmp_path, precision):
    more = {"crop": 2, "flip": True, **precision}
    whole = [*make("whole", **more).epochs()]
    begun = make("first", **more).epochs()
    parts = [next(begun)]
    begun.close()
    latest = tmp_path / "first" / "checkpoint_latest.pth"
    parts += make("rest", **more, resume=latest).epochs()

    assert results(whole) == results(parts)
    a, b = (load(tmp_path / run / "checkpoint_latest.pth") for run in ("whole", "rest"))
    del a["args"], b["args"]
    assert_same(a, b)
    assert a["epoch"] == 1
    assert not torch.equal(a["net"]["conv_fc.4.weight"], load(latest)["net"]["conv_fc.4.weight"])


class Dropping(nn.Module):
    """A network that draws in training, and keeps a membrane from one call to the next."""

    def __init__(self) -> None:
        from spikeport.targets import cuda

        super().__init__()
        layers = (nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))
        self.layers = nn.Sequential(*layers, cuda.LIFNode(step_mode="s"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.layers(x) for _ in range(2)]).mean(0)


def test_a_network_that_draws_and_keeps_state_resumes_exactly_too(folder, tmp_path):
    def train(out: str, resume: Path | None = None) -> Training:
        given = {"epochs": 2, "limit": 192, "batch_size": 100, "tensorboard": False}
        options = Options(data=str(folder), out_dir=tmp_path / out, resume=resume, **given)
        return Training(Dropping, options)

    list(train("whole").epochs())
    next(train("first").epochs())
    list(train("rest", tmp_path / "first" / "checkpoint_latest.pth").epochs())
    a, b = (load(tmp_path / run / "checkpoint_latest.pth")["net"] for run in ("whole", "rest"))
    assert_same(a, b)


def test_seed_decides(make, tmp_path):
    nets = []
    for run, seed in enumerate((0, 0, 1)):
        next(make(str(run), seed=seed).epochs())
        nets.append(load(tmp_path / str(run) / "checkpoint_latest.pth")["net"])
    assert_same(nets[0], nets[1])
    assert not torch.equal(nets[0]["conv_fc.0.weight"], nets[2]["conv_fc.0.weight"])


def test_training_learns(make, tmp_path, folder):
    arguments = ("T=4", "channels=8")
    few = {"batch_size": 32, "limit": 7680, "epochs": 1, "lr": 0.2}
    (result,) = make(arguments=arguments, **few).epochs()
    assert result.test_acc > 0.6
    best = load(tmp_path / "out" / "checkpoint_max.pth")
    assert best["max_test_acc"] == result.max_test_acc == result.test_acc
    net = network.build("conv", arguments)
    net.load_state_dict(best["net"])
    test = data.load(folder)
    assert evaluate(net, test.x, test.y, 32)[1] == result.test_acc
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_half_moves_float32_copies(make, tmp_path):
    """Steps that are smaller than float16 resolves add up."""
    latest = tmp_path / "out" / "checkpoint_latest.pth"
    [*make(net="fc", arguments=("T=2",), half=True, lr=1e-4, epochs=1).epochs()]
    checkpoint = load(latest)
    rounded = {
        n: p.half() for n, p in zip(checkpoint["net"], checkpoint["float32"].values(), strict=True)
    }
    assert_same(rounded, dict(checkpoint["net"]))
    lost = [(p != p.half().float()).float().mean().item() for p in checkpoint["float32"].values()]
    assert min(lost) > 0.1


def test_half_and_amp_precisions(make, tmp_path):
    for option, dtype in (("half", torch.half), ("amp", torch.float)):
        next(make(option, net="fc", arguments=(), **{option: True}).epochs())
        net = load(tmp_path / option / "checkpoint_latest.pth")["net"]
        assert net["layer.1.weight"].dtype == dtype


def test_channels_last_is_the_memory_format_of_weights_and_changes_no_result(make):
    last = make(channels_last=True)
    assert last.net.conv_fc[4].weight.is_contiguous(memory_format=torch.channels_last)
    (a, _), (b, _) = make().epochs(), last.epochs()
    assert a.train_loss == pytest.approx(b.train_loss, rel=1e-4)


def test_augment():
    rng = torch.Generator().manual_seed(0)
    x = torch.arange(1.0, 26).reshape(1, 1, 5, 5).repeat(400, 1, 1, 1)
    assert torch.equal(training.augment(x, 0, False, rng), x)
    padded = F.pad(x[0, 0], (1, 1, 1, 1))
    shifts = [padded[i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    allowed = {tuple(s.flatten().tolist()) for s in shifts}
    mirrored = {tuple(s.flip(1).flatten().tolist()) for s in shifts}
    seen = [tuple(s.flatten().tolist()) for s in training.augment(x, 1, False, rng)]
    assert set(seen) == allowed
    seen = [tuple(s.flatten().tolist()) for s in training.augment(x, 1, True, rng)]
    assert set(seen) == allowed | mirrored
    assert 150 < sum(s in allowed for s in seen) < 250


class Interrupted:
    def __reduce__(self):
        raise KeyboardInterrupt


def test_an_interrupted_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    training.save({"epoch": 1}, path)
    with pytest.raises(KeyboardInterrupt):
        training.save({"epoch": 2, "cut off": Interrupted()}, path)
    assert load(path) == {"epoch": 1}


def test_tensorboard_scalars(make, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    epochs = list(make(net="fc", arguments=(), tensorboard=True).epochs())
    events = accumulator.EventAccumulator(str(tmp_path / "out")).Reload()
    for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
        written = [(e.step, e.value) for e in events.Scalars(name)]
        assert written == [(e.epoch, pytest.approx(getattr(e, name))) for e in epochs]


# Several processes


@pytest.mark.parametrize(("N", "size"), [(64, 2), (7, 3), (2, 4)])
def test_shares_are_the_batch_in_order(N, size):
    batch = torch.arange(N)
    shares = [Ranks(rank, size).share(batch) for rank in range(size)]
    assert torch.equal(torch.cat(shares), batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def together(size: int, *argv: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(size), "-m", "spikeport.deploy", "train", *map(str, argv)]
    command += ["--device", "cpu", "--no-tensorboard", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_two_processes_are_one(make, folder, tmp_path):
    """A batch whose shares differ in size, a last test batch of one image, and a resume."""
    few = {"limit": 301, "batch_size": 75, "lr": 1.0}
    alone = list(make("alone", net="fc", arguments=("T=4",), **few).epochs())
    next(make("begun", net="fc", arguments=("T=4",), **few).epochs())
    latest = tmp_path / "begun" / "checkpoint_latest.pth"
    argv = ["fc", "-T", 4, "--epochs", 2, "--limit", 301, "-b", 75, "--lr", 1.0, "--data", folder]
    done = together(2, *argv, "--out-dir", tmp_path / "two", "--resume", latest)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch = 1") == 1
    assert "cpu, 2 processes\n" in done.stderr
    (second,) = results([Epoch(**e) for e in json.loads(done.stdout)["epochs"]])
    (expected,) = results(alone[1:])
    # Rounding flips a spike here and there: one image of 301 may fall into another class.
    assert second == {k: pytest.approx(v, rel=1e-3, abs=1 / 301) for k, v in expected.items()}
    a, b = (load(tmp_path / run / "checkpoint_latest.pth") for run in ("alone", "two"))
    torch.testing.assert_close(b["net"], a["net"], rtol=1e-3, atol=1e-4)
    assert (a["net"]["layer.1.weight"] - load(latest)["net"]["layer.1.weight"]).abs().max() > 0.01


@pytest.mark.slow
def test_two_processes_with_batch_norms_of_their_own(folder, tmp_path):
    """Against the same written out: gradients of the two halves averaged, process 0's statistics."""
    argv = ["conv", "-T", 2, "--channels", 4, "--epochs", 1, "--limit", 128, "-b", 64]
    done = together(2, *argv, "--data", folder, "--out-dir", tmp_path)
    assert "2 processes, each with batch norm statistics of its own share" in done.stderr
    train_set = data.load(folder, split="train", limit=128)
    torch.manual_seed(0)
    net = network.build("conv", SMALL).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    for batch in order.split(64):
        optimizer.zero_grad()
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        for half in reversed(batch.split(32)):  # process 0's last, whose statistics stay
            net.load_state_dict(buffers, strict=False)
            rate = net(train_set.x[half])
            (F.mse_loss(rate, F.one_hot(train_set.y[half], 10).float()) / 2).backward()
        optimizer.step()
    found = load(tmp_path / "checkpoint_latest.pth")["net"]
    torch.testing.assert_close(found, dict(net.state_dict()), rtol=1e-4, atol=1e-5)


def test_processes_on_gpus_that_are_not_there(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "99")):
        monkeypatch.setenv(name, value)
    for device, said in (
        ("cuda:0", "2 processes were given one GPU, cuda:0"),
        ("cuda", "has no GPU"),
    ):
        with pytest.raises(UsageError, match=said), join(torch.device(device)):
            pass


def test_sync_batch_norm_needs_gpus():
    options = Options(sync_batch_norm=True)
    with pytest.raises(UsageError, match="--sync-batch-norm is for GPUs, and the device is cpu"):
        TorchTrainer(network.build("conv", SMALL), options, Ranks(0, 2), 10)


# What is refused


def test_divergence_is_noticed(make):
    with pytest.raises(SpikeportError, match=r"diverged in epoch .: conv_fc.* finite; lower --l"):
        list(make(half=True, momentum=1e4).epochs())


def test_resume_refuses(make, tmp_path):
    list(make().epochs())
    latest = tmp_path / "out" / "checkpoint_latest.pth"
    with pytest.raises(UsageError, match="has all of its 2 epochs"):
        make(resume=latest)
    with pytest.raises(UsageError) as caught:
        make(resume=latest, arguments=("T=2", "channels=8"), lr=0.5)
    assert str(caught.value).splitlines()[1:] == [
        "  channels: 4 there, 8 here",
        "  lr: 0.1 there, 0.5 here",
    ]
    with pytest.raises(UsageError, match="net: CSNN there, FCSNN here"):
        make(resume=latest, net="fc", arguments=())
    with pytest.raises(CheckpointError, match="has no optimizer, lr_scheduler, scaler"):
        make(resume=CHECKPOINT)
    with pytest.raises(CheckpointError, match=r"missing\.pth cannot be loaded"):
        make(resume=tmp_path / "missing.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="has no net"):
        make(resume=tmp_path / "tensor.pth")
    (tmp_path / "cut.pth").write_bytes(latest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be loaded"):
        make(resume=tmp_path / "cut.pth")
    torch.save({"net": Path("x")}, tmp_path / "object.pth")
    with pytest.raises(CheckpointError, match=r"object\.pth cannot be loaded"):
        make(resume=tmp_path / "object.pth")
    other = load(latest)
    other |= {"epoch": 0, "net": {"fc.weight": torch.zeros(3)}}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"(?s)other\.pth is of another .*fc\.weight"):
        make(resume=tmp_path / "other.pth")


def test_checkpoints_of_before_there_was_a_choice_of_network_resume(make, tmp_path):
    begun = make("first").epochs()
    next(begun)
    latest = tmp_path / "first" / "checkpoint_latest.pth"
    old = load(latest)
    new = ("net", "separate_norms", "backend", "channels_last", "sync_batch_norm")
    old["args"] = {n: v for n, v in old["args"].items() if n not in new}
    torch.save(old, latest)
    assert [e.epoch for e in make("rest", resume=latest).epochs()] == [1]


def test_parts_of_a_batch_with_statistics_of_their_own_are_another_result():
    ours = {"net": "CSNN", "separate_norms": 2, "device": "cpu"}
    assert differences({"device": "cuda"}, ours) == ["separate_norms: 1 there, 2 here"]


def test_batch_that_the_data_or_the_processes_do_not_fit(make, folder):
    with pytest.raises(UsageError, match="192 training images are no batch of 512"):
        make(batch_size=512)
    options = Options(data=str(folder), batch_size=1)
    with pytest.raises(UsageError, match="a batch of 1 is too small for 2 processes"):
        Training(Dropping, options, Ranks(0, 2))


def test_data_missing(make, tmp_path, folder):
    with pytest.raises(DataError, match="no data set or path"):
        make(data=str(tmp_path / "none"))


def test_network_that_cannot_be_trained():
    with pytest.raises(UsageError, match="has no parameters that learn"):
        TorchTrainer(nn.Flatten(), Options(), Ranks(), 10)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 9))
    for net, found in ((flat, [5, 9]), (nn.Linear(28, 9), [5, 1, 28, 9])):
        trainer = TorchTrainer(net, Options(), Ranks(), 10)
        with pytest.raises(
            UsageError, match=re.escape(f"gives {found} for 5 samples of 10 classes")
        ):
            trainer.step(torch.zeros(5, 1, 28, 28), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("precision", [{}, {"amp": True}, {"half": True}])
def test_a_training_is_evaluated_in_float32(precision):
    """As conversions of the checkpoint are compared with that."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    trainer = TorchTrainer(net, Options(**precision), Ranks(), 10)
    held = copy.deepcopy(trainer.net).float()
    assert trainer.evaluate(x, y) == evaluate(held, x, y)
    assert {p.dtype for p in trainer.net.parameters()} == {Options(**precision).dtype}


def test_a_training_on_a_gpu_goes_on_without_one():
    """There the learning rate is a tensor."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    state = copy.deepcopy(TorchTrainer(net, Options(), Ranks(), 10).state())
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(0.025), "fused": True}
    trainer = TorchTrainer(net, Options(), Ranks(), 10)
    trainer.load(state)
    trainer.step(torch.rand(4, 1, 28, 28), torch.arange(4))
    trainer.end_epoch()
    (group,) = trainer.state()["optimizer"]["param_groups"]
    assert isinstance(group["lr"], float)
    assert 0 < group["lr"] <= 0.025


def test_backends(make):
    with pytest.raises(TargetUnavailableError, match="backend='fused' runs on a CUDA GPU"):
        list(make(backend="fused").epochs())
    assert {n.backend for n in make(backend="torch").net.conv_fc if hasattr(n, "backend")} == {
        "torch"
    }
    with pytest.raises(UsageError, match=r"no neuron layer of spikeport\.targets\.cuda"):
        TorchTrainer(nn.Linear(2, 2), Options(backend="torch"), Ranks(), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [{}, {"half": True}, {"amp": True}])
def test_a_graph_takes_the_same_steps(make, tmp_path, precision):
    """Captured once, with each epoch's learning rate."""
    more = {"device": "cuda", "epochs": 3, "limit": 640, **precision}
    plain = [*make("plain", "fc", ("T=4",), **more).epochs()]
    graph = [*make("graph", "fc", ("T=4",), graph=True, **more).epochs()]
    assert results(plain) == results(graph)
    a, b = (load(tmp_path / run / "checkpoint_latest.pth") for run in ("plain", "graph"))
    assert_same(a["net"], b["net"])
    assert_same(a["optimizer"]["state"], b["optimizer"]["state"])


@pytest.mark.gpu
def test_a_first_step_that_is_skipped_leaves_no_trace(make):
    training = make(device="cuda", half=True, graph=True, limit=640)
    training._trainer._scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    for epoch in training.epochs():
        assert epoch.train_loss < 1


class Asking(nn.Module):
    """Looks at a value while it runs, which a graph cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(28 * 28, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x.flatten(1))
        return y if y.sum().item() > 0 else -y


@pytest.mark.gpu
def test_a_step_that_no_graph_can_hold(folder, tmp_path):
    options = Options(
        device="cuda", graph=True, data=str(folder), out_dir=tmp_path, tensorboard=False
    )
    with pytest.raises(
        UsageError, match="cannot be captured as a CUDA graph: .* Leave --graph out"
    ):
        next(Training(Asking, options).epochs())


def test_options_say_all_that_is_wrong_with_them():
    with pytest.raises(
        UsageError, match=r"epochs must .* 1; lr must be above 0; backend is .x.; .*; half and amp"
    ):
        Options(epochs=0, lr=0, backend="x", half=True, amp=True)
    with pytest.raises(UsageError, match="graph is a CUDA graph, and the device is cpu"):
        Options(graph=True)
    with pytest.raises(UsageError, match="device is 'gpu'; allowed: cpu, cuda"):
        Options(device="gpu")
    with pytest.raises(DeviceError, match="there is no device cuda:99"):
        Options(device="cuda:99")


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'spikeport\[train\]', or --no-tensorboard"):
        training.summary_writer(tmp_path, 0)


# The command


def test_command_line(folder, tmp_path, capsys):
    few = ["-T", "2", "--channels", "4", "-b", "64", "--epochs", "1", "--limit", "128"]
    where = ["--data", str(folder), "--device", "cpu", "--no-tensorboard", "--out-dir"]
    net = f"{EXAMPLES / 'conv_fashion_mnist.py'}:CSNN"
    assert cli.main(["train", net, *few, *where, str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    assert out.startswith(f"spikeport train {net} -T 2 --channels 4")
    assert re.search(r"^epoch = 0, train_loss = 0\.\d{4}, .*, max_test_acc = 0\.", out, re.M)
    best = load(tmp_path / "checkpoint_max.pth")
    assert (best["args"]["T"], best["args"]["channels"], best["args"]["net"]) == (2, 4, "CSNN")
    load_checkpoint(network.build("conv", SMALL), tmp_path / "checkpoint_max.pth", "net")


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["conv", "-T", "0"], 2, "T is 0"),
        (["con"], 2, "conv, fc or leaky"),
        (["fc", "--channels", "4"], 2, "unexpected keyword argument 'channels'"),
        (["conv", "-T", "2", "--arg", "T=3"], 2, "T is given twice"),
        (["fc", "--half", "--amp"], 2, "not allowed with"),
        (["fc", "--data", "fashion_mnist"], 4, "did you mean fashion-mnist"),
        (["fc", "--backend", "fused", "--limit", "128"], 3, "use backend='auto'"),
        (["fc", "--device", "cuda:99"], 3, "no device cuda:99"),
        (["fc", "--limit", "100"], 2, "100 training images are no batch of 128"),
        (["fc", "--out-dir", "/proc/out", "--limit", "128"], 2, "give another --out-dir"),
    ],
)
def test_command_line_errors(argv, code, said, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    where = [] if "--data" in argv else ["--data", str(folder)]
    device = [] if "--device" in argv else ["--device", "cpu"]
    try:
        found = cli.main(["train", *argv, *where, *device, "--no-tensorboard"])
    except SystemExit as left:
        found = left.code
    assert found == code
    assert said in capsys.readouterr().err
