# SPDX-License-Identifier: Apache-2.0
"""chunked.py - backend `chunked`: exact attention whose memory does not grow as the scores do.

Four ways, from the cheapest: `direct` (PyTorch's SDPA), `rows` (blocks of queries over all keys),
`chunked` (all queries over blocks of keys, joined by their log-sum-exp) and `ring` (_ring.py:
blocks of both).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

from wan_attn import config
from wan_attn.backends import _ring, _torch_kernels, torch_sdpa
from wan_attn.backends._common import empty_result, outside_autocast, with_all_batches
from wan_attn.request import Call, Request, check, gate, host_lengths, refuse

if TYPE_CHECKING:  # not every torch is built with it
    from torch.distributed import ProcessGroup

Result = tuple[Tensor, Tensor | None]

NAME = "chunked"
TITLE = "memory-bounded SDPA"

METHODS = ("auto", "direct", "rows", "chunked", "ring")
_OLD_NAMES = {"xformers": "rows"}  # which never used xformers
MAX_ELEMENTS = 1 << 25  # fp32 scores in one block: 128 MiB, some three times that with temporaries
MIN_BLOCK = 64  # rows or keys below which a block is too thin to be worth its launches
FUSED_ROWS = 1 << 14  # rows per call where a fused kernel stores no scores


def why_not(request: Request) -> str | None:
    """Why it cannot take this call; None: it can."""
    return "has no dropout" if request.dropout_p > 0 else None


def needed(request: Request, threshold: int) -> str | None:
    """Why this call should not go to PyTorch's SDPA as it is; None: it may.

    Args:
        threshold: query-key pairs, seqlen_q * seqlen_k, that are harmless anyway.
    """
    if request.seqlen_q * request.seqlen_k <= threshold or why_not(request) is not None:
        return None
    size = f"seqlen_q * seqlen_k = {request.seqlen_q * request.seqlen_k} > {threshold}"
    reason = torch_sdpa.needs_square_memory(request)
    if reason is not None:
        return f"{reason}, and {size} scores would be stored"
    if sys.platform == "win32" and request.device.type == "cuda" and not _torch_kernels.has_flash():
        return f"no flash kernel in PyTorch on Windows, and {size}"
    return None


def windows_flash_attention_wrapper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    method: str = "auto",
    threshold: int | None = None,
    max_elements: int = MAX_ELEMENTS,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention in bounded memory, where PyTorch has no kernel that would bound it.

    Named after the platform that needs it most, it runs on every device. Blocks are computed in
    float32 from the operands as they are and joined exactly (see wan_attn.merge_states).

    Args:
        query: [batch, seqlen_q, num_heads_q, head_dim], float16, bfloat16 or float32.
        key, value: [batch, seqlen_k, num_heads_k, head_dim]; num_heads_k divides num_heads_q.
        q_lens, k_lens: [batch] int32 or int64, on the CPU or the device; None: all.
        scale: of the scores; None: 1/sqrt(head_dim).
        is_causal, window: as in wan_attn.sdpa, aligned bottom-right.
        return_lse: also return the log-sum-exp.
        method: "direct", "rows", "chunked", "ring", or "auto": direct up to `threshold` pairs, rows
            where a fused kernel or enough memory serves it, else chunked, else ring. "xformers",
            the name of "rows" until 0.1, is still taken: it never used that library.
        threshold: query-key pairs; None: WAN_ATTN_CHUNK_THRESHOLD.
        max_elements: the most scores of one block, over batch and heads.
        group: with "ring", a torch.distributed group whose every rank holds an equal share of the
            tokens, in rank order: query, key and value are this rank's, lengths count all tokens.
            Keys and values travel round the ring; each rank gets the result of its queries.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim] in query's dtype; with return_lse also lse
        [batch, num_heads_q, seqlen_q] float32, natural log.

    Raises:
        RuntimeError: an argument breaks the contract; the message names it.
    """
    call = Call(
        q_lens=gate.lengths("q_lens", q_lens),
        k_lens=gate.lengths("k_lens", k_lens),
        scale=None if scale is None else gate.number("scale", scale),
        is_causal=gate.flag("is_causal", is_causal),
        window=gate.pair("window", window),
        return_lse=gate.flag("return_lse", return_lse),
    )
    if not isinstance(method, str) or method not in (*METHODS, *_OLD_NAMES):
        refuse("method", f"one of {', '.join(METHODS)}", gate.shown(method))
    method = _OLD_NAMES.get(method, method)
    max_elements = gate.integer("max_elements", max_elements, at_least=1)
    if threshold is not None:
        threshold = gate.integer("threshold", threshold, at_least=0)
    check(query, key, value, call)
    if group is None:  # with one, lengths count the tokens of all ranks
        host_lengths("q_lens", call.q_lens, query.shape[0], query.shape[1])
        host_lengths("k_lens", call.k_lens, key.shape[0], key.shape[1])
    if group is not None and method not in ("auto", "ring"):
        refuse("method", "ring where a group is given", repr(method))
    if threshold is None:
        threshold = config.current().chunk_threshold
    if group is not None:
        method = "ring"
    elif method == "auto":
        request = Request.from_tensors(query, key, value, call)
        method = choose_method(request, threshold, max_elements)
    out, lse = _attend(method, query, key, value, call, max_elements, group)
    return out if lse is None else (out, lse)


def choose_method(request: Request, threshold: int, max_elements: int) -> str:
    """The cheapest way that keeps the call's memory bounded."""
    if request.seqlen_q * request.seqlen_k <= threshold:
        return "direct"
    heads = max(1, request.batch * request.num_heads_q)
    has_masks = request.is_causal or request.window != (-1, -1)
    if torch_sdpa.needs_square_memory(request) is None:
        return "rows"
    if not has_masks and max_elements >= heads * request.seqlen_k * MIN_BLOCK:
        return "rows"
    return "chunked" if max_elements >= heads * request.seqlen_q * MIN_BLOCK else "ring"


def reads_float32(request: Request) -> bool:
    """Whether a float32 query and key beside a half value are read as they are."""
    method = choose_method(request, config.current().chunk_threshold, MAX_ELEMENTS)
    return method in ("chunked", "ring")


def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
    """windows_flash_attention_wrapper as a backend; see there and wan_attn.sdpa."""
    if call.dropout_p > 0:
        refuse("dropout_p", "0 for the memory-bounded wrapper", call.dropout_p)
    request = Request.from_tensors(query, key, value, call)
    method = choose_method(request, config.current().chunk_threshold, MAX_ELEMENTS)
    return _attend(method, query, key, value, call)


def _attend(
    method: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    max_elements: int = MAX_ELEMENTS,
    group: ProcessGroup | None = None,
) -> Result:
    if method == "direct":
        return torch_sdpa.run(query, key, value, call)
    query = with_all_batches(query, key, value, call.q_lens, call.k_lens)
    if method == "rows":
        return _by_rows(query, key, value, call, max_elements)
    batch, seqlen_q, heads, _ = query.shape
    per_head = max_elements // max(1, batch * heads)
    rows = max(1, seqlen_q) if method == "chunked" else max(1, int(per_head**0.5))
    keys = max(1, per_head // max(1, seqlen_q)) if method == "chunked" else rows
    with outside_autocast(query.device):
        return _ring.attend(query, key, value, call, rows, keys, group)


def _by_rows(query: Tensor, key: Tensor, value: Tensor, call: Call, max_elements: int) -> Result:
    """Rows are independent of each other: blocks of them, each over all keys, need no merging."""
    batch, seqlen_q, heads, _ = query.shape
    if call.is_causal or call.window != (-1, -1):
        return torch_sdpa.run(query, key, value, call)  # cuts masked calls into blocks itself
    request = Request.from_tensors(query, key, value, needs_grad=False)
    if torch_sdpa.needs_square_memory(request) is None:
        step = FUSED_ROWS
    else:
        step = max(1, max_elements // max(1, batch * heads * key.shape[1]))
    out, lse = empty_result(query, query.dtype, call.return_lse)
    key = key.to(value.dtype)  # once, and not for each block of rows
    for begin in range(0, seqlen_q, step):
        end = min(begin + step, seqlen_q)
        lens = None if call.q_lens is None else (call.q_lens - begin).clamp(0, end - begin)
        rows = query[:, begin:end]
        part, part_lse = torch_sdpa.run(rows, key, value, call._replace(q_lens=lens))
        out[:, begin:end].copy_(part)
        if lse is not None and part_lse is not None:
            lse[:, :, begin:end].copy_(part_lse)
    return out, lse
