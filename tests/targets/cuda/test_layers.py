"""Containers, and batch norm inside the neuron's kernel."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikeport.converters.errors import UsageError
from spikeport.targets import cuda
from tests.targets.cuda.test_fused import LAYOUTS, drive, relative


def normalised(C: int, device: str, **options: Any) -> nn.BatchNorm2d:
    torch.manual_seed(C)
    norm = nn.BatchNorm2d(C, **options)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0, 1)
    if norm.track_running_stats:
        nn.init.uniform_(norm.running_mean, 0.2, 0.4)
        nn.init.uniform_(norm.running_var, 0.5, 0.8)
    return norm.to(device)


def apart(norm: nn.Module, node: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return node(norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class TestBatchNorm:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("C", "H", "T", "layout"),
        [
            # One layout of each size every day; all of them take a minute and a half.
            pytest.param(*size, layout, marks=[pytest.mark.slow] * (i != j))
            for i, size in enumerate([(6, 5, 4), (130, 1, 2), (20, 3, 18)])
            for j, layout in enumerate(["contiguous", "a slice of columns", "channels-last"])
        ],
    )
    def test_equal_to_both_apart(
        self, C: int, H: int, T: int, layout: str, training: bool, device: str
    ) -> None:
        x = LAYOUTS[layout](drive(T, 3, C, H, H + 1, device=device))
        norms = [normalised(C, device).train(training) for _ in range(2)]
        tau = torch.rand(C, 1, 1, generator=torch.Generator().manual_seed(0)) + 2
        nodes = [
            cuda.LIFNode(tau=nn.Parameter(tau.clone().to(device)), backend=backend)
            for backend in ("torch", "fused")
        ]
        a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
        expected = apart(norms[0], nodes[0], a)
        spikes = cuda.batch_norm_neuron(norms[1], nodes[1], b)
        assert 0.02 < expected.mean() < 0.98
        assert torch.equal(spikes, expected)
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        expected.backward(g)
        spikes.backward(g)
        assert relative(b.grad, a.grad) < 2e-6
        assert relative(nodes[1].tau.grad, nodes[0].tau.grad) < 4e-6
        for p, q in zip(norms[0].parameters(), norms[1].parameters(), strict=True):
            assert relative(q.grad, p.grad) < 4e-6
        for p, q in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
            assert torch.allclose(q, p, atol=1e-6)

    @pytest.mark.parametrize(
        "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
    )
    def test_options_of_the_norm(self, options: dict[str, Any], device: str) -> None:
        x = drive(4, 3, 6, 5, 4, device=device)
        norms = [normalised(6, device, **options) for _ in range(2)]
        for _ in range(2):
            expected = apart(norms[0], cuda.IFNode(backend="torch"), x)
            assert torch.equal(cuda.batch_norm_neuron(norms[1], cuda.IFNode(), x), expected)
        for p, q in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
            assert torch.allclose(q, p, atol=1e-6)

    def test_half_precision(self, device: str) -> None:
        x = drive(4, 3, 6, 5, 4, device=device).half()
        norm, node = normalised(6, device), cuda.IFNode(backend="fused")
        wide = copy.deepcopy(norm)
        a, b = x.float().requires_grad_(), x.clone().requires_grad_()
        expected = apart(wide, cuda.IFNode(backend="torch"), a)
        spikes = cuda.batch_norm_neuron(norm.half(), node, b)
        assert spikes.dtype == torch.half
        differ = (spikes.float() != expected).float().mean()
        assert differ < 0.02  # the norm's own weights were rounded
        spikes.backward(torch.ones_like(spikes))
        assert norm.weight.grad.dtype == torch.half
        assert b.grad.isfinite().all()

    def test_a_mean_far_from_zero_keeps_its_precision(self, device: str) -> None:
        x = drive(4, 3, 6, 5, 4, device=device) + 1000
        norm = normalised(6, device)
        double = copy.deepcopy(norm).double()
        h = double(x.double().flatten(0, 1)).unflatten(0, (4, 3))
        expected = cuda.IFNode(backend="torch")(h)
        spikes = cuda.batch_norm_neuron(norm, cuda.IFNode(), x)
        assert (spikes != expected).float().mean() < 0.01

    def test_another_number_of_channels(self, device: str) -> None:
        with pytest.raises(UsageError, match=r"of 6 channels got x_seq \[4, 3, 5, 2, 2\]"):
            cuda.batch_norm_neuron(
                normalised(6, device), cuda.IFNode(), drive(4, 3, 5, 2, 2, device=device)
            )


def network(backend: Any = "fused") -> cuda.LayerByLayer:
    torch.manual_seed(0)
    net = cuda.LayerByLayer(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        cuda.LIFNode(tau=3.0, backend=backend),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
        cuda.ParametricLIFNode(backend=backend),
    )
    nn.init.uniform_(net[1].bias, 0.5, 1.0)
    nn.init.uniform_(net[5].weight, 0.0, 0.5)
    return net


class TestPooling:
    @pytest.mark.parametrize("layout", ["contiguous", "channels-last", "a slice of columns"])
    @pytest.mark.parametrize(
        ("T", "window", "norm"), [(4, (2, 2), True), (18, (1, 3), False), (3, (3, 2), False)]
    )
    def test_equal_to_a_layer_of_its_own(
        self, layout: str, T: int, window: tuple[int, int], norm: bool, device: str
    ) -> None:
        C, H, W = 5, 6, 12
        x = LAYOUTS[layout](drive(T, 2, C, H, W, device=device))
        tau = (torch.rand(C, 1, 1, generator=torch.Generator().manual_seed(0)) + 2).to(device)
        a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
        v_0 = nn.Parameter(torch.tensor(0.25, device=device))
        nodes = [
            cuda.LIFNode(tau=nn.Parameter(tau.clone()), v_0=copy.deepcopy(v_0), backend=backend)
            for backend in ("torch", "fused")
        ]
        first = [normalised(C, device) if norm else nn.Identity() for _ in nodes]
        expected = F.max_pool2d(apart(first[0], nodes[0], a).flatten(0, 1), window)
        net = cuda.LayerByLayer(first[1], nodes[1], nn.MaxPool2d(window))
        with calls_of(nn.MaxPool2d) as pooled:
            spikes = net(b).flatten(0, 1)
        assert not pooled
        assert 0.02 < expected.mean() < 0.98
        assert torch.equal(spikes, expected)
        g = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1)).to(device)
        expected.backward(g)
        spikes.backward(g)
        assert relative(b.grad, a.grad) < 2e-6
        for p, q in zip(
            [*nodes[0].parameters(), *first[0].parameters()],
            [*nodes[1].parameters(), *first[1].parameters()],
            strict=True,
        ):
            assert relative(q.grad, p.grad) < 4e-6

    @pytest.mark.parametrize(
        "pool",
        [
            nn.MaxPool2d(2, 1),
            nn.MaxPool2d(3, 3, padding=1),
            nn.MaxPool2d(2, dilation=2),
            nn.MaxPool2d(4),
            nn.MaxPool2d(5),
            nn.AvgPool2d(2),
        ],
        ids=str,
    )
    def test_other_poolings_stay_layers(self, pool: nn.Module, device: str) -> None:
        x = drive(8, 2, 3, 6, 6, device=device)
        net = cuda.LayerByLayer(cuda.IFNode(backend="fused"), pool)
        alone = cuda.IFNode(backend="torch")(x).flatten(0, 1)
        with calls_of(type(pool)) as pooled:
            y = net(x)
        assert pooled
        assert torch.equal(y.flatten(0, 1), pool(alone))

    def test_a_parameter_of_each_place_keeps_it_a_layer(self, device: str) -> None:
        tau = nn.Parameter(torch.rand(3, 6, 6, device=device) + 2)
        node = cuda.LIFNode(tau=tau, backend="fused")
        x = drive(4, 2, 3, 6, 6, device=device)
        y = cuda.LayerByLayer(node, nn.MaxPool2d(2))(x)
        assert torch.equal(y.flatten(0, 1), F.max_pool2d(node(x).flatten(0, 1), 2))


@contextmanager
def calls_of(kind: type[nn.Module]) -> Iterator[list[nn.Module]]:
    """The layers of this kind that are called."""
    calls: list[nn.Module] = []
    forward = kind.forward

    def counted(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", counted)
        yield calls


class TestLayerByLayer:
    def test_the_norm_and_the_neuron_after_it_are_one_call(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        net, x = network().to(device), drive(4, 3, 2, 4, 4, device=device)
        called = []
        monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *_: called.append("norm"))
        net(x)
        assert not called

    def test_equal_to_the_layers_one_by_one(self, device: str) -> None:
        x = drive(4, 3, 2, 4, 4, device=device)
        fused, plain = network().to(device), network("torch").to(device)
        y, expected = fused(x), plain(x)
        assert torch.equal(y, expected)
        assert 0 < y.mean() < 1
        y.sum().backward()
        expected.sum().backward()
        for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
            assert torch.allclose(q.grad, p.grad, rtol=1e-4, atol=1e-6), name

    def test_step_by_step_gives_the_same(self, device: str) -> None:
        net, x = network().to(device).eval(), drive(4, 3, 2, 4, 4, device=device)
        expected = net(x)
        assert torch.equal(net.step_by_step(x), expected)
        assert torch.equal(net.step_by_step(x), expected)  # no state is left behind
        assert all(m.step_mode == "m" for m in net.modules() if isinstance(m, cuda.FusedNode))

    def test_a_hook_keeps_the_norm_a_layer_of_its_own(self, device: str) -> None:
        net, x = network().to(device), drive(4, 3, 2, 4, 4, device=device)
        seen: list[torch.Size] = []
        net[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))
        net(x)
        assert seen == [torch.Size([12, 6, 4, 4])]

    def test_the_state_dict_is_that_of_a_sequence(self) -> None:
        plain = nn.Sequential(*network())
        assert network().state_dict().keys() == plain.state_dict().keys()


def test_seq_to_ann_folds_time(device: str) -> None:
    x = drive(4, 3, 2, 4, 4, device=device)
    conv, pool = nn.Conv2d(2, 5, 3).to(device), nn.MaxPool2d(2)
    y = cuda.SeqToANN(conv, pool)(x)
    assert torch.equal(y, torch.stack([pool(conv(x_t)) for x_t in x]))
