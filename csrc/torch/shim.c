/* SPDX-License-Identifier: Apache-2.0
 * shim.c - torch.ops.wan_attn.sdpa for CPU and CUDA tensors, rms_norm_rope for CPU tensors, and
 * rms_norm_rope_kernel, the same for CUDA tensors (wan_attn/native/rope_on_cuda.py calls it):
 * describes tensors to the C ABI, allocates, turns a status into an exception. The only native file
 * that knows torch, and only through its stable C ABI: one binary serves every torch from 2.9 on.
 * Knows no kernel.
 *
 * Nothing of torch or libwan_attn is linked: Python finds every function by its name
 * (wan_attn/native/shim.py) and hands over the addresses.
 *
 * An error is thrown by torch itself: a C++ exception that passes through the frames of this file.
 * They own nothing at that time, and the compiler writes unwind tables for them (setup.py).
 */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "torch/torch_abi.h"
#include "wan_attn.h"

#if defined(_MSC_VER)
#define PER_THREAD __declspec(thread)
#else
#define PER_THREAD _Thread_local
#endif

static wan_attn_shim_functions torch;

/* The row of this thread's last call: an op cannot return it beside its tensors. */
static PER_THREAD int32_t last_kernel = -1;

/* Python's variable: the features that the user allows (WAN_ATTN_CPU_ISA). Read at every call, so
 * that a change holds from the next call on. */
static const volatile uint32_t *cpu_features;

/* What torch calls these; constant while it runs. code_of is indexed by wan_attn_dtype. */
static int32_t cpu_code, cuda_code, u8_code, code_of[WAN_ATTN_DTYPE_OTHER];

/* In the order of the op's schema. */
enum { QUERY, KEY, VALUE, Q_LENS, K_LENS, BLOCK_COUNTS, BLOCK_INDICES, OPERANDS };
enum {
    SCALE = OPERANDS,
    IS_CAUSAL,
    WINDOW_LEFT,
    WINDOW_RIGHT,
    RETURN_LSE,
    KERNEL,
    OUT_LIKE_VALUE,
    PRECISION,
    POOLS_OTHERS,
    SKIP_THRESHOLD,
    INPUTS
};
static const char *const NAMES[] = {"query",  "key",          "value",        "q_lens",
                                    "k_lens", "block_counts", "block_indices"};

/* The same of rms_norm_rope. */
enum { X, WEIGHT, TABLE, GRID_SIZES, ROPE_OPERANDS };
enum {
    EPS = ROPE_OPERANDS,
    PER_HEAD,
    ROUND_NORM,
    SEQLEN_OFFSET,
    OUT_DTYPE,
    ROPE_KERNEL,
    ROPE_INPUTS
};
static const char *const ROPE_NAMES[] = {"x", "weight", "table", "grid_sizes"};

/* One call. It owns its tensors: each is deleted on every way out, but for those returned. */
typedef struct call {
    const char *const *names;       /* of its operands */
    torch_tensor operand[OPERANDS]; /* NULL: an optional one that was not given */
    torch_tensor out, lse, workspace;
    bool return_lse, out_like_value;
    int64_t kernel, precision;
    wan_attn_params params;
    char message[sizeof(wan_attn_error) + 16]; /* why the call failed */
} call;

/* Says why the call failed. Returns false, for its callers to return. */
static bool fail(call *c, const char *first, const char *second) {
    snprintf(c->message, sizeof(c->message), "wan_attn: %s%s", first, second);
    return false;
}

/* The value within an optional, which is deleted. False: there is none. */
static bool take_optional(torch_value from, torch_value *value) {
    torch_value *at = (torch_value *)(uintptr_t)from;
    if (!at)
        return false;
    *value = *at;
    torch.torch_delete_stable_ivalue(at);
    return true;
}

/* Takes over what the stack holds. */
static void take_arguments(const torch_value *stack, call *c) {
    wan_attn_params *p = &c->params;
    memset(p, 0, sizeof(*p));
    p->struct_size = sizeof(*p);
    c->names = NAMES;
    for (int i = QUERY; i < OPERANDS; i++) {
        torch_value handle = stack[i];
        if (i >= Q_LENS && !take_optional(stack[i], &handle))
            handle = 0;
        c->operand[i] = (torch_tensor)(uintptr_t)handle;
    }
    c->out = c->lse = c->workspace = NULL;
    torch_value scale = 0;
    p->has_softmax_scale = take_optional(stack[SCALE], &scale);
    memcpy(&p->softmax_scale, &scale, sizeof(p->softmax_scale));
    p->is_causal = (stack[IS_CAUSAL] & 0xff) != 0;
    p->window_size_left = (int64_t)stack[WINDOW_LEFT];
    p->window_size_right = (int64_t)stack[WINDOW_RIGHT];
    c->return_lse = (stack[RETURN_LSE] & 0xff) != 0;
    c->kernel = (int64_t)stack[KERNEL];
    c->out_like_value = (stack[OUT_LIKE_VALUE] & 0xff) != 0;
    c->precision = (int64_t)stack[PRECISION];
    p->pools_others = (stack[POOLS_OTHERS] & 0xff) != 0;
    memcpy(&p->skip_threshold, &stack[SKIP_THRESHOLD], sizeof(p->skip_threshold));
}

static void delete_tensor(torch_tensor tensor) {
    if (tensor)
        torch.aoti_torch_delete_tensor_object(tensor);
}

static int32_t dtype_of(int32_t code) {
    int32_t dtype = 0;
    while (dtype < WAN_ATTN_DTYPE_OTHER && code_of[dtype] != code)
        dtype++;
    return dtype;
}

/* Describes an operand to the C ABI: no copy. */
static bool describe(call *c, int i, wan_attn_tensor *to) {
    torch_tensor tensor = c->operand[i];
    bool is_defined = false;
    int32_t dtype = 0, device_type = 0, device_index = 0;
    int64_t ndim = 0, *sizes = NULL, *strides = NULL;
    if (torch.aoti_torch_is_defined(tensor, &is_defined) == 0 && !is_defined)
        return fail(c, c->names[i],
                    " must be a tensor, got None"); /* the dispatcher lets it pass */
    if (torch.aoti_torch_get_data_ptr(tensor, &to->data) ||
        torch.aoti_torch_get_dtype(tensor, &dtype) ||
        torch.aoti_torch_get_device_type(tensor, &device_type) ||
        torch.aoti_torch_get_device_index(tensor, &device_index) ||
        torch.aoti_torch_get_dim(tensor, &ndim) || torch.aoti_torch_get_sizes(tensor, &sizes) ||
        torch.aoti_torch_get_strides(tensor, &strides))
        return fail(c, c->names[i], " must be a dense tensor, got one that torch cannot describe");
    to->dtype = dtype_of(dtype);
    to->device_type = device_type == cpu_code    ? WAN_ATTN_CPU
                      : device_type == cuda_code ? WAN_ATTN_CUDA
                                                 : WAN_ATTN_DEVICE_OTHER;
    to->device_index = device_index < 0 ? 0 : device_index; /* the CPU's is -1 */
    to->ndim = (int32_t)ndim;
    for (int32_t d = 0; d < to->ndim && d < WAN_ATTN_MAX_NDIM; d++) {
        to->shape[d] = sizes[d];
        to->stride[d] = strides[d];
    }
    return true;
}

/* Makes a contiguous tensor on query's device; `to` holds its device, dtype, ndim and shape. Where
 * torch's function fails it does not say why: Python asks once more and keeps torch's exception. */
static bool allocate(call *c, int32_t code, int64_t itemsize, wan_attn_tensor *to,
                     torch_tensor *tensor) {
    int64_t bytes = itemsize, stride = 1;
    for (int32_t d = to->ndim - 1; d >= 0; d--) {
        to->stride[d] = stride;
        stride *= to->shape[d] > 1 ? to->shape[d] : 1;
        bytes *= to->shape[d];
    }
    bool is_cpu = to->device_type == WAN_ATTN_CPU;
    for (int attempt = 0; attempt < 2; attempt++) {
        if (torch.aoti_torch_empty_strided(to->ndim, to->shape, to->stride, code,
                                           is_cpu ? cpu_code : cuda_code, to->device_index,
                                           tensor) == 0)
            return torch.aoti_torch_get_data_ptr(*tensor, &to->data) == 0 ||
                   fail(c, "torch does not say where a new tensor is", "");
        if (torch.why_no_memory(bytes, is_cpu ? -1 : to->device_index, c->message,
                                sizeof(c->message)) == 0)
            return false;
    }
    return fail(c, "torch cannot allocate the result and does not say why", "");
}

/* A number of 64 bits would wrap, perhaps into one that means something. */
static bool narrow(call *c, int64_t wide, const char *rule, int32_t *to) {
    char number[32];
    *to = (int32_t)wide;
    if (wide >= INT32_MIN && wide <= INT32_MAX)
        return true;
    snprintf(number, sizeof(number), "%lld", (long long)wide);
    return fail(c, rule, number);
}

static bool take_kernel(call *c, int32_t *kernel) {
    return narrow(c, c->kernel, "kernel must be -1 (the best) or a row, got ", kernel);
}

/* What runs the call: threads of the CPU, or the current stream of the GPU that `first` is on. */
static bool find_place(call *c, const wan_attn_tensor *first, int32_t *num_threads,
                       wan_attn_parallel_fn *parallel, void **stream) {
    if (first->device_type == WAN_ATTN_CPU) {
        uint32_t threads = 1;
        torch.torch_get_num_threads(&threads);
        *num_threads = (int32_t)threads;
        *parallel = torch.torch_parallel_for;
    } else if (!torch.aoti_torch_get_current_cuda_stream ||
               torch.aoti_torch_get_current_cuda_stream(first->device_index, stream)) {
        return fail(c, "torch does not tell the current CUDA stream of the device of ",
                    c->names[0]);
    }
    return true;
}

/* The call in words of the C ABI, but for what it writes to. */
static bool describe_call(call *c) {
    wan_attn_params *p = &c->params;
    wan_attn_tensor *const slots[] = {
        &p->q, &p->k, &p->v, &p->seqused_q, &p->seqused_k, &p->block_counts, &p->block_indices};
    if (!take_kernel(c, &p->kernel) ||
        !narrow(c, c->precision, "precision must be 0 (exact) or 1 (8-bit scores), got ",
                &p->precision))
        return false;
    for (int i = QUERY; i < OPERANDS; i++)
        if (c->operand[i] && !describe(c, i, slots[i]))
            return false;
    p->cpu_features = *cpu_features;
    return find_place(c, &p->q, &p->num_threads, &p->parallel, &p->stream);
}

/* Allocates out, lse and the workspace. An lse that is not wanted has batch 0: a schema cannot
 * return an optional tensor that can be traced. */
static bool allocate_all(call *c, size_t workspace_size) {
    wan_attn_params *p = &c->params;
    wan_attn_tensor workspace = {.device_type = p->q.device_type,
                                 .device_index = p->q.device_index,
                                 .ndim = 1,
                                 .shape = {(int64_t)workspace_size}};
    p->out = p->q;
    p->out.dtype = c->out_like_value ? p->v.dtype : p->q.dtype;
    int64_t out_size = p->out.dtype == WAN_ATTN_F32 ? 4 : 2;
    p->lse = p->q;
    p->lse.dtype = WAN_ATTN_F32;
    p->lse.ndim = 3;
    p->lse.shape[0] = c->return_lse ? p->q.shape[0] : 0;
    p->lse.shape[1] = p->q.shape[2];
    p->lse.shape[2] = p->q.shape[1];
    if (!allocate(c, code_of[p->out.dtype], out_size, &p->out, &c->out) ||
        !allocate(c, code_of[WAN_ATTN_F32], 4, &p->lse, &c->lse) ||
        (workspace_size && !allocate(c, u8_code, 1, &workspace, &c->workspace)))
        return false;
    if (!c->return_lse)
        memset(&p->lse, 0, sizeof(p->lse));
    p->workspace = workspace.data;
    p->workspace_size = workspace_size;
    return true;
}

static bool compute(call *c) {
    wan_attn_error error;
    wan_attn_call prepared;
    prepared.struct_size = sizeof(prepared);
    if (!describe_call(c))
        return false;
    if (torch.wan_attn_prepare(&c->params, &prepared, &error) != WAN_ATTN_OK)
        return fail(c, error.message, ""); /* the whole contract is checked here */
    if (!allocate_all(c, prepared.workspace_size))
        return false;
    if (torch.wan_attn_run(&c->params, &prepared, &error) != WAN_ATTN_OK)
        return fail(c, error.message, "");
    last_kernel = prepared.kernel;
    return true;
}

/* The op, as torch's dispatcher calls it. */
static void sdpa(torch_value *stack, uint64_t num_inputs, uint64_t num_outputs) {
    if (num_inputs != INPUTS || num_outputs != 2) {
        torch.aoti_torch_check(false, __func__, __FILE__, __LINE__,
                               "wan_attn: the op's schema is not the one its shim was made for");
        return;
    }
    call c;
    take_arguments(stack, &c);
    bool is_done = compute(&c);
    for (int i = QUERY; i < OPERANDS; i++)
        delete_tensor(c.operand[i]);
    delete_tensor(c.workspace);
    if (is_done) {
        stack[0] = (torch_value)(uintptr_t)c.out;
        stack[1] = (torch_value)(uintptr_t)c.lse;
        return;
    }
    delete_tensor(c.out);
    delete_tensor(c.lse);
    torch.aoti_torch_check(false, __func__, __FILE__, __LINE__, c.message); /* does not return */
}

/* Takes over what the stack of rms_norm_rope holds. *out_dtype: wan_attn_dtype, or -1 for x's. */
static void take_rope_arguments(const torch_value *stack, call *c, wan_attn_rope_params *p,
                                int32_t *out_dtype) {
    torch_value value = 0;
    memset(c, 0, sizeof(*c));
    memset(p, 0, sizeof(*p));
    p->struct_size = sizeof(*p);
    c->names = ROPE_NAMES;
    for (int i = X; i < ROPE_OPERANDS; i++) {
        torch_value handle = stack[i];
        if (i >= WEIGHT && !take_optional(stack[i], &handle))
            handle = 0;
        c->operand[i] = (torch_tensor)(uintptr_t)handle;
    }
    p->has_norm = take_optional(stack[EPS], &value);
    memcpy(&p->eps, &value, sizeof(p->eps));
    p->is_per_head = (stack[PER_HEAD] & 0xff) != 0;
    p->rounds_norm = (stack[ROUND_NORM] & 0xff) != 0;
    p->seqlen_offset = (int64_t)stack[SEQLEN_OFFSET];
    *out_dtype = take_optional(stack[OUT_DTYPE], &value) ? dtype_of((int32_t)value) : -1;
    c->kernel = (int64_t)stack[ROPE_KERNEL];
}

static bool compute_rope(call *c, wan_attn_rope_params *p, int32_t out_dtype) {
    wan_attn_error error;
    wan_attn_tensor *const slots[] = {&p->x, &p->weight, &p->table, &p->grid_sizes};
    int32_t row = -1;
    if (!take_kernel(c, &p->kernel))
        return false;
    for (int i = X; i < ROPE_OPERANDS; i++)
        if (c->operand[i] && !describe(c, i, slots[i]))
            return false;
    p->cpu_features = *cpu_features;
    if (!find_place(c, &p->x, &p->num_threads, &p->parallel, &p->stream))
        return false;
    if (torch.wan_attn_rope_select(p, &row, &error) != WAN_ATTN_OK)
        return fail(c, error.message, "");
    if (out_dtype > WAN_ATTN_BF16) /* those before it are the floats that are computed with */
        return fail(c, "dtype must be float32, float16 or bfloat16", "");
    p->out = p->x;
    p->out.dtype = out_dtype < 0 ? p->x.dtype : out_dtype;
    if (!allocate(c, code_of[p->out.dtype], p->out.dtype == WAN_ATTN_F32 ? 4 : 2, &p->out, &c->out))
        return false;
    return torch.wan_attn_rms_norm_rope(p, NULL, &error) == WAN_ATTN_OK ||
           fail(c, error.message, "");
}

/* The op, as torch's dispatcher calls it. */
static void rms_norm_rope(torch_value *stack, uint64_t num_inputs, uint64_t num_outputs) {
    if (num_inputs != ROPE_INPUTS || num_outputs != 1) {
        torch.aoti_torch_check(false, __func__, __FILE__, __LINE__,
                               "wan_attn: the op's schema is not the one its shim was made for");
        return;
    }
    call c;
    wan_attn_rope_params params;
    int32_t out_dtype;
    take_rope_arguments(stack, &c, &params, &out_dtype);
    bool is_done = compute_rope(&c, &params, out_dtype);
    for (int i = X; i < ROPE_OPERANDS; i++)
        delete_tensor(c.operand[i]);
    if (is_done) {
        stack[0] = (torch_value)(uintptr_t)c.out;
        return;
    }
    delete_tensor(c.out);
    torch.aoti_torch_check(false, __func__, __FILE__, __LINE__, c.message); /* does not return */
}

/* The functions that wan_attn_shim_configure wants, one name a line; ? before an optional one. */
WAN_ATTN_API const char *wan_attn_shim_wants(void) {
#define REQUIRED_NAME(result, name, parameters) #name "\n"
#define OPTIONAL_NAME(result, name, parameters) "?" #name "\n"
    return WAN_ATTN_SHIM_REQUIRED(REQUIRED_NAME) WAN_ATTN_SHIM_OPTIONAL(OPTIONAL_NAME);
}

/* Sets these functions, in that order, and where the allowed CPU features stand. To be called
 * before the op is registered, and again in a child of fork. */
WAN_ATTN_API void wan_attn_shim_configure(const wan_attn_shim_functions *functions,
                                          const uint32_t *allowed_cpu_features) {
    torch = *functions;
    cpu_features = allowed_cpu_features;
    cpu_code = torch.aoti_torch_device_type_cpu();
    cuda_code = torch.aoti_torch_device_type_cuda();
    u8_code = torch.aoti_torch_dtype_uint8();
    code_of[WAN_ATTN_F32] = torch.aoti_torch_dtype_float32();
    code_of[WAN_ATTN_F16] = torch.aoti_torch_dtype_float16();
    code_of[WAN_ATTN_BF16] = torch.aoti_torch_dtype_bfloat16();
    code_of[WAN_ATTN_I32] = torch.aoti_torch_dtype_int32();
    code_of[WAN_ATTN_I64] = torch.aoti_torch_dtype_int64();
    code_of[WAN_ATTN_F64] = torch.aoti_torch_dtype_float64();
}

/* The row that the last call of this thread ran; -1: there was none. */
WAN_ATTN_API int32_t wan_attn_shim_last_kernel(void) { return last_kernel; }

/* Registers the ops as long as the process lives: sdpa for CPU and CUDA, rms_norm_rope for the CPU,
 * rms_norm_rope_kernel for CUDA. 0, or torch has refused. */
WAN_ATTN_API int32_t wan_attn_shim_register(void) {
    static const char *const KEYS[] = {"CPU", "CUDA"};
    static const char *const ROPE_OPS[] = {"rms_norm_rope", "rms_norm_rope_kernel"};
    for (int i = 0; i < 2; i++) {
        torch_library library = NULL; /* never deleted: that would take the op away */
        if (torch.aoti_torch_library_init_impl("wan_attn", KEYS[i], __FILE__, __LINE__, &library) ||
            torch.aoti_torch_library_impl(library, "sdpa", sdpa) ||
            torch.aoti_torch_library_impl(library, ROPE_OPS[i], rms_norm_rope))
            return 1;
    }
    return 0;
}
