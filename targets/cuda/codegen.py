"""Triton source of a neuron's kernels, written from its declaration.

One program works on a tile of neurons for all T time steps, in chunks of ``steps``. The state stays in
registers, in float32 whatever the dtype of x. The forward pass reads x and writes the spikes; where a
backward pass will come, it also keeps the state at the start of each chunk but the first. The backward
pass reads x and the gradient of the spikes, computes the chunk's states again, and runs the recursion of
the derivatives in reverse.

A batch norm before the neuron is part of its kernels: x is then ``(y - mean) * scale + shift``, and the
derivatives that the norm's own backward pass sums over a channel are those in ``shift`` and ``scale``.

A max pooling after the neuron is part of its kernels too: a program works on a tile of windows, takes the
neurons of each window one beside the other, and writes whether one of them fired. As in torch, the
gradient goes to the first that fired, or to the window's first neuron if none did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...converters.neurons import Neuron
from ...converters.surrogates import Surrogate
from ...converters.symbolic import Expr, Tape, backward
from .text import Text

#: What a batch norm before the neuron adds to its parameters.
NORM = ("norm_mean", "norm_scale", "norm_shift")


@dataclass(frozen=True)
class Spec:
    """All that decides the source of a pair of kernels.

    Attributes:
        neuron: ``Neuron.to_json()``.
        reads: How each tensor among the parameters is read: ``"scalar"``, one number; ``"element"``,
            repeated over the tile as (n // inner) % size; ``"channel"``, one number a channel of the
            tile.
        surrogate: ``Surrogate.to_json()``.
        detach_reset: Whether the reset passes no gradient.
        steps: Time steps of a chunk.
        tail: Time steps of the last chunk, if it is shorter, else 0.
        loop: Whether there are chunks besides the tail's that a loop runs over; T <= steps has none.
        counted: Whether the compiler knows the number of whole chunks.
        tile: ``"flat"``, consecutive neurons; ``"rows"``, [neurons, channels] with channels innermost;
            ``"planes"``, [outer, inner] of one channel.
        masked: Whether the last tile reaches beyond the neurons.
        wide: Whether the neurons' numbers need 64 bits.
        strided: Whether x[t] is not dense: n lies at (n // inner) * outer + n % inner.
        normalised: Whether a batch norm precedes.
        window: Height and width of a max pooling's windows; (1, 1) if none follows.
    """

    neuron: str
    reads: tuple[tuple[str, Literal["scalar", "element", "channel"]], ...]
    surrogate: str
    detach_reset: bool
    steps: int
    tail: int = 0
    loop: bool = False
    counted: bool = True
    tile: Literal["flat", "rows", "planes"] = "flat"
    masked: bool = True
    wide: bool = False
    strided: bool = False
    normalised: bool = False
    window: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Forward:
    """What a forward kernel is asked for besides the spikes.

    Attributes:
        initial: Whether it starts from a state that is given.
        final: Whether it gives the last state.
        sequence: The part of the state that it gives after each step, by name; none if empty.
        checkpoints: Whether it keeps the state at the start of each chunk but the first.
    """

    initial: bool = False
    final: bool = False
    sequence: str = ""
    checkpoints: bool = False


@dataclass(frozen=True)
class Backward:
    """What a backward kernel is given and asked for.

    Attributes:
        initial: Whether the forward pass started from a state that was given.
        final: Whether the last state has a gradient.
        v_seq: Whether v after each step has a gradient.
        into_x: ``"x"``, the gradient of x; ``"norm"``, that of a batch norm's input, corrected for the
            norm's own mean and variance; or None.
        wrt: Parameters whose gradients are wanted.
    """

    initial: bool = False
    final: bool = False
    v_seq: bool = False
    into_x: Literal["x", "norm"] | None = "x"
    wrt: tuple[str, ...] = ()

    def of_last(self, step: _Step) -> tuple[str, ...]:
        """The parts of the last state that have a gradient."""
        return step.names if self.final else ("v",) if self.v_seq else ()


#: Whether a step is the last of all, as far as the source's text can know.
Last = Literal["yes", "no", "perhaps"]

#: Steps before its use that the gradient of the spikes is loaded: all of a chunk's fill the registers.
_AHEAD = 8


class _Step:
    """One time step as expressions."""

    def __init__(self, spec: Spec) -> None:
        self.tape = tape = Tape()
        names = [name for name, _ in spec.reads]
        self.params = {name: tape.input(f"p_{name}") for name in names}
        own = [self.params[n] for n in names if n not in NORM]
        self.neuron = neuron = Neuron.from_json(spec.neuron, own)
        self.surrogate = Surrogate.from_json(spec.surrogate)
        self.names = ("v", *neuron.dynamics.states)
        self.state = tuple(tape.input(f"q_{n}") for n in self.names)
        self.x = drive = tape.input("x")
        if spec.normalised:
            mean, scale, shift = (self.params[n] for n in NORM)
            drive = (self.x - mean) * scale + shift
        began = tape.input("began")

        def fire(h: Expr) -> Expr:
            s = tape.fire(h, neuron.v_threshold, neuron.fires, self.surrogate)
            return s * began if h is self.state[0] else s

        def select(s: Expr, yes: Any, no: Expr) -> Any:
            s = s.detach() if spec.detach_reset else s
            return s * yes + (1.0 - s) * no

        def lower(s: Expr, h: Expr, by: Any) -> Any:
            return h - (s.detach() if spec.detach_reset else s) * by

        self.spikes, after, self.h = neuron.step(self.state, drive, fire, select, lower=lower)
        self.after = tuple(tape.lift(part) for part in after)
        self.forward = len(tape.exprs)

    def gradients(
        self, wrt: list[Expr], used: Sequence[str], idle: Sequence[str] = ()
    ) -> list[Expr]:
        """The derivatives in ``wrt``, from g_spikes and, for each part of the state in use, gq_<name>.

        Those of the ``idle`` parts are 0 at the last step of all, where they add nothing.
        """
        seeds: dict[Expr, Expr] = {self.spikes: self.tape.input("g_spikes")}
        zeros: dict[Expr, Expr] = {}
        for name, part in zip(self.names, self.after, strict=True):
            if name in (*used, *idle):
                to, g = zeros if name in idle else seeds, self.tape.input(f"gq_{name}")
                to[part] = to[part] + g if part in to else g
        return backward(self.tape, seeds, wrt, zeros, self._finite)

    def _finite(self, factor: Expr) -> Expr:
        """A factor that is some finite number at the last step of all."""
        if not self._may_be_infinite(factor):
            return factor
        return self.tape.emit("where", self.tape.input("last"), 1.0, factor)

    def _may_be_infinite(self, e: Expr) -> bool:
        """Whether infinity or NaN in x or the state can get into a value."""
        if e.op == "input":
            return e is self.x or e in self.state
        return not e.op.startswith("fire") and any(map(self._may_be_infinite, e.args))


class _Kernel:
    """What the forward and the backward kernel share: arguments, tile, parameters."""

    def __init__(self, spec: Spec, name: str) -> None:
        self.spec, self.name = spec, name
        self.step = _Step(spec)
        self.reads = dict(spec.reads)
        self.text = Text(self.step.forward)
        self.arguments: list[str] = []
        height, width = spec.window
        self.pooled = height * width > 1
        #: The neurons of a window: what the names of their values end in.
        self.members = [f"_w{i}" for i in range(height * width)] if self.pooled else [""]

    def pointer(self, name: str) -> str:
        """Another pointer among the arguments."""
        self.arguments.append(name)
        return name

    def source(self) -> str:
        """The whole function."""
        spec = self.spec
        sizes = ["N"]
        sizes += [f"{n}_{w}" for n, r in spec.reads if r == "element" for w in ("inner", "size")]
        sizes += ["x_time", "x_inner", "x_outer"] if spec.strided else []
        sizes += ["rows", "C", "inner"] if spec.tile != "flat" else []
        sizes += ["columns", "within_column"] if self.pooled else []
        sizes += [] if spec.counted else ["chunks"]
        blocks = ["BLOCK"] if spec.tile == "flat" else ["BLOCK_R", "BLOCK_C"]
        blocks = ["chunks", *blocks] if spec.counted else blocks
        arguments = [*self.arguments, *sizes, *(f"{b}: tl.constexpr" for b in blocks)]
        return f"def {self.name}({', '.join(arguments)}):\n" + "\n".join(self.text.lines) + "\n"

    def prologue(self) -> None:
        """The tile's neurons n, its mask and its parameters."""
        p, spec = self.text, self.spec
        index = "tl.int64" if spec.wide else "tl.int32"
        p("N64 = tl.cast(N, tl.int64)")
        if spec.tile == "flat":
            p(f"program = tl.cast(tl.program_id(0), {index})")
            p("n = program * BLOCK + tl.arange(0, BLOCK)")
            p("within = n < N")
            self.shape = "[BLOCK]"
        else:
            p(f"program, column = tl.cast(tl.program_id(0), {index}), tl.program_id(1)")
            p("across = tl.arange(0, BLOCK_C)[None, :]")
            if spec.tile == "rows":
                p("row = program * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]")
                p("channel = column * BLOCK_C + across")
                p("n = row * C + channel")
                p("within = (row < rows) & (channel < C)")
                p("in_channel = channel < C")
            else:
                p("blocks = tl.cdiv(inner, BLOCK_C)")
                p("row = (program // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]")
                p("across = (program % blocks) * BLOCK_C + across")
                p("channel = column")
                p("n = (row * C + channel) * inner + across")
                p("within = (row < rows) & (across < inner)")
                p("in_channel = channel < C")
            self.shape = "[BLOCK_R, BLOCK_C]"
        p("M64 = N64")
        if self.pooled:
            self._windows(index)
        for name, read in spec.reads:
            pointer = self.pointer(f"{name}_ptr")
            if read == "scalar":
                p(f"p_{name} = tl.load({pointer}).to(tl.float32)")
            elif read == "channel":
                p(f"p_{name} = tl.load({pointer} + channel, mask=in_channel).to(tl.float32)")
            else:
                at = f"{pointer} + (n{self.members[0]} // {name}_inner) % {name}_size"
                p(f"p_{name} = tl.load({at}{self.mask(other=True)}).to(tl.float32)")
        if spec.strided:
            for w in self.members:
                p(f"n_x{w} = (n{w} // x_inner) * x_outer + n{w} % x_inner")

    def _windows(self, index: str) -> None:
        """Where the neurons of window n lie, and how many neurons there are."""
        p, (height, width) = self.text, self.spec.window
        p(f"M64 = N64 * {height * width}")
        p(f"width = tl.cast(columns * {width}, {index})")
        p("window = n // within_column")
        p(f"corner = (window // columns) * {height} * width + (window % columns) * {width}")
        for i, w in enumerate(self.members):
            at = f"corner + {i // width} * width + {i % width}"
            p(f"n{w} = ({at}) * within_column + n % within_column")

    def mask(self, other: bool = False) -> str:
        """The mask of a load or store."""
        if not self.spec.masked:
            return ""
        return ", mask=within, other=0.0" if other else ", mask=within"

    def load(self, pointer: str, base: str, w: str = "") -> str:
        """A load of the tile in float32; of a window's neurons, those of w."""
        return f"tl.load({pointer} + ({base}) + n{w}{self.mask(other=True)}).to(tl.float32)"

    def load_x(self, t: str, w: str) -> str:
        """x[t] in float32."""
        if not self.spec.strided:
            return self.load("x_ptr", f"({t}) * M64", w)
        at = f"x_ptr + ({t}) * tl.cast(x_time, tl.int64) + n_x{w}"
        return f"tl.load({at}{self.mask(other=True)}).to(tl.float32)"

    def checkpoint(self, i: int) -> str:
        """Where part i of the state at the start of a chunk is kept."""
        return f"((chunk - 1) * {len(self.step.names)} + {i}) * M64"

    def store(self, pointer: str, base: str, value: str, w: str = "") -> None:
        """Write the tile, in the pointer's dtype."""
        value = f"tl.cast({value}, {pointer}.dtype.element_ty)"
        self.text(f"tl.store({pointer} + ({base}) + n{w}, {value}{self.mask()})")

    def initial(self, given: bool, after: str = "") -> None:
        """The state before the first step, under names that end in ``after``."""
        neuron = self.step.neuron
        for w in self.members:
            for i, (name, value) in enumerate(zip(self.step.names, neuron.starts, strict=True)):
                if given:
                    start = self.load("initial_ptr", f"{i} * M64", w)
                elif isinstance(value, Expr):
                    start = f"{self.block('0.0')} + {value.value}"
                else:
                    start = self.block(repr(value))
                self.text(f"q_{name}{w}{after} = {start}")

    def block(self, value: str) -> str:
        """A value as a tile, which a number is not."""
        number = value.lstrip("-")[:1].isdigit()
        return f"tl.full({self.shape}, {value}, tl.float32)" if number else value

    def began(self, k: int, given: bool, looped: bool) -> str:
        """1.0 where a step was before this one, as a number."""
        if k or given:
            return "1.0"
        return "tl.where(chunk > 0, 1.0, 0.0)" if looped else "0.0"

    def given(self, k: int, w: str, initial: bool, looped: bool, after: str = "") -> dict[str, str]:
        """What the inputs of one step are called, the state's names ending in ``after``."""
        state = {f"q_{n}": f"q_{n}{w}{after}" for n in self.step.names}
        began = self.began(k, initial, looped)
        params = {f"p_{n}": f"p_{n}" for n in self.reads}
        return {**params, **state, "x": f"x_{k}{w}", "began": began}


def forward_source(spec: Spec, asked: Forward, name: str = "forward") -> str:
    """The forward kernel.

    Arguments: x, spikes; then, as asked for, sequence, initial, final, checkpoints; the parameters; N and
    what the tile needs; the number of whole chunks and the tile's blocks.
    """
    k = _Kernel(spec, name)
    p, step = k.text, k.step
    k.pointer("x_ptr")
    k.pointer("spikes_ptr")
    for wanted, pointer in (
        (bool(asked.sequence), "sequence_ptr"),
        (asked.initial, "initial_ptr"),
        (asked.final, "final_ptr"),
        (asked.checkpoints, "checkpoints_ptr"),
    ):
        if wanted:
            k.pointer(pointer)
    k.prologue()
    k.initial(asked.initial)

    def chunk(steps: int, looped: bool) -> None:
        p("t = tl.cast(chunk, tl.int64) * " + str(spec.steps))
        if asked.checkpoints:
            p("if chunk > 0:")
            p.indent += 1
            for w in k.members:
                for i, part in enumerate(step.names):
                    k.store("checkpoints_ptr", k.checkpoint(i), f"q_{part}{w}", w)
            p.indent -= 1
        for i in range(steps):
            for w in k.members:
                p(f"x_{i}{w} = {k.load_x(f't + {i}', w)}")
        for i in range(steps):
            fired = []
            for w in k.members:
                given = k.given(i, w, asked.initial, looped)
                spikes, *after = p.evaluate([step.spikes, *step.after], given, f"{i}{w}")
                fired.append(spikes)
                for part, value in zip(step.names, after, strict=True):
                    p(f"q_{part}{w}_{i} = {k.block(value)}")
                if asked.sequence:
                    k.store("sequence_ptr", f"(t + {i}) * M64", f"q_{asked.sequence}{w}_{i}", w)
                for part in step.names:
                    p(f"q_{part}{w} = q_{part}{w}_{i}")
            largest = fired[0]
            for spikes in fired[1:]:
                largest = f"tl.maximum({largest}, {spikes})"
            k.store("spikes_ptr", f"(t + {i}) * N64", largest)

    _chunks(p, spec, chunk, reverse=False)
    for w in k.members if asked.final else ():
        for i, part in enumerate(step.names):
            k.store("final_ptr", f"{i} * M64", f"q_{part}{w}", w)
    return k.source()


def backward_source(spec: Spec, asked: Backward, name: str = "backward") -> str:
    """The backward kernel.

    Arguments: x, the gradient of the spikes; then, as asked for, the gradients of v_seq and of the last
    state; initial, checkpoints; the gradients of x and initial; the two corrections of a batch norm;
    the parameters' gradients, one each of N, of each program, or of each program and channel; the
    parameters; N and what the tile needs; the number of whole chunks and the tile's blocks.
    """
    k = _Kernel(spec, name)
    p, step = k.text, k.step
    kept = spec.loop
    k.pointer("x_ptr")
    k.pointer("g_spikes_ptr")
    for wanted, pointer in (
        (asked.v_seq, "g_v_seq_ptr"),
        (asked.final, "g_final_ptr"),
        (asked.initial, "initial_ptr"),
        (kept, "checkpoints_ptr"),
        (asked.into_x is not None, "g_x_ptr"),
        (asked.initial, "g_initial_ptr"),
        (asked.into_x == "norm", "minus_ptr"),
        (asked.into_x == "norm", "slope_ptr"),
    ):
        if wanted:
            k.pointer(pointer)
    for parameter in asked.wrt:
        k.pointer(f"g_{parameter}_ptr")
    k.prologue()
    if asked.into_x == "norm":
        p("minus = tl.load(minus_ptr + channel, mask=in_channel)")
        p("slope = tl.load(slope_ptr + channel, mask=in_channel)")
    for w in k.members:
        for i, part in enumerate(step.names):
            given = k.load("g_final_ptr", f"{i} * M64", w) if asked.final else k.block("0.0")
            p(f"gq_{part}{w} = {given}")
    for parameter in asked.wrt:
        p(f"gp_{parameter} = {k.block('0.0')}")
    k.initial(asked.initial, after="_start")

    def gradient(i: int) -> None:
        p(f"g_{i} = {k.load('g_spikes_ptr', f'(t + {i}) * N64')}")

    def chunk(steps: int, looped: bool) -> None:
        p("t = tl.cast(chunk, tl.int64) * " + str(spec.steps))
        for w in k.members:
            for i, part in enumerate(step.names):
                start = f"q_{part}{w}_start"
                at = f"checkpoints_ptr + ({k.checkpoint(i)}) + n{w}"
                later = f"(n{w} < tl.where(chunk > 0, M64, 0))"
                within = f"within & {later}" if spec.masked else later
                load = f"tl.load({at}, mask={within}, other={start})"
                p(f"q_{part}{w}_0 = {load if kept else start}")
        last: Last = "yes" if not looped or steps == spec.tail else "no" if spec.tail else "perhaps"
        if last == "perhaps":
            p("last = chunk == chunks - 1")
        for i in range(steps):
            for w in k.members:
                p(f"x_{i}{w} = {k.load_x(f't + {i}', w)}")
        for i in range(max(0, steps - _AHEAD), steps):
            gradient(i)
        for i in range(steps - 1):
            for w in k.members:
                given = k.given(i, w, asked.initial, looped, f"_{i}")
                after = p.evaluate(list(step.after), given, f"f{i}{w}")
                for part, value in zip(step.names, after, strict=True):
                    p(f"q_{part}{w}_{i + 1} = {k.block(value)}")
        for i in reversed(range(steps)):
            if i >= _AHEAD:
                gradient(i - _AHEAD)
            if k.pooled:
                _pooling_backward(k, asked, i, looped)
            for w in k.members:
                _reverse_step(k, asked, i, w, looped, last if i == steps - 1 else "no")

    _chunks(p, spec, chunk, reverse=True)
    for w in k.members if asked.initial else ():
        for i, part in enumerate(step.names):
            k.store("g_initial_ptr", f"{i} * M64", f"gq_{part}{w}", w)
    for parameter in asked.wrt:
        if parameter == "v_0":
            p(" + ".join(["gp_v_0 = gp_v_0", *(f"gq_v{w}" for w in k.members)]))
        _store_parameter(k, parameter)
    return k.source()


def _pooling_backward(k: _Kernel, asked: Backward, i: int, looped: bool) -> None:
    """The gradient of a window's spike goes to its first neuron that fired, or to its first."""
    p, (first, *others) = k.text, k.members
    fired = [
        p.evaluate([k.step.spikes], k.given(i, w, asked.initial, looped, f"_{i}"), f"s{i}{w}")
        for w in k.members
    ]
    p(f"before = {fired[0][0]}")
    for w, (spikes,) in zip(others, fired[1:], strict=True):
        p(f"g_{i}{w} = tl.where({spikes} > before, g_{i}, 0.0)")
        p(f"before = tl.maximum(before, {spikes})")
    p(f"g_{i}{first} = tl.where({fired[0][0]} >= before, g_{i}, 0.0)")


def _reverse_step(k: _Kernel, asked: Backward, i: int, w: str, looped: bool, last: Last) -> None:
    """One step of the recursion of the derivatives.

    What follows the last step is no gradient of 0, which times infinity would be no number, but none.
    """
    p, step = k.text, k.step
    if asked.v_seq:
        p(f"gq_v{w} = gq_v{w} + {k.load('g_v_seq_ptr', f'(t + {i}) * M64', w)}")
    given = k.given(i, w, asked.initial, looped, f"_{i}")
    given |= {f"gq_{n}": f"gq_{n}{w}" for n in step.names}
    given |= {"g_spikes": f"g_{i}{w}", "last": "last"}
    wrt = [step.x, *step.state, *(step.params[n] for n in asked.wrt)]
    ended = asked.of_last(step)
    idle = [n for n in step.names if last == "perhaps" and n not in ended]
    wanted = step.gradients(wrt, ended if last != "no" else step.names, idle)
    g_x, *rest = p.evaluate(wanted, given, f"b{i}{w}")
    if asked.into_x == "norm":
        p(f"g_x = {g_x} - minus - (x_{i}{w} - p_norm_mean) * slope")
        g_x = "g_x"
    if asked.into_x is not None:
        k.store("g_x_ptr", f"(t + {i}) * M64", k.block(g_x), w)
    # All of a step's derivatives are computed from the state's old ones before any is replaced.
    states = [f"gq_{n}{w}" for n in step.names]
    sums = [f"gp_{n}" for n in asked.wrt]
    for target, value in zip(states, rest, strict=False):
        p(f"{target}_{i} = {k.block(value)}")
    for target, value in zip(sums, rest[len(states) :], strict=True):
        p(f"{target} = {target} + {value}")
    for target in states:
        p(f"{target} = {target}_{i}")


def _store_parameter(k: _Kernel, name: str) -> None:
    """A parameter's gradient: summed over what shares a value, as far as one program can."""
    p, read, pointer = k.text, k.reads[name], f"g_{name}_ptr"
    if k.spec.masked and read != "element":
        p(f"gp_{name} = tl.where(within, gp_{name}, 0.0)")
    if read == "element":
        k.store(pointer, "0", f"gp_{name}")
    elif read == "scalar":
        column = "" if k.spec.tile == "flat" else " * tl.num_programs(1) + column"
        p(f"tl.store({pointer} + program{column}, tl.sum(gp_{name}))")
    elif k.spec.tile == "rows":
        p(f"total = tl.sum(gp_{name}, 0)[None, :]")
        p(f"tl.store({pointer} + program * C + channel, total, mask=in_channel)")
    else:
        p(f"tl.store({pointer} + program * C + channel, tl.sum(gp_{name}))")


def _chunks(p: Text, spec: Spec, chunk: Any, reverse: bool) -> None:
    """The chunks in order: a loop over the whole ones, then the tail; or in reverse."""

    def tail() -> None:
        if spec.tail or not spec.loop:
            p("chunk = chunks" if spec.loop else "chunk = 0")
            chunk(spec.tail or spec.steps, looped=spec.loop)

    if reverse:
        tail()
    if spec.loop:
        p("for i in range(0, chunks):")
        p.indent += 1
        p("chunk = chunks - 1 - i" if reverse else "chunk = i")
        chunk(spec.steps, looped=True)
        p.indent -= 1
    if not reverse:
        tail()
