# SPDX-License-Identifier: Apache-2.0
"""test_cpu_threads.py - threads, forks and instruction-set levels change when and where CPU rows
compute, and never what.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import calls
from calls import BF16, F32, sdpa
from wan_attn.native import bindings, library, op, shim

pytestmark = pytest.mark.usefixtures("native", "threads")

ROWS = [row for row in calls.rows() if row is not None and row.device == "cpu"]
each_row = pytest.mark.parametrize("row", ROWS, ids=calls.row_id)
# Many tiles, several blocks of keys, tails everywhere, both orders of tiles; 2 samples.
SHAPE = {"batch": 2, "seqlen_q": 333, "seqlen_k": 301, "heads_q": 4, "heads_k": 2}


def operands(row: op.KernelInfo) -> tuple[torch.Tensor, ...]:
    return calls.operands(**SHAPE, head_dim=40, dtype=row.dtypes[-1])


@pytest.mark.parametrize("masks", ({}, {"is_causal": True, "k_lens": [301, 77]}), ids=str)
@each_row
def test_thread_counts_give_the_same_bits(row: op.KernelInfo, masks: dict[str, Any]) -> None:
    tensors = operands(row)
    torch.set_num_threads(1)
    expected = sdpa(*tensors, row=row, return_lse=True, **masks)
    for count in range(2, 9):
        torch.set_num_threads(count)
        for got, want in zip(
            sdpa(*tensors, row=row, return_lse=True, **masks), expected, strict=True
        ):
            assert torch.equal(got, want), f"{count} threads"


@each_row
def test_threads_of_its_own(row: op.KernelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch lends no loop (torch < 2.10, children of fork)."""
    tensors = operands(row)
    expected = sdpa(*tensors, row=row)[0]
    monkeypatch.setattr(shim, "parallel_for", lambda: None)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(bindings.ctypes_sdpa(*tensors, kernel=row.index)[0], expected)


@each_row
def test_called_from_many_python_threads(row: op.KernelInfo) -> None:
    """As data loaders and servers do; the caller's loop may be busy with another call."""
    tensors = operands(row)
    expected = sdpa(*tensors, row=row)[0]
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(3):
            if not torch.equal(sdpa(*tensors, row=row)[0], expected):
                wrong.append(number)

    workers = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@each_row
def test_turns_with_torch(row: op.KernelInfo) -> None:
    """torch's own operators and ours share threads; neither disturbs the other's results."""
    tensors = operands(row)
    expected, matrix = sdpa(*tensors, row=row)[0], torch.randn(300, 300)
    product = matrix @ matrix
    torch.set_num_threads(2)
    for _ in range(5):
        assert torch.equal(sdpa(*tensors, row=row)[0], expected)
        torch.testing.assert_close(matrix @ matrix, product)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("count", (1, 2))
def test_after_fork(count: int) -> None:
    """The parent has used torch's threads, so that in the child torch's own loops would hang."""
    torch.set_num_threads(2)
    tensors = operands(ROWS[0])
    expected = sdpa(*tensors)[0].view(torch.uint8).numpy()
    child = os.fork()
    if child == 0:  # no pytest, no torch loops from here on
        try:
            signal.alarm(30)
            torch.set_num_threads(count)
            got = torch.ops.wan_attn.sdpa(*tensors)[0].view(torch.uint8).numpy()
            os._exit(0 if (got == expected).all() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_data_loader_workers() -> None:
    data = [torch.randn(1, 70, 2, 32) for _ in range(4)]

    class Attention(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> torch.Tensor:
            out: torch.Tensor = torch.ops.wan_attn.sdpa(data[index], data[index], data[index])[0]
            return out

    loader = torch.utils.data.DataLoader(
        Attention(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    for x, out in zip(data, loader, strict=True):
        assert torch.equal(out, torch.ops.wan_attn.sdpa(x, x, x)[0])


LEVELS = {
    "portable": set(),
    "avx2": {"avx2"},
    "avx512": {"avx2", "avx512"},
    "avx512_bf16": {"avx2", "avx512", "avx512_bf16"},
    "avx512_vnni": {"avx2", "avx512", "avx512_vnni"},
    "amx": {"avx2", "avx512", "avx512_bf16", "amx"},
    "neon": {"neon"},
}
CHOICE = """
import sys, torch
from wan_attn.native import op
from wan_attn.request import Request
for dtype in (torch.float32, torch.bfloat16):
    q = torch.randn(1, 20, 1, 16).to(dtype)
    row, _ = op.select(Request.from_tensors(q, q, q))
    torch.testing.assert_close(
        torch.ops.wan_attn.sdpa(q, q, q)[0],
        torch.ops.wan_attn.sdpa(q, q, q, kernel=row.index)[0], rtol=0, atol=0)
    print(row.name)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_masks_what_is_above_it(level: str) -> None:
    """WAN_ATTN_CPU_ISA: the best row that needs no more than the level has, here and on any CPU."""
    allowed = LEVELS[level] & set(op.cpu_features())
    environment = {**os.environ, "WAN_ATTN_CPU_ISA": level}
    done = subprocess.run(
        [sys.executable, "-c", CHOICE],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [
        next(
            row.name
            for row in op.kernels()
            if row.device == "cpu"
            and dtype in row.dtypes
            and set(row.cpu_features) <= allowed
            and not row.is_lossy
        )
        for dtype in (F32, BF16)
    ]
    assert done.stdout.split() == expected


@each_row
def test_every_row_runs_under_a_mask(row: op.KernelInfo) -> None:
    """Forcing a row and allowing just what it needs come to the same bits."""
    tensors = calls.operands(dtype=row.dtypes[-1])
    needs = sum(1 << bit for n, bit in library.cpu_features().items() if n in row.cpu_features)
    levels = [library.cpu_feature_level(name) for name in library.cpu_features()]
    assert row.name == "sdpa_ref" or any(bits & needs == needs for bits in levels)
    assert torch.isfinite(sdpa(*tensors, row=row)[0]).all()
