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
 * Who does what: one task = 16 query rows of one head of one sample, which are in one block of
 * queries and so have one list of blocks; tasks share nothing but their inputs.
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
 * Listed blocks of keys that are neighbours are one run of keys, so that a list of all blocks gives
 * the bits of none. The others' means are summed in float32 in the order of their keys, and follow
 * the keys. What a skip_threshold leaves out is bounded by its largest weight times its keys.
 */
#include <float.h>
#include <math.h>

#include "core/lists.h"
#include "cpu/half.h"
#include "cpu/lost.h"
#include "cpu/threads.h"

enum { BLOCK_M = 16, BLOCK_N = 32, PART_D = 64, MAX_HEAD_DIM = 256 };

/* One task: rows [first_row, first_row + count) of a head. */
typedef struct row_task {
    const wan_attn_problem *p;
    int64_t b, head, head_k, first_row, len_k;
    int count;
    wan_attn_list list;
    wan_attn_key_range some; /* the keys that any of these rows sees, were they all listed */
} row_task;

/* The 16 rows of one task. */
typedef struct row_block {
    float q[BLOCK_M][MAX_HEAD_DIM];
    float o[BLOCK_M][MAX_HEAD_DIM];
    float row_max[BLOCK_M], row_sum[BLOCK_M];
    float lost[BLOCK_M];              /* at most: what was left out of row_sum */
    wan_attn_key_range keys[BLOCK_M]; /* what each row sees, were all blocks listed */
} row_block;

/* One block of keys: K transposed, so that the scores of a row form a vector along the keys. */
typedef struct key_block {
    float k_transposed[MAX_HEAD_DIM][BLOCK_N];
    float v[BLOCK_N][MAX_HEAD_DIM];
} key_block;

/* Keys behind the last: computed with the rest, never read. */
static void fill_up(key_block *block, int64_t count, int64_t head_dim) {
    for (int64_t n = count; n < BLOCK_N; n++)
        for (int64_t d = 0; d < head_dim; d++)
            block->k_transposed[d][n] = 0.0f;
}

static void load_keys(const row_task *t, int64_t first, int64_t count, key_block *block) {
    const wan_attn_problem *p = t->p;
    float row[MAX_HEAD_DIM];
    for (int64_t n = 0; n < count; n++) {
        wan_attn_load_floats(row, wan_attn_row_address(&p->k, t->b, first + n, t->head_k),
                             p->k.dtype, p->head_dim);
        for (int64_t d = 0; d < p->head_dim; d++)
            block->k_transposed[d][n] = row[d];
        wan_attn_load_floats(block->v[n], wan_attn_row_address(&p->v, t->b, first + n, t->head_k),
                             p->v.dtype, p->head_dim);
    }
    fill_up(block, count, p->head_dim);
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

/* Adds the keys [begin, end) of this block to row m; each weighs factor[n] times what its score
 * says. factor may be NULL: 1. */
static void add_keys(row_block *rows, int m, const key_block *block, int64_t head_dim,
                     const float *s, const float *factor, int begin, int end) {
    float block_max = rows->row_max[m];
    for (int n = begin; n < end; n++)
        block_max = s[n] > block_max ? s[n] : block_max;

    float alpha = rows->row_max[m] == block_max ? 1.0f : expf(rows->row_max[m] - block_max);
    float sum = 0.0f, acc[MAX_HEAD_DIM] = {0};
    for (int n = begin; n < end; n++) {
        float weight = expf(s[n] - block_max) * (factor ? factor[n] : 1.0f);
        sum += weight;
        for (int64_t d = 0; d < head_dim; d++)
            acc[d] += weight * block->v[n][d];
    }
    for (int64_t d = 0; d < head_dim; d++)
        rows->o[m][d] = rows->o[m][d] * alpha + acc[d];
    rows->row_sum[m] = rows->row_sum[m] * alpha + sum;
    rows->lost[m] = wan_attn_lost_after(rows->lost[m], alpha);
    rows->row_max[m] = block_max;
}

/* Adds these keys to the rows that see them. */
static void add_run(const row_task *t, row_block *rows, wan_attn_key_range run) {
    key_block block;
    for (int64_t first_key = run.begin; first_key < run.end; first_key += BLOCK_N) {
        int64_t left = run.end - first_key < BLOCK_N ? run.end - first_key : BLOCK_N;
        load_keys(t, first_key, left, &block);
        for (int m = 0; m < t->count; m++) {
            int64_t from = rows->keys[m].begin - first_key, to = rows->keys[m].end - first_key;
            from = from > 0 ? from : 0;
            to = to < left ? to : left;
            if (from >= to)
                continue;
            float s[BLOCK_N];
            score_row(rows->q[m], &block, t->p->head_dim, (float)t->p->softmax_scale, s);
            add_keys(rows, m, &block, t->p->head_dim, s, NULL, (int)from, (int)to);
        }
    }
}

/* The largest score that each row has in this block of keys, and what all of them weigh against its
 * maximum so far. False: an infinity or NaN is among scores or values, or a row sees only a part of
 * the block. */
static int weigh_block(const row_task *t, const row_block *rows, wan_attn_key_range keys,
                       float largest[BLOCK_M], float weight[BLOCK_M]) {
    key_block block;
    int is_plain = 1;
    for (int m = 0; m < BLOCK_M; m++) {
        largest[m] = -FLT_MAX;
        weight[m] = 0.0f;
    }
    for (int64_t first = keys.begin; first < keys.end; first += BLOCK_N) {
        int64_t left = keys.end - first < BLOCK_N ? keys.end - first : BLOCK_N;
        load_keys(t, first, left, &block);
        for (int64_t n = 0; n < left; n++)
            for (int64_t d = 0; d < t->p->head_dim; d++)
                is_plain &= isfinite(block.v[n][d]) != 0;
        for (int m = 0; m < t->count; m++) {
            float s[BLOCK_N];
            if (rows->keys[m].begin >= rows->keys[m].end)
                continue;
            is_plain &= rows->keys[m].begin <= keys.begin && rows->keys[m].end >= keys.end;
            score_row(rows->q[m], &block, t->p->head_dim, (float)t->p->softmax_scale, s);
            for (int64_t n = 0; n < left; n++) {
                is_plain &= isfinite(s[n]) != 0;
                largest[m] = s[n] > largest[m] ? s[n] : largest[m];
                weight[m] += expf(s[n] - rows->row_max[m]);
            }
        }
    }
    return is_plain;
}

/* Whether no row needs this block of keys; then what they lack has been counted. */
static int leave_out(const row_task *t, row_block *rows, wan_attn_key_range keys) {
    float largest[BLOCK_M], weight[BLOCK_M];
    if (!weigh_block(t, rows, keys, largest, weight))
        return 0;
    for (int m = 0; m < t->count; m++)
        if (rows->keys[m].begin < rows->keys[m].end &&
            !(expf(largest[m] - rows->row_max[m]) < t->p->skip_threshold))
            return 0;
    for (int m = 0; m < t->count; m++)
        if (rows->keys[m].begin < rows->keys[m].end)
            rows->lost[m] += weight[m] + LOST_AT_LEAST;
    return 1;
}

/* The means of block n's keys and values become key `at` of `to`. */
static void load_means(const row_task *t, int64_t n, key_block *to, int at) {
    key_block block;
    int64_t keys = wan_attn_keys_in_block(n, t->len_k);
    for (int64_t d = 0; d < t->p->head_dim; d++)
        to->k_transposed[d][at] = to->v[at][d] = 0.0f;
    for (int64_t first = 0; first < keys; first += BLOCK_N) {
        int64_t left = keys - first < BLOCK_N ? keys - first : BLOCK_N;
        load_keys(t, n * WAN_ATTN_BLOCK + first, left, &block);
        for (int64_t j = 0; j < left; j++)
            for (int64_t d = 0; d < t->p->head_dim; d++) {
                to->k_transposed[d][at] += block.k_transposed[d][j];
                to->v[at][d] += block.v[j][d];
            }
    }
    for (int64_t d = 0; d < t->p->head_dim; d++) {
        to->k_transposed[d][at] /= (float)keys;
        to->v[at][d] /= (float)keys;
    }
}

/* Adds the means of blocks that are not listed to the rows that see all of such a block. */
static void add_others(const row_task *t, row_block *rows) {
    key_block block;
    int64_t at = 0, number[BLOCK_N];
    float factor[BLOCK_N];
    wan_attn_key_range blocks = {t->some.begin / WAN_ATTN_BLOCK, wan_attn_key_blocks(t->some.end)};
    int64_t n = wan_attn_next_other(&t->list, &at, blocks.begin);
    while (n < blocks.end) {
        int count = 0;
        for (; n < blocks.end && count < BLOCK_N;
             n = wan_attn_next_other(&t->list, &at, n + 1), count++) {
            number[count] = n;
            factor[count] = (float)wan_attn_keys_in_block(n, t->len_k);
            load_means(t, n, &block, count);
        }
        fill_up(&block, count, t->p->head_dim);
        for (int m = 0; m < t->count; m++) {
            wan_attn_key_range whole = wan_attn_whole_blocks(rows->keys[m], t->len_k);
            int from = 0, to = count;
            float s[BLOCK_N];
            while (from < to && number[from] < whole.begin)
                from++;
            while (from < to && number[to - 1] >= whole.end)
                to--;
            if (from == to || rows->keys[m].begin >= rows->keys[m].end)
                continue;
            score_row(rows->q[m], &block, t->p->head_dim, (float)t->p->softmax_scale, s);
            add_keys(rows, m, &block, t->p->head_dim, s, factor, from, to);
        }
    }
}

/* Whether anything counts for a row that would see these keys, were all blocks listed. */
static int sees_any(const row_task *t, wan_attn_key_range keys) {
    int64_t at = 0;
    if (keys.begin >= keys.end)
        return 0;
    if (wan_attn_sees_listed(&t->list, &at, keys))
        return 1;
    at = 0;
    wan_attn_key_range whole = wan_attn_whole_blocks(keys, t->len_k);
    return t->p->pools_others && wan_attn_next_other(&t->list, &at, whole.begin) < whole.end;
}

static void store_row(const row_task *t, row_block *rows, int m) {
    const wan_attn_problem *p = t->p;
    int64_t i = t->first_row + m;
    int sees_none = !sees_any(t, rows->keys[m]);
    float *o = rows->o[m];
    for (int64_t d = 0; d < p->head_dim; d++)
        o[d] = sees_none ? 0.0f : o[d] / rows->row_sum[m];
    wan_attn_store_floats(wan_attn_row_address(&p->out, t->b, i, t->head), o, p->out.dtype,
                          p->head_dim);
    if (p->lse)
        p->lse[t->b * p->lse_batch_stride + t->head * p->lse_head_stride + i * p->lse_row_stride] =
            sees_none                  ? -INFINITY
            : rows->row_sum[m] == 0.0f ? NAN /* all scores -inf: the softmax is NaN */
                                       : rows->row_max[m] + logf(rows->row_sum[m]);
}

static int64_t row_blocks(const wan_attn_problem *p) {
    return wan_attn_divide_up(p->seqlen_q, BLOCK_M);
}

/* Nothing has been seen yet. */
static void begin_rows(row_task *t, row_block *rows) {
    const wan_attn_problem *p = t->p;
    int64_t len_q = wan_attn_length_at(&p->seqused_q, t->b, p->seqlen_q);
    wan_attn_key_range none = {INT64_MAX, 0};
    t->some = none;
    for (int m = 0; m < t->count; m++) {
        wan_attn_key_range keys = wan_attn_visible_keys(p, t->first_row + m, len_q, t->len_k);
        rows->keys[m] = keys;
        rows->row_max[m] = -FLT_MAX; /* finite: a score of -inf must weigh 0, not NaN */
        rows->row_sum[m] = rows->lost[m] = 0.0f;
        for (int64_t d = 0; d < p->head_dim; d++)
            rows->o[m][d] = 0.0f;
        if (keys.begin >= keys.end)
            continue;
        wan_attn_load_floats(rows->q[m],
                             wan_attn_row_address(&p->q, t->b, t->first_row + m, t->head),
                             p->q.dtype, p->head_dim);
        t->some.begin = keys.begin < t->some.begin ? keys.begin : t->some.begin;
        t->some.end = keys.end > t->some.end ? keys.end : t->some.end;
    }
}

typedef struct ref_call {
    const wan_attn_problem *p;
    wan_attn_flags lost; /* of all rows: lost.h */
} ref_call;

/* Task numbers run over [batch][head][row block]. */
static void run_row_block(int64_t task, int64_t worker, void *ctx) {
    (void)worker; /* its scratch is the stack */
    ref_call *call = (ref_call *)ctx;
    const wan_attn_problem *p = call->p;
    row_task t = {.p = p, .first_row = task % row_blocks(p) * BLOCK_M};
    t.head = task / row_blocks(p) % p->num_heads_q;
    t.b = task / row_blocks(p) / p->num_heads_q;
    t.head_k = t.head / (p->num_heads_q / p->num_heads_k);
    t.len_k = wan_attn_length_at(&p->seqused_k, t.b, p->seqlen_k);
    t.count = (int)(p->seqlen_q - t.first_row < BLOCK_M ? p->seqlen_q - t.first_row : BLOCK_M);
    t.list = wan_attn_list_of(p, t.b, t.head, t.first_row);

    row_block rows;
    begin_rows(&t, &rows);
    int skips = p->skip_threshold > 0.0f;
    int64_t at = 0, most = skips ? 1 : INT64_MAX;
    for (;;) {
        wan_attn_key_range run = wan_attn_next_run(&t.list, &at, t.some, most);
        if (run.begin >= run.end)
            break;
        run.end = run.end < t.len_k ? run.end : t.len_k;
        if (skips && leave_out(&t, &rows, run))
            continue;
        run.begin = run.begin > t.some.begin ? run.begin : t.some.begin;
        run.end = run.end < t.some.end ? run.end : t.some.end;
        add_run(&t, &rows, run);
    }
    if (p->pools_others)
        add_others(&t, &rows);
    for (int m = 0; m < t.count; m++) {
        store_row(&t, &rows, m);
        wan_attn_note_lost(&call->lost, rows.lost[m], rows.row_sum[m], p->seqlen_k);
    }
}

/* Takes every call, and needs nothing but the stack. */
const char *wan_attn_sdpa_ref_plan(wan_attn_problem *p) {
    (void)p;
    return NULL;
}

wan_attn_status wan_attn_sdpa_ref(const wan_attn_problem *p, wan_attn_error *err) {
    ref_call call = {.p = p};
    (void)err;
    wan_attn_run_tasks(p->params, p->batch * p->num_heads_q * row_blocks(p), run_row_block, &call);
    wan_attn_tell_lost(p, &call.lost);
    return WAN_ATTN_OK;
}
