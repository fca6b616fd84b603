"""Byte movement against numpy: any order of axes, any strides, any alignment, and not a byte beside the target."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvblocks.movement import BlockLayout, first_outside

Bytes = npt.NDArray[np.uint8]
GUARD = 64  # bytes before and behind every target


@dataclass(frozen=True)
class Case:
    """Sizes of a cache, the order of its axes inside a block, how far from a 16-byte boundary memory starts, and what
    lies between blocks."""

    blocks: int
    block_size: int
    heads: int
    runs: int
    run_bytes: int
    order: tuple[str, ...]
    shift: int = 0
    gap: int = 0

    @property
    def strides(self) -> dict[str, int]:
        sizes, steps, step = {"t": self.block_size, "h": self.heads, "r": self.runs}, {}, self.run_bytes
        for axis in reversed(self.order):
            steps[axis], step = step, step * sizes[axis]
        return steps

    @property
    def token_bytes(self) -> int:
        return self.heads * self.runs * self.run_bytes

    @property
    def layout(self) -> BlockLayout:
        steps = self.strides
        stride = self.block_size * self.token_bytes + self.gap
        return BlockLayout(
            self.blocks,
            self.block_size,
            self.heads,
            self.runs,
            self.run_bytes,
            steps["t"],
            steps["h"],
            steps["r"],
            stride,
        )

    @property
    def cache_bytes(self) -> int:
        return self.blocks * (self.block_size * self.token_bytes + self.gap)

    def view(self, memory: Bytes) -> Bytes:
        """[blocks, block_size, heads, runs, run_bytes] over the memory of a cache."""
        steps = self.strides
        block = self.block_size * self.token_bytes + self.gap
        shape = (self.blocks, self.block_size, self.heads, self.runs, self.run_bytes)
        return np.lib.stride_tricks.as_strided(memory, shape, (block, steps["t"], steps["h"], steps["r"], 1))


orders = st.permutations(["t", "h", "r"]).map(tuple)
cases = st.builds(
    Case,
    blocks=st.integers(1, 4),
    block_size=st.sampled_from([1, 2, 3, 4, 8, 16, 20, 33, 64]),
    heads=st.integers(1, 3),
    runs=st.sampled_from([1, 1, 2, 4, 5, 8, 16, 17, 35, 70]),
    run_bytes=st.sampled_from([1, 2, 4, 8, 16, 3, 6, 24, 32, 64, 80, 144]),
    order=orders,
    shift=st.sampled_from([0, 0, 0, 1, 8]),
    gap=st.sampled_from([0, 0, 16, 5]),
)


def noise(size: int, seed: int, shift: int = 0) -> Bytes:
    """`size` random bytes, starting `shift` bytes past a 64-byte boundary, with guards on both sides."""
    memory = np.random.default_rng(seed).integers(0, 256, size + 2 * GUARD + 64 + shift, np.uint8)
    start = -memory.ctypes.data % 64 + GUARD + shift
    return memory[start : start + size]


def whole(memory: Bytes) -> Bytes:
    """All the memory that `memory` is a part of, guards included."""
    assert isinstance(memory.base, np.ndarray)
    return memory.base


def slots_of(case: Case) -> st.SearchStrategy[list[int]]:
    """Runs of consecutive slots and single ones, pads, and some that do not exist."""
    capacity = case.blocks * case.block_size
    run = st.tuples(st.integers(0, capacity - 1), st.integers(1, 40)).map(
        lambda run: list(range(run[0], min(capacity, run[0] + run[1])))
    )
    outside = st.sampled_from([-1, -2, capacity, capacity + 1, -(2**63), 2**63 - 1])
    pieces = st.lists(run | st.integers(0, capacity - 1).map(lambda slot: [slot]) | outside.map(lambda slot: [slot]))
    return pieces.map(lambda lists: [slot for piece in lists for slot in piece])


@given(st.data(), cases, st.integers(0, 2**32))
@example(None, Case(4, 16, 2, 64, 4, ("h", "r", "t")), 1)
@example(None, Case(4, 16, 2, 64, 2, ("h", "r", "t")), 1)
@example(None, Case(4, 20, 2, 64, 1, ("h", "r", "t")), 1)
@example(None, Case(4, 16, 2, 8, 16, ("h", "r", "t")), 1)
def test_write_then_gather_equals_indexing(data: st.DataObject | None, case: Case, seed: int) -> None:
    capacity = case.blocks * case.block_size
    slots = list(range(capacity)) if data is None else data.draw(slots_of(case), label="slots")
    # Gaps between the tokens, and between the heads of a token, of the source.
    token_gap, head_gap = (0, 0) if data is None else data.draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    head_step = case.runs * case.run_bytes + head_gap
    token_step = case.heads * head_step + token_gap
    source = noise(len(slots) * token_step, seed, case.shift)
    rows = np.lib.stride_tricks.as_strided(
        source, (len(slots), case.heads, case.runs, case.run_bytes), (token_step, head_step, case.run_bytes, 1)
    )
    cache = noise(case.cache_bytes, seed + 1, case.shift)
    expected = whole(cache).copy()
    offset = cache.ctypes.data - whole(cache).ctypes.data
    model = case.view(expected[offset : offset + cache.size])
    for row, slot in zip(rows, slots, strict=True):
        if 0 <= slot < capacity:
            model[slot // case.block_size, slot % case.block_size] = row

    index = np.array(slots, np.int64)
    case.layout.write(cache.ctypes.data, source.ctypes.data, token_step, head_step, index.ctypes.data, len(slots))
    np.testing.assert_array_equal(whole(cache), expected)

    table = np.array([2, 0, 1] if case.blocks > 2 else [0], np.int64)
    num_tokens = len(table) * case.block_size
    num_tokens -= 0 if data is None else data.draw(st.integers(0, case.block_size), label="tokens not gathered")
    target = noise(num_tokens * case.token_bytes, seed + 2, case.shift)
    filled = whole(target).copy()
    offset = target.ctypes.data - whole(target).ctypes.data
    filled[offset : offset + target.size] = model[table].reshape(-1)[: target.size]
    case.layout.gather(cache.ctypes.data, target.ctypes.data, table.ctypes.data, num_tokens)
    np.testing.assert_array_equal(whole(target), filled)


@pytest.mark.parametrize("order", list(permutations("thr")))
@pytest.mark.parametrize("run_bytes", [1, 2, 4, 8, 16, 64])
def test_gather_of_many_bytes_equals_indexing(order: tuple[str, ...], run_bytes: int) -> None:
    case = Case(64, 16, 4, 8192 // run_bytes // 4, run_bytes, order)
    cache = noise(64 * 16 * case.token_bytes, 1)
    table = np.random.default_rng(2).permutation(64).astype(np.int64)
    num_tokens = 64 * 16 - 3
    target = noise(num_tokens * case.token_bytes, 3)
    before = whole(target).copy()
    case.layout.gather(cache.ctypes.data, target.ctypes.data, table.ctypes.data, num_tokens)
    np.testing.assert_array_equal(target, case.view(cache)[table].reshape(-1)[: target.size])
    offset = target.ctypes.data - whole(target).ctypes.data
    np.testing.assert_array_equal(whole(target)[:offset], before[:offset])
    np.testing.assert_array_equal(whole(target)[offset + target.size :], before[offset + target.size :])


@given(st.data(), cases, st.integers(0, 2**32))
def test_copy_and_zero_blocks_equal_indexing(data: st.DataObject, case: Case, seed: int) -> None:
    ids = st.integers(-2, case.blocks + 1)
    pairs = np.array(data.draw(st.lists(st.tuples(ids, ids))), np.int64).reshape(-1, 2)
    zeros = np.array(data.draw(st.lists(ids)), np.int64)
    cache = noise(case.cache_bytes, seed, case.shift)
    expected = whole(cache).copy()
    offset = cache.ctypes.data - whole(cache).ctypes.data
    model = expected[offset : offset + cache.size].reshape(case.blocks, -1)[:, : case.layout.block_bytes]
    for source, target in pairs:
        if 0 <= source < case.blocks and 0 <= target < case.blocks:
            model[target] = model[source]
    case.layout.copy_blocks(cache.ctypes.data, pairs.ctypes.data, len(pairs))
    np.testing.assert_array_equal(whole(cache), expected)
    model[[block for block in zeros if 0 <= block < case.blocks]] = 0
    case.layout.zero_blocks(cache.ctypes.data, zeros.ctypes.data, len(zeros))
    np.testing.assert_array_equal(whole(cache), expected)


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 9)), st.integers(-3, 3), st.integers(0, 9))
def test_first_outside_is_the_first(values: list[int], low: int, high: int) -> None:
    array = np.array(values, np.int64)
    outside = [place for place, value in enumerate(values) if not low <= value <= high]
    assert first_outside(array.ctypes.data, len(values), low, high) == (outside[0] if outside else -1)
