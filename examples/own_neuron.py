"""A neuron of one's own: an adaptive LIF in ten lines, its kernels, its checks and its speed.

    python examples/own_neuron.py

prints the kernels that are generated from the equation, the largest errors of spikes and gradient
against the torch backend, and on a GPU the speed over T and dtype. Without a GPU the same kernels run
in Triton's interpreter.
"""

from __future__ import annotations

import os
import statistics

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

from torch import nn

from spikeport.converters import neurons
from spikeport.targets import cuda


@neurons.dynamics(states={"w": 0.0, "s": 0.0})
def AdaptiveLIF(v, w, s, x, *, tau, tau_w, a, b):  # noqa: N802 -- a kind, named as in the field
    """A leak, and a current w that follows v and jumps by b at a spike.

    Gerstner et al., Neuronal Dynamics, section 6.1 with a linear f(u), by forward Euler with a step
    of 1; s is the spike of the step before.
    """
    w = w + (a * v - w) / tau_w + b * s
    return v + (x - w - v) / tau, w


def layer(backend: str) -> cuda.Node:
    """A layer of them, with a learned time constant."""
    tau = nn.Parameter(torch.tensor(2.0))
    return cuda.Node(AdaptiveLIF, tau=tau, tau_w=20.0, a=0.1, b=0.2, backend=backend)


def check(x: torch.Tensor, g: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Largest errors of the fused backend on x [T, N] and the gradient g [T, N] of the spikes.

    Beside each stands the largest value: tau's gradient is a sum over all neurons and steps.
    """
    found = []
    for backend in ("torch", "fused"):
        node, leaf = layer(backend).to(x.device), x.clone().requires_grad_()
        spikes = node(leaf)
        found.append((spikes.detach(), *torch.autograd.grad(spikes, (leaf, node.tau), g)))
    return {
        name: ((ours - theirs).abs().max().item(), theirs.abs().max().item())
        for name, theirs, ours in zip(("spikes", "x.grad", "tau.grad"), *found, strict=True)
    }


def milliseconds(node: nn.Module, x: torch.Tensor, g: torch.Tensor) -> float:
    """Median time of a forward and a backward pass on the GPU."""
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.autograd.grad(node(x), x, g)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def main() -> None:
    """Print the kernels, the errors, and the speed."""
    on_gpu = torch.cuda.is_available()
    device, N = ("cuda", 64 * 32**3) if on_gpu else ("cpu", 1000)
    generator = torch.Generator(device).manual_seed(0)

    def random(T: int) -> torch.Tensor:
        return torch.rand(T, N, device=device, generator=generator)

    x, g = 4 * random(8), random(8)
    print(cuda.kernel(layer("fused").to(device), x[:2]).source)  # of two steps, which is short
    for name, (error, largest) in check(x, g).items():
        print(f"max error of {name}: {error:.3g}, of values up to {largest:.3g}")
    for dtype in (torch.float32, torch.float16) if on_gpu else ():
        for T in (2, 4, 8, 16, 32):
            x, g = (4 * random(T)).to(dtype).requires_grad_(), random(T).to(dtype)
            torch_ms, fused_ms = (
                milliseconds(layer(backend).to(device), x, g) for backend in ("torch", "fused")
            )
            print(
                f"{dtype}, T = {T:2}: torch {torch_ms:.2f} ms, fused {fused_ms:.2f} ms, "
                f"{torch_ms / fused_ms:.1f} x"
            )


if __name__ == "__main__":
    main()
