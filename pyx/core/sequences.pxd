# Sequences: their tokens, their block tables, and every operation on them. Functions here run under the manager's lock,
# touch no Python object, and either do all of their work or report a Fault and change nothing that can be observed.
#
# A sequence's tokens, left to right (half-open ranges):
#
#   [ 0 ........ num_computed ) [ ....... num_prepared ) [ ....... reserved ) [ ...... num_tokens )
#     K and V written             in open steps            a slot exists        known, no slot yet
#
# Its first `published` blocks hang on nodes of the tree, the last of them on `last_node`. A block that is shared or
# published is never written: `prepare` puts a copy in its place first.
#
# A table has one row for each block of tokens, and in it one block for each layer group. In a group with a window or
# chunks the blocks that no later token can reach, those before `first_row`, are given back at `commit`: -1 in its rows.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from core.checks cimport check
from core.memory cimport MAX_GENERATION, MAX_GROUPS, MAX_INT32, SLOT_BITS, SLOT_MASK, grab, grab_zeroed, regrow
from core.ints cimport at, Ints
from core.reach cimport first_reached, Reach
from core.text cimport (
    PAGE_REFS, add_extras, clear_text, cut_extras, cut_text, drop_extras, extend_text, grow_text, kvb_same, Mark,
    offset_in_page, own_placeholders, page_of, Paging, share_text, take_extras, Text, token_at,
)
from core.tree cimport node_at, Tree, tree_drop
from core.states cimport leave_state, reset_checkpoints, share_state, Standing
from core.host cimport Host, drop_slots, forget_work
from core.pool cimport Pool, pool_free, pool_step, release_table, take, unpublish


cdef enum Kind:
    UNUSED, LIVE, PREEMPTED, PIN, LEAVING       # LEAVING: freed while in an open step


cdef enum Problem:
    STALE, IS_PIN, IS_SEQUENCE, TWICE, IS_PREEMPTED, NOT_PREEMPTED, IN_STEP, EXTRA_SIZE, BAD_TOKEN, BAD_COUNT, TOO_LONG
    SIZE_TOKENS, BAD_QUERY, NOT_ENOUGH_TOKENS, STEP_SEQS, STEP_TOKENS, STEP_BLOCKS, STEP_LIMIT
    COMPUTED_UNKNOWN, UNMOVED, NO_STEP, NOT_OLDEST, NOT_NEWEST, SIZE_ACCEPTED, BAD_ACCEPTED, LATER_STEP, NOT_UNKNOWN
    BAD_TRIM, OUT_OF_REACH, STEP_GROUPS, NOTHING_TO_PIN, NO_BLOCKS, WATERMARK, NO_SLOTS, NO_MEMORY
    NO_STATES, LOST_STATE, OWN_STATE, STEP_STATES


cdef struct Marks:      # the extra bytes of the tokens that are added to a batch
    Mark* marks         # of all sequences, one sequence after the other
    int32_t* counts     # [sequences]
    Text* made          # [sequences]: their extras as they will be


cdef struct Fault:
    Problem problem
    Py_ssize_t index    # in the batch
    int64_t value
    int64_t bound


cdef struct Seq:        # two cache lines: what `append` needs, what a step needs besides
    int64_t handle      # generation << SLOT_BITS | slot; -generation when no handle is valid
    int64_t mark        # the last batch that named it
    Text text           # of a pin: none, no pages

    int32_t* table      # [num_rows, groups]
    int64_t version     # changes when entries of the table that were there change
    int64_t last_step   # the newest open step it is in
    uint8_t kind
    uint8_t publishing
    int32_t num_rows    # of the table
    int32_t table_capacity  # rows
    int32_t open_steps
    int32_t num_cached  # or the next unused slot
    int32_t num_computed
    int32_t num_prepared
    int32_t reserved
    int32_t published
    int32_t last_node


cdef struct Counters:
    int64_t admitted, prompt_tokens, hit_tokens, preemptions, resumed, published, merged, copies, peak_used


cdef struct Core:
    Pool pool
    int32_t block_size
    int32_t shift       # block_size is 1 << shift, or shift is -1
    int32_t num_groups
    bint reach_ends     # in at least one group
    Reach[MAX_GROUPS] reaches
    int32_t watermark   # blocks
    bint caching
    int64_t uid
    Seq* seqs
    int32_t max_seqs
    int32_t num_slots   # in use: sequences, pins, and sequences that leave when a step closes
    int32_t num_seqs
    int32_t num_resting  # slots of pins and of preempted sequences: these do not run
    int32_t fresh_seq   # slots from here on were never used
    int32_t unused_seq  # list of slots used before, -1: none
    int64_t serial      # of batches
    int64_t version
    int64_t last_step_id
    Counters counters


cdef inline bint fail(Fault* f, Problem problem, Py_ssize_t index, int64_t value, int64_t bound) noexcept nogil:
    f.problem, f.index, f.value, f.bound = problem, index, value, bound
    return False


cdef inline int32_t blocks_for(int64_t num_tokens, int32_t block_size) noexcept nogil:
    return <int32_t>((num_tokens + block_size - 1) // block_size)


cdef inline int32_t block_of(const Core* c, int32_t position) noexcept nogil:
    """The index of the block that holds a position: a shift where it can be, a division costs as much as the rest."""
    return position >> c.shift if c.shift >= 0 else position // c.block_size


cdef inline int32_t first_row(const Core* c, int32_t g, int32_t position) noexcept nogil:
    """The first table row that tokens from `position` on reach in group g."""
    cdef const Reach* reach = &c.reaches[g]
    return block_of(c, first_reached(reach, position)) if reach.window or reach.chunk else 0


cdef inline int32_t* row_at(const Core* c, const Seq* seq, int32_t row) noexcept nogil:
    check(0 <= row <= seq.table_capacity, b"a row is one of its table")
    return seq.table + <int64_t>row * c.num_groups


cdef inline int64_t needs_of(const Core* c, const Seq* seq) noexcept nogil:
    """The newest move that the next pass of a sequence waits for."""
    return c.pool.host.needs[seq - c.seqs] if c.pool.host.num_slots else 0


cdef inline void wait_for(Core* c, const Seq* seq, int64_t move) noexcept nogil:
    """Let the next pass of a sequence wait for a move too."""
    if move > c.pool.host.needs[seq - c.seqs]:
        c.pool.host.needs[seq - c.seqs] = move


cdef inline int64_t handle_of(const Core* c, const Seq* seq) noexcept nogil:
    """The handle that a sequence has or had: one that leaves has given it up."""
    return seq.handle if seq.handle > 0 else -seq.handle << SLOT_BITS | <int64_t>(seq - c.seqs)


cdef inline void let_go_state(Core* c, const Seq* seq) noexcept nogil:
    leave_state(&c.pool.states, <int32_t>(seq - c.seqs), handle_of(c, seq))


cdef inline int32_t standing_on(const Core* c, const Seq* seq) noexcept nogil:
    """1 + the slot of the state that a sequence stands on, 0: none."""
    return c.pool.states.standing[seq - c.seqs].slot


cdef inline int64_t num_loading(const Core* c, const Seq* seq) noexcept nogil:
    """Cached tokens of a sequence whose loads have not landed."""
    cdef const Host* h = &c.pool.host
    cdef int32_t g, i, late = 0
    cdef const int32_t* blocks
    cdef bint loads
    if needs_of(c, seq) <= c.pool.moves.landed:
        return 0
    for i in range(seq.num_cached // c.block_size):
        blocks = row_at(c, seq, i)
        loads = False
        for g in range(c.num_groups):
            loads = loads or blocks[g] >= 0 and h.shadows[blocks[g]].load > c.pool.moves.landed
        late += loads
    return <int64_t>late * c.block_size


cdef inline int32_t take_for(Core* c, const Seq* seq) noexcept nogil:
    """A block that a sequence is to write."""
    cdef int32_t b = take(&c.pool)
    if c.pool.host.num_slots:
        wait_for(c, seq, c.pool.host.shadows[b].move)
    return b


cdef inline void set_last_node(Tree* t, Seq* seq, int32_t node) noexcept nogil:
    """Make `node` the one that the sequence published last; it keeps its nodes in the tree."""
    if node:
        node_at(t, node).uses += 1
    if seq.last_node:
        tree_drop(t, seq.last_node)
    seq.last_node = node


cdef inline Seq* find_any(Core* c, int64_t handle, Py_ssize_t i, Fault* f) noexcept nogil:
    """The sequence or pin of a handle, or NULL."""
    cdef int64_t slot = handle & SLOT_MASK
    if handle <= 0 or slot >= c.fresh_seq or c.seqs[slot].handle != handle:
        fail(f, STALE, i, handle, 0)
        return NULL
    return &c.seqs[slot]


cdef inline Seq* find(Core* c, int64_t handle, Py_ssize_t i, Fault* f) noexcept nogil:
    """The sequence of a handle, or NULL."""
    cdef Seq* seq = find_any(c, handle, i, f)
    if seq != NULL and seq.text.pages == NULL:
        fail(f, IS_PIN, i, handle, 0)
        return NULL
    return seq


cdef inline bint mark(Seq* seq, int64_t serial, Py_ssize_t i, Fault* f) noexcept nogil:
    """Note that the batch names this sequence; false if it did so before."""
    if seq.mark == serial:
        return fail(f, TWICE, i, seq.handle, 0)
    seq.mark = serial
    return True


cdef inline Seq* of(Core* c, const Ints* seqs, Py_ssize_t i) noexcept nogil:
    """A sequence of a batch that was checked before."""
    check(c.seqs[at(seqs, i) & SLOT_MASK].handle == at(seqs, i), b"a handle that was checked names its sequence")
    return &c.seqs[at(seqs, i) & SLOT_MASK]


cdef inline void touch(Core* c, Seq* seq) noexcept nogil:
    c.version += 1
    seq.version = c.version


cdef inline void note_peak(Core* c) noexcept nogil:
    cdef int64_t used = c.pool.num_blocks - pool_free(&c.pool)
    if used > c.counters.peak_used:
        c.counters.peak_used = used


cdef inline bint has_room(Core* c, int32_t n, Fault* f) noexcept nogil:
    if n > c.max_seqs - c.num_slots:
        return fail(f, NO_SLOTS, 0, c.num_slots, c.max_seqs)
    return True


cdef inline Seq* open_seq(Core* c, Kind kind) noexcept nogil:
    """A new handle on the slot that was given back last; the caller has made sure of room."""
    cdef int32_t slot
    cdef Seq* seq
    cdef int64_t generation
    if c.unused_seq >= 0:
        slot = c.unused_seq
        c.unused_seq = c.seqs[slot].num_cached
    else:
        slot = c.fresh_seq
        c.fresh_seq += 1
    seq = &c.seqs[slot]
    generation = 1 - seq.handle
    memset(seq, 0, sizeof(Seq))
    if c.pool.host.num_slots:
        c.pool.host.needs[slot] = 0
    if c.pool.states.num_slots:
        memset(&c.pool.states.standing[slot], 0, sizeof(Standing))
    seq.handle = generation << SLOT_BITS | slot
    seq.kind = kind
    touch(c, seq)
    c.num_slots += 1
    c.num_seqs += kind == LIVE
    c.num_resting += kind == PIN
    return seq


cdef inline void spend_handle(Seq* seq) noexcept nogil:
    seq.handle = -(seq.handle >> SLOT_BITS)


cdef inline void release_rows(Core* c, Seq* seq, int32_t keep) noexcept nogil:
    """Drop the rows of the table from `keep` on, of a sequence that no open step needs them for."""
    release_table(&c.pool, seq.table, <int64_t>keep * c.num_groups, <int64_t>seq.num_rows * c.num_groups)
    seq.num_rows = keep


cdef inline void close_seq(Core* c, Seq* seq) noexcept nogil:
    """Give back blocks, memory and slot."""
    cdef int32_t slot = <int32_t>(seq - c.seqs)
    check(seq.kind != UNUSED and seq.open_steps == 0, b"a sequence that ends is there, and in no open step")
    release_rows(c, seq, 0)
    set_last_node(&c.pool.tree, seq, 0)
    if c.pool.states.num_slots:
        let_go_state(c, seq)
    clear_text(&seq.text)
    free(seq.table)
    seq.table = NULL
    if seq.handle > 0:
        spend_handle(seq)
    c.num_resting -= seq.kind == PIN or seq.kind == PREEMPTED
    seq.kind = UNUSED
    c.num_slots -= 1
    if -seq.handle < MAX_GENERATION:        # else the slot is retired: its next handle would repeat an old one
        seq.num_cached = c.unused_seq
        c.unused_seq = slot
    else:
        c.max_seqs -= 1


cdef inline bint grow_table(Seq* seq, int32_t num_rows, int32_t num_groups) noexcept nogil:
    cdef int64_t capacity
    cdef int32_t* table
    if num_rows <= seq.table_capacity:
        return True
    capacity = min(<int64_t>num_rows + num_rows // 4 + 8, MAX_INT32)
    table = <int32_t*>regrow(seq.table, capacity * num_groups * sizeof(int32_t))
    if table == NULL:
        return False
    seq.table = table
    seq.table_capacity = <int32_t>capacity
    return True


cdef inline void cut(Core* c, Seq* seq, int32_t num_tokens) noexcept nogil:
    """Drop tokens, and blocks that no reserved token needs any more. Blocks that stay are left as they are."""
    cdef int32_t keep, last_node = seq.last_node, _i
    if num_tokens < seq.text.num_tokens:
        cut_text(&c.pool.tree.paging, &seq.text, num_tokens)
        cut_extras(&seq.text, num_tokens, c.block_size)
    seq.num_cached = min(seq.num_cached, num_tokens)
    seq.num_computed = min(seq.num_computed, num_tokens)
    seq.num_prepared = min(seq.num_prepared, num_tokens)
    seq.reserved = min(seq.reserved, num_tokens)
    keep = blocks_for(seq.reserved, c.block_size)
    if seq.published > num_tokens // c.block_size:
        for _i in range(seq.published - num_tokens // c.block_size):
            check(last_node > 0, b"a sequence has a node for each block that it published")
            last_node = node_at(&c.pool.tree, last_node).parent
        seq.published = num_tokens // c.block_size
        set_last_node(&c.pool.tree, seq, last_node)
    if keep < seq.num_rows:
        release_rows(c, seq, keep)
        touch(c, seq)


cdef inline bint core_unpin(Core* c, int64_t handle, Fault* f) noexcept nogil:
    cdef Seq* seq = find_any(c, handle, 0, f)
    if seq == NULL:
        return False
    if seq.kind != PIN:
        return fail(f, IS_SEQUENCE, 0, handle, 0)
    close_seq(c, seq)
    return True


cdef inline bint are_ids(const Ints* tokens, Py_ssize_t i, int64_t first, int64_t n, Fault* f) noexcept nogil:
    """Whether there are n elements from `first` on, for the sequence at i, and each of them is a token id."""
    cdef int64_t j, token
    if n > tokens.size - first:
        return fail(f, SIZE_TOKENS, i, first + n, tokens.size)
    for j in range(first, first + n):
        token = at(tokens, j)
        if token < 0 or token > MAX_INT32:
            return fail(f, BAD_TOKEN, j, token, 0)
    return True


cdef inline bint core_append(Core* c, const Ints* seqs, const Ints* tokens, Fault* f) noexcept nogil:
    """Add one token to each, or a placeholder without tokens: `core_extend` for the common case."""
    cdef Py_ssize_t i, n = seqs.size
    cdef Seq* seq
    cdef Text* x
    cdef const Paging* p = &c.pool.tree.paging
    c.serial += 1
    for i in range(n):
        seq = find(c, at(seqs, i), i, f)
        if seq == NULL or not mark(seq, c.serial, i, f):
            return False
        if tokens != NULL and not are_ids(tokens, i, i, 1, f):
            return False
        if seq.text.num_tokens == seq.text.capacity:
            if seq.text.num_tokens == MAX_INT32:
                return fail(f, TOO_LONG, i, 1, MAX_INT32)
            if not grow_text(p, &seq.text, <int64_t>seq.text.num_tokens + 1):
                return fail(f, NO_MEMORY, i, 0, 0)
    if tokens != NULL and n != tokens.size:
        return fail(f, SIZE_TOKENS, -1, n, tokens.size)
    for i in range(n):
        x = &of(c, seqs, i).text
        check(x.num_tokens < x.capacity and x.tail[PAGE_REFS] == 1, b"a text writes into pages of its own")
        x.tail[offset_in_page(p, x.num_tokens)] = <int32_t>at(tokens, i) if tokens != NULL else -1
        x.num_tokens += 1
        if tokens == NULL:
            x.num_unknown += 1
        elif x.num_unknown == 0:
            x.known = x.num_tokens
    return True


cdef inline int32_t next_block(const Core* c, const Text* x, const Mark* m) noexcept nogil:
    return <int32_t>((x.num_tokens + m.position) // c.block_size)


cdef inline bint plan_marks(Core* c, const Ints* seqs, const Marks* m, Fault* f) noexcept nogil:
    """Make the extras of each sequence as they will be, in m.made."""
    cdef Py_ssize_t i, k = 0
    cdef int64_t size
    for i in range(seqs.size):
        if m.counts[i]:
            size = add_extras(&of(c, seqs, i).text, m.marks + k, m.counts[i], c.block_size, &m.made[i])
            if size:
                while i:
                    i -= 1
                    k -= m.counts[i]
                    if m.counts[i]:
                        drop_extras(&m.made[i], next_block(c, &of(c, seqs, i).text, m.marks + k))
                return fail(f, NO_MEMORY, 0, 0, 0) if size < 0 else fail(f, EXTRA_SIZE, i, size, MAX_INT32)
        k += m.counts[i]
    return True


cdef inline bint core_extend(
    Core* c, const Ints* seqs, const Ints* tokens, const Ints* counts, const Marks* m, Fault* f
) noexcept nogil:
    """Add counts[i] tokens to each (one without counts), or placeholders without tokens; the extra bytes are in `m`."""
    cdef Py_ssize_t i, j = 0, k = 0
    cdef int64_t n
    cdef Seq* seq
    c.serial += 1
    for i in range(seqs.size):
        seq = find(c, at(seqs, i), i, f)
        if seq == NULL or not mark(seq, c.serial, i, f):
            return False
        n = 1 if counts == NULL else at(counts, i)
        if n < 0:
            return fail(f, BAD_COUNT, i, n, 0)
        if n > MAX_INT32 - seq.text.num_tokens:
            return fail(f, TOO_LONG, i, n, seq.text.num_tokens)
        if tokens != NULL and not are_ids(tokens, i, k, n, f):
            return False
        k += n
        if not grow_text(&c.pool.tree.paging, &seq.text, seq.text.num_tokens + n):
            return fail(f, NO_MEMORY, i, 0, 0)
    if tokens != NULL and k != tokens.size:
        return fail(f, SIZE_TOKENS, -1, k, tokens.size)
    if m != NULL and not plan_marks(c, seqs, m, f):
        return False
    k = 0
    for i in range(seqs.size):
        seq = of(c, seqs, i)
        n = 1 if counts == NULL else at(counts, i)
        if m != NULL and m.counts[i]:
            take_extras(&seq.text, &m.made[i], next_block(c, &seq.text, m.marks + j))
            j += m.counts[i]
        extend_text(&c.pool.tree.paging, &seq.text, tokens, k, <int32_t>n)
        k += n
    return True


cdef inline bint core_set_tokens(
    Core* c, const Ints* seqs, const Ints* tokens, const Ints* counts, Fault* f
) noexcept nogil:
    """Give each sequence's first counts[i] placeholders their ids."""
    cdef Py_ssize_t i, k = 0
    cdef int64_t n
    cdef int32_t* token
    cdef const Paging* p = &c.pool.tree.paging
    cdef Text* x
    cdef Seq* seq
    c.serial += 1
    for i in range(seqs.size):
        seq = find(c, at(seqs, i), i, f)
        if seq == NULL or not mark(seq, c.serial, i, f):
            return False
        n = 1 if counts == NULL else at(counts, i)
        if n < 0:
            return fail(f, BAD_COUNT, i, n, 0)
        if n > seq.text.num_unknown:
            return fail(f, NOT_UNKNOWN, i, n, seq.text.num_unknown)
        if not are_ids(tokens, i, k, n, f):
            return False
        k += n
        if not own_placeholders(p, &seq.text, <int32_t>n):
            return fail(f, NO_MEMORY, i, 0, 0)
    if k != tokens.size:
        return fail(f, SIZE_TOKENS, -1, k, tokens.size)
    k = 0
    for i in range(seqs.size):
        x = &of(c, seqs, i).text
        n = 1 if counts == NULL else at(counts, i)
        x.num_unknown -= <int32_t>n
        while n:
            token = token_at(p, x, x.known)
            if token[0] < 0:
                check(x.pages[page_of(p, x.known)][PAGE_REFS] == 1, b"a text writes into pages of its own")
                token[0] = <int32_t>at(tokens, k)
                k += 1
                n -= 1
            x.known += 1
        while x.known < x.num_tokens and token_at(p, x, x.known)[0] >= 0:
            x.known += 1
    return True


cdef inline void preempt(Core* c, Seq* seq) noexcept nogil:
    release_rows(c, seq, 0)
    set_last_node(&c.pool.tree, seq, 0)
    if c.pool.states.num_slots:
        let_go_state(c, seq)
    seq.num_cached = seq.num_computed = seq.num_prepared = seq.reserved = seq.published = 0
    seq.kind = PREEMPTED
    c.num_resting += 1
    touch(c, seq)
    c.counters.preemptions += 1


cdef inline bint core_trim(Core* c, int64_t handle, int64_t num_tokens, Fault* f) noexcept nogil:
    cdef int32_t g, held
    cdef Seq* seq = find(c, handle, 0, f)
    if seq == NULL:
        return False
    if num_tokens < 0 or num_tokens > seq.text.num_tokens:
        return fail(f, BAD_TRIM, 0, num_tokens, seq.text.num_tokens)
    if seq.open_steps:
        return fail(f, IN_STEP, 0, handle, seq.last_step)
    if num_tokens < seq.num_computed and c.pool.states.num_slots and standing_on(c, seq):
        preempt(c, seq)     # its state cannot go back
    if num_tokens < seq.num_computed and c.reach_ends:
        for g in range(c.num_groups):
            held = first_row(c, g, seq.num_computed)
            if min(held, blocks_for(num_tokens, c.block_size)) > first_row(c, g, <int32_t>num_tokens):
                return fail(f, OUT_OF_REACH, g, num_tokens, <int64_t>held * c.block_size)
    cut(c, seq, <int32_t>num_tokens)
    return True


cdef inline void copy_progress(Seq* target, const Seq* source) noexcept nogil:
    """How far a child has come: as far as its parent, with slots for what is computed and no more."""
    target.num_cached = source.num_cached
    target.num_computed = target.num_prepared = target.reserved = source.num_computed
    target.published = source.published
    target.last_node = source.last_node
    target.publishing = source.publishing


cdef inline bint copy_seq(Core* c, Seq* source, int32_t first, Seq* target) noexcept nogil:
    """Fill the memory of a child: its text, and its table from row `first` on; no references to blocks yet. False:
    nothing allocated."""
    cdef int32_t n = blocks_for(source.num_computed, c.block_size) - first
    target.table = NULL
    target.table_capacity = 0
    target.mark = needs_of(c, source)   # for `adopt` and `take_copy`: a copy is in no batch
    if not share_text(&c.pool.tree.paging, &target.text, &source.text):
        return False
    if not grow_table(target, n + 1, c.num_groups):
        clear_text(&target.text)
        return False
    memcpy(target.table, row_at(c, source, first), <size_t>n * c.num_groups * sizeof(int32_t))
    target.num_rows = n
    copy_progress(target, source)
    return True


cdef inline void drop_copy(Seq* made) noexcept nogil:
    """Take back `copy_seq`."""
    clear_text(&made.text)
    free(made.table)


cdef inline bint is_at_rest(const Seq* seq, Py_ssize_t i, Fault* f) noexcept nogil:
    if seq.kind == PREEMPTED:
        return fail(f, IS_PREEMPTED, i, seq.handle, 0)
    if seq.open_steps:
        return fail(f, IN_STEP, i, seq.handle, seq.last_step)
    return True


cdef inline bint can_fork(const Seq* seq, Py_ssize_t i, Fault* f) noexcept nogil:
    """A computed block is shared only when its ids are known: else two sequences could give it two names."""
    if seq.text.num_unknown and seq.text.known < seq.num_computed:
        return fail(f, COMPUTED_UNKNOWN, i, seq.handle, seq.text.known)
    return is_at_rest(seq, i, f)


cdef inline bint core_fork(Core* c, int64_t handle, int64_t n, int64_t* children, Fault* f) noexcept nogil:
    cdef Seq* parent = find(c, handle, 0, f)
    cdef Seq* copies
    cdef Seq* child
    cdef int64_t i
    if parent == NULL or not can_fork(parent, 0, f):
        return False
    if n > MAX_INT32 or not has_room(c, <int32_t>n, f):
        return fail(f, NO_SLOTS, 0, c.num_slots, c.max_seqs)
    copies = <Seq*>grab(n * sizeof(Seq))
    if copies == NULL:
        return fail(f, NO_MEMORY, 0, 0, 0)
    for i in range(n):
        if not copy_seq(c, parent, 0, &copies[i]):
            while i:
                i -= 1
                drop_copy(&copies[i])
            free(copies)
            return fail(f, NO_MEMORY, 0, 0, 0)
    for i in range(n):
        child = open_seq(c, LIVE)
        adopt(c, child, &copies[i])
        share(c, child)
        if c.pool.states.num_slots:
            share_state(&c.pool.states, <int32_t>(parent - c.seqs), <int32_t>(child - c.seqs))
        children[i] = child.handle
    free(copies)
    return True


cdef inline void share(Core* c, const Seq* seq) noexcept nogil:
    """One more reference to all that a sequence made by `copy_seq` names."""
    cdef int64_t i
    for i in range(<int64_t>seq.num_rows * c.num_groups):
        if seq.table[i] >= 0:
            c.pool.blocks[seq.table[i]].refs += 1
    if seq.last_node:
        node_at(&c.pool.tree, seq.last_node).uses += 1


cdef inline void adopt(Core* c, Seq* seq, const Seq* made) noexcept nogil:
    """Take over what `copy_seq` made."""
    if c.pool.host.num_slots:
        wait_for(c, seq, made.mark)
    seq.text = made.text
    seq.table = made.table
    seq.table_capacity = made.table_capacity
    seq.num_rows = made.num_rows
    copy_progress(seq, made)


cdef inline int32_t common_rows(const Core* c, const Seq* parent, const Seq* seq) noexcept nogil:
    """Leading rows of a parent's table that are the same in the table of the sequence that is to become its child."""
    cdef int32_t n = min(blocks_for(parent.num_computed, c.block_size), seq.num_rows)
    return <int32_t>(kvb_same(parent.table, seq.table, <int64_t>n * c.num_groups) // c.num_groups)


cdef inline void take_copy(Core* c, Seq* seq, int32_t first, Seq* made) noexcept nogil:
    """Put what `copy_seq` made, its references counted already, in place of what a sequence has from row `first` on.
    Its table has the room."""
    release_rows(c, seq, first)
    if seq.last_node:
        tree_drop(&c.pool.tree, seq.last_node)
    clear_text(&seq.text)
    seq.text = made.text
    memcpy(row_at(c, seq, first), made.table, <size_t>made.num_rows * c.num_groups * sizeof(int32_t))
    seq.num_rows = first + made.num_rows
    if c.pool.states.num_slots:
        let_go_state(c, seq)
        c.pool.states.standing[seq - c.seqs].slot = <int32_t>made.handle
        c.pool.states.standing[seq - c.seqs].checkpoint = 0
    if c.pool.host.num_slots:
        c.pool.host.needs[seq - c.seqs] = made.mark
    copy_progress(seq, made)
    free(made.table)
    touch(c, seq)


cdef inline bint core_reorder(Core* c, const Ints* seqs, const Ints* parents, Fault* f) noexcept nogil:
    """Each sequence becomes a child of its parent as it was before the call, under its own handle.

    Beams have most of their tokens in common: the rows in which their tables are the same stay as they are.
    """
    cdef Seq* copies
    cdef Seq* seq
    cdef Seq* parent
    cdef Py_ssize_t i
    cdef bint made = True
    cdef int32_t* firsts
    c.serial += 1
    for i in range(seqs.size):
        seq = find(c, at(seqs, i), i, f)
        if seq == NULL or not mark(seq, c.serial, i, f) or find(c, at(parents, i), i, f) == NULL:
            return False
    for i in range(seqs.size):
        if not is_at_rest(of(c, seqs, i), i, f) or not can_fork(of(c, parents, i), i, f):
            return False
    copies = <Seq*>grab_zeroed(max(seqs.size, <Py_ssize_t>1), sizeof(Seq))
    firsts = <int32_t*>grab_zeroed(max(seqs.size, <Py_ssize_t>1), sizeof(int32_t))
    for i in range(seqs.size if copies != NULL and firsts != NULL else 0):
        seq, parent = of(c, seqs, i), of(c, parents, i)
        if seq != parent:
            firsts[i] = common_rows(c, parent, seq)
            made = grow_table(seq, blocks_for(parent.num_computed, c.block_size) + 1, c.num_groups)
            made = made and copy_seq(c, parent, firsts[i], &copies[i])
            if not made:
                break
    if copies == NULL or firsts == NULL or not made:
        for i in range(seqs.size if copies != NULL else 0):
            drop_copy(&copies[i])
        free(copies)
        free(firsts)
        return fail(f, NO_MEMORY, 0, 0, 0)
    for i in range(seqs.size):
        share(c, &copies[i])
        if c.pool.states.num_slots and at(seqs, i) != at(parents, i):
            copies[i].handle = standing_on(c, of(c, parents, i))    # as it is now: it may be a child of this call too
            if copies[i].handle:
                c.pool.states.slots[copies[i].handle - 1].refs += 1
    for i in range(seqs.size):
        if at(seqs, i) != at(parents, i):
            take_copy(c, of(c, seqs, i), firsts[i], &copies[i])
    free(copies)
    free(firsts)
    return True


cdef inline bint core_free(Core* c, const Ints* seqs, Fault* f) noexcept nogil:
    cdef Py_ssize_t i
    cdef Seq* seq
    c.serial += 1
    for i in range(seqs.size):
        seq = find(c, at(seqs, i), i, f)
        if seq == NULL or not mark(seq, c.serial, i, f):
            return False
    c.num_seqs -= <int32_t>seqs.size
    for i in range(seqs.size):
        seq = of(c, seqs, i)
        if seq.open_steps:
            seq.kind = LEAVING
            spend_handle(seq)
        else:
            close_seq(c, seq)
    return True


cdef inline void core_take_back(Core* c, int64_t handle, bint counted) noexcept nogil:
    """Undo `core_admit` or `core_fork` of a sequence that nobody has heard of. What was evicted for it is gone."""
    cdef Seq* seq = &c.seqs[handle & SLOT_MASK]
    if counted:
        c.counters.admitted -= 1
        c.counters.prompt_tokens -= seq.text.num_tokens
        c.counters.hit_tokens -= seq.num_cached
    c.num_seqs -= 1
    close_seq(c, seq)


cdef inline bint core_preempt(Core* c, int64_t handle, Fault* f) noexcept nogil:
    cdef Seq* seq = find(c, handle, 0, f)
    if seq == NULL or not is_at_rest(seq, 0, f):
        return False
    preempt(c, seq)
    return True


cdef inline void core_forget_resume(Core* c, int64_t handle, int64_t num_cached) noexcept nogil:
    """Let the counters say nothing of a `core_resume` that `core_preempt` has undone."""
    c.counters.resumed -= 1
    c.counters.preemptions -= 1
    c.counters.prompt_tokens -= c.seqs[handle & SLOT_MASK].text.num_tokens
    c.counters.hit_tokens -= num_cached


cdef inline void core_reset(Core* c) noexcept nogil:
    """Unpublish every block; sequences alive now publish no more, and pins hold nothing: nobody could reach it."""
    cdef Pool* p = &c.pool
    cdef int32_t i, b
    cdef int64_t j
    cdef uint32_t k
    cdef Seq* seq
    if p.states.num_slots:
        reset_checkpoints(&p.states)
    drop_slots(&p.host, &p.tree, &p.host.checkpoints)
    drop_slots(&p.host, &p.tree, &p.host.blocks)    # first: what is unpublished makes its slot the newest
    forget_work(&p.host, &p.tree)
    for i in range(c.fresh_seq):
        seq = &c.seqs[i]
        seq.publishing = False
        seq.published = 0
        set_last_node(&p.tree, seq, 0)
        for j in range(<int64_t>seq.num_rows * c.num_groups):
            if seq.table[j] >= 0 and p.blocks[seq.table[j]].node:
                unpublish(p, seq.table[j])
        if seq.kind == PIN:
            release_rows(c, seq, 0)
            if p.states.num_slots:
                let_go_state(c, seq)
    for i in range(p.num_steps):
        for j in range(pool_step(p, i).num_rows * c.num_groups):
            b = pool_step(p, i).sources[j]
            if b >= 0 and p.blocks[b].node:
                unpublish(p, b)
    for k in range(p.queue_tail - p.queue_head):
        b = p.queue[(p.queue_head + k) & p.queue_mask]
        if b >= 0:
            unpublish(p, b)
            p.stack[p.stack_size] = b
            p.stack_size += 1
    p.queue_head = p.host.cursor = p.queue_tail
    p.num_cached = p.host.examined = 0
