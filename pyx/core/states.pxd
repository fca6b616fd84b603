# States: slots of fixed size, each with what the layers keep once for a sequence, and which of them are checkpoints. A
# pass overwrites the slot that its sequence stands on. One that stands at a multiple of `every` tokens is not written
# again where another can be had: the sequence goes on in a copy, and what stays behind hangs on the node of its prefix.
#
# A slot is free, held (refs > 0), or a checkpoint that nobody holds: in a list, the least recently used first. Holders
# are sequences that stand on it, rows of open steps that an abort takes back to it, and pins.
#
# A checkpoint is no use of its node. It goes with the block, or host slot, that hangs there for the group `anchor`:
# without that nobody could hit it.
#
# All of this lies in arrays of its own. Where no group keeps a state there are none, and `num_slots` is 0.

from libc.stdint cimport int32_t, int64_t, uint8_t

from core.checks cimport check
from core.reach cimport Reach


cdef struct StateSlot:
    int64_t owner       # handle of the sequence whose next checkpoint frees this one; 0: none, as it was hit
    int32_t refs
    int32_t at          # tokens it has seen once every pass that was prepared has run
    int32_t node        # whose checkpoint it is, 0: none
    int32_t older       # neighbours in the list, -1: none
    int32_t newer
    int32_t in_batch    # scratch of `plan_states`: rows of a batch that stand on it, and the last of them
    int32_t last_row
    uint8_t offered     # it is in the queue of those to be offloaded


cdef struct Standing:   # of a sequence or a pin
    int32_t slot        # 1 + the slot that it stands on, or holds; 0: none, which after computed tokens is the caller's
    int32_t checkpoint  # 1 + the slot of the newest checkpoint that it left; 0: none
    uint8_t lost        # an aborted pass wrote its slot: it is preempted once no open step has it


cdef struct StateRow:   # of one sequence in one open step
    int64_t first       # of its slots in `drafts` of the step
    int32_t count       # of these: one, or with drafts one for each token
    int32_t before      # the slot that it stood on, -1: none
    uint8_t returns     # whether an abort can go back to that; the row has a reference to it then
    uint8_t in_place    # it takes no slot


cdef struct States:
    int32_t num_slots
    int32_t every
    int32_t anchor
    const Reach* reaches    # of each layer group
    int32_t stack_size
    int32_t fresh       # slots from here on were never used
    int32_t oldest
    int32_t newest
    int32_t num_idle    # in the list
    StateSlot* slots
    int32_t* stack
    int32_t* of_node    # [max_nodes + 1]: 1 + the slot of the node's checkpoint, 0: none
    Standing* standing  # [max_seqs]
    int64_t* preempted  # [max_seqs]: handles of those that the last commit or abort has preempted
    int32_t num_preempted
    int32_t first_offer     # the ring of slots whose checkpoints are to be offloaded, if they still are some
    int32_t num_offers
    int32_t* offers     # [num_slots]; NULL: checkpoints have no slots in host memory
    int64_t evictions, copies, checkpoints


cdef inline int32_t states_free(const States* s) noexcept nogil:
    return s.stack_size + s.num_slots - s.fresh + s.num_idle


cdef inline void idle_remove(States* s, int32_t i) noexcept nogil:
    cdef StateSlot* slot = &s.slots[i]
    if slot.older >= 0:
        s.slots[slot.older].newer = slot.newer
    else:
        s.oldest = slot.newer
    if slot.newer >= 0:
        s.slots[slot.newer].older = slot.older
    else:
        s.newest = slot.older
    s.num_idle -= 1


cdef inline void idle_append(States* s, int32_t i) noexcept nogil:
    s.slots[i].older = s.newest
    s.slots[i].newer = -1
    if s.newest >= 0:
        s.slots[s.newest].newer = i
    else:
        s.oldest = i
    s.newest = i
    s.num_idle += 1


cdef inline void offer(States* s, int32_t i) noexcept nogil:
    """Let a checkpoint be offloaded, as it is to stay: it was hit, or its sequence has left."""
    cdef int64_t end = <int64_t>s.first_offer + s.num_offers
    if s.offers != NULL and not s.slots[i].offered:
        s.slots[i].offered = True
        s.offers[end if end < s.num_slots else end - s.num_slots] = i
        s.num_offers += 1


cdef inline int32_t next_offer(const States* s) noexcept nogil:
    check(s.num_offers > 0, b"there is an offer")
    return s.offers[s.first_offer]


cdef inline void end_offer(States* s) noexcept nogil:
    s.slots[next_offer(s)].offered = False
    s.first_offer = s.first_offer + 1 if s.first_offer + 1 < s.num_slots else 0
    s.num_offers -= 1


cdef inline void forget_checkpoint(States* s, int32_t i) noexcept nogil:
    """Take a slot off its node, if it hangs on one: nobody finds it any more."""
    if s.slots[i].node:
        check(s.of_node[s.slots[i].node] == i + 1, b"a checkpoint hangs on its node, and the node on it")
        s.of_node[s.slots[i].node] = 0
    s.slots[i].node = 0
    s.slots[i].owner = 0


cdef inline void state_push(States* s, int32_t i) noexcept nogil:
    check(s.stack_size < s.fresh, b"no state is free twice")
    s.stack[s.stack_size] = i
    s.stack_size += 1


cdef inline void drop_checkpoint(States* s, int32_t i) noexcept nogil:
    """The same, and the slot is free if nobody holds it."""
    forget_checkpoint(s, i)
    if s.slots[i].refs == 0:
        idle_remove(s, i)
        state_push(s, i)


cdef inline void lose_anchor(States* s, int32_t node) noexcept nogil:
    """A node has neither block nor host slot any more for the group with which its checkpoint goes; that of the device
    goes too."""
    if s.of_node[node]:
        drop_checkpoint(s, s.of_node[node] - 1)


cdef inline int32_t state_take(States* s) noexcept nogil:
    """A slot to write, with one reference. The caller has made sure that one is free."""
    cdef int32_t i
    if s.stack_size:
        s.stack_size -= 1
        i = s.stack[s.stack_size]
    elif s.fresh < s.num_slots:
        i = s.fresh
        s.fresh += 1
    else:
        i = s.oldest
        check(i >= 0, b"there is a checkpoint to evict")
        forget_checkpoint(s, i)
        idle_remove(s, i)
        s.evictions += 1
    check(0 <= i < s.fresh and s.slots[i].refs == 0 and s.slots[i].node == 0, b"a state is taken that nobody has")
    s.slots[i].refs = 1
    return i


cdef inline void state_release(States* s, int32_t i) noexcept nogil:
    """Drop a reference."""
    check(0 <= i < s.fresh and s.slots[i].refs > 0, b"a state is held as often as it is released")
    s.slots[i].refs -= 1
    if s.slots[i].refs == 0:
        if s.slots[i].node:
            idle_append(s, i)
            if s.slots[i].owner == 0:
                offer(s, i)
        else:
            state_push(s, i)


cdef inline void leave_state(States* s, int32_t seq, int64_t handle) noexcept nogil:
    """A sequence or a pin lets go of its slot, and no longer frees the newest checkpoint that it left."""
    cdef Standing* standing = &s.standing[seq]
    if standing.checkpoint and s.slots[standing.checkpoint - 1].owner == handle:
        offer(s, standing.checkpoint - 1)
    if standing.slot:
        state_release(s, standing.slot - 1)
    standing.slot = standing.lost = 0


cdef inline void hold_checkpoint(States* s, int32_t seq, int32_t node) noexcept nogil:
    """A hit: the checkpoint of a node is held, and stays when its sequence leaves a newer one."""
    cdef int32_t i = s.of_node[node] - 1
    check(i >= 0, b"a hit has a checkpoint")
    if s.slots[i].refs == 0:
        idle_remove(s, i)
    s.slots[i].refs += 1
    s.slots[i].owner = 0
    s.standing[seq].slot = i + 1


cdef inline void share_state(States* s, int32_t parent, int32_t child) noexcept nogil:
    """A child stands where its parent does."""
    s.standing[child].slot = s.standing[parent].slot
    if s.standing[child].slot:
        s.slots[s.standing[child].slot - 1].refs += 1


cdef inline void reset_checkpoints(States* s) noexcept nogil:
    """Nobody finds any of them any more, those that nobody holds first."""
    cdef int32_t i
    while s.oldest >= 0:
        drop_checkpoint(s, s.oldest)
    for i in range(s.fresh):
        forget_checkpoint(s, i)
