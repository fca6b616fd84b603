# The pool: which blocks are free, who is next, and when a released block may be used again. Knows blocks, their nodes
# and open steps; knows no sequences.
#
# A block is free (on the stack, never used, or cached: in the queue), held (refs > 0), or waiting for an open step.
# The queue is a ring of cached blocks, the least recently used first; a block that is hit leaves a hole. An array, so
# that an eviction can fetch what the next ones will need. Of cached blocks of one full group a child is always
# released before its parent, so it is evicted first.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from core.checks cimport check
from core.tree cimport kvb_prefetch, kvb_prefetch_write, line_of, Node, node_at, Tree, tree_drop
from core.states cimport lose_anchor, state_take, StateRow, States
from core.host cimport (
    Host, Moves, cancel_load, check_anchor, count_moves, find_slot, hand_out_loads, hang_slot, note_offload,
    offload_checkpoints, queue_slot, slot_at, use_slot,
)


cdef enum:
    AHEAD = 16          # how many blocks ahead of its use a cache line is fetched
    LENT = -2


cdef struct Block:      # 12 bytes
    int32_t refs        # table entries, pins and pending copy sources that name it
    int32_t node        # where it is published, 0: nowhere
    int32_t link        # in the queue; or the next that waits for a step; scratch of `plan_in_place` while it is held


cdef struct StepRow:    # one sequence in one open step
    int32_t slot
    int32_t start       # its tokens [start, start + count)
    int32_t count
    int32_t old_reserved
    int32_t old_rows
    int32_t num_copies      # of blocks that it writes into and may not
    int32_t full            # `commit` publishes the rows of the table before this one
    int64_t old_last_step
    uint64_t hash           # of the first of these


cdef struct Step:
    int64_t id
    int64_t last_move   # the newest move that was handed out with it, 0: none
    StepRow* rows
    int32_t* sources    # [rows, groups]: b to copy from, -1: none; LENT - b: a row of the step writes b in place
    StateRow* states    # [rows], where a group keeps a state
    int32_t* drafts     # the slots that rows write their states to
    Py_ssize_t num_rows
    Py_ssize_t capacity
    Py_ssize_t draft_capacity
    bint keeps          # the state after each token
    bint own            # the caller keeps the states of its rows
    int32_t wait_head   # blocks that wait for it, -1: none
    int32_t wait_tail


cdef struct Pool:
    int32_t num_blocks
    Block* blocks
    int32_t* stack
    int32_t stack_size
    int32_t fresh       # blocks from here on were never used
    int32_t* queue      # [queue_mask + 1], -1: a hole
    uint32_t queue_mask
    uint32_t queue_head  # counts on for ever, as the tail does
    uint32_t queue_tail
    int32_t num_cached
    int32_t num_waiting
    int64_t evictions
    Step* steps         # ring of open steps, oldest first
    int32_t max_steps
    int32_t first_step
    int32_t num_steps
    Moves moves
    States states
    Host host
    Tree tree


cdef inline Step* pool_step(const Pool* p, int32_t i) noexcept nogil:
    """The i-th oldest open step."""
    check(0 <= i < p.max_steps, b"a step is one of the ring's")
    return &p.steps[(p.first_step + i) % p.max_steps]


cdef inline int32_t pool_free(const Pool* p) noexcept nogil:
    return p.stack_size + (p.num_blocks - p.fresh) + p.num_cached


cdef inline void queue_compact(Pool* p) noexcept nogil:
    """Close the holes. The queue has room for half as many holes as there are blocks, so this is rare."""
    cdef uint32_t i, end = p.queue_head
    cdef int32_t b
    p.host.cursor = p.queue_head + p.host.examined
    for i in range(p.queue_tail - p.queue_head):
        b = p.queue[(p.queue_head + i) & p.queue_mask]
        if b >= 0:
            p.queue[end & p.queue_mask] = b
            p.blocks[b].link = <int32_t>(end & p.queue_mask)
            end += 1
    p.queue_tail = end


cdef inline void queue_append(Pool* p, int32_t b) noexcept nogil:
    cdef uint32_t index
    if p.queue_tail - p.queue_head > p.queue_mask:
        queue_compact(p)
    index = p.queue_tail & p.queue_mask
    check(p.queue_tail - p.queue_head <= p.queue_mask, b"the queue has room for every cached block")
    p.queue[index] = b
    p.blocks[b].link = <int32_t>index
    p.queue_tail += 1
    p.num_cached += 1


cdef inline void queue_remove(Pool* p, int32_t b) noexcept nogil:
    check(0 <= p.blocks[b].link <= <int64_t>p.queue_mask, b"a cached block is in the queue")
    check(p.queue[p.blocks[b].link] == b, b"the queue has a cached block where the block says")
    if p.host.num_slots:
        p.host.shadows[b].slid = False
        if (<uint32_t>p.blocks[b].link - p.queue_head & p.queue_mask) < p.host.cursor - p.queue_head:
            p.host.examined -= 1
    p.queue[p.blocks[b].link] = -1
    p.num_cached -= 1


cdef inline void unpublish(Pool* p, int32_t b) noexcept nogil:
    cdef int32_t n = p.blocks[b].node, g = 0
    cdef Node* node = node_at(&p.tree, n)
    check(n > 0, b"a block that is unpublished was published")
    while node.blocks[g] != b:
        g += 1
        check(g < p.tree.num_groups, b"a published block hangs on its node")
    node.blocks[g] = -1
    p.blocks[b].node = 0
    if p.states.num_slots and g == p.states.anchor:
        if p.host.num_slots:
            check_anchor(&p.host, &p.tree, n)
        else:
            lose_anchor(&p.states, n)
    if p.host.num_slots:
        use_slot(&p.host, &p.tree, n, g)
    tree_drop(&p.tree, n)


cdef inline int32_t evict(Pool* p) noexcept nogil:
    """The block that was used longest ago, unpublished; there is one. Fetches for the evictions that will follow."""
    cdef uint32_t head = p.queue_head, mask = p.queue_mask
    cdef int32_t b = p.queue[head & mask], next
    while b < 0:
        head += 1
        b = p.queue[head & mask]
    check(<int32_t>(p.queue_tail - head) > 0, b"there is a cached block to evict")
    check(p.blocks[b].refs == 0, b"a block that is evicted is held by nobody")
    p.queue_head = head + 1
    p.num_cached -= 1
    if p.host.examined:
        p.host.examined -= 1
    else:
        p.host.cursor = p.queue_head
    # Past the tail lie blocks of before, or zeros: fetching for them is idle, no more.
    next = p.queue[(head + 3 * AHEAD) & mask]
    if next >= 0:
        kvb_prefetch_write(&p.blocks[next])
        if p.host.num_slots:
            kvb_prefetch_write(&p.host.shadows[next])
    next = p.queue[(head + 2 * AHEAD) & mask]
    if next >= 0:
        kvb_prefetch_write(node_at(&p.tree, p.blocks[next].node))
        if p.host.num_slots:
            kvb_prefetch(&p.host.slot_of[<int64_t>p.blocks[next].node * p.host.width])
    next = p.queue[(head + AHEAD) & mask]
    if next >= 0:
        kvb_prefetch_write(&p.tree.lines[line_of(&p.tree, node_at(&p.tree, p.blocks[next].node).hash)])
        if p.host.num_slots and slot_at(&p.host, &p.tree, p.blocks[next].node, 0) >= 0:
            kvb_prefetch_write(&p.host.slots[slot_at(&p.host, &p.tree, p.blocks[next].node, 0)])
    unpublish(p, b)
    p.evictions += 1
    return b


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
        b = evict(p)
    check(0 <= b < p.fresh, b"a free block is one of the pool's")
    check(p.blocks[b].refs == 0 and p.blocks[b].node == 0, b"a block is taken that nobody holds or finds")
    p.blocks[b].refs = 1
    if p.host.num_slots:
        cancel_load(&p.host, b)
        p.host.shadows[b].load = p.host.shadows[b].slid = 0
    return b


cdef inline int32_t take_state(Pool* p) noexcept nogil:
    """A slot for a state, with one reference. The caller has made sure that one is free."""
    cdef States* s = &p.states
    cdef int32_t i, evicted = 0
    if s.stack_size == 0 and s.fresh == s.num_slots:
        evicted = s.slots[s.oldest].node
    i = state_take(s)
    if p.host.checkpoints.num_slots:
        if evicted:
            use_slot(&p.host, &p.tree, evicted, p.tree.num_groups)
        cancel_load(&p.host, p.num_blocks + i)
        p.host.shadows[p.num_blocks + i].load = 0
    return i


cdef inline void acquire(Pool* p, int32_t b) noexcept nogil:
    """One more reference to a block that is held or cached."""
    check(0 <= b < p.fresh, b"a block that is shared is in use")
    check(p.blocks[b].refs > 0 or p.blocks[b].refs == 0 and p.blocks[b].node > 0, b"a shared block is held or cached")
    if p.blocks[b].refs == 0:
        queue_remove(p, b)
    p.blocks[b].refs += 1


cdef inline void settle(Pool* p, int32_t b, int64_t step_id) noexcept nogil:
    """Make a block without references free, or let it wait for the newest open step up to `step_id`.

    Only duplicates that were dropped at publication wait for a step. They are never cached, so the order of the LRU
    list does not depend on when steps close.
    """
    cdef int32_t i
    cdef Step* step
    for i in range(p.num_steps - 1 if step_id else -1, -1, -1):
        step = pool_step(p, i)
        if step.id <= step_id:
            p.blocks[b].link = -1
            if step.wait_head < 0:
                step.wait_head = b
            else:
                p.blocks[step.wait_tail].link = b
            step.wait_tail = b
            p.num_waiting += 1
            return
    if p.blocks[b].node:
        queue_append(p, b)
    else:
        check(p.stack_size < p.fresh, b"no block is free twice")
        p.stack[p.stack_size] = b
        p.stack_size += 1


cdef inline void release(Pool* p, int32_t b, int64_t step_id) noexcept nogil:
    """Drop a reference. `step_id` is the newest open step that names the block through it, 0: none."""
    check(0 <= b < p.fresh, b"a block that is released is in use")
    check(p.blocks[b].refs > 0, b"a block is held as often as it is released")
    p.blocks[b].refs -= 1
    if p.blocks[b].refs == 0:
        settle(p, b, step_id)


cdef inline void release_table(Pool* p, const int32_t* table, int64_t first, int64_t end) noexcept nogil:
    """Drop the references of table[first:end], the last one first, of a sequence in no open step."""
    cdef int64_t i
    for i in range(end - 1, first - 1, -1):
        if i - AHEAD >= first and table[i - AHEAD] >= 0:
            kvb_prefetch_write(&p.blocks[table[i - AHEAD]])
        if table[i] >= 0:
            release(p, table[i], 0)


cdef inline void close_waiting(Pool* p, const Step* step) noexcept nogil:
    """Settle again what waited for a step that has left the ring."""
    cdef int32_t b = step.wait_head, following
    while b >= 0:
        following = p.blocks[b].link
        check(b < p.fresh and p.num_waiting > 0, b"a block that waits for a step is counted")
        p.num_waiting -= 1
        settle(p, b, step.id)
        b = following


cdef inline void offload_ahead(Pool* p, bint everything) noexcept nogil:
    """Note and hand out offloads of checkpoints that are to stay and of the blocks that will be evicted next, or of
    `everything` that is cached, as far as the host has no copy of them. Where no slot is free the one used longest ago
    goes, but for those that are held, or that this very call has given out."""
    cdef Host* h = &p.host
    cdef int64_t before = p.moves.noted
    cdef int32_t b, g, n, s, end = p.num_cached if everything else min(p.num_cached, h.horizon)
    if h.checkpoints.num_slots:
        offload_checkpoints(h, &p.tree, &p.moves, before)
    while p.moves.noted - before < h.write_ahead and h.examined < end:
        b = p.queue[(h.cursor + 2 * AHEAD) & p.queue_mask]     # past the tail this is idle, as in `evict`
        if b >= 0:
            kvb_prefetch(&p.blocks[b])
            kvb_prefetch_write(&h.shadows[b])
        b = p.queue[(h.cursor + AHEAD) & p.queue_mask]
        if b >= 0:
            kvb_prefetch_write(node_at(&p.tree, p.blocks[b].node))
            kvb_prefetch_write(&h.slot_of[<int64_t>p.blocks[b].node * h.width])
        b = p.queue[h.cursor & p.queue_mask]
        if b < 0:
            h.cursor += 1
            continue
        n, g = p.blocks[b].node, 0
        while node_at(&p.tree, n).blocks[g] != b:
            g += 1
        if slot_at(h, &p.tree, n, g) < 0 and not h.shadows[b].slid:
            if not find_slot(h, &p.tree, &h.blocks, before):
                break
            s = hang_slot(h, &p.tree, &h.blocks, n, g)
            queue_slot(h, s)
            note_offload(h, &p.moves, b, s)
        h.cursor += 1
        h.examined += 1


cdef inline int64_t hand_out(Pool* p, bint everything) noexcept nogil:
    """Hand out the moves that are noted, with offloads of `everything` or of what will be evicted next; the number of
    the newest, 0 if there are none."""
    cdef bint kept = p.host.num_moves > 0       # of a step that never came to be
    if p.host.num_slots:
        hand_out_loads(&p.host)
        if not kept:
            offload_ahead(p, everything)
        count_moves(&p.host, 1)
    if p.moves.noted == p.moves.handed:
        return 0
    p.moves.handed = p.moves.noted
    return p.moves.handed
