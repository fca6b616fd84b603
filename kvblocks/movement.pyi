from typing import Any, final

__all__ = ["BlockLayout", "first_outside", "move_blocks"]

def first_outside(address: int, count: int, low: int, high: int) -> int:
    """Position of the first of `count` int64 at `address` that is not in low..high (both included); -1 if all are."""

def move_blocks(
    pieces: int,
    num_pieces: int,
    num_blocks: int,
    slots: int,
    slot_stride: int,
    num_slots: int,
    sizes: int,
    num_groups: int,
    moves: int,
    count: int,
) -> None:
    """Copy blocks into slots and back, one after the other: moves of (kind, group, source, target).

    Kind 0 copies block `source` into slot `target`, kind 1 slot `source` into block `target`. A slot holds the bytes of
    a block that belong to the group in the order of the pieces, without gaps; these are the first of the block. Moves
    of another kind, or that name a group, a block or a slot which is not there, are skipped.

    Args:
        pieces, num_pieces: address of contiguous int64 [num_pieces, 3]: where the piece of block 0 lies, the bytes from
            there to that of the next block, and its length.
        num_blocks: blocks there are.
        slots, slot_stride, num_slots: where the bytes of slot 0 begin, the bytes to the next slot, slots there are.
        sizes, num_groups: address of int64 [num_groups]: bytes of a block that belong to each group.
        moves, count: address of contiguous int32 [count, 4].

    Thread-safety: releases the GIL; calls that write the same bytes must not overlap.
    """

@final
class BlockLayout:
    """Where the bytes of a token lie in a cache of blocks: the strides of one K or V tensor, without its address.

    A token has `heads` heads of `runs` runs of `run_bytes` contiguous bytes. In the cache, a block takes `block_bytes`
    without gaps (the product of all sizes); blocks are `block_stride` apart, tokens of a block `token_stride`, heads
    `head_stride`, the runs of a head `run_stride`; in rows of tokens the runs of a head touch.

    All sizes and strides are bytes or counts; `cache`, `source`, `target`, `slots`, `table`, `pairs` and `ids` are
    addresses, the last four of contiguous int64.

    Thread-safety: the methods release the GIL; calls that write the same bytes must not overlap.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    heads: int
    runs: int
    run_bytes: int
    token_stride: int
    head_stride: int
    run_stride: int
    block_stride: int
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        heads: int,
        runs: int,
        run_bytes: int,
        token_stride: int,
        head_stride: int,
        run_stride: int,
        block_stride: int,
    ) -> None: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    def write(self, cache: int, source: int, token_stride: int, head_stride: int, slots: int, count: int) -> None:
        """Row i of `source` goes to slot `slots[i]`, in order; a slot outside the cache is skipped."""
    def gather(self, cache: int, target: int, table: int, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the blocks in `table` go to the rows of `target`, which lie without gaps."""
    def copy_blocks(self, cache: int, pairs: int, count: int) -> None:
        """For each (source, target) of `pairs`, in order: the whole block."""
    def zero_blocks(self, cache: int, ids: int, count: int) -> None:
        """All bytes of the blocks `ids` become zero."""
