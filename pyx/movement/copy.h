/* Copies of tokens and blocks in CPU memory, past the caches where they are large. Used by movement.pyx alone. */
#ifndef KVB_COPY_H
#define KVB_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* A streaming store leaves the target's old bytes unread and the caches as they are. memcpy does so only for single
   copies of about the size of the last-level cache, and a token or a block is far smaller. */
static inline void kvb_copy(char *to, const char *from, size_t n, int stream) {
#ifdef __SSE2__
    if (stream && !((uintptr_t)to & 15) && !(n & 15)) {
        size_t i = 0;
        for (; i + 64 <= n; i += 64) {
            __m128i v[4];
            for (int k = 0; k < 4; k++) v[k] = _mm_loadu_si128((const __m128i *)(from + i + 16 * k));
            for (int k = 0; k < 4; k++) _mm_stream_si128((__m128i *)(to + i + 16 * k), v[k]);
        }
        for (; i < n; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
        return;
    }
#endif
    if (n == 16)
        memcpy(to, from, 16);
    else
        memcpy(to, from, n);
}

static inline void kvb_zero(char *to, size_t n) {
#ifdef __SSE2__
    if (!((uintptr_t)to & 15) && !(n & 15)) {
        for (size_t i = 0; i < n; i += 16) _mm_stream_si128((__m128i *)(to + i), _mm_setzero_si128());
        return;
    }
#endif
    memset(to, 0, n);
}

/* The start of what is copied next, which no prefetcher of the processor's expects. */
static inline void kvb_expect(const char *from, size_t n) {
    for (size_t i = 0; i < n && i < 1024; i += 64) __builtin_prefetch(from + i);
}

/* After streaming stores, before another thread may be told that the bytes are there. */
static inline void kvb_fence(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* to[j][i] = from[i][j] for rows x cols elements, strides in bytes. Square tiles of 16-byte vectors: interleaving
   rows i and i + N/2 into rows 2i and 2i + 1, log2(N) times, transposes N x N elements. Four tiles are stored
   together, so that streaming stores fill whole cache lines. */
#ifdef __SSE2__
#define KVB_TILES(NAME, SIZE, LO, HI)                                                                         \
    enum { N = 16 / SIZE };                                                                                   \
    stream = stream && !(((uintptr_t)to | (uintptr_t)to_stride) & 15);                                        \
    for (; rows - i >= N;) {                                                                                  \
        ptrdiff_t tiles = (rows - i) / N < 4 ? (rows - i) / N : 4, j = 0;                                     \
        for (; j + N <= cols; j += N) {                                                                       \
            __m128i v[N], w[N], out[4][N];                                                                    \
            for (ptrdiff_t g = 0; g < tiles; g++) {                                                           \
                const char *corner = from + (i + g * N) * from_stride + j * SIZE;                             \
                for (int k = 0; k < N; k++)                                                                   \
                    v[k] = _mm_loadu_si128((const __m128i *)(corner + k * from_stride));                      \
                for (int step = 1; step < N; step *= 2) {                                                     \
                    for (int k = 0; k < N / 2; k++) {                                                         \
                        w[2 * k] = LO(v[k], v[k + N / 2]);                                                    \
                        w[2 * k + 1] = HI(v[k], v[k + N / 2]);                                                \
                    }                                                                                         \
                    for (int k = 0; k < N; k++) v[k] = w[k];                                                  \
                }                                                                                             \
                for (int k = 0; k < N; k++) out[g][k] = v[k];                                                 \
            }                                                                                                 \
            for (int k = 0; k < N; k++)                                                                       \
                for (ptrdiff_t g = 0; g < tiles; g++) {                                                       \
                    __m128i *place = (__m128i *)(to + (j + k) * to_stride + (i + g * N) * SIZE);              \
                    if (stream) _mm_stream_si128(place, out[g][k]); else _mm_storeu_si128(place, out[g][k]);  \
                }                                                                                             \
        }                                                                                                     \
        kvb_scalar_##NAME(to, to_stride, from, from_stride, i, i + tiles * N, j, cols);                       \
        i += tiles * N;                                                                                       \
    }
#else
#define KVB_TILES(NAME, SIZE, LO, HI) (void)stream;
#endif
#define KVB_TRANSPOSE(NAME, SIZE, LO, HI)                                                                     \
    static inline void kvb_scalar_##NAME(char *to, ptrdiff_t to_stride, const char *from,                     \
                                         ptrdiff_t from_stride, ptrdiff_t i0, ptrdiff_t i1, ptrdiff_t j0,     \
                                         ptrdiff_t j1) {                                                      \
        for (ptrdiff_t i = i0; i < i1; i++)                                                                   \
            for (ptrdiff_t j = j0; j < j1; j++)                                                               \
                memcpy(to + j * to_stride + i * SIZE, from + i * from_stride + j * SIZE, SIZE);               \
    }                                                                                                         \
    static void kvb_transpose_##NAME(char *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride,  \
                                     ptrdiff_t rows, ptrdiff_t cols, int stream) {                            \
        ptrdiff_t i = 0;                                                                                      \
        KVB_TILES(NAME, SIZE, LO, HI)                                                                         \
        kvb_scalar_##NAME(to, to_stride, from, from_stride, i, rows, 0, cols);                                \
    }
KVB_TRANSPOSE(1, 1, _mm_unpacklo_epi8, _mm_unpackhi_epi8)
KVB_TRANSPOSE(2, 2, _mm_unpacklo_epi16, _mm_unpackhi_epi16)
KVB_TRANSPOSE(4, 4, _mm_unpacklo_epi32, _mm_unpackhi_epi32)
KVB_TRANSPOSE(8, 8, _mm_unpacklo_epi64, _mm_unpackhi_epi64)
KVB_TRANSPOSE(16, 16, _mm_unpacklo_epi64, _mm_unpackhi_epi64)

static void kvb_transpose(char *to, ptrdiff_t to_stride, const char *from, ptrdiff_t from_stride, ptrdiff_t rows,
                          ptrdiff_t cols, size_t size, int stream) {
    switch (size) {
    case 1: kvb_transpose_1(to, to_stride, from, from_stride, rows, cols, stream); break;
    case 2: kvb_transpose_2(to, to_stride, from, from_stride, rows, cols, stream); break;
    case 4: kvb_transpose_4(to, to_stride, from, from_stride, rows, cols, stream); break;
    case 8: kvb_transpose_8(to, to_stride, from, from_stride, rows, cols, stream); break;
    case 16: kvb_transpose_16(to, to_stride, from, from_stride, rows, cols, stream); break;
    }
}

#endif
