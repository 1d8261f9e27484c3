"""The networks of snnTorch's tutorials and of its documentation, and inputs for each of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any

import snntorch as snn
import torch
from snntorch import surrogate, utils
from torch import nn
from torch.nn import functional

from spikeport.converters import sources
from spikeport.deploy import data

#: The threshold of neurons that are not meant to fire.
_NEVER = 20000


class Alone(nn.Module):
    """Tutorials 2 and 4: one neuron and a current at each step; its spikes and its potential."""

    def __init__(self, neuron: Any) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, current: torch.Tensor) -> Any:
        state = self.neuron.reset_mem()
        state = state if isinstance(state, tuple) else (state,)
        hears = isinstance(self.neuron, (snn.RLeaky, snn.RSynaptic))
        spikes, potentials = [], []
        for x in current:
            spk, *rest = self.neuron(x, *state)
            state = (spk, *rest) if hears else tuple(rest)
            spikes.append(spk)
            potentials.append(rest[-1])
        return torch.stack(spikes).flatten(2), torch.stack(potentials)


class Forward(nn.Module):
    """Tutorials 3 and 5, and the first on IPUs: 784-1000-10 of one kind of neuron, a static image."""

    def __init__(self, steps: int, neuron: Callable[[], Any], sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.fc = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.lif = nn.ModuleList(neuron() for _ in self.fc)

    def forward(self, x: torch.Tensor) -> Any:
        states = [lif.reset_mem() for lif in self.lif]
        spk_rec, mem_rec = [], []
        for _ in range(self.steps):
            spk = x.flatten(1)
            for i, (fc, lif) in enumerate(zip(self.fc, self.lif, strict=True)):
                state = states[i] if isinstance(states[i], tuple) else (states[i],)
                spk, *states[i] = lif(fc(spk), *state)
                states[i] = tuple(states[i])
            spk_rec.append(spk)
            mem_rec.append(states[-1][-1])
        return torch.stack(spk_rec), torch.stack(mem_rec)


class Inputs(nn.Module):
    """Tutorial 3: the spikes of 784 inputs at each of 200 steps, 1000 hidden neurons, 10 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(784, 1000), nn.Linear(1000, 10)
        self.lif1, self.lif2 = snn.Leaky(beta=0.99), snn.Leaky(beta=0.99)

    def forward(self, spk_in: torch.Tensor) -> Any:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        mem2_rec, spk1_rec, spk2_rec = [], [], []
        for step in range(spk_in.shape[0]):
            spk1, mem1 = self.lif1(self.fc1(spk_in[step]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            mem2_rec.append(mem2)
            spk1_rec.append(spk1)
            spk2_rec.append(spk2)
        return torch.stack(spk2_rec), torch.stack(spk1_rec), torch.stack(mem2_rec)


class Step(nn.Module):
    """Tutorial 6, the class: one step of 12C5-MP2-64C5-MP2-1024FC10, from the start at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc1 = (
            nn.Conv2d(1, 12, 5),
            nn.Conv2d(12, 64, 5),
            nn.Linear(64 * 4 * 4, 10),
        )
        self.lif1, self.lif2, self.lif3 = (snn.Leaky(beta=0.5) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        mem1, mem2, mem3 = (lif.init_leaky() for lif in (self.lif1, self.lif2, self.lif3))
        spk1, mem1 = self.lif1(functional.max_pool2d(self.conv1(x), 2), mem1)
        spk2, mem2 = self.lif2(functional.max_pool2d(self.conv2(spk1), 2), mem2)
        return self.lif3(self.fc1(spk2.view(x.shape[0], -1)), mem3)


class Hidden(nn.Module):
    """Tutorials 6 and 7 and others: an ``nn.Sequential`` whose neurons keep their states, in a loop.

    With ``steps`` the input is the same at each, without it has one for each.
    """

    def __init__(self, *layers: nn.Module, steps: int = 0) -> None:
        super().__init__()
        self.net, self.steps = nn.Sequential(*layers), steps

    def forward(self, x: torch.Tensor) -> Any:
        utils.reset(self.net)
        spk_rec, mem_rec = [], []
        for step in range(self.steps or x.shape[0]):
            spk, mem = self.net(x if self.steps else x[step])
            spk_rec.append(spk)
            mem_rec.append(mem)
        return torch.stack(spk_rec), torch.stack(mem_rec)


class Regression(nn.Module):
    """Regression I: 1-128-128-1, decays and thresholds a neuron each, the last potential read.

    ``written`` is the published code, in which the second layer runs through the last one's neurons.
    """

    def __init__(self, written: bool, hidden: int = 128) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid()
        self.written = written
        self.fc_in, self.fc_hidden, self.fc_out = (
            nn.Linear(1, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 1),
        )
        self.lif_in, self.lif_hidden = (
            snn.Leaky(
                beta=torch.rand(hidden),
                threshold=torch.rand(hidden),
                learn_beta=True,
                spike_grad=grad,
            )
            for _ in range(2)
        )
        self.li_out = snn.Leaky(
            beta=torch.rand(1), learn_beta=True, spike_grad=grad, reset_mechanism="none"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem1, mem2, mem3 = (lif.init_leaky() for lif in (self.lif_in, self.lif_hidden, self.li_out))
        middle = self.li_out if self.written else self.lif_hidden
        mem3_rec = []
        for step in range(x.shape[0]):
            spk, mem1 = self.lif_in(self.fc_in(x[step]), mem1)
            spk, mem2 = middle(self.fc_hidden(spk), mem2)
            _, mem3 = self.li_out(self.fc_out(spk), mem3)
            mem3_rec.append(mem3)
        return torch.stack(mem3_rec)


class Recurrent(nn.Module):
    """Regression II: 784-128-10, each layer of whose neurons hears its own last spikes."""

    def __init__(self, make: Callable[[int], Any], steps: int = 10, hidden: int = 128) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.fc2 = nn.Linear(784, hidden), nn.Linear(hidden, 10)
        self.rlif1, self.rlif2 = make(hidden), make(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state1, state2 = self.rlif1.reset_mem(), self.rlif2.reset_mem()
        spk_rec = []
        for _ in range(self.steps):
            state1 = self.rlif1(self.fc1(x.flatten(1)), *state1)
            state2 = self.rlif2(self.fc2(state1[0]), *state2)
            spk_rec.append(state2[0])
        return torch.stack(spk_rec)


class Autoencoder(nn.Module):
    """The spiking autoencoder: three convolutions down to 32 neurons and three up, 5 steps.

    All steps are encoded, then all are decoded; the last potential is the image.
    """

    def __init__(self, steps: int = 5, latent: int = 32) -> None:
        super().__init__()
        self.steps = steps

        def lif(**more: Any) -> Any:
            return snn.Leaky(
                beta=0.5, spike_grad=surrogate.atan(alpha=2.0), init_hidden=True, **more
            )

        def down(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1, stride=2), nn.BatchNorm2d(b), lif()]

        def up(a: int, b: int) -> nn.Module:
            return nn.ConvTranspose2d(a, b, 3, padding=1, stride=(2, 2), output_padding=1)

        self.encoder = nn.Sequential(
            *down(1, 32),
            *down(32, 64),
            *down(64, 128),
            nn.Flatten(start_dim=1, end_dim=3),
            nn.Linear(128 * 4 * 4, latent),
            lif(output=True),
        )
        self.linear = nn.Sequential(nn.Linear(latent, 128 * 4 * 4), lif(output=True))
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (128, 4, 4)),
            lif(),
            *(up(128, 64), nn.BatchNorm2d(64), lif()),
            *(up(64, 32), nn.BatchNorm2d(32), lif()),
            *(up(32, 1), lif(output=True, threshold=_NEVER)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (self.encoder, self.decoder, self.linear):
            utils.reset(part)
        latent = torch.stack([self.encoder(x)[0] for _ in range(self.steps)], dim=2)
        images = []
        for step in range(self.steps):
            spk, _ = self.linear(latent[..., step])
            images.append(self.decoder(spk)[1])
        return torch.stack(images, dim=4)[:, :, :, :, -1].flatten(1)


class Exoplanets(nn.Module):
    """The exoplanet hunter: 3197-128-64-2 with pooling over features, one step."""

    def __init__(self) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid(slope=25)
        self.fc1, self.fc2, self.fc3 = nn.Linear(3197, 128), nn.Linear(64, 64), nn.Linear(32, 2)
        self.lif1, self.lif2 = (snn.Leaky(beta=0.5, spike_grad=grad) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk1, mem1 = self.lif1(functional.max_pool1d(self.fc1(x), 2), mem1)
        spk2, mem2 = self.lif2(functional.max_pool1d(self.fc2(spk1), 2), mem2)
        return self.fc3(spk2.view(x.shape[0], -1))


class ForwardForward(nn.Module):
    """Forward-forward: 784-500-500 on each label drawn into the image; the goodness of each."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in ((784, 500), (500, 500)))
        self.lif = nn.ModuleList(snn.Leaky(beta=0.8) for _ in self.fc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        goodness = []
        for label in range(10):
            h = x.flatten(1).clone()
            h[:, :10] *= 0.0
            h[:, label] = x.max()
            layers = []
            for fc, lif in zip(self.fc, self.lif, strict=True):
                direction = h / (torch.norm(h, p=2, dim=1, keepdim=True) + 1e-4)
                _, h = lif(torch.mm(direction, fc.weight.T), lif.init_leaky())
                layers.append(h.pow(2).mean(1))
            goodness.append(sum(layers).unsqueeze(1))  # type: ignore[union-attr]
        return torch.cat(goodness, 1)


class Long(nn.Module):
    """The documented networks of SLSTM and SConv2dLSTM: two such layers and a readout."""

    def __init__(self, first: Any, second: Any, features: int) -> None:
        super().__init__()
        self.lstm1, self.lstm2 = first, second
        self.fc1, self.lif1 = nn.Linear(features, 10), snn.Leaky(beta=0.5)

    def forward(self, x: torch.Tensor) -> Any:
        (syn1, mem1), (syn2, mem2) = self.lstm1.reset_mem(), self.lstm2.reset_mem()
        mem3 = self.lif1.init_leaky()
        spk3_rec, mem3_rec = [], []
        for step in range(x.shape[0]):
            spk1, syn1, mem1 = self.lstm1(x[step], syn1, mem1)
            spk2, syn2, mem2 = self.lstm2(spk1, syn2, mem2)
            spk3, mem3 = self.lif1(self.fc1(spk2.flatten(1)), mem3)
            spk3_rec.append(spk3)
            mem3_rec.append(mem3)
        return torch.stack(spk3_rec), torch.stack(mem3_rec)


def _convolutional(steps: int, channels: int, second: int, side: int, grad: Any) -> nn.Module:
    """12C5-MP2-..C5-MP2-..FC10, as in tutorials 6 and 7."""

    def lif(**more: Any) -> Any:
        return snn.Leaky(beta=0.5, spike_grad=grad, init_hidden=True, **more)

    return Hidden(
        *(nn.Conv2d(channels, 12, 5), nn.MaxPool2d(2), lif()),
        *(nn.Conv2d(12, second, 5), nn.MaxPool2d(2), lif()),
        *(nn.Flatten(), nn.Linear(second * side * side, 10), lif(output=True)),
        steps=steps,
    )


def _population(outputs: int) -> nn.Module:
    """784-128-outputs, one step."""
    grad = surrogate.fast_sigmoid()
    lif = {"beta": 0.9, "spike_grad": grad, "init_hidden": True}
    return Hidden(
        *(nn.Flatten(), nn.Linear(784, 128), snn.Leaky(**lif)),
        *(nn.Linear(128, outputs), snn.Leaky(output=True, **lif)),
        steps=1,
    )


def _tactile() -> nn.Module:
    """ST-MNIST: 10x10-32c4-64c3-MP2-10, a frame at each of 89 steps."""
    lif = {"beta": 0.95, "init_hidden": True}
    return Hidden(
        *(nn.Conv2d(2, 32, 4), snn.Leaky(**lif), nn.Conv2d(32, 64, 3), snn.Leaky(**lif)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 2 * 2, 10), snn.Leaky(output=True, **lif)),
    )


def _speech() -> nn.Module:
    """Spiking Speech Commands: 350-512-512-512-512-35, 83 steps."""
    lif = {"beta": 0.95, "spike_grad": surrogate.atan(alpha=2), "init_hidden": True}
    hidden = [
        layer for a in (350, 512, 512, 512) for layer in (nn.Linear(a, 512), snn.Leaky(**lif))
    ]
    return Hidden(*hidden, nn.Dropout(0.4), nn.Linear(512, 35), snn.Leaky(output=True, **lif))


def _searched() -> nn.Module:
    """Optuna's: 784-299-299-10, decays learned a neuron each but for the first layer."""
    betas = iter((0.9, torch.rand(299), torch.rand(10)))
    learned = iter((False, True, True))
    return Forward(
        25, lambda: snn.Leaky(beta=next(betas), learn_beta=next(learned)), (784, 299, 299, 10)
    )


def _images(n: int) -> torch.Tensor:
    return data.load("fashion-mnist", limit=200).x[torch.randperm(200)[:n]]


def _large_images(n: int) -> torch.Tensor:
    return functional.interpolate(_images(n), size=(32, 32), mode="bilinear")


def _events(steps: int, *shape: int) -> Callable[[int], torch.Tensor]:
    return lambda n: (torch.rand(steps, n, *shape) < 0.1).float()


def _currents(steps: int, *shape: int) -> Callable[[int], torch.Tensor]:
    return lambda n: 0.6 * torch.rand(steps, n, *shape)


def _ramp(n: int) -> torch.Tensor:
    return torch.linspace(0, 1, 50).reshape(50, 1, 1) * torch.rand(1, n, 1)


_TWO = (784, 1000, 10)
#: The network of each tutorial, and n -> a batch of n samples for it.
TUTORIALS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "2 Lapicque": (
        lambda: Alone(snn.Lapicque(R=5.1, C=5e-3, time_step=1e-3)),
        _currents(200, 1),
    ),
    "2 Lapicque, no reset": (
        lambda: Alone(snn.Lapicque(R=5.1, C=5e-3, time_step=1e-3, reset_mechanism="none")),
        _currents(200, 1),
    ),
    "3 Leaky": (lambda: Alone(snn.Leaky(beta=0.8)), _currents(200, 1)),
    "3 feedforward": (Inputs, _events(200, 784)),
    "4 Synaptic": (lambda: Alone(snn.Synaptic(alpha=0.9, beta=0.8)), _currents(200, 1)),
    "4 Alpha": (
        lambda: Alone(snn.Alpha(alpha=0.8, beta=0.7, threshold=0.5)),
        _currents(200, 1),
    ),
    "3 Synaptic, older": (
        lambda: Forward(25, lambda: snn.Synaptic(alpha=0.9, beta=0.85), _TWO),
        _images,
    ),
    "5 fully connected": (lambda: Forward(25, lambda: snn.Leaky(beta=0.95), _TWO), _images),
    "6 class, one step": (Step, _images),
    "6 convolutional": (
        lambda: _convolutional(50, 1, 64, 4, surrogate.fast_sigmoid(slope=25)),
        _images,
    ),
    "7 N-MNIST": (lambda: _convolutional(0, 2, 32, 5, surrogate.atan()), _events(311, 2, 34, 34)),
    "population, 10": (lambda: _population(10), _images),
    "population, 500": (lambda: _population(500), _images),
    "regression 1": (lambda: Regression(written=False), _ramp),
    "regression 1, as written": (lambda: Regression(written=True), _ramp),
    "regression 2": (lambda: Recurrent(lambda n: snn.RLeaky(beta=0.9, linear_features=n)), _images),
    "regression 2, one to one": (
        lambda: Recurrent(lambda n: snn.RLeaky(beta=0.9, all_to_all=False)),
        _images,
    ),
    "regression 2, convolutional": (
        lambda: Alone(snn.RLeaky(beta=0.9, conv2d_channels=3, kernel_size=(5, 5))),
        _currents(10, 3, 32, 32),
    ),
    "IPU 1": (lambda: Forward(25, lambda: snn.Leaky(beta=0.9), _TWO), _images),
    "autoencoder": (Autoencoder, _large_images),
    "exoplanets": (Exoplanets, lambda n: torch.randn(n, 3197)),
    "forward-forward": (ForwardForward, _images),
    "ST-MNIST": (_tactile, _events(89, 2, 10, 10)),
    "speech commands": (_speech, _events(83, 350)),
    "Optuna": (_searched, _images),
    "RSynaptic": (
        lambda: Recurrent(lambda n: snn.RSynaptic(alpha=0.9, beta=0.5, linear_features=n)),
        _images,
    ),
    "SLSTM": (
        lambda: Long(snn.SLSTM(784, 100), snn.SLSTM(100, 100), 100),
        _events(25, 784),
    ),
    "SConv2dLSTM": (
        lambda: Long(
            snn.SConv2dLSTM(1, 8, 3, max_pool=2), snn.SConv2dLSTM(8, 16, 3, avg_pool=2), 49 * 16
        ),
        _events(10, 1, 28, 28),
    ),
}


def build(name: str) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    """The network in eval mode, and ``n -> a batch of n samples``."""
    torch.manual_seed(0)
    made, batch = TUTORIALS[name]
    net = made()
    _calibrate(net, batch(8))
    return net.eval(), batch


def _calibrate(net: nn.Module, x: torch.Tensor) -> None:
    """Let an untrained network fire as a trained one does.

    Batch norms take the statistics of a batch, and neurons that hardly fire, layer by layer, a threshold
    that their potentials reach.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 1.0
    for neuron in [m for m in net.modules() if hasattr(m, "reset_mem")]:
        rates, high = list[float](), list[float]()

        def watch(lif: Any, _: Any, out: Any, rates: Any = rates, high: Any = high) -> None:
            rates.append((out[0] if isinstance(out, tuple) else out).mean().item())
            high.append(lif.mem.quantile(0.9).item())

        hook = neuron.register_forward_hook(watch)
        with torch.no_grad():
            net(x)
        hook.remove()
        if neuron.threshold.numel() == 1 and neuron.threshold < _NEVER and mean(rates) < 0.02:
            neuron.threshold.data.fill_(max(round(max(high) / 2, 3), 0.001))
    sources.reset(net)
