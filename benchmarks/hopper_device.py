# SPDX-License-Identifier: Apache-2.0
"""hopper_device.py - the Hopper kernels on a real GPU, for benchmarks and the first hour on a card:
compiles an instance, makes the tensor maps, launches. CUDA's driver API by ctypes, memory by torch.

Not part of the package, and independent of its loader: two readings of csrc/cuda/README.md's recipe
that can be compared. Written without a GPU; tests/test_tune_sm90.py runs it against a driver that
only records.
"""

from __future__ import annotations

import ctypes
import math
import sys
import tempfile
from ctypes import byref, c_char_p, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import torch
from torch import Tensor

from emu import compile as compilers
from emu.rows_sm90 import ARCH, TileSm90
from emu.run_sm90 import Sm90Args, aligned_args, call_args, map_fields, takes_tma

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DATA_TYPE = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_
SWIZZLE_128B, L2_256B = 3, 3


def why_not() -> str | None:
    """Why no Hopper kernel can run here."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"these kernels are for sm_90a, and this is {torch.cuda.get_device_name()}"
    if not (compilers.nvcc() or compilers.nvrtcs()):
        return "neither nvcc nor NVRTC is here"
    return None


class DriverError(Exception):
    """What the driver said, and to which call."""


class Device:
    def __init__(self, driver: Any = None) -> None:
        self.driver = driver or ctypes.CDLL("libcuda.so.1")
        self.name = torch.cuda.get_device_name() if driver is None else "stand-in"
        self.functions: dict[TileSm90, c_void_p] = {}
        self.operands: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def _do(self, name: str, *args: Any) -> None:
        status = getattr(self.driver, name)(*args)
        if status != 0:
            text = c_char_p()
            self.driver.cuGetErrorString(status, byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown').decode()} ({status})")

    def function(self, tile: TileSm90) -> c_void_p:
        """The compiled kernel, kept for the process."""
        if tile not in self.functions:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                if compilers.nvcc():
                    compilers.with_nvcc(tile, ARCH, cubin)
                else:
                    newest = max(compilers.nvrtcs())
                    compilers.with_nvrtc(compilers.nvrtcs()[newest], tile, ARCH, cubin)
                image = cubin.read_bytes()
            module, function = c_void_p(), c_void_p()
            self._do("cuModuleLoadData", byref(module), image)
            self._do("cuModuleGetFunction", byref(function), module, tile.symbol.encode())
            self._do("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, tile.smem_bytes)
            self.functions[tile] = function
        return self.functions[tile]

    def _encode(self, at: int, x: Tensor, box_rows: int) -> None:
        size, strides, box = map_fields(x, box_rows)
        self._do(
            "cuTensorMapEncodeTiled",
            *(c_void_p(at), DATA_TYPE[x.dtype], c_uint32(4), c_void_p(x.data_ptr())),
            *((c_uint64 * 4)(*size), (c_uint64 * 3)(*strides), (c_uint32 * 4)(*box)),
            *((c_uint32 * 4)(1, 1, 1, 1), 0, SWIZZLE_128B, L2_256B, 0),
        )

    def arguments(self, tile: TileSm90, operands: tuple[Tensor, ...], **call: Any) -> Sm90Args:
        """operands: query, key, value, out, lse (or None)."""
        query, key, value, out, lse = operands
        args = aligned_args()
        args.call = call_args(tile, query, key, out, lse, **call)
        rows = tile.block_n // tile.cluster
        for name, x, box in (("q", query, tile.block_m), ("k", key, rows), ("v", value, rows)):
            self._encode(ctypes.addressof(getattr(args, name)), x, box)
        if out.dtype == query.dtype and takes_tma(out):
            self._encode(ctypes.addressof(args.out), out, 64)
            args.stores_by_tma = 1
        return args

    def launch(self, tile: TileSm90, args: Sm90Args, stream: int) -> None:
        grid = args.call.m_blocks * args.call.num_heads_q * args.call.batch
        parameters = (c_void_p * 1)(ctypes.addressof(args))
        self._do(
            "cuLaunchKernel",
            *(self.function(tile), c_uint(grid), c_uint(1), c_uint(1)),
            *(c_uint(tile.num_threads), c_uint(1), c_uint(1), c_uint(tile.smem_bytes)),
            *(c_void_p(stream), parameters, None),
        )

    def run(
        self,
        tile: TileSm90,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        return_lse: bool = True,
        **call: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """One call on torch's current stream, with the oracle's arguments; out and lse, which were
        NaN before."""
        out = torch.full_like(query, math.nan, memory_format=torch.contiguous_format)
        lse = None
        if return_lse:
            lse = torch.full((query.shape[0], query.shape[2], query.shape[1]), math.nan)
            lse = lse.to(query.device)
        args = self.arguments(tile, (query, key, value, out, lse), **call)
        self.launch(tile, args, torch.cuda.current_stream().cuda_stream)
        return out, lse

    def seconds(self, tile: TileSm90, call: Any) -> float:
        """Of one run of a benchmarks.tune_sm90.Call; the mean of as many as take some 50 ms."""
        dtype = torch.bfloat16 if tile.dtype == "BF16" else torch.float16
        key = (dtype, tile.head_dim, call.seqlen_q, call.seqlen_k, call.heads, call.batch)
        if key not in self.operands:
            self.operands.clear()  # of one call at a time
            self.operands[key] = tuple(
                torch.randn(call.batch, n, call.heads, tile.head_dim, device="cuda", dtype=dtype)
                for n in (call.seqlen_q, call.seqlen_k, call.seqlen_k, call.seqlen_q)
            )
        operands = (*self.operands[key], None)
        args = self.arguments(tile, operands, is_causal=call.is_masked)
        stream = torch.cuda.current_stream()
        repeats = max(1, min(200, int(0.05 / (call.flop(tile.head_dim) / 600e12))))
        self.launch(tile, args, stream.cuda_stream)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            self.launch(tile, args, stream.cuda_stream)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats
