"""The states of sequences in a block manager: slots, checkpoints, what aborts and drafts leave, and wrong arguments."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from manager_hooks import hook, needs_hooks

from kvblocks.config import CacheConfig, LayerTensor, State, Window, key_value
from kvblocks.errors import InvariantViolation, MovesPending, NoFreeStates
from kvblocks.manager import BlockManager, StepArrays
from kvblocks.step import StepBuffers

BLOCK, EVERY = 4, 8
GROUPS = (None, State(EVERY))


def made(num_states: int = 8, **options: Any) -> tuple[BlockManager, StepBuffers]:
    options = {"groups": GROUPS, **options}
    return BlockManager(64, BLOCK, num_states=num_states, **options), StepBuffers(4, 64, 16, states=True)


def prepared(manager: BlockManager, seqs: Any, lens: Any, step: StepArrays, **options: Any) -> int:
    step_id = manager.prepare(seqs, lens, step, **options)
    manager.mark_moved(step.last_move)
    return step_id


def computed(manager: BlockManager, seqs: Any, lens: Any, step: StepArrays, accepted: Any = None) -> list[int]:
    return manager.commit(prepared(manager, seqs, lens, step), accepted)


def slots(step: StepBuffers) -> list[int]:
    assert step.state_slots is not None
    found: list[int] = step.state_slots[: step.num_seqs].tolist()
    return found


def zeroed(step: StepBuffers) -> list[int]:
    assert step.state_zero is not None
    found: list[int] = step.state_zero[: step.num_state_zero].tolist()
    return found


def copied(step: StepBuffers) -> list[list[int]]:
    assert step.state_copies is not None
    found: list[list[int]] = step.state_copies.tolist()
    return found


def test_a_slot_is_taken_at_the_first_pass_and_begins_at_zero() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(5))
    assert manager.num_free_states == 8
    step_id = manager.prepare(seq, 3, step)
    assert (slots(step), zeroed(step), copied(step)) == ([0], [0], [])
    assert step.last_move == step.needs == 1  # to be zeroed is to be moved
    with pytest.raises(MovesPending):
        manager.commit(step_id)
    manager.mark_moved(1)
    assert manager.commit(step_id) == []
    step_id = prepared(manager, seq, 2, step)  # it goes on in place
    assert (slots(step), zeroed(step), copied(step), step.last_move) == ([0], [], [], 0)
    manager.commit(step_id)
    assert manager.num_free_states == 7
    manager.free(seq)
    assert manager.num_free_states == 8
    manager.audit()


def test_what_stands_on_the_grid_is_left_behind_as_a_checkpoint() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(11))
    assert manager.next_checkpoint(seq) == 8
    computed(manager, seq, 8, step)
    assert manager.next_checkpoint(seq) == 0
    assert manager.match(range(20)) == 8
    computed(manager, seq, 3, step)
    assert (slots(step), copied(step)) == ([1], [[0, 1]])
    assert manager.match(range(20)) == 8  # the third block is full and off the grid
    manager.free(seq)
    assert manager.num_free_states == 8
    again, cached = manager.admit(range(11))
    assert cached == 8
    assert manager.num_free_states == 7
    computed(manager, again, 3, step)
    assert copied(step) == [[0, 1]]
    assert manager.stats()[-3:] == (2, 1, 0)
    manager.audit()


def test_only_the_newest_checkpoint_stays_and_what_was_hit() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(17))
    for _ in range(2):
        computed(manager, seq, 8, step)
    assert manager.match(range(9)) == 0
    assert manager.match(range(17)) == 16
    manager.free(seq)
    other, cached = manager.admit([*range(16), *range(50, 68)])
    assert cached == 16
    computed(manager, other, 16, step)
    assert manager.match(range(17)) == 16  # it was hit, and is not the other's own
    assert manager.match([*range(16), *range(50, 68)]) == 32


def test_without_a_spare_slot_the_pass_goes_on_in_place() -> None:
    manager, step = made(num_states=1)
    seq, _ = manager.admit(range(12))
    computed(manager, seq, 8, step)
    assert manager.match(range(20)) == 8
    computed(manager, seq, 4, step)
    assert (slots(step), copied(step)) == ([0], [])
    assert manager.match(range(20)) == 0
    late, _ = manager.admit(range(100, 110))
    with pytest.raises(NoFreeStates) as caught:
        manager.prepare(late, 1, step)
    assert (caught.value.needed, caught.value.free) == (1, 0)
    manager.audit()
    manager.preempt(seq)
    computed(manager, late, 10, step)


def test_a_checkpoint_goes_for_a_state_that_is_needed() -> None:
    manager, step = made(num_states=2)
    for start in (0, 100, 200):
        seq, _ = manager.admit(range(start, start + 8))
        computed(manager, seq, 8, step)
        manager.free(seq)
    assert [manager.match(range(start, start + 9)) for start in (0, 100, 200)] == [0, 8, 8]
    assert manager.stats().checkpoint_evictions == 1


def host_moves(step: StepBuffers) -> list[list[int]]:
    """kind (1: from the host), group (1: the state), source, target"""
    found: list[list[int]] = step.moves.tolist()
    return found


def left_and_pushed_out() -> tuple[BlockManager, StepBuffers]:
    """A manager of two slots for states, of which neither has the checkpoint of range(8) any more."""
    manager, step = made(num_states=2, host_blocks=16, host_states=2)
    for start in (0, 100, 200):
        seq, _ = manager.admit(range(start, start + 8))
        computed(manager, seq, 8, step)
        manager.free(seq)
    assert manager.stats().checkpoint_evictions == 1
    return manager, step


def test_a_checkpoint_goes_to_the_host_once_its_sequence_has_left() -> None:
    manager, step = made(host_blocks=16, host_states=2)
    seq, _ = manager.admit(range(9))
    computed(manager, seq, 8, step)
    computed(manager, seq, 1, step)
    assert host_moves(step) == []
    manager.free(seq)
    other, _ = manager.admit(range(100, 103))
    step_id = manager.prepare(other, 3, step)
    assert host_moves(step) == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]  # then its blocks, the last one first
    manager.mark_moved(step.last_move)
    manager.commit(step_id)
    assert (manager.num_free_host_states, manager.num_free_host_blocks) == (1, 14)
    manager.audit()


def test_a_hit_loads_the_checkpoint_into_a_slot_of_its_own() -> None:
    manager, step = left_and_pushed_out()
    assert [manager.match(range(start, start + 9)) for start in (0, 100, 200)] == [8, 8, 8]
    seq, cached = manager.admit(range(10))
    assert cached == 8
    step_id = manager.prepare(seq, 2, step)
    loads = [move for move in host_moves(step) if move[0] == 1]
    assert loads == [[1, 1, 0, 1]]
    assert step.needs >= step.first_move
    assert copied(step) == [[1, 0]]  # it goes on in the other one
    manager.mark_moved(step.last_move)
    manager.commit(step_id)
    assert manager.stats().loads == 1
    manager.audit()


def test_where_no_slot_is_free_a_checkpoint_is_not_loaded() -> None:
    manager, step = left_and_pushed_out()
    running = [manager.admit(range(300, 303))[0], manager.admit(range(400, 403))[0]]
    computed(manager, running, 3, step)
    assert (manager.num_free_states, manager.match(range(10))) == (0, 8)
    seq, cached = manager.admit(range(10))
    assert cached == 0
    manager.free(running[0])
    manager.preempt(seq)
    assert manager.resume(seq) == 8


def test_of_checkpoints_in_the_host_the_one_used_longest_ago_goes() -> None:
    manager, step = left_and_pushed_out()
    seq, _ = manager.admit(range(9))  # a hit makes it the most recent
    computed(manager, seq, 1, step)
    manager.free(seq)
    for start in (300, 400):
        seq, _ = manager.admit(range(start, start + 8))
        computed(manager, seq, 8, step)
        manager.free(seq)
    assert manager.stats().host_evictions == 1
    assert [manager.match(range(start, start + 9)) for start in (0, 100)] == [8, 0]
    manager.audit()


def test_a_checkpoint_that_is_pinned_does_not_keep_others_from_the_host() -> None:
    manager, step = made(num_states=3, host_blocks=64, host_states=2)
    for start in (0, 100, 200, 300, 400):
        seq, _ = manager.admit(range(start, start + 8))
        computed(manager, seq, 8, step)
        manager.free(seq)
        if start == 0:
            manager.pin(range(8))
    assert [manager.match(range(start, start + 9)) for start in (0, 200, 300, 400)] == [8] * 4
    manager.audit()


def test_a_reset_forgets_checkpoints_in_the_host_and_keeps_what_was_promised() -> None:
    manager, step = left_and_pushed_out()
    seq, cached = manager.admit(range(10))
    assert cached == 8
    manager.reset_prefix_cache()
    assert (manager.num_free_host_states, manager.match(range(10))) == (2, 0)
    manager.prepare(seq, 2, step)
    assert [1, 1, 0, 1] in host_moves(step)
    manager.audit()


def test_an_abort_takes_back_what_has_a_slot_of_its_own() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(12))
    assert manager.abort(prepared(manager, seq, 3, step)) == []  # back to nothing
    assert manager.num_free_states == 8
    computed(manager, seq, 8, step)
    assert manager.abort(prepared(manager, seq, 2, step)) == []
    computed(manager, seq, 4, step)
    assert copied(step) == [[0, 1]]
    manager.audit()


def test_an_aborted_sequence_that_was_written_in_place_starts_again() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(14))
    computed(manager, seq, 8, step)
    computed(manager, seq, 2, step)
    first = prepared(manager, seq, 1, step)
    second = prepared(manager, seq, 1, step)
    assert manager.abort(second) == []  # the older step still has it
    with pytest.raises(ValueError, match=r"was lost with a pass that was aborted"):
        manager.prepare(seq, 1, step)
    assert manager.commit(first) == [seq]
    assert manager.resume(seq) == 8
    computed(manager, seq, 6, step)
    manager.audit()


def test_aborts_that_go_back_to_a_slot_lose_nothing() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(14))
    computed(manager, seq, 8, step)
    first = prepared(manager, seq, 1, step)
    assert manager.abort(prepared(manager, seq, 1, step)) == []
    assert manager.abort(first) == []
    computed(manager, seq, 6, step)
    assert copied(step) == [[0, 1]]
    manager.audit()


def test_children_copy_what_they_share_but_the_last() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(5))
    computed(manager, seq, 5, step)
    family = [seq, *manager.fork(seq, 2)]
    assert manager.num_free_states == 7
    manager.append(family, [5, 6, 7])
    step_id = prepared(manager, family, 1, step)
    assert (slots(step), copied(step)) == ([1, 2, 0], [[0, 1], [0, 2]])
    assert sorted(manager.abort(step_id)) == sorted(family)  # one wrote what the others had
    assert manager.num_free_states == 8


def test_reordered_beams_need_no_more_slots_than_there_are_beams() -> None:
    manager, step = made(num_states=2)
    seq, _ = manager.admit(range(5))
    computed(manager, seq, 5, step)
    beams = [seq, *manager.fork(seq)]
    for token in range(5):
        manager.append(beams, [token, token + 1])
        computed(manager, beams, 1, step)
        manager.reorder(beams, [beams[token % 2]] * 2)
        assert manager.num_free_states == 1
        manager.audit()


def test_drafts_keep_the_state_after_the_last_accepted_token() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(12))
    computed(manager, seq, 8, step)
    step_id = prepared(manager, seq, 4, step, keep_state=True)
    assert step.state_drafts is not None
    assert (slots(step), copied(step), zeroed(step)) == ([0], [], [])  # read from the checkpoint, written elsewhere
    assert step.state_drafts.tolist()[:5] == [1, 2, 3, 4, -1]
    assert manager.commit(step_id, [2]) == []
    assert manager.num_free_states == 7
    manager.append(seq, 99)
    computed(manager, seq, 1, step)
    assert slots(step) == [2]
    assert step.state_drafts.tolist() == [-1] * 64
    manager.audit()
    fresh, _ = manager.admit(range(50, 54))
    assert manager.commit(prepared(manager, fresh, 4, step, keep_state=True), [0]) == []
    manager.audit()


def test_rejected_tokens_without_drafts_take_the_state_along() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(12))
    computed(manager, seq, 8, step)
    assert computed(manager, seq, 4, step, [2]) == [seq]
    assert manager.lengths(seq).num_tokens.tolist() == [10]
    assert manager.resume(seq) == 8
    assert computed(manager, seq, 2, step, [0]) == []  # nothing counts: it goes back to the checkpoint
    manager.audit()


def own(manager: BlockManager, seqs: Any, lens: Any, step: StepBuffers) -> tuple[int, list[int], list[int]]:
    """A step whose rows' states the caller keeps: its id, where they are read, and where each token's is to be put."""
    step_id = prepared(manager, seqs, lens, step, own_state=True)
    assert step.state_drafts is not None
    return step_id, slots(step), step.state_drafts[: step.num_tokens].tolist()


def test_states_that_the_caller_keeps_take_slots_on_the_grid_alone() -> None:
    manager, step = made(num_states=2)
    seq, _ = manager.admit(range(14))
    assert manager.state_slot(seq) == -1
    step_id, read, written = own(manager, seq, 5, step)
    assert (read, written) == ([-1], [-1] * 5)
    assert manager.abort(step_id) == []
    for count, given in ((5, [-1] * 5), (3, [-1, -1, 0])):
        step_id, read, written = own(manager, seq, count, step)
        assert (read, written, zeroed(step), copied(step)) == ([-1], given, [], [])
        assert manager.commit(step_id) == []
    assert manager.num_free_states == 2  # nobody holds the checkpoint
    assert manager.match(range(14)) == 8
    step_id, _, _ = own(manager, seq, 6, step)
    assert manager.commit(step_id, [4]) == []
    manager.trim(seq, 9)  # no state is lost
    assert manager.lengths(seq).num_computed.tolist() == [9]
    manager.extend(seq, [1], 1)
    with pytest.raises(ValueError, match=r"the state of sequence \d+ \(at 0\) is kept by the caller, and in no slot;"):
        manager.prepare(seq, 1, step)
    other, cached = manager.admit(range(14))
    assert (cached, manager.state_slot(other), manager.num_free_states) == (8, 0, 1)
    step_id, read, written = own(manager, [other, *manager.fork(seq)], [6, 1], step)
    assert (read, written, manager.state_slot(other)) == ([0, -1], [-1] * 7, -1)
    assert manager.num_free_states == 1  # an abort goes back to it
    manager.abort(step_id)
    assert manager.state_slot(other) == 0
    manager.audit()
    for options in ({"keep_state": True}, {"own_state": 1}):
        with pytest.raises((ValueError, TypeError)):
            manager.prepare(seq, 1, step, **{"own_state": True, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keep_state=False, own_state=True, but no group"):
        BlockManager(8, BLOCK).prepare(1, 1, step, own_state=True)


def test_without_a_slot_the_caller_leaves_no_checkpoint() -> None:
    manager, step = made(num_states=1)
    seq, _ = manager.admit(range(8))
    computed(manager, seq, 8, step)
    late, _ = manager.admit(range(100, 108))
    step_id, _, written = own(manager, late, 8, step)
    assert written == [-1] * 8
    assert manager.commit(step_id) == []
    assert manager.match(range(100, 109)) == 0
    manager.audit()


def test_a_trim_of_computed_tokens_preempts() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(12))
    computed(manager, seq, 10, step)
    manager.trim(seq, 11)
    manager.append(seq, 5)
    manager.trim(seq, 9)
    with pytest.raises(ValueError, match=r"preempted"):
        manager.prepare(seq, 1, step)
    assert manager.resume(seq) == 0
    assert manager.num_free_states == 8


def test_a_pin_holds_the_checkpoint() -> None:
    manager, step = made(num_states=1)
    seq, _ = manager.admit(range(8))
    computed(manager, seq, 8, step)
    manager.free(seq)
    with pytest.raises(ValueError, match=r"is published"):
        manager.pin(range(4))
    pin = manager.pin(range(9))
    other, _ = manager.admit(range(100, 108))
    with pytest.raises(NoFreeStates):
        manager.prepare(other, 8, step)
    manager.unpin(pin)
    computed(manager, other, 8, step)
    assert manager.match(range(9)) == 0


def test_a_checkpoint_goes_with_its_blocks_and_with_a_reset() -> None:
    manager, step = BlockManager(4, BLOCK, groups=GROUPS, num_states=8), StepBuffers(4, 64, 16, states=True)
    seq, _ = manager.admit(range(8))
    computed(manager, seq, 8, step)
    manager.free(seq)
    other, _ = manager.admit(range(100, 116))
    assert manager.stats().evictions == 2
    computed(manager, other, 16, step)
    manager.audit()
    assert manager.match(range(100, 117)) == 16
    manager.reset_prefix_cache()
    assert manager.match(range(100, 117)) == 0
    manager.audit()


def test_without_prefix_caching_nothing_is_copied() -> None:
    manager, step = made(prefix_caching=False)
    seq, _ = manager.admit(range(12))
    for _ in range(3):
        computed(manager, seq, 4, step)
        assert copied(step) == []
    assert manager.stats().checkpoints == 0


class Torn(StepArrays):
    """Arrays whose way to the device is cut."""

    def _upload(self) -> None:
        raise RuntimeError("no device")


def torn_step() -> Torn:
    ids, positions, slots, drafts = (np.empty(64, np.int64) for _ in range(4))
    table, copies = np.empty((4, 16), np.int32), np.empty((4, 2), np.int64)
    states = {"state_slots": np.empty(4, np.int64), "state_zero": np.empty(4, np.int64), "state_drafts": drafts}
    arrays = (ids, positions, slots, table, np.empty(4, np.int32), np.empty(5, np.int32), copies)
    return Torn(*arrays, **states, state_copies=np.empty((4, 2), np.int64), uploads=True)


@pytest.mark.parametrize("handed_out", [False, True], ids=["noted", "of a step that never came to be"])
@pytest.mark.parametrize("goes", [False, True])
def test_a_load_is_done_by_the_next_step_or_goes_with_its_slot(handed_out: bool, goes: bool) -> None:
    manager, step = left_and_pushed_out()
    seq, _ = manager.admit(range(10))
    if handed_out:
        with pytest.raises(RuntimeError, match="no device"):
            manager.prepare(seq, 2, torn_step())
        manager.audit()
    if goes:
        manager.free(seq)
        others = [manager.admit(range(start, start + 3))[0] for start in (500, 600)]
        step_id = manager.prepare(others, 3, step)
    else:
        step_id = manager.prepare(seq, 2, step)
    assert [move for move in host_moves(step) if move[0] == 1] == ([] if goes else [[1, 1, 0, 1]])
    manager.mark_moved(step.last_move)
    manager.commit(step_id)
    manager.audit()


def test_an_upload_that_fails_has_changed_no_state() -> None:
    manager, step = made(num_states=3)
    torn = torn_step()
    seq, _ = manager.admit(range(13))
    computed(manager, seq, 9, step)
    children = manager.fork(seq)
    before = manager.num_free_states, manager.stats().state_copies
    for batch in ([seq], [seq, *children]):
        with pytest.raises(RuntimeError, match=r"no device"):
            manager.prepare(batch, 1, torn)
        assert (manager.num_free_states, manager.stats().state_copies) == before
        manager.audit()
    assert computed(manager, [seq, *children], 1, step) == []
    manager.audit()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"groups": (None, State(6))}, ValueError, r"State\.every=6 must be a multiple of block_size=4"),
        ({"groups": (None, State(8), State(8))}, ValueError, r"two States"),
        ({"groups": (State(8),)}, ValueError, r"0 layer groups"),
        ({"num_states": 0}, ValueError, r"num_states= slots, at least 1"),
        ({"num_states": -1}, ValueError, r"num_states=-1"),
        ({"num_states": 2**31}, ValueError, r"num_states=2147483648"),
        ({"num_states": 1.5}, TypeError, r"num_states"),
        ({"num_states": True}, TypeError, r"num_states"),
        ({"groups": (None,), "num_states": 4}, ValueError, r"num_states=4 slots for states need a State"),
        ({"host_states": 4}, ValueError, r"host_states=4 needs num_states= and host_blocks=, each at least 1"),
        ({"host_states": -1}, ValueError, r"host_states=-1 must be 0 to"),
        ({"host_states": 2**31 - 2, "host_blocks": 1}, ValueError, r"are more than 2147483646 together"),
        ({"host_blocks": 4, "host_states": 1.5}, TypeError, r"host_states"),
    ],
)
def test_wrong_managers(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        BlockManager(8, BLOCK, **{"groups": GROUPS, "num_states": 4, **options})


@pytest.mark.parametrize("every", [0, -1, 2**31])
def test_wrong_grids(every: int) -> None:
    with pytest.raises(ValueError, match=rf"State\.every={every}"):
        State(every)


def test_wrong_calls_change_nothing() -> None:
    manager, step = made()
    seq, _ = manager.admit(range(9))
    with pytest.raises(ValueError, match=r"the step has no arrays for states"):
        manager.prepare(seq, 1, StepBuffers(4, 64, 16))
    with pytest.raises(TypeError, match=r"keep_state must be a bool"):
        manager.prepare(seq, 1, step, keep_state=1)  # type: ignore[arg-type]
    plain = BlockManager(8, BLOCK)
    other, _ = plain.admit(range(9))
    with pytest.raises(ValueError, match=r"no group of the manager is a State"):
        plain.prepare(other, 1, step, keep_state=True)
    plain.prepare(other, 1, step)  # buffers for states serve a manager without any
    assert slots(step) == [-1]
    assert plain.next_checkpoint(other) == 0
    for handle in (0, 12345):
        with pytest.raises(LookupError):
            manager.next_checkpoint(handle)
    with pytest.raises(NoFreeStates):
        manager.prepare(seq, 9, step, keep_state=True)
    assert manager.num_free_states == 8
    manager.audit()


def test_arrays_for_states_come_together() -> None:
    ints = [np.zeros(size, np.int64) for size in (8, 8, 8)]
    arrays = [
        *ints,
        np.zeros((2, 4), np.int32),
        np.zeros(2, np.int32),
        np.zeros(3, np.int32),
        np.zeros((2, 2), np.int64),
    ]
    fine: dict[str, Any] = {"state_slots": np.zeros(2, np.int64), "state_zero": np.zeros(2, np.int64)}
    fine |= {"state_copies": np.zeros((2, 2), np.int64), "state_drafts": np.zeros(8, np.int64)}
    StepArrays(*arrays, **fine)
    for name in ("state_zero", "state_copies", "state_drafts"):
        with pytest.raises(TypeError):
            StepArrays(*arrays, **{**fine, name: None})
        with pytest.raises(ValueError, match=name):
            StepArrays(*arrays, **{**fine, name: np.zeros(3, np.int64)})


def test_a_manager_for_a_config_of_layers_with_states() -> None:
    mamba = (LayerTensor("conv", (3, 8), per="sequence"),)
    config = CacheConfig(layers=[key_value(2, 8), mamba], num_gpu_blocks=16, block_size=4)
    manager = BlockManager.for_config(config, every=12, num_states=3)
    assert (manager.num_states, manager.state_every, manager.groups) == (3, 12, (None,))
    step = StepBuffers.for_config(config, max_seqs=2, max_tokens=8, max_seq_len=32)
    assert step.state_slots is not None
    with pytest.raises(ValueError, match=r"num_states="):
        BlockManager.for_config(config)


def test_windows_beside_states() -> None:
    manager = BlockManager(64, BLOCK, groups=(Window(3), State(EVERY), None), num_states=8)
    step = StepBuffers(4, 64, 16, groups=2, states=True)
    assert manager.groups == (Window(3), None)
    seq, _ = manager.admit(range(12))
    computed(manager, seq, 8, step)
    assert manager.match(range(12)) == 8
    manager.audit()


@needs_hooks
@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("state_refs", 1, 1),
        ("state_refs", 0, 1),
        ("state_at", 0, 8),
        ("state_at", 1, 1),
        ("state_node", 0, 1),
        ("state_idle", 0, 1),
        ("state_of", 1, 1),
        ("standing", 0, 1),
        ("lost", 0, 1),
    ],
)
def test_audit_finds_broken_states(field: str, index: int, value: int) -> None:
    manager, step = made()
    seq, _ = manager.admit(range(12))
    computed(manager, seq, 8, step)
    computed(manager, seq, 3, step)  # slot 0 is a checkpoint, slot 1 the sequence's
    poke: Callable[[BlockManager, str, int, int], None] = hook("_poke")
    poke(manager, field, index, value)
    with pytest.raises(InvariantViolation, match=r"invariant 11:") as caught:
        manager.audit()
    assert caught.value.invariant == 11
    poke(manager, field, index, -value)
    manager.audit()


@needs_hooks
@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("slot_node", 16, 1),
        ("slot_group", 16, -1),
        ("slot_newer", 16, 1),
        ("slot_of", 16, 1),
        ("slot_move", 16, 1000),
        ("shadow_move", 64, 1000),
        ("slot_holds", 16, 1),
        ("slot_passed", 16, 1),
        ("checkpoints_held", 0, 1),
        ("offered", 0, 1),
        ("num_offers", 0, 1),
        ("offers", 0, 1),
    ],
)
def test_audit_finds_broken_checkpoints_in_the_host(field: str, index: int, value: int) -> None:
    manager, _ = left_and_pushed_out()
    poke: Callable[[BlockManager, str, int, int], None] = hook("_poke")
    poke(manager, field, index, value)
    with pytest.raises(InvariantViolation) as caught:
        manager.audit()
    assert caught.value.invariant in {3, 10, 11, 12}
    poke(manager, field, index, -value)
    manager.audit()


@needs_hooks
@pytest.mark.parametrize("host", [{}, {"host_blocks": 8, "host_states": 4}])
def test_every_allocation_for_states_may_fail(host: dict[str, Any]) -> None:
    fail: Callable[[int], int] = hook("_fail_allocation")

    def all_of_it() -> None:
        manager = BlockManager(64, BLOCK, groups=GROUPS, num_states=20, **host)
        step = StepBuffers(4, 64, 16, states=True)
        seq, _ = manager.admit(range(30))
        manager.commit(prepared(manager, seq, 3, step))
        manager.commit(prepared(manager, seq, 12, step, keep_state=True), [3])
        manager.audit()

    failures = 0
    while True:
        fail(failures)
        try:
            all_of_it()
            break
        except MemoryError:
            failures += 1
        finally:
            left = fail(-1)
    assert left >= 0
    assert failures >= 20


@pytest.mark.parametrize("host_blocks", [6, 15, 16, 31, 32, 256])
def test_a_window_that_the_host_pool_does_not_hold_leaves_room_for_others(host_blocks: int) -> None:
    """Blocks of one checkpoint do not push each other out in every step: each has its turn once."""
    options: dict[str, Any] = {"groups": (Window(33), State(64)), "num_states": 8}
    manager = BlockManager(256, 1, host_blocks=host_blocks, host_states=4, write_ahead=8, **options)
    step = StepBuffers(2, 128, 128, states=True)
    seqs = [manager.admit(range(first, first + 120))[0] for first in (0, 200)]
    for count in (64, 56):
        computed(manager, seqs, [count] * 2, step)
    manager.free(seqs)
    moved = [1]
    while moved[-1] and len(moved) < 99:
        computed(manager, [], [], step)
        moved.append(step.last_move)
    assert moved[-1] == 0
    assert manager.num_free_host_states == 2
    found = [manager.match(range(first, first + 65), tiers=True) for first in (0, 200)]
    assert found == [(64, 0)] * 2
    manager.audit()
