/* SPDX-License-Identifier: Apache-2.0
 * rope.h - what the CPU rows of rms_norm_rope share: which angles a token turns by, and who
 * computes which tokens. Knows no instruction set.
 */
#ifndef WAN_ATTN_CPU_ROPE_H
#define WAN_ATTN_CPU_ROPE_H

#include <math.h>

#include "core/rope.h"

/* Elements behind a row of angles, so that vectors may read past its end. */
enum { WAN_ATTN_ROPE_ANGLES = WAN_ATTN_ROPE_MAX_HEAD_DIM + 8 };

/* One token: all heads of x's row s of sample b. */
typedef struct wan_attn_rope_token {
    int64_t b, s;
    wan_attn_grid grid; /* of its sample; without grid_sizes not set */
} wan_attn_rope_token;

typedef void (*wan_attn_rope_token_fn)(const wan_attn_rope_problem *p,
                                       const wan_attn_rope_token *token);

/* cos and sin of every pair of this head, in turn, as float64. 0: the token is not rotated. */
int wan_attn_rope_angles(const wan_attn_rope_problem *p, const wan_attn_rope_token *token,
                         int64_t head, double angles[WAN_ATTN_ROPE_ANGLES]);

/* Whether every head has angles of its own, so that they are asked for again. */
static inline int wan_attn_rope_has_angles_of_heads(const wan_attn_rope_problem *p) {
    return p->table.data && p->table.head_stride != 0;
}

/* 1 / sqrt(mean(x^2) + eps), from the sum of the squares of `heads` heads. */
static inline float wan_attn_rope_scale(const wan_attn_rope_problem *p, double sum, int64_t heads) {
    return (float)(1.0 / sqrt(sum / (double)(heads * p->head_dim) + p->eps));
}

/* Calls fn for every token, in some order, on the caller's threads. */
wan_attn_status wan_attn_rope_run(const wan_attn_rope_problem *p, wan_attn_rope_token_fn fn,
                                  wan_attn_error *err);

#endif /* WAN_ATTN_CPU_ROPE_H */
