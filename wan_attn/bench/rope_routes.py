# SPDX-License-Identifier: Apache-2.0
"""rope_routes.py - ways to norm and rotate a query or a key: stock Wan2.2's steps,
diffusers' steps, our op in torch's operators, and each of our kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wan_attn.native import rope_in_torch
from wan_attn.native.kernels import rope_kernels
from wan_attn.native.rope_call import RopeCall

EPS = 1e-6
THETA = 10000.0
POSITIONS = 1024  # of each axis; Wan2.2 makes as many

Grid = tuple[int, int, int]
"""Frames, height and width, in tokens."""

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Operands:
    """One query or key, as the projection leaves it, and what its norm and rotation need.

    Attributes:
        x: [1, seqlen, heads, head_dim], the dtype of the model.
        weight: [heads * head_dim], of the same dtype.
        table: [POSITIONS, head_dim] float64, cos and sin of each pair in turn.
        grid: its product is seqlen.
    """

    x: Tensor
    weight: Tensor
    table: Tensor
    grid: Grid

    @property
    def grid_sizes(self) -> Tensor:
        return torch.tensor([self.grid], device="cpu")


@dataclass(frozen=True)
class Route:
    """One way. `make` prepares what a model holds over its layers; what it returns is timed."""

    name: str
    title: str
    make: Callable[[Operands], Run]
    device: str = ""  # the only kind that it runs on; "": any

    def runs_on(self, device: torch.device) -> bool:
        """Whether it is for calls on this device."""
        return self.device in ("", device.type)


STOCK = "wan22"
"""The route that is 1.0."""

COPY = "copy"
COMPILED = "compiled"


def operands(
    grid: Grid, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Operands:
    """Standard normal x, a weight around 1."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    seqlen = grid[0] * grid[1] * grid[2]
    x = draw(1, seqlen, heads * head_dim).to(dtype).unflatten(2, (heads, head_dim))
    weight = (1 + 0.1 * draw(heads * head_dim)).to(dtype)
    return Operands(x, weight, table(head_dim).to(device), grid)


def axis_sizes(head_dim: int) -> list[int]:
    """How many elements of a head turn by frame, by line and by column, as Wan2.2 shares them."""
    line = 2 * (head_dim // 6)
    return [head_dim - 2 * line, line, line]


def table(head_dim: int) -> Tensor:
    """cos and sin of pair i of an axis with n elements: position * THETA ** (-2 i / n)."""
    parts = []
    for size in axis_sizes(head_dim):
        rates = THETA ** -(torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
        angles = torch.arange(POSITIONS, dtype=torch.float64, device="cpu")[:, None] * rates
        parts.append(torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1))
    return torch.cat(parts, dim=1)


def exact(given: Operands) -> Tensor:
    """In float64 from first to last."""
    x = given.x.double()
    y = x * torch.rsqrt(x.square().mean(dim=(2, 3), keepdim=True) + EPS)
    y = y * given.weight.double().unflatten(0, x.shape[2:])
    turn = torch.view_as_complex(_of_tokens(given).unflatten(-1, (-1, 2)))
    pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def _of_tokens(given: Operands) -> Tensor:
    """The table's row of each token, [1, seqlen, 1, head_dim]."""
    frames, height, width = given.grid
    parts = given.table.split(axis_sizes(given.table.shape[1]), dim=1)
    shapes = ((frames, 1, 1, -1), (1, height, 1, -1), (1, 1, width, -1))
    axes = [
        part[:size].view(shape).expand(*given.grid, -1)
        for part, size, shape in zip(parts, given.grid, shapes, strict=True)
    ]
    return torch.cat(axes, dim=-1).reshape(1, -1, 1, given.table.shape[1])


def _wan22(given: Operands) -> Run:
    """WanRMSNorm, rope_apply, then the cast that stands in flash_attention
    (wan/modules/model.py, attention.py)."""
    turns = torch.view_as_complex(given.table.unflatten(-1, (-1, 2)).contiguous())
    x, weight = given.x, given.weight
    seqlen, heads = x.shape[1:3]
    frames, height, width = given.grid

    def run() -> Tensor:
        flat = x.flatten(2)
        wide = flat.float()
        scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS)
        normed = ((wide * scale).type_as(flat) * weight).view(x.shape)
        parts = turns.split([size // 2 for size in axis_sizes(x.shape[3])], dim=1)
        turned = []
        for sample in normed:
            pairs = torch.view_as_complex(sample.to(torch.float64).reshape(seqlen, heads, -1, 2))
            angles = torch.cat(
                [
                    parts[0][:frames].view(frames, 1, 1, -1).expand(frames, height, width, -1),
                    parts[1][:height].view(1, height, 1, -1).expand(frames, height, width, -1),
                    parts[2][:width].view(1, 1, width, -1).expand(frames, height, width, -1),
                ],
                dim=-1,
            ).reshape(seqlen, 1, -1)
            real = torch.view_as_real(pairs * angles).flatten(2)
            turned.append(torch.cat([real, sample[seqlen:]]))
        return torch.stack(turned).float().to(x.dtype)

    return run


def _diffusers(given: Operands) -> Run:
    """torch's RMSNorm and a rotation in float32."""
    x, weight = given.x, given.weight
    angles = _of_tokens(given).float()
    cos, sin = angles[..., 0::2].contiguous(), angles[..., 1::2].contiguous()

    def run() -> Tensor:
        y = torch.nn.functional.rms_norm(x.flatten(2), weight.shape, weight, EPS).view(x.shape)
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(y)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out.type_as(y)

    return run


def _compiled(given: Operands) -> Run:
    """diffusers' steps, fused by torch.compile."""
    run: Run = torch.compile(_diffusers(given), dynamic=False)
    return run


def _torch(given: Operands) -> Run:
    call = RopeCall(given.x, given.weight, given.table, given.grid_sizes, EPS)
    return partial(rope_in_torch.compute, call)


def _ours(given: Operands, kernel: int = -1) -> Run:
    grid_sizes = given.grid_sizes

    def run() -> Tensor:
        out: Tensor = torch.ops.wan_attn.rms_norm_rope(
            given.x, given.weight, given.table, grid_sizes, eps=EPS, kernel=kernel
        )
        return out

    return run


def _copy(given: Operands) -> Run:
    """One reading and one writing of as many bytes: no pass can be faster."""
    out = torch.empty_like(given.x)
    return lambda: out.copy_(given.x)


def routes() -> list[Route]:
    """Every route, stock first."""
    ours = [
        Route(row.name, "one of wan_attn's kernels", partial(_ours, kernel=row.index), row.device)
        for row in rope_kernels()
    ]
    return [
        Route(STOCK, "stock Wan2.2's steps", _wan22),
        Route("diffusers", "diffusers' steps", _diffusers),
        Route(COMPILED, "diffusers' steps under torch.compile", _compiled),
        Route("torch", "rms_norm_rope in torch's operators", _torch),
        *ours,
        Route(COPY, "torch's copy of the same bytes", _copy),
    ]
