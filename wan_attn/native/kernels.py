# SPDX-License-Identifier: Apache-2.0
"""kernels.py - libwan_attn's kernel table as Python values: which row takes a call, and why not."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32
from dataclasses import dataclass

import torch

from wan_attn.native import cuda_driver, library
from wan_attn.native.bindings import DEVICES, DTYPES, allowed_cpu_features
from wan_attn.request import Request, blocks_of


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """One row of csrc/core/kernels.def. `dtypes` are value's; query and key may be float32 too."""

    index: int
    name: str
    description: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    head_dim_min: int
    head_dim_max: int
    arch_min: int
    arch_max: int
    cpu_features: tuple[str, ...]
    is_lossy: bool
    takes_block_lists: bool

    @property
    def is_for_lists(self) -> bool:
        """It takes no call without lists of blocks or a skip_threshold."""
        return self.takes_block_lists and self.device == "cuda"


@functools.cache
def kernels() -> tuple[KernelInfo, ...]:
    """Every row, best first; empty where the native library does not load (see binding_reason)."""
    return _table("kernel")


@functools.cache
def rope_kernels() -> tuple[KernelInfo, ...]:
    """The same of rms_norm_rope; `dtypes` are those of x."""
    return _table("rope_kernel")


@functools.cache
def backward_kernels() -> tuple[KernelInfo, ...]:
    """The same of gradients."""
    return _table("backward_kernel")


def _table(name: str) -> tuple[KernelInfo, ...]:
    lib = library.load()
    if lib is None:
        return ()
    device_names = {number: device for device, number in DEVICES.items()}
    rows = []
    for index in range(getattr(lib, f"wan_attn_{name}_count")()):
        info = library.KernelInfo(struct_size=ctypes.sizeof(library.KernelInfo))
        getattr(lib, f"wan_attn_{name}_at")(index, ctypes.byref(info))
        rows.append(
            KernelInfo(
                index=index,
                name=info.name.decode(),
                description=info.description.decode(),
                device=device_names[info.device_type],
                dtypes=tuple(dtype for dtype, bit in DTYPES.items() if info.dtypes >> bit & 1),
                head_dim_min=info.head_dim_min,
                head_dim_max=info.head_dim_max,
                arch_min=info.arch_min,
                arch_max=info.arch_max,
                cpu_features=library.feature_names(info.cpu_features),
                is_lossy=bool(info.is_lossy),
                takes_block_lists=bool(info.takes_block_lists),
            )
        )
    return tuple(rows)


def cpu_features() -> tuple[str, ...]:
    """Vector extensions that this CPU has, the operating system saves, and some row could use."""
    lib = library.load()
    return () if lib is None else library.feature_names(lib.wan_attn_cpu_features())


def build_info() -> str:
    """Target and compiler of the native library."""
    lib = library.load()
    return "" if lib is None else lib.wan_attn_build_info().decode()


def _describe(request: Request, dtype: torch.dtype, shape: tuple[int, ...]) -> library.Tensor:
    """A contiguous tensor that does not exist: the questions below never read data."""
    described = library.Tensor(
        dtype=DTYPES.get(dtype, library.DTYPE_OTHER),
        device_type=DEVICES.get(request.device.type, library.DEVICE_OTHER),
        device_index=request.device.index or 0,
        ndim=len(shape),
    )
    stride = 1
    for dim in reversed(range(len(shape))):
        described.shape[dim], described.stride[dim] = shape[dim], stride
        stride *= shape[dim]
    return described


def call_params(
    request: Request, kernel: int = -1, precision: int = library.EXACT
) -> library.Params:
    """The call as C is asked about it: of contiguous tensors that need not exist."""
    r = request
    q_shape = (r.batch, r.seqlen_q, r.num_heads_q, r.head_dim)
    k_shape = (r.batch, r.seqlen_k, r.num_heads_k, r.head_dim)
    params = library.Params(
        struct_size=ctypes.sizeof(library.Params),
        kernel=kernel,
        q=_describe(r, r.query_dtype, q_shape),
        k=_describe(r, r.key_dtype, k_shape),
        v=_describe(r, r.dtype, k_shape),
        is_causal=r.is_causal,
        window_size_left=r.window[0],
        window_size_right=r.window[1],
        cpu_features=allowed_cpu_features(),
        precision=precision,
        pools_others=r.pools_others,
        skip_threshold=r.skip_threshold,
    )
    if r.has_block_lists:
        lists = (r.batch, r.num_heads_q, blocks_of(r.seqlen_q))
        params.block_counts = _describe(r, torch.int32, lists)
        params.block_indices = _describe(r, torch.int32, (*lists, blocks_of(r.seqlen_k)))
    return params


def why_not(request: Request, row: int) -> str | None:
    """Why this row of the table cannot take the call; None: it can."""
    error = library.Error()
    with cuda_driver.question():
        status = library.lib().wan_attn_why_not(call_params(request), row, ctypes.byref(error))
    return None if status == library.OK else error.text()


def select(request: Request, precision: int = library.EXACT) -> tuple[KernelInfo | None, str]:
    """The row that would run and "", or None and every row's reason (or a broken contract).

    Args:
        precision: library.QK8 asks for a lossy row.

    Raises:
        RuntimeError: the device is in trouble: another backend would fail there, or hide it.
    """
    if library.load() is None:
        return None, library.load_error() or ""
    error, row = library.Error(), c_int32(-1)
    with cuda_driver.question():
        status = library.lib().wan_attn_select(
            call_params(request, precision=precision), ctypes.byref(row), ctypes.byref(error)
        )
    if status == library.OK:
        return kernels()[row.value], ""
    if status == library.DEVICE_ERROR:
        raise RuntimeError(f"wan_attn: {error.text()}")
    return None, error.text()


def workspace_bytes(request: Request, row: str = "") -> int | None:
    """The memory beside operands and result that a row needs for a call of contiguous tensors;
    None: no row takes the call.

    On the CPU it grows with the number of torch's threads.

    Args:
        row: of the kernel table, by name; "": the best one that takes the call.
    """
    if library.load() is None:
        return None
    index = next((kernel.index for kernel in kernels() if kernel.name == row), -1)
    params, size = call_params(request, index), ctypes.c_size_t(0)
    if request.device.type == "cpu":
        params.num_threads = torch.get_num_threads()
    with cuda_driver.question():
        status = library.lib().wan_attn_workspace_size(params, ctypes.byref(size), None)
    return int(size.value) if status == library.OK else None
