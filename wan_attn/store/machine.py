# SPDX-License-Identifier: Apache-2.0
"""machine.py - the processor and the NVIDIA driver that a record belongs to, without torch."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

from wan_attn.transient import is_transient

_LINUX_DRIVER = Path("/sys/module/nvidia/version")


def cpu_name() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def driver_version() -> str:
    """The version of the NVIDIA driver, such as 570.86.15: its kernel module's on Linux, else what
    NVML says; "" where it cannot be told."""
    try:
        return _LINUX_DRIVER.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        if is_transient(error):
            raise
        return _by_nvml()  # Windows, and Linux within it


def _by_nvml() -> str:
    name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL(name)
        if nvml.nvmlInit_v2() != 0:
            return ""
        answer = nvml.nvmlSystemGetDriverVersion(text, len(text))
        nvml.nvmlShutdown()
    except (OSError, AttributeError) as error:
        if is_transient(error):
            raise
        return ""
    return text.value.decode(errors="replace") if answer == 0 else ""
