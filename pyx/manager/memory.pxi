# Memory and limits. Every allocation goes through here, so that a test can make each of them fail in turn.

cdef extern from *:
    """
    #include <stdlib.h>
    static int64_t kvb_fail_in = -1;    /* allocations until one fails; negative: never */
    static inline int kvb_fails(void) { return kvb_fail_in >= 0 && kvb_fail_in-- == 0; }
    static inline void *kvb_grab(size_t n) { return kvb_fails() ? NULL : malloc(n); }
    static inline void *kvb_grab_zeroed(size_t n, size_t width) { return kvb_fails() ? NULL : calloc(n, width); }
    static inline void *kvb_regrow(void *p, size_t n) { return kvb_fails() ? NULL : realloc(p, n); }
    #define KVB_MAX_GENERATION ((int64_t)1 << 38)
    """
    int64_t kvb_fail_in
    void* grab "kvb_grab"(size_t n) noexcept nogil
    void* grab_zeroed "kvb_grab_zeroed"(size_t n, size_t width) noexcept nogil
    void* regrow "kvb_regrow"(void* p, size_t n) noexcept nogil
    const int64_t MAX_GENERATION "KVB_MAX_GENERATION"

cdef enum:
    MAX_INT32 = 0x7FFFFFFF
    SLOT_BITS = 24
    SLOT_MASK = 0xFFFFFF
