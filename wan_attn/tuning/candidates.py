# SPDX-License-Identifier: Apache-2.0
"""candidates.py - the exact ways to compute a call, and how to run each of them alone.

A row of our kernel table is a candidate, and so is each kernel of PyTorch's on a GPU. The tiles of
a row are not: the C ABI names a row, and C takes the tile that its table gives for the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wan_attn.backends import REGISTRY, chunked, native, torch_sdpa
from wan_attn.backends._torch_kernels import VARIANTS, variants
from wan_attn.native import kernels, op
from wan_attn.request import Call, Request

Run = Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor | None]]

# The modules whose version decides how fast a backend is, where it is not torch's or ours.
_MODULES = {
    "fa3": ("flash_attn_interface", "flash_attn_3"),
    "fa2": ("flash_attn",),
    "xformers": ("xformers",),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a call.

    Attributes:
        backend: key of REGISTRY.
        variant: of backend `sdpa` a row of the kernel table, of `torch` one of its kernels; "" is
            the backend's own choice.
    """

    backend: str
    variant: str = ""

    @property
    def name(self) -> str:
        """As the file has it: sdpa:sdpa_avx2, torch:cudnn, fa2."""
        return f"{self.backend}:{self.variant}" if self.variant else self.backend

    @property
    def title(self) -> str:
        """As people read it."""
        return title(self.name)


def title(name: str) -> str:
    """A candidate's name as people read it."""
    backend, _, variant = name.partition(":")
    if backend == native.NAME and variant:
        return variant
    if backend == torch_sdpa.NAME:
        return f"torch {VARIANTS[variant].title}" if variant in VARIANTS else "torch"
    return REGISTRY[backend].TITLE if backend in REGISTRY else name


def of(request: Request, backends: Iterable[str]) -> tuple[Candidate, ...]:
    """The candidates for a call, in today's order.

    Args:
        backends: those that take the call and may be chosen for it, in today's order.
    """
    found: list[Candidate] = []
    for name in backends:
        if name == native.NAME:
            found += [Candidate(name, row) for row in _rows(request)]
        elif name == torch_sdpa.NAME:
            found += [Candidate(name, one) for one in variants(request.device) or ("",)]
        elif name != chunked.NAME:  # which computes by torch's kernels, and more slowly
            found.append(Candidate(name))
    return tuple(found)


def _rows(request: Request) -> list[str]:
    """Our rows that take the call, best first. The portable one only where there is no other."""
    rows = [
        row
        for row in kernels.kernels()
        if row.device == request.device.type
        and not row.is_lossy
        and op.why_not(request, row.index) is None
    ]
    vector = [row for row in rows if row.device != "cpu" or row.cpu_features]
    return [row.name for row in vector or rows]


def runner(candidate: Candidate, request: Request) -> Run:
    """How a plan runs it: where its kernel refuses one of these calls, the next one is asked."""
    backend, variant = candidate.backend, candidate.variant
    if backend == native.NAME and variant:
        # Not by its number where it is C's own choice: C may take another row for odd strides.
        if native.kernel_name(request) == variant:
            return native.run
        return partial(native.run, kernel=_index(variant))
    if backend == torch_sdpa.NAME and variant:
        return partial(torch_sdpa.run_by, VARIANTS[variant].kernel, False)
    return REGISTRY[backend].run


def alone(candidate: Candidate, with_gradients: bool = False) -> Run:
    """How it is measured: its kernel, or an error.

    Args:
        with_gradients: those of query, key and value come after it.
    """
    run = _alone(candidate)
    return partial(_and_gradients, run) if with_gradients else run


def _and_gradients(
    run: Run, query: Tensor, key: Tensor, value: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    """The gradient of out is out itself: it lies there already."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out, lse = run(leaves[0], leaves[1], leaves[2], call)
        grads = torch.autograd.grad(out, leaves, out.detach())
    if not all(grad.shape == x.shape for grad, x in zip(grads, leaves, strict=True)):
        raise RuntimeError("its gradients have other shapes than their operands")
    return out.detach(), None if lse is None else lse.detach()


def _alone(candidate: Candidate) -> Run:
    backend, variant = candidate.backend, candidate.variant
    if backend == native.NAME and variant:
        return partial(native.run, kernel=_index(variant))
    if backend == torch_sdpa.NAME and variant:
        return partial(torch_sdpa.run_by, VARIANTS[variant].kernel, True)
    return REGISTRY[backend].run


def _index(row: str) -> int:
    return next(kernel.index for kernel in kernels.kernels() if kernel.name == row)


def version(backend: str) -> str:
    """Of the library behind a backend; "" for torch and us, whose versions the machine has."""
    for name in _MODULES.get(backend, ()):
        if found := str(getattr(sys.modules.get(name), "__version__", "")):
            return found
    return ""
