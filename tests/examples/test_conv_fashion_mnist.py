"""The example network, and the checkpoint that is shipped."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikeport.converters.capture import capture
from spikeport.converters.errors import UsageError
from spikeport.converters.program import NEURON
from spikeport.converters.stand_in import StandIn
from spikeport.deploy import cli, data
from spikeport.deploy.options import differences
from spikeport.deploy.trainer import evaluate
from spikeport.targets.cuda import layers

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "conv_fashion_mnist.py"
CHECKPOINT = EXAMPLES / "checkpoints" / "csnn_c32_t4_half.pth"

_spec = importlib.util.spec_from_file_location("conv_fashion_mnist", SCRIPT)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def test_set() -> data.Dataset:
    return data.load(EXAMPLES / "data" / "fashion-mnist")


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


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


def test_the_script_is_the_command_for_its_network(tmp_path):
    command = [sys.executable, str(SCRIPT), "--epochs", "0", "--crop", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: epochs must be at least 1; crop must be at least 0\n"


def test_sizes_below_one_are_refused():
    with pytest.raises(UsageError, match="T is 0 and channels is -1; it must be at least 1"):
        example.CSNN(0, -1)


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
    args = cli.parser().parse_args(["train", "conv", *command[2:]])
    assert not differences(checkpoint["args"], {n: getattr(args, n) for n in checkpoint["args"]})
    accuracies = re.findall(r"^epoch = (\d+), .*, test_acc = ([\d.]+), max_test", log, re.M)
    assert accuracies[checkpoint["epoch"]] == (
        str(checkpoint["epoch"]),
        f"{checkpoint['max_test_acc']:.4f}",
    )
    assert max(float(a) for _, a in accuracies) == checkpoint["max_test_acc"] >= 0.92


def test_shipped_checkpoint_in_float32(test_set):
    assert evaluate(shipped_net(), test_set.x[:1000], test_set.y[:1000])[1] > 0.91


@pytest.mark.slow
def test_shipped_checkpoint_on_all_images(test_set):
    assert evaluate(shipped_net(), test_set.x, test_set.y)[1] >= 0.92


def test_capture_sees_the_neurons_where_kernels_would_take_the_batch_norm_in(monkeypatch):
    """On a GPU a layer's neuron and its batch norm are one kernel; in the graph they stay two."""

    def one_kernel(norm, node, x_seq):
        assert not isinstance(node, StandIn)
        return node(norm(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2]))

    monkeypatch.setattr(layers, "batch_norm_neuron", one_kernel)
    monkeypatch.setattr(layers, "fused_is_possible", lambda x: True)
    program = capture(example.CSNN(2, 2), (torch.rand(2, 1, 28, 28),))
    assert sum(n.target is NEURON for n in program.graph.nodes) == 4
