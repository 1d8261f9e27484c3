"""A model that is trained on the device: touching its weights on the host brings them back first."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Owner(Protocol):
    """Who has the weights on the device."""

    _version: int

    def sync(self) -> bool:
        """Bring the weights back if they have changed; whether they had."""

    def destroy(self) -> None:
        """Let the model go."""


def is_wrapped(model: Any) -> bool:
    """Whether a model is being trained already."""
    return hasattr(type(model), "_poptorch_unwrapped")


def owner(model: Any) -> Owner | None:
    """Who trains a wrapped model."""
    found: Owner | None = type(model)._poptorch_owner()
    return found


def wrap(model: nn.Module, owner: Owner) -> None:
    """Change the classes of a model, its parameters and buffers, so that they follow the device."""
    reference = weakref.ref(owner)

    def sync() -> bool:
        found = reference()
        return found is not None and found.sync()

    original = type(model)

    class Wrapped(original):  # type: ignore[misc, valid-type]
        _poptorch_unwrapped = original
        _poptorch_owner = reference

        def copyWeightsToHostIfNeeded(self) -> bool:  # noqa: N802
            """Bring the weights back if they have changed; whether they had."""
            return sync()

        def destroy(self) -> None:
            """Let the model go."""
            found = reference()
            if found is not None:
                found.destroy()

        def __getattribute__(self, name: str) -> Any:
            if name in ("_buffers", "_parameters", "forward"):
                sync()
            return super().__getattribute__(name)

        def __reduce_ex__(self, protocol: Any) -> Any:
            sync()
            return _rebuild, (original, dict(self.__dict__))

    Wrapped.__name__ = Wrapped.__qualname__ = f"Poptorch{original.__name__}"

    class Parameter(nn.Parameter):
        def __getattribute__(self, name: str) -> Any:
            sync()
            return object.__getattribute__(self, name)

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            sync()
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
            made = nn.Parameter(self.detach().clone(), self.requires_grad)
            return memo.setdefault(id(self), made)  # type: ignore[no-any-return]

        def __repr__(self) -> str:  # type: ignore[override]
            return f"Parameter containing:\n{self.detach().requires_grad_(self.requires_grad)!r}"

    class Buffer(Tensor):
        __getattribute__ = Parameter.__getattribute__
        __torch_function__ = Parameter.__torch_function__

        def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
            return memo.setdefault(id(self), self.detach().clone())  # type: ignore[no-any-return]

        def __repr__(self) -> str:  # type: ignore[override]
            return repr(self.detach())

        def __reduce_ex__(self, protocol: Any) -> Any:
            return self.detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    for parameter in model.parameters():
        parameter.__class__ = Parameter
    for buffer in model.buffers():
        buffer.__class__ = Buffer
    model.__class__ = Wrapped


def _rebuild(original: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    made = original.__new__(original)
    made.__dict__.update(state)
    return made


def unwrap(model: nn.Module) -> None:
    """Undo :func:`wrap`."""
    if not is_wrapped(model):
        return
    wrapped: Any = type(model)
    model.__class__ = wrapped._poptorch_unwrapped
    for parameter in model.parameters():
        parameter.__class__ = nn.Parameter
    for buffer in model.buffers():
        buffer.__class__ = Tensor
