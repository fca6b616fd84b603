# The prefix tree: who a full block of tokens is. A node is one block of tokens after one exact prefix; what hangs on it
# is the block that holds its K and V. Knows nothing of sequences, reference counts or eviction.
#
# A node's key is (parent, its block_size tokens, its extra bytes). Every hit is compared with the node, so a hash only
# decides where to look, never what matches. The hash is keyed per tree: nobody outside can aim at one bucket.
# Node 0 is the root: no tokens, no block. A salt is part of the extra bytes of a sequence's first block.

cdef enum:
    RUN = 32            # blocks hashed ahead of their look-up, so that their cache lines are on the way


cdef extern from *:
    """
    static inline uint64_t kvb_fold(uint64_t a, uint64_t b) {
        unsigned __int128 p = (unsigned __int128)a * b;
        return (uint64_t)p ^ (uint64_t)(p >> 64);
    }
    /* NH (Black et al., UMAC, 1999): sums of products of keyed halves; the two halves keep the loads contiguous. */
    static inline uint64_t kvb_nh(const int32_t *t, const uint32_t *k, int32_t n) {
        uint64_t s = 0;
        int32_t h = n / 2;
        for (int32_t i = 0; i < h; i++)
            s += (uint64_t)((uint32_t)t[i] + k[i]) * (uint64_t)((uint32_t)t[i + h] + k[i + h]);
        return n & 1 ? kvb_fold(s + k[n], (uint64_t)(uint32_t)t[n - 1] + k[n - 1]) : s;
    }
    #define kvb_prefetch(p) __builtin_prefetch(p)
    #define kvb_prefetch_write(p) __builtin_prefetch(p, 1)
    """
    uint64_t kvb_fold(uint64_t a, uint64_t b) noexcept nogil
    uint64_t kvb_nh(const int32_t* tokens, const uint32_t* key, int32_t n) noexcept nogil
    void kvb_prefetch(const void* p) noexcept nogil
    void kvb_prefetch_write(const void* p) noexcept nogil


cdef struct Blob:       # bytes shared by sequences and nodes
    int64_t refs
    char* bytes


cdef struct Extra:      # the extra bytes of block `index` of a text: `size` bytes of (offset, length, bytes) entries
    uint64_t hash
    Blob* blob
    int32_t size
    int32_t index


cdef struct Node:       # 32 bytes
    uint64_t hash
    Blob* blob
    int32_t size        # extra bytes; 0: none, and no blob
    int32_t parent
    int32_t block       # the block that hangs here; -1 in a node that is not in use
    int32_t next        # in its bucket, or in the list of unused nodes


cdef struct Text:       # what a sequence says
    int32_t* tokens     # -1: a placeholder
    int32_t capacity
    int32_t num_tokens
    int32_t known       # tokens before the first placeholder
    int32_t num_unknown
    Extra* extras
    int32_t num_extras


cdef struct Tree:
    int32_t block_size
    int32_t max_nodes
    int32_t num_nodes
    int32_t fresh       # nodes from here on were never used
    int32_t unused      # head of the list of nodes used before
    Node* nodes
    int32_t* tokens     # [max_nodes + 1, block_size]
    int32_t* buckets
    uint64_t mask
    uint64_t spread     # all ones; zero makes every hash equal (a test hook)
    uint32_t* key
    uint64_t seal       # hash of the root
    uint64_t twist


cdef Blob* blob_new(const char* data, size_t size) noexcept nogil:
    cdef Blob* blob = <Blob*>grab(sizeof(Blob) + size)
    if blob != NULL:
        blob.refs = 1
        blob.bytes = <char*>blob + sizeof(Blob)
        memcpy(blob.bytes, data, size)
    return blob


cdef inline void blob_drop(Blob* blob) noexcept nogil:
    if blob != NULL:
        blob.refs -= 1
        if blob.refs == 0:
            free(blob)


cdef void hash_extra(const Tree* t, Extra* extra) noexcept nogil:
    cdef uint64_t h = t.seal + <uint64_t>extra.size, word
    cdef int64_t i
    for i in range(0, <int64_t>extra.size, 8):
        word = 0
        memcpy(&word, extra.blob.bytes + i, min(extra.size - i, 8))
        h = kvb_fold(h ^ t.key[0], word ^ t.twist) + i
    extra.hash = h


cdef inline bint same_extra(const Node* node, const Extra* extra) noexcept nogil:
    if extra == NULL:
        return node.size == 0
    return node.size == extra.size and (
        node.blob == extra.blob or memcmp(node.blob.bytes, extra.blob.bytes, extra.size) == 0
    )


cdef inline const Extra* extra_of(const Text* x, int32_t index) noexcept nogil:
    """The extra bytes of block `index`, or NULL; extras are in order of their index."""
    cdef int32_t low = 0, high = x.num_extras, middle
    if high == 0:
        return NULL
    while low < high:
        middle = (low + high) >> 1
        if x.extras[middle].index < index:
            low = middle + 1
        else:
            high = middle
    return &x.extras[low] if low < x.num_extras and x.extras[low].index == index else NULL


cdef void cut_extras(const Tree* t, Text* x, int32_t num_tokens) noexcept nogil:
    """Forget the extra bytes of tokens from `num_tokens` on: other tokens may come there. The salt, at -1, stays."""
    cdef Extra* extra
    cdef int64_t[2] entry
    cdef int32_t size
    while x.num_extras:
        extra = &x.extras[x.num_extras - 1]
        size = 0
        while size < extra.size:
            memcpy(entry, extra.blob.bytes + size, sizeof(entry))
            if entry[0] >= num_tokens - <int64_t>extra.index * t.block_size:
                break
            size += <int32_t>(sizeof(entry) + entry[1])
        if size == extra.size:
            return
        if size:
            extra.size = size
            hash_extra(t, extra)
            return
        blob_drop(extra.blob)
        x.num_extras -= 1


cdef inline uint64_t tree_hash(
    const Tree* t, uint64_t parent, const int32_t* tokens, const Extra* extra
) noexcept nogil:
    cdef uint64_t h = kvb_nh(tokens, t.key, t.block_size)
    if extra != NULL:
        h += extra.hash
    return kvb_fold(parent ^ t.twist, h ^ t.seal) & t.spread  # parent ^ seal would be 0 below the root


cdef inline int32_t tree_find(
    const Tree* t, int32_t parent, uint64_t h, const int32_t* tokens, const Extra* extra
) noexcept nogil:
    """The node with this key, or 0."""
    cdef int32_t n = t.buckets[h & t.mask]
    cdef const Node* node
    while n:
        node = &t.nodes[n]
        if (
            node.hash == h
            and node.parent == parent
            and memcmp(t.tokens + <size_t>n * t.block_size, tokens, t.block_size * sizeof(int32_t)) == 0
            and same_extra(node, extra)
        ):
            return n
        n = node.next
    return 0


cdef inline int32_t tree_insert(
    Tree* t, int32_t parent, uint64_t h, const int32_t* tokens, const Extra* extra, int32_t block
) noexcept nogil:
    """A new node for a key that is not there, with `block` on it; 0 when the node capacity is spent."""
    cdef int32_t n
    cdef Node* node
    if t.num_nodes == t.max_nodes:
        return 0
    if t.unused:
        n = t.unused
        t.unused = t.nodes[n].next
    else:
        n = t.fresh
        t.fresh += 1
    t.num_nodes += 1
    node = &t.nodes[n]
    node.hash = h
    if extra != NULL:
        node.size = extra.size
        node.blob = extra.blob
        node.blob.refs += 1
    node.parent = parent
    node.block = block
    node.next = t.buckets[h & t.mask]
    t.buckets[h & t.mask] = n
    memcpy(t.tokens + <size_t>n * t.block_size, tokens, t.block_size * sizeof(int32_t))
    return n


cdef inline void tree_remove(Tree* t, int32_t n) noexcept nogil:
    cdef Node* node = &t.nodes[n]
    cdef int32_t* link = &t.buckets[node.hash & t.mask]
    while link[0] != n:
        link = &t.nodes[link[0]].next
    link[0] = node.next
    blob_drop(node.blob)
    node.blob = NULL
    node.size = 0
    node.block = -1
    node.next = t.unused
    t.unused = n
    t.num_nodes -= 1


cdef inline int32_t hash_run(
    const Tree* t, uint64_t parent, const Text* x, int32_t first, int32_t limit, uint64_t* hashes
) noexcept nogil:
    """Hash up to RUN blocks of `x` from block `first` on, after a parent of that hash, and fetch where they lead."""
    cdef int32_t j, n = min(RUN, limit - first)
    cdef int32_t found
    for j in range(n):
        parent = tree_hash(t, parent, x.tokens + <size_t>(first + j) * t.block_size, extra_of(x, first + j))
        hashes[j] = parent
        kvb_prefetch(&t.buckets[parent & t.mask])
    for j in range(n):
        found = t.buckets[hashes[j] & t.mask]
        if found:
            kvb_prefetch(&t.nodes[found])
            kvb_prefetch(t.tokens + <size_t>found * t.block_size)
    for j in range(n):
        kvb_prefetch(&t.nodes[t.nodes[t.buckets[hashes[j] & t.mask]].next])
    return n


cdef int32_t tree_walk(const Tree* t, const Text* x, int32_t limit, int32_t* nodes) noexcept nogil:
    """Find the longest published prefix of `x`, at most `limit` blocks: its nodes, and how many there are."""
    cdef uint64_t[RUN] hashes
    cdef int32_t i = 0, j, n, node = 0
    cdef uint64_t h = t.seal
    while i < limit:
        n = hash_run(t, h, x, i, limit, hashes)
        for j in range(n):
            node = tree_find(
                t, node, hashes[j], x.tokens + <size_t>(i + j) * t.block_size, extra_of(x, i + j)
            )
            if node == 0:
                return i + j
            nodes[i + j] = node
        h = hashes[n - 1]
        i += n
    return limit
