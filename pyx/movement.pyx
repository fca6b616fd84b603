# cython: auto_pickle=False, autotestdict=False
"""Moving K and V between cache blocks and rows of tokens in CPU memory: bytes between addresses, without the GIL.

Nothing here knows torch, dtypes or layout names: a layout is a handful of strides. Callers check what they pass and
keep the memory alive; an index outside the cache is skipped, so that it can never reach memory that is not the cache's.
"""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint64_t

__all__ = ["BlockLayout", "first_outside", "move_blocks"]

cdef extern from "movement/copy.h" nogil:
    void kvb_copy(char* to, const char* source, size_t n, bint stream) noexcept nogil
    void kvb_zero(char* to, size_t n) noexcept nogil
    void kvb_expect(const char* source, size_t n) noexcept nogil
    void kvb_fence() noexcept nogil
    void kvb_transpose(char* to, ptrdiff_t to_stride, const char* source, ptrdiff_t source_stride, ptrdiff_t rows,
                       ptrdiff_t cols, size_t size, bint stream) noexcept nogil

# A cache's blocks are seldom in the CPU's caches when they are written, so writing always streams. What `gather`
# returns is about to be read: it streams only from this many bytes on, where the caches would not hold it anyway.
cdef enum:
    GATHER_STREAM_BYTES = 8 << 20


cdef inline void move(char* to, int64_t to_token, int64_t to_run, const char* source, int64_t from_token,
                      int64_t from_run, int64_t tokens, int64_t runs, int64_t size, bint stream) noexcept nogil:
    """Copy `tokens` x `runs` pieces of `size` bytes, each side with its own two strides."""
    cdef int64_t outer, inner, outer_to, outer_from, inner_to, inner_from, i, j
    if to_run == size and from_run == size:
        size *= runs
        runs = 1
    if runs == 1 and (tokens == 1 or (to_token == size and from_token == size)):
        kvb_copy(to, source, size * tokens, stream)
        return
    if size <= 16 and size & (size - 1) == 0:
        if to_token == size and from_run == size:
            kvb_transpose(to, to_run, source, from_token, tokens, runs, size, stream)
            return
        if from_token == size and to_run == size:
            kvb_transpose(to, to_token, source, from_run, runs, tokens, size, stream)
            return
    # In the order of the source's addresses, for the sake of prefetching.
    if from_token <= from_run:
        outer, outer_to, outer_from, inner, inner_to, inner_from = runs, to_run, from_run, tokens, to_token, from_token
    else:
        outer, outer_to, outer_from, inner, inner_to, inner_from = tokens, to_token, from_token, runs, to_run, from_run
    for i in range(outer):
        for j in range(inner):
            kvb_copy(to + i * outer_to + j * inner_to, source + i * outer_from + j * inner_from, size, stream)


def first_outside(size_t address, int64_t count, int64_t low, int64_t high):
    """Position of the first of `count` int64 at `address` that is not in low..high (both included); -1 if all are."""
    cdef const int64_t* values = <const int64_t*> address
    cdef int64_t i
    cdef int64_t found = -1
    with nogil:
        for i in range(count):
            if values[i] < low or values[i] > high:
                found = i
                break
    return found


def move_blocks(size_t pieces, int64_t num_pieces, int64_t num_blocks, size_t slots, int64_t slot_stride,
                int64_t num_slots, size_t sizes, int64_t num_groups, size_t moves, int64_t count):
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
    cdef const int64_t* piece = <const int64_t*> pieces
    cdef const int64_t* of_group = <const int64_t*> sizes
    cdef const int32_t* move = <const int32_t*> moves
    cdef int64_t _i, j, block, slot, left, length
    cdef bint out
    cdef char* at
    cdef char* own
    with nogil:
        for _i in range(count):
            out = move[0] == 0
            block = move[2] if out else move[3]
            slot = move[3] if out else move[2]
            if 0 <= move[0] <= 1 and 0 <= move[1] < num_groups and 0 <= block < num_blocks and 0 <= slot < num_slots:
                at = <char*> slots + slot * slot_stride
                left = of_group[move[1]]
                j = 0
                while j < num_pieces and left > 0:
                    length = min(piece[3 * j + 2], left)
                    own = <char*> <size_t> piece[3 * j] + block * piece[3 * j + 1]
                    if out:
                        if j + 1 < num_pieces and left > length:
                            kvb_expect(<char*> <size_t> piece[3 * j + 3] + block * piece[3 * j + 4], left - length)
                        kvb_copy(at, own, length, True)
                    else:
                        kvb_copy(own, at, length, True)
                    at += length
                    left -= length
                    j += 1
            move += 4
        kvb_fence()


@cython.final
cdef class BlockLayout:
    """Where the bytes of a token lie in a cache of blocks: the strides of one K or V tensor, without its address.

    A token has `heads` heads of `runs` runs of `run_bytes` contiguous bytes. In the cache, a block takes `block_bytes`
    without gaps (the product of all sizes); blocks are `block_stride` apart, tokens of a block `token_stride`, heads
    `head_stride`, the runs of a head `run_stride`; in rows of tokens the runs of a head touch.

    All sizes and strides are bytes or counts; `cache`, `source`, `target`, `slots`, `table`, `pairs` and `ids` are
    addresses, the last four of contiguous int64.

    Thread-safety: the methods release the GIL; calls that write the same bytes must not overlap.
    """

    def __init__(self, int64_t num_blocks, int64_t block_size, int64_t heads, int64_t runs, int64_t run_bytes,
                 int64_t token_stride, int64_t head_stride, int64_t run_stride, int64_t block_stride):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.heads, self.runs, self.run_bytes = heads, runs, run_bytes
        self.token_stride, self.head_stride, self.run_stride = token_stride, head_stride, run_stride
        self.block_bytes = block_size * heads * runs * run_bytes
        self.block_stride = block_stride

    def __reduce__(self):
        return BlockLayout, (self.num_blocks, self.block_size, self.heads, self.runs, self.run_bytes,
                             self.token_stride, self.head_stride, self.run_stride, self.block_stride)

    def write(self, size_t cache, size_t source, int64_t token_stride, int64_t head_stride, size_t slots,
              int64_t count):
        """Row i of `source` goes to slot `slots[i]`, in order; a slot outside the cache is skipped."""
        with nogil:
            self._write(<char*> cache, <const char*> source, token_stride, head_stride, <const int64_t*> slots, count)

    def gather(self, size_t cache, size_t target, size_t table, int64_t num_tokens):
        """The first `num_tokens` tokens of the blocks in `table` go to the rows of `target`, which lie without gaps."""
        with nogil:
            self._gather(<const char*> cache, <char*> target, <const int64_t*> table, num_tokens)

    def copy_blocks(self, size_t cache, size_t pairs, int64_t count):
        """For each (source, target) of `pairs`, in order: the whole block."""
        with nogil:
            self._copy(<char*> cache, <const int64_t*> pairs, count)

    def zero_blocks(self, size_t cache, size_t ids, int64_t count):
        """All bytes of the blocks `ids` become zero."""
        with nogil:
            self._zero(<char*> cache, <const int64_t*> ids, count)

    cdef void _write(self, char* cache, const char* source, int64_t token_stride, int64_t head_stride,
                     const int64_t* slots, int64_t n) noexcept nogil:
        cdef int64_t head_bytes = self.runs * self.run_bytes
        # Heads that follow each other on both sides as runs do are more runs.
        cdef bint fold = head_stride == head_bytes and self.head_stride == self.runs * self.run_stride
        cdef int64_t heads = 1 if fold or self.runs == 1 else self.heads
        cdef int64_t runs = self.heads if self.runs == 1 else self.heads * self.runs if fold else self.runs
        cdef int64_t to_run = self.head_stride if self.runs == 1 else self.run_stride
        cdef int64_t from_run = head_stride if self.runs == 1 else self.run_bytes
        cdef int64_t i = 0
        cdef int64_t count, limit, offset, slot, h
        cdef char* to
        while i < n:
            slot = slots[i]
            if <uint64_t> slot >= <uint64_t> (self.num_blocks * self.block_size):
                i += 1
                continue
            offset = slot % self.block_size
            limit = min(n - i, self.block_size - offset)
            count = 1
            while count < limit and slots[i + count] == slot + count:
                count += 1
            to = cache + slot // self.block_size * self.block_stride + offset * self.token_stride
            for h in range(heads):
                move(to + h * self.head_stride, self.token_stride, to_run,
                     source + i * token_stride + h * head_stride, token_stride, from_run,
                     count, runs, self.run_bytes, True)
            i += count
        kvb_fence()

    cdef void _gather(self, const char* cache, char* target, const int64_t* table, int64_t num_tokens) noexcept nogil:
        cdef int64_t head_bytes = self.runs * self.run_bytes
        cdef int64_t token_bytes = self.heads * head_bytes
        cdef bint stream = num_tokens * token_bytes >= GATHER_STREAM_BYTES
        cdef bint fold = self.runs == 1 or self.head_stride == self.runs * self.run_stride
        cdef int64_t heads = 1 if fold else self.heads
        cdef int64_t runs = self.heads * self.runs if fold else self.runs
        cdef int64_t from_run = self.head_stride if self.runs == 1 else self.run_stride
        cdef int64_t start = 0
        cdef int64_t block, h
        while start < num_tokens:
            block = table[start // self.block_size]
            if 0 <= block < self.num_blocks:
                for h in range(heads):
                    move(target + start * token_bytes + h * head_bytes, token_bytes, self.run_bytes,
                         cache + block * self.block_stride + h * self.head_stride, self.token_stride, from_run,
                         min(self.block_size, num_tokens - start), runs, self.run_bytes, stream)
            start += self.block_size
        if stream:
            kvb_fence()

    cdef void _copy(self, char* cache, const int64_t* pairs, int64_t n) noexcept nogil:
        cdef int64_t i, source, target
        for i in range(n):
            source, target = pairs[2 * i], pairs[2 * i + 1]
            if 0 <= source < self.num_blocks and 0 <= target < self.num_blocks and source != target:
                kvb_copy(cache + target * self.block_stride, cache + source * self.block_stride, self.block_bytes, True)
        kvb_fence()

    cdef void _zero(self, char* cache, const int64_t* ids, int64_t n) noexcept nogil:
        cdef int64_t i
        for i in range(n):
            if 0 <= ids[i] < self.num_blocks:
                kvb_zero(cache + ids[i] * self.block_stride, self.block_bytes)
        kvb_fence()
