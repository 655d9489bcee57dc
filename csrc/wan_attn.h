/* SPDX-License-Identifier: Apache-2.0
 * wan_attn.h - the C ABI of libwan_attn: scaled-dot-product attention; behind it, its gradient, and
 * RMS norm and rotary embedding of what goes into it. Knows neither torch nor CUDA's headers.
 *
 *   out[b,i,h,:] = sum_j softmax_j(softmax_scale * <q[b,i,h,:], k[b,j,h',:]>) * v[b,j,h',:]
 *   lse[b,h,i]   = log sum_j exp(softmax_scale * <q[b,i,h,:], k[b,j,h',:]>)
 *   h'           = h / (num_heads_q / num_heads_k)
 *
 * over the keys j that row i may see:
 *   j < seqused_k[b]                       real keys only; i >= seqused_q[b] sees none
 *   j <= i + seqused_k[b] - seqused_q[b]   if is_causal: bottom-right, as in flash-attn >= 2.1
 *   -window_size_left <= j - (i + seqused_k[b] - seqused_q[b]) <= window_size_right
 * A row that sees no key gets out = 0 and lse = -inf. What lies in memory beyond the real lengths
 * is never used. Lists of blocks (block_counts below) make a row see fewer keys.
 *
 * Every call is re-entrant and deterministic; the library allocates nothing and prints nothing.
 * Between calls it keeps what it has found out about the CUDA driver, and the kernels loaded there.
 */
#ifndef WAN_ATTN_H
#define WAN_ATTN_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(WAN_ATTN_BUILD)
#define WAN_ATTN_API __declspec(dllexport)
#else
#define WAN_ATTN_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define WAN_ATTN_API __attribute__((visibility("default")))
#else
#define WAN_ATTN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a struct below changes in a way that struct_size cannot express. */
#define WAN_ATTN_ABI_VERSION 1

typedef enum wan_attn_status {
    WAN_ATTN_OK = 0,
    WAN_ATTN_INVALID_ARGUMENT = 1, /* the call breaks the contract: no kernel could take it */
    WAN_ATTN_UNSUPPORTED = 2,  /* a legal call that no kernel of this build takes on this device */
    WAN_ATTN_DEVICE_ERROR = 3, /* the device or its driver reported a failure */
    WAN_ATTN_INTERNAL = 4      /* a bug in this library */
} wan_attn_status;

typedef enum wan_attn_dtype {
    WAN_ATTN_F32 = 0,
    WAN_ATTN_F16 = 1,
    WAN_ATTN_BF16 = 2,
    WAN_ATTN_I32 = 3,
    WAN_ATTN_I64 = 4,
    WAN_ATTN_F64 = 5,        /* rotation tables; as q, k and v it is refused by its name */
    WAN_ATTN_DTYPE_OTHER = 6 /* anything else a framework may hold; always refused */
} wan_attn_dtype;

typedef enum wan_attn_device {
    WAN_ATTN_CPU = 0,
    WAN_ATTN_CUDA = 1,
    WAN_ATTN_DEVICE_OTHER = 2
} wan_attn_device;

#define WAN_ATTN_MAX_NDIM 4

/* One operand, as its owner describes it. data == NULL with ndim == 0: the operand is absent. Where
 * data is read or written it is a multiple of the element's size. It spans at most
 * 2^60 bytes. The stride of a dimension of size 1 may be any number. */
typedef struct wan_attn_tensor {
    void *data;
    int32_t dtype;        /* wan_attn_dtype */
    int32_t device_type;  /* wan_attn_device */
    int32_t device_index; /* 0 for the CPU */
    int32_t ndim;         /* the real rank, also where it exceeds WAN_ATTN_MAX_NDIM */
    int64_t shape[WAN_ATTN_MAX_NDIM];
    int64_t stride[WAN_ATTN_MAX_NDIM]; /* in elements */
} wan_attn_tensor;

/* Runs fn over [begin, end) cut into ranges of at least `grain`, on the caller's own threads;
 * returns when all ran. The signature is that of torch_parallel_for (PyTorch >= 2.10), whose
 * address may be put here as it is. */
typedef void (*wan_attn_range_fn)(int64_t begin, int64_t end, void *ctx);
typedef int32_t (*wan_attn_parallel_fn)(int64_t begin, int64_t end, int64_t grain,
                                        wan_attn_range_fn fn, void *ctx);

/* How exact the kernel has to be. */
typedef enum wan_attn_precision {
    WAN_ATTN_EXACT = 0, /* as exact as its dtypes allow */
    WAN_ATTN_QK8 = 1    /* scores from q and k in INT8: about 1 % off, never chosen unasked */
} wan_attn_precision;

/* What a caller who asked for less than exact wants to know of its results. A call adds to what
 * stands there and takes nothing back: one guard may watch many calls. */
typedef struct wan_attn_guard {
    float largest_value;        /* largest |v| of a real key; NaN if one is */
    uint32_t clipped_values;    /* numbers of v that did not fit what the row computes in */
    uint32_t nonfinite_values;  /* infinite or NaN numbers of v */
    uint32_t nonfinite_results; /* infinite or NaN numbers of out. Counts stop at UINT32_MAX */
    /* Under a skip_threshold: no row of out lacks a larger share of its weights (of the scores as
     * the kernel computes them). */
    float lost_mass;
} wan_attn_guard;

/* Lists of blocks are of this many queries and keys: block n is those from 64 n on. */
#define WAN_ATTN_BLOCK 64

typedef struct wan_attn_params {
    uint32_t struct_size; /* sizeof(wan_attn_params) of the caller; fields are only ever appended */
    int32_t kernel; /* row of the kernel table to force; -1: the best one that takes the call */

    /* [batch, seqlen, heads, head_dim], any strides whose last is 1, at most 2^48 elements.
     * num_heads_q must be a multiple of num_heads_k. v is f32, f16 or bf16; q and k have v's dtype
     * or f32; out has q's dtype, or v's. */
    wan_attn_tensor q;
    wan_attn_tensor k;
    wan_attn_tensor v;

    /* No two elements in one place, and none where an input or the workspace is; lse neither. Views
     * of one tensor are told apart by their elements; for strides so odd that some thousand steps
     * do not settle it, the call is refused. */
    wan_attn_tensor out;
    wan_attn_tensor lse; /* [batch, num_heads_q, seqlen_q] f32, natural log; absent: not wanted */

    /* Real lengths, [batch] i32 or i64; absent: all. On the CPU they are checked against [0,
     * seqlen]; on a device they are clamped to it, because reading them here would stall the
     * stream. */
    wan_attn_tensor seqused_q, seqused_k;

    double softmax_scale;      /* read only if has_softmax_scale; finite */
    int32_t has_softmax_scale; /* 0: 1/sqrt(head_dim) */
    int32_t is_causal;
    /* Keys left and right of the diagonal; -1: no bound. */
    int64_t window_size_left, window_size_right;

    void *workspace; /* wan_attn_workspace_size() bytes, 64-byte aligned, on q's device */
    size_t workspace_size;
    void *stream; /* CUstream of q's device; unused on the CPU */

    wan_attn_parallel_fn parallel; /* CPU rows; NULL: threads made for this call */
    int32_t num_threads;           /* CPU rows; most threads to use; <= 0: one */
    uint32_t cpu_features;         /* CPU rows; features that may be used; 0: all there are */

    /* On q's device, written as the call runs; it shares no memory with anything. NULL: not
     * wanted. */
    void *guard;
    uint32_t guard_size; /* sizeof(wan_attn_guard) of the caller; only ever appended to */
    int32_t precision;   /* wan_attn_precision of the rows to choose from; a forced row may have
                            any */

    /* Callers whose struct_size ends here have none of what follows.
     *
     * For each block of queries the blocks of keys that it sees: both tensors or neither, i32, any
     * strides, on q's device; absent: all. Masks and lengths cut a block that is listed as they cut
     * any key. block_counts: [batch, num_heads_q, ceil(seqlen_q / 64)], how many of block_indices
     * count. block_indices: the same and [capacity] behind it; these rise, each below
     * ceil(seqlen_k / 64); what lies behind the count is never read. On the CPU all that is checked
     * when the call runs; on a device it cannot be. */
    wan_attn_tensor block_counts, block_indices;
    /* 1: each block that is not listed, and of which a row may see every real key, counts for it as
     * one key: the means of that block's keys and values, with the number of its real keys as a
     * factor of the weight. lse has it too. */
    int32_t pools_others;
    /* 0: off. To 1: rows that are computed together (at most a block of queries) leave out a block
     * of keys that all of them see whole where its largest weight, against each row's maximum so
     * far, is below this; but none with an infinite or NaN score or value. Above 0.05 it shows. */
    double skip_threshold;
} wan_attn_params;

/* The caller's, so that no thread-local or heap memory is needed. message is always terminated. */
typedef struct wan_attn_error {
    int32_t status;
    char message[1020];
} wan_attn_error;

/* A call between wan_attn_prepare and wan_attn_run, in the caller's memory: nothing has to be
 * freed. It may be run more than once. */
typedef struct wan_attn_call {
    uint32_t struct_size;  /* set by the caller: sizeof(wan_attn_call) */
    int32_t kernel;        /* the row that will run */
    size_t workspace_size; /* bytes that it needs */
    uint64_t opaque[192];
} wan_attn_call;

/* One row of the kernel table, for tools, tests and documentation. Strings live as long as the
 * library. */
typedef struct wan_attn_kernel_info {
    uint32_t struct_size;
    int32_t device_type;     /* wan_attn_device */
    const char *name;        /* sdpa_<isa>[_variant][_d<head_dim>] */
    const char *description; /* one line */
    uint32_t dtypes;         /* bit 1 << wan_attn_dtype for each dtype of v it takes */
    int32_t head_dim_min, head_dim_max, head_dim_multiple; /* multiple: always 1 */
    int32_t arch_min, arch_max; /* CUDA: compute capability * 10, inclusive; 0, 0 on the CPU */
    uint32_t cpu_features;      /* CPU: all of these must be there */
    int32_t is_lossy;           /* 1: a WAN_ATTN_QK8 row, chosen only where that is asked */
    int32_t takes_block_lists;  /* 1: and pools_others and a skip_threshold, if it is not lossy */
} wan_attn_kernel_info;

/* THE list of CPU features that rows use: X(NAME, bit, "name", builds on, "words for messages"). */
#define WAN_ATTN_CPU_FEATURE_LIST(X)                                                               \
    X(AVX2, 0, "avx2", 0, "AVX2 with FMA and F16C")                                                \
    X(AVX512, 1, "avx512", WAN_ATTN_CPU_AVX2, "AVX-512 F, BW, VL and DQ")                          \
    X(AVX512_BF16, 2, "avx512_bf16", WAN_ATTN_CPU_AVX512, "AVX-512 BF16")                          \
    X(AMX, 3, "amx", WAN_ATTN_CPU_AVX512_BF16, "AMX BF16")                                         \
    X(NEON, 4, "neon", 0, "NEON")                                                                  \
    X(AVX512_VNNI, 5, "avx512_vnni", WAN_ATTN_CPU_AVX512, "AVX-512 VNNI")

/* Their bits in cpu_features: WAN_ATTN_CPU_AVX2 and so on. */
#define WAN_ATTN_CPU_FEATURE(name, bit, text, builds_on, words) WAN_ATTN_CPU_##name = 1 << (bit),
enum wan_attn_cpu_feature { WAN_ATTN_CPU_FEATURE_LIST(WAN_ATTN_CPU_FEATURE) };
#undef WAN_ATTN_CPU_FEATURE
/* Set in every answer of wan_attn_cpu_features, so that "detected, none" is not 0. */
#define WAN_ATTN_CPU_KNOWN (1u << 31)

/* Finds the machine code (a cubin) of `kernel`, a CUDA row or a pass beside one, for compute
 * capability arch / 10. 0: *image and *size are set, valid until this thread asks again. Else a
 * reason is in message. May take seconds (it may compile); called without any lock. */
typedef int32_t (*wan_attn_image_fn)(const char *kernel, int32_t arch, const void **image,
                                     size_t *size, char *message, size_t message_size);

/* What is known of a CUDA row on one card. */
typedef enum wan_attn_proof {
    WAN_ATTN_PROOF_MISSING = 0, /* nothing yet: the row refuses, and the next call asks again */
    WAN_ATTN_PROOF_PASSED = 1,
    WAN_ATTN_PROOF_FAILED = 2 /* the row refuses for as long as this configuration holds */
} wan_attn_proof;

/* The proof of a row for device `index` and a dtype of v. May take seconds (it may make the proof);
 * called without any lock, and not again once it has said PASSED or FAILED. */
typedef int32_t (*wan_attn_proof_fn)(int32_t index, const char *row, int32_t dtype);

/* What the CUDA rows need from outside. */
typedef struct wan_attn_cuda_config {
    uint32_t struct_size;
    const char *driver; /* the driver library's path; NULL: the system's */
    wan_attn_image_fn find_image;
    wan_attn_proof_fn find_proof; /* NULL: every row counts as proven */
} wan_attn_cuda_config;

/* One CUDA device as the driver describes it. */
typedef struct wan_attn_cuda_device {
    uint32_t struct_size;
    int32_t arch; /* compute capability * 10 */
    int32_t num_sms;
    int32_t is_half_rate;   /* 1: tensor cores sum f32 at half the rate of f16 */
    int32_t driver_version; /* the newest CUDA it supports: 1000 * major + 10 * minor */
    char name[100];
} wan_attn_cuda_device;

WAN_ATTN_API int32_t wan_attn_abi_version(void);
WAN_ATTN_API const char *wan_attn_build_info(void); /* compiler, target, build type; one line */
WAN_ATTN_API const char *wan_attn_status_name(int32_t status);
WAN_ATTN_API uint32_t wan_attn_cpu_features(void);
/* "avx2" for bit 0, and so on; NULL behind the last feature. */
WAN_ATTN_API const char *wan_attn_cpu_feature_name(int32_t bit);
/* This feature and all that it builds on: what a user allows who names it. 0: there is none. */
WAN_ATTN_API uint32_t wan_attn_cpu_feature_level(int32_t bit);

/* The kernel table, best row first. info->struct_size must be set. */
WAN_ATTN_API int32_t wan_attn_kernel_count(void);
WAN_ATTN_API wan_attn_status wan_attn_kernel_at(int32_t row, wan_attn_kernel_info *info);

/* Questions about a call that need not exist: data pointers may be NULL, nothing is read, and out
 * and lse count only where they are given. Any device may be asked about. err may be NULL, here and
 * everywhere. */
WAN_ATTN_API wan_attn_status wan_attn_why_not(const wan_attn_params *params, int32_t row,
                                              wan_attn_error *err);
WAN_ATTN_API wan_attn_status wan_attn_select(const wan_attn_params *params, int32_t *row,
                                             wan_attn_error *err);

/* Before the first CUDA call; later the two functions can still change. Opens nothing, and forgets
 * what find_proof has said. */
WAN_ATTN_API wan_attn_status wan_attn_cuda_configure(const wan_attn_cuda_config *config,
                                                     wan_attn_error *err);
/* Opens the driver, makes no context. UNSUPPORTED: no driver, or no such device.
 * device->struct_size must be set. */
WAN_ATTN_API wan_attn_status wan_attn_cuda_device_at(int32_t index, wan_attn_cuda_device *device,
                                                     wan_attn_error *err);

/* A call in two steps, so that its caller can allocate in between: everything is checked, chosen
 * and planned once. prepare: everything but out, lse, the workspace and what lists of blocks hold.
 * Reads lengths that lie on the CPU, and nothing else that tensors point to. Fills call: the row
 * that will run, and what workspace it needs. */
WAN_ATTN_API wan_attn_status wan_attn_prepare(const wan_attn_params *params, wan_attn_call *call,
                                              wan_attn_error *err);
/* run: at once on the CPU, enqueued on `stream` on a GPU. params must be as prepare saw them,
 * lengths on the CPU included, but for out, lse and the workspace. */
WAN_ATTN_API wan_attn_status wan_attn_run(const wan_attn_params *params, const wan_attn_call *call,
                                          wan_attn_error *err);

/* Both steps in one, for callers that know how much workspace is needed. */
WAN_ATTN_API wan_attn_status wan_attn_forward(const wan_attn_params *params, wan_attn_error *err);
/* How much forward needs. Reads lengths that lie on the CPU; other data pointers may be NULL. */
WAN_ATTN_API wan_attn_status wan_attn_workspace_size(const wan_attn_params *params, size_t *size,
                                                     wan_attn_error *err);

/* The gradient of attention. With P[i,j] = exp(softmax_scale * <q[i], k[j]> - lse[i]) over the keys
 * j that row i sees, and 0 elsewhere,
 *
 *   dS[i,j] = P[i,j] * (<dout[i], v[j]> - <dout[i], out[i]> + dlse[i])
 *   dq[i] = softmax_scale * sum_j dS[i,j] k[j]
 *   dk[j] = softmax_scale * sum_i dS[i,j] q[i]         over all query heads that share the key
 *   dv[j] = sum_i P[i,j] dout[i]
 *
 * Rows without keys, keys that no row sees and all that lies beyond the real lengths get zeros, and
 * nothing that is stored there is used. Memory grows with seqlen_q + seqlen_k. */
typedef struct wan_attn_backward_params {
    uint32_t struct_size; /* sizeof(wan_attn_backward_params) of the caller; only ever appended */
    int32_t kernel;       /* row of the table of backward kernels to force; -1: the best */

    /* The call as wan_attn_forward ran it, exactly: precision is WAN_ATTN_EXACT, and there is no
     * guard. out and lse are read; where forward has summed scores in another order than the row
     * does, this may make them again. workspace is this call's; kernel says nothing here. */
    const wan_attn_params *forward;

    /* [batch, seqlen_q, num_heads_q, head_dim], as out in any float dtype. */
    wan_attn_tensor dout;
    /* Shaped like lse, f32; absent: lse has no gradient. */
    wan_attn_tensor dlse;

    /* Shaped like q, k and v, and of their dtypes. They share no memory with anything. */
    wan_attn_tensor dq, dk, dv;
} wan_attn_backward_params;

/* The backward kernels, best row first, as wan_attn_kernel_at. */
WAN_ATTN_API int32_t wan_attn_backward_kernel_count(void);
WAN_ATTN_API wan_attn_status wan_attn_backward_kernel_at(int32_t row, wan_attn_kernel_info *info);
/* The row that would run, and how much workspace it needs; either may be NULL. Reads nothing; data
 * pointers may be NULL, and of the tensors all but q, k and v may be absent. */
WAN_ATTN_API wan_attn_status wan_attn_backward_select(const wan_attn_backward_params *params,
                                                      int32_t *row, size_t *workspace_size,
                                                      wan_attn_error *err);
/* *row, if not NULL: the row that ran. */
WAN_ATTN_API wan_attn_status wan_attn_backward(const wan_attn_backward_params *params, int32_t *row,
                                               wan_attn_error *err);

/* RMS norm and rotary position embedding (RoPE) of a query or a key, in one pass over it:
 *
 *   n = x / sqrt(mean(x^2) + eps)          over all heads of a token, or over one head; or n = x
 *   y = n * weight
 *   out[2i]     = y[2i] * cos - y[2i + 1] * sin          pair i of a head: a complex number that is
 *   out[2i + 1] = y[2i] * sin + y[2i + 1] * cos          multiplied by cos + i sin
 *
 * Where cos and sin of pair i are table[2i] and table[2i + 1] of the token's rows of the table.
 * Row s of x is token t = seqlen_offset + s, so that a part of a sequence can be rotated alone.
 *
 * With grid_sizes the table is separable: row r has the angles of position r of every axis. In a
 * sample of frames x height x width, token t is in frame t / (height * width), line t / width %
 * height and column t % width. With P = head_dim / 2 pairs, the first P - 2 * (P / 3) take their
 * angle from the frame's row, the next P / 3 from the line's, the last P / 3 from the column's.
 * Tokens behind the grid are not rotated: out = y.
 *
 * Numerics. Squares are summed in float32, in at least 16 parts or as many as a head has elements;
 * these parts and 1 / sqrt are float64 (on a GPU: one part a thread, a warp's summed in float32,
 * warps and 1 / sqrt in pairs of floats). n and y are float32 products. With rounds_norm, n is
 * rounded to x's dtype and y to the wider one of x's and the weight's, as torch's operators do in
 * x.float() ... .type_as(x) * weight; without, neither is. Products of the rotation are float64,
 * each rounded by itself, and so is their sum, which is what complex128 gives; out is that sum,
 * rounded to float32 and then to its dtype. A GPU makes that sum in pairs of floats for a float32
 * out, off by 2^-44 of the products at most; for a 16-bit out in float32, off by 2^-22. */
typedef struct wan_attn_rope_params {
    uint32_t struct_size; /* sizeof(wan_attn_rope_params) of the caller; only ever appended to */
    int32_t kernel;       /* row of the table of rope kernels to force; -1: the best */

    wan_attn_tensor x; /* [batch, seqlen, heads, head_dim], as q is; head_dim at most 256 */
    /* Shaped like x; f32, f16 or bf16. It may be x itself (same address, dtype and strides); else
     * it shares no memory with anything. */
    wan_attn_tensor out;
    /* [heads * head_dim], or [head_dim] if is_per_head; f32, f16 or bf16, stride 1; absent: 1. Only
     * with has_norm. */
    wan_attn_tensor weight;
    /* f32 or f64, last stride 1; absent: no rotation. With grid_sizes [positions, head_dim], else
     * shaped like x, each token's own (its strides may be 0), and seqlen_offset is 0. */
    wan_attn_tensor table;
    /* [batch, 3] i32 or i64: frames, height and width of each sample, each between 0 and positions
     * (on a device they are clamped to it). On the CPU or x's device. */
    wan_attn_tensor grid_sizes;
    int64_t seqlen_offset; /* >= 0 */

    double eps;       /* read only if has_norm; finite, >= 0 */
    int32_t has_norm; /* 0: n = x */
    int32_t is_per_head;
    int32_t rounds_norm;

    int32_t num_threads; /* these four: as in wan_attn_params */
    wan_attn_parallel_fn parallel;
    void *stream;
    uint32_t cpu_features;
} wan_attn_rope_params;

/* The rope kernels, best row first, as wan_attn_kernel_at: dtypes are those of x. */
WAN_ATTN_API int32_t wan_attn_rope_kernel_count(void);
WAN_ATTN_API wan_attn_status wan_attn_rope_kernel_at(int32_t row, wan_attn_kernel_info *info);
/* As wan_attn_select: the row that would run. Reads nothing; data pointers may be NULL. */
WAN_ATTN_API wan_attn_status wan_attn_rope_select(const wan_attn_rope_params *params, int32_t *row,
                                                  wan_attn_error *err);
/* Needs no workspace. At once on the CPU, enqueued on `stream` on a GPU. *row, if not NULL: the row
 * that ran. */
WAN_ATTN_API wan_attn_status wan_attn_rms_norm_rope(const wan_attn_rope_params *params,
                                                    int32_t *row, wan_attn_error *err);

#ifdef __cplusplus
}
#endif

#endif /* WAN_ATTN_H */
