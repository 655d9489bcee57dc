/* SPDX-License-Identifier: Apache-2.0
 * lost.h - the certificate of a skip_threshold: what share of its weights a row lacks at most.
 * Knows no kernel.
 *
 * Of a block of keys that is left out the weights are summed, as softmax would: beside the scores,
 * which are known, that is little. With `lost`, the sum over all of them in the unit of row_sum, so
 * that both shrink as the maximum rises, the row lacks lost / (row_sum + lost) of all it should
 * have, but for rounding, which is counted in.
 */
#ifndef WAN_ATTN_CPU_LOST_H
#define WAN_ATTN_CPU_LOST_H

#include "core/atomic.h"
#include "core/kernel.h"
#include "cpu/half.h"

/* What weights below float32's normal numbers, which count as 0, may add up to in a row. */
#define LOST_AT_LEAST 0x1p-100f

/* The rounding of scores and weights; of sums, which take a few for each block of keys. */
static inline float wan_attn_lost_rounding(int64_t keys) {
    return 1.001f + (float)keys * (0x1p-21f / WAN_ATTN_BLOCK);
}

/* `lost` of a row whose maximum has risen: all before is worth alpha of what it was. */
static inline float wan_attn_lost_after(float lost, float alpha) {
    return lost > 0.0f ? lost * alpha + LOST_AT_LEAST : 0.0f;
}

/* Takes a row into account. *most: the largest share so far, a float that is not negative, whose
 * bits are ordered as it is. keys: that there are. */
static inline void wan_attn_note_lost(wan_attn_flags *most, float lost, float row_sum,
                                      int64_t keys) {
    if (lost > 0.0f) {
        float share = lost * wan_attn_lost_rounding(keys) / (row_sum + lost) + LOST_AT_LEAST;
        wan_attn_raise(most, wan_attn_bits_of_float(share < 1.0f ? share : 1.0f));
    }
}

/* Tells the call's guard, if it has one that wants to know. */
static inline void wan_attn_tell_lost(const wan_attn_problem *p, wan_attn_flags *most) {
    float *lost_mass = wan_attn_lost_mass_of(p->params);
    float lost = wan_attn_float_of_bits(wan_attn_load(most));
    if (lost_mass && lost > *lost_mass)
        *lost_mass = lost;
}

#endif /* WAN_ATTN_CPU_LOST_H */
