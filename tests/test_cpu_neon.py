# SPDX-License-Identifier: Apache-2.0
"""test_cpu_neon.py - the NEON row on a machine that is no Arm: cross-compiled with the C driver of
tests/c, and run by qemu's user mode. On an Arm machine every other test runs it.

On Debian and Ubuntu: apt install qemu-user gcc-aarch64-linux-gnu
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import c_driver

COMPILER = "aarch64-linux-gnu-gcc"
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None or QEMU is None,
    reason=f"needs {COMPILER} and qemu-aarch64 (apt install qemu-user gcc-aarch64-linux-gnu)",
)


def test_neon_under_qemu(tmp_path: Path) -> None:
    csrc = c_driver.ROOT / "csrc"
    c_driver.compile_objects(COMPILER, tmp_path, csrc, c_driver.sources(csrc))
    program = c_driver.link(COMPILER, tmp_path, "-static")
    assert b"wan_attn_sdpa_neon" in program.read_bytes()
    # The choice of the driver: any Arm has NEON, so its row takes every call.
    done = subprocess.run(
        [str(QEMU), program, "8"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
