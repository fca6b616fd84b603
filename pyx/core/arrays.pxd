# The arrays of a step, as addresses opened once. What is in them, not where they live, changes from step to step.

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy, memset

from core.checks cimport check
from core.text cimport late_token, Paging, run_at, token_at
from core.pool cimport Step, StepRow
from core.sequences cimport block_of, blocks_for, Core, first_row, row_at, Seq
from kvblocks.step_arrays cimport Arrays, TableRow


cdef extern from "core/arrays.h" nogil:
    void kvb_widen(const int32_t* tokens, int32_t n, int64_t* ids) noexcept nogil
    void kvb_count(int64_t first, int32_t n, int64_t* positions) noexcept nogil
    void kvb_fill_slots(
        const int32_t* blocks, int32_t stride, int32_t block_size, int32_t offset, int32_t n, int64_t* slots
    ) noexcept nogil


cdef enum:
    PATCH_WORDS = 6   # of int32 in a patch: three int64
    ARRAYS = 14       # patches beside those of the groups, at most
    GROUPS_AT_ONCE = 8
    PADDING = 0xFF    # each byte of what pads a block table: -1, which is no block


cdef inline int64_t* int64_array(object array, str name, Py_ssize_t size, list views) except NULL:
    return <int64_t*>array_address(array, name, size, 8, views)


cdef inline int32_t* int32_array(object array, str name, Py_ssize_t size, list views) except NULL:
    return <int32_t*>array_address(array, name, size, 4, views)


cdef inline void* array_address(object array, str name, Py_ssize_t size, Py_ssize_t width, list views) except NULL:
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


cdef struct Pack:
    char* image
    int32_t* out
    int64_t* patches
    Py_ssize_t words, count, longest, room


cdef inline void add_patch(Pack* pack, const void* source, Py_ssize_t words) noexcept nogil:
    cdef int64_t* patch = pack.patches + pack.count * (PATCH_WORDS // 2)
    if words == 0:
        return
    check(words > 0 and pack.count < pack.room, b"there is room for a patch")
    patch[0] = (<const char*>source - pack.image) // <Py_ssize_t>sizeof(int32_t)
    patch[1], patch[2] = pack.words, words
    memcpy(pack.out + pack.words, source, words * sizeof(int32_t))
    pack.words += words
    pack.count += 1
    pack.longest = max(pack.longest, words)


cdef inline int32_t* cells_at(Arrays* a, int32_t g, Py_ssize_t i) noexcept nogil:
    return a.block_table + (g * a.max_seqs + i) * a.max_blocks_per_seq


cdef inline void pack_row(Arrays* a, int32_t g, Py_ssize_t i, bint same, Pack* pack) noexcept nogil:
    """Add what changed in row i of group g's table: leading entries that became padding, and the changed tail."""
    cdef const int32_t* cells = cells_at(a, g, i)
    cdef int32_t* zeros = &a.sent_zeros[g * a.max_seqs + i]
    cdef int32_t had = a.sent[i].length, has = a.rows[i].length
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


cdef inline void pack_step(Arrays* a, char* image, int32_t* out, Pack* pack) noexcept nogil:
    """Behind the counts of this step and the last one both the arrays and the device's image are padding."""
    cdef Py_ssize_t i, seqs = max(a.num_seqs, a.sent_seqs), tokens = max(a.num_tokens, a.sent_tokens)
    cdef int32_t g
    cdef bint same
    cdef TableRow* row
    cdef TableRow* sent
    pack.image, pack.out, pack.patches = image, out, a.patches
    pack.words = pack.count = pack.longest = 0
    pack.room = max_patches(a.num_groups, a.max_seqs)
    add_patch(pack, a.input_ids, 2 * tokens)
    add_patch(pack, a.positions, 2 * tokens)
    add_patch(pack, a.copies, 4 * a.num_copies)
    if a.state_slots != NULL:
        add_patch(pack, a.state_slots, 2 * max(a.num_state_rows, a.sent_state_rows))
        add_patch(pack, a.state_zero, 2 * max(a.num_state_zero, a.sent_state_zero))
        add_patch(pack, a.state_copies, 4 * a.num_state_copies)
        add_patch(pack, a.state_drafts, 2 * max(a.num_state_drafts, a.sent_state_drafts))
        a.sent_state_rows, a.sent_state_zero = a.num_state_rows, a.num_state_zero
        a.sent_state_drafts = a.num_state_drafts
    add_patch(pack, a.seq_lens, seqs)
    add_patch(pack, a.query_start_loc, a.max_seqs + 1)
    for g in range(a.num_groups):
        add_patch(pack, a.slot_mapping + g * a.max_tokens, 2 * tokens)
        if a.kv_indices != NULL:
            add_patch(pack, a.kv_indptr + g * (a.max_seqs + 1), a.max_seqs + 1)
            add_patch(
                pack, a.kv_indices + g * a.max_seqs * a.max_blocks_per_seq, a.num_pages[g]
            )
    if a.kv_indices != NULL:
        add_patch(pack, a.kv_last_page_len, seqs)
    for i in range(seqs):
        row, sent = &a.rows[i], &a.sent[i]
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
    a.sent_seqs, a.sent_tokens = a.num_seqs, a.num_tokens


cdef inline void rewrite_row(
    Arrays* a, Py_ssize_t i, const Core* c, const Seq* seq, int32_t have, int32_t computed
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
        if a.rows[i].length > seq.num_rows:
            memset(cells + seq.num_rows, PADDING, (a.rows[i].length - seq.num_rows) * sizeof(int32_t))
        low = max(have, low)
        if c.num_groups == 1:
            memcpy(cells + low, seq.table + low, (seq.num_rows - low) * sizeof(int32_t))
            continue
        for j in range(low, seq.num_rows):
            cells[j] = row_at(c, seq, j)[g]


cdef inline void sync_row(Arrays* a, Py_ssize_t i, const Core* c, const Seq* seq) noexcept nogil:
    """Bring row i of the block table up to date, writing only what is not there yet."""
    cdef TableRow* row = &a.rows[i]
    check(0 <= i < a.max_seqs and seq.num_rows <= a.max_blocks_per_seq, b"a table fits its row of a step's")
    if row.handle != seq.handle or row.version != seq.version or row.manager != c.uid:
        row.handle, row.version, row.manager = seq.handle, seq.version, c.uid
        rewrite_row(a, i, c, seq, 0, 0)
    elif row.length != seq.num_rows or c.reach_ends:
        rewrite_row(a, i, c, seq, row.length, row.computed)
    row.length, row.computed = seq.num_rows, seq.num_computed


cdef inline void fill_tokens(
    Arrays* a, Py_ssize_t at_token, const Core* c, const Seq* seq, int32_t start, int32_t count
) noexcept nogil:
    """Write input ids and positions of the tokens [start, start + count)."""
    cdef int64_t* ids = a.input_ids + at_token
    cdef int64_t* positions = a.positions + at_token
    cdef const Paging* p = &c.pool.tree.paging
    cdef int32_t done = 0, run
    check(0 <= at_token <= a.max_tokens - count, b"tokens of a step fit its arrays")
    if count == 1:
        ids[0], positions[0] = late_token(p, &seq.text, start), start
        return
    while done < count:
        run = run_at(p, start + done, count - done)
        kvb_widen(token_at(p, &seq.text, start + done), run, ids + done)
        done += run
    kvb_count(start, count, positions)


cdef inline void fill_slots(
    Arrays* a, Py_ssize_t at_token, const Core* c, const Seq* seq, int32_t start, int32_t count, int32_t low,
    int32_t end,
) noexcept nogil:
    """Write the slots of the tokens [start, start + count) in the groups [low, end)."""
    cdef int64_t* slots = a.slot_mapping + at_token
    cdef int32_t g, first = block_of(c, start), offset = start - first * c.block_size
    cdef const int32_t* blocks = row_at(c, seq, first)
    if count == 1:
        for g in range(low, end):
            slots[g * a.max_tokens] = <int64_t>blocks[g] * c.block_size + offset
        return
    for g in range(low, end):
        kvb_fill_slots(blocks + g, c.num_groups, c.block_size, offset, count, slots + g * a.max_tokens)


cdef inline void fill_many_slots(Arrays* a, const Core* c, const Step* step) noexcept nogil:
    """Write the slots of a step, a few groups at a time. The slots of one token lie `max_tokens` apart, and a cache has
    room for few lines whose addresses differ by a power of two."""
    cdef Py_ssize_t i
    cdef int32_t low = 0, at_token
    cdef const StepRow* row
    while low < c.num_groups:
        at_token = 0
        for i in range(step.num_rows):
            row = &step.rows[i]
            fill_slots(
                a, at_token, c, &c.seqs[row.slot], row.start, row.count, low,
                min(low + GROUPS_AT_ONCE, c.num_groups),
            )
            at_token += row.count
        low += GROUPS_AT_ONCE


cdef inline void fill_pages(Arrays* a, const Core* c, const Step* step) noexcept nogil:
    """Write the ragged form of the block table: of each row the blocks from the first that its queries reach to the one
    with this step's last token."""
    cdef Py_ssize_t i
    cdef int32_t g, n, low, end
    cdef int32_t* indptr = a.kv_indptr
    cdef int32_t* indices = a.kv_indices
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
        a.num_pages[g] = end
        indptr += a.max_seqs + 1
        indices += a.max_seqs * a.max_blocks_per_seq
    for i in range(step.num_rows):
        n = step.rows[i].start + step.rows[i].count
        a.kv_last_page_len[i] = n - (blocks_for(n, c.block_size) - 1) * c.block_size
    for i in range(step.num_rows, a.max_seqs):
        a.kv_last_page_len[i] = 0


cdef inline void pad_after(Arrays* a, Py_ssize_t num_seqs, Py_ssize_t num_tokens) noexcept nogil:
    """Turn what the step before wrote past these counts back into padding."""
    cdef Py_ssize_t i
    cdef int32_t g
    for i in range(num_tokens, a.num_tokens):
        a.input_ids[i] = a.positions[i] = 0
    for g in range(a.num_groups):
        for i in range(num_tokens, a.num_tokens):
            a.slot_mapping[g * a.max_tokens + i] = -1
        for i in range(num_seqs, a.num_seqs):
            memset(cells_at(a, g, i), PADDING, a.rows[i].length * sizeof(int32_t))
    for i in range(num_seqs, a.num_seqs):
        memset(&a.rows[i], 0, sizeof(TableRow))
        a.seq_lens[i] = 0
    if num_seqs != a.num_seqs or num_tokens != a.num_tokens:
        for i in range(num_seqs, a.max_seqs + 1):
            a.query_start_loc[i] = <int32_t>num_tokens
    else:
        a.query_start_loc[num_seqs] = <int32_t>num_tokens
    a.num_seqs, a.num_tokens = num_seqs, num_tokens
