# Text: what a sequence says, its token ids and the extra bytes that some of them carry beyond their ids (the hash of an
# image). Extra bytes are kept for each block of tokens, in blobs that sequences and nodes of the tree share.
#
# Token ids lie in pages that forks share. Only a text that alone names a page writes into it; before it writes into a
# page of others it copies that. A page holds a power of two of blocks, so that no block lies in two pages and a page is
# found by a shift. Only the last page of a text may have less room than that.

from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from core.checks cimport check
from core.memory cimport MAX_INT32, grab, regrow
from core.ints cimport at, Ints


cdef extern from "core/text.h" nogil:
    enum:
        RUN "KVB_RUN"
        LEAST_PAGE "KVB_PAGE"
    ctypedef struct Blob "struct kvb_blob":     # bytes shared by sequences and nodes
        int64_t refs
        int64_t room        # bytes that there is memory for
        char* bytes
    int64_t kvb_same(const int32_t* a, const int32_t* b, int64_t n)


cdef struct Extra:      # the extra bytes of block `index` of a text: `size` bytes of entries, see ENTRY
    uint64_t hash       # 0: to be computed
    Blob* blob
    int32_t size
    int32_t index


cdef enum:
    ENTRY = 24          # bytes of an entry besides those it is made for: offset and length before them, length after
    PAGE_REFS = -1      # in front of a page's tokens: the texts that name it
    PAGE_ROOM = -2      # and the tokens that it has memory for
    PAGE_HEAD = 4       # int32 in front of its tokens


cdef struct Mark:       # the extra bytes of a token that is to be added
    int64_t position    # from the first added token of its sequence
    const char* bytes
    int64_t size


cdef struct Paging:     # how texts are cut into pages
    int32_t block_size
    int32_t page_shift  # a page has 1 << page_shift blocks,
    int32_t token_shift  # and 1 << token_shift tokens; -1: no power of two
    int64_t page_size   # tokens


cdef struct Text:       # what a sequence says
    int32_t** pages     # -1 in them: a placeholder
    int32_t* tail       # the page of the next token, if that can be written as it is, else NULL
    int32_t num_pages
    int32_t capacity    # tokens that there is room for up to the end of `tail`; -1: pages are somebody else's memory
    int32_t num_tokens
    int32_t known       # tokens before the first placeholder
    int32_t num_unknown
    int32_t num_extras
    Extra* extras


cdef inline Blob* blob_new(size_t size) noexcept nogil:
    cdef Blob* blob = <Blob*>grab(sizeof(Blob) + size)
    if blob != NULL:
        blob.refs, blob.room = 1, size
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

    Where `x` alone names its last blob and that has the room, the new bytes go behind those that `x` reads.

    0, -1 when memory is out, or the number of bytes that is too large for one block.
    """
    cdef int32_t i = 0, j, index, first = <int32_t>((x.num_tokens + marks[0].position) // block_size)
    cdef int64_t kept, size, start
    cdef Extra* last
    cdef Blob* blob
    cdef Blob* last_blob = NULL
    made.extras = <Extra*>grab((<size_t>x.num_extras + count) * sizeof(Extra))
    if made.extras == NULL:
        return -1
    made.num_extras = x.num_extras
    if x.num_extras:
        memcpy(made.extras, x.extras, x.num_extras * sizeof(Extra))
    kept = 0
    if x.num_extras and x.extras[x.num_extras - 1].index == first:   # that block is made anew, longer
        made.num_extras -= 1
        kept, last_blob = x.extras[x.num_extras - 1].size, x.extras[x.num_extras - 1].blob
    while i < count:
        index, size = <int32_t>((x.num_tokens + marks[i].position) // block_size), kept
        start = <int64_t>index * block_size - x.num_tokens
        j = i
        while j < count and marks[j].position < start + block_size:
            size += ENTRY + marks[j].size
            j += 1
        blob = NULL
        if kept and size <= last_blob.room and last_blob.refs == 1:
            blob = last_blob
            blob.refs += 1
        elif size <= MAX_INT32:
            blob = blob_new(size + kept // 2)   # so that many additions copy each byte a few times only
        if blob == NULL:
            drop_extras(made, first)
            return -1 if size <= MAX_INT32 else size
        if kept and blob != last_blob:
            memcpy(blob.bytes, last_blob.bytes, kept)
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


cdef inline Paging paging_of(int32_t block_size) noexcept nogil:
    cdef Paging p
    p.block_size = block_size
    p.page_shift = 0
    while 1 << p.page_shift < RUN or (<int64_t>block_size << p.page_shift) < LEAST_PAGE:
        p.page_shift += 1
    p.page_size = <int64_t>block_size << p.page_shift
    p.token_shift = -1
    if p.page_size & (p.page_size - 1) == 0:
        p.token_shift = 0
        while <int64_t>1 << p.token_shift < p.page_size:
            p.token_shift += 1
    return p


cdef inline int32_t page_of(const Paging* p, int64_t position) noexcept nogil:
    return <int32_t>(position >> p.token_shift if p.token_shift >= 0 else position // p.page_size)


cdef inline int32_t pages_for(const Paging* p, int64_t num_tokens) noexcept nogil:
    return page_of(p, num_tokens + p.page_size - 1)


cdef inline int64_t offset_in_page(const Paging* p, int64_t position) noexcept nogil:
    return position & (p.page_size - 1) if p.token_shift >= 0 else position % p.page_size


cdef inline int32_t* token_at(const Paging* p, const Text* x, int32_t position) noexcept nogil:
    return x.pages[page_of(p, position)] + offset_in_page(p, position)


cdef inline int32_t late_token(const Paging* p, const Text* x, int32_t position) noexcept nogil:
    """A token that is likely to be among the last: without the list of pages if it lies in `tail`."""
    if x.tail != NULL and p.token_shift >= 0 and (position ^ x.num_tokens) < p.page_size:
        return x.tail[offset_in_page(p, position)]
    return token_at(p, x, position)[0]


cdef inline int32_t run_at(const Paging* p, int32_t position, int64_t count) noexcept nogil:
    """How many of `count` tokens from a position on lie in one page."""
    return <int32_t>min(count, p.page_size - offset_in_page(p, position))


cdef inline const int32_t* block_at(const Paging* p, const Text* x, int32_t i) noexcept nogil:
    """The tokens of block i, and of those after it in the same page."""
    return x.pages[i >> p.page_shift] + <int64_t>(i & ((1 << p.page_shift) - 1)) * p.block_size


cdef inline int32_t block_run(const Paging* p, int32_t i) noexcept nogil:
    """Blocks from block i to the end of its page."""
    return (1 << p.page_shift) - (i & ((1 << p.page_shift) - 1))


cdef inline void drop_page(int32_t* page) noexcept nogil:
    check(page[PAGE_REFS] > 0, b"a page that is let go of was held")
    page[PAGE_REFS] -= 1
    if page[PAGE_REFS] == 0:
        free(page - PAGE_HEAD)


cdef inline bint own_page(const Paging* p, Text* x, int32_t i, int64_t room) noexcept nogil:
    """Make page i, which may be the one after the last, the text's alone, and give it room for so many tokens."""
    cdef int32_t* page = x.pages[i] if i < x.num_pages else NULL
    cdef int32_t* own = NULL
    cdef bint shared = page != NULL and page[PAGE_REFS] > 1
    if page != NULL and not shared:
        if page[PAGE_ROOM] >= room:
            return True
        own = page - PAGE_HEAD
    room = min(room + room // 4 + 32, p.page_size)
    own = <int32_t*>regrow(own, <size_t>(room + PAGE_HEAD) * sizeof(int32_t))
    if own == NULL:
        return False
    own += PAGE_HEAD
    own[PAGE_REFS], own[PAGE_ROOM] = 1, <int32_t>min(room, MAX_INT32)
    if shared:
        memcpy(own, page, <size_t>min(x.num_tokens - i * p.page_size, p.page_size) * sizeof(int32_t))
        drop_page(page)
    x.pages[i] = own
    x.num_pages = max(x.num_pages, i + 1)
    return True


cdef inline int32_t power_of_two(int32_t n) noexcept nogil:
    """The least power of two that is not below n; 0 for 0."""
    cdef int32_t power = n > 0
    while power < n:
        power *= 2
    return power


cdef inline void note_tail(const Paging* p, Text* x) noexcept nogil:
    """Set `tail` and `capacity`; called whenever the number of tokens, or the page of the next one, has changed."""
    cdef int32_t i = page_of(p, x.num_tokens)
    x.tail, x.capacity = NULL, x.num_tokens
    if i < x.num_pages and x.pages[i][PAGE_REFS] == 1:
        x.tail = x.pages[i]
        x.capacity = <int32_t>min(i * p.page_size + x.tail[PAGE_ROOM], MAX_INT32)


cdef inline bint grow_text(const Paging* p, Text* x, int64_t num_tokens) noexcept nogil:
    """Make room for so many tokens in all: pages from that of the next token on are the text's own."""
    cdef int32_t i, last
    cdef int32_t** pages
    if num_tokens <= x.capacity:
        return True
    last = page_of(p, num_tokens - 1)
    if last >= power_of_two(x.num_pages):
        pages = <int32_t**>regrow(x.pages, <size_t>power_of_two(last + 1) * sizeof(int32_t*))
        if pages == NULL:
            return False
        x.pages = pages
    for i in range(page_of(p, x.num_tokens), last + 1):
        if not own_page(p, x, i, min(num_tokens - i * p.page_size, p.page_size)):
            note_tail(p, x)     # pages before this one may lie elsewhere now
            return False
    note_tail(p, x)
    return True


cdef inline void extend_text(const Paging* p, Text* x, const Ints* tokens, Py_ssize_t first, int32_t n) noexcept nogil:
    """Add n tokens, or n placeholders; there is room."""
    cdef int32_t i, j = 0, run
    cdef int32_t* target
    cdef bint known = tokens != NULL and x.num_unknown == 0
    while j < n:
        target, run = token_at(p, x, x.num_tokens + j), run_at(p, x.num_tokens + j, n - j)
        check(x.pages[page_of(p, x.num_tokens + j)][PAGE_REFS] == 1, b"a text writes into pages of its own")
        for i in range(run):
            target[i] = -1 if tokens == NULL else <int32_t>at(tokens, first + j + i)
        j += run
    x.num_tokens += n
    if known:
        x.known = x.num_tokens
    elif tokens == NULL:
        x.num_unknown += n
    note_tail(p, x)


cdef inline void cut_text(const Paging* p, Text* x, int32_t num_tokens) noexcept nogil:
    cdef int32_t i
    if x.num_unknown:
        for i in range(max(num_tokens, x.known), x.num_tokens):
            x.num_unknown -= token_at(p, x, i)[0] < 0
    x.num_tokens = num_tokens
    x.known = min(x.known, num_tokens) if x.num_unknown else num_tokens
    while x.num_pages > pages_for(p, num_tokens):
        x.num_pages -= 1
        drop_page(x.pages[x.num_pages])
    note_tail(p, x)


cdef inline bint own_placeholders(const Paging* p, Text* x, int32_t count) noexcept nogil:
    """Make the pages in which the first `count` placeholders lie the text's own; there are as many."""
    cdef int32_t position = x.known, page
    while count:
        if token_at(p, x, position)[0] < 0:
            page = page_of(p, position)
            if not own_page(p, x, page, min(x.num_tokens - page * p.page_size, p.page_size)):
                return False
            count -= 1
        position += 1
    note_tail(p, x)
    return True


cdef inline bint share_text(const Paging* p, Text* target, Text* source) noexcept nogil:
    """A second text that names the pages and extra bytes of the first; false and nothing changed when memory is out."""
    cdef int32_t i, n = pages_for(p, source.num_tokens)
    cdef int32_t** pages = <int32_t**>grab(<size_t>(power_of_two(n) or 1) * sizeof(int32_t*))
    cdef Extra* extras = NULL
    if source.num_extras:
        extras = <Extra*>grab(<size_t>source.num_extras * sizeof(Extra))
    if pages == NULL or source.num_extras and extras == NULL:
        free(pages)
        free(extras)
        return False
    source.tail, source.capacity = NULL, source.num_tokens
    target[0] = source[0]
    target.pages, target.num_pages, target.extras = pages, n, extras
    for i in range(n):
        pages[i] = source.pages[i]
        pages[i][PAGE_REFS] += 1
    for i in range(source.num_extras):
        extras[i] = source.extras[i]
        extras[i].blob.refs += 1
    return True


cdef inline bint borrow_text(const Paging* p, int32_t* tokens, int64_t num_tokens, Text* x) noexcept nogil:
    """Let the pages of a new text be somebody else's memory, to be read only."""
    cdef int32_t i, n = pages_for(p, num_tokens)
    x.pages = <int32_t**>grab(<size_t>n * sizeof(int32_t*))
    if x.pages == NULL:
        return False
    for i in range(n):
        x.pages[i] = tokens + i * p.page_size
    x.num_pages, x.capacity = n, -1
    return True


cdef inline void read_text(const Paging* p, const Text* x, int32_t* target) noexcept nogil:
    cdef int32_t done = 0, run
    while done < x.num_tokens:
        run = run_at(p, done, x.num_tokens - done)
        memcpy(target + done, token_at(p, x, done), run * sizeof(int32_t))
        done += run


cdef inline void clear_text(Text* x) noexcept nogil:
    cdef int32_t i
    for i in range(x.num_extras):
        blob_drop(x.extras[i].blob)
    for i in range(x.num_pages if x.capacity >= 0 else 0):
        drop_page(x.pages[i])
    free(x.extras)
    free(x.pages)
    memset(x, 0, sizeof(Text))
