# SPDX-License-Identifier: Apache-2.0
"""test_bindings.py - every binding is the same op: same tests, same bits.

WAN_ATTN_BINDING is read when wan_attn.native.op is imported, so the others run in processes of
their own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch

import calls
import test_op
import wan_attn
from wan_attn import config
from wan_attn.backends import native as backend
from wan_attn.native import bindings, library, op, shim
from wan_attn.native.bindings import ctypes_sdpa
from wan_attn.request import PLAIN, Request

HERE = Path(__file__).parent
# Kernels are the same code under shim and ctypes; what differs is how a call gets there and back.
FILES = {
    "shim": ("test_op.py", "test_errors.py", "test_autograd.py", "test_property.py"),
    "ctypes": (
        *("test_op.py", "test_errors.py", "test_autograd.py", "test_property.py"),
        "test_rope_op.py",
    ),
    "torch": ("test_op.py", "test_errors.py", "test_kernels.py", "test_property.py"),
}
NOT_ABOUT_BINDINGS = "not public and not merges"


@pytest.mark.parametrize("other", FILES)
def test_the_same_tests_under(other: str, binding: str) -> None:
    if other == binding:
        pytest.skip("the binding of this very process")
    if binding == "torch":
        pytest.skip("this process was told to do without the native library")
    if other == "shim" and shim.why_not() is not None:
        pytest.skip(str(shim.why_not()))
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
    if "WAN_ATTN_BINDING" in os.environ or shim.why_not() is not None:
        pytest.skip(shim.why_not() or "WAN_ATTN_BINDING is set")
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


BINDINGS = {"op": test_op.OP, "ctypes": ctypes_sdpa}
each_binding = pytest.mark.parametrize("function", BINDINGS.values(), ids=BINDINGS)


@each_binding
def test_a_change_of_the_allowed_cpu_features_holds_from_the_next_call_on(
    function: Callable[..., Any], native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = calls.operands(seqlen_q=64, seqlen_k=64, head_dim=64)
    try:
        for isa in ("portable", "avx2", "neon", "auto"):
            monkeypatch.setenv("WAN_ATTN_CPU_ISA", isa)
            config.refresh()
            row, _ = op.select(Request.from_tensors(*operands))
            assert row is not None and (isa != "portable" or row.name == "sdpa_ref")
            expected = function(*operands, kernel=row.index)[0]
            assert torch.equal(function(*operands)[0], expected), isa
    finally:
        monkeypatch.undo()
        config.refresh()


@pytest.mark.parametrize("name", test_op.NAMES)
def test_the_row_that_ran_is_known(name: str, native: str) -> None:
    """Whichever was forced; and a call that failed, or another thread's, changes nothing."""
    args, kwargs = test_op.samples()[name]
    for row in (row for row in op.kernels() if calls.can_run(row)):
        if op.why_not(Request.from_tensors(*args[:3]), row.index) is None:
            test_op.OP(*args, **kwargs | {"kernel": row.index})
            assert bindings.last_kernel() == row.index
    test_op.OP(*args, **kwargs)
    best = bindings.last_kernel()
    with pytest.raises(RuntimeError):
        test_op.OP(*args, **kwargs | {"kernel": 1000})
    with ThreadPoolExecutor(1) as other:
        assert other.submit(bindings.last_kernel).result() == -1
        other.submit(test_op.OP, *args, **kwargs | {"kernel": op.kernels()[-1].index}).exception()
    assert bindings.last_kernel() == best


def impossible() -> tuple[torch.Tensor, ...]:
    """A legal call whose result no machine can hold: 32 TiB."""
    query = torch.zeros(1, 1, 1, 128).expand(1, 1 << 30, 64, 128)
    return query, torch.zeros(1, 4, 64, 128), torch.zeros(1, 4, 64, 128)


@pytest.mark.parametrize("function", [*BINDINGS.values(), wan_attn.sdpa])
def test_without_memory_the_error_is_torchs_own(function: Callable[..., Any], native: str) -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(impossible()[0].shape)
    with pytest.raises(RuntimeError) as ours:
        function(*impossible())
    assert type(ours.value) is type(of_torch.value)
    assert str(ours.value) == str(of_torch.value)


class NoMemory(RuntimeError):
    """Stands for torch.OutOfMemoryError, which only a GPU raises."""


Empty = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, *[ctypes.c_int32] * 3, c_void_p)


@pytest.fixture
def failing(native: str) -> Iterator[Callable[[int], list[int]]]:
    """Lets the shim's allocations of so many dimensions fail; returns how often they did."""
    if native != "shim":
        pytest.skip("ctypes allocates in Python")
    address_, library = shim.torch_function("aoti_torch_empty_strided"), shim._shim
    assert address_ is not None and library is not None
    kept, real = [], Empty(address_)

    def fail(ndim: int) -> list[int]:
        failures = [0]

        def empty(*arguments: Any) -> int:
            failures[0] += arguments[0] == ndim
            return 1 if arguments[0] == ndim else int(real(*arguments))

        kept.append(Empty(empty))
        address = ctypes.cast(kept[-1], c_void_p).value
        assert address is not None
        shim.configure(library, aoti_torch_empty_strided=address)
        return failures

    yield fail
    shim.configure(library)


ALLOCATIONS = {"out": 4, "lse": 3, "workspace": 1}
each_allocation = pytest.mark.parametrize("ndim", ALLOCATIONS.values(), ids=ALLOCATIONS)


@each_allocation
def test_torchs_own_exception_gets_out_of_every_allocation(
    ndim: int, failing: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = calls.operands(seqlen_q=64, seqlen_k=64, head_dim=64)
    wan_attn.sdpa(*operands)
    words = "CUDA out of memory. Tried to allocate 2.00 GiB."

    def empty(*_: Any, **__: Any) -> torch.Tensor:
        raise NoMemory(words)

    failures = failing(ndim)
    monkeypatch.setattr(torch, "empty", empty)
    for _ in range(2):  # the first was not taken for a backend that is broken
        with pytest.raises(NoMemory, match=words):
            wan_attn.sdpa(*operands)
    assert failures == [2]
    with pytest.raises(RuntimeError, match=words):
        test_op.OP(*operands)  # nothing in Python stands between that could raise the other type
    with pytest.raises(RuntimeError, match="value must be shaped like"):
        backend.run(*operands[:2], operands[2][:, 1:], PLAIN)  # and not the exception of before


@each_allocation
def test_where_python_gets_the_memory_the_shim_tries_once_more(
    ndim: int, failing: Callable[[int], list[int]]
) -> None:
    failures = failing(ndim)
    with pytest.raises(RuntimeError, match="torch cannot allocate the result and does not say why"):
        test_op.OP(*calls.operands(seqlen_q=64, seqlen_k=64, head_dim=64))
    assert failures == [2]


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ("calls", "refusals", *ALLOCATIONS))
def test_ten_thousand_leave_nothing_behind(
    kind: str, native: str, request: pytest.FixtureRequest
) -> None:
    query, key, value = calls.operands(batch=1, seqlen_q=4, seqlen_k=4, heads_q=1, heads_k=1)
    lens = torch.tensor([3])
    if kind in ALLOCATIONS:
        request.getfixturevalue("failing")(ALLOCATIONS[kind])
    good = {"scale": 0.5, "is_causal": True, "return_lse": True}

    def many(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                if kind == "calls":
                    test_op.OP(query, key, value, lens, lens, **good)
                    continue
                try:
                    bad = {"kernel": 1 << 40} if kind == "refusals" else {}
                    test_op.OP(query, key, value, lens, lens, **good, **bad)
                except RuntimeError:
                    continue
                raise AssertionError("that call must fail")

    many(1000)
    references = [sys.getrefcount(x) for x in (query, key, value, lens)]
    used = [x._use_count() for x in (query, lens)]
    gc.collect()
    before = resident()
    many(10_000)
    gc.collect()
    # A tensor handle is 16 bytes and more, an optional as many: 10,000 of one kind are 160 KiB.
    assert resident() - before < 128 * 1024
    assert references == [sys.getrefcount(x) for x in (query, key, value, lens)]
    assert used == [x._use_count() for x in (query, lens)]
