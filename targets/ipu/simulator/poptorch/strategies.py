"""How blocks of a network become stages and go to IPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .enums import AutoStage, Liveness


class Stage:
    """Blocks that run together on one IPU.

    Args:
        block_ids: Their names.
    """

    def __init__(self, *block_ids: str) -> None:
        assert all(isinstance(b, str) for b in block_ids), (
            f"Block IDs are supposed to be strings but got {block_ids}"
        )
        self._blocks = block_ids
        self._stage_id = -1
        self._phase_id = -1
        self._ipu: int | None = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks."""
        return self._blocks

    def ipu(self, ipu: int) -> Stage:
        """Put the stage onto this IPU."""
        assert isinstance(ipu, int)
        self._ipu = ipu
        return self


class Phase:
    """Stages that run at the same time; strings make up one stage."""

    def __init__(self, *arg: str | Stage) -> None:
        if all(isinstance(a, Stage) for a in arg):
            self.stages = [a for a in arg if isinstance(a, Stage)]
        else:
            assert all(isinstance(a, str) for a in arg), (
                "All arguments must either be block ids (strings) or Stages: "
                f"{[type(a) for a in arg]}"
            )
            self.stages = [Stage(*(a for a in arg if isinstance(a, str)))]

    def stage(self, idx: int) -> Stage:
        """One stage, by position."""
        return self.stages[idx]

    def ipus(self, *ipus: int) -> None:
        """One IPU for each stage."""
        assert len(ipus) == len(self.stages), (
            f"Phase contains {len(self.stages)} stages but you provided {len(ipus)} ipus"
        )
        for stage, ipu in zip(self.stages, ipus, strict=True):
            stage.ipu(ipu)


class ExecutionStrategy:
    """Maps blocks to stages, while a network is traced."""

    pipelined = False

    def __init__(self, blocks: dict[str, Stage], auto_stage: AutoStage | None = None) -> None:
        self._blocks = blocks
        self._auto_stage = auto_stage
        self._found: dict[str, Stage] = {}
        self._auto_ids = 0

    def stage(self, block_id: str) -> Stage:
        """The stage that a block belongs to."""
        assert block_id in self._blocks, f"Unknown block {block_id}"
        return self._blocks[block_id]

    def restart(self) -> None:
        """Forget the blocks of an earlier trace."""
        self._found.clear()
        self._auto_ids = 0

    def reset_auto_ids(self) -> None:
        """Number the blocks without a name from 0 again."""
        self._auto_ids = 0

    def begin(self, user_id: str | None, ipu_id: int | None) -> tuple[int, int]:
        """The stage and the IPU of a block that begins.

        Raises:
            AssertionError: The strategy does not know the block.
        """
        if user_id is None:
            user_id = str(self._auto_ids)
            self._auto_ids += 1
        stage = self._stage_of(user_id, ipu_id)
        number = stage._stage_id if stage._stage_id >= 0 else stage._phase_id
        ipu = next(i for i in (stage._ipu, ipu_id, number) if i is not None)
        return number, ipu

    def _stage_of(self, user_id: str, ipu_id: int | None) -> Stage:
        if self._auto_stage is None:
            assert user_id in self._blocks, (
                f"Unknown Block '{user_id}' list of expected Blocks: {list(self._blocks)}"
            )
            return self._blocks[user_id]
        if user_id not in self._found:
            stage = self._found[user_id] = Stage(user_id)
            if self._auto_stage == AutoStage.SameAsIpu:
                assert ipu_id is not None, (
                    "poptorch.AutoStage.SameAsIpu was selected but no IPU was specified for "
                    f"block {user_id}"
                )
                stage._stage_id = ipu_id
            else:
                stage._stage_id = len(self._found) - 1
        return self._found[user_id]


class PipelinedExecution(ExecutionStrategy):
    """Stages that work on different micro-batches at the same time.

    Args:
        args: An :class:`AutoStage`, or for each stage a :class:`Stage`, a block's name or several.
    """

    pipelined = True

    def __init__(self, *args: AutoStage | Stage | str | Sequence[str]) -> None:
        if len(args) == 1 and isinstance(args[0], AutoStage):
            super().__init__({}, args[0])
            return
        blocks: dict[str, Stage] = {}
        for number, arg in enumerate(args):
            if isinstance(arg, Stage):
                stage = arg
            elif isinstance(arg, str):
                stage = Stage(arg)
            else:
                assert not isinstance(arg, AutoStage)
                stage = Stage(*arg)
            stage._stage_id = number
            _assign(blocks, stage)
        super().__init__(blocks, None if blocks else AutoStage.SameAsIpu)


class ShardedExecution(PipelinedExecution):
    """Stages that work one after the other."""

    pipelined = False


class _PhasedExecution(ExecutionStrategy):
    def __init__(self, *phases: Any) -> None:
        assert phases, (
            "There is currently no AutoStage for PhasedExecution, please explicitly specify the "
            "phases"
        )
        self._phases: list[Phase] = []
        blocks: dict[str, Stage] = {}
        for number, given in enumerate(phases):
            items = given if isinstance(given, list) else [given]
            phase = given if isinstance(given, Phase) else Phase(*items)
            self._phases.append(phase)
            for stage in phase.stages:
                stage._phase_id = number
                _assign(blocks, stage)
        self._liveness = Liveness.AlwaysLive
        self._separate_backward = False
        super().__init__(blocks)

    def phase(self, phase: int) -> Phase:
        """One phase, by position."""
        assert phase in range(len(self._phases)), "Phases are identified by positive integers"
        return self._phases[phase]

    def useSeparateBackwardPhase(self, use: bool = True) -> _PhasedExecution:
        """Whether the backward pass begins in a phase of its own."""
        assert isinstance(use, bool)
        self._separate_backward = use
        return self


class ParallelPhasedExecution(_PhasedExecution):
    """Phases that alternate between two groups of IPUs."""

    def sendTensorsOffChipAfterFwd(self, off_chip: bool = True) -> ParallelPhasedExecution:
        """Whether activations leave the chip between forward and backward pass."""
        assert isinstance(off_chip, bool)
        self._liveness = Liveness.OffChipAfterFwd if off_chip else Liveness.AlwaysLive
        return self


class SerialPhasedExecution(_PhasedExecution):
    """Phases that run one after the other on the same IPUs."""

    def setTensorsLiveness(self, liveness: Liveness) -> SerialPhasedExecution:
        """Which tensors stay on the chip between phases."""
        assert isinstance(liveness, Liveness)
        self._liveness = liveness
        return self


def _assign(blocks: dict[str, Stage], stage: Stage) -> None:
    for block in stage.blocks:
        assert block not in blocks, f"{block} associated with more than one stage"
        blocks[block] = stage
