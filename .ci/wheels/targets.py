# SPDX-License-Identifier: Apache-2.0
"""targets.py - the platforms that one machine compiles for, with `zig cc`: WAN_ATTN_TARGET names
one. setup.py reads this file, and so do the tools beside it. Needs nothing but Python.
"""

from __future__ import annotations

import sys
from typing import NamedTuple


class Target(NamedTuple):
    """One platform.

    Attributes:
        platform: the last part of the wheel's name.
        triple: zig's name of it; empty: Python files alone.
        system: sys.platform there.
        machine: platform.machine() there, in small letters.
        has_cuda: whether NVIDIA's cards work there.
    """

    platform: str
    triple: str
    system: str
    machine: str
    has_cuda: bool

    def compiler(self) -> list[str]:
        """The C compiler's command, for compiling and linking."""
        return [sys.executable, "-m", "ziglang", "cc", "-target", self.triple]

    def compile_flags(self) -> list[str]:
        # zig's own default adds checks that trap; and the caller's folder must not be in a library.
        flags = ["-fno-sanitize=all", "-ffile-prefix-map=.=wan_attn"]
        if self.system == "linux" and self.machine == "x86_64":
            flags.append("-fcf-protection=full")
        elif self.system == "linux":
            flags.append("-mbranch-protection=standard")
        return flags

    def link_flags(self, library: str) -> list[str]:
        if self.system == "darwin":
            return ["-s", f"-Wl,-install_name,@rpath/{library}"]
        if self.system == "win32":
            return ["-s"]
        return ["-s", "-Wl,--no-undefined,-z,relro,-z,now,-z,noexecstack"]


TARGETS = {
    target.platform: target
    for target in (
        Target("manylinux_2_17_x86_64", "x86_64-linux-gnu.2.17", "linux", "x86_64", True),
        Target("manylinux_2_17_aarch64", "aarch64-linux-gnu.2.17", "linux", "aarch64", True),
        Target("win_amd64", "x86_64-windows-gnu", "win32", "amd64", True),
        Target("win_arm64", "aarch64-windows-gnu", "win32", "arm64", False),
        Target("macosx_11_0_arm64", "aarch64-macos.11.0", "darwin", "arm64", False),
        Target("macosx_11_0_x86_64", "x86_64-macos.11.0", "darwin", "x86_64", False),
        Target("any", "", "", "", False),
    )
}
