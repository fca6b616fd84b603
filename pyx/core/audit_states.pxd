# The integrity check of states: invariant 11, derived again from sequences, pins, rows of open steps and nodes.

from libc.stdint cimport int32_t, int64_t

from core.tree cimport node_at, Tree
from core.states cimport StateRow, States, StateSlot
from core.host cimport checkpoint_at, Host, slot_at
from core.pool cimport pool_step, Step
from core.sequences cimport PIN, UNUSED, Core, Seq


cdef struct StateFinding:
    const char* what
    int64_t where


cdef inline bint torn(StateFinding* out, const char* what, int64_t where) noexcept nogil:
    out.what, out.where = what, where
    return False


cdef inline int64_t depth_of(const Tree* t, int32_t n) noexcept nogil:
    """How many blocks the prefix of a node has."""
    cdef int64_t depth = 0
    while n > 0 and depth <= t.max_nodes:
        n = node_at(t, n).parent
        depth += 1
    return depth


cdef inline bint audit_checkpoint(Core* c, int32_t i, StateFinding* out) noexcept nogil:
    cdef States* s = &c.pool.states
    cdef StateSlot* slot = &s.slots[i]
    cdef int32_t n = slot.node
    if n < 0 or n >= c.pool.tree.fresh or node_at(&c.pool.tree, n).uses <= 0 or s.of_node[n] != i + 1:
        return torn(out, b"a checkpoint hangs on a node that does not know of it; slot:", i)
    if slot.at % s.every or depth_of(&c.pool.tree, n) * c.block_size != slot.at:
        return torn(out, b"a checkpoint stands elsewhere than its node; slot:", i)
    if node_at(&c.pool.tree, n).blocks[s.anchor] < 0 and (
        c.pool.host.num_slots == 0 or slot_at(&c.pool.host, &c.pool.tree, n, s.anchor) < 0
    ):
        return torn(out, b"a checkpoint outlives the block that it goes with; slot:", i)
    return True


cdef inline bint audit_copies(Core* c, StateFinding* out) noexcept nogil:
    """Checkpoints in host memory, and the queue of those that are to be copied there."""
    cdef States* s = &c.pool.states
    cdef const Host* h = &c.pool.host
    cdef int32_t i, n, slot, offered = 0
    cdef int64_t place
    for i in range(s.fresh):
        offered += s.slots[i].offered
    if offered != s.num_offers:
        return torn(out, b"the queue of checkpoints to be copied has another length than was counted:", offered)
    for i in range(s.num_offers):
        place = (<int64_t>s.first_offer + i) % s.num_slots
        if s.offers[place] < 0 or s.offers[place] >= s.fresh or not s.slots[s.offers[place]].offered:
            return torn(out, b"the queue of checkpoints to be copied is torn; slot:", s.offers[place])
    for n in range(1, c.pool.tree.fresh):
        slot = checkpoint_at(h, &c.pool.tree, n)
        if slot < 0:
            continue
        if depth_of(&c.pool.tree, n) * c.block_size % s.every:
            return torn(out, b"a checkpoint in host memory stands off the grid; slot:", slot)
        if (
            h.slots[slot].holds == 0 and node_at(&c.pool.tree, n).blocks[s.anchor] < 0
            and slot_at(h, &c.pool.tree, n, s.anchor) < 0
        ):
            return torn(out, b"a checkpoint in host memory outlives the block that it goes with; slot:", slot)
    return True


cdef inline bint audit_rows(Core* c, int32_t* counts, StateFinding* out) noexcept nogil:
    """Slots that rows of open steps write are held once. Counts what these rows hold."""
    cdef States* s = &c.pool.states
    cdef int32_t i, j, k, slot
    cdef Step* step
    cdef StateRow* row
    for i in range(c.pool.num_steps):
        step = pool_step(&c.pool, i)
        for j in range(<int32_t>step.num_rows):
            row = &step.states[j]
            if row.returns and row.before >= 0:
                counts[row.before] += 1
            for k in range(row.count):
                slot = step.drafts[row.first + k]
                if slot < 0 or slot >= s.fresh or s.slots[slot].refs != 1 or s.slots[slot].node:
                    return torn(out, b"an open step writes a state that others find; slot:", slot)
                if k < row.count - 1 or step.own:
                    counts[slot] += 1
    return True


cdef inline bint audit_states(Core* c, int32_t* counts, StateFinding* out) noexcept nogil:
    """`counts` is zeroed scratch, one number for each slot."""
    cdef States* s = &c.pool.states
    cdef int32_t i, n, idle = 0, held = 0, newer = -1, hung = 0
    cdef Seq* seq
    if s.num_slots == 0:
        return True
    if not audit_copies(c, out) or not audit_rows(c, counts, out):
        return False
    for i in range(c.fresh_seq):
        seq = &c.seqs[i]
        n = s.standing[i].slot - 1
        if n >= s.fresh or n >= 0 and seq.kind == UNUSED:
            return torn(out, b"a place without a sequence stands on a state, or one on a state that is not there:", i)
        if n >= 0:
            counts[n] += 1
        if seq.kind == UNUSED or seq.kind == PIN:
            continue
        if n >= 0 and seq.num_prepared == 0:
            return torn(out, b"a sequence has a state before it has computed tokens; slot:", i)
        if n >= 0 and not s.standing[i].lost and s.slots[n].at != seq.num_prepared:
            return torn(out, b"a sequence stands on a state of other tokens; slot:", i)
        if s.standing[i].lost and seq.open_steps == 0:
            return torn(out, b"a sequence without its state goes on; slot:", i)
    for i in range(s.fresh):
        if s.slots[i].refs != counts[i]:
            return torn(out, b"a state's count is not the number of its holders; slot:", i)
        held += s.slots[i].refs > 0
        hung += s.slots[i].node != 0
        if s.slots[i].node and not audit_checkpoint(c, i, out):
            return False
    for n in range(c.pool.tree.fresh):
        hung -= s.of_node[n] != 0
    if hung:
        return torn(out, b"nodes know of checkpoints that do not hang on them; so many:", -hung)
    for i in range(s.stack_size):
        n = s.stack[i]
        if n < 0 or n >= s.fresh or s.slots[n].refs or s.slots[n].node or counts[n]:
            return torn(out, b"the stack of free states names one that is in use or free already:", n)
        counts[n] = -1
    n = s.newest
    while n >= 0 and idle <= s.num_slots:
        if n >= s.fresh or counts[n] or s.slots[n].node == 0 or s.slots[n].newer != newer:
            return torn(out, b"the list of checkpoints is torn; slot:", n)
        idle += 1
        newer = n
        n = s.slots[n].older
    if s.oldest != newer or idle != s.num_idle or s.stack_size + idle + held != s.fresh:
        return torn(out, b"a state is lost or in two places; held:", held)
    return True
