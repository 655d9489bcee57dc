# SPDX-License-Identifier: Apache-2.0
"""test_flash_attn_begins.py - packed sequences that begin anywhere, and those that have no key."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import wan_attn
from calls import F32, operands


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("begins_q", "begins_k"),
    [([3, 9], [2, 11]), ([0, 9], [5, 12]), ([4, 4], [1, 9]), ([2, 5, 9], [1, 4, 11])],
    ids=["both", "keys", "no_row", "two"],
)
def test_sequences_that_begin_behind_the_first_token(
    is_compiled: bool, begins_q: list[int], begins_k: list[int]
) -> None:
    """A slice of cu_seqlens with the whole q, k and v: flash-attn computes those sequences."""
    q, k, v = (x[0] for x in operands(1, 10, 12, heads_q=2, heads_k=2, dtype=F32))
    cu_q, cu_k = (torch.tensor(b, dtype=torch.int32) for b in (begins_q, begins_k))

    def packed(*x: Any) -> Any:
        function: Any = wan_attn.flash_attn_varlen_func
        return function(*x, causal=True, return_attn_probs=True)

    torch.compiler.reset()
    function = torch.compile(packed, backend="eager", fullgraph=True) if is_compiled else packed
    out, lse, _ = function(q, k, v, cu_q, cu_k, 10, 12)
    want = torch.zeros_like(q)
    want_lse = torch.full((2, 10), -torch.inf)
    for q_part, k_part in zip(
        itertools.pairwise(begins_q), itertools.pairwise(begins_k), strict=True
    ):
        rows, columns = slice(*q_part), slice(*k_part)
        one = (q[rows][None], k[columns][None], v[columns][None])
        part, part_lse = wan_attn.sdpa(*one, is_causal=True, return_lse=True)
        want[rows], want_lse[:, rows] = part[0], part_lse[0]
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("longest", [0, 3])
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_sequence_has_a_key_where_sizes_are_symbols(longest: int, tokens: int) -> None:
    torch.compiler.reset()
    function = torch.compile(
        wan_attn.flash_attn_varlen_func, backend="eager", dynamic=True, fullgraph=True
    )
    q, kv = torch.randn(9, 2, 16), torch.randn(tokens, 2, 16, requires_grad=True)
    nothing = torch.zeros(3, dtype=torch.int32)
    out: Any = function(q, kv, kv, torch.tensor([0, 4, 9], dtype=torch.int32), nothing, 5, longest)
    assert torch.equal(out, torch.zeros_like(q))
    out.sum().backward()
    assert kv.grad is not None and not kv.grad.any()
