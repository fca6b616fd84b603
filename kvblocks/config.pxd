# The sizes of a paged KV cache, for Cython code that cimports them. pyx/config.pyx holds the code.

from libc.stdint cimport int64_t


cpdef int64_t itemsize(object dtype) except -1
cpdef int64_t tensor_itemsize(object dtype) except -1


cdef class CacheConfig:
    cdef readonly int64_t num_layers
    cdef readonly int64_t num_kv_heads
    cdef readonly int64_t head_dim
    cdef readonly int64_t num_gpu_blocks
    cdef readonly int64_t block_size
    cdef readonly int64_t v_head_dim
    cdef readonly int64_t layers_per_group
    # None stands for one group of every layer, and for layers that are all alike with K and V: a tuple is made only
    # when somebody looks.
    cdef tuple _groups
    cdef tuple _layers

    cdef int _take_layers(self, tuple layers) except -1
    cdef dict _arguments(self)
    cdef int64_t _largest_group(self, int64_t size) except -1
    cpdef int64_t token_bytes(self, object dtype) except -1
    cpdef int64_t block_bytes(self, object dtype) except -1
    cpdef int64_t memory_bytes(self, object dtype) except -1
    cpdef int64_t state_bytes(self, object dtype) except -1
    cpdef int64_t num_blocks_for(self, object num_tokens) except -1
