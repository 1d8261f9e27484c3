"""Expressions as lines of Triton."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ...converters.errors import UsageError
from ...converters.symbolic import Expr, needed

#: 1 / x as one instruction, exact to a bit in the last place; and as Triton's interpreter knows it.
RECIPROCAL = """\
def reciprocal(x):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )
"""
RECIPROCAL_INTERPRETED = """\
def reciprocal(x):
    return 1.0 / x
"""


class Text:
    """Lines of a kernel.

    Args:
        forward: How many of the expressions are those of the forward pass, which come first.
    """

    def __init__(self, forward: int) -> None:
        self.forward = forward
        self.lines: list[str] = []
        self.indent = 1

    def __call__(self, line: str) -> None:
        """Add a line."""
        self.lines.append("    " * self.indent + line)

    def evaluate(self, results: list[Expr], given: Mapping[str, str], suffix: str) -> list[str]:
        """Lines that compute the results; their names."""
        names: dict[int, str] = {}
        values = needed(results)
        parts = _parts(values, results, self.forward)
        for e in values:
            if e.op == "const":
                names[e.index] = repr(e.value)
            elif e.op == "input":
                names[e.index] = given[e.value]
            elif e.op == "detach":
                names[e.index] = names[e.args[0].index]
            elif e not in parts.values():
                names[e.index] = f"e{e.index}_{suffix}"
                self(f"{names[e.index]} = {_code(e, parts.get(e), names, self.forward)}")
        return [names[r.index] for r in results]


def _parts(values: list[Expr], results: list[Expr], forward: int) -> dict[Expr, Expr]:
    """Operations that are computed as part of another, by that other: nothing else needs their value.

    A derivative is a sum of products, each of which makes one operation with its sum: derivatives need
    not be rounded as torch rounds them. 1 - spikes is as exact from the comparison.
    """
    uses = Counter([*(a for e in values for a in e.args), *results])
    parts: dict[Expr, Expr] = {}
    for e in values:
        for a in reversed(e.args):
            product = e.op in ("add", "sub") and a.op == "mul" and forward <= a.index
            if uses[a] == 1 and a not in parts and (product or _no_spike(e, a)):
                parts[e] = a
                break
    return parts


def _no_spike(e: Expr, spike: Expr) -> bool:
    """Whether a value is 1 - spike."""
    one = e.args[0]
    return e.op == "sub" and one.op == "const" and one.value == 1 and spike.op.startswith("fire")


_FIRES = {"fire_ge": ">=", "fire_gt": ">"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _code(e: Expr, part: Expr | None, names: Mapping[int, str], forward: int) -> str:
    """One operation, or two; those of the forward pass are rounded as torch rounds them."""

    def name(of: Expr) -> str:
        return names[of.index]

    if part is not None and part.op == "mul":
        first, second = map(name, part.args)
        if e.args[0] is part:
            added = name(e.args[1])
            return f"tl.fma({first}, {second}, {added if e.op == 'add' else f'-{added}'})"
        first = first if e.op == "add" else f"-{first}"
        return f"tl.fma({first}, {second}, {name(e.args[0])})"
    if part is not None:
        h, threshold = map(name, part.args)
        return f"tl.where({h} {_FIRES[part.op]} {threshold}, 0.0, 1.0)"
    a, b, c = (*map(name, e.args), "", "", "")[:3]
    if e.op in _INFIX:
        return f"{a} {_INFIX[e.op]} {b}"
    if e.op in _FIRES:
        return f"tl.where({a} {_FIRES[e.op]} {b}, 1.0, 0.0)"
    if e.op == "div":
        return f"tl.div_rn({a}, {b})" if e.index < forward else _quotient(e, a, b)
    if e.op == "pow":
        return _power(a, e.args[1])
    return {
        "neg": f"-{a}",
        "abs": f"tl.abs({a})",
        "sigmoid": f"tl.sigmoid({a})",
        "exp": f"tl.exp({a})",
        "tanh": f"2.0 * tl.sigmoid(2.0 * {a}) - 1.0",
        "relu": f"tl.where({a} < 0.0, 0.0, {a})",
        "where": f"tl.where({a}, {b}, {c})",
    }[e.op]


def _quotient(e: Expr, a: str, b: str) -> str:
    """a / b to within the last bits."""
    over, under = e.args
    if under.op == "const":
        return f"{a} * {1.0 / under.value!r}"
    return (
        f"reciprocal({b})" if over.op == "const" and over.value == 1 else f"{a} * reciprocal({b})"
    )


def _power(a: str, exponent: Expr) -> str:
    n = exponent.value
    if exponent.op == "const" and n == 0.5:
        return f"tl.sqrt_rn({a})"
    if exponent.op == "const" and n == int(n) and 0 < abs(n) <= 8:
        product = " * ".join([a] * abs(int(n)))
        return product if n > 0 else f"1.0 / ({product})"
    raise UsageError(
        f"a fused kernel has powers of 0.5 and of whole numbers up to 8, not of {exponent}; write the "
        "equation with those, or use backend='torch'"
    )
