/* y = x W^T with W packed or dense: one contract, and one value of each output whatever is computed beside it. */
#ifndef DIPTYCH_MATMUL_H
#define DIPTYCH_MATMUL_H

#include "simd.h"

enum kind { BF16 = 0, Q4_0 = 1, Q4_1 = 2, Q8_0 = 3 };
enum { BLOCK = 32, GROUP = 16, MAX_ROWS = 6, MAX_GROUPS = 4, MAX_PARTS = 3 };

/* A weight [rows, columns], rows padded with zeros to a multiple of 16, columns a multiple of 32. Sixteen
 * rows are a group, stored as one record after the other, each of 32 columns:
 *
 *   BF16   16 pairs of columns:          16 rows x 2 columns bfloat16                              1,024 bytes
 *   Q4_0   d fp16 [16 rows],             8 x 32 bytes: byte 2r + i of the j-th holds column          288
 *                                        4j + i of row r below and column 4j + 2 + i above
 *   Q4_1   d and m fp16 [2][16 rows],    the same                                                    320
 *   Q8_0   d fp16 [16 rows],             16 pairs of columns: 16 rows x 2 columns int8               544
 *
 * A value is q * d, (q - 8) * d for Q4_0, q * d + m for Q4_1: the file's own numbers, not rounded. */
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
static inline size_t panel_bytes(int columns) { return (size_t)2 * GROUP * 2 * columns; }

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
