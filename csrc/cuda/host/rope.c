/* SPDX-License-Identifier: Apache-2.0
 * rope.c - rms_norm_rope on a GPU: which calls each of its two rows takes, and the launch. Waits
 * for nothing, allocates nothing, reads nothing from the device; sizes of a grid that lies on the
 * CPU travel inside the launch.
 */
#include "core/rope.h"

#include <string.h>

#include "core/util.h"
#include "cuda/args_rope.h"
#include "cuda/host/plan.h"
#include "cuda/host/proof.h"

/* As rope.cuh has them. */
enum { WARP = 32, VECTORS = 4, WIDTH = 8, MOST_THREADS = 512 };

/* What the indices of both kernels can count. */
static const char *refuse_sizes(const wan_attn_rope_problem *p) {
    const int64_t most = INT32_MAX;
    if (p->seqlen > most / (p->batch > 1 ? p->batch : 1))
        return "takes batch * seqlen below 2^31";
    if (p->num_heads > most / p->head_dim)
        return "takes heads * head_dim below 2^31";
    if (p->seqlen_offset > most - p->seqlen)
        return "takes seqlen_offset + seqlen below 2^31";
    return NULL;
}

static int64_t num_groups_of(const wan_attn_rope_problem *p) {
    return wan_attn_divide_up(p->num_heads, VECTORS);
}

static int is_aligned(const wan_attn_rope_problem *p, const wan_attn_view *view) {
    return wan_attn_cuda_is_aligned(view, p->batch, p->seqlen, p->num_heads, 16);
}

/* What rope.cuh asks of a call. */
static const char *refuse_vectors(const wan_attn_rope_problem *p) {
    int64_t slots = p->head_dim / WIDTH;
    if (p->head_dim % WIDTH)
        return "takes a head_dim that is a multiple of 8";
    if (num_groups_of(p) > MOST_THREADS / slots)
        return "takes at most 16,384 elements a token";
    if (p->has_norm && p->is_per_head && (slots & (slots - 1)))
        return "takes a head_dim that is a power of two for a norm of each head";
    if (p->table.data && p->table.head_stride != 0)
        return "takes a table that is the same for all heads";
    if (!is_aligned(p, &p->x) || !is_aligned(p, &p->out) || (intptr_t)p->weight.data % 16)
        return "needs x, out, weight and their strides to be multiples of 16 bytes";
    return NULL;
}

static const char *refuse(const wan_attn_rope_problem *p) {
    const char *why = refuse_sizes(p);
    return why ? why
               : wan_attn_cuda_refuse_unproven(p->params->x.device_index,
                                               WAN_ATTN_CUDA_FIRST_ROPE_ROW + p->kernel,
                                               p->kernel_name, p->x.dtype);
}

const char *wan_attn_rms_norm_rope_sm75_refuse(const wan_attn_rope_problem *p) {
    const char *why = refuse_vectors(p);
    return why ? why : refuse(p);
}

const char *wan_attn_rms_norm_rope_any_sm75_refuse(const wan_attn_rope_problem *p) {
    return refuse(p);
}

static void set_pair(float pair[2], double x) {
    pair[0] = (float)x;
    pair[1] = (float)(x - pair[0]);
}

/* Sample `first` of an operand, and those behind it. */
static wan_attn_cuda_view view_of(const wan_attn_view *v, int64_t first) {
    wan_attn_cuda_view view = {v->data, v->batch_stride, v->row_stride, v->head_stride};
    if (v->data)
        view.data = (char *)v->data + first * v->batch_stride * wan_attn_dtype_size(v->dtype);
    return view;
}

static void fill_numbers(const wan_attn_rope_problem *p, wan_attn_cuda_rope_args *args) {
    int64_t size = p->head_dim * (p->is_per_head ? 1 : p->num_heads);
    set_pair(args->inverse_size, 1.0 / (double)size);
    set_pair(args->eps, p->has_norm ? p->eps : 0.0);
    args->seqlen = (int)p->seqlen;
    args->num_heads = (int)p->num_heads;
    args->head_dim = (int)p->head_dim;
    args->seqlen_offset = (int)p->seqlen_offset;
    args->positions = (int)p->positions;
    args->weight_head_stride = (int)p->weight.head_stride;
    args->x_dtype = (int)p->x.dtype;
    args->out_dtype = (int)p->out.dtype;
    args->weight_dtype = (int)p->weight.dtype;
    args->table_is_f64 = p->table.dtype == WAN_ATTN_F64;
    args->has_grid = p->grid_sizes != NULL;
    args->grid_is_i64 = p->grid_dtype == WAN_ATTN_I64;
    args->has_norm = p->has_norm;
    args->is_per_head = p->is_per_head;
    args->rounds_n = p->n_dtype != WAN_ATTN_F32;
    args->rounds_y = p->y_dtype != WAN_ATTN_F32;
}

/* Samples [first, first + count). */
static void fill_operands(const wan_attn_rope_problem *p, int64_t first, int64_t count,
                          wan_attn_cuda_rope_args *args) {
    args->x = view_of(&p->x, first);
    args->out = view_of(&p->out, first);
    args->weight = p->weight.data;
    args->table = view_of(&p->table, first);
    args->grid_batch_stride = p->grid_batch_stride;
    args->grid_axis_stride = p->grid_axis_stride;
    if (p->grid_sizes && p->grid_device == WAN_ATTN_CUDA)
        args->grid_sizes = p->grid_sizes;
    for (int64_t b = 0; p->grid_sizes && !args->grid_sizes && b < count; b++)
        for (int axis = 0; axis < 3; axis++)
            args->grids[b][axis] = (int)wan_attn_grid_size_at(p, first + b, axis);
}

static wan_attn_cuda_program program_of(const wan_attn_rope_problem *p, int is_vector) {
    static const wan_attn_cuda_rope_kernel VECTOR_KERNELS[] = {
        [WAN_ATTN_F32] = ROPE_KERNEL_rms_norm_rope_f32_sm75,
        [WAN_ATTN_F16] = ROPE_KERNEL_rms_norm_rope_f16_sm75,
        [WAN_ATTN_BF16] = ROPE_KERNEL_rms_norm_rope_bf16_sm75};
    return wan_attn_cuda_rope_program(is_vector ? VECTOR_KERNELS[p->x.dtype]
                                                : ROPE_KERNEL_rms_norm_rope_any_sm75);
}

static wan_attn_status launch(const wan_attn_rope_problem *p, const wan_attn_cuda_driver *driver,
                              int is_vector, wan_attn_error *err) {
    wan_attn_cuda_program program = program_of(p, is_vector);
    wan_attn_cu_kernel kernel;
    wan_attn_cuda_rope_args args;
    wan_attn_status status =
        wan_attn_cuda_kernel(driver, p->params->x.device_index, &program, &kernel, err);
    if (status != WAN_ATTN_OK)
        return status;
    memset(&args, 0, sizeof(args));
    fill_numbers(p, &args);
    if (is_vector) {
        args.slots = (int)(p->head_dim / WIDTH);
        args.num_groups = (int)num_groups_of(p);
        args.slot_factor = (int)wan_attn_divide_up(65536, args.slots);
        program.num_threads = (unsigned)(args.slots * args.num_groups + WARP - 1) / WARP * WARP;
    }
    args.num_threads = (int)program.num_threads;
    /* The sizes of so many samples fit one launch; those on the device are read there. */
    int is_host_grid = p->grid_sizes && p->grid_device == WAN_ATTN_CPU;
    int64_t at_once = is_host_grid ? WAN_ATTN_CUDA_MOST_GRIDS : p->batch;
    for (int64_t first = 0; first < p->batch; first += at_once) {
        int64_t count = p->batch - first < at_once ? p->batch - first : at_once;
        void *params[] = {&args};
        fill_operands(p, first, count, &args);
        wan_attn_cu_result error =
            driver->launch(kernel, (unsigned)(p->seqlen * count), 1, 1, program.num_threads, 1, 1,
                           program.smem_bytes, p->params->stream, params, NULL);
        if (error != 0)
            return wan_attn_cuda_kernel_failed(driver, error, "when launching", program.name, err);
    }
    return WAN_ATTN_OK;
}

static wan_attn_status run(const wan_attn_rope_problem *p, int is_vector, wan_attn_error *err) {
    char reason[300];
    int is_pushed = 0;
    const wan_attn_cuda_driver *driver = wan_attn_cuda_open_driver(reason, sizeof(reason));
    if (!driver)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s", reason);
    wan_attn_status status =
        wan_attn_cuda_enter(driver, p->params->x.device_index, &is_pushed, err);
    if (status != WAN_ATTN_OK)
        return status;
    status = launch(p, driver, is_vector, err);
    wan_attn_cuda_leave(driver, is_pushed);
    return status == WAN_ATTN_OK ? wan_attn_ok(err) : status;
}

wan_attn_status wan_attn_rms_norm_rope_sm75(const wan_attn_rope_problem *p, wan_attn_error *err) {
    return run(p, 1, err);
}

wan_attn_status wan_attn_rms_norm_rope_any_sm75(const wan_attn_rope_problem *p,
                                                wan_attn_error *err) {
    return run(p, 0, err);
}
