"""From an ``nn.Module`` to a :class:`Program`, through ``torch.export``.

Every neuron module of a copy of the network is replaced by a wrapper that calls one operator, so that
the exported graph is plain ATen with one node for each neuron layer, and each node says which module
it came from. In-place writes become functional ones on the way.
"""

from __future__ import annotations

import copy
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import sources
from .errors import CaptureError, Finding, MismatchError, UsageError
from .neurons import Neuron
from .program import NEURON, NEURON_STEP, Builder, PassReport, Program, TensorSpec, seal
from .sources import Reading

aten = torch.ops.aten


def capture(net: nn.Module, args: Sequence[torch.Tensor]) -> Program:
    """The network as a program, for inputs of these shapes, in eval mode.

    The captured program is run against the network itself, whose outputs it must equal bit for bit.

    Args:
        net: The network; it is copied, and left as it is.
        args: Example inputs, tensors.

    Raises:
        UsageError: The example inputs are not tensors.
        CaptureError: With everything that stops the capture.
        MismatchError: The program computes something else than the network.
    """
    args = tuple(args)
    if not args or not all(isinstance(a, torch.Tensor) for a in args):
        kinds = ", ".join(type(a).__name__ for a in args) or "nothing"
        raise UsageError(f"the example inputs are {kinds}; give a tuple of tensors")
    work = _copy(net)
    findings = _weights(work)
    readings: dict[int, tuple[str, Reading]] = {}
    for path, module, reading in sources.read_all(work):
        if isinstance(reading, Reading):
            readings[id(module)] = (path, reading)
        else:
            findings += reading
    calls: dict[str, int] = {}
    expected, failed = _run_source(work, args, readings, calls)
    findings += failed
    findings += _outer_loops(readings, calls)
    if findings:
        raise CaptureError("the network cannot be captured:", findings)

    state = _State()
    _wrap(work, readings, state)
    first = _outputs(work, args, state)
    if not _equal(first, _outputs(work, args, state)):
        raise CaptureError("the network cannot be captured:", [_surviving()])
    if not _equal(expected, first):
        raise MismatchError(
            "the declared neurons give other outputs than the network's own; "
            + _first_difference(net, args, readings)
        )
    program = _program(_export(work, args, state), net, args)
    if not _equal(first, program(*args)):
        raise MismatchError(
            "the exported graph gives other outputs than the network: its forward depends on "
            "something besides its inputs, such as randomness, time or a global"
        )
    return program


def _copy(net: nn.Module) -> nn.Module:
    try:
        work = copy.deepcopy(net)
    except RuntimeError as error:
        raise CaptureError(
            "the network cannot be captured:",
            [
                Finding(
                    rule="copy",
                    where="",
                    found=f"the network cannot be copied ({error})",
                    allowed="a network that keeps no tensor of an earlier training step",
                    fix="reset it first (SpikingJelly: functional.reset_net(net))",
                )
            ],
        ) from error
    work.eval().requires_grad_(False)
    sources.reset(work)
    return work


def _weights(net: nn.Module) -> list[Finding]:
    """Weights that are not finite."""
    return [
        Finding(
            rule="non-finite-weight",
            where=name.rpartition(".")[0],
            found=f"{name} has {int((~torch.isfinite(value)).sum())} values that are NaN or infinite",
            allowed="finite weights",
            fix="look at the training run: the checkpoint was saved after it diverged",
        )
        for name, value in (*net.named_parameters(), *net.named_buffers())
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]


def _run_source(
    net: nn.Module,
    args: Sequence[torch.Tensor],
    readings: dict[int, tuple[str, Reading]],
    calls: dict[str, int],
) -> tuple[Any, list[Finding]]:
    """The network's own outputs, and how often each neuron was called."""

    def count(path: str) -> Callable[..., None]:
        return lambda *_: calls.__setitem__(path, calls.get(path, 0) + 1)

    hooks = [
        m.register_forward_hook(count(readings[id(m)][0])) for m in net.modules() if id(m) in readings
    ]
    try:
        with torch.no_grad():
            return net(*args), []
    except Exception as error:
        return None, [
            Finding(
                rule="forward-fails",
                where="",
                found=f"{type(error).__name__}: {error} ({_place(error)})",
                allowed="a network that runs on the example inputs "
                f"{', '.join(str(list(a.shape)) for a in args)}",
                fix="give inputs of the shapes that it takes, or mend its forward",
            )
        ]
    finally:
        for hook in hooks:
            hook.remove()
        sources.reset(net)


def _place(error: BaseException) -> str:
    """File and line of the user's code that an error came from."""
    skip = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(skip)
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "inside torch"


def _outer_loops(
    readings: dict[int, tuple[str, Reading]], calls: dict[str, int]
) -> list[Finding]:
    return [
        Finding(
            rule="time-loop-outside",
            where=path,
            found="a single-step neuron that the forward calls once: its time loop lies outside the "
            "network, and its state would survive from one call to the next",
            allowed="all time steps inside one call",
            fix="set step_mode='m' (SpikingJelly: functional.set_step_mode(net, 'm')) and give "
            "[T, N, ...], or put the loop over time into a module's forward",
        )
        for path, reading in readings.values()
        if reading.step_mode == "s" and calls.get(path) == 1
    ]


def _surviving() -> Finding:
    return Finding(
        rule="surviving-state",
        where="",
        found="two calls with the same inputs give other outputs: state survives from one call to the "
        "next outside the neurons, or the forward is random",
        allowed="a network whose outputs follow from its inputs",
        fix="keep neurons in registered modules (nn.ModuleList, not a list), and other state in the "
        "forward's own variables",
    )


class _State:
    """Membranes of single-step neurons during one forward, by path; each forward starts without."""

    def __init__(self) -> None:
        self.v: dict[str, tuple[torch.Tensor, int]] = {}


class _StateAccess(Exception):
    """The network's own code touched a neuron's state."""


class _Wrapper(nn.Module):
    """Stands where a neuron was; its tensors keep their names, and what is set on it is refused.

    It is made as an instance of the neuron's class too (:meth:`of`), because networks ask
    ``isinstance(layer, neuron.BaseNode)``.
    """

    @classmethod
    def of(cls, path: str, reading: Reading, state: _State, original: nn.Module) -> _Wrapper:
        """A wrapper that passes for the original's class."""
        kind = type(original)
        return type(kind.__name__, (cls, kind), {})(path, reading, state, original)

    def __init__(self, path: str, reading: Reading, state: _State, original: nn.Module) -> None:
        nn.Module.__init__(self)
        tensors = reading.neuron.tensors()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach())
        self._path, self._reading, self._steps = path, reading, state
        self._names = list(tensors)
        self._spec = reading.neuron.to_json()
        self._original = (original,)
        self._sealed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        params = [getattr(self, name) for name in self._names]
        spikes: torch.Tensor
        if self._reading.step_mode == "m":
            if x.dim() < 2:
                raise _StateAccess(
                    f"{self._path}: its input is {list(x.shape)}; a multi-step neuron takes [T, N, ...]"
                )
            spikes = NEURON(x, params, self._spec, "stepped", x.shape[0])
            return spikes
        neuron = Neuron.from_json(self._spec, params)
        v, t = self._steps.v.get(self._path) or (neuron.initial(x), 0)
        spikes, v = NEURON_STEP(x, v, params, self._spec, t)
        self._steps.v[self._path] = (v, t + 1)
        return spikes

    def reset(self) -> None:
        """As the original's, for a forward that resets its neurons itself."""
        self._steps.v.pop(self._path, None)

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("_original")
        if original is None or name in self._buffers:
            return super().__getattr__(name)
        value = getattr(original[0], name)
        if isinstance(value, torch.Tensor) or name in (*getattr(original[0], "_memories", ()), "v_seq"):
            raise _StateAccess(f"{self._path}: the forward reads its {name}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_sealed"):
            raise _StateAccess(f"{self._path}: the forward sets its {name}")
        super().__setattr__(name, value)


def _wrap(net: nn.Module, readings: dict[int, tuple[str, Reading]], state: _State) -> None:
    wrappers = {
        id(m): _Wrapper.of(*readings[id(m)], state, m) for m in net.modules() if id(m) in readings
    }
    if id(net) in wrappers:
        raise UsageError("the network is a single neuron; put it into a module, such as nn.Sequential")
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if id(child) in wrappers:
                module._modules[name] = wrappers[id(child)]


def _outputs(net: nn.Module, args: Sequence[torch.Tensor], state: _State) -> Any:
    state.v.clear()
    try:
        with torch.no_grad():
            return net(*args)
    except _StateAccess as error:
        raise CaptureError("the network cannot be captured:", [_touched(error)]) from error
    finally:
        sources.reset(net)


def _touched(error: _StateAccess) -> Finding:
    return Finding(
        rule="neuron-state",
        where=str(error).partition(":")[0],
        found=str(error).partition(": ")[2] or str(error),
        allowed="neurons that are only called; their state is not part of the graph",
        fix="compute what you need from the spikes, or read the membrane after the conversion "
        "(deploy.compare)",
    )


def _equal(a: Any, b: Any) -> bool:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(
        isinstance(y, torch.Tensor) and torch.equal(x, y)
        if isinstance(x, torch.Tensor)
        else bool(x == y)
        for x, y in zip(left, right, strict=True)
    )


def _first_difference(
    net: nn.Module, args: Sequence[torch.Tensor], readings: dict[int, tuple[str, Reading]]
) -> str:
    """The first neuron whose own output is not what its declaration gives for its own input."""
    paths = {path: reading for path, reading in readings.values()}
    work, seen = _copy(net), list[str]()
    inputs: dict[str, list[torch.Tensor]] = {}
    outputs: dict[str, list[torch.Tensor]] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, x: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            seen.append(path) if path not in seen else None
            inputs.setdefault(path, []).append(x[0].clone())
            outputs.setdefault(path, []).append(y.clone())

        return hook

    for path, module in work.named_modules():
        if path in paths:
            module.register_forward_hook(record(path))
    with torch.no_grad():
        work(*args)
    for path in seen:
        multi = paths[path].step_mode == "m"
        x = inputs[path][0] if multi else torch.stack(inputs[path])
        y = outputs[path][0] if multi else torch.stack(outputs[path])
        spikes, h, _ = paths[path].neuron.trace(x)
        wrong = (spikes != y).nonzero()
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            return (
                f"the first is {path}: {len(wrong)} of {y.numel()} spikes differ, first at step "
                f"{at[0]}, index {list(at[1:])}, where the declaration has h = {h[at].item():.6g} "
                f"({paths[path].neuron.describe()})"
            )
    return "every neuron agrees on its own input, so a neuron is missing from the registered modules"


def _export(net: nn.Module, args: Sequence[torch.Tensor], state: _State) -> Any:
    state.v.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(net, tuple(args), strict=False)
            program = exported.run_decompositions({})
    except Exception as error:
        raise CaptureError("the network cannot be captured:", [_export_failed(error)]) from error
    signature = program.graph_signature
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise CaptureError(
            "the network cannot be captured:",
            [
                Finding(
                    rule="surviving-state",
                    where=name.rpartition(".")[0],
                    found=f"the forward writes to {name}, which survives the call",
                    allowed="a forward that writes only to its own variables",
                    fix="write to a copy (x = x.clone()), or declare the state as a neuron's",
                )
                for name in mutated
            ],
        )
    return program


def _export_failed(error: Exception) -> Finding:
    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    name = type(error).__name__
    if "DataDependent" in name or "data-dependent" in str(error):
        return Finding(
            rule="data-dependent",
            where="",
            found=f"control flow or a shape that depends on a tensor's value, at {_place(error)}",
            allowed="a forward whose operations follow from the inputs' shapes",
            fix="compute both branches and choose with torch.where, or take the decision out of the "
            "network",
        )
    if "was assigned during export" in str(error) or "attribute" in text and "assign" in text:
        return Finding(
            rule="surviving-state",
            where="",
            found=text,
            allowed="a forward that keeps nothing on self",
            fix="return it, or declare the state as a neuron's "
            "(spikeport.converters.neurons.dynamics)",
        )
    return Finding(
        rule="export",
        where="",
        found=f"torch.export: {name}: {text} ({_place(error)})",
        allowed="what torch.export can trace",
        fix="rewrite that line with tensor operations",
    )


_PASS_THROUGH = frozenset(
    {
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
    }
)
_DROPOUT = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})
_CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async"})


def _program(exported: Any, net: nn.Module, args: Sequence[torch.Tensor]) -> Program:
    """The exported graph in this project's form."""
    signature = exported.graph_signature
    attributes = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values = {**dict(exported.state_dict), **exported.constants}
    specs = []
    empty = Program(fx.GraphModule({}, fx.Graph()), (), (), exported.call_spec.out_spec)
    build = _Canonical(empty)
    user = iter(args)
    for n in exported.graph.nodes:
        if n.op == "placeholder":
            if (name := attributes.get(n.name)) is not None:
                build.env[n] = build.constant(name, values[name].detach())
            else:
                x = next(user)
                build.env[n] = build.placeholder(n, x)
                specs.append(TensorSpec(n.name, tuple(x.shape), x.dtype))
        elif n.op == "call_function":
            build.emit(n)
    results = exported.graph.output_node().args[0]
    constant = [str(r) for r in results if not isinstance(r, fx.Node)]
    if constant:
        raise UsageError(f"the network returns {', '.join(constant)}; outputs must be tensors")
    outputs = []
    for i, result in enumerate(results):
        value = build.env[result].meta["val"]
        name = "output" if len(results) == 1 else f"output_{i}"
        outputs.append(TensorSpec(name, tuple(value.shape), value.dtype))
    floating = [a.dtype for a in (*args, *net.parameters()) if a.is_floating_point()]
    kind = type(net)
    build.graph.output(tuple(build.env[r] for r in results))
    report = PassReport("capture", (f"{kind.__qualname__} through torch.export",))
    return seal(
        empty,
        build.graph,
        build.tensors,
        report,
        inputs=tuple(specs),
        outputs=tuple(outputs),
        dtype=floating[-1] if floating else torch.float32,
        source={
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "framework": sources.framework(net),
        },
    )


class _Canonical(Builder):
    """Copies exported nodes, with one spelling for what ATen spells in several ways."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.env: dict[fx.Node, Any] = {}

    def emit(self, n: fx.Node) -> None:
        target: Any = n.target
        args, kwargs = fx.map_arg((n.args, n.kwargs), self.env.__getitem__)
        path = _path(n)
        if getattr(target, "_opname", "") in _CHECKS:
            return
        if target is operator.getitem and isinstance(args[0], fx.Node):
            if args[0].target in (aten.batch_norm.default, aten.max_pool2d.default) and args[1] == 0:
                self.env[n] = args[0]
                return
        elif target in _PASS_THROUGH or (target in _DROPOUT and not args[2]):
            self.env[n] = args[0]
            return
        elif target is aten._to_copy.default and _same(args[0], kwargs):
            self.env[n] = args[0]
            return
        self.env[n] = self._spelled(target, args, kwargs, path, n)

    def _spelled(self, target: Any, args: Any, kwargs: Any, path: str, n: fx.Node) -> fx.Node:
        if target in (aten._unsafe_view.default, aten.reshape.default, aten.view.default):
            return self.call(aten.reshape.default, args[0], list(n.meta["val"].shape), path=path)
        if target is aten.expand.default:
            return self.call(target, args[0], list(n.meta["val"].shape), path=path)
        if target is aten._native_batch_norm_legit_no_training.default:
            x, weight, bias, mean, var, momentum, eps = args
            return self.call(
                aten.batch_norm.default, x, weight, bias, mean, var, False, momentum, eps, False,
                path=path,
            )
        if target is aten.max_pool2d_with_indices.default and _only_first(n):
            return self.call(aten.max_pool2d.default, *args, path=path, **kwargs)
        if target is aten.copy.default:
            like = args[0].meta["val"]
            return self.call(aten.expand.default, args[1], list(like.shape), path=path)
        if target is aten.select_scatter.default:
            base, source, dim, index = args
            row = self.call(aten.unsqueeze.default, source, dim, path=path)
            return self._scatter(base, row, dim, index, index + 1, path)
        if target is aten.slice_scatter.default:
            base, source, *rest = args
            dim, start, end, step = (*rest, *(0, None, None, 1)[len(rest):])
            size = base.meta["val"].shape[dim]
            if step == 1:
                return self._scatter(base, source, dim, *slice(start, end).indices(size)[:2], path)
        return self.call(target, *args, path=path, **kwargs)

    def _scatter(
        self, base: fx.Node, part: fx.Node, dim: int, start: int, end: int, path: str
    ) -> fx.Node:
        """A write to base[start:end] along dim, as slices and a concatenation."""
        size = base.meta["val"].shape[dim]
        parts = [part]
        if start % size:
            parts.insert(0, self.call(aten.slice.Tensor, base, dim, 0, start % size, path=path))
        if (end - 1) % size + 1 < size:
            rest = (end - 1) % size + 1
            parts.append(self.call(aten.slice.Tensor, base, dim, rest, size, path=path))
        if len(parts) == 1:
            return part
        return self.call(aten.cat.default, parts, dim, path=path)


def _same(x: fx.Node, kwargs: dict[str, Any]) -> bool:
    value = x.meta["val"]
    return bool(kwargs.get("dtype", value.dtype) == value.dtype)


def _only_first(n: fx.Node) -> bool:
    return all(u.target is operator.getitem and u.args[1] == 0 for u in n.users)


def _path(n: fx.Node) -> str:
    stack = n.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return re.sub(r"@\d+", "", path)
