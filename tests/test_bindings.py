# SPDX-License-Identifier: Apache-2.0
"""test_bindings.py - every binding is the same op: same tests, same bits.

WAN_ATTN_BINDING is read when wan_attn.native.op is imported, so the others run in processes of
their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import calls
import test_op
from wan_attn.native import library
from wan_attn.native.bindings import ctypes_sdpa, why_no_shim

HERE = Path(__file__).parent
# Kernels are the same code under shim and ctypes; what differs is how a call gets there and back.
FILES = {
    "shim": ("test_op.py", "test_errors.py", "test_autograd.py", "test_property.py"),
    "ctypes": ("test_op.py", "test_errors.py", "test_autograd.py", "test_property.py"),
    "torch": ("test_op.py", "test_errors.py", "test_kernels.py", "test_property.py"),
}
NOT_ABOUT_BINDINGS = "not public and not merges"


@pytest.mark.parametrize("other", FILES)
def test_the_same_tests_under(other: str, binding: str) -> None:
    if other == binding:
        pytest.skip("the binding of this very process")
    if binding == "torch":
        pytest.skip("this process was told to do without the native library")
    if other == "shim" and why_no_shim() is not None:
        pytest.skip(why_no_shim())
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", NOT_ABOUT_BINDINGS, *(str(HERE / name) for name in FILES[other])]
    done = subprocess.run(
        command,
        env=os.environ | {"WAN_ATTN_BINDING": other},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_shim_is_there_where_it_can_be(binding: str) -> None:
    """A build that quietly lost its shim would pass every other test, some 10 us slower a call."""
    if "WAN_ATTN_BINDING" in os.environ or why_no_shim() is not None:
        pytest.skip(why_no_shim() or "WAN_ATTN_BINDING is set")
    assert binding == "shim"


@pytest.mark.parametrize("name", test_op.NAMES)
def test_same_bits_through_ctypes(name: str, native: str) -> None:
    args, kwargs = test_op.samples()[name]
    for ours, other in zip(test_op.OP(*args, **kwargs), ctypes_sdpa(*args, **kwargs), strict=True):
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
        assert torch.equal(ours, other)


def test_same_message_through_ctypes(native: str) -> None:
    query, key, value = calls.operands()
    messages = []
    for function in (test_op.OP, ctypes_sdpa):
        with pytest.raises(RuntimeError) as caught:
            function(query, key, value[:, 1:])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_the_native_library_is_there() -> None:
    """Where it is not, whole files skip: better one red test that says why."""
    assert library.load_error() is None
