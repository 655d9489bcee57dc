# SPDX-License-Identifier: Apache-2.0
"""test_cuda_launch_listed_qk8.py - calls of 8-bit scores with lists of blocks through the C ABI and
a mock of the driver: what is launched with which arguments, what is refused, and the results.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blocks_oracle
import oracle
from blocks_oracle import Lists, random_lists
from cuda_mock.gpu import CARDS, Gpu
from emu import cases_qk8
from emu.args import ListedArgs
from emu.build import compiler
from emu.rows import gpus, tiles_listed_qk8
from emu.run import DTYPES, Result
from nightly import unless
from test_cuda_launch_lists import ARCHS, BF16, F16, KEYS, Recorder, lists, operands, refused
from test_cuda_launch_qk8 import PASSES, QK8, guard_of
from wan_attn.native import library

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]


def tile_of(arch: int, dtype: torch.dtype, head_dim: int) -> Any:
    name = next(n for n, known in DTYPES.items() if known == dtype)
    kind = (gpus()[arch], name, head_dim)
    return next(t for t in tiles_listed_qk8() if (t.gpu_class, t.dtype, t.head_dim) == kind)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_row_of_each_card(arch: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Hopper's too, which has no dense one; only where both are asked for."""
    gpu = Recorder(tmp_path, arch)
    for head_dim in (64, 128):
        x, tile = operands(head_dim, dtype), tile_of(arch, dtype, head_dim)
        scaled = ["measure", "find_scale", "convert"] if tile.v_is_scaled else []
        assert gpu.ran(*x, precision=QK8, **lists()) == [*scaled, *PASSES, tile.symbol]
        assert "qk8" not in gpu.ran(*x, **lists())[-1]
        if arch != 90:
            assert gpu.ran(*x, precision=QK8)[-1] == tile.symbol.replace("_listed", "")
    assert "is slower than sdpa_sm90" in refused(Recorder(tmp_path, 90), *x, precision=QK8)


def test_what_the_kernel_is_told(tmp_path: Path) -> None:
    """The lists as they lie, and the integers in the workspace."""
    gpu, x, given = Recorder(tmp_path, 80), operands(), lists()
    gpu.ran(*x, precision=QK8, **given)
    passes = {name: args for name, args, _ in gpu.passes}
    args = passes["sdpa_sm80_qk8_listed_bf16_d64"]
    assert isinstance(args, ListedArgs)
    counts, indices = given["block_counts"], given["block_indices"]
    assert args.lists.counts == counts.data_ptr() and args.lists.indices == indices.data_ptr()
    assert tuple(args.lists.count_strides) == counts.stride()
    assert tuple(args.lists.strides) == indices.stride() and args.lists.capacity == indices.shape[3]
    assert not (args.pooled_k or args.pooled_v or args.nonfinite or args.lost_mass)
    call = args.call
    assert (call.num_splits, call.split_tiles, call.q_is_f32) == (1, 5, 0)
    assert call.k.data == passes["quantise_k"].to and call.q.data == passes["quantise_q"].to
    assert call.k_scale == passes["quantise_q"].rows and call.v.data == x[2].data_ptr()
    # K's mean is that of all real keys: the passes know no lists.
    assert passes["sum_keys"].seqlen == passes["quantise_k"].seqlen == KEYS
    assert passes["quantise_k"].tiles == 5


def test_few_queries_over_many_keys_are_not_split(tmp_path: Path) -> None:
    for arch in (75, 80, 89, 90):
        gpu, x = Recorder(tmp_path, arch), operands(seqlen_q=70, seqlen_k=9000)
        names = gpu.ran(*x, precision=QK8, **lists(seqlen_q=70, seqlen_k=9000))
        assert "merge" not in names and gpu.passes[-1][1].call.num_splits == 1
        assert gpu.passes[-1][1].call.split_tiles == 141


def test_refusals(tmp_path: Path) -> None:
    rule = "takes block lists, but neither pools_others nor a skip_threshold"
    for arch in ARCHS:
        gpu, row = Recorder(tmp_path, arch), "sdpa_sm75" if arch == 75 else "sdpa_sm80"
        both: dict[str, Any] = {"precision": QK8, **lists()}
        for more in ({"pools_others": True}, {"skip_threshold": 0.05}):
            said = refused(gpu, *operands(), **both, **more)
            assert f"{row}_qk8_listed_d64: {rule}" in said
        said = refused(gpu, *operands(), precision=QK8, skip_threshold=0.05)
        assert f"{row}_qk8_listed_d64: {rule}" in said
        said = refused(gpu, *operands(80), **both)
        assert "none for cuda computes 8-bit scores of bfloat16 with head_dim 80" in said
        assert gpu.asked == [], "nothing was loaded"


def test_no_keys(tmp_path: Path) -> None:
    """There is nothing to sum or to quantise, and no block to look at."""
    gpu = Gpu(tmp_path, CARDS[80])
    x, given = operands(seqlen_q=5, seqlen_k=0), lists(seqlen_q=5, seqlen_k=0)
    out, lse = gpu.sdpa(*x, precision=QK8, **given)
    assert not out.any() and bool((lse == -math.inf).all())


def check(
    gpu: Gpu, arch: int, x: Any, named: Lists, lens_on_device: bool = False, **call: Any
) -> Any:
    """Against the definition."""
    (query, key, value), (counts, indices) = x, named.as_tensors()
    how: dict[str, Any] = {"block_counts": counts, "block_indices": indices, "precision": QK8}
    how |= {"lens_on_device": lens_on_device, **call}
    out, lse = gpu.sdpa(query, key, value, **how)
    tile = tile_of(arch, value.dtype, query.shape[3])
    assert any(name == tile.symbol for name, _ in gpu.asked)
    cases_qk8.check_result(tile, Result(out, lse, 0), query, key, value, named, **call)
    return out, lse


def is_short(arch: int, head_dim: int, dtype: torch.dtype) -> bool:
    """The kernels of each class once; and Hopper's, which are those of an A100."""
    return arch in (75, 80, 86) and (head_dim, dtype) in ((64, F16), (128, BF16))


@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype"),
    unless(is_short, itertools.product(ARCHS, (64, 128), (F16, BF16))),
)
def test_the_emulated_kernels_compute_it(
    arch: int, head_dim: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """From the C ABI to the result, 1.1 % from float64; a full list has a dense call's bits."""
    lens, gpu = torch.tensor([KEYS, 65]), Gpu(tmp_path, CARDS[arch])
    x, named = operands(head_dim, dtype), random_lists(3, 2, 4, 130, KEYS, 0.4)
    for each in (named, Lists(named.named | True)):
        found = check(gpu, arch, x, each, k_lens=lens)
        want, _ = blocks_oracle.attention(*x, each, k_lens=lens)
        error = np.linalg.norm(oracle.as_float64(found[0]) - want) / np.linalg.norm(want)
        assert error <= 0.011
    if arch != 90:  # there is no dense row
        assert all(map(torch.equal, found, gpu.sdpa(*x, k_lens=lens, precision=QK8)))


@pytest.mark.parametrize("arch", (75, 80, 86))
def test_every_kind_of_call(arch: int, tmp_path: Path) -> None:
    (query, key, value), named = operands(), random_lists(5, 2, 4, 130, KEYS, 0.5)
    real: dict[str, Any] = {"q_lens": torch.tensor([130, 70]), "k_lens": torch.tensor([KEYS, 150])}

    def checked(*x: Any, **call: Any) -> Any:
        return check(Gpu(tmp_path, CARDS[arch]), arch, x, named, **call)

    checked(query, key, value, **real, is_causal=True)
    plain = checked(query, key, value, **real, scale=-0.2)
    device = checked(query, key, value, **real, scale=-0.2, lens_on_device=True)
    assert all(map(torch.equal, plain, device))
    checked(query, key, value, window=(40, 70))
    checked(query.float(), key.float(), value)
    around = [torch.full((*x.shape[:3], 77), math.nan, dtype=x.dtype) for x in (query, key, value)]
    views = [a[..., 5:69].copy_(x) for a, x in zip(around, (query, key, value), strict=True)]
    plain = checked(query, key, value)
    assert all(map(torch.equal, plain, checked(*views)))


def test_a_guard_is_filled(tmp_path: Path) -> None:
    """As by any row; nothing is lost, for nothing is left out by a threshold."""
    gpu, words = Gpu(tmp_path, CARDS[86]), torch.zeros(5, dtype=torch.int32)
    query, key, value = operands()
    value[0, 7, 1, 5] = -77.0
    gpu.sdpa(query, key, value, precision=QK8, guard=words, **lists())
    seen = guard_of(words)
    assert (seen.largest_value, seen.nonfinite_values, seen.nonfinite_results) == (77.0, 0, 0)
    assert seen.lost_mass == 0.0
    value[0, 7, 1, 5] = math.inf
    gpu.sdpa(query, key, value, precision=QK8, guard=words, **lists())
    assert guard_of(words).nonfinite_values == 1
