"""What the compiler refuses in a network, and by which rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import Error


@dataclass(frozen=True)
class Rule:
    """A rule of the compiler.

    Attributes:
        name: Short stable name.
        allowed: What it takes.
        fix: What to do about what it does not take.
        complete: Whether the SDK's own text says this already.
    """

    name: str
    allowed: str
    fix: str
    complete: bool = False


_REWRITES = "spikeport.targets.ipu.training_module rewrites the neurons that it knows so"

READ = Rule(
    "value-in-python",
    "values that stay in tensors: the device does not hand them to Python",
    "a branch becomes torch.where, a number an attribute that is set before the model is compiled",
)
SHAPE = Rule("dynamic-shape", "shapes that are static", "mask with torch.where, or take torch.topk")
BACKWARD = Rule(
    "backward-inside",
    "a forward, which the compiler differentiates itself",
    "return the loss, and leave backward() and grad() out",
)
EARLIER = Rule(
    "surviving-state",
    "tensors that this call made, parameters and buffers",
    "reset what an earlier call left in an attribute before the model is compiled",
)
OPERATOR = Rule("operator", "torch's own operations", _REWRITES)
REASSIGNED = Rule(
    "reassigned-buffer",
    "buffers and parameters that are read, or written in place",
    f"state that begins anew in every call belongs into local variables of forward: {_REWRITES}",
)
SURROGATE = Rule(
    "stock-surrogate",
    "a surrogate in differentiable forward operations, because the compiler differentiates the forward "
    "that it traces",
    f"write heaviside(u).detach() + (sigma(u) - sigma(u).detach()): {_REWRITES}",
)
STEP = Rule("zero-gradient", SURROGATE.allowed, SURROGATE.fix)
LOSS = Rule(
    "loss",
    "one final loss, made by a loss of torch's or poptorch.identity_loss",
    "wrap the one final loss in poptorch.identity_loss",
    complete=True,
)
OUTPUT = Rule("output", "tensors, in tuples, lists and dictionaries", "return nothing else")
EMPTY = Rule(
    "empty-tensor", "tensors with elements", "leave out what computes nothing", complete=True
)
NAME = Rule(
    "anchor", "names of getTensorNames()", "give one to Options.anchorTensor", complete=True
)
BUFFERS = Rule(
    "written-buffer",
    "buffers that replicas only read, or one replica",
    "call Options.broadcastBuffers(False), if each replica may have its own",
    complete=True,
)
IPUS = Rule(
    "ipus", "1, 2, 4, ... 64 IPUs in a process", "spread the model over as many", complete=True
)
PIPELINE = Rule(
    "pipeline",
    "as many micro-batches as fill the pipeline",
    "take more, fewer stages, or poptorch.ShardedExecution",
    complete=True,
)
MEMORY = Rule(
    "memory",
    "what one IPU holds",
    "take a smaller batch or fewer time steps, spread the model over IPUs with poptorch.Block, or use "
    "float16",
)


@dataclass(frozen=True)
class Problem:
    """One thing that the compiler refuses.

    Attributes:
        rule: The rule that it breaks.
        text: What the SDK says, with the place in the network.
        module: Path of the module; ``""`` for the model.
    """

    rule: Rule
    text: str
    module: str = ""


class RefusedError(Error):
    """A network that the compiler refuses.

    Attributes:
        problems: Everything that one trace shows.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        hints = dict.fromkeys(_hint(p.rule) for p in self.problems if not p.rule.complete)
        kind = "graph_memory_allocation_error"
        only = {p.rule for p in self.problems} == {MEMORY}
        super().__init__(
            "\n".join([*(p.text for p in self.problems), *hints]),
            kind if only else "poptorch_py_error",
        )


def _hint(rule: Rule) -> str:
    return f"Allowed: {rule.allowed}. To do: {rule.fix}."


class Problems(list[Problem]):
    """Collects what checks raise."""

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Take in a refusal, and go on after the block."""
        try:
            yield
        except RefusedError as error:
            self.extend(error.problems)
