# SPDX-License-Identifier: Apache-2.0
"""test_long_sequences.py - lengths as MiniMax-H3 has them, up to 170,000 tokens.

Few heads and few rows, or all rows and few keys: what is judged is a sample of the rows, in
float64. A CUDA call is planned and launched on the mock driver, where nothing is computed.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import calls
import wan_attn
from calls import BF16, F16, operands, poisoned, sdpa
from cuda_mock.gpu import CARDS, Gpu
from emu.build import compiler
from tolerances import FACTOR, FLOOR_ULP, assert_close_to_oracle, ulp
from wan_attn.backends import chunked
from wan_attn.native import op
from wan_attn.request import Call, Request
from wan_attn.workloads import H3_TOKENS, WORKLOADS

MOST = 170_000
ROWS = [row for row in calls.rows() if row is not None and row.device == "cpu"]
each_row = pytest.mark.parametrize("row", ROWS, ids=calls.row_id)


def keys_of(length: int, rows: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    """`rows` queries of two heads and `length` keys of one."""
    return list(operands(1, rows, length, heads_q=2, heads_k=1, head_dim=128, dtype=dtype))


def judge(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: list[int]) -> None:
    """These rows of a call without masks, as tolerances.py judges; the oracle itself is made for
    short calls."""

    def by(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scores = q[0, rows].to(dtype).transpose(0, 1) @ k[0, :, 0].to(dtype).T * 128**-0.5
        weights = torch.softmax(scores.double(), -1).to(dtype)
        return weights @ v[0, :, 0].to(dtype), torch.logsumexp(scores.double(), -1)

    (exact, exact_lse), (theirs, _) = by(torch.float64), by(q.dtype)
    error = (out[0, rows].transpose(0, 1).double() - exact).abs().max()
    allowed = FACTOR * (theirs.double() - exact).abs().max() + FLOOR_ULP * ulp(q.dtype, 0.1)
    assert error <= allowed, f"out: {error:.2e}, allowed {allowed:.2e}"
    torch.testing.assert_close(lse[0, :, rows].double(), exact_lse, rtol=0, atol=1e-4)


@each_row
def test_many_keys(row: op.KernelInfo) -> None:
    """By few rows and by a whole panel, a key short of the padding, which is NaN."""
    for rows in (5, 70):
        q, k, v = keys_of(MOST, rows, row.dtypes[-1])
        lens = [MOST - 1]
        padded = poisoned(k, lens), poisoned(v, lens)
        out, lse = sdpa(q, *padded, row=row, k_lens=lens, return_lse=True)
        judge(out, lse, q, k[:, :-1], v[:, :-1], [0, rows - 1])


@pytest.mark.parametrize("length", H3_TOKENS)
def test_the_lengths_of_h3(length: int) -> None:
    q, k, v = keys_of(length, 5)
    out, lse = wan_attn.sdpa(q, k, v, return_lse=True)
    judge(out, lse, q, k, v, [0, 4])


@each_row
def test_a_window_at_the_far_end(row: op.KernelInfo) -> None:
    q, k, v = keys_of(MOST, 33, row.dtypes[-1])
    out, _ = sdpa(q, k, v, row=row, is_causal=True, window=(1000, -1))
    near = slice(MOST - 1100, None)
    assert_close_to_oracle(out, q, k[:, near], v[:, near], is_causal=True, window=(1000, -1))


@each_row
def test_many_rows(row: op.KernelInfo) -> None:
    q, k, v = operands(1, MOST, 19, heads_q=2, heads_k=2, head_dim=128, dtype=row.dtypes[-1])
    lens = [MOST - 5]
    out, lse = sdpa(q, k, v, row=row, q_lens=lens, return_lse=True)
    some = torch.tensor([0, 1, 65_535, 65_536, 104_049, 131_072, MOST - 6])
    assert_close_to_oracle(out[:, some], q[:, some], k, v, lse=lse[..., some])
    assert not out[:, -5:].any() and (lse[..., -5:] == -math.inf).all()


def test_the_wrapper_of_torch() -> None:
    q, k, v = keys_of(MOST, 5)
    out, lse = chunked.run(q, k, v, Call(k_lens=torch.tensor([MOST - 1]), return_lse=True))
    assert lse is not None
    judge(out, lse, q, k[:, :-1], v[:, :-1], [0, 4])


def test_packed_tokens() -> None:
    """Text, audio and video of one clip as one sequence beside a shorter one."""
    lengths = (104_050, 65_950)
    q, k, v = keys_of(MOST, 10)
    begins = torch.tensor([0, lengths[0], MOST], dtype=torch.int32)
    rows = torch.tensor([0, 4, 10], dtype=torch.int32)
    result = wan_attn.flash_attn_varlen_func(
        q[0], k[0], v[0], rows, begins, 6, max(lengths), return_attn_probs=True
    )
    assert isinstance(result, tuple)
    out, lse = result[0][None], result[1][None]
    for mine, keys in (
        (slice(0, 4), slice(0, lengths[0])),
        (slice(4, 10), slice(lengths[0], None)),
    ):
        judge(out[:, mine], lse[..., mine], q[:, mine], k[:, keys], v[:, keys], [0, 3])


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name.startswith("h3-")])
def test_a_row_takes_each_of_them(name: str) -> None:
    request = Request.of(WORKLOADS[name], BF16, "cpu", has_k_lens=True)
    assert any(op.why_not(request, row.index) is None for row in ROWS)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")
@pytest.mark.parametrize("arch", CARDS)
def test_a_launch_covers_all_rows_and_heads(arch: int, tmp_path: Path) -> None:
    """As many blocks as tiles of BLOCK_M rows by heads, at 170,000 tokens of H3's 56 heads: over
    2^31 bytes from the first element of an operand to its last."""
    tokens = MOST * 56 * 128
    memory = calls.reserve(4 * tokens, F16)  # of which no card needs a converted copy
    if memory is None:
        pytest.skip("this system does not lend address space without memory behind it")
    q, k, v, out = (memory[n * tokens :][:tokens].view(1, MOST, 56, 128) for n in range(4))
    gpu = Gpu(tmp_path, CARDS[arch])
    gpu.driver.mock_on_launch(type(gpu._keep[0])(0))  # nothing has to be computed
    gpu.sdpa(q, k, v, out=out, return_lse=False)
    launched = [line for line in gpu.log() if line.startswith("launch")]
    assert launched[-1].split()[1].startswith("sdpa_")
    blocks = int(launched[-1].split("grid ")[1].split(",")[0])
    assert blocks % 56 == 0
    per_head = blocks // 56
    assert any(per_head * rows >= MOST > (per_head - 2) * rows for rows in (64, 128, 192, 256))
