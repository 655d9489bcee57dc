/* SPDX-License-Identifier: Apache-2.0
 * rope_check.c - the contract of a call of rms_norm_rope, tested once for every binding and row.
 * Messages use the names that Python users write. Knows no kernel.
 */
#include <math.h>
#include <string.h>

#include "core/operand.h"
#include "core/overlap.h"
#include "core/rope.h"
#include "core/util.h"

#define INVALID(err, ...) wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, __VA_ARGS__)

/* Of an axis: three axes multiplied are still a number. */
#define MAX_POSITIONS (1ll << 20)

static wan_attn_status check_x_and_out(const wan_attn_rope_params *a, wan_attn_error *err) {
    const wan_attn_tensor *x = &a->x, *out = &a->out;
    wan_attn_status status = wan_attn_check_rank_and_dtype("x", x, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_cpu_index("x", x, err);
    if (status != WAN_ATTN_OK)
        return status;
    if (x->shape[2] < 1 || x->shape[3] < 1 || x->shape[3] > WAN_ATTN_ROPE_MAX_HEAD_DIM)
        return INVALID(err, "x must have at least 1 head and a head_dim of 1 to %d, got %s",
                       WAN_ATTN_ROPE_MAX_HEAD_DIM, wan_attn_shape_of(x->shape, 4).text);
    if (wan_attn_is_absent(out))
        return WAN_ATTN_OK;
    status = wan_attn_check_rank_and_dtype("out", out, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_device("out", out, x, "x", err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_shape("out", out, x->shape, "shaped like x", err);
    return status == WAN_ATTN_OK ? wan_attn_check_overlap("out", out, err) : status;
}

static wan_attn_status check_norm(const wan_attn_rope_params *a, wan_attn_error *err) {
    const wan_attn_tensor *weight = &a->weight;
    if (a->has_norm && !(isfinite(a->eps) && a->eps >= 0.0))
        return INVALID(err, "eps must be finite and at least 0, got %g", a->eps);
    if (wan_attn_is_absent(weight))
        return WAN_ATTN_OK;
    if (!a->has_norm)
        return INVALID(err, "weight must be None where eps is None, which means no norm, got %s",
                       wan_attn_shape_of(weight->shape, weight->ndim).text);
    int64_t size = a->x.shape[3] * (a->is_per_head ? 1 : a->x.shape[2]);
    if (weight->ndim != 1 || weight->shape[0] != size)
        return INVALID(err, "weight must be [%s] = [%lld], got %s",
                       a->is_per_head ? "head_dim" : "heads * head_dim", (long long)size,
                       wan_attn_shape_of(weight->shape, weight->ndim).text);
    if (!wan_attn_is_float(weight->dtype))
        return INVALID(err, "weight must be float32, float16 or bfloat16, got %s",
                       wan_attn_dtype_name(weight->dtype));
    if (size > 1 && weight->stride[0] != 1)
        return INVALID(err, "weight must have stride 1, got %lld", (long long)weight->stride[0]);
    return wan_attn_check_device("weight", weight, &a->x, "x", err);
}

static wan_attn_status check_table(const wan_attn_rope_params *a, wan_attn_error *err) {
    const wan_attn_tensor *x = &a->x, *table = &a->table;
    int has_grid = !wan_attn_is_absent(&a->grid_sizes);
    if (wan_attn_is_absent(table))
        return has_grid ? INVALID(err, "table must be a tensor where grid_sizes is one, got None")
                        : WAN_ATTN_OK;
    if (x->shape[3] % 2)
        return INVALID(err, "x must have an even head_dim to be rotated, got %lld",
                       (long long)x->shape[3]);
    if (table->dtype != WAN_ATTN_F32 && table->dtype != WAN_ATTN_F64)
        return INVALID(err, "table must be float32 or float64, got %s",
                       wan_attn_dtype_name(table->dtype));
    if (has_grid && table->ndim == 2 && table->shape[0] > MAX_POSITIONS)
        return INVALID(err, "table must have at most 2^20 positions, got %lld",
                       (long long)table->shape[0]);
    if (has_grid && (table->ndim != 2 || table->shape[1] != x->shape[3] || table->shape[0] < 0))
        return INVALID(err, "table must be [positions, head_dim] = [.., %lld], got %s",
                       (long long)x->shape[3], wan_attn_shape_of(table->shape, table->ndim).text);
    if (!has_grid && table->ndim != 4)
        return INVALID(err,
                       "table must be [batch, seqlen, heads, head_dim] without grid_sizes, got %s",
                       wan_attn_shape_of(table->shape, table->ndim).text);
    wan_attn_status status =
        has_grid ? WAN_ATTN_OK
                 : wan_attn_check_shape("table", table, x->shape, "shaped like x", err);
    if (status != WAN_ATTN_OK)
        return status;
    int64_t last_stride = table->stride[table->ndim - 1]; /* of 2 or 4 */
    if (last_stride != 1)
        return INVALID(err, "table must have stride 1 in its last dimension, got %lld",
                       (long long)last_stride);
    status = wan_attn_check_device("table", table, x, "x", err);
    return status == WAN_ATTN_OK ? wan_attn_check_reach("table", table, err) : status;
}

static wan_attn_status check_grid(const wan_attn_rope_params *a, wan_attn_error *err) {
    const wan_attn_tensor *grid = &a->grid_sizes, *x = &a->x;
    if (a->seqlen_offset < 0 || a->seqlen_offset > INT64_MAX / 2)
        return INVALID(err, "seqlen_offset must be at least 0 and below 2^62, got %lld",
                       (long long)a->seqlen_offset);
    if (wan_attn_is_absent(grid))
        return a->seqlen_offset
                   ? INVALID(err, "seqlen_offset must be 0 without grid_sizes, got %lld",
                             (long long)a->seqlen_offset)
                   : WAN_ATTN_OK;
    if (grid->ndim != 2 || grid->shape[0] != x->shape[0] || grid->shape[1] != 3)
        return INVALID(err, "grid_sizes must be [batch, 3] = [%lld, 3], got %s",
                       (long long)x->shape[0], wan_attn_shape_of(grid->shape, grid->ndim).text);
    if (grid->dtype != WAN_ATTN_I32 && grid->dtype != WAN_ATTN_I64)
        return INVALID(err, "grid_sizes must be int32 or int64, got %s",
                       wan_attn_dtype_name(grid->dtype));
    if (grid->device_type != WAN_ATTN_CPU &&
        (grid->device_type != x->device_type || grid->device_index != x->device_index))
        return INVALID(err, "grid_sizes must be on the CPU or on x's device %s, got %s",
                       wan_attn_device_of(x).text, wan_attn_device_of(grid).text);
    wan_attn_status status = wan_attn_check_cpu_index("grid_sizes", grid, err);
    return status == WAN_ATTN_OK ? wan_attn_check_reach("grid_sizes", grid, err) : status;
}

/* What torch's operators make of x's dtype and the weight's. */
static wan_attn_dtype wider_of(wan_attn_dtype a, wan_attn_dtype b) {
    return a == b ? a : WAN_ATTN_F32;
}

static void fill(const wan_attn_rope_params *a, wan_attn_rope_problem *p) {
    p->params = a;
    p->device_type = (wan_attn_device)a->x.device_type;
    p->batch = a->x.shape[0];
    p->seqlen = a->x.shape[1];
    p->num_heads = a->x.shape[2];
    p->head_dim = a->x.shape[3];
    p->x = wan_attn_view_of(&a->x);
    p->out = wan_attn_view_of(&a->out);
    p->weight.data = a->weight.data;
    p->weight.dtype = (wan_attn_dtype)a->weight.dtype;
    p->weight.head_stride = a->is_per_head ? 0 : p->head_dim;
    p->has_norm = a->has_norm != 0;
    p->is_per_head = a->is_per_head != 0;
    p->eps = a->eps;
    int is_rounded = a->has_norm && a->rounds_norm;
    p->n_dtype = is_rounded ? p->x.dtype : WAN_ATTN_F32;
    p->y_dtype =
        is_rounded && a->weight.ndim ? wider_of(p->x.dtype, p->weight.dtype) : WAN_ATTN_F32;
    p->seqlen_offset = a->seqlen_offset;
    if (a->grid_sizes.ndim) {
        p->table.data = a->table.data;
        p->table.dtype = (wan_attn_dtype)a->table.dtype;
        p->table.row_stride = wan_attn_stride_of(&a->table, 0);
        p->positions = a->table.shape[0];
        p->grid_sizes = a->grid_sizes.data;
        p->grid_dtype = (wan_attn_dtype)a->grid_sizes.dtype;
        p->grid_device = (wan_attn_device)a->grid_sizes.device_type;
        p->grid_batch_stride = wan_attn_stride_of(&a->grid_sizes, 0);
        p->grid_axis_stride = wan_attn_stride_of(&a->grid_sizes, 1);
    } else if (a->table.ndim) {
        p->table = wan_attn_view_of(&a->table);
    }
}

wan_attn_status wan_attn_rope_check(const wan_attn_rope_params *params,
                                    wan_attn_rope_problem *problem, wan_attn_error *err) {
    memset(problem, 0, sizeof(*problem));
    if (!params)
        return INVALID(err, "params must be a pointer, got NULL");
    if (params->struct_size != sizeof(*params))
        return INVALID(
            err, "params.struct_size must be %zu (this library's wan_attn_rope_params), got %u",
            sizeof(*params), (unsigned)params->struct_size);
    wan_attn_status status = check_x_and_out(params, err);
    if (status == WAN_ATTN_OK)
        status = check_norm(params, err);
    if (status == WAN_ATTN_OK)
        status = check_table(params, err);
    if (status == WAN_ATTN_OK)
        status = check_grid(params, err);
    if (status == WAN_ATTN_OK)
        fill(params, problem);
    return status;
}

/* The sizes of a grid that lies on the CPU: positions that the table has. */
static wan_attn_status check_grid_sizes(const wan_attn_rope_problem *p, wan_attn_error *err) {
    if (!p->grid_sizes || p->grid_device != WAN_ATTN_CPU)
        return WAN_ATTN_OK;
    for (int64_t b = 0; b < p->batch; b++)
        for (int axis = 0; axis < 3; axis++) {
            int64_t size = wan_attn_grid_size_at(p, b, axis);
            if (size < 0 || size > p->positions)
                return INVALID(err,
                               "grid_sizes must be between 0 and the table's %lld positions, got "
                               "%lld for sample %lld",
                               (long long)p->positions, (long long)size, (long long)b);
        }
    return WAN_ATTN_OK;
}

/* Whether every element of out lies where the same element of x does. */
static int is_in_place(const wan_attn_rope_problem *p) {
    return p->out.data == p->x.data && p->out.dtype == p->x.dtype &&
           p->out.batch_stride == p->x.batch_stride && p->out.row_stride == p->x.row_stride &&
           p->out.head_stride == p->x.head_stride;
}

wan_attn_status wan_attn_rope_check_memory(const wan_attn_rope_problem *p, wan_attn_error *err) {
    enum { ALL = 5, X = 3, OUT = 4 };
    const wan_attn_rope_params *a = p->params;
    const wan_attn_tensor *const tensors[ALL] = {&a->weight, &a->table, &a->grid_sizes, &a->x,
                                                 &a->out};
    static const char *const NAMES[ALL] = {"weight", "table", "grid_sizes", "x", "out"};
    wan_attn_extent extents[ALL];
    for (int n = 0; n < ALL; n++) {
        int is_given = n >= X || !wan_attn_is_absent(tensors[n]);
        wan_attn_status status =
            is_given ? wan_attn_check_memory(NAMES[n], tensors[n], err) : WAN_ATTN_OK;
        if (status != WAN_ATTN_OK)
            return status;
        (void)wan_attn_find_extent(tensors[n], &extents[n]); /* it has been looked at */
    }
    if (a->out.ndim == 0)
        return INVALID(err, "out must be shaped like x, got none");
    for (int n = 0; n < OUT; n++)
        if (tensors[n]->device_type == a->out.device_type && !(n == X && is_in_place(p)) &&
            wan_attn_share_memory(&extents[OUT], &extents[n]))
            return INVALID(err, "out must %sshare no memory with %s, got addresses %p and %p",
                           n == X ? "be x itself or " : "", NAMES[n], a->out.data,
                           tensors[n]->data);
    return check_grid_sizes(p, err);
}
