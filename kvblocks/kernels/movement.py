"""Triton kernels that move K and V: rows of tokens into slots and out of blocks, whole blocks, zeros.

Tensors are moved as integers of 1 to 8 bytes, so that every bit survives, in one launch for two, K and V mostly.
Nothing here allocates, waits or reads a value on the host: a launch can be captured in a CUDA graph. What is out of
range is skipped (zeros, in what `gather` returns), as in `kvblocks.storage.on_torch`, which these kernels equal bit for
bit.
Imports torch, Triton and the layout of blocks.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvblocks.kernels.launch import on_device_of, power_of_2
from kvblocks.movement import BlockLayout

__all__ = ["Blocks", "Forms", "copy_blocks", "forms", "gather", "write", "zero_blocks"]

# By the alignment of the rows that are moved, in bytes.
Forms: TypeAlias = "dict[int, _Form]"

_TILE_BYTES = 4096  # moved by one program: 32 bytes in flight for each of its 128 threads
_TURNED_TILE_BYTES = 8192
_CHUNK_BYTES = 8192
_SECTOR_BYTES = 32  # the least that an access to the device's memory moves
_UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@dataclass(frozen=True, slots=True, eq=False)  # one object for each, as a launch looks its constants up
class _Form:
    """How K or V is moved: sizes and strides in units of 1 to 8 bytes, and the tile of one program.

    A constant of the kernels, which read its fields through `value`: it comes wrapped, or bare where interpreted.
    """

    unit: tl.dtype
    block_size: int
    units: int  # of a token
    head: int  # units of a head
    run: int  # units of a run
    block: int
    token_stride: int
    head_stride: int
    run_stride: int
    together: int  # units of rows that lie aligned together; strides of rows come in multiples of them
    turned: bool  # neighbours in the cache are tokens and not dims: a tile is transposed on its way
    tokens: int  # of a tile
    columns: int  # units of a token in a tile
    vector: int  # tokens of a turned tile that may lie aligned together

    @property
    def value(self) -> Self:
        return self

    @property
    def programs(self) -> int:
        """Tiles that the units of a token take."""
        return -(-self.units // self.columns)

    @classmethod
    @functools.lru_cache(4096)
    def of(cls, counts: tuple[int, int, int], nbytes: tuple[int, int, int, int, int], align: int) -> Self:
        """For rows whose address and strides are multiples of `align` bytes; counts and bytes as `forms` gives them."""
        block_size, heads, runs = counts
        run_bytes, block_stride, token_stride, head_stride, run_stride = nbytes
        # The address of every run is a multiple of this if the cache's is a multiple of 16.
        aligned = _alignment(
            run_bytes,
            block_stride,
            token_stride if block_size > 1 else 0,
            head_stride if heads > 1 else 0,
            run_stride if runs > 1 else 0,
        )
        width = min(align, aligned, 8)
        run = run_bytes // width
        units = heads * runs * run
        turned = token_stride == run_bytes < _SECTOR_BYTES and run & (run - 1) == 0
        if turned:
            tokens = min(32, max(8, power_of_2(block_size)))
            columns = max(run, min(power_of_2(units), _TURNED_TILE_BYTES // width // tokens))
            vector = min(_power_in(block_size), tokens, 16 // width) if run == 1 else 1
        else:
            columns = min(power_of_2(units), _TILE_BYTES // width)
            tokens, vector = _TILE_BYTES // width // columns, 1
        return cls(
            unit=_UNITS[width],
            block_size=block_size,
            units=units,
            head=runs * run,
            run=run,
            block=block_stride // width,
            token_stride=token_stride // width,
            head_stride=head_stride // width,
            run_stride=run_stride // width,
            together=align // width,
            turned=turned,
            tokens=tokens,
            columns=columns,
            vector=vector,
        )


def _alignment(*numbers: int) -> int:
    """The largest power of two, up to 16, that divides every number (addresses, sizes and strides in bytes)."""
    return _power_in(functools.reduce(operator.or_, numbers, 16))


def forms(layout: BlockLayout) -> Forms:
    """What `write` and `gather` take of a layout without gaps; the same objects for pools of any number of blocks."""
    counts = (layout.block_size, layout.heads, layout.runs)
    nbytes = (layout.run_bytes, layout.block_stride, layout.token_stride, layout.head_stride, layout.run_stride)
    return {align: _Form.of(counts, nbytes, align) for align in (1, 2, 4, 8, 16)}


def _power_in(number: int) -> int:
    """The largest power of two that divides a positive number."""
    return number & -number


@triton.jit
def _in_cache(column, form: tl.constexpr):
    """Offset of a token's unit `column` from its first one in the cache."""
    in_head = column % form.value.head
    offset = (column // form.value.head).to(tl.int64) * form.value.head_stride
    if form.value.head == form.value.run:
        return offset + in_head  # said in this form, it shows the compiler that units follow each other
    return offset + (in_head // form.value.run).to(tl.int64) * form.value.run_stride + in_head % form.value.run


@triton.jit
def _store(cache, data, block, offset, there, first, form: tl.constexpr):
    """Put a tile `data` [tokens, columns] into the cache, from a token's unit `first` on; the others are [tokens]."""
    token = cache + block * form.value.block + offset * form.value.token_stride
    if form.value.turned:
        runs: tl.constexpr = form.value.columns // form.value.run
        run = first + tl.arange(0, runs) * form.value.run
        there = there[None, :] & (run < form.value.units)[:, None]
        at = token[None, :] + _in_cache(run, form)[:, None]
        if form.value.run == 1:
            tl.store(at, tl.trans(data), mask=there)
        else:
            data = tl.permute(tl.reshape(data, (form.value.tokens, runs, form.value.run)), (1, 0, 2))
            tl.store(at[:, :, None] + tl.arange(0, form.value.run)[None, None, :], data, mask=there[:, :, None])
    else:
        column = first + tl.arange(0, form.value.columns)
        there = there[:, None] & (column < form.value.units)[None, :]
        tl.store(token[:, None] + _in_cache(column, form)[None, :], data, mask=there)


@triton.jit
def _load(cache, block, offset, there, first, form: tl.constexpr):
    """The tile [tokens, columns] that `_store` puts there; zeros where not `there`."""
    token = cache + block * form.value.block + offset * form.value.token_stride
    if form.value.turned:
        runs: tl.constexpr = form.value.columns // form.value.run
        run = first + tl.arange(0, runs) * form.value.run
        there = there[None, :] & (run < form.value.units)[:, None]
        at = token[None, :] + _in_cache(run, form)[:, None]
        if form.value.run == 1:
            data = tl.trans(tl.load(at, mask=there, other=0))
        else:
            at = at[:, :, None] + tl.arange(0, form.value.run)[None, None, :]
            data = tl.permute(tl.load(at, mask=there[:, :, None], other=0), (1, 0, 2))
            data = tl.reshape(data, (form.value.tokens, form.value.columns))
    else:
        column = first + tl.arange(0, form.value.columns)
        there = there[:, None] & (column < form.value.units)[None, :]
        data = tl.load(token[:, None] + _in_cache(column, form)[None, :], mask=there, other=0)
    return data


@triton.jit
def _write_tile(cache, rows, row_stride, head_stride, slots, count, capacity, form: tl.constexpr):
    cache = cache.to(tl.pointer_type(form.value.unit), bitcast=True)
    rows = rows.to(tl.pointer_type(form.value.unit), bitcast=True)
    nth = tl.arange(0, form.value.tokens)
    start = tl.program_id(0).to(tl.int64) * form.value.tokens
    token = start + nth
    slot = tl.load(slots + token, mask=token < count, other=-1).to(tl.int64)
    there = (slot >= 0) & (slot < capacity)
    first = tl.program_id(1) * form.value.columns
    column = first + tl.arange(0, form.value.columns)
    head = (column // form.value.head).to(tl.int64)
    source = token[:, None] * (row_stride.to(tl.int64) * form.value.together)
    source += (head * (head_stride.to(tl.int64) * form.value.together) + column % form.value.head)[None, :]
    data = tl.load(rows + source, mask=there[:, None] & (column < form.value.units)[None, :], other=0)
    if form.value.vector > 1:
        # Consecutive slots that start at an aligned one are stored as one vector, each vector with one mask.
        lead = nth // form.value.vector * form.value.vector
        leader = tl.load(slots + start + lead, mask=start + lead < count, other=-1).to(tl.int64)
        follows = there & (leader % form.value.vector == 0) & (slot == leader + nth % form.value.vector)
        if tl.min(follows.to(tl.int32), 0) == 1:
            leader = leader // form.value.vector * form.value.vector  # itself, in a form that says it is aligned
            offset = leader % form.value.block_size + nth % form.value.vector
            _store(cache, data, leader // form.value.block_size, offset, leader >= 0, first, form)
        else:
            _store(cache, data, slot // form.value.block_size, slot % form.value.block_size, there, first, form)
    else:
        _store(cache, data, slot // form.value.block_size, slot % form.value.block_size, there, first, form)


@triton.jit(do_not_specialize=["k_row", "k_head", "v_row", "v_head", "count", "capacity"])
def _write(
    k_cache,
    v_cache,
    keys,
    values,
    slots,
    k_row,
    k_head,
    v_row,
    v_head,
    count,
    capacity,
    k_form: tl.constexpr,
    v_form: tl.constexpr,
):
    if tl.program_id(2) == 0:
        _write_tile(k_cache, keys, k_row, k_head, slots, count, capacity, k_form)
    else:
        _write_tile(v_cache, values, v_row, v_head, slots, count, capacity, v_form)


@triton.jit
def _gather_tile(cache, out, table, count, num_blocks, form: tl.constexpr):
    cache = cache.to(tl.pointer_type(form.value.unit), bitcast=True)
    out = out.to(tl.pointer_type(form.value.unit), bitcast=True)
    token = tl.program_id(0).to(tl.int64) * form.value.tokens + tl.arange(0, form.value.tokens)
    entry = token // form.value.block_size
    # Masked by whole blocks, so that neighbouring tokens can be loaded together.
    block = tl.load(table + entry, mask=entry * form.value.block_size < count, other=-1).to(tl.int64)
    first = tl.program_id(1) * form.value.columns
    there = (block >= 0) & (block < num_blocks)
    data = _load(cache, block, token % form.value.block_size, there, first, form)
    column = first + tl.arange(0, form.value.columns)
    mask = (token < count)[:, None] & (column < form.value.units)[None, :]
    tl.store(out + (token * form.value.units)[:, None] + column[None, :], data, mask=mask)


@triton.jit(do_not_specialize=["count", "num_blocks"])
def _gather(k_cache, v_cache, keys, values, table, count, num_blocks, k_form: tl.constexpr, v_form: tl.constexpr):
    if tl.program_id(2) == 0:
        _gather_tile(k_cache, keys, table, count, num_blocks, k_form)
    else:
        _gather_tile(v_cache, values, table, count, num_blocks, v_form)


@triton.jit(do_not_specialize=["num_blocks"])
def _blocks(
    table,
    ids,
    num_blocks,
    unit: tl.constexpr,
    width: tl.constexpr,
    together: tl.constexpr,
    chunk: tl.constexpr,
    copies: tl.constexpr,
):
    """Copy block ids[2 i] to ids[2 i + 1], or zero block ids[i], in the cache of row program_id(2) of the table."""
    item = tl.program_id(0).to(tl.int64)
    cache = tl.load(table + 2 * tl.program_id(2)).to(tl.pointer_type(unit))
    cache = tl.multiple_of(cache, together)
    # In this form it shows the compiler that blocks are as well aligned as the cache is.
    units = tl.load(table + 2 * tl.program_id(2) + 1) * (together // width)
    at = tl.program_id(1).to(tl.int64) * chunk + tl.arange(0, chunk)
    if copies:
        source = tl.load(ids + 2 * item).to(tl.int64)
        target = tl.load(ids + 2 * item + 1).to(tl.int64)
        there = (source >= 0) & (source < num_blocks) & (target >= 0) & (target < num_blocks)
        mask = there & (at < units)
        tl.store(cache + target * units + at, tl.load(cache + source * units + at, mask=mask, other=0), mask=mask)
    else:
        target = tl.load(ids + item).to(tl.int64)
        mask = (target >= 0) & (target < num_blocks) & (at < units)
        tl.store(cache + target * units + at, tl.zeros((chunk,), unit), mask=mask)


def write(
    caches: Sequence[Tensor],
    forms: Sequence[Forms],
    rows: Sequence[Tensor],
    slots: Tensor,
    capacity: int,
) -> None:
    """Row i of each tensor's rows goes to slot `slots[i]`; a slot outside 0..capacity - 1 is skipped.

    Args:
        caches: the tensors of one layer, K and V or others, each of an integer dtype. One launch moves two.
        forms: how tokens lie in them.
        rows: [n, heads, dim] of the same bytes, the dims of a head without gaps, n >= 1.
        slots: int64 or int32 [n]. The same slot twice: some mix of the two rows.
        capacity: slots of the cache.
    """
    chosen, strides = [], []
    for row, by_alignment in zip(rows, forms, strict=True):
        count, heads, _ = row.shape
        apart, step, _ = row.stride()
        apart = apart * row.itemsize if count > 1 else 0
        step = step * row.itemsize if heads > 1 else 0
        align = _power_in(16 | row.data_ptr() | apart | step)
        chosen.append(by_alignment[align])
        strides.append((apart // align, step // align))
    with on_device_of(slots):
        for first, last in _couples(len(caches)):
            k, v = chosen[first], chosen[last]
            two = (*strides[first], *strides[last])
            cache, given = (caches[first], caches[last]), (rows[first], rows[last])
            _write[_grid(len(slots), k, v, last - first + 1)](*cache, *given, slots, *two, len(slots), capacity, k, v)


def gather(
    caches: Sequence[Tensor],
    forms: Sequence[Forms],
    out: Sequence[Tensor],
    table: Tensor,
    num_blocks: int,
) -> None:
    """The tokens of the blocks in `table`, in order, fill each tensor's `out`; zeros where a block does not exist.

    Args:
        caches, forms: as for `write`.
        out: [n, heads, dim] of the caches' integer dtypes, without gaps, n >= 1.
        table: int64 or int32 [m], `m * block_size >= n`.
        num_blocks: of the cache.
    """
    chosen = [by[_power_in(16 | rows.data_ptr())] for rows, by in zip(out, forms, strict=True)]
    count = len(out[0])
    with on_device_of(table):
        for first, last in _couples(len(caches)):
            k, v = chosen[first], chosen[last]
            cache, rows = (caches[first], caches[last]), (out[first], out[last])
            _gather[_grid(count, k, v, last - first + 1)](*cache, *rows, table, count, num_blocks, k, v)


def _couples(count: int) -> list[tuple[int, int]]:
    """Tensors two by two, for a launch each; one that is left over is both, and `_grid` has programs for the first."""
    return [(first, min(first + 1, count - 1)) for first in range(0, count, 2)]


def _grid(count: int, k: _Form, v: _Form, tensors: int) -> tuple[int, int, int]:
    return max(-(-count // k.tokens), -(-count // v.tokens)), max(k.programs, v.programs), tensors


@dataclass(frozen=True)
class Blocks:
    """Caches whose blocks move together.

    Attributes:
        table: int64 [caches, 2] on the device: the address of each, a multiple of 16, and the bytes of its blocks in
            units of `align`.
        most: bytes of the largest block.
        align: the largest power of two, up to 16, that divides the bytes of every block.
    """

    table: Tensor
    most: int
    align: int

    @classmethod
    def of(cls, addresses: Sequence[int], block_bytes: Sequence[int], device: torch.device) -> Self:
        align = _alignment(*block_bytes)
        rows = [(address, nbytes // align) for address, nbytes in zip(addresses, block_bytes, strict=True)]
        return cls(torch.tensor(rows, dtype=torch.int64, device=device), max(block_bytes), align)


def copy_blocks(blocks: Blocks, pairs: Tensor, num_blocks: int) -> None:
    """Block `pairs[i, 1]` becomes block `pairs[i, 0]` in all caches, for pairs of existing blocks.

    Args:
        blocks: the caches, without gaps between blocks.
        pairs: int64 or int32 [n, 2], n >= 1. A target appears once, and nowhere as a source.
        num_blocks: of each cache.
    """
    _launch_blocks(blocks, pairs, num_blocks, True)


def zero_blocks(blocks: Blocks, ids: Tensor, num_blocks: int) -> None:
    """All bytes of the blocks `ids` [n], n >= 1, that exist become zero; the rest as for `copy_blocks`."""
    _launch_blocks(blocks, ids, num_blocks, False)


def _launch_blocks(blocks: Blocks, ids: Tensor, num_blocks: int, copies: bool) -> None:
    width = min(blocks.align, 8)
    chunk = min(power_of_2(blocks.most), _CHUNK_BYTES) // width
    grid = (len(ids), -(-blocks.most // (chunk * width)), len(blocks.table))
    with on_device_of(ids):
        _blocks[grid](blocks.table, ids, num_blocks, _UNITS[width], width, blocks.align, chunk, copies)
