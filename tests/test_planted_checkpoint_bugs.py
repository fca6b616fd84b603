"""Tests of the tests: the state machine must find bugs planted in what becomes of checkpoints in host memory."""

from random import Random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from manager_machine import MODEL, Action, Driver, ManagerMachine, machine_for
from manager_model import ModelFetch, ModelManager, ModelSpill, ModelStep, Node, Seq
from manager_streams import Streams
from test_planted_bugs import SETTINGS, silent
from test_planted_tier_bugs import RIGHT

from kvblocks.config import State, Window


class LateStreams(Streams):
    def run_some(self) -> None:
        if self.rng.random() < 0.1:
            super().run_some()


class Returning(ManagerMachine):
    """Small pools, and conversations that come back."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.rng = Random(seed)
        choice = self.rng.choice
        self.groups = choice([(None,), (None,), (None, Window(3)), (Window(2),)])
        self.large = False
        self.block_size, self.vocabulary, self.honest = 1, 2, True
        self.favourites = []
        config = {
            "groups": (*self.groups, State(choice([1, 2]))),
            "max_seqs": 4,
            "host_blocks": choice([8, 16]),
            "num_states": choice([1, 2, 3, 4]),
            "host_states": choice([1, 4, 8]),
        }
        self.open(choice([4, 6, 8]) * len(self.groups), config)
        self.streams = LateStreams(self.rng)

    def weight(self, a: Action) -> int:
        return {"come_back": 60, "draft": 10, "waver": 10, "abort": 6}.get(a.name, 1)


BACKGROUND = ["turn_over", "begin_fetch", "end_fetch", "admit_fetched", "begin_spill", "end_spill"]


class Stored(ManagerMachine):
    """Small pools, a late device, and checkpoints that go outside and come back."""

    patience = 0.3

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.rng = Random(seed)
        choice = self.rng.choice
        self.groups = choice([(None,), (None,), (None, Window(3))])
        self.large = False
        self.block_size, self.vocabulary, self.honest = 1, 2, True
        self.favourites = self.rng.sample(BACKGROUND, 2)
        config = {
            "groups": (*self.groups, State(choice([1, 2]))),
            "max_seqs": 4,
            "host_blocks": choice([8, 16, 24]),
            "num_states": choice([2, 3]),
            "host_states": choice([4, 8]),
        }
        self.open(choice([4, 6]) * len(self.groups), config)
        self.streams = LateStreams(self.rng)

    def weight(self, a: Action) -> int:
        return 8 if a.name in BACKGROUND else 1 + (a.name in ("come_back", "landed"))


def run(subject: Any, reference: Any = RIGHT, engine: type[ManagerMachine] = Returning) -> None:
    machine = machine_for(Driver(subject, MODEL.step, MODEL.read), reference, tiers=True, states=True)
    run_state_machine_as_test(type("Machine", (engine, machine), {}), settings=SETTINGS)


class AnothersCheckpointIsLoaded(ModelManager):
    """A hit loads the checkpoint that came to the host last, whoever's it is."""

    def _hold_checkpoint(self, node: Node, sequence: Seq) -> int | None:
        own = self._host_state(node)
        if node.state is None and own is not None:
            node.slots[-1] = self.host_checkpoints[-1]
        slot = super()._hold_checkpoint(node, sequence)
        if own is not None:
            node.slots[-1] = own
        return slot


class WriterDoesNotWait(ModelManager):
    """A slot for states is written while its last move still reads or writes it."""

    def prepare(self, seqs: Any, query_lens: Any, step: ModelStep, **options: bool) -> int:
        step_id = super().prepare(seqs, query_lens, step, **options)
        if not step.copies:
            step.needs = max([row.sequence.needs for row in self.steps[-1].rows], default=0)
        return step_id


class PassDoesNotWaitForItsState(ModelManager):
    def _note_load(self, sequence: Seq, block: int, slot: int) -> None:
        needs = sequence.needs
        super()._note_load(sequence, block, slot)
        if self._is_state(slot):
            sequence.needs = needs
            self.load_of_block[block] = self.move_of_block[block] = 0


class AbortLeavesTheLoadPending(ModelManager):
    """What was loaded for an aborted pass is loaded again by the next step, over whatever is there then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sources: dict[int, int] = {}

    def _note_load(self, sequence: Seq, block: int, slot: int) -> None:
        super()._note_load(sequence, block, slot)
        self.sources[block] = slot

    def abort(self, step_id: int) -> list[int]:
        rows = [row for step in self.steps[-1:] if step.step_id == step_id for row in step.rows]
        preempted = super().abort(step_id)
        for block in [self.num_blocks + row.before for row in rows if row.before is not None]:
            if block in self.sources:
                self.loading.append((block, self.sources.pop(block)))
        return preempted


class OutlivesItsBlock(ModelManager):
    """A checkpoint stays in host memory when its node has no block any more."""

    def _check_anchor(self, node: Node) -> None:
        slot = self._host_state(node)
        if slot is not None:
            self.holds[slot] += 1
        super()._check_anchor(node)
        if slot is not None:
            self.holds[slot] -= 1


class HitNeedsNoCheckpoint(ModelManager):
    """In host memory blocks are enough."""

    def _has_state(self, path: list[Node], host: bool) -> bool:
        return host or super()._has_state(path, host)

    def _hold_checkpoint(self, node: Node, sequence: Seq) -> int | None:
        if node.state is None and self._host_state(node) is None:
            return None
        return super()._hold_checkpoint(node, sequence)


class LoadsNeedNoSlot(ModelManager):
    """A hit is not cut where no slot is free for its checkpoint."""

    def _serves(self, path: list[Node], host: bool, loads_state: bool | None = None) -> bool:
        return super()._serves(path, host)


class ResetKeepsThem(ModelManager):
    """After a reset a new node has the checkpoint that the old one of its tokens had."""

    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        if len(self.host_states_unused) > 1:
            self.host_states_unused.reverse()


class RunningSequencesAreOffloaded(ModelManager):
    """Each checkpoint is copied as soon as it is left, though the next one will free it."""

    def _leave_checkpoint(self, row: Any) -> None:
        super()._leave_checkpoint(row)
        if row.sequence.checkpoint is not None:
            self._offer(row.sequence.checkpoint)


class EvictionLeavesTheSlotOld(ModelManager):
    """A slot is as old as its offload, though the checkpoint left the device just now."""

    def _take_state(self) -> int:
        slots = list(self.host_checkpoints)
        taken = super()._take_state()
        self.host_checkpoints = slots
        return taken


class PushesCopiesOut(ModelManager):
    """A checkpoint takes the slot of one that the device has too, which will not be copied again."""

    def _find_slot(self, before: int, states: bool = False) -> bool:
        known, self.known = self.known, set(self.home)
        found = super()._find_slot(before, states)
        self.known = known & set(self.home)
        return found


class PinsKeepOthersOut(ModelManager):
    """A checkpoint takes no slot from one that is held on the device, which may be for good."""

    def _find_slot(self, before: int, states: bool = False) -> bool:
        oldest = self._oldest_slot(states) if states and not self.host_states_unused else None
        if oldest is not None and oldest not in self.known and self.home[oldest][0].state is not None:
            return False
        return super()._find_slot(before, states)


class WindowStaysBehind(ModelManager):
    """What has slid out of a window is not copied with the checkpoint before whose end it lies."""

    def _slid_before(self, node: Node) -> list[tuple[int, Node, int]]:
        return []


# In the background


class StateInFlightIsFetchedInto(ModelManager):
    """A slot is given to a fetch while a move that names it has not landed."""

    def _take_landed(self, count: int, states: bool = False) -> list[int]:
        landed = self.moves_landed
        self.moves_landed = self.moves_noted if states else landed
        taken = super()._take_landed(count, states)
        self.moves_landed = landed
        return taken


class StateInFlightIsSpilled(ModelManager):
    def begin_spill(self, max_blocks: int, **options: Any) -> ModelSpill:
        moves = list(self.move_of_slot)
        self.move_of_slot[self.host_blocks :] = [0] * self.host_states
        spill = super().begin_spill(max_blocks, **options)
        self.move_of_slot = moves
        return spill


class SpilledStateIsEvicted(ModelManager):
    """A slot that is being read is given to another checkpoint."""

    def _oldest_slot(self, states: bool = False) -> int | None:
        if states:
            return self.host_checkpoints[0] if self.host_checkpoints else None
        return super()._oldest_slot()

    def _let_go_slot(self, slot: int) -> None:
        super()._let_go_slot(slot)
        if self.host_states_unused.count(slot) > 1:
            self.host_states_unused.pop()


class StateOfHalfAFetchIsHung(ModelManager):
    """A state counts as fetched as soon as something of its fetch is whole, and hangs where it was asked for."""

    def end_fetch(self, fetch: ModelFetch, num_ok: int) -> int:
        path = list(fetch.path)
        states = [(i, slot) for (i, g, _), slot in zip(fetch.blocks, fetch.taken, strict=True) if g == len(self.groups)]
        tokens = super().end_fetch(fetch, num_ok)
        for i, slot in states if num_ok and path and tokens < len(path) * self.block_size else []:
            if slot in self.host_states_unused and path[i] in self._all_nodes() and self._host_state(path[i]) is None:
                self.host_states_unused.remove(slot)
                self._hang_slot(slot, path[i], len(self.groups))
                self.host_checkpoints.append(slot)
        return tokens


class FetchNeedsNoCheckpoint(ModelManager):
    """A fetch is planned to where blocks are believed to be, though no state is."""

    def begin_fetch(self, tokens: Any, **options: Any) -> ModelFetch:
        every, self.every = self.every, 0
        try:
            return super().begin_fetch(tokens, **options | {"checkpoints": ()})
        finally:
            self.every = every


class StaysWhenLetGo(ModelManager):
    """A checkpoint whose block went while it was held hangs on its node for good."""

    def _let_go_slot(self, slot: int) -> None:
        anchored = slot in self.home and self._is_state(slot) and self.holds[slot] == 1
        if anchored:
            self.holds[slot] = 0
            if slot in self.passed:
                self.passed.remove(slot)
                self.host_checkpoints.insert(0, slot)
            return
        super()._let_go_slot(slot)


class OneQuarterForBoth(ModelManager):
    """What the background holds of states is not counted apart."""

    def _room_for_work(self) -> tuple[int, int]:
        blocks, states = super()._room_for_work()
        return blocks, max(states, min(1, blocks))


class StatesWaitBehindBlocks(ModelManager):
    """Checkpoints are spilled once there are no blocks left to be."""

    def begin_spill(self, max_blocks: int, **options: Any) -> ModelSpill:
        states, self.state_spills = self.state_spills, []
        spill = super().begin_spill(max_blocks, **options)
        self.state_spills = states
        return spill


# Seen in what slots of states hold, without a right manager to compare with.
MISREAD: list[type[ModelManager]] = [
    AnothersCheckpointIsLoaded,
    WriterDoesNotWait,
    PassDoesNotWaitForItsState,
]
OTHERS: list[type[ModelManager]] = [
    HitNeedsNoCheckpoint,  # the next step refuses such a row, so that nothing is misread
    AbortLeavesTheLoadPending,
    OutlivesItsBlock,
    LoadsNeedNoSlot,
    ResetKeepsThem,
    RunningSequencesAreOffloaded,
    EvictionLeavesTheSlotOld,
    PushesCopiesOut,
    PinsKeepOthersOut,
    WindowStaysBehind,
]
MISREAD_OUTSIDE: list[type[ModelManager]] = [
    StateInFlightIsSpilled,
    SpilledStateIsEvicted,
]
OTHERS_OUTSIDE: list[type[ModelManager]] = [
    StateInFlightIsFetchedInto,  # misread too, after minutes, as is the next one
    StateOfHalfAFetchIsHung,
    FetchNeedsNoCheckpoint,
    StaysWhenLetGo,
    OneQuarterForBoth,
    StatesWaitBehindBlocks,
]


@pytest.mark.parametrize("mutant", OTHERS)
def test_comparison_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises((AssertionError, LookupError)):
        run(silent(mutant))


@pytest.mark.parametrize("mutant", MISREAD)
def test_device_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises(AssertionError, match=r"another prefix"):
        run(silent(mutant), silent(mutant))


@pytest.mark.parametrize("mutant", OTHERS_OUTSIDE)
def test_comparison_finds_outside(mutant: type[ModelManager]) -> None:
    with pytest.raises((AssertionError, LookupError)):
        run(silent(mutant), engine=Stored)


@pytest.mark.parametrize("mutant", MISREAD_OUTSIDE)
def test_reads_find_outside(mutant: type[ModelManager]) -> None:
    with pytest.raises(AssertionError, match=r"another prefix"):
        run(silent(mutant), silent(mutant), Stored)
