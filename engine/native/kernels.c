/* Products of few rows with GGUF-packed weights, for CPUs with AVX512-BF16.
 *
 * Each weight is dequantised and rounded to bfloat16 on the fly: exactly the value that the dense bfloat16
 * matrix holds, so both packings are one numeric profile and differ only in the order of sums. Activations
 * are bfloat16, sums fp32. Plain C behind a C interface: no header of torch is needed, and ctypes releases
 * the GIL. All pointers are the caller's; nothing is kept.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

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
