"""The weights of a checkpoint, read without running what it may hold, into a network."""

from __future__ import annotations

import logging
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..converters.errors import CheckpointError

_WELL_KNOWN = ("net", "model", "state_dict", "model_state_dict")
_TRUST = (
    "if you trust whoever made it, give --trust-pickle; else have it saved as a state dict of "
    "tensors, torch.save(net.state_dict(), path)"
)
_OF_TENSORS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}

_logger = logging.getLogger(__name__)


def load_checkpoint(
    net: nn.Module, path: str | Path, key: str | None = None, *, trust_pickle: bool = False
) -> None:
    """Load a checkpoint's state dict into a network; values are cast to the network's dtypes.

    Args:
        net: The network.
        path: What ``torch.save`` wrote, or a .safetensors file.
        key: Where the state dict lies in it, such as ``net`` or ``ema.model``; found unless given.
        trust_pickle: Whether to unpickle objects, which runs code that the file's author chose.

    Raises:
        CheckpointError: The file cannot be read, holds no state dict, or one that does not fit; all
            missing, unexpected and misshaped keys are named.
    """
    path = Path(path)
    state = _state_dict(_read(path, trust_pickle), path, key)
    own = set(net.state_dict())
    if state and all(k.startswith("module.") for k in state) and not own & set(state):
        _logger.info("%s: the prefix module. (of DataParallel) is taken off all keys", path)
        state = {k.removeprefix("module."): value for k, value in state.items()}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        _, *problems = str(error).splitlines()
        raise CheckpointError(
            f"{path} does not fit {type(net).__name__}:\n"
            + "\n".join(f"  {line.strip()}" for line in problems)
            + "\ngive the --arg that it was trained with, or another --key or checkpoint"
        ) from error


def _read(path: Path, trust_pickle: bool) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
    if _is_plain_pickle(path):
        return _unpickle(path, trust_pickle)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        names = ", ".join(sorted(_unsafe(path)))
        if trust_pickle or not names:
            raise CheckpointError(f"{path} is no checkpoint: {_brief(error)}") from error
        raise CheckpointError(
            f"{path} asks to run code when it is read: {names}; {_TRUST}"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} is no checkpoint, or one that is cut short: {_brief(error)}"
        ) from error


def _is_plain_pickle(path: Path) -> bool:
    """Whether pickle.dump wrote it; torch.save writes a zip file, of old a magic number first."""
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return False
        file.seek(0)
        try:
            names = [op.name for op, _, _ in pickletools.genops(file)]
        except ValueError:
            return False
    return names[1] != "LONG1"


def _unpickle(path: Path, trust_pickle: bool) -> Any:
    if not trust_pickle:
        names = ", ".join(sorted(_unsafe(path)))
        asks = f" that asks for {names}" if names else ""
        raise CheckpointError(
            f"{path} is a plain pickle{asks}, and reading it may run code; {_TRUST}"
        )
    try:
        with path.open("rb") as file:
            return pickle.load(file)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be unpickled: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def _unsafe(path: Path) -> set[str]:
    """Functions and classes that a file's pickles ask for, but for those of tensors."""
    found: set[str] = set()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with archive.open(name) as file:
                        found |= set(_globals(file))
    else:
        with path.open("rb") as file:
            found |= set(_globals(file))
    storages = {name for name in found if name.startswith("torch.") and name.endswith("Storage")}
    return found - _OF_TENSORS - storages


def _globals(file: IO[bytes]) -> Iterator[str]:
    """Names that one or several pickles in a row import, without unpickling any."""
    while True:
        strings: list[str] = []
        memo: dict[int, str] = {}
        try:
            for op, arg, _ in pickletools.genops(file):
                if op.name == "GLOBAL":
                    yield str(arg).replace(" ", ".")
                elif op.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif "UNICODE" in op.name:
                    strings.append(str(arg))
                elif op.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif op.name in ("BINGET", "LONG_BINGET") and arg in memo:
                    strings.append(memo[arg])
        except (ValueError, IndexError):
            return


def _state_dict(content: Any, path: Path, key: str | None) -> dict[str, torch.Tensor]:
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict")
    if key is not None:
        return _under(content, path, key)
    if _is_state_dict(content):
        return dict(content)
    found = [k for k, value in content.items() if _is_state_dict(value)]
    taken = [k for k in found if k in _WELL_KNOWN]
    if len(taken) == 1:
        _logger.info("%s: the state dict under the key %r is taken", path, taken[0])
        return dict(content[taken[0]])
    what = (
        f"state dicts under {', '.join(map(str, found))}" if found else "no state dict of tensors"
    )
    raise CheckpointError(f"{path} holds {what}; {_keys(content)}; give the right one with --key")


def _under(content: Mapping[Any, Any], path: Path, key: str) -> dict[str, torch.Tensor]:
    value: Any = content
    for part in (key,) if key in content else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = _keys(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise CheckpointError(f"{path} has no key {key!r}: {part!r} is missing; {there}")
        value = value[part]
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if not _is_state_dict(value):
        raise CheckpointError(
            f"{path}: under {key!r} is a {type(value).__name__}, no state dict of tensors; "
            + (_keys(value) if isinstance(value, Mapping) else _keys(content))
        )
    return dict(value)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _keys(content: Mapping[Any, Any]) -> str:
    names = [str(k) for k in content]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"its keys are {', '.join(names[:12])}{more}" if names else "it is empty"
