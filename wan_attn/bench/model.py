# SPDX-License-Identifier: Apache-2.0
"""model.py - a stack of Wan transformer blocks, weights random, and its attention on any route.

Two makers: diffusers' WanTransformer3DModel, and stock Wan2.2's WanModel from a checkout. Both at
the real dimensions, with as many blocks as asked for: blocks are all alike, so a few of them tell
what all would take.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wan_attn import config, workloads
from wan_attn.integrations import diffusers as diffusers_host
from wan_attn.integrations import wan22
from wan_attn.integrations.wan22.rope_patch import RopePatch
from wan_attn.selection.choose import compute_dtype

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(query, key, value, k_lens), [batch, seqlen, heads, head_dim] -> the same shape as query."""

ALIAS = "wan_attn_bench_wan22"
"""The name stock Wan2.2 is imported under, without its __init__, which imports every pipeline."""

TEXT_DIM = 4096
CPU_HEADS = 4
CPU_FRAMES = 5


@dataclass(frozen=True)
class Arch:
    """What decides how long a block takes, beside the shapes of its attention.

    Attributes:
        call: heads, head_dim and strides.
        ffn: width of the feed-forward layer; channels: of the latents.
        steps: denoising steps of a video, frames: of the model's own video (Wan2.2's configs).
        size: width and height of that video.
        time_per_token: TI2V-5B gives each token its own time.
    """

    call: workloads.Model
    ffn: int
    channels: int
    steps: int
    frames: int
    size: tuple[int, int]
    time_per_token: bool

    @property
    def dim(self) -> int:
        return self.call.num_heads * self.call.head_dim


ARCHS = {
    "ti2v-5b": Arch(workloads.TI2V_5B, 14336, 48, 50, 121, (1280, 704), True),
    "a14b": Arch(workloads.A14B, 13824, 16, 40, 81, (1280, 720), False),
}


def reduced(arch: Arch) -> Arch:
    """Returns the same with CPU_HEADS heads and a feed-forward layer of the same proportion."""
    share = CPU_HEADS / arch.call.num_heads
    ffn = max(64, round(arch.ffn * share / 64) * 64)
    return replace(arch, call=replace(arch.call, num_heads=CPU_HEADS), ffn=ffn)


@dataclass(frozen=True)
class Video:
    """The video that is denoised."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    def latent(self, arch: Arch) -> tuple[int, int, int, int]:
        """[channels, frames, rows, columns] of the latents."""
        call = arch.call
        return (
            arch.channels,
            (self.frames - 1) // call.stride_time + 1,
            self.height // call.stride_space,
            self.width // call.stride_space,
        )


class ModelError(Exception):
    """The model is not available here; the message says what to do."""


class DiffusersStack:
    """diffusers' transformer."""

    title = "diffusers WanTransformer3DModel"

    def __init__(self, arch: Arch, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        try:
            cls = importlib.import_module("diffusers").WanTransformer3DModel
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            raise ModelError(
                f"diffusers with WanTransformer3DModel is needed ({str(error)[:160]}); "
                'pip install "diffusers>=0.35", or set WAN22_DIR to a checkout of Wan2.2'
            ) from error
        with _made_on(device, dtype):
            self.model = cls(
                num_attention_heads=arch.call.num_heads,
                attention_head_dim=arch.call.head_dim,
                in_channels=arch.channels,
                out_channels=arch.channels,
                ffn_dim=arch.ffn,
                num_layers=layers,
            )
        _prepare(self.model)
        kept = self.model._keep_in_fp32_modules or ()
        for name, weight in self.model.named_parameters():
            if any(part in kept for part in name.split(".")):
                weight.data = weight.data.float()
        self.arch, self.dtype, self.device = arch, dtype, device
        self.inputs: tuple[Any, ...] = ()

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.blocks)

    def show(self, video: Video, batch: int, fill: tuple[float, ...]) -> None:
        """Take these inputs from now on; `fill` makes attend's k_lens: diffusers has no lengths."""
        draw = _Draw(self.device, self.dtype)
        tokens = self.arch.call.tokens(video.width, video.height, video.frames)
        time = torch.full((batch,), 500, device=self.device)
        if self.arch.time_per_token:
            time = time[:, None].expand(batch, tokens)
        text = draw(batch, workloads.TEXT_TOKENS, TEXT_DIM)
        self.inputs = (draw(batch, *video.latent(self.arch)), time, text)
        self.k_lens = _lengths(tokens, batch, fill)

    def use(self, attend: Attend | None, *, rope: bool = False) -> None:
        """Computes attention by this function, None: as diffusers does; `rope`: norm and rotation
        by our pass."""
        diffusers_host.restore_processors(self.model)
        if attend is None:
            return

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            is_self = query.shape[1] == key.shape[1]
            return attend(query, key, value, self.k_lens if is_self else None)

        diffusers_host.replace_processors(self.model, function, rope=rope)

    def forward(self) -> None:
        self.model(*self.inputs, return_dict=False)

    def close(self) -> None:
        """Does nothing: this model leaves nothing behind."""


class Wan22Stack:
    """Stock Wan2.2's own transformer, unedited, its flash_attention replaced as patch() does it."""

    title = "stock Wan2.2 WanModel"

    def __init__(
        self, arch: Arch, layers: int, dtype: torch.dtype, device: torch.device, checkout: Path
    ) -> None:
        module = import_wan22(checkout)
        # Without CUDA its autocast regions do nothing, and mixed dtypes fail: float32 throughout.
        self.weights = dtype if device.type == "cuda" else torch.float32
        with _made_on(device, self.weights):
            self.model = module.WanModel(
                model_type="ti2v" if arch.time_per_token else "t2v",
                in_dim=arch.channels,
                out_dim=arch.channels,
                dim=arch.dim,
                ffn_dim=arch.ffn,
                text_dim=TEXT_DIM,
                num_heads=arch.call.num_heads,
                num_layers=layers,
            )
        _prepare(self.model)
        self.arch, self.dtype, self.device = arch, dtype, device
        self.attend: Attend | None = None
        self.original = vars(module)["flash_attention"]
        wan22.patch(package=ALIAS, attention=self._flash_attention)
        self.rope = RopePatch(ALIAS)

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.blocks)

    def show(self, video: Video, batch: int, fill: tuple[float, ...]) -> None:
        """Take these inputs from now on; a sample that is filled less has fewer frames."""
        draw = _Draw(self.device, self.weights)
        tokens = self.arch.call.tokens(video.width, video.height, video.frames)
        channels, frames, *space = video.latent(self.arch)
        self.videos = [
            draw(channels, max(1, round(frames * fill[b % len(fill)])), *space)
            for b in range(batch)
        ]
        self.text = [draw(workloads.TEXT_TOKENS, TEXT_DIM) for _ in range(batch)]
        self.time = torch.full((batch, tokens), 500, device=self.device)
        self.tokens = tokens

    def use(self, attend: Attend | None, *, rope: bool = False) -> None:
        """Computes attention by this function, None: by the model's own, which needs flash_attn;
        `rope`: norm and rotation by our pass."""
        self.attend = attend
        if rope:
            self.rope.sync()
        else:
            self.rope.restore()

    def forward(self) -> None:
        is_cuda = self.device.type == "cuda"
        with warnings.catch_warnings(), torch.autocast("cuda", self.dtype, enabled=is_cuda):
            warnings.filterwarnings("ignore", message="CUDA is not available")  # Wan's own regions
            self.model(self.videos, self.time, self.text, self.tokens)

    def close(self) -> None:
        """Restores the names, and forgets the modules."""
        self.rope.restore()
        wan22.unpatch()
        for name in [n for n in sys.modules if n.split(".")[0] == ALIAS]:
            del sys.modules[name]

    def _flash_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lens: Tensor | None = None,
        k_lens: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **others: Any,
    ) -> Tensor:
        """Wan2.2's call to a route's: what wan_attn.flash_attention does before its selection."""
        if self.attend is None:
            out: Tensor = self.original(q, k, v, q_lens, k_lens, dtype=dtype, **others)
            return out
        asked = self.dtype if dtype == torch.bfloat16 and self.dtype != torch.bfloat16 else dtype
        kind = compute_dtype(v.dtype, asked, q.device, config.current().force_fp16)
        q, k = (x if x.dtype == torch.float32 else x.to(kind) for x in (q, k))
        return self.attend(q, k, v.to(kind), k_lens).to(q.dtype)


def import_wan22(checkout: Path) -> ModuleType:
    """wan/modules/model.py of a checkout, without the __init__ files around it.

    Raises:
        ModelError: there is no such file, or it cannot be imported.
    """
    folder = checkout / "wan"
    if not (folder / "modules" / "model.py").is_file():
        raise ModelError(
            f"{checkout.name} must be a checkout of Wan2.2, has no wan/modules/model.py"
        )
    for name, path in ((ALIAS, folder), (f"{ALIAS}.modules", folder / "modules")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    try:
        return importlib.import_module(f"{ALIAS}.modules.model")
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(f"Wan2.2's model.py cannot be imported: {str(error)[:160]}") from error


class _Draw:
    """Standard normal tensors, the same ones each time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.to(self.dtype)


class _made_on:  # noqa: N801 - reads as a statement
    """Modules made inside are on this device and of this dtype: never a float32 copy of a model."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        self.device.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.device.__exit__(*error)
        torch.set_default_dtype(self.before)


def _prepare(model: Any) -> None:
    model.eval()
    model.requires_grad_(False)


def _lengths(tokens: int, batch: int, fill: tuple[float, ...]) -> Tensor | None:
    """Returns the real lengths; None if every sample is full."""
    if all(share == 1.0 for share in fill):
        return None
    lengths = [max(1, round(tokens * fill[b % len(fill)])) for b in range(batch)]
    return torch.tensor(lengths, device="cpu")
