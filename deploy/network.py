"""Networks as the command line names them: code, arguments, example inputs."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..converters.errors import FindingsError, UsageError
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
    except (Exception, SystemExit) as error:
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
        _check_file(Path(net))
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


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path}: {'not a file' if path.exists() else 'no such file'}")


def _import_file(path: Path) -> types.ModuleType:
    _check_file(path)
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
    said = f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
    if isinstance(error, ModuleNotFoundError):
        said += "; install the package that has it (pip install --no-deps leaves torch as it is)"
    return said


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
