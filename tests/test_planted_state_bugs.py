"""Tests of the tests: the state machine must find bugs planted in what a manager does with the states of sequences."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test
from manager_machine import MODEL, Driver, machine_for
from manager_model import ModelManager, ModelStep, Node, Row, Seq
from test_planted_bugs import SETTINGS, silent

RIGHT = partial(ModelManager, checking=False)


def run(subject: Callable[..., ModelManager], reference: Callable[..., ModelManager] = RIGHT) -> None:
    machine = machine_for(Driver(subject, MODEL.step, MODEL.read), reference, tiers=False, states=True)
    run_state_machine_as_test(machine, settings=SETTINGS)


class CheckpointIsWritten(ModelManager):
    """A sequence goes on in the slot of its checkpoint."""

    def _wants_checkpoint(self, sequence: Seq) -> bool:
        return False

    def _forget_checkpoint(self, slot: int) -> None:
        if self.state_slots[slot].refs == 0:
            super()._forget_checkpoint(slot)


class CheckpointIsCopiedLater(ModelManager):
    """A sequence goes on in its slot, and the next step that is prepared copies what was in it at the grid point."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.due: list[tuple[int, Node]] = []

    def _wants_checkpoint(self, sequence: Seq) -> bool:
        return False

    def _leave_checkpoint(self, row: Row) -> None:
        sequence = row.sequence
        end, node = sequence.num_computed, sequence.last_node
        if sequence.state is not None and end % self.every == 0 and node is not None and node.state is None:
            self.due.append((sequence.state, node))

    def _prepare_states(self, rows: list[Row], taken: list[int], keep: bool, step: ModelStep) -> None:
        super()._prepare_states(rows, taken, keep, step)
        for source, node in self.due:
            if self.state_unused and node in self._all_nodes() and node.state is None:
                node.state = self.state_unused.pop()
                self.state_idle.append(node.state)
                self.state_slots[node.state].node = node
                step.state_copies.append((source, node.state))
        self.due.clear()


class AbortLeavesTheState(ModelManager):
    """A sequence goes on after an aborted pass that wrote its only slot."""

    def _return_state(self, row: Row) -> None:
        super()._return_state(row)
        row.sequence.lost = False


class AbortKeepsTheNewSlot(ModelManager):
    def _return_state(self, row: Row) -> None:
        if row.returns and row.before is not None:
            self._drop_state(row.before)
        else:
            super()._return_state(row)


class SharersGoBack(ModelManager):
    """A row that copied a slot which another row of its step writes goes back to it after an abort."""

    def _prepare_state(self, row: Row, *args: Any) -> None:
        before = row.sequence.state
        super()._prepare_state(row, *args)
        if before is not None and not row.returns and row.states != [before]:
            row.before, row.returns = before, True
            self.state_slots[before].refs += 1


class HitNeedsNoCheckpoint(ModelManager):
    def _serves(self, path: list[Node], host: bool, loads_state: bool | None = None) -> bool:
        every, self.every = self.every, 0
        found = super()._serves(path, host, loads_state)
        self.every = every
        return found

    def _hold_checkpoint(self, node: Node, sequence: Seq) -> int | None:
        return None if node.state is None else super()._hold_checkpoint(node, sequence)


class ForkSharesAndWrites(ModelManager):
    def _plan_states(self, batch: list[Seq], lens: list[int], keep: bool) -> list[int]:
        taken = super()._plan_states(batch, lens, keep)
        return [int(s.state is None) if n == 1 and not keep else n for s, n in zip(batch, taken, strict=True)]


class ZeroIsForgotten(ModelManager):
    def _prepare_states(self, rows: list[Row], taken: list[int], keep: bool, step: ModelStep) -> None:
        super()._prepare_states(rows, taken, keep, step)
        step.state_zero.clear()


class SlotOfAnOpenStepIsGivenOut(ModelManager):
    """A sequence that is freed while a step has it gives its slot back at once."""

    def free(self, seqs: Any) -> None:
        for handle in seqs if isinstance(seqs, list) else []:
            sequence = self.sequences.get(handle)
            if sequence is not None and sequence.state is not None and self._steps_of(sequence):
                self._drop_state(sequence.state)
                sequence.state = None
        super().free(seqs)


class UncommittedIsPublished(ModelManager):
    """Commit hangs the slot on which a sequence stands now, which a later open step writes."""

    def _leave_checkpoint(self, row: Row) -> None:
        sequence = row.sequence
        if sequence.state is not None and not sequence.lost:
            at, self.state_slots[sequence.state].at = self.state_slots[sequence.state].at, sequence.num_computed
            states, row.states = row.states, [sequence.state]
            super()._leave_checkpoint(row)
            row.states, self.state_slots[sequence.state].at = states, at


class OffTheGridIsPublished(ModelManager):
    """A block later, the checkpoint is hung on the node that is the newest then."""

    def _leave_checkpoint(self, row: Row) -> None:
        sequence, node = row.sequence, row.sequence.last_node
        there = sequence.state is not None and node is not None and node.state is None and not sequence.lost
        if there and self.state_slots[sequence.state or 0].node is None and sequence.num_computed % self.every == 1:
            slot = self.state_slots[sequence.state or 0]
            assert node is not None
            node.state, slot.node = sequence.state, node


class OlderCheckpointStays(ModelManager):
    def _leave_checkpoint(self, row: Row) -> None:
        row.sequence.checkpoint = None
        super()._leave_checkpoint(row)


class HitCheckpointIsFreed(ModelManager):
    """A newer checkpoint frees the older one though that was hit."""

    def _hold_checkpoint(self, node: Node, sequence: Seq) -> int | None:
        owner = self.state_slots[node.state].owner if node.state is not None else 0
        slot = super()._hold_checkpoint(node, sequence)
        if slot is not None:
            self.state_slots[slot].owner = owner
        return slot


class PinHoldsNoCheckpoint(ModelManager):
    def pin(self, tokens: Any, **identity: Any) -> int:
        handle = super().pin(tokens, **identity)
        rows, node, state = self.pins[handle]
        if state is not None:
            self._drop_state(state)
        self.pins[handle] = rows, node, None
        return handle


class CheckpointOutlivesItsBlock(ModelManager):
    def _check_anchor(self, node: Node) -> None:
        pass


class ResetKeepsCheckpoints(ModelManager):
    def reset_prefix_cache(self) -> None:
        roots, hung = self.roots, [(slot, slot.node, slot.owner) for slot in self.state_slots if slot.node is not None]
        unused, idle = list(self.state_unused), list(self.state_idle)
        self.roots = {}
        super().reset_prefix_cache()
        if hung and self.state_unused[: len(unused)] == unused and len(self.state_unused) == len(unused) + len(idle):
            self.state_unused, self.state_idle, self.roots = unused, idle, roots
            for slot, node, owner in hung:
                assert node is not None
                node.state, slot.node, slot.owner = self.state_slots.index(slot), node, owner


class RejectedDraftsStay(ModelManager):
    """A state that has seen rejected tokens is gone on from."""

    def _settle_state(self, row: Row, count: int) -> None:
        super()._settle_state(row, count)
        row.sequence.lost = False


class LastDraftIsKept(ModelManager):
    """Whatever was accepted, the state after the last drafted token is taken."""

    def _settle_state(self, row: Row, count: int) -> None:
        if row.keeps and count:
            row.states[count - 1], row.states[-1] = row.states[-1], row.states[count - 1]
        super()._settle_state(row, count)


class TrimKeepsTheState(ModelManager):
    def trim(self, seq: int, num_tokens: int) -> None:
        every, self.every = self.every, 0
        try:
            super().trim(seq, num_tokens)
        finally:
            self.every = every


class CopiesAreNoMoves(ModelManager):
    """A step whose states were never copied can be committed."""

    def prepare(self, seqs: Any, query_lens: Any, step: ModelStep, **options: bool) -> int:
        step_id = super().prepare(seqs, query_lens, step, **options)
        if not step.copies:
            self.moves_marked = self.moves_handed
        return step_id


class FailedPrepareTakesASlot(ModelManager):
    def _plan_states(self, batch: list[Seq], lens: list[int], keep: bool) -> list[int]:
        if len(self.state_unused) == 1:
            self.state_unused.reverse()
            self.num_states += 0
            taken = self.state_unused.pop()
            try:
                return super()._plan_states(batch, lens, keep)
            finally:
                if len(batch) == 1:
                    self.state_unused.append(taken)
        return super()._plan_states(batch, lens, keep)


class OwnStateGoesOverItsCheckpoint(ModelManager):
    """The caller is told to write the state after a pass to the slot that the pass went on from."""

    def _prepare_own(self, rows: list[Row], taken: list[int], step: ModelStep) -> None:
        super()._prepare_own(rows, taken, step)
        for row in rows:
            if row.states and row.before is not None:
                step.state_drafts[step.state_drafts.index(row.states[0])] = row.before


class PartOfAnOwnPassIsPublished(ModelManager):
    """The state after all tokens of a pass is hung on the node of those that count."""

    def _settle_state(self, row: Row, count: int) -> None:
        states = row.states
        if row.own and 0 < count < row.query_len and states:
            self.state_slots[states[0]].at = row.start + count
            self.state_slots[states[0]].refs += 1
        super()._settle_state(row, count)
        if row.own and 0 < count < row.query_len:
            row.states = states


class OwnAbortKeepsTheSlot(ModelManager):
    def _return_state(self, row: Row) -> None:
        if row.own:
            row.states = []
        super()._return_state(row)


class OwnStateIsTakenForZero(ModelManager):
    """A sequence whose state the caller keeps gets a slot of zeros, in a step that does not say so."""

    def _plan_states(self, batch: list[Seq], lens: list[int], keep: bool) -> list[int]:
        prepared = [sequence.num_prepared for sequence in batch]
        for sequence in batch:
            sequence.num_prepared *= sequence.state is not None
        try:
            return super()._plan_states(batch, lens, keep)
        finally:
            for sequence, count in zip(batch, prepared, strict=True):
                sequence.num_prepared = count


# Seen in what slots of states hold, without a right manager to compare with.
MISREAD: list[type[ModelManager]] = [
    CheckpointIsWritten,
    CheckpointIsCopiedLater,
    AbortLeavesTheState,
    SharersGoBack,
    ForkSharesAndWrites,
    ZeroIsForgotten,
    UncommittedIsPublished,
    OffTheGridIsPublished,
    RejectedDraftsStay,
    LastDraftIsKept,
    TrimKeepsTheState,
    ResetKeepsCheckpoints,
    OwnStateGoesOverItsCheckpoint,
    PartOfAnOwnPassIsPublished,
    OwnStateIsTakenForZero,
]
OTHERS: list[type[ModelManager]] = [
    AbortKeepsTheNewSlot,
    HitNeedsNoCheckpoint,
    SlotOfAnOpenStepIsGivenOut,
    OlderCheckpointStays,
    HitCheckpointIsFreed,
    PinHoldsNoCheckpoint,
    CheckpointOutlivesItsBlock,
    CopiesAreNoMoves,
    FailedPrepareTakesASlot,
    OwnAbortKeepsTheSlot,
]


@pytest.mark.parametrize("mutant", OTHERS)
def test_comparison_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises((AssertionError, LookupError)):
        run(silent(mutant))


@pytest.mark.parametrize("mutant", MISREAD)
def test_device_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises(AssertionError, match=r"another prefix"):
        run(silent(mutant), silent(mutant))
