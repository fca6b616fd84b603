"""Moving K and V between cache blocks and rows of tokens with torch operations: for caches that are not in CPU memory.

Nothing here waits for the device, so nothing can be checked: an index out of range is redirected to where it does no
harm. Imports only torch.
"""

import torch
from torch import Tensor

__all__ = ["bits", "copy_blocks", "gather", "write", "zero_blocks"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: bits that survive every operation, and operations that exist for every dtype."""
    return tensor.view(_BITS[tensor.itemsize])


def _stand_in(index: Tensor, valid: Tensor, none: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `index` with the invalid ones replaced by the first valid one, or by `none` where none is valid.

    Returns the new index, the position [1] of the row that stands in, and whether any is valid (bool, no dimensions).
    """
    first, found = valid.to(torch.int32).argmax().view(1), valid.any()
    row = torch.where(found, index.index_select(0, first), none)
    return torch.where(valid.view(-1, *[1] * (index.ndim - 1)), index, row), first, found


@torch.no_grad()
def write(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """`cache[slot // block_size, slot % block_size] = row` for every row whose slot exists.

    Args:
        cache: [blocks, block_size, ...], any strides.
        rows: [n, ...] of the same dtype and device.
        slots: int64 [n] on that device. The same slot twice: some mix of the two rows.
    """
    if not len(slots):
        return
    cache, rows = bits(cache), bits(rows)
    num_blocks, block_size = cache.shape[:2]
    valid = (slots >= 0) & (slots < num_blocks * block_size)
    slots, first, found = _stand_in(slots, valid, slots.new_zeros(1))
    row = torch.where(found, rows.index_select(0, first), cache[:1, 0])
    rows = torch.where(valid.view(-1, *[1] * (rows.ndim - 1)), rows, row)
    cache.index_put_((slots // block_size, slots % block_size), rows)


@torch.no_grad()
def gather(cache: Tensor, table: Tensor, num_tokens: int) -> Tensor:
    """The first `num_tokens` tokens of the blocks in `table`, [num_tokens, ...]; zeros where a block does not exist.

    Args:
        cache: [blocks, block_size, ...], any strides.
        table: int64 [m] on its device, `m * block_size >= num_tokens`.
    """
    valid = (table >= 0) & (table < len(cache))
    blocks = bits(cache).index_select(0, torch.where(valid, table, 0))
    blocks.masked_fill_(~valid.view(-1, *[1] * (cache.ndim - 1)), 0)
    return blocks.flatten(0, 1)[:num_tokens].contiguous().view(cache.dtype)


@torch.no_grad()
def copy_blocks(cache: Tensor, pairs: Tensor) -> None:
    """Block `pairs[i, 1]` becomes what block `pairs[i, 0]` was before the call, for pairs of existing blocks.

    Args:
        cache: [blocks, ...].
        pairs: int64 [n, 2] on its device.
    """
    if not len(pairs):
        return
    cache = bits(cache)
    valid = ((pairs >= 0) & (pairs < len(cache))).all(1)
    pairs, _, _ = _stand_in(pairs, valid, pairs.new_zeros(1, 2))
    cache.index_copy_(0, pairs[:, 1], cache.index_select(0, pairs[:, 0]))


@torch.no_grad()
def zero_blocks(cache: Tensor, ids: Tensor) -> None:
    """All bytes of the blocks `ids` that exist become zero.

    Args:
        cache: [blocks, ...].
        ids: int64 [n] on its device.
    """
    if not len(ids):
        return
    cache = bits(cache)
    ids, _, found = _stand_in(ids, (ids >= 0) & (ids < len(cache)), ids.new_zeros(1))
    cache.index_copy_(0, ids, torch.where(found, 0, cache.index_select(0, ids)))
