# SPDX-License-Identifier: Apache-2.0
"""test_ptx_helpers.py - the passes before and after the attention, run from their PTX."""

from __future__ import annotations

import pytest
import torch

from ptx import collect, machine
from ptx.helpers import HALVES, MERGED_PARTS, NUMBER, Helpers

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

ARCHS = (75, 80, 120)  # those between have 80's text, but for its target
each_arch = pytest.mark.parametrize("arch", ARCHS)


def of(arch: int) -> Helpers:
    return Helpers(collect.nvrtcs()[0], arch)


@each_arch
@pytest.mark.parametrize("to", HALVES, ids=str)
@pytest.mark.parametrize("source", NUMBER, ids=str)
def test_convert_is_torchs(source: torch.dtype, to: torch.dtype, arch: int) -> None:
    of(arch).check_convert(source, to)


@each_arch
def test_measure_and_find_scale(arch: int) -> None:
    of(arch).check_scales()


@each_arch
@pytest.mark.parametrize("dtype", NUMBER, ids=str)
def test_merge(dtype: torch.dtype, arch: int) -> None:
    for splits in MERGED_PARTS:
        of(arch).check_merge(splits, dtype)


@each_arch
def test_put_lengths(arch: int) -> None:
    of(arch).check_put_lengths()


@each_arch
@pytest.mark.parametrize("dtype", NUMBER, ids=str)
def test_q_and_k_in_int8(dtype: torch.dtype, arch: int) -> None:
    of(arch).check_qk8(dtype)


@each_arch
@pytest.mark.parametrize("dtype", NUMBER, ids=str)
def test_watch(dtype: torch.dtype, arch: int) -> None:
    of(arch).check_watch(dtype, dtype)


@each_arch
@pytest.mark.parametrize("dtype", NUMBER, ids=str)
def test_find_nonfinite(dtype: torch.dtype, arch: int) -> None:
    of(arch).check_nonfinite(dtype)


@each_arch
@pytest.mark.parametrize("dtype", NUMBER, ids=str)
def test_pool(dtype: torch.dtype, arch: int) -> None:
    for to in (torch.float16, torch.bfloat16):
        of(arch).check_pool(dtype, to)


@each_arch
def test_all_of_them_run_every_opcode(arch: int) -> None:
    of(arch).check_all()
    assert not [opcode for opcode, times in of(arch).counts().items() if not times]
