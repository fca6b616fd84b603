"""The Triton kernel that moves blocks between a device and slots of host memory, which it reads and writes in place.

Moves are done in their order, as one may read what the one before it has written. So they are not divided among the
programs of a launch: each program has some bytes of the block, the same of every move, and does all moves one after the
other. In every layer group these bytes of a block lie at the same place, so that no two programs meet.
Imports torch and Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvblocks.kernels.launch import on_device_of

__all__ = ["Chunks", "move_blocks"]

_CHUNK_BYTES = 4096  # of a block, for each program
_UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@dataclass(frozen=True)
class Chunks:
    """A block cut into the bytes of each program.

    Attributes:
        table: int64 [chunks, 4] on the device: where the chunk of block 0 lies, the bytes to that of the next block,
            the bytes of a block before it, and its length.
        sizes: int64 [groups] on the device: bytes of a block that belong to each group, the first of it.
        width: a power of two, up to 8, that divides all of these.
    """

    table: Tensor
    sizes: Tensor
    width: int

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int, int]], sizes: Sequence[int], device: torch.device) -> Self:
        """For pieces of (address in block 0, bytes to the next block, length) that make up a block in their order."""
        rows, before = [], 0
        for address, stride, length in pieces:
            for start in range(0, length, _CHUNK_BYTES):
                rows.append((address + start, stride, before + start, min(_CHUNK_BYTES, length - start)))
            before += length
        together = 8
        for number in (*(number for row in rows for number in row), *sizes):
            together |= number
        table = torch.tensor(rows, dtype=torch.int64, device=device)
        return cls(table, torch.tensor(sizes, dtype=torch.int64, device=device), together & -together)


@triton.jit(do_not_specialize=["slot_stride", "count"])
def _move(chunks, sizes, slots, slot_stride, moves, count, unit: tl.constexpr, width: tl.constexpr, most: tl.constexpr):
    chunk = chunks + tl.program_id(0) * 4
    address = tl.load(chunk)
    stride = tl.load(chunk + 1)
    before = tl.load(chunk + 2)
    length = tl.load(chunk + 3)
    lane = tl.arange(0, most)
    for _ in range(count):
        out = tl.load(moves) == 0
        group = tl.load(moves + 1)
        source = tl.load(moves + 2).to(tl.int64)
        target = tl.load(moves + 3).to(tl.int64)
        on_device = address + tl.where(out, source, target) * stride
        on_host = slots + tl.where(out, target, source) * slot_stride + before
        there = lane < tl.minimum(length, tl.load(sizes + group) - before) // width
        read = tl.where(out, on_device, on_host).to(tl.pointer_type(unit))
        write = tl.where(out, on_host, on_device).to(tl.pointer_type(unit))
        tl.store(write + lane, tl.load(read + lane, mask=there, other=0), mask=there)
        moves += 4
        tl.debug_barrier()  # the next move may read what other threads of this program have written


def move_blocks(chunks: Chunks, slots: int, slot_stride: int, moves: Tensor) -> None:
    """Do the moves in their order, as `kvblocks.movement.move_blocks` does, but without checking what they name.

    Args:
        chunks: of the blocks.
        slots: address of the bytes of slot 0, in host memory that the device can reach, a multiple of 8.
        slot_stride: bytes to the next slot, a multiple of 8.
        moves: int32 [n, 4] on the device: kind, group, source, target.
    """
    most = _CHUNK_BYTES // chunks.width
    grid = (len(chunks.table),)
    with on_device_of(moves):
        _move[grid](
            chunks.table,
            chunks.sizes,
            slots,
            slot_stride,
            moves,
            len(moves),
            _UNITS[chunks.width],
            chunks.width,
            most,
        )
