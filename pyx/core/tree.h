/* Nodes and lines of the prefix tree, and what is done to many at once. */
#ifndef KVB_TREE_H
#define KVB_TREE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "text.h"
#include "wide.h"

static inline uint64_t kvb_fold(uint64_t a, uint64_t b) {
    unsigned __int128 p = (unsigned __int128)a * b;
    return (uint64_t)p ^ (uint64_t)(p >> 64);
}
/* NH (Black et al., UMAC, 1999) of `blocks` blocks of n tokens: sums of products of keyed halves; the two halves
   keep the loads contiguous. */
KVB_WIDE static void kvb_nh(const int32_t *t, const uint32_t *k, int32_t n, int32_t blocks, uint64_t *out) {
    const int32_t h = n / 2;
    for (int32_t b = 0; b < blocks; b++, t += n) {
        uint64_t s = 0;
        for (int32_t i = 0; i < h; i++)
            s += (uint64_t)((uint32_t)t[i] + k[i]) * (uint64_t)((uint32_t)t[i + h] + k[i + h]);
        out[b] = n & 1 ? kvb_fold(s + k[n], (uint64_t)(uint32_t)t[n - 1] + k[n - 1]) : s;
    }
}
#define kvb_prefetch(p) __builtin_prefetch(p)
#define kvb_prefetch_write(p) __builtin_prefetch(p, 1)
#define kvb_lowest(mask) __builtin_ctz(mask)
static inline int kvb_differ(const int32_t *a, const int32_t *b, int32_t n) {
    int32_t d = 0;
    for (int32_t i = 0; i < n; i++) d |= a[i] ^ b[i];
    return d != 0;
}
/* 16 is what everybody uses; as a constant it is four moves and no call. */
static inline void kvb_keep(int32_t *kept, const int32_t *tokens, int32_t n) {
    if (n == 16) memcpy(kept, tokens, 16 * sizeof(int32_t));
    else memcpy(kept, tokens, (size_t)n * sizeof(int32_t));
}
typedef struct {
    uint64_t hash;
    struct kvb_blob *blob;
    int32_t parent, uses, size, blocks[];
} kvb_node;
#define KVB_NODE_HEAD offsetof(kvb_node, blocks)
/* How many of n nodes, without extra bytes, are a path down from `parent` that says these tokens. */
KVB_WIDE static int32_t kvb_follow(
    const char *nodes, size_t width, const int32_t *kept, int32_t size, int32_t parent, const int32_t *tokens,
    const uint64_t *hashes, const int32_t *path, int32_t n
) {
    for (int32_t j = 0; j < n; j++, tokens += size) {
        const kvb_node *node = (const kvb_node *)(nodes + path[j] * width);
        if (path[j] <= 0 || node->hash != hashes[j] || node->parent != parent || node->size) return j;
        if (kvb_differ(kept + (size_t)path[j] * size, tokens, size)) return j;
        parent = path[j];
    }
    return n;
}
typedef struct { uint8_t tags[12]; uint32_t passed; int32_t nodes[12]; } kvb_line;
/* The slots of a line that have this tag, as bits. */
#ifdef __SSE2__
#include <emmintrin.h>
static inline uint32_t kvb_slots(const kvb_line *line, uint8_t tag) {
    __m128i tags = _mm_load_si128((const __m128i *)line);
    return (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(tags, _mm_set1_epi8((char)tag))) & 0xFFF;
}
#else
static inline uint32_t kvb_slots(const kvb_line *line, uint8_t tag) {
    uint32_t found = 0;
    for (int i = 0; i < 12; i++) found |= (uint32_t)(line->tags[i] == tag) << i;
    return found;
}
#endif

#endif
