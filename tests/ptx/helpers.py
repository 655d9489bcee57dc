# SPDX-License-Identifier: Apache-2.0
"""helpers.py - calls of the passes before and after attention, on the machine, and what they have
to give: for one compiler and one architecture.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from ctypes import Structure, c_int, c_longlong
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu import qk8, run_listed
from emu.args import (
    GuardArgs,
    Lengths,
    MergeArgs,
    PackArgs,
    PoolArgs,
    PutLengthsArgs,
    View,
)
from emu.rows import CSRC
from ptx import collect, machine
from ptx.calls import kernel

NUMBER = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HALVES = (torch.float16, torch.bfloat16)
HELPERS = tuple(
    f"wan_attn_{name}"
    for name in (
        *("measure", "find_scale", "convert", "merge", "put_lengths"),
        *("sum_keys", "mean_of_keys", "quantise_k", "quantise_q", "watch", "find_nonfinite"),
        "pool",
    )
)
MERGED_PARTS = (3, 11)  # and as many as the compiler's unrolled loops take at once, and some more


def _view(x: Tensor) -> View:
    return View(x.data_ptr(), (c_longlong * 3)(*x.stride()[:3]))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _lengths(lens: Tensor | None) -> Lengths:
    if lens is None:
        return Lengths()
    return Lengths(lens.data_ptr(), lens.stride(0), int(lens.dtype == torch.int64), 0)


def _known(tensors: list[tuple[str, Tensor, int]]) -> list[machine.Tensor_]:
    return [
        machine.Tensor_(n.encode(), x.untyped_storage().data_ptr(), x.untyped_storage().nbytes(), o)
        for n, x, o in tensors
    ]


@dataclass(frozen=True)
class Helpers:
    """The helpers as this compiler makes them for this architecture."""

    compiler: collect.Compiler
    arch: int
    csrc: Path = CSRC

    def program(self, name: str) -> machine.Program:
        jobs = (j for j in collect.shipped() if j.name == name and j.arch == self.arch)
        return kernel(next(jobs), self.compiler, self.csrc)

    def counts(self) -> Counter[str]:
        """How often each opcode of all of them has run, put together: put_lengths has a loop that
        its 256 lengths cannot enter."""
        total: Counter[str] = Counter()
        for name in HELPERS:
            total.update(self.program(name).counts())
        return total

    def _launch(
        self, name: str, args: Structure, warps: int, output: Tensor, **inputs: Tensor | None
    ) -> None:
        known = [(n, x, 0) for n, x in inputs.items() if x is not None] + [("output", output, 1)]
        knobs = machine.Knobs(order=warps % 3, seed=warps)
        machine.launch(
            self.program(f"wan_attn_{name}"),
            args,
            -(-warps // 4),
            _known(known),
            threads=128,
            knobs=knobs,
        )

    def convert(
        self,
        x: Tensor,
        dtype: torch.dtype,
        lens: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        batch, seqlen, heads, head_dim = x.shape
        to = torch.full(x.shape, 7.0, dtype=dtype)
        args = PackArgs(
            *(_view(x), to.data_ptr(), _lengths(lens), None, _address(scale)),
            *(batch, seqlen, heads, head_dim, NUMBER[x.dtype], int(dtype == torch.bfloat16), 0, 0),
        )
        rows = batch * seqlen * heads
        self._launch("convert", args, rows, to, x=x, lens=lens, scale=scale)
        return to

    def check_one_conversion(self) -> None:
        x = torch.randn(1, 5, 2, 66).bfloat16()
        got = self.convert(x, torch.float16)
        assert torch.equal(got, x.half()), "a conversion is wrong"

    def check_convert(self, source: torch.dtype, to: torch.dtype) -> None:
        """From odd addresses and strides; with infinities, NaN and subnormal numbers."""
        around = torch.randn(2, 9, 3, 101).to(source)
        special = [math.inf, -math.inf, 1e-7, -6e-8, 65520.0, 65519.0, math.nan, -0.0, 1e-40]
        around[0, 3, 1, 5:14] = torch.tensor(special)
        x = around[:, 1:, :2, 3:99]
        got, want = self.convert(x, to), x.to(to)
        assert torch.equal(got.nan_to_num(1.5), want.nan_to_num(1.5))
        assert torch.equal(got.isnan(), want.isnan())
        wide = torch.randn(1, 3, 1, 640).to(source)
        assert torch.equal(self.convert(wide, to), wide.to(to))
        for lens_dtype in (torch.int32, torch.int64):
            got = self.convert(x, to, torch.tensor([5, 0], dtype=lens_dtype))
            assert torch.equal(got[0, :5].nan_to_num(1.5), want[0, :5].nan_to_num(1.5))
            assert (got[0, 5:] == 7.0).all() and (got[1] == 7.0).all()

    def check_scales(self) -> None:
        """The power of two below which the largest finite number of a head comes to lie."""
        kinds = itertools.product(NUMBER, (torch.int32, torch.int64), ((5, 34), (170, 302)))
        for dtype, lens_dtype, (parts, head_dim) in kinds:
            x = torch.randn(2, 11, 3, head_dim).mul(
                torch.tensor([1.0, 300.0, 1e-4]).view(1, 1, 3, 1)
            )
            x = x.to(dtype)
            x[0, 2, 1, 3], x[1, 4, 0, 1] = math.inf, math.nan
            x[1, :, 2] = 0.0
            lens = torch.tensor([7, 11], dtype=lens_dtype)
            largest, scale = torch.full((2, 3, parts), math.nan), torch.full((2, 3), math.nan)
            args = PackArgs(
                *(_view(x), None, _lengths(lens), largest.data_ptr(), scale.data_ptr()),
                *(2, 11, 3, head_dim, NUMBER[dtype], 0, parts, 9),
            )
            self._launch("measure", args, 6 * parts, largest, x=x, lens=lens)
            self._launch("find_scale", args, 6, scale, largest=largest)
            for b in range(2):
                for h in range(3):
                    seen = x[b, : lens[b], h].float()
                    most = seen[seen.isfinite()].abs().max().item()
                    want = 2.0 ** (math.frexp(most)[1] - 9) if most else 1.0
                    assert scale[b, h] == want, (dtype, b, h)
            scaled = self.convert(x, torch.float16, None, scale)
            assert torch.equal(
                scaled.nan_to_num(1.5),
                (x.float() / scale[:, None, :, None]).half().nan_to_num(1.5),
            )

    def check_merge(self, splits: int, dtype: torch.dtype) -> None:
        """Parts without keys weigh nothing; a row whose parts all have none is 0 with lse -inf.

        A row whose parts all have seen scores of -inf only has NaN in them: it is NaN, and so is
        its lse.
        """
        batch, seqlen, heads, head_dim = 2, 5, 2, 80
        parts = torch.randn(splits, batch, seqlen, heads, head_dim)
        lse = torch.randn(splits, batch, heads, seqlen) * 3
        lse[1, 0, 0, 0] = lse[0, 1, 1, 2] = -math.inf
        lse[:, 1, 0, 3], parts[:, 1, 3, 0] = -math.inf, 0.0  # as the rows write what has no key
        lse[:, 0, 1, 4] = -math.inf  # and what has keys, but no score above -inf
        parts[:, 0, 4, 1] = math.nan
        for wants_lse in (True, False):
            out = torch.full((batch, seqlen, heads, head_dim), math.nan, dtype=dtype)
            new = torch.full((batch, heads, seqlen), math.nan)
            args = MergeArgs(
                *(parts.data_ptr(), lse.data_ptr(), _view(out)),
                new.data_ptr() if wants_lse else None,
                (c_longlong * 3)(*new.stride()),
                *(batch, seqlen, heads, head_dim, splits, NUMBER[dtype]),
            )
            # Two outputs: the machine is told of both.
            tensors = _known([("p", parts, 0), ("l", lse, 0), ("o", out, 1), ("n", new, 1)])
            machine.launch(self.program("wan_attn_merge"), args, 5, tensors, threads=128)
            total = torch.logsumexp(lse.double(), 0)
            weight = torch.where(lse == -math.inf, 0.0, torch.exp(lse.double() - total))
            want = (weight.permute(0, 1, 3, 2)[..., None] * parts.double()).sum(0)
            assert out[0, 4, 1].isnan().all()
            out[0, 4, 1] = want[0, 4, 1] = 0.0
            # Each weight is off by roundings of its own and of its exponent, which grow with it; of
            # the sum comes one rounding more for each part beyond three; and that of the result.
            below = (lse.amax(0) - lse).double().clamp(max=100.0).nan_to_num()
            moved = (weight * (1 + below)).permute(0, 1, 3, 2)[..., None] * parts.double().abs()
            moved = moved.nan_to_num().sum(0)
            off = (out.double() - want).abs()
            units = 4 * torch.finfo(dtype).eps + (splits - 3) * torch.finfo(torch.float32).eps
            assert (off <= units * moved).all(), f"merge is wrong by {off.max():.3e}"
            if wants_lse:
                assert new[0, 1, 4].isnan()
                new[0, 1, 4] = -math.inf
                known = total.isfinite()
                assert (new - total)[known].abs().max() <= 1e-6 * 10
                assert (new[~known] == -math.inf).all()
            else:
                assert new.isnan().all()

    def check_put_lengths(self) -> None:
        for count in (1, 127, 129, 256):
            to = torch.full((count,), -7, dtype=torch.int32)
            args = PutLengthsArgs(to.data_ptr(), count, (c_int * 256)(*range(3, 259)), 0)
            self._launch("put_lengths", args, 4, to)
            assert to.tolist() == list(range(3, 3 + count))

    def check_qk8(self, dtype: torch.dtype) -> None:
        """Integers, steps and means, to the bit; with lengths of both kinds, views, bad numbers."""

        def run(name: str, args: Structure, grid: int, tensors: list[Any]) -> None:
            knobs = machine.Knobs(order=grid % 3, seed=grid)
            machine.launch(self.program(name), args, grid, tensors, threads=128, knobs=knobs)

        for head_dim, kind in ((64, torch.int32), (128, torch.int64)):
            around = torch.randn(2, 9, 2, head_dim + 3).to(dtype)
            query, key = around[..., 3:], torch.randn(2, 700, 1, head_dim).to(dtype)
            key = key * torch.logspace(-1, 1, head_dim).to(dtype) + 2
            query[1, 2, 0, 5], key[0, 9, 0, 7] = math.inf, math.nan
            query[0, 1], key[1, 3] = 0.0, 1e-40
            qk8.check_integers(query, key, runner=run)
            lens = {"q_lens": torch.tensor([4, 9]), "k_lens": torch.tensor([70, 0])}
            lens = {name: n.to(kind) for name, n in lens.items()}
            qk8.check_integers(query, key, scale=-0.3, runner=run, **lens)
            qk8.check_integers(query, key[:, :65], scale=1e-45, wants_lse=False, runner=run)
            qk8.check_integers(query, key[:, :65], scale=3e38, wants_lse=False, runner=run)

    def check_watch(self, v_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        """The largest real |v|, and how many numbers of v and out are not finite."""
        out = torch.randn(2, 70, 2, 80).to(out_dtype)
        value = torch.randn(2, 130, 1, 80).to(v_dtype)
        for kind in (torch.int32, torch.int64, None):
            lens = None if kind is None else torch.tensor([130, 65], dtype=kind)
            value[1, 65:] = 900.0
            value[0, 129, 0, 79], out[1, 69, 1, 79], out[0, 0, 0, 0] = -77.0, math.nan, -math.inf
            words = torch.zeros(4, dtype=torch.int32)
            lengths = _lengths(lens)
            args = GuardArgs(
                *(_view(value), _view(out), lengths, words.data_ptr(), 2, 70, 130, 2, 1, 80),
                *(NUMBER[v_dtype], NUMBER[out_dtype]),
            )
            known = [("v", value, 0), ("out", out, 0), ("guard", words, 1)]
            known += [] if lens is None else [("lens", lens, 0)]

            run = partial(
                machine.launch,
                *(self.program("wan_attn_watch"), args, -(-(2 * (2 * 2 + 3)) // 4), _known(known)),
                threads=128,
            )
            run()
            largest = 77.0 if lens is not None else 900.0
            assert words[:1].view(torch.float32).item() == largest
            assert words[1:].tolist() == [0, 0, 2]
            words[3] = -1  # full
            run()
            assert words[1:].tolist() == [0, 0, -1]

    def check_nonfinite(self, dtype: torch.dtype) -> None:
        """Which blocks of values have an infinity or NaN among the real ones."""
        for head_dim, seqlen in ((2, 65), (80, 130), (128, 200)):
            around = torch.randn(2, seqlen, 3, head_dim + 1).to(dtype)
            value = around[..., 1:]
            value[0, 64, 1, -1], value[1, 3, 2, 0] = math.inf, math.nan
            value[1, 0, 0, -1] = torch.finfo(dtype).max
            value[1, 40:, 1, 1] = -math.inf
            for kind in (torch.int32, torch.int64, None):
                used = [seqlen, seqlen] if kind is None else [seqlen, 40]
                lens = None if kind is None else torch.tensor(used, dtype=kind)
                found = torch.full((2, 3, -(-seqlen // 64)), -7, dtype=torch.int32)
                args = PoolArgs(
                    *(_view(value), _lengths(lens), found.data_ptr(), None),
                    *(2, seqlen, 3, head_dim, NUMBER[dtype], 0),
                )
                inputs = {"value": value, "lens": lens}
                self._launch("find_nonfinite", args, found.numel(), found, **inputs)
                for b, h, n in itertools.product(*map(range, found.shape)):
                    seen = value[b, n * 64 : min((n + 1) * 64, used[b]), h]
                    assert found[b, h, n] == (not seen.isfinite().all()), (b, h, n)

    def check_pool(self, source: torch.dtype, to: torch.dtype) -> None:
        """Means of blocks: the bits of the emulated pass, near those in float64."""
        for head_dim, seqlen in ((2, 65), (80, 130), (128, 200)):
            x = torch.randn(2, seqlen, 3, head_dim + 2).to(source)[..., 2:]
            for kind in (torch.int32, torch.int64, None):
                used = [seqlen, seqlen] if kind is None else [seqlen, 40]
                lens = None if kind is None else torch.tensor(used, dtype=kind)
                scale = None if kind is None else torch.exp2(torch.randint(-3, 4, (2, 3)).float())
                means = torch.full((2, 3, -(-seqlen // 64), head_dim), math.nan, dtype=to)
                args = PoolArgs(
                    *(_view(x), _lengths(lens), means.data_ptr(), _address(scale)),
                    *(2, seqlen, 3, head_dim, NUMBER[source], int(to == torch.bfloat16)),
                )
                inputs = {"x": x, "lens": lens, "scale": scale}
                self._launch("pool", args, means.numel() // head_dim, means, **inputs)
                want = run_listed.pooled(x, lens, scale, to)
                assert torch.equal(means.view(torch.int16), want.view(torch.int16)), "bits"
                for b, h, n in itertools.product(*map(range, means.shape[:3])):
                    mine = x[b, n * 64 : min((n + 1) * 64, used[b]), h].double()
                    exact = mine.mean(0) / (1.0 if scale is None else scale[b, h].double())
                    tight = {"rtol": torch.finfo(to).eps, "atol": 1e-6}
                    equal = torch.allclose(means[b, h, n].double(), exact, **tight, equal_nan=True)
                    assert equal, (b, h, n)

    def check_all(self) -> None:
        for source, to in itertools.product(NUMBER, HALVES):
            self.check_pool(source, to)
        for dtype in NUMBER:
            self.check_nonfinite(dtype)
            self.check_qk8(dtype)
            self.check_watch(dtype, torch.float32)
            self.check_watch(torch.bfloat16, dtype)
        for source, to in itertools.product(NUMBER, HALVES):
            self.check_convert(source, to)
        self.check_scales()
        for dtype, splits in itertools.product(NUMBER, MERGED_PARTS):
            self.check_merge(splits, dtype)
        self.check_put_lengths()
