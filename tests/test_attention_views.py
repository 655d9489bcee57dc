# SPDX-License-Identifier: Apache-2.0
"""Views whose rows share memory, as sliding windows have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wan_attn


@pytest.mark.parametrize("strides", [(1, 32, 16, 1), (0, 1, 16, 1)])
def test_rows_that_overlap_are_converted(strides: tuple[int, ...], caplog: Any) -> None:
    """Converting keeps the order of strides, and the kernels want the last one to be 1."""
    q, k, _ = (torch.randn(2, 7, 2, 16) for _ in range(3))
    v = torch.randn(2000).as_strided(q.shape, strides)
    out = wan_attn.flash_attention(q, k, v)
    assert torch.equal(out, wan_attn.flash_attention(q, k, v.contiguous()))
    assert "failed at run time" not in caplog.text
