# The step transaction: prepare, then commit or abort. Several may be open; commit takes the oldest, abort the newest.
# `prepare` does everything that can fail, so that the other two cannot.

from libc.stdint cimport int32_t, int64_t, uint64_t

from core.checks cimport CHECKED, check
from core.memory cimport regrow
from core.ints cimport at, Ints
from core.text cimport block_at, Extra, extra_of
from core.tree cimport (
    RUN, hash_run, kvb_prefetch_write, line_of, Node, node_at, tokens_at, Tree, tree_find, tree_hash, tree_insert,
)
from core.host cimport evict_slot, oldest_slot
from core.pool cimport (
    LENT, acquire, Block, close_waiting, hand_out, Pool, pool_free, pool_step, release, release_table, Step, StepRow,
)
from core.sequences cimport (
    BAD_ACCEPTED, BAD_QUERY, IS_PREEMPTED, LATER_STEP, LEAVING, NO_BLOCKS, NO_MEMORY, NO_STEP, NOT_ENOUGH_TOKENS,
    NOT_NEWEST, NOT_OLDEST, PREEMPTED, SIZE_ACCEPTED, STEP_BLOCKS, STEP_GROUPS, STEP_LIMIT, STEP_SEQS,
    STEP_STATES, STEP_TOKENS, UNMOVED, block_of, blocks_for, close_seq, Core, cut, fail, Fault, find, first_row,
    grow_table, mark, note_peak, needs_of, release_rows, row_at, Seq, take_for, touch, wait_for,
)
from core.state_rows cimport (
    leave_checkpoints, pad_states, plan_own, plan_states, prepare_own, prepare_states, preempt_lost, return_states,
    settle_states,
)
from core.arrays cimport GROUPS_AT_ONCE, fill_many_slots, fill_pages, fill_slots, fill_tokens, pad_after, sync_row
from kvblocks.step_arrays cimport Arrays


cdef inline bint may_write(const Core* c, int32_t b) noexcept nogil:
    return c.pool.blocks[b].refs == 1 and c.pool.blocks[b].node == 0


cdef inline int32_t plan_copies(const Core* c, const Seq* seq, int32_t* sources) noexcept nogil:
    """Note in `sources` the blocks that the next token is written into and may not be, one for each group or -1."""
    cdef int32_t g, index = block_of(c, seq.num_prepared), n = 0
    cdef const int32_t* blocks = row_at(c, seq, index)
    for g in range(c.num_groups):
        sources[g] = -1
        if index < seq.num_rows and not may_write(c, blocks[g]):
            sources[g] = blocks[g]
            n += 1
    return n


cdef inline int32_t plan_in_place(Core* c, Step* step) noexcept nogil:
    """Let one row write in place a block that no one but rows of this step holds; how many copies that saves.

    It is the last row of those that have the most tokens in the block: whatever it writes lies past what the others
    still have there when the step is aborted. Copies are made before the pass, so the others read it before the write.
    """
    cdef Py_ssize_t i, num = step.num_rows * c.num_groups
    cdef int32_t saved = 0
    cdef Block* block
    for i in range(num):
        if step.sources[i] >= 0:
            block = &c.pool.blocks[step.sources[i]]
            block.refs -= 1         # 0 once all who hold it are known to be rows of this step
            block.link = 0         # of held blocks it is free to be used
    for i in range(num):
        if step.sources[i] >= 0:
            block = &c.pool.blocks[step.sources[i]]
            block.link = max(block.link, step.rows[i // c.num_groups].start)
    for i in range(num - 1, -1, -1):
        if step.sources[i] >= 0:
            block = &c.pool.blocks[step.sources[i]]
            if block.refs == 0 and block.node == 0 and block.link == step.rows[i // c.num_groups].start:
                block.refs = 1
                block.link = -1
                step.sources[i] = -1
                step.rows[i // c.num_groups].num_copies -= 1
                saved += 1
    for i in range(num):
        if step.sources[i] >= 0:
            block = &c.pool.blocks[step.sources[i]]
            block.refs += 1
            if block.link < 0:
                step.sources[i] = LENT - step.sources[i]
    return saved


cdef inline bint grow_step(Step* step, Py_ssize_t capacity, int32_t num_groups) noexcept nogil:
    cdef StepRow* rows = <StepRow*>regrow(step.rows, capacity * sizeof(StepRow))
    cdef int32_t* sources
    if rows == NULL:
        return False
    step.rows = rows
    sources = <int32_t*>regrow(step.sources, capacity * num_groups * sizeof(int32_t))
    if sources == NULL:
        return False
    step.sources = sources
    step.capacity = capacity
    return True


cdef inline bint plan_step(
    Core* c, const Ints* seqs, const Ints* query_lens, Arrays* a, Step* step, bint keep, bint own, Fault* f
) noexcept nogil:
    """Check a batch, find the memory for it, and note in step.rows what is to be done. No effect."""
    cdef Py_ssize_t i, n = seqs.size
    cdef int64_t q, end, needed = 0, num_tokens = 0, num_copies = 0, available = pool_free(&c.pool)
    cdef int32_t num_rows
    cdef Seq* seq
    cdef StepRow* row
    if n > a.max_seqs:
        return fail(f, STEP_SEQS, 0, n, a.max_seqs)
    if a.num_groups != c.num_groups:
        return fail(f, STEP_GROUPS, 0, c.num_groups, a.num_groups)
    if c.pool.states.num_slots and a.state_slots == NULL:
        return fail(f, STEP_STATES, 0, c.pool.states.num_slots, 0)
    if n > step.capacity and not grow_step(step, n * 2, c.num_groups):
        return fail(f, NO_MEMORY, 0, 0, 0)
    c.serial += 1
    for i in range(n):
        seq = find(c, at(seqs, i), i, f)
        if seq == NULL or not mark(seq, c.serial, i, f):
            return False
        if seq.kind == PREEMPTED:
            return fail(f, IS_PREEMPTED, i, seq.handle, 0)
        q = query_lens.value if query_lens.scalar else at(query_lens, i)
        if q < 1:
            return fail(f, BAD_QUERY, i, q, 0)
        if q > seq.text.num_tokens - seq.num_prepared:
            return fail(f, NOT_ENOUGH_TOKENS, i, q, seq.text.num_tokens - seq.num_prepared)
        num_tokens += q
        end = seq.num_prepared + q
        num_rows = seq.num_rows
        if end > <int64_t>num_rows * c.block_size:
            num_rows = blocks_for(end, c.block_size)
            needed += <int64_t>(num_rows - seq.num_rows) * c.num_groups
            if not grow_table(seq, num_rows, c.num_groups):
                return fail(f, NO_MEMORY, i, 0, 0)
        if num_rows > a.max_blocks_per_seq:
            return fail(f, STEP_BLOCKS, i, num_rows, a.max_blocks_per_seq)
        row = &step.rows[i]
        row.slot = <int32_t>(seq - c.seqs)
        row.start = seq.num_prepared
        row.count = <int32_t>q
        row.old_reserved = seq.reserved
        row.old_rows = seq.num_rows
        row.old_last_step = seq.last_step
        row.num_copies = plan_copies(c, seq, step.sources + i * c.num_groups)
        num_copies += row.num_copies
    if num_tokens > a.max_tokens:
        return fail(f, STEP_TOKENS, 0, num_tokens, a.max_tokens)
    step.num_rows = n
    if num_copies > 1:
        num_copies -= plan_in_place(c, step)
    needed += num_copies
    if needed > available:
        return fail(f, NO_BLOCKS, 0, needed, available)
    step.own = own
    if c.pool.states.num_slots and not (
        plan_own(c, step, f) if own else plan_states(c, step, num_tokens, keep, f)
    ):
        return False
    if c.pool.moves.handed > c.pool.moves.marked:
        return fail(f, UNMOVED, 0, c.pool.moves.handed, c.pool.moves.marked)
    step.wait_head = step.wait_tail = -1
    return True


cdef inline int32_t put_copies(Core* c, Seq* seq, int32_t index, int32_t* sources, int64_t* pairs) noexcept nogil:
    """Put blocks of its own in place of those that the sequence may not write, with (source, target) of each."""
    cdef int32_t g, n = 0
    cdef int32_t* blocks = row_at(c, seq, index)
    for g in range(c.num_groups):
        if sources[g] != -1:
            if sources[g] <= LENT:
                c.pool.blocks[blocks[g]].refs -= 1
            pairs[2 * n] = blocks[g]
            pairs[2 * n + 1] = blocks[g] = take_for(c, seq)
            n += 1
    touch(c, seq)
    return n


cdef inline void check_written(const Core* c, const StepRow* row) noexcept nogil:
    """Assert that a row of a step writes into blocks that its sequence alone holds, and that nobody finds."""
    cdef int32_t g, j
    for j in range(block_of(c, row.start), block_of(c, row.start + row.count - 1) + 1):
        for g in range(c.num_groups):
            check(may_write(c, row_at(c, &c.seqs[row.slot], j)[g]), b"a block that is written has one holder")


cdef inline int64_t core_prepare(
    Core* c, const Ints* seqs, const Ints* query_lens, Arrays* a, bint keep, bint own, Fault* f
) noexcept nogil:
    """Reserve the next tokens of each sequence and fill the arrays; the step's id, 0 after a fault. With `keep` the
    states after each token are kept until `commit`; with `own` the caller keeps those of all rows."""
    cdef Py_ssize_t i, num_copies = 0, num_moved
    cdef int64_t j, needs = 0
    cdef int32_t end, num_tokens = 0, longest_query = 0, longest_seq = 0
    cdef Step* step
    cdef Seq* seq
    cdef StepRow* row
    if c.pool.num_steps == c.pool.max_steps:
        fail(f, STEP_LIMIT, 0, c.pool.num_steps, c.pool.max_steps)
        return 0
    step = pool_step(&c.pool, c.pool.num_steps)
    if not plan_step(c, seqs, query_lens, a, step, keep, own, f):
        return 0
    c.last_step_id += 1
    c.pool.num_steps += 1
    step.id = c.last_step_id
    for i in range(step.num_rows):
        row = &step.rows[i]
        seq = &c.seqs[row.slot]
        end = row.start + row.count
        if row.num_copies:
            num_copies += put_copies(
                c, seq, block_of(c, row.start), step.sources + i * c.num_groups, a.copies + 2 * num_copies
            )
        if end > seq.reserved:
            seq.reserved = end
            if end > <int64_t>seq.num_rows * c.block_size:
                seq.num_rows = blocks_for(end, c.block_size)
                for j in range(<int64_t>row.old_rows * c.num_groups, <int64_t>seq.num_rows * c.num_groups):
                    seq.table[j] = take_for(c, seq)
        if c.pool.host.num_slots:
            needs = max(needs, needs_of(c, seq))
        seq.num_prepared = end
        seq.last_step = step.id
        seq.open_steps += 1
        sync_row(a, i, c, seq)
        fill_tokens(a, num_tokens, c, seq, row.start, row.count)
        if c.num_groups <= GROUPS_AT_ONCE:
            fill_slots(a, num_tokens, c, seq, row.start, row.count, 0, c.num_groups)
        a.seq_lens[i] = end
        a.query_start_loc[i] = num_tokens
        num_tokens += row.count
        longest_query = max(longest_query, row.count)
        longest_seq = max(longest_seq, end)
    if c.num_groups > GROUPS_AT_ONCE:
        fill_many_slots(a, c, step)
    if CHECKED:
        for i in range(step.num_rows):
            check_written(c, &step.rows[i])
    a.fills += 1
    pad_after(a, step.num_rows, num_tokens)
    if a.kv_indices != NULL:
        fill_pages(a, c, step)
    num_moved = num_copies
    if a.state_slots != NULL:
        a.num_state_copies = a.num_state_zero = 0
        if c.pool.states.num_slots:
            needs = max(needs, prepare_own(c, step, a) if own else prepare_states(c, step, a))
            num_moved += a.num_state_copies + a.num_state_zero
        pad_states(a, step.num_rows if c.pool.states.num_slots else 0, num_tokens if keep or own else 0)
    c.pool.moves.noted += num_moved
    if num_moved:
        needs = c.pool.moves.noted
    a.needs = needs if needs > c.pool.moves.landed else 0
    a.first_move = c.pool.moves.handed + 1
    step.last_move = a.last_move = hand_out(&c.pool, step.num_rows == 0)
    a.num_copies, a.max_query_len, a.max_seq_len = num_copies, longest_query, longest_seq
    c.counters.copies += num_copies
    note_peak(c)
    return step.id


cdef inline bint shared_unpublished(const Core* c, const int32_t* blocks) noexcept nogil:
    """Whether another sequence holds one of a row's blocks: a fork shared it before all its ids were known. Such a
    block is not published: the other sequence could still hold it when the published block before it is evicted."""
    cdef int32_t g
    for g in range(c.num_groups):
        if blocks[g] >= 0 and c.pool.blocks[blocks[g]].refs > 1:
            return True
    return False


cdef inline void publish_row(Core* c, Seq* seq, int32_t* blocks, int32_t n) noexcept nogil:
    """Publish a row's blocks on its node. Where the node has a block already, the sequence takes that one instead."""
    cdef Pool* p = &c.pool
    cdef Node* node = node_at(&p.tree, n)
    cdef int32_t g, own
    for g in range(c.num_groups):
        own = blocks[g]
        if own < 0:
            continue
        if node.blocks[g] < 0:
            node.blocks[g] = own
            node.uses += 1
            p.blocks[own].node = n
            c.counters.published += 1
        else:
            blocks[g] = node.blocks[g]
            acquire(p, blocks[g])
            if p.host.num_slots:
                wait_for(c, seq, p.host.shadows[blocks[g]].load)
            release(p, own, seq.last_step)
            touch(c, seq)
            c.counters.merged += 1


cdef inline void publish(Core* c, Seq* seq, int32_t full, uint64_t first_hash) noexcept nogil:
    """Hang every full, computed, known block, those before row `full`, on its node. `first_hash` is the first one's."""
    cdef Pool* p = &c.pool
    cdef Tree* t = &p.tree
    cdef uint64_t[RUN] hashes
    cdef int32_t[RUN] likely
    cdef int32_t i, j, n, node, _j
    cdef int64_t k
    cdef const int32_t* tokens
    cdef int32_t* blocks
    cdef const Extra* extra
    cdef bint one = full - seq.published == 1
    while seq.published < full:
        i = seq.published
        if one:
            n, hashes[0], likely[0] = 1, first_hash, 0
        else:
            n = hash_run(t, node_at(t, seq.last_node).hash, &seq.text, i, full, hashes, likely)
        node = t.unused
        for _j in range(n):
            if node == 0:
                break
            kvb_prefetch_write(tokens_at(t, node))
            node = node_at(t, node).parent
        for k in range(<int64_t>i * c.num_groups, <int64_t>(i + n) * c.num_groups):
            if seq.table[k] >= 0:
                kvb_prefetch_write(&p.blocks[seq.table[k]])
        for j in range(n):
            blocks = row_at(c, seq, i + j)
            if shared_unpublished(c, blocks):
                return
            tokens = block_at(&t.paging, &seq.text, i + j)
            extra = extra_of(&seq.text, i + j)
            node = tree_find(t, seq.last_node, hashes[j], tokens, extra) if likely[j] >= 0 else 0
            if node:
                node_at(t, node).uses += 1
            else:
                while t.num_nodes >= t.max_nodes and p.host.num_slots and oldest_slot(&p.host, &p.host.blocks) >= 0:
                    evict_slot(&p.host, t, &p.host.blocks)
                node = tree_insert(t, seq.last_node, hashes[j], tokens, extra)
                if node == 0:
                    seq.publishing = False
                    return
            publish_row(c, seq, blocks, node)
            if seq.last_node:
                node_at(t, seq.last_node).uses -= 1   # never the last one: `node` is its child
            seq.last_node = node
            seq.published += 1


cdef inline void slide(Core* c, Seq* seq, int32_t computed_before) noexcept nogil:
    """Give back the blocks that went out of reach since so many tokens were computed. An open step may name them, but
    its queries come later and do not reach them either."""
    cdef int32_t g, i
    cdef int32_t* blocks
    for g in range(c.num_groups):
        for i in range(first_row(c, g, computed_before), first_row(c, g, seq.num_computed)):
            blocks = row_at(c, seq, i)
            release(&c.pool, blocks[g], 0)
            if c.pool.host.num_slots and c.pool.blocks[blocks[g]].refs == 0:
                c.pool.host.shadows[blocks[g]].slid = True
            blocks[g] = -1


cdef inline void close_step(Core* c, const Step* step) noexcept nogil:
    """What follows when a step has left the ring: waiting blocks first, then sequences freed while they were in it, and
    those whose state it took along."""
    cdef Py_ssize_t i
    cdef Seq* seq
    close_waiting(&c.pool, step)
    for i in range(step.num_rows):
        seq = &c.seqs[step.rows[i].slot]
        if seq.kind == LEAVING and seq.open_steps == 0:
            close_seq(c, seq)
    if c.pool.states.num_slots:
        preempt_lost(c, step)


cdef inline uint64_t hash_next(const Core* c, const Seq* seq) noexcept nogil:
    """The hash of the first block that is not published, its cache line on the way."""
    cdef const Tree* t = &c.pool.tree
    cdef uint64_t h = tree_hash(
        t, node_at(t, seq.last_node).hash, block_at(&t.paging, &seq.text, seq.published),
        extra_of(&seq.text, seq.published),
    )
    kvb_prefetch_write(&t.lines[line_of(t, h)])
    return h


cdef inline bint core_commit(Core* c, int64_t step_id, const Ints* accepted, Fault* f) noexcept nogil:
    cdef Pool* p = &c.pool
    cdef Step* step
    cdef Seq* seq
    cdef StepRow* row
    cdef Py_ssize_t i
    cdef int64_t n
    if p.num_steps == 0:
        return fail(f, NO_STEP, 0, step_id, 0)
    step = pool_step(p, 0)
    if step.id != step_id:
        return fail(f, NOT_OLDEST, 0, step_id, step.id)
    if step.last_move > p.moves.marked:
        return fail(f, UNMOVED, 0, step.last_move, p.moves.marked)
    if accepted != NULL:
        if accepted.size != step.num_rows:
            return fail(f, SIZE_ACCEPTED, 0, accepted.size, step.num_rows)
        for i in range(step.num_rows):
            n = at(accepted, i)
            if n < 0 or n > step.rows[i].count:
                return fail(f, BAD_ACCEPTED, i, n, step.rows[i].count)
            if n < step.rows[i].count and c.seqs[step.rows[i].slot].open_steps > 1:
                return fail(f, LATER_STEP, i, n, c.seqs[step.rows[i].slot].last_step)
    p.first_step = (p.first_step + 1) % p.max_steps
    p.num_steps -= 1
    if p.states.num_slots:
        settle_states(c, step, accepted)
    for i in range(step.num_rows):
        row = &step.rows[i]
        seq = &c.seqs[row.slot]
        if row.num_copies:
            release_table(p, step.sources, i * c.num_groups, (i + 1) * c.num_groups)
        check(seq.open_steps > 0, b"a sequence of a step counts it")
        seq.open_steps -= 1
        if seq.open_steps == 0:
            seq.last_step = 0
        n = row.count if accepted == NULL else at(accepted, i)
        seq.num_computed = row.start + <int32_t>n
        if n < row.count:
            cut(c, seq, seq.num_computed)
        row.full = 0
        if seq.publishing and seq.num_computed - seq.published * c.block_size >= c.block_size:
            row.full = block_of(c, min(seq.num_computed, seq.text.known))
            if row.full > seq.published:
                row.hash = hash_next(c, seq)
    for i in range(step.num_rows):
        row = &step.rows[i]
        seq = &c.seqs[row.slot]
        if row.full > seq.published:
            publish(c, seq, row.full, row.hash)
        if c.reach_ends:
            slide(c, seq, row.start)
    if c.pool.states.num_slots:
        leave_checkpoints(c, step)
    close_step(c, step)
    note_peak(c)
    return True


cdef inline bint core_abort(Core* c, int64_t step_id, bint launched, Fault* f) noexcept nogil:
    """Take back the newest step; `launched` says whether its pass may have begun."""
    cdef Pool* p = &c.pool
    cdef Step* step
    cdef Seq* seq
    cdef StepRow* row
    cdef Py_ssize_t i
    cdef int32_t g
    cdef int32_t* blocks
    cdef int32_t* sources
    if p.num_steps == 0:
        return fail(f, NO_STEP, 0, step_id, 0)
    step = pool_step(p, p.num_steps - 1)
    if step.id != step_id:
        return fail(f, NOT_NEWEST, 0, step_id, step.id)
    if p.host.num_slots == 0:   # copies-on-write alone: what was not copied need not be, the targets go back
        p.moves.marked = max(p.moves.marked, step.last_move)
    p.num_steps -= 1
    if p.states.num_slots:
        return_states(c, step, launched)
    for i in range(step.num_rows - 1, -1, -1):
        row = &step.rows[i]
        seq = &c.seqs[row.slot]
        if seq.num_rows > row.old_rows or row.num_copies:
            touch(c, seq)
        release_rows(c, seq, row.old_rows)
        if row.num_copies:
            blocks, sources = row_at(c, seq, block_of(c, row.start)), step.sources + i * c.num_groups
            for g in range(c.num_groups - 1, -1, -1):
                if sources[g] != -1:
                    release(p, blocks[g], 0)
                    blocks[g] = sources[g] if sources[g] >= 0 else LENT - sources[g]
                    p.blocks[blocks[g]].refs += sources[g] <= LENT
        seq.reserved = row.old_reserved
        seq.num_prepared = row.start
        check(seq.open_steps > 0, b"a sequence of a step counts it")
        seq.open_steps -= 1
        seq.last_step = row.old_last_step if seq.open_steps else 0
    close_step(c, step)
    return True
