# How far a layer group attends, and how many blocks of it a step holds at most. Plain arithmetic: the manager counts
# with it, and `kvblocks.config.blocks_held` gives it to all who plan.

from libc.stdint cimport int32_t, int64_t


cdef struct Reach:      # of a layer group: the window or the chunk of a query in tokens; both 0: everything before it
    int32_t window
    int32_t chunk


cdef inline int32_t first_reached(const Reach* reach, int32_t position) noexcept nogil:
    """The first position that tokens from `position` on reach."""
    if reach.window:
        return position - reach.window + 1 if position >= reach.window else 0
    return position - position % reach.chunk if reach.chunk else 0


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
