# SPDX-License-Identifier: Apache-2.0
"""test_cuda_launch_qk8.py - calls of 8-bit scores through the C ABI and a mock of the driver: every
pass runs on the emulated GPU, and the result is held against the definition and float64.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from cuda_mock.gpu import CARDS, Gpu
from emu import cases_qk8
from emu.build import compiler
from emu.rows import gpus, tiles_qk8
from emu.run import DTYPES, Result
from wan_attn.native.library import Guard

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

QK8 = 1
PASSES = ["sum_keys", "mean_of_keys", "quantise_k", "quantise_q"]
ARCHS = (75, 80, 86, 89, 120)


def operands(dtype: torch.dtype, seqlen_q: int = 70, seqlen_k: int = 150, **how: Any) -> Any:
    head_dim, batch = how.get("head_dim", 64), how.get("batch", 1)
    made = torch.Generator().manual_seed(seqlen_k)
    shapes = ((seqlen_q, 2 * how.get("groups", 1)), (seqlen_k, 2), (seqlen_k, 2))
    return tuple(torch.randn(batch, n, h, head_dim, generator=made).to(dtype) for n, h in shapes)


def tile_of(arch: int, dtype: torch.dtype, head_dim: int) -> Any:
    name = next(n for n, known in DTYPES.items() if known == dtype)
    return next(
        t
        for t in tiles_qk8()
        if (t.gpu_class, t.dtype, t.head_dim) == (gpus()[arch], name, head_dim)
    )


def check(gpu: Gpu, arch: int, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Any:
    on_device = {n: call.pop(n) for n in ("lens_on_device", "guard") if n in call}
    out, lse = gpu.sdpa(query, key, value, precision=QK8, **on_device, **call)
    tile = tile_of(arch, value.dtype, query.shape[3])
    cases_qk8.check_result(tile, Result(out, lse, 0), query, key, value, **call)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_row_of_each_card(arch: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Which passes run, in which order, and what comes of them; head_dim 64 and 128."""
    gpu = Gpu(tmp_path, CARDS[arch])
    for head_dim in (64, 128):
        call = operands(dtype, head_dim=head_dim)
        out, _ = check(gpu, arch, *call)
        want, _ = oracle.attention(*call)
        error = np.linalg.norm(oracle.as_float64(out) - want) / np.linalg.norm(want)
        assert error <= 0.011
        tile = tile_of(arch, dtype, head_dim)
        asked = [name.removeprefix("wan_attn_") for name, _ in gpu.asked]
        scaled = ["measure", "find_scale", "convert"] if tile.v_is_scaled else []
        # A pass is asked for at its first launch.
        helpers = [*scaled, *PASSES] if head_dim == 64 else []
        assert asked == [*helpers, tile.symbol]
        gpu.asked.clear()


@pytest.mark.parametrize("arch", (75, 80, 86))
def test_every_kind_of_call(arch: int, tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[arch])
    lens = torch.tensor([70, 33]), torch.tensor([149, 64])
    call = operands(torch.bfloat16, 70, 150, batch=2, groups=2)
    for on_device in (False, True):
        real: dict[str, Any] = {"q_lens": lens[0], "k_lens": lens[1], "lens_on_device": on_device}
        check(gpu, arch, *call, **real, is_causal=True)
    check(gpu, arch, *call, window=(40, 3), scale=-0.2)
    around = [torch.full((*x.shape[:3], 77), math.nan, dtype=x.dtype) for x in call]
    views = [a[..., 5:69].copy_(x) for a, x in zip(around, call, strict=True)]
    plain, moved = (gpu.sdpa(*x, precision=QK8) for x in (call, views))
    assert all(map(torch.equal, plain, moved))
    query, key, value = call
    check(gpu, arch, query.float(), key, value)
    check(gpu, arch, query.float(), key.float(), value)
    check(gpu, arch, *operands(torch.bfloat16, 5, 0))


def test_few_rows_over_many_keys_are_split(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[86])
    check(gpu, 86, *operands(torch.float16, 3, 4200))
    assert gpu.asked[-1][0] == "wan_attn_merge"


def test_it_is_never_chosen_unasked_and_always_where_it_is_asked(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[89])
    call = operands(torch.bfloat16)
    gpu.sdpa(*call)
    assert not any("qk8" in name for name, _ in gpu.asked)
    gpu.sdpa(*call, precision=QK8)
    assert any("qk8" in name for name, _ in gpu.asked)


def test_hopper_refuses_and_says_why(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[90])
    with pytest.raises(RuntimeError, match="is slower than sdpa_sm90 on Hopper"):
        gpu.sdpa(*operands(torch.bfloat16), precision=QK8)


def test_other_head_dims_are_refused(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[86])
    with pytest.raises(RuntimeError, match="head_dim"):
        gpu.sdpa(*operands(torch.bfloat16, head_dim=80), precision=QK8)


def guard_of(words: Tensor) -> Guard:
    return Guard.from_buffer_copy(bytes(words.numpy().tobytes()))


@pytest.mark.parametrize("precision", (0, QK8))
@pytest.mark.parametrize("arch", (75, 80, 86, 90))
def test_a_guard_is_filled_by_any_row(arch: int, precision: int, tmp_path: Path) -> None:
    """As on the CPU: the largest |v|, what is not finite in v and out; it only ever adds."""
    if arch == 90 and precision:
        pytest.skip("Hopper has no such row")
    gpu = Gpu(tmp_path, CARDS[arch])
    query, key, value = operands(torch.bfloat16, 70, 150, batch=2)
    value[1, 100:] = 1e30  # behind the real length
    value[0, 149, 1, 5] = -77.0
    words, lens = torch.zeros(5, dtype=torch.int32), torch.tensor([150, 100])
    plain = gpu.sdpa(query, key, value, precision=precision, k_lens=lens)
    out, lse = gpu.sdpa(query, key, value, precision=precision, k_lens=lens, guard=words)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
    seen = guard_of(words)
    assert seen.largest_value == 77.0
    assert (seen.clipped_values, seen.nonfinite_values, seen.nonfinite_results) == (0, 0, 0)
    value[0, 3, 0, :2] = math.inf
    words[2] = -3  # two more, and it is full
    gpu.sdpa(query, key, value, precision=precision, k_lens=lens, guard=words)
    seen = guard_of(words)
    assert seen.largest_value == math.inf
    assert seen.nonfinite_values == 0xFFFFFFFF and seen.nonfinite_results >= 2 * 70
    gpu.sdpa(query, key, value, precision=precision, k_lens=lens, guard=words)
    assert guard_of(words).nonfinite_values == 0xFFFFFFFF
