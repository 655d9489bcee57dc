# SPDX-License-Identifier: Apache-2.0
"""test_emu_helpers.py - the passes before and after the attention: pack.cuh, merge.cuh."""

from __future__ import annotations

import math
from ctypes import c_int, c_longlong

import pytest
import torch
from torch import Tensor

from emu.args import Lengths, MergeArgs, PackArgs, PutLengthsArgs, View
from emu.build import compiler, library
from emu.rows import helpers
from emu.run import (
    LIMIT_F16,
    LIMIT_SUM_F16,
    EmulatorError,
    Tensor_,
    launch,
    scaled,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

NUMBER = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def view(x: Tensor) -> View:
    return View(x.data_ptr(), (c_longlong * 3)(*x.stride()[:3]))


def memory(output: Tensor | None = None, **inputs: Tensor | None) -> list[Tensor_]:
    tensors = [(name, x, 0) for name, x in inputs.items()] + [("output", output, 1)]
    return [
        Tensor_(name.encode(), x.untyped_storage().data_ptr(), x.untyped_storage().nbytes(), out)
        for name, x, out in tensors
        if x is not None
    ]


def blocks(warps: int) -> int:
    return -(-warps // 4)


def convert(
    x: Tensor, dtype: torch.dtype, lens: Tensor | None, scale: Tensor | None, arch: int = 80
) -> Tensor:
    batch, seqlen, heads, head_dim = x.shape
    to = torch.full(x.shape, 7.0, dtype=dtype)
    lengths = Lengths(lens.data_ptr(), lens.stride(0), 1, 0) if lens is not None else Lengths()
    args = PackArgs(
        *(view(x), to.data_ptr(), lengths, None, scale.data_ptr() if scale is not None else None),
        *(batch, seqlen, heads, head_dim, NUMBER[x.dtype], int(dtype == torch.bfloat16), 0, 0),
    )
    kernel = library(helpers()["wan_attn_convert"], arch=arch)
    known = memory(to, x=x, lens=lens, scale=scale)
    launch(kernel, args, blocks(batch * seqlen * heads), known)
    return to


def measured_scale(x: Tensor, lens: Tensor | None, num_parts: int, limit: int) -> Tensor:
    batch, seqlen, heads, head_dim = x.shape
    largest, scale = (
        torch.full((batch, heads, num_parts), math.nan),
        torch.full((batch, heads), math.nan),
    )
    lengths = Lengths(lens.data_ptr(), lens.stride(0), 1, 0) if lens is not None else Lengths()
    args = PackArgs(
        *(view(x), None, lengths, largest.data_ptr(), scale.data_ptr()),
        *(batch, seqlen, heads, head_dim, NUMBER[x.dtype], 0, num_parts, limit),
    )
    measure, find = (
        library(helpers()["wan_attn_measure"]),
        library(helpers()["wan_attn_find_scale"]),
    )
    launch(measure, args, blocks(batch * heads * num_parts), memory(largest, x=x, lens=lens))
    launch(find, args, blocks(batch * heads), memory(scale, largest=largest))
    return scale


@pytest.mark.parametrize("to", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("source", NUMBER, ids=str)
def test_convert_is_torchs_conversion(source: torch.dtype, to: torch.dtype) -> None:
    """From odd addresses and strides, rounded to nearest, dense."""
    around = torch.randn(2, 9, 3, 101).to(source)
    around[0, 3, 1, 5:9] = torch.tensor([math.inf, -math.inf, 1e-7, 65520.0])
    x = around[:, 1:, :2, 3:99]
    assert torch.equal(convert(x, to, None, None), x.to(to))
    lens = torch.tensor([5, 0])
    got = convert(x, to, lens, None)
    assert torch.equal(got[0, :5], x[0, :5].to(to))
    assert (got[0, 5:] == 7.0).all() and (got[1] == 7.0).all()


@pytest.mark.parametrize("arch", (75, 80))
@pytest.mark.parametrize("to", (torch.float16, torch.bfloat16), ids=str)
def test_the_conversions_are_torchs_for_every_number(to: torch.dtype, arch: int) -> None:
    """On Turing bf16 is the kernel's own arithmetic, elsewhere all of it is the emulator's. Each
    16-bit number, what lies half way to the next one, and the floats beside that."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(to).float()
    every = every[every.isfinite()].sort().values
    middle = (every[1:].double() + every[:-1].double()).mul(0.5).float()
    beside = [torch.nextafter(middle, torch.tensor(side)) for side in (-math.inf, math.inf)]
    x = torch.cat([every, middle, *beside])
    x = x[: len(x) // 128 * 128].view(1, -1, 1, 128)
    assert torch.equal(convert(x, to, None, None, arch), x.to(to))
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]).int().view(torch.float32)
    assert convert(nan.view(1, 1, 1, 4), to, None, None, arch).isnan().all()
    back = torch.float32 if to == torch.float16 else torch.float16
    exact = every[: len(every) // 128 * 128].to(to).view(1, -1, 1, 128)
    if back == torch.float16:
        assert torch.equal(convert(exact, back, None, None), exact.to(back))


@pytest.mark.parametrize("limit", (LIMIT_SUM_F16, LIMIT_F16))
@pytest.mark.parametrize("num_parts", (1, 3, 40))
def test_heads_are_scaled_into_the_range_of_f16(num_parts: int, limit: int) -> None:
    size = torch.tensor([1.0, 1e30, 1e-30, 6e4])[:, None]
    value = (torch.randn(2, 33, 4, 128) * size).bfloat16()
    value[0, 7, 0, 3], value[0, 8, 1, 3], value[1, 2, 2, 9] = math.nan, math.inf, -math.inf
    value[1, :, 3] = 0.0
    lens = torch.tensor([33, 20])
    value[1, 20:] = 1e38  # padding must not count
    is_real = torch.arange(33)[:, None, None] < lens[:, None, None, None]
    want, want_scale = scaled(torch.where(is_real, value, 0.0).bfloat16(), limit)
    scale = measured_scale(value, lens, num_parts, limit)
    assert torch.equal(scale, want_scale)
    got = convert(value, torch.float16, lens, scale)
    for b, n in enumerate((33, 20)):
        assert torch.equal(got[b, :n].nan_to_num(777.0), want[b, :n].nan_to_num(777.0))


@pytest.mark.parametrize("dtype", NUMBER, ids=str)
def test_merge(dtype: torch.dtype) -> None:
    splits, batch, seqlen, heads, head_dim = 3, 2, 5, 2, 80
    out = torch.randn(splits, batch, seqlen, heads, head_dim)
    lse = 30.0 * torch.randn(splits, batch, heads, seqlen)
    lse[:, 0, 0, 1] = -math.inf  # sees no key at all
    lse[1:, 1, 1, 2] = -math.inf  # all its keys are in the first part
    lse[0, 1, 0, 3] = -math.inf  # in the first part all scores are -inf, others have more
    lse[:, 0, 1, 4] = -math.inf  # in all parts
    out[:, 0, 1, 0] = 0.0
    out[0, 1, 3, 0] = out[0, 0, 4, 1] = math.nan
    got, got_lse = (
        torch.full(out.shape[1:], math.nan, dtype=dtype),
        torch.full(lse.shape[1:], math.nan),
    )
    args = MergeArgs(
        *(out.data_ptr(), lse.data_ptr(), view(got), got_lse.data_ptr()),
        *((c_longlong * 3)(*got_lse.stride()), batch, seqlen, heads, head_dim, splits),
        NUMBER[dtype],
    )
    known = [*memory(got, out=out, lse=lse), *memory(got_lse)]
    launch(library(helpers()["wan_attn_merge"]), args, blocks(batch * seqlen * heads), known)

    want_lse = torch.logsumexp(lse.double(), dim=0)
    weight = torch.where(lse == -math.inf, 0.0, (lse.double() - want_lse).exp())
    want = (weight.transpose(2, 3)[..., None] * out.double().nan_to_num()).sum(0)
    assert got[0, 4, 1].isnan().all() and got_lse[0, 1, 4].isnan()
    got[0, 4, 1], got_lse[0, 1, 4] = 0.0, -math.inf
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    assert not got[0, 1, 0].any() and torch.equal(got[1, 2, 1], out[0, 1, 2, 1].to(dtype))
    close = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)


@pytest.mark.parametrize("count", (0, 1, 127, 128, 129, 256))
def test_lengths_travel_inside_the_launch(count: int) -> None:
    lengths = torch.randint(-(2**31), 2**31 - 1, (256,), dtype=torch.int32)
    to = torch.full((count,), 7, dtype=torch.int32)
    args = PutLengthsArgs(to.data_ptr(), count, (c_int * 256)(*lengths.tolist()))
    launch(library(helpers()["wan_attn_put_lengths"]), args, 1, memory(to))
    assert torch.equal(to, lengths[:count])


def test_a_store_outside_the_tensor_is_found() -> None:
    x = torch.randn(1, 4, 1, 64)
    short = torch.zeros(1, 3, 1, 64, dtype=torch.float16)
    args = PackArgs(view(x), short.data_ptr(), Lengths(), None, None, 1, 4, 1, 64, 0, 0, 0, 0)
    with pytest.raises(EmulatorError, match="global store outside the outputs"):
        launch(library(helpers()["wan_attn_convert"]), args, 1, memory(short, x=x))
