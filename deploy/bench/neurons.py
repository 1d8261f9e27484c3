"""One layer of neurons: the forward patterns beside other frameworks and the memory's bandwidth."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from ...converters.errors import DeviceError, UsageError
from ...targets.cuda import FusedNode
from ...targets.cuda.kernels import interpreted
from . import contestants
from .contestants import NODES, Contestant
from .timing import FORWARD_BACKWARD_WORDS, FORWARD_WORDS, Timer, roofline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Compiling takes minutes above.
_COMPILED_UP_TO = 16
_GPU_NEURONS, _CPU_NEURONS = 2**20, 2**12


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        device: Such as cuda, cuda:1 or cpu; unless given, a GPU if there is one.
        neurons: N; 2^20 on a GPU and 2^12 on a CPU unless given.
        T: Time steps.
        dtypes: Names of dtypes.
        quick: Whether to take few repeats.
    """

    device: str | None = None
    neurons: int | None = None
    T: tuple[int, ...] = (8, 16, 32, 64, 128)
    dtypes: tuple[str, ...] = ("float32", "float16")
    quick: bool = False

    def resolve(self) -> tuple[torch.device, int]:
        """Device and N.

        Raises:
            UsageError: A value cannot be used; the error names all of them.
            DeviceError: There is no such device.
        """
        problems = [
            f"--dtype {d}; allowed: {', '.join(DTYPES)}" for d in self.dtypes if d not in DTYPES
        ]
        problems += [f"--T {t}; allowed: 1 or more" for t in self.T if t < 1]
        if self.neurons is not None and self.neurons < 1:
            problems.append(f"--neurons {self.neurons}; allowed: 1 or more")
        has_gpu = torch.cuda.is_available()
        try:
            device = torch.device(self.device or ("cuda" if has_gpu else "cpu"))
        except RuntimeError:
            problems.append(f"--device {self.device}; allowed: cpu, cuda, cuda:1, ...")
        if problems:
            raise UsageError("; ".join(problems))
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {device}; allowed: cpu, cuda, cuda:1, ...")
        if device.type == "cuda":
            count = torch.cuda.device_count() if has_gpu else 0
            if (device.index or 0) >= count:
                raise DeviceError(f"--device {device}: torch sees {count} CUDA device(s) here")
            device = torch.device(
                "cuda", torch.cuda.current_device() if device.index is None else device.index
            )
        default = _GPU_NEURONS if device.type == "cuda" else _CPU_NEURONS
        return device, default if self.neurons is None else self.neurons


@dataclass(frozen=True)
class Errors:
    """How far a contestant is from this project's torch backend in float32, on the same x.

    Attributes:
        spikes: How many spikes there are to compare, T x N.
        differing: How many of them differ.
        distance: The largest |h - v_threshold| where a neuron's spikes differ for the first time, h being
            the reference's; after that the potentials differ by a reset.
        gradient: The largest error of the gradient of x, over its largest value.
    """

    spikes: int
    differing: int
    distance: float
    gradient: float


@dataclass(frozen=True)
class Entry:
    """One contestant in one cell; times in ms. What could not be measured is None.

    Attributes:
        name: The contestant.
        forward: Time of a forward pass.
        forward_backward: Time of a forward and a backward pass.
        forward_fraction: Of the roofline of two words an element.
        forward_backward_fraction: Of the roofline of five words an element.
        errors: Its errors.
        first_s: Time in s of the first call of both passes, which compiles what is not cached.
        failure: Why there are no times.
    """

    name: str
    forward: float | None = None
    forward_backward: float | None = None
    forward_fraction: float | None = None
    forward_backward_fraction: float | None = None
    errors: Errors | None = None
    first_s: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Cell:
    """All contestants on one neuron, dtype and T.

    Attributes:
        neuron: ``"IF"`` or ``"LIF"``.
        dtype: Of x and the spikes.
        T: Time steps.
        N: Neurons.
        copy: Time in ms of a copy of x within the device; None on a CPU.
        entries: The contestants.
    """

    neuron: str
    dtype: str
    T: int
    N: int
    copy: float | None
    entries: tuple[Entry, ...]

    def entry(self, name: str) -> Entry | None:
        """The contestant of this name, or the first whose name starts so."""
        return next((e for e in self.entries if e.name.startswith(name)), None)


@dataclass(frozen=True)
class Results:
    """What :func:`run` measured.

    Attributes:
        machine: Device and versions.
        cells: The measurements.
        left_out: What was not measured, and why.
    """

    machine: dict[str, str]
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def machine(device: torch.device) -> dict[str, str]:
    """Device and versions; "not installed" where there is none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__} | {
        package: _version(package) for package in ("triton", "spikingjelly")
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def run(options: Options, progress: Callable[[str], None] = lambda _: None) -> Results:
    """Measure every cell; ``progress`` hears of each before it begins. An interrupt keeps what there is.

    Raises:
        UsageError: An option cannot be used.
        DeviceError: There is no such device, or it has not the memory.
    """
    device, N = options.resolve()
    on_gpu = device.type == "cuda"
    timer = Timer(device, 0.05, (3, 10)) if options.quick else Timer(device, 0.2)
    fused = on_gpu or interpreted()
    left_out = []
    if not on_gpu:
        left_out.append(f"the roofline and {contestants.COMPILED}: they are measured on a GPU")
    if not fused:
        left_out.append("the fused patterns: they run on a GPU")
    if on_gpu and max(options.T) > _COMPILED_UP_TO:
        left_out.append(f"{contestants.COMPILED} above T = {_COMPILED_UP_TO}: it unrolls the loop")
    cells: list[Cell] = []
    try:
        for kind, name in itertools.product(NODES, options.dtypes):
            others, reason = _others(kind, DTYPES[name], device)
            if reason and reason not in left_out:
                left_out.append(reason)
            for T in options.T:
                progress(f"{kind}, {name}, T = {T}, N = {N}")
                competitors = [*contestants.patterns(kind, fused), *others]
                if on_gpu and T <= _COMPILED_UP_TO:
                    competitors.append(contestants.compiled(kind))
                cells.append(measure(kind, name, T, N, competitors, timer))
    except KeyboardInterrupt:
        if not cells:
            raise
        last = cells[-1]
        left_out.append(f"all after {last.neuron}, {last.dtype}, T = {last.T}: it was interrupted")
    return Results(machine(device), tuple(cells), tuple(left_out))


def _others(
    kind: str, dtype: torch.dtype, device: torch.device
) -> tuple[list[Contestant], str | None]:
    """SpikingJelly's contestants, or why there are none."""
    try:
        return [*contestants.spikingjelly(kind, dtype, device)], None
    except ImportError as error:
        return [], f"{contestants.SPIKINGJELLY} 2.0: not installed ({error})"


def measure(
    kind: str, dtype: str, T: int, N: int, competitors: Sequence[Contestant], timer: Timer
) -> Cell:
    """One cell: x uniform in [0, 2), so that IF and LIF both fire, and a dense random gradient.

    Raises:
        DeviceError: The device has not the memory for one of ours.
    """
    generator = torch.Generator(timer.device).manual_seed(T)
    try:
        x, g = (
            torch.rand(T, N, device=timer.device, generator=generator).to(DTYPES[dtype])
            for _ in range(2)
        )
        x, g = 2 * x, 2 * g - 1
        copy = timer.copy(x) if timer.device.type == "cuda" else None
        reference = Reference.of(kind, x, g)
        entries = tuple(_entry(c, x, g, copy, reference, timer) for c in competitors)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{kind} of T = {T}, N = {N} in {dtype} does not fit into the memory of {timer.device}; take "
            "fewer --neurons or a smaller --T"
        ) from error
    return Cell(kind, dtype, T, N, copy, entries)


def _entry(
    c: Contestant,
    x: torch.Tensor,
    g: torch.Tensor,
    copy: float | None,
    reference: Reference,
    timer: Timer,
) -> Entry:
    leaf = x.detach().requires_grad_()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return c.run(x)

    def forward_backward() -> tuple[torch.Tensor, torch.Tensor]:
        spikes = c.run(leaf)
        return spikes, torch.autograd.grad(spikes, leaf, g)[0]

    try:
        start = time.perf_counter()
        forward()
        errors = reference.errors(*forward_backward())
        if timer.device.type == "cuda":
            torch.cuda.synchronize(timer.device)
        first_s = time.perf_counter() - start
        one, both = timer.milliseconds(forward), timer.milliseconds(forward_backward)
    except Exception as error:
        if c.ours:
            raise
        return Entry(c.name, failure=f"{type(error).__name__}: {error}".splitlines()[0])
    return Entry(
        c.name,
        one,
        both,
        None if copy is None else roofline(copy, FORWARD_WORDS) / one,
        None if copy is None else roofline(copy, FORWARD_BACKWARD_WORDS) / both,
        errors,
        first_s,
    )


@dataclass(frozen=True)
class Reference:
    """The float32 torch backend on one x and one gradient.

    Attributes:
        spikes: [T, N].
        distance: |h - v_threshold|, [T, N].
        gradient: Of x, [T, N].
    """

    spikes: torch.Tensor
    distance: torch.Tensor
    gradient: torch.Tensor

    @classmethod
    def of(cls, kind: str, x: torch.Tensor, g: torch.Tensor) -> Reference:
        """The reference for a neuron of :data:`NODES`."""
        return cls.of_node(NODES[kind](backend="torch"), x, g)

    @classmethod
    def of_node(cls, node: FusedNode, x: torch.Tensor, g: torch.Tensor) -> Reference:
        """The reference for a layer whose backend is torch."""
        leaf = x.detach().float().requires_grad_()
        spikes = node(leaf)
        (gradient,) = torch.autograd.grad(spikes, leaf, g.float())
        with torch.no_grad():
            _, h, _ = node.neuron.trace(leaf.detach())
            distance = (h - node.neuron.v_threshold).abs_()
        return cls(spikes.detach(), distance, gradient)

    def errors(self, spikes: torch.Tensor, gradient: torch.Tensor) -> Errors:
        """Of spikes [T, N] and the gradient of x [T, N]."""
        differs = spikes.detach().float() != self.spikes
        first = differs & (differs.cumsum(0) == 1)
        count = int(differs.sum())
        distance = self.distance[first].max().item() if count else 0.0
        error = (gradient.float() - self.gradient).abs().max() / self.gradient.abs().max()
        return Errors(spikes.numel(), count, distance, error.item())


def cells_by(results: Results) -> Iterator[tuple[str, str, list[Cell]]]:
    """(neuron, dtype, the cells in order of T) for each table."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in results.cells:
        found.setdefault((cell.neuron, cell.dtype), []).append(cell)
    for (neuron, dtype), cells in found.items():
        yield neuron, dtype, cells
