# The arrays of a step, as addresses opened once. What is in them, not where they live, changes from step to step.


cdef extern from *:
    """
    KVB_WIDE static void kvb_widen(const int32_t *tokens, int32_t n, int64_t *ids) {
        for (int32_t i = 0; i < n; i++) ids[i] = tokens[i];
    }
    KVB_WIDE static void kvb_count(int64_t first, int32_t n, int64_t *positions) {
        for (int32_t i = 0; i < n; i++) positions[i] = first + i;
    }
    /* The slots of n tokens, the first at `offset` in its block; blocks[0] and each `stride` further on are theirs. */
    KVB_WIDE static void kvb_fill_slots(
        const int32_t *blocks, int32_t stride, int32_t block_size, int32_t offset, int32_t n, int64_t *slots
    ) {
        while (n > 0) {
            int32_t m = block_size - offset < n ? block_size - offset : n;
            int64_t slot = (int64_t)*blocks * block_size + offset;
            for (int32_t i = 0; i < m; i++) slots[i] = slot + i;
            slots += m, n -= m, blocks += stride, offset = 0;
        }
    }
    """
    void kvb_widen(const int32_t* tokens, int32_t n, int64_t* ids) noexcept nogil
    void kvb_count(int64_t first, int32_t n, int64_t* positions) noexcept nogil
    void kvb_fill_slots(
        const int32_t* blocks, int32_t stride, int32_t block_size, int32_t offset, int32_t n, int64_t* slots
    ) noexcept nogil


cdef struct TableRow:   # what a row of the block table holds now, in every group
    int64_t manager
    int64_t handle
    int64_t version
    int32_t length
    int32_t computed    # tokens of the sequence that were, when its blocks out of reach became padding


cdef enum:
    PATCH_WORDS = 6   # of int32 in a patch: three int64
    ARRAYS = 10       # patches beside those of the groups, at most
    PADDING = 0xFF    # each byte of what pads a block table: -1, which is no block


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


cdef inline Py_ssize_t max_patches(Py_ssize_t groups, Py_ssize_t max_seqs) noexcept nogil:
    """In each row of each group's table the beginning and the end may change."""
    return ARRAYS + groups * (3 + 2 * max_seqs)


cdef class StepArrays:
    """The host arrays that `BlockManager.prepare` fills for one forward pass.

    Args:
        input_ids, positions: int64 [max_tokens]; pads 0.
        slot_mapping: int64 [max_tokens]; pads -1.
        block_table: int32 [max_seqs, max_blocks_per_seq]; pads -1.
        seq_lens: int32 [max_seqs]: tokens of each row, this step's included; pads 0.
        query_start_loc: int32 [max_seqs + 1]; pads repeat `num_tokens`.
        copies: int64 [max_seqs * groups, 2]: (source, target) blocks, the first `num_copies` rows.
        kv_indptr, kv_indices, kv_last_page_len: int32 [max_seqs + 1], [max_seqs * max_blocks_per_seq] and [max_seqs]:
            the blocks of all rows one after the other, where each row's start, and the tokens in its last; all or none.
            Blocks that a group does not reach are left out.
        uploads: whether `prepare` calls `_upload` when it has filled them.

    Raises:
        TypeError: an array is not writable, contiguous or of its dtype.
        ValueError: the sizes of the arrays disagree.

    With several layer groups `block_table`, `slot_mapping`, `kv_indptr` and `kv_indices` have one more dimension in
    front, [groups, ...]; the number of dimensions of `block_table` says which it is.

    `kvblocks.StepBuffers` makes them, and carries them to a device.
    """

    def __init__(
        self, input_ids, positions, slot_mapping, block_table, seq_lens, query_start_loc, copies,
        kv_indptr=None, kv_indices=None, kv_last_page_len=None, *, uploads=False,
    ):
        if self._begun:
            raise RuntimeError("StepArrays is initialised once")
        self._begun = True  # a buffer's owner may run any code, this one too
        cdef list views = []
        table = memoryview(block_table)
        if table.ndim != 2 and table.ndim != 3:
            raise ValueError(f"block_table must have two dimensions, or three with groups, not {table.ndim}")
        cdef Py_ssize_t groups = table.shape[0] if table.ndim == 3 else 1
        cdef Py_ssize_t max_seqs = table.shape[table.ndim - 2], max_blocks = table.shape[table.ndim - 1]
        cdef Py_ssize_t max_tokens = len(input_ids)
        if not 1 <= groups <= MAX_GROUPS:
            raise ValueError(f"{groups=} must be 1 to {MAX_GROUPS}")
        if not (1 <= max_seqs <= MAX_INT32 and 1 <= max_blocks <= MAX_INT32 and 1 <= max_tokens <= MAX_INT32):
            raise ValueError(f"{max_seqs=}, {max_blocks=} and {max_tokens=} must be 1 to {MAX_INT32}")
        self._input_ids = int64_array(input_ids, "input_ids", max_tokens, views)
        self._positions = int64_array(positions, "positions", max_tokens, views)
        self._slot_mapping = int64_array(slot_mapping, "slot_mapping", groups * max_tokens, views)
        self._block_table = int32_array(block_table, "block_table", groups * max_seqs * max_blocks, views)
        self._seq_lens = int32_array(seq_lens, "seq_lens", max_seqs, views)
        self._query_start_loc = int32_array(query_start_loc, "query_start_loc", max_seqs + 1, views)
        self._copies = int64_array(copies, "copies", groups * max_seqs * 2, views)
        if kv_indices is not None:
            self._kv_indptr = int32_array(kv_indptr, "kv_indptr", groups * (max_seqs + 1), views)
            self._kv_indices = int32_array(kv_indices, "kv_indices", groups * max_seqs * max_blocks, views)
            self._kv_last_page_len = int32_array(kv_last_page_len, "kv_last_page_len", max_seqs, views)
        else:
            self._kv_indices = NULL
        self._uploads = uploads
        self._rows = <TableRow*>grab_zeroed(max_seqs, sizeof(TableRow))
        if self._rows == NULL:
            raise MemoryError(f"no memory for {max_seqs} rows")
        if uploads:
            self._sent = <TableRow*>grab_zeroed(max_seqs, sizeof(TableRow))
            self._sent_zeros = <int32_t*>grab_zeroed(groups * max_seqs, sizeof(int32_t))
            self._patches = <int64_t*>grab(max_patches(groups, max_seqs) * PATCH_WORDS * sizeof(int32_t))
            if self._sent == NULL or self._sent_zeros == NULL or self._patches == NULL:
                raise MemoryError(f"no memory for {max_seqs} rows")
        self._sent_seqs = self._sent_tokens = 0
        self._views = views
        self.num_groups = <int32_t>groups
        self.max_seqs, self.max_blocks_per_seq, self.max_tokens = max_seqs, max_blocks, max_tokens
        self.num_seqs = self.num_tokens = self.num_copies = self.max_query_len = self.max_seq_len = 0
        self.needs = 0
        self.manager = None
        cdef Py_ssize_t i
        memset(self._input_ids, 0, max_tokens * sizeof(int64_t))
        memset(self._positions, 0, max_tokens * sizeof(int64_t))
        for i in range(groups * max_tokens):
            self._slot_mapping[i] = -1
        memset(self._block_table, PADDING, groups * max_seqs * max_blocks * sizeof(int32_t))
        memset(self._seq_lens, 0, max_seqs * sizeof(int32_t))
        memset(self._query_start_loc, 0, (max_seqs + 1) * sizeof(int32_t))
        if self._kv_indices != NULL:
            memset(self._kv_indptr, 0, groups * (max_seqs + 1) * sizeof(int32_t))
            memset(self._kv_indices, 0, groups * max_seqs * max_blocks * sizeof(int32_t))
            memset(self._kv_last_page_len, 0, max_seqs * sizeof(int32_t))

    def __dealloc__(self):
        free(self._rows)
        free(self._sent)
        free(self._sent_zeros)
        free(self._patches)

    @property
    def waits(self):
        """Whether the pass waits for moves that nobody has marked as made."""
        return self.manager is not None and self.needs > self.manager.moves_marked

    def _upload(self):
        """Carry the arrays to the device; called by `prepare` after it has filled them, where there is one."""

    def _pack(self, size_t image, size_t out):
        """Write what changed in the arrays since the last call to `out`, the words first, then the list of patches.

        A patch is three int64: the first int32 of the image that it changes, where its words start in `out`, and how
        many int32 they are. At most `_pack_bytes(image bytes)` are written.

        Args:
            image: address that positions count from; all arrays lie after it as they do in the device's image.
            out: address of memory, a multiple of 8.

        Returns:
            bytes written, the int32 at which the patches start, their number, and the words of the longest.
        """
        cdef Pack pack
        if self._sent == NULL:
            raise RuntimeError("these StepArrays were made without uploads=True")
        with nogil:
            pack_step(self, <char*>image, <int32_t*>out, &pack)
        return (pack.words + pack.count * PATCH_WORDS) * sizeof(int32_t), pack.words, pack.count, pack.longest

    def _pack_bytes(self, Py_ssize_t image_bytes):
        """Bytes that `_pack` writes at most for arrays that lie in `image_bytes`."""
        return image_bytes + 8 + max_patches(self.num_groups, self.max_seqs) * PATCH_WORDS * sizeof(int32_t)

    def _forget(self):
        """Let the next `_pack` bring everything: nothing is known of what the device holds."""
        cdef Py_ssize_t i
        self._sent_seqs, self._sent_tokens = self.max_seqs, self.max_tokens
        for i in range(self.max_seqs if self._sent != NULL else 0):
            self._sent[i].manager, self._sent[i].length = -1, <int32_t>self.max_blocks_per_seq


cdef struct Pack:
    char* image
    int32_t* out
    int64_t* patches
    Py_ssize_t words, count, longest


cdef void add_patch(Pack* pack, const void* source, Py_ssize_t words) noexcept nogil:
    cdef int64_t* patch = pack.patches + pack.count * (PATCH_WORDS // 2)
    if words == 0:
        return
    patch[0] = (<const char*>source - pack.image) // <Py_ssize_t>sizeof(int32_t)
    patch[1], patch[2] = pack.words, words
    memcpy(pack.out + pack.words, source, words * sizeof(int32_t))
    pack.words += words
    pack.count += 1
    pack.longest = max(pack.longest, words)


cdef inline int32_t* cells_at(StepArrays a, int32_t g, Py_ssize_t i) noexcept nogil:
    return a._block_table + (g * a.max_seqs + i) * a.max_blocks_per_seq


cdef void pack_row(StepArrays a, int32_t g, Py_ssize_t i, bint same, Pack* pack) noexcept nogil:
    """Add what changed in row i of group g's table: leading entries that became padding, and the changed tail."""
    cdef const int32_t* cells = cells_at(a, g, i)
    cdef int32_t* zeros = &a._sent_zeros[g * a.max_seqs + i]
    cdef int32_t had = a._sent[i].length, has = a._rows[i].length
    cdef int32_t start = min(had, has) if same else 0, low = zeros[0] if same else 0
    cdef int32_t first = low
    while low < has and cells[low] == -1:
        low += 1
    zeros[0] = low
    if same:
        add_patch(pack, cells + first, low - first)
        start = max(start, low)
    if start < max(had, has):
        add_patch(pack, cells + start, max(had, has) - start)


cdef void pack_step(StepArrays a, char* image, int32_t* out, Pack* pack) noexcept nogil:
    """Behind the counts of this step and the last one both the arrays and the device's image are padding."""
    cdef Py_ssize_t i, seqs = max(a.num_seqs, a._sent_seqs), tokens = max(a.num_tokens, a._sent_tokens)
    cdef int32_t g
    cdef bint same
    cdef TableRow* row
    cdef TableRow* sent
    pack.image, pack.out, pack.patches = image, out, a._patches
    pack.words = pack.count = pack.longest = 0
    add_patch(pack, a._input_ids, 2 * tokens)
    add_patch(pack, a._positions, 2 * tokens)
    add_patch(pack, a._copies, 4 * a.num_copies)
    add_patch(pack, a._seq_lens, seqs)
    add_patch(pack, a._query_start_loc, a.max_seqs + 1)
    for g in range(a.num_groups):
        add_patch(pack, a._slot_mapping + g * a.max_tokens, 2 * tokens)
        if a._kv_indices != NULL:
            add_patch(pack, a._kv_indptr + g * (a.max_seqs + 1), a.max_seqs + 1)
            add_patch(
                pack, a._kv_indices + g * a.max_seqs * a.max_blocks_per_seq, a._num_pages[g]
            )
    if a._kv_indices != NULL:
        add_patch(pack, a._kv_last_page_len, seqs)
    for i in range(seqs):
        row, sent = &a._rows[i], &a._sent[i]
        same = row.handle == sent.handle and row.version == sent.version and row.manager == sent.manager
        if same and row.length == sent.length and row.computed == sent.computed:
            continue
        for g in range(a.num_groups):
            pack_row(a, g, i, same, pack)
        sent[0] = row[0]
    if pack.words & 1:
        pack.out[pack.words] = 0
        pack.words += 1
    memcpy(pack.out + pack.words, pack.patches, pack.count * PATCH_WORDS * sizeof(int32_t))
    a._sent_seqs, a._sent_tokens = a.num_seqs, a.num_tokens


cdef void rewrite_row(
    StepArrays a, Py_ssize_t i, const Core* c, const Seq* seq, int32_t have, int32_t computed
) noexcept nogil:
    """Write what row i lacks of a sequence's table: it has the first `have` rows, as they were when so many tokens were
    computed. Blocks that went out of reach become padding."""
    cdef int32_t g, j, low, gone
    cdef int32_t* cells
    for g in range(c.num_groups):
        cells = cells_at(a, g, i)
        gone, low = first_row(c, g, computed), first_row(c, g, seq.num_computed)
        if gone < low:
            memset(cells + gone, PADDING, (low - gone) * sizeof(int32_t))
        if a._rows[i].length > seq.num_rows:
            memset(cells + seq.num_rows, PADDING, (a._rows[i].length - seq.num_rows) * sizeof(int32_t))
        low = max(have, low)
        if c.num_groups == 1:
            memcpy(cells + low, seq.table + low, (seq.num_rows - low) * sizeof(int32_t))
            continue
        for j in range(low, seq.num_rows):
            cells[j] = row_at(c, seq, j)[g]


cdef inline void sync_row(StepArrays a, Py_ssize_t i, const Core* c, const Seq* seq) noexcept nogil:
    """Bring row i of the block table up to date, writing only what is not there yet."""
    cdef TableRow* row = &a._rows[i]
    if row.handle != seq.handle or row.version != seq.version or row.manager != c.uid:
        row.handle, row.version, row.manager = seq.handle, seq.version, c.uid
        rewrite_row(a, i, c, seq, 0, 0)
    elif row.length != seq.num_rows or c.reach_ends:
        rewrite_row(a, i, c, seq, row.length, row.computed)
    row.length, row.computed = seq.num_rows, seq.num_computed


cdef inline void fill_tokens(
    StepArrays a, Py_ssize_t at_token, const Core* c, const Seq* seq, int32_t start, int32_t count
) noexcept nogil:
    """Write input ids, positions and slots of the tokens [start, start + count)."""
    cdef int64_t* ids = a._input_ids + at_token
    cdef int64_t* positions = a._positions + at_token
    cdef int64_t* slots = a._slot_mapping + at_token
    cdef const int32_t* tokens = seq.text.tokens + start
    cdef int32_t g, first = block_of(c, start), offset = start - first * c.block_size
    if count == 1:
        ids[0], positions[0] = tokens[0], start
        for g in range(c.num_groups):
            slots[g * a.max_tokens] = <int64_t>row_at(c, seq, first)[g] * c.block_size + offset
        return
    kvb_widen(tokens, count, ids)
    kvb_count(start, count, positions)
    for g in range(c.num_groups):
        kvb_fill_slots(row_at(c, seq, first) + g, c.num_groups, c.block_size, offset, count, slots + g * a.max_tokens)


cdef void fill_pages(StepArrays a, const Core* c, const Step* step) noexcept nogil:
    """Write the ragged form of the block table: of each row the blocks from the first that its queries reach to the one
    with this step's last token."""
    cdef Py_ssize_t i
    cdef int32_t g, n, low, end
    cdef int32_t* indptr = a._kv_indptr
    cdef int32_t* indices = a._kv_indices
    for g in range(c.num_groups):
        end = 0
        for i in range(step.num_rows):
            n = blocks_for(step.rows[i].start + step.rows[i].count, c.block_size)
            low = first_row(c, g, step.rows[i].start)
            indptr[i] = end
            memcpy(indices + end, cells_at(a, g, i) + low, (n - low) * sizeof(int32_t))
            end += n - low
        for i in range(step.num_rows, a.max_seqs + 1):
            indptr[i] = end
        a._num_pages[g] = end
        indptr += a.max_seqs + 1
        indices += a.max_seqs * a.max_blocks_per_seq
    for i in range(step.num_rows):
        n = step.rows[i].start + step.rows[i].count
        a._kv_last_page_len[i] = n - (blocks_for(n, c.block_size) - 1) * c.block_size
    for i in range(step.num_rows, a.max_seqs):
        a._kv_last_page_len[i] = 0


cdef void pad_after(StepArrays a, Py_ssize_t num_seqs, Py_ssize_t num_tokens) noexcept nogil:
    """Turn what the step before wrote past these counts back into padding."""
    cdef Py_ssize_t i
    cdef int32_t g
    for i in range(num_tokens, a.num_tokens):
        a._input_ids[i] = a._positions[i] = 0
    for g in range(a.num_groups):
        for i in range(num_tokens, a.num_tokens):
            a._slot_mapping[g * a.max_tokens + i] = -1
        for i in range(num_seqs, a.num_seqs):
            memset(cells_at(a, g, i), PADDING, a._rows[i].length * sizeof(int32_t))
    for i in range(num_seqs, a.num_seqs):
        memset(&a._rows[i], 0, sizeof(TableRow))
        a._seq_lens[i] = 0
    if num_seqs != a.num_seqs or num_tokens != a.num_tokens:
        for i in range(num_seqs, a.max_seqs + 1):
            a._query_start_loc[i] = <int32_t>num_tokens
    else:
        a._query_start_loc[num_seqs] = <int32_t>num_tokens
    a.num_seqs, a.num_tokens = num_seqs, num_tokens
