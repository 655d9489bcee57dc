# SPDX-License-Identifier: Apache-2.0
"""wan_stack.py - queries, keys and values of stock Wan2.2's block stack, recorded as it calls
attention.

No weights of Wan2.2 are at hand here, and random ones make random keys. These have what trained
ones have and independent ones lack: spectra that fall off, a few channels of the norms' weights
many times the others, biases, and a video in place of noise. That is an assumption about trained
weights, not a measurement of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_attn.bench import model

from .families import Case, bf16

LAYERS = 4
VIDEO = model.Video(480, 320, 17)
ROWS = 128
STACKS = 3  # each with weights of its own


def structured(weight: Tensor, draw: torch.Generator) -> Tensor:
    """A matrix of the same size and energy, whose singular values fall as 1 / sqrt(i + 1)."""
    rows, columns = weight.shape
    left, _, right = torch.linalg.svd(
        torch.randn(rows, columns, generator=draw), full_matrices=False
    )
    values = 1.0 / torch.sqrt(torch.arange(left.shape[1]) + 1.0)
    values *= (columns / (values**2).sum()).sqrt()
    made: Tensor = (left * values) @ right * (rows / columns) ** 0.5
    return made


def outlier_gains(channels: int, draw: torch.Generator) -> Tensor:
    """Log-normal around 1; one channel in fifty is five times as large."""
    gains = torch.exp(0.4 * torch.randn(channels, generator=draw))
    return torch.where(torch.rand(channels, generator=draw) < 0.02, 5.0 * gains, gains)


def shape_weights(stack: Any, seed: int) -> None:
    """Replaces the weights of every block's self-attention."""
    draw = torch.Generator().manual_seed(seed)
    for block in stack.blocks:
        attention = block.self_attn
        for linear in (attention.q, attention.k, attention.v, attention.o):
            linear.weight.data = structured(linear.weight, draw)
            linear.bias.data = 0.3 * torch.randn(linear.bias.shape, generator=draw)
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.data = outlier_gains(len(norm.weight), draw)


def smooth_video(shape: tuple[int, ...]) -> Tensor:
    """Latents that vary slowly over frames, rows and columns, with noise, as while denoising."""
    draw = torch.Generator().manual_seed(18)
    coarse = torch.randn(1, shape[0], 2, 4, 6, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="trilinear")[0]
    return smooth + 0.5 * torch.randn(shape, generator=draw)


def record(checkout: Path, layers: int = LAYERS, stacks: int = STACKS) -> Iterator[Case]:
    """One case for each layer and head of the stacks' self-attention.

    Raises:
        model.ModelError: there is no such checkout, or it cannot be imported.
    """
    for number in range(stacks):
        yield from _record(checkout, layers, number)


def _record(checkout: Path, layers: int, number: int) -> Iterator[Case]:
    arch = model.reduced(model.ARCHS["a14b"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)  # Wan2.2 draws the weights that stay from torch's own
        stack = model.Wan22Stack(arch, layers, torch.bfloat16, torch.device("cpu"), checkout)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None) -> Tensor:
        if q.shape[1] == k.shape[1]:
            seen.append((q[0], k[0], v[0]))
        query, key, value = (x.float().transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2)

    try:
        shape_weights(stack, 17 + number)
        stack.show(VIDEO, 1, (1.0,))
        stack.videos = [smooth_video(VIDEO.latent(arch))]
        stack.use(attend)
        with torch.inference_mode():
            stack.forward()
    finally:
        stack.close()
    for layer, (q, k, v) in enumerate(seen):
        first = (len(q) - ROWS) // 2
        for head in range(q.shape[1]):
            parts = (x[:, head].double().numpy() for x in (q[first : first + ROWS], k, v))
            arrays = [bf16(np.asarray(x)) for x in parts]
            name = f"wan_{number}.{layer}.{head}"
            yield Case(name, f"stack {number}, layer {layer}, head {head}", *arrays)
