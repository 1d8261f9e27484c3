"""Unroll every neuron over time into slice, arithmetic, compare, select and concatenate.

Nothing is written in place and nothing has a rank above the input's. The equation is the declaration's
own: it is evaluated once on symbolic values that emit graph nodes instead of computing. The first
step starts from the constant v_0, so it is partly evaluated here, and the reset after the last step is
dead and dropped.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..builder import Builder, state_of
from ..equations import SPIKES, Symbol
from ..neurons import Neuron
from ..ops import Node, aten, shape
from ..program import NEURON, NEURON_STEP, STATE, PassReport, Program, Site, where


def lower_neurons(program: Program) -> Program:
    """Replace every neuron by primitive operators, T steps unrolled."""
    return _Lower(program).run()


class _Value(Symbol):
    """A value of the graph inside a charge equation: arithmetic on it emits nodes."""

    def __init__(self, emit: _Emitter, node: Node) -> None:
        self.emit, self.node = emit, node

    def apply(self, op: str, *args: Any) -> Any:
        """The operator's node; what rounding leaves exact takes a simpler form."""
        a, b = (*args, None)[:2]
        if op in ("add", "mul") and not isinstance(a, _Value):
            a, b = b, a
        if (op in ("add", "sub") and _is(b, 0.0)) or (op in ("mul", "div") and _is(b, 1.0)):
            return a
        if op == "sub" and not isinstance(a, _Value):
            return self.apply("add", -b, a)
        if op == "div" and not isinstance(a, _Value):
            return self.emit(_OPERATORS[op], self.emit.constant(a), b)
        if op == "div" and isinstance(b, (int, float)) and _power_of_two(b):
            return a * (1.0 / b)  # exact, and a multiplication is cheaper than a division
        return self.emit(_OPERATORS[op], *((a,) if b is None else (a, b)))

    def __ge__(self, other: Any) -> Any:
        return self.emit.compare("ge", self, other)

    def __gt__(self, other: Any) -> Any:
        return self.emit.compare("gt", self, other)


_OPERATORS = {
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "pow": aten.pow.Tensor_Scalar,
    "neg": aten.neg.default,
    "abs": aten.abs.default,
    "sigmoid": aten.sigmoid.default,
    "exp": aten.exp.default,
    "tanh": aten.tanh.default,
    "relu": aten.relu.default,
}


def _is(value: Any, number: float) -> bool:
    """Whether a constant is this number, so that the operation with it changes nothing."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.item() == number
    return isinstance(value, (int, float)) and value == number


def _power_of_two(value: float) -> bool:
    mantissa, _ = torch.frexp(torch.tensor(float(value), dtype=torch.float64))
    return abs(mantissa.item()) == 0.5


class _Emitter:
    """Emits the nodes of one neuron, each once; constants are named after its path."""

    def __init__(self, build: Builder, path: str, site: str, dtype: torch.dtype) -> None:
        self.build, self.path, self.dtype = build, path, dtype
        self.stem = f"{site.replace('#', '_')}.constant"
        self.emitted: dict[Any, Node] = {}

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> _Value:
        # A reset at the next step compares what the spikes of this one came from.
        args = tuple(map(self._argument, args))
        key = (target, args, *kwargs.items())
        if key not in self.emitted:
            self.emitted[key] = self.build.call(target, *args, path=self.path, **kwargs)
        return _Value(self, self.emitted[key])

    def _argument(self, value: Any) -> Any:
        if isinstance(value, _Value):
            return value.node
        if isinstance(value, torch.Tensor):
            return value.item() if value.dim() == 0 else self._tensor(value)
        return value

    def _tensor(self, value: torch.Tensor) -> Node:
        return self.build.constant(self.stem, value.detach().to(self.dtype))

    def constant(self, value: Any) -> _Value:
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        return _Value(self, self._tensor(tensor))

    def value(self, value: Any) -> _Value:
        """A node for what may be a constant."""
        return value if isinstance(value, _Value) else self.constant(value)

    def compare(self, name: str, a: _Value, b: Any) -> _Value:
        b = self._argument(b)
        packet = getattr(aten, name)
        return self(packet.Tensor if isinstance(b, fx.Node) else packet.Scalar, a, b)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """As torch.where; where everything is constant it is computed."""
        if not isinstance(condition, _Value):
            return torch.where(torch.as_tensor(condition), a, b)
        if isinstance(a, _Value) and isinstance(b, _Value) and _one_less(a.node, b.node):
            return b - self.number(condition)  # one operator for two, and as exact
        a, b = self._argument(a), self._argument(b)
        overload = {
            (True, True): aten.where.self,
            (False, True): aten.where.ScalarSelf,
            (True, False): aten.where.ScalarOther,
            (False, False): aten.where.Scalar,
        }[isinstance(a, fx.Node), isinstance(b, fx.Node)]
        return self(overload, condition, a, b)

    def number(self, condition: _Value) -> _Value:
        """1 where the condition holds, else 0."""
        return self(aten._to_copy.default, condition, dtype=self.dtype)


def _one_less(a: Node, b: Node) -> bool:
    """Whether a is b - 1."""
    return a.target is aten.sub.Tensor and a.args == (b, 1.0)


class _Lower(Builder):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.env: dict[Node, Node] = {}
        self.sites = {site.spikes[0]: site for site in program.sites}
        self.lowered: list[Site] = []
        self.done: list[str] = []
        # The state after a single step, by the node of its call: it need not be a node itself.
        self.states: dict[Node, Any] = {}
        self.unrolled: dict[Any, list[tuple[Node, tuple[Any, ...]]]] = {}

    def run(self) -> Program:
        for n in self.program.walk():
            if n.op == "placeholder":
                self.env[n] = self.placeholder(n, n.meta["val"])
            elif n.op == "get_attr":
                self.env[n] = self.copy(n, self.env)
            elif n.op == "call_function" and n.target is NEURON:
                self._multi_step(n)
            elif n.op == "call_function" and n.target is STATE:
                self._state(n)
            elif n.op == "call_function" and n.target is NEURON_STEP:
                self._single_step(n)
            elif n.op == "call_function" and n.args and n.args[0] in self.states:
                continue
            elif (call := state_of(n)) is not None:
                emit = _Emitter(self, where(n), f"{where(n)}.{n.name}", n.meta["val"].dtype)
                self.env[n] = emit.value(self.states[call][n.args[2]]).node
            elif n.op == "call_function":
                self.env[n] = self.copy(n, self.env)
        named, known = self.program.named(), {site.name for site in self.lowered}
        for site in self.program.sites:
            if site.name not in known:
                self._site(
                    site,
                    [self.env[named[d]] for d in site.drives],
                    [self.env[named[s]] for s in site.spikes],
                )
        report = PassReport("lower_neurons", tuple(self.done))
        order = {site.name: i for i, site in enumerate(self.program.sites)}
        sites = sorted(self.lowered, key=lambda s: order[s.name])
        outputs = [self.env[r] for r in self.program.results]
        return self.finish(outputs, report, sites)

    def _site(self, site: Site, drives: list[Node], spikes: list[Node]) -> None:
        names = (tuple(d.name for d in drives), tuple(s.name for s in spikes))
        self.lowered.append(replace(site, drives=names[0], spikes=names[1]))
        self.done.append(f"{site.name}: {site.neuron.describe()}, {site.T} steps")

    def _initial(self, neuron: Neuron, dtype: torch.dtype) -> tuple[Any, ...]:
        """The constants that the first step starts from."""
        return tuple(torch.as_tensor(value, dtype=dtype).detach() for value in neuron.starts)

    def _step(
        self, neuron: Neuron, state: tuple[Any, ...], x: _Value, t: int
    ) -> tuple[Node, tuple[Any, ...]]:
        """Spikes in the dtype of x, and the state after the step."""
        fired, state, _ = neuron.step(state, x, neuron.fired, x.emit.where, t)
        # The charge may multiply the last step's spikes, which a boolean does not take.
        spikes = x.emit.number(fired)
        parts = zip(state[1:], neuron.dynamics.states, strict=True)
        return spikes.node, (
            state[0],
            *(spikes if name == SPIKES else part for part, name in parts),
        )

    def _multi_step(self, n: Node) -> None:
        site = self.sites[n.name]
        spikes = [s for s, _ in self._unrolled(n)]
        node = self._joined(spikes, where(n))
        self.env[n] = node
        self._site(site, [self.env[n.args[0]]], [node])

    def _state(self, n: Node) -> None:
        x, index = self.env[n.args[0]], n.args[5]
        emit = _Emitter(self, where(n), f"{where(n)}.state_{index}", x.meta["val"].dtype)
        parts = [emit.value(state[index]).node for _, state in self._unrolled(n)]
        self.env[n] = self._joined(parts, where(n))

    def _joined(self, steps: list[Node], path: str) -> Node:
        return steps[0] if len(steps) == 1 else self.call(aten.cat.default, steps, 0, path=path)

    def _unrolled(self, n: Node) -> list[tuple[Node, tuple[Any, ...]]]:
        """Spikes and state of each step of a layer, emitted once for all that ask for them."""
        x, params, spec, layout, T = n.args[:5]
        key = (x, tuple(params), spec, layout)
        if key in self.unrolled:
            return self.unrolled[key]
        neuron = Neuron.from_json(spec, (self.program.tensor(p.target) for p in params))
        x, path = self.env[x], where(n)
        dtype = x.meta["val"].dtype
        name = self.sites[n.name].name if n.name in self.sites else f"{path}.state"
        emit = _Emitter(self, path, name, dtype)
        N = shape(x)[0] // (1 if layout == "static" else T)
        state = self._initial(neuron, dtype)
        steps = self.unrolled[key] = []
        for t in range(T):
            xt = x
            if layout != "static" and T > 1:
                xt = self.call(aten.slice.Tensor, x, 0, t * N, (t + 1) * N, path=path)
            s, state = self._step(neuron, state, _Value(emit, xt), t)
            steps.append((s, state))
        return steps

    def _single_step(self, n: Node) -> None:
        x, before, _, spec, t = n.args
        path = where(n)
        neuron = Neuron.from_json(spec, (self.program.tensor(p.target) for p in n.args[2]))
        dtype = x.meta["val"].dtype
        emit = _Emitter(self, path, f"{path}.step_{t}", dtype)
        state = self._initial(neuron, dtype)
        if before.target is operator.getitem and before.args[0] in self.states:
            state = self.states[before.args[0]]
        elif t > 0 and before.target is aten.stack.default:  # of the inputs of a stepped program
            state = tuple(_Value(emit, self.env[part]) for part in before.args[0])
        spikes, self.states[n] = self._step(neuron, state, _Value(emit, self.env[x]), t)
        if spikes.users or any(getattr(part, "node", None) is spikes for part in self.states[n]):
            # Where a run is given other spikes, the layer goes on from its own.
            spikes = self.call(spikes.target, *spikes.args, path=path, **spikes.kwargs)
        for user in n.users:
            if user.args[1] == 0:
                self.env[user] = spikes
