"""The torch path against plain indexing. It runs on any device; here on the CPU, and on CUDA where there is one."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvblocks.storage import on_torch

DTYPES = [torch.float8_e5m2, torch.int8, torch.bfloat16, torch.float32, torch.float64]
BLOCKS, BLOCK_SIZE, HEADS, DIM = 4, 3, 2, 5
CAPACITY = BLOCKS * BLOCK_SIZE


@st.composite
def caches(draw: st.DrawFn) -> Tensor:
    """A cache [blocks, block_size, heads, dim] of random bits; its axes after the first lie in memory in any order."""
    dtype, order = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(list(permutations((1, 2, 3)))))
    sizes = (BLOCKS, BLOCK_SIZE, HEADS, DIM)
    cache = random_bits((BLOCKS, *(sizes[axis] for axis in order)), dtype, draw(st.integers(0, 2**32)))
    return cache.permute(0, *(1 + order.index(axis) for axis in (1, 2, 3)))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, wide, dtype=torch.uint8, generator=generator).view(dtype)


def bits(tensor: Tensor) -> list[int]:
    out: list[int] = tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).flatten().tolist()
    return out


indices = st.integers(-2, CAPACITY + 1)


@given(caches(), st.lists(indices, unique=True), st.integers(0, 2**32))
def test_write_equals_indexing_and_drops_what_is_outside(cache: Tensor, slots: list[int], seed: int) -> None:
    rows = random_bits((len(slots), HEADS, DIM), cache.dtype, seed)
    expected = cache.clone()
    for row, slot in zip(rows, slots, strict=True):
        if 0 <= slot < CAPACITY:
            expected[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = row
    on_torch.write(cache, rows, torch.tensor(slots, dtype=torch.int64))
    assert bits(cache) == bits(expected)


@given(caches(), st.lists(st.integers(-1, BLOCKS), max_size=6), st.data())
def test_gather_equals_indexing_and_gives_zeros_for_what_is_outside(
    cache: Tensor, table: list[int], data: st.DataObject
) -> None:
    num_tokens = data.draw(st.integers(0, len(table) * BLOCK_SIZE))
    zeros = torch.zeros_like(cache[0])
    blocks = [cache[block] if 0 <= block < BLOCKS else zeros for block in table]
    expected = torch.stack([*blocks, zeros]).flatten(0, 1)[:num_tokens]
    rows = on_torch.gather(cache, torch.tensor(table, dtype=torch.int64), num_tokens)
    assert rows.shape == (num_tokens, HEADS, DIM)
    assert rows.dtype == cache.dtype
    assert rows.is_contiguous()
    assert bits(rows) == bits(expected)


@given(caches(), st.permutations(list(range(-1, BLOCKS + 1))), st.integers(0, 3))
def test_copy_blocks_equals_indexing(cache: Tensor, ids: list[int], count: int) -> None:
    pairs = [(ids[2 * i], ids[2 * i + 1]) for i in range(count)]
    expected = cache.clone()
    for source, target in pairs:
        if 0 <= source < BLOCKS and 0 <= target < BLOCKS:
            expected[target] = cache[source]
    on_torch.copy_blocks(cache, torch.tensor(pairs, dtype=torch.int64).view(-1, 2))
    assert bits(cache) == bits(expected)


@given(caches(), st.lists(st.integers(-1, BLOCKS)))
def test_zero_blocks_equals_indexing(cache: Tensor, ids: list[int]) -> None:
    expected = cache.clone()
    for block in ids:
        if 0 <= block < BLOCKS:
            expected[block] = 0
    on_torch.zero_blocks(cache, torch.tensor(ids, dtype=torch.int64))
    assert bits(cache) == bits(expected)


def test_gradients_are_neither_needed_nor_kept() -> None:
    cache = torch.zeros(BLOCKS, BLOCK_SIZE, HEADS, DIM)
    rows = torch.ones(2, HEADS, DIM, requires_grad=True)
    on_torch.write(cache, rows, torch.tensor([0, 4]))
    assert not cache.requires_grad
    assert cache.sum() == 2 * HEADS * DIM


@pytest.mark.cuda
def test_nothing_waits_for_the_device() -> None:
    cache = torch.zeros(BLOCKS, BLOCK_SIZE, HEADS, DIM, device="cuda")
    rows = torch.ones(3, HEADS, DIM, device="cuda")
    slots = torch.tensor([4, -1, CAPACITY], device="cuda")
    pairs = torch.tensor([[1, 2], [0, BLOCKS]], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_torch.write(cache, rows, slots)
        on_torch.copy_blocks(cache, pairs)
        on_torch.zero_blocks(cache, slots[1:])
        gathered = on_torch.gather(cache, slots, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gathered.sum() == 0
    assert cache.sum() == 2 * HEADS * DIM
