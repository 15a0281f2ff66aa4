/* A product is cut into work items: some groups of outputs for some rows. Which rows share an item changes no
 * number (matmul.h). */
#include "products.h"

#include "threads.h"

typedef struct {
    const product_context *context;
    const product_job *jobs;
    int num_jobs;
    const operand *from;
    epilogue epilogue;
    gate_clamp clamp;
    float *to;
    const operand *gated;
    int stride, groups, groups_per_item;
} product_loop;

size_t product_bytes(int columns) {
    return sizeof(float) * 2 * ROWS_PER_ITEM * MAX_GROUPS * GROUP + panel_bytes(columns);
}

/* x times the logistic function of z. */
static __m512 times_logistic(__m512 x, __m512 z) {
    __m512 e = exp_ps(_mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_sub_ps(_mm512_setzero_ps(), z)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* x times the logistic function of x, or of 2 sqrt(2 / pi) (x + 0.044715 x^3): 0.5 x (1 + tanh(...)), the usual
 * approximation of GELU (Hendrycks, Gimpel 2016). */
static __m512 activate(__m512 x, activation kind) {
    __m512 z = x;
    if (kind == GELU_TANH) {
        const __m512 square = _mm512_mul_ps(x, x), cubic = _mm512_set1_ps(0.044715f);
        z = _mm512_mul_ps(x, _mm512_fmadd_ps(square, cubic, _mm512_set1_ps(1.0f)));
        z = _mm512_mul_ps(z, _mm512_set1_ps(1.5957691216f));
    }
    return times_logistic(x, z);
}

static __m512 gate_of(const product_loop *l, __m512 gate, __m512 up) {
    if (!l->clamp.limit) return _mm512_mul_ps(activate(gate, l->context->activation), up);
    const __m512 most = _mm512_set1_ps(l->clamp.limit), least = _mm512_set1_ps(-l->clamp.limit);
    gate = _mm512_min_ps(most, gate); /* in this order: a NaN stays one */
    up = _mm512_max_ps(least, _mm512_min_ps(most, up));
    gate = times_logistic(gate, _mm512_mul_ps(gate, _mm512_set1_ps(l->clamp.alpha)));
    return _mm512_mul_ps(_mm512_add_ps(up, _mm512_set1_ps(1.0f)), gate);
}

/* Outputs of groups first .. first + N - 1 for M rows. */
static void some_outputs(const product_loop *l, const joined *w, int first, int N, int row, int M, float *tile,
                         int16_t *panel) {
    const product_context *context = l->context;
    const int wide = MAX_GROUPS * GROUP, column = first * GROUP;
    if (l->epilogue == STORE && column + N * GROUP <= l->stride) {
        joined_product(w, first, N, l->from, row, M, l->to + (size_t)row * l->stride + column, l->stride, panel);
        return;
    }
    joined_product(w, first, N, l->from, row, M, tile, wide, panel);
    float *up = tile + ROWS_PER_ITEM * wide;
    if (l->epilogue == GATED) joined_product(w, l->groups + first, N, l->from, row, M, up, wide, panel);
    const __m512 residual = _mm512_set1_ps(context->residual_scale), logit = _mm512_set1_ps(context->logit_scale);
    for (int i = 0; i < M; i++, tile += wide, up += wide) {
        const size_t at = (size_t)(row + i) * l->stride + column;
        for (int c = 0; c < N * GROUP; c += GROUP) {
            const __mmask16 mask = lanes(l->stride - column - c);
            __m512 value = _mm512_loadu_ps(tile + c);
            if (l->epilogue == ADD)
                value = _mm512_fmadd_ps(value, residual, _mm512_maskz_loadu_ps(mask, l->to + at + c));
            if (l->epilogue == GATED) value = gate_of(l, value, _mm512_loadu_ps(up + c));
            if (l->epilogue == CAP) value = cap_ps(_mm512_mul_ps(value, logit), context->logit_cap);
            _mm512_mask_storeu_ps(l->to + at + c, mask, value);
        }
        if (l->epilogue == GATED) quantise(l->gated, row + i, column, N * GROUP);
    }
}

/* The job of a work item. */
static const product_job *job_of(const product_loop *l, int index) {
    int low = 0, high = l->num_jobs;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (l->jobs[middle].first_item <= index)
            low = middle;
        else
            high = middle;
    }
    return &l->jobs[low];
}

static void product_item(void *arg, int index, int thread) {
    const product_loop *l = arg;
    const product_job *job = job_of(l, index);
    float *tile = (float *)(l->context->scratch + l->context->scratch_bytes * thread);
    int16_t *panel = (int16_t *)(tile + 2 * ROWS_PER_ITEM * MAX_GROUPS * GROUP);
    index -= job->first_item;
    const int row_parts = (job->M + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM;
    const int row = index % row_parts * ROWS_PER_ITEM, M = at_most(ROWS_PER_ITEM, job->M - row);
    const int first = index / row_parts * l->groups_per_item;
    const int end = at_most(first + l->groups_per_item, l->groups);
    for (int group = first; group < end; group += MAX_GROUPS)
        some_outputs(l, job->w, group, at_most(MAX_GROUPS, end - group), job->first_row + row, M, tile, panel);
}

void multiply_all(const product_context *c, product_job *jobs, int count, const operand *from, epilogue epilogue,
                  gate_clamp clamp, float *to, const operand *gated) {
    if (!count) return;
    const int rows = jobs[0].w->rows;
    product_loop l = {c, jobs, count, from, epilogue, clamp, to, gated, .stride = epilogue == GATED ? rows / 2 : rows};
    l.groups = (l.stride + GROUP - 1) / GROUP;
    const int share = count * l.groups / (MAX_GROUPS * 8 * num_threads());
    l.groups_per_item = at_most(MAX_GROUPS_PER_ITEM, MAX_GROUPS * at_least(1, share));
    const int group_parts = (l.groups + l.groups_per_item - 1) / l.groups_per_item;
    int items = 0;
    for (int i = 0; i < count; i++) {
        jobs[i].first_item = items;
        items += group_parts * ((jobs[i].M + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM);
    }
    parallel(items, product_item, &l);
}

void multiply(const product_context *c, const joined *w, const operand *from, int M, epilogue epilogue, float *to,
              const operand *gated) {
    product_job job = {w, 0, M, 0};
    multiply_all(c, &job, 1, from, epilogue, (gate_clamp){0, 0}, to, gated);
}
