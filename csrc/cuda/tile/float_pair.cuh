/* SPDX-License-Identifier: Apache-2.0
 * float_pair.cuh - numbers of 48 bits as the sum of two floats, for the few places where float32
 * alone is too coarse: GeForce cards do float64 at 1/64 of its rate. Knows no kernel.
 *
 * Sums and products that are exact: Dekker, "A floating-point technique for extending the available
 * precision", 1971; Knuth's sum of two floats. Every operation stands by itself, so that no
 * compiler fuses two. Where `high` is infinite or NaN it is the answer, and `rest` is NaN.
 */
#ifndef WAN_ATTN_CUDA_TILE_FLOAT_PAIR_H
#define WAN_ATTN_CUDA_TILE_FLOAT_PAIR_H

#include "cuda/ptx/ptx.cuh"

typedef struct float_pair {
    float high, rest;
} float_pair;

/* x + y, exactly. */
DEVICE float_pair exact_sum(float x, float y) {
    float_pair sum;
    sum.high = rounded_sum(x, y);
    float of_y = rounded_sum(sum.high, -x);
    float lost_x = rounded_sum(x, -rounded_sum(sum.high, -of_y));
    sum.rest = rounded_sum(lost_x, rounded_sum(y, -of_y));
    return sum;
}

/* x * y, exactly. */
DEVICE float_pair exact_product(float x, float y) {
    float_pair product;
    product.high = rounded_product(x, y);
    product.rest = fused_multiply_add(x, y, -product.high);
    return product;
}

DEVICE float_pair pair_sum(float_pair x, float_pair y) {
    float_pair sum = exact_sum(x.high, y.high);
    sum.rest = rounded_sum(sum.rest, rounded_sum(x.rest, y.rest));
    return sum;
}

DEVICE float_pair pair_product(float_pair x, float_pair y) {
    float_pair product = exact_product(x.high, y.high);
    product.rest = fused_multiply_add(x.high, y.rest, product.rest);
    product.rest = fused_multiply_add(x.rest, y.high, product.rest);
    return product;
}

/* 1 / sqrt(x), as it would be rounded from many more bits but for one case in some ten thousands:
 * one step of Newton's from the hardware's 22 bits. Of 0, infinities and NaN the hardware's own. */
DEVICE float pair_reciprocal_sqrt(float_pair x) {
    float y = reciprocal_sqrt(x.high);
    float_pair root = exact_product(x.high, y); /* nearly sqrt(x) */
    float off = fused_multiply_add(-root.high, y, 1.0f);
    off = fused_multiply_add(-fused_multiply_add(x.rest, y, root.rest), y, off); /* 1 - x y^2 */
    float better = fused_multiply_add(0.5f * y, off, y);
    return off == off ? better : y;
}

/* The pair nearest to x. */
DEVICE float_pair pair_of(double x) {
    float_pair pair;
    pair.high = (float)x;
    pair.rest = (float)(x - (double)pair.high);
    return pair;
}

/* x * c - y * s, off by at most half a unit in the last place and 2^-44 of the products. */
DEVICE float difference_of_products(float x, float_pair c, float y, float_pair s) {
    float_pair xc = exact_product(x, c.high), ys = exact_product(y, s.high);
    float_pair sum = exact_sum(xc.high, -ys.high);
    float rest = rounded_sum(sum.rest, rounded_sum(xc.rest, -ys.rest));
    rest = fused_multiply_add(x, c.rest, rest);
    rest = fused_multiply_add(-y, s.rest, rest);
    return rest == rest ? rounded_sum(sum.high, rest) : sum.high;
}

#endif /* WAN_ATTN_CUDA_TILE_FLOAT_PAIR_H */
