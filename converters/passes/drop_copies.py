"""Drop copies that capture keeps, since a library may round otherwise for another order in memory.

Where values lie in memory is each target's own; what its rounding differs by is verified.
"""

from __future__ import annotations

from dataclasses import replace

from ..builder import Builder
from ..ops import Node, aten
from ..program import PassReport, Program, where


def drop_copies(program: Program) -> Program:
    """Use what a copy was made of in its place."""
    if not any(n.target is aten.clone.default for n in program.walk()):
        return replace(program, history=(*program.history, PassReport("drop_copies")))
    build, env = Builder(program), dict[Node, Node]()
    done: dict[str, None] = {}
    for n in program.walk():
        if n.op == "placeholder":
            env[n] = build.placeholder(n, n.meta["val"])
        elif n.target is aten.clone.default:
            env[n] = env[n.args[0]]
            done[f"{n.name} ({where(n) or 'the network'})"] = None
        elif n.op != "output":
            env[n] = build.copy(n, env)
    report = PassReport("drop_copies", tuple(done))
    return build.finish([env[r] for r in program.results], report)
