/* SPDX-License-Identifier: Apache-2.0
 * tensor.h - how a tensor core sums. The manual says "accumulation with at least single precision"
 * and leaves order and rounding open (PTX ISA, "mma", "wgmma.mma_async"); so it is a knob.
 */
#ifndef WAN_ATTN_TESTS_PTX_TENSOR_H
#define WAN_ATTN_TESTS_PTX_TENSOR_H

#include <cmath>

#include "machine.h"

/* Products of one step and what they are added to, cut off `bits` below the largest of them; the
 * sum is cut off to a float's 24 bits. Measured of Ampere to Hopper: Fasi et al. 2021, MMA-Sim. */
inline double cut_sum(double c, const double *products, int count, int bits) {
    int largest = -1000;
    bool is_finite = std::isfinite(c);
    double sum = c;
    for (int i = -1; i < count; i++) {
        double x = i < 0 ? c : products[i];
        is_finite = is_finite && std::isfinite(x);
        if (x != 0 && std::isfinite(x))
            largest = std::max(largest, std::ilogb(x));
        sum += i < 0 ? 0 : x;
    }
    if (!is_finite || largest == -1000)
        return sum;
    double unit = std::ldexp(1.0, largest - bits);
    sum = 0;
    for (int i = -1; i < count; i++)
        sum += std::trunc((i < 0 ? c : products[i]) / unit) * unit;
    if (sum == 0)
        return sum;
    unit = std::ldexp(1.0, std::ilogb(sum) - 23);
    return std::trunc(sum / unit) * unit;
}

/* The f32 that comes of a sum. */
inline float result_of(const Knobs &knobs, double sum) {
    float x = (float)sum;
    return knobs.flush_sums && std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

/* c + sum of a[k] * b[k * stride], as the knobs have it; not yet rounded to the result's type. */
inline double dot(const Knobs &knobs, double c, const float *a, const float *b, int stride, int k) {
    int block = knobs.sum_block ? knobs.sum_block : k;
    for (int first = 0; first < k; first += block) {
        double products[16];
        int count = std::min(block, k - first);
        for (int i = 0; i < count; i++)
            products[i] = (double)a[first + i] * b[(first + i) * stride];
        c = cut_sum(c, products, count, knobs.sum_bits);
    }
    return c;
}

/* d[m][n] = c[m][n] + sum over k of a[m][k] b[k][n]. Products of 16-bit numbers and sums of a few
 * of them are exact in double, so that the one rounding is that to the result. */
template <int N>
inline void multiply(const Knobs &knobs, double (*d)[N], const float (*a)[16], const float (*b)[N],
                     int rows, int k) {
    if (knobs.sum_block) {
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < N; n++)
                d[m][n] = dot(knobs, d[m][n], a[m], &b[0][n], N, k);
        return;
    }
    for (int m = 0; m < rows; m++)
        for (int i = 0; i < k; i++) {
            double x = a[m][i];
            for (int n = 0; n < N; n++)
                d[m][n] += x * b[i][n];
        }
}

#endif /* WAN_ATTN_TESTS_PTX_TENSOR_H */
