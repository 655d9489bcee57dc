# SPDX-License-Identifier: Apache-2.0
"""choose.py - Request + Settings -> Choice: what runs a call, and why not what came before it.

The same request and settings give the same choice on the same machine and with the same
measurements (tuning/). Python chooses the library here, and C the kernel (csrc/core/dispatch.c)
unless another was measured to be faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import torch

from wan_attn.backends import (
    LOSSY,
    REGISTRY,
    _torch_kernels,
    chunked,
    native,
    torch_sdpa,
    xformers,
)
from wan_attn.backends._common import accelerators, capability
from wan_attn.backends._flash_attention import NOT_INSTALLED
from wan_attn.config import FLASH_ATTENTION_BACKENDS, Settings
from wan_attn.request import Request
from wan_attn.selection import measured
from wan_attn.tuning import words
from wan_attn.tuning.book import Entry
from wan_attn.tuning.candidates import Candidate
from wan_attn.tuning.turn import Turn
from wan_attn.workloads import WORKLOADS

DISABLED = "disabled by DISABLE_FLASH_ATTN=1"


class Card(NamedTuple):
    """What selection knows about the cards of one compute capability.

    Attributes:
        title: for people.
        is_float16_better: for float32 inputs, where the caller did not say: float16 has three more
            bits of mantissa than bfloat16 at the same speed on the consumer cards. Data-centre
            cards, and newer ones, get the range of bfloat16.
        is_torch_first: its tensor cores reach their full rate by wgmma or tcgen05 alone: PyTorch's
            cuDNN has such kernels, and what mma.sync can reach is some 62 % on Hopper (Luo et al.,
            arXiv 2402.13499). Until they are measured on the card itself, PyTorch's go first.
    """

    title: str
    is_float16_better: bool = False
    is_torch_first: bool = False


CARDS = {
    (8, 6): Card("GeForce RTX 30", is_float16_better=True),
    (8, 9): Card("GeForce RTX 40", is_float16_better=True),
    (9, 0): Card("Hopper", is_torch_first=True),
    (10, 0): Card("B200", is_torch_first=True),
    (10, 1): Card("Thor, as CUDA 12 calls it", is_torch_first=True),
    (10, 3): Card("B300", is_torch_first=True),
    (11, 0): Card("Thor, as CUDA 13 calls it", is_torch_first=True),
}
_ANY_CARD = Card("any other card")
_FIRST_WITH_BF16 = (8, 0)


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a call.

    Attributes:
        backend: key of REGISTRY.
        request: the call.
        refusals: (backend, reason) for each one that came before it in the order, in that order.
        forced_by: the variable that named a backend, as the user wrote it; "" for auto.
        variant: the row or the kernel of PyTorch's that was measured to be the fastest; "": the
            backend's own choice.
        entry: the measurement of such calls; None: there is none.
        turn: what such calls wait for until they are measured; None: for nothing.
    """

    backend: str
    request: Request
    refusals: tuple[tuple[str, str], ...]
    forced_by: str = ""
    variant: str = ""
    entry: Entry | None = field(default=None, compare=False, repr=False)
    turn: Turn | None = field(default=None, compare=False, repr=False)

    @property
    def candidate(self) -> Candidate:
        """The backend and its variant."""
        return Candidate(self.backend, self.variant)

    @property
    def kernel_name(self) -> str | None:
        """The row that would take a contiguous call of this kind, for backend `sdpa`; else None.

        An answer of the kernel table, asked now. What ran is what the backend says after a run.
        """
        if self.backend != native.NAME:
            return None
        return self.variant or native.kernel_name(self.request)

    @property
    def gradient_name(self) -> str | None:
        """What computes the gradients of such a call, for backend `sdpa`, where they are wanted."""
        is_ours = self.backend == native.NAME and self.request.needs_grad
        return native.gradient_name(self.request) if is_ours else None

    @property
    def title(self) -> str:
        """What would run, as the log calls it."""
        return title(self.backend, self.kernel_name or self.variant)

    @property
    def is_measured(self) -> bool:
        """A measurement has decided."""
        entry = self.entry
        return entry is not None and entry.is_whole and bool(entry.times) and self.turn is None

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
        if self.entry is not None and self.is_measured:
            parts.append(words.measured(self.entry, self.candidate))
        return "; ".join(parts)


def title(backend: str, kernel_name: str | None) -> str:
    """A backend, and the row of the kernel table or PyTorch's kernel that it runs, as the log
    calls them."""
    name = REGISTRY[backend].TITLE
    if kernel_name in _torch_kernels.VARIANTS and backend == torch_sdpa.NAME:
        kernel_name = _torch_kernels.VARIANTS[kernel_name].title
    return f"{name} ({kernel_name})" if kernel_name else name


def _card(device: torch.device) -> Card:
    arch = capability(device)
    if arch is None or torch.version.hip is not None:  # AMD's numbers are of other cards
        return _ANY_CARD
    return CARDS.get(arch, _ANY_CARD)


def compute_dtype(
    value_dtype: torch.dtype, asked: torch.dtype | None, device: torch.device, force_fp16: bool
) -> torch.dtype:
    """What a call is computed in: the dtype policy.

    Args:
        asked: flash_attention's `dtype`; None: value's own.
    """
    if force_fp16:
        return torch.float16
    if asked is None or value_dtype in (torch.float16, torch.bfloat16):
        return value_dtype
    if asked != torch.bfloat16:
        return asked
    # bfloat16 is the default of the signature: what the card does best, rather than a wish.
    arch = capability(device)
    if arch is not None and (arch < _FIRST_WITH_BF16 or _card(device).is_float16_better):
        return torch.float16
    return torch.bfloat16


_CUDA_ONLY = (*FLASH_ATTENTION_BACKENDS, xformers.NAME)


def _is_for_auto(name: str) -> bool:
    """Few have xFormers: to say of it in every reason that it is not installed would be noise."""
    return name not in LOSSY and (name != xformers.NAME or xformers.is_installed())


def _has_flash_gradient(request: Request) -> bool:
    """Whether PyTorch's flash kernels compute the gradient of this call: five products of tensor
    cores a tile, where ours have seven. Not of what it needs a mask for, which those do not take.
    """
    r = request
    if not r.needs_grad or r.has_q_lens or r.has_k_lens or r.window != (-1, -1):
        return False
    if r.is_causal and r.seqlen_q != r.seqlen_k:
        return False
    is_half = r.dtype in (torch.float16, torch.bfloat16)
    arch = capability(r.device) or _FIRST_WITH_BF16
    return is_half and arch >= _FIRST_WITH_BF16 and _torch_kernels.has_flash()


def order(request: Request, settings: Settings) -> tuple[str, ...]:
    """The backends in the order in which they are asked.

    auto: FA3 > FA2 > ours > xFormers > PyTorch > memory-bounded; off CUDA without FlashAttention
        and xFormers, which have nothing there; PyTorch before ours on the cards where CARDS says
        so, and for a gradient that its flash kernels compute. A measurement goes before this order
        (select). A named backend comes first and the ones behind it follow; all of auto's, behind a
        lossy one, which auto never takes.
    """
    names = tuple(name for name in REGISTRY if _is_for_auto(name))
    forced = settings.forced_backend
    if forced is not None and forced in names:
        behind = names[names.index(forced) + 1 :]
        return (forced, *behind) if forced != chunked.NAME else (forced, torch_sdpa.NAME)
    if forced is not None:
        return (forced, *order(request, replace(settings, backend="auto")))
    if request.device.type != "cuda":
        return tuple(name for name in names if name not in _CUDA_ONLY)
    if _card(request.device).is_torch_first or _has_flash_gradient(request):
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


def select(
    request: Request,
    settings: Settings,
    *,
    version: int | None = None,
    failed: tuple[tuple[str, str], ...] = (),
) -> Choice:
    """The fastest that was measured for such calls; else the first backend in the order that does
    not refuse the call.

    Args:
        version: flash_attention's `version`: 2 leaves FlashAttention 3 out, 3 and None do not.
        failed: (backend or candidate, reason) for each one that failed at run time: passed over.

    Raises:
        RuntimeError: no backend takes the call, or, under WAN_ATTN_STRICT=1, the named one does
            not; the message has every reason.
    """
    refusals: list[tuple[str, str]] = []
    gone, names = dict(failed), order(request, settings)

    @cache
    def reason_of(name: str) -> str | None:
        return gone.get(name) or why_not(
            name, request, settings, version, wrapper_failed=chunked.NAME in gone
        )

    found = _decide(request, settings, names, reason_of, gone)
    for name in names:
        reason = reason_of(name)
        if reason is None:
            if found.candidate is not None and found.candidate.backend != name:
                continue  # slower
            variant = "" if found.candidate is None else found.candidate.variant
            given = (settings.forced_by, variant, found.entry, found.turn)
            return Choice(name, request, tuple(refusals), *given)
        refusals.append((name, reason))
        if settings.strict and settings.forced_backend == name:
            raise RuntimeError(
                f"wan_attn: {settings.forced_by} cannot take this call: {reason} "
                "(WAN_ATTN_STRICT=1: nothing else is tried)"
            )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise RuntimeError(f"wan_attn: no backend takes this call: {reasons}")


def _decide(
    request: Request,
    settings: Settings,
    names: tuple[str, ...],
    reason_of: Callable[[str], str | None],
    gone: dict[str, str],
) -> measured.Decision:
    """What the measurements say. `names` is the order that holds without them."""
    if not measured.may_decide(request, settings):
        return measured.NONE
    try:
        takers = [name for name in names if reason_of(name) is None]
    except RuntimeError:  # a device in trouble: the order says where that matters
        return measured.NONE
    return measured.decide(request, takers, gone)


def takers(request: Request, settings: Settings) -> tuple[str, ...]:
    """The backends that take the call and may be chosen for it, in the order of order()."""
    names = order(request, settings)
    return tuple(n for n in names if why_not(n, request, settings, None, False) is None)


def available(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, str | None]:
    """Every backend, in the order of the selection, with why it cannot run here; None: it can.

    Asked for Wan2.2's plain self-attention (TI2V-5B at 1280x704); `python -m wan_attn why` asks for
    any other call. Allocates nothing.

    Args:
        device: None: the current CUDA device where there is one, or another GPU, else the CPU.
        dtype: what would be computed in.

    Returns:
        name, as in USE_ATTENTION_BACKEND -> reason or None.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else (*accelerators(), "cpu")[0]
    request = Request.of(WORKLOADS["ti2v-5b-720p"], dtype, device)
    return {name: backend.why_not(request) for name, backend in REGISTRY.items()}
