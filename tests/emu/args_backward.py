# SPDX-License-Identifier: Apache-2.0
"""args_backward.py - csrc/cuda/args_backward.h for Python."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_longlong, c_void_p

from emu.args import Lengths, View


class BackwardRowsArgs(ctypes.Structure):
    """wan_attn_cuda_backward_rows_args."""

    _fields_ = [
        *(("out", View), ("dout", View), ("lse", c_void_p), ("dlse", c_void_p)),
        *(("lse_strides", c_longlong * 3), ("dlse_strides", c_longlong * 3)),
        *(("seqused_q", Lengths), ("seqused_k", Lengths), ("rows", c_void_p), ("sizes", c_void_p)),
        *((name, c_int) for name in ("batch", "num_heads_q", "seqlen_q", "seqlen_k", "head_dim")),
        *((name, c_int) for name in ("window_size_left", "window_size_right")),
        *((name, c_int) for name in ("out_dtype", "dout_dtype")),
    ]


class BackwardScaleArgs(ctypes.Structure):
    """wan_attn_cuda_backward_scale_args."""

    _fields_ = [
        *((name, c_void_p) for name in ("rows", "sizes", "largest")),
        *(("seqused_q", Lengths), ("scales", c_void_p), ("dout_scale", c_void_p)),
        *((name, c_int) for name in ("batch", "num_heads_q", "heads_per_key_head", "seqlen_q")),
        ("num_parts", c_int),
    ]


class BackwardArgs(ctypes.Structure):
    """wan_attn_cuda_backward_args."""

    _fields_ = [
        *((name, View) for name in ("q", "k", "v", "dout", "dq", "dk", "dv")),
        *(("rows", c_void_p), ("scales", c_void_p)),
        *(("seqused_q", Lengths), ("seqused_k", Lengths)),
        *((name, c_int) for name in ("batch", "num_heads_q", "heads_per_key_head")),
        *((name, c_int) for name in ("seqlen_q", "seqlen_k", "blocks")),
        *((name, c_int) for name in ("window_size_left", "window_size_right")),
        *((name, c_int) for name in ("dq_is_f32", "dk_is_f32", "dv_is_f32")),
        *(("softmax_scale", c_float), ("scale_log2e", c_float)),
    ]
