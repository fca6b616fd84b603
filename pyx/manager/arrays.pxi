# The arrays of a step, as addresses opened once. What is in them, not where they live, changes from step to step.


cdef struct TableRow:   # what a row of the block table holds now
    int64_t manager
    int64_t handle
    int64_t version
    int32_t length


cdef int64_t* int64_array(object array, str name, Py_ssize_t size, list views) except NULL:
    return <int64_t*>array_address(array, name, size, 8, views)


cdef int32_t* int32_array(object array, str name, Py_ssize_t size, list views) except NULL:
    return <int32_t*>array_address(array, name, size, 4, views)


cdef void* array_address(object array, str name, Py_ssize_t size, Py_ssize_t width, list views) except NULL:
    cdef Py_buffer view
    kept = memoryview(array)
    if kept.readonly or not kept.c_contiguous or kept.itemsize != width or kept.format not in "ilq":
        raise TypeError(f"{name} must be a writable contiguous array of int{width * 8}")
    if kept.nbytes != size * width:
        raise ValueError(f"{name} has {kept.nbytes // width} elements, not {size}")
    views.append(kept)  # keeps the memory in place as long as the StepArrays lives
    PyObject_GetBuffer(kept, &view, PyBUF_FORMAT | PyBUF_STRIDES)
    cdef void* address = view.buf
    PyBuffer_Release(&view)
    return address


cdef class StepArrays:
    """The host arrays that `BlockManager.prepare` fills for one forward pass.

    Args:
        input_ids, positions, slot_mapping: int64 [max_tokens]; pads 0, 0 and -1.
        block_table: int32 [max_seqs, max_blocks_per_seq]; pads 0.
        seq_lens: int32 [max_seqs]: tokens of each row, this step's included; pads 0.
        query_start_loc: int32 [max_seqs + 1]; pads repeat `num_tokens`.
        copies: int64 [max_seqs, 2]: (source, target) blocks, the first `num_copies` rows.
        kv_indptr, kv_indices, kv_last_page_len: int32 [max_seqs + 1], [max_seqs * max_blocks_per_seq] and [max_seqs]:
            the blocks of all rows one after the other, where each row's start, and the tokens in its last; all or none.
        uploads: whether `prepare` calls `_upload` when it has filled them.

    Raises:
        TypeError: an array is not writable, contiguous or of its dtype.
        ValueError: the sizes of the arrays disagree.

    `kvblocks.StepBuffers` makes them, and carries them to a device.
    """

    def __init__(
        self, input_ids, positions, slot_mapping, block_table, seq_lens, query_start_loc, copies,
        kv_indptr=None, kv_indices=None, kv_last_page_len=None, *, uploads=False,
    ):
        if self._rows != NULL:
            raise RuntimeError("StepArrays is initialised once")
        cdef list views = []
        table = memoryview(block_table)
        if table.ndim != 2:
            raise ValueError(f"block_table must have two dimensions, not {table.ndim}")
        cdef Py_ssize_t max_seqs = table.shape[0], max_blocks = table.shape[1], max_tokens = len(input_ids)
        if not (1 <= max_seqs <= MAX_INT32 and 1 <= max_blocks <= MAX_INT32 and 1 <= max_tokens <= MAX_INT32):
            raise ValueError(f"{max_seqs=}, {max_blocks=} and {max_tokens=} must be 1 to {MAX_INT32}")
        self._input_ids = int64_array(input_ids, "input_ids", max_tokens, views)
        self._positions = int64_array(positions, "positions", max_tokens, views)
        self._slot_mapping = int64_array(slot_mapping, "slot_mapping", max_tokens, views)
        self._block_table = int32_array(block_table, "block_table", max_seqs * max_blocks, views)
        self._seq_lens = int32_array(seq_lens, "seq_lens", max_seqs, views)
        self._query_start_loc = int32_array(query_start_loc, "query_start_loc", max_seqs + 1, views)
        self._copies = int64_array(copies, "copies", max_seqs * 2, views)
        if kv_indices is not None:
            self._kv_indptr = int32_array(kv_indptr, "kv_indptr", max_seqs + 1, views)
            self._kv_indices = int32_array(kv_indices, "kv_indices", max_seqs * max_blocks, views)
            self._kv_last_page_len = int32_array(kv_last_page_len, "kv_last_page_len", max_seqs, views)
        else:
            self._kv_indices = NULL
        self._uploads = uploads
        self._rows = <TableRow*>grab_zeroed(max_seqs, sizeof(TableRow))
        if self._rows == NULL:
            raise MemoryError(f"no memory for {max_seqs} rows")
        self._views = views
        self.max_seqs, self.max_blocks_per_seq, self.max_tokens = max_seqs, max_blocks, max_tokens
        self.num_seqs = self.num_tokens = self.num_copies = self.max_query_len = self.max_seq_len = 0
        cdef Py_ssize_t i
        for i in range(max_tokens):
            self._input_ids[i] = self._positions[i] = 0
            self._slot_mapping[i] = -1
        memset(self._block_table, 0, max_seqs * max_blocks * sizeof(int32_t))
        memset(self._seq_lens, 0, max_seqs * sizeof(int32_t))
        memset(self._query_start_loc, 0, (max_seqs + 1) * sizeof(int32_t))
        if self._kv_indices != NULL:
            memset(self._kv_indptr, 0, (max_seqs + 1) * sizeof(int32_t))
            memset(self._kv_indices, 0, max_seqs * max_blocks * sizeof(int32_t))
            memset(self._kv_last_page_len, 0, max_seqs * sizeof(int32_t))

    def __dealloc__(self):
        free(self._rows)

    def _upload(self):
        """Carry the arrays to the device; called by `prepare` after it has filled them, where there is one."""


cdef void sync_row(StepArrays a, Py_ssize_t i, int64_t manager, const Seq* seq) noexcept nogil:
    """Bring row i of the block table up to date, writing only what is not there yet."""
    cdef TableRow* row = &a._rows[i]
    cdef int32_t* cells = a._block_table + i * a.max_blocks_per_seq
    cdef int32_t have = row.length
    if row.handle != seq.handle or row.version != seq.version or row.manager != manager:
        row.handle, row.version, row.manager = seq.handle, seq.version, manager
        if have > seq.num_blocks:
            memset(cells + seq.num_blocks, 0, (have - seq.num_blocks) * sizeof(int32_t))
        have = 0
    if have < seq.num_blocks:
        memcpy(cells + have, seq.table + have, (seq.num_blocks - have) * sizeof(int32_t))
    row.length = seq.num_blocks


cdef inline void fill_tokens(
    StepArrays a, Py_ssize_t at_token, const Seq* seq, int32_t start, int32_t count, int32_t block_size, int32_t index
) noexcept nogil:
    """Write input ids, positions and slots of the tokens [start, start + count); the first lies in block `index`."""
    cdef int64_t* ids = a._input_ids + at_token
    cdef int64_t* positions = a._positions + at_token
    cdef int64_t* slots = a._slot_mapping + at_token
    cdef const int32_t* tokens = seq.text.tokens + start
    cdef int32_t i, done = 0, n, offset = start - index * block_size
    cdef int64_t slot
    if count == 1:
        ids[0], positions[0] = tokens[0], start
        slots[0] = <int64_t>seq.table[index] * block_size + offset
        return
    for i in range(count):
        ids[i] = tokens[i]
    for i in range(count):
        positions[i] = start + i
    while done < count:
        n = min(count - done, block_size - offset)
        slot = <int64_t>seq.table[index] * block_size + offset
        for i in range(n):
            slots[done + i] = slot + i
        done += n
        index += 1
        offset = 0


cdef void fill_pages(StepArrays a, Py_ssize_t num_seqs, int32_t block_size) noexcept nogil:
    """Write the ragged form of the block table: only the blocks that hold tokens up to this step's last."""
    cdef Py_ssize_t i
    cdef int32_t n, end = 0
    for i in range(num_seqs):
        n = blocks_for(a._seq_lens[i], block_size)
        a._kv_indptr[i] = end
        memcpy(a._kv_indices + end, a._block_table + i * a.max_blocks_per_seq, n * sizeof(int32_t))
        a._kv_last_page_len[i] = a._seq_lens[i] - (n - 1) * block_size
        end += n
    for i in range(num_seqs, a.max_seqs):
        a._kv_indptr[i] = end
        a._kv_last_page_len[i] = 0
    a._kv_indptr[a.max_seqs] = end


cdef void pad_after(StepArrays a, Py_ssize_t num_seqs, Py_ssize_t num_tokens) noexcept nogil:
    """Turn what the step before wrote past these counts back into padding."""
    cdef Py_ssize_t i
    for i in range(num_tokens, a.num_tokens):
        a._input_ids[i] = a._positions[i] = 0
        a._slot_mapping[i] = -1
    for i in range(num_seqs, a.num_seqs):
        memset(a._block_table + i * a.max_blocks_per_seq, 0, a._rows[i].length * sizeof(int32_t))
        memset(&a._rows[i], 0, sizeof(TableRow))
        a._seq_lens[i] = 0
    for i in range(num_seqs, a.max_seqs + 1):
        a._query_start_loc[i] = <int32_t>num_tokens
    a.num_seqs, a.num_tokens = num_seqs, num_tokens
