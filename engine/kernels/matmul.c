/* Products with packed (GGUF) and dense weights.
 *
 * Packed: activations become 16-bit fixed point, 32 to a block, as the weights are. Inside a block sums are
 * integers and so exact; blocks are added in fp32, first to last. Dense: fp32 sums over the columns, first to
 * last. Either way an output is one number, whatever rows and outputs are computed beside it.
 *
 * Sixteen outputs lie in the lanes of a vector and a pair of activations is broadcast (VNNI's vpdpwssd: 64
 * products a cycle where AVX512-BF16 gives 16 and fp32 32 on the machine this was written on).
 *
 *   M = 1         four groups at once           weights unpacked in registers, as they come from memory
 *   M = 2 .. 24   tiles of <= 6 rows x 32 outputs   the same, again for each tile
 *   M > 24        the same tiles                weights of two groups unpacked into the cache once
 */
#include "matmul.h"

#include <string.h>

#include "records.h"

enum { FEW = 24 };

size_t group_bytes(int kind, int columns) {
    return (size_t)columns / BLOCK / blocks_of(kind) * record_bytes(kind);
}

INLINE __m512 low_half(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
INLINE __m512 high_half(__m512i pair) {
    return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE __m512i pair_of(const int16_t *q) { int32_t both; memcpy(&both, q, 4); return _mm512_set1_epi32(both); }

/* Two groups unpacked: integers less their zero, in pairs of columns, and factors. */
typedef struct {
    int16_t *pairs;  /* [2, columns / 4, 2, 16 rows, 2] */
    float *scale;    /* [2, columns / 16 or 32, 16 rows] */
    float *offset;   /* [2, columns / 32, 16 rows] */
} unpacked;

static unpacked unpacked_at(int16_t *panel, int columns) {
    float *scale = (float *)(panel + (size_t)2 * GROUP * columns);
    return (unpacked){panel, scale, scale + (size_t)2 * columns};
}

/* The kind whose loop takes an unpacked weight. */
INLINE int unpacked_kind(int kind) { return halves_of(kind) > 1 ? Q6_K : has_offset(kind) ? Q4_1 : Q8_0; }

/* Where a tile finds a weight: in the records of its first group, the next one `stride` bytes on; or unpacked. */
typedef struct {
    const uint8_t *group;
    size_t stride;
    const unpacked *panel;
} weight;

INLINE void pairs_of(const weight *w, int kind, int n, int b, int j, int columns, __m512i *first, __m512i *second) {
    if (w->panel) {
        const int16_t *pairs = w->panel->pairs + (size_t)n * GROUP * columns + ((size_t)b * BLOCK + 4 * j) * GROUP;
        *first = _mm512_loadu_si512(pairs);
        *second = _mm512_loadu_si512(pairs + 2 * GROUP);
    } else {
        const uint8_t *record = record_at(kind, w->group + n * w->stride, b);
        unpack_pairs(values_at(kind, record, b), kind, j, first, second);
    }
}

INLINE factors factors_at(const weight *w, int kind, int n, int b, int half, int columns) {
    if (!w->panel)
        return factors_of(kind, record_at(kind, w->group + n * w->stride, b), b % blocks_of(kind), half);
    const int blocks = columns / BLOCK, parts = halves_of(kind);
    const size_t at = (size_t)n * blocks + b;
    const __m512 scale = _mm512_loadu_ps(w->panel->scale + (at * parts + half) * GROUP);
    return (factors){scale, has_offset(kind) ? _mm512_loadu_ps(w->panel->offset + at * GROUP) : scale};
}

/* M rows x N groups of one block, or of half of one, given its integer sums. */
INLINE void add_block(int kind, factors f, const __m512i *ints, const operand *x, size_t at, size_t step, int M, int N,
                      __m512 *sums) {
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
        __m512 scale = _mm512_mul_ps(f.scale, _mm512_set1_ps(x->scale[at + i * step]));
        sums[i * N] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints[i * N]), scale, sums[i * N]);
        if (has_offset(kind))
            sums[i * N] = _mm512_fmadd_ps(f.offset, _mm512_set1_ps(x->sum[at + i * step]), sums[i * N]);
    }
}

/* What the sums of a block start from: integers in records still have their zero. */
INLINE __m512i start(const weight *w, int kind, int32_t count) {
    const int zero = w->panel ? 0 : zero_of(kind);
    return zero ? _mm512_set1_epi32(-zero * count) : _mm512_setzero_si512();
}

/* M rows x N groups of a packed weight. */
INLINE void packed_tile(int kind, const weight *w, const operand *x, int row, int M, int N, __m512 *sums) {
    const int K = x->columns, blocks = K / BLOCK, parts = halves_of(kind), fours = FOURS / parts;
    const int two = M * N < 8; /* two sums each where there are few: one alone would wait for itself */
    for (int b = 0; b < blocks; b++) {
        const size_t at = (size_t)row * blocks + b;
        for (int half = 0; half < parts; half++) {
            const int16_t *q = x->q + (size_t)row * K + b * BLOCK + half * 4 * fours;
            __m512i ints[MAX_ROWS * MAX_GROUPS], more[MAX_ROWS * MAX_GROUPS];
#pragma GCC unroll 24
            for (int i = 0; i < M * N; i++) {
                ints[i] = start(w, kind, x->count[at + i / N * blocks]);
                more[i] = _mm512_setzero_si512();
            }
#pragma GCC unroll 8
            for (int j = 0; j < fours; j++) {
                __m512i first[MAX_GROUPS], second[MAX_GROUPS];
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) pairs_of(w, kind, n, b, half * fours + j, K, &first[n], &second[n]);
#pragma GCC unroll 6
                for (int i = 0; i < M; i++) {
                    __m512i lower = pair_of(q + (size_t)i * K + 4 * j), upper = pair_of(q + (size_t)i * K + 4 * j + 2);
#pragma GCC unroll 4
                    for (int n = 0; n < N; n++) {
                        __m512i *other = two ? more : ints;
                        ints[i * N + n] = _mm512_dpwssd_epi32(ints[i * N + n], first[n], lower);
                        other[i * N + n] = _mm512_dpwssd_epi32(other[i * N + n], second[n], upper);
                    }
                }
            }
            if (two)
#pragma GCC unroll 24
                for (int i = 0; i < M * N; i++) ints[i] = _mm512_add_epi32(ints[i], more[i]);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++)
                add_block(kind, factors_at(w, kind, n, b, half, K), ints + n, x, at, blocks, M, N, sums + n);
        }
    }
}

/* M rows x N groups of a dense weight. */
INLINE void dense_tile(const weight *w, const operand *x, int row, int M, int N, __m512 *sums) {
    const int K = x->columns;
    const float *at = x->x + (size_t)row * K;
    for (int k = 0; k < K; k += 2) {
        __m512 even[MAX_GROUPS], odd[MAX_GROUPS];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            __m512i pair = _mm512_loadu_si512(w->group + n * w->stride + (size_t)k * 2 * GROUP);
            even[n] = low_half(pair);
            odd[n] = high_half(pair);
        }
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
            __m512 first = _mm512_set1_ps(at[(size_t)i * K + k]), second = _mm512_set1_ps(at[(size_t)i * K + k + 1]);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                sums[i * N + n] = _mm512_fmadd_ps(even[n], first, sums[i * N + n]);
                sums[i * N + n] = _mm512_fmadd_ps(odd[n], second, sums[i * N + n]);
            }
        }
    }
}

/* Where outputs go: groups `group` ... of a matrix, the first `groups` of a tile's. */
typedef struct {
    const matrix *w;
    int group, groups;
    float *out;
    int stride;
} outputs;

INLINE void tile(int kind, const weight *w, const operand *x, int row, int M, int N, const outputs *to, float *out) {
    __m512 sums[MAX_ROWS * MAX_GROUPS];
#pragma GCC unroll 24
    for (int i = 0; i < M * N; i++) sums[i] = _mm512_setzero_ps();
    if (kind == BF16)
        dense_tile(w, x, row, M, N, sums);
    else
        packed_tile(kind, w, x, row, M, N, sums);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        if (n >= to->groups) break;
        const int first = (to->group + n) * GROUP, left = to->w->rows - first;
        const float *bias = to->w->bias;
        __m512 added = bias ? _mm512_maskz_loadu_ps(lanes(left), bias + first) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int i = 0; i < M; i++)
            _mm512_storeu_ps(out + (size_t)i * to->stride + n * GROUP, _mm512_add_ps(sums[i * N + n], added));
    }
}

/* Unpack N groups. If there is `more`, it is sent for and comes while these are used. */
INLINE void unpack(int kind, const uint8_t *group, int columns, int N, int more, const unpacked *to) {
    const int blocks = columns / BLOCK, records = N * blocks / blocks_of(kind), zero = zero_of(kind);
    int16_t *pairs = to->pairs;
    float *scale = to->scale, *offset = to->offset;
    for (int i = 0; i < records; i++, group += record_bytes(kind)) {
        for (int line = 0; more && line < record_bytes(kind); line += 64)
            _mm_prefetch((const char *)group + (size_t)records * record_bytes(kind) + line, _MM_HINT_T1);
        for (int b = 0; b < blocks_of(kind); b++) {
#pragma GCC unroll 8
            for (int j = 0; j < FOURS; j++, pairs += 4 * GROUP) {
                __m512i first, second;
                unpack_pairs(values_at(kind, group, b), kind, j, &first, &second);
                _mm512_storeu_si512(pairs, _mm512_sub_epi16(first, _mm512_set1_epi16(zero)));
                _mm512_storeu_si512(pairs + 2 * GROUP, _mm512_sub_epi16(second, _mm512_set1_epi16(zero)));
            }
            for (int half = 0; half < halves_of(kind); half++, scale += GROUP) {
                const factors f = factors_of(kind, group, b, half);
                _mm512_storeu_ps(scale, f.scale);
                if (has_offset(kind)) _mm512_storeu_ps(offset, f.offset);
            }
            offset += GROUP;
        }
    }
}

/* M rows x 2 groups by tiles of at most six rows, the last two of them alike: a tile of one row is slow. */
INLINE void strips(int kind, const weight *w, const operand *x, int row, int M, const outputs *to) {
    float *out = to->out;
    while (M > 0) {
        const int rows = M >= 12 || M == 6 ? 6 : M > 6 ? (M + 1) / 2 : M;
        switch (rows) {
        case 1: tile(kind, w, x, row, 1, 2, to, out); break;
        case 2: tile(kind, w, x, row, 2, 2, to, out); break;
        case 3: tile(kind, w, x, row, 3, 2, to, out); break;
        case 4: tile(kind, w, x, row, 4, 2, to, out); break;
        case 5: tile(kind, w, x, row, 5, 2, to, out); break;
        default: tile(kind, w, x, row, 6, 2, to, out);
        }
        M -= rows, row += rows, out += (size_t)rows * to->stride;
    }
}

static void unpacked_strips(int kind, const unpacked *panel, const operand *x, int row, int M, const outputs *to) {
    const weight w = {NULL, 0, panel};
    switch (unpacked_kind(kind)) {
    case Q4_1: strips(Q4_1, &w, x, row, M, to); break;
    case Q6_K: strips(Q6_K, &w, x, row, M, to); break;
    default: strips(Q8_0, &w, x, row, M, to);
    }
}

INLINE void product_of(int kind, const matrix *m, int group, int groups, const operand *x, int row, int M, float *out,
                       int stride, int16_t *scratch) {
    const size_t bytes = (size_t)m->columns / BLOCK / blocks_of(kind) * record_bytes(kind);
    const unpacked panel = unpacked_at(scratch, m->columns);
    weight w = {m->data + group * bytes, bytes, NULL};
    outputs to = {m, group, groups, out, stride};
    if (M == 1 && groups == 4) {
        tile(kind, &w, x, row, 1, 4, &to, out);
        return;
    }
    for (; to.groups > 0; to.groups -= 2, to.group += 2, to.out += 2 * GROUP, w.group += 2 * bytes) {
        if (to.groups == 1) w.stride = 0; /* the group twice; only the first is stored */
        if (kind != BF16 && M > FEW) {
            unpack(kind, w.group, m->columns, to.groups > 1 ? 2 : 1, to.groups > 2, &panel);
            unpacked_strips(kind, &panel, x, row, M, &to);
        } else {
            strips(kind, &w, x, row, M, &to);
        }
    }
}

/* A case for each kind, with its loops. */
#define EACH_KIND(DO) \
    DO(BF16) DO(Q4_0) DO(Q4_1) DO(Q8_0) DO(Q5_0) DO(Q5_1) DO(Q4_K) DO(Q5_K) DO(Q6_K) DO(IQ4_NL) DO(IQ4_XS) DO(MXFP4)

void product(const matrix *w, int group, int groups, const operand *x, int row, int M, float *out, int stride,
             int16_t *panel) {
    switch (w->kind) {
#define PRODUCT_OF(kind) \
    case kind: product_of(kind, w, group, groups, x, row, M, out, stride, panel); break;
        EACH_KIND(PRODUCT_OF)
    }
}

void joined_product(const joined *w, int group, int groups, const operand *x, int row, int M, float *out, int stride,
                    int16_t *panel) {
    for (const matrix *part = w->parts; groups > 0; part++) {
        const int end = (part->rows + GROUP - 1) / GROUP, left = end - group;
        if (left <= 0) {
            group -= end;
            continue;
        }
        const int count = groups < left ? groups : left;
        product(part, group, count, x, row, M, out, stride, panel);
        group = 0, groups -= count, out += count * GROUP;
    }
}

void quantise(const operand *x, int row, int first, int count) {
    const int K = x->columns;
    for (int k = first; k < first + count; k += BLOCK) {
        const float *from = x->x + (size_t)row * K + k;
        const size_t at = (size_t)row * (K / BLOCK) + k / BLOCK;
        __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
        float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        __m512 inverse = _mm512_set1_ps(largest > 0 ? 32767.0f / largest : 0.0f);
        __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
        __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
        int16_t *to = x->q + (size_t)row * K + k;
        _mm256_storeu_si256((__m256i *)to, _mm512_cvtsepi32_epi16(low));
        _mm256_storeu_si256((__m256i *)(to + 16), _mm512_cvtsepi32_epi16(high));
        x->count[at] = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
        /* What is no number must stay that: integers and maxima would hide it. */
        const int lost = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) || !isfinite(largest);
        x->scale[at] = lost ? NAN : largest * (1.0f / 32767.0f);
        x->sum[at] = x->scale[at] * x->count[at];
    }
}

static void unpack_bf16_row(const bf16 *group, int columns, int r, float *out) {
    for (int k = 0; k < columns; k++) {
        uint32_t wide = (uint32_t)group[k / 2 * 32 + 2 * r + k % 2] << 16;
        memcpy(out + k, &wide, 4);
    }
}

/* Block b of sixteen rows is unpacked, and one row of them taken. */
static void unpack_block(int kind, const uint8_t *group, int b, int r, float *out) {
    const uint8_t *record = record_at(kind, group, b);
    float scale[2][GROUP], offset[GROUP];
    for (int half = 0; half < 2; half++)
        _mm512_storeu_ps(scale[half], factors_of(kind, record, b % blocks_of(kind), half).scale);
    _mm512_storeu_ps(offset, factors_of(kind, record, b % blocks_of(kind), 0).offset);
    for (int j = 0; j < FOURS; j++) {
        __m512i pairs[2];
        unpack_pairs(values_at(kind, record, b), kind, j, &pairs[0], &pairs[1]);
        const float factor = scale[halves_of(kind) > 1 && j >= FOURS / 2][r];
        for (int i = 0; i < 4; i++) {
            const float value = (float)(((const int16_t *)&pairs[i / 2])[2 * r + i % 2] - zero_of(kind));
            out[4 * j + i] = has_offset(kind) ? fmaf(factor, value, offset[r]) : factor * value;
        }
    }
}

void unpack_row(const matrix *w, int row, float *out) {
    const uint8_t *group = w->data + (size_t)(row / GROUP) * group_bytes(w->kind, w->columns);
    if (w->kind == BF16) {
        unpack_bf16_row((const bf16 *)group, w->columns, row % GROUP, out);
        return;
    }
    for (int b = 0; b < w->columns / BLOCK; b++, out += BLOCK) unpack_block(w->kind, group, b, row % GROUP, out);
}
