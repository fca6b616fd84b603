/* Loops over token ids that a caller gave. */
#ifndef KVB_INTS_H
#define KVB_INTS_H

#include <stddef.h>
#include <stdint.h>

#include "wide.h"

/* Both give the bitwise or of all tokens: negative where one is, and past 31 bits where one is too large. */
KVB_WIDE static int64_t kvb_copy(const int32_t *source, ptrdiff_t n, int32_t *target) {
    int32_t bits = 0;
    for (ptrdiff_t i = 0; i < n; i++) bits |= target[i] = source[i];
    return bits;
}
KVB_WIDE static int64_t kvb_narrow(const int64_t *source, ptrdiff_t n, int32_t *target) {
    int64_t bits = 0;
    for (ptrdiff_t i = 0; i < n; i++) bits |= source[i], target[i] = (int32_t)source[i];
    return bits;
}
KVB_WIDE static int64_t kvb_bits(const int32_t *source, ptrdiff_t n) {
    int32_t bits = 0;
    for (ptrdiff_t i = 0; i < n; i++) bits |= source[i];
    return bits;
}

#endif
