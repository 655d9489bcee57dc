# SPDX-License-Identifier: Apache-2.0
"""test_accuracy.py - the simulation of 8-bit attention: its parts, and what it promises of ours."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from benchmarks.accuracy import __main__ as room
from benchmarks.accuracy import families, library, schemes
from benchmarks.accuracy.families import Case

CASES = {case.family: case for case in families.synthetic(keys=512, long=1280)}


def drawn(*shape: int) -> schemes.Array:
    return np.random.default_rng(3).normal(size=shape)


@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
def test_the_rotation_keeps_products(head_dim: int) -> None:
    q, k = drawn(20, head_dim), drawn(30, head_dim)[::-1]
    products = schemes.hadamard(q) @ schemes.hadamard(k).T
    np.testing.assert_allclose(products, q @ k.T, atol=1e-11)
    one = np.zeros((1, head_dim))
    one[0, 5] = 1.0  # spread evenly
    assert np.ptp(np.abs(schemes.hadamard(one))) < 1e-15
    constant = schemes.hadamard(np.ones((1, head_dim)))
    assert np.abs(constant).max() < 0.5 * np.linalg.norm(constant)


def test_roundings_are_those_of_torch() -> None:
    x = np.concatenate([drawn(4000) * 10.0**e for e in range(-4, 4)])
    x = np.concatenate([x, [0.0, 448.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9]])
    fp8 = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(schemes.e4m3(x), fp8)
    bf16 = torch.from_numpy(x).float().bfloat16().double().numpy()
    np.testing.assert_array_equal(families.bf16(x), bf16)


def test_integers_use_the_range_and_share_their_groups_step() -> None:
    x = drawn(64, 128)
    values, step = schemes.to_int8(x)
    assert (np.abs(values).max(axis=1) == 127).all() and values.shape == x.shape
    assert np.abs(values * step - x).max() <= 0.5001 * step.max()
    group = schemes.rows_of_a_thread(64)
    assert np.bincount(group).tolist() == [4] * 16
    _, shared = schemes.to_int8(x, group)
    assert (shared >= step).all() and len(np.unique(shared)) == 16
    assert np.bincount(schemes.keys_of_a_thread(128)).tolist() == [16] * 8
    assert np.bincount(schemes.keys_of_a_thread(256, 128)).tolist() == [32] * 8
    zeros, none = schemes.to_int8(np.zeros((2, 8)))
    assert not zeros.any() and not none.any()


@pytest.mark.parametrize("scheme", room.SCHEMES.values(), ids=room.SCHEMES)
def test_a_scheme_is_attention(scheme: schemes.Scheme) -> None:
    case = CASES["normal"]
    want, _ = oracle.one_head(
        case.q, case.k, case.v, case.scale, np.ones((len(case.q), len(case.k)), dtype=bool)
    )
    np.testing.assert_allclose(schemes.exact(case.q, case.k, case.v, case.scale), want, atol=1e-12)
    got = scheme(case.q, case.k, case.v, case.scale)
    assert 1e-4 < room.error(got, want).relative_l2 < 0.06


def test_constants_are_those_of_the_kernels() -> None:
    csrc = Path(__file__).resolve().parents[1] / "csrc"
    integers = f"WEIGHT_ONE = {schemes.WEIGHT_ONE}, VALUE_TOP = {schemes.VALUE_TOP} }}"
    assert integers in (csrc / "cpu" / "sdpa_qk8_values.inc").read_text()
    assert "#define BLOCK_N 128" in (csrc / "cpu" / "sdpa_avx512_qk8.c").read_text()
    assert schemes.CPU_BLOCK == 128
    shift = f"#define P_SHIFT (!PV_SUM_F16 ? 13 : QK_INT8 ? {schemes.P_SHIFT} : 9)"
    assert shift in (csrc / "cuda" / "sdpa_sm80.cuh").read_text()
    tiles = re.findall(
        r"^TILE_QK8\(\w+, +\w+, +\d+, +(\d+),", (csrc / "cuda/sdpa_rows.def").read_text(), re.M
    )
    assert len(tiles) > 4 and set(tiles) == {str(schemes.TILE)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_is_what_was_simulated(case: Case) -> None:
    """It rounds K's mean to float32, so that an integer here and there is the next one."""
    row = library.lossy_row()
    if row is None:
        pytest.skip("without the native library")
    in_integers = row.name != "sdpa_ref_qk8"
    simulated = schemes.qk8(case.q, case.k, case.v, case.scale, in_integers=in_integers)
    computed = library.scheme(row)(case.q, case.k, case.v, case.scale)
    want = schemes.exact(case.q, case.k, case.v, case.scale)
    assert (
        room.error(computed, simulated).relative_l2 < 0.05 * room.error(simulated, want).relative_l2
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_promises_hold_on_every_family(case: Case) -> None:
    assert list(room.broken_promises(case.family, room.judge(case, room.SCHEMES))) == []


def test_a_broken_promise_is_told() -> None:
    worse: dict[str, schemes.Scheme] = dict(room.SCHEMES)
    worse[room.OURS] = partial(schemes.qk8, rotates=False)
    case = CASES["few_channels"]
    (told,) = [
        t for t in room.broken_promises(case.family, room.judge(case, worse)) if "Sage2" in t
    ]
    assert told.startswith("few_channels: qk8 has ")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    few = [CASES["normal"], CASES["v_bias"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "cases", lambda small, wan22: iter(few))
        assert room.main(["--small", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "every promise holds" in text and "| v_bias |" in text
    assert '"comfy-kitchen"' in file.read_text()
