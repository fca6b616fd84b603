# The step transaction: prepare, then commit or abort. Several may be open; commit takes the oldest, abort the newest.
# `prepare` does everything that can fail, so that the other two cannot.


cdef inline bint must_copy(Core* c, const Seq* seq) noexcept nogil:
    """Whether the block that the next token is written into is there but may not be written."""
    cdef int32_t index = block_of(c, seq.num_prepared)
    cdef const Block* block
    if index >= seq.num_blocks:
        return False
    block = &c.pool.blocks[seq.table[index]]
    return block.refs > 1 or block.node != 0


cdef bint plan_step(
    Core* c, const Ints* seqs, const Ints* query_lens, StepArrays a, Step* step, Fault* f
) noexcept nogil:
    """Check a batch, find the memory for it, and note in step.rows what is to be done. No effect."""
    cdef Py_ssize_t i, n = seqs.size
    cdef int64_t q, end, needed = 0, num_tokens = 0, available = pool_free(&c.pool)
    cdef int32_t num_blocks
    cdef Seq* seq
    cdef Row* row
    if n > a.max_seqs:
        return fail(f, STEP_SEQS, 0, n, a.max_seqs)
    if n > step.capacity:
        row = <Row*>regrow(step.rows, n * 2 * sizeof(Row))
        if row == NULL:
            return fail(f, NO_MEMORY, 0, 0, 0)
        step.rows = row
        step.capacity = n * 2
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
        num_blocks = seq.num_blocks
        if end > <int64_t>num_blocks * c.block_size:
            num_blocks = blocks_for(end, c.block_size)
            needed += num_blocks - seq.num_blocks
            if not grow_table(seq, num_blocks):
                return fail(f, NO_MEMORY, i, 0, 0)
        if num_blocks > a.max_blocks_per_seq:
            return fail(f, STEP_BLOCKS, i, num_blocks, a.max_blocks_per_seq)
        row = &step.rows[i]
        row.slot = <int32_t>(seq - c.seqs)
        row.start = seq.num_prepared
        row.count = <int32_t>q
        row.old_reserved = seq.reserved
        row.old_blocks = seq.num_blocks
        row.old_last_step = seq.last_step
        row.copy_source = -1
        if must_copy(c, seq):
            row.copy_source = seq.table[block_of(c, row.start)]
            needed += 1
    if num_tokens > a.max_tokens:
        return fail(f, STEP_TOKENS, 0, num_tokens, a.max_tokens)
    if needed > available:
        return fail(f, NO_BLOCKS, 0, needed, available)
    step.num_rows = n
    step.wait_head = step.wait_tail = -1
    return True


cdef int64_t core_prepare(Core* c, const Ints* seqs, const Ints* query_lens, StepArrays a, Fault* f) noexcept nogil:
    """Reserve the next tokens of each sequence and fill the arrays; the step's id, 0 after a fault."""
    cdef Py_ssize_t i, num_copies = 0
    cdef int32_t end, num_tokens = 0, longest_query = 0, longest_seq = 0
    cdef Step* step
    cdef Seq* seq
    cdef Row* row
    if c.pool.num_steps == c.pool.max_steps:
        fail(f, STEP_LIMIT, 0, c.pool.num_steps, c.pool.max_steps)
        return 0
    step = pool_step(&c.pool, c.pool.num_steps)
    if not plan_step(c, seqs, query_lens, a, step, f):
        return 0
    c.last_step_id += 1
    c.pool.num_steps += 1
    step.id = c.last_step_id
    for i in range(step.num_rows):
        row = &step.rows[i]
        seq = &c.seqs[row.slot]
        end = row.start + row.count
        if row.copy_source >= 0:
            a._copies[2 * num_copies] = row.copy_source
            a._copies[2 * num_copies + 1] = seq.table[block_of(c, row.start)] = take(&c.pool)
            num_copies += 1
            touch(c, seq)
        if end > seq.reserved:
            seq.reserved = end
            if end > <int64_t>seq.num_blocks * c.block_size:
                take_run(&c.pool, seq.table + seq.num_blocks, blocks_for(end, c.block_size) - seq.num_blocks)
                seq.num_blocks = blocks_for(end, c.block_size)
        seq.num_prepared = end
        seq.last_step = step.id
        seq.open_steps += 1
        sync_row(a, i, c.uid, seq)
        fill_tokens(a, num_tokens, seq, row.start, row.count, c.block_size, block_of(c, row.start))
        a._seq_lens[i] = end
        a._query_start_loc[i] = num_tokens
        num_tokens += row.count
        longest_query = max(longest_query, row.count)
        longest_seq = max(longest_seq, end)
    pad_after(a, step.num_rows, num_tokens)
    if a._kv_indices != NULL:
        fill_pages(a, step.num_rows, c.block_size)
    a.num_copies, a.max_query_len, a.max_seq_len = num_copies, longest_query, longest_seq
    c.counters.copies += num_copies
    note_peak(c)
    return step.id


cdef void publish(Core* c, Seq* seq) noexcept nogil:
    """Hang every full, computed, known block on its node; take the block that is there already where one is."""
    cdef Pool* p = &c.pool
    cdef Tree* t = &p.tree
    cdef uint64_t[RUN] hashes
    cdef int32_t i, j, n, node, own, full = block_of(c, min(seq.num_computed, seq.text.known))
    cdef int32_t* tokens
    cdef const Extra* extra
    while seq.published < full:
        i = seq.published
        n = hash_run(t, t.nodes[seq.tip].hash, &seq.text, i, full, hashes)
        node = t.unused
        for j in range(i, i + n):
            kvb_prefetch_write(&p.blocks[seq.table[j]])
            if node:
                kvb_prefetch_write(t.tokens + <size_t>node * c.block_size)
                node = t.nodes[node].next
        for j in range(i, i + n):
            own = seq.table[j]
            if p.blocks[own].refs > 1:
                # Shared by a fork before its ids were known. If it were published or merged now, the other holder
                # would hold a published block without the one before it, which could then be evicted first.
                return
            tokens = seq.text.tokens + <size_t>j * c.block_size
            extra = extra_of(&seq.text, j)
            node = tree_find(t, seq.tip, hashes[j - i], tokens, extra)
            if node:
                seq.table[j] = t.nodes[node].block
                acquire(p, seq.table[j])
                release(p, own, seq.last_step)
                touch(c, seq)
                c.counters.merged += 1
            else:
                node = tree_insert(t, seq.tip, hashes[j - i], tokens, extra, own)
                if node == 0:
                    seq.publishing = False
                    return
                p.blocks[own].node = node
                c.counters.published += 1
            seq.tip = node
            seq.published += 1


cdef void close_step(Core* c, const Step* step) noexcept nogil:
    """What follows when a step has left the ring: waiting blocks first, then sequences freed while they were in it."""
    cdef Py_ssize_t i
    cdef Seq* seq
    close_waiting(&c.pool, step)
    for i in range(step.num_rows):
        seq = &c.seqs[step.rows[i].slot]
        if seq.kind == LEAVING and seq.open_steps == 0:
            close_seq(c, seq)


cdef bint core_commit(Core* c, int64_t step_id, const Ints* accepted, Fault* f) noexcept nogil:
    cdef Pool* p = &c.pool
    cdef Step* step
    cdef Seq* seq
    cdef Row* row
    cdef Py_ssize_t i
    cdef int64_t n
    if p.num_steps == 0:
        return fail(f, NO_STEP, 0, step_id, 0)
    step = pool_step(p, 0)
    if step.id != step_id:
        return fail(f, NOT_OLDEST, 0, step_id, step.id)
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
    for i in range(step.num_rows):
        row = &step.rows[i]
        seq = &c.seqs[row.slot]
        if row.copy_source >= 0:
            release(p, row.copy_source, 0)
        seq.open_steps -= 1
        if seq.open_steps == 0:
            seq.last_step = 0
        n = row.count if accepted == NULL else at(accepted, i)
        seq.num_computed = row.start + <int32_t>n
        if n < row.count:
            cut(c, seq, seq.num_computed)
        if seq.publishing and seq.num_computed - seq.published * c.block_size >= c.block_size:
            publish(c, seq)
    note_peak(c)
    close_step(c, step)
    return True


cdef bint core_abort(Core* c, int64_t step_id, Fault* f) noexcept nogil:
    cdef Pool* p = &c.pool
    cdef Step* step
    cdef Seq* seq
    cdef Row* row
    cdef Py_ssize_t i
    cdef int32_t index
    if p.num_steps == 0:
        return fail(f, NO_STEP, 0, step_id, 0)
    step = pool_step(p, p.num_steps - 1)
    if step.id != step_id:
        return fail(f, NOT_NEWEST, 0, step_id, step.id)
    p.num_steps -= 1
    for i in range(step.num_rows - 1, -1, -1):
        row = &step.rows[i]
        seq = &c.seqs[row.slot]
        if seq.num_blocks > row.old_blocks or row.copy_source >= 0:
            touch(c, seq)
        release_table(p, seq.table, row.old_blocks, seq.num_blocks)
        seq.num_blocks = row.old_blocks
        if row.copy_source >= 0:
            index = block_of(c, row.start)
            release(p, seq.table[index], 0)
            seq.table[index] = row.copy_source
        seq.reserved = row.old_reserved
        seq.num_prepared = row.start
        seq.open_steps -= 1
        seq.last_step = row.old_last_step if seq.open_steps else 0
    close_step(c, step)
    return True
