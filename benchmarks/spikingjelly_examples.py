"""SpikingJelly 2.0's examples: the network of each, converted for several targets and held against itself.

    python benchmarks/spikingjelly_examples.py                      every network; prints the table
    python benchmarks/spikingjelly_examples.py ResNet11 ILC-SAN     these alone
    python benchmarks/spikingjelly_examples.py --target onnx ResNet11

Float32, batch 2. What is measured, and what the verdicts say, is as in ``zoo.py``. The networks are the
examples' own classes, built with the examples' own arguments; packages that their training asks for, and
that are not installed, are stood in for. Those that are refused have neurons of the example's own, which
nobody declared.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.util
import platform
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import zoo
from torch import nn

EXAMPLES = "spikingjelly.activation_based.examples"
#: Packages that the examples import for their data and their training.
_UNUSED = ("gym", "sklearn", "tensorboardX", "torchaudio", "torchvision")


class _Absent(types.ModuleType):
    """A package that is not installed: any name can be imported from it, and none used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module of the packages that are not installed."""

    def __init__(self) -> None:
        self._missing = {n for n in _UNUSED if importlib.util.find_spec(n) is None}

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        found = name.partition(".")[0] in self._missing
        return ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


@contextmanager
def _stood_in() -> Iterator[None]:
    """While an example is imported; torch asks later which packages there are."""
    finder = _StandIn()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, module in sys.modules.items() if isinstance(module, _Absent)]:
            del sys.modules[name]


def _example(file: str, name: str, *args: Any) -> nn.Module:
    with _stood_in():
        module = importlib.import_module(f"{EXAMPLES}.{file}")
    net: nn.Module = getattr(module, name)(*args)
    return net


def _sequence(name: str) -> nn.Module:
    from spikingjelly.activation_based import functional

    net = _example("rsnn_sequential_fmnist", name)
    functional.set_step_mode(net, "m")
    return net


def _actor() -> nn.Module:
    sizes = (17, 6, 10, 10, [256, 256], (-3, 3), 0.15**0.5, 5)
    return _example("ilc_san.ilc_san", "PopSpikeActor", *sizes, "pop-raw", "fr-mlp", 1.0)


def _frames(n: int) -> torch.Tensor:
    return torch.rand(n, 4, 84, 84)


def _rows(n: int) -> torch.Tensor:
    return torch.rand(28, n, 28)


def _dsqn(decode: str) -> nn.Module:
    return _example("dsqn.utils.model", "DSQN", (4, 84, 84), 6, 5, decode)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "conv_fashion_mnist": (
        lambda: _example("conv_fashion_mnist", "CSNN", 4, 32),
        lambda n: torch.rand(n, 1, 28, 28),
    ),
    "lif_fc_mnist": (
        lambda: zoo.Steps(_example("lif_fc_mnist", "SNN", 2.0), 100),
        lambda n: torch.rand(n, 1, 28, 28),
    ),
    "sequential, plain": (lambda: _sequence("PlainNet"), _rows),
    "sequential, synapses": (lambda: _sequence("StatefulSynapseNet"), _rows),
    "sequential, feedback": (lambda: _sequence("FeedBackNet"), _rows),
    "spiking LSTM": (lambda: _example("spiking_lstm_sequential_mnist", "Net"), _rows),
    "speech commands": (
        lambda: _example("speech_commands", "Net"),
        lambda n: torch.randn(n, 1, 101, 40),
    ),
    "CIFAR10-DVS, VGG": (
        lambda: _example("memopt.models", "CIFAR10DVSVGG"),
        lambda n: (torch.rand(n, 10, 2, 48, 48) < 0.2).float(),
    ),
    "DSQN, max-mem": (lambda: _dsqn("max-mem"), _frames),
    "DSQN, last-mem": (lambda: _dsqn("last-mem"), _frames),
    "DSQN, mean-mem": (lambda: _dsqn("mean-mem"), _frames),
    "DSQN, fr-mlp": (lambda: _dsqn("fr-mlp"), _frames),
    "spiking DQN": (
        lambda: _example("spiking_dqn_state", "DQSN", 4, 256, 2, 16),
        lambda n: torch.randn(n, 4),
    ),
    "ResNet11": (
        lambda: _example("cifar10_r11_enabling_spikebased_backpropagation", "ResNet11"),
        lambda n: torch.rand(n, 3, 32, 32),
    ),
    "ILC-SAN": (_actor, lambda n: torch.randn(n, 17)),
}


def build(name: str) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    """The network in eval mode, and ``n -> a batch of n samples``."""
    torch.manual_seed(0)
    made, batch = NETWORKS[name]
    net = made().eval()
    zoo.calibrate(net, batch(2))
    return net, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NETWORK", help="all unless given")
    parser.add_argument("--target", action="append", choices=zoo.TARGETS, help="may be repeated")
    args = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads"
    print(f"python {platform.python_version()}, torch {torch.__version__}, {threads}, float32")
    print(f"{'network':21} {'target':10} {'nodes':>5} {'s':>6} {'rate':>6}  verdict")
    for name in args.names or NETWORKS:
        net, batch = build(name)
        for target in args.target or zoo.TARGETS:
            row = zoo.convert(net, batch, 2, target)
            print(f"{name:21} {target:10} {row}", flush=True)


if __name__ == "__main__":
    main()
