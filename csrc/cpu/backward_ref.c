/* SPDX-License-Identifier: Apache-2.0
 * backward_ref.c - the specification of gradients: portable C for every dtype, head_dim, mask and
 * stride of the contract (wan_attn.h has the formulas). Written to be read.
 *
 * Implements: FlashAttention's backward pass (Dao et al., arXiv 2205.14135, algorithm 4) in two
 * passes instead of one, so that nothing is added to by two tasks:
 *
 *   dq   one task = 16 query rows of one head; loops over blocks of keys
 *   dk, dv   one task = 16 keys of one head; loops over the query rows of all heads that share it
 *
 * Limits: none within the contract.
 * Measured: not for speed; it is what the others are compared with.
 * Budget: some 110 KiB of stack at the largest head_dim.
 * Numerics: products and sums in float32, but for delta's; neither P nor dS is rounded. What is
 * summed over keys or rows is summed from zero for a block of 16 and then added, a score 64
 * elements of head_dim at a time, 16 where rows are few. softmax_scale multiplies sums, not their
 * terms. A single key weighs exactly 1, and its dS is dlse. lse and delta come from what forward
 * has left, but those of few rows from these scores: forward sums such scores in another order
 * (sdpa_few.inc), and where they are large, weights and dS would be off by that.
 * Masked keys are left out by loop bounds, so that nothing behind the lengths or outside the mask
 * can leak, NaN included.
 */
#include <float.h>
#include <math.h>

#include "core/backward.h"
#include "core/util.h"
#include "cpu/backward_blocked.h"
#include "cpu/half.h"
#include "cpu/threads.h"

enum { BLOCK = 16, PART_D = 64, PART_D_OF_FEW = 16, MAX_HEAD_DIM = 256 };

/* Query rows and what is known of them. */
typedef struct row_block {
    float q[BLOCK][MAX_HEAD_DIM], dout[BLOCK][MAX_HEAD_DIM];
    float lse[BLOCK], dlse[BLOCK], delta[BLOCK]; /* delta: <dout, out> - dlse */
    wan_attn_key_range keys[BLOCK]; /* what each row sees: if nothing, all else is unset */
    int64_t count;
} row_block;

/* Keys; transposed, so that a row's scores form a vector along them. */
typedef struct key_block {
    float k_transposed[MAX_HEAD_DIM][BLOCK], v_transposed[MAX_HEAD_DIM][BLOCK];
    int64_t first, count;
} key_block;

/* One row of P and of dS. */
typedef struct weights {
    float p[BLOCK], ds[BLOCK];
    int64_t begin, end; /* the keys of the block that count */
} weights;

/* Where lse and <dout, out> of a row of few are kept. */
static float *own_sums(const wan_attn_problem *call, int64_t b, int64_t head, int64_t i) {
    int64_t row = (b * call->num_heads_q + head) * call->seqlen_q + i;
    return (float *)call->params->workspace + 2 * row;
}

static void load_row(const wan_attn_backward_problem *p, int64_t b, int64_t head, int64_t i,
                     row_block *rows, int64_t m) {
    const wan_attn_problem *call = &p->call;
    float out[MAX_HEAD_DIM];
    double sum = 0.0; /* dP - delta is often a small difference */
    wan_attn_load_floats(rows->q[m], wan_attn_row_address(&call->q, b, i, head), call->q.dtype,
                         call->head_dim);
    wan_attn_load_floats(rows->dout[m], wan_attn_row_address(&p->dout, b, i, head), p->dout.dtype,
                         call->head_dim);
    wan_attn_load_floats(out, wan_attn_row_address(&call->out, b, i, head), call->out.dtype,
                         call->head_dim);
    for (int64_t d = 0; d < call->head_dim; d++)
        sum += (double)rows->dout[m][d] * out[d];
    rows->dlse[m] = wan_attn_dlse_at(p, b, head, i);
    rows->lse[m] = wan_attn_lse_at(p, b, head, i);
    if (wan_attn_backward_is_few(call)) {
        rows->lse[m] = own_sums(call, b, head, i)[0];
        sum = own_sums(call, b, head, i)[1];
    }
    rows->delta[m] = (float)(sum - rows->dlse[m]);
}

static void load_rows(const wan_attn_backward_problem *p, int64_t b, int64_t head, int64_t first,
                      row_block *rows) {
    const wan_attn_problem *call = &p->call;
    int64_t len_q = wan_attn_length_at(&call->seqused_q, b, call->seqlen_q);
    int64_t len_k = wan_attn_length_at(&call->seqused_k, b, call->seqlen_k);
    rows->count = call->seqlen_q - first < BLOCK ? call->seqlen_q - first : BLOCK;
    for (int64_t m = 0; m < rows->count; m++) {
        rows->keys[m] = wan_attn_visible_keys(call, first + m, len_q, len_k);
        if (rows->keys[m].begin < rows->keys[m].end)
            load_row(p, b, head, first + m, rows, m);
    }
}

static void load_keys(const wan_attn_problem *call, int64_t b, int64_t head_k, int64_t first,
                      int64_t end, key_block *keys) {
    float k[MAX_HEAD_DIM] = {0}, v[MAX_HEAD_DIM] = {0};
    keys->first = first;
    keys->count = end - first < BLOCK ? end - first : BLOCK;
    for (int64_t n = 0; n < BLOCK; n++) {
        if (n < keys->count) {
            wan_attn_load_floats(k, wan_attn_row_address(&call->k, b, first + n, head_k),
                                 call->k.dtype, call->head_dim);
            wan_attn_load_floats(v, wan_attn_row_address(&call->v, b, first + n, head_k),
                                 call->v.dtype, call->head_dim);
        }
        for (int64_t d = 0; d < call->head_dim; d++) { /* a tail: computed with, never read */
            keys->k_transposed[d][n] = n < keys->count ? k[d] : 0.0f;
            keys->v_transposed[d][n] = n < keys->count ? v[d] : 0.0f;
        }
    }
}

/* product[n] = <row, column n> for the whole block: a fixed trip count vectorises. */
static void multiply(const wan_attn_problem *call, const float *row, float (*columns)[BLOCK],
                     float product[BLOCK]) {
    const int64_t head_dim = call->head_dim;
    const int64_t part_d = wan_attn_backward_is_few(call) ? PART_D_OF_FEW : PART_D;
    for (int n = 0; n < BLOCK; n++)
        product[n] = 0.0f;
    for (int64_t first = 0; first < head_dim; first += part_d) {
        float part[BLOCK] = {0};
        for (int64_t d = first; d < head_dim && d < first + part_d; d++)
            for (int n = 0; n < BLOCK; n++)
                part[n] += row[d] * columns[d][n];
        for (int n = 0; n < BLOCK; n++)
            product[n] += part[n];
    }
}

/* The largest score of a row; the sums of weights relative to that one, and of weights times dP. */
typedef struct row_sums {
    double top, sum, dp_sum;
} row_sums;

/* Adds a block of keys to what is known of row m. */
static void add_scores(const wan_attn_problem *call, const row_block *rows, int64_t m,
                       key_block *keys, row_sums *x) {
    float scale = (float)call->softmax_scale, s[BLOCK], dp[BLOCK];
    double before = x->top;
    int64_t begin = rows->keys[m].begin - keys->first, end = rows->keys[m].end - keys->first;
    multiply(call, rows->q[m], keys->k_transposed, s);
    multiply(call, rows->dout[m], keys->v_transposed, dp);
    begin = begin > 0 ? begin : 0;
    end = end < keys->count ? end : keys->count;
    for (int64_t n = begin; n < end; n++)
        x->top = fmax(x->top, (double)s[n] * scale);
    x->sum *= exp(before - x->top);
    x->dp_sum *= exp(before - x->top);
    for (int64_t n = begin; n < end; n++) {
        double weight = exp((double)s[n] * scale - x->top);
        x->sum += weight;
        x->dp_sum += weight * dp[n];
    }
}

/* Task numbers run over [batch][query head][row block]; of few rows alone. */
static void find_sums(int64_t task, int64_t worker, void *ctx) {
    (void)worker;
    const wan_attn_backward_problem *p = (const wan_attn_backward_problem *)ctx;
    const wan_attn_problem *call = &p->call;
    int64_t blocks = wan_attn_divide_up(call->seqlen_q, BLOCK), first = task % blocks * BLOCK;
    int64_t head = task / blocks % call->num_heads_q, b = task / blocks / call->num_heads_q;
    int64_t head_k = head / (call->num_heads_q / call->num_heads_k);
    int64_t len_k = wan_attn_length_at(&call->seqused_k, b, call->seqlen_k);
    row_sums sums[BLOCK];
    row_block rows;
    key_block keys;
    for (int m = 0; m < BLOCK; m++)
        sums[m] = (row_sums){-DBL_MAX, 0.0, 0.0}; /* finite, so that no difference is NaN */
    load_rows(p, b, head, first, &rows);          /* with sums that are not made yet */
    for (int64_t key = 0; key < len_k; key += BLOCK) {
        load_keys(call, b, head_k, key, len_k, &keys);
        for (int64_t m = 0; m < rows.count; m++)
            if (rows.keys[m].begin < rows.keys[m].end)
                add_scores(call, &rows, m, &keys, &sums[m]);
    }
    for (int64_t m = 0; m < rows.count; m++) {
        float *to = own_sums(call, b, head, first + m);
        to[0] = (float)(sums[m].top + log(sums[m].sum));
        to[1] = (float)(sums[m].dp_sum / sums[m].sum);
    }
}

/* P and dS of row m; 0: it sees none of these keys. */
static int find_weights(const wan_attn_problem *call, const row_block *rows, int64_t m,
                        key_block *keys, weights *w) {
    float scale = (float)call->softmax_scale, s[BLOCK], dp[BLOCK];
    int is_single = rows->keys[m].end - rows->keys[m].begin == 1;
    int64_t begin = rows->keys[m].begin - keys->first, end = rows->keys[m].end - keys->first;
    w->begin = begin > 0 ? begin : 0;
    w->end = end < keys->count ? end : keys->count;
    if (w->begin >= w->end)
        return 0;
    multiply(call, rows->q[m], keys->k_transposed, s);
    multiply(call, rows->dout[m], keys->v_transposed, dp);
    for (int64_t n = w->begin; n < w->end; n++) {
        w->p[n] = expf(s[n] * scale - rows->lse[m]);
        w->ds[n] = w->p[n] * (dp[n] - rows->delta[m]);
        if (is_single)
            wan_attn_weigh_single_key(rows->lse[m], rows->delta[m], rows->dlse[m], &w->p[n],
                                      &w->ds[n]);
    }
    return 1;
}

static void store(const wan_attn_view *view, int64_t b, int64_t row, int64_t head, float *x,
                  float factor, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d++)
        x[d] *= factor;
    wan_attn_store_floats(wan_attn_row_address(view, b, row, head), x, view->dtype, head_dim);
}

/* Task numbers run over [batch][query head][row block]. */
static void find_dq(int64_t task, int64_t worker, void *ctx) {
    (void)worker; /* its scratch is the stack */
    const wan_attn_backward_problem *p = (const wan_attn_backward_problem *)ctx;
    const wan_attn_problem *call = &p->call;
    int64_t blocks = wan_attn_divide_up(call->seqlen_q, BLOCK), first = task % blocks * BLOCK;
    int64_t head = task / blocks % call->num_heads_q, b = task / blocks / call->num_heads_q;
    int64_t head_k = head / (call->num_heads_q / call->num_heads_k);
    int64_t len_k = wan_attn_length_at(&call->seqused_k, b, call->seqlen_k);
    float dq[BLOCK][MAX_HEAD_DIM] = {{0}};
    row_block rows;
    key_block keys;
    weights w;
    load_rows(p, b, head, first, &rows);
    for (int64_t key = 0; key < len_k; key += BLOCK) {
        load_keys(call, b, head_k, key, len_k, &keys);
        for (int64_t m = 0; m < rows.count; m++) {
            if (!find_weights(call, &rows, m, &keys, &w))
                continue;
            for (int64_t d = 0; d < call->head_dim; d++) {
                float part = 0.0f;
                for (int64_t n = w.begin; n < w.end; n++)
                    part += w.ds[n] * keys.k_transposed[d][n];
                dq[m][d] += part;
            }
        }
    }
    for (int64_t m = 0; m < rows.count; m++)
        store(&p->dq, b, first + m, head, dq[m], (float)call->softmax_scale, call->head_dim);
}

/* Sums of a block of keys. */
typedef struct key_sums {
    float dk[BLOCK][MAX_HEAD_DIM], dv[BLOCK][MAX_HEAD_DIM];
} key_sums;

static void add_rows(const wan_attn_problem *call, const row_block *rows, key_block *keys,
                     key_sums *sums) {
    float dk[MAX_HEAD_DIM], dv[MAX_HEAD_DIM];
    weights of_rows[BLOCK];
    for (int64_t m = 0; m < rows->count; m++)
        if (!find_weights(call, rows, m, keys, &of_rows[m]))
            of_rows[m].begin = of_rows[m].end = 0;
    for (int64_t n = 0; n < keys->count; n++) {
        for (int64_t d = 0; d < call->head_dim; d++)
            dk[d] = dv[d] = 0.0f;
        for (int64_t m = 0; m < rows->count; m++) {
            const weights *w = &of_rows[m];
            if (n < w->begin || n >= w->end)
                continue;
            for (int64_t d = 0; d < call->head_dim; d++) {
                dk[d] += w->ds[n] * rows->q[m][d];
                dv[d] += w->p[n] * rows->dout[m][d];
            }
        }
        for (int64_t d = 0; d < call->head_dim; d++) {
            sums->dk[n][d] += dk[d];
            sums->dv[n][d] += dv[d];
        }
    }
}

/* Task numbers run over [batch][key head][key block]. */
static void find_dk_and_dv(int64_t task, int64_t worker, void *ctx) {
    (void)worker;
    const wan_attn_backward_problem *p = (const wan_attn_backward_problem *)ctx;
    const wan_attn_problem *call = &p->call;
    int64_t blocks = wan_attn_divide_up(call->seqlen_k, BLOCK), first = task % blocks * BLOCK;
    int64_t head_k = task / blocks % call->num_heads_k, b = task / blocks / call->num_heads_k;
    int64_t share = call->num_heads_q / call->num_heads_k;
    int64_t len_k = wan_attn_length_at(&call->seqused_k, b, call->seqlen_k);
    key_sums sums = {{{0}}, {{0}}};
    row_block rows;
    key_block keys;
    if (first < len_k) {
        load_keys(call, b, head_k, first, len_k, &keys);
        for (int64_t head = head_k * share; head < (head_k + 1) * share; head++)
            for (int64_t row = 0; row < call->seqlen_q; row += BLOCK) {
                load_rows(p, b, head, row, &rows);
                add_rows(call, &rows, &keys, &sums);
            }
    }
    for (int64_t n = 0; n < BLOCK && first + n < call->seqlen_k; n++) {
        store(&p->dk, b, first + n, head_k, sums.dk[n], (float)call->softmax_scale, call->head_dim);
        store(&p->dv, b, first + n, head_k, sums.dv[n], 1.0f, call->head_dim);
    }
}

/* Needs nothing but the stack, and two sums of each of few rows. */
const char *wan_attn_sdpa_backward_ref_plan(wan_attn_backward_problem *p) {
    const wan_attn_problem *call = &p->call;
    if (wan_attn_backward_is_few(call))
        p->call.workspace_size =
            (size_t)(call->batch * call->num_heads_q * call->seqlen_q) * 2 * sizeof(float);
    return NULL;
}

wan_attn_status wan_attn_sdpa_backward_ref(const wan_attn_backward_problem *p,
                                           wan_attn_error *err) {
    const wan_attn_problem *call = &p->call;
    int64_t row_blocks =
        call->batch * call->num_heads_q * wan_attn_divide_up(call->seqlen_q, BLOCK);
    if (wan_attn_backward_is_few(call))
        wan_attn_run_tasks(call->params, row_blocks, find_sums, (void *)p);
    wan_attn_run_tasks(call->params, row_blocks, find_dq, (void *)p);
    wan_attn_run_tasks(call->params,
                       call->batch * call->num_heads_k * wan_attn_divide_up(call->seqlen_k, BLOCK),
                       find_dk_and_dv, (void *)p);
    return wan_attn_ok(err);
}
