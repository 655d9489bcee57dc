/* SPDX-License-Identifier: Apache-2.0
 * rope.c - what the CPU rows of rms_norm_rope share: which angles a token turns by, and who
 * computes which tokens. Knows no instruction set.
 */
#include "cpu/rope.h"

#include <string.h>

#include "core/util.h"
#include "cpu/threads.h"

/* Tokens of one task: some hundred KiB of x at Wan's sizes, and few enough to fill all threads. */
enum { TOKENS = 16 };

/* Elements [first, first + count) of one row of the table. */
static void copy_angles(const wan_attn_rope_problem *p, int64_t at, int64_t first, int64_t count,
                        double *to) {
    const void *from = wan_attn_element(p->table.data, p->table.dtype, at + first);
    if (p->table.dtype == WAN_ATTN_F64)
        memcpy(to + first, from, (size_t)count * sizeof(double));
    else
        for (int64_t d = 0; d < count; d++)
            to[first + d] = ((const float *)from)[d];
}

int wan_attn_rope_angles(const wan_attn_rope_problem *p, const wan_attn_rope_token *token,
                         int64_t head, double angles[WAN_ATTN_ROPE_ANGLES]) {
    if (!p->table.data)
        return 0;
    memset(angles + p->head_dim, 0, (size_t)(WAN_ATTN_ROPE_ANGLES - p->head_dim) * sizeof(*angles));
    if (!p->grid_sizes) {
        copy_angles(p,
                    token->b * p->table.batch_stride + token->s * p->table.row_stride +
                        head * p->table.head_stride,
                    0, p->head_dim, angles);
        return 1;
    }
    const wan_attn_grid *grid = &token->grid;
    int64_t t = p->seqlen_offset + token->s, line = grid->height * grid->width;
    if (t >= grid->frames * line)
        return 0;
    int64_t lines = 2 * wan_attn_rope_line_pairs(p->head_dim), frames = p->head_dim - 2 * lines;
    copy_angles(p, t / line * p->table.row_stride, 0, frames, angles);
    copy_angles(p, t / grid->width % grid->height * p->table.row_stride, frames, lines, angles);
    copy_angles(p, t % grid->width * p->table.row_stride, frames + lines, lines, angles);
    return 1;
}

typedef struct job {
    const wan_attn_rope_problem *p;
    wan_attn_rope_token_fn fn;
    int64_t tasks; /* of one sample */
} job;

/* Task numbers run over [batch][TOKENS tokens]. */
static void run_tokens(int64_t task, int64_t worker, void *ctx) {
    const job *j = (const job *)ctx;
    const wan_attn_rope_problem *p = j->p;
    (void)worker; /* its scratch is the stack */
    wan_attn_rope_token token = {.b = task / j->tasks, .s = task % j->tasks * TOKENS};
    if (p->grid_sizes) {
        token.grid.frames = wan_attn_grid_size_at(p, token.b, 0);
        token.grid.height = wan_attn_grid_size_at(p, token.b, 1);
        token.grid.width = wan_attn_grid_size_at(p, token.b, 2);
    }
    int64_t end = token.s + TOKENS < p->seqlen ? token.s + TOKENS : p->seqlen;
    for (; token.s < end; token.s++)
        j->fn(p, &token);
}

wan_attn_status wan_attn_rope_run(const wan_attn_rope_problem *p, wan_attn_rope_token_fn fn,
                                  wan_attn_error *err) {
    job j = {p, fn, wan_attn_divide_up(p->seqlen, TOKENS)};
    /* The loop reads nothing else of a call's parameters. */
    wan_attn_params loop = {.parallel = p->params->parallel, .num_threads = p->params->num_threads};
    wan_attn_run_tasks(&loop, p->batch * j.tasks, run_tokens, &j);
    return wan_attn_ok(err);
}
