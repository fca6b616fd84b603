# The arrays of a step, by address: what the manager fills, and compiled code elsewhere may read.

from libc.stdint cimport int32_t, int64_t


cdef struct TableRow:   # what a row of the block table holds now, in every group
    int64_t manager
    int64_t handle
    int64_t version
    int32_t length
    int32_t computed    # tokens of the sequence that were, when its blocks out of reach became padding


cdef struct Arrays:
    int64_t* input_ids
    int64_t* positions
    int64_t* slot_mapping
    int32_t* block_table
    int32_t* seq_lens
    int32_t* query_start_loc
    int64_t* copies
    int32_t* kv_indptr
    int32_t* kv_indices
    int32_t* kv_last_page_len
    int32_t[64] num_pages   # of each group in `kv_indices`
    # Slots of states, NULL where nobody keeps any: of each row, those that begin at zero, (source, target) of copies,
    # and of each token where drafts are kept.
    int64_t* state_slots
    int64_t* state_zero
    int64_t* state_copies
    int64_t* state_drafts
    Py_ssize_t num_state_rows, num_state_zero, num_state_copies, num_state_drafts
    Py_ssize_t last_state_zero  # of the step before, while this one is filled
    TableRow* rows
    # What the image on the device holds, and room for a list of patches to it; none where there is no such image.
    TableRow* sent
    int32_t* sent_zeros
    int64_t* patches
    Py_ssize_t sent_seqs, sent_tokens, sent_state_rows, sent_state_zero, sent_state_drafts
    int num_groups
    Py_ssize_t max_seqs, max_tokens, max_blocks_per_seq
    Py_ssize_t num_seqs, num_tokens, num_copies, max_query_len, max_seq_len
    int64_t needs           # the newest move that the pass waits for, 0: none
    int64_t first_move      # of those that were handed out with the step, as far as there are any
    int64_t last_move       # 0: none
    int64_t fills           # how often they have been filled
