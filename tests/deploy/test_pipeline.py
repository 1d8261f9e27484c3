"""Check and convert: every finding of every target, errors, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spikeport import deploy
from spikeport.converters.errors import CaptureError, UnsupportedError, UsageError
from spikeport.converters.neurons import IFNode, LIFNode
from spikeport.deploy.pipeline import check, convert, rewrite_for

T, N = 4, 2


class Net(nn.Module):
    """A network with one operator of the user's between two neurons."""

    def __init__(self, between: Any = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.a, self.b = nn.Linear(5, 6), LIFNode(), IFNode()
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.between(self.a(self.fc(x)))).mean(0)


X = torch.randn(T, N, 5, generator=torch.Generator().manual_seed(0)) * 2


def rules(findings: Any) -> list[tuple[str, str, str]]:
    return [(f.rule, f.where, f.target) for f in findings]


def test_nothing_stops_a_plain_network() -> None:
    found = check(Net(), (X,), ["lynxi", "lynxi-sim", "reference"])
    assert not found
    assert str(found) == "no findings"


def test_findings_of_every_target() -> None:
    found = check(Net(lambda x: x.erf()), (X,), ["lynxi", "lynxi-sim", "reference"])
    assert rules(found) == [("operator", "", "lynxi"), ("operator", "", "lynxi-sim")]
    assert found[0].found == "aten.erf"
    assert found[0].fix


def test_all_findings_of_one_target() -> None:
    def between(x: torch.Tensor) -> torch.Tensor:
        return x.erf().reshape(T, N, 1, 2, 3).logcumsumexp(-1).reshape(T, N, 6)

    found = check(Net(between), (X,), ["lynxi-sim"])
    assert {f.rule for f in found} >= {"operator", "rank"}
    assert {f.found for f in found if f.rule == "operator"} == {
        "aten.erf",
        "aten.logcumsumexp",
    }
    assert all("rank" in f.found and f.allowed == "rank up to 4" for f in found if f.rule == "rank")
    with pytest.raises(UnsupportedError) as caught:
        convert(Net(between), (X,), "lynxi-sim")
    assert {str(f) for f in caught.value.findings} == {str(f) for f in found.errors}


def test_one_finding_for_a_layer_and_not_for_each_of_its_steps() -> None:
    found = check(Net(lambda x: torch.stack([row.erf() for row in x])), (X,), ["lynxi"])
    assert len(found) == 1


def test_rows_and_pieces_are_slices() -> None:
    def between(x: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([row * 2 for row in x])
        a, b = rows.chunk(2, -1)
        return torch.cat([b, a], -1) + torch.cat(x.split([1, 2, 3], -1)[::-1], -1)

    net = Net(between)
    program = convert(net, (X,), "lynxi-sim", dtype="float32")
    with torch.no_grad():
        assert torch.equal(program(X), net(X))


def test_what_stops_the_capture_is_of_every_target() -> None:
    net = Net()
    net.a.forward = lambda x: x
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    found = check(net, (X,), ["lynxi", "reference"])
    assert {(f.rule, f.where) for f in found} == {
        ("non-finite-weight", "fc"),
        ("altered-neuron", "a"),
    }
    assert {f.target for f in found} == {""}
    with pytest.raises(CaptureError) as caught:
        convert(net, (X,), "lynxi")
    assert rules(caught.value.findings) == rules(found)


def test_an_overflow_is_a_finding_of_its_target() -> None:
    net = Net()
    with torch.no_grad():
        net.fc.weight[0, 0] = 1e6
    found = check(net, (X,), ["reference", "lynxi-sim"])
    assert rules(found) == [("float16-overflow", "fc", "lynxi-sim")]
    assert not check(net, (X,), ["lynxi-sim"], dtype="float32").errors


def test_float32_on_a_chip_of_float16_is_a_warning() -> None:
    found = check(Net(), (X,), ["lynxi"], dtype="float32")
    assert [(f.rule, f.severity) for f in found] == [("arithmetic", "warning")]
    assert not found.errors
    assert convert(Net(), (X,), "lynxi", dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("target", "dtype", "expected"),
    [
        ("lynxi-sim", None, torch.float16),
        ("lynxi-sim", "float16", torch.float16),
        ("lynxi-sim", "float32", torch.float32),
        ("reference", None, torch.float32),
    ],
)
def test_dtypes(target: str, dtype: str | None, expected: torch.dtype) -> None:
    program = convert(Net(), (X,), target, dtype=dtype)
    assert program.dtype == expected
    assert program.target == target
    assert program.evidence is not None
    assert program.captured is not None
    assert program.captured.target == ""
    result = program(X)
    assert result.dtype == torch.float32
    if expected == torch.float32:
        with torch.no_grad():
            assert torch.equal(result, Net()(X))


def test_a_dtype_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="dtype is 'int8'; allowed: float16, float32"):
        convert(Net(), (X,), "lynxi-sim", dtype="int8")
    with pytest.raises(UsageError, match="allowed: float16, float32"):
        check(Net(), (X,), ["lynxi-sim"], dtype="half")


def test_a_dtype_that_the_target_has_not() -> None:
    with pytest.raises(UsageError, match="reference target computes in float32"):
        convert(Net(), (X,), "reference", dtype="float16")


@pytest.mark.parametrize("call", [convert, lambda net, x, name: check(net, x, [name])])
def test_a_target_that_there_is_not(call: Any) -> None:
    with pytest.raises(UsageError, match="no target 'lynxy'.*did you mean lynxi"):
        call(Net(), (X,), "lynxy")


def test_a_name_in_place_of_a_list() -> None:
    """A string would be taken for its letters."""
    with pytest.raises(UsageError, match="targets=\\['lynxi'\\]"):
        check(Net(), (X,), "lynxi")  # type: ignore[arg-type]


def test_without_verification() -> None:
    program = convert(Net(), (X,), "lynxi-sim", verify=False)
    assert program.evidence is None
    assert len(program.examples) == 1


def test_a_network_of_half_precision() -> None:
    net, x = Net().half(), X.half()
    for dtype in (None, "float16"):
        program = convert(net, (x,), "lynxi-sim", dtype=dtype)
        assert program.dtype == torch.float16
        assert program(x).dtype == torch.float16


def test_a_network_of_double_precision() -> None:
    program = convert(Net().double(), (X.double(),), "lynxi-sim")
    assert program.dtype == torch.float16
    assert program(X.double()).dtype == torch.float64


def test_float32_of_a_network_in_another_precision_is_refused() -> None:
    """float32 turns the cast off; a graph in float64 is not one in float32."""
    with pytest.raises((UnsupportedError, UsageError), match="float64"):
        convert(Net().double(), (X.double(),), "lynxi-sim", dtype="float32")


@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["reference", "onnx", "lynxi-sim", "ipu-sim"])
def test_none_among_the_outputs_stays_there(target: str, time: Any, tmp_path: Path) -> None:
    """As in Spike-driven Transformer, whose forward returns (x, hook), hook being None."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(4, 3), IFNode()

        def forward(self, x: torch.Tensor, hook: Any = None) -> Any:
            return {"hook": hook, "scores": [None, self.lif(self.fc(x)).mean(0)]}

    net, x = Hooked(), torch.rand(3, 2, 4) * 4
    program = convert(net, (x,), target, time=time)
    artifact = deploy.compile(program, tmp_path / "made", cache=False)
    with torch.no_grad(), artifact.load() as model:
        expected = net(x)["scores"][1]
        for found in (program(x), model(x)):
            assert torch.allclose(found["scores"].pop(1), expected, atol=1e-3)
            assert found == {"hook": None, "scores": [None]}
        assert deploy.compare(net, model, [(x, torch.zeros(2))]).samples == 2
    assert artifact.verify().equal


def test_the_history_says_what_each_pass_did() -> None:
    program = convert(Net(), (X,), "lynxi-sim")
    assert [r.name for r in program.history] == [
        "capture", "drop_copies", "drop_unused_steps", "fold_constants", "reroll_time",
        "hoist_time_invariant", "flatten_time", "absorb_batch_norm", "fold_batch_norm",
        "decompose_operators", "merge_dimensions", "exact_encoder", "lower_neurons", "cast_float16",
    ]  # fmt: skip
    captured = convert(Net(), (X,), "lynxi-sim").captured
    assert captured is not None
    again = rewrite_for(captured, "lynxi-sim", torch.float16, "unrolled")
    assert torch.equal(again(X), program(X))


def test_the_examples_are_not_the_callers() -> None:
    """What the caller does with the input afterwards leaves the program's evidence alone."""
    x = X.clone()
    program = convert(Net(), (x,), "lynxi-sim")
    x.zero_()
    assert torch.equal(program.examples[0][0], X)
