"""Drop the last steps of layers that nothing uses, such as those before a delay.

A layer that a loop calls at steps 0 ... T - 1, and whose results after step T - k lead to no output, has
T - k steps. The program of one time step needs to see all of them; a call of the network does not.
"""

from __future__ import annotations

from dataclasses import replace

from ..builder import Builder
from ..ops import Node, needed
from ..program import PassReport, Program, Site


def drop_unused_steps(program: Program) -> Program:
    """End each layer that is called step by step with the last step that leads to an output.

    What the program is compared with, ``captured``, ends its layers alike.
    """
    used, named = needed(program.results), program.named()
    kept = {site: _kept(site, used, named) for site in program.sites}
    done = [
        f"{site.name}: the last {site.T - len(spikes)} of {site.T} steps, which nothing uses"
        for site, spikes in kept.items()
        if len(spikes) < len(site.spikes)
    ]
    report = PassReport("drop_unused_steps", tuple(done))
    if not done:
        return replace(program, history=(*program.history, report))
    captured = program.captured and drop_unused_steps(program.captured)
    build, env = Builder(program), dict[Node, Node]()
    wanted = needed([*program.results, *(n for spikes in kept.values() for n in spikes)])
    for n in program.walk():
        if n.op == "placeholder":
            env[n] = build.placeholder(n, n.meta["val"])
        elif n in wanted:
            env[n] = build.copy(n, env)
    return build.finish([env[r] for r in program.results], report, captured=captured)


def _kept(site: Site, used: set[Node], named: dict[str, Node]) -> list[Node]:
    """A layer's spikes up to its last step that is used; none where it is for nothing."""
    spikes = [named[name] for name in site.spikes]
    while site.layout == "steps" and spikes and spikes[-1].args[0] not in used:
        spikes.pop()
    return spikes
