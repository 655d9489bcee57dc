# SPDX-License-Identifier: Apache-2.0
"""test_cuda_launch_lists.py - calls with lists of blocks or a skip_threshold through the C ABI and
a mock of the driver: what is launched with which arguments, and what is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import blocks_oracle
import oracle
from blocks_oracle import Lists, random_lists
from cuda_mock.gpu import CARDS, STREAM, Gpu, _decode
from emu.args import ListedArgs, PoolArgs
from emu.build import compiler
from emu.rows import TileSm90
from wan_attn.native import library
from wan_attn.selfcheck import skip_calls
from wan_attn.selfcheck.reference import MASKS
from wan_attn.selfcheck.skip_calls import SkipCall

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ARCHS = (75, 80, 86, 89, 90, 120)
SHORT = (75, 80, 89)  # a card of each class of tiles
KEYS = 300  # five blocks of keys, the last one cut


class Recorder(Gpu):
    """A GPU whose kernels do nothing: what each is launched with is kept."""

    def __init__(self, folder: Path, arch: int) -> None:
        super().__init__(folder, CARDS[arch])
        self.passes: list[tuple[str, Any, int]] = []

    def _launch(self, image: bytes, args: int, numbers: Any, stream: int | None) -> int:
        assert self.call is not None and stream == STREAM
        kernel = self.call._kernel(image.decode())
        found = None
        if not isinstance(kernel, TileSm90):  # whose maps only the emulator understands
            found, _ = _decode(kernel, args, None)  # type: ignore[arg-type]
        self.passes.append((image.decode().removeprefix("wan_attn_"), found, numbers[0]))
        return 0

    def ran(self, *operands: Tensor, **call: Any) -> list[str]:
        """The passes of a call."""
        self.passes.clear()
        self.sdpa(*operands, **call)
        return [name for name, _, _ in self.passes]

    def at(self, place: int | None) -> int:
        """Of the workspace."""
        assert place is not None and self.call is not None
        return place - self.call.workspace.data_ptr()


@pytest.fixture
def gpu(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path, 80)


def operands(
    head_dim: int = 64, dtype: torch.dtype = BF16, seqlen_q: int = 130, seqlen_k: int = KEYS
) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples, four heads over two."""
    query = torch.randn(2, seqlen_q, 4, head_dim).to(dtype)
    key, value = torch.randn(2, 2, seqlen_k, 2, head_dim).to(dtype)
    return query, key, value


def lists(capacity: int | None = None, seqlen_q: int = 130, seqlen_k: int = KEYS) -> dict[str, Any]:
    counts, indices = random_lists(1, 2, 4, seqlen_q, seqlen_k, 0.5).as_tensors(capacity)
    return {"block_counts": counts, "block_indices": indices}


def row_of(arch: int, head_dim: int, dtype: torch.dtype) -> str:
    """The symbol of the row that such a card has for lists."""
    is_geforce = CARDS[arch].name.endswith(("4090", "5090"))
    variant = "_pv16" if is_geforce and head_dim == 128 and dtype == BF16 else ""
    name = "f16" if dtype == F16 else "bf16"
    return f"sdpa_sm{75 if arch == 75 else 80}_listed{variant}_{name}_d{head_dim}"


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_row_of_each_card(arch: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Hopper's too: by mma.sync."""
    gpu = Recorder(tmp_path, arch)
    for head_dim in (64, 128):
        x, row = operands(head_dim, dtype), row_of(arch, head_dim, dtype)
        assert gpu.ran(*x, **lists())[-1] == row
        assert "listed" not in gpu.ran(*x)[-1]


def test_lists_are_passed_as_they_lie(gpu: Recorder) -> None:
    x, given = operands(), lists()
    assert gpu.ran(*x, **given) == ["sdpa_sm80_listed_bf16_d64"]
    _, args, blocks = gpu.passes[-1]
    assert isinstance(args, ListedArgs)
    counts, indices = given["block_counts"], given["block_indices"]
    assert args.lists.counts == counts.data_ptr() and args.lists.indices == indices.data_ptr()
    assert tuple(args.lists.count_strides) == counts.stride()
    assert tuple(args.lists.strides) == indices.stride() and args.lists.capacity == indices.shape[3]
    assert not (args.pooled_k or args.pooled_v)
    call = args.call
    assert (call.num_splits, call.split_tiles) == (
        1,
        5,
    ) and blocks == 2 * 4 * 2 == 2 * 4 * call.m_blocks
    assert (call.batch, call.num_heads_q, call.heads_per_key_head) == (2, 4, 2)
    assert (call.seqlen_q, call.seqlen_k, call.q.data) == (130, KEYS, x[0].data_ptr())
    assert gpu.prepared is not None and gpu.prepared.workspace_size == 0


def test_strides_of_lists(gpu: Recorder) -> None:
    counts, indices = (given := lists(5)).values()
    apart = torch.zeros(3, 2 * 2, 4 * 3, dtype=torch.int32)[:, ::2, ::3].permute(1, 2, 0)
    every_other = torch.zeros(2, 4, 3, 10, dtype=torch.int32)[..., ::2]
    given = {"block_counts": apart.copy_(counts), "block_indices": every_other.copy_(indices)}
    gpu.ran(*operands(), **given)
    args = gpu.passes[-1][1]
    assert tuple(args.lists.count_strides) == (24, 3, 48) == apart.stride()
    assert tuple(args.lists.strides) == every_other.stride() and args.lists.strides[3] == 2
    same = counts[:1, :1].expand(2, 4, 3), indices[:1, :1].expand(2, 4, 3, 5)
    gpu.ran(*operands(), block_counts=same[0], block_indices=same[1])
    args = gpu.passes[-1][1]
    assert tuple(args.lists.count_strides) == (0, 0, 1) and tuple(args.lists.strides) == (
        0,
        0,
        5,
        1,
    )


@pytest.mark.parametrize("capacity, passed", ((0, 0), (3, 3), (5, 5), (70, 5)))
def test_no_more_room_than_there_are_blocks(capacity: int, passed: int, gpu: Recorder) -> None:
    """A count that nobody could check can be anything: the kernel's walk ends all the same."""
    none = Lists(random_lists(0, 2, 4, 130, KEYS, 0.5).named & False)
    counts, indices = none.as_tensors(capacity)
    gpu.ran(*operands(), block_counts=counts, block_indices=indices)
    assert gpu.passes[-1][1].lists.capacity == passed


def test_few_queries_over_many_keys_are_not_split(tmp_path: Path) -> None:
    for arch in (75, 80, 90):
        gpu, x = Recorder(tmp_path, arch), operands(seqlen_q=70, seqlen_k=9000)
        names = gpu.ran(*x, **lists(seqlen_q=70, seqlen_k=9000))
        assert "merge" not in names and gpu.passes[-1][1].call.num_splits == 1
        assert gpu.passes[-1][1].call.split_tiles == 141
        assert gpu.ran(*x)[-1] == "merge"


def test_what_goes_before(tmp_path: Path) -> None:
    """The passes that dense calls have: lengths, float32 keys, scales."""
    gpu, given = Recorder(tmp_path, 80), lists()
    query, key, value = operands()
    lens = torch.tensor([130, 40]), torch.tensor([KEYS, 65])
    names = gpu.ran(query, key.float(), value, q_lens=lens[0], k_lens=lens[1], **given)
    assert names == ["put_lengths", "put_lengths", "convert", "sdpa_sm80_listed_bf16_d64"]
    call = gpu.passes[-1][1].call
    assert call.seqused_q.data and call.seqused_k.data and call.k.data != key.data_ptr()
    names = gpu.ran(query, key, value, k_lens=lens[1], lens_on_device=True, **given)
    assert names == ["sdpa_sm80_listed_bf16_d64"]
    assert gpu.passes[-1][1].call.seqused_k.data == lens[1].data_ptr()
    scaled = ["measure", "find_scale", "convert"]
    assert Recorder(tmp_path, 75).ran(query, key, value, **given)[:-1] == 2 * scaled
    assert Recorder(tmp_path, 89).ran(*operands(128), **given)[:-1] == scaled


@pytest.mark.parametrize("arch", ARCHS)
def test_the_means_of_the_others(arch: int, tmp_path: Path) -> None:
    """In the dtype and by the scale of what the kernel multiplies."""
    gpu = Recorder(tmp_path, arch)
    for head_dim, dtype in ((64, BF16), (128, F16), (128, BF16)):
        query, key, value = operands(head_dim, dtype)
        lens = torch.tensor([KEYS, 65])
        names = gpu.ran(
            query,
            key.float(),
            value,
            k_lens=lens,
            lens_on_device=True,
            pools_others=True,
            **lists(),
        )
        assert names[-3:] == ["pool", "pool", row_of(arch, head_dim, dtype)]
        args = gpu.passes[-1][1]
        is_turing, is_bf16 = arch == 75, dtype == BF16
        v_is_f16 = is_turing or "pv16" in names[-1]
        for (_, pool, warps), x, to, scale, is_f16 in (
            (gpu.passes[-3], key.float(), args.pooled_k, args.call.k_scale, is_turing),
            (gpu.passes[-2], value, args.pooled_v, args.call.v_scale, v_is_f16),
        ):
            assert isinstance(pool, PoolArgs)
            assert pool.to == to and pool.scale == scale and bool(scale) == (is_f16 and is_bf16)
            assert (pool.batch, pool.seqlen, pool.heads, pool.head_dim) == (2, KEYS, 2, head_dim)
            assert pool.from_dtype == {F32: 0, F16: 1, BF16: 2}[x.dtype]
            assert pool.to_bf16 == (is_bf16 and not is_f16)
            assert pool.seqused.data == lens.data_ptr() and tuple(pool.source.strides)[
                1
            ] == x.stride(1)
            assert warps == 2 * 2 * 5 // 4
        assert gpu.passes[-2][1].source.data == value.data_ptr()
        size = 2 * 2 * 5 * head_dim * 2
        assert gpu.at(args.pooled_v) - gpu.at(args.pooled_k) == -(-size // 256) * 256
        assert gpu.call is not None
        assert gpu.at(args.pooled_v) + size <= len(gpu.call.workspace)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_threshold_alone(arch: int, tmp_path: Path) -> None:
    """V is looked at as the caller has it, whatever the kernel multiplies."""
    gpu, lens = Recorder(tmp_path, arch), torch.tensor([KEYS, 65])
    for head_dim, dtype in ((64, F16), (64, BF16), (128, BF16)):
        query, key, value = operands(head_dim, dtype)
        how: dict[str, Any] = {"k_lens": lens, "lens_on_device": True, "skip_threshold": 0.05}
        names = gpu.ran(query, key, value, **how)
        assert names[-2:] == ["find_nonfinite", row_of(arch, head_dim, dtype)]
        (_, found, warps), (_, args, _) = gpu.passes[-2:]
        assert isinstance(args, ListedArgs) and isinstance(found, PoolArgs)
        assert not (args.lists.counts or args.lists.indices or args.lists.capacity)
        assert not (args.pooled_k or args.pooled_v or args.lost_mass)
        assert args.log2_threshold == pytest.approx(math.log2(0.05), abs=1e-6)
        assert args.nonfinite == found.to and warps == 2 * 2 * 5 // 4
        assert gpu.call is not None and gpu.at(found.to) + 2 * 2 * 5 * 4 <= len(gpu.call.workspace)
        assert found.source.data == value.data_ptr() and not found.scale
        assert tuple(found.source.strides) == value.stride()[:3]
        assert (found.batch, found.seqlen, found.heads, found.head_dim) == (2, KEYS, 2, head_dim)
        assert found.from_dtype == (1 if dtype == F16 else 2)
        assert found.seqused.data == lens.data_ptr()


def test_who_wants_to_know_what_was_lost(gpu: Recorder) -> None:
    """A guard does; one of before there were lists is left alone, and calls without a threshold say
    nothing."""
    x, row = operands(), "sdpa_sm80_listed_bf16_d64"
    words = torch.zeros(5, dtype=torch.int32)
    mixed: dict[str, Any] = {"skip_threshold": 1.0, "pools_others": True, **lists()}
    names = gpu.ran(*x, guard=words, **mixed)
    assert names == ["pool", "pool", "find_nonfinite", row, "watch"]
    args = gpu.passes[-2][1]
    assert args.lists.counts and args.lists.capacity == 5 and args.log2_threshold == 0.0
    assert args.lost_mass == words.data_ptr() + 16
    places = [gpu.at(place) for place in (args.pooled_k, args.pooled_v, args.nonfinite)]
    size = 2 * 2 * 5 * 64 * 2
    assert places == [0, size, 2 * size] and size % 256 == 0
    gpu.ran(*x, skip_threshold=0.5, guard=words[:4])
    assert gpu.passes[-2][1].nonfinite and not gpu.passes[-2][1].lost_mass
    gpu.ran(*x, skip_threshold=0.5)
    assert gpu.passes[-1][1].nonfinite and not gpu.passes[-1][1].lost_mass
    assert gpu.ran(*x, guard=words, **lists()) == [row, "watch"]
    assert not gpu.passes[-2][1].lost_mass and not gpu.passes[-2][1].nonfinite


def skip_cases() -> list[tuple[int, SkipCall, int, torch.dtype]]:
    """Each card has each call once, and each of its rows, in the first third of all."""
    rows = ((64, F16), (64, BF16), (128, BF16))
    return [
        (arch, call, *rows[(n + i + more) % 3])
        for more in range(3)
        for i, arch in enumerate(ARCHS)
        for n, call in enumerate(skip_calls.CALLS)
    ]


@pytest.mark.parametrize(
    ("arch", "call", "head_dim", "dtype"),
    [
        pytest.param(*case, marks=() if n < 18 and case[0] in SHORT else pytest.mark.nightly)
        for n, case in enumerate(skip_cases())
    ],
    ids=lambda x: x.name if isinstance(x, SkipCall) else str(x),
)
def test_the_emulated_kernels_leave_out_what_is_small(
    arch: int, call: SkipCall, head_dim: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """From the C ABI to the guard, judged as a card's proof is."""
    gpu = Gpu(tmp_path, CARDS[arch])

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        *x, q_lens, k_lens, mask, blocks, guard = given
        is_causal, window = MASKS[mask]
        how: dict[str, Any] = {"is_causal": is_causal, "window": window, **blocks._asdict()}
        return gpu.sdpa(*x, q_lens=q_lens, k_lens=k_lens, guard=guard, **how)

    assert skip_calls.wrong_in(run, call, torch.device("cpu"), dtype, head_dim) is None
    asked = {name for name, _ in gpu.asked}
    assert {row_of(arch, head_dim, dtype), "wan_attn_find_nonfinite"} <= asked


@pytest.mark.parametrize("arch", SHORT)
def test_a_threshold_that_leaves_out_nothing_changes_no_bit(arch: int, tmp_path: Path) -> None:
    gpu, guard = Gpu(tmp_path, CARDS[arch]), torch.zeros(5, dtype=torch.int32)
    for head_dim, dtype in ((64, F16), (128, BF16)):
        x = operands(head_dim, dtype)
        dense = gpu.sdpa(*x)
        assert all(map(torch.equal, dense, gpu.sdpa(*x, skip_threshold=1e-30, guard=guard)))
        assert guard[0] > 0 and guard[4] == 0


def test_no_keys(gpu: Recorder) -> None:
    """There are no blocks to look at: no pass has nothing to do."""
    x, given = operands(seqlen_k=0), lists(seqlen_k=0)
    how: dict[str, Any] = {"pools_others": True, "skip_threshold": 0.05}
    assert gpu.ran(*x, **how, **given) == ["sdpa_sm80_listed_bf16_d64"]
    assert gpu.passes[-1][1].lists.capacity == 0


def refused(gpu: Gpu, *x: Tensor, **call: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        gpu.sdpa(*x, **call)
    return str(error.value)


def test_refusals(gpu: Recorder) -> None:
    assert "take head_dim 128, 64, got 80" in refused(gpu, *operands(80), **lists())
    assert "takes float32" in refused(gpu, *operands(dtype=F32), **lists())
    for broken in ({"block_counts": None}, {"block_indices": None}):
        assert "must be given with" in refused(gpu, *operands(), **{**lists(), **broken})
    assert "must be 0 without block_counts" in refused(gpu, *operands(), pools_others=True)
    assert "take head_dim 128, 64, got 80" in refused(gpu, *operands(80), skip_threshold=0.05)
    assert "takes float32" in refused(gpu, *operands(dtype=F32), skip_threshold=0.05)
    said = refused(gpu, *operands(), precision=1, skip_threshold=0.05)
    reason = "takes block lists, but neither pools_others nor a skip_threshold"
    assert f"sdpa_sm80_qk8_listed_d64: {reason}" in said
    assert gpu.asked == [], "nothing was loaded"


def test_lists_lie_where_the_call_does(gpu: Recorder) -> None:
    given = lists()
    real = gpu._on_device
    for name, at in (("block_counts", 0), ("block_indices", 1)):
        there = list(given.values())[at].data_ptr()

        def elsewhere(x: Tensor, device: int, there: int = there) -> library.Tensor:
            made = real(x, device)
            made.device_type = library.CPU if x.data_ptr() == there else made.device_type
            return made

        gpu._on_device = elsewhere  # type: ignore[method-assign]
        said = refused(gpu, *operands(), **given)
        assert f"{name} must be on query's device cuda:0, got cpu" in said


def test_what_is_counted_fits_31_bits(gpu: Recorder) -> None:
    """As without lists; their own numbers are smaller."""
    many = torch.zeros(1, 64, 1, 64, dtype=BF16).expand(1 << 14, 64, 4096, 64)
    counts = torch.zeros(1, 1, 1, dtype=torch.int32).expand(1 << 14, 4096, 1)
    indices = torch.zeros(1, 1, 1, 0, dtype=torch.int32).expand(1 << 14, 4096, 1, 0)
    said = refused(
        gpu, many, many, many, out=many, lse=many, block_counts=counts, block_indices=indices
    )
    assert "batch * num_heads_q * seqlen below 2^31" in said


@pytest.mark.parametrize("pools_others", (False, True))
@pytest.mark.parametrize("arch", ARCHS)
def test_the_emulated_kernels_compute_it(arch: int, pools_others: bool, tmp_path: Path) -> None:
    """From the C ABI to the result, by every row; a full list has a dense call's bits."""
    gpu, lens = Gpu(tmp_path, CARDS[arch]), torch.tensor([KEYS, 65])
    for head_dim, dtype in ((64, F16), (64, BF16), (128, BF16)):
        x, named = operands(head_dim, dtype), random_lists(3, 2, 4, 130, KEYS, 0.4)
        how: dict[str, Any] = {"k_lens": lens, "pools_others": pools_others}
        counts, indices = named.as_tensors()
        out, lse = gpu.sdpa(*x, block_counts=counts, block_indices=indices, **how)
        assert gpu.asked[-1][0] == row_of(arch, head_dim, dtype)
        want, want_lse = blocks_oracle.attention(*x, named, **how)
        bound = 0.02 if dtype == BF16 else 0.002
        assert np.abs(oracle.as_float64(out) - want).max() < bound
        sees = np.isfinite(want_lse)
        assert (np.isfinite(lse.numpy()) == sees).all()
        assert np.abs(lse.numpy()[sees] - want_lse[sees]).max() < (0.01 if pools_others else 1e-4)
        every = Lists(named.named | True).as_tensors()
        full = gpu.sdpa(*x, block_counts=every[0], block_indices=every[1], **how)
        if arch != 90:  # there the dense row is another kernel
            assert all(map(torch.equal, full, gpu.sdpa(*x, k_lens=lens)))
