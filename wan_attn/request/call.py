# SPDX-License-Identifier: Apache-2.0
"""call.py - one attention call: its arguments, what selection sees of it, and its rules.

The rules and their words are those of csrc/core/check.c, which owns them for calls that reach C.
They are here again for calls that do not: fake tensors, wan_attn.sdpa's first call of a kind, and
machines without the native library. tests/test_refusals.py compares them. Knows no backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_attn.request import gate, transforms
from wan_attn.request.gate import refuse, refuse_having
from wan_attn.workloads import Workload

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of query, key and value
MAX_HEAD_DIM = 256  # of every fused kernel: ours, FlashAttention's, PyTorch's

# The dtypes that csrc/core/check.c knows by name.
_DTYPE_WORDS = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (*DTYPES, torch.int32, torch.int64, torch.float64)
}
_MAX_ELEMENTS = 1 << 48


class Call(NamedTuple):
    """One call's arguments beside query, key and value: what every backend is given.

    Attributes:
        q_lens, k_lens: [batch] real lengths, int32 or int64, on the CPU or the device; None: all.
        scale: multiplies the scores; None: 1/sqrt(head_dim).
        is_causal, window: masks, aligned bottom-right; window is (left, right), -1 is no bound.
        dropout_p: probability, already 0 where grad is disabled.
        return_lse: the log-sum-exp is wanted too.
        dtype: what to compute in where value is not half; None: in value's.
        version: of FlashAttention: 2 leaves version 3 out.
        out_dtype: of the result; None: query's as it was given.
    """

    q_lens: Tensor | None = None
    k_lens: Tensor | None = None
    scale: float | None = None
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0
    return_lse: bool = False
    dtype: torch.dtype | None = None
    version: int | None = None
    out_dtype: torch.dtype | None = None


PLAIN = Call()


@dataclass(frozen=True, slots=True)
class Request:
    """One call's shapes, dtypes and wishes, without its tensors; hashable.

    Attributes:
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim: sizes; seqlens are the padded
            ones.
        dtype: what is computed in (value's dtype after the dtype policy).
        query_dtype, key_dtype: what query and key arrive in: `dtype`, or float32 which a backend
            may read directly.
        device: where query, key and value live.
        is_causal, window, dropout_p, return_lse: as in Call.
        has_q_lens, has_k_lens: whether real lengths come with the call.
        needs_grad: autograd will ask for a gradient.
        has_block_lists, pools_others, skip_threshold: as in Blocks.
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
    has_block_lists: bool = False
    pools_others: bool = False
    skip_threshold: float = 0.0

    @classmethod
    def of(
        cls,
        workload: Workload,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        qk_dtype: torch.dtype | None = None,
        **flags: Any,
    ) -> Request:
        """A call of these sizes that need not exist.

        Args:
            workload: its sizes, by name or from text (see workloads.py).
            dtype: what is computed in; qk_dtype: of query and key, None: the same.
            flags: any of is_causal, window, has_q_lens, has_k_lens, needs_grad, dropout_p,
                return_lse, has_block_lists, pools_others and skip_threshold.
        """
        w, qk_dtype = workload, qk_dtype or dtype
        return cls(
            *(w.batch, w.seqlen_q, w.seqlen_k, w.num_heads_q, w.num_heads_k, w.head_dim),
            *(dtype, qk_dtype, qk_dtype),
            torch.device(device),
            **flags,
        )

    @classmethod
    def from_tensors(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: Call = PLAIN,
        *,
        needs_grad: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> Request:
        """Describe a call, after checking everything about it that needs no tensor data.

        Args:
            query: [batch, seqlen_q, num_heads_q, head_dim].
            key, value: [batch, seqlen_k, num_heads_k, head_dim].
            needs_grad: None: found out from grad mode and the tensors.
            dtype: what will be computed in; None: value's dtype.

        Raises:
            RuntimeError: an argument breaks the contract; the message names it, the rule and what
                was given.
        """
        check(query, key, value, call)
        if needs_grad is None:
            needs_grad = wants_grad(query, key, value)
        batch, seqlen_q, num_heads_q, head_dim = query.shape
        return cls(
            *(batch, seqlen_q, key.shape[1], num_heads_q, key.shape[2], head_dim),
            *(value.dtype if dtype is None else dtype, query.dtype, key.dtype),
            query.device,
            is_causal=bool(call.is_causal),
            window=(int(call.window[0]), int(call.window[1])),
            has_q_lens=call.q_lens is not None,
            has_k_lens=call.k_lens is not None,
            needs_grad=needs_grad,
            dropout_p=float(call.dropout_p),
            return_lse=bool(call.return_lse),
        )


def wants_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether autograd would record this call."""
    return torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (
            transforms.innermost_transform() is not None
            and transforms.wants_grad_below(query, key, value)
        )
    )


def empty_lse(query: Tensor, return_lse: bool) -> Tensor:
    """[batch, num_heads_q, seqlen_q] float32, uninitialised; batch 0 where it is not wanted, as a
    schema cannot return an optional tensor that can be traced. `query` may be fake."""
    batch, seqlen_q, heads, _ = query.shape
    return query.new_empty((batch if return_lse else 0, heads, seqlen_q), dtype=torch.float32)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    *,
    takes_any_strides: bool = False,
    takes_any_float: bool = False,
) -> None:
    """Raise RuntimeError for the first broken rule that can be told without tensor data.

    Shapes may be symbolic. The order is that of csrc/core/check.c.

    Args:
        takes_any_strides: the caller will make the last dimension contiguous.
        takes_any_float: the caller will convert the operands to what is computed in.
    """
    _check_operands(query, key, value, takes_any_strides, takes_any_float)
    transforms.without_tangent(query=query, key=key, value=value)
    _check_shapes(query, key, value)
    check_scale(call.scale)
    if len(call.window) != 2:
        refuse("window", "a pair (left, right)", call.window)
    for name, bound in zip(("window_left", "window_right"), call.window, strict=True):
        if bound < -1:
            refuse(name, "-1 (no bound) or at least 0", bound)
    _check_lengths("q_lens", call.q_lens, query)
    _check_lengths("k_lens", call.k_lens, query)
    if not 0.0 <= call.dropout_p < 1.0:
        refuse("dropout_p", "in [0, 1)", call.dropout_p)


def check_dense(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise RuntimeError where an operand is no tensor, or none that lies in memory by strides."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        gate.dense(name, tensor)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError for an operand that cannot be converted to what is computed in."""
    if not tensor.is_floating_point():
        refuse(name, "of a floating-point dtype", tensor.dtype)


def check_scale(scale: float | None) -> None:
    """Raise RuntimeError for a scale that is no number to compute with."""
    if scale is not None and not math.isfinite(scale):
        refuse("scale", "finite", f"{scale:g}")


def dtype_word(dtype: torch.dtype) -> str:
    """A dtype as refusals name it."""
    return _DTYPE_WORDS.get(dtype, "another dtype")


def _check_operands(
    query: Tensor, key: Tensor, value: Tensor, takes_any_strides: bool, takes_any_float: bool
) -> None:
    check_dense(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            refuse(name, "[batch, seqlen, heads, head_dim]", shape_text(tensor))
        if takes_any_float:
            check_floating(name, tensor)
        elif tensor.dtype not in DTYPES:
            refuse(name, "float32, float16 or bfloat16", dtype_word(tensor.dtype))
        sizes = [max(size, 1) for size in tensor.shape if isinstance(size, int)]
        if len(sizes) == 4 and math.prod(sizes) > _MAX_ELEMENTS:  # a stride of 0 makes it possible
            refuse_having(name, "at most 2^48 elements", shape_text(tensor))
        if not takes_any_strides and tensor.shape[3] > 1 and tensor.stride(3) != 1:
            got = f"{tensor.stride(3)} ({name}.contiguous() makes it so)"
            refuse_having(name, "stride 1 in its last dimension", got)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.device != query.device:
            refuse(name, f"on query's device {query.device}", tensor.device)
    for name, tensor in (("query", query), ("key", key)):
        if not takes_any_float and tensor.dtype not in (torch.float32, value.dtype):
            rule = f"value's dtype {dtype_word(value.dtype)}"
            if value.dtype == torch.float32:
                refuse_having(name, rule, dtype_word(tensor.dtype))
            refuse(name, f"float32 or have {rule}", dtype_word(tensor.dtype))


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    batch, _, heads_q, head_dim = query.shape
    heads_k = key.shape[2]
    if head_dim < 1:
        refuse_having("query", "a head_dim of at least 1", shape_text(query))
    if heads_q < 1 or heads_k < 1 or heads_q % heads_k != 0:
        got = f"{heads_q} heads for key's {heads_k}"
        refuse_having("query", "a multiple of key's heads", got)
    expected = f"[{batch}, {key.shape[1]}, {heads_k}, {head_dim}]"
    if key.shape[0] != batch or key.shape[3] != head_dim:
        rule = "[query's batch, seqlen_k, num_heads_k, query's head_dim]"
        refuse("key", f"{rule} = {expected}", shape_text(key))
    if value.shape != key.shape:
        refuse("value", f"shaped like key = {expected}", shape_text(value))


def _check_lengths(name: str, lengths: Tensor | None, query: Tensor) -> None:
    if lengths is None:
        return
    gate.dense(name, lengths)
    if lengths.dim() != 1 or lengths.shape[0] != query.shape[0]:
        refuse(name, f"[batch] = [{query.shape[0]}]", shape_text(lengths))
    if lengths.dtype not in (torch.int32, torch.int64):
        refuse(name, "int32 or int64", dtype_word(lengths.dtype))
    if lengths.device.type != "cpu" and lengths.device != query.device:
        refuse(name, f"on the CPU or on query's device {query.device}", lengths.device)


def shape_text(tensor: Tensor) -> str:
    """As csrc/core/check.c writes it: [2, 3], or [1, 2, 3, 4, ...] (5 dimensions)."""
    if tensor.dim() <= 4:
        return str(list(tensor.shape))
    first = ", ".join(str(size) for size in tensor.shape[:4])
    return f"[{first}, ...] ({tensor.dim()} dimensions)"


def host_lengths(name: str, lengths: Tensor | None, batch: int, seqlen: int) -> list[int] | None:
    """The real lengths as Python integers; None where reading them would sync (on a device), or
    where each sample of a torch.func.vmap has others, which are checked together.

    Raises:
        RuntimeError: a length lies outside [0, seqlen]. Those on a device are clamped where used.
    """
    if lengths is None:
        return [seqlen] * batch
    if lengths.device.type != "cpu":
        return None
    is_transformed = transforms.innermost_transform() is not None and transforms.is_transformed(
        lengths
    )
    # A subclass that computes its own operators holds its numbers elsewhere.
    if type(lengths).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        refuse(name, "a tensor whose numbers can be read", gate.kind_of(lengths))
    values: list[int] = (
        transforms.untransformed(lengths).flatten() if is_transformed else lengths
    ).tolist()
    for index, length in enumerate(values):
        if not 0 <= length <= seqlen:
            rule = f"between 0 and the padded length {seqlen}"
            refuse(name, rule, f"{length} for sample {index}")
    return None if is_transformed else values
