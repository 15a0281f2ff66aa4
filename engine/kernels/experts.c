/* Experts of a layer, in loops over all tokens:
 *
 *     scores   router (fp32)                      every token and expert
 *     route    choice, weights                    every token
 *     sort     rows by expert; a row is copied once for each expert that it takes
 *     inner    gate, up --GATED--> inner          every expert and its rows
 *     outputs  down                               the same
 *     sum      weighted, by rising expert; then the shared part
 */
#include "experts.h"

#include <string.h>

#include "threads.h"

enum { TOKENS = 8, EXPERTS = 16 }; /* of a work item */

typedef struct {
    const expert_spec *spec;
    const expert_layer *layer;
    const expert_memory *m;
    const operand *x;
    int T;
    float *to;
} expert_loop;

static int parts_of(int count, int size) { return (count + size - 1) / size; }

/* Sum of products of [width] numbers, a multiple of 16, in a fixed order. */
static float dot(const float *a, const float *b, int width) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < width; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    return sum1(sum);
}

static float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

static void score_item(void *arg, int index, int thread) {
    (void)thread;
    const expert_loop *l = arg;
    const int number = l->spec->number, hidden = l->x->columns, expert_parts = parts_of(number, EXPERTS);
    const int token = index / expert_parts * TOKENS, expert = index % expert_parts * EXPERTS;
    for (int e = expert; e < at_most(expert + EXPERTS, number); e++)
        for (int t = token; t < at_most(token + TOKENS, l->T); t++) {
            const float bias = l->layer->router_bias ? l->layer->router_bias[e] : 0.0f;
            const float *x = l->x->x + (size_t)t * hidden;
            l->m->scores[(size_t)t * number + e] = dot(x, l->layer->router + (size_t)e * hidden, hidden) + bias;
        }
}

/* ---- the choice ---------------------------------------------------------------------------------------- */

static int contains(const int32_t *ids, int count, int id) {
    for (int i = 0; i < count; i++)
        if (ids[i] == id) return 1;
    return 0;
}

/* The `count` largest of n values; of equal ones the first. */
static void choose(const float *values, int n, int count, int32_t *ids) {
    for (int k = 0; k < count; k++) {
        int best = -1;
        for (int i = 0; i < n; i++)
            if ((best < 0 || values[i] > values[best]) && !contains(ids, k, i)) best = i;
        ids[k] = best;
    }
}

/* -inf outside the groups whose two best experts have the largest sums. */
static void keep_best_groups(const expert_spec *spec, float *ranked) {
    const int size = spec->number / spec->groups;
    float sums[spec->groups];
    int32_t chosen[spec->chosen_groups], best[2] = {0, 0};
    for (int g = 0; g < spec->groups; g++) {
        const int count = at_most(2, size);
        choose(ranked + g * size, size, count, best);
        sums[g] = ranked[g * size + best[0]];
        if (count == 2) sums[g] += ranked[g * size + best[1]];
    }
    choose(sums, spec->groups, spec->chosen_groups, chosen);
    for (int g = 0; g < spec->groups; g++)
        if (!contains(chosen, spec->chosen_groups, g))
            for (int i = 0; i < size; i++) ranked[g * size + i] = -INFINITY;
}

static void sort_rising(int32_t *ids, int count) {
    for (int i = 1; i < count; i++)
        for (int j = i; j > 0 && ids[j - 1] > ids[j]; j--) {
            const int32_t id = ids[j];
            ids[j] = ids[j - 1];
            ids[j - 1] = id;
        }
}

/* Weights of the chosen experts by their scores. */
static void weigh(const expert_spec *spec, const float *scores, const int32_t *ids, float *weights) {
    float largest = scores[0], all = 0, chosen = 0;
    if (!spec->sigmoid) {
        for (int e = 1; e < spec->number; e++) largest = scores[e] > largest ? scores[e] : largest;
        for (int e = 0; e < spec->number; e++) all += expf(scores[e] - largest);
    }
    for (int k = 0; k < spec->per_token; k++) {
        const float score = scores[ids[k]];
        weights[k] = spec->sigmoid ? logistic(score) : expf(score - largest) / all;
        chosen += weights[k];
    }
    for (int k = 0; k < spec->per_token; k++) {
        if (spec->normalise) weights[k] /= chosen + 1e-20f;
        weights[k] *= spec->scale;
    }
}

static void route_item(void *arg, int index, int thread) {
    (void)thread;
    const expert_loop *l = arg;
    const expert_spec *spec = l->spec;
    const float *correction = l->layer->correction;
    for (int t = index * TOKENS; t < at_most((index + 1) * TOKENS, l->T); t++) {
        const float *scores = l->m->scores + (size_t)t * spec->number;
        float *ranked = l->m->ranked + (size_t)t * spec->number;
        int32_t *ids = l->m->ids + (size_t)t * spec->per_token;
        for (int e = 0; e < spec->number; e++) {
            ranked[e] = spec->sigmoid ? logistic(scores[e]) : scores[e];
            if (correction) ranked[e] += correction[e];
        }
        if (spec->groups > 1) keep_best_groups(spec, ranked);
        choose(ranked, spec->number, spec->per_token, ids);
        sort_rising(ids, spec->per_token);
        weigh(spec, scores, ids, l->m->weights + (size_t)t * spec->per_token);
    }
}

/* ---- rows by expert ------------------------------------------------------------------------------------ */

/* Give each token a row for each of its experts, those of an expert beside each other. */
static void sort_rows(const expert_loop *l) {
    const expert_memory *m = l->m;
    const int number = l->spec->number, pairs = l->T * l->spec->per_token;
    memset(m->first_row, 0, sizeof(int32_t) * (number + 1));
    for (int i = 0; i < pairs; i++) m->first_row[m->ids[i] + 1]++;
    for (int e = 0; e < number; e++) m->first_row[e + 1] += m->first_row[e];
    for (int i = 0; i < pairs; i++) m->rows[i] = m->first_row[m->ids[i]]++;
    for (int e = number; e > 0; e--) m->first_row[e] = m->first_row[e - 1];
    m->first_row[0] = 0;
}

static void copy_row(const operand *from, int row, const operand *to, int to_row) {
    const size_t columns = from->columns, blocks = columns / BLOCK;
    memcpy(to->x + to_row * columns, from->x + row * columns, sizeof(float) * columns);
    memcpy(to->q + to_row * columns, from->q + row * columns, sizeof(int16_t) * columns);
    memcpy(to->scale + to_row * blocks, from->scale + row * blocks, sizeof(float) * blocks);
    memcpy(to->sum + to_row * blocks, from->sum + row * blocks, sizeof(float) * blocks);
    memcpy(to->count + to_row * blocks, from->count + row * blocks, sizeof(int32_t) * blocks);
}

static void copy_item(void *arg, int index, int thread) {
    (void)thread;
    const expert_loop *l = arg;
    const int K = l->spec->per_token;
    for (int t = index * TOKENS; t < at_most((index + 1) * TOKENS, l->T); t++)
        for (int k = 0; k < K; k++) copy_row(l->x, t, &l->m->sorted, l->m->rows[t * K + k]);
}

/* One expert's rows of a tensor of one part. */
static matrix rows_of(const joined *all, int expert, int number) {
    matrix w = all->parts[0];
    w.rows /= number;
    w.data += (size_t)expert * (w.rows / GROUP) * group_bytes(w.kind, w.columns);
    if (w.bias) w.bias += (size_t)expert * w.rows;
    return w;
}

/* The experts that have rows: their tensors as jobs of products. Returns their number. */
static int list_jobs(const expert_loop *l, product_job *inner, product_job *outputs) {
    const expert_memory *m = l->m;
    const int number = l->spec->number;
    int count = 0;
    for (int e = 0; e < number; e++) {
        const int first = m->first_row[e], M = m->first_row[e + 1] - first;
        if (!M) continue;
        joined *gate_up = &m->tensors[2 * count], *down = gate_up + 1;
        const matrix gate = rows_of(&l->layer->gate, e, number), up = rows_of(&l->layer->up, e, number);
        *gate_up = (joined){.num_parts = 2, .rows = gate.rows + up.rows, .parts = {gate, up}};
        *down = (joined){.num_parts = 1, .parts = {rows_of(&l->layer->down, e, number)}};
        down->rows = down->parts[0].rows;
        inner[count] = (product_job){gate_up, first, M, 0};
        outputs[count++] = (product_job){down, first, M, 0};
    }
    return count;
}

/* ---- sums ---------------------------------------------------------------------------------------------- */

/* `to` holds the shared part. */
static void sum_item(void *arg, int index, int thread) {
    (void)thread;
    const expert_loop *l = arg;
    const int K = l->spec->per_token, hidden = l->x->columns;
    for (int t = index * TOKENS; t < at_most((index + 1) * TOKENS, l->T); t++) {
        const float *gate = l->layer->shared_gate, *x = l->x->x + (size_t)t * hidden;
        const __m512 share = _mm512_set1_ps(gate ? logistic(dot(x, gate, hidden)) : 1.0f);
        float *to = l->to + (size_t)t * hidden;
        for (int c = 0; c < hidden; c += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int k = 0; k < K; k++) {
                const float *from = l->m->outputs + (size_t)l->m->rows[t * K + k] * hidden + c;
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(from), _mm512_set1_ps(l->m->weights[t * K + k]), sum);
            }
            if (l->spec->shared_width) sum = _mm512_fmadd_ps(_mm512_loadu_ps(to + c), share, sum);
            _mm512_storeu_ps(to + c, sum);
        }
    }
}

void compute_experts(const expert_spec *spec, const expert_layer *layer, const product_context *c, const expert_memory *m,
                     const operand *x, int T, float *to) {
    expert_loop l = {spec, layer, m, x, T, to};
    const int token_parts = parts_of(T, TOKENS);
    parallel(token_parts * parts_of(spec->number, EXPERTS), score_item, &l);
    parallel(token_parts, route_item, &l);
    sort_rows(&l);
    parallel(token_parts, copy_item, &l);
    const gate_clamp clamp = {spec->limit, spec->alpha}, none = {0, 0};
    product_job *inner = m->jobs, *outputs = m->jobs + spec->number;
    const int count = list_jobs(&l, inner, outputs);
    multiply_all(c, inner, count, &m->sorted, GATED, clamp, m->inner.x, &m->inner);
    multiply_all(c, outputs, count, &m->inner, STORE, none, m->outputs, NULL);
    if (spec->shared_width) {
        multiply(c, &layer->shared_gate_up, x, T, GATED, m->shared_inner.x, &m->shared_inner);
        multiply(c, &layer->shared_down, &m->shared_inner, T, STORE, to, NULL);
    }
    parallel(token_parts, sum_item, &l);
}
