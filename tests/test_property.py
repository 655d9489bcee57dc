# SPDX-License-Identifier: Apache-2.0
"""test_property.py - generated calls over the whole contract, each held against the oracle.

HYPOTHESIS_PROFILE=explore draws new calls on every run; the default repeats the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import calls
import wan_attn
from calls import DTYPES, MIXED
from tolerances import assert_close_to_oracle

EXAMPLES = 250

ROWS = calls.rows()
LENGTHS = st.one_of(
    st.integers(0, 40), st.sampled_from((0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 129))
)
HEAD_DIMS = st.sampled_from((1, 2, 3, 7, 8, 16, 24, 32, 40, 64, 80, 96, 100, 128, 256))
LAYOUTS: st.SearchStrategy[Any] = st.sampled_from((torch.clone, *calls.LAYOUTS))
WINDOW_SIDES = st.one_of(st.just(-1), st.integers(0, 40), st.just(2**63 - 1))
# Times head_dim ** -0.5. Peakier calls are judged by many rows in test_kernels.py: a generated one
# may have a single number to show, and then twice the error of torch is a matter of luck.
SCALES = st.one_of(st.none(), st.sampled_from((0.0, 1.0)), st.floats(-2.0, 2.0))
POISONS = st.sampled_from((math.nan, math.inf, -math.inf))


@dataclass
class Call:
    row: Any
    tensors: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{list(t.shape)} {t.dtype} {t.stride()}" for t in self.tensors)
        return f"Call({calls.row_id(self.row)}: {shapes}, {self.options})"


@st.composite
def lengths(draw: st.DrawFn, batch: int, padded: int) -> Tensor | None:
    if draw(st.booleans()):
        return None
    values = draw(st.lists(st.integers(0, padded), min_size=batch, max_size=batch))
    return torch.tensor(values, dtype=draw(st.sampled_from((torch.int32, torch.int64))))


@st.composite
def legal_calls(draw: st.DrawFn, rows: list[Any]) -> Call:
    """Any call that the contract allows and one of these rows takes."""
    row = draw(st.sampled_from(rows))
    legal = [d for d in ((t, t, t) for t in DTYPES)] + list(MIXED)
    dtypes = draw(st.sampled_from([d for d in legal if d[2] in calls.dtypes_for(row)]))
    batch, seqlen_q, seqlen_k = draw(st.integers(0, 3)), draw(LENGTHS), draw(LENGTHS)
    heads_k = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    query, key, value = calls.operands(
        batch,
        seqlen_q,
        seqlen_k,
        heads_q=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=calls.head_dim_for(row, draw(HEAD_DIMS)),
        dtype=dtypes,
    )
    q_lens, k_lens = draw(lengths(batch, seqlen_q)), draw(lengths(batch, seqlen_k))
    poison = draw(POISONS)
    if q_lens is not None:
        query = calls.poisoned(query, q_lens.tolist(), poison)
    if k_lens is not None:
        key = calls.poisoned(key, k_lens.tolist(), poison)
        value = calls.poisoned(value, k_lens.tolist(), poison)
    tensors = tuple(draw(LAYOUTS)(t) for t in (query, key, value))
    scale = draw(SCALES)
    options = {
        "q_lens": q_lens,
        "k_lens": k_lens,
        "scale": None if scale is None else scale * query.shape[3] ** -0.5,
        "is_causal": draw(st.booleans()),
        "window": (draw(WINDOW_SIDES), draw(WINDOW_SIDES)),
    }
    return Call(row, tensors, options)


def test_generated_calls_match_the_oracle(record_property: Any) -> None:
    ran: dict[str, int] = {}

    @settings(max_examples=EXAMPLES)
    @given(call=legal_calls(ROWS))
    def run(call: Call) -> None:
        calls.check(call.row, *call.tensors, **call.options)
        name = calls.row_id(call.row)
        event(name)
        ran[name] = ran.get(name, 0) + 1

    run()
    assert sum(ran.values()) >= 200
    each = ", ".join(f"{name} {n}" for name, n in sorted(ran.items()))
    summary = f"{sum(ran.values())} generated calls through the op, no mismatch ({each})"
    record_property("summary", summary)


def test_generated_calls_through_the_public_function(record_property: Any) -> None:
    """wan_attn.sdpa: whatever backend it chooses, the contract is the same."""
    ran = 0

    @settings(max_examples=60)
    @given(call=legal_calls([None]), return_lse=st.booleans())
    def run(call: Call, return_lse: bool) -> None:
        nonlocal ran
        ran += 1
        if return_lse:
            out, lse = wan_attn.sdpa(*call.tensors, **call.options, return_lse=True)
        else:
            out, lse = wan_attn.sdpa(*call.tensors, **call.options), None
        assert_close_to_oracle(out, *call.tensors, lse=lse, **call.options)

    run()
    record_property("summary", f"{ran} generated calls through wan_attn.sdpa, no mismatch")


def test_generated_merges() -> None:
    """Attention over two parts of the keys, merged, is attention over all of them."""

    @settings(max_examples=40)
    @given(
        seqlen_q=st.integers(1, 20),
        seqlen_k=st.integers(0, 50),
        at=st.integers(0, 50),
        seed=st.integers(0, 2**32 - 1),
        poison=POISONS,
    )
    def run(seqlen_q: int, seqlen_k: int, at: int, seed: int, poison: float) -> None:
        torch.manual_seed(seed)
        at = min(at, seqlen_k)
        query, key, value = calls.operands(2, seqlen_q, seqlen_k, heads_q=2, head_dim=16)
        k_lens = torch.tensor([seqlen_k, seqlen_k // 2])
        key, value = (calls.poisoned(x, k_lens.tolist(), poison) for x in (key, value))
        first, second = k_lens.clamp(max=at), (k_lens - at).clamp(min=0)
        out, lse = wan_attn.merge_states(
            *wan_attn.sdpa(query, key[:, :at], value[:, :at], k_lens=first, return_lse=True),
            *wan_attn.sdpa(query, key[:, at:], value[:, at:], k_lens=second, return_lse=True),
        )
        assert_close_to_oracle(out, query, key, value, lse=lse, k_lens=k_lens)

    run()
