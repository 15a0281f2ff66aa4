/* Products of many rows with the joined tensors of a model, and what is done to their outputs at once. */
#ifndef DIPTYCH_PRODUCTS_H
#define DIPTYCH_PRODUCTS_H

#include "matmul.h"

enum { ROWS_PER_ITEM = 128, MAX_GROUPS_PER_ITEM = 16 };

static inline int at_most(int a, int b) { return a < b ? a : b; }
static inline int at_least(int a, int b) { return a > b ? a : b; }

typedef enum { SILU, GELU_TANH } activation;

/* What follows a product. ADD: scaled, to a residual; GATED: activation of the first half, times the second
 * half; CAP: logits scaled and capped. */
typedef enum { STORE, ADD, GATED, CAP } epilogue;

/* A model's numbers in epilogues, and scratch memory. */
typedef struct {
    int activation;
    float residual_scale;         /* of what is added */
    float logit_scale, logit_cap; /* cap * tanh(logit * scale / cap); cap 0: none */
    char *scratch;                /* a part for each thread ... */
    size_t scratch_bytes;         /* ... of at least product_bytes */
} product_context;

/* A tensor, and the rows of the operand that it is multiplied with. */
typedef struct {
    const joined *w;
    int first_row, M;
    int first_item; /* used by multiply_all */
} product_job;

/* GATED with both halves clamped: (up + 1) * gate * sigmoid(alpha * gate); limit 0: the activation, not clamped. */
typedef struct {
    float limit, alpha;
} gate_clamp;

/* Scratch memory of a thread, for tensors of up to so many columns. */
size_t product_bytes(int columns);

/* to [.., outputs] = from [.., columns] times w, then the epilogue, for the rows of each of `count` jobs, whose tensors
 * have one shape. `gated`: what GATED quantises. */
void multiply_all(const product_context *c, product_job *jobs, int count, const operand *from, epilogue epilogue,
                  gate_clamp clamp, float *to, const operand *gated);

/* The same of the first M rows with one tensor. */
void multiply(const product_context *c, const joined *w, const operand *from, int M, epilogue epilogue, float *to,
              const operand *gated);

#endif
