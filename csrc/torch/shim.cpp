// SPDX-License-Identifier: Apache-2.0
// shim.cpp - torch.ops.wan_attn.sdpa for CPU and CUDA tensors: describes tensors to the C ABI,
// allocates, turns a status into an exception. The only C++ and the only native file that knows
// torch, through its stable ABI (torch >= 2.9) alone: no ATen, no c10, so one binary serves every
// later torch. Knows no kernel.
//
// Functions come as addresses from Python (wan_attn/ops.py): libwan_attn's, and the few of torch's
// that are newer than 2.9 or live in a library that a CPU-only torch does not have. So nothing but
// libtorch_cpu is linked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "wan_attn.h"

#if defined(_WIN32)
#define SHIM_API extern "C" __declspec(dllexport)
#else
#define SHIM_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Functions {
    decltype(&wan_attn_workspace_size) workspace_size;
    decltype(&wan_attn_forward) forward;
    wan_attn_parallel_fn parallel;      // torch_parallel_for; NULL before torch 2.10
    int32_t (*num_threads)(uint32_t *); // torch_get_num_threads, or a stand-in with its signature
    int32_t (*cuda_stream)(int32_t,
                           void **); // aoti_torch_get_current_cuda_stream; NULL in a CPU-only torch
    uint32_t cpu_features;           // what the user allows; 0: all
} functions;

wan_attn_dtype dtype_of(const Tensor &t) {
    switch (t.scalar_type()) {
    case ScalarType::Float: return WAN_ATTN_F32;
    case ScalarType::Half: return WAN_ATTN_F16;
    case ScalarType::BFloat16: return WAN_ATTN_BF16;
    case ScalarType::Int: return WAN_ATTN_I32;
    case ScalarType::Long: return WAN_ATTN_I64;
    default: return WAN_ATTN_DTYPE_OTHER;
    }
}

wan_attn_device device_of(const Tensor &t) {
    return t.is_cpu() ? WAN_ATTN_CPU : t.is_cuda() ? WAN_ATTN_CUDA : WAN_ATTN_DEVICE_OTHER;
}

wan_attn_tensor describe(const Tensor &t, const char *name) {
    if (!t.defined()) // None in place of a tensor comes through the dispatcher like this
        throw std::runtime_error(std::string("wan_attn: ") + name + " must be a tensor, got None");
    wan_attn_tensor d{};
    d.data = t.data_ptr();
    d.dtype = dtype_of(t);
    d.device_type = device_of(t);
    d.device_index = d.device_type == WAN_ATTN_CPU ? 0 : t.get_device_index();
    d.ndim = static_cast<int32_t>(t.dim());
    for (int32_t i = 0; i < d.ndim && i < WAN_ATTN_MAX_NDIM; i++) {
        d.shape[i] = t.size(i);
        d.stride[i] = t.stride(i);
    }
    return d;
}

void check(wan_attn_status status, const wan_attn_error &error) {
    if (status != WAN_ATTN_OK)
        throw std::runtime_error(std::string("wan_attn: ") + error.message);
}

std::tuple<Tensor, Tensor> sdpa(Tensor query, Tensor key, Tensor value,
                                std::optional<Tensor> q_lens, std::optional<Tensor> k_lens,
                                std::optional<double> scale, bool is_causal, int64_t window_left,
                                int64_t window_right, bool return_lse, int64_t kernel) {
    wan_attn_params params{};
    wan_attn_error error{};
    params.struct_size = sizeof(params);
    if (kernel < INT32_MIN || kernel > INT32_MAX) // would wrap, perhaps into a row that exists
        throw std::runtime_error("wan_attn: kernel must be -1 (the best) or a row, got " +
                                 std::to_string(kernel));
    params.kernel = static_cast<int32_t>(kernel);
    params.q = describe(query, "query");
    params.k = describe(key, "key");
    params.v = describe(value, "value");
    if (q_lens)
        params.seqused_q = describe(*q_lens, "q_lens");
    if (k_lens)
        params.seqused_k = describe(*k_lens, "k_lens");
    params.has_softmax_scale = scale.has_value();
    params.softmax_scale = scale.value_or(0.0);
    params.is_causal = is_causal;
    params.window_size_left = window_left;
    params.window_size_right = window_right;
    params.cpu_features = functions.cpu_features;

    if (params.q.device_type == WAN_ATTN_CPU) {
        uint32_t threads = 1;
        functions.num_threads(&threads);
        params.num_threads = static_cast<int32_t>(threads);
        params.parallel = functions.parallel;
    } else if (!functions.cuda_stream ||
               functions.cuda_stream(params.q.device_index, &params.stream) != 0) {
        throw std::runtime_error(
            "wan_attn: torch does not tell the current CUDA stream of query's device");
    }

    size_t workspace_bytes = 0;
    check(functions.workspace_size(&params, &workspace_bytes, &error),
          error); // the whole contract is checked here

    Tensor out = torch::stable::new_empty(
        query, {query.size(0), query.size(1), query.size(2), query.size(3)});
    Tensor lse = torch::stable::new_empty(
        query, {return_lse ? query.size(0) : 0, query.size(2), query.size(1)}, ScalarType::Float);
    params.out = describe(out, "out");
    if (return_lse)
        params.lse = describe(lse, "lse");
    std::optional<Tensor> workspace;
    if (workspace_bytes) {
        workspace = torch::stable::new_empty(query, {static_cast<int64_t>(workspace_bytes)},
                                             ScalarType::Byte);
        params.workspace = workspace->data_ptr();
        params.workspace_size = workspace_bytes;
    }
    check(functions.forward(&params, &error), error);
    return {out, lse};
}

} // namespace

// Called once by Python after loading, before the op can be reached with real tensors.
SHIM_API void wan_attn_shim_configure(const Functions *table) { functions = *table; }

STABLE_TORCH_LIBRARY_IMPL(wan_attn, CPU, m) { m.impl("sdpa", TORCH_BOX(&sdpa)); }
STABLE_TORCH_LIBRARY_IMPL(wan_attn, CUDA, m) { m.impl("sdpa", TORCH_BOX(&sdpa)); }
