# SPDX-License-Identifier: Apache-2.0
"""request.py - one attention call as plain values, for selection; knows no backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from wan_attn.contract import check_call


@dataclass(frozen=True, slots=True)
class Request:
    """One call's shapes, dtypes and wishes; hashable, so that a choice can be cached by it.

    Attributes:
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim: sizes; seqlens are the padded
            ones.
        dtype: what is computed in (value's dtype after the dtype policy).
        query_dtype, key_dtype: what query and key arrive in: `dtype`, or float32 which a backend
            may read directly.
        device: where query, key and value live.
        is_causal, window: masks, aligned bottom-right per sample; window is (left, right), -1 is
            unlimited.
        has_q_lens, has_k_lens: whether real lengths come with the call.
        needs_grad: autograd will ask for a gradient.
        dropout_p: probability, already 0 where grad is disabled.
        return_lse: the log-sum-exp is wanted too.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_k: int
    head_dim: int
    dtype: torch.dtype
    query_dtype: torch.dtype
    key_dtype: torch.dtype
    device: torch.device
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    has_q_lens: bool = False
    has_k_lens: bool = False
    needs_grad: bool = False
    dropout_p: float = 0.0
    return_lse: bool = False

    @classmethod
    def from_tensors(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        q_lens: Tensor | None = None,
        k_lens: Tensor | None = None,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        dropout_p: float = 0.0,
        return_lse: bool = False,
        needs_grad: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> Request:
        """Describe a call, after checking everything about it that needs no tensor data.

        Args:
            query: [batch, seqlen_q, num_heads_q, head_dim].
            key, value: [batch, seqlen_k, num_heads_k, head_dim].
            q_lens, k_lens: [batch] int32 or int64, on the CPU or on query's device; None: all.
            needs_grad: None: found out from grad mode and the tensors.
            dtype: what will be computed in; None: value's dtype.

        Raises:
            RuntimeError: an argument breaks the contract; the message names it, the rule and what
                was given.
        """
        check_arguments(query, key, value, q_lens, k_lens, window, dropout_p)
        if needs_grad is None:
            needs_grad = wants_grad(query, key, value)
        batch, seqlen_q, num_heads_q, head_dim = query.shape
        return cls(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=key.shape[1],
            num_heads_q=num_heads_q,
            num_heads_k=key.shape[2],
            head_dim=head_dim,
            dtype=value.dtype if dtype is None else dtype,
            query_dtype=query.dtype,
            key_dtype=key.dtype,
            device=query.device,
            is_causal=bool(is_causal),
            window=(int(window[0]), int(window[1])),
            has_q_lens=q_lens is not None,
            has_k_lens=k_lens is not None,
            needs_grad=needs_grad,
            dropout_p=float(dropout_p),
            return_lse=bool(return_lse),
        )


def wants_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether autograd would record this call."""
    return torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    window: tuple[int, int],
    dropout_p: float,
) -> None:
    """Raise RuntimeError where the call breaks a rule that needs no tensor data to be told."""
    operands = (("query", query), ("key", key), ("value", value))
    for name, tensor in (*operands, ("q_lens", q_lens), ("k_lens", k_lens)):
        if not isinstance(tensor, Tensor) and (
            tensor is not None or name in ("query", "key", "value")
        ):
            refuse(name, "a torch.Tensor", type(tensor).__name__)
    if len(window) != 2:
        refuse("window", "a pair (left, right)", window)
    check_call(query, key, value, q_lens, k_lens, None, window[0], window[1])
    for name, lengths in (("q_lens", q_lens), ("k_lens", k_lens)):
        if lengths is not None and lengths.device.type != "cpu" and lengths.device != query.device:
            refuse(name, "on the CPU or on query's device", lengths.device)
    if not 0.0 <= dropout_p < 1.0:
        refuse("dropout_p", "in [0, 1)", dropout_p)


def refuse(argument: str, rule: str, got: object) -> NoReturn:
    """Raise the error of a broken rule; torch.ops.wan_attn.sdpa words its errors the same way."""
    raise RuntimeError(f"wan_attn: {argument} must be {rule}, got {got}")


def host_lengths(name: str, lengths: Tensor | None, batch: int, seqlen: int) -> list[int] | None:
    """The real lengths as Python integers; None if they live on a device: reading would sync.

    Raises:
        RuntimeError: a length lies outside [0, seqlen]. Lengths on a device are clamped instead,
            where they are used.
    """
    if lengths is None:
        return [seqlen] * batch
    if lengths.device.type != "cpu":
        return None
    values: list[int] = lengths.tolist()
    for index, length in enumerate(values):
        if not 0 <= length <= seqlen:
            rule = f"between 0 and the padded length {seqlen}"
            refuse(name, rule, f"{length} for sample {index}")
    return values
