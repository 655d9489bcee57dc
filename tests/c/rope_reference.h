/* SPDX-License-Identifier: Apache-2.0
 * rope_reference.h - what a call of wan_attn_rms_norm_rope must give: each step of the contract in
 * wan_attn.h on an interval of doubles. Only the scale of the norm is wider than a point, by what
 * float32 sums of squares may be off; every later step rounds, and rounding keeps an order. So a
 * rotation alone is expected to the bit. Shares no code with csrc/.
 */
#ifndef WAN_ATTN_TESTS_ROPE_REFERENCE_H
#define WAN_ATTN_TESTS_ROPE_REFERENCE_H

#include <float.h>

#include "elements.h"

/* From low to high, or what `numbers` says. */
typedef struct interval {
    double low, high;
    enum { REAL, IS_NAN, IS_ANYTHING } numbers;
} interval;

static interval between(double one, double other) {
    interval r = {one < other ? one : other, one < other ? other : one, REAL};
    if (one != one || other != other)
        r.numbers = one != one && other != other ? IS_NAN : IS_ANYTHING;
    return r;
}

/* A step of `a` gives these two at its ends. */
static interval after(interval a, double low, double high) {
    interval r = between(low, high);
    if (a.numbers != REAL)
        r.numbers = a.numbers;
    return r;
}

/* Between the ends lies 0 times infinity, which is no number. */
static interval times(interval a, double factor) {
    interval r = after(a, a.low * factor, a.high * factor);
    if (r.numbers == REAL && isinf(factor) && a.low < 0.0 && a.high > 0.0)
        r.numbers = IS_ANYTHING;
    return r;
}

/* Between the ends lies infinity minus infinity. */
static interval plus(interval a, interval b) {
    interval r = after(a, a.low + b.low, a.high + b.high);
    if (b.numbers != REAL && r.numbers != IS_NAN)
        r.numbers = b.numbers;
    int may_cancel =
        (a.high == INFINITY && b.low == -INFINITY) || (a.low == -INFINITY && b.high == INFINITY);
    if (r.numbers == REAL && may_cancel)
        r.numbers = IS_ANYTHING;
    return r;
}

/* The nearest number of the dtype, the even one of two; infinity beyond its largest. */
static double nearest(double value, int32_t dtype) {
    int mantissa_bits = dtype == WAN_ATTN_F32 ? 23 : dtype == WAN_ATTN_F16 ? 10 : 7, exponent;
    int most = dtype == WAN_ATTN_F16 ? 16 : 128, least = dtype == WAN_ATTN_F16 ? -13 : -125;
    if (!isfinite(value) || value == 0.0)
        return value;
    frexp(value, &exponent); /* value is a fraction in [0.5, 1) times 2^exponent */
    int step = (exponent < least ? least : exponent) - 1 - mantissa_bits;
    double rounded = ldexp(rint(ldexp(value, -step)), step);
    return fabs(rounded) >= ldexp(1.0, most) ? copysign(INFINITY, value) : rounded;
}

static interval rounded(interval a, int32_t dtype) {
    return after(a, nearest(a.low, dtype), nearest(a.high, dtype));
}

/* 1 / sqrt(mean(x^2) + eps), a float32, of the heads [first, first + count) of a token. */
static interval scale_of(const wan_attn_rope_params *p, int64_t b, int64_t s, int64_t first,
                         int64_t count) {
    int64_t head_dim = p->x.shape[3];
    double sum = 0.0, largest = 0.0, n = (double)(count * head_dim);
    for (int64_t h = first; h < first + count; h++)
        for (int64_t d = 0; d < head_dim; d++) {
            double square = pow(value_at(&p->x, b, s, h, d), 2.0);
            sum += square;
            largest = square > largest ? square : largest;
        }
    if (sum != sum)
        return between(NAN, NAN);
    /* The longest of 16 parts; a square, and each of its sums, may be off by half a unit. */
    int64_t longest = count * ((head_dim + 15) / 16);
    double off = sum * (double)(longest + 2) * 0x1p-24 + n * 0x1p-149;
    double low = sum - off > 0.0 ? sum - off : 0.0, high = sum + off;
    if (high > FLT_MAX)
        high = INFINITY;
    if (nearest(largest, WAN_ATTN_F32) > FLT_MAX)
        low = INFINITY;
    interval scale = between(1.0 / sqrt(high / n + p->eps) * (1.0 - 0x1p-50),
                             1.0 / sqrt(low / n + p->eps) * (1.0 + 0x1p-50));
    return rounded(scale, WAN_ATTN_F32);
}

/* x, normed and weighed. */
static interval normed(const wan_attn_rope_params *p, interval scale, double x, int64_t h,
                       int64_t d) {
    interval y = rounded(times(scale, x), WAN_ATTN_F32);
    if (p->rounds_norm)
        y = rounded(y, p->x.dtype);
    if (!p->weight.ndim)
        return y;
    int64_t at = p->is_per_head ? d : h * p->x.shape[3] + d;
    y = rounded(times(y, value_at(&p->weight, at, 0, 0, 0)), WAN_ATTN_F32);
    if (p->rounds_norm && p->weight.dtype == p->x.dtype)
        y = rounded(y, p->x.dtype);
    return y;
}

/* The row of the table that turns pair `pair` of this token; -1: none, it is not turned. */
static int64_t position_of(const wan_attn_rope_params *p, int64_t b, int64_t s, int64_t pair) {
    int64_t of_axis = p->x.shape[3] / 2 / 3, of_frame = p->x.shape[3] / 2 - 2 * of_axis;
    int64_t frames = (int64_t)value_at(&p->grid_sizes, b, 0, 0, 0);
    int64_t height = (int64_t)value_at(&p->grid_sizes, b, 1, 0, 0);
    int64_t width = (int64_t)value_at(&p->grid_sizes, b, 2, 0, 0), token = p->seqlen_offset + s;
    if (token >= frames * height * width)
        return -1;
    int64_t column = token % width, line = (token - column) / width % height;
    int64_t frame = (token - column - line * width) / (height * width);
    return pair < of_frame ? frame : pair < of_frame + of_axis ? line : column;
}

/* cos and sin of a pair; 0: it is not turned. */
static int angle_of(const wan_attn_rope_params *p, int64_t b, int64_t s, int64_t h, int64_t pair,
                    double angle[2]) {
    if (!p->table.ndim)
        return 0;
    int64_t row = p->grid_sizes.ndim ? position_of(p, b, s, pair) : 0;
    for (int64_t n = 0; n < 2 && row >= 0; n++)
        angle[n] = p->grid_sizes.ndim ? value_at(&p->table, row, 2 * pair + n, 0, 0)
                                      : value_at(&p->table, b, s, h, 2 * pair + n);
    return row >= 0;
}

static interval minus(interval a) { return after(a, -a.high, -a.low); }

/* Elements d and d + 1 of y become their product with cos + i sin. */
static void turn(const double angle[2], interval y[2]) {
    interval real = plus(times(y[0], angle[0]), minus(times(y[1], angle[1])));
    interval imaginary = plus(times(y[1], angle[0]), times(y[0], angle[1]));
    y[0] = rounded(real, WAN_ATTN_F32);
    y[1] = rounded(imaginary, WAN_ATTN_F32);
}

/* out[b, s, h, :]. `scale` is that of the token, or of this head. */
static void expect_head(const wan_attn_rope_params *p, interval scale, int64_t b, int64_t s,
                        int64_t h, interval *out) {
    int64_t head_dim = p->x.shape[3];
    for (int64_t d = 0; d < head_dim; d++) {
        double x = value_at(&p->x, b, s, h, d), angle[2];
        out[d] = p->has_norm ? normed(p, scale, x, h, d) : between(x, x);
        if (d % 2 && angle_of(p, b, s, h, d / 2, angle))
            turn(angle, &out[d - 1]);
    }
    for (int64_t d = 0; d < head_dim; d++)
        out[d] = rounded(out[d], p->out.dtype);
}

#endif /* WAN_ATTN_TESTS_ROPE_REFERENCE_H */
