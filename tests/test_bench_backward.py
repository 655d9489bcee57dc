# SPDX-License-Identifier: Apache-2.0
"""test_bench_backward.py - `bench backward`: each fast row that takes the call beside torch's."""

from __future__ import annotations

import json

import pytest

from wan_attn.__main__ import main
from wan_attn.bench.backward import TORCH
from wan_attn.native import backward
from wan_attn.native.kernels import backward_kernels

pytestmark = pytest.mark.usefixtures("native")
WORDS = ["bench", "backward", "--shape", "1x64x2x32", "--rounds", "2"]


def test_every_fast_row_is_timed_beside_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--dtype", "fp32,bf16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    for dtype in ("fp32", "bf16"):
        found = {row["kernel"]: row for row in rows if row["dtype"] == dtype}
        assert found[TORCH]["speedup"] == 1.0 and found[TORCH]["workspace_mib"] is None
        ours = [row for row in found.values() if row["ours"]]
        assert all(row["workspace_mib"] > 0 and row["iters"] == 2 for row in ours)
        known = {row.name for row in backward_kernels()} - {backward.PORTABLE}
        assert {row["kernel"] for row in ours} <= known


def test_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--device", "cuda"]) == 2
    assert "cuda" in capsys.readouterr().err
