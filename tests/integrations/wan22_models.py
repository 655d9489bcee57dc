# SPDX-License-Identifier: Apache-2.0
"""wan22_models.py - stock Wan2.2's models, small, with random weights, each run once.

Every function here builds one model the way its pipeline does and returns its output as one tensor.
Which attention runs is the caller's business.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from wan22_harness import CpuAutocast, redraw

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {
    "text_len": 24,
    "dim": 256,
    "ffn_dim": 256,
    "freq_dim": 32,
    "text_dim": 48,
    "num_heads": 2,
    "num_layers": 2,
}
# Two videos of different size, padded to a length that neither has: 72 and 30 tokens in 80.
VIDEOS = ((3, 8, 12), (2, 6, 10))
SEQ_LEN = 80


class Random:
    """Tensors that depend on nothing but the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _flat(outputs: list[Tensor]) -> Tensor:
    return torch.cat([output.float().flatten() for output in outputs])


def wan_model() -> Any:
    from wan.modules.model import WanModel

    return redraw(WanModel(model_type="t2v", **SMALL))


def _wan_model_inputs() -> dict[str, Any]:
    random = Random(1)
    return {
        "x": [random(16, *size) for size in VIDEOS],
        "t": torch.tensor([[700.0], [300.0]]).expand(2, SEQ_LEN),
        "context": [random(24, 48), random(9, 48)],
        "seq_len": SEQ_LEN,
    }


def wan_model_as_shipped() -> Tensor:
    """Float32 weights under bf16 autocast: q, k float32, v bf16, 30 of 80 keys in one sample."""
    with CpuAutocast(BF16):
        return _flat(wan_model()(**_wan_model_inputs()))


def wan_model_converted() -> Tensor:
    """--convert_model_dtype: bf16 weights."""
    with CpuAutocast(BF16):
        return _flat(wan_model().to(BF16)(**_wan_model_inputs()))


def wan_model_float32() -> Tensor:
    """No autocast at all: q, k, v float32."""
    return run(wan_model())


def run(model: Any) -> Tensor:
    """wan_model(), or what was made of it, once."""
    return _flat(model(**_wan_model_inputs()))


def clip() -> Tensor:
    """CLIP's vision tower at its own odd head_dim of 80, 257 tokens, float16."""
    from wan.modules.animate.clip import VisionTransformer

    model = redraw(VisionTransformer(224, 14, 160, 2, 32, 2, 3)).to(F16)
    with CpuAutocast(F16):
        return _flat([model(Random(2)(2, 3, 224, 224).to(F16), use_31_block=True)])


def clip_pool() -> Tensor:
    """CLIP's attention pool: one query, expanded over the batch without a copy."""
    from wan.modules.animate.clip import AttentionPool

    with CpuAutocast(BF16):
        return _flat([redraw(AttentionPool(160, 2, 2))(Random(3)(3, 33, 160))])


def s2v() -> Tensor:
    """Speech to video: attention over video, reference and motion; audio injected per frame."""
    return _s2v(is_parallel=False)


def s2v_ulysses() -> Tensor:
    """The same, sequence parallel; needs a process group."""
    return _s2v(is_parallel=True)


def _s2v(is_parallel: bool) -> Tensor:
    from wan.modules.s2v.model_s2v import WanModel_S2V, sp_attn_forward_s2v

    model = WanModel_S2V(
        cond_dim=16,
        audio_dim=32,
        num_audio_token=3,
        audio_inject_layers=[0, 1],
        enable_motioner=False,
        zero_timestep=True,
        **SMALL,
    )
    if is_parallel:
        for block in model.blocks:
            block.self_attn.forward = types.MethodType(sp_attn_forward_s2v, block.self_attn)
        model.use_context_parallel = True
    random = Random(4)
    with CpuAutocast(BF16):
        return _flat(
            redraw(model)(
                x=[random(16, 3, 8, 8)],
                t=torch.tensor([500.0]),
                context=[random(11, 48)],
                seq_len=48,
                ref_latents=[random(16, 1, 8, 8)],
                motion_latents=[random(16, 2, 8, 8)],
                cond_states=[random(16, 3, 8, 8)],
                audio_input=random(1, 25, 32, 12),
                motion_frames=[8, 2],
            )
        )


def s2v_motioner() -> Tensor:
    """The motion encoder; its frame-wise variants run with rope stubbed, as theirs is broken."""
    from wan.modules.s2v import motioner

    random = Random(5)
    model = motioner.MotionerTransformers(
        dim=128, ffn_dim=128, num_heads=2, num_layers=1, motion_token_num=16
    )
    rope = motioner.rope_apply
    outputs = []
    with CpuAutocast(BF16):
        outputs.append(redraw(model)([random(16, 2, 8, 8)]))
        motioner.rope_apply = lambda x, *args, **kwargs: x.float()
        try:
            for kind in (motioner.SwinSelfAttention, motioner.CasualSelfAttention):
                grid = torch.tensor([[6, 3, 3]])
                outputs.append(redraw(kind(128, 2))(random(1, 54, 128), None, grid, None))
        finally:
            motioner.rope_apply = rope
    return _flat(outputs)


class _Motion(torch.nn.Module):
    """In place of the 512x512 face encoder, which has no attention and most of the work."""

    def get_motion(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :512]


def animate() -> Tensor:
    """Animate: image cross-attention over 257 tokens, and face blocks through flash_attn_func."""
    from wan.modules.animate import model_animate

    generator = model_animate.Generator
    model_animate.Generator = lambda **kwargs: _Motion()
    try:
        model = model_animate.WanAnimateModel(in_dim=16, **{**SMALL, "num_layers": 5})
    finally:
        model_animate.Generator = generator
    random = Random(6)
    with CpuAutocast(BF16):
        return _flat(
            redraw(model)(
                x=[random(16, 2, 8, 8)],
                t=torch.tensor([500.0]),
                clip_fea=random(1, 257, 1280),
                context=[random(11, 48)],
                seq_len=32,
                pose_latents=[random(16, 1, 8, 8)],
                face_pixel_values=random(1, 3, 4, 16, 16),
            )
        )


def wan_model_ulysses() -> Tensor:
    """Sequence parallel, as the pipelines set it up; needs a process group."""
    from wan.distributed.sequence_parallel import sp_attn_forward, sp_dit_forward

    model = wan_model()
    for block in model.blocks:
        block.self_attn.forward = types.MethodType(sp_attn_forward, block.self_attn)
    model.forward = types.MethodType(sp_dit_forward, model)
    with CpuAutocast(BF16):
        return _flat(model(**_wan_model_inputs()))


PIECES = {
    function.__name__: function
    for function in (
        wan_model_as_shipped,
        wan_model_converted,
        wan_model_float32,
        clip,
        clip_pool,
        s2v,
        s2v_motioner,
        animate,
    )
}
