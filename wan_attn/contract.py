# SPDX-License-Identifier: Apache-2.0
"""contract.py - the rules of csrc/core/check.c again, for calls that never reach C.

Those are fake tensors with symbolic shapes, and machines where the native library does not load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    scale: float | None,
    window_left: int,
    window_right: int,
) -> None:
    """Raises RuntimeError for what can be told without data; shapes may be symbolic."""
    _check_operands(query, key, value)
    _check_shapes(query, key, value)
    _check_lengths(query, q_lens, k_lens)
    if scale is not None and not math.isfinite(scale):
        _refuse(f"scale must be finite, got {scale:g}")
    for name, bound in (("window_left", window_left), ("window_right", window_right)):
        if bound < -1:
            _refuse(f"{name} must be -1 (no bound) or at least 0, got {bound}")


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):  # None gets past the dispatcher
            _refuse(f"{name} must be a tensor, got {tensor}")
        if tensor.dim() != 4:
            _refuse(f"{name} must be [batch, seqlen, heads, head_dim], got {list(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            _refuse(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.device != query.device:
            _refuse(f"{name} must be on query's device {query.device}, got {tensor.device}")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            _refuse(
                f"{name} must have stride 1 in its last dimension, got {tensor.stride(3)}"
                f" ({name}.contiguous() makes it so)"
            )
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dtype not in (torch.float32, value.dtype):
            _refuse(
                f"{name} must be float32 or have value's dtype {value.dtype}, got {tensor.dtype}"
            )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    batch, _, heads_q, head_dim = query.shape
    heads_k = key.shape[2]
    if head_dim < 1:
        _refuse(f"query must have a head_dim of at least 1, got {list(query.shape)}")
    if heads_q < 1 or heads_k < 1 or heads_q % heads_k != 0:
        _refuse(
            f"query must have a multiple of key's heads, got {heads_q} heads for key's {heads_k}"
        )
    if key.shape[0] != batch or key.shape[3] != head_dim:
        _refuse(
            "key must be [query's batch, seqlen_k, num_heads_k, query's head_dim],"
            f" got {list(key.shape)}"
        )
    if value.shape != key.shape:
        _refuse(f"value must be shaped like key, got {list(value.shape)}")


def _check_lengths(query: Tensor, q_lens: Tensor | None, k_lens: Tensor | None) -> None:
    batch = query.shape[0]
    for name, lengths in (("q_lens", q_lens), ("k_lens", k_lens)):
        if lengths is None:
            continue
        if lengths.dim() != 1 or lengths.shape[0] != batch:
            _refuse(f"{name} must be [batch] = [{batch}], got {list(lengths.shape)}")
        if lengths.dtype not in (torch.int32, torch.int64):
            _refuse(f"{name} must be int32 or int64, got {lengths.dtype}")
        if lengths.device.type != "cpu" and lengths.device != query.device:
            _refuse(
                f"{name} must be on the CPU or on query's device {query.device},"
                f" got {lengths.device}"
            )


def _refuse(message: str) -> None:
    raise RuntimeError(f"wan_attn: {message}")
