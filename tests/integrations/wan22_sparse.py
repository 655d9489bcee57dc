# SPDX-License-Identifier: Apache-2.0
"""wan22_sparse.py - a denoise by stock Wan2.2's models with blocks left out, beside one without.

Part of wan22_worker.py's process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import wan22_models
import wan22_precision
from torch import Tensor
from wan22_harness import redraw

from wan_attn import config, sparse
from wan_attn.integrations import wan22
from wan_attn.observe import place

SHAPE = (3, 32, 40)  # of latents: 3 x 16 x 20 tokens
BUDGET = 0.05


def left_out() -> dict[str, Any]:
    """What the test judges: errors of every self-attention in float64, the report, the grids."""
    wan22.patch()
    from wan.modules import model as stock

    small = wan22_models.SMALL | {"num_layers": wan22_precision.LAYERS}
    models: list[Any] = [redraw(stock.WanModel(model_type="t2v", **small)) for _ in range(2)]
    exact = wan22_precision.denoise(models, SHAPE)
    errors: dict[str, float] = {}
    grids: set[str] = set()
    ours = stock.flash_attention

    def measured(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        where = place.here(q.shape[1], k.shape[1])
        out: Tensor = ours(q, k, v, *args, **options)
        if where.kind == "self":
            grids.add(str(where.grid))
            query, key, value = (x.to(v.dtype).double().transpose(1, 2) for x in (q, k, v))
            want = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            off = float((out.double().transpose(1, 2) - want).norm() / want.norm())
            name = f"{where.expert} {where.layer} {where.step}"
            errors[name] = max(off, errors.get(name, 0.0))
        return out

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("WAN_ATTN_TUNE", "off")
        config.refresh()
        monkeypatch.setattr(stock, "flash_attention", measured)
        with sparse.use(budget=BUDGET, min_tokens=256) as used:
            found = wan22_precision.denoise(models, SHAPE)
    config.refresh()
    result = {
        "errors": errors,
        "grids": sorted(grids),
        "off": float((found - exact).norm() / exact.norm()),
        "layers": used.report().layers,
        "text": used.report().as_text(),
        "exact again": torch.equal(wan22_precision.denoise(models, SHAPE), exact),
    }
    wan22.unpatch()
    return result
