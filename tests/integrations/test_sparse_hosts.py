# SPDX-License-Identifier: Apache-2.0
"""test_sparse_hosts.py - whole denoises with blocks left out, whose budget an independent dense
measurement in float64 finds kept in every layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import diffusers_models as models
import pytest
import torch
from torch import Tensor

import wan_attn
from wan_attn import sparse
from wan_attn.integrations import _places
from wan_attn.integrations import diffusers as host
from wan_attn.observe import place
from wan_attn.sparse import state

pytestmark = pytest.mark.usefixtures("native", "as_in_a_new_process")

GRID = (5, 12, 16)
STEPS, LAYERS, BUDGET = 10, 4, 0.05


@pytest.fixture
def pipe() -> Iterator[Any]:
    made = models.pipeline(layers=LAYERS)
    host.enable(made)
    yield made
    host.disable(made)


class Measured:
    """Every self-attention of a run, once more in float64: (layer, step) -> relative errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: dict[tuple[int | None, int | None], list[float]] = {}
        self._stock: Any = wan_attn.attention.sdpa
        monkeypatch.setattr(wan_attn.attention, "sdpa", self._sdpa)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        out = self._stock(query, key, value, **options)
        if query.shape == key.shape:
            q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
            want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            error = float((out.double() - want).norm() / want.norm())
            where = place.here(*query.shape[1:2], *key.shape[1:2])
            self.errors.setdefault((where.layer, where.step), []).append(error)
        return out


def test_a_denoise_keeps_the_budget(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = models.denoise(pipe, STEPS, GRID)
    measured = Measured(monkeypatch)
    with (
        sparse.use(budget=BUDGET, min_tokens=256) as used,
        caplog.at_level(logging.INFO, "wan_attn"),
    ):
        found = models.denoise(pipe, STEPS, GRID)
    assert len(measured.errors) == LAYERS * STEPS
    for (layer, step), errors in measured.errors.items():
        assert layer is not None and step is not None
        is_dense = layer == 0 or step < 0.2 * STEPS
        assert max(errors) < (1e-5 if is_dense else BUDGET), (layer, step)
    report = used.report()
    lossy = [one for one in report.layers if one["lossy_calls"]]
    assert lossy and all(one["layer"] > 0 for one in lossy)
    for one in lossy:
        assert min(one["densities"]) < 0.75 and 0 < one["largest_error"] <= BUDGET
        assert max(max(measured.errors[one["layer"], step]) for step in range(2, STEPS)) > 1e-5
    off = float((found - exact).norm() / exact.norm())
    assert 0 < off < 2 * BUDGET
    assert not [r for r in caplog.records if "no host tells" in r.message]
    assert torch.equal(models.denoise(pipe, STEPS, GRID), exact), "as before, once it is over"


def test_enable_asks_and_disable_ends_it(pipe: Any) -> None:
    exact = models.denoise(pipe, STEPS, GRID)
    host.enable(pipe, sparse={"budget": 0.1, "min_tokens": 256})
    first = state.uses.active
    assert first is not None and first.wishes.budget == 0.1
    found = models.denoise(pipe, STEPS, GRID)
    assert not torch.equal(found, exact)
    assert sum(layer["lossy_calls"] for layer in sparse.current_report().layers) > 0
    host.enable(pipe, sparse="near_exact")
    assert state.uses.active is not None and state.uses.active.wishes.mode == "near_exact"
    host.enable(pipe)
    assert state.uses.active is None
    host.enable(pipe, sparse="sparse")
    assert models.denoise(pipe, 2, GRID).isfinite().all(), "too few tokens: dense"
    host.disable(pipe)
    assert state.uses.active is None


@pytest.mark.parametrize("sparse_", ["best", 1, {"taus": 1}, {"mode": "best"}])
def test_enable_refuses(pipe: Any, sparse_: Any) -> None:
    host.disable(pipe)
    with pytest.raises(RuntimeError, match=r"^wan_attn: (mode|sparse) must be"):
        host.enable(pipe, sparse=sparse_)
    assert state.uses.active is None and host.disable(pipe) == 0
    with pytest.raises(RuntimeError, match="model_or_pipe must be"):
        host.enable(torch.nn.Linear(2, 2), sparse="sparse")
    assert state.uses.active is None


def test_grids() -> None:
    latents = torch.zeros(1, 16, 5, 24, 32)
    assert _places.patches(latents.shape, (1, 2, 2)) == (5, 12, 16)
    assert _places.patches(latents.shape[1:], [1, 2, 2]) == (5, 12, 16)
    assert _places.patches((3, 4), (1, 2, 2)) is None and _places.patches((3, 4, 5), None) is None


@pytest.mark.parametrize("name", ["text", "image", "vace", "animate"])
def test_each_model_tells_the_grid_of_its_self_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = models.make(name)
    host.enable(model)
    seen = []
    stock = wan_attn.attention.sdpa

    def look(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        where = place.here(query.shape[1], key.shape[1])
        if where.kind == "self" and where.layer is not None:
            grid = where.grid or (0, 0, 0)
            seen.append((query.shape[1], grid[0] * grid[1] * grid[2]))
        return stock(query, key, value, **options)

    monkeypatch.setattr(wan_attn.attention, "sdpa", look)
    with sparse.use():
        models.predict(model, inputs)
    assert seen and all(tokens == of_grid for tokens, of_grid in seen)
    assert place.here(9, 9).grid is None
