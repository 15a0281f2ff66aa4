/* Kernels for CPUs with AVX512-BF16: products of few rows with GGUF-packed weights, attention, norms.
 *
 * Each weight is dequantised and rounded to bfloat16 on the fly: exactly the value that the dense bfloat16
 * matrix holds, so both packings are one numeric profile and differ only in the order of sums. Activations
 * are bfloat16, sums fp32. Plain C behind a C interface: no header of torch is needed, and ctypes releases
 * the GIL. All pointers are the caller's; nothing is kept.
 */
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef uint16_t bf16;
enum { BLOCK = 32, CHUNK = 32, MAX_BLOCKS = 2048 };

static inline void store(void *y, int narrow, size_t at, float value) {
    if (narrow) {
        __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(value));
        ((bf16 *)y)[at] = (bf16)_mm_extract_epi16((__m128i)rounded, 0);
    } else {
        ((float *)y)[at] = value;
    }
}

/* fp16 -> fp32, `count` of them, rounded up to sixteen. */
static inline void widen_scales(const uint16_t *from, float *to, int count) {
    for (int i = 0; i < count; i += 16) {
        int left = count - i;
        __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i)));
    }
}

/* ---- Q4_1: value = d * q + m, q of 0..15 ------------------------------------------------------------
 *
 * Two blocks A and B of a row lie together: byte i holds A[i] below and B[i] above, the scales are
 * (dA, mA, dB, mB). The 16 values of each block are a table of bfloat16, and a permutation looks up 32
 * weights at once. */
#define Q4_1_TILE(M)                                                                                   \
    static void q4_1_##M(const uint8_t *q, const float *scales, const bf16 *x, float *sums, int K) {   \
        const __m512 levels =                                                                          \
            _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);                       \
        const __m512i low = _mm512_set1_epi16(15), upper = _mm512_set1_epi16(16);                      \
        __m512 a[M], b[M];                                                                             \
        for (int m = 0; m < M; m++) a[m] = b[m] = _mm512_setzero_ps();                                 \
        for (int k = 0; k < K; k += 2 * BLOCK, q += BLOCK, scales += 4) {                              \
            __m512 table_a =                                                                           \
                _mm512_fmadd_ps(levels, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));         \
            __m512 table_b =                                                                           \
                _mm512_fmadd_ps(levels, _mm512_set1_ps(scales[2]), _mm512_set1_ps(scales[3]));         \
            __m512i table = (__m512i)_mm512_cvtne2ps_pbh(table_b, table_a);                            \
            __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)q));               \
            __m512i at_b = _mm512_or_si512(_mm512_srli_epi16(both, 4), upper);                         \
            __m512bh wa =                                                                              \
                (__m512bh)_mm512_permutexvar_epi16(_mm512_and_si512(both, low), table);                \
            __m512bh wb = (__m512bh)_mm512_permutexvar_epi16(at_b, table);                             \
            for (int m = 0; m < M; m++) {                                                              \
                const bf16 *row = x + (size_t)m * K + k;                                               \
                a[m] = _mm512_dpbf16_ps(a[m], wa, (__m512bh)_mm512_loadu_si512(row));                  \
                b[m] = _mm512_dpbf16_ps(b[m], wb, (__m512bh)_mm512_loadu_si512(row + BLOCK));          \
            }                                                                                          \
        }                                                                                              \
        for (int m = 0; m < M; m++) sums[m] = _mm512_reduce_add_ps(_mm512_add_ps(a[m], b[m]));         \
    }
Q4_1_TILE(1) Q4_1_TILE(2) Q4_1_TILE(3) Q4_1_TILE(4)
Q4_1_TILE(5) Q4_1_TILE(6) Q4_1_TILE(7) Q4_1_TILE(8)

/* ---- Q8_0: value = d * q, q signed ------------------------------------------------------------------ */
#define Q8_0_TILE(M)                                                                                   \
    static void q8_0_##M(const uint8_t *q, const float *scales, const bf16 *x, float *sums, int K) {   \
        __m512 a[M];                                                                                   \
        for (int m = 0; m < M; m++) a[m] = _mm512_setzero_ps();                                        \
        for (int k = 0; k < K; k += BLOCK, q += BLOCK, scales += 1) {                                  \
            __m512 d = _mm512_set1_ps(scales[0]);                                                      \
            __m512i lower = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q));                 \
            __m512i upper = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + 16)));          \
            __m512bh w = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_cvtepi32_ps(upper), d),              \
                                             _mm512_mul_ps(_mm512_cvtepi32_ps(lower), d));             \
            for (int m = 0; m < M; m++)                                                                \
                a[m] = _mm512_dpbf16_ps(a[m], w,                                                       \
                                        (__m512bh)_mm512_loadu_si512(x + (size_t)m * K + k));          \
        }                                                                                              \
        for (int m = 0; m < M; m++) sums[m] = _mm512_reduce_add_ps(a[m]);                              \
    }
Q8_0_TILE(1) Q8_0_TILE(2) Q8_0_TILE(3) Q8_0_TILE(4)
Q8_0_TILE(5) Q8_0_TILE(6) Q8_0_TILE(7) Q8_0_TILE(8)

typedef void (*tile)(const uint8_t *, const float *, const bf16 *, float *, int);

/* y [M, N] = x [M, K] times the packed w [N, K] transposed. `per_row` scales a row. */
static void product(const uint8_t *q, size_t row_bytes, const uint16_t *scales, int per_row,
                    const tile tiles[8], const bf16 *x, void *y, int narrow, int M, int K, int N,
                    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int first = 0; first < N; first += CHUNK) {
        int last = first + CHUNK < N ? first + CHUNK : N;
        float wide[2 * MAX_BLOCKS + 16], sums[8];
        for (int n = first; n < last; n++) {
            widen_scales(scales + (size_t)n * per_row, wide, per_row);
            for (int m = 0, rows; m < M; m += rows) {
                rows = M - m < 8 ? M - m : 8;
                tiles[rows - 1](q + n * row_bytes, wide, x + (size_t)m * K, sums, K);
                for (int i = 0; i < rows; i++) store(y, narrow, (size_t)(m + i) * N + n, sums[i]);
            }
        }
    }
}

/* The largest K that a call takes. */
int diptych_max_columns(void) { return MAX_BLOCKS * BLOCK; }

/* q [N, K / 64, 32], scales fp16 [N, K / 32, 2]; K a multiple of 64. y bfloat16 if narrow, else fp32. */
void diptych_linear_q4_1(const uint8_t *q, const uint16_t *scales, const bf16 *x, void *y, int narrow,
                         int M, int K, int N, int threads) {
    static const tile tiles[8] = {q4_1_1, q4_1_2, q4_1_3, q4_1_4,
                                  q4_1_5, q4_1_6, q4_1_7, q4_1_8};
    product(q, (size_t)K / 2, scales, K / BLOCK * 2, tiles, x, y, narrow, M, K, N,
            threads);
}

/* q int8 [N, K], scales fp16 [N, K / 32]; K a multiple of 32. */
void diptych_linear_q8_0(const uint8_t *q, const uint16_t *scales, const bf16 *x, void *y, int narrow,
                         int M, int K, int N, int threads) {
    static const tile tiles[8] = {q8_0_1, q8_0_2, q8_0_3, q8_0_4,
                                  q8_0_5, q8_0_6, q8_0_7, q8_0_8};
    product(q, (size_t)K, scales, K / BLOCK, tiles, x, y, narrow, M, K, N,
            threads);
}

/* ---- attention of few queries over paged KV -----------------------------------------------------------
 *
 * A row has the queries of one request; query head h reads K/V head h / group. Scores are kept whole, so
 * each K and each V is read once for all queries of its head. fp32 throughout, from bfloat16. */
static inline __m512 widen(const bf16 *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* e^x to about 2 units in the last place; x <= 0. After Cephes' expf. */
static inline __m512 exp_ps(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), y, r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

/* Turn `count` scores into weights that sum to 1. */
static void softmax(float *scores, int count) {
    __m512 high = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) {
        __mmask16 mask = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
        high = _mm512_mask_max_ps(high, mask, high, _mm512_maskz_loadu_ps(mask, scores + i));
    }
    high = _mm512_set1_ps(_mm512_reduce_max_ps(high));
    for (int i = 0; i < count; i += 16) {
        __mmask16 mask = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
        __m512 e = exp_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + i), high));
        _mm512_mask_storeu_ps(scores + i, mask, e);
        total = _mm512_mask_add_ps(total, mask, total, e);
    }
    __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int i = 0; i < count; i += 16) {
        __mmask16 mask = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
        __m512 weights = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scores + i), scale);
        _mm512_mask_storeu_ps(scores + i, mask, weights);
    }
}

typedef struct {
    const bf16 *layer;        /* of block 0: [2, kv_heads, block_size, head_dim] */
    int64_t block_stride;     /* elements from one block to the next */
    int64_t table_stride;     /* entries from one row's block table to the next */
    int kv_heads, group, head_dim, block_size, window;
    float scale;
} geometry;

/* The first position that a query at `position` sees. */
static inline int64_t oldest(const geometry *g, int64_t position) {
    return g->window && position >= g->window ? position - g->window + 1 : 0;
}

/* One K/V head of one row: queries q [count, heads, head_dim] whose last one is at context - 1. */
static void attend(const geometry *g, const int64_t *table, int head, int count, int64_t context,
                   const bf16 *q, bf16 *out, float *scores) {
    const int D = g->head_dim, heads = g->kv_heads * g->group;
    const int64_t plane = (int64_t)g->block_size * D, first = oldest(g, context - count);
    for (int64_t p = first; p < context; p++) {
        const bf16 *k = g->layer + table[p / g->block_size] * g->block_stride + head * plane +
                        p % g->block_size * D;
        for (int t = 0; t < count; t++)
            for (int i = 0; i < g->group; i++) {
                const bf16 *query = q + ((size_t)t * heads + head * g->group + i) * D;
                __m512 sum = _mm512_setzero_ps();
                for (int d = 0; d < D; d += 32)
                    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(k + d),
                                           (__m512bh)_mm512_loadu_si512(query + d));
                scores[(t * g->group + i) * context + p] = _mm512_reduce_add_ps(sum) * g->scale;
            }
    }
    for (int t = 0; t < count; t++)
        for (int i = 0; i < g->group; i++) {
            int64_t position = context - count + t, from = oldest(g, position);
            float *weights = scores + (t * g->group + i) * context;
            softmax(weights + from, (int)(position + 1 - from));
            bf16 *to = out + ((size_t)t * heads + head * g->group + i) * D;
            for (int d = 0; d < D; d += 64) {
                __m512 a[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                               _mm512_setzero_ps()};
                int parts = D - d >= 64 ? 4 : (D - d) / 16;
                for (int64_t p = from; p <= position; p++) {
                    const bf16 *v = g->layer + table[p / g->block_size] * g->block_stride +
                                    (g->kv_heads + head) * plane + p % g->block_size * D + d;
                    __m512 weight = _mm512_set1_ps(weights[p]);
                    for (int j = 0; j < parts; j++)
                        a[j] = _mm512_fmadd_ps(weight, widen(v + 16 * j), a[j]);
                }
                for (int j = 0; j < parts; j++)
                    _mm256_storeu_si256((__m256i *)(to + d + 16 * j),
                                        (__m256i)_mm512_cvtneps_pbh(a[j]));
            }
        }
}

/* q and out [T, heads, head_dim]; row r has queries query_start[r] to query_start[r + 1], the last at
 * context_lens[r] - 1, and block table `tables` + r * table_stride. head_dim a multiple of 32. Returns 0,
 * or 1 when there is no memory for the scores. */
int diptych_attention(const bf16 *layer, int64_t block_stride, const int64_t *tables, int64_t table_stride,
                      const int64_t *query_start, const int64_t *context_lens, const bf16 *q, bf16 *out,
                      int rows, int kv_heads, int group, int head_dim, int block_size, int window,
                      float scale, int threads) {
    const geometry g = {layer,    block_stride, table_stride, kv_heads, group,
                        head_dim, block_size,   window,       scale};
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int task = 0; task < rows * kv_heads; task++) {
        int row = task / kv_heads, count = (int)(query_start[row + 1] - query_start[row]);
        size_t at = (size_t)query_start[row] * kv_heads * group * head_dim;
        float *scores = malloc(sizeof(float) * count * group * context_lens[row]);
        if (!scores) {
            failed = 1;
            continue;
        }
        attend(&g, tables + row * table_stride, task % kv_heads, count, context_lens[row], q + at,
               out + at, scores);
        free(scores);
    }
    return failed;
}

/* out = x / rms(x) * w, each row of x [T, width]; width a multiple of 16. */
void diptych_rms_norm(const bf16 *x, const bf16 *w, bf16 *out, int T, int width, float eps) {
    for (int t = 0; t < T; t++, x += width, out += width) {
        __m512 squares = _mm512_setzero_ps();
        for (int i = 0; i < width; i += 16) {
            __m512 v = widen(x + i);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / width + eps));
        for (int i = 0; i < width; i += 16) {
            __m512 v = _mm512_mul_ps(_mm512_mul_ps(widen(x + i), scale), widen(w + i));
            _mm256_storeu_si256((__m256i *)(out + i), (__m256i)_mm512_cvtneps_pbh(v));
        }
    }
}
