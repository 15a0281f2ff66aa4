/* y = x W^T with W packed or dense: one contract, and one value of each output whatever is computed beside it. */
#ifndef DIPTYCH_MATMUL_H
#define DIPTYCH_MATMUL_H

#include "simd.h"

enum kind { BF16, Q4_0, Q4_1, Q8_0, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 };
enum { BLOCK = 32, GROUP = 16, MAX_ROWS = 6, MAX_GROUPS = 4, MAX_PARTS = 3 };

/* A weight [rows, columns], rows padded with zeros to a multiple of 16, columns a multiple of 32. Sixteen
 * rows are a group, stored as one record after the other, each of 32 columns, or of 256:
 *
 *                                                                                     bytes of a record
 *   BF16     16 pairs of columns: 16 rows x 2 columns bfloat16                                   1,024
 *   Q8_0     d, 16 pairs of columns: 16 rows x 2 columns int8                                      544
 *   Q4_0     d, four bits          q - 8                                                           288
 *   Q4_1     d, m, four bits       d * q + m                                                       320
 *   Q5_0     d, five bits          q - 16                                                          352
 *   Q5_1     d, m, five bits       d * q + m                                                       384
 *   IQ4_NL   d, four bits          of a code book                                                  288
 *   MXFP4    e, four bits          of another; d is 2^(e - 128)                                    272
 *   Q4_K     d, m, s, 8 blocks of four bits   d * s * q - m * t                          256:    2,304
 *   Q5_K     d, m, s, 8 blocks of five bits   the same                                   256:    2,816
 *   Q6_K     d, s, 8 blocks of six bits       d * s * (q - 32)                           256:    3,360
 *   IQ4_XS   d, s, 8 blocks of four bits      d * (s - 32) * code                        256:    2,176
 *
 *   d, m          fp16 [16 rows]; e one byte each
 *   four bits     8 x 32 bytes: byte 2r + i of the j-th holds column 4j + i of row r below, 4j + 2 + i above
 *   five bits     and 8 x 2 x 32 bits: the fifth of column 4j + i, then of column 4j + 2 + i
 *   six bits      and 4 x 32 bytes: the upper two of columns 8j + i, + 2, + 4, + 6 of a row
 *   s of Q4_K     [8 blocks, 16 rows]: s, and 2 bits of t above; [4 pairs of blocks, 16 rows]: 4 bits of t
 *   s of Q6_K     int8 [8 blocks, 2 halves, 16 rows]
 *   s of IQ4_XS   [4 pairs of blocks, 16 rows]: 4 bits; [2 fours of blocks, 16 rows]: the upper 2
 *
 * A value is the file's own number, not rounded. */
typedef struct {
    const uint8_t *data;
    const float *bias; /* [rows], or NULL */
    int32_t kind, rows, columns, unused;
} matrix;

/* A tensor of the model [rows, columns]: matrices of one width whose rows follow one another, a matrix for each
 * change of kind. All but the last consist of whole groups. */
typedef struct {
    int32_t num_parts, rows;
    matrix parts[MAX_PARTS];
} joined;

/* Rows [M, columns] fp32 and their 16-bit fixed-point form: block b of row m is q * scale[m, b] to within
 * half of scale, the largest of the block being 32,767 of them. */
typedef struct {
    float *x;       /* [M, columns] */
    int16_t *q;     /* [M, columns] */
    float *scale;   /* [M, columns / 32] */
    float *sum;     /* [M, columns / 32]: of the block, scale included */
    int32_t *count; /* [M, columns / 32]: of the block, in units of scale */
    int columns;
} operand;

/* Fill in the fixed-point form of columns first .. first + count - 1 of one row; multiples of 32. */
void quantise(const operand *x, int row, int first, int count);

/* Bytes of one group of a kind, and of the scratch that `product` wants for large M. */
size_t group_bytes(int kind, int columns);
static inline size_t panel_bytes(int columns) { return (size_t)2 * GROUP * columns * 2 + (size_t)12 * columns; }

/* out [M, 16 * groups], rows `stride` floats apart, = rows first_row ... of x times groups `group` ... of w, and the bias added.
 * groups <= MAX_GROUPS. */
void product(const matrix *w, int group, int groups, const operand *x, int first_row, int M, float *out, int stride,
             int16_t *panel);

/* The same of a joined tensor. */
void joined_product(const joined *w, int group, int groups, const operand *x, int first_row, int M, float *out,
                    int stride, int16_t *panel);

/* Row `row` of w as fp32 [columns]. */
void unpack_row(const matrix *w, int row, float *out);

#endif
