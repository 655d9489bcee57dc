# SPDX-License-Identifier: Apache-2.0
"""choose.py - Request + Settings -> Choice: what runs a call, and why not what came before it.

Pure: the same request and settings give the same choice on the same machine. Python chooses the
    library here, C chooses the kernel (csrc/core/dispatch.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from wan_attn.backends import REGISTRY, chunked, native, torch_sdpa
from wan_attn.backends._common import capability
from wan_attn.backends._flash_attention import NOT_INSTALLED
from wan_attn.config import FLASH_ATTENTION_BACKENDS, Settings
from wan_attn.request import Request

DISABLED = "disabled by DISABLE_FLASH_ATTN=1"


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a call.

    Attributes:
        backend: key of REGISTRY.
        kernel_name: row of our kernel table, for backend `sdpa`; else None.
        refusals: (backend, reason) for each one that came before it in the order, in that order.
        forced_by: the variable that named a backend, as the user wrote it; "" for auto.
    """

    backend: str
    kernel_name: str | None
    refusals: tuple[tuple[str, str], ...]
    forced_by: str = ""

    @property
    def title(self) -> str:
        """What runs, as the log calls it."""
        title = REGISTRY[self.backend].TITLE
        return title if self.kernel_name is None else f"{title} ({self.kernel_name})"

    @property
    def is_fallback(self) -> bool:
        """The user named another backend: the first asked, hence the first refusal."""
        return bool(self.forced_by and self.refusals)

    def reasons(self) -> str:
        """The refusals as one line of text; "" if there were none and nothing was forced."""
        said = dict(self.refusals)
        flash = [said[name] for name in FLASH_ATTENTION_BACKENDS if name in said]
        parts = []
        if flash == [NOT_INSTALLED] * len(FLASH_ATTENTION_BACKENDS):
            parts.append("Flash Attention not available")
        elif flash == [DISABLED] * len(FLASH_ATTENTION_BACKENDS):
            parts.append(f"Flash Attention {DISABLED}")
        is_said = FLASH_ATTENTION_BACKENDS if parts else ()
        for name, reason in self.refusals:
            if name not in is_said:
                parts.append(f"{REGISTRY[name].TITLE}: {' '.join(reason.split())}")
        if not parts and self.forced_by:
            parts.append(self.forced_by)
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Measured:
    """A kind of call for which our kernel was measured faster than FlashAttention on a GPU.

    Attributes:
        capability: of the GPU; dtype, head_dim: of the call; seqlen_k_min: from here up.
        source: the file of benchmarks/results that shows it.
    """

    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    seqlen_k_min: int
    source: str


MEASURED_FASTER: tuple[Measured, ...] = ()

# Cards whose tensor cores reach their full rate by wgmma or tcgen05 alone: PyTorch's cuDNN has such
# kernels, and what mma.sync can reach is some 62 % on Hopper (Luo et al., arXiv 2402.13499). Until
# ours are measured there, PyTorch's go first.
# (Thor is 10.1 to CUDA 12 and 11.0 to CUDA 13.)
_BEYOND_MMA_SYNC = ((9, 0), (10, 0), (10, 1), (10, 3), (11, 0))

# For fp32 inputs, where the caller did not say: fp16 has three more bits of mantissa than bf16 at
# the same speed on the consumer cards RTX 30 and 40, and is all that cards before those have; the
# data-centre cards, and what is newer, get the range of bf16.
_FP16_CARDS = ((8, 6), (8, 9))
_FIRST_WITH_BF16 = (8, 0)


def compute_dtype(
    value_dtype: torch.dtype, asked: torch.dtype | None, device: torch.device, force_fp16: bool
) -> torch.dtype:
    """What a call is computed in: the dtype policy.

    Args:
        asked: flash_attention's `dtype`; None: value's own, whatever it is.
    """
    if force_fp16:
        return torch.float16
    if asked is None or value_dtype in (torch.float16, torch.bfloat16):
        return value_dtype
    if asked != torch.bfloat16:
        return asked
    # bfloat16 is the default of the signature: what the card does best, rather than a wish.
    arch = capability(device)
    if arch is not None and (arch < _FIRST_WITH_BF16 or arch in _FP16_CARDS):
        return torch.float16
    return torch.bfloat16


def measured_faster(request: Request, table: tuple[Measured, ...]) -> bool:
    """Whether our kernel goes before FlashAttention for this call."""
    arch = capability(request.device)
    return any(
        (row.capability, row.dtype, row.head_dim) == (arch, request.dtype, request.head_dim)
        and request.seqlen_k >= row.seqlen_k_min
        for row in table
    )


def order(
    request: Request, settings: Settings, table: tuple[Measured, ...] = MEASURED_FASTER
) -> tuple[str, ...]:
    """The backends in the order in which they are asked.

    auto: FA3 > FA2 > ours > PyTorch > memory-bounded; ours first where measured faster, and off
        CUDA, where FlashAttention has nothing; PyTorch before ours on the cards of
        _BEYOND_MMA_SYNC. A named backend comes first and the ones behind it follow.
    """
    names = tuple(REGISTRY)
    forced = settings.forced_backend
    if forced is not None:
        behind = names[names.index(forced) + 1 :]
        return (forced, *behind) if forced != chunked.NAME else (forced, torch_sdpa.NAME)
    if request.device.type != "cuda":
        return tuple(name for name in names if name not in FLASH_ATTENTION_BACKENDS)
    if measured_faster(request, table):
        return (native.NAME, *(name for name in names if name != native.NAME))
    if capability(request.device) in _BEYOND_MMA_SYNC:
        before = FLASH_ATTENTION_BACKENDS + (torch_sdpa.NAME,)
        return (*before, *(name for name in names if name not in before))
    return names


def why_not(
    name: str, request: Request, settings: Settings, version: int | None, wrapper_failed: bool
) -> str | None:
    """Why this backend is passed over for this call; None: it is not."""
    if name in FLASH_ATTENTION_BACKENDS and settings.disable_flash_attn:
        return DISABLED
    if name == "fa3" and version == 2:
        return "the caller asked for version=2"
    if name == torch_sdpa.NAME and not wrapper_failed:
        reason = chunked.needed(request, settings.chunk_threshold)
        if reason is not None:
            return reason
    return REGISTRY[name].why_not(request)


@lru_cache(maxsize=1024)
def select(
    request: Request,
    settings: Settings,
    *,
    version: int | None = None,
    failed: tuple[tuple[str, str], ...] = (),
) -> Choice:
    """The first backend in the order that does not refuse the call.

    Args:
        version: flash_attention's `version`: 2 leaves FlashAttention 3 out, 3 and None do not.
        failed: (backend, reason) for each one that failed at run time: passed over too.

    Raises:
        RuntimeError: no backend takes the call, or, under WAN_ATTN_STRICT=1, the named one does
            not;
            the message has every reason.
    """
    refusals: list[tuple[str, str]] = []
    gone = dict(failed)
    for name in order(request, settings):
        reason = gone.get(name) or why_not(
            name, request, settings, version, wrapper_failed=chunked.NAME in gone
        )
        if reason is None:
            kernel_name = native.kernel_name(request) if name == native.NAME else None
            return Choice(name, kernel_name, tuple(refusals), settings.forced_by)
        refusals.append((name, reason))
        if settings.strict and settings.forced_backend == name:
            raise RuntimeError(
                f"wan_attn: {settings.forced_by} cannot take this call: {reason} "
                "(WAN_ATTN_STRICT=1: nothing else is tried)"
            )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise RuntimeError(f"wan_attn: no backend takes this call: {reasons}")
