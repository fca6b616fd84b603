# The prefix tree: who a full block of tokens is. A node is one block of tokens after one exact prefix; on it hang the
# blocks that hold its K and V, at most one for each layer group. Knows nothing of sequences, references or eviction.
#
# A node's key is (parent, its block_size tokens, its extra bytes). Every hit is compared with the node, so a hash only
# decides where to look, never what matches. Hashes are seeded for each tree, so users cannot force collisions.
# Node 0 is the root: no tokens, no block. A salt is part of the extra bytes of a sequence's first block.
#
# The table has one cache line for six nodes, with room for twelve: their tags (a byte of the hash, 0: empty) usually
# settle a lookup, so that a prefix that is not there costs one cache line. A node whose line is full goes to the next
# line, and each line that it passes counts it.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcmp, memcpy

from core.checks cimport check
from core.text cimport RUN, Blob, blob_drop, block_at, block_run, Extra, extra_of, Paging, Text


cdef extern from "core/tree.h" nogil:
    ctypedef struct Node "kvb_node":            # 32 bytes with one group
        uint64_t hash
        Blob* blob          # NULL: no extra bytes
        int32_t parent      # or the next unused node
        int32_t uses        # blocks that hang here, children, and sequences that published this last; 0: not in use
        int32_t size        # extra bytes
        int32_t* blocks     # [groups]; -1: none
    const size_t NODE_HEAD "KVB_NODE_HEAD"
    ctypedef struct Line "kvb_line":
        uint8_t[12] tags
        uint32_t passed     # nodes whose hash says this line or one before it, and that were put into a later one
        int32_t[12] nodes
    uint64_t kvb_fold(uint64_t a, uint64_t b) noexcept nogil
    void kvb_nh(const int32_t* tokens, const uint32_t* key, int32_t n, int32_t blocks, uint64_t* out) noexcept nogil
    void kvb_prefetch(const void* p) noexcept nogil
    void kvb_prefetch_write(const void* p) noexcept nogil
    int kvb_lowest(uint32_t mask) noexcept nogil
    bint kvb_differ(const int32_t* a, const int32_t* b, int32_t n) noexcept nogil
    void kvb_keep(int32_t* kept, const int32_t* tokens, int32_t n) noexcept nogil
    uint32_t kvb_slots(const Line* line, uint8_t tag) noexcept nogil
    int32_t kvb_follow(
        const char* nodes, size_t width, const int32_t* kept, int32_t size, int32_t parent, const int32_t* tokens,
        const uint64_t* hashes, const int32_t* path, int32_t n
    ) noexcept nogil


cdef struct Tree:
    Paging paging
    int32_t block_size
    int32_t num_groups
    int32_t max_nodes
    int32_t num_nodes
    int32_t fresh       # nodes from here on were never used
    int32_t unused      # head of the list of nodes used before
    size_t width        # bytes of a node
    char* nodes
    int32_t* tokens     # [max_nodes + 1, block_size]
    Line* lines
    uint32_t num_lines
    uint32_t* key       # [block_size + 2]
    int64_t key_made    # words of it that are there: all but those of a block too large for most texts to fill
    uint64_t[4] key_seed  # of the others
    uint64_t seal       # hash of the root
    uint64_t seed
    uint8_t* named      # [max_nodes + 1]: whether a digest of the node is kept; NULL: of none ever


cdef inline Node* node_at(const Tree* t, int32_t n) noexcept nogil:
    check(0 <= n <= t.max_nodes, b"a node is one of the tree's")
    return <Node*>(t.nodes + n * t.width)


cdef inline int32_t* tokens_at(const Tree* t, int32_t n) noexcept nogil:
    return t.tokens + <size_t>n * t.block_size


cdef inline uint32_t line_of(const Tree* t, uint64_t h) noexcept nogil:
    return <uint32_t>((h >> 32) * t.num_lines >> 32)


cdef inline void make_key(Tree* t) noexcept nogil:
    """Make the words of the key that are not there yet, from the seed and their place: a full block is to be hashed."""
    cdef int64_t i
    cdef uint64_t word
    for i in range(t.key_made, <int64_t>t.block_size + 2):
        word = kvb_fold(t.key_seed[0] + i, t.key_seed[1])
        t.key[i] = <uint32_t>kvb_fold(word ^ t.key_seed[2], t.key_seed[3] + i)
    t.key_made = <int64_t>t.block_size + 2


cdef inline uint8_t tag_of(uint64_t h) noexcept nogil:
    return <uint8_t>(h | ((h & 0xFF) == 0))


cdef inline void hash_extra(const Tree* t, Extra* extra) noexcept nogil:
    cdef uint64_t h = t.seal + <uint64_t>extra.size, word
    cdef int64_t i
    for i in range(0, <int64_t>extra.size, 8):
        word = 0
        memcpy(&word, extra.blob.bytes + i, min(extra.size - i, 8))
        h = kvb_fold(h ^ t.key[0], word ^ t.seed) + i
    extra.hash = h


cdef inline bint same_extra(const Node* node, const Extra* extra) noexcept nogil:
    if extra == NULL:
        return node.size == 0
    return node.size == extra.size and (
        node.blob == extra.blob or memcmp(node.blob.bytes, extra.blob.bytes, extra.size) == 0
    )


cdef inline uint64_t chain(const Tree* t, uint64_t parent, uint64_t h, Extra* extra) noexcept nogil:
    """The hash of a node, from its parent's and that of its tokens."""
    if extra != NULL:
        if extra.hash == 0:
            hash_extra(t, extra)
        h += extra.hash
    return kvb_fold(parent ^ t.seed, h ^ t.seal)  # parent ^ seal would be 0 below the root


cdef inline uint64_t tree_hash(
    const Tree* t, uint64_t parent, const int32_t* tokens, Extra* extra
) noexcept nogil:
    cdef uint64_t h
    if t.key_made <= t.block_size:
        make_key(<Tree*>t)
    kvb_nh(tokens, t.key, t.block_size, 1, &h)
    return chain(t, parent, h, extra)


cdef inline bint is_key(
    const Tree* t, int32_t n, int32_t parent, uint64_t h, const int32_t* tokens, const Extra* extra
) noexcept nogil:
    cdef const Node* node = node_at(t, n)
    return (
        node.hash == h
        and node.parent == parent
        and not kvb_differ(tokens_at(t, n), tokens, t.block_size)
        and same_extra(node, extra)
    )


cdef inline int32_t tree_find(
    const Tree* t, int32_t parent, uint64_t h, const int32_t* tokens, const Extra* extra
) noexcept nogil:
    """The node with this key, or 0."""
    cdef uint32_t i = line_of(t, h), left = t.num_lines, slots
    cdef const Line* line
    cdef int32_t n
    while left:
        line = &t.lines[i]
        slots = kvb_slots(line, tag_of(h))
        while slots:
            n = line.nodes[kvb_lowest(slots)]
            if is_key(t, n, parent, h, tokens, extra):
                return n
            slots &= slots - 1
        if line.passed == 0:
            return 0
        i = i + 1 if i + 1 < t.num_lines else 0
        left -= 1
    return 0


cdef inline int32_t tree_insert(
    Tree* t, int32_t parent, uint64_t h, const int32_t* tokens, const Extra* extra
) noexcept nogil:
    """A new node for a key that is not there, with one use for the caller; 0 when the node capacity is spent."""
    cdef int32_t n, g, slot
    cdef uint32_t i = line_of(t, h), slots
    cdef Node* node
    cdef Line* line
    if t.num_nodes == t.max_nodes:
        return 0
    if t.unused:
        n = t.unused
        t.unused = node_at(t, n).parent
    else:
        n = t.fresh
        t.fresh += 1
    t.num_nodes += 1
    check(t.num_nodes <= t.max_nodes and t.fresh <= t.max_nodes + 1, b"there are no more nodes than may be")
    check(node_at(t, parent).uses > 0, b"the parent of a new node is in use")
    node = node_at(t, n)
    check(node.uses == 0, b"a node is not given out twice")
    node.hash = h
    if extra != NULL:
        node.size = extra.size
        node.blob = extra.blob
        node.blob.refs += 1
    node.parent = parent
    node_at(t, parent).uses += 1
    node.uses = 1
    for g in range(t.num_groups):
        node.blocks[g] = -1
    kvb_keep(tokens_at(t, n), tokens, t.block_size)
    line = &t.lines[i]
    slots = kvb_slots(line, 0)
    while slots == 0:
        line.passed += 1
        i = i + 1 if i + 1 < t.num_lines else 0
        line = &t.lines[i]
        slots = kvb_slots(line, 0)
    slot = kvb_lowest(slots)
    line.tags[slot] = tag_of(h)
    line.nodes[slot] = n
    return n


cdef inline void tree_remove(Tree* t, int32_t n) noexcept nogil:
    """Take a node without uses out of the table."""
    cdef Node* node = node_at(t, n)
    cdef uint32_t i = line_of(t, node.hash), slots
    cdef Line* line
    check(n > 0 and node.uses == 0, b"a node that goes is not the root, and nothing uses it")
    while True:
        line = &t.lines[i]
        slots = kvb_slots(line, tag_of(node.hash))
        while slots and line.nodes[kvb_lowest(slots)] != n:
            slots &= slots - 1
        if slots:
            break
        check(line.passed > 0, b"the table finds a node that goes")
        line.passed -= 1
        i = i + 1 if i + 1 < t.num_lines else 0
    line.tags[kvb_lowest(slots)] = 0
    if node.blob != NULL:
        blob_drop(node.blob)
        node.blob = NULL
        node.size = 0
    if t.named != NULL:
        t.named[n] = False
    node.parent = t.unused
    t.unused = n
    t.num_nodes -= 1


cdef inline void tree_drop(Tree* t, int32_t n) noexcept nogil:
    """One use of a node less; nodes that nothing uses any more go, from here up."""
    cdef int32_t parent
    cdef Node* node = node_at(t, n)
    check(node.uses > 0, b"a node is used as often as it is dropped")
    node.uses -= 1
    while node.uses == 0:
        parent = node.parent
        tree_remove(t, n)
        n = parent
        node = node_at(t, n)
        check(node.uses > 0, b"a node counts its children")
        node.uses -= 1


cdef inline int32_t hash_run(
    const Tree* t, uint64_t parent, const Text* x, int32_t first, int32_t limit, uint64_t* hashes, int32_t* likely
) noexcept nogil:
    """Hash up to RUN blocks of `x` in one page, from block `first` on, after a parent of that hash, and fetch the nodes
    that they are likely to be; 0: not known, -1: none for certain."""
    cdef int32_t j, n = min(min(RUN, limit - first), block_run(&t.paging, first))
    cdef uint32_t slots
    cdef const Line* line
    if t.key_made <= t.block_size:
        make_key(<Tree*>t)
    kvb_nh(block_at(&t.paging, x, first), t.key, t.block_size, n, hashes)
    for j in range(n):
        parent = hashes[j] = chain(t, parent, hashes[j], extra_of(x, first + j))
        kvb_prefetch_write(&t.lines[line_of(t, parent)])
    for j in range(n):
        line = &t.lines[line_of(t, hashes[j])]
        slots = kvb_slots(line, tag_of(hashes[j]))
        if slots:
            likely[j] = line.nodes[kvb_lowest(slots)]
            kvb_prefetch(node_at(t, likely[j]))
            kvb_prefetch(tokens_at(t, likely[j]))
        else:
            likely[j] = 0 if line.passed else -1
    return n


cdef inline int32_t tree_walk(const Tree* t, const Text* x, int32_t limit, int32_t* nodes) noexcept nogil:
    """Find the longest prefix of `x` in the tree, at most `limit` blocks: its nodes, and how many there are."""
    cdef uint64_t[RUN] hashes
    cdef int32_t i = 0, j, n, node = 0
    cdef uint64_t h = t.seal
    while i < limit:
        n = hash_run(t, h, x, i, limit, hashes, nodes + i)
        j = 0
        if x.num_extras == 0 or x.extras[x.num_extras - 1].index < i:
            j = kvb_follow(
                t.nodes, t.width, t.tokens, t.block_size, node, block_at(&t.paging, x, i), hashes, nodes + i, n
            )
            node = nodes[i + j - 1] if j else node
        for j in range(j, n):
            if nodes[i + j] < 0:
                return i + j
            node = tree_find(t, node, hashes[j], block_at(&t.paging, x, i + j), extra_of(x, i + j))
            if node == 0:
                return i + j
            nodes[i + j] = node
        h = hashes[n - 1]
        i += n
    return limit
