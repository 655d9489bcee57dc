# SPDX-License-Identifier: Apache-2.0
"""test_flash_attn_suite.py - a sample of FlashAttention's own tests, where FLASH_ATTN_DIR says.

flash_attn_suite.py runs more of them, and says what is left out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("FLASH_ATTN_DIR", "")
SUITE = Path(__file__).with_name("flash_attn_suite.py")


@pytest.mark.skipif(not CHECKOUT, reason="FLASH_ATTN_DIR names no checkout of flash-attention")
def test_flash_attns_own_tests_pass() -> None:
    if importlib.util.find_spec("einops") is None:
        pytest.skip("flash-attention's tests need einops")
    run = subprocess.run(
        [sys.executable, str(SUITE), CHECKOUT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\b\d{2,} passed\b", run.stdout), run.stdout[-2000:]
    assert "failed" not in run.stdout and "skipped" not in run.stdout
