/* A feed-forward of many experts, of which each token takes a few. */
#ifndef DIPTYCH_EXPERTS_H
#define DIPTYCH_EXPERTS_H

#include "products.h"

/* What all layers with experts have in common; filled in by engine/kernels/decoder.py. */
typedef struct {
    int32_t number, per_token, width; /* width: of an expert's inner rows */
    int32_t groups, chosen_groups;    /* of neighbouring experts: the choice is within the best groups */
    int32_t shared_width;             /* of what every token takes; 0: nothing */
    int32_t sigmoid, normalise;       /* scores: sigmoid, or softmax; weights are divided by their sum */
    float scale, limit, alpha;        /* of weights; of the gate (products.h) */
} expert_spec;

/* Of one layer. Joined tensors hold one expert's rows after the other's. */
typedef struct {
    const float *router;      /* [number, hidden] */
    const float *router_bias; /* [number], or NULL */
    const float *correction;  /* [number], added to scores in the choice alone; or NULL */
    const float *shared_gate; /* [hidden], or NULL: the shared part has the weight 1 */
    joined gate, up, down, shared_gate_up, shared_down;
} expert_layer;

/* Memory for T tokens. */
typedef struct {
    float *scores, *ranked;  /* [T, number]: the router's outputs; what the choice compares */
    int32_t *ids;            /* [T, per_token], rising */
    float *weights;          /* [T, per_token] */
    int32_t *rows;           /* [T, per_token]: where a token stands among the rows of its expert */
    int32_t *first_row;      /* [number + 1]: rows are sorted by expert */
    joined *tensors;         /* [2, number]: an expert's gate and up, and its down */
    product_job *jobs;       /* [2, number] */
    operand sorted;          /* [T * per_token, hidden] */
    operand inner;           /* [T * per_token, width] */
    float *outputs;          /* [T * per_token, hidden] */
    operand shared_inner;    /* [T, shared_width] */
} expert_memory;

/* to [T, hidden] = what the experts give for rows 0 .. T - 1 of x. A token's numbers do not depend on other tokens: its
 * sum runs over its experts by rising number, then the shared part is added. */
void compute_experts(const expert_spec *spec, const expert_layer *layer, const product_context *c, const expert_memory *m,
                     const operand *x, int T, float *to);

#endif
