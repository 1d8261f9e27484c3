"""Stepped artifacts: steps, states, calls, and what is refused with what to do about it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Net
from torch import nn

from spikeport import deploy
from spikeport.converters.neurons import IFNode, Leaky, LIFNode, Node, Synaptic
from spikeport.deploy import cli
from spikeport.targets import cuda

T, N = 4, 3
TARGETS = [
    ("reference", "float32"),
    ("lynxi-sim", "float16"),
    pytest.param("lynxi-sim", "float32", marks=pytest.mark.slow),
    ("ipu-sim", "float32"),
    ("onnx", "float32"),
    ("onnx", "float16"),
]


class Recurrent(nn.Module):
    """Events [T, N, 2, 8, 8] -> spikes of each step, mean of them, last potential of a trace."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.bn.running_mean.uniform_(-0.5, 0.5)
        self.bn.running_var.uniform_(0.5, 2)
        self.lif, self.pool = LIFNode(), nn.MaxPool2d(2)
        self.fc, self.rec = nn.Linear(36, 5), nn.Linear(5, 5)
        self.syn = Node(Synaptic, alpha=0.75, beta=0.5, v_reset=None, reset_at="next")

    def forward(self, x: torch.Tensor) -> Any:
        steps = x.shape[0]
        seen = self.lif(self.bn(self.conv(x.flatten(0, 1))).unflatten(0, (steps, -1)))
        drive = self.fc(self.pool(seen.flatten(0, 1)).unflatten(0, (steps, -1)).flatten(2))
        back, traces = torch.zeros(x.shape[1], 5), []
        for t in range(steps):
            back = 0.5 * back + torch.sigmoid(drive[t] + self.rec(back))
            traces.append(back)
        spikes = self.syn(torch.stack(traces) * 2)
        return {"spikes": spikes, "rate": spikes.mean(0), "trace": back}


def events(steps: int = T, n: int = N, seed: int = 0) -> torch.Tensor:
    return (
        torch.rand(steps, n, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) > 0.7
    ).float()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Recurrent().eval()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def compiled(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stepped") / "made"
    program = deploy.convert(net, (events(),), "lynxi-sim", time="stepped")
    deploy.compile(program, path, cache=False)
    return path


@pytest.fixture
def model(compiled: Path) -> Iterator[deploy.Model]:
    with deploy.load(compiled) as loaded:
        yield loaded


@pytest.mark.parametrize(("target", "dtype"), TARGETS)
def test_all_steps_equal_one_unrolled_call(net, target, dtype, tmp_path):
    found = {}
    for time in ("unrolled", "stepped"):
        proved = time == "stepped" and (target, dtype) == ("onnx", "float16")
        program = deploy.convert(net, (events(),), target, dtype=dtype, time=time, verify=proved)
        deploy.compile(program, tmp_path / time, cache=False)
        found[time] = deploy.load(tmp_path / time)
    stepped, x = found["stepped"], events(seed=1)
    expected, whole = found["unrolled"](x), stepped(x)
    steps = [stepped.step(now) for now in x]
    joined = {"spikes": torch.stack([s["spikes"] for s in steps])}
    joined |= {name: steps[-1][name] for name in ("rate", "trace")}
    for name, value in expected.items():
        assert torch.equal(joined[name], whole[name])
        if (target, dtype) == ("onnx", "float16") and name == "trace":
            # ONNX Runtime keeps float32 from operator to operator inside one call.
            assert torch.allclose(whole[name].float(), value.float(), atol=2e-3)
        else:
            assert torch.equal(whole[name], value), name
    if found["unrolled"].has_probes:
        ours, theirs = (found[time].probe(x)[1] for time in ("stepped", "unrolled"))
        assert all(torch.equal(ours[site], spikes) for site, spikes in theirs.items())


def test_the_manifest_says_how_steps_make_up_a_call(compiled):
    manifest = deploy.Artifact.open(compiled).manifest
    stepping = manifest["stepping"]
    assert (manifest["time"], manifest["T"], manifest["schema_version"]) == ("stepped", None, 2)
    assert (stepping["inputs"], sorted(map(str, stepping["outputs"]))) == (
        [0],
        ["0", "None", "None"],
    )
    assert [port["shape"] for port in manifest["outputs"]] == [[3, 5]] * 3
    assert stepping["state"] == "host"
    assert [s["name"] for s in stepping["states"]][:1] == ["lif.v"]
    assert str(deploy.Artifact.open(compiled)).endswith("stepped, batch=3, float16")
    assert deploy.Artifact.open(compiled).verify().equal


def test_the_artifact_does_not_depend_on_the_steps_of_the_example(net, tmp_path):
    made = []
    for steps in (3, 8):
        program = deploy.convert(net, (events(steps),), "onnx", time="stepped", verify=False)
        made.append(deploy.compile(program, tmp_path / str(steps), cache=False))
    assert made[0].manifest["graph"] == made[1].manifest["graph"]
    files = [(m.path / "device/model.onnx").read_bytes() for m in made]
    assert files[0] == files[1]


# Streams


def test_a_call_leaves_the_stream_alone_and_reset_starts_it_anew(model):
    x = events()
    first = model.step(x[0])
    kept = model.state
    model(x)
    assert all(torch.equal(model.state[name], value) for name, value in kept.items())
    second = model.step(x[0])
    assert not torch.equal(second["trace"], first["trace"])
    model.reset()
    again = model.step(x[0])
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_state_is_saved_and_restored_in_another_model(model, compiled, tmp_path):
    x = events(8)
    for now in x[:5]:
        model.step(now)
    torch.save(model.state, tmp_path / "state.pt")
    rest = [model.step(now) for now in x[5:]]
    with deploy.load(compiled) as other:
        other.state = torch.load(tmp_path / "state.pt", weights_only=True)
        for now, expected in zip(x[5:], rest, strict=True):
            found = other.step(now)
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_state_is_a_copy(model):
    model.step(events()[0])
    state = model.state
    for value in state.values():
        value.fill_(7)
    assert not any((value == 7).all() for value in model.state.values())


def test_smaller_batches_stream_too(model):
    x = events()
    whole = [model.step(now) for now in x]
    model.reset()
    part = [model.step(now[:2]) for now in x]
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a["spikes"][:2], b["spikes"])
    with pytest.raises(deploy.UsageError, match=r"3 samples.*had 2.*reset\(\)"):
        model.step(x[0])


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {**s, "lif.u": s["lif.v"]}, "no state 'lif.u'; the states are lif.v, "),
        (lambda s: {k: v for k, v in s.items() if k != "lif.v"}, "lif.v is missing"),
        (
            lambda s: {**s, "lif.v": s["lif.v"][:1]},
            r"lif.v is float16\[1, 4, 6, 6\], wanted float16",
        ),
        (lambda s: {**s, "lif.v": s["lif.v"].float()}, r"lif.v is float32.*wanted float16"),
        (lambda s: {**s, "lif.v": None, "syn.v": 1.0}, "lif.v is missing.*syn.v is missing"),
        (lambda s: {**s, "steps": s["steps"] - 5}, r"steps is \[-5.0\], wanted a number of time"),
        (lambda s: {**s, "steps": s["steps"] * torch.nan}, r"steps is \[nan\]"),
        (lambda s: {**s, "steps": s["steps"] + torch.inf}, r"steps is \[inf\]"),
        (lambda s: {**s, "steps": s["steps"] + 0.5}, r"steps is \[0.5\]"),
        (lambda s: None, "a state of type NoneType.*the states are lif.v, "),
        (lambda s: [*s.values()], "a state of type list"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(model, change, said):
    before = model.state
    with pytest.raises(deploy.UsageError, match=said):
        model.state = change(before)
    assert all(torch.equal(model.state[name], value) for name, value in before.items())


@pytest.mark.parametrize("x", [events()[0].numpy(), events().tolist(), None], ids=type)
@pytest.mark.parametrize("use", ["__call__", "step", "steps", "probe"])
def test_inputs_that_are_no_tensors_are_refused(model, use, x):
    said = rf"inputs of type {type(x).__name__}, not dense torch tensors; allowed: .* at each time step"
    with pytest.raises(deploy.UsageError, match=said):
        getattr(model, use)(x)


def test_inputs_with_a_dimension_for_time_are_refused_by_step(model):
    with pytest.raises(
        deploy.UsageError, match=r"\[4, 3, 2, 8, 8\]: one time step is .*\[N, 2, 8, 8\]"
    ):
        model.step(events())
    with pytest.raises(deploy.UsageError, match=r"\[3, 2, 8, 9\]; allowed: .* at each time step"):
        model.step(torch.zeros(3, 2, 8, 9))
    with pytest.raises(deploy.UsageError, match="0 time steps"):
        model(events(0))


def test_an_unrolled_artifact_has_no_steps(tmp_path):
    program = deploy.convert(nn.Sequential(IFNode()), (torch.rand(T, N, 5),), "reference")
    deploy.compile(program, tmp_path / "made")
    with deploy.load(tmp_path / "made") as unrolled:
        for use in (lambda m: m.step(torch.rand(N, 5)), lambda m: m.state):
            with pytest.raises(deploy.UsageError, match=r"all 4 time steps.*time=.stepped."):
                use(unrolled)


def test_time_is_one_of_two(net):
    with pytest.raises(
        deploy.UsageError, match="time is 'looped'; allowed for onnx: stepped, unrolled"
    ):
        deploy.convert(net, (events(),), "onnx", time="looped")
    with pytest.raises(deploy.UsageError, match="time is 'stepped'; allowed for nir: unrolled"):
        deploy.convert(net, (events(),), "nir", time="stepped")


def test_what_has_no_steps_is_a_finding_of_check():
    net = nn.Sequential(LIFNode())
    (finding,) = deploy.check(net, (torch.rand(1, N, 5),), ["onnx"], time="stepped")
    assert (finding.rule, finding.target) == ("time-steps", "onnx")
    assert not deploy.check(net, (torch.rand(T, N, 5),), ["onnx"], time="stepped")


class Rate(nn.Module):
    """An image, repeated by the network itself -> firing rates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc, self.lif = nn.Linear(784, 10), Node(Leaky, beta=0.5, v_reset=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lif(self.fc(x.flatten(1)).unsqueeze(0).repeat(T, 1, 1)).mean(0)


def test_a_running_mean_in_float16_ends_before_it_is_wrong(tmp_path):
    program = deploy.convert(
        Rate().eval(), (torch.rand(1, 1, 28, 28),), "lynxi-sim", time="stepped"
    )
    deploy.compile(program, tmp_path / "made", probe=False)
    with deploy.load(tmp_path / "made") as model:
        model.step(torch.rand(1, 1, 28, 28))
        model.state = {**model.state, "steps": torch.tensor([2047.0], dtype=torch.float16)}
        model.step(torch.rand(1, 1, 28, 28))
        with pytest.raises(deploy.UsageError, match=r"2049 time steps.*up to 2048.*reset\(\)"):
            model.step(torch.rand(1, 1, 28, 28))


# Around it


@pytest.mark.slow
def test_compare_shell_and_bundle_take_stepped_artifacts(tmp_path, capsys):
    file = tmp_path / "rate.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_stepped import Rate\n"
    )
    np.savez(tmp_path / "data.npz", x=np.random.rand(10, 1, 28, 28).astype("f"), y=np.arange(10))
    spec, made = [f"{file}:Rate"], str(tmp_path / "made")
    shape, given = ["--input", "4,1,28,28"], ["--data", str(tmp_path / "data.npz")]
    stepped = ["--time", "stepped", "--target"]
    assert cli.main(["show", *spec, *shape, *stepped, "onnx", "--pass", "step_time"]) == 0
    assert "lif.v" in capsys.readouterr().out
    assert cli.main(["compile", *spec, *shape, *stepped, "lynxi-sim", "-o", made]) == 0
    assert cli.main(["run", made, *given, "--verify"]) == 0
    assert "ms a step" in capsys.readouterr().out
    assert cli.main(["compare", made, *spec, *given]) == 0
    capsys.readouterr()
    onnx = str(tmp_path / "onnx")
    options = ["--dtype", "float16", "--no-verify", "-o", onnx]
    assert cli.main(["compile", *spec, *shape, *stepped, "onnx", *options]) == 0
    assert cli.main(["bundle", onnx, "-o", str(tmp_path / "bundle")]) == 0
    script = str(tmp_path / "bundle/run.py")
    shell = [sys.executable, "-m", "spikeport.deploy", "simulate", "lynxi", script]
    ran = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "the chip computes what was recorded" in ran.stdout


@pytest.mark.parametrize("seed", [0, 1])
def test_what_rounding_flips_is_no_other_neuron_from_then_on(seed: int) -> None:
    """A soft reset of 1 subtracts the spikes themselves, which are given where layers are compared."""
    torch.manual_seed(seed)
    net = Net(
        lambda s, x: s.lif(s.conv(x).mul(1.821979).unsqueeze(0).repeat(8, 1, 1, 1, 1)).mean(0),
        conv=nn.Conv2d(3, 4, 3, padding=1),
        lif=IFNode(v_reset=None),
    )
    program = deploy.convert(net, (torch.rand(2, 3, 8, 8),), "lynxi-sim", time="stepped")
    assert program.evidence is not None
    assert program.evidence.layers[0].flips > 0


def counted(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.lif(x).sum(0)


@pytest.mark.parametrize("target", ["reference", "onnx", "ipu-sim", "lynxi-sim"])
def test_outputs_are_the_callers_own(target: str, tmp_path: Path) -> None:
    net, x = Net(counted, lif=LIFNode()).eval(), 3 * torch.rand(T, N, 5)
    for time in ("unrolled", "stepped"):
        program = deploy.convert(net, (x,), target, dtype="float32", time=time)
        deploy.compile(program, tmp_path / time, cache=False)
    with deploy.load(tmp_path / "stepped") as model:
        for t in range(T):
            counts = model.step(x[t])
            last = counts.clone()
            counts /= t + 1
    assert torch.equal(last, net(x))
    assert last.any()
    with deploy.load(tmp_path / "unrolled") as model:
        nn.Linear(5, 2)(model(x)).sum().backward()


class Loop(nn.Module):
    """Spikes of a loop over time, which knows how many steps there are."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.fc, self.lif, self.use = nn.Linear(5, 5), cuda.LIFNode(step_mode="s"), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lif.reset()
        return self.use(self, x, x.shape[0])


def spikes(net: Loop, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([net.lif(now) for now in x])


def delayed(net: Loop, x: torch.Tensor, steps: int) -> torch.Tensor:
    found: list[torch.Tensor] = []
    for t in range(steps):
        found.append(net.lif(x[t] + net.fc(found[t - 2]) if t >= 2 else x[t]))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("use", "steps", "said"),
    [
        (lambda net, x, T: sum(net.lif(now) / T for now in x), 5, "aten.div takes 5 .* and 18 in"),
        (
            lambda net, x, T: (spikes(net, x) / T).sum(0),
            2,
            "aten.div takes 2 .* and 12 in one of 12",
        ),
        (lambda net, x, T: spikes(net, x).sum(0) > T / 2, 5, r"aten.gt takes 2.5 .* and 9.0"),
        (lambda net, x, T: spikes(net, net.fc(x) / T), 4, "aten.div takes 4 .* at the end"),
        (delayed, 2, "in an example of 12 time steps: step 2 computes something else"),
    ],
    ids=["inside the loop", "before the sum", "vote", "drive", "delay"],
)
def test_what_follows_from_the_number_of_steps_is_refused(use: Any, steps: int, said: str) -> None:
    x = 3 * torch.rand(steps, N, 5)
    with pytest.raises(deploy.UnsupportedError, match=said):
        deploy.convert(Loop(use).eval(), (x,), "reference", time="stepped")


@pytest.mark.parametrize(
    "use",
    [
        lambda net, x, T: spikes(net, x).sum(0) / T,
        lambda net, x, T: spikes(net, x).mean(0),
        lambda net, x, T: spikes(net, net.fc(x) / 3),
    ],
)
def test_what_does_not_is_the_same_for_any_number(use: Any) -> None:
    net, x = Loop(use).eval(), 3 * torch.rand(7, N, 5)
    program = deploy.convert(net, (x[:3],), "reference", time="stepped")
    with torch.no_grad():
        assert torch.allclose(program(x), net(x))


class Presented(nn.Module):
    """An image, for a number of steps that is the network's own: an attribute or a number in its code."""

    def __init__(self, use: Any, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.out = nn.Linear(5, 5), nn.Linear(5, 5)
        self.lif, self.last = cuda.LIFNode(step_mode="s"), cuda.IFNode(step_mode="s")
        self.use, self.own = use, own
        if own:
            self.T = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lif.reset()
        self.last.reset()
        steps = self.T if self.own else 3
        return self.use(self, [self.lif(self.fc(x)) for _ in range(steps)], steps)


def queued(net: Presented, spikes: list[torch.Tensor], delay: int) -> torch.Tensor:
    queue, seen = [torch.zeros_like(spikes[0])] * delay, []
    for now in spikes:
        seen.append(net.last(net.out(queue[0]) + now))
        queue = [*queue[1:], now]
    return torch.stack(seen)


@pytest.mark.parametrize("own", [True, False], ids=["attribute", "in the code"])
@pytest.mark.parametrize(
    ("use", "found"),
    [
        (lambda net, s, T: sum(now / T for now in s), "aten.div takes 3 "),
        (lambda net, s, T: sum(s) > T / 2, "aten.gt takes 1.5 "),
        (lambda net, s, T: sum(s) * 2.0 / T, "aten.(div|mul) takes [32] "),
        (lambda net, s, T: queued(net, s, 3), "aten.linear takes a constant .* 0 in all elements"),
        (lambda net, s, T: queued(net, s, 50), "aten.linear takes a constant .* 0 in all elements"),
    ],
    ids=["inside the loop", "vote", "gain", "delay", "longer delay"],
)
def test_a_number_of_steps_of_its_own_is_no_way_around(use: Any, found: str, own: bool) -> None:
    x = 3 * torch.rand(N, 5)
    with pytest.raises(deploy.UnsupportedError, match=found):
        deploy.convert(Presented(use, own).eval(), (x,), "reference", time="stepped")


@pytest.mark.parametrize("own", [True, False], ids=["attribute", "in the code"])
@pytest.mark.parametrize(
    "use",
    [
        lambda net, s, T: sum(s) / T,
        lambda net, s, T: torch.stack(s).mean(0) * 2,
        lambda net, s, T: net.out(sum(s)),
        lambda net, s, T: queued(net, [0.9 * now for now in s], 1),
    ],
    ids=["rate", "gain", "layer", "delay"],
)
def test_what_needs_no_number_of_steps_converts_whosever_it_is(use: Any, own: bool) -> None:
    net, x = Presented(use, own).eval(), 3 * torch.rand(N, 5)
    program = deploy.convert(net, (x,), "reference", time="stepped")
    for steps in (3, 1, 9) if own else (3,):
        net.T = steps
        stream = replace(program, stepping=replace(program.stepping, steps=steps))
        with torch.no_grad():
            assert torch.allclose(stream(x), net(x), atol=1e-5)


@pytest.mark.parametrize(
    ("hear", "node"),
    [(lambda now, q: now + q, "add"), (lambda now, q: now * (1 - q), "mul")],
    ids=["sum", "refractory"],
)
@pytest.mark.parametrize("delay", [6, 40])
def test_a_delay_that_no_example_shows_is_refused(hear: Any, node: str, delay: int) -> None:
    def late(net: Loop, x: torch.Tensor, steps: int) -> torch.Tensor:
        queue, seen = [torch.zeros_like(x[0])] * delay, []
        for now in spikes(net, x):
            seen.append(hear(now, queue[0]))
            queue = [*queue[1:], now]
        return torch.stack(seen)

    x = 3 * torch.rand(3, N, 5)
    with pytest.raises(
        deploy.UnsupportedError, match=rf"aten.{node} takes a constant .* of 3 time steps"
    ):
        deploy.convert(Loop(late).eval(), (x,), "reference", time="stepped")


@pytest.mark.parametrize(
    "use",
    [
        lambda net, x, T: spikes(net, torch.maximum(x, torch.zeros_like(x[0]))),
        lambda net, x, T: torch.stack([s * torch.ones(5) + torch.ones(1) for s in spikes(net, x)]),
        lambda net, x, T: torch.stack(
            [torch.where(s > 0, torch.zeros(5), s) for s in spikes(net, x)]
        ),
        lambda net, x, T: spikes(net, x + net.fc.bias.new_tensor([0.5, 0, 0, 0, 0])),
    ],
    ids=["extreme", "factor", "condition", "values of their own"],
)
def test_constants_that_no_delay_starts_from_convert(use: Any) -> None:
    net, x = Loop(use).eval(), 3 * torch.rand(9, N, 5)
    program = deploy.convert(net, (x[:3],), "reference", time="stepped")
    with torch.no_grad():
        assert torch.allclose(program(x), net(x))
