# SPDX-License-Identifier: Apache-2.0
"""workloads.py - the calls of Wan2.2, MiniMax-H3 and encoders beside them, by name or as text.

Plain numbers: no torch, no device. Used by `doctor`, `why`, benchmarks and tests, so that all of
them mean the same thing by "TI2V-5B at 720p".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

TEXT_TOKENS = (
    512  # Wan2.2 attends to all 512 text positions, padding included: zero rows pass the text MLP
)
# MiniMax-H3 attends to text, audio and video packed into one sequence without a mask: what users of
# it measure, by 50 layers of 56 heads.
H3_TOKENS = (32_700, 38_222, 79_567, 104_050)
IMAGE_TOKENS = 257  # CLIP ViT-H/14 at 224x224: 256 patches and the class token


@dataclass(frozen=True)
class Model:
    """One Wan2.2 transformer: what decides the shapes of its attention calls."""

    name: str
    title: str
    num_heads: int
    head_dim: int
    layers: int
    stride_time: int  # frames per latent frame
    stride_space: int  # pixels per latent pixel (VAE)
    patch: int = 2  # latent pixels per token and side

    def tokens(self, width: int, height: int, frames: int) -> int:
        """Length of self-attention: latent frames times patches of a latent frame."""
        cell = self.stride_space * self.patch
        if width < cell or height < cell or width % cell or height % cell:
            raise ValueError(
                f"width and height must be positive multiples of {cell} for {self.name}, "
                f"got {width}x{height}"
            )
        if frames < 1 or (frames - 1) % self.stride_time:
            raise ValueError(f"frames must be {self.stride_time}*n + 1, got {frames}")
        return ((frames - 1) // self.stride_time + 1) * (height // cell) * (width // cell)


@dataclass(frozen=True)
class Workload:
    """One attention call: batch, real lengths, heads; one forward of the model makes `calls`."""

    name: str
    title: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_k: int
    head_dim: int
    calls: int = 1

    @property
    def shape(self) -> str:
        """The call as `--shape` reads it."""
        lengths = (
            f"{self.seqlen_q}"
            if self.seqlen_q == self.seqlen_k
            else f"{self.seqlen_q}:{self.seqlen_k}"
        )
        return f"{self.batch}x{lengths}x{self.num_heads_q}x{self.head_dim}"

    @property
    def flops(self) -> int:
        """Multiply-adds of QKᵀ and PV, counted as two operations each, without masks."""
        return 4 * self.batch * self.num_heads_q * self.seqlen_q * self.seqlen_k * self.head_dim


TI2V_5B = Model("ti2v-5b", "TI2V-5B", 24, 128, 30, stride_time=4, stride_space=16)
A14B = Model("a14b", "A14B", 40, 128, 40, stride_time=4, stride_space=8)

MODELS: dict[str, Model] = {m.name: m for m in (TI2V_5B, A14B)}
# Tasks of the 14B family that share its transformer's shape (generate.py --task).
_ALIASES = {name: "a14b" for name in ("t2v-a14b", "i2v-a14b", "s2v-14b", "animate-14b")}


def model_call(model: Model, name: str, width: int, height: int, frames: int) -> Workload:
    """Self-attention of one layer of `model` for a video of this size."""
    tokens = model.tokens(width, height, frames)
    return Workload(
        name,
        f"{model.title} {width}x{height}, {frames} frames, self-attention",
        batch=1,
        seqlen_q=tokens,
        seqlen_k=tokens,
        num_heads_q=model.num_heads,
        num_heads_k=model.num_heads,
        head_dim=model.head_dim,
        calls=model.layers,
    )


def _cross(call: Workload, suffix: str, seqlen_k: int, what: str) -> Workload:
    return replace(
        call,
        name=f"{call.name}-{suffix}",
        title=call.title.replace("self-attention", what),
        seqlen_k=seqlen_k,
    )


def _h3(tokens: int) -> Workload:
    return Workload(
        f"h3-{tokens // 1000}k",
        f"MiniMax-H3, {tokens} tokens of text, audio and video, self-attention",
        batch=1,
        seqlen_q=tokens,
        seqlen_k=tokens,
        num_heads_q=56,
        num_heads_k=56,
        head_dim=128,
        calls=50,
    )


def _named() -> dict[str, Workload]:
    ti2v = model_call(TI2V_5B, "ti2v-5b-720p", 1280, 704, 121)
    small = model_call(A14B, "a14b-480p", 832, 480, 81)
    large = model_call(A14B, "a14b-720p", 1280, 720, 81)
    calls = [ti2v, small, large]
    calls += [
        _cross(c, "cross", TEXT_TOKENS, "attention to the text") for c in (ti2v, small, large)
    ]
    calls.append(_cross(large, "image", IMAGE_TOKENS, "attention to the image tokens"))
    calls += [_h3(tokens) for tokens in H3_TOKENS]
    calls.append(
        Workload(
            "clip-vit-h",
            "CLIP ViT-H image encoder, self-attention",
            batch=1,
            seqlen_q=IMAGE_TOKENS,
            seqlen_k=IMAGE_TOKENS,
            num_heads_q=16,
            num_heads_k=16,
            head_dim=80,
            calls=32,
        )
    )
    calls += [
        Workload(  # facebook/wav2vec2-large-xlsr-53, the audio encoder of S2V: 50 frames a second
            "wav2vec2-10s",
            "wav2vec 2.0 audio encoder, 10 seconds of sound, self-attention",
            batch=1,
            seqlen_q=499,
            seqlen_k=499,
            num_heads_q=16,
            num_heads_k=16,
            head_dim=64,
            calls=24,
        ),
        Workload(  # google/gemma-3-12b, the text encoder of LTX-2
            "gemma-3-12b",
            "Gemma 3 12B text encoder, 1024 tokens, self-attention (causal)",
            batch=1,
            seqlen_q=1024,
            seqlen_k=1024,
            num_heads_q=16,
            num_heads_k=8,
            head_dim=256,
            calls=48,
        ),
    ]
    return {c.name: c for c in calls}


WORKLOADS: dict[str, Workload] = _named()

_SHAPE = re.compile(r"(\d+)x(\d+)(?::(\d+))?x(\d+)x(\d+)", re.ASCII)
_VIDEO = re.compile(r"([a-z0-9-]+):(\d+)[x*](\d+)[x*](\d+)", re.ASCII)


def parse_shape(text: str, seqlen_k: int | None = None, num_heads_k: int | None = None) -> Workload:
    """A call from text: `BxLxHxD`, `BxLq:LkxHxD`, `MODEL:WxHxFRAMES`, or a name of WORKLOADS.

    seqlen_k and num_heads_k, where given, replace what the text says. Raises ValueError with the
    rule that was broken.
    """
    call = _parse_text(text.strip())
    if seqlen_k is not None:
        call = replace(call, seqlen_k=seqlen_k)
    if num_heads_k is not None:
        call = replace(call, num_heads_k=num_heads_k)
    _check(call)
    return call


def _parse_text(text: str) -> Workload:
    name = text.lower()
    if name in WORKLOADS:
        return WORKLOADS[name]
    if match := _SHAPE.fullmatch(name):
        batch, seqlen_q, own_k, heads, head_dim = (int(g) if g else None for g in match.groups())
        assert (
            batch is not None
            and seqlen_q is not None
            and heads is not None
            and head_dim is not None
        )
        return Workload(
            name=name,
            title="as given",
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_q if own_k is None else own_k,
            num_heads_q=heads,
            num_heads_k=heads,
            head_dim=head_dim,
        )
    if match := _VIDEO.fullmatch(name):
        model = MODELS.get(_ALIASES.get(match[1], match[1]))
        if model is None:
            known = ", ".join([*MODELS, *_ALIASES])
            raise ValueError(f"model must be one of {known}, got {match[1]!r}")
        return model_call(model, name, int(match[2]), int(match[3]), int(match[4]))
    raise ValueError(
        "shape must be BxLxHxD (1x27280x24x128), BxLq:LkxHxD (1x27280:512x24x128), "
        f"MODEL:WxHxFRAMES (ti2v-5b:1280x704x121) or one of {', '.join(WORKLOADS)}, got {text!r}"
    )


def _check(call: Workload) -> None:
    for name in ("batch", "num_heads_q", "num_heads_k", "head_dim"):
        if getattr(call, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(call, name)}")
    for name in ("seqlen_q", "seqlen_k"):  # 0 is a legal length: no rows, or rows that see nothing
        if getattr(call, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(call, name)}")
    if call.num_heads_q % call.num_heads_k:
        raise ValueError(
            f"num_heads_k must divide num_heads_q, got {call.num_heads_k} and {call.num_heads_q}"
        )
