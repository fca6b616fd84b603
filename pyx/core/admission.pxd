# Admission: the longest hit that a prompt has in the prefix cache, whether the blocks for the rest are there, and who
# gets them: new sequences, resumed ones, and pins.

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free
from libc.string cimport memmove, memset

from core.memory cimport MAX_GROUPS, grab, least_multiple
from core.reach cimport most_in_chunk, most_in_window
from core.text cimport Text
from core.tree cimport kvb_prefetch, kvb_prefetch_write, node_at, tree_walk
from core.states cimport hold_checkpoint, States, states_free
from core.host cimport checkpoint_at, note_load, slot_at, use_slot
from core.pool cimport acquire, Pool, pool_free, take_state
from core.sequences cimport (
    LIVE, NO_BLOCKS, NO_MEMORY, NOT_PREEMPTED, NOTHING_TO_PIN, PIN, PREEMPTED, WATERMARK, blocks_for, Core, fail,
    Fault, find, first_row, grow_table, has_room, note_peak, open_seq, row_at, Seq, set_last_node, take_for, touch,
    wait_for,
)


cdef enum Tiers:        # from which a hit may come
    DEVICE = 0
    HOST_BLOCKS = 1     # blocks from host slots too
    HOST = 2            # the checkpoint too


cdef inline int64_t held_by(const Core* c, int64_t position, int64_t end) noexcept nogil:
    """Blocks that a sequence alone holds while its tokens [position, end) are computed."""
    cdef int64_t held = 0, rows = (end + c.block_size - 1) // c.block_size
    cdef int32_t g
    for g in range(c.num_groups):
        held += rows - first_row(c, g, <int32_t>position)
    return held


cdef struct Stride:     # how tokens are computed: from `base` on, `size` at a time
    int64_t base
    int64_t size
    int32_t num_chunks
    int64_t[MAX_GROUPS] chunks      # [num_chunks]: each size of a chunk once, the largest first
    int64_t[MAX_GROUPS + 1] periods  # after so many tokens what groups with windows and chunks[i:] hold repeats
    int64_t[MAX_GROUPS + 1] bounds  # they hold no more blocks than this


cdef inline void open_stride(const Core* c, int64_t base, int64_t size, Stride* s) noexcept nogil:
    cdef int32_t g, i
    cdef int64_t chunk, n = c.block_size
    s.base, s.size, s.num_chunks = base, size, 0
    memset(s.bounds, 0, sizeof(s.bounds))
    for g in range(c.num_groups):
        chunk = c.reaches[g].chunk
        if c.reaches[g].window:
            s.bounds[0] += most_in_window(c.reaches[g].window, size, n)
        i = s.num_chunks
        while chunk and i and s.chunks[i - 1] < chunk:
            i -= 1
        if chunk and not (i and s.chunks[i - 1] == chunk):
            memmove(&s.chunks[i + 1], &s.chunks[i], (s.num_chunks - i) * sizeof(int64_t))
            s.chunks[i] = chunk
            s.num_chunks += 1
    s.periods[s.num_chunks], s.bounds[s.num_chunks] = least_multiple(size, n), s.bounds[0]
    for i in range(s.num_chunks - 1, -1, -1):
        chunk = s.chunks[i]
        s.periods[i], s.bounds[i] = least_multiple(s.periods[i + 1], chunk), s.bounds[i + 1]
        for g in range(c.num_groups):
            if c.reaches[g].chunk == chunk:
                s.bounds[i] += most_in_chunk(chunk, size, n)


cdef inline int64_t next_step(const Stride* s, int64_t position) noexcept nogil:
    """Where the first step from a position on begins."""
    return position + (s.size - (position - s.base) % s.size) % s.size


cdef inline int64_t bound_of(const Core* c, const Stride* s, int32_t i, int64_t last) noexcept nogil:
    """What no step holds more than that begins at `last` or before, in the same chunks of chunks[:i]."""
    cdef int32_t g, chunk
    cdef int64_t bound = s.bounds[i], rows = (last + s.size + c.block_size - 1) // c.block_size
    for g in range(c.num_groups):
        chunk = c.reaches[g].chunk
        if c.reaches[g].window == 0 and (chunk == 0 or i == s.num_chunks or chunk > s.chunks[i]):
            bound += rows - first_row(c, g, <int32_t>last)
    return bound


cdef inline int64_t most_between(
    const Core* c, const Stride* s, int32_t i, int64_t first, int64_t last, int64_t most
) noexcept nogil:
    """The most blocks held by a whole step that begins at `first` to `last`, between which no chunk of chunks[:i] ends;
    or `most`, where that is more.

    A period earlier the groups that repeat hold as much, and all others no more: so the last period has the most. It is
    taken apart where the largest of the other chunks end, from the last on, until what comes before cannot hold more.
    Within one chunk of each size the first of the steps that end in one block holds the most.
    """
    cdef int64_t begin, end
    first = max(first, last - s.periods[i] + s.size)
    while last >= first and bound_of(c, s, i, last) > most:
        if i < s.num_chunks:
            begin = next_step(s, max(first, last - last % s.chunks[i]))
            most = most_between(c, s, i + 1, begin, last, most)
        else:
            end = (last + s.size - 1) // c.block_size * c.block_size
            begin = next_step(s, max(first, end + 1 - s.size))
            most = max(most, held_by(c, begin, begin + s.size))
        last = begin - s.size
    return most


cdef inline int64_t most_held(const Core* c, int64_t position, int64_t end, int64_t step) noexcept nogil:
    """The most blocks that a sequence alone holds while it computes its tokens [position, end), `step` at a time."""
    cdef Stride s
    cdef int64_t last
    if position >= end:     # `step` may be 0 then
        return 0
    last = position + (end - position - 1) // step * step   # of `step` tokens, or of those that are left
    open_stride(c, position, step, &s)
    return most_between(c, &s, 0, position, last - step, held_by(c, last, end))


cdef inline int64_t most_ever(const Core* c, int64_t num_tokens, int64_t num_new, int64_t reserve) noexcept nogil:
    """Blocks with which a prompt alone, after no hit, gets its last token: the prompt in steps of `reserve` tokens, or
    in one, and all new tokens but the last one by one."""
    cdef int64_t step = num_tokens if reserve < 0 else max(<int64_t>1, reserve)
    return max(
        most_held(c, 0, num_tokens, min(step, num_tokens)), most_held(c, num_tokens, num_tokens + num_new - 1, 1)
    )


cdef inline int32_t hit_limit(Core* c, const Text* x, int64_t max_hit) noexcept nogil:
    """Blocks that a hit may have: whole, known, at most `max_hit` tokens, and one token is left to compute."""
    cdef int64_t limit = min(x.num_tokens - 1, x.known)
    if max_hit >= 0:
        limit = min(limit, max_hit)
    return <int32_t>(limit // c.block_size) if c.caching and x.num_tokens else 0


cdef inline bint is_there(const Core* c, int32_t n, int32_t g, Tiers tiers) noexcept nogil:
    """Whether a node has a block in a group, or a slot where these may be hit."""
    return node_at(&c.pool.tree, n).blocks[g] >= 0 or tiers and slot_at(&c.pool.host, &c.pool.tree, n, g) >= 0


cdef inline bint has_state(const Core* c, const int32_t* nodes, int32_t hit, Tiers tiers) noexcept nogil:
    """Whether a hit of so many nodes can go on: from zero, or from the checkpoint of its last one."""
    if hit == 0 or c.pool.states.num_slots == 0 or c.pool.states.of_node[nodes[hit - 1]] != 0:
        return True
    return tiers == HOST and checkpoint_at(&c.pool.host, &c.pool.tree, nodes[hit - 1]) >= 0


cdef inline Tiers tiers_for(const Core* c, bint host) noexcept nogil:
    """From where an admission can have its hit: a checkpoint is loaded into a slot of the sequence's own."""
    if not host or c.pool.host.num_slots == 0:
        return DEVICE
    return HOST if c.pool.states.num_slots == 0 or states_free(&c.pool.states) else HOST_BLOCKS


cdef inline int32_t longest_hit(const Core* c, const int32_t* nodes, int32_t n, Tiers tiers) noexcept nogil:
    """How many of n nodes of a path make a hit: every group has the blocks that a token after them reaches, or slots
    for them; and where a group keeps a state, it is there."""
    cdef int32_t i, g, best = 0
    cdef int32_t[MAX_GROUPS] since      # the first row from which on the group has all blocks
    cdef bint served
    if not c.reach_ends and c.num_groups == 1 and c.pool.host.num_slots == 0:
        while not has_state(c, nodes, n, tiers):
            n -= 1
        return n
    memset(since, 0, c.num_groups * sizeof(int32_t))
    for i in range(n):
        served = True
        for g in range(c.num_groups):
            if not is_there(c, nodes[i], g, tiers):
                since[g] = i + 1
            served = served and since[g] <= min(first_row(c, g, (i + 1) * c.block_size), i + 1)
        if served and has_state(c, nodes, i + 1, tiers):
            best = i + 1
    return best


cdef inline int32_t late_rows(const Core* c, const int32_t* nodes, int32_t hit) noexcept nogil:
    """Rows of a hit for which something has to be loaded."""
    cdef int32_t g, i, late = 0
    cdef bint there
    for i in range(hit):
        there = True
        for g in range(c.num_groups):
            there = there and (i < first_row(c, g, hit * c.block_size) or is_there(c, nodes[i], g, DEVICE))
        late += not there
    return late


cdef inline int32_t hit_that_fits(
    const Core* c, const Text* x, int64_t reserve, const int32_t* nodes, int32_t hit, Tiers tiers
) noexcept nogil:
    """The longest hit after which the pool has the blocks for the rest of a sequence, were it alone. Steps that begin
    elsewhere than without a hit can hold more at once. Where no hit is no better the longest stays."""
    cdef int32_t longest = hit
    if reserve < 0 or most_ever(c, x.num_tokens, 1, reserve) > c.pool.num_blocks:
        return longest
    while hit and most_held(
        c, <int64_t>hit * c.block_size, x.num_tokens, max(<int64_t>1, reserve)
    ) > c.pool.num_blocks:
        hit = longest_hit(c, nodes, hit - 1, tiers)
    return hit


cdef struct Cost:       # of a hit
    int32_t idle        # cached blocks that nobody holds: they are free no longer
    int32_t loads       # blocks for what lies in host slots


cdef inline void add_cost(
    const Core* c, const int32_t* nodes, int32_t g, int32_t first, int32_t end, int32_t sign, Cost* out
) noexcept nogil:
    """Add what the rows [first, end) of a hit cost in one group, or take it off again."""
    cdef int32_t i, b
    for i in range(first, end):
        b = node_at(&c.pool.tree, nodes[i]).blocks[g]
        if b < 0:
            out.loads += sign
        elif c.pool.blocks[b].refs == 0:
            out.idle += sign


cdef inline int32_t shorter_hit(
    const Core* c, const int32_t* nodes, int32_t hit, Tiers tiers, Cost* cost
) noexcept nogil:
    """The next shorter hit than one with loads, and its cost. Of full groups a row less is one less; what groups with
    a window or chunks need is looked at again."""
    cdef int32_t g, i, longer = hit
    cdef bint served = False
    while not served:
        hit -= 1
        served = has_state(c, nodes, hit, tiers)
        for g in range(c.num_groups):
            if c.reaches[g].window or c.reaches[g].chunk:
                for i in range(hit - 1, first_row(c, g, hit * c.block_size) - 1, -1):
                    served = served and is_there(c, nodes[i], g, tiers)
    for g in range(c.num_groups):
        if c.reaches[g].window or c.reaches[g].chunk:
            add_cost(c, nodes, g, first_row(c, g, longer * c.block_size), longer, -1, cost)
            add_cost(c, nodes, g, first_row(c, g, hit * c.block_size), hit, 1, cost)
        else:
            add_cost(c, nodes, g, hit, longer, -1, cost)
    return hit


cdef inline bint has_blocks(Core* c, int64_t new, int32_t idle, bint watermark, Fault* f) noexcept nogil:
    cdef int32_t available = pool_free(&c.pool) - idle
    if new > available:
        return fail(f, NO_BLOCKS, 0, new, available)
    # Nothing that runs: nothing for which blocks are kept, and nothing that would ever give any back.
    if watermark and c.num_slots > c.num_resting and new > max(available - c.watermark, 0):
        return fail(f, WATERMARK, 0, new, max(available - c.watermark, 0))
    return True


cdef inline int32_t slots_after(const Core* c, const Text* x, int64_t reserve, int32_t hit) noexcept nogil:
    """How many tokens get slots with a hit of so many blocks."""
    if reserve < 0:
        return x.num_tokens
    return <int32_t>min(<int64_t>x.num_tokens, <int64_t>hit * c.block_size + reserve)


cdef inline int64_t new_blocks(const Core* c, int32_t target, int32_t hit, const Cost* cost) noexcept nogil:
    return <int64_t>max(blocks_for(target, c.block_size) - hit, 0) * c.num_groups + cost.loads


cdef inline bint plan_admission(
    Core* c, const Text* x, int64_t reserve, int64_t max_hit, bint host, int32_t* found, int32_t* num_found,
    int32_t* target, Fault* f, bint watermark,
) noexcept nogil:
    """Find the hit and check that the blocks for the rest are there. `found` gets the hit's nodes. No effect.

    A hit whose loads do not fit is cut until they do. Where all tokens get slots and no group has an end to its reach,
    that is no use: what is not loaded is computed, into as many blocks.
    """
    cdef int32_t i, g, hit
    cdef Cost cost
    cdef Fault shorter
    cdef Tiers tiers = tiers_for(c, host)
    cost.idle = cost.loads = 0
    hit = longest_hit(c, found, tree_walk(&c.pool.tree, x, hit_limit(c, x, max_hit), found), tiers)
    if c.reach_ends and <int64_t>blocks_for(x.num_tokens, c.block_size) * c.num_groups > c.pool.num_blocks:
        hit = hit_that_fits(c, x, reserve, found, hit, tiers)
    for g in range(c.num_groups):
        for i in range(first_row(c, g, hit * c.block_size), hit):
            if node_at(&c.pool.tree, found[i]).blocks[g] >= 0:
                kvb_prefetch(&c.pool.blocks[node_at(&c.pool.tree, found[i]).blocks[g]])
                if c.pool.host.num_slots:
                    kvb_prefetch_write(&c.pool.host.shadows[node_at(&c.pool.tree, found[i]).blocks[g]])
        add_cost(c, found, g, first_row(c, g, hit * c.block_size), hit, 1, &cost)
    num_found[0], target[0] = hit, slots_after(c, x, reserve, hit)
    if has_blocks(c, new_blocks(c, target[0], hit, &cost), cost.idle, watermark, f):
        return True
    while cost.loads and (reserve >= 0 or c.reach_ends):
        hit = shorter_hit(c, found, hit, tiers, &cost)
        num_found[0], target[0] = hit, slots_after(c, x, reserve, hit)
        if has_blocks(c, new_blocks(c, target[0], hit, &cost), cost.idle, watermark, &shorter):
            return True
    return False


cdef inline void hold_hit(Core* c, Seq* seq, const int32_t* nodes, int32_t hit) noexcept nogil:
    """Hold the blocks that a hit needs and write them to the first rows of the table. `nodes` may lie in its end."""
    cdef int32_t i, g, n, b
    cdef int32_t[MAX_GROUPS] low
    for g in range(c.num_groups):
        low[g] = first_row(c, g, hit * c.block_size)
    for i in range(hit):
        n = nodes[i]
        for g in range(c.num_groups):
            b = -1
            if i >= low[g]:
                b = node_at(&c.pool.tree, n).blocks[g]
                if b >= 0:
                    acquire(&c.pool, b)
            seq.table[<int64_t>i * c.num_groups + g] = b


cdef inline int64_t load_hit(Core* c, Seq* seq, int32_t hit) noexcept nogil:
    """Take blocks for what of a hit lies in host slots, note their loads, and make the hit's slots the most recent. How
    many rows of it had something to load. The blocks are hung on their nodes at once: who finds them waits as well."""
    cdef Pool* p = &c.pool
    cdef int32_t i, g, n = seq.last_node, late = 0
    cdef int32_t* blocks
    cdef bint loads
    for i in range(hit - 1, -1, -1):
        blocks = row_at(c, seq, i)
        loads = False
        for g in range(c.num_groups):
            if i < first_row(c, g, hit * c.block_size):
                continue
            if blocks[g] >= 0:
                wait_for(c, seq, p.host.shadows[blocks[g]].load)
                continue
            loads = True
            blocks[g] = take_for(c, seq)
            node_at(&p.tree, n).blocks[g] = blocks[g]
            node_at(&p.tree, n).uses += 1
            p.blocks[blocks[g]].node = n
            note_load(&p.host, &p.moves, slot_at(&p.host, &p.tree, n, g), blocks[g])
            wait_for(c, seq, p.moves.noted)
        for g in range(c.num_groups):
            if i >= first_row(c, g, hit * c.block_size):
                use_slot(&p.host, &p.tree, n, g)
        late += loads
        n = node_at(&p.tree, n).parent
    return late


cdef inline void hold_state(Core* c, Seq* seq, int32_t n) noexcept nogil:
    """Let a sequence or a pin stand on the checkpoint of a node. One that lies in host memory alone is loaded into a
    slot of the device, which is the node's checkpoint at once: there is a slot to be had."""
    cdef Pool* p = &c.pool
    cdef States* s = &p.states
    cdef int32_t i, source = checkpoint_at(&p.host, &p.tree, n)
    if source >= 0:
        use_slot(&p.host, &p.tree, n, p.tree.num_groups)
    if s.of_node[n] == 0:
        i = take_state(p)
        s.of_node[n] = i + 1
        s.slots[i].node, s.slots[i].at = n, seq.num_cached
        s.standing[seq - c.seqs].slot = i + 1
        note_load(&p.host, &p.moves, source, p.num_blocks + i)
    else:
        hold_checkpoint(s, <int32_t>(seq - c.seqs), n)
    if p.host.checkpoints.num_slots:
        wait_for(c, seq, p.host.shadows[p.num_blocks + s.of_node[n] - 1].load)


cdef inline int32_t* path_of(const Core* c, int32_t* table, int32_t capacity) noexcept nogil:
    """Room for the nodes of a hit, one for each row, in the end of a table: `hold_hit` reads a node before it
    overwrites it."""
    return table + <int64_t>capacity * (c.num_groups - 1)


cdef struct Cached:     # tokens of a hit
    int64_t tokens
    int64_t loaded      # of these, those that come from the host


cdef inline int64_t occupy(Core* c, Seq* seq, const int32_t* nodes, int32_t hit, int32_t target) noexcept nogil:
    """Hold the hit and take the blocks for the rest; they are there, and the table has room. Tokens that are loaded."""
    cdef int64_t i
    cdef int32_t last_node = nodes[hit - 1] if hit else 0
    cdef int64_t late = 0
    set_last_node(&c.pool.tree, seq, last_node)
    hold_hit(c, seq, nodes, hit)
    seq.num_cached = seq.num_computed = seq.num_prepared = hit * c.block_size
    if c.pool.host.num_slots:
        c.pool.host.needs[seq - c.seqs] = 0
        late = load_hit(c, seq, hit) * c.block_size
        c.pool.host.hit_tokens += late
    if c.pool.states.num_slots and hit:
        hold_state(c, seq, last_node)
    seq.num_rows = blocks_for(target, c.block_size)
    for i in range(<int64_t>hit * c.num_groups, <int64_t>seq.num_rows * c.num_groups):
        seq.table[i] = take_for(c, seq)
    seq.reserved = max(target, seq.num_cached)
    seq.published = hit
    seq.publishing = c.caching
    c.counters.prompt_tokens += seq.text.num_tokens
    c.counters.hit_tokens += seq.num_cached
    note_peak(c)
    return late


cdef inline int64_t core_admit(
    Core* c, Text* x, int64_t reserve, int64_t max_hit, bint host, Fault* f, Cached* cached
) noexcept nogil:
    """A sequence that takes over `x`; 0 after a fault."""
    cdef int32_t hit, target
    cdef Seq* seq
    cdef int32_t capacity = blocks_for(x.num_tokens, c.block_size)
    cdef int32_t* table
    cdef int32_t* path
    if not has_room(c, 1, f):
        return 0
    table = <int32_t*>grab(<size_t>capacity * c.num_groups * sizeof(int32_t))
    if table == NULL:
        fail(f, NO_MEMORY, 0, capacity, 0)
        return 0
    path = path_of(c, table, capacity)
    if not plan_admission(c, x, reserve, max_hit, host, path, &hit, &target, f, True):
        free(table)
        return 0
    seq = open_seq(c, LIVE)
    seq.table = table
    seq.table_capacity = capacity
    seq.text = x[0]
    memset(x, 0, sizeof(Text))
    cached.loaded = occupy(c, seq, path, hit, target)
    c.counters.admitted += 1
    cached.tokens = seq.num_cached
    return seq.handle


cdef inline bint core_resume(
    Core* c, int64_t handle, int64_t reserve, int64_t max_hit, bint host, Fault* f, Cached* cached
) noexcept nogil:
    cdef Seq* seq = find(c, handle, 0, f)
    cdef int32_t hit, target
    cdef int32_t* path
    if seq == NULL:
        return False
    if seq.kind != PREEMPTED:
        return fail(f, NOT_PREEMPTED, 0, handle, 0)
    if not grow_table(seq, blocks_for(seq.text.num_tokens, c.block_size), c.num_groups):
        return fail(f, NO_MEMORY, 0, 0, 0)
    if reserve < 0 and c.reach_ends and most_ever(c, seq.text.num_tokens, 1, -1) > c.pool.num_blocks:
        if most_ever(c, seq.text.num_tokens, 1, 1) <= c.pool.num_blocks:
            reserve = 1     # the whole never fits, and need not: blocks out of reach are given back on the way
    path = path_of(c, seq.table, seq.table_capacity)
    if not plan_admission(c, &seq.text, reserve, max_hit, host, path, &hit, &target, f, False):
        return False
    cached.loaded = occupy(c, seq, path, hit, target)
    touch(c, seq)
    seq.kind = LIVE
    c.num_resting -= 1
    c.counters.resumed += 1
    cached.tokens = seq.num_cached
    return True


cdef inline int64_t core_pin(Core* c, const Text* x, Fault* f) noexcept nogil:
    cdef int32_t n, limit = x.num_tokens // c.block_size if c.caching else 0
    cdef Seq* seq
    cdef int32_t* table
    cdef int32_t* path
    if not has_room(c, 1, f):
        return 0
    table = <int32_t*>grab(<size_t>(limit or 1) * c.num_groups * sizeof(int32_t))
    if table == NULL:
        fail(f, NO_MEMORY, 0, limit, 0)
        return 0
    path = path_of(c, table, limit)
    n = longest_hit(c, path, tree_walk(&c.pool.tree, x, limit, path), DEVICE)
    if n == 0:
        free(table)
        fail(f, NOTHING_TO_PIN, 0, x.num_tokens, c.block_size)
        return 0
    seq = open_seq(c, PIN)
    set_last_node(&c.pool.tree, seq, path[n - 1])
    if c.pool.states.num_slots:
        hold_state(c, seq, path[n - 1])
    seq.table = table
    seq.table_capacity = limit
    hold_hit(c, seq, path, n)
    if c.pool.host.num_slots:
        load_hit(c, seq, n)     # there is nothing to load
    seq.num_rows = n
    note_peak(c)
    return seq.handle
