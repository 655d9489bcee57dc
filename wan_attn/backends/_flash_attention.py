# SPDX-License-Identifier: Apache-2.0
"""_flash_attention.py - what the FlashAttention 2 and 3 adapters share; imports neither of them.

Their varlen functions take the real tokens of all samples end to end ("packed"), so padding is
never read, and lengths on a device cost no sync: packing them is a sort whose size does not depend
on the lengths.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from wan_attn.backends._common import capability, empty_result, in_graph
from wan_attn.request import MAX_HEAD_DIM, Call, Request, host_lengths
from wan_attn.transient import is_transient

NOT_INSTALLED = "not installed"

_pad = torch._C._nn.pad  # as SDPA in _torch_kernels.py: nobody else's function


def load(*names: str, functions: Iterable[str] = ()) -> tuple[ModuleType | None, str]:
    """The first module of these that is installed, with these functions, or None and why not.

    A package that is installed but broken (a DLL or symbol missing, built for another torch) raises
    ImportError or OSError, and sometimes worse: that is its reason, never our crash.
    """
    for name in names:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):
                return None, f"{name} is installed but broken: {error}"
        except Exception as error:  # noqa: BLE001 - foreign code that runs at import
            if is_transient(error):
                raise
            return None, f"{name} is installed but broken: {type(error).__name__}: {error}"
        else:
            missing = [one for one in functions if not callable(getattr(module, one, None))]
            return (
                (None, f"{name} is installed but has no {missing[0]}") if missing else (module, "")
            )
    return None, NOT_INSTALLED


def common_why_not(request: Request) -> str | None:
    """What both refuse, told without importing either."""
    if request.device.type != "cuda":
        return f"needs a CUDA device, the call is on {request.device.type}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"computes float16 and bfloat16, not {str(request.dtype).removeprefix('torch.')}"
    if request.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {request.head_dim}"
    if request.needs_grad and request.return_lse:
        return "its log-sum-exp has no gradient"
    if capability(request.device) is None:
        return "needs a CUDA device, and there is none"
    return None


@dataclass(frozen=True, slots=True)
class Packed:
    """The real tokens of a batch end to end, and how to put a result back.

    Attributes:
        tokens: [total, heads, head_dim]; for lengths on a device total is the padded one and what
            lies behind the last real token is zero.
        cu_seqlens: [batch + 1] int32 on the tokens' device: where each sample begins.
        lengths: the real lengths, None if they live on a device.
        order: [batch * seqlen] where each token came from, for lengths on a device.
        is_real: [batch * seqlen] bool, likewise.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    lengths: list[int] | None
    order: Tensor | None = None
    is_real: Tensor | None = None


def pack(name: str, x: Tensor, lengths: Tensor | None) -> Packed:
    """Pack x [batch, seqlen, heads, head_dim]; `name` is the argument that `lengths` came as."""
    batch, seqlen = x.shape[:2]
    host = host_lengths(name, lengths, batch, seqlen)
    if host is None and lengths is not None:
        return _pack_on_device(x, lengths)
    host = host or []
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device="cpu")
    torch.cumsum(torch.tensor(host, device="cpu"), 0, dtype=torch.int32, out=cu_seqlens[1:])
    if host == [seqlen] * batch:
        tokens = x.flatten(0, 1)
    else:
        tokens = torch.cat([x[b, :length] for b, length in enumerate(host)])
    return Packed(tokens, cu_seqlens.to(x.device, non_blocking=True), host)


def _pack_on_device(x: Tensor, lengths: Tensor) -> Packed:
    batch, seqlen = x.shape[:2]
    lengths = lengths.clamp(0, seqlen)
    is_real = (torch.arange(seqlen, device=x.device) < lengths.unsqueeze(1)).flatten()
    order = torch.argsort(is_real.to(torch.uint8), descending=True, stable=True)
    tokens = x.flatten(0, 1).index_select(0, order)
    # Behind the last real token may lie NaN, and a kernel's last tile may reach there.
    tokens = tokens.masked_fill(~is_real[order].view(-1, 1, 1), 0)
    cu_seqlens = _pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Packed(tokens, cu_seqlens, None, order, is_real)


def unpack(
    packed: Packed, out: Tensor, lse: Tensor | None, shape: torch.Size
) -> tuple[Tensor, Tensor | None]:
    """Put a packed result back, rows beyond the lengths being 0 and -inf.

    Args:
        packed: of query.
        out: [total, heads, head_dim]; lse: [heads, total] or None.
        shape: query's, [batch, seqlen_q, heads, head_dim].
    """
    batch, seqlen, heads, head_dim = shape
    if packed.order is not None and packed.is_real is not None:
        is_real = packed.is_real.view(-1, 1, 1)
        back = torch.empty_like(packed.order).scatter_(
            0, packed.order, torch.arange(batch * seqlen, device=out.device)
        )
        out = out.index_select(0, back).masked_fill(~is_real, 0).view(shape)
        if lse is not None:
            lse = lse.index_select(1, back).masked_fill(~packed.is_real, -math.inf)
            lse = lse.view(heads, batch, seqlen).transpose(0, 1)
        return out, lse
    lengths = packed.lengths or []
    if lengths == [seqlen] * batch:
        if lse is not None:
            lse = lse.view(heads, batch, seqlen).transpose(0, 1)
        return out.view(shape), lse
    padded = out.new_zeros(shape)
    padded_lse = None if lse is None else lse.new_full((batch, heads, seqlen), -math.inf)
    begin = 0
    for b, length in enumerate(lengths):
        padded[b, :length] = out[begin : begin + length]
        if lse is not None and padded_lse is not None:
            padded_lse[b, :, :length] = lse[:, begin : begin + length]
        begin += length
    return padded, padded_lse


def attend(
    library: Library, query: Tensor, key: Tensor, value: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by `library`, giving it real tokens only.

    Args:
        query: [batch, seqlen_q, num_heads_q, head_dim] in value's dtype, as are key and value.

    Returns:
        out like query, and lse [batch, num_heads_q, seqlen_q] float32 or None.
    """
    batch, seqlen_q = query.shape[:2]
    q_host = host_lengths("q_lens", call.q_lens, batch, seqlen_q)
    k_host = host_lengths("k_lens", call.k_lens, batch, key.shape[1])
    sees_nothing = 0 in query.shape or 0 in key.shape
    if sees_nothing or (q_host and not any(q_host)) or (k_host and not any(k_host)):
        out, lse = empty_result(query, query.dtype, call.return_lse)
        return in_graph(out, query, key, value), lse
    if q_host and k_host and len(set(q_host)) == 1 and len(set(k_host)) == 1:
        q_len, k_len = q_host[0], k_host[0]
        out, lse = library.dense(
            query[:, :q_len], key[:, :k_len], value[:, :k_len], call.return_lse
        )
        if q_len < seqlen_q:
            out = _pad(out, (0, 0, 0, 0, 0, seqlen_q - q_len))
            if lse is not None:
                lse = _pad(lse, (0, seqlen_q - q_len), "constant", -math.inf)
    else:
        q, k = pack("q_lens", query, call.q_lens), pack("k_lens", key, call.k_lens)
        v = pack("k_lens", value, call.k_lens)
        max_q = seqlen_q if q_host is None else max(q_host)
        max_k = key.shape[1] if k_host is None else max(k_host)
        out, lse = library.packed(q, k, v, max_q, max_k, call.return_lse)
        out, lse = unpack(q, out, None if lse is None else by_total(lse, q), query.shape)
    # FlashAttention 2 reports +inf for a row without a key; the contract says -inf.
    return out, None if lse is None else lse.masked_fill(lse == math.inf, -math.inf)


class Library(Protocol):
    """One FlashAttention, called with what both versions understand."""

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Tensors [batch, seqlen, heads, head_dim]; lse [batch, heads, seqlen_q]."""

    def packed(
        self, q: Packed, k: Packed, v: Packed, max_q: int, max_k: int, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Out [total, heads, head_dim]; lse [heads, total], or padded as before 2.7."""


def by_total(lse: Tensor, packed: Packed) -> Tensor:
    """[heads, total] from what varlen returns: that, or [batch, heads, max_seqlen] before 2.7."""
    if lse.ndim == 2:
        return lse
    if packed.lengths is None:
        raise RuntimeError("this FlashAttention pads its lse, which lengths on a device forbid")
    return torch.cat([lse[b, :, :length] for b, length in enumerate(packed.lengths)], dim=1)


def unpack_result(result: object, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, lse) from out alone, or from a tuple that begins with out and lse."""
    if isinstance(result, Tensor):
        if return_lse:
            raise RuntimeError("the log-sum-exp was asked for and did not come")
        return result, None
    if not isinstance(result, tuple | list) or not isinstance(result[0], Tensor):
        raise RuntimeError(f"a tensor or a tuple of tensors was expected, got {type(result)}")
    lse = result[1] if return_lse and len(result) > 1 else None
    if return_lse and not isinstance(lse, Tensor):
        raise RuntimeError("the log-sum-exp was asked for and did not come")
    return result[0], lse
