/* The records of packed weights: where their parts lie, and how integers and factors come out of them.
 *
 * A weight is scale * (integer - zero) + offset. Scale and offset are those of a row in a block of 32 columns,
 * or of 16 (Q6_K). A record holds a block of sixteen rows, or eight blocks of them (the kinds with `_K`, and
 * IQ4_XS): first what the scales consist of, then the integers of each block. All functions are inlined with
 * a constant kind, so that each kind has loops of its own. */
#ifndef DIPTYCH_RECORDS_H
#define DIPTYCH_RECORDS_H

#include <string.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))

enum { FOURS = BLOCK / 4 }; /* integers are unpacked four columns at a time */

INLINE int blocks_of(int kind) { return kind == Q4_K || kind == Q5_K || kind == Q6_K || kind == IQ4_XS ? 8 : 1; }
INLINE int halves_of(int kind) { return kind == Q6_K ? 2 : 1; } /* of a block, with a scale each */
INLINE int has_offset(int kind) { return kind == Q4_1 || kind == Q5_1 || kind == Q4_K || kind == Q5_K; }
INLINE int has_fifth_bit(int kind) { return kind == Q5_0 || kind == Q5_1 || kind == Q5_K; }
INLINE int zero_of(int kind) { return kind == Q4_0 ? 8 : kind == Q5_0 ? 16 : 0; }

INLINE int head_bytes(int kind) {
    switch (kind) {
    case BF16: return 0;
    case MXFP4: return 16;
    case Q4_1: case Q5_1: return 64;
    case Q4_K: case Q5_K: return 256;
    case Q6_K: return 288;
    case IQ4_XS: return 128;
    default: return 32;
    }
}

/* The integers of a block. */
INLINE int value_bytes(int kind) {
    if (kind == BF16) return 1024;
    if (kind == Q8_0) return 512;
    return kind == Q6_K ? 384 : has_fifth_bit(kind) ? 320 : 256;
}

INLINE int record_bytes(int kind) { return head_bytes(kind) + blocks_of(kind) * value_bytes(kind); }

/* The record of a group's block b, and the integers of the block. */
INLINE const uint8_t *record_at(int kind, const uint8_t *group, int b) {
    return group + (size_t)(b / blocks_of(kind)) * record_bytes(kind);
}
INLINE const uint8_t *values_at(int kind, const uint8_t *record, int b) {
    return record + head_bytes(kind) + b % blocks_of(kind) * value_bytes(kind);
}

/* ---- integers ------------------------------------------------------------------------------------------ */

/* What four bits stand for, twice: the lookup takes five bits of an index. */
INLINE __m512i code_book(int kind) {
    static const int8_t books[2][16] = {
        {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}, /* IQ4_NL, IQ4_XS */
        {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},                  /* MXFP4: halves */
    };
    __m128i book = _mm_loadu_si128((const __m128i *)books[kind == MXFP4]);
    return _mm512_cvtepi8_epi16(_mm256_broadcastsi128_si256(book));
}

/* Two bits of Q6_K as bits 4 and 5: shifted left by `left`, or right. */
INLINE __m512i two_bits(__m512i low, __m512i high, int left) {
    __m512i moved = left >= 0 ? _mm512_slli_epi16(high, left) : _mm512_srli_epi16(high, -left);
    /* low | (moved & 0x30), less 32 */
    __m512i six = _mm512_ternarylogic_epi32(moved, _mm512_set1_epi16(0x30), low, 0xea);
    return _mm512_sub_epi16(six, _mm512_set1_epi16(32));
}

/* Pairs of columns 4j .. 4j + 1 and 4j + 2 .. 4j + 3 of a block's integers as int16 [16 rows, 2]. */
INLINE void unpack_pairs(const uint8_t *values, int kind, int j, __m512i *first, __m512i *second) {
    if (kind == Q8_0) {
        *first = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(values + 64 * j)));
        *second = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(values + 64 * j + 32)));
        return;
    }
    __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(values + 32 * j)));
    *second = _mm512_srli_epi16(both, 4);
    if (kind == IQ4_NL || kind == IQ4_XS || kind == MXFP4) {
        *first = _mm512_permutexvar_epi16(both, code_book(kind));
        *second = _mm512_permutexvar_epi16(*second, code_book(kind));
        return;
    }
    *first = _mm512_and_si512(both, _mm512_set1_epi16(15));
    if (has_fifth_bit(kind)) {
        uint32_t bits[2];
        memcpy(bits, values + 256 + 8 * j, 8);
        *first = _mm512_mask_add_epi16(*first, bits[0], *first, _mm512_set1_epi16(16));
        *second = _mm512_mask_add_epi16(*second, bits[1], *second, _mm512_set1_epi16(16));
    }
    if (kind == Q6_K) {
        __m512i high = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(values + 256 + j / 2 * 32)));
        *first = two_bits(*first, high, j % 2 ? 0 : 4);
        *second = two_bits(*second, high, j % 2 ? -2 : 2);
    }
}

/* ---- factors ------------------------------------------------------------------------------------------- */

typedef struct {
    __m512 scale, offset; /* of sixteen rows; `offset` only where the kind has one */
} factors;

INLINE __m512 halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* `count` bits (4 or 2) of sixteen bytes each, which 8 / count blocks share. */
INLINE __m512i shared_bits(const uint8_t *plane, int count, int b) {
    const int sharing = 8 / count;
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(plane + b / sharing * 16)));
    __m512i moved = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(b % sharing * count));
    return _mm512_and_si512(moved, _mm512_set1_epi32((1 << count) - 1));
}

/* Q4_K, Q5_K: a byte has the scale's six bits and two of the minimum's; its other four lie behind. */
INLINE factors factors_of_k(const uint8_t *record, int b) {
    __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(record + 64 + 16 * b)));
    __m512i upper = _mm512_slli_epi32(shared_bits(record + 192, 4, b), 2);
    __m512 scale = _mm512_cvtepi32_ps(_mm512_and_si512(byte, _mm512_set1_epi32(63)));
    __m512 least = _mm512_cvtepi32_ps(_mm512_or_si512(_mm512_srli_epi32(byte, 6), upper));
    __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), halves(record + 32));
    return (factors){_mm512_mul_ps(halves(record), scale), _mm512_mul_ps(minus, least)};
}

/* MXFP4: half of 2^(e - 127), as its values are doubled. */
INLINE __m512 power_of_two(const uint8_t *exponents) {
    __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)exponents));
    __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    __mmask16 tiny = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    return _mm512_castsi512_ps(_mm512_mask_sllv_epi32(normal, tiny, _mm512_set1_epi32(0x00200000), e));
}

/* Of block b in a record's, and of one half of it where halves have their own. */
INLINE factors factors_of(int kind, const uint8_t *record, int b, int half) {
    __m512 none = _mm512_setzero_ps();
    if (kind == MXFP4) return (factors){power_of_two(record), none};
    if (kind == Q4_K || kind == Q5_K) return factors_of_k(record, b);
    if (kind == Q6_K) {
        __m128i scale = _mm_loadu_si128((const __m128i *)(record + 32 + 16 * (2 * b + half)));
        return (factors){_mm512_mul_ps(halves(record), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scale))), none};
    }
    if (kind == IQ4_XS) {
        __m512i upper = _mm512_slli_epi32(shared_bits(record + 96, 2, b), 4);
        __m512i scale = _mm512_or_si512(shared_bits(record + 32, 4, b), upper);
        scale = _mm512_sub_epi32(scale, _mm512_set1_epi32(32));
        return (factors){_mm512_mul_ps(halves(record), _mm512_cvtepi32_ps(scale)), none};
    }
    return (factors){halves(record), has_offset(kind) ? halves(record + 32) : none};
}

#endif
