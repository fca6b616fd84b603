# cython: auto_pickle=False, autotestdict=False
"""Attention over cache blocks in CPU memory: K and V are read where they lie, without the GIL.

Nothing here knows torch: tensors are addresses and strides in bytes. Callers check what they pass and keep the memory
alive; lengths and block tables, which they do not read, are checked here.
"""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from core.memory cimport grab
from kvblocks.movement cimport BlockLayout

__all__ = ["attend", "best_isa"]

cdef extern from "cpu_attention/kernel.h" nogil:
    enum:
        KVB_PADDING

    ctypedef struct kvb_side:
        const char* cache
        int64_t block_stride, token_stride, head_stride, run_stride
        int64_t dim, runs, run, padded
        int ahead

    ctypedef struct kvb_job:
        kvb_side keys, values
        const char* query
        const char* sinks
        char* out
        const int32_t* table
        const int32_t* lens
        const int32_t* starts
        int64_t table_stride, rows, num_blocks, block_size, columns
        int64_t heads, kv_heads, query_token, query_head, out_token, out_head
        int64_t window, chunk
        float scale, softcap
        int dtype, itemsize, threads, isa

    int kvb_best_isa() noexcept
    int64_t kvb_plan(kvb_job* job, int64_t num_tokens, int64_t* nbytes) noexcept
    void kvb_run(kvb_job* job, char* workspace) noexcept

_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


def best_isa():
    """The best instruction set that there is code for on this processor: 0 plain C, 1 AVX2, 2 AVX-512."""
    return kvb_best_isa()


cdef void lay(kvb_side* side, BlockLayout layout, size_t cache, int itemsize) noexcept:
    side.cache = <const char*> cache
    side.block_stride, side.token_stride = layout.block_stride, layout.token_stride
    side.head_stride, side.run_stride = layout.head_stride, layout.run_stride
    side.runs, side.run = layout.runs, layout.run_bytes // itemsize
    side.dim = side.runs * side.run
    side.padded = (side.dim + KVB_PADDING - 1) // KVB_PADDING * KVB_PADDING
    # Some 16 KiB ahead, as far as tokens that are known go.
    side.ahead = <int> min(max(16384 // (layout.heads * side.dim * itemsize) & ~7, 8), 32)


def attend(BlockLayout key_layout, size_t key_cache, BlockLayout value_layout, size_t value_cache, str dtype,
           size_t query, int64_t query_token, int64_t query_head, int64_t heads, size_t out, int64_t num_tokens,
           size_t table, int64_t table_stride, int64_t columns, size_t seq_lens, size_t query_start_loc,
           int64_t num_seqs, double scale, int64_t window, int64_t chunk, double softcap, size_t sinks, int threads,
           int isa=-1):
    """Causal attention of a ragged batch over the blocks of its rows.

    Args:
        key_layout, key_cache, value_layout, value_cache: how K and V lie, and their addresses.
        dtype: of K, V, queries and output: "float32", "bfloat16" or "float16".
        query, query_token, query_head, heads: address of [num_tokens, heads, dim], and its strides in bytes; dims
            touch.
        out: address of [num_tokens, heads, v dim], without gaps.
        num_tokens: rows of `query` that count.
        table, table_stride, columns: int32 [num_seqs, columns], rows `table_stride` elements apart.
        seq_lens, query_start_loc: int32 [num_seqs] and [num_seqs + 1].
        scale, window, chunk, softcap: as in `kvblocks.paged_attention`; 0 for no window, chunk or cap.
        sinks: address of float32 [heads], or 0.
        threads: that may work at once.
        isa: the instruction set, by default the best; a lower one is for tests.

    Returns:
        -1; or the number of the first row whose lengths do not fit together or whose table names a block that does not
        exist, and nothing was computed.

    Raises:
        MemoryError: there is no memory for what threads work in; nothing was computed.
    """
    cdef kvb_job job
    cdef int64_t bad, nbytes = 0
    cdef char* space = NULL
    cdef int32_t* lens
    job.dtype = _DTYPES[dtype]
    job.itemsize = 4 if job.dtype == 0 else 2
    lay(&job.keys, key_layout, key_cache, job.itemsize)
    lay(&job.values, value_layout, value_cache, job.itemsize)
    job.query, job.out, job.sinks = <const char*> query, <char*> out, <const char*> sinks
    job.table, job.lens = <const int32_t*> table, <const int32_t*> seq_lens
    job.starts = <const int32_t*> query_start_loc
    job.table_stride, job.columns, job.rows = table_stride, columns, num_seqs
    job.num_blocks, job.block_size = key_layout.num_blocks, key_layout.block_size
    job.heads, job.kv_heads = heads, key_layout.heads
    job.query_token, job.query_head = query_token, query_head
    job.out_head = job.values.dim * job.itemsize
    job.out_token = heads * job.out_head
    job.window, job.chunk = window, chunk
    job.scale, job.softcap = <float> scale, <float> softcap
    job.threads = max(threads, 1)
    job.isa = kvb_best_isa() if isa < 0 else min(isa, kvb_best_isa())
    # Lengths are copied: they decide what is read, and lie in memory that others can write.
    lens = <int32_t*> grab((2 * num_seqs + 1) * sizeof(int32_t))
    if lens == NULL:
        raise MemoryError(f"the lengths of {num_seqs} rows have no memory")
    with nogil:
        memcpy(lens, job.lens, num_seqs * sizeof(int32_t))
        memcpy(lens + num_seqs, job.starts, (num_seqs + 1) * sizeof(int32_t))
        job.lens, job.starts = lens, lens + num_seqs
        bad = kvb_plan(&job, num_tokens, &nbytes)
        if bad < 0:
            space = <char*> grab(nbytes)
            if space != NULL:
                kvb_run(&job, space)
        free(lens)
        free(space)
    if bad < 0 and space == NULL:
        raise MemoryError(f"attention has no {nbytes} bytes to work in")
    return bad
