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
 *   M = 2 .. 12   tiles of <= 6 rows x 32 outputs   the same, again for each tile
 *   M > 12        the same tiles                weights of two groups unpacked into the cache once
 */
#include "matmul.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { FEW = 12 };

INLINE int head_bytes(int kind) { return kind == BF16 ? 0 : kind == Q4_1 ? 64 : 32; }
INLINE int record_bytes(int kind) {
    return head_bytes(kind) + (kind == BF16 ? 1024 : kind == Q8_0 ? 512 : 256);
}

size_t group_bytes(int kind, int columns) { return (size_t)columns / BLOCK * record_bytes(kind); }

INLINE __m512 halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512 low_half(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
INLINE __m512 high_half(__m512i pair) {
    return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
}

/* Pairs of columns 2j and 2j + 1 of a record's weights as int16 [16 rows, 2]. `q` is behind the scales. */
INLINE void unpack_pairs(const uint8_t *q, int kind, int j, __m512i *first, __m512i *second) {
    if (kind == Q8_0) {
        *first = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(q + 64 * j)));
        *second = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(q + 64 * j + 32)));
    } else {
        __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(q + 32 * j)));
        *first = _mm512_and_si512(both, _mm512_set1_epi16(15));
        *second = _mm512_srli_epi16(both, 4);
    }
}

INLINE __m512i pair_of(const int16_t *q) { int32_t both; memcpy(&both, q, 4); return _mm512_set1_epi32(both); }

/* What a block starts from: the weights of Q4_0 are q - 8. */
INLINE __m512i start(int kind, int32_t count) {
    return kind == Q4_0 ? _mm512_set1_epi32(-8 * count) : _mm512_setzero_si512();
}

/* M rows x N groups of one block, given its integer sums. */
INLINE void add_block(int kind, const uint8_t *record, __m512i *ints, const operand *x, size_t at, size_t step, int M,
                      int N, __m512 *sums) {
    __m512 d = halves(record), m = kind == Q4_1 ? halves(record + 32) : d;
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
        __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(x->scale[at + i * step]));
        sums[i * N] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints[i * N]), scale, sums[i * N]);
        if (kind == Q4_1) sums[i * N] = _mm512_fmadd_ps(m, _mm512_set1_ps(x->sum[at + i * step]), sums[i * N]);
    }
}

/* M rows x N groups of a packed weight. `panel`: the weights as int16 pairs, or NULL to unpack here. */
INLINE void packed_tile(int kind, const uint8_t *group, size_t stride_bytes, const int16_t *panel, const operand *x,
                        int row, int M, int N, __m512 *sums) {
    const int K = x->columns, blocks = K / BLOCK;
    const int16_t *q = x->q + (size_t)row * K;
    for (int b = 0; b < blocks; b++) {
        const uint8_t *record = group + (size_t)b * record_bytes(kind);
        const size_t at = (size_t)row * blocks + b;
        /* Two sums each where there are few: one alone would wait for itself. */
        const int two = M * N < 8;
        __m512i ints[MAX_ROWS * MAX_GROUPS], more[MAX_ROWS * MAX_GROUPS];
#pragma GCC unroll 24
        for (int i = 0; i < M * N; i++) {
            ints[i] = start(kind, x->count[at + i / N * blocks]);
            more[i] = _mm512_setzero_si512();
        }
#pragma GCC unroll 8
        for (int j = 0; j < BLOCK / 4; j++) {
            __m512i first[MAX_GROUPS], second[MAX_GROUPS];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++)
                if (panel) {
                    const int16_t *pairs = panel + (size_t)n * GROUP * K + ((size_t)b * BLOCK + 4 * j) * GROUP;
                    first[n] = _mm512_loadu_si512(pairs);
                    second[n] = _mm512_loadu_si512(pairs + 2 * GROUP);
                } else {
                    unpack_pairs(record + n * stride_bytes + head_bytes(kind), kind, j, &first[n], &second[n]);
                }
#pragma GCC unroll 6
            for (int i = 0; i < M; i++) {
                const int16_t *at_k = q + (size_t)i * K + b * BLOCK + 4 * j;
                __m512i lower = pair_of(at_k), upper = pair_of(at_k + 2);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    ints[i * N + n] = _mm512_dpwssd_epi32(ints[i * N + n], first[n], lower);
                    if (two)
                        more[i * N + n] = _mm512_dpwssd_epi32(more[i * N + n], second[n], upper);
                    else
                        ints[i * N + n] = _mm512_dpwssd_epi32(ints[i * N + n], second[n], upper);
                }
            }
        }
        if (two)
#pragma GCC unroll 24
            for (int i = 0; i < M * N; i++) ints[i] = _mm512_add_epi32(ints[i], more[i]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
            add_block(kind, record + n * stride_bytes, ints + n, x, at, blocks, M, N, sums + n);
    }
}

/* M rows x N groups of a dense weight. */
INLINE void dense_tile(const uint8_t *group, size_t stride_bytes, const operand *x, int row, int M, int N, __m512 *sums) {
    const int K = x->columns;
    const float *at = x->x + (size_t)row * K;
    for (int k = 0; k < K; k += 2) {
        __m512 even[MAX_GROUPS], odd[MAX_GROUPS];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            __m512i pair = _mm512_loadu_si512(group + n * stride_bytes + (size_t)k * 2 * GROUP);
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

INLINE void tile(const matrix *w, int kind, int group, const int16_t *panel, const operand *x, int row, int M, int N,
                 float *out, int stride) {
    const size_t bytes = (size_t)w->columns / BLOCK * record_bytes(kind);
    const uint8_t *data = w->data + group * bytes;
    __m512 sums[MAX_ROWS * MAX_GROUPS];
#pragma GCC unroll 24
    for (int i = 0; i < M * N; i++) sums[i] = _mm512_setzero_ps();
    if (kind == BF16)
        dense_tile(data, bytes, x, row, M, N, sums);
    else
        packed_tile(kind, data, bytes, panel, x, row, M, N, sums);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        const int first = (group + n) * GROUP, left = w->rows - first;
        __m512 bias = w->bias ? _mm512_maskz_loadu_ps(lanes(left), w->bias + first) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int i = 0; i < M; i++)
            _mm512_storeu_ps(out + (size_t)i * stride + n * GROUP, _mm512_add_ps(sums[i * N + n], bias));
    }
}

/* The weights of N groups as int16 pairs, one group after the other. If there is `more`, it is sent for and
 * comes while these are used. */
INLINE void unpack_panel(const matrix *w, int kind, int group, int N, int more, int16_t *panel) {
    const int blocks = N * w->columns / BLOCK;
    const uint8_t *record = w->data + (size_t)group * w->columns / BLOCK * record_bytes(kind);
    for (int i = 0; i < blocks; i++, record += record_bytes(kind)) {
        for (int line = 0; more && line < record_bytes(kind); line += 64)
            _mm_prefetch((const char *)record + (size_t)blocks * record_bytes(kind) + line, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int j = 0; j < BLOCK / 4; j++, panel += 4 * GROUP) {
            __m512i first, second;
            unpack_pairs(record + head_bytes(kind), kind, j, &first, &second);
            _mm512_storeu_si512(panel, first);
            _mm512_storeu_si512(panel + 2 * GROUP, second);
        }
    }
}

/* M rows x N groups by tiles of at most six rows, the last two of them alike: a tile of one row is slow. */
INLINE void strips(const matrix *w, int kind, int group, int N, const int16_t *panel, const operand *x, int row, int M,
                   float *out, int stride) {
    while (M > 0) {
        const int rows = M >= 12 || M == 6 ? 6 : M > 6 ? (M + 1) / 2 : M;
        switch (rows) {
        case 1: tile(w, kind, group, panel, x, row, 1, N, out, stride); break;
        case 2: tile(w, kind, group, panel, x, row, 2, N, out, stride); break;
        case 3: tile(w, kind, group, panel, x, row, 3, N, out, stride); break;
        case 4: tile(w, kind, group, panel, x, row, 4, N, out, stride); break;
        case 5: tile(w, kind, group, panel, x, row, 5, N, out, stride); break;
        default: tile(w, kind, group, panel, x, row, 6, N, out, stride);
        }
        M -= rows, row += rows, out += (size_t)rows * stride;
    }
}

INLINE void product_of(const matrix *w, int kind, int group, int groups, const operand *x, int row, int M, float *out,
                       int stride, int16_t *panel) {
    if (M == 1 && groups == 4) {
        tile(w, kind, group, NULL, x, row, 1, 4, out, stride);
        return;
    }
    const int use_panel = kind != BF16 && M > FEW;
    for (; groups > 0; groups -= 2, group += 2, out += 2 * GROUP) {
        const int N = groups > 1 ? 2 : 1;
        if (use_panel) unpack_panel(w, kind, group, N, groups > 2, panel);
        if (N == 2 && use_panel) strips(w, kind, group, 2, panel, x, row, M, out, stride);
        if (N == 2 && !use_panel) strips(w, kind, group, 2, NULL, x, row, M, out, stride);
        if (N == 1 && use_panel) strips(w, kind, group, 1, panel, x, row, M, out, stride);
        if (N == 1 && !use_panel) strips(w, kind, group, 1, NULL, x, row, M, out, stride);
    }
}

void product(const matrix *w, int group, int groups, const operand *x, int row, int M, float *out, int stride,
             int16_t *panel) {
    switch (w->kind) {
    case BF16: product_of(w, BF16, group, groups, x, row, M, out, stride, panel); break;
    case Q4_0: product_of(w, Q4_0, group, groups, x, row, M, out, stride, panel); break;
    case Q4_1: product_of(w, Q4_1, group, groups, x, row, M, out, stride, panel); break;
    default: product_of(w, Q8_0, group, groups, x, row, M, out, stride, panel);
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

void unpack_row(const matrix *w, int row, float *out) {
    const int r = row % GROUP, kind = w->kind;
    const uint8_t *record = w->data + (size_t)(row / GROUP) * group_bytes(kind, w->columns);
    for (int k = 0; k < w->columns; k++) {
        const int c = k % BLOCK;
        if (k && c == 0) record += record_bytes(kind);
        const uint8_t *q = record + head_bytes(kind);
        if (kind == BF16) {
            uint32_t wide = (uint32_t)((const bf16 *)q)[c / 2 * 32 + 2 * r + c % 2] << 16;
            memcpy(out + k, &wide, 4);
            continue;
        }
        const float d = _cvtsh_ss(((const uint16_t *)record)[r]);
        if (kind == Q8_0) {
            out[k] = d * (float)((const int8_t *)q)[c / 2 * 32 + 2 * r + c % 2];
            continue;
        }
        const uint8_t both = q[c / 4 * 32 + 2 * r + c % 2];
        const int value = c % 4 < 2 ? both & 15 : both >> 4;
        out[k] = kind == Q4_0 ? d * (float)(value - 8) : fmaf(d, (float)value, _cvtsh_ss(((const uint16_t *)record)[GROUP + r]));
    }
}
