# The host pool: slots in host memory, each with one block of one group, that hang on the nodes of the tree as blocks of
# the device do; and the moves between the two. Nothing is copied here: moves are noted, and handed out with a step.
#
# Checkpoints have slots of their own, of another size, numbered after those of blocks. Their group is the one after the
# last, and on the device they are numbered after the blocks: all that follows is true of them too.
#
# Moves are numbered from 1, together with copies-on-write. Those of one step are done in the order in which the step
# lists them, so that a slot or a block that a move names may be given to a later move at once. A pass waits for the
# loads of what it reads, and for every move that names a block that it writes.
#
# Slots that hang on nodes are in a list, the least recently used first. A hit, and the eviction of a device block, make
# a slot the most recent one, children before parents: the end of a path is evicted first.
#
# Work in the background (`background.pxd`) holds slots: one that is held is not evicted, and not free before it is let
# go. It hangs on its node all the same, or has none: a fetch has taken it, or it lost its node in a reset.
#
# All of this lies in arrays of its own. Without a host pool there are none, and `num_slots` is 0.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint8_t

from core.checks cimport check
from core.tree cimport kvb_prefetch_write, line_of, node_at, Tree, tree_drop
from core.reach cimport first_reached
from core.states cimport end_offer, lose_anchor, next_offer, States, StateSlot


cdef enum:
    OFFLOAD = 0         # from a device block to a host slot
    LOAD = 1            # from a host slot to a device block
    DIGEST_BYTES = 32


cdef struct Move:
    int32_t kind
    int32_t group
    int32_t source
    int32_t target
    int64_t number


cdef struct SlotPool:   # slots of one size: those of blocks, or those of checkpoints
    int32_t first
    int32_t num_slots
    int32_t stack_size
    int32_t fresh       # slots from here on were never used
    int32_t oldest
    int32_t newest
    int32_t num_held    # that work in the background holds
    int32_t spill_first     # the ring of slots that an offload has filled since they were spilled, if they ever were
    int32_t spill_size
    int32_t* stack
    int32_t* spills     # [num_slots]; some have lost what they held meanwhile


cdef struct Slot:       # 32 bytes
    int32_t node        # that it hangs on, 0: none
    int32_t group
    int32_t older       # neighbours in the list, -1: none
    int32_t newer
    int64_t move        # the newest move that names it
    int32_t holds       # of work in the background
    uint8_t passed      # not in the list: an eviction passed over it, because it was held
    uint8_t known       # what it holds is there outside of this process too
    uint8_t queued      # it is in the queue of those to be spilled


cdef enum WorkKind:
    FETCHING, FETCHED, SPILLING


cdef struct WorkRow:
    int32_t index       # of a fetch: the block's in the prompt; of a spill: its node's in `nodes`
    int32_t group


cdef struct Work:       # in the background: a fetch until it is released, or a spill until it ends
    Work* older
    Work* newer
    int64_t number
    WorkKind kind
    bint stale          # the prefix cache was reset: its nodes are gone
    int32_t num_rows
    int32_t num_slots   # that it holds: first those of its rows, then those of the local hit of a fetch
    int32_t num_nodes
    int32_t last_node   # that a fetch keeps in the tree until it ends, 0: none
    WorkRow* rows
    int32_t* slots      # -1: let go of
    int32_t* nodes      # of a fetch: of the blocks it could serve; of a spill: whose digests are asked for
    int32_t* parents    # of a spill: the index of each node's parent, or OF_ROOT or NAMED
    int32_t* sizes      # of a spill: the extra bytes of each node
    char* said          # of a spill: for each node its tokens, its extra bytes and, where NAMED, its parent's digest


cdef struct Shadow:     # the moves of a device block: 32 bytes
    int64_t move        # the newest move that names it: whoever writes it waits for that
    int64_t load        # the newest load of what it holds: whoever reads it waits for that
    int32_t noted       # 1 + its index in `loads`, 0: none
    int32_t slot        # the source of that load
    uint8_t slid        # cached because it went out of a window


cdef struct Moves:      # the number of the newest move that was noted, handed out, enqueued, done
    int64_t noted, handed, marked, landed


cdef struct Host:
    int32_t num_slots   # of both pools
    int32_t width       # groups that have slots: those of blocks, and the one of states
    int32_t first_state  # the device's blocks, after which its slots for states are numbered
    int32_t num_states  # of these, 0 where checkpoints have no host slots
    SlotPool blocks
    SlotPool checkpoints
    int32_t write_ahead     # offloads that one step notes at most
    int32_t horizon     # cached blocks that are examined at most, from the next to be evicted on
    int32_t examined    # of these, how many were offloaded, or need not be
    uint32_t cursor     # the index in the queue of the next one to examine
    int32_t num_loads
    int32_t num_moves
    Slot* slots
    int32_t* slot_of    # [max_nodes + 1, width]: 1 + the slot of the node, 0: none
    Shadow* shadows     # [blocks and slots for states of the device]
    int32_t* loads      # [the same]: those whose loads are noted and not handed out
    Move* moves         # [most_moves]: handed out, and not marked as enqueued
    int64_t* needs      # [max_seqs]: the newest move that a sequence's next pass waits for
    Work* works         # the newest of those that are there
    int64_t num_begun
    int32_t* places     # [max_nodes + 1]: zeros; scratch of `core_begin_spill`
    char* digests       # [max_nodes + 1, DIGEST_BYTES]: of nodes that are `named` in the tree
    int64_t evictions, num_loaded, num_offloaded, hit_tokens
    States* states      # NULL: no group keeps a state


cdef inline size_t most_moves(const Host* h, size_t on_device) noexcept nogil:
    """Moves of one step, where the device has so many blocks and states: a load of each, and offloads, where blocks go
    with checkpoints also of more than a step notes."""
    return on_device + h.write_ahead + (on_device if h.checkpoints.num_slots else 0)


cdef inline int32_t host_free(const SlotPool* p) noexcept nogil:
    return p.stack_size + p.first + p.num_slots - p.fresh


cdef inline SlotPool* pool_of(Host* h, int32_t s) noexcept nogil:
    """The pool of a slot."""
    check(0 <= s < h.num_slots, b"a host slot is one of a pool's")
    return &h.blocks if s < h.checkpoints.first else &h.checkpoints


cdef inline int32_t slot_at(const Host* h, const Tree* t, int32_t n, int32_t g) noexcept nogil:
    """The slot of a node in one group, or -1."""
    check(0 <= n <= t.max_nodes and 0 <= g < h.width, b"a slot is looked for at a node and a group")
    return h.slot_of[<int64_t>n * h.width + g] - 1


cdef inline int32_t checkpoint_at(const Host* h, const Tree* t, int32_t n) noexcept nogil:
    """The slot of a node's checkpoint, or -1."""
    return slot_at(h, t, n, t.num_groups) if h.checkpoints.num_slots else -1


cdef inline void list_remove(Host* h, int32_t s) noexcept nogil:
    cdef Slot* slot = &h.slots[s]
    cdef SlotPool* p = pool_of(h, s)
    if slot.older >= 0:
        h.slots[slot.older].newer = slot.newer
    else:
        p.oldest = slot.newer
    if slot.newer >= 0:
        h.slots[slot.newer].older = slot.older
    else:
        p.newest = slot.older


cdef inline void list_append(Host* h, int32_t s) noexcept nogil:
    cdef SlotPool* p = pool_of(h, s)
    h.slots[s].older = p.newest
    h.slots[s].newer = -1
    if p.newest >= 0:
        h.slots[p.newest].newer = s
    else:
        p.oldest = s
    p.newest = s


cdef inline void use_slot(Host* h, const Tree* t, int32_t n, int32_t g) noexcept nogil:
    """Make the slot of a node, if it has one, the most recent."""
    cdef int32_t s = slot_at(h, t, n, g)
    if s >= 0 and s != pool_of(h, s).newest:
        if not h.slots[s].passed:
            list_remove(h, s)
        h.slots[s].passed = False
        list_append(h, s)


cdef inline int32_t oldest_slot(Host* h, SlotPool* p) noexcept nogil:
    """The slot to evict next, -1: there is none. Held ones are passed over, once: let go, they are the next."""
    cdef int32_t s = p.oldest
    while s >= 0 and h.slots[s].holds:
        list_remove(h, s)
        h.slots[s].passed = True
        s = p.oldest
    return s


cdef inline void free_slot(Host* h, int32_t s) noexcept nogil:
    cdef SlotPool* p = pool_of(h, s)
    check(p.stack_size < p.num_slots and h.slots[s].node == 0, b"a host slot is free once, and hangs nowhere")
    p.stack[p.stack_size] = s
    p.stack_size += 1


cdef inline void hold_slot(Host* h, int32_t s) noexcept nogil:
    pool_of(h, s).num_held += h.slots[s].holds == 0
    h.slots[s].holds += 1


cdef inline void let_go_slot(Host* h, Tree* t, int32_t s) noexcept nogil:
    """A slot that nobody holds any more is free, or may be evicted again."""
    cdef Slot* slot = &h.slots[s]
    cdef SlotPool* p = pool_of(h, s)
    check(slot.holds > 0, b"a host slot is held as often as it is let go")
    slot.holds -= 1
    if slot.holds:
        return
    p.num_held -= 1
    if slot.node == 0:
        free_slot(h, s)
        return
    if slot.passed:
        slot.passed = False
        slot.older, slot.newer = -1, p.oldest
        if p.oldest >= 0:
            h.slots[p.oldest].older = s
        else:
            p.newest = s
        p.oldest = s
    if p == &h.checkpoints:
        check_anchor(h, t, slot.node)


cdef inline void put_slot(Host* h, Tree* t, int32_t s, int32_t n, int32_t g) noexcept nogil:
    """Hang a slot on a node; it is in no list yet."""
    check(slot_at(h, t, n, g) < 0, b"a node has at most one host slot for a group")
    h.slots[s].node, h.slots[s].group = n, g
    h.slot_of[<int64_t>n * h.width + g] = s + 1
    node_at(t, n).uses += 1


cdef inline int32_t take_off(Host* h, Tree* t, int32_t s) noexcept nogil:
    """Undo `put_slot`, but for the use of the node, which is returned."""
    cdef Slot* slot = &h.slots[s]
    cdef int32_t n = slot.node
    check(n > 0 and slot_at(h, t, n, slot.group) == s, b"a slot that is dropped hangs on its node")
    h.slot_of[<int64_t>n * h.width + slot.group] = 0
    slot.node = 0
    slot.passed = slot.known = False
    if h.states != NULL and slot.group == h.states.anchor:
        check_anchor(h, t, n)
    return n


cdef inline void drop_slot(Host* h, Tree* t, int32_t s) noexcept nogil:
    """Take a slot off its node, which is dropped if nothing else uses it."""
    if not h.slots[s].passed:
        list_remove(h, s)
    tree_drop(t, take_off(h, t, s))
    if h.slots[s].holds == 0:
        free_slot(h, s)


cdef inline void check_anchor(Host* h, Tree* t, int32_t n) noexcept nogil:
    """Drop the checkpoint of a node that has neither block nor host slot any more for the group with which it goes. One
    that is held in host memory goes once it is let go. The caller has a use of the node."""
    cdef int32_t s = checkpoint_at(h, t, n)
    if node_at(t, n).blocks[h.states.anchor] < 0 and slot_at(h, t, n, h.states.anchor) < 0:
        lose_anchor(h.states, n)
        if s >= 0 and h.slots[s].holds == 0:
            drop_slot(h, t, s)


cdef inline void evict_slot(Host* h, Tree* t, const SlotPool* p) noexcept nogil:
    """Drop what `oldest_slot` has found. Prefetches what the next evictions will touch."""
    cdef int32_t next
    check(p.oldest >= 0 and h.slots[p.oldest].holds == 0, b"there is a host slot to evict, and nobody holds it")
    next = h.slots[p.oldest].newer
    if next >= 0:
        kvb_prefetch_write(&t.lines[line_of(t, node_at(t, h.slots[next].node).hash)])
        kvb_prefetch_write(node_at(t, node_at(t, h.slots[next].node).parent))
        next = h.slots[next].newer
    if next >= 0:
        kvb_prefetch_write(node_at(t, h.slots[next].node))
        kvb_prefetch_write(&h.slot_of[<int64_t>h.slots[next].node * h.width])
        next = h.slots[next].newer
    if next >= 0 and h.slots[next].newer >= 0:
        kvb_prefetch_write(&h.slots[h.slots[next].newer])
    drop_slot(h, t, p.oldest)
    h.evictions += 1


cdef inline void drop_slots(Host* h, Tree* t, const SlotPool* p) noexcept nogil:
    """Drop all that an eviction would find."""
    while p.num_slots and p.oldest >= 0:
        drop_slot(h, t, p.oldest)


cdef inline void queue_slot(Host* h, int32_t s) noexcept nogil:
    """Let a slot be spilled, after those of its pool that are in the queue."""
    cdef SlotPool* p = pool_of(h, s)
    if not h.slots[s].queued:
        h.slots[s].queued = True
        p.spills[spill_index(p, p.spill_size)] = s
        p.spill_size += 1


cdef inline int32_t spill_index(const SlotPool* p, int32_t i) noexcept nogil:
    """Where the i-th of a queue lies in its ring."""
    cdef int64_t at = <int64_t>p.spill_first + i
    return <int32_t>(at if at < p.num_slots else at - p.num_slots)


cdef inline int32_t leave_queue(Host* h, SlotPool* p) noexcept nogil:
    """Take the first slot out of the queue."""
    cdef int32_t s = p.spills[p.spill_first]
    check(p.spill_size > 0 and h.slots[s].queued, b"what leaves the queue was in it")
    h.slots[s].queued = False
    p.spill_first = spill_index(p, 1)
    p.spill_size -= 1
    return s


cdef inline void forget_work(Host* h, Tree* t) noexcept nogil:
    """What a reset does to work in the background: its slots lose their nodes, and stay held until they are let go."""
    cdef Work* work = h.works
    cdef int32_t i
    while work != NULL:
        for i in range(work.num_slots):
            if work.slots[i] >= 0 and h.slots[work.slots[i]].node:
                drop_slot(h, t, work.slots[i])
        if work.last_node:
            tree_drop(t, work.last_node)
        work.last_node = 0
        work.stale = True
        work = work.older
    while h.blocks.spill_size:
        leave_queue(h, &h.blocks)
    while h.checkpoints.spill_size:
        leave_queue(h, &h.checkpoints)


cdef inline bint is_twin(const Host* h, const Slot* slot) noexcept nogil:
    """Whether the device has the checkpoint of a host slot too, and may evict it."""
    cdef int32_t i = h.states.of_node[slot.node] - 1
    return i >= 0 and h.states.slots[i].refs == 0


cdef inline bint find_slot(Host* h, Tree* t, SlotPool* p, int64_t before) noexcept nogil:
    """Make a slot free, if none is: the one used longest ago goes, unless a move newer than `before` names it. A
    checkpoint that the device has too does not go for another one before it is known outside: the two would take turns.
    One that is held there does, as it may be held for good, and is offered again."""
    cdef int32_t s
    if host_free(p) == 0:
        s = oldest_slot(h, p)
        if s < 0 or h.slots[s].move > before:
            return False
        if p == &h.checkpoints and is_twin(h, &h.slots[s]) and not h.slots[s].known:
            return False
        evict_slot(h, t, p)
    return True


cdef inline int32_t hang_slot(Host* h, Tree* t, SlotPool* p, int32_t n, int32_t g) noexcept nogil:
    """Give a node a free slot, which an offload will fill; there is one."""
    cdef int32_t s
    if p.stack_size:
        p.stack_size -= 1
        s = p.stack[p.stack_size]
    else:
        s = p.fresh
        p.fresh += 1
    check(p.first <= s < p.first + p.num_slots and h.slots[s].node == 0, b"a host slot is not given out twice")
    put_slot(h, t, s, n, g)
    list_append(h, s)
    return s


cdef inline void note_offload(Host* h, Moves* m, int32_t b, int32_t s) noexcept nogil:
    """Note and hand out the move of a block, or of a state, to a slot that hangs on its node."""
    cdef Move* move = &h.moves[h.num_moves]
    m.noted += 1
    h.shadows[b].move = h.slots[s].move = m.noted
    move.kind, move.group, move.source, move.target, move.number = OFFLOAD, h.slots[s].group, b, s, m.noted
    h.num_moves += 1


cdef inline void offload_slid(Host* h, Tree* t, Moves* m, int32_t i, int32_t g, int64_t before) noexcept nogil:
    """Note and hand out offloads of the blocks of a group that a hit at the checkpoint in slot i needs and that have
    slid out, so that nobody else would copy them; as many as there are slots for."""
    cdef StateSlot* slot = &h.states.slots[i]
    cdef int32_t first = first_reached(&h.states.reaches[g], slot.at) // t.block_size
    cdef int32_t b, s, n = slot.node, checkpoint = n, _row
    for _row in range(slot.at // t.block_size - 1, first - 1, -1):
        b = node_at(t, n).blocks[g]
        if b >= 0 and h.shadows[b].slid and slot_at(h, t, n, g) < 0:
            if not find_slot(h, t, &h.blocks, before):
                return
            if slot.node != checkpoint:
                return      # it has lost the block with which it goes
            s = hang_slot(h, t, &h.blocks, n, g)
            queue_slot(h, s)
            note_offload(h, m, b, s)
        n = node_at(t, n).parent


cdef inline bint offload_checkpoint(Host* h, Tree* t, Moves* m, int32_t i, int64_t before) noexcept nogil:
    """Note and hand out the offload of a checkpoint that is to stay, where the host has no copy of it, and of what goes
    with it. False: there is no slot for it."""
    cdef int32_t g, s, n = h.states.slots[i].node
    if n and checkpoint_at(h, t, n) < 0:
        if not find_slot(h, t, &h.checkpoints, before):
            return False
        s = hang_slot(h, t, &h.checkpoints, n, t.num_groups)
        queue_slot(h, s)
        note_offload(h, m, h.first_state + i, s)
    for g in range(t.num_groups):
        if h.states.slots[i].node and (h.states.reaches[g].window or h.states.reaches[g].chunk):
            offload_slid(h, t, m, i, g, before)
    return True


cdef inline void offload_checkpoints(Host* h, Tree* t, Moves* m, int64_t before) noexcept nogil:
    """The same for all that are to stay, in the order in which they were offered. The last one may go past what a step
    notes, so that each is done at once."""
    while m.noted - before < h.write_ahead and h.states.num_offers:
        if not offload_checkpoint(h, t, m, next_offer(h.states), before):
            break
        end_offer(h.states)


cdef inline void note_load(Host* h, Moves* m, int32_t s, int32_t b) noexcept nogil:
    """Note that a block is to be loaded from a slot."""
    cdef Shadow* shadow = &h.shadows[b]
    check(shadow.noted == 0, b"a block waits for one load")
    m.noted += 1
    shadow.move = shadow.load = h.slots[s].move = m.noted
    shadow.slot = s
    h.loads[h.num_loads] = b
    h.num_loads += 1
    shadow.noted = h.num_loads


cdef inline void cancel_load(Host* h, int32_t b) noexcept nogil:
    """Forget the load noted for a block, if any: the block has a new owner. The last load takes its index."""
    cdef int32_t i = h.shadows[b].noted - 1, last
    if i >= 0:
        h.num_loads -= 1
        last = h.loads[h.num_loads]
        h.loads[i] = last
        h.shadows[last].noted = i + 1
        h.shadows[b].noted = 0


cdef inline void hand_out_loads(Host* h) noexcept nogil:
    """Move the noted loads to the moves of a step. Moves of a `prepare` that raised are still there; of these, loads of
    a block that has a new owner are left out."""
    cdef int32_t i, n = 0
    cdef int32_t b
    cdef Move* move
    for i in range(h.num_moves):
        if h.moves[i].kind == OFFLOAD or h.shadows[h.moves[i].target].load == h.moves[i].number:
            h.moves[n] = h.moves[i]
            n += 1
    for i in range(h.num_loads):
        b = h.loads[i]
        move = &h.moves[n]
        move.kind, move.group = LOAD, h.slots[h.shadows[b].slot].group
        move.source, move.target, move.number = h.shadows[b].slot, b, h.shadows[b].load
        h.shadows[b].noted = 0
        n += 1
    h.num_loads = 0
    h.num_moves = n


cdef inline void count_moves(Host* h, int32_t sign) noexcept nogil:
    """Count the moves of a step as handed out, or take that back."""
    cdef int32_t i
    for i in range(h.num_moves):
        if h.moves[i].kind == LOAD:
            h.num_loaded += sign
        else:
            h.num_offloaded += sign
