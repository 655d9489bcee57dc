/* SPDX-License-Identifier: Apache-2.0
 * sdpa_ref.c - the specification: attention in portable C, for every dtype, head_dim, mask and
 * stride of the contract. Fast rows are tested against the same oracle and must agree with it; this
 * one is written to be read.
 *
 * Implements: online softmax (Milakov & Gimelshein, arXiv 1805.02867) over blocks of keys, as
 * FlashAttention does (Dao et al., arXiv 2205.14135, algorithm 1); forward only.
 *
 *              BLOCK_N = 32 keys
 *            +-----------+    S = softmax_scale * Q K^T  a row at a time, vectors along keys
 *  BLOCK_M   |  S  -> P  |    P = exp(S - row_max)
 *  = 16 rows +-----------+    O = O * alpha + P V  vectors along head_dim
 *
 * Who does what: one task = 16 query rows of one head of one sample; tasks share nothing but their
 * inputs.
 * Pipeline: none; nothing is loaded ahead. Limits: none within the contract.
 * Measured: not for speed; it is what the others are compared with.
 * Budget: 106 KiB of stack at the largest head_dim (Q, O, K^T, V as float); a block of K and V is
 * converted once per 16 rows.
 * Numerics: products and sums in float32. Each block of keys is summed from zero and then added to
 * O and row_sum, so that rounding grows with the number of blocks, not of keys; for the same reason
 * a score is summed 64 elements of head_dim at a time. P is not rounded.
 * x = s - row_max is exactly 0 for the largest score, hence one key gives that value exactly.
 * Masked keys are left out by loop bounds, never by -inf or by a zero weight, so nothing behind the
 * lengths or outside the mask can leak, NaN included; NaN in a visible key stays NaN.
 */
#include <float.h>
#include <math.h>

#include "core/util.h"
#include "cpu/half.h"
#include "cpu/threads.h"

enum { BLOCK_M = 16, BLOCK_N = 32, PART_D = 64, MAX_HEAD_DIM = 256 };

/* The 16 rows of one task. */
typedef struct row_block {
    float q[BLOCK_M][MAX_HEAD_DIM];
    float o[BLOCK_M][MAX_HEAD_DIM];
    float row_max[BLOCK_M], row_sum[BLOCK_M];
    wan_attn_key_range keys[BLOCK_M]; /* what each row sees */
} row_block;

/* One block of keys: K transposed, so that the scores of a row form a vector along the keys. */
typedef struct key_block {
    float k_transposed[MAX_HEAD_DIM][BLOCK_N];
    float v[BLOCK_N][MAX_HEAD_DIM];
} key_block;

static void load_keys(const wan_attn_problem *p, int64_t b, int64_t head, int64_t first,
                      int64_t count, key_block *block) {
    float row[MAX_HEAD_DIM];
    for (int64_t n = 0; n < count; n++) {
        wan_attn_load_floats(row, wan_attn_row_address(&p->k, b, first + n, head), p->k.dtype,
                             p->head_dim);
        for (int64_t d = 0; d < p->head_dim; d++)
            block->k_transposed[d][n] = row[d];
        wan_attn_load_floats(block->v[n], wan_attn_row_address(&p->v, b, first + n, head),
                             p->v.dtype, p->head_dim);
    }
    for (int64_t n = count; n < BLOCK_N; n++) /* a tail: computed with the rest, never read */
        for (int64_t d = 0; d < p->head_dim; d++)
            block->k_transposed[d][n] = 0.0f;
}

/* s[n] = softmax_scale * <q, k[n]> for the whole block: a fixed trip count vectorises, and a few
 * unused scores cost less. */
static void score_row(const float *q, const key_block *block, int64_t head_dim, float softmax_scale,
                      float s[BLOCK_N]) {
    float sum[BLOCK_N] = {0};
    for (int64_t first = 0; first < head_dim; first += PART_D) {
        float part[BLOCK_N] = {0};
        for (int64_t d = first; d < head_dim && d < first + PART_D; d++)
            for (int n = 0; n < BLOCK_N; n++)
                part[n] += q[d] * block->k_transposed[d][n];
        for (int n = 0; n < BLOCK_N; n++)
            sum[n] += part[n];
    }
    for (int n = 0; n < BLOCK_N; n++)
        s[n] = sum[n] * softmax_scale;
}

/* Adds the keys [begin, end) of this block to row m. */
static void add_keys(row_block *rows, int m, const key_block *block, int64_t head_dim, float *s,
                     int begin, int end) {
    float block_max = rows->row_max[m];
    for (int n = begin; n < end; n++)
        block_max = s[n] > block_max ? s[n] : block_max;

    float alpha = rows->row_max[m] == block_max ? 1.0f : expf(rows->row_max[m] - block_max);
    float sum = 0.0f, acc[MAX_HEAD_DIM] = {0};
    for (int n = begin; n < end; n++) {
        float weight = expf(s[n] - block_max);
        sum += weight;
        for (int64_t d = 0; d < head_dim; d++)
            acc[d] += weight * block->v[n][d];
    }
    for (int64_t d = 0; d < head_dim; d++)
        rows->o[m][d] = rows->o[m][d] * alpha + acc[d];
    rows->row_sum[m] = rows->row_sum[m] * alpha + sum;
    rows->row_max[m] = block_max;
}

static void store_row(const wan_attn_problem *p, row_block *rows, int m, int64_t b, int64_t head,
                      int64_t i) {
    int sees_none = rows->keys[m].begin >= rows->keys[m].end;
    float *o = rows->o[m];
    for (int64_t d = 0; d < p->head_dim; d++)
        o[d] = sees_none ? 0.0f : o[d] / rows->row_sum[m];
    wan_attn_store_floats(wan_attn_row_address(&p->out, b, i, head), o, p->out.dtype, p->head_dim);
    if (p->lse)
        p->lse[b * p->lse_batch_stride + head * p->lse_head_stride + i * p->lse_row_stride] =
            sees_none                  ? -INFINITY
            : rows->row_sum[m] == 0.0f ? NAN /* all scores -inf: the softmax is NaN */
                                       : rows->row_max[m] + logf(rows->row_sum[m]);
}

static int64_t row_blocks(const wan_attn_problem *p) {
    return wan_attn_divide_up(p->seqlen_q, BLOCK_M);
}

/* Task numbers run over [batch][head][row block]. */
static void run_row_block(int64_t task, int64_t worker, void *ctx) {
    (void)worker; /* its scratch is the stack */
    const wan_attn_problem *p = (const wan_attn_problem *)ctx;
    int64_t first_row = task % row_blocks(p) * BLOCK_M;
    int64_t head = task / row_blocks(p) % p->num_heads_q;
    int64_t b = task / row_blocks(p) / p->num_heads_q;
    int64_t head_k = head / (p->num_heads_q / p->num_heads_k);
    int64_t len_q = wan_attn_length_at(&p->seqused_q, b, p->seqlen_q);
    int64_t len_k = wan_attn_length_at(&p->seqused_k, b, p->seqlen_k);
    int count = (int)(p->seqlen_q - first_row < BLOCK_M ? p->seqlen_q - first_row : BLOCK_M);

    row_block rows;
    key_block block;
    int64_t begin = INT64_MAX, end = 0; /* the keys that any of these rows sees */
    for (int m = 0; m < count; m++) {
        wan_attn_key_range keys = wan_attn_visible_keys(p, first_row + m, len_q, len_k);
        rows.keys[m] = keys;
        rows.row_max[m] = -FLT_MAX; /* finite: a score of -inf must weigh 0, not NaN */
        rows.row_sum[m] = 0.0f;
        for (int64_t d = 0; d < p->head_dim; d++)
            rows.o[m][d] = 0.0f;
        if (keys.begin >= keys.end)
            continue;
        wan_attn_load_floats(rows.q[m], wan_attn_row_address(&p->q, b, first_row + m, head),
                             p->q.dtype, p->head_dim);
        begin = keys.begin < begin ? keys.begin : begin;
        end = keys.end > end ? keys.end : end;
    }

    for (int64_t first_key = begin; first_key < end; first_key += BLOCK_N) {
        int64_t left = end - first_key < BLOCK_N ? end - first_key : BLOCK_N;
        load_keys(p, b, head_k, first_key, left, &block);
        for (int m = 0; m < count; m++) {
            int64_t from = rows.keys[m].begin - first_key, to = rows.keys[m].end - first_key;
            from = from > 0 ? from : 0;
            to = to < left ? to : left;
            if (from >= to)
                continue;
            float s[BLOCK_N];
            score_row(rows.q[m], &block, p->head_dim, (float)p->softmax_scale, s);
            add_keys(&rows, m, &block, p->head_dim, s, (int)from, (int)to);
        }
    }
    for (int m = 0; m < count; m++)
        store_row(p, &rows, m, b, head, first_row + m);
}

/* Takes every call, and needs nothing but the stack. */
const char *wan_attn_sdpa_ref_plan(wan_attn_problem *p) {
    (void)p;
    return NULL;
}

wan_attn_status wan_attn_sdpa_ref(const wan_attn_problem *p, wan_attn_error *err) {
    (void)err;
    wan_attn_run_tasks(p->params, p->batch * p->num_heads_q * row_blocks(p), run_row_block,
                       (void *)p);
    return WAN_ATTN_OK;
}
