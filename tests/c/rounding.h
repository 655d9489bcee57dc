/* SPDX-License-Identifier: Apache-2.0
 * rounding.h - what arithmetic may be off by, as oracles count it, and dense copies of operands in
 * double precision. Shares no code with csrc/.
 */
#ifndef WAN_ATTN_TESTS_ROUNDING_H
#define WAN_ATTN_TESTS_ROUNDING_H

#include <float.h>

#include "elements.h"

enum { MOST_KEYS = 512, MOST_HEAD_DIM = 256 };

static const double UNIT_F32 = 0x1p-24, UNIT_BF16 = 0x1p-8, EXP_ERROR = 0x1p-20;

/* What a row computes products in. */
typedef enum arithmetic { IN_FLOATS, IN_BF16, IN_EIGHT_BITS } arithmetic;

static double *decode(const wan_attn_tensor *t, double *to) {
    for (int64_t a = 0; a < t->shape[0]; a++)
        for (int64_t b = 0; b < t->shape[1]; b++)
            for (int64_t c = 0; c < t->shape[2]; c++)
                for (int64_t d = 0; d < (t->ndim == 4 ? t->shape[3] : 1); d++)
                    *to++ = value_at(t, a, b, c, d);
    return to;
}

static double unit_of(int32_t dtype) {
    return dtype == WAN_ATTN_F16 ? 0x1p-11 : dtype == WAN_ATTN_BF16 ? UNIT_BF16 : UNIT_F32;
}

static double tiniest(int32_t dtype) { return dtype == WAN_ATTN_F16 ? 0x1p-24 : 2 * FLT_MIN; }

#endif /* WAN_ATTN_TESTS_ROUNDING_H */
