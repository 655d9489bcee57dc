/* SPDX-License-Identifier: Apache-2.0
 * blocked.c - cuts a call into packed blocks and tiles and runs them on the threads (see
 * blocked.h). Knows no instruction set.
 */
#include "cpu/blocked.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu/large_pages.h"
#include "cpu/lost.h"
#include "cpu/threads.h"

/* Packed K and V of one group. Large enough that a group keeps many cores busy, small enough not to
 * matter beside a model; but always at least one pair, which takes as much as its K and V. */
#define GROUP_BYTES (128ll << 20)

/* While the keys of all heads stay in the cache, tiles of the same rows follow each other: heads
 * lie side by side in a row, so their queries and outputs share pages of memory. Beyond, the tiles
 * of a head follow each other and share its keys. */
#define CACHED_BYTES (8ll << 20)

/* With fewer tiles than this for each thread, the last ones to finish would leave the others
 * waiting. */
enum { TILES_PER_WORKER = 3, CACHE_LINE = 64 };

static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t round_up(int64_t n, int64_t to) { return wan_attn_divide_up(n, to) * to; }

static void choose_tiles(const wan_attn_problem *p, const wan_attn_blocking *blocking,
                         wan_attn_plan *plan) {
    int64_t heads = p->batch * p->num_heads_q,
            panels = wan_attn_divide_up(p->seqlen_q, blocking->panel);
    int64_t threads = wan_attn_workers(p->params, INT64_MAX);
    plan->panels_per_tile = blocking->most_panels;
    while (plan->panels_per_tile > 1 &&
           heads * wan_attn_divide_up(panels, plan->panels_per_tile) < threads * TILES_PER_WORKER)
        plan->panels_per_tile /= 2;
    plan->panels_per_tile = max_of(1, min_of(plan->panels_per_tile, panels));
    plan->tiles_per_head = wan_attn_divide_up(panels, plan->panels_per_tile);
    plan->tiles_per_pair = plan->tiles_per_head * (p->num_heads_q / p->num_heads_k);
}

/* Few rows would leave most lanes of a panel unused. A task takes several heads that share K and V,
 * but no more than leave every thread a task. */
static void plan_few(const wan_attn_problem *p, wan_attn_plan *plan) {
    const int64_t block_n = plan->blocking->block_n;
    const int64_t share = p->num_heads_q / p->num_heads_k; /* query heads with the same K and V */
    const int64_t threads = wan_attn_workers(p->params, INT64_MAX);
    int64_t heads = max_of(1, min_of(share, plan->blocking->few_rows / max_of(1, p->seqlen_q)));
    while (heads > 1 && (share % heads || p->batch * p->num_heads_q / heads < threads))
        heads--;
    plan->few_heads = heads;
    plan->width = round_up(p->head_dim, CACHE_LINE / (int64_t)sizeof(float));
    plan->workers = wan_attn_workers(p->params, p->batch * p->num_heads_q / heads);
    /* Q and O, scores with a vector behind them; a block of K or V. */
    int64_t floats_per_row = 2 * plan->width + block_n + CACHE_LINE / (int64_t)sizeof(float);
    plan->scratch_floats = round_up(heads * p->seqlen_q * floats_per_row + block_n * plan->width,
                                    CACHE_LINE / (int64_t)sizeof(float));
    plan->workspace_bytes = (size_t)(plan->workers * plan->scratch_floats * (int64_t)sizeof(float));
}

static wan_attn_plan make_plan(const wan_attn_problem *p, const wan_attn_blocking *blocking) {
    wan_attn_plan plan = {.blocking = blocking};
    plan.depth = blocking->depth_of ? blocking->depth_of(p->head_dim)
                                    : round_up(wan_attn_divide_up(p->head_dim, blocking->unit),
                                               blocking->depth_multiple);
    plan.width = round_up(p->head_dim, blocking->width_multiple);
    plan.q_factor = p->softmax_scale < 0.0 ? -1.0f : p->softmax_scale > 0.0 ? 1.0f : 0.0f;
    /* Finite, or the largest score, 0 times this, would become NaN. */
    plan.log2_scale = (float)fmin(fabs(p->softmax_scale) * WAN_ATTN_LOG2_E, FLT_MAX);

    if (p->seqlen_q <= blocking->few_rows) {
        plan_few(p, &plan);
        return plan;
    }
    plan.k_bytes = blocking->block_n * plan.depth * (int64_t)sizeof(float);
    plan.v_bytes = (blocking->block_n / blocking->unit + blocking->value_numbers) * plan.width *
                   (int64_t)sizeof(float);
    plan.blocks = wan_attn_divide_up(p->seqlen_k, blocking->block_n);
    if (blocking->survey_floats)
        plan.survey_floats =
            round_up(blocking->survey_floats(&plan, p), CACHE_LINE / (int64_t)sizeof(float));
    plan.pair_bytes =
        plan.blocks * (plan.k_bytes + plan.v_bytes) + plan.survey_floats * (int64_t)sizeof(float);
    plan.pairs = p->batch * p->num_heads_k;
    int64_t groups =
        wan_attn_divide_up(plan.pairs, max_of(1, GROUP_BYTES / max_of(1, plan.pair_bytes)));
    plan.pairs_per_group = wan_attn_divide_up(plan.pairs, max_of(1, groups));

    plan.heads_together = plan.pairs * plan.pair_bytes <= CACHED_BYTES;
    choose_tiles(p, blocking, &plan);
    plan.workers = wan_attn_workers(p->params, plan.pairs_per_group *
                                                   max_of(plan.tiles_per_pair, plan.blocks));
    /* Q^T and O^T of each panel, S of one; some numbers for each row (maximum, sum and so on). */
    plan.scratch_floats =
        round_up(blocking->panel *
                     (plan.panels_per_tile * (plan.depth + plan.width + blocking->row_numbers) +
                      blocking->block_n),
                 CACHE_LINE / (int64_t)sizeof(float));
    plan.workspace_bytes = (size_t)(plan.pairs_per_group * plan.pair_bytes +
                                    round_up(plan.pairs_per_group * plan.blocks, CACHE_LINE) +
                                    plan.workers * plan.scratch_floats * (int64_t)sizeof(float));
    return plan;
}

_Static_assert(sizeof(wan_attn_plan) <= sizeof(wan_attn_row_plan), "a problem carries the plan");

static int is_dense(const wan_attn_problem *p) {
    return !p->has_lists && p->skip_threshold == 0.0f;
}

void wan_attn_blocked_plan(wan_attn_problem *p, const wan_attn_blocking *blocking,
                           const wan_attn_blocking *listed) {
    wan_attn_plan plan = make_plan(p, blocking);
    size_t size = plan.workspace_bytes; /* lists may be full, which is known as the call runs */
    if (!is_dense(p))
        plan = make_plan(p, listed);
    memcpy(&p->plan, &plan, sizeof(plan));
    p->workspace_size = plan.workspace_bytes > size ? plan.workspace_bytes : size;
}

wan_attn_packed_block wan_attn_packed_block_at(const wan_attn_plan *plan, int64_t pair_slot,
                                               int64_t block, int64_t len_k) {
    char *base = (char *)plan->p->params->workspace;
    char *k = base + pair_slot * plan->pair_bytes + block * (plan->k_bytes + plan->v_bytes);
    char *flags = base + plan->pairs_per_group * plan->pair_bytes;
    int64_t first_key = block * plan->blocking->block_n;
    wan_attn_packed_block at = {(float *)k,
                                (float *)(k + plan->k_bytes),
                                (uint8_t *)flags + pair_slot * plan->blocks + block,
                                first_key,
                                min_of(plan->blocking->block_n, len_k - first_key),
                                pair_slot};
    return at;
}

float *wan_attn_survey_at(const wan_attn_plan *plan, int64_t pair_slot) {
    char *end = (char *)plan->p->params->workspace + (pair_slot + 1) * plan->pair_bytes;
    return (float *)end - plan->survey_floats;
}

/* Task numbers run over [pair of the group][block]. */
static void survey_block(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_plan *plan = (const wan_attn_plan *)ctx;
    const wan_attn_problem *p = plan->p;
    (void)worker;
    int64_t slot = task / plan->blocks, pair = plan->first_pair + slot;
    plan->blocking->survey(plan, pair / p->num_heads_k, pair % p->num_heads_k, slot,
                           task % plan->blocks);
}

static void conclude_pair(int64_t slot, int64_t worker, void *ctx) {
    const wan_attn_plan *plan = (const wan_attn_plan *)ctx;
    (void)worker;
    plan->blocking->conclude(plan, (plan->first_pair + slot) / plan->p->num_heads_k, slot);
}

/* Task numbers run over [pair of the group][block]. */
static void pack_block(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_plan *plan = (const wan_attn_plan *)ctx;
    const wan_attn_problem *p = plan->p;
    (void)worker;
    int64_t slot = task / plan->blocks, pair = plan->first_pair + slot;
    int64_t b = pair / p->num_heads_k, len_q = wan_attn_len_q(p, b), len_k = wan_attn_len_k(p, b);
    wan_attn_packed_block to = wan_attn_packed_block_at(plan, slot, task % plan->blocks, len_k);
    /* The first and the last row bound what any row sees; without rows they are not read. */
    int64_t begin = wan_attn_visible_keys(p, 0, len_q, len_k).begin;
    int64_t end = len_q ? wan_attn_visible_keys(p, len_q - 1, len_q, len_k).end : 0;
    if (to.count > 0 && to.first_key < end && to.first_key + to.count > begin)
        plan->blocking->pack(plan, b, pair % p->num_heads_k, &to);
}

/* Task numbers run over [pair of the group][query head of the pair][tile], or over [tile][pair]
 * [query head] where all keys stay in the cache. Tiles go from the last: under a causal mask the
 * last rows see most, and long tasks should not come last. */
static wan_attn_tile tile_of(const wan_attn_plan *plan, int64_t task) {
    const wan_attn_problem *p = plan->p;
    int64_t heads_per_pair = p->num_heads_q / p->num_heads_k;
    int64_t heads = plan->group_pairs * heads_per_pair;
    int64_t head = plan->heads_together ? task % heads : task / plan->tiles_per_head;
    int64_t tile = plan->heads_together ? task / heads : task % plan->tiles_per_head;
    int64_t slot = head / heads_per_pair, pair = plan->first_pair + slot;
    int64_t rows = plan->panels_per_tile * plan->blocking->panel;
    int64_t first_row = (plan->tiles_per_head - 1 - tile) * rows;
    wan_attn_tile at = {.b = pair / p->num_heads_k,
                        .head = pair % p->num_heads_k * heads_per_pair + head % heads_per_pair,
                        .pair_slot = slot,
                        .first_row = first_row,
                        .count = min_of(rows, p->seqlen_q - first_row)};
    return at;
}

static float *scratch_of(const wan_attn_plan *plan, int64_t worker) {
    char *end = (char *)plan->p->params->workspace + plan->workspace_bytes;
    return (float *)end - (plan->workers - worker) * plan->scratch_floats;
}

/* Task numbers run over [sample][few_heads of the query heads]. */
static void compute_few(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_plan *plan = (const wan_attn_plan *)ctx;
    const wan_attn_problem *p = plan->p;
    int64_t tasks = p->num_heads_q / plan->few_heads; /* of a sample */
    wan_attn_tile tile = {.b = task / tasks,
                          .head = task % tasks * plan->few_heads,
                          .count = plan->few_heads * p->seqlen_q};
    plan->blocking->compute_few(plan, &tile, scratch_of(plan, worker));
}

static void compute_tile(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_plan *plan = (const wan_attn_plan *)ctx;
    int64_t after = task + plan->workers; /* tasks are handed out in order, to all in turn */
    int has_next = after < plan->group_pairs * plan->tiles_per_pair;
    wan_attn_tile tile = tile_of(plan, task), next = has_next ? tile_of(plan, after) : tile;
    plan->blocking->compute(plan, &tile, has_next ? &next : NULL, scratch_of(plan, worker));
}

/* The output and the workspace are often fresh from the system. */
static void prefer_large_pages(const wan_attn_plan *plan) {
    const wan_attn_problem *p = plan->p;
    const wan_attn_view *out = &p->out;
    int64_t last = (p->batch - 1) * out->batch_stride + (p->seqlen_q - 1) * out->row_stride +
                   (p->num_heads_q - 1) * out->head_stride + p->head_dim;
    wan_attn_prefer_large_pages(out->data, last * wan_attn_dtype_size(out->dtype));
    wan_attn_prefer_large_pages(p->params->workspace, (int64_t)plan->workspace_bytes);
}

void wan_attn_blocked_run(const wan_attn_problem *p, const wan_attn_blocking *blocking) {
    wan_attn_plan plan;
    wan_attn_flags lost = 0;
    memcpy(&plan, &p->plan, sizeof(plan));
    if (is_dense(p) && plan.blocking != blocking)
        plan = make_plan(p, blocking);
    plan.p = p;
    plan.lost = &lost;
    prefer_large_pages(&plan);
    if (plan.few_heads) {
        wan_attn_run_tasks(p->params, p->batch * p->num_heads_q / plan.few_heads, compute_few,
                           &plan);
        return;
    }
    for (; plan.first_pair < plan.pairs; plan.first_pair += plan.pairs_per_group) {
        plan.group_pairs = min_of(plan.pairs_per_group, plan.pairs - plan.first_pair);
        if (plan.survey_floats) {
            wan_attn_run_tasks(p->params, plan.group_pairs * plan.blocks, survey_block, &plan);
            wan_attn_run_tasks(p->params, plan.group_pairs, conclude_pair, &plan);
        }
        wan_attn_run_tasks(p->params, plan.group_pairs * plan.blocks, pack_block, &plan);
        wan_attn_run_tasks(p->params, plan.group_pairs * plan.tiles_per_pair, compute_tile, &plan);
    }
    wan_attn_tell_lost(p, &lost);
}
