"""What the block manager promises, one rule a story, told of the model and of the compiled manager alike."""

from typing import Any

import pytest
from manager_compiled import COMPILED
from manager_machine import MODEL, Driver, StepView, plain

from kvblocks.config import Chunk, Window
from kvblocks.errors import MovesPending, NoFreeBlocks, StaleSequence, TooManySequences

GENERATION = 1 << 24


class Engine:
    """A manager with blocks of 2 tokens, unless told otherwise, and the few lines around it that an engine has."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def start(self, num_blocks: int = 8, block_size: int = 2, **config: Any) -> Any:
        self.manager = self.driver.manager(num_blocks, block_size, **config)
        self.step = self.driver.step(8, 64, 16, len(config.get("groups", (None,))))
        return self.manager

    def prepare(self, *seqs: int, lens: list[int] | None = None) -> int:
        """All tokens that are left, or `lens` of them."""
        lengths = self.manager.lengths(list(seqs))
        left = [int(n) - int(c) for n, c in zip(lengths.num_tokens, lengths.num_computed, strict=True)]
        step_id: int = self.manager.prepare(list(seqs), lens or left, self.step)
        self.manager.mark_moved(self.step.last_move)
        return step_id

    def compute(self, *seqs: int) -> None:
        self.manager.commit(self.prepare(*seqs))

    def serve(self, tokens: list[int], **identity: Any) -> int:
        seq: int = self.manager.admit(tokens, **identity)[0]
        self.compute(seq)
        return seq

    def view(self) -> StepView:
        return self.driver.read(self.step)

    def table(self, seq: int) -> list[Any]:
        table: list[Any] = plain(self.manager.block_table(seq))
        return table

    def lengths(self, seq: int) -> list[int]:
        """num_cached, num_computed, reserved, num_tokens; nothing is loading"""
        *lengths, loading = (int(values[0]) for values in self.manager.lengths([seq]))
        assert loading == 0
        return lengths


@pytest.fixture(params=[MODEL, COMPILED], ids=["model", "compiled"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


def test_blocks_are_taken_from_a_stack(engine: Engine) -> None:
    manager = engine.start()
    a, b = manager.admit([1, 2, 3])[0], manager.admit([4])[0]
    assert (engine.table(a), engine.table(b)) == ([0, 1], [2])
    manager.free([a, b])  # 1, 0, then 2: a table is given back from its end
    assert engine.table(manager.admit([5, 6, 7, 8, 9])[0]) == [2, 0, 1]


def test_a_handle_is_a_slot_and_its_generation(engine: Engine) -> None:
    manager = engine.start(max_seqs=2)
    a, b = manager.admit([1])[0], manager.admit([1])[0]
    assert (a, b) == (GENERATION, GENERATION + 1)
    with pytest.raises(TooManySequences):
        manager.admit([1])
    manager.free([b, a])
    assert manager.admit([1])[0] == 2 * GENERATION
    with pytest.raises(StaleSequence):
        manager.free(a)


def test_chunked_prefill_reserves_as_it_goes(engine: Engine) -> None:
    manager = engine.start()
    seq, _ = manager.admit([1, 2, 3, 4, 5], reserve=1)
    assert (engine.lengths(seq), engine.table(seq)) == ([0, 0, 1, 5], [0])
    manager.commit(engine.prepare(seq, lens=[3]))
    assert (engine.lengths(seq), engine.table(seq)) == ([0, 3, 3, 5], [0, 1])


def test_a_hit_leaves_a_token_to_compute(engine: Engine) -> None:
    manager = engine.start()
    a = engine.serve([1, 2, 3, 4])
    assert manager.match([1, 2, 3, 4]) == 2
    assert manager.match([1, 2, 3, 4, 5]) == 4
    b, cached = manager.admit([1, 2, 3, 4, 5])
    assert (cached, engine.table(a), engine.table(b)) == (4, [0, 1], [0, 1, 2])


def test_nothing_is_published_before_it_is_counted(engine: Engine) -> None:
    manager = engine.start()
    seq, _ = manager.admit([1, 2, 3])
    step_id = engine.prepare(seq)
    assert manager.match([1, 2, 3]) == 0
    manager.commit(step_id, [1])
    assert manager.match([1, 2, 3]) == 0


def test_an_aborted_step_was_never_prepared(engine: Engine) -> None:
    manager = engine.start()
    a = engine.serve([1, 2, 3])
    b = manager.fork(a)[0]
    manager.append([a, b], [8, 9])
    manager.extend([b], [9, 9], [2])
    before = [engine.lengths(s) + engine.table(s) for s in (a, b)], manager.num_free_blocks
    manager.abort(engine.prepare(a, b))
    assert ([engine.lengths(s) + engine.table(s) for s in (a, b)], manager.num_free_blocks) == before
    assert engine.prepare(a, b) == 3  # but its number is gone


def test_drafts_that_are_not_accepted_are_dropped(engine: Engine) -> None:
    manager = engine.start()
    seq = engine.serve([1, 2, 3])
    manager.extend([seq], [4, 5, 6, 7], [4])
    manager.commit(engine.prepare(seq), [1])
    assert plain(manager.tokens(seq)) == [1, 2, 3, 4]
    assert (engine.lengths(seq), engine.table(seq)) == ([0, 4, 4, 4], [0, 1])


def test_a_sequence_of_a_later_step_cannot_be_cut(engine: Engine) -> None:
    manager = engine.start()
    seq, _ = manager.admit([1, 2, 3])
    first = manager.prepare([seq], [2], engine.step)
    later = manager.prepare([seq], [1], engine.step)
    with pytest.raises(ValueError, match=r"."):
        manager.commit(first, [1])
    manager.abort(later)
    manager.commit(first, [1])
    assert engine.lengths(seq)[-1] == 1


def test_a_shared_block_is_copied_before_it_is_written(engine: Engine) -> None:
    manager = engine.start()
    a = engine.serve([1, 2, 3])
    b = manager.fork(a)[0]
    assert engine.table(b) == [0, 1]
    manager.append([b], [4])
    step_id = engine.prepare(b)
    assert engine.view().copies == [(1, 2)]
    assert engine.view().slot_mapping[0][:2] == [2 * 2 + 1, -1]
    assert (engine.table(a), engine.table(b)) == ([0, 1], [0, 2])
    manager.commit(step_id)
    manager.append([a], [5])
    engine.prepare(a)
    assert engine.view().copies == []  # it is its own again


def test_copies_cannot_be_forgotten(engine: Engine) -> None:
    manager = engine.start()
    first = engine.serve([1])
    child = manager.fork(first)[0]
    manager.append([first, child], [2, 3])
    step_id = manager.prepare([child], [1], engine.step)
    assert engine.step.needs == 1
    with pytest.raises(MovesPending) as caught:
        manager.commit(step_id)
    assert caught.value.needs == 1
    with pytest.raises(MovesPending):
        manager.prepare([first], [1], engine.step)
    with pytest.raises(ValueError, match="number"):
        manager.mark_moved(2)
    manager.abort(step_id)  # the target goes back: nothing is left to be copied, and no number comes twice
    step_id = manager.prepare([child], [1], engine.step)
    assert engine.step.needs == 2
    manager.mark_moved(engine.step.needs)
    manager.commit(step_id)
    engine.compute(first)


def test_a_published_block_is_copied_before_it_is_written(engine: Engine) -> None:
    manager = engine.start()
    seq = engine.serve([1, 2, 3, 4])
    manager.trim(seq, 3)
    manager.append([seq], [9])
    engine.compute(seq)
    assert engine.table(seq) == [0, 2]
    assert (manager.match([1, 2, 3, 4, 0]), manager.match([1, 2, 3, 9, 0])) == (4, 4)


def test_equal_blocks_become_one_and_the_other_waits_for_who_may_read_it(engine: Engine) -> None:
    manager = engine.start()
    a, b = manager.admit([1, 2])[0], manager.admit([1, 2])[0]
    first = engine.prepare(a, b)
    manager.append([b], [3])
    second = manager.prepare([b], [1], engine.step)
    assert engine.view().block_table[0][0][:2] == [1, 2]
    manager.commit(first)
    assert (engine.table(a), engine.table(b)) == ([0], [0, 2])
    assert manager.num_free_blocks == 8 - 3  # the second step still names block 1
    manager.commit(second)
    assert manager.num_free_blocks == 8 - 2


def test_eviction_takes_the_least_recently_used_and_a_child_before_its_parent(engine: Engine) -> None:
    manager = engine.start(num_blocks=4)
    old, new = engine.serve([1, 2, 3, 4]), engine.serve([5, 6, 7, 8])
    manager.free(old)
    manager.free(new)
    assert manager.num_free_blocks == 4
    assert engine.table(manager.admit([9])[0]) == [1]
    assert (manager.match([1, 2, 3, 4, 0]), manager.match([5, 6, 7, 8, 0])) == (2, 4)


def test_what_is_hit_is_not_free_for_the_rest(engine: Engine) -> None:
    manager = engine.start(num_blocks=3)
    manager.free(engine.serve([1, 2, 3, 4]))
    with pytest.raises(NoFreeBlocks) as caught:
        manager.admit([1, 2, 3, 4, 5, 6, 7])
    assert (caught.value.needed, caught.value.free) == (2, 1)
    assert manager.can_admit([1, 2, 3, 4, 5, 6, 7]) == 2  # NEVER: more than the whole pool
    assert not manager.can_admit([1, 2, 3, 4, 5, 6, 7])
    assert manager.can_admit([1, 2, 3, 4, 5, 6]) == 0
    assert manager.can_admit([1, 2, 3, 4, 5, 6])  # NOW is 0, and true


def test_salt_and_extra_keep_equal_tokens_apart(engine: Engine) -> None:
    manager = engine.start()
    engine.serve([1, 2, 3], salt=b"tenant", extra=[(1, b"image")])
    assert manager.match([1, 2, 3]) == 0
    assert manager.match([1, 2, 3], salt=b"tenant") == 0
    assert manager.match([1, 2, 3], salt=b"tenant", extra=[(0, b"image")]) == 0
    assert manager.match([1, 2, 3], salt=b"tenant", extra=[(1, b"image")]) == 2


def test_extra_goes_with_its_token(engine: Engine) -> None:
    manager = engine.start()
    seq, _ = manager.admit([1, 2], extra=[(1, b"image")])
    manager.trim(seq, 1)
    manager.append([seq], [2])  # the same id, but no image
    engine.compute(seq)
    assert manager.match([1, 2, 3], extra=[(1, b"image")]) == 0
    assert manager.match([1, 2, 3]) == 2


def test_a_placeholder_is_published_once_it_is_known(engine: Engine) -> None:
    manager = engine.start()
    seq = engine.serve([1, 2, 3])
    manager.append(seq)
    engine.prepare(seq)
    assert engine.view().input_ids[0] == -1
    manager.append([seq], [5])
    manager.prepare([seq], [1], engine.step)
    manager.commit(2)
    assert plain(manager.tokens(seq)) == [1, 2, 3, -1, 5]
    assert manager.match([1, 2, 3, 4, 5]) == 2
    manager.set_tokens([seq], [4])
    assert manager.match([1, 2, 3, 4, 5]) == 2
    manager.commit(3)
    assert manager.match([1, 2, 3, 4, 5]) == 4


def test_a_shared_block_is_published_only_once_it_is_held_alone(engine: Engine) -> None:
    manager = engine.start(num_blocks=8, block_size=1)
    a = engine.serve([7])
    manager.extend([a], None, [2])
    engine.compute(a)
    with pytest.raises(ValueError, match=r"."):
        manager.fork(a)  # what was computed is not known
    engine.serve([7, 1])
    manager.set_tokens([a], [1, 2], [2])
    b = manager.fork(a)[0]
    manager.append([a], [3])
    engine.compute(a)
    assert engine.table(a)[:3] == engine.table(b)  # not merged with the other [7, 1]: b would be left behind
    assert manager.match([7, 1, 2, 3]) == 2
    manager.free(b)
    manager.append([a], [4])
    engine.compute(a)
    assert manager.match([7, 1, 2, 3]) == 3


def test_a_sequence_freed_in_an_open_step_leaves_when_it_closes(engine: Engine) -> None:
    manager = engine.start()
    seq, _ = manager.admit([1, 2, 3])
    step_id = engine.prepare(seq)
    manager.free(seq)
    with pytest.raises(StaleSequence):
        manager.tokens(seq)
    assert (manager.num_sequences, manager.num_free_blocks) == (0, 6)
    manager.commit(step_id)
    assert manager.num_free_blocks == 8
    assert manager.match([1, 2, 3]) == 2  # what it computed is good all the same


def test_resume_hits_what_survived(engine: Engine) -> None:
    manager = engine.start(num_blocks=4)
    seq = engine.serve([1, 2, 3, 4, 5])
    manager.preempt(seq)
    assert (engine.lengths(seq), engine.table(seq)) == ([0, 0, 0, 5], [])
    other, _ = manager.admit([6, 7, 8, 9, 10])  # two unused blocks, and the last of the prefix
    with pytest.raises(NoFreeBlocks) as caught:
        manager.resume(seq)
    assert (caught.value.needed, caught.value.free) == (2, 0)
    manager.free(other)
    assert manager.resume(seq) == 2
    assert engine.lengths(seq) == [2, 2, 5, 5]


def test_a_beam_step_moves_many_at_once(engine: Engine) -> None:
    manager = engine.start()
    a, b = engine.serve([1, 2, 3]), engine.serve([4, 5, 6])
    c = manager.fork(a)[0]
    manager.reorder([a, b, c], [b, a, c])
    assert [plain(manager.tokens(s)) for s in (a, b, c)] == [[4, 5, 6], [1, 2, 3], [1, 2, 3]]
    assert (engine.table(a), engine.table(b), engine.table(c)) == ([2, 3], [0, 1], [0, 1])


def test_a_pin_keeps_a_prefix(engine: Engine) -> None:
    manager = engine.start(num_blocks=3)
    seq = engine.serve([1, 2, 3, 4])
    pin = manager.pin([1, 2, 3])
    manager.free(seq)
    assert manager.num_free_blocks == 2
    manager.free(manager.admit([5, 6, 7])[0])
    assert manager.match([1, 2, 3]) == 2
    with pytest.raises(ValueError, match=r"."):
        manager.free(pin)
    manager.unpin(pin)
    assert manager.num_free_blocks == 3


def test_after_a_reset_the_old_publish_no_more(engine: Engine) -> None:
    manager = engine.start()
    seq = engine.serve([1, 2, 3])
    manager.reset_prefix_cache()
    assert manager.match([1, 2, 3]) == 0
    manager.append([seq], [4])
    engine.compute(seq)
    assert manager.match([1, 2, 3, 4, 5]) == 0
    manager.preempt(seq)
    assert manager.resume(seq) == 0
    engine.compute(seq)
    assert manager.match([1, 2, 3, 4, 5]) == 4


def test_without_a_node_to_hang_on_a_sequence_stops_publishing(engine: Engine) -> None:
    manager = engine.start(max_nodes=1)
    a = engine.serve([1, 2, 3, 4])
    b = engine.serve([5, 6])
    assert (manager.match([1, 2, 3, 4, 5]), manager.match([5, 6, 7])) == (2, 0)
    manager.free([a, b])
    manager.admit([9] * 16)  # the whole pool: the node is free again
    assert manager.stats().evictions == 1


def test_the_watermark_holds_back_admissions_only(engine: Engine) -> None:
    manager = engine.start(num_blocks=4, watermark=0.25)
    a, _ = manager.admit([1] * 8)  # nothing is held: ignored
    manager.free(a)
    b, _ = manager.admit([1] * 4)
    with pytest.raises(NoFreeBlocks) as caught:
        manager.admit([2] * 4)
    assert (caught.value.needed, caught.value.free) == (2, 1)
    manager.extend([b], [1] * 4, [4])
    engine.compute(b)
    assert manager.num_free_blocks == 0


def test_a_call_that_fails_changes_nothing(engine: Engine) -> None:
    manager = engine.start(num_blocks=4)
    a, b = manager.admit([1, 2])[0], manager.admit([3, 4])[0]
    stats, before = manager.stats(), engine.view()
    with pytest.raises(ValueError, match=r"."):
        manager.append([a, b], [5, -1])
    with pytest.raises(ValueError, match=r"."):
        manager.free([a, b, a])
    manager.extend([a, b], [1] * 6, [3, 3])
    with pytest.raises(NoFreeBlocks) as caught:
        engine.prepare(a, b)
    assert (caught.value.needed, caught.value.free) == (4, 2)
    assert engine.view() == before
    assert manager.stats() == stats
    assert engine.lengths(a) == [0, 0, 2, 5]


# Groups of different reach: blocks of 2 tokens, one group that attends to everything and one to the last 3 tokens


def test_what_slides_out_of_a_window_is_given_back(engine: Engine) -> None:
    manager = engine.start(num_blocks=16, groups=(None, Window(3)))
    seq = manager.admit([1, 2, 3, 4, 5, 6, 7])[0]
    assert engine.table(seq) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    engine.compute(seq)  # the next token, at position 7, reaches 5 and 6
    assert engine.table(seq) == [[0, 2, 4, 6], [-1, -1, 5, 7]]
    assert manager.num_free_blocks == 16 - 6
    manager.append([seq], [8])
    engine.prepare(seq)
    assert [row[0][:4] for row in engine.view().block_table] == [[0, 2, 4, 6], [-1, -1, 5, 7]]
    assert engine.view().kv_indices == [[0, 2, 4, 6], [5, 7]]


def test_a_chunk_is_given_back_when_the_next_begins(engine: Engine) -> None:
    manager = engine.start(num_blocks=8, groups=(Chunk(4),))
    seq = manager.admit([1, 2, 3, 4, 5])[0]
    manager.commit(engine.prepare(seq, lens=[3]))
    assert engine.table(seq) == [0, 1, 2]
    manager.commit(engine.prepare(seq, lens=[1]))
    assert engine.table(seq) == [-1, -1, 2]


def test_a_hit_needs_only_what_a_window_reaches(engine: Engine) -> None:
    manager = engine.start(num_blocks=16, groups=(None, Window(3)))
    first = engine.serve([1, 2, 3, 4, 5, 6, 7, 8])
    manager.free(first)
    second, cached = manager.admit([1, 2, 3, 4, 5, 6, 9])
    assert cached == 6
    assert [row[2] >= 0 for row in engine.table(second)] == [True, True]
    assert engine.table(second)[1][:2] == [-1, -1]


def test_a_hit_ends_where_a_windows_blocks_were_evicted(engine: Engine) -> None:
    manager = engine.start(num_blocks=10, groups=(None, Window(3)))
    seq = engine.serve([1, 2, 3, 4, 5, 6, 7])  # rows 0 and 1 of the window are cached, 2 and 3 held
    other = engine.serve([9, 9, 9, 9])  # takes two fresh blocks and evicts those two
    assert manager.stats().evictions == 2
    assert manager.match([1, 2, 3, 4, 5, 6, 7, 8]) == 6  # a token at 6 reaches row 2
    assert manager.match([1, 2, 3, 4, 5]) == 0  # one at 4 reaches row 1
    manager.free([seq, other])


def test_windowed_blocks_alone_make_a_hit(engine: Engine) -> None:
    """Where no group attends to everything, the blocks of the window are enough, and the way to them stays known."""
    manager = engine.start(num_blocks=4, groups=(Window(3),))
    seq = manager.admit([1, 2, 3, 4, 5, 6, 7], reserve=2)[0]
    for _ in range(3):
        manager.commit(engine.prepare(seq, lens=[2]))
    engine.serve([9, 9, 9])  # evicts what slid out
    assert manager.stats().evictions > 0
    assert manager.match([1, 2, 3, 4, 5, 6, 7]) == 6
    assert manager.match([1, 2, 3]) == 0
    assert manager.match([2, 2, 3, 4, 5, 6, 7]) == 0


def test_what_slid_away_cannot_be_trimmed_back_to(engine: Engine) -> None:
    manager = engine.start(num_blocks=16, groups=(None, Window(3)))
    seq = engine.serve([1, 2, 3, 4, 5, 6, 7])
    with pytest.raises(ValueError, match=r"slid out of reach|are gone"):
        manager.trim(seq, 4)
    manager.trim(seq, 6)
    manager.preempt(seq)
    manager.trim(seq, 4)
    assert manager.resume(seq) == 2  # of the window its first block is still there
    manager.trim(seq, 0)
    assert engine.table(seq) == [[], []]


def test_a_step_has_arrays_for_each_group(engine: Engine) -> None:
    manager = engine.start(num_blocks=16, groups=(None, Window(3), Window(3)))
    seq = manager.admit([1, 2, 3])[0]
    manager.commit(engine.prepare(seq))
    view = engine.view()
    assert [slots[:4] for slots in view.slot_mapping] == [[0, 1, 6, -1], [2, 3, 8, -1], [4, 5, 10, -1]]
    child = manager.fork(seq)[0]
    manager.append([seq, child], [4, 5])
    engine.prepare(child)
    assert engine.view().copies == [(3, 6), (4, 7), (5, 8)]  # the last block of each group is shared


def test_the_watermark_is_for_sequences_that_run(engine: Engine) -> None:
    manager = engine.start(10, 4, watermark=0.5)
    first = engine.serve([1] * 5)
    with pytest.raises(NoFreeBlocks) as caught:
        manager.admit([2] * 16)
    assert (caught.value.needed, caught.value.free) == (4, 3)
    manager.preempt(first)
    manager.pin([1] * 4)
    second, _ = manager.admit([2] * 20)  # a pin and a preempted sequence give nothing back by themselves
    manager.free([second])
    manager.resume(first)
    with pytest.raises(NoFreeBlocks):
        manager.admit([2] * 20)


def test_can_admit_says_never_where_an_empty_pool_does_not_do(engine: Engine) -> None:
    """What a window saves on the way counts, and what is cached now does not: it may be gone tomorrow."""
    manager = engine.start(14, 1, groups=(None, Window(1)))
    manager.free(engine.serve([1, 2, 3, 4, 5, 6]))
    other = engine.serve([7])
    assert manager.can_admit(range(1, 11)) == 2  # 20 blocks at once, but for the hit
    assert manager.can_admit(range(1, 11), reserve=4) == 1  # after the hit of 6 tokens 14 blocks in all
    manager.free(other)
    assert manager.can_admit(range(1, 11), reserve=4) == 0
    assert manager.can_admit([9] * 10, reserve=8) == 2
    assert manager.can_admit([9] * 10, reserve=4) == 0
    held = engine.serve([8, 8, 8, 8, 8, 8, 8])
    assert manager.can_admit([9] * 10, reserve=4) == 1
    assert not manager.can_admit([9] * 10, reserve=4)
    manager.free(held)
    assert manager.can_admit([9] * 10, reserve=4) == 0
    bare = engine.start(12, 1, groups=(None, Window(1)), prefix_caching=False)
    assert bare.can_admit(range(10), reserve=10) == 2
    assert bare.can_admit(range(10), reserve=1) == 0


def test_the_peak_is_what_was_used_at_once(engine: Engine) -> None:
    """A step that merges gives blocks back in the same breath as it takes others."""
    manager = engine.start(16, 1)
    steps = [engine.driver.step(4, 16, 16) for _ in range(3)]
    one, two = manager.admit([1, 5, 5], reserve=0)[0], manager.admit([2, 6, 6], reserve=0)[0]
    for tokens in ([1], [2]):
        manager.free(engine.serve(tokens))
    ids = [manager.prepare([one], [1], steps[0]), manager.prepare([one, two], [1, 1], steps[1])]
    ids.append(manager.prepare([two], [1], steps[2]))
    peaks = [manager.stats().peak_used_blocks]
    for step_id in ids:
        manager.commit(step_id)
        peaks.append(manager.stats().peak_used_blocks)
    assert peaks == [4, 5, 5, 5]


def test_a_child_keeps_the_way_that_only_its_parent_knew(engine: Engine) -> None:
    manager = engine.start(6, 1, groups=(Window(1),))
    parent = manager.admit([1, 2], reserve=0)[0]
    manager.commit(engine.prepare(parent))  # both blocks slid out of the window
    child, other = manager.admit([5], reserve=0)[0], manager.admit([6], reserve=0)[0]
    manager.free(manager.admit([7] * 6)[0])  # they are evicted: only the parent still stands on their node
    manager.reorder([parent, child], [other, parent])
    manager.append([child], [3])
    manager.commit(engine.prepare(child))
    assert manager.match([1, 2, 3, 4]) == 3
    manager.audit()


def test_two_chats_with_equal_ids_and_other_images_share_only_what_came_before(engine: Engine) -> None:
    manager = engine.start(num_blocks=16)

    def chat(image: bytes) -> list[int]:
        seq = engine.serve([5, 5, 5])
        manager.extend([seq], [9, 9, 9, 2], [4], extra=[[(1, image)]])
        engine.compute(seq)
        return engine.table(seq)

    cat, dog, cat_again = chat(b"cat"), chat(b"dog"), chat(b"cat")
    assert cat[:2] == dog[:2] == cat_again[:2]  # up to the image, which is the sixth token
    assert not set(cat[2:]) & set(dog[2:])
    assert cat[2] == cat_again[2]


def test_added_extra_bytes_that_are_wrong_change_nothing(engine: Engine) -> None:
    manager = engine.start()
    a, b = manager.admit([1])[0], manager.admit([2])[0]
    for extra, error in [
        ([[(0, b"x")]], ValueError),  # one list for two sequences
        ([[(0, b"x")], [(1, b"y")]], ValueError),  # past its token
        ([[(-1, b"x")], []], ValueError),
        ([[(0, b"x"), (0, b"y")], []], ValueError),
        ([[(0, "x")], []], TypeError),
        ([[0], []], TypeError),
    ]:
        with pytest.raises(error):
            manager.append([a, b], [3, 4], extra=extra)
        with pytest.raises(error):
            manager.extend([a, b], [3, 4], [1, 1], extra=extra)
    assert [list(manager.tokens(seq)) for seq in (a, b)] == [[1], [2]]


def test_children_of_a_partly_filled_block_copy_it_once_less(engine: Engine) -> None:
    manager = engine.start(num_blocks=16, block_size=4)
    parent = engine.serve([1, 2, 3, 4, 5, 6])
    family = [parent, *(int(child) for child in manager.fork(parent, 3))]
    manager.append(family, [7, 8, 9, 10])
    outsider = manager.fork(parent)[0]
    step_id = engine.prepare(*family[1:])
    assert [source for source, _ in engine.view().copies] == [1, 1, 1]  # the parent and the outsider have it too
    manager.abort(step_id)
    manager.free([outsider])
    step_id = engine.prepare(*family)
    assert [source for source, _ in engine.view().copies] == [1, 1, 1]
    assert engine.table(family[-1]) == [0, 1]
    manager.abort(step_id)
    assert [engine.table(seq) for seq in family] == [[0, 1]] * 4
    manager.trim(family[-1], 5)  # it has less there than the others, which an abort would give what it wrote
    manager.append([family[-1]], [11])
    engine.prepare(*family)
    assert engine.table(family[2]) == [0, 1]
    manager.audit()


def test_beams_keep_what_they_have_in_common(engine: Engine) -> None:
    """Children of other beams, with extra bytes, windows and trims in between, are what a copy of all would be."""
    for groups in [(None,), (None, Window(5)), (Chunk(6),)]:
        manager = engine.start(num_blocks=200, groups=groups)
        first = engine.serve([1, 2, 3, 4, 5, 6, 7], extra=[(2, b"image")])
        beams = [first, *(int(child) for child in manager.fork(first, 3))]
        texts = {beam: [1, 2, 3, 4, 5, 6, 7] for beam in beams}
        for round_ in range(9):
            tokens = [10 * round_ + i for i in range(4)]
            manager.append(beams, tokens, extra=[[(0, b"%d" % round_)], [], [(0, b"x")], []])
            for beam, token in zip(beams, tokens, strict=True):
                texts[beam] = [*texts[beam], token]
            engine.compute(*beams)
            parents = [beams[(i * round_ + 1) % 4] for i in range(4)]
            manager.reorder(beams, parents)
            texts = {beam: texts[parent] for beam, parent in zip(beams, parents, strict=True)}
            manager.audit()
        assert [plain(manager.tokens(beam)) for beam in beams] == [texts[beam] for beam in beams]
        manager.free(beams)
        assert manager.num_free_blocks == 200


@pytest.mark.parametrize("reach", [Window(4), Chunk(4)])
def test_a_beam_gets_back_what_slid_out_of_its_own_window(engine: Engine, reach: Window | Chunk) -> None:
    manager = engine.start(num_blocks=40, groups=(None, reach))
    parent = engine.serve([1, 2, 3, 4, 5, 6, 7])
    child = int(manager.fork(parent)[0])
    for token in range(10, 16):
        manager.append([child], [token])
        engine.compute(child)
    ahead = engine.table(child)
    manager.reorder([child], [parent])
    assert engine.table(child) == engine.table(parent) != ahead
    manager.audit()
    manager.reorder([parent], [child])
    assert engine.table(child) == engine.table(parent)
    manager.audit()
