# Admission: the longest hit that a prompt has in the prefix cache, whether the blocks for the rest are there, and who
# gets them: new sequences, resumed ones, and pins.

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free
from libc.string cimport memset

from core.memory cimport MAX_GROUPS, grab, least_multiple
from core.text cimport Text
from core.tree cimport kvb_prefetch, node_at, tree_walk
from core.pool cimport acquire, pool_free, take
from core.sequences cimport (
    LIVE, NO_BLOCKS, NO_MEMORY, NOT_PREEMPTED, NOTHING_TO_PIN, PIN, PREEMPTED, WATERMARK, blocks_for, Core, fail,
    Fault, find, first_row, grow_table, has_room, note_peak, open_seq, Seq, set_last_node, touch,
)


cdef inline int64_t held_by(const Core* c, int64_t position, int64_t end) noexcept nogil:
    """Blocks that a sequence alone holds while its tokens [position, end) are computed."""
    cdef int64_t held = 0, rows = (end + c.block_size - 1) // c.block_size
    cdef int32_t g
    for g in range(c.num_groups):
        held += rows - first_row(c, g, <int32_t>position)
    return held


cdef inline int64_t repeats_after(const Core* c, int64_t step) noexcept nogil:
    """After so many tokens, computed `step` at a time, what groups with an end to their reach hold repeats."""
    cdef int64_t period = least_multiple(step, c.block_size)
    cdef int32_t g
    for g in range(c.num_groups):
        if c.reaches[g].chunk:
            period = least_multiple(period, c.reaches[g].chunk)
    return period


cdef inline int64_t tokens_to_skip(const Core* c, int64_t position, int64_t end, int64_t step) noexcept nogil:
    """Tokens after which a whole step holds at least as much as one at `position`, the steps between them likewise.

    Up to the next start of a chunk, of two steps that begin at one place of their blocks the later one holds no less.
    So only the last of each such place need be looked at.
    """
    cdef int64_t period = least_multiple(step, c.block_size), limit = end - step + 1
    cdef int32_t g
    for g in range(c.num_groups):
        if c.reaches[g].chunk:
            limit = min(limit, position - position % c.reaches[g].chunk + c.reaches[g].chunk)
    return max(<int64_t>0, (limit - 1 - position) // period - 1) * period


cdef inline int64_t most_held(const Core* c, int64_t position, int64_t end, int64_t step) noexcept nogil:
    """The most blocks that a sequence alone holds while it computes its tokens [position, end), `step` at a time.

    What full groups hold only grows and what the others hold repeats, so the most is held within the last period. Of
    steps of one token those at the start of a block hold the most.
    """
    cdef int64_t most = 0, last = end - position
    if last <= 0:
        return 0
    last -= last % step + repeats_after(c, step) + step
    if last > 0:
        position += last - last % step
    while position < end:
        most = max(most, held_by(c, position, min(position + step, end)))
        position += step if step > 1 else c.block_size - position % c.block_size
        position += tokens_to_skip(c, position, end, step)
    return most


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


cdef inline int32_t longest_hit(const Core* c, const int32_t* nodes, int32_t n) noexcept nogil:
    """How many of n nodes of a path make a hit: every group has the blocks that a token after them reaches."""
    cdef int32_t i, g, best = 0
    cdef int32_t[MAX_GROUPS] since      # the first row from which on the group has all blocks
    cdef bint served
    if not c.reach_ends and c.num_groups == 1:
        return n
    memset(since, 0, c.num_groups * sizeof(int32_t))
    for i in range(n):
        served = True
        for g in range(c.num_groups):
            if node_at(&c.pool.tree, nodes[i]).blocks[g] < 0:
                since[g] = i + 1
            served = served and since[g] <= min(first_row(c, g, (i + 1) * c.block_size), i + 1)
        if served:
            best = i + 1
    return best


cdef inline int32_t hit_that_fits(
    const Core* c, const Text* x, int64_t reserve, const int32_t* nodes, int32_t hit
) noexcept nogil:
    """The longest hit after which the pool has the blocks for the rest of a sequence, were it alone. Steps that begin
    elsewhere than without a hit can hold more at once. Where no hit is no better the longest stays."""
    cdef int32_t longest = hit
    if reserve < 0 or most_ever(c, x.num_tokens, 1, reserve) > c.pool.num_blocks:
        return longest
    while hit and most_held(
        c, <int64_t>hit * c.block_size, x.num_tokens, max(<int64_t>1, reserve)
    ) > c.pool.num_blocks:
        hit = longest_hit(c, nodes, hit - 1)
    return hit


cdef inline bint plan_admission(
    Core* c, const Text* x, int64_t reserve, int64_t max_hit, int32_t* found, int32_t* num_found, int32_t* target,
    Fault* f, bint watermark,
) noexcept nogil:
    """Find the hit and check that the blocks for the rest are there. `found` gets the hit's nodes. No effect."""
    cdef int32_t i, g, b, hit, idle = 0, available
    cdef int64_t new
    hit = longest_hit(c, found, tree_walk(&c.pool.tree, x, hit_limit(c, x, max_hit), found))
    if c.reach_ends and <int64_t>blocks_for(x.num_tokens, c.block_size) * c.num_groups > c.pool.num_blocks:
        hit = hit_that_fits(c, x, reserve, found, hit)
    for g in range(c.num_groups):
        for i in range(first_row(c, g, hit * c.block_size), hit):
            kvb_prefetch(&c.pool.blocks[node_at(&c.pool.tree, found[i]).blocks[g]])
        for i in range(first_row(c, g, hit * c.block_size), hit):
            b = node_at(&c.pool.tree, found[i]).blocks[g]
            idle += c.pool.blocks[b].refs == 0
    num_found[0] = hit
    target[0] = x.num_tokens
    if reserve >= 0:
        target[0] = <int32_t>min(<int64_t>x.num_tokens, <int64_t>hit * c.block_size + reserve)
    new = <int64_t>(blocks_for(target[0], c.block_size) - hit) * c.num_groups
    available = pool_free(&c.pool) - idle
    if new > available:
        return fail(f, NO_BLOCKS, 0, new, available)
    # Nothing that runs: nothing for which blocks are kept, and nothing that would ever give any back.
    if watermark and c.num_slots > c.num_resting and new > max(available - c.watermark, 0):
        return fail(f, WATERMARK, 0, new, max(available - c.watermark, 0))
    return True


cdef inline void hold_hit(Core* c, int32_t* table, const int32_t* nodes, int32_t hit) noexcept nogil:
    """Hold the blocks that a hit needs and write them to the first rows of a table. `nodes` may lie in its end."""
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
                acquire(&c.pool, b)
            table[<int64_t>i * c.num_groups + g] = b


cdef inline int32_t* path_of(const Core* c, int32_t* table, int32_t capacity) noexcept nogil:
    """Room for the nodes of a hit, one for each row, in the end of a table: `hold_hit` reads a node before it
    overwrites it."""
    return table + <int64_t>capacity * (c.num_groups - 1)


cdef inline void occupy(Core* c, Seq* seq, const int32_t* nodes, int32_t hit, int32_t target) noexcept nogil:
    """Hold the hit and take the blocks for the rest; they are there, and the table has room."""
    cdef int64_t i
    cdef int32_t last_node = nodes[hit - 1] if hit else 0
    set_last_node(&c.pool.tree, seq, last_node)
    hold_hit(c, seq.table, nodes, hit)
    seq.num_rows = blocks_for(target, c.block_size)
    for i in range(<int64_t>hit * c.num_groups, <int64_t>seq.num_rows * c.num_groups):
        seq.table[i] = take(&c.pool)
    seq.num_cached = seq.num_computed = seq.num_prepared = hit * c.block_size
    seq.reserved = max(target, seq.num_cached)
    seq.published = hit
    seq.publishing = c.caching
    c.counters.prompt_tokens += seq.text.num_tokens
    c.counters.hit_tokens += seq.num_cached
    note_peak(c)


cdef inline int64_t core_admit(
    Core* c, Text* x, int64_t reserve, int64_t max_hit, Fault* f, int64_t* num_cached
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
    if not plan_admission(c, x, reserve, max_hit, path, &hit, &target, f, True):
        free(table)
        return 0
    seq = open_seq(c, LIVE)
    seq.table = table
    seq.table_capacity = capacity
    seq.text = x[0]
    memset(x, 0, sizeof(Text))
    occupy(c, seq, path, hit, target)
    c.counters.admitted += 1
    num_cached[0] = seq.num_cached
    return seq.handle


cdef inline bint core_resume(
    Core* c, int64_t handle, int64_t reserve, int64_t max_hit, Fault* f, int64_t* num_cached
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
    if not plan_admission(c, &seq.text, reserve, max_hit, path, &hit, &target, f, False):
        return False
    occupy(c, seq, path, hit, target)
    touch(c, seq)
    seq.kind = LIVE
    c.num_resting -= 1
    c.counters.resumed += 1
    num_cached[0] = seq.num_cached
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
    n = longest_hit(c, path, tree_walk(&c.pool.tree, x, limit, path))
    if n == 0:
        free(table)
        fail(f, NOTHING_TO_PIN, 0, x.num_tokens, c.block_size)
        return 0
    seq = open_seq(c, PIN)
    set_last_node(&c.pool.tree, seq, path[n - 1])
    hold_hit(c, table, path, n)
    seq.table = table
    seq.table_capacity = limit
    seq.num_rows = n
    note_peak(c)
    return seq.handle
