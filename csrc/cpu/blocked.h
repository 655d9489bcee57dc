/* SPDX-License-Identifier: Apache-2.0
 * blocked.h - what the vectorised rows share: how a call is cut into blocks and tiles, where they
 * lie in the workspace, and who computes them when. Knows no instruction set.
 *
 *            BLOCK_N keys    pair   one head of K and V of one sample, shared by its query heads
 *           +------------+   block  BLOCK_N keys of a pair, packed once into the order of use
 *    panel  |    S, P    |   panel  some 50 queries of one head: the width of a register tile
 *           +------------+   tile   up to MAX_PANELS panels: one task; they share a block of keys
 *
 * Phases of a call, for each group of pairs that fits the workspace: pack all blocks, then compute
 * all tiles. Both are lists of independent tasks for threads.h. Calls of few rows have one phase
 * (sdpa_few.inc), and pack nothing. With lists of blocks a tile is within one block of queries, so
 * that it has one list (sdpa_lists.inc).
 */
#ifndef WAN_ATTN_CPU_BLOCKED_H
#define WAN_ATTN_CPU_BLOCKED_H

#include "core/lists.h"
#include "cpu/lost.h"

enum { WAN_ATTN_MAX_PANELS = 4, WAN_ATTN_MAX_PANEL = 64, WAN_ATTN_MAX_WIDTH = 256 };

/* Rows that a task of compute_few may have. */
enum { WAN_ATTN_MAX_FEW = 32 };

typedef struct wan_attn_plan wan_attn_plan;

/* Where a packed block of keys goes or is. */
typedef struct wan_attn_packed_block {
    float *k, *v;
    uint8_t *has_nonfinite_v; /* 1: some value is infinite or NaN, 0 times it is not 0 */
    int64_t first_key, count; /* keys [first_key, first_key + count); 1 to BLOCK_N     */
    int64_t pair_slot;
} wan_attn_packed_block;

/* One tile: queries [first_row, first_row + count) of head `head` of sample b. */
typedef struct wan_attn_tile {
    int64_t b, head, pair_slot; /* slot of its pair in the workspace */
    int64_t first_row, count;
} wan_attn_tile;

/* What an instruction set brings along. A "unit" is 32 bits of packed input: one float or two
 * bfloat16. */
typedef struct wan_attn_blocking {
    int64_t unit;           /* elements in a unit: 1 or 2                                     */
    int64_t block_n;        /* keys in a block                                                */
    int64_t panel;          /* queries in a panel, <= WAN_ATTN_MAX_PANEL                      */
    int64_t most_panels;    /* of a tile, <= WAN_ATTN_MAX_PANELS                              */
    int64_t few_rows;       /* up to so many queries pack nothing (sdpa_few.inc), <= MAX_FEW  */
    int64_t depth_multiple; /* units of K and Q are padded with zeros to a multiple of this   */
    int64_t width_multiple; /* rows of O^T (head_dim) are padded to a multiple of this        */
    int64_t row_numbers;    /* floats of scratch for each row, beside Q, O and S               */
    int64_t value_numbers;  /* floats of a packed block for each row of V^T, beside V          */
    /* The next three may be NULL. depth_of: units of one row of Q or K; NULL: head_dim / unit. */
    int64_t (*depth_of)(int64_t head_dim);
    /* What has to be known of all keys of a pair before tiles are computed: survey looks at one
     * block of them, conclude at what survey has left, survey_floats floats at wan_attn_survey_at;
     * 0: this call needs none. */
    int64_t (*survey_floats)(const wan_attn_plan *plan, const wan_attn_problem *p);
    void (*survey)(const wan_attn_plan *plan, int64_t b, int64_t head_k, int64_t pair_slot,
                   int64_t block);
    void (*conclude)(const wan_attn_plan *plan, int64_t b, int64_t pair_slot);
    void (*pack)(const wan_attn_plan *plan, int64_t b, int64_t head_k,
                 const wan_attn_packed_block *to);
    /* `next`: the tile that this thread will probably compute next, or NULL; what to prefetch. */
    void (*compute)(const wan_attn_plan *plan, const wan_attn_tile *tile, const wan_attn_tile *next,
                    float *scratch);
    /* All rows of few_heads heads from tile->head on; tile->count is how many rows these are. */
    void (*compute_few)(const wan_attn_plan *plan, const wan_attn_tile *tile, float *scratch);
} wan_attn_blocking;

struct wan_attn_plan {
    const wan_attn_problem *p; /* set when the call runs: its problem may have moved by then */
    const wan_attn_blocking *blocking;
    int64_t depth;    /* units of one row of Q or K, padded    */
    int64_t width;    /* rows of O^T, padded                   */
    float q_factor;   /* sign of softmax_scale, or 0: packing Q multiplies it by this, so that the
                         largest score is always the largest weight */
    float log2_scale; /* |softmax_scale| * log2(e)              */

    int64_t k_bytes, v_bytes, blocks, pair_bytes; /* of one packed block; blocks of one pair */
    int64_t survey_floats;                        /* of one pair */
    int64_t pairs, pairs_per_group;
    int64_t first_pair, group_pairs; /* of the group at work */
    int64_t panels_per_tile, tiles_per_head, tiles_per_pair;
    int heads_together; /* the order of tiles: see blocked.c */
    int64_t few_heads;  /* not 0: few rows; heads that a task of compute_few takes together */
    int64_t workers, scratch_floats;
    size_t workspace_bytes;
    wan_attn_flags *lost; /* of all rows: lost.h */
};

/* Fills the problem's plan and workspace_size: with this blocking every dense call can be taken, and
 * with `listed` those with lists of blocks or a skip_threshold; NULL: there are none. */
void wan_attn_blocked_plan(wan_attn_problem *p, const wan_attn_blocking *blocking,
                           const wan_attn_blocking *listed);

/* Runs the problem, as it was planned; `blocking`, if its lists have turned out to be full. */
void wan_attn_blocked_run(const wan_attn_problem *p, const wan_attn_blocking *blocking);

/* For `compute`: the packed block that holds the keys from block * BLOCK_N on; count is what is
 * real for a sample of len_k. */
wan_attn_packed_block wan_attn_packed_block_at(const wan_attn_plan *plan, int64_t pair_slot,
                                               int64_t block, int64_t len_k);

/* For a row with a survey: what it leaves, and what it concludes, of the pair in this slot. */
float *wan_attn_survey_at(const wan_attn_plan *plan, int64_t pair_slot);

/* The real lengths of sample b. */
static inline int64_t wan_attn_len_q(const wan_attn_problem *p, int64_t b) {
    return wan_attn_length_at(&p->seqused_q, b, p->seqlen_q);
}
static inline int64_t wan_attn_len_k(const wan_attn_problem *p, int64_t b) {
    return wan_attn_length_at(&p->seqused_k, b, p->seqlen_k);
}

#endif /* WAN_ATTN_CPU_BLOCKED_H */
