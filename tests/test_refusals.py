# SPDX-License-Identifier: Apache-2.0
"""test_refusals.py - every bad call is refused in the same words, through whichever door it comes.

The rules have two owners, csrc/core/check.c and wan_attn/request/call.py. Each bad call of
test_errors.py goes through wan_attn.sdpa and through the op, with real and with fake tensors, by
every binding.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import refusals

SUPPORT = Path(refusals.__file__).parent
PATHS = [str(SUPPORT.parents[1]), str(SUPPORT.parent), str(SUPPORT)]
BINDINGS = ("shim", "ctypes", "torch")
FAKES = ("fake", "traced")

# name's beginning -> the doors that it does not concern, and why.
NOT_FOR: dict[str, tuple[tuple[str, ...], str]] = {
    "query_last_stride": (("sdpa", "traced"), "wan_attn.sdpa takes any strides"),
    "key_transposed": (("sdpa", "traced"), "wan_attn.sdpa takes any strides"),
    "value_expanded_last": (("sdpa", "traced"), "wan_attn.sdpa takes any strides"),
    "sparse": (FAKES, "a fake tensor is dense"),
    "mkldnn": (FAKES, "a fake tensor is dense"),
    "k_lens_too_long": (FAKES, "a fake tensor holds no lengths"),
    "q_lens_too_long": (FAKES, "a fake tensor holds no lengths"),
    "k_lens_negative": (FAKES, "a fake tensor holds no lengths"),
    "k_lens_beyond_int32": (FAKES, "a fake tensor holds no lengths"),
    "kernel_": (("sdpa", *FAKES), "only the op's table knows its rows"),
}


@functools.cache
def said(binding: str) -> dict[str, Any]:
    """What refusals.py says in a process of its own; skips where there is no such binding."""
    done = subprocess.run(
        [sys.executable, refusals.__file__],
        env={**os.environ, "WAN_ATTN_BINDING": binding, "PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and "is not available" in done.stderr:
        return {}
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found["said"] if found["binding"] == binding else {}


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("name", refusals.calls())
def test_every_door_says_the_same(name: str, binding: str) -> None:
    here = said(binding)
    if not here:
        pytest.skip(f"no binding {binding} here")
    # The words of Python, which is everywhere: the op without the native library.
    expected = said("torch")[name]["op"]
    assert expected.startswith("RuntimeError: wan_attn: ")
    excused = next((doors for n, (doors, _) in NOT_FOR.items() if name.startswith(n)), ())
    for door, words in here[name].items():
        if door in excused:
            assert words is None, f"{door}: no excuse is needed"
        elif name.startswith("kernel_") and binding != "torch":
            assert words.startswith("RuntimeError: wan_attn: kernel must be -1 (the best) or a row")
        else:
            assert words == expected, door
