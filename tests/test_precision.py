# SPDX-License-Identifier: Apache-2.0
"""test_precision.py - who gets a lossy row, and what a guard tells of a call; by the C ABI.

Nothing lossy runs unless it is asked for, and what is exact stays what it was.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import calls
from calls import BF16, F16, F32, operands
from wan_attn.native import library, op
from wan_attn.native.bindings import describe

pytestmark = pytest.mark.usefixtures("native")

EXACT = [row for row in op.kernels() if calls.can_run(row) and not row.is_lossy]
LOSSY = [row for row in op.kernels() if calls.can_run(row) and row.is_lossy]
each_row = pytest.mark.parametrize("row", [*EXACT, *LOSSY], ids=calls.row_id)


class Forward:
    """wan_attn_forward of these operands, on a row, with a precision and a guard."""

    def __init__(self, *operands: Tensor, k_lens: list[int] | None = None) -> None:
        self.operands, self.error = operands, library.Error()
        self.out = torch.full_like(operands[0], math.nan)
        self.lse = torch.full(
            (operands[0].shape[0], operands[0].shape[2], operands[0].shape[1]), math.nan
        )
        self.k_lens = calls.as_lens(k_lens)
        q, k, v = map(describe, operands)
        self.params = library.Params(
            struct_size=ctypes.sizeof(library.Params),
            kernel=-1,
            q=q,
            k=k,
            v=v,
            out=describe(self.out),
            lse=describe(self.lse),
            window_size_left=-1,
            window_size_right=-1,
            num_threads=2,
        )
        if self.k_lens is not None:
            self.params.seqused_k = describe(self.k_lens)

    def watch(self) -> library.Guard:
        """Gives the call a guard of zeros."""
        self.guard = library.Guard()
        self.params.guard = ctypes.addressof(self.guard)
        self.params.guard_size = ctypes.sizeof(self.guard)
        return self.guard

    def select(self) -> str:
        """The name of the row, or why there is none."""
        row = ctypes.c_int32(-1)
        if library.lib().wan_attn_select(self.params, row, self.error) == library.OK:
            return op.kernels()[row.value].name
        return self.error.text()

    def run(self) -> int:
        lib, size = library.lib(), ctypes.c_size_t()
        status: int = lib.wan_attn_workspace_size(self.params, size, self.error)
        if status != library.OK:
            return status
        self.workspace = torch.empty(size.value + 64, dtype=torch.uint8)
        self.params.workspace = -(-self.workspace.data_ptr() // 64) * 64
        self.params.workspace_size = size.value
        status = lib.wan_attn_forward(self.params, self.error)
        return status


def test_a_lossy_row_runs_only_where_it_is_asked_for() -> None:
    for dtype in (F32, F16, BF16):
        for head_dim in (1, 64, 80, 128, 256):
            call = Forward(*operands(head_dim=head_dim, dtype=dtype))
            assert not next(k for k in op.kernels() if k.name == call.select()).is_lossy
            call.params.precision = library.QK8
            assert next(k for k in op.kernels() if k.name == call.select()).is_lossy


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=calls.NAMES.get)
@pytest.mark.parametrize("head_dim", [1, 17, 64, 128, 256])
def test_avx512_has_the_bits_of_avx2(head_dim: int, dtype: torch.dtype) -> None:
    """So what one of them is off by, the other one is, too: the integers are the definition's, and
    what follows them is the same arithmetic, lane by lane."""
    rows = {row.name: row for row in LOSSY}
    if "sdpa_avx512_qk8" not in rows:
        pytest.skip("this CPU has no AVX-512 VNNI")
    for seqlen_q, seqlen_k in ((1, 1), (5, 35), (70, 200), (200, 700)):
        x = operands(2, seqlen_q, seqlen_k, 4, 2, head_dim, dtype, peaky=3.0)
        spoilt = [x[0], x[1], x[2].clone()]
        spoilt[2][1, seqlen_k // 2, 0, 0] = math.inf
        for call in (x, spoilt):
            masks: list[dict[str, Any]] = [
                *({}, {"is_causal": True}, {"window": (9, 20)}, {"k_lens": [1, seqlen_k]})
            ]
            for options in masks:
                found = [
                    calls.sdpa(*call, row=rows[name], return_lse=True, **options)
                    for name in ("sdpa_avx2_qk8", "sdpa_avx512_qk8")
                ]
                for narrow, wide in zip(*found, strict=True):
                    torch.testing.assert_close(narrow, wide, rtol=0, atol=0, equal_nan=True)


def test_a_forced_row_runs_whatever_the_precision() -> None:
    for row in (EXACT[-1], LOSSY[-1]):
        for precision in (library.EXACT, library.QK8):
            call = Forward(*operands())
            call.params.kernel, call.params.precision = row.index, precision
            assert call.select() == row.name


def test_no_exact_row_stands_in_for_a_lossy_one() -> None:
    """The caller decides what to do instead, and says so."""
    call = Forward(*operands(head_dim=300))
    call.params.precision = library.QK8
    assert call.select() == (
        "no kernel takes this call: none for cpu computes 8-bit scores of float32 with head_dim 300"
    )
    call = Forward(*operands())
    for tensor in (call.params.q, call.params.k, call.params.v, call.params.out, call.params.lse):
        tensor.device_type = library.CUDA
    call.params.precision = library.QK8
    assert "none for cuda computes 8-bit scores of float32" in call.select()


@pytest.mark.parametrize("precision", (-1, 2, 2**31 - 1))
def test_a_precision_that_there_is_not(precision: int) -> None:
    call = Forward(*operands())
    call.params.precision = precision
    said = f"precision must be 0 (exact) or 1 (8-bit scores), got {precision}"
    assert call.run() == library.INVALID_ARGUMENT and call.error.text() == said


def test_broken_guards() -> None:
    call = Forward(*operands())
    call.watch()
    call.params.guard_size = 12
    assert call.run() == library.INVALID_ARGUMENT
    rule = "20 (this library's wan_attn_guard) or, without lost_mass, 16"
    assert call.error.text() == f"guard_size must be {rule}, got 12"
    call.params.guard_size, call.params.guard = 16, ctypes.addressof(call.guard) + 2
    assert call.run() == library.INVALID_ARGUMENT
    assert call.error.text().startswith("guard must lie at a multiple of 4 bytes, got address ")


def test_cuda_rows_say_that_they_fill_no_guard_yet() -> None:
    call = Forward(*operands(dtype=BF16, head_dim=128))
    for tensor in (call.params.q, call.params.k, call.params.v, call.params.out, call.params.lse):
        tensor.device_type = library.CUDA
    call.watch()
    assert call.select().startswith("no kernel takes this call: ")


@each_row
def test_a_guard_costs_no_bit_and_is_quiet_where_all_is_well(row: op.KernelInfo) -> None:
    for dtype in row.dtypes:
        for seqlen_q in (5, 130):
            of_call = operands(batch=2, seqlen_q=seqlen_q, seqlen_k=150, dtype=dtype)
            alone, watched = (Forward(*of_call, k_lens=[150, 70]) for _ in range(2))
            alone.params.kernel = watched.params.kernel = row.index
            guard = watched.watch()
            assert alone.run() == watched.run() == library.OK
            assert torch.equal(alone.out, watched.out) and torch.equal(alone.lse, watched.lse)
            real = torch.cat([of_call[2][0].flatten(), of_call[2][1, :70].flatten()])
            assert guard.largest_value == float(real.abs().max())
            counts = guard.clipped_values, guard.nonfinite_values, guard.nonfinite_results
            assert counts == (0, 0, 0)


@each_row
def test_a_guard_tells_what_is_wrong(row: op.KernelInfo) -> None:
    """Padding does not count; whoever sees a NaN does, in every element of out."""
    for dtype, bad in itertools.product(row.dtypes, (math.nan, math.inf, -math.inf)):
        query, key, value = operands(batch=2, seqlen_q=70, seqlen_k=150, dtype=dtype)
        value[0, 3, 0, 1], value[0, 9, 1, 2], value[1, 100] = bad, bad, math.nan
        call = Forward(query, key, value, k_lens=[150, 70])
        call.params.kernel = row.index
        guard = call.watch()
        assert call.run() == library.OK
        assert (
            math.isnan(guard.largest_value) if math.isnan(bad) else guard.largest_value == math.inf
        )
        assert guard.nonfinite_values == 2 and guard.nonfinite_results == 2 * 70
        assert guard.nonfinite_results == int((~call.out.isfinite()).sum())

        call.params.is_causal = 1  # 70 rows end with the 150 keys: the third row sees key 82
        query, key, value = operands(seqlen_q=70, seqlen_k=150, dtype=dtype)
        key[0, 82, 1, 5] = bad
        call = Forward(query, key, value)
        call.params.kernel, call.params.is_causal = row.index, 1
        guard = call.watch()
        assert call.run() == library.OK
        assert guard.nonfinite_values == 0
        assert guard.nonfinite_results == int((~call.out.isfinite()).sum())
        assert row.is_lossy is False or guard.nonfinite_results == 68 * 64


def test_a_guard_watches_many_calls() -> None:
    call = Forward(*operands())
    guard = call.watch()
    guard.largest_value, guard.nonfinite_values = 100.0, 7
    guard.nonfinite_results, guard.clipped_values = 2**32 - 1, 3
    call.operands[0][0, 0, 0, 0] = math.nan
    assert call.run() == library.OK
    assert (guard.largest_value, guard.nonfinite_values, guard.clipped_values) == (100.0, 7, 3)
    assert guard.nonfinite_results == 2**32 - 1, "a count does not start again"
    call.operands[2][0, 0, 0, 0] = 1000.0
    assert call.run() == library.OK and guard.largest_value == 1000.0


@pytest.mark.parametrize(
    "spoil",
    (
        lambda q, k, v: v.fill_(2.5),
        lambda q, k, v: v.zero_(),
        lambda q, k, v: k.zero_(),
        lambda q, k, v: q.zero_(),
        lambda q, k, v: v.mul_(1e4).clamp_(-65504, 65504),
        lambda q, k, v: k.fill_(3.0),
    ),
    ids=("constant V", "V 0", "K 0", "q 0", "V at f16's limit", "K constant"),
)
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=calls.NAMES.get)
def test_odd_operands_are_finite(
    spoil: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """What gives others NaN and black frames: an all-zero or constant channel, row or head."""
    for row in LOSSY:
        of_call = operands(seqlen_q=70, seqlen_k=150, dtype=dtype)
        spoil(*of_call)
        call = Forward(*of_call)
        call.params.kernel = row.index
        guard = call.watch()
        assert call.run() == library.OK
        assert guard.nonfinite_results == guard.nonfinite_values == 0
        assert call.out.isfinite().all() and call.lse.isfinite().all()
        assert call.out.abs().max() <= guard.largest_value * (1 + max(1e-6, torch.finfo(dtype).eps))
