/* SPDX-License-Identifier: Apache-2.0
 * rope_ref.c - the specification of rms_norm_rope: portable C, for every call of the contract, as
 * wan_attn.h writes it. Written to be read; fast rows are tested against the same oracle.
 *
 * Implements: RMSNorm (Zhang & Sennrich, arXiv 1910.07467) and RoPE (Su et al., arXiv 2104.09864)
 * with one angle for each axis of a video.
 * Who does what: one task is 16 tokens; tokens share nothing but their inputs.
 * Limits: none within the contract. Budget: 4 KiB of stack.
 * Numerics: squares are summed in 32 parts, each of which is a float, so that rounding grows with a
 * part's length; the parts are summed in double. Each product of the rotation stands in a statement
 * of its own: compilers may fuse a product and a sum only within one expression.
 * Measured: not for speed; it is what the others are compared with.
 */
#include "core/util.h"
#include "cpu/half.h"
#include "cpu/rope.h"

enum { PARTS = 32 };

static float rounded_to(float x, wan_attn_dtype dtype) {
    if (dtype == WAN_ATTN_BF16)
        return wan_attn_float_of_bf16(wan_attn_bf16_of_float(x));
    return dtype == WAN_ATTN_F16 ? wan_attn_float_of_f16(wan_attn_f16_of_float(x)) : x;
}

/* 1 / sqrt(mean(x^2) + eps) over the heads [first, first + count) of a token. */
static float inverse_rms(const wan_attn_rope_problem *p, const wan_attn_rope_token *token,
                         int64_t first, int64_t count) {
    float x[WAN_ATTN_ROPE_MAX_HEAD_DIM], part[PARTS] = {0};
    double sum = 0.0;
    for (int64_t h = first; h < first + count; h++) {
        wan_attn_load_floats(x, wan_attn_row_address(&p->x, token->b, token->s, h), p->x.dtype,
                             p->head_dim);
        for (int64_t d = 0; d < p->head_dim; d++)
            part[d % PARTS] += x[d] * x[d];
    }
    for (int n = 0; n < PARTS; n++)
        sum += part[n];
    return wan_attn_rope_scale(p, sum, count);
}

/* y = n * weight of one head, in place of x. */
static void normalize(const wan_attn_rope_problem *p, int64_t h, float scale, float *x) {
    float weight[WAN_ATTN_ROPE_MAX_HEAD_DIM];
    if (p->weight.data)
        wan_attn_load_floats(
            weight, wan_attn_element(p->weight.data, p->weight.dtype, h * p->weight.head_stride),
            p->weight.dtype, p->head_dim);
    for (int64_t d = 0; d < p->head_dim; d++) {
        x[d] = rounded_to(x[d] * scale, p->n_dtype);
        if (p->weight.data)
            x[d] = rounded_to(x[d] * weight[d], p->y_dtype);
    }
}

/* (y[d] + i y[d + 1]) * (cos + i sin), as complex128. */
static void rotate(float *y, const double *angles, int64_t head_dim) {
    for (int64_t d = 0; d + 1 < head_dim; d += 2) { /* head_dim is even here */
        double a = y[d], b = y[d + 1], cosine = angles[d], sine = angles[d + 1];
        double ac = a * cosine, bs = b * sine;
        double bc = b * cosine, as = a * sine;
        y[d] = (float)(ac - bs);
        y[d + 1] = (float)(bc + as);
    }
}

static void run_token(const wan_attn_rope_problem *p, const wan_attn_rope_token *token) {
    float x[WAN_ATTN_ROPE_MAX_HEAD_DIM], scale = 1.0f;
    double angles[WAN_ATTN_ROPE_ANGLES];
    int is_rotated = 0;
    if (p->has_norm && !p->is_per_head)
        scale = inverse_rms(p, token, 0, p->num_heads);
    for (int64_t h = 0; h < p->num_heads; h++) {
        if (h == 0 || wan_attn_rope_has_angles_of_heads(p))
            is_rotated = wan_attn_rope_angles(p, token, h, angles);
        if (p->has_norm && p->is_per_head)
            scale = inverse_rms(p, token, h, 1);
        wan_attn_load_floats(x, wan_attn_row_address(&p->x, token->b, token->s, h), p->x.dtype,
                             p->head_dim);
        if (p->has_norm)
            normalize(p, h, scale, x);
        if (is_rotated)
            rotate(x, angles, p->head_dim);
        wan_attn_store_floats(wan_attn_row_address(&p->out, token->b, token->s, h), x, p->out.dtype,
                              p->head_dim);
    }
}

wan_attn_status wan_attn_rms_norm_rope_ref(const wan_attn_rope_problem *p, wan_attn_error *err) {
    return wan_attn_rope_run(p, run_token, err);
}
