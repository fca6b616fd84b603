"""Tests of the tests: the state machine must find bugs planted in what a manager does with host slots and moves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test
from manager_machine import MODEL, Driver, ManagerMachine, StepView, machine_for
from manager_model import ModelManager, ModelStep, Move, Node, Seq
from manager_streams import Work
from test_planted_bugs import SETTINGS, silent

RIGHT = partial(ModelManager, checking=False)


def run(
    subject: Callable[..., ModelManager],
    reference: Callable[..., ModelManager] = RIGHT,
    engine: type[ManagerMachine] = ManagerMachine,
) -> None:
    machine = machine_for(Driver(subject, MODEL.step, MODEL.read), reference, tiers=True, states=False)
    if engine is not ManagerMachine:
        machine = type(machine.__name__, (engine, machine), {})
    run_state_machine_as_test(machine, settings=SETTINGS)


class MovesOfAnAbortedStepAreLost(ModelManager):
    def abort(self, step_id: int) -> list[int]:
        self.moves_marked = self.moves_handed
        return super().abort(step_id)


class MovesAreKnownToTheirStepOnly(ModelManager):
    """The next step may be prepared, in other arrays, before the moves of the last one are on their way."""

    def prepare(self, seqs: Any, query_lens: Any, step: ModelStep, **options: bool) -> int:
        self.moves_marked = self.moves_handed
        return super().prepare(seqs, query_lens, step, **options)


class PassDoesNotWaitForItsLoads(ModelManager):
    def prepare(self, seqs: Any, query_lens: Any, step: ModelStep, **options: bool) -> int:
        step_id = super().prepare(seqs, query_lens, step, **options)
        step.needs = 0
        return step_id


class WriterDoesNotWait(ModelManager):
    """A block that was given out anew is written while its last move still reads it."""

    def _take(self, sequence: Seq) -> int:
        needs = sequence.needs
        block = super()._take(sequence)
        sequence.needs = needs
        return block


class OffloadsRunBeforeLoads(ModelManager):
    def prepare(self, seqs: Any, query_lens: Any, step: ModelStep, **options: bool) -> int:
        step_id = super().prepare(seqs, query_lens, step, **options)
        step.moves.sort(key=lambda move: move.loads)
        return step_id


class CancelledLoadIsDone(ModelManager):
    def _cancel_load(self, block: int) -> None:
        pass


class EvictedSlotIsStillFound(ModelManager):
    def _drop_slot(self, slot: int) -> None:
        node, g = self.home[slot]
        super()._drop_slot(slot)
        if node.children:
            node.slots[g] = slot


class ResetKeepsTheHost(ModelManager):
    def reset_prefix_cache(self) -> None:
        roots, host = self.roots.copy(), (self.host_unused, self.host_slots, self.home)
        self.host_unused, self.host_slots, self.home = [], [], {}
        super().reset_prefix_cache()
        self.roots, (self.host_unused, self.host_slots, self.home) = roots, host
        for node in self._all_nodes():
            node.blocks = [None] * len(self.groups)


class ParentsAreUsedFirst(ModelManager):
    """A hit makes the slots of children more recent than their parents', which are evicted before them."""

    def _hold_path(self, path: list[Node], sequence: Seq) -> list[list[int]]:
        table = super()._hold_path(path, sequence)
        for node in path:
            for g in range(len(self.groups)):
                self._use_slot(node, g)
        return table


class EvictionLeavesTheSlotOld(ModelManager):
    """A slot is as old as its offload, though its device block was evicted just now."""

    def _unpublish(self, block: int) -> None:
        slots = list(self.host_slots)
        super()._unpublish(block)
        self.host_slots = slots


class OutOfWindowIsOffloaded(ModelManager):
    def _slide(self, sequence: Seq) -> None:
        super()._slide(sequence)
        self.slid.clear()


class LoadsCountForNothing(ModelManager):
    """An admission forgets that what comes from the host needs blocks on the device."""

    def _find_room(self, sequence: Seq, reserve: int | None, max_hit: int | None, watermark: int, host: bool) -> Any:
        unused, self.unused = self.unused, [*self.unused, *[0] * len(self.home)]
        try:
            return super()._find_room(sequence, reserve, max_hit, watermark, host)
        finally:
            self.unused = unused


class HostSlotsBlockPublishing(ModelManager):
    """Nodes that only host slots keep are not given up for new ones."""

    def _publish(self, sequence: Seq) -> None:
        slots, self.host_slots = self.host_slots, []
        super()._publish(sequence)
        self.host_slots = slots


# Seen in what blocks and slots hold, without a right manager to compare with.
MISREAD: list[type[ModelManager]] = [
    PassDoesNotWaitForItsLoads,
    WriterDoesNotWait,
    ResetKeepsTheHost,
]
OTHERS: list[type[ModelManager]] = [
    MovesOfAnAbortedStepAreLost,
    MovesAreKnownToTheirStepOnly,
    OffloadsRunBeforeLoads,
    CancelledLoadIsDone,
    EvictedSlotIsStillFound,
    ParentsAreUsedFirst,
    EvictionLeavesTheSlotOld,
    OutOfWindowIsOffloaded,
    LoadsCountForNothing,
    HostSlotsBlockPublishing,
]


@pytest.mark.parametrize("mutant", OTHERS)
def test_comparison_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises((AssertionError, LookupError)):
        run(silent(mutant))


@pytest.mark.parametrize("mutant", MISREAD)
def test_device_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises(AssertionError, match=r"another prefix"):
        run(silent(mutant), silent(mutant))


class HastyMoves(ManagerMachine):
    """An engine whose moves do not wait for the passes of steps that are closed."""

    def launch_moves(self, step: StepView, last_move: int, after: list[Work], needs: int, aborted: bool) -> None:
        super().launch_moves(step, last_move, [], needs, aborted)


class LostMove(ManagerMachine):
    """An engine that forgets the last of a step's moves."""

    def launch_moves(self, step: StepView, last_move: int, after: list[Work], needs: int, aborted: bool) -> None:
        moves: list[Move] = step.moves
        del moves[len(moves) - 1 :]
        super().launch_moves(step, last_move, after, needs, aborted)


@pytest.mark.parametrize("engine", [HastyMoves, LostMove])
def test_device_finds_a_wrong_engine(engine: type[ManagerMachine]) -> None:
    with pytest.raises(AssertionError, match=r"another prefix"):
        run(RIGHT, RIGHT, engine)
