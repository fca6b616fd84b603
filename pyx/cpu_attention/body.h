/* Attention over cache blocks for one instruction set. kernel.h includes this once for each, with KVB(name) to tell
   the copies apart, KVB_LANES floats in a vector, and KVB_F16C where halves are converted by an instruction. */

typedef float KVB(vec) __attribute__((vector_size(4 * KVB_LANES), aligned(4), may_alias));
typedef int32_t KVB(ivec) __attribute__((vector_size(4 * KVB_LANES), aligned(4), may_alias));
#define VEC KVB(vec)
#define IVEC KVB(ivec)
#define LOAD(p) (*(const VEC *)(p))
#define STORE(p, v) (*(VEC *)(p) = (v))

static inline VEC KVB(pick)(IVEC mask, VEC yes, VEC no) {
    return (VEC)((mask & (IVEC)yes) | (~mask & (IVEC)no));
}

/* exp(x) with a relative error below 2e-7; 0 below -87, exp(88) above 88, NaN for NaN. */
static inline VEC KVB(exp)(VEC x) {
    const VEC zero = {0};
    IVEC tiny = x < zero - 87.0f, none = x != x;
    x = KVB(pick)(x > zero + 88.0f, zero + 88.0f, x);
    x = KVB(pick)(tiny | none, zero, x);
    VEC shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2**23: adding it rounds to an integer */
    IVEC power = (IVEC)shifted << 23;
    VEC n = shifted - 12582912.0f;
    VEC r = x - n * 0.693359375f + n * 2.12194440e-4f;
    VEC y = zero + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y = (VEC)((IVEC)y + power);
    y = KVB(pick)(tiny, zero, y);
    return KVB(pick)(none, zero + NAN, y);
}

/* Element i of the result is the sum of the lanes of v[i]. Each round adds pairs of vectors: of lanes whose bit is clear
   it keeps the first one's sums, of the others the second one's. */
#define ROUND(half)                                                                                          \
    for (int i = 0; i < half; i++) {                                                                         \
        IVEC first, second;                                                                                  \
        for (int lane = 0; lane < KVB_LANES; lane++) {                                                       \
            first[lane] = lane & half ? KVB_LANES + lane - half : lane;                                      \
            second[lane] = first[lane] + half;                                                               \
        }                                                                                                    \
        v[i] = __builtin_shuffle(v[i], v[i + half], first) + __builtin_shuffle(v[i], v[i + half], second);   \
    }
static inline VEC KVB(sums)(VEC *v) {
#if KVB_LANES == 8
    ROUND(4)
#endif
    ROUND(2)
    ROUND(1)
    return v[0];
}
#undef ROUND

/* The lanes of a vector, summed, or their largest; NaN where there is one among those of a sum. */
#define FOLD(half)                                                                                           \
    {                                                                                                        \
        IVEC other;                                                                                          \
        for (int lane = 0; lane < KVB_LANES; lane++) other[lane] = lane ^ half;                              \
        VEC w = __builtin_shuffle(v, other);                                                                 \
        v = COMBINE;                                                                                         \
    }
static inline float KVB(total)(VEC v) {
#define COMBINE v + w
#if KVB_LANES == 8
    FOLD(4)
#endif
    FOLD(2)
    FOLD(1)
#undef COMBINE
    return v[0];
}
static inline float KVB(largest)(VEC v) {
#define COMBINE KVB(pick)(w > v, w, v)
#if KVB_LANES == 8
    FOLD(4)
#endif
    FOLD(2)
    FOLD(1)
#undef COMBINE
    return v[0];
}
#undef FOLD

/* Two vectors of floats from the next 2 * KVB_LANES elements of a row. Of bfloat16 the first has the elements at even
   places and the second those at odd ones; see kvb_place. */
static inline __attribute__((always_inline)) void KVB(two)(const char *from, int dtype, VEC *first, VEC *second) {
    if (dtype == KVB_BFLOAT16) {
        typedef int32_t halves __attribute__((vector_size(4 * KVB_LANES), aligned(2), may_alias));
        IVEC pairs = *(const halves *)from;
        *first = (VEC)(pairs << 16);
        *second = (VEC)(pairs & -65536);
        return;
    }
#ifdef KVB_F16C
    if (dtype == KVB_FLOAT16) {
        *first = (VEC)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
        *second = (VEC)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 16)));
        return;
    }
#endif
    *first = LOAD((const float *)from);
    *second = LOAD((const float *)from + KVB_LANES);
}

/* Four query vectors against `tokens` keys: scores[m][t]. Dims are a multiple of the lanes, of twice as many but for
   float32. */
static inline __attribute__((always_inline)) void KVB(scores_of)(const float *query, const char *const *keys,
                                                                 int dtype, int tokens, int dim, float *scores) {
    const int size = dtype == KVB_FLOAT32 ? 4 : 2;
    for (int t = 0; t < tokens; t += 2) { /* two keys by four queries keep eight sums, as many as hide an addition */
        const char *k0 = keys[t], *k1 = keys[t + 1 < tokens ? t + 1 : t];
        VEC sum[8], a[2], b[2];
        for (int i = 0; i < 8; i++) sum[i] = (VEC){0};
        int d = 0;
        for (; d + 2 * KVB_LANES <= dim; d += 2 * KVB_LANES) {
            KVB(two)(k0 + d * size, dtype, &a[0], &a[1]);
            KVB(two)(k1 + d * size, dtype, &b[0], &b[1]);
            for (int half = 0; half < 2; half++)
                for (int m = 0; m < 4; m++) {
                    VEC q = LOAD(query + m * dim + d + half * KVB_LANES);
                    sum[2 * m] += q * a[half];
                    sum[2 * m + 1] += q * b[half];
                }
        }
        if (dtype == KVB_FLOAT32 && d < dim)
            for (int m = 0; m < 4; m++) {
                VEC q = LOAD(query + m * dim + d);
                sum[2 * m] += q * LOAD((const float *)k0 + d);
                sum[2 * m + 1] += q * LOAD((const float *)k1 + d);
            }
        float total[8];
        for (int i = 0; i < 8; i += KVB_LANES) STORE(total + i, KVB(sums)(sum + i));
        for (int m = 0; m < 4; m++) memcpy(scores + m * KVB_CHUNK + t, total + 2 * m, 2 * sizeof(float));
    }
}

/* out[m] += sum over tokens of weights[m][t] * values[t], for four query vectors. */
static inline __attribute__((always_inline)) void KVB(weigh_of)(const float *weights, const char *const *values,
                                                                int dtype, int tokens, int dim, float *out) {
    const int size = dtype == KVB_FLOAT32 ? 4 : 2;
    int d = 0;
    for (; d + 2 * KVB_LANES <= dim; d += 2 * KVB_LANES) {
        VEC a[4], b[4], v, w;
        for (int m = 0; m < 4; m++) a[m] = LOAD(out + m * dim + d), b[m] = LOAD(out + m * dim + d + KVB_LANES);
        for (int t = 0; t < tokens; t++) {
            KVB(two)(values[t] + d * size, dtype, &v, &w);
            for (int m = 0; m < 4; m++) a[m] += weights[m * KVB_CHUNK + t] * v, b[m] += weights[m * KVB_CHUNK + t] * w;
        }
        for (int m = 0; m < 4; m++) STORE(out + m * dim + d, a[m]), STORE(out + m * dim + d + KVB_LANES, b[m]);
    }
    if (dtype == KVB_FLOAT32 && d < dim) {
        VEC a[4];
        for (int m = 0; m < 4; m++) a[m] = LOAD(out + m * dim + d);
        for (int t = 0; t < tokens; t++) {
            VEC v = LOAD((const float *)values[t] + d);
            for (int m = 0; m < 4; m++) a[m] += weights[m * KVB_CHUNK + t] * v;
        }
        for (int m = 0; m < 4; m++) STORE(out + m * dim + d, a[m]);
    }
}

/* The two for each dtype of rows. */
#define FOR_EACH(dtype, call)                                                                                \
    switch (dtype) {                                                                                         \
    case KVB_BFLOAT16: call(KVB_BFLOAT16); break;                                                            \
    case KVB_FLOAT16: call(KVB_FLOAT16); break;                                                              \
    default: call(KVB_FLOAT32);                                                                              \
    }
static void KVB(scores)(const float *query, const char *const *keys, int dtype, int tokens, int dim, float *scores) {
#define CALL(known) KVB(scores_of)(query, keys, known, tokens, dim, scores)
    FOR_EACH(dtype, CALL)
#undef CALL
}
static void KVB(weigh)(const float *weights, const char *const *values, int dtype, int tokens, int dim, float *out) {
#define CALL(known) KVB(weigh_of)(weights, values, known, tokens, dim, out)
    FOR_EACH(dtype, CALL)
#undef CALL
}
#undef FOR_EACH

/* `count` elements that lie `step` bytes apart, as floats. */
static inline void KVB(widen)(float *to, const char *from, int64_t count, int64_t step, int dtype) {
    typedef uint16_t halves __attribute__((vector_size(2 * KVB_LANES), aligned(2), may_alias));
    typedef uint32_t wholes __attribute__((vector_size(4 * KVB_LANES)));
    int64_t i = 0;
    if (dtype == KVB_BFLOAT16 && step == 2)
        for (; i + KVB_LANES <= count; i += KVB_LANES) {
            wholes bits = __builtin_convertvector(*(const halves *)(from + 2 * i), wholes) << 16;
            STORE(to + i, (VEC)bits);
        }
#ifdef KVB_F16C
    if (dtype == KVB_FLOAT16 && step == 2)
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i))));
#endif
    for (; i < count; i++) to[i] = kvb_widen(from + i * step, dtype);
}

/* Rows of one head for `tokens` tokens: in the cache itself, or converted to float32 in `scratch`, [tokens, padded].
   `bases` are where the tokens' first heads lie. */
static inline void KVB(rows)(const kvb_job *job, const kvb_side *side, const char *const *bases, int tokens, int64_t head,
                             float *scratch, const char **rows) {
    int64_t at = head * side->head_stride;
    if (side->direct) {
        for (int t = 0; t < tokens; t++) rows[t] = bases[t] + at;
        return;
    }
    for (int t = 0; t < tokens; t++) rows[t] = (const char *)(scratch + (int64_t)t * side->padded);
    if (side->runs == 1) {
        for (int t = 0; t < tokens; t++)
            KVB(widen)(scratch + (int64_t)t * side->padded, bases[t] + at, side->dim, job->itemsize, job->dtype);
        return;
    }
    for (int64_t d = 0; d < side->dim; d++) { /* dims lie apart, a token's neighbours beside it */
        int64_t from = at + d / side->run * side->run_stride + d % side->run * job->itemsize;
        for (int t = 0; t < tokens; t++) scratch[(int64_t)t * side->padded + d] = kvb_widen(bases[t] + from, job->dtype);
    }
}

/* Scores of one query vector become weights: capped, hidden where out of reach, and taken to the running softmax. */
static void KVB(soften)(const kvb_job *job, float *scores, int tokens, int64_t low, int64_t first, int64_t last,
                        float *largest, float *total, float *out, int64_t dim) {
    const float none = -INFINITY;
    const VEC zero = {0};
    if (job->softcap > 0.0f)
        for (int t = 0; t < KVB_CHUNK; t += KVB_LANES) {
            VEC e = KVB(exp)(LOAD(scores + t) * (2.0f / job->softcap));
            STORE(scores + t, job->softcap - 2.0f * job->softcap / (e + 1.0f));
        }
    if (tokens < KVB_CHUNK || low < first || low + KVB_CHUNK - 1 > last)
        for (int t = 0; t < KVB_CHUNK; t++)
            if (t >= tokens || low + t < first || low + t > last) scores[t] = none;
    VEC top = LOAD(scores);
    for (int t = KVB_LANES; t < KVB_CHUNK; t += KVB_LANES) {
        VEC other = LOAD(scores + t);
        top = KVB(pick)(other > top, other, top);
    }
    float most = KVB(largest)(top);
    if (!(most > *largest)) most = *largest;
    /* A NaN is larger than nothing and shows in the sum below; without a number to compare with it shows in the output. */
    if (most == none) {
        for (int t = 0; t < KVB_CHUNK; t++) scores[t] = scores[t] == none ? 0.0f : scores[t];
        return;
    }
    if (most > *largest) {
        float shrink = *largest == none ? 0.0f : expf(*largest - most);
        *total *= shrink;
        for (int64_t d = 0; d < dim; d += KVB_LANES) STORE(out + d, LOAD(out + d) * shrink);
        *largest = most;
    }
    VEC sum = zero;
    for (int t = 0; t < KVB_CHUNK; t += KVB_LANES) {
        VEC weight = KVB(exp)(LOAD(scores + t) - most);
        STORE(scores + t, weight);
        sum += weight;
    }
    *total += KVB(total)(sum);
}

/* One item: some queries of a row, all heads, a range of keys. Leaves largest, total and out for each query vector. */
static void KVB(item)(const kvb_job *job, const kvb_item *item, char *scratch) {
    const int64_t per_kv = job->heads / job->kv_heads, queries = item->last_query - item->first_query;
    const int64_t vectors = per_kv * queries, padded = (vectors + 3) & ~(int64_t)3;
    const int64_t kd = job->keys.padded, vd = job->values.padded;
    const int key_dtype = job->keys.direct ? job->dtype : KVB_FLOAT32;
    const int value_dtype = job->values.direct ? job->dtype : KVB_FLOAT32;
    const int32_t *table = job->table + item->row * job->table_stride;
    const int64_t start = job->starts[item->row], before = job->lens[item->row] - (job->starts[item->row + 1] - start);
    float *q = (float *)scratch, *out = q + job->kv_heads * padded * kd, *largest = out + job->kv_heads * padded * vd;
    float *total = largest + job->kv_heads * padded, *key_space = total + job->kv_heads * padded;
    float *value_space = key_space + KVB_CHUNK * kd, *scores = value_space + KVB_CHUNK * vd;
    /* Where few vectors share a reading, memory is what is waited for, and it is read in the order in which it lies. */
    const int together = padded <= KVB_FEW && job->keys.head_stride < job->keys.token_stride && job->keys.runs == 1;
    const int64_t heads = together ? job->kv_heads : 1;
    const int step = together ? 8 : KVB_CHUNK;
    memset(q, 0, (size_t)(job->kv_heads * padded * (kd + vd)) * sizeof(float));
    if (kd != job->keys.dim || vd != job->values.dim) /* what pads a vector counts for nothing */
        memset(key_space, 0, (size_t)(KVB_CHUNK * (kd + vd)) * sizeof(float));
    for (int64_t i = 0; i < job->kv_heads * padded; i++) largest[i] = -INFINITY, total[i] = 0.0f;
    for (int64_t h = 0; h < job->kv_heads; h++)
        for (int64_t m = 0; m < vectors; m++) {
            const char *from = job->query + (start + item->first_query + m / per_kv) * job->query_token +
                               (h * per_kv + m % per_kv) * job->query_head;
            float *to = q + (h * padded + m) * kd;
            if (job->dtype == KVB_FLOAT32) {
                for (int64_t d = 0; d < job->keys.dim; d++) to[d] = ((const float *)from)[d] * job->scale;
                continue;
            }
            for (int64_t d = 0; d < job->keys.dim; d++)
                to[kvb_place(&job->keys, d)] = kvb_widen(from + d * job->itemsize, job->dtype) * job->scale;
        }
    const char *key_bases[2 * KVB_CHUNK], *value_bases[2 * KVB_CHUNK];
    int ready = kvb_bases(job, table, item->low, item->high, 0, key_bases, value_bases);
    for (int64_t low = item->low; low < item->high; low += KVB_CHUNK) {
        const char *rows[KVB_CHUNK];
        int tokens = (int)(item->high - low < KVB_CHUNK ? item->high - low : KVB_CHUNK);
        for (int64_t h0 = 0; h0 < job->kv_heads; h0 += heads) {
            /* A few tokens of all heads at a time where these lie together, all tokens of one head where those do. */
            for (int t = 0; t < tokens; t += step) {
                int some = tokens - t < step ? tokens - t : step;
                for (int64_t h = h0; h < h0 + heads; h++) {
                    kvb_fetch(&job->keys, key_bases, t, some, ready, h, heads, job->itemsize);
                    KVB(rows)(job, &job->keys, key_bases + t, some, h, key_space, rows);
                    for (int64_t m = 0; m < padded; m += 4)
                        KVB(scores)(q + (h * padded + m) * kd, rows, key_dtype, some, (int)kd,
                                    scores + ((h - h0) * padded + m) * KVB_CHUNK + t);
                }
            }
            for (int64_t h = h0; h < h0 + heads; h++)
                for (int64_t m = 0; m < padded; m++) {
                    int64_t vector = m < vectors ? m : vectors - 1;
                    int64_t position = before + item->first_query + vector / per_kv;
                    KVB(soften)(job, scores + ((h - h0) * padded + m) * KVB_CHUNK, tokens, low,
                                kvb_first(job, position), position, largest + h * padded + m, total + h * padded + m,
                                out + (h * padded + m) * vd, vd);
                }
            for (int t = 0; t < tokens; t += step) {
                int some = tokens - t < step ? tokens - t : step;
                for (int64_t h = h0; h < h0 + heads; h++) {
                    kvb_fetch(&job->values, value_bases, t, some, ready, h, heads, job->itemsize);
                    KVB(rows)(job, &job->values, value_bases + t, some, h, value_space, rows);
                    for (int64_t m = 0; m < padded; m += 4)
                        KVB(weigh)(scores + ((h - h0) * padded + m) * KVB_CHUNK + t, rows, value_dtype, some, (int)vd,
                                   out + (h * padded + m) * vd);
                }
            }
        }
        if (low + KVB_CHUNK < item->high)
            ready = kvb_bases(job, table, low + KVB_CHUNK, item->high, ready, key_bases, value_bases);
    }
    if (item->part >= 0) { /* a part of a row's keys: kept to be joined with the others */
        float *to = job->parts + item->part * job->part_floats;
        for (int64_t h = 0; h < job->kv_heads; h++)
            for (int64_t m = 0; m < vectors; m++, to += vd + 2) {
                to[0] = largest[h * padded + m], to[1] = total[h * padded + m];
                memcpy(to + 2, out + (h * padded + m) * vd, (size_t)vd * sizeof(float));
            }
        return;
    }
    for (int64_t h = 0; h < job->kv_heads; h++)
        for (int64_t m = 0; m < vectors; m++)
            kvb_finish(job, start + item->first_query + m / per_kv, h * per_kv + m % per_kv, largest[h * padded + m],
                       total[h * padded + m], out + (h * padded + m) * vd);
}

#undef VEC
#undef IVEC
#undef LOAD
#undef STORE
