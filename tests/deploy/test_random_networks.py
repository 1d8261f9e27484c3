"""Random networks on every target: what runs equals the network in every spike, or was refused.

Their weights and inputs lie on a grid, so that every drive is exact and rounding explains nothing.
"""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from random_networks import RANDOM, stacks
from torch import nn
from torch.utils import _pytree as pytree

from spikeport import deploy
from spikeport.targets.lynxi.simulator import options

TARGETS = ("reference", "lynxi-sim", "onnx", "nir")
#: What a target may refuse; everything else in a random network it must run.
REFUSES = {"nir": {"operator", "recurrence"}}


def check(net: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path) -> dict[str, str]:
    """Every target gives what the network gives, or has refused; the verdicts."""
    with torch.no_grad():
        expected = pytree.tree_leaves(net(*inputs))
    verdicts = {}
    for target in TARGETS:
        program = convert(net, inputs, target)
        verdicts[target] = "equal" if program else "refused"
        if program is None:
            continue
        path = folder / target
        with options(storage="float32"):
            deploy.compile(program, path, cache=False, probe=False, overwrite=True)
            with deploy.load(path) as model:
                found = pytree.tree_leaves(model(*inputs))
        for y, z in zip(expected, found, strict=True):
            assert torch.equal(y, z), f"{target}: {int((y != z).sum())} of {y.numel()} differ"
    return verdicts


def convert(net: nn.Module, inputs: tuple[torch.Tensor, ...], target: str) -> Any:
    """The program, or None where the target refuses what it may."""
    try:
        return deploy.convert(net, inputs, target, dtype="float32")
    except deploy.UnsupportedError as error:
        if not {f.rule for f in error.findings} <= REFUSES.get(target, set()):
            raise
        return None


@settings(RANDOM, max_examples=2)
@given(stack=stacks(exact=True))
def test_random_networks(stack: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(*stack, tmp_path_factory.mktemp("random"))


@pytest.mark.slow
def test_200_random_networks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.ERROR)
    verdicts = collections.Counter[tuple[str, str]]()

    @settings(RANDOM, max_examples=200)
    @given(stack=stacks(exact=True))
    def every(stack: Any) -> None:
        verdicts.update(check(*stack, tmp_path).items())

    every()
    with capsys.disabled():
        print(f"\n{dict(sorted(verdicts.items()))}")
    assert sum(verdicts.values()) >= 200 * len(TARGETS)
    assert verdicts["nir", "equal"] >= 100
