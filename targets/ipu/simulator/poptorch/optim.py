"""The SDK's optimizers: torch's, with loss scaling, types of the state, and clipping.

An attribute that is passed to the constructor is a variable of the compiled model, any other a
constant. ``step`` is the device's, so these objects hold hyper-parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Params = Iterable[Any]


class VariableAttributes:
    """Which attributes of an optimizer may change once a model is compiled.

    Args:
        variable_attributes: Those that may.
        allowed_attributes: All there are.
    """

    def __init__(
        self, variable_attributes: Iterable[str], allowed_attributes: Iterable[str]
    ) -> None:
        self._variable = set(variable_attributes)
        self._allowed = set(allowed_attributes)

    def isConstant(self, attr: str) -> bool:
        """Whether the attribute is compiled in."""
        return attr not in self._variable

    def markAsConstant(self, attr: str) -> None:
        """Compile the attribute in."""
        self._check(attr)
        self._variable.discard(attr)

    def markAsVariable(self, attr: str) -> None:
        """Let the attribute change."""
        self._check(attr)
        self._variable.add(attr)

    def _check(self, attr: str) -> None:
        assert attr in self._allowed, f"Unknown attribute {attr}; allowed: {sorted(self._allowed)}"


class Optimizer(torch.optim.Optimizer):
    """What the SDK's optimizers have in common.

    Attributes:
        variable_attrs: Which attributes may change once a model is compiled.
    """

    def _extend(self, given: dict[str, Any], shared: dict[str, Any], names: Iterable[str]) -> None:
        """Set what torch's optimizer does not have.

        Args:
            given: What the constructor was passed.
            shared: Attributes of the whole optimizer and their defaults.
            names: Attributes of its groups.
        """
        for name, default in shared.items():
            value = given.get(name)
            if name.endswith("accum_type") and value not in (None, torch.float16, torch.float32):
                raise ValueError(
                    f"{name} must be set to either torch.float16 or torch.float32 not {value}"
                )
            setattr(self, name, default if value is None else value)
        passed = {name for name, value in given.items() if value is not None}
        self.variable_attrs = VariableAttributes(passed, {*shared, *names})
        self._read_state: Callable[[], dict[str, Any]] | None = None
        self._loaded: dict[str, Any] | None = None

    def get_state_dict(self) -> dict[str, Any]:
        """Hyper-parameters, and the state on the device as ``ipu_state``."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        state = self._read_state() if self._read_state is not None else self._loaded
        return {"ipu_state": state or {}, "param_groups": groups}

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`get_state_dict`."""
        return self.get_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take hyper-parameters and state; the device gets them when a model is compiled."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self._loaded = state_dict["ipu_state"] or None
        self._read_state = None

    def has_state(self) -> bool:
        """Whether there is state from a checkpoint that no device has taken yet."""
        return self._loaded is not None

    def step(self, closure: Any = None) -> Any:
        """The device updates the weights whenever the model is called.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "a poptorch optimizer has no step of its own: calling the poptorch.trainingModel runs "
            "the optimizer on the device"
        )


_SHARED = {"loss_scaling": 1.0, "accum_type": torch.float32}
_MOMENTS = {
    "first_order_momentum_accum_type": torch.float32,
    "second_order_momentum_accum_type": torch.float32,
}


def _given(scope: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: scope[name] for name in names if scope[name] is not None}


def _refuse_amsgrad(amsgrad: bool | None) -> None:
    if amsgrad:
        raise ValueError("Only non-amsgrad Adam/AdamW optimizers are supported.")


class SGD(Optimizer, torch.optim.SGD):
    """Stochastic gradient descent.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        momentum: Momentum.
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty.
        nesterov: Whether the momentum is Nesterov's.
        loss_scaling: Factor on the loss that the update takes out again.
        velocity_scaling: The same for the velocity, with ``use_combined_accum``.
        use_combined_accum: Whether velocity and accumulated gradient share a tensor.
        accum_type: Type of accumulated gradients.
        velocity_accum_type: Type of the velocity.
        max_grad_norm: Largest norm of all gradients together.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float | None = None,
        dampening: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool | None = None,
        loss_scaling: float | None = None,
        velocity_scaling: float | None = None,
        use_combined_accum: bool | None = None,
        accum_type: torch.dtype | None = None,
        velocity_accum_type: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        scope = dict(locals())
        if use_combined_accum and (accum_type is not None or velocity_accum_type is not None):
            raise ValueError(
                "accum_type and velocity_accum_type must not be set with use_combined_accum=True"
            )
        if velocity_scaling is not None and not use_combined_accum:
            raise ValueError("velocity_scaling is only available with use_combined_accum=True")
        names = ("momentum", "dampening", "weight_decay", "nesterov")
        torch.optim.SGD.__init__(self, params, lr=lr, **_given(scope, names))
        shared = {
            **_SHARED,
            "velocity_scaling": 1.0,
            "use_combined_accum": False,
            "velocity_accum_type": torch.float32,
            "max_grad_norm": float("inf"),
        }
        self._extend(_given(scope, ("lr", *names, *shared)), shared, ("lr", *names))


class Adam(Optimizer, torch.optim.Adam):
    """Adam.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second.
        weight_decay: L2 penalty.
        amsgrad: Not supported.
        loss_scaling: Factor on the loss that the update takes out again.
        accum_type: Type of accumulated gradients.
        first_order_momentum_accum_type: Type of the first moment.
        second_order_momentum_accum_type: Type of the second moment.
        max_grad_norm: Largest norm of all gradients together.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        amsgrad: bool | None = None,
        loss_scaling: float | None = None,
        accum_type: torch.dtype | None = None,
        first_order_momentum_accum_type: torch.dtype | None = None,
        second_order_momentum_accum_type: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        scope = dict(locals())
        _refuse_amsgrad(amsgrad)
        names = ("lr", "betas", "eps", "weight_decay")
        torch.optim.Adam.__init__(self, params, **_given(scope, names))
        shared = {**_SHARED, **_MOMENTS, "max_grad_norm": float("inf")}
        self._extend(_given(scope, (*names, *shared)), shared, names)


class AdamW(Optimizer, torch.optim.AdamW):
    """Adam with decoupled weight decay.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second.
        weight_decay: Decay.
        amsgrad: Not supported.
        loss_scaling: Factor on the loss that the update takes out again.
        bias_correction: Whether the moments are corrected for starting at zero.
        accum_type: Type of accumulated gradients.
        first_order_momentum_accum_type: Type of the first moment.
        second_order_momentum_accum_type: Type of the second moment.
        max_grad_norm: Largest norm of all gradients together.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        amsgrad: bool | None = None,
        loss_scaling: float | None = None,
        bias_correction: bool | None = None,
        accum_type: torch.dtype | None = None,
        first_order_momentum_accum_type: torch.dtype | None = None,
        second_order_momentum_accum_type: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        scope = dict(locals())
        _refuse_amsgrad(amsgrad)
        names = ("lr", "betas", "eps", "weight_decay")
        torch.optim.AdamW.__init__(self, params, **_given(scope, names))
        shared = {**_SHARED, **_MOMENTS, "bias_correction": True, "max_grad_norm": float("inf")}
        self._extend(_given(scope, (*names, *shared)), shared, names)


class RMSprop(Optimizer, torch.optim.RMSprop):
    """RMSprop.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        alpha: Decay of the mean square.
        eps: Added to its root.
        weight_decay: L2 penalty.
        momentum: Momentum.
        centered: Whether the mean is subtracted.
        loss_scaling: Factor on the loss that the update takes out again.
        accum_type: Type of accumulated gradients.
        first_order_momentum_accum_type: Type of momentum and mean.
        second_order_momentum_accum_type: Type of the mean square.
        use_tf_variant: Whether it is TensorFlow's.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        alpha: float | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        momentum: float | None = None,
        centered: bool | None = None,
        loss_scaling: float | None = None,
        accum_type: torch.dtype | None = None,
        first_order_momentum_accum_type: torch.dtype | None = None,
        second_order_momentum_accum_type: torch.dtype | None = None,
        use_tf_variant: bool | None = None,
    ) -> None:
        scope = dict(locals())
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
        torch.optim.RMSprop.__init__(self, params, **_given(scope, names))
        shared = {**_SHARED, **_MOMENTS, "use_tf_variant": False}
        self._extend(_given(scope, (*names, *shared)), shared, names)


class LAMB(Optimizer):
    """Layer-wise adaptive moments for large batches.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second.
        weight_decay: Decay.
        bias_correction: Whether the moments are corrected for starting at zero.
        loss_scaling: Factor on the loss that the update takes out again.
        max_weight_norm: Largest norm of a weight in the trust ratio.
        accum_type: Type of accumulated gradients.
        first_order_momentum_accum_type: Type of the first moment.
        second_order_momentum_accum_type: Type of the second moment.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        bias_correction: bool | None = None,
        loss_scaling: float | None = None,
        max_weight_norm: float | None = None,
        accum_type: torch.dtype | None = None,
        first_order_momentum_accum_type: torch.dtype | None = None,
        second_order_momentum_accum_type: torch.dtype | None = None,
    ) -> None:
        scope = dict(locals())
        names = ("lr", "betas", "eps", "weight_decay")
        defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        torch.optim.Optimizer.__init__(self, params, {**defaults, **_given(scope, names)})
        shared = {**_SHARED, **_MOMENTS, "bias_correction": True, "max_weight_norm": 65500.0}
        self._extend(_given(scope, (*names, *shared)), shared, names)
