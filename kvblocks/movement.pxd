from libc.stdint cimport int64_t


cdef class BlockLayout:
    cdef readonly int64_t num_blocks, block_size, block_bytes, heads, runs, run_bytes
    cdef readonly int64_t token_stride, head_stride, run_stride, block_stride

    cdef void _write(self, char* cache, const char* source, int64_t token_stride, int64_t head_stride,
                     const int64_t* slots, int64_t n) noexcept nogil
    cdef void _gather(self, const char* cache, char* target, const int64_t* table, int64_t num_tokens) noexcept nogil
    cdef void _copy(self, char* cache, const int64_t* pairs, int64_t n) noexcept nogil
    cdef void _zero(self, char* cache, const int64_t* ids, int64_t n) noexcept nogil
