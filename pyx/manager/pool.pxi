# The pool: which blocks are free, who is next, and when a released block may be used again. Knows blocks, their nodes
# and open steps; knows no sequences.
#
# A block is free (on the stack, never used, or cached: on the LRU list), held (refs > 0), or waiting for an open step.
# Among cached blocks a child is always released before its parent, so the head of the LRU list is a leaf.


cdef struct Block:      # 16 bytes
    int32_t refs        # table entries, pins and pending copy sources that name it
    int32_t node        # where it is published, 0: nowhere
    int32_t prev        # LRU list
    int32_t next        # LRU list, or the waiting list of a step


cdef struct Row:        # one sequence in one open step
    int32_t slot
    int32_t start       # its tokens [start, start + count)
    int32_t count
    int32_t old_reserved
    int32_t old_blocks
    int32_t copy_source     # -1: none
    int64_t old_last_step


cdef struct Step:
    int64_t id
    Row* rows
    Py_ssize_t num_rows
    Py_ssize_t capacity
    int32_t wait_head   # blocks that wait for it, -1: none
    int32_t wait_tail


cdef struct Pool:
    int32_t num_blocks
    Block* blocks       # [num_blocks + 1]; the last is the LRU list's sentinel
    int32_t* stack
    int32_t stack_size
    int32_t fresh       # blocks from here on were never used
    int32_t num_cached
    int32_t num_waiting
    int64_t evictions
    Step* steps         # ring of open steps, oldest first
    int32_t max_steps
    int32_t first_step
    int32_t num_steps
    Tree tree


cdef inline Step* pool_step(const Pool* p, int32_t i) noexcept nogil:
    """The i-th oldest open step."""
    return &p.steps[(p.first_step + i) % p.max_steps]


cdef inline int32_t pool_free(const Pool* p) noexcept nogil:
    return p.stack_size + (p.num_blocks - p.fresh) + p.num_cached


cdef inline void lru_append(Pool* p, int32_t b) noexcept nogil:
    cdef int32_t end = p.num_blocks, tail = p.blocks[end].prev
    p.blocks[b].prev = tail
    p.blocks[b].next = end
    p.blocks[tail].next = b
    p.blocks[end].prev = b
    p.num_cached += 1


cdef inline void lru_remove(Pool* p, int32_t b) noexcept nogil:
    cdef int32_t prev = p.blocks[b].prev, next = p.blocks[b].next
    p.blocks[prev].next = next
    p.blocks[next].prev = prev
    p.num_cached -= 1


cdef inline void unpublish(Pool* p, int32_t b) noexcept nogil:
    tree_remove(&p.tree, p.blocks[b].node)
    p.blocks[b].node = 0


cdef inline int32_t take(Pool* p) noexcept nogil:
    """A block to write, with one reference. The caller has made sure that one is free."""
    cdef int32_t b
    if p.stack_size:
        p.stack_size -= 1
        b = p.stack[p.stack_size]
    elif p.fresh < p.num_blocks:
        b = p.fresh
        p.fresh += 1
    else:
        b = p.blocks[p.num_blocks].next
        lru_remove(p, b)
        unpublish(p, b)
        p.evictions += 1
    p.blocks[b].refs = 1
    return b


cdef void take_run(Pool* p, int32_t* out, int32_t n) noexcept nogil:
    """`take` n times. Evictions go in runs, so that the nodes of a run are on their way before the first is needed."""
    cdef int32_t i = 0, j, run, b
    cdef int32_t[RUN] victims
    cdef const Node* node
    while i < n and p.num_cached < pool_free(p):
        out[i] = take(p)
        i += 1
    while i < n:
        run = min(RUN, n - i)
        b = p.blocks[p.num_blocks].next
        for j in range(run):
            victims[j] = b
            kvb_prefetch(&p.tree.nodes[p.blocks[b].node])
            b = p.blocks[b].next
        for j in range(run):
            kvb_prefetch(&p.tree.buckets[p.tree.nodes[p.blocks[victims[j]].node].hash & p.tree.mask])
        for j in range(run):
            node = &p.tree.nodes[p.blocks[victims[j]].node]
            kvb_prefetch(&p.tree.nodes[p.tree.buckets[node.hash & p.tree.mask]])
        for j in range(run):
            node = &p.tree.nodes[p.blocks[victims[j]].node]
            kvb_prefetch(&p.tree.nodes[p.tree.nodes[p.tree.buckets[node.hash & p.tree.mask]].next])
        for j in range(run):
            out[i + j] = take(p)
        i += run


cdef inline void acquire(Pool* p, int32_t b) noexcept nogil:
    """One more reference to a block that is held or cached."""
    if p.blocks[b].refs == 0:
        lru_remove(p, b)
    p.blocks[b].refs += 1


cdef inline void settle(Pool* p, int32_t b, int64_t step_id) noexcept nogil:
    """Make a block without references free, or let it wait for the newest open step up to `step_id`.

    Only a block that lost a merge is named by an open step at this point, and such a block is never published:
    so the order of the LRU list does not depend on when steps close.
    """
    cdef int32_t i
    cdef Step* step
    for i in range(p.num_steps - 1 if step_id else -1, -1, -1):
        step = pool_step(p, i)
        if step.id <= step_id:
            p.blocks[b].next = -1
            if step.wait_head < 0:
                step.wait_head = b
            else:
                p.blocks[step.wait_tail].next = b
            step.wait_tail = b
            p.num_waiting += 1
            return
    if p.blocks[b].node:
        lru_append(p, b)
    else:
        p.stack[p.stack_size] = b
        p.stack_size += 1


cdef inline void release(Pool* p, int32_t b, int64_t step_id) noexcept nogil:
    """Drop a reference. `step_id` is the newest open step that names the block through it, 0: none."""
    p.blocks[b].refs -= 1
    if p.blocks[b].refs == 0:
        settle(p, b, step_id)


cdef void release_table(Pool* p, const int32_t* table, int32_t first, int32_t end) noexcept nogil:
    """Drop the references of table[first:end], the last one first, of a sequence in no open step."""
    cdef int32_t i
    for i in range(end - 1, first - 1, -1):
        release(p, table[i], 0)


cdef void close_waiting(Pool* p, const Step* step) noexcept nogil:
    """Settle again what waited for a step that has left the ring."""
    cdef int32_t b = step.wait_head, following
    while b >= 0:
        following = p.blocks[b].next
        p.num_waiting -= 1
        settle(p, b, step.id)
        b = following
