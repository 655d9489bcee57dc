# SPDX-License-Identifier: Apache-2.0
"""dense_error.py - what a run under wan_attn.precision is off by, from outside: every row of every
call against attention in float64. Shares nothing with how wan_attn measures itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

import oracle
from wan_attn.precision import Use, place
from wan_attn.precision.watch import Watch


class Error(NamedTuple):
    """One call: where it stood, whether a lossy row computed it, the relative L2 of each head."""

    where: place.Place
    is_lossy: bool
    heads: tuple[float, ...]


@contextmanager
def measured() -> Iterator[list[Error]]:
    """The calls made within it; those with NaN in their inputs are left out."""
    found: list[Error] = []
    run = Watch.run

    def watched(
        self: Watch, exact: Any, backend: str, request: Any, q: Any, k: Any, v: Any, call: Any
    ) -> Any:
        operands = [x.clone() for x in (q, k, v)]
        result = run(self, exact, backend, request, q, k, v, call)
        if all(bool(x.isfinite().all()) for x in operands):
            where = place.here(request.seqlen_q, request.seqlen_k)
            found.append(Error(where, bool(result[2]), _off(result[0], operands, call)))
        return result

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Watch, "run", watched)
        yield found


def agrees(found: list[Error], used: Use) -> None:
    """Every call is in the budget, and the report's figures are near these."""
    budget = used.report().found["budget"]
    assert found
    for one in found:
        assert max(one.heads) <= (budget if one.is_lossy else 1e-5), one
    for layer in used.report().layers:
        own = [
            max(one.heads)
            for one in found
            if one.is_lossy
            and (one.where.expert, one.where.layer) == (layer["expert"], layer["layer"])
        ]
        assert len(own) == layer["lossy_calls"] or layer["kind"] != "self"
        if layer["lossy_calls"]:
            assert 0.4 * min(own) <= layer["error"] <= 2.5 * max(own)


def _off(out: Any, operands: list[Any], call: Any) -> tuple[float, ...]:
    want, _ = oracle.attention(
        *operands,
        q_lens=call.q_lens,
        k_lens=call.k_lens,
        scale=call.scale,
        is_causal=call.is_causal,
        window=call.window,
    )
    error = oracle.as_float64(out) - want
    return tuple((_norm_of_heads(error) / _norm_of_heads(want)).tolist())


def _norm_of_heads(x: oracle.Array) -> oracle.Array:
    """[heads]: over samples, rows and channels."""
    return np.asarray(np.sqrt(np.square(x).sum(axis=(0, 1, 3))))
