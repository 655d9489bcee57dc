# SPDX-License-Identifier: Apache-2.0
"""_ring.py - attention as members of a ring who each hold some queries and pass blocks of keys on.

    turn 0            turn 1            turn 2          member m holds queries q_m throughout,
    q0 ← kv0          q0 ← kv1          q0 ← kv2        sees another block of keys each turn
    q1 ← kv1          q1 ← kv2          q1 ← kv0        and merges what it got into its state
    q2 ← kv2          q2 ← kv0          q2 ← kv1        (Liu et al., Ring Attention, arXiv
    2310.01889)

On one device all members are walked in turn; with a process group each rank is a member, and keys
and values travel while it computes. Both are the loop in attend().
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from wan_attn.backends._common import in_graph
from wan_attn.backends._masks import DeviceMask, HostMask
from wan_attn.merge import merge_states
from wan_attn.request import Call, host_lengths, refuse


@dataclass(frozen=True, slots=True)
class _Shard:
    """Keys and values [batch, keys, num_heads_k, head_dim] that begin at token `begin` of all."""

    begin: int
    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class _Visible:
    """Who sees what: on the host if lengths are known there, to skip blocks that no row sees."""

    device: DeviceMask
    hosts: tuple[HostMask, ...] | None
    is_full: bool

    def keys(self, begin: int, end: int, seqlen_k: int) -> tuple[int, int]:
        """The keys [lo, hi) outside of which no row of [begin, end) sees any."""
        if self.hosts is None:
            return 0, seqlen_k
        # Rows beyond a sample's length see nothing.
        rows = [(mask, min(end, mask.q_len)) for mask in self.hosts if begin < mask.q_len]
        ranges = [mask.keys(begin, last) for mask, last in rows]
        return min((r[0] for r in ranges), default=0), max((r[1] for r in ranges), default=0)


State = tuple[Tensor, Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    rows: int,
    keys: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention by blocks of at most `rows` queries and `keys` keys.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim] in query's dtype, and lse [batch, num_heads_q,
        seqlen_q] float32 or None.
    """
    batch, seqlen_q, heads, head_dim = query.shape
    rank, ranks = _place(query, group)
    visible = _see(query, key, call, ranks)
    scale = 1.0 / math.sqrt(head_dim) if call.scale is None else call.scale
    first = rank * seqlen_q
    is_real = visible.device.real_rows()[:, first : first + seqlen_q]
    if call.q_lens is not None:  # NaN beyond a length would reach key's and value's gradients
        query = query.masked_fill(~is_real, 0)
    members = [(b, min(b + rows, seqlen_q)) for b in range(0, seqlen_q, rows)]
    states: list[State | None] = [None] * len(members)
    for held in _turns(_Shard(rank * key.shape[1], key, value), len(members), keys, group):
        for m, (begin, end) in enumerate(members):
            block = query[:, begin:end]
            position = (first + begin, first + end)
            states[m] = _meet(states[m], block, position, held[m], keys, visible, scale)
    out = query.new_zeros(query.shape)
    lse = query.new_full((batch, heads, seqlen_q), -math.inf, dtype=torch.float32)
    for (begin, end), state in zip(members, states, strict=True):
        if state is not None:
            dead = ~is_real[:, begin:end]
            out[:, begin:end].copy_(state[0].masked_fill(dead, 0))
            lse[:, :, begin:end].copy_(state[1].masked_fill(dead.squeeze(-1).mT, -math.inf))
    out, lse = in_graph(out, query, key, value), in_graph(lse, query, key, value)
    return out, lse if call.return_lse else None


def _place(query: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(this rank, ranks) of the group."""
    if group is None:
        return 0, 1
    if torch.is_grad_enabled() and query.requires_grad:
        refuse("query", "without a gradient where a group is given", "requires_grad=True")
    return dist.get_rank(group), dist.get_world_size(group)


def _see(query: Tensor, key: Tensor, call: Call, ranks: int) -> _Visible:
    """The masks of the whole problem, of which query and key may be one rank's share."""
    batch, seqlen_q, seqlen_k = query.shape[0], query.shape[1] * ranks, key.shape[1] * ranks
    q_host = host_lengths("q_lens", call.q_lens, batch, seqlen_q)
    k_host = host_lengths("k_lens", call.k_lens, batch, seqlen_k)
    mask = DeviceMask.make(call, query, seqlen_k, seqlen_q)
    if q_host is None or k_host is None:
        return _Visible(mask, None, False)
    lengths = zip(q_host, k_host, strict=True)
    hosts = tuple(HostMask.make(q_len, k_len, call) for q_len, k_len in lengths)
    return _Visible(mask, hosts, all(m.is_full and m.k_len == seqlen_k for m in hosts))


def _turns(
    own: _Shard, members: int, keys: int, group: dist.ProcessGroup | None
) -> Iterator[Sequence[_Shard]]:
    """For each turn, the shard that each member holds."""
    if group is None:
        seqlen_k = own.key.shape[1]
        shards = [
            _Shard(begin, own.key[:, begin : begin + keys], own.value[:, begin : begin + keys])
            for begin in range(0, seqlen_k, keys)
        ]
        for turn in range(len(shards)):
            yield [shards[(m + turn) % len(shards)] for m in range(members)]
        return
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    share = own.key.shape[1]
    held = torch.stack((own.key, own.value))  # one message per turn; never the caller's memory
    for turn in range(ranks):
        coming = torch.empty_like(held)
        pending = _pass_on(held, coming, rank, ranks, group) if turn + 1 < ranks else []
        begin = (rank + turn) % ranks * share
        yield [_Shard(begin, held[0], held[1])] * members
        for work in pending:
            work.wait()
        held = coming


def _pass_on(
    held: Tensor, coming: Tensor, rank: int, ranks: int, group: dist.ProcessGroup
) -> list[dist.Work]:
    """Start sending what we hold to the rank before us and receiving from the one behind."""
    before = dist.get_global_rank(group, (rank - 1) % ranks)
    behind = dist.get_global_rank(group, (rank + 1) % ranks)
    return list(
        dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, held, before, group),
                dist.P2POp(dist.irecv, coming, behind, group),
            ]
        )
    )


def _meet(
    state: State | None,
    query: Tensor,
    position: tuple[int, int],
    shard: _Shard,
    keys: int,
    visible: _Visible,
    scale: float,
) -> State | None:
    """Merge what a block of queries gets from a shard into its state.

    Args:
        query: [batch, rows, num_heads_q, head_dim], at rows [begin, end) = position of all.
    """
    low, high = visible.keys(*position, visible.device.seqlen_k)
    for start in range(0, shard.key.shape[1], keys):
        begin = shard.begin + start
        end = min(begin + keys, shard.begin + shard.key.shape[1])
        if end <= low or begin >= high:
            continue
        part = slice(start, start + end - begin)
        got = _partial(
            query,
            shard.key[:, part],
            shard.value[:, part],
            None if visible.is_full else visible.device.block(*position, begin, end),
            None if visible.is_full else visible.device.real_keys()[:, begin:end],
            scale,
        )
        state = got if state is None else merge_states(*state, *got)
    return state


def _partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    is_real: Tensor | None,
    scale: float,
) -> State:
    """Softmax attention over one block of keys, in float32.

    Args:
        keep: bool [batch, 1, rows or 1, keys], True where seen; None: all.
        is_real: bool [batch, keys, 1, 1]: keys that exist; the others may hold NaN. None: all.

    Returns:
        out [batch, rows, num_heads_q, head_dim] and lse [batch, num_heads_q, rows], float32.
    """
    key, value = key.float(), value.float()
    if is_real is not None:
        key, value = key.masked_fill(~is_real, 0), value.masked_fill(~is_real, 0)
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
    rows = (query.float() * scale).transpose(1, 2)
    scores = torch.matmul(rows, key.permute(0, 2, 3, 1))
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    largest = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - largest.masked_fill(largest == -math.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    sees_none = total == 0
    total = total.masked_fill(sees_none, 1.0)
    out = torch.matmul(weights, value.transpose(1, 2)) / total
    lse = (largest + torch.log(total)).masked_fill(sees_none, -math.inf)
    return out.transpose(1, 2), lse.squeeze(-1)
