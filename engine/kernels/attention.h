/* Causal attention over paged bfloat16 KV, for decode tokens, drafts and prompt chunks alike. */
#ifndef DIPTYCH_ATTENTION_H
#define DIPTYCH_ATTENTION_H

#include "simd.h"

enum { TILE = 64, SEGMENT = 256, MAX_QUERIES = 96, STRIP = 6 };

/* One layer of the pool, and how heads share it. */
typedef struct {
    const bf16 *layer;    /* of block 0, head 0: [2, block_size, head_dim], K and V */
    int64_t block_stride; /* elements from one block to the next */
    int64_t head_stride;  /* elements from one K/V head of a block to the next */
    int kv_heads, group, head_dim, block_size; /* head_dim a multiple of 32, block_size of 16 */
    int window;           /* positions that a query sees, itself included; 0: all */
    float scale;          /* of scores; times log2(e) where there is no cap */
    float cap;            /* scores become cap * tanh(scaled score / cap); 0: none */
} geometry;

/* The query vectors of some consecutive tokens of one request for one K/V head: vector i is of token
 * i / group, which stands at `position` + i / group. At most MAX_QUERIES. */
typedef struct {
    const int32_t *table; /* the request's blocks */
    const float *q;       /* the first token's first query head of the group; fp32, rotated */
    int q_stride;         /* floats from one token to the next */
    int head, num_tokens, position;
} queries;

/* V weighted by 2^(score - max) over some keys, and the sum of those weights. */
typedef struct {
    float max[MAX_QUERIES], sum[MAX_QUERIES];
    float out[]; /* [vectors, head_dim] */
} partial;

static inline size_t partial_bytes(int head_dim) {
    return sizeof(partial) + sizeof(float) * MAX_QUERIES * (size_t)head_dim;
}
static inline size_t attention_bytes(int head_dim) {
    return sizeof(float) * ((size_t)2 * TILE * head_dim + STRIP * TILE);
}

/* The segments first .. end - 1 of SEGMENT positions that these queries see anything of. */
void segments_seen(const geometry *g, const queries *w, int *first, int *end);

/* Attention over one segment. `then` and its `then_segment` are what this thread will probably attend next
 * (NULL: not known): their first keys are sent for. `scratch`: attention_bytes(head_dim). */
void attend(const geometry *g, const queries *w, int segment, const queries *then, int then_segment, partial *part,
            float *scratch);

/* Add what another segment gave; segments are merged in rising order. */
void merge(partial *total, const partial *part, int vectors, int head_dim);

/* Attention over all segments that the queries see, one after the other. `part` is scratch. */
void attend_all(const geometry *g, const queries *w, const queries *then, int then_segment, partial *total, partial *part,
                float *scratch);

/* One vector's attention, fp32 [head_dim]. `sink`: one more score, scaled as it is, that takes its share; or NULL. */
void finalize(const partial *total, int vector, int head_dim, const float *sink, float *out);

#endif
