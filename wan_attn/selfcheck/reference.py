# SPDX-License-Identifier: Apache-2.0
"""reference.py - the self-tests' calls and their results in float64; shares no code.

The inputs are multiples of 1/32 in [-2, 2], which float32, float16 and bfloat16 all hold exactly.
So one float64 result serves the three, and what is measured is the arithmetic of the path alone.
Everything beyond a sample's real lengths is NaN: a path that reads it, even to multiply it by
zero, shows NaN.

The bound for one element is 2 u (sum p|v| + |out|): rounding each softmax weight p and the result
once costs at most u (sum p|v| + |out|), and a factor of two is left for the order of the sums.
u is half a unit in the last place: 2^-9 for bfloat16, 2^-12 for float16. Paths in float32 round
thousands of times instead of twice: u = 2^-20. Libraries that are not ours may also round the
scores (torch 2.4 does, in float16 on the CPU), which moves a weight by u |score|: for them
sum p|v| counts (1 + largest score of the row) times.

Rows of 8-bit scores (csrc/cpu/qk8.h) may be off by more: quantising moves score (i, j) by about
scale |q[i]| |k[j] - mean| c sqrt(2) / (127 sqrt(12 head_dim)), where c, the largest number of a
rotated row in units of its root mean square, is about 3.5. Such shifts differ from key to key, so
that out moves by their size times sqrt(sum p^2 (v - out)^2), and lse by their size times
sqrt(sum p^2). Eight times that is allowed, and for lse, whose shifts do not cancel in the second
order, the square of their size. What the integers are does not depend on the card.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_DIMS = (64, 80, 128)
LENGTHS = ((1, 1), (1, 513), (257, 257), (257, 513), (513, 257), (513, 1), (513, 513))
MASKS = {"full": (False, (-1, -1)), "causal": (True, (-1, -1)), "window": (False, (100, 40))}
UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-20}
BATCH, HEADS_Q, HEADS_K = 2, 2, 1
SHIFT_8BIT = 3.5 * math.sqrt(2) / (127 * math.sqrt(12))


@dataclass(frozen=True)
class Case:
    """One call. Sample 0 has its full lengths, sample 1 fewer rows and half the keys."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int
    mask: str

    @property
    def k_lens(self) -> tuple[int, int]:
        return self.seqlen_k, self.seqlen_k // 2

    @property
    def q_lens(self) -> tuple[int, int] | None:
        """Given in half of the cases, as callers do."""
        return (self.seqlen_q, self.seqlen_q * 2 // 3) if self.head_dim != 80 else None

    @property
    def is_longest(self) -> bool:
        """The one call of a kind that is worth several threads."""
        return (self.seqlen_q, self.seqlen_k, self.head_dim) == (*max(LENGTHS), max(HEAD_DIMS))

    def __str__(self) -> str:
        lengths = f"seqlen_q={self.seqlen_q} seqlen_k={self.seqlen_k}"
        return f"{lengths} head_dim={self.head_dim} {self.mask}"


def cases() -> Iterator[Case]:
    """Every pair of lengths with every head_dim; the kinds of mask take turns."""
    masks = itertools.cycle(MASKS)
    for head_dim, (seqlen_q, seqlen_k) in itertools.product(HEAD_DIMS, LENGTHS):
        yield Case(seqlen_q, seqlen_k, head_dim, next(masks))


def draw(generator: torch.Generator, *shape: int, lens: Sequence[int] | None = None) -> Tensor:
    """[batch, seqlen, heads, head_dim] float32 on the CPU, NaN beyond the real lengths."""
    # The CPU by name: the program may have another default device.
    x = torch.randint(-64, 65, shape, generator=generator, device="cpu").to(torch.float32) / 32
    for b, used in enumerate(lens or ()):
        x[b, used:] = math.nan
    return x


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as float32 on the CPU, the same for the same case, NaN beyond the real lengths."""
    generator = torch.Generator("cpu").manual_seed(
        case.seqlen_q * 1000 + case.seqlen_k + case.head_dim
    )

    def operand(seqlen: int, heads: int, lens: tuple[int, int] | None) -> Tensor:
        return draw(generator, BATCH, seqlen, heads, case.head_dim, lens=lens)

    return (
        operand(case.seqlen_q, HEADS_Q, case.q_lens),
        operand(case.seqlen_k, HEADS_K, case.k_lens),
        operand(case.seqlen_k, HEADS_K, case.k_lens),
    )


@dataclass(frozen=True)
class Truth:
    """A case in float64."""

    out: Tensor  # [batch, seqlen_q, heads, head_dim]
    lse: Tensor  # [batch, heads, seqlen_q]
    spread: Tensor  # Σ p|v|, as out
    peak: Tensor  # largest |score| of each row, [batch, seqlen_q, heads, 1]
    # By how much 8-bit scores, or means of blocks, may move out and lse; None: nobody has asked.
    moved: tuple[Tensor, Tensor] | None = None

    def out_bound(self, unit: float, is_ours: bool) -> Tensor:
        weights = self.spread if is_ours else self.spread * (1 + self.peak)
        return 2 * unit * (weights + self.out.abs())

    def bounds(self, unit: float, has_moved: bool) -> tuple[Tensor, Tensor]:
        """For out and lse of a kernel of ours; has_moved: `moved` counts."""
        out, lse = self.out_bound(unit, is_ours=True), self.lse_bound(unit, is_ours=True)
        if not has_moved:
            return out, lse
        assert self.moved is not None, "attention() has not been asked for 8-bit scores"
        return out + self.moved[0], lse + self.moved[1]

    def lse_bound(self, unit: float, is_ours: bool) -> Tensor:
        """lse is float32 for every dtype of the inputs; only a rounded score moves it further."""
        size = 1 + self.lse.nan_to_num(0.0, 0.0, 0.0).abs()
        rounded = 0.0 if is_ours else unit
        return 2 * (UNIT[torch.float32] * size + rounded * self.peak[..., 0].transpose(1, 2))


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor, is_lossy: bool = False) -> Truth:
    """The case's result; see attention()."""
    is_causal, window = MASKS[case.mask]
    q_lens = case.q_lens or (case.seqlen_q,) * BATCH
    return attention(q, k, v, q_lens, case.k_lens, is_causal, window, is_lossy=is_lossy)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    is_lossy: bool = False,
) -> Truth:
    """Straight from the definition, one head at a time.

    Args:
        q, k, v: [batch, seqlen, heads, head_dim]; the heads of q are a multiple of those of k.
        q_lens, k_lens: the real lengths of each sample.
        window, scale: as in Call.
        is_lossy: with what 8-bit scores may be off by, which costs as much again.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    spread, peak = torch.zeros_like(out), torch.zeros_like(out[..., :1])
    lse = torch.full_like(out[..., 0].transpose(1, 2), -math.inf)
    moved = (torch.zeros_like(out), torch.zeros_like(lse)) if is_lossy else None
    factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    group = q.shape[2] // k.shape[2]
    for b, (used_q, used_k) in enumerate(zip(q_lens, k_lens, strict=True)):
        if not (used_q and used_k):
            continue
        seen = seen_keys(used_q, used_k, is_causal, window, q.device)
        for h in range(q.shape[2]):
            keys, values = k[b, :used_k, h // group].double(), v[b, :used_k, h // group].double()
            scores = q[b, :used_q, h].double() @ keys.T * factor
            peak[b, :used_q, h, 0] = scores.abs().amax(dim=1)
            scores = scores.masked_fill(~seen, -math.inf)
            row = torch.logsumexp(scores, dim=1)
            weights = torch.exp(scores - row[:, None]).nan_to_num(
                0.0
            )  # -inf - -inf: a row without keys
            out[b, :used_q, h] = weights @ values
            spread[b, :used_q, h] = weights @ values.abs()
            lse[b, h, :used_q] = row
            if moved is not None:
                rows = q[b, :used_q, h].double() * factor
                moved[0][b, :used_q, h], moved[1][b, h, :used_q] = moved_by_8_bits(
                    rows, keys, values, weights, out[b, :used_q, h]
                )
    return Truth(out, lse, spread, peak, moved)


def moved_by_8_bits(
    rows: Tensor, keys: Tensor, values: Tensor, weights: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """By how much 8-bit scores may move out, [rows, head_dim], and lse, [rows].

    Args:
        rows, keys: of one head; rows times the scale. All real keys: K's mean is theirs.
        weights: [rows, keys], 0 where a row does not see a key.
    """
    longest = (keys - keys.mean(dim=0)).norm(dim=1).amax()
    size = rows.norm(dim=1) * longest * SHIFT_8BIT / math.sqrt(keys.shape[1])
    square = weights.square()
    total = square.sum(dim=1)
    apart = square @ values.square() - 2 * out * (square @ values) + out.square() * total[:, None]
    of_out = 8 * size[:, None] * apart.clamp(min=0.0).sqrt()
    return of_out, 8 * size * total.sqrt() + size.square()


def seen_keys(
    used_q: int, used_k: int, is_causal: bool, window: tuple[int, int], device: torch.device
) -> Tensor:
    """[used_q, used_k]: whether the mask lets row i see key j."""
    # How far key j lies to the right of row i's diagonal; the last row's is the last key.
    rows, keys_at = (torch.arange(n, device=device) for n in (used_q, used_k))
    ahead = keys_at[None, :] - (rows[:, None] + used_k - used_q)
    left, right = window
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if is_causal:
        seen &= ahead <= 0
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def difference(
    case: object, truth: Truth, out: Tensor, lse: Tensor, unit: float, has_moved: bool = False
) -> str | None:
    """What is beyond its bound, in words; None: nothing. `case`: what the words call the call;
    `unit`, has_moved: see above and Truth."""
    bounds = truth.bounds(unit, has_moved)
    for name, got, expected, bound in (
        ("out", out, truth.out, bounds[0]),
        ("lse", lse, truth.lse, bounds[1]),
    ):
        got = got.to("cpu", torch.float64)
        off = (got - expected).abs()
        is_wrong = ~((off <= bound) | (got == expected))  # NaN is wrong; -inf and -inf are equal
        if bool(is_wrong.any()):
            at = tuple(int(n) for n in is_wrong.nonzero()[0])
            return (
                f"{name}{list(at)} is {float(got[at]):g} instead of {float(expected[at]):g} in a"
                f" call of [{case}], {int(is_wrong.sum())} of {is_wrong.numel()} elements are wrong"
            )
    return None
