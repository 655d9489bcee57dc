/* SPDX-License-Identifier: Apache-2.0
 * guard.c - what a caller wants to know of a call that has run on the CPU: the largest value, and
 * what is infinite or NaN. One more look at V and out, whatever the row. Knows no row.
 */
#include "core/util.h"
#include "cpu/half.h"
#include "cpu/threads.h"

enum { ROWS = 64, MAX_WORKERS = 64, MAX_HEAD_DIM = 256 };

/* What one thread has seen. */
typedef struct finding {
    uint32_t largest; /* bits of a magnitude: these are ordered as magnitudes are, NaN above all */
    int64_t nonfinite_values, nonfinite_results;
} finding;

typedef struct look {
    const wan_attn_problem *p;
    int64_t q_blocks, k_blocks; /* of ROWS rows, of one head */
    finding found[MAX_WORKERS];
} look;

/* Bits of a magnitude, signed, so that any x86-64 compares several at a time; those of a bfloat16
 * are the upper half. */
static inline int32_t magnitude(float x) {
    return (int32_t)(wan_attn_bits_of_float(x) & 0x7fffffffu);
}

/* How many of n numbers are infinite or NaN; *largest becomes the largest. Counting waits until
 * there is something to count. */
static int64_t look_at_floats(const float *x, int64_t n, uint32_t *largest) {
    int32_t top = 0;
    int64_t nonfinite = 0;
    for (int64_t d = 0; d < n; d++)
        top = magnitude(x[d]) > top ? magnitude(x[d]) : top;
    for (int64_t d = 0; top >= 0x7f800000 && d < n; d++)
        nonfinite += magnitude(x[d]) >= 0x7f800000;
    *largest = (uint32_t)top > *largest ? (uint32_t)top : *largest;
    return nonfinite;
}

static int64_t look_at_bf16(const uint16_t *x, int64_t n, uint32_t *largest) {
    int16_t top = 0;
    int64_t nonfinite = 0;
    for (int64_t d = 0; d < n; d++) {
        int16_t bits = (int16_t)(x[d] & 0x7fff);
        top = bits > top ? bits : top;
    }
    for (int64_t d = 0; top >= 0x7f80 && d < n; d++)
        nonfinite += (x[d] & 0x7fff) >= 0x7f80;
    uint32_t bits = (uint32_t)top << 16;
    *largest = bits > *largest ? bits : *largest;
    return nonfinite;
}

/* The same of a row of V or of out. */
static int64_t look_at_row(const wan_attn_view *view, int64_t b, int64_t row, int64_t head,
                           int64_t head_dim, uint32_t *largest) {
    const void *from = wan_attn_row_address(view, b, row, head);
    if (view->dtype == WAN_ATTN_F32)
        return look_at_floats((const float *)from, head_dim, largest);
    if (view->dtype == WAN_ATTN_BF16)
        return look_at_bf16((const uint16_t *)from, head_dim, largest);
    float x[MAX_HEAD_DIM];
    wan_attn_load_floats(x, from, view->dtype, head_dim);
    return look_at_floats(x, head_dim, largest);
}

/* Task numbers run over [sample][query head, then key head][block of rows]. */
static void look_at_rows(int64_t task, int64_t worker, void *ctx) {
    look *l = (look *)ctx;
    const wan_attn_problem *p = l->p;
    finding *found = &l->found[worker];
    int64_t of_out = p->num_heads_q * l->q_blocks, of_v = p->num_heads_k * l->k_blocks;
    int64_t b = task / (of_out + of_v), part = task % (of_out + of_v);
    int is_out = part < of_out;
    int64_t blocks = is_out ? l->q_blocks : l->k_blocks, at = is_out ? part : part - of_out;
    int64_t end = is_out ? p->seqlen_q : wan_attn_length_at(&p->seqused_k, b, p->seqlen_k);
    for (int64_t row = at % blocks * ROWS; row < end && row < (at % blocks + 1) * ROWS; row++) {
        uint32_t ignored = 0;
        int64_t nonfinite = look_at_row(is_out ? &p->out : &p->v, b, row, at / blocks, p->head_dim,
                                        is_out ? &ignored : &found->largest);
        *(is_out ? &found->nonfinite_results : &found->nonfinite_values) += nonfinite;
    }
}

static uint32_t add(uint32_t count, int64_t more) {
    return more < (int64_t)(UINT32_MAX - count) ? count + (uint32_t)more : UINT32_MAX;
}

void wan_attn_cpu_guard(const wan_attn_problem *p) {
    wan_attn_guard *guard = (wan_attn_guard *)p->params->guard;
    wan_attn_params params = *p->params;
    look l = {.p = p,
              .q_blocks = wan_attn_divide_up(p->seqlen_q, ROWS),
              .k_blocks = wan_attn_divide_up(p->seqlen_k, ROWS)};
    if (params.num_threads > MAX_WORKERS)
        params.num_threads = MAX_WORKERS;
    wan_attn_run_tasks(&params,
                       p->batch * (p->num_heads_q * l.q_blocks + p->num_heads_k * l.k_blocks),
                       look_at_rows, &l);
    for (int worker = 0; worker < MAX_WORKERS; worker++) {
        const finding *found = &l.found[worker];
        uint32_t largest = wan_attn_bits_of_float(guard->largest_value) & 0x7fffffffu;
        guard->largest_value =
            wan_attn_float_of_bits(found->largest > largest ? found->largest : largest);
        guard->nonfinite_values = add(guard->nonfinite_values, found->nonfinite_values);
        guard->nonfinite_results = add(guard->nonfinite_results, found->nonfinite_results);
    }
}
