# SPDX-License-Identifier: Apache-2.0
"""transformers_models.py - tiny random models of transformers, and what goes into them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the packages of the extra `demo`")

VOCABULARY, LENGTH = 99, 10

LANGUAGE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
TEXT = {
    **{name: LANGUAGE[name] for name in LANGUAGE if name != "num_key_value_heads"},
    "max_position_embeddings": 32,
    "projection_dim": 8,
    "eos_token_id": 2,
}
VISION = {  # head_dim 80, as in Wan's CLIP
    "hidden_size": 160,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
UMT5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

LANGUAGE_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2 sliding": ("Qwen2Config", "Qwen2ForCausalLM", SLIDING),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 5}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 8, "sliding_window": 4}),
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip vision": ("CLIPVisionConfig", "CLIPVisionModel", VISION),
    "clip text": ("CLIPTextConfig", "CLIPTextModel", TEXT),
    "siglip vision": ("SiglipVisionConfig", "SiglipVisionModel", VISION),
    "siglip text": ("SiglipTextConfig", "SiglipTextModel", TEXT),
    "dinov2": ("Dinov2Config", "Dinov2Model", VISION | {"mlp_ratio": 2}),
}
UNABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "softcap": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        LANGUAGE | {"head_dim": 8, "attn_logit_softcapping": 2.0},
    ),
    "s_aux": (
        "GptOssConfig",
        "GptOssForCausalLM",
        LANGUAGE
        | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
    ),
    "position_bias": ("UMT5Config", "UMT5EncoderModel", UMT5),
}


def make(config_class: str, model_class: str, options: dict[str, Any], attention: str) -> Any:
    """The same weights at every call; skips where this transformers has no such model."""
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**copy.deepcopy(options))
    model = getattr(transformers, model_class)._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for weight in model.parameters():
            # Scores of some size, or attention is an average of everything.
            weight.normal_(0, 0.3 if weight.ndim > 1 else 0.1)
    return model.eval()


def make_language_model(name: str, attention: str) -> Any:
    config_class, model_class, options = LANGUAGE_MODELS[name]
    return make(config_class, model_class, LANGUAGE | options, attention)


def tokens(side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask) of three prompts of 10, 7 and 4 tokens, padded on this side or not at all."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if side != "none":
        for row, length in ((1, 7), (2, 4)):
            mask[row, slice(length, None) if side == "right" else slice(None, LENGTH - length)] = 0
    if side == "right":
        ids[torch.arange(3), mask.sum(1) - 1] = 2  # where CLIP looks for the sentence
    return ids.masked_fill(mask == 0, 0), mask


def encode(model: Any, name: str) -> Tensor:
    """What comes out of an encoder, for two pictures or three padded sentences."""
    if name.endswith("text"):
        ids, mask = tokens("right")
        inputs = {"input_ids": ids, "attention_mask": mask}
    else:
        generator = torch.Generator().manual_seed(6)
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    with torch.no_grad():
        out = model(**inputs)
    return torch.cat([out.last_hidden_state.flatten(), out.pooler_output.flatten()])


def make_qwen_vl() -> tuple[Any, dict[str, Tensor]]:
    """Qwen2.5-VL, which extends Wan's prompts: (model, a sentence with a picture in it)."""
    image, start, end = 90, 91, 92
    text = LANGUAGE | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=93,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3 if weight.ndim > 1 else 0.1)
    ids = torch.randint(3, image, (1, 24))
    ids[0, 2], ids[0, 3:19], ids[0, 19] = start, image, end
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == image).long()
    return model, inputs


def say(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
    return out
