/* SPDX-License-Identifier: Apache-2.0
 * backward_blocked.h - what the vectorised backward rows share: how a call is cut, where its parts
 * lie in the workspace, and who computes them when. Knows no instruction set.
 *
 *             a panel of keys
 *           +----------------+   pair   one head of K and V of one sample, and the query heads that
 *    block  |     P, dS      |          share it
 *  of rows  |                |   panel  24 or 48 keys: the width of a register tile. dK and dV of a
 *           +----------------+          panel grow as block after block passes
 *                                strip  some blocks of rows, for which all of dS is kept
 *
 * Phases of a call, for each group of pairs that fits the workspace: pack all keys; then, for each
 * query head of a pair and each strip: pack its rows; of few, find lse and delta; compute
 * dS and add to dK and dV, a few panels a task; compute dQ from dS, a panel of rows a task. At the
 * end, store dK and dV. Every number is summed by one task at a time and in one order, so that it
 * has the same bits on any number of threads.
 */
#ifndef WAN_ATTN_CPU_BACKWARD_BLOCKED_H
#define WAN_ATTN_CPU_BACKWARD_BLOCKED_H

#include <math.h>

#include "core/backward.h"
#include "core/util.h"
#include "cpu/blocked.h"

typedef struct wan_attn_backward_step wan_attn_backward_step;

/* What an instruction set brings along. A "unit" is 32 bits of packed input: one float or two
 * bfloat16. */
typedef struct wan_attn_backward_blocking {
    int64_t unit;    /* elements in a unit: 1 or 2                            */
    int64_t panel;   /* keys in a panel; rows in a panel of dQ                */
    int64_t block_m; /* query rows in a block: a multiple of panel and of 8   */
    /* All take the slot of their pair in the workspace. */
    void (*pack_keys)(const wan_attn_backward_step *step, int64_t slot, int64_t panel);
    void (*pack_rows)(const wan_attn_backward_step *step, int64_t slot, int64_t block);
    /* After keys and rows are packed, where the call has few rows: their lse and delta. */
    void (*find_lse)(const wan_attn_backward_step *step, int64_t slot, int64_t block);
    void (*add_panel)(const wan_attn_backward_step *step, int64_t slot, int64_t panel,
                      int64_t block, float *scratch);
    void (*find_dq)(const wan_attn_backward_step *step, int64_t slot, int64_t row_panel,
                    float *scratch);
    void (*store_keys)(const wan_attn_backward_step *step, int64_t slot, int64_t panel);
} wan_attn_backward_blocking;

/* Made from the sizes of a call and its threads. */
typedef struct wan_attn_backward_plan {
    const wan_attn_backward_blocking *blocking;
    int64_t depth;  /* units of one row                                     */
    int64_t width;  /* rows of dQ^T, dK^T, dV^T: head_dim, padded           */
    float scale;    /* softmax_scale                                        */
    int64_t panels; /* of keys, of one pair                                 */
    int64_t strip;  /* blocks of rows in a strip                            */
    int64_t panel_floats, block_floats, ds_floats, pair_floats, scratch_floats;
    int64_t pairs, pairs_per_group, panels_per_task, workers;
    size_t workspace_bytes;
} wan_attn_backward_plan;

/* Where a call stands. */
struct wan_attn_backward_step {
    const wan_attn_backward_problem *p;
    const wan_attn_problem *call;
    wan_attn_backward_plan plan;
    int64_t first_pair, group_pairs;
    int64_t head;      /* of the pair's query heads     */
    int64_t first_row; /* of the strip                  */
    int64_t blocks;    /* of the strip: its last may have fewer */
};

/* A pair of the group: its sample, its head of K, the query head at work; and lengths. */
typedef struct wan_attn_backward_pair {
    int64_t b, head_k, head, len_q, len_k;
} wan_attn_backward_pair;

/* A packed panel of keys. */
typedef struct wan_attn_backward_keys {
    float *k, *v;             /* [depth][panel] units                      */
    float *dk_t, *dv_t;       /* [width][panel]                            */
    float *k_sum;             /* [width / ROWS][all keys / unit][ROWS] units: of the pair */
    uint8_t *has_nonfinite_k; /* 1: 0 times some number of K is not 0 */
    int64_t first, count;     /* real keys; count may be negative     */
} wan_attn_backward_keys;

/* A packed block of rows. */
typedef struct wan_attn_backward_rows {
    float *q, *dout;         /* [block_m / ROWS][depth][ROWS] units          */
    float *q_sum, *dout_sum; /* [width / ROWS][block_m / unit][ROWS] units    */
    float *neg_lse, *delta;  /* [block_m]: -lse, -inf for a row without keys */
    float *has_nonfinite;    /* 1: some number of Q or dO is infinite or NaN  */
    float *ds_t;             /* [block_m / panel][all keys / unit][panel] units */
    int64_t first, count;
} wan_attn_backward_rows;

/* Whether forward may have summed scores in an order of its own (sdpa_few.inc), so that its lse and
 * out do not fit the scores of the gradients. */
static inline int wan_attn_backward_is_few(const wan_attn_problem *call) {
    return call->seqlen_q <= WAN_ATTN_MAX_FEW;
}

/* A single key weighs 1, and only lse's gradient changes that. Its lse is its score, so the two may
 * differ by what large scores are rounded by; where they are infinite or NaN, what comes of that
 * stays, and so it does in dS, where dout or v is. */
static inline void wan_attn_weigh_single_key(float lse, float delta, float dlse, float *p,
                                             float *ds) {
    if (!isfinite(lse))
        return;
    *p = 1.0f;
    if (isfinite(delta))
        *ds = dlse;
}

const char *wan_attn_backward_blocked_plan(wan_attn_backward_problem *p,
                                           const wan_attn_backward_blocking *blocking);
wan_attn_status wan_attn_backward_blocked_run(const wan_attn_backward_problem *p,
                                              wan_attn_error *err);

wan_attn_backward_pair wan_attn_backward_pair_at(const wan_attn_backward_step *step, int64_t slot);
wan_attn_backward_keys wan_attn_backward_keys_at(const wan_attn_backward_step *step, int64_t slot,
                                                 int64_t panel);
wan_attn_backward_rows wan_attn_backward_rows_at(const wan_attn_backward_step *step, int64_t slot,
                                                 int64_t block);

#endif /* WAN_ATTN_CPU_BACKWARD_BLOCKED_H */
