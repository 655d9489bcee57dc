/* SPDX-License-Identifier: Apache-2.0
 * launch.c - runs a call on a GPU: fills the arguments of each pass of its plan and enqueues them
 * on the caller's stream, in order. Waits for nothing, allocates nothing, reads nothing from the
 * device; what it passes by value is baked into a captured graph, as are the pointers.
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cuda/args_sm90.h"
#include "cuda/host/call.h"

enum { WARP = 32 };

typedef wan_attn_cuda_call call;

wan_attn_status wan_attn_cuda_launch(const call *c, const wan_attn_cuda_program *program,
                                     int64_t blocks, void *args) {
    wan_attn_cu_kernel kernel;
    wan_attn_status status =
        wan_attn_cuda_kernel(c->driver, c->device_index, program, &kernel, c->err);
    if (status != WAN_ATTN_OK || blocks == 0)
        return status;
    void *params[] = {args};
    wan_attn_cu_result error =
        c->driver->launch(kernel, (unsigned)blocks, 1, 1, program->num_threads, 1, 1,
                          program->smem_bytes, c->p->params->stream, params, NULL);
    return error == 0 ? WAN_ATTN_OK
                      : wan_attn_cuda_kernel_failed(c->driver, error, "when launching",
                                                    wan_attn_cuda_symbol_of(program).text, c->err);
}

wan_attn_status wan_attn_cuda_launch_warps(const call *c, wan_attn_cuda_helper helper,
                                           int64_t warps, void *args) {
    const wan_attn_cuda_program program = wan_attn_cuda_helper_program(helper);
    int64_t per_block = program.num_threads / WARP;
    return wan_attn_cuda_launch(c, &program, wan_attn_divide_up(warps, per_block), args);
}

wan_attn_cuda_lengths wan_attn_cuda_lengths_of(const call *c, const wan_attn_lengths *lengths,
                                               wan_attn_cuda_place place) {
    wan_attn_cuda_lengths found = {NULL, 0, 0, 0};
    if (place >= 0) {
        found.data = wan_attn_cuda_at(c, place);
        found.stride = 1;
    } else if (lengths->data && lengths->device_type == WAN_ATTN_CUDA) {
        found.data = lengths->data;
        found.stride = lengths->stride;
        found.is_i64 = lengths->dtype == WAN_ATTN_I64;
    }
    return found;
}

wan_attn_status wan_attn_cuda_put_lengths(const call *c, const wan_attn_lengths *lengths,
                                          int64_t padded, wan_attn_cuda_place place) {
    const wan_attn_cuda_program program = wan_attn_cuda_helper_program(HELPER_wan_attn_put_lengths);
    wan_attn_status status = WAN_ATTN_OK;
    for (int64_t first = 0; place >= 0 && first < c->p->batch && status == WAN_ATTN_OK;
         first += WAN_ATTN_CUDA_MOST_LENGTHS) {
        wan_attn_cuda_put_lengths_args args;
        int64_t left = c->p->batch - first;
        args.to = (int *)wan_attn_cuda_at(c, place) + first;
        args.count = (int)(left < WAN_ATTN_CUDA_MOST_LENGTHS ? left : WAN_ATTN_CUDA_MOST_LENGTHS);
        for (int n = 0; n < WAN_ATTN_CUDA_MOST_LENGTHS; n++)
            args.lengths[n] =
                n < args.count ? (int)wan_attn_length_at(lengths, first + n, padded) : 0;
        status = wan_attn_cuda_launch(c, &program, 1, &args);
    }
    return status;
}

/* An operand on its way into the workspace. */
typedef struct packing {
    const wan_attn_view *from;
    int64_t seqlen, heads;
    wan_attn_cuda_lengths seqused;
    wan_attn_cuda_place to, largest, scale;
    int limit; /* 0: not scaled, in the row's dtype; else in f16 */
} packing;

static wan_attn_status pack(const call *c, const packing *operand) {
    if (operand->to < 0)
        return WAN_ATTN_OK;
    wan_attn_cuda_pack_args args;
    memset(&args, 0, sizeof(args));
    args.from = wan_attn_cuda_view_of(operand->from);
    args.to = wan_attn_cuda_at(c, operand->to);
    args.seqused = operand->seqused;
    args.batch = (int)c->p->batch;
    args.seqlen = (int)operand->seqlen;
    args.heads = (int)operand->heads;
    args.head_dim = (int)c->p->head_dim;
    args.from_dtype = (int)operand->from->dtype;
    args.to_bf16 = c->p->dtype == WAN_ATTN_BF16 && !operand->limit;
    args.largest = wan_attn_cuda_at(c, operand->largest);
    args.scale = wan_attn_cuda_at(c, operand->scale);
    args.num_parts = c->plan.measured_parts;
    args.limit = operand->limit;
    int64_t heads = c->p->batch * operand->heads;
    wan_attn_status status = WAN_ATTN_OK;
    if (operand->limit)
        status =
            wan_attn_cuda_launch_warps(c, HELPER_wan_attn_measure, heads * args.num_parts, &args);
    if (operand->limit && status == WAN_ATTN_OK)
        status = wan_attn_cuda_launch_warps(c, HELPER_wan_attn_find_scale, heads, &args);
    if (status == WAN_ATTN_OK)
        status =
            wan_attn_cuda_launch_warps(c, HELPER_wan_attn_convert, heads * operand->seqlen, &args);
    return status;
}

static wan_attn_status pack_all(const call *c, wan_attn_cuda_lengths seqused_q,
                                wan_attn_cuda_lengths seqused_k) {
    const wan_attn_problem *p = c->p;
    const wan_attn_cuda_plan *plan = &c->plan;
    const packing operands[3] = {
        {&p->q, p->seqlen_q, p->num_heads_q, seqused_q, plan->q, -1, -1, 0},
        {&p->k, p->seqlen_k, p->num_heads_k, seqused_k, plan->k, plan->k_largest, plan->k_scale,
         plan->k_limit},
        {&p->v, p->seqlen_k, p->num_heads_k, seqused_k, plan->v, plan->v_largest, plan->v_scale,
         plan->v_limit}};
    wan_attn_status status = WAN_ATTN_OK;
    for (int n = 0; n < 3 && status == WAN_ATTN_OK; n++)
        status = pack(c, &operands[n]);
    return status;
}

static void fill_numbers(const wan_attn_problem *p, wan_attn_cuda_args *args) {
    args->batch = (int)p->batch;
    args->num_heads_q = (int)p->num_heads_q;
    args->heads_per_key_head = (int)(p->num_heads_q / p->num_heads_k);
    args->seqlen_q = (int)p->seqlen_q;
    args->seqlen_k = (int)p->seqlen_k;
    args->window_size_left = wan_attn_cuda_bound_of(p->window_size_left);
    args->window_size_right = wan_attn_cuda_bound_of(p->window_size_right);
    double scale = fmin(fabs(p->softmax_scale) * WAN_ATTN_LOG2_E, FLT_MAX);
    args->scale_log2e =
        scale > WAN_ATTN_CUDA_SMALLEST_SCALE ? (float)scale : WAN_ATTN_CUDA_SMALLEST_SCALE;
    args->q_sign = p->softmax_scale < 0 ? 0x80008000u : 0;
}

static void fill_operands(const call *c, wan_attn_cuda_args *args) {
    const wan_attn_problem *p = c->p;
    const wan_attn_cuda_plan *plan = &c->plan;
    args->q = wan_attn_cuda_view_of(&p->q);
    args->k = wan_attn_cuda_view_of(&p->k);
    args->v = wan_attn_cuda_view_of(&p->v);
    args->q_is_f32 = p->q.dtype == WAN_ATTN_F32 && plan->q < 0;
    if (plan->q >= 0)
        args->q = wan_attn_cuda_dense(wan_attn_cuda_at(c, plan->q), p->seqlen_q, p->num_heads_q,
                                      p->head_dim);
    if (plan->k >= 0)
        args->k = wan_attn_cuda_dense(wan_attn_cuda_at(c, plan->k), p->seqlen_k, p->num_heads_k,
                                      p->head_dim);
    if (plan->v >= 0)
        args->v = wan_attn_cuda_dense(wan_attn_cuda_at(c, plan->v), p->seqlen_k, p->num_heads_k,
                                      p->head_dim);
    args->k_scale = wan_attn_cuda_at(c, plan->k_scale);
    if (plan->qk8_keys >= 0) {
        args->q.data = wan_attn_cuda_at(c, plan->qk8_queries);
        args->k.data = wan_attn_cuda_at(c, plan->qk8_keys);
        args->q_is_f32 = 0;
        args->q_rows = wan_attn_cuda_at(c, plan->qk8_rows);
    }
    args->v_scale = wan_attn_cuda_at(c, plan->v_scale);
    args->out = wan_attn_cuda_view_of(&p->out);
    args->out_is_f32 = p->out.dtype == WAN_ATTN_F32;
    args->lse = p->lse;
    args->lse_batch_stride = p->lse_batch_stride;
    args->lse_head_stride = p->lse_head_stride;
    args->lse_row_stride = p->lse_row_stride;
    if (plan->num_splits == 1)
        return;
    args->out = wan_attn_cuda_dense(wan_attn_cuda_at(c, plan->part_out), p->seqlen_q,
                                    p->num_heads_q, p->head_dim);
    args->out_is_f32 = 1;
    args->out_split_stride = p->batch * args->out.batch_stride;
    args->lse = wan_attn_cuda_at(c, plan->part_lse);
    args->lse_row_stride = 1;
    args->lse_head_stride = p->seqlen_q;
    args->lse_batch_stride = p->num_heads_q * p->seqlen_q;
    args->lse_split_stride = p->batch * args->lse_batch_stride;
}

/* A tensor map of one operand: boxes of 64 columns and box_rows rows; README.md of csrc/cuda,
 * "Launch: sdpa_sm90.cuh". */
static wan_attn_cu_result encode(const call *c, wan_attn_cuda_tensor_map *map,
                                 const wan_attn_cuda_view *v, int64_t seqlen, int64_t heads,
                                 int box_rows) {
    const wan_attn_problem *p = c->p;
    const uint64_t size[4] = {(uint64_t)p->head_dim, (uint64_t)seqlen, (uint64_t)heads,
                              (uint64_t)p->batch};
    /* In bytes. A dimension of size 1 is never walked along, but its stride must be a legal one;
     * for heads and samples others pass 16 as well, for rows nobody passes less than a row. */
    const uint64_t strides[3] = {(uint64_t)(seqlen > 1 ? v->row_stride : p->head_dim) * 2,
                                 heads > 1 ? (uint64_t)v->head_stride * 2 : 16,
                                 p->batch > 1 ? (uint64_t)v->batch_stride * 2 : 16};
    const uint32_t box[4] = {64, (uint32_t)box_rows, 1, 1}, ones[4] = {1, 1, 1, 1};
    int dtype = p->dtype == WAN_ATTN_F16 ? WAN_ATTN_CU_MAP_F16 : WAN_ATTN_CU_MAP_BF16;
    return c->driver->encode_map(map, dtype, 4, v->data, size, strides, box, ones, 0,
                                 WAN_ATTN_CU_MAP_SWIZZLE_128B, WAN_ATTN_CU_MAP_L2_256B, 0);
}

/* Whether TMA can store out: the row's dtype, and what it asks of base and strides. */
static int can_store_by_tma(const wan_attn_problem *p) {
    return p->out.dtype == p->dtype &&
           wan_attn_cuda_is_spread(&p->out, p->batch, p->seqlen_q, p->num_heads_q) &&
           wan_attn_cuda_is_aligned(&p->out, p->batch, p->seqlen_q, p->num_heads_q, 16);
}

static wan_attn_status launch_sm90(const call *c, const wan_attn_cuda_program *program,
                                   const wan_attn_cuda_args *args, int64_t blocks) {
    const wan_attn_problem *p = c->p;
    const wan_attn_cuda_tile *tile = c->plan.tile;
    wan_attn_cuda_sm90_args with_maps;
    memset(&with_maps, 0, sizeof(with_maps));
    with_maps.call = *args;
    with_maps.stores_by_tma = can_store_by_tma(p);
    int box = tile->block_n / tile->cluster;
    wan_attn_cu_result error =
        encode(c, &with_maps.q, &args->q, p->seqlen_q, p->num_heads_q, tile->block_m);
    if (error == 0)
        error = encode(c, &with_maps.k, &args->k, p->seqlen_k, p->num_heads_k, box);
    if (error == 0)
        error = encode(c, &with_maps.v, &args->v, p->seqlen_k, p->num_heads_k, box);
    if (error == 0 && with_maps.stores_by_tma)
        error = encode(c, &with_maps.out, &args->out, p->seqlen_q, p->num_heads_q, 64);
    if (error != 0)
        return wan_attn_cuda_kernel_failed(c->driver, error, "when describing tensors to",
                                           wan_attn_cuda_symbol_of(program).text, c->err);
    return wan_attn_cuda_launch(c, program, blocks, &with_maps);
}

static wan_attn_status attend(const call *c, wan_attn_cuda_lengths seqused_q,
                              wan_attn_cuda_lengths seqused_k) {
    wan_attn_cuda_args args;
    memset(&args, 0, sizeof(args));
    fill_numbers(c->p, &args);
    fill_operands(c, &args);
    args.seqused_q = seqused_q;
    args.seqused_k = seqused_k;
    args.num_splits = c->plan.num_splits;
    args.split_tiles = c->plan.split_tiles;
    args.m_blocks = c->plan.m_blocks;
    int64_t blocks = (int64_t)args.m_blocks * args.num_splits * args.num_heads_q * args.batch;
    const wan_attn_cuda_program program = wan_attn_cuda_tile_program(c->plan.tile, c->p->dtype);
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): a call that is run has a tile */
    if (c->plan.tile->is_listed) {
        wan_attn_cuda_listed_args with_lists;
        memset(&with_lists, 0, sizeof(with_lists));
        with_lists.call = args;
        wan_attn_cuda_fill_lists(c, &with_lists);
        return wan_attn_cuda_launch(c, &program, blocks, &with_lists);
    }
    return c->plan.tile->body == WAN_ATTN_CUDA_SM90
               ? launch_sm90(c, &program, &args, blocks)
               : wan_attn_cuda_launch(c, &program, blocks, &args);
}

static wan_attn_status merge(const call *c) {
    const wan_attn_problem *p = c->p;
    if (c->plan.num_splits == 1)
        return WAN_ATTN_OK;
    wan_attn_cuda_merge_args args;
    memset(&args, 0, sizeof(args));
    args.part_out = wan_attn_cuda_at(c, c->plan.part_out);
    args.part_lse = wan_attn_cuda_at(c, c->plan.part_lse);
    args.out = wan_attn_cuda_view_of(&p->out);
    args.lse = p->lse;
    args.lse_batch_stride = p->lse_batch_stride;
    args.lse_head_stride = p->lse_head_stride;
    args.lse_row_stride = p->lse_row_stride;
    args.batch = (int)p->batch;
    args.seqlen = (int)p->seqlen_q;
    args.num_heads = (int)p->num_heads_q;
    args.head_dim = (int)p->head_dim;
    args.num_splits = c->plan.num_splits;
    args.out_dtype = (int)p->out.dtype;
    return wan_attn_cuda_launch_warps(c, HELPER_wan_attn_merge,
                                      p->batch * p->seqlen_q * p->num_heads_q, &args);
}

static wan_attn_status run_passes(const call *c) {
    const wan_attn_problem *p = c->p;
    const wan_attn_cuda_plan *plan = &c->plan;
    wan_attn_status status =
        wan_attn_cuda_put_lengths(c, &p->seqused_q, p->seqlen_q, plan->seqused_q);
    if (status == WAN_ATTN_OK)
        status = wan_attn_cuda_put_lengths(c, &p->seqused_k, p->seqlen_k, plan->seqused_k);
    wan_attn_cuda_lengths used_q = wan_attn_cuda_lengths_of(c, &p->seqused_q, plan->seqused_q);
    wan_attn_cuda_lengths used_k = wan_attn_cuda_lengths_of(c, &p->seqused_k, plan->seqused_k);
    if (status == WAN_ATTN_OK)
        status = pack_all(c, used_q, used_k);
    if (status == WAN_ATTN_OK)
        status = wan_attn_cuda_quantise(c, used_q, used_k);
    if (status == WAN_ATTN_OK)
        status = wan_attn_cuda_survey_blocks(c, used_k);
    if (status == WAN_ATTN_OK)
        status = attend(c, used_q, used_k);
    if (status == WAN_ATTN_OK)
        status = merge(c);
    return status == WAN_ATTN_OK ? wan_attn_cuda_watch(c, used_k) : status;
}

wan_attn_status wan_attn_cuda_run_call(const wan_attn_problem *p, wan_attn_error *err) {
    char reason[300];
    int is_pushed = 0;
    call c = {
        p, wan_attn_cuda_open_driver(reason, sizeof(reason)), {0}, p->params->q.device_index, err};
    if (!c.driver)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s", reason);
    const char *why = wan_attn_cuda_refuse_out(p); /* out was not known when the plan was made */
    if (why)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s: %s", p->kernel_name, why);
    memcpy(&c.plan, &p->plan, sizeof(c.plan));
    wan_attn_status status = wan_attn_cuda_enter(c.driver, c.device_index, &is_pushed, err);
    if (status != WAN_ATTN_OK)
        return status;
    status = run_passes(&c);
    wan_attn_cuda_leave(c.driver, is_pushed);
    return status;
}
