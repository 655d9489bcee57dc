# SPDX-License-Identifier: Apache-2.0
"""peers.py - everything that can compute one attention call, ours and others', as one list.

A peer takes query, key and value as Wan has them, [batch, seqlen, heads, head_dim], and returns the
same; whatever it must convert or quantise for that is part of its time. To add one: a function, and
a line in all_peers().
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_attn.backends import LOSSY, REGISTRY
from wan_attn.backends._torch_kernels import SDPA
from wan_attn.backends.chunked import NAME as CHUNKED
from wan_attn.native import op
from wan_attn.request import PLAIN, Request

BASELINE = "torch"
"""PyTorch's SDPA by its own choice of kernel: 1.0 in every table and picture."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to compute a call.

    Attributes:
        name: in tables and for --kernels.
        title: what it is.
        is_ours: a row of our kernel table.
        is_lossy: it quantises; its error is larger by design.
        run: computes the call.
        why_not: why it cannot take a call; None: it can.
        is_quiet: measured only where named: the row for CPUs that have no vector row.
    """

    name: str
    title: str
    run: Attend
    why_not: Callable[[Request], str | None]
    is_ours: bool = False
    is_lossy: bool = False
    is_quiet: bool = False


def all_peers(device: torch.device) -> list[Peer]:
    """Ours first; the rest in the order in which tables show them."""
    rows = [row for row in op.kernels() if row.device == device.type]
    peers = [_row(row) for row in rows]
    peers.append(Peer(BASELINE, "PyTorch SDPA, its own choice", _torch, _takes_everything))
    peers += [_torch_kernel(name, kernel, device) for name, kernel in _TORCH_KERNELS]
    peers += [_backend(name) for name in ("fa3", "fa2", CHUNKED, "xformers", *sorted(LOSSY))]
    return peers


def _row(row: op.KernelInfo) -> Peer:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = (x if x.dtype == torch.float32 else x.to(value.dtype) for x in (query, key))
        out: Tensor = torch.ops.wan_attn.sdpa(query, key, value, kernel=row.index)[0]
        return out

    def why_not(request: Request) -> str | None:
        return op.why_not(request, row.index)

    return Peer(
        row.name,
        row.description,
        run,
        why_not,
        is_ours=True,
        is_lossy=row.is_lossy,
        is_quiet=row.device == "cpu" and not row.cpu_features and bool(op.cpu_features()),
    )


def _takes_everything(request: Request) -> str | None:
    return None


def _heads_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, heads, seqlen, head_dim] in value's dtype, key and value repeated where fewer."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return SDPA(*_heads_first(query, key, value)).transpose(1, 2)


_TORCH_KERNELS = (
    ("torch-flash", SDPBackend.FLASH_ATTENTION),
    ("torch-cudnn", SDPBackend.CUDNN_ATTENTION),
    ("torch-efficient", SDPBackend.EFFICIENT_ATTENTION),
    ("torch-math", SDPBackend.MATH),
)


def _torch_kernel(name: str, kernel: SDPBackend, device: torch.device) -> Peer:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a refusal comes with a warning for each reason
            return _torch(query, key, value)

    def why_not(request: Request) -> str | None:
        if device.type != "cuda" and kernel in (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ):
            return f"PyTorch has it for CUDA, the call is on {device.type}"
        if kernel == SDPBackend.MATH:
            return _why_not_math(request)
        return None  # what else it refuses it says when it is called

    return Peer(
        name, f"PyTorch SDPA, {kernel.name.lower().replace('_attention', '')}", run, why_not
    )


def _why_not_math(request: Request) -> str | None:
    """Refuses calls whose scores do not fit: math stores them about three times."""
    scores = request.batch * request.num_heads_q * request.seqlen_q * request.seqlen_k
    needed = 3 * scores * 4
    free = free_bytes(request.device)
    if free is not None and needed > 0.8 * free:
        return f"would need about {needed / 2**30:.1f} GiB for scores, {free / 2**30:.1f} are free"
    return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that are free now; None: not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return None


def _backend(name: str) -> Peer:
    backend = REGISTRY[name]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return backend.run(query, key, value, PLAIN)[0]

    return Peer(name, backend.TITLE, run, backend.why_not, is_lossy=name in LOSSY)


def choose(peers: list[Peer], wanted: list[str] | None) -> list[Peer]:
    """Returns the peers to measure: the named ones, or all that are worth it.

    Raises:
        ValueError: no peer has this name.
    """
    if wanted is None:
        return [peer for peer in peers if not peer.is_quiet]
    known = {peer.name: peer for peer in peers}
    for name in wanted:
        if name not in known:
            raise ValueError(f"--kernels must name some of {', '.join(known)}; got {name!r}")
    chosen = [peer for peer in peers if peer.name in wanted]
    if BASELINE not in wanted:  # what all others are a multiple of
        chosen.append(known[BASELINE])
    return chosen
