/* Loops that fill the arrays of a step. */
#ifndef KVB_ARRAYS_H
#define KVB_ARRAYS_H

#include <stdint.h>

#include "wide.h"

KVB_WIDE static void kvb_widen(const int32_t *tokens, int32_t n, int64_t *ids) {
    for (int32_t i = 0; i < n; i++) ids[i] = tokens[i];
}
KVB_WIDE static void kvb_count(int64_t first, int32_t n, int64_t *positions) {
    for (int32_t i = 0; i < n; i++) positions[i] = first + i;
}
/* The slots of n tokens, the first at `offset` in its block; blocks[0] and each `stride` further on are theirs. */
KVB_WIDE static void kvb_fill_slots(
    const int32_t *blocks, int32_t stride, int32_t block_size, int32_t offset, int32_t n, int64_t *slots
) {
    while (n > 0) {
        int32_t m = block_size - offset < n ? block_size - offset : n;
        int64_t slot = (int64_t)*blocks * block_size + offset;
        for (int32_t i = 0; i < m; i++) slots[i] = slot + i;
        slots += m, n -= m, blocks += stride, offset = 0;
    }
}

#endif
