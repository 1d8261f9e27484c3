"""Networks as the command line names them: code, arguments, checkpoint, example inputs."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
import pickle
import pickletools
import sys
import traceback
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..converters.errors import CheckpointError, FindingsError, UsageError
from ..converters.sources.nir import NirNetwork

_FORMS = (
    "path/to/file.py:Class or package.module:Class (a function that returns the network will do), "
    "path/to/file.nir, or conv, fc or leaky for an example"
)
_EXAMPLES = {
    "conv": "conv_fashion_mnist.py:CSNN",
    "fc": "fc_fashion_mnist.py:FCSNN",
    "leaky": "leaky_fashion_mnist.py:LeakySNN",
}
_EXAMPLE_FOLDERS = (Path(__file__).resolve().parent.parent / "examples", Path("examples"))
_PLAIN = (bool, int, float, str, types.NoneType)
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
_INPUT_DTYPES = ("float32", "float16", "float64", "uint8", "int32", "int64", "bool")

_logger = logging.getLogger(__name__)


# The network


def build(net: str, arguments: Iterable[str] = ()) -> nn.Module:
    """The network that a name stands for, in eval mode.

    A name is ``file.py:Class``, ``package.module:Class``, ``file.nir``, or that of an example.

    Its file can import its neighbours; ``__main__`` blocks do not run.

    Args:
        net: Where it is.
        arguments: What to construct it with, each ``name=value``.

    Raises:
        UsageError: There is no such file, module or class, or it fails.
    """
    factory, given, signature = _bind(net, arguments)
    try:
        made = factory(**given)
    except FindingsError:
        raise
    except Exception as error:
        called = ", ".join(f"{k}={v!r}" for k, v in given.items())
        raise UsageError(
            f"{net} cannot be built: ({called}) raises {_said(error)}; it takes {signature}"
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{net} gives a {type(made).__name__}; it must give an nn.Module")
    return made.eval()


def description(net: str, arguments: Iterable[str] = ()) -> dict[str, Any]:
    """The network's name, under ``net``, and what :func:`build` constructs it with, as plain data.

    Raises:
        UsageError: There is no such file, module or class, or it takes other arguments.
    """
    factory, given, signature = _bind(net, arguments)
    defaults = {n: p.default for n, p in signature.parameters.items()}
    return {
        "net": getattr(factory, "__qualname__", net),
        **{n: v for n, v in defaults.items() if isinstance(v, _PLAIN)},
        **{n: v if isinstance(v, _PLAIN) else repr(v) for n, v in given.items()},
    }


def _bind(
    net: str, arguments: Iterable[str]
) -> tuple[Callable[..., Any], dict[str, Any], inspect.Signature]:
    """What makes the network, the arguments that it is given, and those that it takes."""
    factory = _find(net)
    given = parse_arguments(arguments)
    try:
        signature = inspect.signature(factory)
        signature.bind(**given)
    except TypeError as error:
        raise UsageError(
            f"{net} cannot be built: {error}; given: "
            f"{', '.join(f'{k}={v!r}' for k, v in given.items()) or 'no --arg'}; it takes "
            f"{signature} (--arg name=value)"
        ) from error
    return factory, given, signature


def _find(net: str) -> Callable[..., Any]:
    if net.endswith(".nir"):
        return functools.partial(NirNetwork, Path(net))
    place, colon, name = (_example_file(net) if net in _EXAMPLES else net).rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"{net!r} names no network; write {_FORMS}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{place} has no {name!r}; {_offers(module, name)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise UsageError(
            f"{net} is a {type(found).__name__}; it must be a class or a function that returns the "
            "network"
        )
    maker: Callable[..., Any] = found
    return maker


def _example_file(name: str) -> str:
    place = _EXAMPLES[name]
    for folder in _EXAMPLE_FOLDERS:
        if (folder / place.partition(":")[0]).is_file():
            return str(folder / place)
    raise UsageError(
        f"the example {name} is examples/{place} of spikeport's repository, which is neither here nor "
        "where spikeport is installed from; go to a checkout, or name a network of your own: "
        "path/to/file.py:Class"
    )


def _offers(module: types.ModuleType, name: str) -> str:
    makers = [
        n
        for n, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
        and (inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module)))
    ]
    near = difflib.get_close_matches(name, makers, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"it has {', '.join(sorted(makers)) or 'no network class and no function'}{hint}"


def _import_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise UsageError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    path = path.resolve()
    name = path.stem
    taken = sys.modules.get(name)
    if taken is not None:
        if getattr(taken, "__file__", None) == str(path):
            return taken
        name = f"{name}@{path.parent}"  # a file may be called as a module that is there already
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    # As for a script: for good, since a forward may import its neighbours when it is called.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{path} cannot be imported: {_said(error)}") from error
    return module


def _import_module(name: str) -> types.ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(f"no module {error.name!r} to import; write {_FORMS}") from error
        raise UsageError(f"{name} cannot be imported: {_said(error)}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name} cannot be imported: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """An error of the user's code with its line."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def parse_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """Texts ``name=value`` as names and values: Python literals, or else the text itself.

    Raises:
        UsageError: A text has another form, or a name is given twice.
    """
    given: dict[str, Any] = {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"argument {text!r} is not of the form name=value, such as T=4")
        if name in given:
            raise UsageError(f"argument {name} is given twice")
        try:
            given[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[name] = value
    return given


# Example inputs


def example_inputs(inputs: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """Inputs for texts such as ``16,1,28,28`` or ``16,10:int64``.

    They are uniform in [0, 1), integers and booleans 0 or 1; the same for the same texts.

    Raises:
        UsageError: A text has another form, or there is none.
    """
    if not inputs:
        raise UsageError("no input shape; give one --input for each input, such as 16,1,28,28")
    random = torch.Generator().manual_seed(0)
    return tuple(_example(text, random) for text in inputs)


def _example(text: str, random: torch.Generator) -> torch.Tensor:
    sizes, _, name = text.partition(":")
    name = name or "float32"
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or name not in _INPUT_DTYPES:
        raise UsageError(
            f"input {text!r} is not of the form 16,1,28,28 or 16,1,28,28:float16; sizes are 1 or "
            f"more, batch included, dtypes {', '.join(_INPUT_DTYPES)}"
        )
    dtype: torch.dtype = getattr(torch, name)
    if dtype.is_floating_point:
        return torch.rand(shape, generator=random).to(dtype)
    return torch.randint(0, 2, shape, generator=random).to(dtype)


# The checkpoint


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
