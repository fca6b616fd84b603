# Text: what a sequence says, its token ids and the extra bytes that some of them carry beyond their ids (the hash of an
# image). Extra bytes are kept for each block of tokens, in blobs that sequences and nodes of the tree share.

from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from core.checks cimport check
from core.memory cimport MAX_INT32, grab, regrow
from core.ints cimport at, Ints


cdef extern from "core/text.h" nogil:
    ctypedef struct Blob "struct kvb_blob":     # bytes shared by sequences and nodes
        int64_t refs
        char* bytes


cdef struct Extra:      # the extra bytes of block `index` of a text: `size` bytes of entries, see ENTRY
    uint64_t hash       # 0: to be computed
    Blob* blob
    int32_t size
    int32_t index


cdef enum:
    ENTRY = 24          # bytes of an entry besides those it is made for: offset and length before them, length after


cdef struct Mark:       # the extra bytes of a token that is to be added
    int64_t position    # from the first added token of its sequence
    const char* bytes
    int64_t size


cdef struct Text:       # what a sequence says
    int32_t* tokens     # -1: a placeholder
    int32_t capacity
    int32_t num_tokens
    int32_t known       # tokens before the first placeholder
    int32_t num_unknown
    Extra* extras
    int32_t num_extras


cdef inline Blob* blob_new(size_t size) noexcept nogil:
    cdef Blob* blob = <Blob*>grab(sizeof(Blob) + size)
    if blob != NULL:
        blob.refs = 1
        blob.bytes = <char*>blob + sizeof(Blob)
    return blob


cdef inline void blob_drop(Blob* blob) noexcept nogil:
    if blob != NULL:
        check(blob.refs > 0, b"extra bytes that are let go of were held")
        blob.refs -= 1
        if blob.refs == 0:
            free(blob)


cdef inline int64_t put_entry(char* target, int64_t offset, const char* data, int64_t size) noexcept nogil:
    """Write the extra bytes of the token at `offset` of a block; how many bytes that took."""
    memcpy(target, &offset, 8)
    memcpy(target + 8, &size, 8)
    memcpy(target + 16, data, size)
    memcpy(target + 16 + size, &size, 8)
    return ENTRY + size


cdef inline void drop_extras(Text* made, int32_t index) noexcept nogil:
    """Let go of the extras from block `index` on, and free the array; those before it belong to somebody else now."""
    while made.num_extras and made.extras[made.num_extras - 1].index >= index:
        made.num_extras -= 1
        blob_drop(made.extras[made.num_extras].blob)
    free(made.extras)
    made.extras = NULL


cdef inline int64_t add_extras(
    const Text* x, const Mark* marks, int32_t count, int32_t block_size, Text* made
) noexcept nogil:
    """Make in `made` the extras of a text with those of tokens that are to be added; `x` stays as it is.

    0, -1 when memory is out, or the number of bytes that is too large for one block.
    """
    cdef int32_t i = 0, j, index, first = <int32_t>((x.num_tokens + marks[0].position) // block_size)
    cdef int64_t kept, size, start
    cdef Extra* last
    cdef Blob* blob
    made.extras = <Extra*>grab((<size_t>x.num_extras + count) * sizeof(Extra))
    if made.extras == NULL:
        return -1
    made.num_extras = x.num_extras
    if x.num_extras:
        memcpy(made.extras, x.extras, x.num_extras * sizeof(Extra))
    kept = 0
    if x.num_extras and x.extras[x.num_extras - 1].index == first:   # that block is made anew, longer
        made.num_extras -= 1
        kept = x.extras[x.num_extras - 1].size
    while i < count:
        index, size = <int32_t>((x.num_tokens + marks[i].position) // block_size), kept
        start = <int64_t>index * block_size - x.num_tokens
        j = i
        while j < count and marks[j].position < start + block_size:
            size += ENTRY + marks[j].size
            j += 1
        blob = blob_new(size) if size <= MAX_INT32 else NULL
        if blob == NULL:
            drop_extras(made, first)
            return -1 if size <= MAX_INT32 else size
        if kept:
            memcpy(blob.bytes, x.extras[x.num_extras - 1].blob.bytes, kept)
        size = kept
        while i < j:
            size += put_entry(blob.bytes + size, marks[i].position - start, marks[i].bytes, marks[i].size)
            i += 1
        last = &made.extras[made.num_extras]
        last.index, last.size, last.blob, last.hash = index, <int32_t>size, blob, 0
        made.num_extras += 1
        kept = 0
    return 0


cdef inline void take_extras(Text* x, Text* made, int32_t index) noexcept nogil:
    """Put the extras that `add_extras` made from block `index` on in place of a text's own."""
    if x.num_extras and x.extras[x.num_extras - 1].index == index:
        blob_drop(x.extras[x.num_extras - 1].blob)
    free(x.extras)
    x.extras, x.num_extras = made.extras, made.num_extras
    made.extras = NULL


cdef inline Extra* extra_of(const Text* x, int32_t index) noexcept nogil:
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


cdef inline void cut_extras(Text* x, int32_t num_tokens, int32_t block_size) noexcept nogil:
    """Forget the extra bytes of tokens from `num_tokens` on: other tokens may come there. The salt, at -1, stays."""
    cdef Extra* extra
    cdef int64_t offset, size
    while x.num_extras:
        extra = &x.extras[x.num_extras - 1]
        while extra.size:
            memcpy(&size, extra.blob.bytes + extra.size - 8, 8)
            memcpy(&offset, extra.blob.bytes + extra.size - ENTRY - size, 8)
            if offset + <int64_t>extra.index * block_size < num_tokens:
                return
            extra.size -= <int32_t>(ENTRY + size)
            extra.hash = 0
        blob_drop(extra.blob)
        x.num_extras -= 1


cdef inline void clear_text(Text* x) noexcept nogil:
    cdef int32_t i
    for i in range(x.num_extras):
        blob_drop(x.extras[i].blob)
    free(x.extras)
    free(x.tokens)
    memset(x, 0, sizeof(Text))


cdef inline bint grow_text(Text* x, int64_t num_tokens) noexcept nogil:
    cdef int64_t capacity
    cdef int32_t* tokens
    if num_tokens <= x.capacity:
        return True
    capacity = min(num_tokens + num_tokens // 4 + 32, MAX_INT32)
    tokens = <int32_t*>regrow(x.tokens, capacity * sizeof(int32_t))
    if tokens == NULL:
        return False
    x.tokens = tokens
    x.capacity = <int32_t>capacity
    return True


cdef inline void extend_text(Text* x, const Ints* tokens, Py_ssize_t first, int32_t n) noexcept nogil:
    """Add n tokens, or n placeholders; there is room."""
    cdef int32_t j
    cdef bint known = tokens != NULL and x.num_unknown == 0
    check(n <= x.capacity - x.num_tokens, b"there is room for tokens that are added")
    for j in range(n):
        x.tokens[x.num_tokens + j] = -1 if tokens == NULL else <int32_t>at(tokens, first + j)
    x.num_tokens += n
    if known:
        x.known = x.num_tokens
    elif tokens == NULL:
        x.num_unknown += n


cdef inline void cut_text(Text* x, int32_t num_tokens) noexcept nogil:
    cdef int32_t i
    if x.num_unknown:
        for i in range(max(num_tokens, x.known), x.num_tokens):
            x.num_unknown -= x.tokens[i] < 0
    x.num_tokens = num_tokens
    x.known = min(x.known, num_tokens) if x.num_unknown else num_tokens


cdef inline bint copy_text(Text* target, const Text* source) noexcept nogil:
    """A copy that shares the extra bytes; false and nothing allocated when memory is out."""
    cdef int32_t i
    memset(target, 0, sizeof(Text))
    if not grow_text(target, <int64_t>source.num_tokens + (source.num_tokens == 0)):
        return False
    if source.num_extras:
        target.extras = <Extra*>grab(source.num_extras * sizeof(Extra))
        if target.extras == NULL:
            free(target.tokens)
            target.tokens = NULL
            return False
    memcpy(target.tokens, source.tokens, source.num_tokens * sizeof(int32_t))
    target.num_tokens = source.num_tokens
    target.known = source.known
    target.num_unknown = source.num_unknown
    target.num_extras = source.num_extras
    for i in range(source.num_extras):
        target.extras[i] = source.extras[i]
        target.extras[i].blob.refs += 1
    return True
