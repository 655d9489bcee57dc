# SPDX-License-Identifier: Apache-2.0
"""diffusers_models.py - diffusers' Wan models and pipeline, tiny, random, and fed by a seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="needs the packages of the extra `demo`")

HEADS, HEAD_DIM = 2, 12
WIDTH = HEADS * HEAD_DIM
CHANNELS = 4
COMMON = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "out_channels": CHANNELS,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
IMAGE = {"image_dim": 12, "added_kv_proj_dim": WIDTH}
TEXT, IMAGE_TOKENS = 20, 7
WAN_TEXT = 512  # with an image, diffusers expects exactly Wan's number of text tokens


def draw(model: Any) -> Any:
    """Every weight anew: with the initial ones (gates closed, norms of 1) attention hardly shows"""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.5 if "norm" in name else 0.0, 0.5 if weight.ndim > 1 else 0.2)
            if name.endswith("scale_shift_table"):
                weight += 0.5
    return model.eval()


def _text() -> Any:
    model = diffusers.WanTransformer3DModel(in_channels=CHANNELS, **COMMON)
    inputs = {
        "hidden_states": torch.randn(2, CHANNELS, 3, 6, 10),
        "timestep": torch.tensor([300, 700]),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
    }
    return model, inputs


def _image() -> Any:
    model = diffusers.WanTransformer3DModel(in_channels=CHANNELS, **IMAGE, **COMMON)
    _, inputs = _text()
    inputs["encoder_hidden_states"] = torch.randn(2, WAN_TEXT, 16)
    inputs["encoder_hidden_states_image"] = torch.randn(2, IMAGE_TOKENS, 12)
    return model, inputs


def _vace() -> Any:
    model = diffusers.WanVACETransformer3DModel(
        in_channels=CHANNELS, vace_layers=[0, 1], vace_in_channels=12, **COMMON
    )
    _, inputs = _text()
    inputs["control_hidden_states"] = torch.randn(2, 12, 3, 6, 10)
    return model, inputs


def _animate() -> Any:
    model = diffusers.WanAnimateTransformer3DModel(
        in_channels=12,
        latent_channels=CHANNELS,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        **IMAGE,
        **COMMON,
    )
    inputs = {
        "hidden_states": torch.randn(1, 12, 6, 4, 4),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, WAN_TEXT, 16),
        "encoder_hidden_states_image": torch.randn(1, IMAGE_TOKENS, 12),
        "pose_hidden_states": torch.randn(1, CHANNELS, 5, 4, 4),
        "face_pixel_values": torch.randn(1, 3, 17, 16, 16),
    }
    return model, inputs


MODELS: dict[str, tuple[str, Callable[[], Any], int, list[tuple[int, int]]]] = {
    # name: (class, what makes it, attention layers, (seqlen_q, seqlen_k) of the calls of a forward)
    "text": ("WanTransformer3DModel", _text, 4, 2 * [(45, 45), (45, TEXT)]),
    "image": (
        "WanTransformer3DModel",
        _image,
        4,
        2 * [(45, 45), (45, WAN_TEXT), (45, IMAGE_TOKENS)],
    ),
    "vace": ("WanVACETransformer3DModel", _vace, 8, 4 * [(45, 45), (45, TEXT)]),
    "animate": (
        "WanAnimateTransformer3DModel",
        _animate,
        5,
        # The face block follows the first block: 24 tokens are 6 frames of 4, each with 3 motions.
        [
            *[(24, 24), (24, WAN_TEXT), (24, IMAGE_TOKENS)],
            (4, 3),
            *[(24, 24), (24, WAN_TEXT), (24, IMAGE_TOKENS)],
        ],
    ),
}


def make(name: str) -> tuple[Any, dict[str, Any]]:
    """(model, inputs); skips where this diffusers has no such model."""
    cls, build, _, _ = MODELS[name]
    if not hasattr(diffusers, cls):
        pytest.skip(f"diffusers {diffusers.__version__} has no {cls}")
    torch.manual_seed(2)
    model, inputs = build()
    return draw(model), inputs


def predict(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        # Animate adds the pose in place.
        copies = {name: value.clone() for name, value in inputs.items()}
        out: Tensor = model(**copies, return_dict=False)[0]
    return out


def pipeline(dtype: torch.dtype = torch.float32, layers: int = 2, experts: int = 1) -> Any:
    """A WanPipeline without text encoder: prompts come as embeddings, and latents go."""
    torch.manual_seed(2)
    options = COMMON | {"num_layers": layers}
    model, *others = (
        draw(diffusers.WanTransformer3DModel(in_channels=CHANNELS, **options))
        for _ in range(experts)
    )
    second = {"transformer_2": others[0].to(dtype), "boundary_ratio": 0.7} if others else {}
    return diffusers.WanPipeline(
        **second,
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=CHANNELS, num_res_blocks=0, dim_mult=[1, 1]
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=model.to(dtype),
    )


def denoise(pipe: Any, steps: int = 3, grid: tuple[int, int, int] = (3, 3, 5)) -> Tensor:
    """With guidance, of so many frames, rows and columns of tokens; the latents."""
    generator = torch.Generator().manual_seed(4)
    shape = (grid[0], 2 * grid[1], 2 * grid[2])
    dtype = pipe.transformer.dtype
    embeddings = torch.randn(2, 1, TEXT, 16, generator=generator, dtype=torch.float64).to(dtype)
    latents = torch.randn(1, CHANNELS, *shape, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {
        "prompt_embeds": embeddings[0],
        "negative_prompt_embeds": embeddings[1],
        "height": 8 * shape[1],
        "width": 8 * shape[2],
        "num_frames": 4 * shape[0] - 3,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "latents": latents.to(torch.float32),  # the pipeline keeps them so, whatever the model is
        "output_type": "latent",
        "return_dict": False,
    }
    known = inspect.signature(pipe.__call__).parameters
    pipe.set_progress_bar_config(disable=True)
    out: Tensor = pipe(**{name: value for name, value in options.items() if name in known})[0]
    return out
