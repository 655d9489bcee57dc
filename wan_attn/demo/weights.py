# SPDX-License-Identifier: Apache-2.0
"""weights.py - random weights of which something can be seen; knows parameters by their names.

Freshly made Wan modules are no test of attention: their gates are nearly shut, their attention is
nearly uniform, and their decoder makes grey noise. The same modules with weights drawn as below
have peaked attention, open gates and smooth decoding kernels. Every number comes from one seed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# RMSNorm leaves q and k at unit variance, so scores have a standard deviation of QK_GAIN ** 2.
QK_GAIN = 1.5
GATE = 1.0  # adaLN gates of attention and feed-forward, about 0 in a fresh module
VELOCITY = 0.5  # of the prediction: the initial noise stays visible, and visibly changes
ROUGHNESS = 0.1  # what of a smooth kernel is random in space

CONTRAST = 2.0  # gain of the decoder's norms: SiLU then bends more, and forms get edges
BRIGHTNESS = 0.35  # of the decoder's output: most of -1..1 is used, little is clipped
SMOOTH = torch.tensor([1.0, 2.0, 1.0]) / 4  # in space
CAUSAL = torch.tensor([2.0, 3.0, 5.0]) / 10  # in time: two frames ago, the last one, this one
NOW = torch.tensor([0.0, 0.0, 1.0])

# Cells of the noise that starts the video, per latent row, column and frame; coarse to fine.
OCTAVES = ((0.3, 0.11), (0.4, 0.22), (0.5, 0.45))
FADING = 0.6  # of each octave against the one before
GRAIN = 0.08


def draw_transformer(transformer: Any, generator: torch.Generator) -> None:
    """Fill a WanTransformer3DModel."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            weight.copy_(_transformer_weight(name, weight.shape, generator))


def draw_decoder(vae: Any, generator: torch.Generator) -> None:
    """Fill the decoding half of an AutoencoderKLWan; the other half is not used."""
    with torch.no_grad():
        for name, weight in vae.decoder.named_parameters():
            weight.copy_(_decoder_weight(name, weight.shape, generator))
        channels = vae.post_quant_conv.weight.shape[0]
        vae.post_quant_conv.weight.copy_(torch.eye(channels).reshape(channels, channels, 1, 1, 1))
        vae.post_quant_conv.bias.zero_()


def draw_latents(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise with visible form to start from: smooth clouds of three sizes and a little grain.

    Args:
        shape: [batch, channels, frames, rows, columns].
    """
    batch, channels, *size = shape
    clouds = torch.zeros(shape)
    for level, (in_time, in_space) in enumerate(OCTAVES):
        cells = [
            1 + round(n * share)
            for n, share in zip(size, (in_time, in_space, in_space), strict=True)
        ]
        layer = _normal(generator, batch, channels, *cells)
        clouds += FADING**level * functional.interpolate(
            layer, size=size, mode="trilinear", align_corners=True
        )
    clouds += GRAIN * _normal(generator, *shape)
    return clouds / clouds.std()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, float32, made on the CPU: the same on every device."""
    return torch.randn(shape, generator=generator)


def _transformer_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    random = _normal(generator, *shape)
    if name.endswith(("norm_q.weight", "norm_k.weight")):
        return QK_GAIN + 0.2 * random
    if name.endswith("norm2.weight"):
        return 1 + 0.1 * random
    if name.endswith("scale_shift_table"):
        table = 0.1 * random
        if shape[1] == 6:  # shift, scale, gate of attention, then of feed-forward
            table[:, 2::3] += GATE
        return table
    if len(shape) == 1:
        return 0.05 * random
    # All positions of a patch nearly alike, in and out, so that no grid of patches shows.
    if name == "patch_embedding.weight":
        alike = _normal(generator, *shape[:2], 1, 1, 1)
        return (alike + ROUGHNESS * random) / (math.sqrt(shape[1]) * math.prod(shape[2:]))
    if name == "proj_out.weight":  # rows are [position in the patch, channel]
        positions = 4
        alike = _normal(generator, shape[0] // positions, shape[1]).repeat(positions, 1)
        return VELOCITY * (alike + ROUGHNESS * random) / math.sqrt(shape[1])
    return (0.2 if "time_proj" in name else 1.0) * random / math.sqrt(math.prod(shape[1:]))


def _decoder_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    random = _normal(generator, *shape)
    if name.endswith("gamma"):
        return torch.full(shape, CONTRAST)
    if len(shape) == 1:
        return 0.3 * random if "conv1" in name else torch.zeros(shape)
    if "time_conv" in name:
        return _frame_doubling(shape)
    in_channels, is_output = shape[1], name.startswith("conv_out")
    # Rows without a mean: SiLU's outputs have one, which would tint the whole picture.
    mixing = _normal(generator, *shape[:2])
    if is_output:  # partly common to red, green and blue: light and dark, not only colours
        mixing = mixing + _normal(generator, 1, in_channels)
    mixing = mixing - mixing.mean(dim=1, keepdim=True)
    if is_output:
        # Of every row the same length, so that no colour is stronger than the others.
        mixing = mixing * (BRIGHTNESS * math.sqrt(in_channels)) / mixing.norm(dim=1, keepdim=True)
    mixing = mixing.reshape(*shape[:2], *[1] * (len(shape) - 2))
    kernel = torch.ones(())
    for axis, length in enumerate(shape[2:]):
        taps = torch.ones(1) if length == 1 else SMOOTH
        if length == 3 and len(shape) == 5 and axis == 0:
            # Before the first frame there are zeros: read at the end, they would fade it in.
            taps = NOW if is_output else CAUSAL
        kernel = kernel[..., None] * taps
    return (mixing + (0 if is_output else ROUGHNESS) * random) * kernel / math.sqrt(in_channels)


def _frame_doubling(shape: tuple[int, ...]) -> Tensor:
    """Two frames from one: halfway from the frame before, and the frame itself."""
    channels = shape[1]
    eye = torch.eye(channels)
    weight = torch.zeros(shape)
    weight[:channels, :, 1, 0, 0] = weight[:channels, :, 2, 0, 0] = eye / 2
    weight[channels:, :, 2, 0, 0] = eye
    return weight
