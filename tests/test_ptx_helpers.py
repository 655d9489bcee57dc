# SPDX-License-Identifier: Apache-2.0
"""test_ptx_helpers.py - the passes before and after the attention, run from their PTX."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from ctypes import Structure, c_int, c_longlong
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emu.args import Lengths, MergeArgs, PackArgs, PutLengthsArgs, View
from emu.rows import CSRC
from ptx import collect, machine
from ptx.calls import kernel

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

ARCHS = (75, 80, 120)  # those between have 80's text, but for its target
NUMBER = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
each_arch = pytest.mark.parametrize("arch", ARCHS)


def helper(name: str, arch: int, csrc: Path = CSRC) -> machine.Program:
    job = next(j for j in collect.shipped() if j.name == name and j.arch == arch)
    return kernel(job, collect.nvrtcs()[0], csrc)


def launch(
    name: str,
    arch: int,
    args: Structure,
    warps: int,
    output: Tensor,
    csrc: Path = CSRC,
    **inputs: Tensor | None,
) -> None:
    known = [(n, x, 0) for n, x in inputs.items() if x is not None] + [("output", output, 1)]
    tensors = [
        machine.Tensor_(n.encode(), x.untyped_storage().data_ptr(), x.untyped_storage().nbytes(), o)
        for n, x, o in known
    ]
    knobs = machine.Knobs(order=warps % 3, seed=warps)
    machine.launch(
        helper(name, arch, csrc), args, -(-warps // 4), tensors, threads=128, knobs=knobs
    )


def view(x: Tensor) -> View:
    return View(x.data_ptr(), (c_longlong * 3)(*x.stride()[:3]))


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def lengths(lens: Tensor | None) -> Lengths:
    if lens is None:
        return Lengths()
    return Lengths(lens.data_ptr(), lens.stride(0), int(lens.dtype == torch.int64), 0)


def convert(
    arch: int,
    x: Tensor,
    dtype: torch.dtype,
    lens: Tensor | None = None,
    scale: Tensor | None = None,
    csrc: Path = CSRC,
) -> Tensor:
    batch, seqlen, heads, head_dim = x.shape
    to = torch.full(x.shape, 7.0, dtype=dtype)
    args = PackArgs(
        *(view(x), to.data_ptr(), lengths(lens), None, address(scale)),
        *(batch, seqlen, heads, head_dim, NUMBER[x.dtype], int(dtype == torch.bfloat16), 0, 0),
    )
    launch(
        "wan_attn_convert",
        arch,
        args,
        batch * seqlen * heads,
        to,
        csrc,
        x=x,
        lens=lens,
        scale=scale,
    )
    return to


def check_conversion(csrc: Path) -> None:
    """Of other sources than the repository's: planted bugs."""
    x = torch.randn(1, 5, 2, 66).bfloat16()
    got = convert(80, x, torch.float16, csrc=csrc)
    assert torch.equal(got, x.half()), "a conversion is wrong"


@each_arch
@pytest.mark.parametrize("to", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("source", NUMBER, ids=str)
def test_convert_is_torchs(source: torch.dtype, to: torch.dtype, arch: int) -> None:
    """From odd addresses and strides; infinities, NaN and subnormal numbers among the values."""
    around = torch.randn(2, 9, 3, 101).to(source)
    special = [math.inf, -math.inf, 1e-7, -6e-8, 65520.0, 65519.0, math.nan, -0.0, 1e-40]
    around[0, 3, 1, 5:14] = torch.tensor(special)
    x = around[:, 1:, :2, 3:99]
    got, want = convert(arch, x, to), x.to(to)
    assert torch.equal(got.nan_to_num(1.5), want.nan_to_num(1.5))
    assert torch.equal(got.isnan(), want.isnan())
    wide = torch.randn(1, 3, 1, 640).to(source)
    assert torch.equal(convert(arch, wide, to), wide.to(to))
    for lens_dtype in (torch.int32, torch.int64):
        got = convert(arch, x, to, torch.tensor([5, 0], dtype=lens_dtype))
        assert torch.equal(got[0, :5].nan_to_num(1.5), want[0, :5].nan_to_num(1.5))
        assert (got[0, 5:] == 7.0).all() and (got[1] == 7.0).all()


@each_arch
def test_measure_and_find_scale(arch: int) -> None:
    """The power of two below which the largest finite number of a head comes to lie."""
    kinds = itertools.product(NUMBER, (torch.int32, torch.int64), ((5, 34), (170, 302)))
    for dtype, lens_dtype, (parts, head_dim) in kinds:
        x = torch.randn(2, 11, 3, head_dim).mul(torch.tensor([1.0, 300.0, 1e-4]).view(1, 1, 3, 1))
        x = x.to(dtype)
        x[0, 2, 1, 3], x[1, 4, 0, 1] = math.inf, math.nan
        x[1, :, 2] = 0.0
        lens = torch.tensor([7, 11], dtype=lens_dtype)
        largest, scale = torch.full((2, 3, parts), math.nan), torch.full((2, 3), math.nan)
        args = PackArgs(
            *(view(x), None, lengths(lens), largest.data_ptr(), scale.data_ptr()),
            *(2, 11, 3, head_dim, NUMBER[dtype], 0, parts, 9),
        )
        launch("wan_attn_measure", arch, args, 6 * parts, largest, x=x, lens=lens)
        launch("wan_attn_find_scale", arch, args, 6, scale, largest=largest)
        for b in range(2):
            for h in range(3):
                seen = x[b, : lens[b], h].float()
                most = seen[seen.isfinite()].abs().max().item()
                want = 2.0 ** (math.frexp(most)[1] - 9) if most else 1.0
                assert scale[b, h] == want, (dtype, b, h)
        scaled = convert(arch, x, torch.float16, None, scale)
        assert torch.equal(
            scaled.nan_to_num(1.5),
            (x.float() / scale[:, None, :, None]).half().nan_to_num(1.5),
        )


@each_arch
@pytest.mark.parametrize("dtype", NUMBER, ids=str)
def test_merge(dtype: torch.dtype, arch: int) -> None:
    """Parts without keys weigh nothing; a row whose parts all have none is 0 with lse -inf.

    Three parts, and as many as the compiler's unrolled loops take at once and some more. A row
    whose parts all have seen scores of -inf only has NaN in them: it is NaN, and so is its lse.
    """
    for splits in (3, 11):
        merge_parts(splits, dtype, arch)


def merge_parts(splits: int, dtype: torch.dtype, arch: int) -> None:
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
            *(parts.data_ptr(), lse.data_ptr(), view(out)),
            new.data_ptr() if wants_lse else None,
            (c_longlong * 3)(*new.stride()),
            *(batch, seqlen, heads, head_dim, splits, NUMBER[dtype]),
        )
        # Two outputs: the machine is told of both.
        tensors: list[Any] = []
        for name, x, o in (("p", parts, 0), ("l", lse, 0), ("o", out, 1), ("n", new, 1)):
            size = x.untyped_storage().nbytes()
            tensors.append(machine.Tensor_(name.encode(), x.data_ptr(), size, o))
        program = helper("wan_attn_merge", arch)
        machine.launch(program, args, 5, tensors, threads=128)
        total = torch.logsumexp(lse.double(), 0)
        weight = torch.where(lse == -math.inf, 0.0, torch.exp(lse.double() - total))
        want = (weight.permute(0, 1, 3, 2)[..., None] * parts.double()).sum(0)
        assert out[0, 4, 1].isnan().all()
        out[0, 4, 1] = want[0, 4, 1] = 0.0
        error = (out.double() - want).abs().max()
        # A rounding of the sum more for each part beyond three.
        sums = (splits - 3) * torch.finfo(torch.float32).eps
        assert error <= 4 * torch.finfo(dtype).eps + sums
        if wants_lse:
            assert new[0, 1, 4].isnan()
            new[0, 1, 4] = -math.inf
            known = total.isfinite()
            assert (new - total)[known].abs().max() <= 1e-6 * 10
            assert (new[~known] == -math.inf).all()
        else:
            assert new.isnan().all()


@each_arch
def test_put_lengths(arch: int) -> None:
    for count in (1, 127, 129, 256):
        to = torch.full((count,), -7, dtype=torch.int32)
        args = PutLengthsArgs(to.data_ptr(), count, (c_int * 256)(*range(3, 259)), 0)
        launch("wan_attn_put_lengths", arch, args, 4, to)
        assert to.tolist() == list(range(3, 3 + count))


@each_arch
def test_these_tests_run_every_opcode(arch: int) -> None:
    for source, to in itertools.product(NUMBER, (torch.float16, torch.bfloat16)):
        test_convert_is_torchs(source, to, arch)
    test_measure_and_find_scale(arch)
    for dtype in NUMBER:
        test_merge(dtype, arch)
    test_put_lengths(arch)
    total: Counter[str] = Counter()
    for name in ("measure", "find_scale", "convert", "merge", "put_lengths"):
        # Not for each alone: put_lengths has a loop that its 256 lengths cannot enter.
        total.update(helper(f"wan_attn_{name}", arch).counts())
    assert not [opcode for opcode, times in total.items() if not times]
