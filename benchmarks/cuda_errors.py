"""The fused kernels' spikes and gradients against torch's, for every declared neuron and surrogate.

    python benchmarks/cuda_errors.py

Each neuron with ATan, each surrogate with IF and LIF; hard and soft resets, with and without
``detach_reset``, float32, x [8, 2^18] normal. Errors are the largest difference over the largest
gradient, of those neurons whose spikes agree. Asked are 1e-6 of torch in float32, or, where rounding is
blown up by the dynamics themselves, to be as near as torch is to the same equations in float64. Torch
runs on the CPU: on a GPU it divides by a number as a product with its inverse, which changes spikes.
Exit code 1 if something asked is not met. Needs a GPU, or TRITON_INTERPRET=1 and patience.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any, NamedTuple

import torch

from spikeport.converters import neurons, surrogates
from spikeport.targets import cuda

T, N = 8, 2**18
ASKED = 1e-6

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "IF": (neurons.IF, {}),
    "LIF": (neurons.LIF, {"tau": 3.0, "v_rest": 0.0}),
    "LIF, decay_input=False": (neurons.LIF, {"tau": 3.0, "v_rest": 0.1, "decay_input": False}),
    "ParametricLIF": (neurons.ParametricLIF, {"w": -0.7, "v_rest": 0.0}),
    "Leaky": (neurons.Leaky, {"beta": 0.9}),
    "Lapicque": (neurons.Lapicque, {"R": 2.0, "C": 3.0, "dt": 1.0}),
    "Synaptic": (neurons.Synaptic, {"alpha": 0.8, "beta": 0.6}),
    "RLeaky": (neurons.RLeaky, {"beta": 0.8, "V": 0.5}),
    "RSynaptic": (neurons.RSynaptic, {"alpha": 0.7, "beta": 0.6, "V": -0.5}),
    "Alpha": (neurons.Alpha, {"alpha": 0.8, "beta": 0.6, "tau": 3.0}),
    "CubaLIF": (neurons.CubaLIF, {"tau_syn": 2.0, "tau_mem": 5.0, "r": 1.5, "v_rest": 0.1}),
    "QIF": (neurons.QIF, {"tau": 2.0, "v_rest": 0.0, "v_c": 0.8, "a_0": 1.0}),
    "EIF": (neurons.EIF, {"tau": 2.0, "v_rest": 0.0, "theta_rh": 0.8, "delta_T": 1.0}),
    "Izhikevich": (
        neurons.Izhikevich,
        {
            "tau": 2.0,
            "v_rest": 0.0,
            "v_c": 0.8,
            "a_0": 1.0,
            "w_rest": 0.0,
            "tau_w": 5.0,
            "a": 0.3,
            "b": 0.2,
        },
    ),
    "KLIF": (neurons.KLIF, {"k": 1.2, "tau": 2.0, "v_rest": 0.0}),
    "CLIF": (neurons.CLIF, {"tau": 2.0, "jump": 1.0}),
    "RAF": (neurons.RAF, {"decay": 0.9, "cos": 0.8, "sin": 0.6}),
    "LIAF": (neurons.LIAF, {"tau": 2.0, "v_rest": 0.0}),
}


class Run(NamedTuple):
    """One call's spikes and gradient of x, [T, N] each."""

    spikes: torch.Tensor
    gradient: torch.Tensor


def run(kind: str, backend: Any, dtype: torch.dtype, options: dict[str, Any]) -> Run:
    """One call of a layer on the same drive, whatever the dtype."""
    charge, params = KINDS[kind]
    device = "cuda" if backend == "fused" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(T, N, generator=generator)
    g = torch.rand(T, N, generator=generator).to(device, dtype)
    leaf = x.to(device, dtype).requires_grad_()
    spikes = cuda.Node(charge, **params, **options, backend=backend)(leaf)
    (gradient,) = torch.autograd.grad(spikes, leaf, g)
    return Run(spikes.detach().cpu(), gradient.double().cpu())


class Errors(NamedTuple):
    """Of one configuration: spikes that differ, and how far gradients are apart."""

    spikes: int
    from_torch: float
    from_float64: float
    torchs: float

    @property
    def excess(self) -> float:
        """What is asked is 1 at most."""
        return min(self.from_torch / ASKED, self.from_float64 / max(self.torchs, ASKED))


def errors(kind: str, options: dict[str, Any]) -> Errors:
    """Of one layer."""
    fused = run(kind, "fused", torch.float32, options)
    ours, exact = (run(kind, "torch", d, options) for d in (torch.float32, torch.float64))
    same = (fused.spikes == ours.spikes).all(0) & (ours.spikes == exact.spikes).all(0)
    same &= (ours.gradient.isfinite() & exact.gradient.isfinite()).all(0)
    largest = exact.gradient[:, same].abs().max()

    def apart(a: Run, b: Run) -> float:
        return ((a.gradient - b.gradient)[:, same].abs().max() / largest).item()

    differ = int((fused.spikes != ours.spikes).sum())
    return Errors(differ, apart(fused, ours), apart(fused, exact), apart(ours, exact))


def main() -> int:
    """Print the table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreted on the CPU"
    print(f"device {device}, torch {torch.__version__}")
    print(f"float32, {T} steps of {N} neurons, the worst of hard and soft reset, detached and not")
    print(f"{'':32} {'spikes':>8} {'error of the gradient':>32}")
    print(f"{'':32} {'differ':>8} {'from torch':>10} {'from float64':>12} {'torch, so':>10}")
    failed = 0
    pairs = [(kind, "ATan") for kind in KINDS]
    pairs += [(kind, s) for kind in ("IF", "LIF") for s in surrogates.KINDS if s != "ATan"]
    for kind, surrogate in pairs:
        found = [
            errors(
                kind, {"v_reset": r, "detach_reset": d, "surrogate": surrogates.named(surrogate)()}
            )
            for r, d in itertools.product((0.0, None), (False, True))
        ]
        worst = max(found, key=lambda e: e.excess)
        numbers = " ".join(f"{e:10.2g}" for e in worst[1:])
        failed += worst.excess > 1
        verdict = "ok" if worst.excess <= 1 else "NOT MET"
        spikes = sum(e.spikes for e in found)
        print(f"{kind + ', ' + surrogate:32} {spikes:8} {numbers}  {verdict}", flush=True)
    print(f"{failed} not met" if failed else "all met")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
