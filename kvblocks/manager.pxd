# What compiled code elsewhere may rely on: the arrays of a step, by address.

from libc.stdint cimport int32_t, int64_t


cdef struct TableRow


cdef class StepArrays:
    cdef int64_t* _input_ids
    cdef int64_t* _positions
    cdef int64_t* _slot_mapping
    cdef int32_t* _block_table
    cdef int32_t* _seq_lens
    cdef int32_t* _query_start_loc
    cdef int64_t* _copies
    cdef int32_t* _kv_indptr
    cdef int32_t* _kv_indices
    cdef int32_t* _kv_last_page_len
    cdef bint _begun
    cdef int32_t[64] _num_pages     # of each group in `_kv_indices`
    cdef TableRow* _rows
    # What the image on the device holds, and room for a list of patches to it; none where there is no such image.
    cdef TableRow* _sent
    cdef int32_t* _sent_zeros
    cdef int64_t* _patches
    cdef Py_ssize_t _sent_seqs, _sent_tokens
    cdef list _views
    cdef bint _uploads
    cdef readonly int num_groups
    cdef readonly Py_ssize_t max_seqs, max_tokens, max_blocks_per_seq
    cdef readonly Py_ssize_t num_seqs, num_tokens, num_copies, max_query_len, max_seq_len
    cdef readonly int64_t needs
    cdef readonly object manager
