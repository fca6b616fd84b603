/* Bytes that sequences and nodes of the prefix tree share, and how texts are cut. */
#ifndef KVB_TEXT_H
#define KVB_TEXT_H

#include <stdint.h>
#include <string.h>

#ifndef KVB_RUN
#define KVB_RUN 32      /* blocks hashed ahead of their look-up, so that their cache lines are on the way */
#endif
#ifndef KVB_PAGE
#define KVB_PAGE 1024   /* tokens that a page has at least: what a fork copies when it writes for the first time */
#endif

struct kvb_blob { int64_t refs, room; char *bytes; };

/* Leading elements of a and b that are equal. */
static inline int64_t kvb_same(const int32_t *a, const int32_t *b, int64_t n) {
    int64_t i = 0;
    while (n - i >= 256 && !memcmp(a + i, b + i, 256 * sizeof(int32_t))) i += 256;
    while (i < n && a[i] == b[i]) i++;
    return i;
}

#endif
