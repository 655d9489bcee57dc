/* SPDX-License-Identifier: Apache-2.0
 * expected_gradient.h - what wan_attn_backward must give, in double precision from the textbook's
 * formulas, and how far a kernel's arithmetic may be from it. Shares no code with csrc/.
 *
 *   P = softmax(scale Q K^T)   dP = dO V^T   delta = sum_j P dP   dS = P (dP - delta + dlse)
 *   dQ = scale dS K            dK = scale dS^T Q                  dV = P^T dO
 *
 * Neither the out nor the lse of a forward call enters these. Every step carries a bound, made from
 * the numbers of the call alone, by what may happen at worst:
 *
 *   a sum of n products     (n + 16) units of float32 of the sum of their sizes, in whatever order
 *                           they are added, and what its factors are off by times the others' sizes
 *   log P of a key          what its score is off by, and what lse is: as far as the lse that is
 *                           handed over is from the true one, or as one made of such scores can be,
 *                           whichever is more, since a kernel may do either; likewise delta
 *   bfloat16 rows           a unit of bfloat16 of each P and dS, and of Q, K, dO that are wider
 *
 * So a gradient of exactly 0 has the noise of the terms that cancel in it; one that no pair of a
 * row and a key adds to has none, nor the weight of a single key. A bound beyond float32's range
 * means that nothing is known.
 */
#ifndef WAN_ATTN_TESTS_EXPECTED_GRADIENT_H
#define WAN_ATTN_TESTS_EXPECTED_GRADIENT_H

#include "rounding.h"

/* What a kernel's number can be, the stronger word last: a sum is what its strongest term is. */
typedef enum certainty { A_NUMBER, ANYTHING, NOT_FINITE, IS_NAN } certainty;

typedef struct estimate {
    double value, error;
    certainty is;
} estimate;

/* A sum of products; size: of their absolute values. */
typedef struct product_sum {
    double value, size, error;
    int64_t count;
    certainty is;
} product_sum;

/* Dense copies of the operands. lse, dlse: [batch, heads, seqlen_q]; dlse may be NULL. */
typedef struct gradient_inputs {
    const wan_attn_params *p;
    double *q, *k, *v, *out, *dout, *lse, *dlse;
    int32_t dout_dtype;
    arithmetic in;
} gradient_inputs;

/* Shaped like q, k and v. */
typedef struct gradient_sums {
    product_sum *dq, *dk, *dv;
} gradient_sums;

static const double NEARLY_ALL = FLT_MAX / 4; /* beyond it, sums may overflow on the way */

static double larger(double a, double b) { return a > b ? a : b; }
static double smaller(double a, double b) { return a < b ? a : b; }

static certainty product_is(const estimate *a, const estimate *b) {
    certainty stronger = a->is > b->is ? a->is : b->is;
    int is_times_zero = (a->value == 0.0 && a->error == 0.0 && a->is == A_NUMBER) ||
                        (b->value == 0.0 && b->error == 0.0 && b->is == A_NUMBER);
    return stronger == NOT_FINITE && is_times_zero ? IS_NAN : stronger;
}

static void add_product(product_sum *to, const estimate *a, const estimate *b, arithmetic in) {
    /* bfloat16's instructions take what is not normal for 0. */
    const double tiniest_kept = in == IN_BF16 ? FLT_MIN : 0x1p-148;
    certainty is = product_is(a, b);
    to->is = is > to->is ? is : to->is;
    to->count++;
    if (is != A_NUMBER)
        return;
    double of_a = fabs(a->value), of_b = fabs(b->value);
    to->value += a->value * b->value;
    to->size += of_a * of_b;
    to->error += of_a * b->error + a->error * (of_b + b->error);
    if (of_a + a->error > 0.0 && of_b + b->error > 0.0)
        to->error += tiniest_kept * (1.0 + of_a + of_b);
}

static estimate estimate_of(const product_sum *s) {
    estimate e = {s->value, 0.0, s->is};
    e.error = s->error + (double)(s->count + 16) * UNIT_F32 * (s->size + s->error);
    if (e.is == A_NUMBER && !(s->size + e.error < NEARLY_ALL))
        e.is = ANYTHING;
    return e;
}

/* A number of an operand of this dtype, as products take it. */
static estimate operand_number(double x, int32_t dtype, arithmetic in) {
    estimate e = {x, 0.0, isnan(x) ? IS_NAN : isinf(x) ? NOT_FINITE : A_NUMBER};
    if (in == IN_BF16 && dtype != WAN_ATTN_BF16 && e.is == A_NUMBER)
        e.error = UNIT_BF16 * fabs(x);
    return e;
}

static void operand_numbers(const double *x, int64_t count, int32_t dtype, arithmetic in,
                            estimate *to) {
    for (int64_t d = 0; d < count; d++)
        to[d] = operand_number(x[d], dtype, in);
}

static product_sum inner_product(const estimate *a, const estimate *b, int64_t count,
                                 arithmetic in) {
    product_sum sum = {0};
    for (int64_t d = 0; d < count; d++)
        add_product(&sum, &a[d], &b[d], in);
    return sum;
}

static double scale_of_scores(const wan_attn_params *p) {
    return p->has_softmax_scale ? p->softmax_scale : 1.0 / sqrt((double)p->q.shape[3]);
}

/* The nearest finite float32, which kernels multiply by. */
static double scale_as_float(const wan_attn_params *p) {
    double scale = scale_of_scores(p);
    return fabs(scale) > FLT_MAX ? copysign(FLT_MAX, scale) : (double)(float)scale;
}

/* What is known of the keys that a row sees, and of the row. */
typedef struct gradient_row {
    int64_t key[MOST_KEYS], count;
    double score[MOST_KEYS], off[MOST_KEYS]; /* a score may be infinite or NaN */
    estimate weight[MOST_KEYS], dp[MOST_KEYS], ds[MOST_KEYS];
    estimate q[MOST_HEAD_DIM], dout[MOST_HEAD_DIM];
    double lse, lse_off, worst; /* worst: of the logarithm of a weight that counts */
    double top, dlse;
    int overflows;
} gradient_row;

static int64_t row_at(const wan_attn_params *p, int64_t b, int64_t h, int64_t i) {
    return (b * p->q.shape[1] + i) * p->q.shape[2] + h;
}

static int64_t key_at(const wan_attn_params *p, int64_t b, int64_t h, int64_t j) {
    int64_t heads_k = p->k.shape[2];
    return (b * p->k.shape[1] + j) * heads_k + h / (p->q.shape[2] / heads_k);
}

static int64_t lse_at(const wan_attn_params *p, int64_t b, int64_t h, int64_t i) {
    return (b * p->q.shape[2] + h) * p->q.shape[1] + i;
}

static void find_score(const gradient_inputs *x, const double *q, const double *k, gradient_row *r,
                       int64_t n) {
    int64_t head_dim = x->p->q.shape[3];
    double scale = scale_of_scores(x->p), as_float = scale_as_float(x->p), sum = 0.0;
    estimate of_k[MOST_HEAD_DIM];
    operand_numbers(k, head_dim, x->p->k.dtype, x->in, of_k);
    product_sum products = inner_product(r->q, of_k, head_dim, x->in);
    estimate e = estimate_of(&products);
    if (e.is >= NOT_FINITE) {
        for (int64_t d = 0; d < head_dim; d++)
            sum += q[d] * k[d];
        r->score[n] = sum * as_float;
        return;
    }
    r->score[n] = e.value * scale;
    r->off[n] = fabs(scale) * e.error + fabs(scale - as_float) * fabs(e.value) +
                8 * UNIT_F32 * fabs(r->score[n]);
    r->overflows |= e.is == ANYTHING || !(fabs(r->score[n]) + r->off[n] < NEARLY_ALL);
}

/* Scores, dP, and the true lse. */
static void look_at_keys(const gradient_inputs *x, int64_t b, int64_t h, int64_t i,
                         gradient_row *r) {
    const wan_attn_params *p = x->p;
    int64_t head_dim = p->q.shape[3], at = row_at(p, b, h, i) * head_dim;
    estimate of_v[MOST_HEAD_DIM];
    double sum = 0.0;
    operand_numbers(x->q + at, head_dim, p->q.dtype, x->in, r->q);
    operand_numbers(x->dout + at, head_dim, x->dout_dtype, x->in, r->dout);
    r->count = 0, r->overflows = 0, r->top = -INFINITY;
    for (int64_t j = 0; j < p->k.shape[1]; j++) {
        int64_t n = r->count, of_key = key_at(p, b, h, j) * head_dim;
        if (!sees(p, b, i, j))
            continue;
        r->key[r->count++] = j;
        find_score(x, x->q + at, x->k + of_key, r, n);
        operand_numbers(x->v + of_key, head_dim, p->v.dtype, x->in, of_v);
        product_sum dp = inner_product(r->dout, of_v, head_dim, x->in);
        r->dp[n] = estimate_of(&dp);
        if (r->score[n] != r->score[n] || r->top != r->top)
            r->top = NAN;
        else
            r->top = larger(r->top, r->score[n]);
    }
    for (int64_t n = 0; n < r->count; n++)
        sum += exp(r->score[n] - r->top);
    r->lse = r->top + log(sum);
}

/* By how much the logarithms of weights that count, and an lse that is made of them, can be off. */
static void bound_lse(const gradient_inputs *x, int64_t at, gradient_row *r) {
    double off_top = 0.0;
    r->worst = 0.0;
    for (int64_t n = 0; n < r->count; n++)
        if (r->score[n] == r->top)
            off_top = larger(off_top, r->off[n]);
    for (int64_t n = 0; n < r->count; n++)
        if (r->score[n] + r->off[n] > r->top - off_top - 80.0)
            r->worst = larger(r->worst, r->off[n]);
    r->worst += EXP_ERROR + 8 * UNIT_F32 * fabs(r->top) + (double)(r->count + 16) * UNIT_F32;
    double of_own = r->worst + 16 * UNIT_F32 * (fabs(r->lse) + fabs(r->top));
    r->lse_off = larger(of_own, fabs(x->lse[at] - r->lse));
    r->overflows |= !isfinite(x->lse[at]);
}

static void weigh_keys(gradient_row *r) {
    for (int64_t n = 0; n < r->count; n++) {
        estimate *w = &r->weight[n];
        double x = r->score[n] - r->lse;
        *w = (estimate){exp(x), 0.0, A_NUMBER};
        if (x == -INFINITY) /* exactly 0 */
            continue;
        double most = x + r->off[n] + r->lse_off + 4 * UNIT_F32 * fabs(x) + EXP_ERROR;
        w->error = exp(most) - w->value + 2 * FLT_MIN; /* denormal weights may be 0 */
        if (!(most < 80.0))
            w->is = ANYTHING;
    }
}

/* <dout, out>: at, of the row in dense copies. */
static estimate find_delta(const gradient_inputs *x, int64_t at, const gradient_row *r) {
    int64_t head_dim = x->p->q.shape[3];
    estimate delta = {0.0, 0.0, A_NUMBER};
    double size = 0.0, spread = 0.0, farthest = 0.0, given = 0.0, of_dp = 0.0, most_of_dp = 0.0;
    for (int64_t n = 0; n < r->count; n++) {
        /* An infinite number of dout times one of v that is 0 is NaN there, but not in delta. */
        certainty is = r->dp[n].is == IS_NAN ? NOT_FINITE : r->dp[n].is;
        delta.is = is > delta.is ? is : delta.is;
        delta.value += r->weight[n].value * r->dp[n].value;
        size += r->weight[n].value * fabs(r->dp[n].value);
    }
    for (int64_t d = 0; d < head_dim; d++) {
        given += x->dout[at * head_dim + d] * x->out[at * head_dim + d];
        if (r->dout[d].is == IS_NAN)
            delta.is = IS_NAN;
    }
    if (delta.is != A_NUMBER)
        return delta;
    for (int64_t n = 0; n < r->count; n++) {
        double distance = fabs(r->dp[n].value - delta.value);
        spread += r->weight[n].value * distance;
        farthest = larger(farthest, distance);
        of_dp += r->weight[n].value * r->dp[n].error;
        most_of_dp = larger(most_of_dp, r->dp[n].error);
    }
    double twice = 2 * r->worst, factor = twice > 300.0 ? INFINITY : exp(twice);
    double own = (double)(r->count + 32) * UNIT_F32 * size; /* a mean, and never beyond its terms */
    own += factor < INFINITY ? smaller((factor - 1.0) * spread, farthest) : farthest;
    own += factor < INFINITY ? smaller(factor * of_dp, most_of_dp) : most_of_dp;
    delta.error = larger(own, fabs(given - delta.value));
    if (!(fabs(delta.value) + delta.error < NEARLY_ALL))
        delta.is = ANYTHING;
    return delta;
}

/* dP - delta + dlse is `diff`, of the size of its terms. */
static estimate find_ds(const estimate *w, const estimate *diff, double size) {
    estimate ds = {w->value * diff->value, 0.0, product_is(w, diff)};
    ds.error = (w->value + w->error) * (diff->error + 2 * UNIT_F32 * size) +
               w->error * fabs(diff->value) + 2 * UNIT_F32 * fabs(ds.value);
    if (ds.is == A_NUMBER && !(fabs(ds.value) + ds.error < NEARLY_ALL))
        ds.is = ANYTHING;
    return ds;
}

static void find_all_ds(const gradient_inputs *x, int64_t at, gradient_row *r) {
    estimate delta = find_delta(x, at, r), dlse = operand_number(r->dlse, WAN_ATTN_F32, IN_FLOATS);
    for (int64_t n = 0; n < r->count; n++) {
        const estimate *dp = &r->dp[n];
        estimate diff = {dp->value - delta.value + dlse.value, dp->error + delta.error, delta.is};
        double size = fabs(dp->value) + fabs(delta.value) + fabs(dlse.value);
        diff.is = dp->is > diff.is ? dp->is : diff.is;
        diff.is = dlse.is > diff.is ? dlse.is : diff.is;
        r->ds[n] = find_ds(&r->weight[n], &diff, size);
        if (r->count == 1 && r->ds[n].is == A_NUMBER) /* a single key: what is NaN stays so */
            r->ds[n] = dlse;
    }
}

/* What bfloat16 makes of a weight or of dS for the sums. */
static estimate rounded(estimate e, arithmetic in) {
    if (in == IN_BF16)
        e.error += UNIT_BF16 * (fabs(e.value) + e.error);
    return e;
}

static void weigh_row(const gradient_inputs *x, int64_t b, int64_t h, int64_t i, gradient_row *r) {
    int64_t at = row_at(x->p, b, h, i);
    static const estimate UNKNOWN = {0.0, 0.0, ANYTHING}, NOTHING = {0.0, 0.0, IS_NAN};
    look_at_keys(x, b, h, i, r);
    r->dlse = x->dlse ? x->dlse[lse_at(x->p, b, h, i)] : 0.0;
    int is_finite = isfinite(r->top);
    if (is_finite)
        bound_lse(x, lse_at(x->p, b, h, i), r);
    if (is_finite && !r->overflows) {
        if (r->count == 1)
            r->weight[0] = (estimate){1.0, 0.0, A_NUMBER};
        else
            weigh_keys(r);
        find_all_ds(x, at, r);
        return;
    }
    /* inf - inf for the keys of an infinite score; 0 or NaN for those below it. */
    for (int64_t n = 0; n < r->count; n++) {
        int is_lower = r->top == INFINITY && r->score[n] < r->top;
        r->weight[n] = r->overflows || is_lower ? UNKNOWN : NOTHING;
        r->ds[n] = r->overflows ? UNKNOWN : NOTHING;
    }
}

static void add_row_to_gradients(const gradient_inputs *x, int64_t b, int64_t h, int64_t i,
                                 gradient_sums *to) {
    static gradient_row row;
    const wan_attn_params *p = x->p;
    int64_t head_dim = p->q.shape[3];
    weigh_row(x, b, h, i, &row);
    for (int64_t n = 0; n < row.count; n++) {
        int64_t of_key = key_at(p, b, h, row.key[n]) * head_dim;
        product_sum *dq = to->dq + row_at(p, b, h, i) * head_dim;
        product_sum *dk = to->dk + of_key, *dv = to->dv + of_key;
        estimate weight = rounded(row.weight[n], x->in), ds = rounded(row.ds[n], x->in);
        for (int64_t d = 0; d < head_dim; d++) {
            estimate k = operand_number(x->k[of_key + d], p->k.dtype, x->in);
            add_product(&dq[d], &ds, &k, x->in);
            add_product(&dk[d], &ds, &row.q[d], x->in);
            add_product(&dv[d], &weight, &row.dout[d], x->in);
        }
    }
}

/* What is stored of a sum: times the scale if it is dq or dk, in its dtype. */
static estimate expected_number(const product_sum *sum, const wan_attn_params *p, int is_scaled,
                                int32_t dtype) {
    estimate e = estimate_of(sum);
    if (sum->count == 0 || e.is != A_NUMBER)
        return e;
    if (is_scaled) {
        double scale = scale_of_scores(p), off = fabs(scale - scale_as_float(p));
        e.error = fabs(scale) * e.error + off * (fabs(e.value) + e.error);
        e.value *= scale;
        e.error += 2 * UNIT_F32 * (fabs(e.value) + e.error);
    }
    e.error += 1.01 * unit_of(dtype) * (fabs(e.value) + e.error);
    if (fabs(e.value) + e.error > 0.0)
        e.error += tiniest(dtype);
    return e;
}

static int is_as_expected(double got, const estimate *e, int32_t dtype) {
    double most = dtype == WAN_ATTN_F16 ? 65504.0 : dtype == WAN_ATTN_BF16 ? 0x1.fep127 : FLT_MAX;
    switch (e->is) {
    case ANYTHING: return 1;
    case NOT_FINITE: return !isfinite(got);
    case IS_NAN: return isnan(got);
    default: break;
    }
    if (isinf(got)) /* what no number of the dtype holds */
        return copysign(1.0, got) * e->value + e->error > most;
    return fabs(got - e->value) <= e->error;
}

#endif /* WAN_ATTN_TESTS_EXPECTED_GRADIENT_H */
