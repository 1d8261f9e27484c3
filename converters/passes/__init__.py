"""Rewrites of a program, one file each.

A pass is a function from program to program that appends to ``program.history`` what it did and,
where it does not apply, why not. A target lists the passes that it needs, in order.
"""

from collections.abc import Callable
from typing import TypeAlias

from ..program import Program
from .absorb_batch_norm import absorb_batch_norm
from .cast_float16 import cast_float16
from .decompose_operators import decompose_operators, unroll_recurrences
from .drop_copies import drop_copies
from .drop_unused_steps import drop_unused_steps
from .exact_encoder import exact_encoder
from .flatten_time import flatten_time
from .fold_batch_norm import fold_batch_norm
from .fold_constants import fold_constants
from .hoist_time_invariant import hoist_time_invariant
from .lower_neurons import lower_neurons
from .merge_dimensions import merge_dimensions
from .reroll_time import reroll_time
from .step_time import OVER_TIME, step_time
from .sum_over_time import sum_over_time

Pass: TypeAlias = Callable[[Program], Program]


def stepped(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """A target's passes for one time step.

    Steps are told apart once layers and neurons have their final weights, which so are those of the
    unrolled program, and before neurons are taken apart. Recurrent layers have steps as loops have.
    An encoder needs all steps to be one layer, and what a layer keeps shows in all of its steps, used or
    not. What is taken over time is an operator until then.
    """
    passes = tuple(one for one in passes if one not in (drop_unused_steps, exact_encoder))
    late = (lower_neurons, cast_float16)
    at = next((i for i, one in enumerate(passes) if one in late), len(passes))
    apart = [one for one in passes if isinstance(one, decompose_operators)]
    early = (one.sparing(OVER_TIME) if one in apart else one for one in passes[:at])
    return (*early, unroll_recurrences, step_time, *apart, *passes[at:])


def keeping_rounding(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """A target's passes without those that let layers round otherwise and that it can do without.

    Batch norms stay out of weights, and an operator has the rows that it has in the network, as they lie in
    memory there: on others a library may add up in another order.
    """
    left: list[Pass] = [absorb_batch_norm, drop_copies, fold_batch_norm, hoist_time_invariant]
    if step_time not in passes:  # it takes apart again what re-rolling puts together
        left.append(reroll_time)
    return tuple(one for one in passes if one not in left)


__all__ = [
    "Pass",
    "absorb_batch_norm",
    "cast_float16",
    "decompose_operators",
    "drop_copies",
    "drop_unused_steps",
    "exact_encoder",
    "flatten_time",
    "fold_batch_norm",
    "fold_constants",
    "hoist_time_invariant",
    "keeping_rounding",
    "lower_neurons",
    "merge_dimensions",
    "reroll_time",
    "step_time",
    "stepped",
    "sum_over_time",
    "unroll_recurrences",
]
