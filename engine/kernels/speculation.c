// Drafts from the tokens of a request, and what the tokens that came teach about them; all rows of
// a step in one call. decode/speculative/ngram.py and acceptance.py have the algorithms, and the
// same in Python.
//
// An index is memory for `capacity` tokens, int32:
//
//     tokens [capacity] | singles: before [capacity], head [2 capacity] | pairs: the same
//
//     head     a hash table of n-grams, each an end (exclusive) of its last occurrence; 0: empty
//     before   of an end, the end of the n-gram's occurrence before; 0: there is none
//
// An n-gram is not stored in the table: the tokens before its end are the key.

#include <math.h>
#include <stdint.h>

enum { MAX_MATCH = 32, MAX_WALK = 64, MAX_DRAFT = 256, NUM_LENGTHS = MAX_MATCH + MAX_DRAFT };
enum { ALONE, DIFFER, AGREE };

typedef struct {
    int32_t *memory;
    int64_t capacity, size, indexed; // a power of two; tokens; of those, the ones in the chains
} ngram_index;

typedef struct {
    int32_t *before, *head;
    uint64_t mask;
    int n; // tokens of an n-gram
} chain;

typedef struct {
    int64_t length, end, other; // `other`: end of the next most recent one, or 0
} match;

static chain chain_of(const ngram_index *x, int n) {
    int32_t *before = x->memory + (n == 1 ? 1 : 4) * x->capacity;
    return (chain){before, before + x->capacity, 2 * (uint64_t)x->capacity - 1, n};
}

// The table's entry of the n-gram that ends at `end`: its last end, or 0.
static int32_t *entry(const chain *c, const int32_t *tokens, int64_t end) {
    const int32_t last = tokens[end - 1], first = c->n == 1 ? 0 : tokens[end - 2];
    const uint64_t key = (uint64_t)(uint32_t)first << 32 | (uint32_t)last;
    for (uint64_t i = key * 0x9E3779B97F4A7C15u >> 32;; i++) {
        int32_t *e = c->head + (i & c->mask);
        if (!*e || (tokens[*e - 1] == last && (c->n == 1 || tokens[*e - 2] == first))) return e;
    }
}

// All n-grams but those that end with the last token, which has no continuation yet.
static void link_all(ngram_index *x) {
    const int32_t *tokens = x->memory;
    const chain singles = chain_of(x, 1), pairs = chain_of(x, 2);
    for (int64_t end = x->indexed + 1; end < x->size; end++) {
        int32_t *e = entry(&singles, tokens, end);
        singles.before[end] = *e;
        *e = (int32_t)end;
        if (end > 1) {
            e = entry(&pairs, tokens, end);
            pairs.before[end] = *e;
            *e = (int32_t)end;
        }
        x->indexed = end;
    }
}

// The most recent of the longest matches of the last tokens; length 0: none.
static match longest(const ngram_index *x) {
    const int32_t *tokens = x->memory;
    const int64_t size = x->size;
    match m = {size > 1 ? 2 : 1, 0, 0};
    chain c = chain_of(x, (int)m.length);
    int64_t end = size ? *entry(&c, tokens, size) : 0;
    if (!end && m.length == 2) {
        m.length = 1;
        c = chain_of(x, 1);
        end = *entry(&c, tokens, size);
    }
    for (int walked = 0; end && walked < MAX_WALK; walked++, end = c.before[end]) {
        if (end < m.length || tokens[end - m.length] != tokens[size - m.length]) continue;
        const int64_t most = end < MAX_MATCH ? end : MAX_MATCH;
        int64_t length = 0;
        while (length < most && tokens[end - 1 - length] == tokens[size - 1 - length]) length++;
        if (length > m.length || (length == m.length && !m.end)) {
            m = (match){length, end, 0};
        } else if (length == m.length && !m.other) {
            m.other = end;
            if (length == MAX_MATCH) break;
        }
    }
    if (!m.end) m.length = 0;
    return m;
}

// The i-th token from `end` on; at the history's end they go on from `end` again.
static int32_t continued(const ngram_index *x, int64_t end, int64_t i) {
    const int64_t period = x->size - end;
    return x->memory[end + (i < period ? i : i % period)];
}

// Append the first counts[r] of the tokens [num_rows, stride] to each index; there is room.
void diptych_ngram_append(ngram_index *indices, const int64_t *ids, int num_rows,
                          const int32_t *tokens, int64_t stride, const int64_t *counts) {
    for (int r = 0; r < num_rows; r++) {
        ngram_index *x = indices + ids[r];
        for (int64_t i = 0; i < counts[r]; i++) x->memory[x->size++] = tokens[r * stride + i];
    }
}

// Drafts of at most limits[r] <= width tokens; `bucket` [kind, NUM_LENGTHS] by the matching tokens.
void diptych_ngram_propose(ngram_index *indices, const int64_t *ids, int num_rows,
                           const int64_t *limits, const int32_t *bucket, int64_t width,
                           int32_t *tokens, int32_t *buckets, int64_t *lengths) {
    for (int r = 0; r < num_rows; r++) {
        ngram_index *x = indices + ids[r];
        int32_t *draft = tokens + r * width, *in_bucket = buckets + r * width;
        link_all(x);
        lengths[r] = 0;
        if (limits[r] <= 0) continue;
        const match m = longest(x);
        if (!m.length) continue;
        lengths[r] = limits[r];
        int kind = m.other ? AGREE : ALONE;
        for (int64_t i = 0; i < limits[r]; i++) {
            draft[i] = continued(x, m.end, i);
            if (kind == DIFFER) kind = ALONE;
            if (kind == AGREE && continued(x, m.other, i) != draft[i]) kind = DIFFER;
            in_bucket[i] = bucket[kind * NUM_LENGTHS + m.length + i];
        }
    }
}

static double clip(double x, double limit) { return x < -limit ? -limit : x > limit ? limit : x; }

// Move the logits of buckets and requests by what followed: `produced` [num_rows, stride], of which
// counts[r], where the draft rows[r] of [drafts, width] was proposed. Negative tokens teach nothing,
// negative buckets are of tokens that a constraint forces.
void diptych_acceptance_learn(const int64_t *ids, const int64_t *rows, int num_rows,
                              const int32_t *drafts, const int32_t *buckets, int64_t width,
                              const int64_t *lengths, const int32_t *produced, int64_t stride,
                              const int64_t *counts, double *of_buckets, double *of_requests,
                              double bucket_rate, double request_rate, double limit) {
    for (int r = 0; r < num_rows; r++) {
        const int32_t *draft = drafts + rows[r] * width, *bucket = buckets + rows[r] * width;
        const int32_t *came = produced + r * stride;
        const int64_t count = counts[r] < lengths[rows[r]] ? counts[r] : lengths[rows[r]];
        double of_request = of_requests[ids[r]];
        for (int64_t i = 0; i < count && draft[i] >= 0; i++) {
            const int hit = draft[i] == came[i];
            if (bucket[i] >= 0) {
                const double logit = of_buckets[bucket[i]];
                const double surprise = hit - 1.0 / (1.0 + exp(-logit - of_request));
                of_request = clip(of_request + request_rate * surprise, limit);
                of_buckets[bucket[i]] = clip(logit + bucket_rate * surprise, limit);
            }
            if (!hit) break;
        }
        of_requests[ids[r]] = of_request;
    }
}
