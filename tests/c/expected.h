/* SPDX-License-Identifier: Apache-2.0
 * expected.h - what a call must give, in double precision straight from the formula in wan_attn.h,
 * and how far a kernel's arithmetic may be from it: the bounds follow from the numbers of each row,
 * so that they hold for values near the limits of a dtype, too. Shares no code with csrc/.
 */
#ifndef WAN_ATTN_TESTS_EXPECTED_H
#define WAN_ATTN_TESTS_EXPECTED_H

#include "eight_bits.h"
#include "rounding.h"

/* Dense copies: [batch, seqlen, heads, head_dim]. */
typedef struct decoded {
    double *q, *k, *v;
} decoded;

/* One row of the result. */
typedef struct row_truth {
    double out[MOST_HEAD_DIM], out_bound[MOST_HEAD_DIM];
    double lse, lse_bound;
    int sees_none;
    int is_anything[MOST_HEAD_DIM]; /* an infinity or NaN of next to no weight: not compared */
} row_truth;

/* Scores of the visible keys, the others -inf, and what each may be off by. */
static void score_row(const wan_attn_params *p, const decoded *x, int64_t b, int64_t h, int64_t i,
                      arithmetic in, double *score, double *off, int *is_visible) {
    int64_t head_dim = p->q.shape[3], heads_k = p->k.shape[2], keys = p->k.shape[1];
    double mean[EIGHT_BITS_DIM];
    double scale = p->has_softmax_scale ? p->softmax_scale : 1.0 / sqrt((double)head_dim);
    const double *q = x->q + ((b * p->q.shape[1] + i) * p->q.shape[2] + h) * head_dim;
    double relative = (double)(head_dim + 16) * UNIT_F32 + (in == IN_BF16 ? 2 * UNIT_BF16 : 0.0);
    if (in == IN_EIGHT_BITS)
        mean_of_keys(x->k + (b * keys * heads_k + h / (p->q.shape[2] / heads_k)) * head_dim,
                     heads_k * head_dim, real_length(&p->seqused_k, b, keys), head_dim, mean);
    for (int64_t j = 0; j < keys; j++) {
        score[j] = -INFINITY, off[j] = 0.0;
        is_visible[j] = sees(p, b, i, j) && is_listed(p, b, h, i, j / WAN_ATTN_BLOCK);
        if (!is_visible[j])
            continue;
        const double *k =
            x->k + ((b * keys + j) * heads_k + h / (p->q.shape[2] / heads_k)) * head_dim;
        double sum = 0.0, sizes = 0.0, flushed = 0.0;
        for (int64_t d = 0; d < head_dim; d++) {
            sum += q[d] * k[d];
            sizes += fabs(q[d] * k[d]);
            flushed += FLT_MIN * (fabs(q[d]) + fabs(k[d]) + 1.0);
        }
        score[j] = sum * scale;
        off[j] = fabs(scale) * (relative * sizes + flushed) + 8 * UNIT_F32 * fabs(score[j]) +
                 EXP_ERROR + (in == IN_BF16 ? 1.01 * UNIT_BF16 : 0.0);
        if (in == IN_EIGHT_BITS)
            off[j] += off_in_eight_bits(q, k, mean, head_dim, scale, &score[j]);
    }
}

/* The most by which the logarithm of a weight that counts can be off. */
static double worst_of(const double *score, const double *off, int64_t keys, double top) {
    double worst = 0.0, off_top = 0.0;
    for (int64_t j = 0; j < keys; j++)
        if (score[j] == top)
            off_top = off[j] > off_top ? off[j] : off_top;
    for (int64_t j = 0; j < keys; j++)
        if (score[j] > -INFINITY && score[j] + off[j] > top - off_top - 80.0)
            worst = off[j] > worst ? off[j] : worst;
    return worst + 8 * UNIT_F32 * fabs(top);
}

/* What rounding moves out[d] by in addition: P, and V, of which the largest counts. */
static double moved_by_rounding(const double *v, int64_t v_stride, const double *weight,
                                int64_t keys, double mean, double off, double *of_values) {
    static double distance[MOST_KEYS];
    double largest = 0.0;
    for (int64_t j = 0; j < keys; j++) {
        double value = v[j * v_stride];
        distance[j] = weight[j] > 0.0 ? fabs(value - mean) : 0.0;
        largest = isfinite(value) && fabs(value) > largest ? fabs(value) : largest;
    }
    *of_values = HALF_A_VALUE * largest + 0x1p-99;
    return moved_in_integers(weight, distance, keys, off);
}

/* out[d] = sum p v, and its bound: weights that are off by a factor of e^off move the mean by that
 * much of the values' spread, and never beyond them. real: how many keys of this sample are. */
static void weigh(const wan_attn_params *p, const double *v, int64_t v_stride, const double *weight,
                  const int *is_visible, int64_t real, double off, arithmetic in, int64_t d,
                  row_truth *row) {
    int64_t keys = p->k.shape[1], seen = 0;
    double sum = 0.0, sizes = 0.0, spread = 0.0, farthest = 0.0, special = 0.0, of_values = 0.0;
    for (int64_t j = 0; j < keys; j++)
        if (is_visible[j]) {
            double value = v[j * v_stride + d];
            seen++;
            sum += weight[j] * value;
            sizes += weight[j] * fabs(value);
            if (!isfinite(value) && (special == 0.0 || weight[j] < special))
                special = weight[j] + 1e-300;
        }
    row->out[d] = sum;
    row->is_anything[d] =
        special > 0.0 && special < 1e-30 * (in == IN_EIGHT_BITS ? exp(2 * off) : 1.0);
    for (int64_t j = 0; j < keys; j++)
        if (is_visible[j] && (weight[j] > 0.0 || off > 1.0)) {
            double distance = fabs(v[j * v_stride + d] - sum);
            spread += weight[j] * distance;
            farthest = distance > farthest ? distance : farthest;
        }
    double moved = off > 300.0 ? INFINITY : expm1(off) * exp(off) * spread;
    if (in == IN_EIGHT_BITS)
        moved += moved_by_rounding(v + d, v_stride, weight, real, sum, off, &of_values);
    if (in == IN_BF16) /* weights that are rounded need not add up to the sum, which is not */
        of_values += UNIT_BF16 * sizes;
    row->out_bound[d] = (moved < farthest ? moved : farthest) + of_values +
                        (double)(seen + 16) * UNIT_F32 * sizes +
                        1.01 * unit_of(p->q.dtype) * (fabs(sum) + of_values) + tiniest(p->q.dtype);
}

static void expect_row(const wan_attn_params *p, const decoded *x, int64_t b, int64_t h, int64_t i,
                       arithmetic in, row_truth *row) {
    static double score[MOST_KEYS], off[MOST_KEYS];
    static int is_visible[MOST_KEYS];
    int64_t keys = p->k.shape[1], head_dim = p->q.shape[3], heads_k = p->k.shape[2];
    int64_t head_k = h / (p->q.shape[2] / heads_k);
    double top = -INFINITY, sum = 0.0;
    score_row(p, x, b, h, i, in, score, off, is_visible);
    row->sees_none = 1;
    for (int64_t j = 0; j < keys; j++) {
        row->sees_none &= !is_visible[j];
        top = score[j] > top || score[j] != score[j] ? score[j] : top;
        if (top != top)
            break;
    }
    double worst = worst_of(score, off, keys, top);
    for (int64_t j = 0; j < keys; j++) {
        score[j] = is_visible[j] ? exp(score[j] - top) : 0.0;
        sum += score[j];
    }
    row->lse = top + log(sum);
    row->lse_bound = worst + 16 * UNIT_F32 * (fabs(row->lse) + fabs(top)) + 0x1p-19;
    for (int64_t j = 0; j < keys; j++)
        score[j] /= sum;
    for (int64_t d = 0; d < head_dim; d++)
        weigh(p, x->v + (b * keys * heads_k + head_k) * head_dim, heads_k * head_dim, score,
              is_visible, real_length(&p->seqused_k, b, keys), worst, in, d, row);
}

#endif /* WAN_ATTN_TESTS_EXPECTED_H */
