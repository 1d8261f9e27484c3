"""The optimizers as the device runs them: one update of all weights from their gradients.

Hyper-parameters are read from an optimizer when it is set, and not again. State is kept in the
types asked for; each update is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import Error

_GROUP_ATTRIBUTES = {
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    "Adam": ("lr", "betas", "eps", "weight_decay"),
    "AdamW": ("lr", "betas", "eps", "weight_decay"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
    "LAMB": ("lr", "betas", "eps", "weight_decay"),
}
# With torch's own optimizers a value that is still the default is compiled in; lr never is.
_CONSTANT_IF = {
    "momentum": 0.0,
    "dampening": 0.0,
    "eps": 1e-8,
    "loss_scaling": 1.0,
}
_ALWAYS_CONSTANT = ("betas", "alpha", "nesterov", "centered")


@dataclass(frozen=True)
class Recipe:
    """What an optimizer says, as the device is told.

    Attributes:
        kind: ``"SGD"``, ``"Adam"``, ``"AdamW"``, ``"RMSprop"`` or ``"LAMB"``.
        groups: Hyper-parameters of each group.
        members: Group of each parameter, by the parameter's id.
        shared: What holds for all groups.
        constants: Hyper-parameters that are compiled in.
    """

    kind: str
    groups: tuple[dict[str, Any], ...]
    members: dict[int, int]
    shared: dict[str, Any]
    constants: frozenset[str]

    def check_replacement(self, compiled: Recipe) -> None:
        """Refuse what a compiled model cannot be told.

        Raises:
            Error: Another kind of optimizer, other groups, or another value of a constant.
        """
        if self.kind != compiled.kind:
            raise Error(
                f"The optimizer's type cannot change: the model was compiled with {compiled.kind}, "
                f"and this is {self.kind}"
            )
        if len(self.groups) != len(compiled.groups):
            raise Error(
                f"The number of groups cannot change: the model was compiled with "
                f"{len(compiled.groups)}, and this optimizer has {len(self.groups)}"
            )
        changed = [
            f"{name} (group {number}): {old[name]} to {new[name]}"
            for number, (new, old) in enumerate(zip(self.groups, compiled.groups, strict=True))
            for name in new
            if name in compiled.constants and new[name] != old[name]
        ] + [
            f"{name}: {compiled.shared[name]} to {self.shared[name]}"
            for name in self.shared
            if name in compiled.constants and self.shared[name] != compiled.shared[name]
        ]
        if changed:
            raise Error(
                f"The compiled model has these as constants: {'; '.join(changed)}. Pass an attribute "
                "to the constructor of a poptorch optimizer, or call "
                "optimizer.variable_attrs.markAsVariable(name) before the model is compiled, and it "
                "may change."
            )


def read(optimizer: torch.optim.Optimizer) -> Recipe:
    """The recipe of an optimizer.

    Raises:
        ValueError: The device has no such optimizer, or not this variant of it.
    """
    kind = _kind(optimizer)
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError("Only non-amsgrad Adam/AdamW optimizers are supported.")
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError("maximize is not supported.")
    names = _GROUP_ATTRIBUTES[kind]
    groups = tuple({name: _number(g[name]) for name in names} for g in optimizer.param_groups)
    members = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    shared = {
        "loss_scaling": float(getattr(optimizer, "loss_scaling", 1.0)),
        "accum_type": getattr(optimizer, "accum_type", torch.float32),
        "first_type": getattr(
            optimizer,
            "velocity_accum_type" if kind == "SGD" else "first_order_momentum_accum_type",
            torch.float32,
        ),
        "second_type": getattr(optimizer, "second_order_momentum_accum_type", torch.float32),
        "max_grad_norm": float(getattr(optimizer, "max_grad_norm", float("inf"))),
        "bias_correction": bool(getattr(optimizer, "bias_correction", True)),
        "use_tf_variant": bool(getattr(optimizer, "use_tf_variant", False)),
        "max_weight_norm": float(getattr(optimizer, "max_weight_norm", 65500.0)),
    }
    return Recipe(kind, groups, members, shared, _constants(optimizer, kind, groups, shared))


def _kind(optimizer: torch.optim.Optimizer) -> str:
    for base in type(optimizer).__mro__:
        if base.__name__ in _GROUP_ATTRIBUTES:
            return base.__name__
    raise ValueError(
        f"Unsupported optimizer type {type(optimizer).__name__}. Types supported "
        f"{list(_GROUP_ATTRIBUTES)}"
    )


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value


def _constants(
    optimizer: torch.optim.Optimizer,
    kind: str,
    groups: tuple[dict[str, Any], ...],
    shared: dict[str, Any],
) -> frozenset[str]:
    attributes = getattr(optimizer, "variable_attrs", None)
    structure = set(shared) - {"loss_scaling"}
    candidates = {*_GROUP_ATTRIBUTES[kind], "loss_scaling"}
    if attributes is not None:
        return frozenset(structure | {n for n in candidates if attributes.isConstant(n)})
    defaults = {**_CONSTANT_IF, "weight_decay": 0.01 if kind == "AdamW" else 0.0}
    for name, default in defaults.items():
        values = [shared[name]] if name in shared else [g[name] for g in groups if name in g]
        if all(value == default for value in values):
            structure.add(name)
    return frozenset(structure | (candidates & set(_ALWAYS_CONSTANT)))


State = dict[str, Tensor]


class Updater:
    """The optimizer on the device, with its state.

    Args:
        recipe: What it does.
        weights: The weights that it updates, by name.
        groups: Group of each weight.
    """

    def __init__(
        self, recipe: Recipe, weights: Mapping[str, Tensor], groups: Mapping[str, int]
    ) -> None:
        self.recipe = recipe
        self._weights = dict(weights)
        self._groups = dict(groups)
        self.steps = 0
        self.state: dict[str, State] = {
            name: self._fresh(weight, recipe.groups[groups[name]])
            for name, weight in weights.items()
        }

    def _fresh(self, weight: Tensor, group: dict[str, Any]) -> State:
        shared, kind = self.recipe.shared, self.recipe.kind
        first = {"dtype": shared["first_type"]}
        second = {"dtype": shared["second_type"]}
        if kind == "SGD":
            return {"velocity": torch.zeros_like(weight, **first)} if group["momentum"] else {}
        if kind != "RMSprop":
            return {
                "exp_avg": torch.zeros_like(weight, **first),
                "exp_avg_sq": torch.zeros_like(weight, **second),
            }
        start = torch.ones_like if shared["use_tf_variant"] else torch.zeros_like
        state = {"square_avg": start(weight, **second)}
        if group["centered"]:
            state["grad_avg"] = torch.zeros_like(weight, **first)
        if group["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(weight, **first)
        return state

    def bytes(self) -> int:
        """Size of the state."""
        return sum(t.numel() * t.element_size() for s in self.state.values() for t in s.values())

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Update every weight that has a gradient."""
        self.steps += 1
        shared = self.recipe.shared
        limit = shared["max_grad_norm"]
        grads = {name: grad.float() for name, grad in gradients.items()}
        if limit != float("inf"):
            norm = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(g) for g in grads.values()])
            )
            factor = limit / torch.clamp(norm, min=limit)
            grads = {name: grad * factor for name, grad in grads.items()}
        rule = _RULES[self.recipe.kind]
        for name, grad in grads.items():
            weight, stored = self._weights[name], self.state[name]
            wide = weight if weight.dtype == torch.float32 else weight.float()
            state = {k: t if t.dtype == torch.float32 else t.float() for k, t in stored.items()}
            rule(wide, grad, state, self.recipe.groups[self._groups[name]], shared, self.steps)
            if wide is not weight:
                weight.copy_(wide)
            for key, value in state.items():
                if value is not stored[key]:
                    stored[key].copy_(value)


def _sgd(w: Tensor, g: Tensor, s: State, group: dict[str, Any], shared: Any, step: int) -> None:
    """v = momentum v + (1 - dampening) (g + weight_decay w); w = w - lr v; v starts at 0."""
    if group["weight_decay"]:
        g = g.add(w, alpha=group["weight_decay"])
    if group["momentum"]:
        v = s["velocity"].mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
        g = g.add(v, alpha=group["momentum"]) if group["nesterov"] else v
    w.add_(g, alpha=-group["lr"])


def _moments(
    g: Tensor, s: State, group: dict[str, Any], shared: Any, step: int
) -> tuple[Tensor, Tensor, float]:
    """First moment, root of the corrected second plus eps, correction of the first."""
    beta1, beta2 = group["betas"]
    m = s["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
    v = s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    first, second = 1.0, 1.0
    if shared["bias_correction"]:
        first, second = 1 - beta1**step, 1 - beta2**step
    return m, (v.sqrt() / second**0.5).add_(group["eps"]), first


def _adam(w: Tensor, g: Tensor, s: State, group: dict[str, Any], shared: Any, step: int) -> None:
    """Kingma and Ba 2015, arXiv:1412.6980, with L2 regularisation."""
    if group["weight_decay"]:
        g = g.add(w, alpha=group["weight_decay"])
    m, root, correction = _moments(g, s, group, shared, step)
    w.addcdiv_(m, root, value=-group["lr"] / correction)


def _adamw(w: Tensor, g: Tensor, s: State, group: dict[str, Any], shared: Any, step: int) -> None:
    """Adam with decoupled weight decay, Loshchilov and Hutter 2019, arXiv:1711.05101."""
    w.mul_(1 - group["lr"] * group["weight_decay"])
    m, root, correction = _moments(g, s, group, shared, step)
    w.addcdiv_(m, root, value=-group["lr"] / correction)


def _lamb(w: Tensor, g: Tensor, s: State, group: dict[str, Any], shared: Any, step: int) -> None:
    """You et al. 2020, arXiv:1904.00962."""
    m, root, correction = _moments(g, s, group, shared, step)
    update = (m / correction / root).add_(w, alpha=group["weight_decay"])
    weight_norm = torch.linalg.vector_norm(w).clamp(max=shared["max_weight_norm"])
    update_norm = torch.linalg.vector_norm(update)
    trust = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
    w.sub_(update.mul_(trust * group["lr"]))


def _rmsprop(w: Tensor, g: Tensor, s: State, group: dict[str, Any], shared: Any, step: int) -> None:
    """Hinton's RMSprop; the variant adds eps inside the root and lr inside the momentum."""
    if group["weight_decay"]:
        g = g.add(w, alpha=group["weight_decay"])
    alpha, eps, lr = group["alpha"], group["eps"], group["lr"]
    variance = s["square_avg"].mul_(alpha).addcmul_(g, g, value=1 - alpha)
    if group["centered"]:
        mean = s["grad_avg"].mul_(alpha).add_(g, alpha=1 - alpha)
        variance = variance.addcmul(mean, mean, value=-1)
    root = (variance + eps).sqrt_() if shared["use_tf_variant"] else variance.sqrt().add_(eps)
    if not group["momentum"]:
        w.addcdiv_(g, root, value=-lr)
        return
    inside, outside = (lr, 1.0) if shared["use_tf_variant"] else (1.0, lr)
    buffer = s["momentum_buffer"].mul_(group["momentum"]).addcdiv_(g, root, value=inside)
    w.add_(buffer, alpha=-outside)


_RULES: dict[str, Callable[[Tensor, Tensor, State, dict[str, Any], Any, int], None]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adamw,
    "LAMB": _lamb,
    "RMSprop": _rmsprop,
}
