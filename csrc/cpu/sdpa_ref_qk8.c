/* SPDX-License-Identifier: Apache-2.0
 * sdpa_ref_qk8.c - the specification of attention with 8-bit scores, in portable C, for every
 * dtype, head_dim, mask and stride of the contract. Integer scores are defined to the bit (qk8.h);
 * what follows them is float32, as in sdpa_ref.c. Written to be read.
 *
 * Implements: INT8 scores with K's mean taken off, after SageAttention (Zhang et al., arXiv
 * 2410.02367); what differs: q and k are rotated, each row has a scale of its own, and lse is that
 * of the keys as they are. benchmarks/accuracy compares them.
 *
 *               all keys of a head
 *             +--------------------+   S = (q_int8 . k_int8) * k_step         one number per key
 *   BLOCK_M   |  S  ->  P          |   P = exp((S - row_max) * factor)
 *   = 16 rows +--------------------+   O = sum of P V, 32 keys at a time
 *
 * Who does what: head by head. One task sums or quantises 64 keys; one task computes 16 query rows
 * against them.
 * Pipeline: none. Limits: none within the contract; head_dim is filled up to a power of two.
 * Measured: not for speed; it is what the others are compared with.
 * Budget: a workspace of one head's keys in INT8, and for each thread 16 rows of scores.
 * Numerics: S is one rounding of an integer times a float. Each 32 keys of P V and of P are summed
 * from zero and then added. (S - row_max) is exactly 0 for the largest, hence one key gives its
 * value exactly. Keys that a row may not see are left out by loop bounds; K's mean is over all real
 * keys, so those do take part in what the integers are, which changes their rounding alone; nor do
 * blocks that a list leaves out, whose neighbours are one run of keys, as in sdpa_ref.c.
 */
#include <float.h>
#include <math.h>

#include "core/lists.h"
#include "cpu/half.h"
#include "cpu/qk8.h"
#include "cpu/threads.h"

enum { BLOCK_M = 16, BLOCK_N = 32, MAX_HEAD_DIM = WAN_ATTN_QK8_MAX_DEPTH, ALIGNMENT = 64 };

/* One head of K and V of one sample at work. The arrays lie in the workspace. */
typedef struct head_at_work {
    const wan_attn_problem *p;
    int64_t b, head_k, len_q, len_k;
    int64_t depth, first_head, row_blocks; /* its query heads begin at first_head */
    int8_t *k;                             /* [seqlen_k][depth]                   */
    float *k_step;                         /* [seqlen_k]                          */
    float *sums;                           /* [blocks of keys][head_dim]          */
    float *mean;                           /* [head_dim]                          */
    float *scores;                         /* [worker][BLOCK_M][seqlen_k]         */
} head_at_work;

/* The rows of one task. */
typedef struct row_block {
    float o[BLOCK_M][MAX_HEAD_DIM];
    float factor[BLOCK_M], row_max[BLOCK_M], row_sum[BLOCK_M];
    double of_mean[BLOCK_M];          /* softmax_scale * <q, mean> */
    wan_attn_key_range keys[BLOCK_M]; /* what each row sees, were all blocks listed */
    wan_attn_key_range some;          /* what any of them does */
    wan_attn_list list;               /* 16 rows are in one block of queries */
} row_block;

static int64_t key_blocks(int64_t keys) { return wan_attn_divide_up(keys, WAN_ATTN_QK8_BLOCK); }

static int64_t row_blocks(const wan_attn_problem *p) {
    return p->num_heads_q / p->num_heads_k * wan_attn_divide_up(p->seqlen_q, BLOCK_M);
}

static int64_t workers(const wan_attn_problem *p) {
    return wan_attn_workers(p->params, row_blocks(p));
}

/* The next `bytes` of the workspace; base NULL: they are only counted. */
static void *take(char *base, int64_t *used, int64_t bytes) {
    char *taken = base ? base + *used : NULL;
    *used += wan_attn_divide_up(bytes, ALIGNMENT) * ALIGNMENT;
    return taken;
}

/* Lays the arrays out from `base` on, and returns how many bytes they take. */
static int64_t lay_out(const wan_attn_problem *p, char *base, head_at_work *h) {
    int64_t used = 0, float_size = (int64_t)sizeof(float);
    h->depth = wan_attn_qk8_depth(p->head_dim);
    h->k = (int8_t *)take(base, &used, p->seqlen_k * h->depth);
    h->k_step = (float *)take(base, &used, p->seqlen_k * float_size);
    h->sums = (float *)take(base, &used, key_blocks(p->seqlen_k) * p->head_dim * float_size);
    h->mean = (float *)take(base, &used, p->head_dim * float_size);
    h->scores = (float *)take(base, &used, workers(p) * BLOCK_M * p->seqlen_k * float_size);
    return used;
}

static void sum_keys(int64_t task, int64_t worker, void *ctx) {
    const head_at_work *h = (const head_at_work *)ctx;
    int64_t first = task * WAN_ATTN_QK8_BLOCK, left = h->len_k - first;
    (void)worker;
    wan_attn_qk8_sum_keys(h->p, h->b, h->head_k, first,
                          left < WAN_ATTN_QK8_BLOCK ? left : WAN_ATTN_QK8_BLOCK,
                          h->sums + task * h->p->head_dim);
}

static void quantise_keys(int64_t task, int64_t worker, void *ctx) {
    const head_at_work *h = (const head_at_work *)ctx;
    const wan_attn_problem *p = h->p;
    float row[MAX_HEAD_DIM];
    (void)worker;
    for (int64_t n = task * WAN_ATTN_QK8_BLOCK; n < h->len_k && n < (task + 1) * WAN_ATTN_QK8_BLOCK;
         n++) {
        wan_attn_load_floats(row, wan_attn_row_address(&p->k, h->b, n, h->head_k), p->k.dtype,
                             p->head_dim);
        for (int64_t d = 0; d < p->head_dim; d++)
            row[d] -= h->mean[d];
        h->k_step[n] = wan_attn_qk8_quantise(row, p->head_dim, h->k + n * h->depth);
    }
}

/* The next keys that any of these rows sees, in listed blocks that are neighbours. */
static wan_attn_key_range next_run(const row_block *rows, int64_t *at) {
    wan_attn_key_range run = wan_attn_next_run(&rows->list, at, rows->some, INT64_MAX);
    run.begin = run.begin > rows->some.begin ? run.begin : rows->some.begin;
    run.end = run.end < rows->some.end ? run.end : rows->some.end;
    return run;
}

/* The scores s[n] of the keys that row m sees, without the row's own factor, and their largest. */
static void score_row(const head_at_work *h, row_block *rows, int m, int64_t head, int64_t i,
                      float *s) {
    const wan_attn_problem *p = h->p;
    float q[MAX_HEAD_DIM];
    int8_t q_int8[MAX_HEAD_DIM];
    wan_attn_load_floats(q, wan_attn_row_address(&p->q, h->b, i, head), p->q.dtype, p->head_dim);
    double of_mean = 0.0;
    for (int64_t d = 0; d < p->head_dim; d++) {
        of_mean += (double)q[d] * (double)h->mean[d];
        q[d] = p->softmax_scale < 0 ? -q[d] : q[d]; /* the largest score is the largest weight */
    }
    rows->of_mean[m] = p->softmax_scale * of_mean;
    float step = wan_attn_qk8_quantise(q, p->head_dim, q_int8);
    rows->factor[m] = wan_attn_qk8_factor(p, step, h->depth);

    float row_max = -FLT_MAX; /* finite: max - max must be 0, not NaN */
    int64_t at = 0;
    for (wan_attn_key_range run = next_run(rows, &at); run.begin < run.end;
         run = next_run(rows, &at)) {
        int64_t begin = run.begin > rows->keys[m].begin ? run.begin : rows->keys[m].begin;
        int64_t end = run.end < rows->keys[m].end ? run.end : rows->keys[m].end;
        for (int64_t n = begin; n < end; n++) {
            const int8_t *k = h->k + n * h->depth;
            int32_t sum = 0;
            for (int64_t d = 0; d < h->depth; d++)
                sum += q_int8[d] * k[d];
            s[n] = (float)sum * h->k_step[n];
            row_max = s[n] > row_max ? s[n] : row_max;
        }
    }
    rows->row_max[m] = row_max;
    rows->row_sum[m] = 0.0f;
    memset(rows->o[m], 0, (size_t)p->head_dim * sizeof(float));
}

/* One block of values, converted once for 16 rows. */
typedef struct value_block {
    float v[BLOCK_N][MAX_HEAD_DIM];
} value_block;

/* Adds the keys [begin, end) of this block to row m; s: the scores of the block. */
static void add_keys(const wan_attn_problem *p, row_block *rows, int m, const value_block *block,
                     const float *s, int begin, int end) {
    float sum = 0.0f, acc[MAX_HEAD_DIM] = {0};
    for (int n = begin; n < end; n++) {
        float weight = expf((s[n] - rows->row_max[m]) * rows->factor[m]);
        sum += weight;
        for (int64_t d = 0; d < p->head_dim; d++)
            /* NOLINTNEXTLINE(clang-analyzer-core.UndefinedBinaryOperatorResult): all are loaded */
            acc[d] += weight * block->v[n][d];
    }
    rows->row_sum[m] += sum;
    for (int64_t d = 0; d < p->head_dim; d++)
        rows->o[m][d] += acc[d];
}

/* Adds these keys to the rows that see them. */
static void add_run(const head_at_work *h, row_block *rows, int count, wan_attn_key_range run,
                    const float *scores) {
    const wan_attn_problem *p = h->p;
    value_block block;
    for (int64_t first = run.begin; first < run.end; first += BLOCK_N) {
        int64_t left = run.end - first < BLOCK_N ? run.end - first : BLOCK_N;
        for (int64_t n = 0; n < left; n++)
            wan_attn_load_floats(block.v[n],
                                 wan_attn_row_address(&p->v, h->b, first + n, h->head_k),
                                 p->v.dtype, p->head_dim);
        for (int m = 0; m < count; m++) {
            int64_t from = rows->keys[m].begin - first, to = rows->keys[m].end - first;
            from = from > 0 ? from : 0;
            to = to < left ? to : left;
            if (from < to)
                add_keys(p, rows, m, &block, scores + m * p->seqlen_k + first, (int)from, (int)to);
        }
    }
}

static void store_row(const head_at_work *h, row_block *rows, int m, int64_t head, int64_t i) {
    const wan_attn_problem *p = h->p;
    int64_t at = 0;
    int sees_none = rows->keys[m].begin >= rows->keys[m].end ||
                    !wan_attn_sees_listed(&rows->list, &at, rows->keys[m]);
    float *o = rows->o[m], lse = -INFINITY;
    for (int64_t d = 0; d < p->head_dim; d++)
        o[d] = sees_none ? 0.0f : o[d] / rows->row_sum[m];
    wan_attn_store_floats(wan_attn_row_address(&p->out, h->b, i, head), o, p->out.dtype,
                          p->head_dim);
    if (!sees_none) {
        float largest = rows->row_max[m] * rows->factor[m];
        lse = (float)((double)largest + (double)logf(rows->row_sum[m]) + rows->of_mean[m]);
    }
    if (p->lse)
        p->lse[h->b * p->lse_batch_stride + head * p->lse_head_stride + i * p->lse_row_stride] =
            lse;
}

/* Task numbers run over [query head of the key head][block of rows]. */
static void compute_rows(int64_t task, int64_t worker, void *ctx) {
    const head_at_work *h = (const head_at_work *)ctx;
    const wan_attn_problem *p = h->p;
    int64_t blocks = wan_attn_divide_up(p->seqlen_q, BLOCK_M);
    int64_t head = h->first_head + task / blocks, first_row = task % blocks * BLOCK_M;
    int count = (int)(p->seqlen_q - first_row < BLOCK_M ? p->seqlen_q - first_row : BLOCK_M);
    float *scores = h->scores + worker * BLOCK_M * p->seqlen_k;

    row_block rows = {.some = {INT64_MAX, 0}, .list = wan_attn_list_of(p, h->b, head, first_row)};
    for (int m = 0; m < count; m++) {
        wan_attn_key_range keys = wan_attn_visible_keys(p, first_row + m, h->len_q, h->len_k);
        rows.keys[m] = keys;
        if (keys.begin >= keys.end)
            continue;
        rows.some.begin = keys.begin < rows.some.begin ? keys.begin : rows.some.begin;
        rows.some.end = keys.end > rows.some.end ? keys.end : rows.some.end;
    }
    for (int m = 0; m < count; m++)
        if (rows.keys[m].begin < rows.keys[m].end)
            score_row(h, &rows, m, head, first_row + m, scores + m * p->seqlen_k);
    int64_t at = 0;
    for (wan_attn_key_range run = next_run(&rows, &at); run.begin < run.end;
         run = next_run(&rows, &at))
        add_run(h, &rows, count, run, scores);
    for (int m = 0; m < count; m++)
        store_row(h, &rows, m, head, first_row + m);
}

/* Takes every call. */
const char *wan_attn_sdpa_ref_qk8_plan(wan_attn_problem *p) {
    head_at_work h;
    p->workspace_size = (size_t)lay_out(p, NULL, &h);
    return NULL;
}

wan_attn_status wan_attn_sdpa_ref_qk8(const wan_attn_problem *p, wan_attn_error *err) {
    (void)err;
    head_at_work h = {.p = p};
    lay_out(p, (char *)p->params->workspace, &h);
    for (int64_t pair = 0; pair < p->batch * p->num_heads_k; pair++) {
        h.b = pair / p->num_heads_k;
        h.head_k = pair % p->num_heads_k;
        h.first_head = h.head_k * (p->num_heads_q / p->num_heads_k);
        h.len_q = wan_attn_length_at(&p->seqused_q, h.b, p->seqlen_q);
        h.len_k = wan_attn_length_at(&p->seqused_k, h.b, p->seqlen_k);
        wan_attn_run_tasks(p->params, key_blocks(h.len_k), sum_keys, &h);
        wan_attn_qk8_find_mean(h.sums, h.len_k, p->head_dim, h.mean);
        wan_attn_run_tasks(p->params, key_blocks(h.len_k), quantise_keys, &h);
        wan_attn_run_tasks(p->params, row_blocks(p), compute_rows, &h);
    }
    return WAN_ATTN_OK;
}
