"""Networks of SpikingJelly's zoo, as benchmarks/zoo.py builds them, go to every target."""

from __future__ import annotations

import pytest

pytest.importorskip("spikingjelly.activation_based.model.masnn", reason="needs SpikingJelly 2.0.0")

import zoo

pytestmark = pytest.mark.spikingjelly


@pytest.mark.parametrize(
    "name",
    [
        "MNISTNet",
        "sew_resnet18",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("spikformer_ti", "masnn_dvs128_gesture", "att_ms_resnet18", "SNASNet")
        ),
    ],
)
def test_a_network_is_rewritten_for_every_target(name: str) -> None:
    net, batch = zoo.build(name)
    rows = dict(zoo.rewrite(net, batch(1), ("reference", "onnx", "lynxi-sim")))
    assert all(row.verdict.startswith("converts") for row in rows.values())
    assert rows["lynxi-sim"].verdict in ("converts, rank 3", "converts, rank 4")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["reference", "onnx", "lynxi-sim"])
def test_a_network_computes_on_a_target_what_was_trained(target: str) -> None:
    net, batch = zoo.build("FashionMNISTNet")
    row = zoo.convert(net, batch, 1, target)
    assert row.verdict == "equal" or row.verdict.startswith("rounding flips")
    assert (row.rate or 0) > 0.05


@pytest.mark.parametrize("target", ["onnx", "lynxi-sim", "ipu-sim"])
def test_where_nothing_rounds_nothing_differs(target: str) -> None:
    net, batch = zoo.build("MNISTNet", exact=True)
    row = zoo.convert(net, batch, 1, target)
    assert row.verdict == "equal"
    assert (row.rate or 0) > 0.05
