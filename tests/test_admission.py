"""What `can_admit` and `blocks_needed` say is what happens: each prompt is run, alone, in a pool of that size."""

from itertools import count
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvblocks.config import Chunk, Window
from kvblocks.errors import NoFreeBlocks
from kvblocks.manager import Admission, BlockManager
from kvblocks.step.buffers import StepBuffers

REACHES = st.none() | st.builds(Window, st.integers(1, 20)) | st.builds(Chunk, st.integers(1, 20))


def finishes(manager: BlockManager, length: int, reserve: int | None, new: int) -> bool:
    """Whether the prompt is computed and answered, in steps of at most `reserve` tokens."""
    step = StepBuffers(1, length, 256, groups=len(manager.groups))
    try:
        seq, done = manager.admit([1] * length, reserve=reserve)
        while done < length:
            size = min(length - done, length if reserve is None else max(1, reserve))
            manager.commit(manager.prepare([seq], size, step))
            done += size
        for _ in range(new - 1):
            manager.append([seq], [2])
            manager.commit(manager.prepare([seq], 1, step))
    except NoFreeBlocks:
        return False
    manager.audit()
    return True


@given(
    groups=st.lists(REACHES, min_size=1, max_size=3).map(tuple),
    block_size=st.integers(1, 6),
    length=st.integers(1, 60),
    reserve=st.none() | st.integers(0, 60),
    new=st.integers(1, 30),
    caching=st.booleans(),
)
def test_the_smallest_pool_that_is_not_called_never_finishes(
    groups: tuple[Any, ...], block_size: int, length: int, reserve: int | None, new: int, caching: bool
) -> None:
    def pool(num_blocks: int) -> BlockManager:
        return BlockManager(num_blocks, block_size, groups=groups, prefix_caching=caching)

    def asks(num_blocks: int) -> Admission:
        return pool(num_blocks).can_admit([1] * length, reserve=reserve, max_new_tokens=new)

    smallest = next(n for n in count(1) if asks(n) is not Admission.NEVER)
    assert asks(smallest) is Admission.NOW
    assert smallest == pool(1).blocks_needed(length, reserve=reserve, max_new_tokens=new)
    assert finishes(pool(smallest), length, reserve, new)
    assert smallest == 1 or not finishes(pool(smallest - 1), length, reserve, new)


@given(
    groups=st.lists(REACHES, min_size=1, max_size=3).map(tuple),
    block_size=st.integers(1, 16),
    length=st.integers(1, 3000),
    reserve=st.none() | st.integers(0, 300),
    new=st.integers(1, 3000),
)
def test_long_prompts_need_what_their_steps_hold(
    groups: tuple[Any, ...], block_size: int, length: int, reserve: int | None, new: int
) -> None:
    def first(reach: Window | Chunk | None, position: int) -> int:
        if isinstance(reach, Window):
            return max(0, position - reach.size + 1) // block_size
        return position // reach.size * reach.size // block_size if isinstance(reach, Chunk) else 0

    starts, size = list(range(0, length, length if reserve is None else max(1, reserve))), 0
    ends = [*starts[1:], length]
    starts, ends = starts + list(range(length, length + new - 1)), ends + list(range(length + 1, length + new))
    for start, end in zip(starts, ends, strict=True):
        size = max(size, sum(-(-end // block_size) - first(reach, start) for reach in groups))
    manager = BlockManager(1, block_size, groups=groups)
    assert manager.blocks_needed(length, reserve=reserve, max_new_tokens=new) == size


@given(
    groups=st.lists(REACHES, min_size=1, max_size=3).map(tuple),
    block_size=st.integers(1, 6),
    length=st.integers(2, 60),
    reserve=st.integers(0, 12),
    warm=st.data(),
)
def test_a_hit_does_not_keep_a_prompt_from_being_served(
    groups: tuple[Any, ...], block_size: int, length: int, reserve: int, warm: Any
) -> None:
    needed = BlockManager(1, block_size, groups=groups).blocks_needed(length, reserve=reserve)
    manager = BlockManager(needed, block_size, groups=groups)
    step = StepBuffers(1, length, 256, groups=len(groups))
    seq, done = manager.admit([1] * warm.draw(st.integers(1, length), label="cached before"), reserve=0)
    left = int(manager.lengths([seq]).num_tokens[0]) - done
    try:
        while left:
            size = warm.draw(st.integers(1, left), label="in steps of")
            manager.commit(manager.prepare([seq], size, step))
            left -= size
    except NoFreeBlocks:
        assert size > 1  # where steps begin elsewhere, one of `reserve` tokens can hold more blocks
    manager.free([seq])
    assert manager.can_admit([1] * length, reserve=reserve) is Admission.NOW
    assert finishes(manager, length, reserve, 1)


def test_never_stays_never_when_blocks_come_free() -> None:
    manager = BlockManager(4, 4)
    seq, _ = manager.admit([1] * 16)
    assert manager.can_admit([0] * 17, reserve=4) is Admission.NEVER
    assert manager.can_admit([0] * 16, reserve=4) is Admission.LATER
    manager.free([seq])
    assert manager.can_admit([0] * 17, reserve=4) is Admission.NEVER
    assert manager.can_admit([0] * 16, reserve=4) is Admission.NOW
    assert manager.can_admit([0] * 16, reserve=4, max_new_tokens=2) is Admission.NEVER
    assert manager.can_admit([0] * 1_000_000, reserve=4) is Admission.NEVER
    assert manager.can_admit([0], max_new_tokens=2**31 - 1) is Admission.NEVER


def test_a_number_out_of_range_is_named() -> None:
    manager = BlockManager(4, 4)
    for wrong, name in [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"reserve": -1}, "reserve=-1"),
        ({"max_new_tokens": 2**31 - 1}, "max_new_tokens=2147483647"),
    ]:
        with pytest.raises(ValueError, match=name):
            manager.blocks_needed(2, **wrong)
    with pytest.raises(ValueError, match="num_tokens=0"):
        manager.blocks_needed(0)
    with pytest.raises(TypeError, match="num_tokens"):
        manager.blocks_needed(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_hit=-1"):
        manager.admit([1], max_hit=-1)
    assert manager.blocks_needed(2**31 - 1) == 2**29


def test_a_hit_can_be_capped() -> None:
    manager, step = BlockManager(16, 4), StepBuffers(1, 16, 8)
    seq, _ = manager.admit(range(12))
    manager.commit(manager.prepare([seq], 12, step))
    assert [manager.match(range(13), max_hit=n) for n in (None, 100, 12, 11, 4, 3, 0)] == [12, 12, 12, 8, 4, 0, 0]
    other, cached = manager.admit(range(13), max_hit=9)
    assert cached == 8
    manager.preempt(other)
    assert manager.resume(other, max_hit=4) == 4


def test_a_windowed_sequence_longer_than_the_pool_comes_back() -> None:
    manager, step = BlockManager(4, 4, groups=(Window(5),)), StepBuffers(1, 16, 64)
    seq, _ = manager.admit([1] * 4)
    manager.commit(manager.prepare([seq], 4, step))
    for token in range(60):
        manager.append([seq], [token])
        manager.commit(manager.prepare([seq], 1, step))
    manager.preempt(seq)
    done = manager.resume(seq)
    while done < 64:
        manager.commit(manager.prepare([seq], 1, step))
        done += 1
    assert manager.tokens(seq).tolist() == [1] * 4 + list(range(60))
    manager.audit()


def test_an_empty_sequence_comes_back() -> None:
    manager = BlockManager(4, 4, groups=(Window(5),))
    seq, _ = manager.admit([1] * 4)
    manager.trim(seq, 0)
    manager.preempt(seq)
    assert manager.resume(seq) == 0
    manager.audit()


def test_chunks_of_coprime_sizes_are_not_walked_token_by_token() -> None:
    """The ends of both chunks meet once in two billion tokens, at the last of as many tokens as their product."""
    manager = BlockManager(1, 1, groups=(Chunk(46337), Chunk(46327)))
    assert 46337 * 46327 < 2**31 - 1
    assert manager.blocks_needed(46337 * 46327, reserve=1) == 46337 + 46327
    assert manager.blocks_needed(46337 * 46327 - 1, reserve=1) == 46337 + 46327 - 1
    assert manager.blocks_needed(2**31 - 1, max_new_tokens=1, reserve=1) == 46337 + 46327


@pytest.mark.parametrize(
    ("block_size", "groups", "reserve", "needed"),
    [
        (16, (Chunk(3), Chunk(2**30 + 3)), 1, 67108865 + 2),
        (16, tuple(Chunk(size) for size in (7, 11, 13, 17, 100_003)), 1, 6252 + 4 * 2),
        (2**28, (Window(1000),), 3, 2),
    ],
)
def test_small_reaches_beside_large_ones_are_not_walked_either(
    block_size: int, groups: tuple[Any, ...], reserve: int, needed: int
) -> None:
    manager = BlockManager(1, block_size, groups=groups, prefix_caching=False)
    started = process_time()
    assert manager.blocks_needed(2**31 - 1, reserve=reserve) == needed
    assert process_time() - started < 0.5  # a step for each chunk or block takes ten times as long


def test_later_where_there_is_no_room_for_another_sequence() -> None:
    manager = BlockManager(8, 4, max_seqs=1)
    assert manager.can_admit([1]) is Admission.NOW
    seq, _ = manager.admit([1])
    assert manager.can_admit([1]) is Admission.LATER
    manager.free([seq])
    assert manager.can_admit([1]) is Admission.NOW


def test_now_heeds_the_watermark_as_admit_does() -> None:
    manager = BlockManager(4, 4, watermark=0.5)
    seq, _ = manager.admit([1])
    assert manager.can_admit([1] * 8) is Admission.LATER
    with pytest.raises(NoFreeBlocks):
        manager.admit([1] * 8)
    manager.free([seq])
    assert manager.can_admit([1] * 8) is Admission.NOW


def test_an_emptied_sequence_of_windows_resumes() -> None:
    """It has no step to be counted; the build with sanitizers sees a division by it."""
    manager = BlockManager(1, 2, groups=(Window(3),))
    seq, _ = manager.admit([1, 2])
    manager.trim(seq, 0)
    manager.preempt(seq)
    assert manager.resume(seq) == 0
    manager.audit()


def test_a_prompt_that_never_fits_is_told_so_and_not_to_free() -> None:
    manager = BlockManager(8, 4)
    seq, _ = manager.admit([1] * 16)
    manager.commit(manager.prepare([seq], 16, StepBuffers(1, 16, 8)))
    with pytest.raises(NoFreeBlocks, match="6 blocks needed, 4 of 8 free; free or preempt") as later:
        manager.admit([2] * 24)
    assert (later.value.needed, later.value.free) == (6, 4)
    # Of the second 4 of 9 blocks are cached: it needs fewer than the pool has, and never fits all the same.
    for tokens, needed in (([2] * 36, 9), ([1] * 36, 5)):
        assert manager.can_admit(tokens) is Admission.NEVER
        with pytest.raises(NoFreeBlocks, match="9 blocks needed at once, and the pool has 8: it never fits") as never:
            manager.admit(tokens)
        assert (never.value.needed, never.value.free) == (needed, 4)
    manager.extend([seq], [3] * 24, [24])
    with pytest.raises(ValueError, match=r"max_blocks_per_seq=8 .* sequences of 40 tokens \(max_seq_len"):
        manager.prepare([seq], 24, StepBuffers(1, 24, 8))
