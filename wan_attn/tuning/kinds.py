# SPDX-License-Identifier: Apache-2.0
"""kinds.py - which calls share a measurement, and which machine it belongs to, as text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import torch

from wan_attn import config
from wan_attn.backends._common import capability
from wan_attn.cuda import sources
from wan_attn.cuda.rows import tiles, tiles_sm90
from wan_attn.log import dtype_name
from wan_attn.native import library, op
from wan_attn.request import Request
from wan_attn.store.machine import cpu_name, driver_version
from wan_attn.version import __version__

# Work of a call, in FLOP, below which it is never measured: other things than its kernel, such as
# launching it, decide how long it takes, and today's order is good enough.
SMALL = {"cpu": 1e8, "cuda": 1e10}


@dataclass(frozen=True, slots=True)
class Kind:
    """Calls for which one measurement is as good as another.

    Attributes:
        device: index of the device in this process, for the slices that are measured; -1: the CPU.
        text: everything else, as it stands in the file.
    """

    device: int
    text: str


def work(request: Request) -> float:
    """FLOP of a call without masks; with the gradient, whose products are two and a half times
    those of forward, where one is wanted."""
    r = request
    return (
        (14.0 if r.needs_grad else 4.0)
        * r.batch
        * r.num_heads_q
        * r.seqlen_q
        * r.seqlen_k
        * r.head_dim
    )


def why_never(request: Request) -> str:
    """Why calls like this are not measured; "": they may be."""
    if request.device.type not in SMALL:
        return f"nothing is measured on {request.device.type}"
    if request.dropout_p > 0:
        return "dropout has no result to compare with"
    if work(request) < SMALL[request.device.type]:
        return "the call is too small for a measurement to pay"
    return ""


def kind_of(request: Request) -> Kind:
    """The kind of a call."""
    r = request
    index = -1 if r.device.type == "cpu" else _index(r.device)
    words = [
        dtype_name(r.dtype),
        f"q={dtype_name(r.query_dtype)}",
        f"k={dtype_name(r.key_dtype)}",
        f"d={r.head_dim}",
        _mask(r),
        f"group={r.num_heads_q // r.num_heads_k}",
        f"lengths={'q' * r.has_q_lens}{'k' * r.has_k_lens}" if r.has_q_lens or r.has_k_lens else "",
        "lse" if r.return_lse else "",
        "gradient" if r.needs_grad else "",
        f"Lq<={_class(r.seqlen_q)}",
        f"Lk<={_class(r.seqlen_k)}",
        f"heads<={_class(r.batch * r.num_heads_q)}",
    ]
    if r.device.type == "cpu":
        words += [f"threads={torch.get_num_threads()}", f"isa={config.current().cpu_isa}"]
    return Kind(index, " ".join(filter(None, words)))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _class(number: int) -> int:
    """The power of two that it does not exceed."""
    return 1 << max(0, number - 1).bit_length()


def _mask(request: Request) -> str:
    left, right = (side if side < 0 else _class(side + 1) for side in request.window)
    if (left, right) == (-1, -1):
        return "causal" if request.is_causal else "full"
    return f"window={left},{right}" + (",causal" if request.is_causal else "")


def machine(device: torch.device) -> dict[str, str] | None:
    """What a measurement depends on beside its kind; None where the device cannot be asked."""
    if device.type == "cpu":
        return _cpu()
    if device.type != "cuda" or capability(device) is None:
        return None
    try:
        return _card(_index(device))
    except (RuntimeError, AssertionError):  # torch has none of that number, or was built without
        return None


def _common() -> dict[str, str]:
    return {"torch": torch.__version__, "wan_attn": __version__, "kernels": _kernels()}


@cache
def _cpu() -> dict[str, str]:
    return {"device": cpu_name(), "features": " ".join(op.cpu_features()), **_common()}


@cache
def _card(index: int) -> dict[str, str]:
    p = torch.cuda.get_device_properties(index)
    return {
        "device": f"{p.name}, {p.major}.{p.minor}, {p.multi_processor_count} SMs",
        "driver": driver_version(),
        "cudnn": str(torch.backends.cudnn.version() or ""),
        **_common(),
    }


@cache
def _kernels() -> str:
    """A hash of our kernels: the library, and the text that CUDA's are compiled from."""
    digest = hashlib.sha256(library.binary())
    for source in sorted({*(one.source for one in tiles()), *(one.source for one in tiles_sm90())}):
        for name, text in sorted(sources.closure(source).items()):
            digest.update(name.encode() + text)
    return digest.hexdigest()[:20]


def forget() -> None:
    """Ask again, as a new process would."""
    for known in (_cpu, _card, _kernels):
        known.cache_clear()


config.memory(forget)
