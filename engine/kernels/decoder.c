/* A step of a decoder on the CPU: ragged rows in, logits out, one call.
 *
 *     x --norm--> qkv --(q, k norm), rotate, write KV--> attention --> out --(norm), + x
 *       --norm--> gate, up --> down --(norm), + x       or, in place of this product, experts.c
 *     once a layer, then norm and the vocabulary, for the tokens whose logits are wanted
 *
 * What is in brackets, and every scale, cap, window and rotation, follows the model's description, layer
 * by layer. A feature that a model does not have costs nothing and changes no bit.
 *
 * Between products everything is fp32. A product's input becomes 16-bit fixed point where its weight
 * is packed (matmul.h). K and V are rounded to bfloat16 when they are written. Each arrow is one
 * `parallel` loop. Every number of a token is computed by the same operations in the same order
 * whatever else is in the step. So the logits of a token are a function of its context alone, bit for
 * bit.
 *
 * The caller owns the weights, the pool and the batch. An arena holds what a step needs in between; it
 * grows to the largest step and belongs to one caller at a time.
 */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "experts.h"
#include "products.h"
#include "threads.h"

enum { TOKENS_PER_ITEM = 8 };

/* Filled in by engine/kernels/decoder.py, which also keeps widths to multiples of 32. */
typedef struct {
    const float *input_norm, *mlp_norm;       /* [hidden], or NULL: none */
    const float *q_norm, *k_norm;             /* [head_dim], or of all heads; or NULL: none */
    const float *out_norm, *down_norm;        /* [hidden], before the sum with x; or NULL: none */
    const float *sinks;                       /* [heads]: one more score of each head; or NULL */
    joined qkv, out, gate_up, down;           /* gate_up and down are unused where there are experts */
    const expert_layer *experts;              /* or NULL */
    int32_t window; /* positions that a query sees, itself included; 0: all */
    int32_t rope;   /* which of the model's tables turns q and k; -1: none */
    float score_scale; /* 0: 1 / sqrt(head_dim) */
    float score_cap; /* scores become cap * tanh(scaled score / cap); 0: none */
} layer_weights;

/* Rotary frequencies. The first `dim` numbers of a head turn, a multiple of 32. */
typedef struct {
    const float *inv_freq; /* [dim / 2] */
    float scale;           /* of cos and sin */
    int32_t dim;
} rope_table;

typedef struct {
    int32_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, num_ropes;
    float eps, embedding_scale;
    float residual_scale;        /* of what a layer adds to x */
    float logit_scale, logit_cap; /* logits become cap * tanh(logit * scale / cap); cap 0: none */
    int32_t activation;
    int32_t whole_qk_norm;       /* q_norm and k_norm are over all heads together */
    float query_beta;            /* q becomes q * (1 + beta * log(1 + floor(position / period))); 0: it stays */
    int32_t query_period;
    const rope_table *ropes;
    const float *norm; /* [hidden] */
    joined embedding, head; /* of one part each */
    const layer_weights *layers;
    expert_spec experts; /* number 0: no layer has experts */
} decoder;

/* T tokens of R rows, S wanted logits; the KV of earlier positions is in the pool. */
typedef struct {
    int32_t num_tokens, num_rows, num_logits, table_stride;
    int64_t column_stride; /* from one column of the block tables to the next */
    const int32_t *token_ids;   /* [T] */
    const int32_t *first_token; /* [R + 1] */
    const int32_t *position;    /* [R], of the row's first token */
    const int32_t *tables;      /* [columns][R, table_stride]: block ids */
    const int32_t *logit_index; /* [S]: tokens */
} batch;

/* Where the model's layers lie in the pool. */
typedef struct {
    bf16 *first;          /* of block 0: [kv_heads, layers, 2, block_size, head_dim] */
    int64_t block_stride; /* elements from one block to the next */
    int64_t head_stride;  /* and from one head of a block to the next: all layers that lie there */
    const int32_t *columns; /* [layers]: the column of the block tables whose blocks hold a layer */
    const int32_t *places;  /* [layers]: where in a block it lies */
    int32_t block_size, unused;
} kv_pool;

/* One task of attention: some tokens of a row, one head, all segments or one of them. */
typedef struct {
    int32_t row, head, token, num_tokens; /* `token`: of the step */
    int32_t first_segment;
    partial *part; /* of that segment alone; NULL: all of them, finalized at once */
} attention_task;

typedef struct {
    const decoder *model;
    const batch *b;
    kv_pool pool;
    const layer_weights *layer; /* in work ... */
    geometry at;                /* ... its part of the pool ... */
    const int32_t *tables;      /* ... and its column of the block tables */
    operand normed, context, inner; /* context: what attention gives */
    float *x, *qkv, *rope, *logits;
    float *added; /* [T, hidden], to be added to x after a norm or as a sum of experts; NULL: not needed */
    attention_task *tasks; /* for the layer's window */
    char *parts;
    int num_tasks, split;
    int32_t *row_of; /* [T] */
    product_context products; /* its scratch memory serves all loops */
    expert_memory experts;
} step;

/* ---- memory ------------------------------------------------------------------------------------------ */

typedef struct {
    char *memory;
    size_t size, used;
} arena;

arena *diptych_arena_new(void) { return calloc(1, sizeof(arena)); }

void diptych_arena_free(arena *a) {
    if (a) free(a->memory);
    free(a);
}

static void *take(arena *a, size_t bytes) {
    void *at = a->memory ? a->memory + a->used : NULL;
    a->used += (bytes + 127) & ~(size_t)63;
    return at;
}

static operand take_operand(arena *a, size_t rows, int columns) {
    const size_t blocks = rows * (columns / BLOCK);
    operand o = {.columns = columns};
    o.x = take(a, sizeof(float) * rows * columns);
    o.q = take(a, sizeof(int16_t) * rows * columns);
    o.scale = take(a, sizeof(float) * blocks);
    o.sum = take(a, sizeof(float) * blocks);
    o.count = take(a, sizeof(int32_t) * blocks);
    return o;
}

/* ---- loops over tokens -------------------------------------------------------------------------------- */

/* out = x over its root mean square, times weight; [width], a multiple of 16. May be in place. */
static void norm_vector(const float *x, const float *weight, float eps, int width, float *out) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < width; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(sum1(squares) / (float)width + eps));
    for (int i = 0; i < width; i += 16)
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale),
                                                _mm512_loadu_ps(weight + i)));
}

/* A loop over `count` rows of x, or over chosen ones. */
typedef struct {
    step *s;
    const float *weight; /* NULL: the rows stay as they are */
    const int32_t *chosen;
    int count;
} norm_loop;

static void norm_item(void *arg, int index, int thread) {
    (void)thread;
    const norm_loop *l = arg;
    const int width = l->s->model->hidden, end = at_most((index + 1) * TOKENS_PER_ITEM, l->count);
    for (int i = index * TOKENS_PER_ITEM; i < end; i++) {
        const int row = l->chosen ? l->chosen[i] : i;
        const operand *to = &l->s->normed;
        const float *x = l->s->x + (size_t)row * width;
        float *out = to->x + (size_t)i * width;
        if (l->weight)
            norm_vector(x, l->weight, l->s->model->eps, width, out);
        else
            memcpy(out, x, sizeof(float) * width);
        quantise(to, i, 0, width);
    }
}

static void norm(step *s, const float *weight, const int32_t *chosen, int count) {
    norm_loop l = {s, weight, chosen, count};
    parallel((count + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM, norm_item, &l);
}

static int position_of(const step *s, int token) {
    const int row = s->row_of[token];
    return s->b->position[row] + token - s->b->first_token[row];
}

/* x += scale * what was added, or its norm. */
static void add_item(void *arg, int index, int thread) {
    (void)thread;
    const norm_loop *l = arg;
    const int width = l->s->model->hidden, end = at_most((index + 1) * TOKENS_PER_ITEM, l->count);
    const __m512 scale = _mm512_set1_ps(l->s->model->residual_scale);
    for (int i = index * TOKENS_PER_ITEM; i < end; i++) {
        float *x = l->s->x + (size_t)i * width, *added = l->s->added + (size_t)i * width;
        if (l->weight) norm_vector(added, l->weight, l->s->model->eps, width, added);
        for (int c = 0; c < width; c += 16)
            _mm512_storeu_ps(x + c, _mm512_fmadd_ps(_mm512_loadu_ps(added + c), scale, _mm512_loadu_ps(x + c)));
    }
}

/* cos and sin [2, dim / 2] of every table, for one token: [num_ropes, head_dim]. */
static float *rope_of(const step *s, int token) {
    return s->rope + (size_t)token * s->model->num_ropes * s->model->head_dim;
}

/* Embedding, and the rotations of each token. */
static void begin_item(void *arg, int index, int thread) {
    (void)thread;
    step *s = arg;
    const decoder *m = s->model;
    const __m512 scale = _mm512_set1_ps(m->embedding_scale);
    for (int t = index * TOKENS_PER_ITEM; t < at_most((index + 1) * TOKENS_PER_ITEM, s->b->num_tokens); t++) {
        float *x = s->x + (size_t)t * m->hidden;
        unpack_row(m->embedding.parts, s->b->token_ids[t], x);
        for (int c = 0; c < m->hidden; c += 16)
            _mm512_storeu_ps(x + c, _mm512_mul_ps(_mm512_loadu_ps(x + c), scale));
        const float position = (float)position_of(s, t);
        for (int r = 0; r < m->num_ropes; r++) {
            const rope_table *rope = &m->ropes[r];
            const int half = rope->dim / 2;
            float *table = rope_of(s, t) + r * m->head_dim;
            for (int i = 0; i < half; i++) {
                table[i] = cosf(position * rope->inv_freq[i]) * rope->scale;
                table[half + i] = sinf(position * rope->inv_freq[i]) * rope->scale;
            }
        }
    }
}

/* NeoX style: the two halves of a head rotate. */
static void rotate(float *head, const float *table, int half) {
    for (int i = 0; i < half; i += 16) {
        __m512 a = _mm512_loadu_ps(head + i), b = _mm512_loadu_ps(head + half + i);
        __m512 cos = _mm512_loadu_ps(table + i), sin = _mm512_loadu_ps(table + half + i);
        _mm512_storeu_ps(head + i, _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)));
        _mm512_storeu_ps(head + half + i, _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)));
    }
}

/* Normalise the heads of q and k at `heads`, each alone or all together. */
static void norm_heads(const step *s, float *heads) {
    const decoder *m = s->model;
    const layer_weights *w = s->layer;
    const int D = m->head_dim, size = m->whole_qk_norm ? m->heads * D : D, kv_size = m->whole_qk_norm ? m->kv_heads * D : D;
    float *k = heads + m->heads * D;
    for (int i = 0; i < m->heads * D; i += size) norm_vector(heads + i, w->q_norm, m->eps, size, heads + i);
    for (int i = 0; i < m->kv_heads * D; i += kv_size) norm_vector(k + i, w->k_norm, m->eps, kv_size, k + i);
}

/* q times what queries at its position are multiplied by. */
static void grow_queries(const decoder *m, int position, float *q) {
    const float periods = floorf((float)position / (float)m->query_period);
    const __m512 factor = _mm512_set1_ps(1.0f + m->query_beta * log1pf(periods));
    for (int i = 0; i < m->heads * m->head_dim; i += 16)
        _mm512_storeu_ps(q + i, _mm512_mul_ps(_mm512_loadu_ps(q + i), factor));
}

/* Normalise and rotate q and k, and write k and v into the blocks of their request. */
static void write_item(void *arg, int index, int thread) {
    (void)thread;
    step *s = arg;
    const decoder *m = s->model;
    const int D = m->head_dim, width = (m->heads + 2 * m->kv_heads) * D, size = s->pool.block_size;
    const int turns = s->layer->rope;
    for (int t = index * TOKENS_PER_ITEM; t < at_most((index + 1) * TOKENS_PER_ITEM, s->b->num_tokens); t++) {
        float *heads = s->qkv + (size_t)t * width;
        const int position = position_of(s, t);
        if (s->layer->q_norm) norm_heads(s, heads);
        for (int h = 0; turns >= 0 && h < m->heads + m->kv_heads; h++)
            rotate(heads + h * D, rope_of(s, t) + turns * D, m->ropes[turns].dim / 2);
        if (m->query_beta) grow_queries(m, position, heads);
        const int32_t block = s->tables[(size_t)s->row_of[t] * s->b->table_stride + position / size];
        bf16 *to = (bf16 *)s->at.layer + block * s->pool.block_stride + (size_t)(position % size) * D;
        const float *k = heads + m->heads * D, *v = k + m->kv_heads * D;
        for (int h = 0; h < m->kv_heads; h++, to += s->pool.head_stride, k += D, v += D)
            for (int d = 0; d < D; d += 16) {
                narrow(to + d, _mm512_loadu_ps(k + d));
                narrow(to + (size_t)size * D + d, _mm512_loadu_ps(v + d));
            }
    }
}

static void over_tokens(step *s, work_item run) {
    parallel((s->b->num_tokens + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM, run, s);
}

/* ---- attention ----------------------------------------------------------------------------------------- */

static queries queries_of(const step *s, const attention_task *task) {
    const decoder *m = s->model;
    const int width = (m->heads + 2 * m->kv_heads) * m->head_dim;
    return (queries){
        .table = s->tables + (size_t)task->row * s->b->table_stride,
        .q = s->qkv + (size_t)task->token * width + task->head * s->at.group * m->head_dim,
        .q_stride = width,
        .head = task->head,
        .num_tokens = task->num_tokens,
        .position = position_of(s, task->token),
    };
}

static void finalize_task(const step *s, const attention_task *task, const partial *total) {
    const decoder *m = s->model;
    for (int i = 0; i < task->num_tokens * s->at.group; i++) {
        const int token = task->token + i / s->at.group;
        const int column = (task->head * s->at.group + i % s->at.group) * m->head_dim;
        const float *sink = s->layer->sinks ? s->layer->sinks + column / m->head_dim : NULL;
        finalize(total, i, m->head_dim, sink, s->context.x + (size_t)token * s->context.columns + column);
        quantise(&s->context, token, column, m->head_dim);
    }
}

static void attend_item(void *arg, int index, int thread) {
    step *s = arg;
    const attention_task *task = &s->tasks[index];
    const int D = s->model->head_dim;
    char *scratch = s->products.scratch + s->products.scratch_bytes * thread;
    partial *total = (partial *)scratch, *part = (partial *)(scratch + partial_bytes(D));
    float *rest = (float *)(scratch + 2 * partial_bytes(D));
    const queries w = queries_of(s, task);
    const int next = index + num_threads(); /* other threads take those in between */
    const attention_task *after = next < s->num_tasks ? &s->tasks[next] : NULL;
    const queries then = after ? queries_of(s, after) : w;
    const int then_segment = after ? after->first_segment : 0;
    if (task->part) {
        attend(&s->at, &w, task->first_segment, after ? &then : NULL, then_segment, task->part, rest);
        return;
    }
    attend_all(&s->at, &w, after ? &then : NULL, then_segment, total, part, rest);
    finalize_task(s, task, total);
}

/* Parts of one row and head follow one another in the list; the first one is the total. */
static void merge_item(void *arg, int index, int thread) {
    (void)thread;
    step *s = arg;
    const attention_task *task = &s->tasks[index], *end = s->tasks + s->num_tasks;
    if (index && task[-1].token == task->token && task[-1].head == task->head) return;
    partial *total = task->part;
    for (const attention_task *t = task + 1; t < end && t->token == task->token && t->head == task->head; t++)
        merge(total, t->part, task->num_tokens * s->at.group, s->model->head_dim);
    finalize_task(s, task, total);
}

static void attention(step *s) {
    parallel(s->num_tasks, attend_item, s);
    if (s->split) parallel(s->num_tasks, merge_item, s);
}

/* How many tokens of a row one task takes, for `group` query heads each. */
static int tokens_a_task(int group) { return at_least(1, MAX_QUERIES / group); }

/* List the tasks for the layer's window; `split`: each segment becomes its own. Returns their number;
 * counts alone when `tasks` is NULL. */
static int list_tasks(const step *s, int split, attention_task *tasks) {
    const batch *b = s->b;
    const int most = tokens_a_task(s->at.group);
    int n = 0;
    for (int row = 0; row < b->num_rows; row++) {
        const int count = b->first_token[row + 1] - b->first_token[row];
        for (int token = 0; token < count; token += most)
            for (int head = 0; head < s->at.kv_heads; head++) {
                attention_task task = {row, head, b->first_token[row] + token, at_most(most, count - token), 0, NULL};
                queries w = {.position = b->position[row] + token, .num_tokens = task.num_tokens};
                int first, end;
                segments_seen(&s->at, &w, &first, &end);
                for (int segment = first; segment < end; segment += split ? 1 : end - first, n++) {
                    if (!tasks) continue;
                    task.first_segment = segment;
                    if (split) task.part = (partial *)(s->parts + n * partial_bytes(s->at.head_dim));
                    tasks[n] = task;
                }
            }
    }
    return n;
}

/* Count the tasks for a window. With few of them each segment becomes its own. */
static void count_tasks(step *s, int window) {
    s->at.window = window;
    const int whole = list_tasks(s, 0, NULL);
    s->split = whole < 4 * num_threads();
    s->num_tasks = s->split ? list_tasks(s, 1, NULL) : whole;
}

/* Make layer i the one in work. Layers of equal windows that follow one another share their tasks. */
static void enter_layer(step *s, int i) {
    const layer_weights *before = s->layer;
    s->layer = &s->model->layers[i];
    s->tables = s->b->tables + s->pool.columns[i] * s->b->column_stride;
    s->at.layer = s->pool.first + 2 * (int64_t)s->pool.places[i] * s->at.block_size * s->at.head_dim;
    const float log2 = s->layer->score_cap ? 1.0f : LOG2_E, scale = s->layer->score_scale;
    s->at.cap = s->layer->score_cap;
    s->at.scale = scale ? log2 * scale : log2 / sqrtf((float)s->at.head_dim);
    if (before && before->window == s->layer->window) return;
    count_tasks(s, s->layer->window);
    list_tasks(s, s->split, s->tasks);
}

/* ---- the step ------------------------------------------------------------------------------------------ */

static void lay_out_products(step *s, arena *a) {
    const decoder *m = s->model;
    int widest = at_least(at_least(m->hidden, m->intermediate), m->heads * m->head_dim);
    widest = at_least(widest, at_least(m->experts.width, m->experts.shared_width));
    const size_t product = product_bytes(widest);
    const size_t attend = 2 * partial_bytes(m->head_dim) + attention_bytes(m->head_dim);
    s->products = (product_context){
        .activation = m->activation,
        .residual_scale = m->residual_scale,
        .logit_scale = m->logit_scale,
        .logit_cap = m->logit_cap,
        .scratch_bytes = ((product > attend ? product : attend) + 4095) & ~(size_t)4095,
    };
    s->products.scratch = take(a, s->products.scratch_bytes * num_threads());
}

static void lay_out_experts(step *s, arena *a) {
    const expert_spec *spec = &s->model->experts;
    const size_t T = s->b->num_tokens, number = spec->number, pairs = T * spec->per_token;
    expert_memory *e = &s->experts;
    e->scores = take(a, sizeof(float) * T * number);
    e->ranked = take(a, sizeof(float) * T * number);
    e->ids = take(a, sizeof(int32_t) * pairs);
    e->weights = take(a, sizeof(float) * pairs);
    e->rows = take(a, sizeof(int32_t) * pairs);
    e->first_row = take(a, sizeof(int32_t) * (number + 1));
    e->tensors = take(a, sizeof(joined) * 2 * number);
    e->jobs = take(a, sizeof(product_job) * 2 * number);
    e->sorted = take_operand(a, pairs, s->model->hidden);
    e->inner = take_operand(a, pairs, spec->width);
    e->outputs = take(a, sizeof(float) * pairs * s->model->hidden);
    if (spec->shared_width) e->shared_inner = take_operand(a, T, spec->shared_width);
}

static void lay_out(step *s, arena *a) {
    const decoder *m = s->model;
    const size_t T = s->b->num_tokens, S = s->b->num_logits, most = T > S ? T : S;
    a->used = 0;
    s->x = take(a, sizeof(float) * T * m->hidden);
    s->qkv = take(a, sizeof(float) * T * (m->heads + 2 * m->kv_heads) * m->head_dim);
    s->rope = take(a, sizeof(float) * T * m->num_ropes * m->head_dim);
    s->row_of = take(a, sizeof(int32_t) * T);
    s->normed = take_operand(a, most, m->hidden);
    s->context = take_operand(a, T, m->heads * m->head_dim);
    s->inner = take_operand(a, T, m->intermediate);
    lay_out_products(s, a);
    if (m->experts.number) lay_out_experts(s, a);
    size_t num_tasks = 0, num_parts = 0; /* the most of any layer */
    int adds_later = m->experts.number != 0;
    for (int i = 0; i < m->num_layers; i++) {
        if (m->layers[i].out_norm || m->layers[i].down_norm) adds_later = 1;
        if (i && m->layers[i].window == m->layers[i - 1].window) continue;
        count_tasks(s, m->layers[i].window);
        if ((size_t)s->num_tasks > num_tasks) num_tasks = s->num_tasks;
        if (s->split && (size_t)s->num_tasks > num_parts) num_parts = s->num_tasks;
    }
    s->added = adds_later ? take(a, sizeof(float) * T * m->hidden) : NULL;
    s->tasks = take(a, sizeof(attention_task) * num_tasks);
    s->parts = take(a, partial_bytes(m->head_dim) * num_parts);
}

/* x += s->added, normalised before where the layer has such a norm. */
static void add_later(step *s, const float *weight) {
    const int T = s->b->num_tokens;
    norm_loop l = {s, weight, NULL, T};
    parallel((T + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM, add_item, &l);
}

/* x += what w makes of `from`. */
static void add_product(step *s, const joined *w, const operand *from, const float *weight) {
    const int T = s->b->num_tokens;
    if (!weight) {
        multiply(&s->products, w, from, T, ADD, s->x, NULL);
        return;
    }
    multiply(&s->products, w, from, T, STORE, s->added, NULL);
    add_later(s, weight);
}

/* x += what the layer's feed-forward, or its experts, make of the normed rows. */
static void feed_forward(step *s) {
    const layer_weights *w = s->layer;
    const int T = s->b->num_tokens;
    if (w->experts) {
        compute_experts(&s->model->experts, w->experts, &s->products, &s->experts, &s->normed, T, s->added);
        add_later(s, w->down_norm);
        return;
    }
    multiply(&s->products, &w->gate_up, &s->normed, T, GATED, s->inner.x, &s->inner);
    add_product(s, &w->down, &s->inner, w->down_norm);
}

/* logits [S, vocab] fp32 of the batch, whose KV is written on the way. Returns 0, or 1 when there is no
 * memory for a step of this size; nothing has been written then. */
int diptych_forward(const decoder *m, const batch *b, const kv_pool *pool, arena *a, float *logits) {
    step s = {.model = m, .b = b, .pool = *pool, .logits = logits};
    s.at = (geometry){pool->first, pool->block_stride, pool->head_stride, m->kv_heads, m->heads / m->kv_heads,
                      m->head_dim, pool->block_size, 0, 0, 0};
    lay_out(&s, a);
    if (a->used > a->size) {
        free(a->memory);
        a->size = a->used + a->used / 4;
        a->memory = aligned_alloc(4096, (a->size + 4095) & ~(size_t)4095);
        if (!a->memory) return a->size = 0, 1;
        lay_out(&s, a);
    }
    for (int row = 0; row < b->num_rows; row++)
        for (int t = b->first_token[row]; t < b->first_token[row + 1]; t++) s.row_of[t] = row;
    over_tokens(&s, begin_item);
    for (int i = 0; i < m->num_layers; i++) {
        enter_layer(&s, i);
        const layer_weights *w = s.layer;
        norm(&s, w->input_norm, NULL, b->num_tokens);
        multiply(&s.products, &w->qkv, &s.normed, b->num_tokens, STORE, s.qkv, NULL);
        over_tokens(&s, write_item);
        if (i == m->num_layers - 1 && !b->num_logits) return 0; /* nothing reads what follows */
        attention(&s);
        add_product(&s, &w->out, &s.context, w->out_norm);
        norm(&s, w->mlp_norm, NULL, b->num_tokens);
        feed_forward(&s);
    }
    norm(&s, m->norm, b->logit_index, b->num_logits);
    const int plain = m->logit_scale == 1.0f && !m->logit_cap;
    multiply(&s.products, &m->head, &s.normed, b->num_logits, plain ? STORE : CAP, logits, NULL);
    return 0;
}
