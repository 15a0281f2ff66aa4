/* The sampler for CPUs with AVX512: a step's rows of logits become tokens, as engine/sampling defines them.
 *
 *     mask, banned -> bias -> penalties -> / T -> min-p -> top-k -> top-p -> argmax(y + G)
 *
 * A greedy row is one pass over its logits. A sampled row takes a second one or two; nothing sorts the
 * vocabulary:
 *   - top-k and top-p look for the last value they keep between brackets taken from small samples
 *     (`find_cut`; Floyd and Rivest 1975, "Expected time bounds for selection"), over the fixed-point weights
 *     of filters.py: integers, whose sum no order of additions changes;
 *   - the noise is Philox's for whole vectors of tokens, but its two logarithms are taken only where a token
 *     could beat the best so far. With u uniform and G = -log(-log(u)):
 *         y + G >= best   is   -log(u) <= exp(y - best)   and so   1 - u <= exp(y - best),
 *     which is decided on the exponent's bits (`can_win`). About a dozen tokens of a vocabulary pass.
 *
 * What decides a token is computed as filters.py and philox.py do: fp32 logits, the noise in doubles, ties to
 * the lowest id; only exp's last bit may differ. A row is computed by one thread and knows no other row.
 * Logits are only read; nothing is kept but the zeros in the caller's scratch.
 */
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { BLOCK = 1024, SAMPLE = 64, SPREAD = 8, ROUNDS = 10, PADDING = 64 };
enum { UNUSABLE = -1, NONE_LEFT = -2, NO_SUCH_TOKEN = -3 };
#define MAX_GUMBEL 36.74 /* as in philox.py */
#define LOG2E 1.4426950408889634

/* One row, packed by engine/sampling/native.py: every field has eight bytes. */
typedef struct {
    double temperature, top_p, lowest; /* lowest: log(min_p), -inf if off */
    double repetition, frequency, presence;
    uint64_t seed;
    int64_t top_k, greedy, penalizes; /* top_k 0: off */
    const int32_t *bias_ids; /* distinct */
    const float *bias;
    int64_t num_bias;
    uint64_t position;
    const int32_t *tokens; /* prompt and output; empty, like `draft`, unless it penalizes */
    int64_t num_tokens, num_prompt;
    const int32_t *draft;
    int64_t num_draft;
    const int32_t *banned;
    int64_t num_banned;
    const uint32_t *mask; /* a bit a token that may be drawn, or NULL: all may */
} row;

/* Parts of the caller's scratch, each with room for a vocabulary and a vector more. */
typedef struct {
    float *edited;   /* a row's logits after bans, bias and penalties */
    float *y;        /* scaled logits of the tokens that are looked at, by rising id, */
    int32_t *ids;    /* and their ids */
    float *close[2]; /* values close to a cut */
    float *peaks;    /* see `survey` */
    int32_t *marks;  /* all zero between rows */
} buffers;
enum { NUM_BUFFERS = 7 };

static size_t room(int vocab) { return ((size_t)vocab + BLOCK - 1) / BLOCK * BLOCK + PADDING; }

static buffers parts(void *scratch, int vocab) {
    float *at[NUM_BUFFERS];
    for (int i = 0; i < NUM_BUFFERS; i++) at[i] = (float *)scratch + i * room(vocab);
    return (buffers){at[0], at[1], (int32_t *)at[2], {at[3], at[4]}, at[5], (int32_t *)at[6]};
}

static inline __mmask16 first_lanes(int count) {
    return count >= 16 ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
}

/* x[at .. at + 16), -inf from n on. */
static inline __m512 load(const float *x, int at, int n) {
    if (at + 16 <= n) return _mm512_loadu_ps(x + at);
    return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first_lanes(n - at), x + at);
}

/* Those of v under the mask, at the front of `to`, which has room for sixteen. Returns their number. */
static inline int pack(float *to, __mmask16 mask, __m512 v) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(mask, v));
    return __builtin_popcount(mask);
}

/* ---- one look at a row --------------------------------------------------------------------------------
 *
 * Returns the maximum of x [n]: finite, unless x holds a NaN or +inf, or nothing but -inf. `peaks` receives
 * sixteen maxima for each BLOCK of x, one a lane: a search for large values reads those first. */
static float survey(const float *x, int n, float *peaks) {
    /* A sum is NaN if a summand is: cheaper than to compare each. -inf may be among them. */
    __m512 sum[4], high[4], top = _mm512_set1_ps(-INFINITY);
    for (int j = 0; j < 4; j++) sum[j] = _mm512_setzero_ps();
    for (int b = 0; b < n; b += BLOCK, peaks += 16) {
        for (int j = 0; j < 4; j++) high[j] = _mm512_set1_ps(-INFINITY);
        if (b + BLOCK <= n)
            for (int i = b; i < b + BLOCK; i += 64)
                for (int j = 0; j < 4; j++) {
                    __m512 v = _mm512_loadu_ps(x + i + 16 * j);
                    high[j] = _mm512_max_ps(high[j], v);
                    sum[j] = _mm512_add_ps(sum[j], v);
                }
        else
            for (int i = b; i < n; i += 16) {
                __m512 v = load(x, i, n);
                high[0] = _mm512_max_ps(high[0], v);
                sum[0] = _mm512_add_ps(sum[0], v);
            }
        high[0] = _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]));
        _mm512_storeu_ps(peaks, high[0]);
        top = _mm512_max_ps(top, high[0]);
    }
    sum[0] = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    if (isnan(_mm512_reduce_add_ps(sum[0]))) /* or an overflow met -inf */
        for (int i = 0; i < n; i++)
            if (isnan(x[i])) return NAN;
    return _mm512_reduce_max_ps(top);
}

/* The first index of `value`, which is the maximum of x. */
static int first_of(const float *x, int n, float value, const float *peaks) {
    __m512 wanted = _mm512_set1_ps(value);
    int b = 0;
    while (!_mm512_cmp_ps_mask(_mm512_loadu_ps(peaks + b / 64), wanted, _CMP_EQ_OQ)) b += BLOCK;
    for (int i = b;; i += 16) {
        __mmask16 found = _mm512_cmp_ps_mask(load(x, i, n), wanted, _CMP_EQ_OQ);
        if (found) return i + __builtin_ctz(found);
    }
}

/* ---- bans, bias, penalties ---------------------------------------------------------------------------- */
typedef struct {
    int32_t *marks, *seen; /* a mark is 1 + 2 * (how often in the output), 0 if the token never occurs */
    int num_seen, failed;
} history;

static void note(history *h, const int32_t *tokens, int64_t count, int in_answer, int vocab) {
    for (int64_t i = 0; i < count && !h->failed; i++) {
        int32_t t = tokens[i];
        if ((h->failed = (uint32_t)t >= (uint32_t)vocab)) return;
        h->seen[h->num_seen] = t;
        h->num_seen += !h->marks[t];
        h->marks[t] = (h->marks[t] | 1) + 2 * in_answer;
    }
}

/* Copy x [vocab] to where it can be changed; what the mask leaves out becomes -inf. */
static void copy(const row *r, const float *x, int vocab, float *to) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    for (int i = 0; i < vocab; i += 16) {
        __m512 v = load(x, i, vocab);
        if (r->mask) v = _mm512_mask_mov_ps(none, (__mmask16)(r->mask[i / 32] >> i % 32), v);
        _mm512_storeu_ps(to + i, v);
    }
}

/* Change x as edit_logits does, with `bans` or without. Returns 0, or NO_SUCH_TOKEN. `seen` is work space. */
static int edit(const row *r, int bans, float *x, int vocab, int32_t *marks, int32_t *seen) {
    for (int64_t i = 0; i < r->num_bias; i++) {
        if ((uint32_t)r->bias_ids[i] >= (uint32_t)vocab) return NO_SUCH_TOKEN;
        x[r->bias_ids[i]] += r->bias[i];
    }
    for (int64_t i = 0; i < (bans ? r->num_banned : 0); i++) {
        if ((uint32_t)r->banned[i] >= (uint32_t)vocab) return NO_SUCH_TOKEN;
        x[r->banned[i]] = -INFINITY;
    }
    if (!r->penalizes) return 0;
    history h = {marks, seen, 0, 0};
    note(&h, r->tokens, r->num_prompt, 0, vocab);
    note(&h, r->tokens + r->num_prompt, r->num_tokens - r->num_prompt, 1, vocab);
    note(&h, r->draft, r->num_draft, 1, vocab);
    const float repetition = (float)r->repetition, presence = (float)r->presence;
    for (int i = 0; i < h.num_seen; i++) {
        int32_t t = seen[i], count = marks[t] >> 1;
        float value = x[t] > 0 ? x[t] / repetition : x[t] * repetition;
        __asm__("" : "+x"(value)); /* rounded here: fused with the subtraction it would not be */
        value -= (float)(r->frequency * count);
        x[t] = count ? value - presence : value;
        marks[t] = 0;
    }
    return h.failed ? NO_SUCH_TOKEN : 0;
}

/* ---- the value at which top-k or top-p cuts -------------------------------------------------------------
 *
 * Tokens are ordered by (value falling, id rising); a cut keeps those above `value` and the first `ties` of
 * those that equal it: `kept` together. */
typedef struct {
    float value;
    int64_t ties, kept;
} cut;
#define ALL INT64_MAX

/* What a value counts for: exp(v - top) in fixed point, or 1. */
typedef struct {
    float top;
    int counting;
} measure;
static const measure by_number = {0, 1};

/* 2^40 e^x, x <= 0: within 1 unit in the last place where it is at least 1, below 1 elsewhere. After Cephes'
 * expf. The exponent comes out of the lowest bits of a sum with a large number. */
static inline __m512 scaled_exp(__m512 x) {
    const __m512 large = _mm512_set1_ps(0x1.8p23f + 40);
    x = _mm512_max_ps(x, _mm512_set1_ps(-64.0f));
    __m512 n = _mm512_fmadd_ps(x, _mm512_set1_ps((float)LOG2E), large);
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
    n = _mm512_sub_ps(n, large);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), exponent));
}

/* Weights of sixteen values, eight in each half. */
static inline void weigh(measure m, __m512 v, __m512i weight[2]) {
    if (m.counting) {
        weight[0] = weight[1] = _mm512_set1_epi64(1);
    } else {
        __m512 e = scaled_exp(_mm512_sub_ps(v, _mm512_set1_ps(m.top)));
        weight[0] = _mm512_cvttps_epi64(_mm512_castps512_ps256(e));
        weight[1] = _mm512_cvttps_epi64(_mm512_extractf32x8_ps(e, 1));
    }
}

typedef struct {
    int64_t above, middle, all; /* summed weights */
    int num_above, num;         /* how many are above, and in the middle */
} shares;

/* Weigh v [n] above and within [lo, hi]; `middle` receives what lies within. */
static shares split(measure m, const float *v, int n, float lo, float hi, float *middle) {
    __m512i all[2], above[2], within[2], weight[2];
    for (int j = 0; j < 2; j++) all[j] = above[j] = within[j] = _mm512_setzero_si512();
    shares s = {0, 0, 0, 0, 0};
    for (int i = 0; i < n; i += 16) {
        __m512 x = load(v, i, n);
        __mmask16 over = _mm512_cmp_ps_mask(x, _mm512_set1_ps(hi), _CMP_GT_OQ);
        __mmask16 in = _mm512_mask_cmp_ps_mask(~over, x, _mm512_set1_ps(lo), _CMP_GE_OQ);
        if (lo == -INFINITY) in &= first_lanes(n - i);
        s.num_above += __builtin_popcount(over);
        s.num += pack(middle + s.num, in, x);
        if (m.counting) continue;
        weigh(m, x, weight); /* nothing beyond the end */
        for (int j = 0; j < 2; j++) {
            all[j] = _mm512_add_epi64(all[j], weight[j]);
            above[j] = _mm512_mask_add_epi64(above[j], over >> 8 * j, above[j], weight[j]);
            within[j] = _mm512_mask_add_epi64(within[j], in >> 8 * j, within[j], weight[j]);
        }
    }
    s.all = m.counting ? n : _mm512_reduce_add_epi64(_mm512_add_epi64(all[0], all[1]));
    s.above = m.counting ? s.num_above : _mm512_reduce_add_epi64(_mm512_add_epi64(above[0], above[1]));
    s.middle = m.counting ? s.num : _mm512_reduce_add_epi64(_mm512_add_epi64(within[0], within[1]));
    return s;
}

/* Copy those of v [n] above `bound`, or those below it. Returns their number. */
static int beyond(const float *v, int n, float bound, int above, float *to) {
    int num = 0;
    for (int i = 0; i < n; i += 16) {
        __m512 x = load(v, i, n), limit = _mm512_set1_ps(bound);
        __mmask16 below = _mm512_mask_cmp_ps_mask(first_lanes(n - i), x, limit, _CMP_LT_OQ);
        num += pack(to + num, above ? _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ) : below, x);
    }
    return num;
}

/* Some or all of v [n], falling, and their weights; at most SAMPLE of them. Returns how many. */
static int sorted_sample(measure m, const float *v, int n, float *sorted, int64_t *weight) {
    int size = n < SAMPLE ? n : SAMPLE;
    float sample[SAMPLE];
    for (int i = 0; i < SAMPLE; i++) sample[i] = i < size ? v[(int64_t)i * n / size] : -INFINITY;
    for (int i = 0; i < size; i++) { /* each goes to its rank */
        __m512 x = _mm512_set1_ps(sample[i]);
        uint64_t larger = 0, equal = 0;
        for (int j = 0; j < SAMPLE; j += 16) {
            __m512 other = _mm512_loadu_ps(sample + j);
            larger |= (uint64_t)_mm512_cmp_ps_mask(other, x, _CMP_GT_OQ) << j;
            equal |= (uint64_t)_mm512_cmp_ps_mask(other, x, _CMP_EQ_OQ) << j;
        }
        sorted[__builtin_popcountll(larger | (equal & ((1ull << i) - 1)))] = sample[i];
    }
    for (int i = 0; i < size; i += 16) {
        __m512i w[2];
        weigh(m, load(sorted, i, size), w);
        _mm512_storeu_si512(weight + i, w[0]);
        _mm512_storeu_si512(weight + i + 8, w[1]);
    }
    return size;
}

/* Where, going down v [n], the summed weight reaches `share` of all of it; by number, where it reaches the
 * number `share`. n at least 1.
 *
 *     | above: weighed and counted | middle: looked at again | below: never needed |        values fall ->
 */
static cut find_cut(measure m, const float *v, int n, double share, float *close[2]) {
    float sorted[SAMPLE];
    int64_t weight[SAMPLE], above = 0, num_above = 0;
    int64_t all = m.counting ? n : 0; /* weight of v, 0: not known yet */
    double target = m.counting ? share : 0;
    int spread = SPREAD;
    for (int round = 0;; round++) {
        int size = sorted_sample(m, v, n, sorted, weight), i = 0;
        int64_t total = 0, sum = 0;
        for (int j = 0; j < size; j++) total += weight[j];
        if (n <= SAMPLE) {
            if (!target) target = fmax(1, share * (double)total);
            while ((double)(above + (sum += weight[i])) < target && i < n - 1) i++;
            int first = i, last = i;
            while (first > 0 && sorted[first - 1] == sorted[i]) first--;
            while (last < n - 1 && sorted[last + 1] == sorted[i]) last++;
            return (cut){sorted[i], i == last ? ALL : i + 1 - first, num_above + i + 1};
        }
        /* Where the sample would cut, and some to both sides: few values lie between. */
        double part = all ? (target - (double)above) / (double)all : share;
        while ((double)(sum += weight[i]) < part * (double)total && i < size - 1) i++;
        float hi = i < spread ? INFINITY : sorted[i - spread];
        float lo = i + spread >= size ? -INFINITY : sorted[i + spread];
        float *middle = close[round & 1];
        shares s = split(m, v, n, lo, hi, middle);
        if (!target) target = fmax(1, share * (double)s.all);
        if ((double)(above + s.above) >= target) { /* the bracket lies too low */
            all = s.above;
            n = beyond(v, n, hi, 1, middle);
        } else if ((double)(above + s.above + s.middle) < target) { /* too high */
            above += s.above + s.middle;
            num_above += s.num_above + s.num;
            all = s.all - s.above - s.middle;
            n = beyond(v, n, lo, 0, middle);
        } else {
            above += s.above;
            num_above += s.num_above;
            all = s.middle;
            if (lo == hi) { /* all equal */
                double each = (double)s.middle / s.num;
                int64_t ties = (int64_t)fmax(1, ceil((target - (double)above) / each));
                if (ties > s.num) ties = s.num;
                return (cut){lo, ties < s.num ? ties : ALL, num_above + ties};
            }
            /* Many equal values can fill any bracket: then one value is tried, with all its equals. */
            spread = s.num > n / 2 ? 0 : SPREAD;
            n = s.num;
        }
        v = middle;
    }
}

/* x / T for |y| above 2^-100, correctly rounded, in a quarter of a division's time: each step corrects the
 * quotient by its remainder, which is exact (Markstein 1990). `inverse` is 1 / T, rounded. */
static inline __m512 divided(__m512 x, __m512 T, __m512 inverse) {
    __m512 y = _mm512_mul_ps(x, inverse);
    y = _mm512_fmadd_ps(_mm512_fnmadd_ps(y, T, x), inverse, y);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(y, T, x), inverse, y);
}

/* List the tokens of x [n] that a cut and min-p keep: y = x / T in b->y, and their ids in b->ids if `ids`.
 * Returns their number. */
static int collect(const row *r, const float *x, int n, float top, cut c, int ids, buffers *b) {
    const float T = (float)r->temperature, min_p = (float)r->lowest;
    /* Most x are refused as they are; the margin is far more than rounding. */
    double least = fmax(fmax(c.value, (double)top + min_p), -FLT_MAX);
    least = least * T - fabs(least) * T * 0x1p-20 - FLT_MIN;
    const __m512 floor = _mm512_set1_ps(fmaxf((float)least, -FLT_MAX)), value = _mm512_set1_ps(c.value);
    const __m512 divisor = _mm512_set1_ps(T), inverse = _mm512_set1_ps(1 / T);
    const __m512 high = _mm512_set1_ps(top), lowest = _mm512_set1_ps(min_p);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    int num = 0;
    for (int i = 0; i < n; i += 16) {
        __m512 v = load(x, i, n);
        __mmask16 maybe = _mm512_cmp_ps_mask(v, floor, _CMP_GE_OQ);
        if (!maybe) continue;
        v = divided(v, divisor, inverse);
        maybe = _mm512_mask_cmp_ps_mask(maybe, _mm512_sub_ps(v, high), lowest, _CMP_GE_OQ);
        maybe = _mm512_mask_cmp_ps_mask(maybe, v, value, _CMP_GE_OQ);
        if (c.ties != ALL) {
            unsigned equal = _mm512_mask_cmp_ps_mask(maybe, v, value, _CMP_EQ_OQ);
            unsigned kept = _pdep_u32(first_lanes(c.ties < 16 ? (int)c.ties : 16), equal); /* lowest ids */
            c.ties -= __builtin_popcount(kept);
            maybe &= (__mmask16)(kept | ~equal);
        }
        if (ids) {
            __m512i id = _mm512_add_epi32(_mm512_set1_epi32(i), lanes);
            pack((float *)b->ids + num, maybe, _mm512_castsi512_ps(id));
        }
        num += pack(b->y + num, maybe, v);
    }
    return num;
}

/* ---- the draw ------------------------------------------------------------------------------------------ */
typedef struct {
    __m512i keys[ROUNDS][2], position[2]; /* of Philox, a copy in each 64-bit lane */
    float cut, min_p;                     /* kept: y > cut, or y == cut up to the id `last_tie`; */
    int last_tie;                         /* and y - top >= min_p */
    float top, best;                      /* the largest y; the best score so far */
    int token;                            /* of the best score */
    float T;                              /* what is looked at are values v = y * T */
    float slope, offset, least;           /* see `can_win`; v below `least` cannot win */
} race;

/* Have the next tests ask for what `score` leaves open. */
static void lead(race *r, float score, int token) {
    r->best = score;
    r->token = token;
    /* Far more than the rounding of slope, offset, score and division together. */
    double margin = (fabs(score) + fabs(r->top) + 64) * 0x1p-20 + 1e-3;
    r->slope = (float)(LOG2E / r->T * 0x1p23);
    r->offset = (float)((127 + 32 + margin - score * LOG2E) * 0x1p23);
    double least = fmax(fmax(score - MAX_GUMBEL, r->cut), (double)r->top + r->min_p) - margin;
    r->least = (float)fmax(least * r->T - fabs(least) * r->T * 0x1p-20 - FLT_MIN, -FLT_MAX);
}

static race start(const row *r, float top) {
    race s = {.cut = -INFINITY, .min_p = -INFINITY, .last_tie = INT32_MAX, .top = top, .T = 1};
    uint32_t k0 = (uint32_t)r->seed, k1 = (uint32_t)(r->seed >> 32);
    for (int i = 0; i < ROUNDS; i++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        s.keys[i][0] = _mm512_set1_epi64(k0);
        s.keys[i][1] = _mm512_set1_epi64(k1);
    }
    s.position[0] = _mm512_set1_epi64((uint32_t)r->position);
    s.position[1] = _mm512_set1_epi64((int64_t)(r->position >> 32));
    lead(&s, -FLT_MAX, INT32_MAX);
    return s;
}

/* Philox4x32-10 of eight counters {block, position, domain 0}, one a 64-bit lane. Each word is the lower half
 * of its lane; upper halves hold rubbish, which multiplication ignores. */
static inline void philox(const race *r, __m512i block, __m512i word[4]) {
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    __m512i c0 = block, c1 = r->position[0], c2 = r->position[1], c3 = _mm512_setzero_si512();
    for (int i = 0; i < ROUNDS; i++) {
        __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, r->keys[i][0], 0x96); /* xor of three */
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, r->keys[i][1], 0x96);
        c1 = p1, c3 = p0;
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

/* Which of sixteen tokens could reach the best score, from values v and the upper words of their u.
 *
 * With d = 2^32 - 1 - upper: d <= 2^32 (1 - u), so it takes log2(d) <= 32 + (y - best) log2(e). A float's
 * bits over 2^23, less 127, are at most its log2, and at least that less 0.09 (Mitchell 1962). */
static inline __mmask16 can_win(const race *r, __m512 v, __m512i upper) {
    __m512 d = _mm512_cvtepu32_ps(_mm512_ternarylogic_epi32(upper, upper, upper, 0x55)); /* not */
    __m512 log = _mm512_cvtepi32_ps(_mm512_castps_si512(d));
    __m512 bound = _mm512_fmadd_ps(v, _mm512_set1_ps(r->slope), _mm512_set1_ps(r->offset));
    return _mm512_cmp_ps_mask(log, bound, _CMP_LE_OQ);
}

/* The exact score of one token. */
static void offer(race *r, float y, int token, uint32_t upper, uint32_t lower) {
    if (y < r->cut || (y == r->cut && token > r->last_tie) || y - r->top < r->min_p) return;
    double u = ((double)((uint64_t)upper << 20 | lower >> 12) + 0.5) * 0x1p-52;
    float score = y + (float)-log(-log(u));
    if (score > r->best || (score == r->best && token < r->token)) lead(r, score, token);
}

/* The same for the tokens under the mask. */
static void offer_some(race *r, __mmask16 mask, __m512 v, __m512i ids, __m512i upper, __m512i lower) {
    float y[16];
    int32_t id[16];
    uint32_t up[16], low[16];
    _mm512_storeu_ps(y, v);
    _mm512_storeu_si512(id, ids);
    _mm512_storeu_si512(up, upper);
    _mm512_storeu_si512(low, lower);
    for (; mask; mask &= mask - 1) {
        int i = __builtin_ctz(mask);
        offer(r, y[i] / r->T, id[i], up[i], low[i]);
    }
}

/* A list of n tokens with values y. One counter for each token. */
static void draw_list(race *r, const float *y, const int32_t *ids, int n) {
    const __m512i three = _mm512_set1_epi32(3);
    for (int i = 0; i < n; i += 16) {
        __mmask16 all = first_lanes(n - i);
        __m512 v = load(y, i, n);
        all = _mm512_mask_cmp_ps_mask(all, v, _mm512_set1_ps(r->least), _CMP_GE_OQ);
        if (!all) continue;
        __m512i id = _mm512_maskz_loadu_epi32(all, ids + i), lane = _mm512_and_si512(id, three);
        __m512i block = _mm512_srli_epi32(id, 2), half[2][4], word[4];
        philox(r, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(block)), half[0]);
        philox(r, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(block, 1)), half[1]);
        for (int j = 0; j < 4; j++)
            word[j] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(half[0][j])),
                                         _mm512_cvtepi64_epi32(half[1][j]), 1);
        __m512i upper = word[0], lower = word[1];
        for (int j = 1; j < 4; j++) {
            __mmask16 at = _mm512_cmpeq_epi32_mask(lane, _mm512_set1_epi32(j));
            upper = _mm512_mask_mov_epi32(upper, at, word[j]);
            lower = _mm512_mask_mov_epi32(lower, at, word[(j + 1) & 3]);
        }
        __mmask16 some = all & can_win(r, v, upper);
        if (some) offer_some(r, some, v, id, upper, lower);
    }
}

/* All tokens of x [n], undivided. A counter's words serve four tokens. */
static void draw_row(race *r, const float *x, int n) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); /* see below */
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int i = 0; i < n; i += 64) {
        __m512 v[4];
        for (int j = 0; j < 4; j++) v[j] = load(x, i + 16 * j, n);
        __m512 high = _mm512_max_ps(_mm512_max_ps(v[0], v[1]), _mm512_max_ps(v[2], v[3]));
        if (!_mm512_cmp_ps_mask(high, _mm512_set1_ps(r->least), _CMP_GE_OQ)) continue;
        for (int j = 0; j < 4; j += 2) {
            /* Blocks b0 b4 b1 b5 ... of four tokens: pairs of words, then pairs of pairs within 128 bits,
             * give the words of b0 b1 b2 b3 and of b4 b5 b6 b7 in the order of their tokens. */
            __m512i w[4], upper[2];
            philox(r, _mm512_add_epi64(_mm512_set1_epi64(i / 4 + 4 * j), order), w);
            __m512i w01 = _mm512_mask_shuffle_epi32(w[0], 0xaaaa, w[1], _MM_PERM_CCAA);
            __m512i w23 = _mm512_mask_shuffle_epi32(w[2], 0xaaaa, w[3], _MM_PERM_CCAA);
            upper[0] = _mm512_unpacklo_epi64(w01, w23);
            upper[1] = _mm512_unpackhi_epi64(w01, w23);
            for (int h = 0; h < 2; h++) {
                __mmask16 some = can_win(r, v[j + h], upper[h]);
                if (some) /* a token's lower word is its neighbour's upper */
                    offer_some(r, some, v[j + h],
                               _mm512_add_epi32(_mm512_set1_epi32(i + 16 * (j + h)), count), upper[h],
                               _mm512_shuffle_epi32(upper[h], _MM_PERM_ADCB));
            }
        }
    }
}

/* ---- a row -------------------------------------------------------------------------------------------- */

/* The token of x [n], which has bans, bias and penalties in it and a finite maximum `top_x`. */
static int32_t sample(const row *r, const float *x, int n, float top_x, buffers *b) {
    int32_t best = first_of(x, n, top_x, b->peaks);
    const float T = (float)r->temperature, top = top_x / T;
    if (r->greedy || !isfinite(top)) return best; /* overflown: of equal infinities the first wins */
    race s = start(r, top);
    draw_list(&s, &top, &best, 1); /* always kept, and mostly hard to beat */

    const int top_k = r->top_k > 0 && r->top_k < n ? (int)r->top_k : 0;
    cut c = {-INFINITY, ALL, 0};
    if (top_k) {
        /* k of the peaks are k tokens: the k-th token is no smaller than the k-th peak. */
        const int num_peaks = (n + BLOCK - 1) / BLOCK * 16;
        if (2 * top_k <= num_peaks)
            c.value = find_cut(by_number, b->peaks, num_peaks, top_k, b->close).value / T;
        int num = collect(r, x, n, top, c, 0, b);
        if (top_k < num) c = find_cut(by_number, b->y, num, top_k, b->close);
    }
    if (r->top_p < 1) {
        if (!top_k) c.value = top - 28; /* what is less likely weighs less than 2^-40, which is nothing */
        int num = collect(r, x, n, top, c, 0, b);
        cut inner = num > 1 ? find_cut((measure){top, 0}, b->y, num, r->top_p, b->close) : c;
        /* All ties of those that top-k left: not more than it left. */
        if (inner.ties == ALL && inner.value == c.value) inner.ties = c.ties;
        c = inner;
    }
    s.min_p = (float)r->lowest;
    if ((top_k || r->top_p < 1 || s.min_p > -INFINITY) && c.kept <= n / 4) {
        int num = collect(r, x, n, top, c, 1, b);
        if (num <= n / 4) {
            draw_list(&s, b->y, b->ids, num);
            return s.token;
        }
    }
    /* Many are left: a counter for four neighbours costs less than one for each that is kept. */
    s.cut = c.value;
    if (c.ties != ALL) {
        int i = collect(r, x, n, top, c, 1, b) - 1;
        while (b->y[i] > c.value) i--;
        s.last_tie = b->ids[i];
    }
    s.T = T;
    lead(&s, s.best, s.token);
    draw_row(&s, x, n);
    return s.token;
}

/* Bytes of scratch that a call with this vocabulary needs, 64-byte aligned and zero before the first. */
size_t diptych_sample_scratch(int vocab) { return NUM_BUFFERS * room(vocab) * sizeof(float); }

/* tokens[i], for i in [first, last), of logits + i * stride, fp32 [vocab]. Where there is none: UNUSABLE if
 * the logits have no finite maximum, NONE_LEFT if they have none after bans and bias, NO_SUCH_TOKEN if a ban,
 * bias or history names a token outside the vocabulary. Calls at the same time need a scratch each. */
void diptych_sample(const float *logits, int64_t stride, int vocab, const row *rows, int first, int last,
                    int32_t *tokens, void *scratch) {
    buffers b = parts(scratch, vocab);
    for (int i = first; i < last; i++) {
        const row *r = rows + i;
        const float *x = logits + i * stride;
        float top = survey(x, vocab, b.peaks);
        tokens[i] = UNUSABLE;
        if (!isfinite(top)) continue;
        if (r->num_bias || r->num_banned || r->penalizes || r->mask) {
            int bans = r->num_banned > 0;
            for (;; bans = 0) {
                copy(r, x, vocab, b.edited);
                tokens[i] = edit(r, bans, b.edited, vocab, b.marks, b.ids);
                if (tokens[i]) break;
                top = survey(b.edited, vocab, b.peaks);
                if (isfinite(top)) break;
                tokens[i] = NONE_LEFT;
                if (!bans || !r->mask) break; /* where a grammar allows nothing else, bans give way */
            }
            if (tokens[i]) continue;
            x = b.edited;
        }
        tokens[i] = sample(r, x, vocab, top, &b);
    }
}
