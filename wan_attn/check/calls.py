# SPDX-License-Identifier: Apache-2.0
"""calls.py - small calls against float64: every tile of a row, every length, every kind of mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from wan_attn.check.target import Kernel, Target
from wan_attn.selfcheck import proof_calls, rope_calls
from wan_attn.selfcheck.proof_calls import Answer
from wan_attn.selfcheck.reference import UNIT, Truth, attention, difference, draw
from wan_attn.workloads import Workload

Detail = dict[str, Any]
LOSSY_RMS = 0.05
GROUP = 25  # lengths that share one padded batch
SEED = 20261129


class WrongError(Exception):
    """The kernel computed something else than what is right; the message says what."""


@dataclass(frozen=True)
class SmallCall:
    """One call. Everything behind a real length is NaN."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int
    heads_q: int = 2
    heads_k: int = 2
    batch: int = 1
    q_lens: tuple[int, ...] | None = None
    k_lens: tuple[int, ...] | None = None
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    qk_is_f32: bool = False  # beside a half value

    def __str__(self) -> str:
        said = f"{self.batch}x{self.seqlen_q}:{self.seqlen_k}x{self.heads_q}x{self.head_dim}"
        for name, default in (("is_causal", False), ("window", (-1, -1)), ("scale", None)):
            value = getattr(self, name)
            said += "" if value == default else f" {name}={value}"
        return said + (" q_lens" if self.q_lens else "") + (" k_lens" if self.k_lens else "")

    @property
    def workload(self) -> Workload:
        sizes = (self.seqlen_q, self.seqlen_k, self.heads_q, self.heads_k, self.head_dim)
        return Workload("small", str(self), self.batch, *sizes)


@lru_cache(maxsize=16)
def known(call: SmallCall, is_lossy: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Truth]:
    """The call's operands in float32 on the CPU, exact in every dtype, and its float64 result."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    rows = (call.batch, call.seqlen_q, call.heads_q, call.head_dim)
    keys = (call.batch, call.seqlen_k, call.heads_k, call.head_dim)
    query = draw(generator, *rows, lens=call.q_lens)
    key, value = (draw(generator, *keys, lens=call.k_lens) for _ in range(2))
    q_lens = call.q_lens or (call.seqlen_q,) * call.batch
    k_lens = call.k_lens or (call.seqlen_k,) * call.batch
    mask = (call.is_causal, call.window, call.scale, is_lossy)
    truth = attention(query, key, value, q_lens, k_lens, *mask)
    return (query, key, value), truth


def lens_tensor(lens: Sequence[int] | None) -> Tensor | None:
    """Real lengths on the CPU, as Wan2.2 passes them."""
    return None if lens is None else torch.tensor(lens, dtype=torch.int64, device="cpu")


class Tally:
    """Calls that a kernel answered rightly, and those that it refused, which is no failure."""

    def __init__(self, target: Target, kernel: Kernel) -> None:
        self.target, self.kernel = target, kernel
        self.done, self.refused = 0, dict[str, int]()

    def check(self, call: SmallCall) -> tuple[Answer, tuple[Tensor, Tensor, Tensor]] | None:
        """The answer and its operands, if the kernel takes the call.

        Raises:
            WrongError: the answer is wrong. RuntimeError: the call failed.
        """
        dtype, row = self.kernel.dtype, self.kernel.row
        qk_dtype = torch.float32 if call.qk_is_f32 else dtype
        reason = self.target.why_not(
            self.kernel, call.workload, qk_dtype=qk_dtype, is_causal=call.is_causal,
            window=call.window, has_q_lens=call.q_lens is not None,
            has_k_lens=call.k_lens is not None, return_lse=True,
        )  # fmt: skip
        if reason is not None:
            reason = reason.removeprefix(f"{row.name}: ")
            self.refused[reason] = self.refused.get(reason, 0) + 1
            return None
        (query, key, value), truth = known(call, self.kernel.row.is_lossy)
        device = self.target.device
        operands = query.to(device, qk_dtype), key.to(device, qk_dtype), value.to(device, dtype)
        answer = self.answer(call, operands)
        found = compare(call, self.kernel, truth, *answer)
        if found is not None:
            raise WrongError(found)
        self.done += 1
        return answer, operands

    def answer(self, call: SmallCall, operands: tuple[Tensor, Tensor, Tensor]) -> Answer:
        """What the kernel computes for the call."""
        return self.target.run(
            self.kernel.row, operands, lens_tensor(call.q_lens), lens_tensor(call.k_lens),
            scale=call.scale, is_causal=call.is_causal, window=call.window,
        )  # fmt: skip

    def detail(self) -> Detail:
        """For the report."""
        if not self.done and self.refused:
            return {"skipped": "; ".join(self.refused)}
        return {"calls": self.done, "refused": self.refused}


def compare(call: SmallCall, kernel: Kernel, truth: Truth, out: Tensor, lse: Tensor) -> str | None:
    """What is wrong with an answer, in words; None: nothing. A row that quantises may be off by
    what selfcheck/reference.py says, and by 5 % root mean square."""
    found = difference(call, truth, out, lse, UNIT[kernel.dtype], kernel.row.is_lossy)
    if found is not None or not kernel.row.is_lossy:
        return found
    gap = float((out.to("cpu", torch.float64) - truth.out).square().mean().sqrt())
    share = gap / float(truth.out.square().mean().sqrt())
    if share <= LOSSY_RMS:
        return None
    return f"relative rms error {share:.1%} in a call of [{call}], allowed {LOSSY_RMS:.0%}"


def check_small(target: Target, kernel: Kernel, _: str) -> Detail:
    """The calls of a proof, which reach every tile of the row and every pass beside it; then few
    rows, and every head_dim, twice with the same bits."""
    tally = Tally(target, kernel)
    # A CPU's row takes any head_dim; what it does for 256 it does for 128 in half the time.
    row = replace(kernel.row, head_dim_max=kernel.head_dim_near(128))
    found = proof_calls.wrong(target.card, row, kernel.dtype)
    if found is not None:
        raise WrongError(found)
    tally.done += len(proof_calls.CALLS)
    head_dim = kernel.head_dim_near(128)
    # CPU rows have another body for few query rows.
    few = (SmallCall(1, 513, head_dim), SmallCall(5, 197, head_dim, heads_q=4))
    for call in (*few, *(SmallCall(130, 197, d) for d in kernel.head_dims())):
        first = tally.check(call)
        if first is not None:
            again = tally.answer(call, first[1])
            if not all(map(torch.equal, first[0], again)):
                raise WrongError(f"[{call}]: the same call gave other bits the second time")
    return tally.detail()


def check_rope(target: Target, _: Kernel | None, name: str) -> Detail:
    """The calls of a proof of a row of rms_norm_rope: rms_norm_rope_sm75/bf16, for example."""
    kernel = next(kernel for kernel in target.rope_kernels() if kernel.name == name)
    found = rope_calls.wrong(target.card, kernel.row, kernel.dtype)
    if found is not None:
        raise WrongError(found)
    return {"calls": len(rope_calls.CALLS)}


def length_calls(lengths: Sequence[int], head_dim: int) -> Iterator[SmallCall]:
    """All these lengths of keys, in padded batches, with other lengths of queries."""
    for begin in range(0, len(lengths), GROUP):
        k_lens = tuple(lengths[begin : begin + GROUP])
        q_lens = tuple(1 + (7 * length) % 300 for length in k_lens)
        yield SmallCall(max(q_lens), max(k_lens), head_dim, 1, 1, len(k_lens), q_lens, k_lens)


def check_lengths(target: Target, kernel: Kernel, _: str) -> Detail:
    """Lengths 1, 3, 5 ... 299 of keys, as many of queries, NaN behind every one."""
    tally, lengths = Tally(target, kernel), target.sizes.lengths
    for call in length_calls(lengths, kernel.head_dim_near(128)):
        tally.check(call)
    return tally.detail() | {"lengths": len(lengths), "to": lengths[-1]}


def mask_calls(head_dim: int) -> Iterator[SmallCall]:
    """Causal, windows, grouped heads, a sample without keys, a scale."""
    plain = SmallCall(150, 201, head_dim, heads_q=4, heads_k=2, batch=2)
    yield replace(plain, is_causal=True)
    yield replace(plain, window=(37, 5))
    yield replace(plain, is_causal=True, window=(64, -1))
    yield replace(plain, is_causal=True, k_lens=(0, 129))
    yield replace(plain, scale=0.3, q_lens=(150, 7))


def check_masks(target: Target, kernel: Kernel, _: str) -> Detail:
    """mask_calls(), float32 query and key, and views of one fused buffer."""
    tally, head_dim = Tally(target, kernel), kernel.head_dim_near(128)
    for call in mask_calls(head_dim):
        tally.check(call)
    if kernel.dtype != torch.float32:
        tally.check(SmallCall(97, 65, head_dim, qk_is_f32=True))
    fused = torch.randn(2, 133, 3, 2, head_dim, device=target.device).to(kernel.dtype)
    query, key, value = fused.unbind(2)
    out, _lse = target.run(kernel.row, (query, key, value))
    copies = query.contiguous(), key.contiguous(), value.contiguous()
    same, _lse = target.run(kernel.row, copies)
    if not torch.equal(out, same):
        raise WrongError("a view of a fused buffer gives other bits than its copy")
    return tally.detail()
