# SPDX-License-Identifier: Apache-2.0
"""ahead.py - measures calls that need not exist yet, for `wan-attn tune`: on a slice's operands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from wan_attn.config import Settings
from wan_attn.request import Call, Request
from wan_attn.selection.choose import compute_dtype, takers
from wan_attn.tuning import candidates, kinds, measure, slices, turn
from wan_attn.tuning.book import Entry
from wan_attn.tuning.candidates import Candidate
from wan_attn.tuning.slices import Operands, Slice
from wan_attn.workloads import Workload

# About as long all runs of one call take on a slow card or CPU, less on others.
SECONDS = {"cuda": 3.0, "cpu": 10.0}


@dataclass(frozen=True)
class Outcome:
    """What is known of one call after its turn.

    Attributes:
        way: how hosts make the call, in words.
        entry: the measurement; None: `why_not` says why there is none.
        chosen: what it chooses.
        is_new: it was made just now.
    """

    call: Workload
    way: str
    request: Request
    entry: Entry | None
    chosen: Candidate | None
    is_new: bool = False
    why_not: str = ""


def ways(
    calls: Iterable[Workload],
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
    grad: bool = False,
) -> Iterator[tuple[Workload, str, Request]]:
    """Each call as hosts make it: diffusers and ComfyUI plainly, stock Wan2.2 with float32 query
    and key, and with the lengths of its keys where it attends to itself.

    Args:
        grad: plainly, as those train that make it, with its gradient.
    """
    for call in calls:
        computed = compute_dtype(dtype, None, device, settings.force_fp16)
        yield call, "plain", Request.of(call, computed, device, needs_grad=grad)
        if grad:
            continue
        if call.head_dim == 128 and computed != torch.float32:
            has_lengths = call.seqlen_q == call.seqlen_k
            words = "fp32 q and k" + (", k_lens" if has_lengths else "")
            stock = Request.of(
                call, computed, device, qk_dtype=torch.float32, has_k_lens=has_lengths
            )
            yield call, words, stock


def tune(
    call: Workload, way: str, request: Request, settings: Settings, again: bool = False
) -> Outcome:
    """Measures a call unless that was done before.

    Args:
        again: also if it was.

    Raises:
        RuntimeError: the device is in trouble.
    """
    settings = replace(settings, backend="auto", use_sdpa=False, tune="auto")
    why_not = kinds.why_never(request)
    if not why_not and kinds.machine(request.device) is None:
        why_not = f"there is no {request.device} here"
    if why_not:
        return Outcome(call, way, request, None, None, why_not=why_not)
    found = candidates.of(request, takers(request, settings))
    if len(found) < 2:
        names = found[0].title if found else "nothing"
        return Outcome(call, way, request, None, None, why_not=f"{names} alone takes it")
    entry = turn.entry_of(request)
    if entry is not None and not again and entry.is_whole and all(map(entry.knows, found)):
        return Outcome(call, way, request, entry, entry.best(found))
    part = _part(request, len(found))
    entry = turn.measured(request, found, _operands(request, part), part, replaces=True)
    return Outcome(call, way, request, entry, entry.best(found), is_new=True)


def _part(request: Request, count: int) -> Slice:
    """As large as there is time for: no call has to pay."""
    kind = request.device.type
    units = 1 if kind == "cuda" else torch.get_num_threads()
    return slices.choose(
        request, 1.0, SECONDS[kind] * turn.RATE[kind] * units / measure.runs(count)
    )


def _operands(request: Request, part: Slice) -> Operands:
    """Random ones of the size of the slice: a call as large as Wan's need not fit the memory."""
    r, group = request, request.num_heads_q // request.num_heads_k
    generator = torch.Generator(r.device).manual_seed(0)

    def draw(rows: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
        shape = (r.batch, rows, heads, r.head_dim)
        return torch.randn(shape, generator=generator, device=r.device).to(dtype)

    query = draw(part.rows, part.heads_k * group, r.query_dtype)
    key = draw(r.seqlen_k, part.heads_k, r.key_dtype)
    value = draw(r.seqlen_k, part.heads_k, r.dtype)
    lengths = torch.full((r.batch,), r.seqlen_k, device="cpu") if r.has_k_lens else None
    return query, key, value, Call(k_lens=lengths, is_causal=r.is_causal, window=r.window)
