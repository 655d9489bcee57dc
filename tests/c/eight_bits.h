/* SPDX-License-Identifier: Apache-2.0
 * eight_bits.h - how far a row of 8-bit scores may be from the truth, proven for each call: what q
 * and k lose when each of their rotated numbers is half a step off, and P V when weights and values
 * are, in double precision after the definitions of csrc/cpu/qk8.h and sdpa_qk8_values.inc. Shares
 * no code with csrc/. Numbers of q and k are below 2^100.
 */
#ifndef WAN_ATTN_TESTS_EIGHT_BITS_H
#define WAN_ATTN_TESTS_EIGHT_BITS_H

#include "elements.h"

enum { EIGHT_BITS_DIM = 256, VALUES_OF_A_BLOCK = 128 };

/* Half a step of a weight, where the largest of a block is 1, and of a value, where it is the
 * largest of its channel in the block; a little more, for float32's rounding. */
static const double HALF_A_WEIGHT = 0.505 / 8192, HALF_A_VALUE = 0.505 / 2047;

/* A vector as its integers have it: how long it is, and how long what they miss. */
typedef struct eight_bits {
    double norm, missed;
} eight_bits;

/* The largest magnitude of x[head_dim], rotated. NaN or infinite: x has such a number. */
static double largest_rotated(const double *x, int64_t head_dim) {
    double y[EIGHT_BITS_DIM], largest = 0.0;
    uint32_t state = 0x9e3779b9u;
    int64_t depth = 1;
    while (depth < head_dim)
        depth *= 2;
    for (int64_t d = 0; d < depth; d++) {
        state = state * 1664525u + 1013904223u;
        y[d] = d >= head_dim ? 0.0 : state >> 31 ? x[d] : -x[d];
    }
    for (int64_t d = 0; d < depth * depth; d++) { /* pairs that differ in one bit, bit by bit */
        int64_t half = (int64_t)1 << d / depth, a = d % depth;
        if (half >= depth)
            break;
        if (a & half)
            continue;
        double sum = y[a] + y[a + half], difference = y[a] - y[a + half];
        y[a] = sum, y[a + half] = difference;
    }
    for (int64_t d = 0; d < depth; d++)
        largest = fabs(y[d]) <= largest ? largest : fabs(y[d]);
    return largest;
}

static eight_bits in_eight_bits(const double *x, int64_t head_dim) {
    double squares = 0.0, largest = largest_rotated(x, head_dim);
    for (int64_t d = 0; d < head_dim; d++)
        squares += x[d] * x[d];
    eight_bits of = {sqrt(squares), 0.5001 * largest / 127};
    of.missed += 4e-6 * of.norm;
    if (largest < 0x1.1p-100)
        of.missed += of.norm; /* it may all be taken for 0 */
    return of;
}

/* The mean of a head's real keys; numbers that are infinite or NaN count as 0. */
static void mean_of_keys(const double *k, int64_t stride, int64_t keys, int64_t head_dim,
                         double *mean) {
    for (int64_t d = 0; d < head_dim; d++) {
        mean[d] = 0.0;
        for (int64_t j = 0; j < keys; j++)
            mean[d] += isfinite(k[j * stride + d]) ? k[j * stride + d] / (double)keys : 0.0;
    }
}

/* By how much a score can be off, and the score itself NaN if q or k has a number that is not
 * finite. */
static double off_in_eight_bits(const double *q, const double *k, const double *mean,
                                int64_t head_dim, double scale, double *score) {
    double centred[EIGHT_BITS_DIM];
    for (int64_t d = 0; d < head_dim; d++)
        centred[d] = k[d] - mean[d];
    eight_bits of_q = in_eight_bits(q, head_dim), of_k = in_eight_bits(centred, head_dim);
    double off = of_q.missed * of_k.norm + of_q.norm * of_k.missed + of_q.missed * of_k.missed;
    if (!isfinite(off))
        *score = NAN;
    return fabs(scale) * off;
}

/* How far rounding P and V moves one number of out. distance: of each key's value from it; weight:
 * of each key, 0 if it is not seen; worst: what the logarithm of a weight may be off by. */
static double moved_in_integers(const double *weight, const double *distance, int64_t keys,
                                double worst) {
    double moved = 0.0;
    for (int64_t first = 0; first < keys; first += VALUES_OF_A_BLOCK) {
        double top = 0.0, distances = 0.0;
        for (int64_t j = first; j < keys && j < first + VALUES_OF_A_BLOCK; j++) {
            top = weight[j] > top ? weight[j] : top;
            distances += distance[j];
        }
        moved += top * distances;
    }
    return 1.02 * exp(2 * worst) * HALF_A_WEIGHT * moved;
}

#endif /* WAN_ATTN_TESTS_EIGHT_BITS_H */
