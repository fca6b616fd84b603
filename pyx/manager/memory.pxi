# Memory and limits. Every allocation goes through here, so that a test can make each of them fail in turn.
#
# The manager's big arrays are mapped: zeroed without being touched, and on huge pages where the system has them,
# because publishing and evicting reach all over them and would wait for page table walks (a fifth of their time).

cdef extern from *:
    """
    #include <stdlib.h>
    #include <sys/mman.h>
    #define KVB_HUGE ((size_t)2 << 20)
    static int64_t kvb_fail_in = -1;    /* allocations until one fails; negative: never */
    static inline int kvb_fails(void) { return kvb_fail_in >= 0 && kvb_fail_in-- == 0; }
    static inline void *kvb_grab(size_t n) { return kvb_fails() ? NULL : malloc(n); }
    static inline void *kvb_grab_zeroed(size_t n, size_t width) { return kvb_fails() ? NULL : calloc(n, width); }
    static inline void *kvb_regrow(void *p, size_t n) { return kvb_fails() ? NULL : realloc(p, n); }
    /* n zeroed items; what is at least a huge page starts on one. Unmapped with the same sizes. */
    static void *kvb_map(size_t n, size_t width) {
        size_t size, slack, head;
        char *base;
        if (kvb_fails() || __builtin_mul_overflow(n, width, &size)) return NULL;
        slack = size >= KVB_HUGE ? KVB_HUGE : 0;
        if (size + slack < size) return NULL;
        base = (char *)mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) return NULL;
        if (slack) {
            head = (KVB_HUGE - (uintptr_t)base % KVB_HUGE) % KVB_HUGE;
            if (head) munmap(base, head);
            base += head;
            size = (size + 4095) / 4096 * 4096;
            if (slack - head) munmap(base + size, slack - head);
    #ifdef MADV_HUGEPAGE
            madvise(base, size, MADV_HUGEPAGE);
    #endif
        }
        return base;
    }
    static void kvb_unmap(void *p, size_t n, size_t width) { if (p) munmap(p, n * width); }
    /* Loops over tokens, compiled for wider vectors too; the loader takes what the processor has. */
    #if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
    #define KVB_WIDE __attribute__((target_clones("default", "arch=x86-64-v3")))
    #else
    #define KVB_WIDE
    #endif
    #define KVB_MAX_GENERATION ((int64_t)1 << 38)
    /* The least common multiple of two positive numbers, or 2^62 where it is more. */
    static inline int64_t kvb_least_multiple(int64_t a, int64_t b) {
        int64_t x = a, y = b, r, product;
        while (y) r = x % y, x = y, y = r;
        if (__builtin_mul_overflow(a / x, b, &product) || product > (int64_t)1 << 62) return (int64_t)1 << 62;
        return product;
    }
    """
    int64_t kvb_fail_in
    void* grab "kvb_grab"(size_t n) noexcept nogil
    void* grab_zeroed "kvb_grab_zeroed"(size_t n, size_t width) noexcept nogil
    void* regrow "kvb_regrow"(void* p, size_t n) noexcept nogil
    void* map_zeroed "kvb_map"(size_t n, size_t width) noexcept nogil
    void unmap "kvb_unmap"(void* p, size_t n, size_t width) noexcept nogil
    int64_t least_multiple "kvb_least_multiple"(int64_t a, int64_t b) noexcept nogil
    const int64_t MAX_GENERATION "KVB_MAX_GENERATION"

cdef enum:
    MAX_INT32 = 0x7FFFFFFF
    SLOT_BITS = 24
    SLOT_MASK = 0xFFFFFF
    MAX_GROUPS = 64
