"""The fused kernels against the declaration evaluated by torch."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

from spikeport.converters import neurons, sources, surrogates
from spikeport.converters.errors import DeviceError, TargetUnavailableError, UsageError
from spikeport.converters.neurons import Neuron
from spikeport.targets import cuda
from spikeport.targets.cuda import kernels


@neurons.dynamics(states={"w": 0.0, "s": 0.0})
def AdaptiveLIF(v, w, s, x, *, tau, tau_w, a, b):  # noqa: N802
    w = w + b * s
    return v + (x - v - w) / tau, w + (a * v - w) / tau_w


@neurons.dynamics
def QuadraticNeuron(v, x, *, tau, v_c, a_0):  # noqa: N802
    return v + (x + a_0 * v * (v - v_c)) / tau


@neurons.dynamics
def ExponentialNeuron(v, x, *, tau, delta):  # noqa: N802
    return v + (x - v + delta * neurons.exp((v - 0.5) / delta)) / tau


@neurons.dynamics
def Bounded(v, x, *, w, k=3):  # noqa: N802
    return neurons.tanh(w * v) + abs(x) ** k


KINDS: dict[str, tuple[Any, dict[str, float]]] = {
    "IF": (neurons.IF, {}),
    "LIF": (neurons.LIF, {"tau": 3.0, "v_rest": 0.0}),
    "LIF-no-decay": (neurons.LIF, {"tau": 2.0, "v_rest": 0.1, "decay_input": False}),
    "PLIF": (neurons.ParametricLIF, {"w": 0.3, "v_rest": 0.0}),
    "Adaptive": (AdaptiveLIF, {"tau": 2.0, "tau_w": 4.0, "a": 0.5, "b": 0.25}),
    "QIF": (QuadraticNeuron, {"tau": 2.0, "v_c": 0.8, "a_0": 1.0}),
    "EIF": (ExponentialNeuron, {"tau": 2.0, "delta": 0.5}),
    "Bounded": (Bounded, {"w": 0.7}),
}

#: Kinds whose charge goes through exp, which Triton and torch round apart.
INEXACT = ("PLIF", "EIF", "Bounded")


def drive(T: int, *shape: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Input on a grid of eighths, which reaches thresholds exactly, shifted for half of it."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randint(-6, 27, (T, *shape), generator=generator) / 8
    off = torch.rand(T, *shape, generator=generator) * (torch.arange(shape[-1]) % 2)
    return (grid + off).to(device)


def pair(kind: Any, params: dict[str, Any], **options: Any) -> tuple[cuda.Node, cuda.Node]:
    """The same layer for torch and fused, with their own tensors."""

    def node(backend: Any) -> cuda.Node:
        own = {n: copy.deepcopy(v) for n, v in params.items()}
        rest = {n: copy.deepcopy(v) for n, v in options.items()}
        return cuda.Node(kind, **own, **rest, backend=backend)

    return node("torch"), node("fused")


def compare(
    reference: cuda.Node,
    fused: cuda.Node,
    x: torch.Tensor,
    exact: bool = True,
    tolerance: float = 1e-6,
) -> torch.Tensor:
    """Check spikes and every gradient of one call; gives the spikes.

    The reference runs on the CPU: on a GPU torch divides by a number as a product with its inverse.
    """
    reference = reference.cpu()
    a, b = x.cpu().clone().requires_grad_(), x.clone().requires_grad_()
    expected, spikes = reference(a), fused(b)
    differ = spikes.cpu() != expected
    if exact:
        assert not differ.any()
    else:
        h = reference.neuron.trace(x.cpu())[1]
        assert ((h[differ] - reference.neuron.v_threshold).abs() < 1e-5).all()
        assert differ.float().mean() < 1e-3
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(g)
    spikes.backward(g.to(x))
    assert relative(b.grad, a.grad) <= tolerance
    for (name, p), q in zip(reference.named_parameters(), fused.parameters(), strict=True):
        assert q.grad is not None, name
        assert q.grad.shape == p.shape
        assert relative(q.grad, p.grad) <= 4 * tolerance, name
    return spikes.detach()


def relative(a: Any, b: Any) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item()


class TestEquality:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("T", [1, 5, 16, 17, 40])
    def test_every_kind_over_chunks_and_tails(self, kind: str, T: int, device: str) -> None:
        reference, fused = pair(*KINDS[kind])
        x = drive(T, 2, 33, device=device)
        spikes = compare(reference, fused, x, kind not in INEXACT, tolerance=2e-6)
        assert 0.02 < spikes.mean() < 0.98

    @pytest.mark.parametrize(
        ("v_reset", "reset_at", "fires", "detach"),
        [*itertools.product([0.0, -0.25, None], ["now", "next"], [">=", ">"], [False, True])],
    )
    def test_every_population(
        self, v_reset: Any, reset_at: str, fires: str, detach: bool, device: str
    ) -> None:
        options = {"v_reset": v_reset, "reset_at": reset_at, "fires": fires}
        options |= {"detach_reset": detach, "v_0": 1.25}
        for kind in ("LIF", "Adaptive"):
            compare(*pair(*KINDS[kind], **options), drive(6, 1, 40, device=device))

    @pytest.mark.parametrize("surrogate", [k() for k in surrogates.KINDS.values()], ids=repr)
    def test_every_surrogate(self, surrogate: surrogates.Surrogate, device: str) -> None:
        if surrogate.name == "Tenth":
            pytest.skip("declared by another test")
        if surrogate.name == "SparseFastSigmoid":
            surrogate = surrogates.SparseFastSigmoid(bound=0.1)  # by default beyond these h
        x = drive(4, 2, 64, device=device) + 1e-3  # clear of the jumps of those that have some
        compare(*pair(*KINDS["LIF"], surrogate=surrogate), x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("T", [4, 20, 32, 36])
    def test_half_precision_computes_in_float32(
        self, dtype: torch.dtype, T: int, device: str
    ) -> None:
        node = cuda.LIFNode(tau=3.0, backend="fused")
        x = drive(T, 2, 50, device=device).to(dtype)
        a, b = x.float().requires_grad_(), x.clone().requires_grad_()
        expected = neurons.LIFNode(tau=3.0)(a)
        spikes = node(b)
        assert spikes.dtype == dtype
        assert torch.equal(spikes.float(), expected)
        g = torch.randn_like(x)
        expected.backward(g.float())
        spikes.backward(g)
        assert b.grad.dtype == dtype
        # Rounded once, at the end.
        assert torch.equal(b.grad, a.grad.to(dtype)) or relative(b.grad, a.grad) < 2**-8

    def test_infinity_and_nan_flow_as_in_torch(self, device: str) -> None:
        x = drive(6, 1, 64, device=device)
        x[1, 0, 3], x[2, 0, 5], x[3, 0, 7] = float("inf"), float("nan"), float("-inf")
        for v_reset in (0.0, None):
            reference, fused = pair(*KINDS["LIF"], v_reset=v_reset, store_v_seq=True)
            assert torch.equal(fused(x).cpu(), reference(x.cpu()))
            v = fused.v_seq.cpu()
            assert torch.equal(v.isnan(), reference.v_seq.isnan())
            assert v.isnan().any()
            assert torch.equal(v.nan_to_num(), reference.v_seq.nan_to_num())

    @pytest.mark.parametrize("T", [1, 6, 16, 32, 35])
    @pytest.mark.parametrize("surrogate", ["ATan", "Rectangle"])
    def test_their_gradients_do(self, T: int, surrogate: str, device: str) -> None:
        x = drive(T, 1, 64, device=device)
        wrong = torch.tensor([float("inf"), float("nan"), float("-inf"), 1e30], device=device)
        x[-1, 0, :4] = x[T // 2, 0, 8:12] = wrong
        for given in ({"v_reset": 0.0}, {"v_reset": None}, {"detach_reset": True}):
            for of_v in (False, True):
                gradients = []
                options = {**given, "surrogate": surrogates.named(surrogate)()}
                for node in pair(*KINDS["LIF"], store_v_seq=True, **options):
                    leaf = x.to("cpu" if node.backend == "torch" else device, copy=True)
                    spikes = node(leaf.requires_grad_())
                    loss = spikes.sum() + node.v_seq.sum() if of_v else spikes.sum()
                    loss.backward()
                    gradients.append(leaf.grad.cpu())
                assert torch.equal(*(g.isnan() for g in gradients))
                torch.testing.assert_close(*gradients, equal_nan=True)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("options", [{}, {"v_reset": None}], ids=["hard", "soft"])
    def test_whole_chunks_end_with_no_gradient_of_the_state(
        self, kind: str, options: dict[str, Any], device: str
    ) -> None:
        x = drive(2 * kernels.CHUNK, 1, 8, device=device) / 4
        x[-1, 0, :3] = torch.tensor([float("inf"), float("nan"), float("-inf")], device=device)
        gradients = []
        for node in pair(*KINDS[kind], surrogate=surrogates.Rectangle(), **options):
            leaf = x.to("cpu" if node.backend == "torch" else device, copy=True)
            node(leaf.requires_grad_()).sum().backward()
            gradients.append([leaf.grad.cpu(), *(p.grad.cpu() for p in node.parameters())])
        assert gradients[0][0][:-1].isfinite().all()
        for theirs, ours in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    shape = x.shape[:2]
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape)


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x,
    "channels-last": channels_last,
    "batch-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second step": lambda x: x.repeat_interleave(2, 0)[::2],
    "a slice of channels": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "a slice of columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(-1, -3).contiguous().transpose(-1, -3),
    "the same at every step": lambda x: x[:1].expand_as(x),
}


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("param", ["scalar", "channel", "row", "neuron", "checkered"])
    def test_right_in_every_layout(self, layout: str, param: str, device: str) -> None:
        shape = {
            "scalar": (),
            "channel": (6, 1, 1),
            "row": (4, 1),
            "neuron": (6, 4, 5),
            "checkered": (6, 1, 5),
        }[param]
        tau = nn.Parameter(2 + torch.rand(shape, generator=torch.Generator().manual_seed(2)))
        kind, params = neurons.LIF, {"tau": tau.to(device), "v_rest": 0.0}
        params["tau"] = nn.Parameter(params["tau"].detach())
        x = LAYOUTS[layout](drive(5, 3, 6, 4, 5, device=device))
        reference, fused = pair(kind, params)
        a = x.detach().contiguous().requires_grad_()
        b = x.detach().requires_grad_() if layout != "the same at every step" else x
        expected, spikes = reference(a), fused(b)
        # A division by a tensor is a division in both, so nothing may differ.
        assert torch.equal(spikes, expected)
        g = torch.rand_like(
            expected
        )  # of one sign, so that the sum over neurons is well conditioned
        expected.backward(g)
        spikes.backward(g)
        assert relative(fused.tau.grad, reference.tau.grad) < 4e-6
        if b.grad is not None:
            assert relative(b.grad, a.grad) < 1e-6

    @pytest.mark.parametrize(
        ("layout", "copied"),
        [
            ("contiguous", False),
            ("channels-last", False),
            ("batch-first", False),
            ("every second step", False),
            ("a slice of channels", False),
            ("the same at every step", False),
        ],
    )
    def test_nothing_is_copied(self, layout: str, copied: bool) -> None:
        x = LAYOUTS[layout](drive(5, 3, 6, 4, 5))
        read, _ = kernels.layout(x)
        assert (read.data_ptr() != x.data_ptr()) == copied

    def test_spikes_of_channels_last_are_channels_last(self, device: str) -> None:
        x = channels_last(drive(2, 3, 6, 4, 5, device=device))
        spikes = cuda.IFNode(backend="fused")(x)
        assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 4), (4, 3, 0)])
    def test_nothing_to_do(self, shape: tuple[int, ...], device: str) -> None:
        node = cuda.LIFNode(tau=nn.Parameter(torch.tensor(2.0, device=device)), backend="fused")
        x = torch.zeros(shape, device=device, requires_grad=True)
        spikes = node(x)
        assert spikes.shape == shape
        spikes.sum().backward()
        assert x.grad.shape == shape
        assert node.tau.grad == 0
        assert cuda.LIFNode(backend="torch")(x).shape == shape


class TestLearned:
    def test_every_parameter_of_a_population(self, device: str) -> None:
        def learned(*shape: int, around: float) -> nn.Parameter:
            generator = torch.Generator().manual_seed(3)
            return nn.Parameter((around + torch.rand(shape, generator=generator) / 4).to(device))

        options = {
            "v_threshold": learned(5, 1, around=0.9),
            "v_reset": learned(around=-0.2),
            "v_0": learned(5, 7, around=0.1),
        }
        params = {"tau": learned(7, around=2.0), "v_rest": learned(around=0.0)}
        for T in (6, 20):
            compare(*pair(neurons.LIF, params, **options), drive(T, 3, 5, 7, device=device))

    def test_plif_learns_the_same(self, device: str) -> None:
        results = []
        for backend in ("torch", "fused"):
            node = cuda.ParametricLIFNode(backend=backend).to(device)
            optimizer = torch.optim.SGD(node.parameters(), lr=0.1)
            for step in range(4):
                optimizer.zero_grad()
                (node(drive(4, 2, 32, device=device, seed=step)).mean() - 0.1).square().backward()
                optimizer.step()
            results.append(node.w.item())
        assert results[0] != 0
        assert results[1] == pytest.approx(results[0], rel=1e-5)


class TestState:
    @pytest.mark.parametrize("backend", ["torch", "fused"])
    @pytest.mark.parametrize("kind", ["LIF", "Adaptive"])
    @pytest.mark.parametrize("reset_at", ["now", "next"])
    def test_parts_of_a_sequence_equal_the_whole(
        self, backend: Any, kind: str, reset_at: Any, device: str
    ) -> None:
        kind_, params = KINDS[kind]
        options = {"reset_at": reset_at, "backend": backend}
        x = drive(9, 2, 20, device=device)
        whole = cuda.Node(kind_, **params, **options)(x)
        node = cuda.Node(kind_, **params, **options, keep_state=True)
        assert torch.equal(torch.cat([node(x[:2]), node(x[2:5]), node(x[5:])]), whole)
        node.reset()
        assert torch.equal(node(x), whole)
        single = cuda.Node(kind_, **params, **options, step_mode="s")
        assert torch.equal(torch.stack([single(x_t) for x_t in x]), whole)
        assert torch.equal(single.v, node.v)

    @pytest.mark.parametrize("T", [6, 23, 43])
    def test_gradients_flow_through_a_kept_state_until_it_is_detached(
        self, T: int, device: str
    ) -> None:
        for detach in (False, True):
            grads = []
            for backend in ("torch", "fused"):
                node = cuda.LIFNode(tau=3.0, keep_state=True, backend=backend)
                x = drive(T, 1, 30, device=device).requires_grad_()
                node(x[:3])
                if detach:
                    node.detach()
                node(x[3:]).sum().backward()
                grads.append(x.grad)
            assert relative(grads[1], grads[0]) < 1e-6
            assert bool(grads[0][:3].any()) != detach

    def test_gradients_of_the_membrane(self, device: str) -> None:
        grads = []
        for backend in ("torch", "fused"):
            kind, params = KINDS["Adaptive"]
            options = {"keep_state": True, "store_v_seq": True, "backend": backend}
            node = cuda.Node(kind, **params, **options)
            x = drive(20, 1, 30, device=device).requires_grad_()
            spikes = node(x)
            weight = torch.linspace(0.5, 1, 20, device=device).reshape(-1, 1, 1)
            (node.v_seq * weight + spikes).sum().backward(retain_graph=True)
            (node.state[1] ** 2).sum().backward()
            grads.append(x.grad)
        assert relative(grads[1], grads[0]) < 1e-6

    def test_a_state_of_another_shape(self, device: str) -> None:
        node = cuda.IFNode(keep_state=True)
        node(drive(2, 4, 3, device=device))
        with pytest.raises(UsageError, match=re.escape("[4, 3]") + r".*call reset\(\)"):
            node(drive(2, 5, 3, device=device))

    def test_copies_and_pickles_take_the_state_along(self, device: str) -> None:
        node = cuda.ParametricLIFNode(keep_state=True, store_v_seq=True).to(device)
        x = drive(6, 2, 3, device=device).requires_grad_()
        node(x[:3])
        twin = copy.deepcopy(node)
        file = io.BytesIO()
        torch.save(node, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        expected = node(x[3:])
        assert torch.equal(twin(x[3:]), expected)
        assert torch.equal(loaded(x[3:]), expected)
        assert node.state_dict().keys() == {"w"}

    def test_the_converter_resets_it(self, device: str) -> None:
        node = cuda.IFNode(keep_state=True)
        node(drive(2, 4, 3, device=device))
        sources.reset(nn.Sequential(node))
        assert node.v is None


class TestTorch:
    def test_opcheck(self, device: str) -> None:
        importlib.import_module("spikeport.targets.cuda.ops")  # where they are registered
        for T, states in ((3, False), (20, True)):
            neuron = Neuron(AdaptiveLIF, {**KINDS["Adaptive"][1], "tau": torch.tensor(2.0)})
            tau = torch.tensor(2.0, device=device, requires_grad=True)
            x = drive(T, 2, 9, device=device).requires_grad_()
            initial = torch.zeros(3, 2, 9, device=device) if states else None
            surrogate = surrogates.ATan().to_json()
            args = (x, [], [tau], initial, neuron.to_json(), surrogate, False, False)
            torch.library.opcheck(
                torch.ops.spikeport.fused_neuron.default, (*args, states, states, True, (1, 1))
            )

    def test_compile_whole_graph(self, device: str) -> None:
        torch.manual_seed(0)
        net = cuda.LayerByLayer(
            nn.Linear(6, 8), cuda.LIFNode(tau=3.0, backend="fused"), nn.Linear(8, 3)
        ).to(device)
        x = drive(4, 2, 6, device=device)
        expected = net(x)
        expected.sum().backward()
        grads = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        y = compiled(x)
        y.sum().backward()
        assert torch.allclose(y, expected)
        for p, g in zip(net.parameters(), grads, strict=True):
            assert torch.allclose(p.grad, g, atol=1e-6)

    def test_export(self, device: str) -> None:
        net = cuda.LayerByLayer(nn.Linear(6, 8), cuda.LIFNode(tau=3.0, backend="fused")).to(device)
        x = drive(4, 2, 6, device=device)
        exported = torch.export.export(net, (x,))
        assert "fused_neuron" in str(exported.graph)
        assert torch.equal(exported.module()(x), net(x))

    def test_gradcheck_of_the_smooth_part(self) -> None:
        node = cuda.LIFNode(tau=3.0, v_threshold=50.0, store_v_seq=True, backend="torch")

        def membrane(x: torch.Tensor) -> torch.Tensor:
            node(x)
            return node.v_seq

        x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(membrane, x)


class TestBadInput:
    def test_fused_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        x = drive(2, 1, 3)
        with pytest.raises(
            TargetUnavailableError, match=r"on cpu; move the network.*backend='auto'"
        ):
            cuda.IFNode(backend="fused")(x)
        assert torch.equal(cuda.IFNode()(x), neurons.IFNode()(x))

    def test_a_dtype_that_it_has_not(self, device: str) -> None:
        x = drive(2, 1, 3, device=device).double()
        with pytest.raises(UsageError, match=r"takes float32, float16, bfloat16, not float64"):
            cuda.IFNode(backend="fused")(x)
        assert torch.equal(cuda.IFNode()(x), neurons.IFNode()(x))

    def test_all_problems_at_once(self, device: str) -> None:
        node = cuda.LIFNode(
            tau=nn.Parameter(torch.ones(4, 1, 1, device=device)),
            v_threshold=torch.ones(3, device="meta"),
        )
        with pytest.raises(
            UsageError, match=r"(?s)tau has shape \[4, 1, 1\].*v_threshold is on meta"
        ):
            node(drive(2, 1, 5, 2, 3, device=device))

    def test_an_input_without_time(self, device: str) -> None:
        with pytest.raises(UsageError, match=r"shape \[3\]; allowed: \[T, N, \.\.\.\]"):
            cuda.IFNode()(torch.zeros(3, device=device))

    @pytest.mark.parametrize("option", [{"backend": "cupy"}, {"step_mode": "multi"}])
    def test_options(self, option: dict[str, str]) -> None:
        name, value = next(iter(option.items()))
        with pytest.raises(UsageError, match=f"{name} is '{value}'; allowed: "):
            cuda.IFNode(**option)

    def test_out_of_memory_names_the_size(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        x = drive(4, 2, 8, device=device)
        monkeypatch.setattr(kernels.torch, "empty_strided", full)
        with pytest.raises(DeviceError, match=r"\[4, 2, 8\] in torch.float32 needs 0.00 GiB more"):
            cuda.IFNode(backend="fused")(x)
        monkeypatch.undo()
        monkeypatch.setattr(torch.Tensor, "contiguous", full)
        with pytest.raises(DeviceError, match=r"\[4, 8, 8\] in torch.float32 needs"):
            cuda.IFNode(backend="fused")(
                drive(4, 8, 8, device=device).as_strided((4, 8, 8), (64, 8, 0))
            )

    def test_a_power_that_kernels_have_not(self, device: str) -> None:
        @neurons.dynamics
        def Root(v, x):  # noqa: N802
            return v + abs(x) ** 1.7

        with pytest.raises(
            UsageError, match=r"powers of 0.5 and of whole numbers.*backend='torch'"
        ):
            cuda.Node(Root, backend="fused")(drive(2, 1, 3, device=device))


def test_the_source_can_be_read() -> None:
    node = cuda.LIFNode(tau=3.0)
    kernel = cuda.kernel(node, drive(2, 1, 3))
    assert "def forward(x_ptr, spikes_ptr, N" in kernel.source
    assert "def backward(x_ptr, g_spikes_ptr, g_x_ptr, N" in kernel.source
    assert "tl.div_rn" in kernel.forward
