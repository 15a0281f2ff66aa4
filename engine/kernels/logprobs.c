/* Log-probabilities for the rows that ask for them: log-softmax of raw logits, and the largest k.
 *
 * Two passes over a row. The first keeps a list of the best so far: in a vocabulary in no particular order
 * about k log(n / k) values ever enter it, so a vector is mostly one comparison. The second sums exp(x - top)
 * in doubles, in one order: a row's numbers depend on nothing beside it.
 */
#include <math.h>
#include <stdint.h>

#include "simd.h"

enum { MOST = 64 };

typedef struct {
    int num, most;
    float value[MOST + 1]; /* falling; of equals the lowest id first */
    int32_t id[MOST + 1];
} best;

/* Ids come in rising order, so an equal one that is there already goes first. */
static void enter(best *b, float value, int32_t id) {
    int at = b->num < b->most ? b->num++ : b->most - 1;
    for (; at > 0 && b->value[at - 1] < value; at--) {
        b->value[at] = b->value[at - 1];
        b->id[at] = b->id[at - 1];
    }
    b->value[at] = value;
    b->id[at] = id;
}

/* The `most` largest of x [n]. Returns whether all of x are numbers below infinity. */
static int find_best(const float *x, int n, best *b) {
    __mmask16 strange = 0;
    float least = -INFINITY; /* of a full list: smaller ones and equals need not be looked at */
    for (int i = 0; i < n; i += 16) {
        const __mmask16 here = lanes(n - i);
        const __m512 v = _mm512_maskz_loadu_ps(here, x + i);
        strange |= _mm512_mask_cmp_ps_mask(here, v, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        __mmask16 some = b->num < b->most
                             ? here
                             : _mm512_mask_cmp_ps_mask(here, v, _mm512_set1_ps(least), _CMP_GT_OQ);
        for (; some; some &= some - 1) {
            const int at = i + __builtin_ctz(some);
            if (b->num == b->most && !(x[at] > b->value[b->most - 1])) continue;
            enter(b, x[at], at);
        }
        if (b->num == b->most) least = b->value[b->most - 1];
    }
    return !strange;
}

/* log(sum(exp(x))) of x [n], whose maximum is `top`. */
static double log_sum_exp(const float *x, int n, float top) {
    __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int i = 0; i < n; i += 16) {
        const __mmask16 here = lanes(n - i);
        const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(here, x + i), _mm512_set1_ps(top));
        const __m512 e = _mm512_maskz_mov_ps(here, exp_ps(v));
        sum[0] = _mm512_add_pd(sum[0], _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
        sum[1] = _mm512_add_pd(sum[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(e, 1)));
    }
    return (double)top + log(_mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1])));
}

/* Of each of `rows` rows of logits, `stride` apart, fp32 [vocab]: log p(tokens[row]) in chosen[row], and the k
 * likeliest tokens with theirs in ids and values [rows, k], best first. k at most 64 and the vocabulary.
 * chosen[row] is NaN where the row holds a NaN, +inf, or nothing but -inf. */
void diptych_logprobs(const float *logits, int64_t stride, int vocab, const int32_t *tokens, int rows, int k,
                      float *chosen, int32_t *ids, float *values) {
    for (int row = 0; row < rows; row++, logits += stride, ids += k, values += k) {
        best b = {.num = 0, .most = k > 0 ? k : 1};
        const int usable = find_best(logits, vocab, &b);
        chosen[row] = NAN;
        if (!usable || b.value[0] == -INFINITY) continue;
        const double total = log_sum_exp(logits, vocab, b.value[0]);
        chosen[row] = (float)((double)logits[tokens[row]] - total);
        for (int i = 0; i < k; i++) {
            ids[i] = b.id[i];
            values[i] = (float)((double)b.value[i] - total);
        }
    }
}
