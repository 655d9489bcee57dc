# SPDX-License-Identifier: Apache-2.0
"""test_cuda_calls.py - odd calls on the mock driver and the emulated GPU: each of these is there
because a planted bug of the host side got past test_cuda_launch.py."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_mock.gpu import CARDS, Gpu
from emu.build import compiler
from test_cuda_launch import BF16, F16, F32, check, gpu, normal  # noqa: F401 - gpu is a fixture
from wan_attn.native import library

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

CONVERT, MERGE = "wan_attn_convert", "wan_attn_merge"


def shifted(x: Tensor, elements: int) -> Tensor:
    """A dense copy that begins so many elements behind a boundary of 64 bytes."""
    store = torch.zeros(x.numel() + 64, dtype=x.dtype)
    begin = -store.data_ptr() % 64 // x.element_size() + elements
    view = store[begin : begin + x.numel()].view(x.shape)
    return view.copy_(x)


def outputs(query: Tensor, gap: int = 4) -> tuple[Tensor, Tensor]:
    """Views for out and lse that are dense in no dimension but out's last, full of 777."""
    batch, rows, heads, head_dim = query.shape
    out = torch.full((batch, heads + 1, rows, head_dim + gap), 777.0, dtype=query.dtype)
    lse = torch.full((batch, rows, heads, 3), 777.0)
    return out[:, :heads, :, :head_dim].transpose(1, 2), lse[..., 1].transpose(1, 2)


def between(view: Tensor) -> Tensor:
    """What lies in the view's memory and is not the view's."""
    view.fill_(777.0)
    store = view.untyped_storage()
    whole: Any = torch.tensor([], dtype=view.dtype)
    whole.set_(store, 0, (store.nbytes() // view.itemsize,))
    return torch.as_tensor(whole)


@pytest.mark.parametrize("arch", (75, 80, 89))
@pytest.mark.parametrize("seqlen_k", (133, 4200), ids=("whole", "split"))
@pytest.mark.parametrize("q_dtype", (BF16, F32), ids=str)
def test_outputs_may_be_views(arch: int, seqlen_k: int, q_dtype: Any, tmp_path: Path) -> None:
    """And K and V differ in layout and size, so that nothing of one passes for the other's."""
    machine = Gpu(tmp_path, CARDS[arch])
    query, key, value = normal(9, seqlen_k, 2, 2, 128 if arch == 89 else 64, q_dtype=q_dtype)
    heads_first = torch.zeros(2, 2, seqlen_k + 3, value.shape[3], dtype=value.dtype)
    key, value = key * 16, heads_first[:, :, :seqlen_k].transpose(1, 2).copy_(value / 64)
    out, lse = outputs(query)
    launched = check(machine, query / 16, key, value, out=out, lse=lse, is_causal=True)
    assert (MERGE in launched) == (seqlen_k > 4096)
    for view in (out, lse):
        assert (between(view) == 777.0).all()


@pytest.mark.parametrize("seqlen_k", (133, 4200), ids=("whole", "split"))
def test_lse_may_be_absent(gpu: Gpu, seqlen_k: int) -> None:  # noqa: F811
    operands = normal(9, seqlen_k, batch=1)
    out, _ = gpu.sdpa(*operands)
    alone, lse = gpu.sdpa(*operands, return_lse=False)
    assert torch.equal(out, alone) and lse.isnan().all()


def test_alignment_is_judged_by_what_each_operand_needs(gpu: Gpu) -> None:  # noqa: F811
    query, key, value = normal(heads_k=2)
    row = "sdpa_sm80_bf16_d64"
    for moved, copies in (
        ((shifted(query, 2), shifted(key, 8), shifted(value, 8)), 0),
        ((shifted(query, 1), key, value), 1),
        ((query, shifted(key, 4), value), 1),
        ((query, key, shifted(value, 4)), 1),
    ):
        assert check(gpu, *moved) == [CONVERT] * copies + [row]
    query = query.float()
    assert check(gpu, shifted(query, 2), key, value) == [row]
    assert check(gpu, shifted(query, 1), key, value, scale=-0.2) == [CONVERT, row]


@pytest.mark.parametrize("dim", (0, 1, 2), ids=("batch", "row", "head"))
@pytest.mark.parametrize("which", (1, 2), ids=("key", "value"))
def test_each_stride_counts_if_it_is_walked(gpu: Gpu, dim: int, which: int) -> None:  # noqa: F811
    def odd(x: Tensor) -> Tensor:
        strides = [8 * s for s in x.stride()[:3]]
        strides[dim] += 4
        store = torch.zeros(sum(s * n for s, n in zip(strides, x.shape, strict=False)) + 64)
        return store.to(x.dtype).as_strided(x.shape, (*strides, 1)).copy_(x)

    operands = list(normal(7, 20, 2, 2))
    one = [x[:1, :1, :1] for x in operands]
    operands[which] = odd(operands[which])
    assert check(gpu, *operands) == [CONVERT, "sdpa_sm80_bf16_d64"]
    one[which] = operands[which][:1, :1, :1]
    assert check(gpu, *one) == ["sdpa_sm80_bf16_d64"]


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("on_device", (False, True), ids=("host", "device"))
def test_lengths_may_be_every_third_number(gpu: Gpu, on_device: bool, dtype: Any) -> None:  # noqa: F811
    numbers = torch.full((9,), 1 << 20, dtype=dtype)
    q_lens, k_lens = numbers[1::3], numbers.clone()[2::3]
    q_lens.copy_(torch.tensor([70, 70, 11]))  # the first ones say nothing
    k_lens.copy_(torch.tensor([133, 90, 5]))
    call: dict[str, Any] = {"q_lens": q_lens, "k_lens": k_lens, "lens_on_device": on_device}
    check(gpu, *normal(batch=3), is_causal=True, **call)


def test_lengths_reach_the_passes_before(tmp_path: Path) -> None:
    """What lies behind the lengths neither is converted nor counts for a head's scale."""
    query, key, value = normal(20, 70, 2, 2, 64)
    for x in (key, value):
        x[1, 9:40] = float("nan")
        x[1, 40:] = 1e30
    query[0, 5:] = float("nan")
    machine = Gpu(tmp_path, CARDS[75])
    check(machine, query, key, value, q_lens=torch.tensor([5, 20]), k_lens=torch.tensor([70, 9]))


@pytest.mark.parametrize("arch", (75, 89))
def test_the_largest_value_of_a_head_is_found_wherever_it_is(arch: int, tmp_path: Path) -> None:
    query, key, value = normal(5, 1500, 2, 2, 128)
    value[1, 1201, 1] = 3e30
    value[0, 700, 0, 3] = 1e6
    key[0, 1499, 1] *= 64
    check(Gpu(tmp_path, CARDS[arch]), query, key, value)


def test_a_split_has_every_kind_of_part(gpu: Gpu) -> None:  # noqa: F811
    """Full, cut by the window, cut by a length, empty; a sample without keys."""
    operands = normal(5, 8300, 2, 1, 64, batch=3)
    k_lens = torch.tensor([8300, 0, 4100])
    assert MERGE in check(gpu, *operands, k_lens=k_lens, window=(4150, 2), is_causal=False)


def test_a_nan_stays_one_through_a_split(gpu: Gpu) -> None:  # noqa: F811
    query, key, value = normal(5, 4200, 1, 1, 64, batch=1)
    query[0, 3, 0, 7] = float("nan")
    out, lse = gpu.sdpa(query, key, value)
    assert out[0, 3].isnan().all() and lse[0, 0, 3].isnan()
    assert out[0, :3].isfinite().all()


@pytest.mark.parametrize("bound", (2**29 - 1, 2**29, 2**31 + 3, 2**32 + 1, 2**61))
def test_bounds_of_a_window_have_64_bits(gpu: Gpu, bound: int) -> None:  # noqa: F811
    operands = normal(9, 40, 1, 1)
    check(gpu, *operands, window=(bound, 3))
    check(gpu, *operands, window=(3, bound))


@pytest.mark.parametrize("scale", (1e-42, -1e-42, 1e-300, -2.5))
def test_scales(gpu: Gpu, scale: float) -> None:  # noqa: F811
    lens = torch.tensor([133, 20])
    check(gpu, *normal(9), scale=scale, k_lens=lens)


@pytest.mark.parametrize("scale", (1e39, -1e300))
def test_scales_beyond_float32(gpu: Gpu, scale: float) -> None:  # noqa: F811
    """Infinity times a score of 0 would be NaN."""
    query, key, value = normal(9)
    out, want = (gpu.sdpa(query * 0, key, value, scale=x)[0] for x in (scale, 0.0))
    assert torch.equal(out, want)


@pytest.mark.parametrize("after", range(9))
def test_a_pass_that_fails_ends_the_call(after: int, tmp_path: Path) -> None:
    """Lengths; measure, find scale and convert K, then V; attend, merge: no later one is tried."""
    machine = Gpu(tmp_path, CARDS[75])
    machine.driver.mock_on_launch(type(machine._keep[0])(0))
    machine.fail("cuLaunchKernel", 700, after)
    with pytest.raises(RuntimeError, match="^3: .*ILLEGAL_ADDRESS.* when launching"):
        machine.sdpa(*normal(5, 4200, head_dim=128, batch=1), k_lens=torch.tensor([4199]))
    launches = [line.split()[0] for line in machine.log() if line.startswith(("launch", "cuL"))]
    assert launches == ["launch"] * after + ["cuLaunchKernel"]
    assert machine.driver.mock_depth() == 0, "a context was left on the stack"


def test_shared_memory_that_is_refused(tmp_path: Path) -> None:
    machine = Gpu(tmp_path, CARDS[80])
    machine.fail("cuKernelSetAttribute", 1)
    with pytest.raises(RuntimeError, match="^2: the machine code .* is not for this device"):
        machine.sdpa(*normal(head_dim=128))
    mode = ctypes.c_int(0)
    machine.driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == 0 and machine.driver.mock_depth() == 0


def select(gpu: Gpu, q_shape: Any, k_shape: Any, **params_of_it: Any) -> tuple[int, str]:  # noqa: F811
    """What the library says of a float16 call that no memory could hold."""

    def absent(shape: tuple[int, ...]) -> library.Tensor:
        described = library.Tensor(dtype=library.F16, device_type=library.CUDA, ndim=4)
        for dim, size in enumerate(shape):
            described.shape[dim], described.stride[dim] = size, int(dim == 3)
        return described

    params = library.Params(struct_size=ctypes.sizeof(library.Params), kernel=-1)
    params.q, params.k, params.v = absent(q_shape), absent(k_shape), absent(k_shape)
    params.window_size_left = params.window_size_right = -1
    for name, x in params_of_it.items():
        setattr(params, name, x)
    row, error = ctypes.c_int32(), library.Error()
    status = gpu.lib.wan_attn_select(params, ctypes.byref(row), ctypes.byref(error))
    return status, error.text()


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "reason"),
    [
        ((1, 1 << 29, 1, 64), (1, 8, 1, 64), "below 2^29"),
        ((1, 8, 1, 64), (1, 1 << 29, 1, 64), "below 2^29"),
        ((1 << 20, 64, 32, 64), (1 << 20, 8, 32, 64), "below 2^31"),
        ((1 << 20, 8, 32, 64), (1 << 20, 64, 32, 64), "below 2^31"),
        ((1 << 31, 1, 1, 64), (1 << 31, 1, 1, 64), "below 2^31"),
        ((1, 1, 1 << 34, 64), (1, 1 << 40, 1, 64), "below 2^29"),
        ((1, 1, 40, 64), (1, (1 << 29) - 1, 1, 64), "below 2^31"),
    ],
)
def test_sizes_beyond_the_kernels(gpu: Gpu, q_shape: Any, k_shape: Any, reason: str) -> None:  # noqa: F811
    status, said = select(gpu, q_shape, k_shape)
    assert status == library.UNSUPPORTED and reason in said


GUARD = {"guard": 1 << 20, "guard_size": ctypes.sizeof(library.Guard)}


@pytest.mark.parametrize(
    ("heads", "seqlen_q", "seqlen_k", "head_dim", "call", "reason"),
    [
        ((1 << 25) - 1, 1, 1, 64, {"precision": library.QK8}, ""),
        (1 << 25, 1, 1, 64, {"precision": library.QK8}, "whole tiles of 64"),
        ((1 << 24) - 1, 1, 65, 128, {"precision": library.QK8}, ""),
        (1 << 24, 1, 0, 128, {"precision": library.QK8}, "times head_dim"),
        (1 << 24, 1, 65, 64, {"precision": library.QK8}, "whole tiles of 64"),
        ((1 << 30) - 1, 1, 1, 64, GUARD, ""),
        (1 << 30, 1, 1, 64, {}, ""),
        (1 << 30, 1, 1, 64, GUARD, "fewer than 2^31 blocks"),
        ((1 << 24) + 1, 127, 127, 64, GUARD, ""),
    ],
)
def test_passes_count_in_31_bits(
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    call: Any,
    reason: str,
    gpu: Gpu,  # noqa: F811
) -> None:
    """Those beside attention, too, where they have more warps or threads than the call has rows."""
    shapes = [(1, n, heads, head_dim) for n in (seqlen_q, seqlen_k)]
    status, said = select(gpu, *shapes, **call)
    assert status == (library.UNSUPPORTED if reason else library.OK) and reason in said, said


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (F32, 128, "none for cuda takes float32"),
        (F16, 72, "those for cuda take head_dim 64, 128, 256, 80, got 72"),
        (BF16, 384, "those for cuda take head_dim 64, 128, 256, 80, got 384"),
    ],
)
def test_calls_of_another_kind_get_one_line(
    gpu: Gpu,  # noqa: F811
    dtype: torch.dtype,
    head_dim: int,
    reason: str,
) -> None:
    with pytest.raises(RuntimeError, match=f"^2: no kernel takes this call: {reason}$"):
        gpu.sdpa(*normal(head_dim=head_dim, dtype=dtype))
