# SPDX-License-Identifier: Apache-2.0
"""test_result_layout.py - results are contiguous where the originals' are: callers `.view` them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import wan_attn
from calls import operands
from wan_attn.integrations import wan2gp

BATCH, SEQLEN, HEADS = 2, 6, 3
BEGINS = torch.tensor([0, SEQLEN, 2 * SEQLEN], dtype=torch.int32)


def _packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    q, k, v = _packed(q, k, v)
    return wan_attn.flash_attn_varlen_func(q, k, v, BEGINS, BEGINS, SEQLEN, SEQLEN, **options)


def _sage(layout: str) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        q, k, v = (x.transpose(1, 2) if layout == "HND" else x for x in (q, k, v))
        return wan_attn.sageattn(q, k, v, tensor_layout=layout, **options)

    return call


def _pay(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    def pay_attention() -> None:
        """Wan2GP's own, which nothing here reaches."""

    return wan2gp.make_pay_attention(pay_attention)([q, k, v], **options)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "func": wan_attn.flash_attn_func,
    "kvpacked": lambda q, k, v, **o: wan_attn.flash_attn_kvpacked_func(
        q, torch.stack((k, v), 2), **o
    ),
    "qkvpacked": lambda q, k, v, **o: wan_attn.flash_attn_qkvpacked_func(
        torch.stack((q, k, v), 2), **o
    ),
    "varlen": _varlen,
    "varlen qkvpacked": lambda q, k, v, **o: wan_attn.flash_attn_varlen_qkvpacked_func(
        torch.stack(_packed(q, k, v), 1), BEGINS, SEQLEN, **o
    ),
    "sage HND": _sage("HND"),
    "sage NHD": _sage("NHD"),
    "Wan": wan_attn.flash_attention,
    "Wan2GP": _pay,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "inference": {},
    "gradient": {},
    "head_dim 264": {},
    "causal": {"causal": True},
    "dropout": {"dropout_p": 0.25},
    "lse": {"return_attn_probs": True},
    "lse gradient": {"return_attn_probs": True},
}


@pytest.mark.parametrize("kind", [*OPTIONS, "mask"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_contiguous(function: str, kind: str) -> None:
    options = dict(OPTIONS.get(kind, {}))
    if function.startswith("sage"):
        options = {{"causal": "is_causal", "return_attn_probs": "return_lse"}.get(k, k): o
                   for k, o in options.items()}  # fmt: skip
        if kind == "mask":
            options["attn_mask"] = torch.rand(SEQLEN, SEQLEN) > 0.3
    is_unknown = kind == "mask" and not function.startswith("sage")
    is_unknown |= kind == "dropout" and function.startswith("sage")
    if is_unknown or (kind.startswith("lse") and function.startswith("Wan")):
        pytest.skip("the original has no such argument")
    head_dim = 264 if kind == "head_dim 264" else 16
    q, k, v = operands(BATCH, SEQLEN, SEQLEN, heads_q=HEADS, head_dim=head_dim)
    for operand in (q, k, v):
        operand.requires_grad_("gradient" in kind or kind == "dropout")
    results = FUNCTIONS[function](q, k, v, **options)
    for result in results if isinstance(results, tuple) else (results,):
        if result is not None:
            assert result.is_contiguous(), (list(result.shape), result.stride())
            result.view(-1)
