/* Assertions of what must hold whatever a caller does: compiled into the checked build, nothing in the one that ships. */
#ifndef KVB_CHECKS_H
#define KVB_CHECKS_H

#ifdef NDEBUG
#define KVB_CHECKED 0
#define kvb_check(ok, what) ((void)sizeof((ok) ? (what) : (what)))    /* used, and never evaluated */
#else
#include <stdio.h>
#include <stdlib.h>
#define KVB_CHECKED 1
static inline void kvb_check(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "kvblocks: assertion failed: %s\n", what);
    abort();
}
#endif

#endif
