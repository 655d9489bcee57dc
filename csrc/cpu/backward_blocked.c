/* SPDX-License-Identifier: Apache-2.0
 * backward_blocked.c - cuts a backward call into panels, blocks and strips, and runs them on the
 * threads (see backward_blocked.h). Knows no instruction set.
 */
#include "cpu/backward_blocked.h"

#include <string.h>

#include "cpu/large_pages.h"
#include "cpu/threads.h"

/* Packed keys, dK, dV and strips of one group; always at least one pair. */
#define GROUP_BYTES (256ll << 20)

/* dS of a strip: what is small enough to come back from the cache, but always at least a block. A
 * strip ends with all threads waiting for the last one. */
#define STRIP_BYTES (8ll << 20)

/* Panels of a task share each block of rows while it is in the cache. With fewer tasks than this
 * for each thread, the last ones to finish would leave the others waiting. */
enum { MAX_PANELS = 4, TASKS_PER_WORKER = 3, ALIGNED_FLOATS = 16, MULTIPLE = 8 };

static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t round_up(int64_t n, int64_t to) { return wan_attn_divide_up(n, to) * to; }

static int64_t keys_in_units(const wan_attn_backward_plan *plan) {
    return plan->panels * plan->blocking->panel / plan->blocking->unit;
}

/* Floats of a block of rows: q and dout in two orders; lse, delta and a flag. */
static int64_t floats_of_block(const wan_attn_backward_plan *plan) {
    const wan_attn_backward_blocking *blocking = plan->blocking;
    return 2 * blocking->block_m * plan->depth +
           2 * plan->width * (blocking->block_m / blocking->unit) + 2 * blocking->block_m +
           ALIGNED_FLOATS;
}

static void choose_strip(const wan_attn_problem *call, wan_attn_backward_plan *plan) {
    plan->ds_floats = plan->blocking->block_m * keys_in_units(plan);
    int64_t bytes = max_of(1, plan->ds_floats * (int64_t)sizeof(float));
    int64_t blocks = max_of(1, wan_attn_divide_up(call->seqlen_q, plan->blocking->block_m));
    plan->strip = max_of(1, min_of(blocks, STRIP_BYTES / bytes));
}

static void choose_tasks(const wan_attn_problem *call, wan_attn_backward_plan *plan) {
    int64_t threads = wan_attn_workers(call->params, INT64_MAX);
    plan->panels_per_task = MAX_PANELS;
    while (plan->panels_per_task > 1 &&
           plan->pairs_per_group * wan_attn_divide_up(plan->panels, plan->panels_per_task) <
               threads * TASKS_PER_WORKER)
        plan->panels_per_task /= 2;
    int64_t row_panels = plan->strip * (plan->blocking->block_m / plan->blocking->panel);
    plan->workers =
        wan_attn_workers(call->params, plan->pairs_per_group * max_of(row_panels, plan->panels));
}

static wan_attn_backward_plan make_plan(const wan_attn_problem *call,
                                        const wan_attn_backward_blocking *blocking) {
    wan_attn_backward_plan plan = {.blocking = blocking};
    plan.depth = wan_attn_divide_up(call->head_dim, blocking->unit);
    plan.width = round_up(call->head_dim, MULTIPLE);
    plan.scale = (float)call->softmax_scale;
    plan.panels = wan_attn_divide_up(call->seqlen_k, blocking->panel);
    plan.panel_floats = round_up(2 * (plan.depth + plan.width) * blocking->panel, ALIGNED_FLOATS);
    plan.block_floats = round_up(floats_of_block(&plan), ALIGNED_FLOATS);
    choose_strip(call, &plan);
    plan.pair_floats =
        round_up(plan.panels * plan.panel_floats + plan.width * keys_in_units(&plan) +
                     plan.strip * (plan.block_floats + plan.ds_floats) +
                     wan_attn_divide_up(plan.panels, sizeof(float)),
                 ALIGNED_FLOATS);
    plan.pairs = call->batch * call->num_heads_k;
    int64_t fit = max_of(1, GROUP_BYTES / (plan.pair_floats * (int64_t)sizeof(float)));
    int64_t groups = max_of(1, wan_attn_divide_up(plan.pairs, fit));
    plan.pairs_per_group = wan_attn_divide_up(plan.pairs, groups);
    choose_tasks(call, &plan);
    /* P and dS of a panel and a block; 8 rows of each before they are packed; dQ^T of a panel. */
    plan.scratch_floats = round_up(
        blocking->panel * (2 * blocking->block_m + 2 * MULTIPLE + plan.width), ALIGNED_FLOATS);
    plan.workspace_bytes =
        (size_t)((plan.pairs_per_group * plan.pair_floats + plan.workers * plan.scratch_floats) *
                 (int64_t)sizeof(float));
    return plan;
}

_Static_assert(sizeof(wan_attn_backward_plan) <= sizeof(wan_attn_row_plan),
               "a problem carries the plan");

const char *wan_attn_backward_blocked_plan(wan_attn_backward_problem *p,
                                           const wan_attn_backward_blocking *blocking) {
    wan_attn_backward_plan plan = make_plan(&p->call, blocking);
    memcpy(&p->call.plan, &plan, sizeof(plan));
    p->call.workspace_size = plan.workspace_bytes;
    return NULL;
}

wan_attn_backward_pair wan_attn_backward_pair_at(const wan_attn_backward_step *step, int64_t slot) {
    const wan_attn_problem *call = step->call;
    int64_t pair = step->first_pair + slot, share = call->num_heads_q / call->num_heads_k;
    int64_t b = pair / call->num_heads_k, head_k = pair % call->num_heads_k;
    wan_attn_backward_pair at = {b, head_k, head_k * share + step->head,
                                 wan_attn_length_at(&call->seqused_q, b, call->seqlen_q),
                                 wan_attn_length_at(&call->seqused_k, b, call->seqlen_k)};
    return at;
}

static float *pair_memory(const wan_attn_backward_step *step, int64_t slot) {
    return (float *)step->call->params->workspace + slot * step->plan.pair_floats;
}

wan_attn_backward_keys wan_attn_backward_keys_at(const wan_attn_backward_step *step, int64_t slot,
                                                 int64_t panel) {
    const wan_attn_backward_plan *plan = &step->plan;
    int64_t size = plan->blocking->panel, first = panel * size;
    int64_t len_k = wan_attn_backward_pair_at(step, slot).len_k;
    float *pair = pair_memory(step, slot), *at = pair + panel * plan->panel_floats;
    uint8_t *flags = (uint8_t *)(pair + plan->pair_floats) - plan->panels;
    wan_attn_backward_keys keys = {.k = at,
                                   .v = at + plan->depth * size,
                                   .dk_t = at + 2 * plan->depth * size,
                                   .dv_t = at + (2 * plan->depth + plan->width) * size,
                                   .k_sum = pair + plan->panels * plan->panel_floats,
                                   .has_nonfinite_k = flags + panel,
                                   .first = first,
                                   .count = min_of(size, len_k - first)};
    return keys;
}

wan_attn_backward_rows wan_attn_backward_rows_at(const wan_attn_backward_step *step, int64_t slot,
                                                 int64_t block) {
    const wan_attn_backward_plan *plan = &step->plan;
    int64_t size = plan->blocking->block_m, of_row = size * plan->depth,
            of_sum = plan->width * (size / plan->blocking->unit);
    float *at = pair_memory(step, slot) + plan->panels * plan->panel_floats +
                plan->width * keys_in_units(plan) + block * (plan->block_floats + plan->ds_floats);
    int64_t first = step->first_row + block * size;
    wan_attn_backward_rows rows = {.q = at,
                                   .dout = at + of_row,
                                   .q_sum = at + 2 * of_row,
                                   .dout_sum = at + 2 * of_row + of_sum,
                                   .neg_lse = at + 2 * (of_row + of_sum),
                                   .delta = at + 2 * (of_row + of_sum) + size,
                                   .has_nonfinite = at + 2 * (of_row + of_sum + size),
                                   .ds_t = at + plan->block_floats,
                                   .first = first,
                                   .count = min_of(size, step->call->seqlen_q - first)};
    return rows;
}

static float *scratch_of(const wan_attn_backward_step *step, int64_t worker) {
    const wan_attn_backward_plan *plan = &step->plan;
    return pair_memory(step, plan->pairs_per_group) + worker * plan->scratch_floats;
}

/* Task numbers run over [pair of the group][panel]. */
static void pack_keys(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_backward_step *step = (const wan_attn_backward_step *)ctx;
    (void)worker;
    step->plan.blocking->pack_keys(step, task / step->plan.panels, task % step->plan.panels);
}

/* Task numbers run over [pair of the group][block of the strip]. */
static void pack_rows(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_backward_step *step = (const wan_attn_backward_step *)ctx;
    (void)worker;
    step->plan.blocking->pack_rows(step, task / step->blocks, task % step->blocks);
}

static void find_lse(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_backward_step *step = (const wan_attn_backward_step *)ctx;
    (void)worker;
    step->plan.blocking->find_lse(step, task / step->blocks, task % step->blocks);
}

static int64_t tasks_of_pair(const wan_attn_backward_plan *plan) {
    return wan_attn_divide_up(plan->panels, plan->panels_per_task);
}

/* Task numbers run over [pair of the group][a few panels]. */
static void add_panels(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_backward_step *step = (const wan_attn_backward_step *)ctx;
    const wan_attn_backward_plan *plan = &step->plan;
    int64_t slot = task / tasks_of_pair(plan), first = task % tasks_of_pair(plan);
    first *= plan->panels_per_task;
    int64_t end = min_of(plan->panels, first + plan->panels_per_task);
    for (int64_t block = 0; block < step->blocks; block++)
        for (int64_t panel = first; panel < end; panel++)
            plan->blocking->add_panel(step, slot, panel, block, scratch_of(step, worker));
}

/* Task numbers run over [pair of the group][panel of the strip's rows]. */
static void find_dq(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_backward_step *step = (const wan_attn_backward_step *)ctx;
    const wan_attn_backward_blocking *blocking = step->plan.blocking;
    int64_t row_panels = step->blocks * (blocking->block_m / blocking->panel);
    blocking->find_dq(step, task / row_panels, task % row_panels, scratch_of(step, worker));
}

static void store_keys(int64_t task, int64_t worker, void *ctx) {
    const wan_attn_backward_step *step = (const wan_attn_backward_step *)ctx;
    (void)worker;
    step->plan.blocking->store_keys(step, task / step->plan.panels, task % step->plan.panels);
}

static void run_strip(wan_attn_backward_step *step) {
    const wan_attn_backward_plan *plan = &step->plan;
    const wan_attn_params *params = step->call->params;
    int64_t block_m = plan->blocking->block_m, pairs = step->group_pairs;
    int64_t left = wan_attn_divide_up(step->call->seqlen_q - step->first_row, block_m);
    step->blocks = min_of(plan->strip, left);
    wan_attn_run_tasks(params, pairs * step->blocks, pack_rows, step);
    if (wan_attn_backward_is_few(step->call))
        wan_attn_run_tasks(params, pairs * step->blocks, find_lse, step);
    wan_attn_run_tasks(params, pairs * tasks_of_pair(plan), add_panels, step);
    wan_attn_run_tasks(params, pairs * step->blocks * (block_m / plan->blocking->panel), find_dq,
                       step);
}

wan_attn_status wan_attn_backward_blocked_run(const wan_attn_backward_problem *p,
                                              wan_attn_error *err) {
    wan_attn_backward_step step = {.p = p, .call = &p->call};
    const wan_attn_problem *call = &p->call;
    memcpy(&step.plan, &call->plan, sizeof(step.plan));
    const wan_attn_backward_plan *plan = &step.plan;
    int64_t rows_of_strip = plan->strip * plan->blocking->block_m;
    wan_attn_prefer_large_pages(call->params->workspace, (int64_t)plan->workspace_bytes);
    for (; step.first_pair < plan->pairs; step.first_pair += plan->pairs_per_group) {
        step.group_pairs = min_of(plan->pairs_per_group, plan->pairs - step.first_pair);
        int64_t panels = step.group_pairs * plan->panels;
        wan_attn_run_tasks(call->params, panels, pack_keys, &step);
        for (step.head = 0; step.head < call->num_heads_q / call->num_heads_k; step.head++)
            for (step.first_row = 0; step.first_row < call->seqlen_q;
                 step.first_row += rows_of_strip)
                run_strip(&step);
        wan_attn_run_tasks(call->params, panels, store_keys, &step);
    }
    return wan_attn_ok(err);
}
