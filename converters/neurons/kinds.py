"""The kinds of neurons that come with spikeport, each by its charge equation."""

from __future__ import annotations

from typing import Any

from ..equations import dynamics, exp, relu, sigmoid


@dynamics(potentials=())
def IF(v: Any, x: Any) -> Any:
    """Integrate-and-fire: h = v + x."""
    return v + x


@dynamics(potentials=("v_rest",))
def LIF(
    v: Any, x: Any, *, tau: Any, v_rest: Any, decay_input: bool = True, factored: bool = False
) -> Any:
    """Leaky integrate-and-fire with membrane time constant tau, in time steps.

    Gerstner et al., Neuronal Dynamics, eq. 1.5, by forward Euler with a step of 1; without
    decay_input, x is a jump of the potential. ``factored`` is the same equation for v_rest = 0 in
    the order of rounding of SpikingJelly 0.0.0.0.14.
    """
    if decay_input:
        return v + (x - (v - v_rest)) / tau
    if factored:
        return v * (1.0 - 1.0 / tau) + x
    return v - (v - v_rest) / tau + x


@dynamics(potentials=("v_rest",))
def ParametricLIF(
    v: Any, x: Any, *, w: Any, v_rest: Any, decay_input: bool = True, factored: bool = False
) -> Any:
    """LIF with a learned 1 / tau = sigmoid(w), Fang et al. 2021, arXiv:2007.05785, eq. 10."""
    if decay_input:
        return v + (x - (v - v_rest)) * sigmoid(w)
    if factored:
        return v * (1.0 - sigmoid(w)) + x
    return v - (v - v_rest) * sigmoid(w) + x


@dynamics(potentials=())
def Leaky(v: Any, x: Any, *, beta: Any) -> Any:
    """LIF with decay rate beta: h = beta v + x, Eshraghian et al. 2023, arXiv:2109.12894, eq. 4."""
    return beta * v + x


@dynamics(potentials=())
def Lapicque(v: Any, x: Any, *, R: Any, C: Any, dt: Any) -> Any:
    """RC circuit, forward Euler: h = (dt / RC) R x + (1 - dt / RC) v; dt in the unit of RC.

    Lapicque's model as in Eshraghian et al. 2023, arXiv:2109.12894, eq. 2, in snnTorch's order of
    rounding.
    """
    return x * R * (1 / (R * C)) * dt + (1 - dt / (R * C)) * v


@dynamics(states={"syn": 0.0}, potentials=())
def Synaptic(v: Any, syn: Any, x: Any, *, alpha: Any, beta: Any) -> Any:
    """Leaky with a synaptic current that decays at rate alpha: syn = alpha syn + x, h = beta v + syn."""
    syn = alpha * syn + x
    return beta * v + syn, syn


@dynamics(states={"s": 0.0})
def RLeaky(v: Any, s: Any, x: Any, *, beta: Any, V: Any) -> Any:
    """Leaky that hears its own last spike, V times; in snnTorch's order of rounding."""
    return beta * v + x + s * V


@dynamics(states={"syn": 0.0, "s": 0.0})
def RSynaptic(v: Any, syn: Any, s: Any, x: Any, *, alpha: Any, beta: Any, V: Any) -> Any:
    """Synaptic whose current hears the neuron's own last spike, V times."""
    syn = alpha * syn + x + s * V
    return beta * v + syn, syn


@dynamics(states={"syn_exc": 0.0, "syn_inh": 0.0, "s": 0.0})
def Alpha(
    v: Any,
    syn_exc: Any,
    syn_inh: Any,
    s: Any,
    x: Any,
    *,
    alpha: Any,
    beta: Any,
    tau: Any,
    jump: Any = 0.0,
    zero: bool = False,
    subtract: bool = False,
) -> Any:
    """The membrane is the difference of a slower and a faster current, tau (syn_exc + syn_inh).

    A reset acts on the currents too, so it is part of the charge: to zero, or, as snnTorch subtracts,
    by ``jump``, its threshold.
    """
    exc, inh = alpha * syn_exc + x, beta * syn_inh - x
    h = tau * (exc + inh)
    if zero:
        return h - h * s, exc - exc * s, inh - inh * s
    if subtract:
        return h + syn_inh * s, exc - jump * s, inh - inh * s
    return h, exc, inh


@dynamics(states={"syn": 0.0}, potentials=("v_rest",))
def CubaLIF(v: Any, syn: Any, x: Any, *, tau_syn: Any, tau_mem: Any, r: Any, v_rest: Any) -> Any:
    """LIF driven through a resistance r by a current that decays, time constants in time steps.

    NIR's equation, Pedersen et al. 2024, Nature Communications 15:8122, by forward Euler with a step
    of 1, the current first.
    """
    syn = syn + (x - syn) / tau_syn
    return v + (r * syn - (v - v_rest)) / tau_mem, syn


@dynamics
def QIF(v: Any, x: Any, *, tau: Any, v_rest: Any, v_c: Any, a_0: Any) -> Any:
    """Quadratic integrate-and-fire, Gerstner et al., Neuronal Dynamics, eq. 5.2."""
    return v + (x + a_0 * (v - v_rest) * (v - v_c)) / tau


@dynamics
def EIF(v: Any, x: Any, *, tau: Any, v_rest: Any, theta_rh: Any, delta_T: Any) -> Any:
    """Exponential integrate-and-fire, Gerstner et al., Neuronal Dynamics, eq. 5.6."""
    return v + (x + v_rest - v + delta_T * exp((v - theta_rh) / delta_T)) / tau


@dynamics(states={"w": "w_rest", "s": 0.0})
def Izhikevich(
    v: Any,
    w: Any,
    s: Any,
    x: Any,
    *,
    tau: Any,
    v_rest: Any,
    v_c: Any,
    a_0: Any,
    w_rest: Any,
    tau_w: Any,
    a: Any,
    b: Any,
    factored: bool = False,
) -> Any:
    """QIF with an adaptation current w, which jumps by b at a spike.

    Gerstner et al., Neuronal Dynamics, eq. 6.1 and 6.2 with 5.2; w follows the charged potential.
    ``factored`` is the order of rounding of SpikingJelly 0.0.0.0.14.
    """
    w = w + b * s
    h = v + (x + a_0 * (v - v_rest) * (v - v_c) - w) / tau
    change = a * (h - v_rest) - w
    return h, w + (1.0 / tau_w * change if factored else change / tau_w)


@dynamics
def KLIF(v: Any, x: Any, *, k: Any, tau: Any, v_rest: Any, decay_input: bool = True) -> Any:
    """LIF whose charge is scaled by a learned k and rectified, Jiang and Zhang 2023, arXiv:2302.09238."""
    return relu(k * LIF.charge(v, x, tau=tau, v_rest=v_rest, decay_input=decay_input))


@dynamics(states={"u": "v_rest", "s": 0.0})
def RescaledKLIF(
    v: Any,
    u: Any,
    s: Any,
    x: Any,
    *,
    k: Any,
    tau: Any,
    v_rest: Any,
    jump: Any,
    decay_input: bool = True,
    soft: bool = False,
) -> Any:
    """KLIF that takes k out of the potential again after firing; u is that potential before the reset.

    The reset is part of the charge: to v_rest, or by ``jump``, the threshold, over k.
    """
    before = u - s * (jump / k) if soft else s * v_rest + (1.0 - s) * u
    h = relu(k * LIF.charge(before, x, tau=tau, v_rest=v_rest, decay_input=decay_input))
    return h, h / k


@dynamics(states={"m": 0.0, "s": 0.0})
def CLIF(v: Any, m: Any, s: Any, x: Any, *, tau: Any, jump: Any) -> Any:
    """LIF whose soft reset grows with its recent firing, Huang et al. 2024, PMLR 235, eq. 6 to 9.

    The reset, by ``jump``, the threshold, and by the complementary potential's sigmoid, is part of the
    charge.
    """
    m = m + s
    before = v - s * (jump + sigmoid(m))
    h = before - before / tau + x
    return h, m * sigmoid(h / tau)


@dynamics(states={"u": 0.0})
def RAF(v: Any, u: Any, x: Any, *, decay: Any, cos: Any, sin: Any) -> Any:
    """Resonate-and-fire, Izhikevich 2001, Neural Networks 14, eq. 4: v + iu turns and decays.

    x goes into u, which v follows at the next step; 0 x lets v have the input's shape at once.
    """
    charged = decay * (u * cos - v * sin) + x
    return decay * (u * sin + v * cos) + 0.0 * x, charged


@dynamics(states={"charged": 0.0})
def LIAF(v: Any, charged: Any, x: Any, *, tau: Any, v_rest: Any, decay_input: bool = True) -> Any:
    """LIF that keeps its potential before the reset, for what fires it in analog, arXiv:2011.06176."""
    h = LIF.charge(v, x, tau=tau, v_rest=v_rest, decay_input=decay_input)
    return h, h


@dynamics(states={"s": 0.0})
def DSRIF(v: Any, s: Any, x: Any, *, jump: Any) -> Any:
    """IF that subtracts another potential than its threshold, ``jump``, for what its rate represents.

    Meng et al. 2022, arXiv:2205.00459.
    """
    return v - s * jump + x


@dynamics(states={"s": 0.0})
def DSRLIF(v: Any, s: Any, x: Any, *, decay: Any, gain: Any, jump: Any) -> Any:
    """LIF likewise: decay = exp(-dt / tau), gain = 1 - decay."""
    return decay * (v - s * jump) + gain * x


@dynamics(potentials=())
def Heaviside(v: Any, x: Any) -> Any:
    """No memory at all: h = x."""
    return x
