/* Online softmax (Milakov, Gimelshein 2018; Dao et al. 2022, "FlashAttention") over tiles of 64 positions,
 * and segments of 256 that may be computed apart and merged (Dao et al. 2023, "Flash-Decoding").
 *
 *   positions   |  tile 0 | 1 | 2 | 3 |  tile 4 ...        borders at fixed positions for every query
 *   segments    |        segment 0    |  segment 1 ...
 *
 * K and V of a tile are read once, where they lie, for all query heads of their group and all tokens of a
 * task. A query's sums run over the same keys in the same order whether it came as a decode token, in a
 * draft or in a prompt chunk, so its result is the same to the last bit. fp32 throughout.
 */
#include "attention.h"

#include <float.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define NOTHING_YET -FLT_MAX

INLINE int64_t oldest(const geometry *g, int position) {
    return g->window && position >= g->window ? position - g->window + 1 : 0;
}

void segments_seen(const geometry *g, const queries *w, int *first, int *end) {
    *first = (int)(oldest(g, w->position) / SEGMENT);
    *end = (w->position + w->num_tokens - 1) / SEGMENT + 1;
}

/* The vectors of a block's head from `position` on; plane 0 is K, 1 is V. */
INLINE const bf16 *vectors_at(const geometry *g, const queries *w, int plane, int position) {
    const int64_t size = (int64_t)g->block_size * g->head_dim;
    return g->layer + w->table[position / g->block_size] * g->block_stride + w->head * g->head_stride +
           plane * size + (int64_t)(position % g->block_size) * g->head_dim;
}

/* Where the K and V of the tile after this one lie, by 16 positions. No hardware guesses where the next
 * block is, so its lines are sent for one by one, between the products of this tile: many at once would
 * only fill the queue to memory and stop the thread. */
typedef struct {
    const bf16 *k[TILE / 16], *v[TILE / 16];
} coming;

static coming tile_at(const geometry *g, const queries *w, int first) {
    coming c;
    const int last = w->position + w->num_tokens - 1;
    for (int i = 0; i < TILE / 16; i++) {
        const int position = first + 16 * i < last ? first + 16 * i : last - last % 16;
        c.k[i] = vectors_at(g, w, 0, position);
        c.v[i] = vectors_at(g, w, 1, position);
    }
    return c;
}

/* Sixteen rows of sixteen 32-bit values: columns become rows. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

INLINE __m512 lower(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
INLINE __m512 upper(__m512i pair) {
    return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
}

/* A tile as the sums want it. Once for a single strip of queries, as pairs of bfloat16 and V where it lies;
 * for many strips widened, so that it is done once for all of them. The sums are the same.
 *
 *   keys     [head_dim / 2, TILE] pairs of bfloat16, or [head_dim, TILE] fp32
 *   values   [TILE, head_dim] fp32, or none
 *
 * What stands in `keys` behind the last position is never used: those scores are masked. */
INLINE void stage(const geometry *g, const queries *w, int first, int count, int once, float *keys, float *values) {
    const int D = g->head_dim;
    for (int sub = 0; sub < count; sub += 16) {
        const bf16 *k = vectors_at(g, w, 0, first + sub);
        for (int d = 0; d < D; d += 32) {
            __m512i r[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(k + i * D + d);
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                if (once) {
                    _mm512_storeu_si512(keys + (size_t)(d / 2 + i) * TILE + sub, r[i]);
                } else {
                    float *to = keys + (size_t)(d + 2 * i) * TILE + sub;
                    _mm512_storeu_ps(to, lower(r[i]));
                    _mm512_storeu_ps(to + TILE, upper(r[i]));
                }
        }
        if (once) continue;
        const bf16 *v = vectors_at(g, w, 1, first + sub);
        const int rows = count - sub < 16 ? count - sub : 16;
        for (int i = 0; i < rows * D; i += 16) _mm512_storeu_ps(values + (size_t)sub * D + i, widen(v + i));
    }
}

/* Scores of M query vectors with the tile's keys, times log2(e), masked: [M, TILE]. */
INLINE void score(const geometry *g, const queries *w, int vector, int M, int first, int once, const float *keys,
                  const coming *next, float *scores) {
    const int D = g->head_dim;
    const __m512 scale = _mm512_set1_ps(g->scale); /* weights are powers of 2 */
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const float *q[STRIP];
    __m512 sums[STRIP][4];
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
        const int token = (vector + i) / g->group, head = (vector + i) % g->group;
        q[i] = w->q + (size_t)token * w->q_stride + head * D;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[i][j] = _mm512_setzero_ps();
    }
    for (int d = 0; d < D; d += 2) {
        if (next) { /* four lines of the next tile's 2 D */
            const bf16 *line = next->k[4 * d / D] + (size_t)(d - 4 * d / D * (D / 4)) * 64;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) _mm_prefetch((const char *)(line + 32 * i), _MM_HINT_T0);
        }
        __m512 k[2][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            if (once) {
                __m512i pair = _mm512_loadu_si512(keys + (size_t)(d / 2) * TILE + 16 * j);
                k[0][j] = lower(pair), k[1][j] = upper(pair);
            } else {
                k[0][j] = _mm512_loadu_ps(keys + (size_t)d * TILE + 16 * j);
                k[1][j] = _mm512_loadu_ps(keys + (size_t)(d + 1) * TILE + 16 * j);
            }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 6
            for (int i = 0; i < M; i++) {
                __m512 value = _mm512_set1_ps(q[i][d + half]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) sums[i][j] = _mm512_fmadd_ps(value, k[half][j], sums[i][j]);
            }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
        const int position = w->position + (vector + i) / g->group;
        const __m512i last = _mm512_set1_epi32(position), from = _mm512_set1_epi32((int)oldest(g, position));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512i key = _mm512_add_epi32(lane, _mm512_set1_epi32(first + 16 * j));
            __mmask16 seen = _mm512_cmple_epi32_mask(key, last) & _mm512_cmpge_epi32_mask(key, from);
            /* An infinite score becomes a NaN: it must not pass for one that is masked. */
            __m512 s = _mm512_fmadd_ps(sums[i][j], _mm512_setzero_ps(), _mm512_mul_ps(sums[i][j], scale));
            if (g->cap) s = _mm512_mul_ps(cap_ps(s, g->cap), _mm512_set1_ps(LOG2_E));
            s = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, s);
            _mm512_storeu_ps(scores + i * TILE + 16 * j, s);
        }
    }
}

/* Scores of one vector become weights; returns by what the sums so far are to be multiplied. */
INLINE float weigh(float *scores, float *max, float *sum) {
    __m512 s[4], high;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) s[j] = _mm512_loadu_ps(scores + 16 * j);
    high = _mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3]));
    const float old = *max, largest = _mm512_reduce_max_ps(high), now = largest > old ? largest : old;
    const __m512 top = _mm512_set1_ps(now);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        /* Not "greater than": a NaN is to stay one. */
        __mmask16 seen = _mm512_cmp_ps_mask(s[j], _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        s[j] = _mm512_maskz_mov_ps(seen, exp2_ps(_mm512_sub_ps(s[j], top)));
        _mm512_storeu_ps(scores + 16 * j, s[j]);
    }
    const float factor = now == old ? 1.0f : _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(old - now)));
    *max = now;
    *sum = *sum * factor + sum1(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
    return factor;
}

/* out [M, D] = out * factor + weights [M, TILE] times values [count, D], for V vectors of 16 from `d` on. `here`:
 * where V lies, by 16 positions, when it was not staged. */
INLINE void gather(const float *weights, const float *factor, const float *values, const coming *here, int count, int M,
                   int V, int D, int d, const coming *next, float *out) {
    __m512 sums[STRIP][4];
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++)
            sums[i][j] = _mm512_mul_ps(_mm512_loadu_ps(out + (size_t)i * D + d + 16 * j), _mm512_set1_ps(factor[i]));
    for (int k = 0; k < count; k++) {
        if (next)
            for (int i = 0; i < V * 16; i += 32)
                _mm_prefetch((const char *)(next->v[k / 16] + (size_t)(k % 16) * D + d + i), _MM_HINT_T0);
        __m512 v[4];
#pragma GCC unroll 4
        for (int j = 0; j < V; j++)
            v[j] = here ? widen(here->v[k / 16] + (size_t)(k % 16) * D + d + 16 * j)
                        : _mm512_loadu_ps(values + (size_t)k * D + d + 16 * j);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
            __m512 weight = _mm512_set1_ps(weights[i * TILE + k]);
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) sums[i][j] = _mm512_fmadd_ps(weight, v[j], sums[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) _mm512_storeu_ps(out + (size_t)i * D + d + 16 * j, sums[i][j]);
}

/* M vectors, from number `vector` on, over one tile. */
INLINE void strip(const geometry *g, const queries *w, int vector, int M, int first, int count, const float *keys,
                  const float *values, const coming *here, const coming *next, float *scores, partial *part) {
    const int D = g->head_dim;
    float factor[STRIP];
    score(g, w, vector, M, first, here != NULL, keys, next, scores);
    for (int i = 0; i < M; i++)
        factor[i] = weigh(scores + i * TILE, &part->max[vector + i], &part->sum[vector + i]);
    float *out = part->out + (size_t)vector * D;
    int d = 0;
    for (; d + 64 <= D; d += 64) gather(scores, factor, values, here, count, M, 4, D, d, next, out);
    if (d < D) gather(scores, factor, values, here, count, M, 2, D, d, next, out);
}

void attend(const geometry *g, const queries *w, int segment, const queries *then, int then_segment, partial *part,
            float *scratch) {
    const int D = g->head_dim, vectors = w->num_tokens * g->group, end = w->position + w->num_tokens;
    const int begin = segment * SEGMENT;
    float *keys = scratch, *values = keys + (size_t)TILE * D, *scores = values + (size_t)TILE * D;
    for (int i = 0; i < vectors; i++) part->max[i] = NOTHING_YET, part->sum[i] = 0;
    memset(part->out, 0, sizeof(float) * vectors * (size_t)D);
    for (int first = begin; first < begin + SEGMENT && first < end; first += TILE) {
        if (first + TILE <= oldest(g, w->position)) continue;
        const int count = end - first < TILE ? end - first : TILE;
        const int more = first + TILE < begin + SEGMENT && first + TILE < end;
        coming tile;
        const coming *next = NULL;
        if (more || then) {
            tile = more ? tile_at(g, w, first + TILE) : tile_at(g, then, then_segment * SEGMENT);
            next = &tile;
        }
        if (vectors <= STRIP) {
            const coming here = tile_at(g, w, first);
            stage(g, w, first, count, 1, keys, values);
            switch (vectors) {
            case 1: strip(g, w, 0, 1, first, count, keys, values, &here, next, scores, part); break;
            case 2: strip(g, w, 0, 2, first, count, keys, values, &here, next, scores, part); break;
            case 3: strip(g, w, 0, 3, first, count, keys, values, &here, next, scores, part); break;
            case 4: strip(g, w, 0, 4, first, count, keys, values, &here, next, scores, part); break;
            case 5: strip(g, w, 0, 5, first, count, keys, values, &here, next, scores, part); break;
            default: strip(g, w, 0, STRIP, first, count, keys, values, &here, next, scores, part);
            }
            continue;
        }
        stage(g, w, first, count, 0, keys, values);
        for (int i = 0; i < vectors; i += STRIP, next = NULL)
            switch (vectors - i) {
            case 1: strip(g, w, i, 1, first, count, keys, values, NULL, next, scores, part); break;
            case 2: strip(g, w, i, 2, first, count, keys, values, NULL, next, scores, part); break;
            case 3: strip(g, w, i, 3, first, count, keys, values, NULL, next, scores, part); break;
            case 4: strip(g, w, i, 4, first, count, keys, values, NULL, next, scores, part); break;
            case 5: strip(g, w, i, 5, first, count, keys, values, NULL, next, scores, part); break;
            default: strip(g, w, i, STRIP, first, count, keys, values, NULL, next, scores, part);
            }
    }
}

void merge(partial *total, const partial *part, int vectors, int head_dim) {
    for (int i = 0; i < vectors; i++) {
        const float top = part->max[i] > total->max[i] ? part->max[i] : total->max[i];
        const __m512 a = exp2_ps(_mm512_set1_ps(total->max[i] - top)), b = exp2_ps(_mm512_set1_ps(part->max[i] - top));
        total->max[i] = top;
        total->sum[i] = total->sum[i] * _mm512_cvtss_f32(a) + part->sum[i] * _mm512_cvtss_f32(b);
        float *to = total->out + (size_t)i * head_dim;
        const float *from = part->out + (size_t)i * head_dim;
        for (int d = 0; d < head_dim; d += 16) {
            __m512 added = _mm512_mul_ps(_mm512_loadu_ps(from + d), b);
            _mm512_storeu_ps(to + d, _mm512_fmadd_ps(_mm512_loadu_ps(to + d), a, added));
        }
    }
}

void attend_all(const geometry *g, const queries *w, const queries *then, int then_segment, partial *total, partial *part,
                float *scratch) {
    int begin, end;
    segments_seen(g, w, &begin, &end);
    for (int segment = begin; segment < end; segment++) {
        partial *to = segment == begin ? total : part;
        if (segment + 1 < end)
            attend(g, w, segment, w, segment + 1, to, scratch);
        else
            attend(g, w, segment, then, then_segment, to, scratch);
        if (to == part) merge(total, part, w->num_tokens * g->group, g->head_dim);
    }
}

void finalize(const partial *total, int vector, int head_dim, const float *sink, float *out) {
    float sum = total->sum[vector], factor = 1.0f;
    if (sink) { /* one more score without a value */
        const float score = *sink * LOG2_E, max = total->max[vector], top = score > max ? score : max;
        factor = _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(max - top)));
        sum = sum * factor + _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(score - top)));
    }
    const __m512 share = _mm512_set1_ps(factor / sum);
    for (int d = 0; d < head_dim; d += 16)
        _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(total->out + (size_t)vector * head_dim + d), share));
}
