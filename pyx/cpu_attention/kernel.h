/* Attention over cache blocks on CPU: ragged batches, K and V read where they lie, softmax as it goes, in float32.

   A call is cut into items: some queries of a row, all heads, a range of its keys. Threads take items in turn. Where
   rows are too few or too unlike to keep them all busy, a row's keys are split, and the parts are joined at the end. */

#ifndef KVB_ATTENTION_H
#define KVB_ATTENTION_H

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifndef _WIN32
#include <dlfcn.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KVB_X86 1
#include <immintrin.h>
#endif

enum {
    KVB_CHUNK = 32,        /* tokens whose scores are held at once */
    KVB_VECTORS = 32,      /* query vectors of a head that share a reading of K and V, where there are so many */
    KVB_SHORTEST = 256,    /* keys that a part has at least */
    KVB_FEW = 8,           /* vectors of a head up to which memory is what is waited for */
    KVB_PADDING = 8        /* floats: dims are padded to a multiple of every instruction set's lanes */
};
enum { KVB_FLOAT32, KVB_BFLOAT16, KVB_FLOAT16 };

typedef struct {
    const char *cache;
    int64_t block_stride, token_stride, head_stride, run_stride; /* bytes */
    int64_t dim, runs, run, padded;                              /* of a head: elements, runs and elements of a run */
    int direct;                                                  /* vectors are read in the cache itself */
    int split;                                                   /* lanes, where vectors are read as kvb_place says */
    int ahead;                                                   /* tokens by which reading ahead is ahead */
} kvb_side;

typedef struct {
    int64_t row, first_query, last_query, low, high, part; /* part: -1 where the item has all keys of its queries */
} kvb_item;

typedef struct {
    kvb_side keys, values;
    const char *query, *sinks;
    char *out;
    const int32_t *table, *lens, *starts;
    int64_t table_stride, rows, num_blocks, block_size, columns;
    int64_t heads, kv_heads, query_token, query_head, out_token, out_head; /* strides in bytes */
    int64_t window, chunk;                                                 /* 0: none */
    float scale, softcap;                                                  /* softcap 0: none */
    int dtype, itemsize, threads, isa;
    /* laid out in the workspace */
    kvb_item *items;
    int64_t most, num_items, num_parts, part_floats, scratch_bytes, next_item, next_scratch;
    float *parts;
    char *scratch;
} kvb_job;

static inline float kvb_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13, bits;
    float value;
    if (rest >= 0x0f800000u) { /* infinite or NaN */
        bits = sign | rest | 0x7f800000u;
        memcpy(&value, &bits, 4);
        return value;
    }
    memcpy(&value, &rest, 4);
    value *= 5.192296858534828e+33f; /* 2**112: rebias, exact for subnormals too */
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float kvb_widen(const char *from, int dtype) {
    float value;
    uint16_t half;
    if (dtype == KVB_FLOAT32) {
        memcpy(&value, from, 4);
        return value;
    }
    memcpy(&half, from, 2);
    if (dtype == KVB_FLOAT16) return kvb_half(half);
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
}

/* Rounded to the nearest, ties to even. */
static inline void kvb_narrow(char *to, float value, int dtype) {
    uint32_t bits;
    uint16_t half;
    if (dtype == KVB_FLOAT32) {
        memcpy(to, &value, 4);
        return;
    }
    memcpy(&bits, &value, 4);
    if (dtype == KVB_BFLOAT16) {
        half = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
        uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
        if (rest > 0x7f800000) half = (uint16_t)(sign | 0x7e00);
        else if (rest >= 0x47800000) half = (uint16_t)(sign | 0x7c00);
        else if (rest < 0x38800000) { /* subnormal: adding 0.5 leaves the bits of the result at the end */
            float shifted, magic = 0.5f;
            memcpy(&shifted, &rest, 4);
            shifted += magic;
            memcpy(&rest, &shifted, 4);
            half = (uint16_t)(sign | (rest - 0x3f000000));
        } else half = (uint16_t)(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
    }
    memcpy(to, &half, 2);
}

/* The first position that a token attends to. */
static inline int64_t kvb_first(const kvb_job *job, int64_t position) {
    int64_t first = job->window && position >= job->window ? position - job->window + 1 : 0;
    if (job->chunk && position - position % job->chunk > first) first = position - position % job->chunk;
    return first;
}

/* The block of a position. Tables were checked, but lie in memory that others can write: nothing outside of the cache is
   ever read. */
static inline int64_t kvb_block(const kvb_job *job, const int32_t *table, int64_t position) {
    int64_t block = table[position / job->block_size];
    return block >= 0 && block < job->num_blocks ? block : 0;
}

/* Where the tokens of this chunk and of the next one lie. `ready` is how many of them the chunk before found, of which
   the first have been worked on. Returns how many there are. */
static inline int kvb_bases(const kvb_job *job, const int32_t *table, int64_t low, int64_t high, int ready,
                            const char **keys, const char **values) {
    int left = ready > KVB_CHUNK ? ready - KVB_CHUNK : 0;
    int end = (int)(high - low < 2 * KVB_CHUNK ? high - low : 2 * KVB_CHUNK);
    memcpy(keys, keys + KVB_CHUNK, (size_t)left * sizeof(*keys));
    memcpy(values, values + KVB_CHUNK, (size_t)left * sizeof(*values));
    for (int t = left; t < end;) {
        int64_t block = kvb_block(job, table, low + t), offset = (low + t) % job->block_size;
        const char *key = job->keys.cache + block * job->keys.block_stride + offset * job->keys.token_stride;
        const char *value = job->values.cache + block * job->values.block_stride + offset * job->values.token_stride;
        for (; offset < job->block_size && t < end; offset++, t++) {
            keys[t] = key, values[t] = value;
            key += job->keys.token_stride, value += job->values.token_stride;
        }
    }
    return end;
}

/* Bring K or V of later tokens nearer while these are worked on: the rows of one head, or, where heads lie together,
   this head's share of whole tokens, in the order in which they lie. */
static inline void kvb_fetch(const kvb_side *side, const char *const *bases, int first, int count, int ready,
                             int64_t head, int64_t heads, int itemsize) {
#ifdef __GNUC__
    if (side->runs != 1) return;
    int64_t bytes = side->dim * itemsize, from = first + side->ahead, to = from + count, at = head * side->head_stride;
    if (heads > 1) {
        bytes *= heads, at = 0;
        to = from + count * (head + 1) / heads;
        from += count * head / heads;
    }
    for (int64_t t = from; t < to && t < ready; t++)
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(bases[t] + at + b);
#endif
}

/* Where element d of a head lies among floats: in its own place, or, in groups of twice the lanes, even elements first.
   Two neighbours of bfloat16 are one integer, whose halves become floats without moving between lanes. */
static inline int64_t kvb_place(const kvb_side *side, int64_t d) {
    int64_t lanes = side->split, inner = d & (2 * lanes - 1);
    return lanes ? d - inner + (inner & 1) * lanes + (inner >> 1) : d;
}

/* Whether the vectors of a side can be read where they lie, by code for an instruction set. */
static void kvb_form(kvb_side *side, int dtype, int isa) {
    side->direct = side->runs == 1 && side->padded == side->dim;
    if (dtype != KVB_FLOAT32) side->direct = side->direct && side->dim % 16 == 0;
    if (dtype == KVB_FLOAT16) side->direct = side->direct && isa > 0;
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    if (dtype == KVB_BFLOAT16) side->direct = 0;
#endif
    side->split = side->direct && dtype == KVB_BFLOAT16 ? (isa > 0 ? 8 : 4) : 0;
}

/* Divide what a query vector gathered by its weights' sum, the sink among them, and store it. */
static inline void kvb_finish(const kvb_job *job, int64_t token, int64_t head, float largest, float total,
                              const float *gathered) {
    char *to = job->out + token * job->out_token + head * job->out_head;
    float share = 1.0f / total;
    if (job->sinks) {
        float sink, most;
        memcpy(&sink, job->sinks + 4 * head, 4);
        most = sink > largest ? sink : largest;
        float shrink = expf(largest - most);
        share = shrink / (total * shrink + expf(sink - most));
    }
    if (job->dtype == KVB_FLOAT32) { /* Asking each element for its dtype takes long beside a short sequence. */
        for (int64_t d = 0; d < job->values.dim; d++) ((float *)to)[d] = gathered[d] * share;
        return;
    }
    for (int64_t d = 0; d < job->values.dim; d++)
        kvb_narrow(to + d * job->itemsize, gathered[kvb_place(&job->values, d)] * share, job->dtype);
}

#define KVB(name) kvb_plain_##name
#define KVB_LANES 4
#include "cpu_attention/body.h"
#undef KVB
#undef KVB_LANES

#ifdef KVB_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define KVB(name) kvb_avx2_##name
#define KVB_LANES 8
#define KVB_F16C
#include "cpu_attention/body.h"
#undef KVB
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#define KVB(name) kvb_avx512_##name
#include "cpu_attention/body.h"
#undef KVB
#undef KVB_LANES
#undef KVB_F16C
#pragma GCC pop_options
#endif

/* The best instruction set that this processor has: 0 plain C, 1 AVX2, 2 AVX-512. */
static int kvb_best_isa(void) {
#ifdef KVB_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
               ? 2
               : 1;
#else
    return 0;
#endif
}

/* Queries of a row that are one item's. */
static inline int64_t kvb_tile(const kvb_job *job) {
    int64_t per_kv = job->heads / job->kv_heads;
    return per_kv >= KVB_VECTORS ? 1 : KVB_VECTORS / per_kv;
}

/* The keys that an item of these queries reaches. */
static inline void kvb_range(const kvb_job *job, int64_t row, int64_t first_query, int64_t last_query, int64_t *low,
                             int64_t *high) {
    int64_t before = job->lens[row] - ((int64_t)job->starts[row + 1] - job->starts[row]);
    *low = kvb_first(job, before + first_query);
    *high = before + last_query;
}

/* Cut the call into items, in `job->items` where that is not NULL. `most` is the number of keys from which on an item is
   split, 0 for never. Returns how many keys there are in all. */
static int64_t kvb_cut(kvb_job *job, int64_t most) {
    int64_t tile = kvb_tile(job), work = 0, low, high;
    job->num_items = job->num_parts = 0;
    for (int64_t row = 0; row < job->rows; row++) {
        int64_t queries = (int64_t)job->starts[row + 1] - job->starts[row];
        for (int64_t q = 0; q < queries; q += tile) {
            int64_t last = q + tile < queries ? q + tile : queries;
            kvb_range(job, row, q, last, &low, &high);
            int64_t keys = high - low, pieces = most && keys > most ? (keys + most - 1) / most : 1;
            work += keys;
            for (int64_t i = 0; i < pieces; i++) {
                if (job->items) {
                    kvb_item item = {row, q, last, low + keys * i / pieces, low + keys * (i + 1) / pieces, -1};
                    if (pieces > 1) item.part = job->num_parts;
                    job->items[job->num_items] = item;
                }
                job->num_items++;
                job->num_parts += pieces > 1;
            }
        }
    }
    return work;
}

/* Check the rows, cut them into items and count the bytes of the workspace that these need. Returns the first row that
   is wrong or whose table names a block that does not exist, -1 where all are right. */
static int64_t kvb_plan(kvb_job *job, int64_t num_tokens, int64_t *bytes) {
    if (job->starts[0] != 0 || job->starts[job->rows] != num_tokens) return 0;
    kvb_form(&job->keys, job->dtype, job->isa);
    kvb_form(&job->values, job->dtype, job->isa);
    for (int64_t row = 0; row < job->rows; row++) {
        int64_t length = job->lens[row], queries = (int64_t)job->starts[row + 1] - job->starts[row];
        if (queries < 1 || queries > length || length > job->columns * job->block_size || job->starts[row] < 0 ||
            job->starts[row + 1] > num_tokens)
            return row;
        for (int64_t i = kvb_first(job, length - queries) / job->block_size; i <= (length - 1) / job->block_size; i++) {
            int32_t block = job->table[row * job->table_stride + i];
            if (block < 0 || block >= job->num_blocks) return row;
        }
    }
    int64_t per_kv = job->heads / job->kv_heads, vectors = per_kv * kvb_tile(job), padded = (vectors + 3) & ~(int64_t)3;
    int64_t kd = job->keys.padded, vd = job->values.padded;
    job->items = NULL;
    job->most = 0;
    int64_t work = kvb_cut(job, 0);
    if (job->threads > job->num_items && work <= KVB_SHORTEST * job->num_items) job->threads = (int)job->num_items;
    if (job->threads > 1) {
        /* A third of a thread's share, so that no thread waits long for the last; not so short that joining costs. */
        job->most = work / (3 * job->threads);
        if (job->most < KVB_SHORTEST) job->most = KVB_SHORTEST;
        kvb_cut(job, job->most);
    }
    job->part_floats = job->kv_heads * vectors * (vd + 2);
    /* Items of few vectors hold the scores of all heads at once. */
    int64_t few = job->kv_heads * (padded < KVB_FEW ? padded : KVB_FEW), scores = few > padded ? few : padded;
    job->scratch_bytes = (job->kv_heads * padded * (kd + vd + 2) + scores * KVB_CHUNK + KVB_CHUNK * (kd + vd)) * 4;
    job->scratch_bytes = (job->scratch_bytes + 63) & ~(int64_t)63;
    *bytes = 64 + job->threads * job->scratch_bytes + job->num_parts * job->part_floats * 4 +
             job->num_items * (int64_t)sizeof(kvb_item);
    return -1;
}

/* What each thread does: take the next item until there is none. */
static void kvb_work(void *data) {
    kvb_job *job = (kvb_job *)data;
    char *scratch = job->scratch + __atomic_fetch_add(&job->next_scratch, 1, __ATOMIC_RELAXED) * job->scratch_bytes;
    for (;;) {
        int64_t i = __atomic_fetch_add(&job->next_item, 1, __ATOMIC_RELAXED);
        if (i >= job->num_items) return;
#ifdef KVB_X86
        if (job->isa == 2) kvb_avx512_item(job, &job->items[i], scratch);
        else if (job->isa == 1) kvb_avx2_item(job, &job->items[i], scratch);
        else
#endif
            kvb_plain_item(job, &job->items[i], scratch);
    }
}

static void *kvb_thread(void *data) {
    kvb_work(data);
    return NULL;
}

/* Run on this thread and others: those of the OpenMP runtime that the process has loaded, which torch's own operations
   use too, so that the two never compete; without one on threads of their own. */
static void kvb_spread(kvb_job *job) {
    enum { MOST = 256 };
    pthread_t threads[MOST];
    int started = 0;
    static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    if (!parallel) *(void **)&parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (parallel) {
        parallel(kvb_work, job, (unsigned)job->threads, 0);
        return;
    }
    while (started < job->threads - 1 && started < MOST && !pthread_create(&threads[started], NULL, kvb_thread, job))
        started++;
    kvb_work(job); /* takes what threads that could not be started leave */
    while (started) pthread_join(threads[--started], NULL);
}

/* The parts of each query's keys become one. */
static void kvb_join(kvb_job *job) {
    int64_t per_kv = job->heads / job->kv_heads, vd = job->values.padded, step = vd + 2;
    for (int64_t i = 0; i < job->num_items;) {
        const kvb_item *item = &job->items[i];
        int64_t pieces = 1;
        while (i + pieces < job->num_items && job->items[i + pieces].row == item->row &&
               job->items[i + pieces].first_query == item->first_query)
            pieces++;
        i += pieces;
        if (item->part < 0) continue;
        int64_t vectors = per_kv * (item->last_query - item->first_query);
        for (int64_t v = 0; v < job->kv_heads * vectors; v++) {
            float *to = job->parts + item->part * job->part_floats + v * step;
            for (int64_t p = 1; p < pieces; p++) {
                const float *from = to + p * job->part_floats;
                if (from[0] == -INFINITY && from[1] == 0.0f) continue;
                float most = from[0] > to[0] ? from[0] : to[0];
                float keep = to[0] == -INFINITY ? 0.0f : expf(to[0] - most), add = expf(from[0] - most);
                for (int64_t d = 0; d < vd; d++) to[2 + d] = to[2 + d] * keep + from[2 + d] * add;
                to[0] = most, to[1] = to[1] * keep + from[1] * add;
            }
            kvb_finish(job, job->starts[item->row] + item->first_query + v % vectors / per_kv,
                       v / vectors * per_kv + v % vectors % per_kv, to[0], to[1], to + 2);
        }
    }
}

static void kvb_run(kvb_job *job, char *workspace) {
    workspace = (char *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    job->scratch = workspace;
    job->parts = (float *)(workspace + job->threads * job->scratch_bytes);
    job->items = (kvb_item *)(workspace + job->threads * job->scratch_bytes + job->num_parts * job->part_floats * 4);
    job->next_item = job->next_scratch = 0;
    kvb_cut(job, job->most);
    if (job->threads > 1) kvb_spread(job);
    else kvb_work(job);
    if (job->num_parts) kvb_join(job);
}
#endif
