# SPDX-License-Identifier: Apache-2.0
"""bindings.py - the two ways from torch tensors to libwan_attn: the shim in C, and ctypes.

Both describe the same tensors in the same C structs, so checks, kernels and messages are the same;
the shim costs less per call (benchmarks/bench_overhead.py) but needs a newer torch.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.native import library as native
from wan_attn.native import shim
from wan_attn.native.shim import CPU_FEATURES

DTYPES = {
    torch.float32: native.F32,
    torch.float16: native.F16,
    torch.bfloat16: native.BF16,
    torch.int32: native.I32,
    torch.int64: native.I64,
    torch.float64: native.F64,
}
DEVICES = {"cpu": native.CPU, "cuda": native.CUDA}


_here = threading.local()


def last_kernel() -> int:
    """The row of the kernel table that ran in this thread's last call of the op; -1: none yet."""
    ran = shim.last_kernel()
    return int(vars(_here).get("kernel", -1)) if ran is None else ran


def allowed_cpu_features() -> int:
    """params.cpu_features of every call and question: what WAN_ATTN_CPU_ISA allows, 0 for all."""
    return CPU_FEATURES.value


def set_cpu_features(settings: config.Settings) -> None:
    """Lets every binding obey these settings from its next call on."""
    isa = settings.cpu_isa
    if isa == "auto" or native.load() is None:
        CPU_FEATURES.value = 0
        return
    allowed = 0 if isa == "portable" else native.cpu_feature_level(isa)
    CPU_FEATURES.value = native.CPU_KNOWN | allowed


config.follow(set_cpu_features)


def describe(tensor: Tensor) -> native.Tensor:
    """The tensor as csrc/wan_attn.h wants it: a description, no copy."""
    shape, device = tensor.shape, tensor.device  # each costs what a short loop costs
    described = native.Tensor(
        tensor.data_ptr(),
        DTYPES.get(tensor.dtype, native.DTYPE_OTHER),
        DEVICES.get(device.type, native.DEVICE_OTHER),
        device.index or 0,
        len(shape),
    )
    kept = min(len(shape), native.MAX_NDIM)
    described.shape[:kept] = shape[:kept]
    described.stride[:kept] = tensor.stride()[:kept]
    return described


def _check(status: int, error: native.Error) -> None:
    if status != native.OK:
        raise RuntimeError(f"wan_attn: {error.text()}")


def describe_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    kernel: int,
    precision: int,
) -> native.Params:
    """What a call computes with and where, but for its masks and what it writes to."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):  # None gets past the dispatcher
            raise RuntimeError(f"wan_attn: {name} must be a tensor, got {tensor}")
    if not -(1 << 31) <= kernel < 1 << 31:  # would wrap, perhaps into a row that exists
        raise RuntimeError(f"wan_attn: kernel must be -1 (the best) or a row, got {kernel}")
    if precision not in (native.EXACT, native.QK8):
        rule = "0 (exact) or 1 (8-bit scores)"
        raise RuntimeError(f"wan_attn: precision must be {rule}, got {precision}")
    params = native.Params(
        struct_size=ctypes.sizeof(native.Params),
        kernel=kernel,
        q=describe(query),
        k=describe(key),
        v=describe(value),
        cpu_features=allowed_cpu_features(),
        precision=precision,
    )
    if q_lens is not None:
        params.seqused_q = describe(q_lens)
    if k_lens is not None:
        params.seqused_k = describe(k_lens)
    if query.device.type == "cpu":
        params.num_threads = torch.get_num_threads()
        params.parallel = shim.parallel_for()
    else:
        params.stream = torch.cuda.current_stream(query.device).cuda_stream
    return params


def ctypes_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    block_counts: Tensor | None = None,
    block_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    return_lse: bool = False,
    kernel: int = -1,
    out_like_value: bool = False,
    precision: int = native.EXACT,
    pools_others: bool = False,
    skip_threshold: float = 0.0,
    guard: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch.ops.wan_attn.sdpa without the shim; the same steps as csrc/torch/shim.c.

    Args:
        guard: int32 on query's device, a wan_attn_guard that the call adds to, [4] or with
            lost_mass [5]; not the op's, whose schema would then change an argument, which has no
            derivative in torch.
    """
    lib, error = native.lib(), native.Error()
    params = describe_call(query, key, value, q_lens, k_lens, kernel, precision)
    params.softmax_scale = 0.0 if scale is None else scale
    params.has_softmax_scale, params.is_causal = scale is not None, is_causal
    params.window_size_left, params.window_size_right = window_left, window_right
    if block_counts is not None:
        params.block_counts = describe(block_counts)
    if block_indices is not None:
        params.block_indices = describe(block_indices)
    params.pools_others, params.skip_threshold = pools_others, skip_threshold
    if guard is not None:
        params.guard, params.guard_size = guard.data_ptr(), guard.numel() * guard.element_size()
    call = native.Call(struct_size=ctypes.sizeof(native.Call))
    _check(lib.wan_attn_prepare(params, call, error), error)

    batch, seqlen_q, heads, _ = query.shape
    out = query.new_empty(query.shape, dtype=(value if out_like_value else query).dtype)
    lse = query.new_empty((batch if return_lse else 0, heads, seqlen_q), dtype=torch.float32)
    params.out = describe(out)
    if return_lse:
        params.lse = describe(lse)
    if call.workspace_size:
        workspace = query.new_empty(call.workspace_size, dtype=torch.uint8)
        params.workspace, params.workspace_size = workspace.data_ptr(), call.workspace_size
    _check(lib.wan_attn_run(params, call, error), error)
    _here.kernel = call.kernel
    return out, lse
