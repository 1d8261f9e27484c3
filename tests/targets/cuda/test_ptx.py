"""What the interpreter does not see: the kernels go through Triton's compiler, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHILD = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spikeport.targets.cuda import LIFNode, kernels
from spikeport.targets.cuda.codegen import (
    NORM, Backward, Forward, Spec, backward_source, forward_source,
)

node = LIFNode(tau=3.0)
CHANNELS = tuple((name, "channel") for name in NORM)
CASES = [  # T, what the spec says besides, block sizes
    (4, {"masked": False}, 1024),
    (37, {}, 512),
    (32, {"counted": False}, 512),
    (20, {"reads": CHANNELS, "tile": "rows", "normalised": True}, (8, 64)),
    (4, {"reads": CHANNELS, "tile": "planes", "normalised": True, "window": (2, 2)}, (4, 64)),
]

def built(source, name, T, block):
    kernel = kernels.compiled(source, name)
    signature, sizes = {}, {}
    for i, (argument, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        if parameter.is_constexpr:
            sizes[(i,)] = T // kernels.chunk(T) if argument == "chunks" else block[argument]
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            half = argument in ("x_ptr", "spikes_ptr", "g_spikes_ptr", "g_x_ptr")
            signature[argument] = "*fp16" if half else "*fp32"
        else:
            signature[argument] = "i32"
    made = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compile(made, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for T, told, block in CASES:
    blocks = {"BLOCK": block} if isinstance(block, int) else dict(zip(("BLOCK_R", "BLOCK_C"), block))
    steps = kernels.chunk(T)
    loop = steps < T
    spec = Spec(**{
        "neuron": node._declaration, "reads": (), "surrogate": node.surrogate.to_json(),
        "detach_reset": False, "steps": steps, "loop": loop,
        "tail": T % steps if loop else 0, **told,
    })
    into_x = "norm" if spec.normalised else "x"
    wrt = ("norm_scale", "norm_shift") if spec.normalised else ()
    ahead = forward_source(spec, Forward(initial=spec.masked, checkpoints=loop))
    back = backward_source(spec, Backward(initial=spec.masked, into_x=into_x, wrt=wrt))
    assert "st.global" in built(ahead, "forward", T, blocks)
    ptx = built(back, "backward", T, blocks)
    assert "rcp.approx.ftz.f32" in ptx and "fma.rn.f32" in ptx and "div.full" not in ptx
"""


def test_kernels_compile_for_a_gpu() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
