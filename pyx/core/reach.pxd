# How many blocks of one layer group a step holds at most, by how far the group attends. Plain arithmetic: the manager
# counts with it, and `kvblocks.config.blocks_held` gives it to all who plan.

from libc.stdint cimport int64_t


cdef inline int64_t common_divisor(int64_t a, int64_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a


cdef inline int64_t most_in_window(int64_t window, int64_t step, int64_t block_size) noexcept nogil:
    """The most blocks that a step of `step` tokens holds where each attends to `window` tokens, itself counted.

    These are `window - 1 + step` tokens, which may begin with the last one of a block.
    """
    return (block_size - 1 + window - 1 + step + block_size - 1) // block_size


cdef inline int64_t most_in_chunk(int64_t chunk, int64_t step, int64_t block_size) noexcept nogil:
    """The same where tokens attend within chunks. These begin at multiples of what chunks and blocks have in common."""
    return (block_size - common_divisor(chunk, block_size) + chunk - 1 + step + block_size - 1) // block_size
