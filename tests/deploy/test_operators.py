"""What networks compute between their neurons: verified, at once and step by step, on every input."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Net, SideBySide, groups, rand
from torch import nn
from torch.utils import _pytree as pytree

from spikeport import deploy
from spikeport.converters.errors import UnsupportedError
from spikeport.converters.neurons import LIFNode
from spikeport.converters.program import Time

T, N = 4, 2
ROWS, IMAGE = (T, N, 6), (T, N, 4, 7, 5)
Run = Callable[..., Any]


def each(layer: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    """Neurons after a function of images, time folded into their batch."""
    return lambda s, x: s.lif(layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


def attention(s: Any, x: torch.Tensor) -> torch.Tensor:
    tokens = x.flatten(0, 1).unsqueeze(1) * torch.arange(1.0, 4.0).reshape(1, 3, 1)
    mixed, _ = s.mha(tokens, tokens, tokens)
    return s.lif(mixed.mean(1).unflatten(0, x.shape[:2]) * 4)


def masked(s: Any, x: torch.Tensor) -> torch.Tensor:
    scores = x.unsqueeze(-1) @ x.unsqueeze(-2)
    scores = scores.masked_fill(torch.ones(6, 6).tril() == 0, float("-inf"))
    return s.lif((scores.softmax(-1) @ x.unsqueeze(-1)).squeeze(-1) * 4)


def one_weight_in_many_roles(s: Any, x: torch.Tensor) -> torch.Tensor:
    code = s.lif(F.conv2d(x.flatten(0, 1), s.tied[0]).unflatten(0, x.shape[:2])).flatten(0, 1)
    image = F.conv_transpose2d(code, s.tied[0])
    image = image + F.conv_transpose2d(code, s.tied[0], groups=3).unflatten(1, (3, 4)).sum(1)
    image = image + s.tied[0].reshape(-1)[:5] * s.tied[0][0, 0, 0, 0]
    return s.lif2(image.unflatten(0, x.shape[:2]))


def written_by_masks(s: Any, x: torch.Tensor) -> torch.Tensor:
    spikes, x = torch.zeros_like(x), x.clone()
    spikes[x > 0.5] = 1.0
    x[x > 0.5] = 0.0
    x[x.amax(-1) < 0.4] = 0.75  # a whole row
    x[:, :, torch.arange(6) > 4] = 0.25
    return s.lif(x + spikes)


EDGES = torch.tensor([[0, 2, 1, 1, 5], [1, 0, 2, 2, 1]])


def written_with_their_sum(s: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[x > 0.5] = x.sum()
    return s.lif(x)


def along_edges(s: Any, x: torch.Tensor) -> torch.Tensor:
    source, to = EDGES
    sums = torch.zeros_like(x).index_add(2, to, x[:, :, source])
    sums = sums.scatter_add(2, EDGES[1].expand(*x.shape[:2], -1), s.lif(x)[:, :, source])
    nodes = sums.permute(2, 0, 1)
    nodes = nodes.index_put((EDGES[0] % 2,), nodes[:5], accumulate=True).permute(1, 2, 0).clone()
    nodes[:, :, EDGES[1, :2] + 3] = 0.5
    return s.lif2(nodes)


#: Of each the shape of the input and the forward.
CASES: dict[str, tuple[tuple[int, ...], Run]] = {
    "fancy index": (ROWS, lambda s, x: s.lif(x)[:, :, [2, 0, 1]]),
    "index of two dimensions": (ROWS, lambda s, x: s.lif(x)[:, :, torch.tensor([[2, -1], [1, 0]])]),
    "index_select": (ROWS, lambda s, x: s.lif(x).index_select(2, torch.tensor([1, 1, 3]))),
    "embedding": (ROWS, lambda s, x: s.lif(s.table((x > 0).long().sum(-1)))),
    "masked_fill": (ROWS, lambda s, x: s.lif(x.masked_fill(x < 0, 0.25))),
    "written by masks": (ROWS, written_by_masks),
    "written with their sum": (ROWS, written_with_their_sum),
    "sign of both zeros": (ROWS, lambda s, x: s.lif(x.copysign((2 * x - 1).round() / 2))),
    "along edges": (ROWS, along_edges),
    "roll": (ROWS, lambda s, x: s.lif(x.roll(2, -1))),
    "flip": (ROWS, lambda s, x: s.lif(x.flip(-1))),
    "einsum": (ROWS, lambda s, x: s.lif(torch.einsum("tni,oi->tno", x, s.fc.weight))),
    "product over samples": (
        (T, 4, 4),
        lambda s, x: torch.stack([spikes.t() @ spikes for spikes in s.lif(x)]),
    ),
    "tile": (ROWS, lambda s, x: s.lif(x.tile(1, 1, 2))),
    "repeat_interleave": (ROWS, lambda s, x: s.lif(x.repeat_interleave(2, dim=2))),
    "tril": (ROWS, lambda s, x: s.lif((x.unsqueeze(-1) @ x.unsqueeze(-2)).tril().sum(-1))),
    "exclusive or": (ROWS, lambda s, x: ((s.lif(x) > 0) ^ (s.lif2(x * 0.7) > 0)).float()),
    "logic": (
        ROWS,
        lambda s, x: ((s.lif(x) > 0) & (x > 0.25) | ~(s.lif2(x * 0.7) > 0)).float(),
    ),
    "logic by arithmetic": (
        ROWS,
        lambda s, x: ((s.lif(x) > 0) * (x > 0.25) + (s.lif2(x * 0.7) > 0)).float(),
    ),
    "any and all": (
        ROWS,
        lambda s, x: (
            x.gt(0.9).any(-1, keepdim=True) * s.lif(x)
            + x.ne(0.3).all(-1, keepdim=True) * x.any(-1, keepdim=True)
        ),
    ),
    "dtype and device of another": (ROWS, lambda s, x: s.lif((x > 0).to(x) + (x > 1).type_as(x))),
    "moved to a device": (ROWS, lambda s, x: s.lif((x > 0).to(x.device, x.dtype, copy=True))),
    "hstack": (ROWS, lambda s, x: s.lif(torch.hstack([x, x * 2])[:, ::2])),
    "meshgrid": (
        ROWS,
        lambda s, x: s.lif(x + torch.meshgrid(s.fc.bias, s.fc.bias, indexing="ij")[1][:1]),
    ),
    "broadcast_tensors": (
        ROWS,
        lambda s, x: s.lif(sum(torch.broadcast_tensors(x, x[..., :1], x[:, :1]))),
    ),
    "products": (
        ROWS,
        lambda s, x: s.lif(x @ x.mT @ x) @ s.fc.weight.mv(s.fc.bias).outer(s.fc.bias),
    ),
    "distances": (
        ROWS,
        lambda s, x: s.lif(
            x
            + F.pairwise_distance(x, x * 0.5, keepdim=True)
            + F.cosine_similarity(x, x + 1, -1)[..., None]
        ),
    ),
    "one_hot": (ROWS, lambda s, x: F.one_hot(s.lif(s.fc(x)).mean(0).argmax(1), 6)),
    "count of truth values": (ROWS, lambda s, x: (s.lif(x) > 0).sum(0)),
    "argmax": (ROWS, lambda s, x: s.lif(s.fc(x)).mean(0).argmax(1)),
    "remainders": (ROWS, lambda s, x: s.lif(x % 0.75 + x.fmod(0.5) + x // 0.5)),
    "rounding": (ROWS, lambda s, x: s.lif(x.round() + x.floor() / 2 + x.ceil() / 4 + x.trunc())),
    "activations": (
        ROWS,
        lambda s, x: s.lif(F.elu(x) + F.mish(x) + F.softplus(x) + F.hardswish(x)),
    ),
    "deviation": (ROWS, lambda s, x: s.lif(x / (x.std(-1, keepdim=True) + 0.5))),
    "norm": (ROWS, lambda s, x: s.lif(F.normalize(x, dim=-1) * 2)),
    "log1p": (ROWS, lambda s, x: s.lif(x.abs().log1p() * 3)),
    "running sum over features": (ROWS, lambda s, x: s.lif(x.cumsum(-1))),
    "GRU over tokens": (
        ROWS,
        lambda s, x: s.lif(
            s.gru(x.flatten(0, 1).T.unsqueeze(-1))[0][-1].unflatten(0, x.shape[:2]) * 4
        ),
    ),
    "LSTM over time": (ROWS, lambda s, x: s.lif(s.lstm(x)[0] * 4)),
    "GRU over time": (ROWS, lambda s, x: s.gru(s.lif(x)[..., :1])[0].mean(0)),
    "logsumexp": (ROWS, lambda s, x: s.lif(x.logsumexp(-1, keepdim=True) / 2)),
    "prod": (ROWS, lambda s, x: s.lif(x.prod(-1, keepdim=True))),
    "prelu": (ROWS, lambda s, x: s.lif(s.prelu(x))),
    "attention": (ROWS, lambda s, x: s.lif(4 * F.scaled_dot_product_attention(x, x, x))),
    "masked attention": (ROWS, masked),
    "causal attention": (
        ROWS,
        lambda s, x: s.lif(4 * F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    ),
    "multi-head attention": (ROWS, attention),
    "pixel_shuffle": (IMAGE, each(lambda x: F.pixel_shuffle(x, 2))),
    "unfold": (IMAGE, each(lambda x: F.unfold(x, 3, padding=1))),
    "circular": (IMAGE, each(lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"))),
    "reflect": (IMAGE, each(lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"))),
    "replicate": (IMAGE, each(lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"))),
    "as large as before": (
        IMAGE,
        lambda s, x: s.lif(s.norm(s.same(x.flatten(0, 1))).unflatten(0, x.shape[:2])),
    ),
    "upsampled": (IMAGE, each(nn.Upsample(scale_factor=(2, 3)))),
    "cropped": (IMAGE, each(lambda x: F.pad(x, (-1, 2, 0, -1)))),
    "one weight in many roles": (IMAGE, one_weight_in_many_roles),
    "instance norm": (IMAGE, each(nn.InstanceNorm2d(4))),
    "cumsum over time": (ROWS, lambda s, x: s.lif(x).cumsum(0)),
    "roll over time": (ROWS, lambda s, x: s.lif(x.roll(1, 0))),
    "deviation over time": (ROWS, lambda s, x: s.lif(x).std(0)),
}
#: What takes a logarithm, a remainder, or numbers of 64 bits.
NOT_ON_LYNXI = (
    *("embedding", "count of truth values", "argmax", "one_hot", "remainders"),
    *("activations", "log1p", "logsumexp"),
)
UNROLLED = ("written with their sum", "cumsum over time", "roll over time", "deviation over time")


#: What the networks have, made when they first ask for it.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{"lif": LIFNode, "lif2": LIFNode, "prelu": nn.PReLU},
    "fc": lambda: nn.Linear(6, 6),
    "table": lambda: nn.Embedding(7, 5),
    "same": lambda: nn.Conv2d(4, 3, (3, 4), padding="same"),
    "norm": lambda: nn.BatchNorm2d(3),
    "gru": lambda: nn.GRU(1, 6, 2),
    "lstm": lambda: nn.LSTM(6, 5),
    "mha": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    "tied": lambda: nn.ParameterList([torch.randn(3, 4, 3, 3)]),
}


class Case(Net):
    """A network of those layers alone that its forward asks for."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in LAYERS:
                raise
        layer = LAYERS[name]().eval()
        setattr(self, name, layer)
        return layer


@cache
def network(*names: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Cases side by side, the same network for every target, and inputs."""
    nets: dict[str, nn.Module] = {}
    for name in names:
        torch.manual_seed(0)
        shape, run = CASES[name]
        nets[name] = Case(run).eval()
        nets[name](rand(*shape))
    return SideBySide(nets).eval(), tuple(rand(*CASES[name][0]) for name in names)


def is_itself(names: list[str], target: str, time: Time) -> None:
    net, example = network(*names)
    converted = deploy.convert(net, example, target, dtype="float32", time=time)
    inputs = [rand(*x.shape, seed=1) for x in example]
    with torch.no_grad():
        expected, found = net(*inputs), converted(*inputs)
    for name in names:
        for a, b in zip(*map(pytree.tree_leaves, (expected[name], found[name])), strict=True):
            assert a.dtype == b.dtype, name
            assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["reference", "onnx", "lynxi-sim"])
@pytest.mark.parametrize(
    "names", groups([name for name in CASES if name not in (*NOT_ON_LYNXI, *UNROLLED)], 12)
)
def test_it_converts(names: list[str], target: str, time: Time) -> None:
    is_itself(names, target, time)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("target", ["reference", "onnx", "lynxi-sim"])
def test_what_takes_all_steps_together_converts(target: str) -> None:
    is_itself([*UNROLLED], target, "unrolled")


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("time", ["unrolled", "stepped"])
@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_what_lynxi_lacks_converts_for_others(target: str, time: Time) -> None:
    is_itself([*NOT_ON_LYNXI], target, time)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("time", ["unrolled", "stepped"])
def test_what_lynxi_lacks_is_refused(time: Time) -> None:
    net, example = network(*NOT_ON_LYNXI)
    with pytest.raises(UnsupportedError) as caught:
        deploy.convert(net, example, "lynxi-sim", dtype="float16", time=time)
    findings = caught.value.findings
    assert all(f.fix for f in findings)
    assert {part for f in findings for part in f.where.split(".")[1:2]} == {*NOT_ON_LYNXI}


def test_an_example_of_more_steps_fits_every_case() -> None:
    """One that it does not fit would keep its neighbours from being compared on it."""
    net, example = network(*CASES)
    net(*(torch.cat([x, x]) for x in example))


def test_multi_head_attention_has_a_rank_that_chips_take() -> None:
    torch.manual_seed(0)
    heads = nn.MultiheadAttention(6, 2, batch_first=True)
    net = Net(attention, lif=LIFNode(), mha=heads).eval()
    for time in ("unrolled", "stepped"):
        program = deploy.convert(net, (rand(*ROWS),), "lynxi-sim", dtype="float32", time=time)
        x = rand(*ROWS, seed=1)
        with torch.no_grad():
            assert torch.equal(program(x), net(x))


def test_attention_that_sees_nothing_is_not_given_what_it_does_not_see() -> None:
    """Which row sees nothing depends on the data: minus infinity has to stay, or the network is refused."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(s.lif(x), x, x, (x @ x.mT) > 0.5)

    net, x = Net(run, lif=LIFNode()), rand(*ROWS)
    with pytest.raises(UnsupportedError, match="not finite") as caught:
        deploy.convert(net, (x,), "onnx", dtype="float32")
    assert {f.rule for f in caught.value.findings} == {"overflow"}
    assert "float32" not in caught.value.findings.errors[0].fix
    assert torch.allclose(deploy.convert(net, (x,), "reference")(x), net(x))


@pytest.mark.parametrize("name", UNROLLED)
def test_what_takes_all_steps_together_is_refused_step_by_step(name: str) -> None:
    shape, run = CASES[name]
    with pytest.raises(UnsupportedError, match=r"step by step:\n.*(together|step \d takes what)"):
        deploy.convert(Net(run, lif=LIFNode()), (rand(*shape),), "reference", time="stepped")


@pytest.mark.parametrize("target", ["reference", "onnx"])
@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.lif(x.sort(-1)[0]),
        lambda s, x: list(s.fc(s.lif(x)).sum(0).topk(2)),
        lambda s, x: s.lif(x.max(-1, keepdim=True)[0] + x.min(-1)[1].unsqueeze(-1)),
        lambda s, x: s.lif(x.gather(-1, x.argsort(-1)[..., 2:4])),
    ],
    ids=["sort", "topk", "max", "gather"],
)
def test_operators_with_several_results(run: Run, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(run, fc=nn.Linear(6, 6), lif=LIFNode()).eval()
    program = deploy.convert(net, (rand(*ROWS),), target)
    deploy.compile(program, tmp_path / "net", cache=False)
    with torch.no_grad(), deploy.load(tmp_path / "net") as model:
        x = rand(*ROWS, seed=1)
        assert all(map(torch.equal, pytree.tree_leaves(net(x)), pytree.tree_leaves(model(x))))


def test_the_order_of_equal_values_is_warned_of() -> None:
    """torch's topk on [0.25, 0, 0] gives any of the last two."""
    ties = Net(lambda s, x: list(s.lif(x).mean(0).topk(2)), lif=LIFNode()).eval()
    found = deploy.check(ties, (rand(*ROWS),), ["onnx", "reference"])
    assert [(f.rule, f.target, f.severity) for f in found] == [("ties", "onnx", "warning")]
    values = Net(lambda s, x: s.lif(x).mean(0).topk(2)[0], lif=LIFNode()).eval()
    assert not deploy.check(values, (rand(*ROWS),), ["onnx"])


def test_what_has_no_operators_says_what_to_do() -> None:
    net = Net(lambda s, x: s.lif(F.gelu(x)).mean(0).log_softmax(-1).topk(2)[1], lif=LIFNode())
    found = deploy.check(net.eval(), (rand(*ROWS),), ["lynxi"])
    fixes = {f.found: f.fix for f in found.errors if f.rule == "operator"}
    assert fixes.keys() == {"aten.gelu", "aten.log_softmax", "aten.topk"}
    assert "approximate='tanh'" in fixes["aten.gelu"]
    assert "leave it out of the network" in fixes["aten.log_softmax"] == fixes["aten.topk"]


def test_places_of_values_that_rounding_exchanges_are_explained() -> None:
    """A batch norm goes into the weights: of outputs that are equal, any may be the largest then."""
    torch.manual_seed(0)
    fc, norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
    with torch.no_grad():
        fc.weight[:] = fc.weight[0] * torch.linspace(1.0, 3.0, 6).reshape(6, 1)
        norm.running_var[:] = torch.linspace(1.0, 3.0, 6) ** 2 - norm.eps
        fc.bias.zero_()

    def run(s: Any, x: torch.Tensor) -> Any:
        drive = s.norm(s.fc(x.flatten(0, 1)))
        return s.lif(drive.unflatten(0, x.shape[:2])), drive.argmax(1)

    net = Net(run, fc=fc, norm=norm, lif=LIFNode()).eval()
    x = rand(T, 64, 6)
    program = deploy.convert(net, (x,), "reference")
    assert not torch.equal(program(x)[1], net(x)[1])
