# SPDX-License-Identifier: Apache-2.0
"""_varlen.py - attention over packed sequences (cu_seqlens), by the call that takes padded ones.

Two routes, the same result:

=====  ===========================================================================================
views  cu_seqlens are known here: each run of sequences with the same lengths is one call on a view
       [sequences, length, heads, head_dim] of the packed tensors. No copy of an operand; the parts
       of the result are joined, which is one copy of it.
pad    cu_seqlens live on a device, or something traces: q, k and v are gathered into [batch,
       max_seqlen, ...], computed with real lengths, and gathered back. Nothing is read from the
       device. It costs batch · max_seqlen / total of the packed memory, and a pass over that, for
       one sequence as well: where it begins is not known here. Where the call ends in
       FlashAttention, that packs them again: who has it had better call it directly.
=====  ===========================================================================================
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wan_attn.request import Call, gate, refuse, transforms
from wan_attn.selection.traced import route

# More runs than this are padded instead, if that no more than doubles the memory: a call costs some
# ten microseconds at any size.
RUNS_MAX = 32


@dataclass(frozen=True, slots=True)
class Sequences:
    """Packed tokens and where their sequences lie.

    Attributes:
        tokens: [total, heads, head_dim].
        begins: [batch + 1] int32 or int64, on the CPU or on the tokens' device.
        batch: how many there are; a field, as torch 2.4's tracer cannot branch on a property.
        longest: no sequence is longer.
        lengths: the real lengths, None where they may not be read.
        first: where the first sequence begins, 0 where that may not be read.
    """

    tokens: Tensor
    begins: Tensor
    batch: int
    longest: int
    lengths: list[int] | None
    first: int = 0

    @classmethod
    def of(cls, side: str, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Sequences:
        """From flash-attn's arguments, checked; `side` is "q" or "k".

        Raises:
            RuntimeError: one does not fit; contents are checked where they are on the CPU.
        """
        name, limit = f"cu_seqlens_{side}", f"max_seqlen_{side}"
        operand = "query" if side == "q" else "key"
        gate.dense(operand, tokens)
        if tokens.dim() != 3:
            refuse(operand, "[total, heads, head_dim]", list(tokens.shape))
        gate.dense(name, cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            refuse(name, "[batch + 1]", list(cu_seqlens.shape))
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            refuse(name, "int32 or int64", cu_seqlens.dtype)
        if cu_seqlens.device.type != "cpu" and cu_seqlens.device != tokens.device:
            refuse(name, f"on the CPU or on {operand}'s device", cu_seqlens.device)
        longest = gate.integer(limit, max_seqlen, at_least=0)
        lengths, first = None, 0
        if _may_read(cu_seqlens):
            lengths = _lengths(name, limit, cu_seqlens, tokens.shape[0], longest)
            first = int(cu_seqlens[0])
        return cls(tokens, cu_seqlens, cu_seqlens.shape[0] - 1, longest, lengths, first)

    def real_lengths(self) -> Tensor:
        """[batch] int64 where begins are, at most longest."""
        return (self.begins[1:] - self.begins[:-1]).to(torch.int64).clamp(0, self.longest)

    def padded(self, tokens: Tensor) -> Tensor:
        """[batch, longest, heads, head_dim] of tokens [total, ...]; padding holds anything."""
        shape = (self.batch, self.longest, *tokens.shape[1:])
        if tokens.shape[0] == 0 or self.longest == 0:  # nothing to gather, which tracers refuse
            return tokens.new_zeros(shape) + tokens[:0].sum()  # of tokens' graph
        begins = self.begins[:-1].to(device=tokens.device, dtype=torch.int64, non_blocking=True)
        within = torch.arange(self.longest, device=tokens.device)
        index = (begins.unsqueeze(1) + within).clamp(0, tokens.shape[0] - 1)
        return tokens.index_select(0, index.flatten()).view(shape)


class _Run(NamedTuple):
    """Neighbouring sequences with the same lengths."""

    sequences: int
    q_len: int
    k_len: int


def attend(
    queries: Sequences, keys: Sequences, values: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    """Attention of each sequence over its own keys.

    Args:
        values: [total_k, heads_k, head_dim], in the sequences of `keys`.
        call: without lengths.

    Returns:
        out [total_q, heads_q, head_dim], and lse [heads_q, total_q] float32 or None.
    """
    if queries.batch != keys.batch:
        rule = f"[batch + 1] = [{queries.batch + 1}] like cu_seqlens_q"
        refuse("cu_seqlens_k", rule, list(keys.begins.shape))
    gate.dense("value", values)
    if values.shape != keys.tokens.shape:
        refuse("value", "shaped like key", list(values.shape))
    if queries.lengths is None or keys.lengths is None:
        return _by_padding(queries, keys, values, call)
    pairs = zip(queries.lengths, keys.lengths, strict=True)
    runs = [_Run(len(list(run)), *pair) for pair, run in itertools.groupby(pairs)]
    room = queries.batch * (queries.longest + keys.longest)
    if len(runs) > RUNS_MAX and room <= 2 * (sum(queries.lengths) + sum(keys.lengths)):
        return _by_padding(queries, keys, values, call)
    return _by_views(runs, queries, keys, values, call)


def _by_views(
    runs: list[_Run], queries: Sequences, keys: Sequences, value: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    query, key = queries.tokens, keys.tokens
    outs, lses = [], []
    q_end, k_end = queries.first, keys.first
    if q_end:
        outs.append(query.new_zeros((q_end, *query.shape[1:])))
        lses.append(_no_key(query, q_end))
    for number, q_len, k_len in runs:
        q_begin, q_end = q_end, q_end + number * q_len
        k_begin, k_end = k_end, k_end + number * k_len
        operands = [
            query[q_begin:q_end].unflatten(0, (number, q_len)),
            key[k_begin:k_end].unflatten(0, (number, k_len)),
            value[k_begin:k_end].unflatten(0, (number, k_len)),
        ]
        out, lse = route(operands, call)
        outs.append(out.flatten(0, 1))
        if lse is not None:
            lses.append(lse.transpose(0, 1).flatten(1))
    rest = query.shape[0] - q_end
    if rest or not outs:
        outs.append(query.new_zeros((rest, *query.shape[1:])))
        lses.append(_no_key(query, rest))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if not call.return_lse:
        return out, None
    return out, lses[0] if len(lses) == 1 else torch.cat(lses, dim=1)


def _by_padding(
    queries: Sequences, keys: Sequences, values: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    total, heads, _ = queries.tokens.shape
    if queries.batch == 0 or queries.longest == 0 or total == 0:
        lse = _no_key(queries.tokens, total) if call.return_lse else None
        return torch.zeros_like(queries.tokens), lse
    out, lse = route(
        [queries.padded(queries.tokens), keys.padded(keys.tokens), keys.padded(values)],
        call._replace(q_lens=queries.real_lengths(), k_lens=keys.real_lengths()),
    )
    begins = queries.begins.to(device=out.device, dtype=torch.int64, non_blocking=True)
    token = torch.arange(total, device=out.device)
    sequence = torch.searchsorted(begins.contiguous(), token, right=True) - 1
    is_inside = (sequence >= 0) & (sequence < queries.batch)
    sequence = sequence.clamp(0, queries.batch - 1)
    position = token - begins.index_select(0, sequence)
    is_inside = is_inside & (position < queries.longest)
    index = sequence * queries.longest + position.clamp(0, queries.longest - 1)
    out = out.flatten(0, 1).index_select(0, index).masked_fill(~is_inside.view(-1, 1, 1), 0)
    if lse is None:
        return out, None
    lse = lse.transpose(0, 1).flatten(1).index_select(1, index)
    return out, lse.masked_fill(~is_inside, -math.inf)


def _no_key(query: Tensor, total: int) -> Tensor:
    """The lse of tokens that belong to no sequence."""
    return query.new_full((query.shape[1], total), -math.inf, dtype=torch.float32)


def _may_read(cu_seqlens: Tensor) -> bool:
    """Whether the numbers can be read at no cost: on the CPU, and nothing traces or wraps them."""
    return (
        not torch.compiler.is_compiling()
        and type(cu_seqlens) is Tensor
        and cu_seqlens.device.type == "cpu"
        and not transforms.is_transformed(cu_seqlens)
    )


def _lengths(name: str, limit: str, cu_seqlens: Tensor, total: int, longest: int) -> list[int]:
    begins: list[int] = cu_seqlens.tolist()
    if begins[0] < 0:
        refuse(name, "a list of begins, of which the first is at least 0", begins[0])
    if begins[-1] > total:
        refuse(name, f"at most the number of tokens, {total}", begins[-1])
    lengths = [end - begin for begin, end in itertools.pairwise(begins)]
    for index, length in enumerate(lengths):
        if length < 0:
            refuse(name, "non-decreasing", f"{begins[index]}, {begins[index + 1]}")
        if length > longest:
            refuse(limit, f"at least the length of sequence {index}, {length}", longest)
    return lengths
