"""SpikingJelly 2.0's model zoo, every builder, converted for several targets and held against itself.

    python benchmarks/zoo.py                              every builder; prints the table
    python benchmarks/zoo.py sew_resnet18 spikformer_ti   these alone
    python benchmarks/zoo.py --rewrite                    rewritten and checked for each target, not run
    python benchmarks/zoo.py --keep-rounding              each with the network's own rounding kept
    python benchmarks/zoo.py --exact                      each with numbers whose sums have one value
    python benchmarks/zoo.py --target source              each against itself in torch, oneDNN off
    python benchmarks/zoo.py --jobs 8                     in as many processes, lines as they come

Float32. Each network is converted, which verifies it layer by layer (s: seconds, nodes: operators of
the result), compiled, loaded, and compared with the source layer by layer on another batch than the
one it was converted with. "equal": no spike differs there. "rounding flips spikes": some do, and where
they part first the membrane lies at the threshold within the rounding of that layer; such a network is
converted once more, with keep_rounding, and the verdict says what comes of that. There "equal bit for
bit" is equal in every spike and in every bit of the outputs. "rate" is the mean firing rate over layers,
so that a silent network shows. lynxi-sim stores in float32 here.

What rounding explains might still hide a fault. With --exact it cannot: weights, norms, thresholds and
samples are multiples of powers of two, few bits long, so that float32 rounds no sum and no norm, in
whatever order, folded or not. What differs there is no rounding, unless the network has a sigmoid, a mean
over another number than a power of two or standardised weights.

How much rounding decides is seen with --target source: no conversion, the same network on the same
samples, its convolutions and products by oneDNN and by torch's other library.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import multiprocessing
import platform
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from spikeport import deploy
from spikeport import targets as registry
from spikeport.converters.capture import capture
from spikeport.deploy.pipeline import rewrite_for
from spikeport.targets.lynxi.simulator import options

TARGETS = ("reference", "onnx", "lynxi-sim", "ipu-sim")
#: No target: the network itself.
SOURCE = "source"
#: Samples that a network is held against itself on.
_ALONE = 8
#: Whole architectures on small images: what a convolution computes does not depend on its image's size.
_IMAGE, _TOKENS, _CIFAR = (3, 32, 32), (3, 64, 64), (3, 32, 32)


@dataclass(frozen=True)
class Builder:
    """How one network of the zoo is built.

    Attributes:
        file: Its module in ``spikingjelly.activation_based.model``.
        image: Shape of one sample, [C, H, W].
        T: Time steps.
        options: Arguments of the builder.
        feed: What the network takes: ``"image"`` [N, C, H, W], ``"repeated"`` [T, N, C, H, W] made of
            an image inside the graph, ``"events"`` [T, N, C, H, W] itself, ``"steps"``, an image at
            each of T calls, its outputs averaged, or ``"first"``, an image, for the first of its
            results.
        neuron: Class of the neurons, or ``""`` for the builder's own.
    """

    file: str
    image: tuple[int, int, int] = _IMAGE
    T: int = 4
    options: tuple[tuple[str, Any], ...] = ()
    feed: str = "repeated"
    neuron: str = "IFNode"


def _family(file: str, names: str, **rest: Any) -> dict[str, Builder]:
    return {name: Builder(file, **rest) for name in names.split()}


def _plif(names: str, **rest: Any) -> dict[str, Builder]:
    return _family("parametric_lif_net", names, neuron="ParametricLIFNode", **rest)


_RESNETS = "18 34 50 101 152"
_WIDE = "resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2"
_VGGS = "11 13 16 19"

# What the two searched architectures are given in their papers' code.
_SNAS = (
    ("args", types.SimpleNamespace(dataset="cifar10", timestep=4, second_avgpooling=2, tau=4 / 3)),
    ("con_mat", torch.tensor([[0, 2, 3, 4], [0, 0, 1, 3], [0, 0, 0, 2], [0, 0, 0, 0]])),
)
vars(_SNAS[0][1]).update(celltype="forward", threshold=1.0)
_DHS = (
    (
        "args",
        types.SimpleNamespace(
            fea_step=3, fea_num_layers=8, fea_block_multiplier=3, fea_filter_multiplier=48
        ),
    ),
)

ZOO: dict[str, Builder] = {
    **_plif("MNISTNet FashionMNISTNet", image=(1, 28, 28)),
    **_plif("NMNISTNet", image=(2, 34, 34), feed="events"),
    **_plif("CIFAR10Net", image=_CIFAR),
    **_plif("CIFAR10DVSNet DVSGestureNet", image=(2, 128, 128), feed="events"),
    **_family("spiking_resnet", " ".join(f"spiking_resnet{n}" for n in _RESNETS.split())),
    **_family("spiking_resnet", " ".join(f"spiking_{n}" for n in _WIDE.split())),
    **_family(
        "sew_resnet",
        " ".join(
            [f"sew_resnet{n}" for n in _RESNETS.split()] + [f"sew_{n}" for n in _WIDE.split()]
        ),
        options=(("cnf", "ADD"),),
    ),
    **_family("spiking_vgg", " ".join(f"spiking_vgg{n} spiking_vgg{n}_bn" for n in _VGGS.split())),
    **_family(
        "spiking_vggws_ottt",
        " ".join(
            ["ottt_spiking_vggws"]
            + [f"ottt_spiking_vgg{n} ottt_spiking_vgg{n}_ws" for n in _VGGS.split()]
        ),
        image=_CIFAR,
        feed="steps",
        neuron="",
    ),
    **_family("ms_resnet", "ms_resnet18 ms_resnet34", feed="image", neuron=""),
    **_family("ms_resnet", "max_resnet18", image=_CIFAR, feed="image", neuron=""),
    **_family("masnn", "masnn_dvs128_gesture", image=(2, 32, 32), T=60, feed="events", neuron=""),
    **_family("masnn", "att_ms_resnet18", feed="image", neuron=""),
    **_family("spikformer", "spikformer_ti spikformer_s", image=_TOKENS, feed="image", neuron=""),
    **_family("spikformer", "spikformer_cifar10", image=_CIFAR, feed="image", neuron=""),
    **_family("qkformer", "qkformer_10_384", image=_TOKENS, feed="image", neuron=""),
    **_family("maxformer", "maxformer_10_384", image=_TOKENS, feed="image", neuron=""),
    **_family("maxformer", "maxformer_cifar", image=_CIFAR, feed="image", neuron=""),
    **_family("spike_driven_transformer", "sdt_8_384", image=_TOKENS, feed="image", neuron=""),
    **_family("snas_net", "SNASNet", image=_CIFAR, feed="image", neuron="", options=_SNAS),
    **_family("spike_dhs", "SpikeDHS", image=_CIFAR, T=6, feed="first", neuron="", options=_DHS),
}


class _Repeated(nn.Module):
    """An image [N, C, H, W] at each of T steps of a multi-step network; outputs averaged."""

    def __init__(self, net: nn.Module, T: int) -> None:
        super().__init__()
        self.net, self.T = net, T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x.unsqueeze(0).expand(self.T, *x.shape)).mean(0)
        return y


class _First(nn.Module):
    """The first of a network's results; the other is None in eval mode."""

    def __init__(self, net: nn.Module, T: int) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x)[0]
        return y


class Steps(nn.Module):
    """An image [N, C, H, W] at each of T calls of a single-step network; outputs averaged."""

    def __init__(self, net: nn.Module, T: int) -> None:
        super().__init__()
        self.net, self.T = net, T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.net(x) for _ in range(self.T)]).mean(0)


def stub_torchvision() -> None:
    """Stand in for torchvision, of which the zoo asks for a downloader that is never called here."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision._internally_replaced_utils"):
            sys.modules.setdefault(name, types.ModuleType(name))
        downloads: Any = sys.modules["torchvision._internally_replaced_utils"]
        downloads.load_state_dict_from_url = None


def build(name: str, exact: bool = False) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    """The network in eval mode, its batch norms calibrated, and ``n -> a batch of n samples``.

    ``exact``: with numbers of which float32 rounds no sum.
    """
    from spikingjelly.activation_based import functional, neuron

    stub_torchvision()
    made = ZOO[name]
    torch.manual_seed(0)
    module = importlib.import_module(f"spikingjelly.activation_based.model.{made.file}")
    options = dict(made.options)
    if made.neuron:
        options["spiking_neuron"] = getattr(neuron, made.neuron)
    builder = getattr(module, name)
    net: nn.Module = builder(**options)
    functional.set_step_mode(net, "s" if made.feed == "steps" or name == "SNASNet" else "m")
    wrappers = {"repeated": _Repeated, "steps": Steps, "first": _First}
    if made.feed in wrappers:
        net = wrappers[made.feed](net, made.T)

    def batch(n: int) -> torch.Tensor:
        if made.feed == "events":
            return (torch.rand(made.T, n, *made.image) < 0.1).float()
        x = torch.randn(n, *made.image)
        return _short(x, 1 / 16) if exact else x

    net.eval()
    calibrate(net, batch(2))
    if exact:
        _make_exact(net)
    return net, batch


def calibrate(net: nn.Module, x: torch.Tensor) -> None:
    """Let an untrained network fire as a trained one does.

    Batch norms take the statistics of a batch, and each neuron a threshold within its input's reach.
    """
    from spikingjelly.activation_based import functional, neuron

    seen = set[nn.Module]()

    def reach(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if layer not in seen and (spread := args[0].std().item()) > 0:
            layer.v_threshold = round(spread / 2, 3)
            seen.add(layer)

    hooks = []
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 1.0
        elif isinstance(module, neuron.BaseNode):
            hooks.append(module.register_forward_pre_hook(reach))
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    functional.reset_net(net)
    net.eval()


def _make_exact(net: nn.Module) -> None:
    """Let no sum and no norm round: weights of 8 bits, norms that multiply by powers of two."""
    from spikingjelly.activation_based import neuron

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                deviation = (module.running_var + module.eps).sqrt()
                module.eps = (
                    1e-30  # vanishes beside any variance here; torch asks for more than zero
                )
                module.running_var.copy_(_power_of_two(deviation).square())
                module.running_mean.copy_(_short(module.running_mean, 2**-8))
                if module.affine:
                    module.weight.copy_(module.weight.sign() * _power_of_two(module.weight.abs()))
                    module.bias.copy_(_short(module.bias, 2**-8))
            elif isinstance(module, neuron.BaseNode):
                module.v_threshold = 2.0 ** round(math.log2(module.v_threshold))
            elif isinstance(getattr(module, "weight", None), nn.Parameter):
                largest = _power_of_two(module.weight.abs().max())
                module.weight.copy_(_short(module.weight, largest / 128))
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(_short(module.bias, 2**-8))


def _short(x: torch.Tensor, unit: float | torch.Tensor) -> torch.Tensor:
    """The nearest multiples of a power of two."""
    return (x / unit).round() * unit


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The nearest by its logarithm; of zero, zero."""
    return torch.where(x > 0, torch.exp2(x.log2().round()), 0.0)


@dataclass(frozen=True)
class Row:
    """What came of one network on one target."""

    nodes: int = 0
    seconds: float = 0.0
    rate: float | None = None
    verdict: str = ""

    def __str__(self) -> str:
        rate = "-" if self.rate is None else f"{self.rate:.3f}"
        return f"{self.nodes:5} {self.seconds:6.1f} {rate:>6}  {self.verdict}"


def compared(
    net: nn.Module, program: Any, x: torch.Tensor, n: int
) -> tuple[Any, dict[str, Any], Any]:
    """Compile, load, run x of n samples: outputs, spikes by layer, and the comparison with the network."""
    labels = torch.zeros(n, dtype=torch.long)
    with tempfile.TemporaryDirectory() as folder, options(storage="float32"):
        deploy.compile(program, f"{folder}/artifact", cache=False, probe=True)
        with deploy.load(f"{folder}/artifact") as model:
            outputs, spikes = model.probe(x)
            report = deploy.compare(net, model, [(x, labels)], layers=n)
    return outputs, spikes, report


def convert(
    net: nn.Module,
    batch: Callable[[int], torch.Tensor],
    n: int,
    target: str,
    keep_rounding: bool = False,
) -> Row:
    """Convert, which verifies layer by layer; compile, load, and compare on another batch.

    Where rounding flips spikes, once more with ``keep_rounding``.
    """
    example, x = batch(n), batch(n)
    row = _row(net, example, x, n, target, keep_rounding)
    if keep_rounding or not row.verdict.startswith("rounding"):
        return row
    kept = _row(net, example, x, n, target, keep_rounding=True)
    return replace(row, verdict=f"{row.verdict}; with keep_rounding {kept.verdict}")


def _row(
    net: nn.Module, example: torch.Tensor, x: torch.Tensor, n: int, target: str, keep_rounding: bool
) -> Row:
    start = time.perf_counter()
    try:
        program = deploy.convert(
            net, (example,), target, dtype="float32", keep_rounding=keep_rounding
        )
    except (deploy.FindingsError, deploy.UsageError, deploy.MismatchError) as error:
        reasons = getattr(error, "findings", None) or [error]
        return Row(verdict=f"REFUSED ({len(reasons)}): {reasons[0]}")
    seconds = time.perf_counter() - start
    nodes = sum(1 for _ in program.nodes("call_function"))
    try:
        outputs, spikes, report = compared(net, program, x, n)
    except deploy.CompileError as error:
        return Row(nodes, seconds, verdict=f"REFUSED by the compiler: {error}")
    rate = sum(s.mean().item() for s in spikes.values()) / len(spikes) if spikes else None
    differing = sum(sum(layer.differing) > 0 for layer in report.layers)
    verdict = "equal" if not differing else f"rounding flips spikes in {differing} layers"
    if not report.explained:
        verdict = f"DIFFERS: {report.divergence}"
    elif keep_rounding and not differing and _same(net, x, outputs):
        verdict = "equal bit for bit"
    return Row(nodes, seconds, rate, verdict)


def _same(net: nn.Module, x: torch.Tensor, outputs: Any) -> bool:
    """Whether outputs are those of the network in every bit."""
    from spikingjelly.activation_based import functional

    functional.reset_net(net)
    with torch.no_grad():
        expected = net(x)
    functional.reset_net(net)
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def itself(net: nn.Module, batch: Callable[[int], torch.Tensor]) -> Row:
    """The network against itself, with oneDNN and without, on samples one by one."""
    start = time.perf_counter()
    pairs = [[_fired(net, x, onednn) for onednn in (True, False)] for x in map(batch, [1] * _ALONE)]
    flipped = sum(not all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs)
    rates = [layer.mean().item() for layer in pairs[0][0]]
    verdict = f"rounding flips spikes of {flipped} of {_ALONE} samples" if flipped else "equal"
    return Row(0, time.perf_counter() - start, sum(rates) / len(rates), verdict)


def _fired(net: nn.Module, x: torch.Tensor, onednn: bool) -> list[torch.Tensor]:
    """What the neuron layers give in one call."""
    from spikingjelly.activation_based import functional, neuron

    fired: list[torch.Tensor] = []
    hooks = [
        m.register_forward_hook(lambda m, x, y: fired.append(y))
        for m in net.modules()
        if isinstance(m, neuron.BaseNode)
    ]
    functional.reset_net(net)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
        net(x)
    for hook in hooks:
        hook.remove()
    return fired


def rewrite(net: nn.Module, x: torch.Tensor, targets: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Rewrite for each target and check its rules; nothing is run."""
    start = time.perf_counter()
    try:
        captured = capture(net, (x,))
    except deploy.FindingsError as error:
        yield from ((target, Row(verdict=f"REFUSED: {error.findings[0]}")) for target in targets)
        return
    capturing = time.perf_counter() - start
    for target in targets:
        start = time.perf_counter()
        program = rewrite_for(captured, target, torch.float32, "unrolled")
        seconds = capturing + time.perf_counter() - start
        found = registry.check(program, registry.get(target)).errors
        verdict = f"REFUSED ({len(found)}): {found[0]}" if found else "converts"
        calls = list(program.nodes("call_function"))
        ranks = [value.dim() for n in calls if hasattr(value := n.meta["val"], "dim")]
        yield target, Row(len(calls), seconds, verdict=f"{verdict}, rank {max(ranks)}")


def rows(
    name: str, targets: Sequence[str], rewriting: bool, keep_rounding: bool, exact: bool
) -> list[str]:
    """The table's lines of one network."""
    net, batch = build(name, exact)
    found: Iterator[tuple[str, Row]]
    if rewriting:
        found = rewrite(net, batch(1), targets)
    else:
        found = (
            (t, itself(net, batch) if t == SOURCE else convert(net, batch, 1, t, keep_rounding))
            for t in targets
        )
    return [f"{name:27} {target:10} {row}" for target, row in found]


def apart(task: tuple[str, tuple[str, ...], bool, bool, bool]) -> list[str]:
    """:func:`rows` in a process of its own; what stops it is a line as well."""
    torch.set_num_threads(1)
    name, targets, *_ = task
    try:
        return rows(*task)
    except Exception as error:
        said = f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
        return [f"{name:27} {target:10} {Row(verdict=said)}" for target in targets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="BUILDER", help="all unless given")
    parser.add_argument(
        "--target", action="append", choices=(*TARGETS, "cuda", SOURCE), help="may be repeated"
    )
    parser.add_argument("--rewrite", action="store_true", help="rewrite and check, do not run")
    parser.add_argument("--keep-rounding", action="store_true", help="convert all with it")
    parser.add_argument("--exact", action="store_true", help="with numbers whose sums do not round")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes, a thread each")
    args = parser.parse_args()
    names, targets = args.names or [*ZOO], tuple(args.target or TARGETS)
    threads = f"{args.jobs} processes" if args.jobs else f"{torch.get_num_threads()} threads"
    print(f"python {platform.python_version()}, torch {torch.__version__}, {threads}, float32")
    print(f"{'builder':27} {'target':10} {'nodes':>5} {'s':>6} {'rate':>6}  verdict")
    how = args.rewrite, args.keep_rounding, args.exact
    if not args.jobs:
        for name in names:
            print(*rows(name, targets, *how), sep="\n", flush=True)
        return
    groups = [targets] if args.rewrite else [(target,) for target in targets]
    tasks = [(name, group, *how) for name, group in itertools.product(names, groups)]
    # A new process for each: networks of hundreds of megabytes leave their memory behind.
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for lines in pool.imap_unordered(apart, tasks):
            print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
