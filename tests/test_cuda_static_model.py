# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static_model.py - what the performance model says of the rows that Wan2.2 uses."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import lossy_model, static_model
from emu import compile as compilers
from emu import sass
from emu.rows import CSRC

pytestmark = pytest.mark.skipif(
    sass.nvdisasm() is None or not (compilers.nvcc() or compilers.nvrtcs()),
    reason="no nvdisasm, or neither nvcc nor NVRTC",
)


@cache
def of(row: str) -> dict[str, static_model.Estimate]:
    return {r.gpu: r for r in static_model.estimates(row)}


def test_head_dim_128_is_limited_by_the_tensor_cores_alone() -> None:
    for r in of("sdpa_sm80_bf16_d128").values():
        assert r.limit == "tensor"
        assert r.clocks["issue"] <= 0.55 * r.clocks["tensor"], r
        assert r.of_peak == pytest.approx(1.0)


def test_f16_sums_lift_the_bound_on_geforce_by_a_third() -> None:
    plain, pv16 = of("sdpa_sm80_bf16_d128"), of("sdpa_sm80_pv16_bf16_d128")
    for gpu in ("RTX 3090", "RTX 4090", "RTX 5090"):
        assert pv16[gpu].limit == "tensor"
        assert pv16[gpu].bound_tflops >= 1.3 * plain[gpu].bound_tflops


def test_bf16_on_turing_is_as_fast_as_f16() -> None:
    """Scaling Q and rounding out cost nothing in the main loop."""
    (bf16,), (f16,) = of("sdpa_sm75_bf16_d128").values(), of("sdpa_sm75_f16_d128").values()
    assert bf16.bound_tflops == f16.bound_tflops
    assert bf16.others_per_product == pytest.approx(f16.others_per_product, rel=0.01)


def test_8_bit_scores_are_worth_it() -> None:
    """Half a rate of 8-bit products, half of f16 ones: 2.67 times what is summed in f32 can reach.
    Every other unit has room, and 60 % of the bound are left if nothing at all is hidden."""
    for gpu, times in (("RTX 3090", 2.66), ("RTX 4090", 2.66), ("RTX 5090", 2.66), ("A100", 1.33)):
        r = of("sdpa_sm80_qk8_bf16_d128")[gpu]
        assert r.limit == "tensor" and r.of_peak >= times
        assert r.clocks["issue"] <= 0.6 * r.clocks["tensor"]
        assert r.unhidden >= 0.6
    assert of("sdpa_sm75_qk8_bf16_d128")["RTX 2080 Ti"].of_peak >= 1.55
    assert "H200" not in of("sdpa_sm80_qk8_bf16_d128")


def test_what_was_asked_of_8_bit_scores_is_reached_and_the_readme_says_so() -> None:
    rows = [r for row in lossy_model.ROWS for r in of(row).values()]
    assert [r.gpu for r in rows if lossy_model.missed(r)] == []
    assert lossy_model.missed(replace(rows[1], of_peak=1.9, unhidden=0.59)).count(", not ") == 2
    for r in rows:
        assert sum(r.shared_for.values()) == r.clocks["shared"]
    if compilers.nvcc():  # whose figures those are
        text = (CSRC / "cuda/README.md").read_text(encoding="utf-8")
        for line in (*lossy_model.bounds(rows), *lossy_model.shared_memory(rows)):
            assert f"{line}\n" in text, line


def test_the_table_shows_every_row() -> None:
    rows = list(of("sdpa_sm80_bf16_d64").values())
    assert static_model.table(rows).count("sdpa_sm80_bf16_d64") == len(rows)
