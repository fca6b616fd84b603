# The integrity check: derive everything again from the tables, in O(blocks + nodes), and compare.

from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memcmp

from core.memory cimport grab_zeroed
from core.text cimport PAGE_REFS, PAGE_ROOM, block_at, Extra, extra_of, page_of, pages_for, Text, token_at
from core.tree cimport hash_extra, line_of, Node, node_at, same_extra, tag_of, tokens_at, Tree, tree_find, tree_hash
from core.host cimport FETCHING, SPILLING, Host, Moves, host_free, slot_at, SlotPool, spill_index, Work
from core.background cimport room_for_work
from core.pool cimport Pool, pool_free, pool_step, Step, StepRow
from core.sequences cimport LIVE, PIN, PREEMPTED, UNUSED, blocks_for, Core, first_row, row_at, Seq
from core.steps cimport may_write
from core.audit_states cimport audit_states, StateFinding


cdef struct Finding:
    int invariant
    const char* what
    int64_t where


cdef inline bint broken(Finding* out, int invariant, const char* what, int64_t where) noexcept nogil:
    out.invariant, out.what, out.where = invariant, what, where
    return False


cdef enum State:
    NOWHERE, FREE, CACHED, WAITING


cdef inline bint audit_pool(Core* c, int32_t* counts, int32_t* order, char* state, Finding* out) noexcept nogil:
    """Invariants 1 and 2. Leaves each cached block's index in the LRU list in `order`."""
    cdef Pool* p = &c.pool
    cdef int32_t i, b, free_blocks = 0, held = 0, waiting = 0
    cdef int64_t j
    cdef uint32_t k, index
    cdef Step* step
    for i in range(c.fresh_seq):
        for j in range(<int64_t>c.seqs[i].num_rows * c.num_groups):
            b = c.seqs[i].table[j]
            if b == -1 and c.reach_ends:
                continue
            if b < 0 or b >= p.num_blocks:
                return broken(out, 1, b"a table names a block that does not exist", b)
            counts[b] += 1
    for i in range(p.num_steps):
        step = pool_step(p, i)
        for j in range(step.num_rows * c.num_groups):
            if step.sources[j] >= 0:
                counts[step.sources[j]] += 1
    for i in range(p.fresh, p.num_blocks):
        state[i] = FREE
    free_blocks = p.num_blocks - p.fresh
    for i in range(p.stack_size):
        b = p.stack[i]
        if b < 0 or b >= p.fresh or state[b] != NOWHERE:
            return broken(out, 1, b"the stack of free blocks names a block that is not in use or is free already", b)
        if p.blocks[b].node:
            return broken(out, 1, b"a published block lies among the unpublished free ones", b)
        state[b] = FREE
        free_blocks += 1
    i = 0
    for k in range(p.queue_tail - p.queue_head):
        index = (p.queue_head + k) & p.queue_mask
        b = p.queue[index]
        if b == -1:
            continue
        if b < 0 or b >= p.fresh or state[b] != NOWHERE or p.blocks[b].link != <int32_t>index:
            return broken(out, 1, b"the queue of cached blocks is torn", b)
        state[b] = CACHED
        order[b] = i
        i += 1
        free_blocks += 1
    if p.queue_tail - p.queue_head > p.queue_mask + 1 or i != p.num_cached:
        return broken(out, 1, b"the queue of cached blocks has another length than was counted", i)
    for i in range(p.num_steps):
        b = pool_step(p, i).wait_head
        while b >= 0:
            if b >= p.fresh or state[b] != NOWHERE or p.blocks[b].node:
                return broken(out, 1, b"a waiting block is free, published, or waits twice", b)
            state[b] = WAITING
            waiting += 1
            b = p.blocks[b].link
    for b in range(p.num_blocks):
        if b < p.fresh and p.blocks[b].refs != counts[b] or b >= p.fresh and counts[b]:
            return broken(out, 1, b"a block's count is not the number of references to it", b)
        if (counts[b] > 0) == (state[b] != NOWHERE):
            return broken(out, 1, b"a block is not exactly one of free, held and waiting", b)
        if state[b] == CACHED and p.blocks[b].node == 0:
            return broken(out, 1, b"an unpublished block lies among the cached ones", b)
        held += counts[b] > 0
    if waiting != p.num_waiting or free_blocks != pool_free(p) or free_blocks + held + waiting != p.num_blocks:
        return broken(out, 2, b"free + held + waiting is not the number of blocks; held:", held)
    return True


cdef inline bint audit_node(
    Core* c, int32_t n, const int32_t* counts, const int32_t* order, int32_t* uses, Finding* out
) noexcept nogil:
    """What invariants 3 and 4 say of one node. Counts its blocks and itself, its parent's child, in `uses`."""
    cdef Pool* p = &c.pool
    cdef Tree* t = &p.tree
    cdef Node* node = node_at(t, n)
    cdef Node* above
    cdef int32_t g, b, parent = node.parent
    cdef int32_t* tokens = tokens_at(t, n)
    cdef Extra extra
    if parent < 0 or parent >= t.fresh or node_at(t, parent).uses <= 0:
        return broken(out, 3, b"a node's parent does not exist; node:", n)
    above = node_at(t, parent)
    uses[parent] += 1
    if (node.size == 0) != (node.blob == NULL):
        return broken(out, 3, b"a node's extra bytes have no size, or no bytes; node:", n)
    extra.blob, extra.size = node.blob, node.size
    hash_extra(t, &extra)
    if tree_hash(t, above.hash, tokens, &extra if node.size else NULL) != node.hash:
        return broken(out, 3, b"a node's hash is not that of its prefix and tokens; node:", n)
    if tree_find(t, parent, node.hash, tokens, &extra if node.size else NULL) != n:
        return broken(out, 3, b"a node is not found under its key; node:", n)
    for g in range(c.num_groups):
        b = node.blocks[g]
        if b == -1:
            continue
        uses[n] += 1
        if b < 0 or b >= p.fresh or p.blocks[b].node != n:
            return broken(out, 3, b"a node's block does not hang on it; node:", n)
        if parent == 0 or c.reaches[g].window or c.reaches[g].chunk:
            continue
        if above.blocks[g] >= p.fresh:
            return broken(out, 3, b"a node's block does not exist; node:", parent)
        if above.blocks[g] < 0:
            return broken(out, 4, b"a block is published and the one before it is not; block:", b)
        if counts[b] and not counts[above.blocks[g]]:
            return broken(out, 4, b"a block is held and the one before it is not; block:", b)
        if not counts[b] and not counts[above.blocks[g]] and order[b] > order[above.blocks[g]]:
            return broken(out, 4, b"a cached block would be evicted after the one before it; block:", b)
    return True


cdef inline bint audit_tree(
    Core* c, const int32_t* counts, const int32_t* order, int32_t* uses, Finding* out
) noexcept nogil:
    """Invariants 3 and 4. `uses` is zeroed scratch, one number for each node."""
    cdef Pool* p = &c.pool
    cdef Tree* t = &p.tree
    cdef int32_t i, n, b, g, used = 0, found = 0
    cdef uint32_t line, first
    cdef int64_t passed = 0
    for n in range(1, t.fresh):
        if node_at(t, n).uses:
            used += 1
            if not audit_node(c, n, counts, order, uses, out):
                return False
    for i in range(c.fresh_seq):
        if c.seqs[i].kind != UNUSED and c.seqs[i].last_node > 0 and c.seqs[i].last_node < t.fresh:
            uses[c.seqs[i].last_node] += 1
    cdef const Work* work = p.host.works
    while work != NULL:
        if 0 < work.last_node < t.fresh:
            uses[work.last_node] += 1
        work = work.older
    for i in range(p.host.num_slots):
        if is_fresh(&p.host, i):
            continue
        if p.host.slots[i].node > 0 and p.host.slots[i].node < t.fresh:
            uses[p.host.slots[i].node] += 1
    for n in range(t.fresh):
        if node_at(t, n).uses != uses[n] + (n == 0):  # nothing may end the root
            return broken(out, 3, b"a node is not used as often as it notes; node:", n)
    if used != t.num_nodes or used > t.max_nodes:
        return broken(out, 3, b"the number of nodes is not what was counted:", used)
    for line in range(t.num_lines):
        for i in range(12):
            if t.lines[line].tags[i] == 0:
                continue
            n = t.lines[line].nodes[i]
            if n <= 0 or n >= t.fresh or node_at(t, n).uses <= 0:
                return broken(out, 3, b"the table finds what is no node; line:", line)
            if tag_of(node_at(t, n).hash) != t.lines[line].tags[i]:
                return broken(out, 3, b"the table has another tag than the node; node:", n)
            found += 1
            first = line_of(t, node_at(t, n).hash)
            passed += line - first if line >= first else <int64_t>t.num_lines - first + line
        passed -= t.lines[line].passed
    if found != used:
        return broken(out, 3, b"the table does not find every node; found:", found)
    if passed:
        return broken(out, 3, b"lines of the table were passed by more or fewer nodes than they count:", passed)
    for b in range(p.fresh):
        n = p.blocks[b].node
        if n < 0 or n >= t.fresh:
            return broken(out, 3, b"a block hangs on a node that does not exist; block:", b)
        if n:
            found = 0
            for g in range(c.num_groups):
                found += node_at(t, n).blocks[g] == b
            if found != 1:
                return broken(out, 3, b"a block hangs on a node that does not name it; block:", b)
    return True


cdef inline bint audit_sequences(Core* c, Finding* out) noexcept nogil:
    """Invariant 5, and what sequences know of the tree (3)."""
    cdef int32_t i, j, g, n, unknown, known, used = 0, alive = 0, resting = 0
    cdef int32_t bs = c.block_size
    cdef Seq* seq
    cdef Text* x
    for i in range(c.fresh_seq):
        seq = &c.seqs[i]
        x = &seq.text
        if seq.kind == UNUSED:
            if seq.num_rows or seq.handle > 0 or seq.last_node:
                return broken(out, 5, b"a slot without a sequence holds blocks; slot:", i)
            continue
        used += 1
        alive += seq.kind == LIVE or seq.kind == PREEMPTED
        resting += seq.kind == PIN or seq.kind == PREEMPTED
        if seq.kind == PIN:
            continue
        if not (
            0 <= seq.num_cached <= seq.num_computed <= seq.num_prepared <= seq.reserved <= x.num_tokens <= x.capacity
        ):
            return broken(out, 5, b"a sequence's lengths are out of order; slot:", i)
        if seq.open_steps == 0 and seq.num_prepared != seq.num_computed:
            return broken(out, 5, b"a sequence in no step has prepared tokens; slot:", i)
        if seq.num_rows != blocks_for(seq.reserved, bs) or seq.num_rows > seq.table_capacity:
            return broken(out, 5, b"a sequence has not the blocks that its reserved tokens need; slot:", i)
        for g in range(c.num_groups):
            for j in range(seq.num_rows):
                if (row_at(c, seq, j)[g] < 0) != (j < first_row(c, g, seq.num_computed)):
                    return broken(out, 5, b"a sequence has a block out of reach, or not one within; slot:", i)
        unknown = known = 0
        for j in range(x.num_tokens):
            unknown += token_at(&c.pool.tree.paging, x, j)[0] < 0
            known += unknown == 0
        if unknown != x.num_unknown or known != x.known:
            return broken(out, 5, b"a sequence miscounts its placeholders; slot:", i)
        if seq.published * bs > seq.num_computed or seq.published > seq.num_rows:
            return broken(out, 3, b"a sequence published more than it computed; slot:", i)
        n = seq.last_node
        for j in range(seq.published - 1, -1, -1):
            if n <= 0 or n >= c.pool.tree.fresh:
                return broken(out, 3, b"a sequence's published blocks are no path of the tree; slot:", i)
            for g in range(c.num_groups):
                if row_at(c, seq, j)[g] >= 0 and c.pool.blocks[row_at(c, seq, j)[g]].node != n:
                    return broken(out, 3, b"a published block does not hang on the sequence's node; slot:", i)
            if memcmp(tokens_at(&c.pool.tree, n), block_at(&c.pool.tree.paging, x, j), bs * sizeof(int32_t)):
                return broken(out, 3, b"a node's tokens are not those of its block; node:", n)
            if not same_extra(node_at(&c.pool.tree, n), extra_of(x, j)):
                return broken(out, 3, b"a node's extra bytes are not those of its block; node:", n)
            n = node_at(&c.pool.tree, n).parent
        if n != 0:
            return broken(out, 3, b"a sequence's last published node is not what it notes; slot:", i)
    if used != c.num_slots or alive != c.num_seqs or resting != c.num_resting:
        return broken(out, 5, b"the number of sequences is not what was counted:", used)
    return True


cdef inline bint audit_pages(Core* c, Finding* out) noexcept nogil:
    """Invariant 9. Takes every text's references off the pages, finds none left, and puts them back."""
    cdef int32_t i, j, torn = 0
    cdef Text* x
    for i in range(c.fresh_seq):
        x = &c.seqs[i].text
        for j in range(x.num_pages):
            x.pages[j][PAGE_REFS] -= 1
    for i in range(c.fresh_seq):
        x = &c.seqs[i].text
        for j in range(x.num_pages):
            torn += x.pages[j][PAGE_REFS] != 0
    for i in range(c.fresh_seq):
        x = &c.seqs[i].text
        for j in range(x.num_pages):
            x.pages[j][PAGE_REFS] += 1
    if torn:
        return broken(out, 9, b"pages of tokens have another count than the texts that name them; pages:", torn)
    for i in range(c.fresh_seq):
        x = &c.seqs[i].text
        if x.num_pages < pages_for(&c.pool.tree.paging, x.num_tokens):
            return broken(out, 9, b"a text has fewer pages than its tokens need; slot:", i)
        if x.capacity > x.num_tokens:
            j = page_of(&c.pool.tree.paging, x.num_tokens)
            if x.tail != x.pages[j] or x.tail[PAGE_REFS] != 1:
                return broken(out, 9, b"a text takes a page of others for its own; slot:", i)
            if x.capacity > j * c.pool.tree.paging.page_size + x.tail[PAGE_ROOM]:
                return broken(out, 9, b"a text takes more room for its own than it has; slot:", i)
    return True


cdef inline bint audit_steps(Core* c, int32_t* written, Finding* out) noexcept nogil:
    """Invariants 6 and 7. `written` is zeroed scratch, one number for each block."""
    cdef Pool* p = &c.pool
    cdef int32_t i, j, k, g, b, first, last
    cdef Step* step
    cdef StepRow* row
    cdef Seq* seq
    for i in range(p.num_steps):
        step = pool_step(p, i)
        for j in range(<int32_t>step.num_rows):
            row = &step.rows[j]
            seq = &c.seqs[row.slot]
            first = row.start // c.block_size
            last = (row.start + row.count - 1) // c.block_size
            if seq.open_steps == 0 or last >= seq.num_rows:
                return broken(out, 6, b"an open step writes where its sequence has no block; step:", step.id)
            for k in range(first, last + 1):
                for g in range(c.num_groups):
                    b = row_at(c, seq, k)[g]
                    if b < 0 or not may_write(c, b):
                        return broken(out, 6, b"an open step writes a block that is shared or published; block:", b)
                    if written[b] == i + 1:
                        return broken(out, 7, b"two rows of one step write into one block:", b)
                    written[b] = i + 1
    return True


cdef inline bint is_fresh(const Host* h, int32_t s) noexcept nogil:
    """Whether a host slot was never used."""
    return s >= (h.blocks.fresh if s < h.checkpoints.first else h.checkpoints.fresh)


cdef inline bint audit_slots(Core* c, const SlotPool* p, int32_t* seen, int32_t* hanging, Finding* out) noexcept nogil:
    """What invariant 10 says of one pool of slots. Counts those that hang on nodes."""
    cdef const Host* h = &c.pool.host
    cdef int32_t i, s, hung = 0, taken = 0, newer = -1
    for i in range(p.stack_size):
        s = p.stack[i]
        if s < p.first or s >= p.fresh or seen[s] or h.slots[s].node:
            return broken(out, 10, b"the stack of free host slots names one that is in use or free already:", s)
        seen[s] = 1
    s = p.newest
    while s >= 0 and hung <= p.num_slots:
        if s < p.first or s >= p.fresh or seen[s] or h.slots[s].newer != newer or h.slots[s].node <= 0:
            return broken(out, 10, b"the list of host slots is torn; slot:", s)
        seen[s] = 1
        hung += 1
        newer = s
        s = h.slots[s].older
    for s in range(p.first, p.fresh):
        if h.slots[s].passed:
            if seen[s] or h.slots[s].node <= 0 or h.slots[s].holds <= 0:
                return broken(out, 10, b"an eviction passed over a host slot that is in the list, or not held:", s)
            seen[s] = 1
            hung += 1
        taken += seen[s] == 0 and h.slots[s].holds > 0
        if h.slots[s].move > c.pool.moves.noted:
            return broken(out, 10, b"a host slot is named by a move that was never noted; slot:", s)
    if p.oldest != newer or hung + taken + host_free(p) != p.num_slots:
        return broken(out, 10, b"a host slot is lost or in two places; in use:", hung)
    hanging[0] += hung
    return True


cdef inline bint is_device(const Core* c, int32_t b) noexcept nogil:
    """Whether a number stands for a block that was used, or for a slot of states that was."""
    if b < c.pool.num_blocks:
        return 0 <= b < c.pool.fresh
    return b - c.pool.num_blocks < c.pool.states.fresh


cdef inline bint audit_host(Core* c, int32_t* seen, Finding* out) noexcept nogil:
    """Invariant 10. `seen` is zeroed scratch, one number for each host slot."""
    cdef Host* h = &c.pool.host
    cdef Tree* t = &c.pool.tree
    cdef const Moves* m = &c.pool.moves
    cdef int32_t i, n, g, b, s, hanging = 0, ahead = 0
    cdef uint32_t k
    if not 0 <= m.landed <= m.marked <= m.handed <= m.noted:
        return broken(out, 10, b"a move is done before it is handed out; the newest:", m.noted)
    if h.num_slots == 0:
        return True
    if not audit_slots(c, &h.blocks, seen, &hanging, out):
        return False
    if h.checkpoints.num_slots and not audit_slots(c, &h.checkpoints, seen, &hanging, out):
        return False
    for n in range(t.fresh):
        for g in range(h.width):
            s = slot_at(h, t, n, g)
            if s < 0:
                continue
            if s >= h.num_slots or is_fresh(h, s) or h.slots[s].node != n or h.slots[s].group != g:
                return broken(out, 10, b"a node's host slot does not hang on it; node:", n)
            if (s >= h.checkpoints.first) != (g == c.num_groups):
                return broken(out, 10, b"a node has a host slot of another size; node:", n)
            hanging -= 1
    if hanging:
        return broken(out, 10, b"host slots hang on nodes that do not know of them; so many:", hanging)
    for i in range(h.num_loads):
        b = h.loads[i]
        if not is_device(c, b) or h.shadows[b].noted != i + 1:
            return broken(out, 10, b"the list of noted loads is torn; block:", b)
        if h.shadows[b].load <= m.handed or h.shadows[b].load > h.shadows[b].move:
            return broken(out, 10, b"a noted load has the number of one that was handed out; block:", b)
    for b in range(c.pool.num_blocks + h.num_states):
        if is_device(c, b) and (h.shadows[b].move > m.noted or h.shadows[b].noted > h.num_loads):
            return broken(out, 10, b"a block waits for a move that was never noted; block:", b)
    for k in range(c.pool.queue_head, h.cursor):
        ahead += c.pool.queue[k & c.pool.queue_mask] >= 0
    if ahead != h.examined or <int32_t>(c.pool.queue_tail - h.cursor) < 0:
        return broken(out, 10, b"the cached blocks that were examined are not those before the cursor:", ahead)
    return True


cdef inline bint audit_queue(const Host* h, const SlotPool* p, int32_t* holds, Finding* out) noexcept nogil:
    """Whether a queue of slots to be spilled has slots of its own pool, each once. Those it has get -1 in `holds`."""
    cdef int32_t i, s
    for i in range(p.spill_size):
        s = p.spills[spill_index(p, i)]
        if (
            s < p.first or s >= p.first + p.num_slots or is_fresh(h, s) or not h.slots[s].queued or holds[s] < 0
        ):
            return broken(out, 12, b"the queue of slots to be spilled is torn; slot:", s)
        holds[s] = -1
    return True


cdef inline bint audit_background(Core* c, int32_t* holds, Finding* out) noexcept nogil:
    """Invariant 12. `holds` is zeroed scratch, one number for each host slot."""
    cdef const Host* h = &c.pool.host
    cdef const Tree* t = &c.pool.tree
    cdef const Work* work = h.works
    cdef int32_t i, s, queued = 0, held = 0, checkpoints = 0
    cdef int64_t newest = h.num_begun
    if h.num_slots == 0:
        return True
    while work != NULL:
        if work.number > newest or work.older != NULL and work.older.newer != work:
            return broken(out, 12, b"the list of fetches and spills is torn; number:", work.number)
        newest = work.number - 1
        for i in range(work.num_slots):
            s = work.slots[i]
            if s < -1 or s >= h.num_slots or s >= 0 and is_fresh(h, s):
                return broken(out, 12, b"work in the background holds a slot that does not exist:", s)
            if s >= 0:
                holds[s] += 1
            if work.kind == FETCHING and i < work.num_rows and (s < 0 or h.slots[s].node):
                return broken(out, 12, b"a slot that a fetch has taken is found; slot:", s)
            if work.kind == SPILLING and not work.stale and h.slots[s].node != work.nodes[work.rows[i].index]:
                return broken(out, 12, b"a slot that is spilled has lost its node; slot:", s)
        work = work.older
    for s in range(h.num_slots):
        if is_fresh(h, s):
            continue
        if h.slots[s].holds != holds[s]:
            return broken(out, 12, b"a host slot is not held as often as it notes; slot:", s)
        if h.slots[s].known and h.slots[s].node == 0:
            return broken(out, 12, b"a host slot without a node is known outside; slot:", s)
        if s < h.checkpoints.first:
            held += holds[s] > 0
        else:
            checkpoints += holds[s] > 0
        queued += h.slots[s].queued
    if (
        held != h.blocks.num_held or room_for_work(&h.blocks) < 0
        or checkpoints != h.checkpoints.num_held or room_for_work(&h.checkpoints) < 0
    ):
        return broken(out, 12, b"work in the background holds too many slots, or miscounts them:", held + checkpoints)
    if queued != h.blocks.spill_size + h.checkpoints.spill_size:
        return broken(out, 12, b"the queues of slots to be spilled have other lengths than were counted:", queued)
    if not audit_queue(h, &h.blocks, holds, out) or not audit_queue(h, &h.checkpoints, holds, out):
        return False
    for i in range(t.fresh):
        if h.places[i]:
            return broken(out, 12, b"a spill has left a mark on a node:", i)
        if t.named[i] and (node_at(t, i).uses == 0 or node_at(t, i).parent and not t.named[node_at(t, i).parent]):
            return broken(out, 12, b"a node has a digest and the one before it has none; node:", i)
    return True


cdef inline bint audit_core(Core* c, Finding* out) noexcept nogil:
    cdef size_t n = c.pool.num_blocks
    cdef int32_t* counts = <int32_t*>grab_zeroed(n, sizeof(int32_t))
    cdef int32_t* order = <int32_t*>grab_zeroed(n, sizeof(int32_t))
    cdef int32_t* written = <int32_t*>grab_zeroed(n, sizeof(int32_t))
    cdef int32_t* uses = <int32_t*>grab_zeroed(c.pool.tree.fresh, sizeof(int32_t))
    cdef int32_t* seen = <int32_t*>grab_zeroed(max(c.pool.host.num_slots, 1), sizeof(int32_t))
    cdef int32_t* standing = <int32_t*>grab_zeroed(max(c.pool.states.num_slots, 1), sizeof(int32_t))
    cdef int32_t* holds = <int32_t*>grab_zeroed(max(c.pool.host.num_slots, 1), sizeof(int32_t))
    cdef char* state = <char*>grab_zeroed(n, 1)
    cdef StateFinding found
    cdef bint ok
    if (
        counts == NULL or order == NULL or written == NULL or uses == NULL or seen == NULL or standing == NULL
        or holds == NULL
        or state == NULL
    ):
        ok = broken(out, 0, b"no memory to audit blocks:", n)
    else:
        ok = (
            audit_pool(c, counts, order, state, out)
            and audit_tree(c, counts, order, uses, out)
            and audit_host(c, seen, out)
            and audit_background(c, holds, out)
            and audit_pages(c, out)
            and audit_sequences(c, out)
            and audit_steps(c, written, out)
        )
        if ok and not audit_states(c, standing, &found):
            ok = broken(out, 11, found.what, found.where)
    free(counts)
    free(order)
    free(written)
    free(uses)
    free(seen)
    free(standing)
    free(holds)
    free(state)
    return ok
