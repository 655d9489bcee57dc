# SPDX-License-Identifier: Apache-2.0
"""args.py - csrc/cuda/args.h for Python: the parameter of each kind of launch."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_longlong, c_uint, c_void_p


class View(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("strides", c_longlong * 3)]


class Lengths(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_longlong), ("is_i64", c_int), ("unused", c_int)]


class Args(ctypes.Structure):
    """wan_attn_cuda_args of csrc/cuda/args.h."""

    _fields_ = [
        *((name, View) for name in ("q", "k", "v", "out")),
        *(("lse", c_void_p), ("lse_strides", c_longlong * 3)),
        *(("seqused_q", Lengths), ("seqused_k", Lengths)),
        *(("v_scale", c_void_p), ("k_scale", c_void_p)),
        *(("out_split_stride", c_longlong), ("lse_split_stride", c_longlong)),
        *((name, c_int) for name in ("num_splits", "split_tiles", "batch", "num_heads_q")),
        *((name, c_int) for name in ("heads_per_key_head", "seqlen_q", "seqlen_k", "m_blocks")),
        *(
            (name, c_int)
            for name in ("window_size_left", "window_size_right", "q_is_f32", "out_is_f32")
        ),
        *(("scale_log2e", c_float), ("q_sign", c_uint)),
    ]


class Lists(ctypes.Structure):
    """wan_attn_cuda_lists of csrc/cuda/args_lists.h."""

    _fields_ = [
        *(("counts", c_void_p), ("indices", c_void_p)),
        *(("count_strides", c_longlong * 3), ("strides", c_longlong * 4)),
        *(("capacity", c_int), ("unused", c_int)),
    ]


class ListedArgs(ctypes.Structure):
    _fields_ = [
        *(("call", Args), ("lists", Lists)),
        *(("pooled_k", c_void_p), ("pooled_v", c_void_p)),
        *(("nonfinite", c_void_p), ("log2_threshold", c_float), ("unused", c_int)),
        ("lost_mass", c_void_p),
    ]


class PoolArgs(ctypes.Structure):
    _fields_ = [
        *(("source", View), ("seqused", Lengths), ("to", c_void_p), ("scale", c_void_p)),
        *((name, c_int) for name in ("batch", "seqlen", "heads", "head_dim")),
        *((name, c_int) for name in ("from_dtype", "to_bf16")),
    ]


class PackArgs(ctypes.Structure):
    _fields_ = [
        *(("source", View), ("to", c_void_p), ("seqused", Lengths)),
        *(("largest", c_void_p), ("scale", c_void_p)),
        *((name, c_int) for name in ("batch", "seqlen", "heads", "head_dim")),
        *((name, c_int) for name in ("from_dtype", "to_bf16", "num_parts", "limit")),
    ]


class Qk8Args(ctypes.Structure):
    """wan_attn_cuda_qk8_args of csrc/cuda/args_qk8.h."""

    _fields_ = [
        *(("source", View), ("seqused", Lengths)),
        *((name, c_void_p) for name in ("sums", "mean", "to", "rows")),
        *((name, c_int) for name in ("batch", "seqlen", "heads", "head_dim", "from_dtype")),
        *((name, c_int) for name in ("tiles", "heads_per_key_head", "is_negated")),
        *(("factor", c_float), ("scale", c_float)),
    ]


class GuardArgs(ctypes.Structure):
    """wan_attn_cuda_guard_args of csrc/cuda/args_guard.h."""

    _fields_ = [
        *(("v", View), ("out", View), ("seqused_k", Lengths), ("guard", c_void_p)),
        *((name, c_int) for name in ("batch", "seqlen_q", "seqlen_k")),
        *((name, c_int) for name in ("num_heads_q", "num_heads_k", "head_dim")),
        *((name, c_int) for name in ("v_dtype", "out_dtype")),
    ]


class PutLengthsArgs(ctypes.Structure):
    _fields_ = [("to", c_void_p), ("count", c_int), ("lengths", c_int * 256), ("unused", c_int)]


class MergeArgs(ctypes.Structure):
    _fields_ = [
        *(("part_out", c_void_p), ("part_lse", c_void_p), ("out", View)),
        *(("lse", c_void_p), ("lse_strides", c_longlong * 3)),
        *((name, c_int) for name in ("batch", "seqlen", "num_heads", "head_dim")),
        *(("num_splits", c_int), ("out_dtype", c_int)),
    ]


class RopeArgs(ctypes.Structure):
    """wan_attn_cuda_rope_args of csrc/cuda/args_rope.h."""

    _fields_ = [
        *(("x", View), ("out", View), ("weight", c_void_p), ("table", View)),
        *(("grid_sizes", c_void_p), ("grid_strides", c_longlong * 2), ("grids", c_int * 3 * 64)),
        *(("inverse_size", c_float * 2), ("eps", c_float * 2)),
        *((name, c_int) for name in ("seqlen", "num_heads", "head_dim", "seqlen_offset")),
        *((name, c_int) for name in ("positions", "weight_head_stride")),
        *((name, c_int) for name in ("x_dtype", "out_dtype", "weight_dtype")),
        *((name, c_int) for name in ("table_is_f64", "has_grid", "grid_is_i64")),
        *((name, c_int) for name in ("has_norm", "is_per_head", "rounds_n", "rounds_y")),
        *((name, c_int) for name in ("num_threads", "slots", "num_groups", "slot_factor")),
    ]
