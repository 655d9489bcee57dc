# SPDX-License-Identifier: Apache-2.0
"""test_diffusers_wan.py - diffusers' Wan transformer computes the same through wan_attn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wan_attn import attention
from wan_attn.integrations import diffusers_wan

diffusers = pytest.importorskip("diffusers", reason="needs the packages of the extra `demo`")

# float32 through two layers; a rotation or a head in the wrong place moves the output by some 0.1.
TOLERANCE = 2e-5


@pytest.fixture(params=["text", "text and image"])
def model(request: pytest.FixtureRequest) -> Any:
    has_image = request.param != "text"
    torch.manual_seed(1)
    made = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        image_dim=12 if has_image else None,
        added_kv_proj_dim=48 if has_image else None,
    ).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            # Gains of norms above 1 and gates open, or attention would hardly show.
            spread = 0.5 if weight.ndim > 1 else 0.2
            weight.normal_(1.5 if "norm" in name else 0.0, spread)
            if name.endswith("scale_shift_table"):
                weight += 0.5
    return made


def predict(model: Any) -> Tensor:
    torch.manual_seed(2)
    has_image = model.config.image_dim is not None
    with torch.no_grad():
        out: Tensor = model(
            hidden_states=torch.randn(2, 4, 3, 6, 10),
            timestep=torch.tensor([300, 700]),
            # With an image, diffusers expects exactly Wan's 512 text tokens.
            encoder_hidden_states=torch.randn(2, 512 if has_image else 20, 16),
            encoder_hidden_states_image=torch.randn(2, 7, 12) if has_image else None,
        ).sample
    return out


def assert_same(out: Tensor, stock: Tensor) -> None:
    scale = float(stock.abs().max())
    assert scale > 0.1
    assert float((out - stock).abs().max()) <= TOLERANCE * scale


@pytest.mark.parametrize("is_fused", [False, True])
def test_output_is_that_of_the_stock_processor(model: Any, is_fused: bool) -> None:
    stock = predict(model)
    if is_fused:
        model.fuse_qkv_projections()
    assert diffusers_wan.enable(model) == 4
    assert_same(predict(model), stock)


def test_every_call_goes_through_wan_attn(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    sdpa = attention.sdpa

    def counted(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        calls.append((query.shape[1], key.shape[1]))
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(attention, "sdpa", counted)
    diffusers_wan.enable(model)
    predict(model)
    tokens = 3 * 3 * 5
    layer = [(tokens, tokens), (tokens, 20)]
    if model.config.image_dim is not None:
        layer = [(tokens, tokens), (tokens, 512), (tokens, 7)]
    assert calls == layer * 2


def test_a_wrong_function_shows(model: Any) -> None:
    stock = predict(model)
    diffusers_wan.enable(model, lambda q, k, v: diffusers_wan.attend(1.05 * q, k, v))
    with pytest.raises(AssertionError):
        assert_same(predict(model), stock)


def test_disable_restores_the_very_processors(model: Any) -> None:
    before = dict(model.attn_processors)
    diffusers_wan.enable(model)
    assert diffusers_wan.enable(model) == 4, "twice is once"
    assert not set(map(id, model.attn_processors.values())) & set(map(id, before.values()))
    diffusers_wan.disable(model)
    diffusers_wan.disable(model)
    after = model.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert after.keys() == before.keys()


def test_other_models_are_refused() -> None:
    class Other:
        attn_processors: dict[str, object] = {"attn.processor": object()}

    with pytest.raises(TypeError, match="must be a WanTransformer3DModel .* got Other"):
        diffusers_wan.enable(Other())


def test_a_mask_is_refused(model: Any) -> None:
    diffusers_wan.enable(model)
    layer = model.blocks[0].attn1
    with pytest.raises(ValueError, match="attention_mask must be None"):
        layer(torch.zeros(1, 4, 48), None, torch.zeros(1, 1, 4, 4), None)
