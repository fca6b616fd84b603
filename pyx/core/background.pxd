# Work in the background: fetches bring blocks from outside of this process into host slots, spills take them out, and
# both do so with checkpoints where these have host slots. Both take their time between a begin and an end, and touch no
# memory but that of the slots they hold.
#
# A slot is given to them only when every move that names it has landed. A fetch takes slots that hang nowhere: nobody
# finds them. At its end those that are whole are hung on the nodes that it has kept in the tree. A spill holds slots
# that hang on nodes: these are found, hit and loaded all the while, and not evicted.
#
# Where a fetch lacks nodes it is shorter: it never evicts for them.
#
# Begins and ends depend on nothing but the calls before them: two managers that get the same calls plan the same.

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove

from core.checks cimport check
from core.ints cimport at, Ints
from core.memory cimport MAX_INT32, grab, grab_zeroed, regrow
from core.text cimport block_at, extra_of, Text
from core.tree cimport Node, node_at, tokens_at, Tree, tree_drop, tree_hash, tree_insert, tree_walk
from core.host cimport (
    DIGEST_BYTES, FETCHED, FETCHING, Host, SlotPool, SPILLING, Work, WorkRow, checkpoint_at, evict_slot, leave_queue,
    free_slot, hold_slot, let_go_slot, oldest_slot, put_slot, queue_slot, slot_at, spill_index, take_off, use_slot,
)
from core.sequences cimport NO_MEMORY, Core, fail, Fault, first_row
from core.admission cimport HOST, has_state, hit_limit, longest_hit


cdef enum:
    SHARE = 4           # at most 1 of so many slots is held
    FREE_LOOK = 16      # free slots that are looked at for one whose moves have landed
    SPILL_LOOK = 1024   # slots of each queue that one `core_begin_spill` looks at
    SPILL_NODES = 4096  # nodes of one spill, but for those of its first slot
    OF_ROOT = -1        # for an index of a node's parent: it is the first of its path
    NAMED = -2          # its digest is kept


cdef inline void free_work(Work* work) noexcept nogil:
    if work != NULL:
        free(work.rows)
        free(work.slots)
        free(work.nodes)
        free(work.parents)
        free(work.sizes)
        free(work.said)
        free(work)


cdef inline void link_work(Host* h, Work* work) noexcept nogil:
    h.num_begun += 1
    work.number = h.num_begun
    work.older = h.works
    if h.works != NULL:
        h.works.newer = work
    h.works = work


cdef inline void unlink_work(Host* h, Work* work) noexcept nogil:
    if work.newer != NULL:
        work.newer.older = work.older
    else:
        h.works = work.older
    if work.older != NULL:
        work.older.newer = work.newer
    free_work(work)


cdef inline int32_t room_for_work(const SlotPool* p) noexcept nogil:
    """Slots that may be held besides those that are."""
    return p.num_slots // SHARE - p.num_held


cdef inline int32_t take_landed(Host* h, Tree* t, SlotPool* p, int64_t landed) noexcept nogil:
    """A slot that no move names any more: free, or the next to be evicted. -1: there is none at hand."""
    cdef int32_t i, s
    for i in range(p.stack_size - 1, max(p.stack_size - FREE_LOOK, 0) - 1, -1):
        s = p.stack[i]
        if h.slots[s].move <= landed:
            p.stack_size -= 1
            memmove(p.stack + i, p.stack + i + 1, (p.stack_size - i) * sizeof(int32_t))
            return s
    if p.stack_size < FREE_LOOK and p.fresh < p.first + p.num_slots:
        p.fresh += 1
        return p.fresh - 1
    s = oldest_slot(h, p)
    if s < 0 or h.slots[s].move > landed:
        return -1
    evict_slot(h, t, p)
    p.stack_size -= 1
    return s


cdef struct Plan:       # of a fetch, for each length up to `limit` blocks
    int32_t* path       # [limit]: nodes, those that are there
    int32_t num_known   # of these
    int32_t limit
    int32_t num_slots   # that hang on them
    int64_t* missing    # [limit + 1]: blocks that are nowhere in this process
    int64_t* states     # [limit + 1]: the same of the state after so many blocks, 1 or 0
    int64_t* costs      # [limit + 1]: slots for blocks to take or to hold that nobody holds yet
    int64_t* sums       # [2, limit + 1]: scratch


cdef inline bint is_missing(const Core* c, const Plan* plan, int32_t i, int32_t g) noexcept nogil:
    """Whether a block, or the state after it, is nowhere in this process; `plan.states` is filled for the latter."""
    if g == c.num_groups:
        return plan.states[i + 1] > 0
    if i >= plan.num_known:
        return True
    return node_at(&c.pool.tree, plan.path[i]).blocks[g] < 0 and slot_of_path(c, plan, i, g) < 0


cdef inline int32_t slot_of_path(const Core* c, const Plan* plan, int32_t i, int32_t g) noexcept nogil:
    return slot_at(&c.pool.host, &c.pool.tree, plan.path[i], g) if i < plan.num_known else -1


cdef inline void fill_plan(const Core* c, Plan* plan, int64_t below, const Ints* ends, int64_t room) noexcept nogil:
    """Fill the arrays of a plan. A length that misses what is not below, or whose state takes a slot that must not be
    had, costs more than there is room."""
    cdef int32_t g, i, s, first
    cdef int64_t* missing = plan.sums
    cdef int64_t* costs = plan.sums + plan.limit + 1
    plan.num_slots = 0
    for i in range(plan.limit + 1):
        plan.missing[i] = plan.states[i] = plan.costs[i] = 0
    for g in range(c.num_groups):
        missing[0] = costs[0] = 0
        for i in range(plan.limit):
            s = slot_of_path(c, plan, i, g)
            missing[i + 1], costs[i + 1] = missing[i], costs[i]
            plan.num_slots += s >= 0
            if is_missing(c, plan, i, g):
                missing[i + 1] += 1
                costs[i + 1] += 1 if i < below else room + 1
            elif s >= 0:
                costs[i + 1] += c.pool.host.slots[s].holds == 0
        for i in range(plan.limit + 1):
            first = first_row(c, g, i * c.block_size)
            plan.missing[i] += missing[i] - missing[min(first, i)]
            plan.costs[i] += costs[i] - costs[min(first, i)]
    if c.pool.states.num_slots:
        plan_ends(c, plan, ends, room)


cdef inline void plan_ends(const Core* c, Plan* plan, const Ints* ends, int64_t room) noexcept nogil:
    """What becomes of a length by the state that its hit ends at: it is there, or it is one of those that are below.
    `ends` are checked here once more, as another thread may have written them."""
    cdef const Host* h = &c.pool.host
    cdef int32_t i, s
    cdef bint takes_slot, outside
    cdef Py_ssize_t below = 0       # the first of `ends` that is not passed
    for i in range(1, plan.limit + 1):
        while below < ends.size and at(ends, below) < i:
            below += 1
        plan.states[i] = i > plan.num_known or not has_state(c, plan.path, i, HOST)
        s = checkpoint_at(h, &c.pool.tree, plan.path[i - 1]) if i <= plan.num_known else -1
        plan.num_slots += s >= 0
        takes_slot = plan.states[i] or s >= 0 and h.slots[s].holds == 0
        outside = below < ends.size and at(ends, below) == i and <int64_t>i * c.block_size % c.pool.states.every == 0
        if plan.states[i] and not outside:
            plan.costs[i] = room + 1
        elif takes_slot and room_for_work(&h.checkpoints) < 1:
            plan.costs[i] = room + 1


cdef inline int32_t longest_plan(
    const Plan* plan, int32_t length, int64_t room, int64_t taken, bint state
) noexcept nogil:
    """The longest length, at most `length`, that does with so much room and so many slots, for a state too or not."""
    while plan.costs[length] > room or plan.missing[length] > taken or plan.states[length] > state:
        length -= 1
    return length


cdef inline bint is_reached(const Core* c, int32_t i, int32_t g, int32_t length) noexcept nogil:
    """Whether a hit of this length needs block i in a group, or the state after it."""
    if g == c.num_groups:
        return i == length - 1
    return i < length and i >= first_row(c, g, length * c.block_size)


cdef inline Work* new_fetch(int32_t num_nodes, int64_t num_rows, int64_t num_slots) noexcept nogil:
    cdef Work* work = <Work*>grab_zeroed(1, sizeof(Work))
    if work == NULL:
        return NULL
    work.kind = FETCHING
    work.nodes = <int32_t*>grab((<size_t>num_nodes or 1) * sizeof(int32_t))
    work.rows = <WorkRow*>grab((<size_t>num_rows or 1) * sizeof(WorkRow))
    work.slots = <int32_t*>grab((<size_t>(num_rows + num_slots) or 1) * sizeof(int32_t))
    if work.nodes == NULL or work.rows == NULL or work.slots == NULL:
        free_work(work)
        return NULL
    return work


cdef inline void grow_path(Core* c, Text* x, Work* work, const Plan* plan) noexcept nogil:
    """Put the nodes of the planned length into the tree and keep the last one there, in place of the last one known."""
    cdef Tree* t = &c.pool.tree
    cdef int32_t i, n = 0, last = plan.path[plan.num_known - 1] if plan.num_known else 0
    for i in range(work.num_nodes):
        if i < plan.num_known:
            n = work.nodes[i] = plan.path[i]
            continue
        n = tree_insert(
            t, n, tree_hash(t, node_at(t, n).hash, block_at(&t.paging, x, i), extra_of(x, i)),
            block_at(&t.paging, x, i), extra_of(x, i),
        )
        check(n > 0, b"there is a node for each block of a fetch")
        work.nodes[i] = n
    # New nodes have a use for whoever made them; those before the last one are kept by their child.
    for i in range(plan.num_known, work.num_nodes - 1):
        node_at(t, work.nodes[i]).uses -= 1
    work.last_node = n
    if work.num_nodes and work.num_nodes <= plan.num_known:
        node_at(t, n).uses += 1
    if last:
        tree_drop(t, last)


cdef inline Work* begin_planned(Core* c, Text* x, Plan* plan, int64_t room) noexcept nogil:
    """A fetch as planned, shorter where slots or nodes do not suffice; NULL: no memory, and no effect."""
    cdef Host* h = &c.pool.host
    cdef Tree* t = &c.pool.tree
    cdef int32_t i, g, s, taken = 0, state = -1, num_rows = 0, num_kept = 0
    cdef int32_t length = longest_plan(plan, plan.limit, room, MAX_INT32, True)
    cdef int64_t wanted = plan.missing[length], states = plan.states[length]
    cdef Work* work = new_fetch(length, wanted + states, plan.num_slots)
    if work == NULL:
        return NULL
    if plan.num_known:
        node_at(t, plan.path[plan.num_known - 1]).uses += 1
    for i in range(plan.num_known):     # first: no slot is taken from the path itself
        for g in range(h.width):
            if slot_of_path(c, plan, i, g) >= 0:
                hold_slot(h, slot_of_path(c, plan, i, g))
    while taken < wanted:
        s = take_landed(h, t, &h.blocks, c.pool.moves.landed)
        if s < 0:
            break
        work.slots[taken] = s
        taken += 1
    if states:
        state = take_landed(h, t, &h.checkpoints, c.pool.moves.landed)
    length = <int32_t>min(<int64_t>length, <int64_t>plan.num_known + t.max_nodes - t.num_nodes)
    length = longest_plan(plan, length, room, taken, state >= 0)
    for i in range(taken - 1, <int32_t>plan.missing[length] - 1, -1):
        free_slot(h, work.slots[i])
    taken = <int32_t>plan.missing[length]
    if plan.states[length]:     # its row is the last one
        work.slots[taken] = state
        taken += 1
    elif state >= 0:
        free_slot(h, state)
    for i in range(taken):
        hold_slot(h, work.slots[i])
    for i in range(max(length, plan.num_known)):
        for g in range(h.width):
            s = slot_of_path(c, plan, i, g)
            if not is_reached(c, i, g, length):
                if s >= 0:
                    let_go_slot(h, t, s)
            elif s >= 0:
                work.slots[taken + num_kept] = s
                num_kept += 1
            elif is_missing(c, plan, i, g):
                work.rows[num_rows].index, work.rows[num_rows].group = i, g
                num_rows += 1
    check(num_rows == taken, b"there is a slot for each row of a fetch")
    work.num_nodes, work.num_rows, work.num_slots = length, num_rows, taken + num_kept
    grow_path(c, x, work, plan)
    link_work(h, work)
    return work


cdef struct Begun:      # tokens of a fetch
    int64_t local       # that this process can serve
    int64_t most        # that it could serve once all has come


cdef inline Work* core_begin_fetch(
    Core* c, Text* x, int64_t below, const Ints* ends, Begun* begun, Fault* f
) noexcept nogil:
    """Plan what of a prompt is to be fetched: `below` blocks of it at most, and the state after as many of them as
    `ends` says, which ascend. NULL after a fault."""
    cdef Plan plan
    cdef Work* work = NULL
    cdef int32_t local, most = hit_limit(c, x, -1)
    cdef int64_t room = room_for_work(&c.pool.host.blocks)
    plan.path = <int32_t*>grab((<size_t>most or 1) * sizeof(int32_t))
    plan.missing = <int64_t*>grab(5 * (<size_t>most + 1) * sizeof(int64_t))
    if plan.path != NULL and plan.missing != NULL:
        plan.states, plan.costs = plan.missing + most + 1, plan.missing + 2 * (<int64_t>most + 1)
        plan.sums = plan.missing + 3 * (<int64_t>most + 1)
        plan.num_known = tree_walk(&c.pool.tree, x, most, plan.path)
        local = longest_hit(c, plan.path, plan.num_known, HOST)
        plan.limit = <int32_t>min(<int64_t>most, max(below, <int64_t>local))
        plan.num_known = min(plan.num_known, plan.limit)
        fill_plan(c, &plan, below, ends, room)
        work = begin_planned(c, x, &plan, room)
    free(plan.path)
    free(plan.missing)
    if work == NULL:
        fail(f, NO_MEMORY, 0, 0, 0)
        return NULL
    begun.local = <int64_t>local * c.block_size
    begun.most = <int64_t>max(local, work.num_nodes) * c.block_size
    return work


cdef inline int64_t core_end_fetch(Core* c, Work* work, int64_t num_ok) noexcept nogil:
    """Hang what is whole, as far as every group can serve, and free the other slots. Tokens that are served."""
    cdef Host* h = &c.pool.host
    cdef Tree* t = &c.pool.tree
    cdef int32_t i, g, s, served = 0
    if not work.stale:
        for i in range(<int32_t>num_ok):
            if slot_at(h, t, work.nodes[work.rows[i].index], work.rows[i].group) < 0:
                s = work.slots[i]
                put_slot(h, t, s, work.nodes[work.rows[i].index], work.rows[i].group)
                h.slots[s].passed = h.slots[s].known = True
        served = longest_hit(c, work.nodes, work.num_nodes, HOST)
        for i in range(<int32_t>num_ok):
            if h.slots[work.slots[i]].node and work.rows[i].index >= served:
                node_at(t, take_off(h, t, work.slots[i])).uses -= 1     # its child, or this fetch, uses it too
        for i in range(served - 1, -1, -1):
            for g in range(h.width):
                if is_reached(c, i, g, served):
                    use_slot(h, t, work.nodes[i], g)
    for i in range(work.num_rows):
        if h.slots[work.slots[i]].node == 0:
            let_go_slot(h, t, work.slots[i])
            work.slots[i] = -1
    if work.last_node:
        tree_drop(t, work.last_node)
    work.last_node = 0
    work.kind = FETCHED
    return <int64_t>served * c.block_size


cdef inline void core_release(Core* c, Work* work) noexcept nogil:
    """Let go of all that an ended fetch holds."""
    cdef int32_t i
    for i in range(work.num_slots):
        if work.slots[i] >= 0:
            let_go_slot(&c.pool.host, &c.pool.tree, work.slots[i])
    unlink_work(&c.pool.host, work)


cdef inline bint name_path(const Core* c, Work* work, int32_t n, int32_t* capacity) noexcept nogil:
    """Add a node to those of a spill, and those before it up to one that is there, or whose parent's digest is kept;
    parents first. False: no memory."""
    cdef const Tree* t = &c.pool.tree
    cdef int32_t* places = c.pool.host.places
    cdef int32_t* grown
    cdef int32_t i, above = 0, node = n
    while places[node] == 0:
        above += 1
        node = node_at(t, node).parent
        if node == 0 or t.named[node]:
            break
    if work.num_nodes + above > capacity[0]:
        capacity[0] = 2 * (work.num_nodes + above)
        grown = <int32_t*>regrow(work.nodes, <size_t>capacity[0] * sizeof(int32_t))
        if grown == NULL:
            return False
        work.nodes = grown
    for i in range(work.num_nodes + above - 1, work.num_nodes - 1, -1):
        work.nodes[i] = n
        places[n] = i + 1
        n = node_at(t, n).parent
    work.num_nodes += above
    return True


cdef inline int32_t path_to_name(const Core* c, int32_t n) noexcept nogil:
    """How many nodes `name_path` would add."""
    cdef int32_t above = 0
    while c.pool.host.places[n] == 0:
        above += 1
        n = node_at(&c.pool.tree, n).parent
        if n == 0 or c.pool.tree.named[n]:
            break
    return above


cdef inline int32_t choose_spill(
    const Core* c, Work* work, const SlotPool* p, int64_t most, int32_t* capacity
) noexcept nogil:
    """Add slots of a pool to those to spill, and their nodes; how many of its queue were looked at, -1: no memory."""
    cdef const Host* h = &c.pool.host
    cdef int32_t looked = 0, s, n, new = 0, room = room_for_work(p)
    while looked < min(p.spill_size, SPILL_LOOK) and work.num_rows < most and new < room:
        s = p.spills[spill_index(p, looked)]
        n = h.slots[s].node
        if n and not h.slots[s].known:
            if h.slots[s].move > c.pool.moves.landed:
                break
            if work.num_rows and work.num_nodes + path_to_name(c, n) > SPILL_NODES:
                break
            if not name_path(c, work, n, capacity):
                return -1
            work.slots[work.num_rows] = s
            work.rows[work.num_rows].index, work.rows[work.num_rows].group = h.places[n] - 1, h.slots[s].group
            work.num_rows += 1
            new += h.slots[s].holds == 0
        looked += 1
    return looked


cdef inline bint copy_nodes(const Core* c, Work* work) noexcept nogil:
    """Write down what a spill says of its nodes. False: no memory."""
    cdef const Tree* t = &c.pool.tree
    cdef const Node* node
    cdef int32_t i
    cdef size_t size = 0
    cdef char* said
    work.parents = <int32_t*>grab((<size_t>work.num_nodes or 1) * sizeof(int32_t))
    work.sizes = <int32_t*>grab((<size_t>work.num_nodes or 1) * sizeof(int32_t))
    if work.parents == NULL or work.sizes == NULL:
        return False
    for i in range(work.num_nodes):
        node = node_at(t, work.nodes[i])
        work.parents[i] = c.pool.host.places[node.parent] - 1
        if work.parents[i] < 0 or work.parents[i] > i:     # one that came later was named before
            work.parents[i] = NAMED if node.parent else OF_ROOT
        work.sizes[i] = node.size
        size += t.block_size * sizeof(int32_t) + node.size + (DIGEST_BYTES if work.parents[i] == NAMED else 0)
    work.said = said = <char*>grab(size or 1)
    if said == NULL:
        return False
    for i in range(work.num_nodes):
        node = node_at(t, work.nodes[i])
        memcpy(said, tokens_at(t, work.nodes[i]), t.block_size * sizeof(int32_t))
        said += t.block_size * sizeof(int32_t)
        if node.size:
            memcpy(said, node.blob.bytes, node.size)
        said += node.size
        if work.parents[i] == NAMED:
            memcpy(said, c.pool.host.digests + <int64_t>node.parent * DIGEST_BYTES, DIGEST_BYTES)
            said += DIGEST_BYTES
    return True


cdef inline Work* core_begin_spill(Core* c, int64_t most, int64_t most_states, Fault* f) noexcept nogil:
    """Hold slots that are to be copied out of this process, `most` of them and `most_states` of checkpoints, and say
    what they are; NULL after a fault."""
    cdef Host* h = &c.pool.host
    cdef int32_t i, _i, capacity = 0, states = -1, blocks = -1
    cdef int64_t queued = min(h.checkpoints.spill_size, SPILL_LOOK) + min(h.blocks.spill_size, SPILL_LOOK)
    cdef size_t room = <size_t>max(min(most, queued), <int64_t>1)
    cdef bint copied = False
    cdef Work* work = <Work*>grab_zeroed(1, sizeof(Work))
    if work != NULL:
        work.kind = SPILLING
        work.rows = <WorkRow*>grab(room * sizeof(WorkRow))
        work.slots = <int32_t*>grab(room * sizeof(int32_t))
        if work.rows != NULL and work.slots != NULL:
            # First: they are few, and blocks are of no use without them.
            states = choose_spill(c, work, &h.checkpoints, min(most, most_states), &capacity)
            blocks = choose_spill(c, work, &h.blocks, most, &capacity) if states >= 0 else -1
            copied = blocks >= 0 and copy_nodes(c, work)
        for i in range(work.num_nodes):
            h.places[work.nodes[i]] = 0
    if not copied:
        free_work(work)
        fail(f, NO_MEMORY, 0, 0, 0)
        return NULL
    for _i in range(states):
        leave_queue(h, &h.checkpoints)
    for _i in range(blocks):
        leave_queue(h, &h.blocks)
    for i in range(work.num_rows):
        hold_slot(h, work.slots[i])
    work.num_slots = work.num_rows
    link_work(h, work)
    return work


cdef inline void core_end_spill(Core* c, Work* work, const uint8_t* ok, const char* digests) noexcept nogil:
    """Let go of the slots of a spill. `ok` [rows] says which are known outside now; the digests of its nodes are kept,
    unless `digests` is NULL."""
    cdef Host* h = &c.pool.host
    cdef int32_t i, s
    for i in range(work.num_rows):
        s = work.slots[i]
        if h.slots[s].node and ok[i]:
            h.slots[s].known = True
        elif h.slots[s].node:
            queue_slot(h, s)
    if digests != NULL and not work.stale:      # its nodes are there: slots that it holds hang on them, or below
        for i in range(work.num_nodes):
            memcpy(h.digests + <int64_t>work.nodes[i] * DIGEST_BYTES, digests + <int64_t>i * DIGEST_BYTES, DIGEST_BYTES)
            c.pool.tree.named[work.nodes[i]] = True
    for i in range(work.num_rows - 1, -1, -1):
        let_go_slot(h, &c.pool.tree, work.slots[i])
    unlink_work(h, work)
