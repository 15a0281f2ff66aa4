/* What the kernels share: bfloat16, exp, and fixed orders of sums. */
#ifndef DIPTYCH_SIMD_H
#define DIPTYCH_SIMD_H

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

typedef uint16_t bf16;

/* Sixteen bfloat16 as fp32. */
static inline __m512 widen(const bf16 *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Sixteen fp32 rounded to nearest even, as the upper half of each lane. Integer arithmetic: AVX512-BF16
 * is not needed, and every CPU gets the same bits as torch (subnormals are kept, a NaN stays a NaN). */
static inline __m512i round_lanes(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value), upper = _mm512_set1_epi32((int)0xffff0000);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    near = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_and_si512(near, upper);
}

/* Sixteen fp32, rounded to nearest even. */
static inline void narrow(bf16 *to, __m512 value) {
    __m512i upper = _mm512_srli_epi32(round_lanes(value), 16);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(upper));
}

/* value rounded to bfloat16 and back. */
static inline __m512 rounded(__m512 value) {
    return _mm512_castsi512_ps(round_lanes(value));
}

/* The first `count` of sixteen lanes. */
static inline __mmask16 lanes(int count) {
    return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
}

/* 2^x to about 2 units in the last place, for x <= 127; below -126 it stays at 2^-126. After Cephes' exp2f. */
static inline __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x); /* in this order: a NaN stays one */
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.535336188319500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.339887440266574e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.618437357674640e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.550332471162809e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.402264791363012e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.931472028550421e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f)), n);
}

#define LOG2_E 1.44269504f

/* e^x for x <= 88, to about |x| units in the last place. */
static inline __m512 exp_ps(__m512 x) { return exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E))); }

/* cap * tanh(x / cap), and x where cap is 0. tanh(y) = 1 - 2 / (1 + e^2y). */
static inline __m512 cap_ps(__m512 x, float cap) {
    if (!cap) return x;
    const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(40.0f);
    __m512 y = _mm512_min_ps(most, _mm512_mul_ps(x, _mm512_set1_ps(2.0f / cap))); /* in this order: a NaN stays */
    __m512 part = _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, exp_ps(y)));
    return _mm512_mul_ps(_mm512_set1_ps(cap), _mm512_sub_ps(one, part));
}

/* The sixteen lanes of each of four vectors summed, always by the same tree: i + (i + 8), then + 4, + 2,
 * + 1. So a sum does not depend on which other sums were made beside it. */
static inline __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    abcd = _mm512_add_ps(abcd, _mm512_shuffle_ps(abcd, abcd, 0x4e));
    abcd = _mm512_add_ps(abcd, _mm512_shuffle_ps(abcd, abcd, 0xb1));
    const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, abcd));
}

static inline float sum1(__m512 a) {
    return _mm_cvtss_f32(sum4(a, a, a, a));
}

#endif
