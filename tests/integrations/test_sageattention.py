# SPDX-License-Identifier: Apache-2.0
"""test_sageattention.py - the function with SageAttention's signature, against float64."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
import wan_attn
from calls import BF16, DTYPES, F32, NAMES, operands
from tolerances import assert_close_to_oracle
from wan_attn import log


@pytest.fixture(autouse=True)
def _say_again() -> None:
    log.forget()


def hnd(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def test_the_signature_is_sageattentions() -> None:
    """Recorded from sageattention/core.py of thu-ml/SageAttention, January 2026."""
    parameters = list(inspect.signature(wan_attn.sageattn).parameters.values())
    found = {p.name: p.default for p in parameters[:-1]}
    assert list(found) == "q k v tensor_layout is_causal sm_scale return_lse".split()
    assert list(found.values())[3:] == ["HND", False, None, False]
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("layout", ("HND", "NHD"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: NAMES[d])
def test_both_layouts(layout: str, dtype: torch.dtype) -> None:
    q, k, v = operands(2, 21, 40, heads_q=4, heads_k=2, dtype=dtype)
    given = hnd(q, k, v) if layout == "HND" else [q, k, v]
    sageattn: Any = wan_attn.sageattn
    out, lse = sageattn(*given, tensor_layout=layout, sm_scale=0.2, return_lse=True)
    assert out.shape == given[0].shape and out.dtype == dtype
    back = out.transpose(1, 2) if layout == "HND" else out
    assert_close_to_oracle(back, q, k, v, lse=lse, scale=0.2)
    alone = sageattn(*given, layout, False, 0.2)
    assert isinstance(alone, Tensor) and torch.allclose(alone, out, atol=1e-2)


@pytest.mark.parametrize("lengths", ((20, 20), (12, 20), (20, 12), (1, 9), (9, 1)))
def test_causal_begins_top_left(lengths: tuple[int, int]) -> None:
    """Row i sees keys up to i, as the original's kernels mask."""
    q, k, v = operands(1, *lengths)
    out, lse = wan_attn.sageattn(q, k, v, "NHD", is_causal=True, return_lse=True)
    i, j = np.arange(lengths[0])[:, None], np.arange(lengths[1])[None]
    for head in range(2):
        q64, k64, v64 = (oracle.as_float64(x[0, :, head]) for x in (q, k, v))
        want, want_lse = oracle.one_head(q64, k64, v64, 64**-0.5, j <= i)
        assert np.allclose(out[0, :, head], want, atol=1e-5)
        assert np.allclose(lse[0, head], want_lse, atol=1e-5)


class TestMask:
    """What the original's sageattn swallows without a word."""

    @pytest.mark.parametrize("layout", ("HND", "NHD"))
    @pytest.mark.parametrize("shape", ((9, 14), (2, 1, 9, 14), (2, 4, 9, 14), (1, 1, 1, 14)))
    def test_by_torch_with_a_reason(
        self, layout: str, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        q, k, v = operands(2, 9, 14, heads_q=4, heads_k=2)
        mask = torch.rand(shape) > 0.4
        given = hnd(q, k, v) if layout == "HND" else [q, k, v]
        sageattn: Any = wan_attn.sageattn
        with caplog.at_level(logging.INFO, "wan_attn"):
            for _ in range(2):
                out = sageattn(*given, tensor_layout=layout, attn_mask=mask)
        assert [r.getMessage() for r in caplog.records] == [
            "[Attention] Using PyTorch SDPA (attn_mask: a mask is given, and wan_attn's kernels"
            " know lengths, causal and window only)"
        ]
        assert isinstance(out, Tensor)
        back = out.transpose(1, 2) if layout == "HND" else out
        full = mask.broadcast_to(2, 4, 9, 14).numpy()
        for b in range(2):
            for h in range(4):
                parts = (q[b, :, h], k[b, :, h // 2], v[b, :, h // 2])
                exact_q, exact_k, exact_v = map(oracle.as_float64, parts)
                want, _ = oracle.one_head(exact_q, exact_k, exact_v, 64**-0.5, full[b, h])
                assert np.allclose(back[b, :, h], want, atol=1e-5)

    def test_added(self) -> None:
        q, k, v = hnd(*operands(1, 9, 14, dtype=BF16))
        bias = torch.randn(9, 14).masked_fill(torch.rand(9, 14) < 0.3, -torch.inf)
        bias[4] = -torch.inf
        out = wan_attn.sageattn(q, k, v, attn_mask=bias)
        assert isinstance(out, Tensor) and out.dtype == BF16
        assert not out[:, :, 4].any() and not out.isnan().any(), "a row without a key is 0"
        scores = (q.double() @ k.double().transpose(-1, -2)) / 8 + bias
        want = scores.softmax(-1).nan_to_num(0) @ v.double()
        assert torch.allclose(out.double(), want, atol=0.05)

    @pytest.mark.parametrize("option", ("is_causal", "return_lse"))
    def test_not_with(self, option: str) -> None:
        q, k, v = hnd(*operands())
        mask = torch.ones(17, 33, dtype=torch.bool)
        wanted: dict[str, Any] = {option: True}
        with pytest.raises(RuntimeError, match=f"attn_mask must be None with {option}"):
            wan_attn.sageattn(q, k, v, attn_mask=mask, **wanted)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (
                torch.ones(3, 33, dtype=torch.bool),
                r"broadcastable to \[1, 2, 17, 33\], got \[3, 33",
            ),
            (torch.ones(5, 1, 1, 17, 33, dtype=torch.bool), "broadcastable to"),
            (torch.ones(17, 33, dtype=torch.int64), "of dtype bool or floating, got torch.int64"),
            ([[True]], "a tensor or None, got list"),
        ],
    )
    def test_refused_by_name(self, mask: Any, message: str) -> None:
        q, k, v = hnd(*operands())
        with pytest.raises(RuntimeError, match=f"attn_mask must be {message}"):
            wan_attn.sageattn(q, k, v, attn_mask=mask)


def test_how_to_round_is_a_wish_that_exact_kernels_grant() -> None:
    q, k, v = hnd(*operands())
    out: Any = wan_attn.sageattn(
        q, k, v, smooth_k=False, pv_accum_dtype="fp32", qk_quant_gran="per_warp", dropout_p=0.0
    )
    want: Any = wan_attn.sageattn(q, k, v)
    assert torch.equal(out, want)


def test_an_unknown_keyword_is_an_error() -> None:
    q, k, v = hnd(*operands())
    with pytest.raises(TypeError, match="unexpected keyword argument 'attn_bias'; it knows smooth"):
        wan_attn.sageattn(q, k, v, attn_bias=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_layout": "BSHD"}, 'tensor_layout must be "HND" or "NHD", got \'BSHD\''),
        ({"dropout_p": 0.1}, "dropout_p must be 0, as SageAttention has no dropout, got 0.1"),
        ({"sm_scale": float("inf")}, "sm_scale must be finite"),
        ({"q": torch.ones(2, 3)}, r"q must be \[batch, heads, seqlen, head_dim\], got \[2, 3\]"),
        ({"v": None, "tensor_layout": "NHD"}, r"v must be \[batch, seqlen, heads, .* got NoneType"),
    ],
)
def test_refused_by_name(options: dict[str, Any], message: str) -> None:
    q, k, v = hnd(*operands())
    with pytest.raises(RuntimeError, match=f"wan_attn: {message}"):
        wan_attn.sageattn(**{"q": q, "k": k, "v": v} | options)


@pytest.mark.compile
@pytest.mark.parametrize("masked", (False, True))
def test_compiles_without_a_break(masked: bool) -> None:
    torch._dynamo.reset()
    mask = torch.rand(17, 33) > 0.5 if masked else None

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return wan_attn.sageattn(q * 2, k, v, smooth_k=False, attn_mask=mask)

    q, k, v = hnd(*operands(dtype=F32))
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(q, k, v), function(q, k, v), atol=1e-6)
    torch._dynamo.reset()
