# What a step does with the states of its rows: which slots they take, what abort goes back to, what commit keeps, and
# which of them become checkpoints. Passes run in the order in which their steps were prepared, and the copies of a step
# after the pass before it: so a slot may be given out anew as soon as nobody holds it.

from libc.stdint cimport int32_t, int64_t

from core.checks cimport check
from core.memory cimport regrow
from core.ints cimport at, Ints
from core.tree cimport node_at
from core.states cimport (
    drop_checkpoint, forget_checkpoint, Standing, state_release, StateRow, States, states_free, StateSlot,
)
from core.host cimport slot_at
from core.pool cimport Step, StepRow, take_state
from core.sequences cimport LOST_STATE, NO_MEMORY, NO_STATES, OWN_STATE, Core, fail, Fault, handle_of, preempt, Seq
from kvblocks.step_arrays cimport Arrays


cdef inline bint wants_checkpoint(const Core* c, const Seq* seq, int32_t i) noexcept nogil:
    """Whether the slot that a sequence stands on is one to be found again, or will be once it is published."""
    cdef const States* s = &c.pool.states
    return s.slots[i].node != 0 or c.caching and seq.publishing and seq.num_prepared % s.every == 0


cdef inline bint grow_states(Step* step, int64_t num_slots) noexcept nogil:
    """Room for as many rows as the step has room for, and for the slots that they write."""
    cdef StateRow* rows = <StateRow*>regrow(step.states, max(step.capacity, 1) * sizeof(StateRow))
    cdef int32_t* drafts
    if rows == NULL:
        return False
    step.states = rows
    if num_slots > step.draft_capacity:
        drafts = <int32_t*>regrow(step.drafts, 2 * num_slots * sizeof(int32_t))
        if drafts == NULL:
            return False
        step.drafts = drafts
        step.draft_capacity = 2 * num_slots
    return True


cdef inline bint plan_own(Core* c, Step* step, Fault* f) noexcept nogil:
    """Note which rows take a slot for what the caller writes there: those that end on the grid and will be published,
    as far as slots are left. No effect."""
    cdef States* s = &c.pool.states
    cdef Py_ssize_t i
    cdef int64_t spare = states_free(s)
    cdef const Seq* seq
    cdef StateRow* row
    if not grow_states(step, step.num_rows):
        return fail(f, NO_MEMORY, 0, 0, 0)
    step.keeps = False
    for i in range(step.num_rows):
        seq, row = &c.seqs[step.rows[i].slot], &step.states[i]
        if s.standing[step.rows[i].slot].lost:
            return fail(f, LOST_STATE, i, seq.handle, seq.last_step)
        row.before = s.standing[step.rows[i].slot].slot - 1
        row.returns, row.in_place = True, False
        row.count = (
            spare > 0 and c.caching and seq.publishing and (seq.num_prepared + step.rows[i].count) % s.every == 0
        )
        spare -= row.count
    return True


cdef inline int64_t last_move_of(const Core* c, int32_t slot) noexcept nogil:
    """The newest move that names a slot of the device: whoever writes it waits for that."""
    return c.pool.host.shadows[c.pool.num_blocks + slot].move if c.pool.host.checkpoints.num_slots else 0


cdef inline int64_t prepare_own(Core* c, Step* step, Arrays* a) noexcept nogil:
    """Let sequences go from their slots, which the pass may read, and give each row its slot. The newest move that
    names one of these."""
    cdef States* s = &c.pool.states
    cdef Py_ssize_t i
    cdef int64_t j, first = 0, token = 0, needs = 0
    cdef int32_t slot
    cdef StateRow* row
    cdef const StepRow* tokens
    for i in range(step.num_rows):
        row, tokens = &step.states[i], &step.rows[i]
        row.first = first
        first += row.count
        s.standing[tokens.slot].slot = 0
        a.state_slots[i] = row.before
        for j in range(tokens.count):
            a.state_drafts[token + j] = -1
        token += tokens.count
        if row.count:
            slot = step.drafts[row.first] = take_state(&c.pool)
            s.slots[slot].at = tokens.start + tokens.count
            a.state_drafts[token - 1] = slot
            needs = max(needs, last_move_of(c, slot))
    return needs


cdef inline void leave_own(Core* c, Step* step, Py_ssize_t i) noexcept nogil:
    """What a row wrote for the caller is a checkpoint by now, or nothing."""
    cdef StateRow* row = &step.states[i]
    if row.count:
        state_release(&c.pool.states, step.drafts[row.first])


cdef inline bint plan_states(Core* c, Step* step, int64_t num_tokens, bint keep, Fault* f) noexcept nogil:
    """Note how many slots each row takes. No effect.

    A row that goes on where it stands needs none. Of those that stand on one slot, which nobody else holds, the last
    one can. As far as slots are left, rows take one all the same where what they leave behind is a checkpoint.
    """
    cdef States* s = &c.pool.states
    cdef Py_ssize_t i
    cdef int32_t slot
    cdef int64_t needed = 0, spare
    cdef StateRow* row
    cdef StateSlot* held
    if not grow_states(step, num_tokens if keep else step.num_rows):
        return fail(f, NO_MEMORY, 0, 0, 0)
    step.keeps = keep
    for i in range(step.num_rows):
        if s.standing[step.rows[i].slot].lost:
            return fail(f, LOST_STATE, i, c.seqs[step.rows[i].slot].handle, c.seqs[step.rows[i].slot].last_step)
        if s.standing[step.rows[i].slot].slot == 0 and c.seqs[step.rows[i].slot].num_prepared:
            return fail(f, OWN_STATE, i, c.seqs[step.rows[i].slot].handle, 0)
        slot = s.standing[step.rows[i].slot].slot - 1
        step.states[i].before = slot
        if slot >= 0:
            s.slots[slot].in_batch = 0
    for i in range(step.num_rows):
        if step.states[i].before >= 0:
            held = &s.slots[step.states[i].before]
            held.in_batch += 1
            held.last_row = <int32_t>i
    for i in range(step.num_rows):
        row = &step.states[i]
        held = &s.slots[max(row.before, 0)]
        row.in_place = not keep and row.before >= 0 and held.refs == held.in_batch and held.last_row == i
        row.count = step.rows[i].count if keep else 1
        row.returns = True
        if not row.in_place:
            needed += row.count
    if needed > states_free(s):
        return fail(f, NO_STATES, 0, needed, states_free(s))
    spare = states_free(s) - needed
    for i in range(step.num_rows):
        row = &step.states[i]
        if row.in_place and spare and wants_checkpoint(c, &c.seqs[step.rows[i].slot], row.before):
            row.in_place = False
            spare -= 1
    for i in range(step.num_rows):      # nobody goes back to what one of them writes
        row = &step.states[i]
        if row.before >= 0:
            s.slots[row.before].in_batch = step.states[s.slots[row.before].last_row].in_place
    for i in range(step.num_rows):
        row = &step.states[i]
        row.returns = row.before < 0 or not s.slots[row.before].in_batch
    return True


cdef inline int64_t prepare_states(Core* c, Step* step, Arrays* a) noexcept nogil:
    """Give each row its slots, and write them with their zeros and copies to the arrays. The newest move that names one
    of these."""
    cdef States* s = &c.pool.states
    cdef Py_ssize_t i
    cdef int64_t first = 0, needs = 0
    cdef int32_t j
    cdef int32_t* slots
    cdef StateRow* row
    cdef const StepRow* tokens
    for i in range(step.num_rows):
        row, tokens = &step.states[i], &step.rows[i]
        row.first = first
        first += row.count
        slots = step.drafts + row.first
        if row.in_place:
            slots[0] = row.before
            forget_checkpoint(s, row.before)
        else:
            for j in range(row.count):
                slots[j] = take_state(&c.pool)
            s.standing[tokens.slot].slot = slots[row.count - 1] + 1
            if row.before < 0:
                a.state_zero[a.num_state_zero] = slots[0]
                a.num_state_zero += 1
            elif not step.keeps:
                a.state_copies[2 * a.num_state_copies] = row.before
                a.state_copies[2 * a.num_state_copies + 1] = slots[0]
                a.num_state_copies += 1
            if not row.returns:
                s.slots[row.before].refs -= 1
        for j in range(row.count):
            check(s.slots[slots[j]].refs == 1, b"a state that is written has one holder")
            s.slots[slots[j]].at = tokens.start + j + 1 if step.keeps else tokens.start + tokens.count
            if step.keeps:
                a.state_drafts[row.first + j] = slots[j]
            needs = max(needs, last_move_of(c, slots[j]))
        a.state_slots[i] = row.before if step.keeps and row.before >= 0 else slots[0]
    s.copies += a.num_state_copies
    return needs


cdef inline void pad_states(Arrays* a, Py_ssize_t num_seqs, int64_t num_drafts) noexcept nogil:
    """Turn what the step before wrote past these counts back into padding."""
    cdef Py_ssize_t i
    for i in range(num_seqs, a.num_state_rows):
        a.state_slots[i] = -1
    for i in range(a.num_state_zero, a.last_state_zero):
        a.state_zero[i] = -1
    for i in range(num_drafts, a.num_state_drafts):
        a.state_drafts[i] = -1
    a.num_state_rows, a.num_state_drafts, a.last_state_zero = num_seqs, num_drafts, a.num_state_zero


cdef inline void return_state(Core* c, Step* step, Py_ssize_t i, bint launched) noexcept nogil:
    """The pass of a row did not happen, or nothing of it counts. If it may have been `launched` and wrote the only slot
    that the row has, its state is lost."""
    cdef States* s = &c.pool.states
    cdef StateRow* row = &step.states[i]
    cdef Standing* standing = &s.standing[step.rows[i].slot]
    cdef int32_t j
    if not row.returns and launched:
        standing.lost = True
        return
    standing.lost = False
    if row.in_place:
        s.slots[row.before].at = step.rows[i].start
        return
    for j in range(row.count - 1, -1, -1):
        state_release(s, step.drafts[row.first + j])
    row.count = 0
    standing.slot = row.before + 1
    if not row.returns:
        s.slots[row.before].refs += 1


cdef inline void return_states(Core* c, Step* step, bint launched) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(step.num_rows - 1, -1, -1):
        return_state(c, step, i, launched)


cdef inline void settle_state(Core* c, Step* step, Py_ssize_t i, int32_t count) noexcept nogil:
    """So many tokens of a row's pass count: let go of the slots that are not needed any more."""
    cdef States* s = &c.pool.states
    cdef StateRow* row = &step.states[i]
    cdef Standing* standing = &s.standing[step.rows[i].slot]
    cdef const int32_t* slots = step.drafts + row.first
    cdef int32_t j, kept
    if count == 0 and row.returns:
        return_state(c, step, i, True)
        return
    if row.returns and row.before >= 0:
        state_release(s, row.before)
    if step.own:
        if count < step.rows[i].count:
            leave_own(c, step, i)
            row.count = 0
        return
    kept = slots[count - 1] if step.keeps else slots[0]
    if count < step.rows[i].count:
        standing.slot = kept + 1
        standing.lost = not step.keeps
    for j in range(row.count - 1, -1, -1):
        if slots[j] != kept:
            state_release(s, slots[j])


cdef inline void settle_states(Core* c, Step* step, const Ints* accepted) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(step.num_rows):
        settle_state(c, step, i, step.rows[i].count if accepted == NULL else <int32_t>at(accepted, i))


cdef inline void leave_checkpoint(Core* c, Step* step, Py_ssize_t i) noexcept nogil:
    """Hang the slot that a committed row left behind on its node, if it stands at a grid point that is published."""
    cdef States* s = &c.pool.states
    cdef Seq* seq = &c.seqs[step.rows[i].slot]
    cdef Standing* standing = &s.standing[step.rows[i].slot]
    cdef StateRow* row = &step.states[i]
    cdef int32_t end = seq.num_computed, j = 0, slot, older
    if row.count == 0 or end <= step.rows[i].start or standing.lost:
        return
    if end % s.every or <int64_t>seq.published * c.block_size != end:
        return
    if step.keeps:
        j = end - step.rows[i].start - 1
    slot = step.drafts[row.first + j]
    if s.slots[slot].at != end or s.of_node[seq.last_node]:
        return
    if node_at(&c.pool.tree, seq.last_node).blocks[s.anchor] < 0 and (
        c.pool.host.num_slots == 0 or slot_at(&c.pool.host, &c.pool.tree, seq.last_node, s.anchor) < 0
    ):
        return
    check(s.slots[slot].refs > 0 and s.slots[slot].node == 0, b"a checkpoint is held when it is hung")
    s.of_node[seq.last_node] = slot + 1
    s.slots[slot].node = seq.last_node
    s.slots[slot].owner = handle_of(c, seq)
    s.checkpoints += 1
    older = standing.checkpoint - 1
    if older >= 0 and s.slots[older].owner == handle_of(c, seq) and s.slots[older].refs == 0:
        drop_checkpoint(s, older)
    standing.checkpoint = slot + 1


cdef inline void leave_checkpoints(Core* c, Step* step) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(step.num_rows):
        leave_checkpoint(c, step, i)
        if step.own:
            leave_own(c, step, i)


cdef inline void preempt_lost(Core* c, const Step* step) noexcept nogil:
    """Preempt sequences of a step that has left the ring, whose state is lost, and that no other step has."""
    cdef States* s = &c.pool.states
    cdef Py_ssize_t i
    cdef Seq* seq
    s.num_preempted = 0
    for i in range(step.num_rows):
        seq = &c.seqs[step.rows[i].slot]
        if s.standing[step.rows[i].slot].lost and seq.open_steps == 0:
            preempt(c, seq)
            s.preempted[s.num_preempted] = seq.handle
            s.num_preempted += 1
