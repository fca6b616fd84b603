/* Allocations and limits of the block manager. */
#ifndef KVB_MEMORY_H
#define KVB_MEMORY_H

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define KVB_HUGE ((size_t)2 << 20)
#ifdef NDEBUG
static inline int kvb_fails(void) { return 0; }
#else
static int64_t kvb_fail_in = -1;    /* allocations until one fails, for tests; negative: never */
/* Let another allocation fail, or none; what was left. */
static inline int64_t kvb_fail_after(int64_t n) {
    const int64_t left = kvb_fail_in;
    kvb_fail_in = n;
    return left;
}
static inline int kvb_fails(void) { return kvb_fail_in >= 0 && kvb_fail_in-- == 0; }
#endif
static inline void *kvb_grab(size_t n) { return kvb_fails() ? NULL : malloc(n); }
static inline void *kvb_grab_zeroed(size_t n, size_t width) { return kvb_fails() ? NULL : calloc(n, width); }
/* Never to nothing, for which realloc frees `p` and gives NULL, as if it had failed. */
static inline void *kvb_regrow(void *p, size_t n) { return kvb_fails() ? NULL : realloc(p, n ? n : 1); }
/* n zeroed items; what is at least a huge page starts on one. Unmapped with the same sizes. */
static void *kvb_map(size_t n, size_t width) {
    size_t size, slack, head, page;
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
        page = (size_t)sysconf(_SC_PAGESIZE);
        size = (size + page - 1) / page * page;
        if (slack - head) munmap(base + size, slack - head);
#ifdef MADV_HUGEPAGE
        madvise(base, size, MADV_HUGEPAGE);
#endif
    }
    return base;
}
static void kvb_unmap(void *p, size_t n, size_t width) { if (p) munmap(p, n * width); }
#define KVB_MAX_GENERATION ((int64_t)1 << 38)
/* The least common multiple of two positive numbers, or 2^62 where it is more. */
static inline int64_t kvb_least_multiple(int64_t a, int64_t b) {
    int64_t x = a, y = b, r, product;
    while (y) r = x % y, x = y, y = r;
    if (__builtin_mul_overflow(a / x, b, &product) || product > (int64_t)1 << 62) return (int64_t)1 << 62;
    return product;
}

#endif
