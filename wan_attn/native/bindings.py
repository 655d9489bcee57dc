# SPDX-License-Identifier: Apache-2.0
"""bindings.py - the two roads from torch tensors to libwan_attn: the C++ shim, and ctypes.

Both describe the same tensors in the same C structs, so checks, kernels and messages are the same;
the shim costs less per call (benchmarks/bench_overhead.py) but needs a newer torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import CFUNCTYPE, POINTER, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from wan_attn.config import current
from wan_attn.native import library as native

DTYPES = {
    torch.float32: native.F32,
    torch.float16: native.F16,
    torch.bfloat16: native.BF16,
    torch.int32: native.I32,
    torch.int64: native.I64,
}
DEVICES = {"cpu": native.CPU, "cuda": native.CUDA}

# Before 2.9 arguments were encoded otherwise: a shim built for 2.9 loads in 2.7 and computes
# nonsense, so the version decides and not whether it loads.
SHIM_NEEDS_TORCH = (2, 9)

# Values of WAN_ATTN_CPU_ISA that are not the name of a feature.
_ISA_NAMES = {"amx": "amx_bf16"}


def torch_version() -> tuple[int, int]:
    """(major, minor) of the torch that runs."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def allowed_cpu_features() -> int:
    """params.cpu_features for WAN_ATTN_CPU_ISA: 0 means all there are."""
    isa = current().cpu_isa
    if isa == "auto":
        return 0
    allowed = 0 if isa == "portable" else native.cpu_feature_level(_ISA_NAMES.get(isa, isa))
    return native.CPU_KNOWN | allowed


@functools.cache
def _torch_libraries() -> tuple[ctypes.CDLL, ...]:
    """Handles through which torch's exported C functions can be found."""
    if sys.platform == "win32":
        folder = Path(torch.__file__).with_name("lib")
        names = [folder / "torch_cpu.dll", folder / "torch_cuda.dll"]
        return tuple(ctypes.CDLL(str(name)) for name in names if name.exists())
    # dlsym on torch._C walks its dependencies, whatever a distribution has named them.
    return (ctypes.CDLL(torch._C.__file__),)


def torch_function(name: str) -> int | None:
    """Address of one of torch's C functions, or None where this torch does not have it."""
    for library in _torch_libraries():
        try:
            return ctypes.cast(getattr(library, name), c_void_p).value
        except AttributeError:
            continue
    return None


@functools.cache
def parallel_for() -> int | None:
    """torch_parallel_for (torch >= 2.10): kernels then run on torch's own threads."""
    return None if _is_forked else torch_function("torch_parallel_for")


_is_forked = False


def _leave_torchs_threads() -> None:
    """In a child of fork, torch's OpenMP would wait for ever for threads that the parent kept."""
    global _is_forked
    _is_forked = True
    parallel_for.cache_clear()
    if _shim is not None:
        _configure(_shim)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_torchs_threads)


def _num_threads(out: ctypes._Pointer[c_uint32]) -> int:
    """torch_get_num_threads for torch 2.9, which does not export it."""
    out[0] = torch.get_num_threads()
    return 0


# Kept for good: C calls it as long as the shim lives.
_NUM_THREADS = CFUNCTYPE(c_int32, POINTER(c_uint32))(_num_threads)


class _ShimFunctions(ctypes.Structure):
    """`Functions` of csrc/torch/shim.cpp."""

    _fields_ = [
        ("workspace_size", c_void_p),
        ("forward", c_void_p),
        ("parallel", c_void_p),
        ("num_threads", c_void_p),
        ("cuda_stream", c_void_p),
        ("cpu_features", c_uint32),
    ]


def why_no_shim() -> str | None:
    """Why the shim cannot be used with this torch, or None."""
    if torch_version() < SHIM_NEEDS_TORCH:
        return f"the shim needs torch >= 2.9, this is {torch.__version__}"
    if not native.shim_path().exists():
        return (
            f"{native.shim_path().name} was not built: torch >= 2.10 was not importable at build"
            " time (pip install --no-build-isolation builds it)"
        )
    return None


_shim: ctypes.CDLL | None = None


def _configure(shim: ctypes.CDLL) -> None:
    """Tells the shim the functions to use."""
    lib = native.lib()
    configure = shim.wan_attn_shim_configure
    configure.restype, configure.argtypes = None, [POINTER(_ShimFunctions)]
    table = _ShimFunctions(
        ctypes.cast(lib.wan_attn_workspace_size, c_void_p),
        ctypes.cast(lib.wan_attn_forward, c_void_p),
        parallel_for(),
        torch_function("torch_get_num_threads") or ctypes.cast(_NUM_THREADS, c_void_p).value,
        torch_function("aoti_torch_get_current_cuda_stream"),
        allowed_cpu_features(),
    )
    configure(ctypes.byref(table))


def load_shim() -> str | None:
    """Loads the shim, which registers the op for CPU and CUDA; or says why it could not."""
    why = why_no_shim()
    if why is not None:
        return why
    global _shim
    try:
        shim = ctypes.CDLL(str(native.shim_path()))
        _configure(shim)
    except (OSError, AttributeError) as error:
        return f"{native.shim_path().name} does not load: {error}"
    _shim = shim
    return None


def describe(tensor: Tensor) -> native.Tensor:
    """The tensor as csrc/wan_attn.h wants it: a description, no copy."""
    described = native.Tensor(
        data=tensor.data_ptr(),
        dtype=DTYPES.get(tensor.dtype, native.DTYPE_OTHER),
        device_type=DEVICES.get(tensor.device.type, native.DEVICE_OTHER),
        device_index=tensor.device.index or 0,
        ndim=tensor.dim(),
    )
    for dim in range(min(tensor.dim(), native.MAX_NDIM)):
        described.shape[dim] = tensor.shape[dim]
        described.stride[dim] = tensor.stride(dim)
    return described


def _check(status: int, error: native.Error) -> None:
    if status != native.OK:
        raise RuntimeError(f"wan_attn: {error.text()}")


def ctypes_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    return_lse: bool = False,
    kernel: int = -1,
) -> tuple[Tensor, Tensor]:
    """torch.ops.wan_attn.sdpa without the shim; the same steps as csrc/torch/shim.cpp."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):  # None gets past the dispatcher
            raise RuntimeError(f"wan_attn: {name} must be a tensor, got {tensor}")
    if not -(1 << 31) <= kernel < 1 << 31:  # would wrap, perhaps into a row that exists
        raise RuntimeError(f"wan_attn: kernel must be -1 (the best) or a row, got {kernel}")
    lib = native.lib()
    error = native.Error()
    params = native.Params(
        struct_size=ctypes.sizeof(native.Params),
        kernel=kernel,
        q=describe(query),
        k=describe(key),
        v=describe(value),
        softmax_scale=0.0 if scale is None else scale,
        has_softmax_scale=scale is not None,
        is_causal=is_causal,
        window_size_left=window_left,
        window_size_right=window_right,
        cpu_features=allowed_cpu_features(),
    )
    if q_lens is not None:
        params.seqused_q = describe(q_lens)
    if k_lens is not None:
        params.seqused_k = describe(k_lens)
    if query.device.type == "cpu":
        params.num_threads = torch.get_num_threads()
        params.parallel = parallel_for()
    else:
        params.stream = torch.cuda.current_stream(query.device).cuda_stream
    size = c_size_t()
    _check(lib.wan_attn_workspace_size(params, ctypes.byref(size), error), error)

    batch, seqlen_q, heads, _ = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty((batch if return_lse else 0, heads, seqlen_q), dtype=torch.float32)
    params.out = describe(out)
    if return_lse:
        params.lse = describe(lse)
    if size.value:
        workspace = query.new_empty(size.value, dtype=torch.uint8)
        params.workspace, params.workspace_size = workspace.data_ptr(), size.value
    _check(lib.wan_attn_forward(params, error), error)
    return out, lse
