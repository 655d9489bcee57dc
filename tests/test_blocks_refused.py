# SPDX-License-Identifier: Apache-2.0
"""test_blocks_refused.py - calls with lists of blocks that break a rule, or that nobody takes.

Both bindings say the same, and so do fake tensors where no number has to be read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import calls
from blocks_oracle import random_lists
from calls import BF16, F32
from cuda_mock.gpu import CARDS, Gpu
from emu.build import compiler
from wan_attn.native import bindings, kernels, library, op
from wan_attn.request import Blocks, Refusal, Request, check_blocks
from wan_attn.workloads import parse_shape

OP = torch.ops.wan_attn.sdpa
BATCH, SEQLEN_Q, SEQLEN_K, HEADS = 2, 130, 200, 4


def good(**changes: Any) -> dict[str, Any]:
    """The keyword arguments of a call that works: 3 blocks of queries, 4 of keys."""
    query, key, value = calls.operands(BATCH, SEQLEN_Q, SEQLEN_K, HEADS, 2, 16)
    counts, indices = random_lists(0, BATCH, HEADS, SEQLEN_Q, SEQLEN_K, 0.6).as_tensors(4, 0)
    of_call = {"query": query, "key": key, "value": value}
    return {**of_call, "block_counts": counts, "block_indices": indices, **changes}


def changed(name: str, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    call = good()
    call[name] = change(call[name])
    return call


def full(index: list[int], count: int = 4) -> dict[str, Any]:
    counts = torch.full((BATCH, HEADS, 3), count, dtype=torch.int32)
    indices = torch.tensor(index, dtype=torch.int32).expand(BATCH, HEADS, 3, len(index)).clone()
    return good(block_counts=counts, block_indices=indices)


def with_one(name: str, number: int) -> dict[str, Any]:
    call = full([0, 1, 2, 3])
    call[name][1, 2, 1, ...] = number
    return call


SHAPE = r"int32 \[batch, num_heads_q, ceil\(seqlen_q / 64\)"
COUNTS = rf"block_counts must be {SHAPE}\] = \[2, 4, 3\], got "
INDICES = rf"block_indices must be {SHAPE}, capacity\] = \[2, 4, 3, capacity\], got "
RISING = r"block_indices must rise from 0 on, below ceil\(seqlen_k / 64\) = 4, got "

# name -> (arguments, what the message must match); told from descriptions alone.
DESCRIBED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "counts_alone": (lambda: good(block_indices=None), "block_indices must be given with block_co"),
    "indices_alone": (lambda: good(block_counts=None), "block_counts must be given with block_ind"),
    "counts_2d": (lambda: changed("block_counts", lambda x: x[0]), COUNTS + r"int32 \[4, 3\]"),
    "counts_4d": (lambda: changed("block_counts", lambda x: x[None]), COUNTS + r"int32 \[1, 2, 4"),
    "counts_i64": (lambda: changed("block_counts", Tensor.long), COUNTS + "int64"),
    "counts_float": (lambda: changed("block_counts", Tensor.float), COUNTS + "float32"),
    "counts_of_a_key_head": (lambda: changed("block_counts", lambda x: x[:, :2]), COUNTS),
    "counts_one_more": (lambda: changed("block_counts", lambda x: x[:, :, [0, 1, 2, 2]]), COUNTS),
    "counts_one_sample": (lambda: changed("block_counts", lambda x: x[:1]), COUNTS),
    "counts_on_meta": (
        lambda: changed("block_counts", lambda x: x.to("meta")),
        "block_counts must be on query's device cpu, got ",
    ),
    "indices_3d": (lambda: changed("block_indices", lambda x: x[..., 0]), INDICES),
    "indices_i64": (lambda: changed("block_indices", Tensor.long), INDICES + "int64"),
    "indices_i16": (lambda: changed("block_indices", Tensor.short), INDICES),
    "indices_of_fewer_blocks": (lambda: changed("block_indices", lambda x: x[:, :, :2]), INDICES),
    "pools_without_lists": (
        lambda: good(block_counts=None, block_indices=None, pools_others=True),
        "pools_others must be 0 without block_counts, got 1",
    ),
    "threshold_negative": (lambda: good(skip_threshold=-0.1), "skip_threshold must be between 0"),
    "threshold_beyond": (lambda: good(skip_threshold=1.01), r"0 \(off\) and 1, got 1.01"),
    "threshold_nan": (
        lambda: good(skip_threshold=float("nan")),
        "skip_threshold must be between 0",
    ),
}
# The same, of what lists hold.
HELD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "count_negative": (
        lambda: with_one("block_counts", -1),
        "block_counts must be between 0 and block_indices' capacity 4, got -1 for sample 1, "
        "head 2, block 1",
    ),
    "count_beyond": (lambda: with_one("block_counts", 5), "capacity 4, got 5 for sample 1, head 2"),
    "count_huge": (lambda: with_one("block_counts", (1 << 31) - 1), "capacity 4, got 2147483647"),
    "index_negative": (lambda: full([-1, 1, 2, 3]), RISING + "-1 as number 0 for sample 0, head 0"),
    "index_beyond": (lambda: full([0, 1, 2, 4]), RISING + "4 as number 3"),
    "index_huge": (lambda: full([0, (1 << 31) - 1], 2), RISING + "2147483647 as number 1"),
    "index_twice": (lambda: full([0, 1, 1, 3]), RISING + "1 as number 2"),
    "index_falls": (lambda: full([0, 2, 1, 3]), RISING + "1 as number 2"),
    "index_of_one_list": (
        lambda: with_one("block_indices", 2),
        RISING + "2 as number 1 for sample 1",
    ),
}
RULES = {**DESCRIBED, **HELD}


def said(function: Any, call: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as error:
        function(**call)
    return str(error.value)


@pytest.mark.parametrize("name", RULES)
def test_is_refused(name: str, native: str) -> None:
    """By each binding in the same words; and the next call works."""
    make, words = RULES[name]
    by_op = said(OP, make())
    in_c = said(bindings.ctypes_sdpa, make())  # where torch's other devices have no names
    assert in_c.replace("another device", "meta") == by_op
    with pytest.raises(RuntimeError, match=words):
        raise RuntimeError(by_op)
    OP(**good())


@pytest.mark.parametrize("name", DESCRIBED)
def test_fake_tensors_say_the_same(name: str, native: str) -> None:
    make, _ = DESCRIBED[name]
    expected = said(OP, make())
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in make().items()}
        assert said(OP, fake) == expected
    blocks = {n: x for n, x in make().items() if n in Blocks._fields}
    with pytest.raises(Refusal) as error:
        check_blocks(make()["query"], Blocks(**blocks))
    assert str(error.value) == expected


def test_gradients_are_refused(native: str) -> None:
    call = good()
    call["query"].requires_grad_()
    assert "block_counts must be None where a gradient is wanted" in said(OP, call)
    call = good(block_counts=None, block_indices=None, skip_threshold=0.01)
    call["value"].requires_grad_()
    assert "skip_threshold must be 0 where a gradient is wanted" in said(OP, call)
    with torch.no_grad():
        OP(**call)


def test_what_lossy_rows_refuse(native: str) -> None:
    reason = "takes block lists, but neither pools_others nor a skip_threshold"
    OP(**good(precision=library.QK8))
    only = good(block_counts=None, block_indices=None, skip_threshold=0.5)
    for call in (good(pools_others=True), good(skip_threshold=0.1), only):
        assert reason in said(OP, {**call, "precision": library.QK8})
        for row in op.kernels():
            if row.is_lossy and calls.can_run(row):
                assert reason in said(OP, {**call, "kernel": row.index})


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")
@pytest.mark.parametrize("wishes", ({"has_block_lists": True}, {"skip_threshold": 0.05}), ids=str)
def test_which_cuda_rows_take_lists(wishes: dict[str, Any], tmp_path: Path, native: str) -> None:
    """On a GPU a row is for lists or for dense calls, and neither takes the other's."""
    gpu, error, row = Gpu(tmp_path, CARDS[80]), library.Error(), ctypes.c_int32()

    def asked(
        shape: str, dtype: torch.dtype = BF16, precision: int = library.EXACT, **how: Any
    ) -> str:
        request = Request.of(parse_shape(shape), dtype, "cuda", **how)
        params = kernels.call_params(request, precision=precision)
        if gpu.lib.wan_attn_select(params, row, error) == library.OK:
            return op.kernels()[row.value].name
        return error.text().removeprefix("no kernel takes this call: ")

    neither = "takes neither block lists nor a skip_threshold"
    for head_dim in (64, 128):
        shape = f"1x200x2x{head_dim}"
        assert asked(shape, **wishes) == f"sdpa_sm80_listed_d{head_dim}"
        assert asked(shape) == f"sdpa_sm80_d{head_dim}"
        lossy = asked(shape, precision=library.QK8, **wishes)
        if "skip_threshold" in wishes:
            assert "takes block lists, but neither pools_others nor a skip_threshold" in lossy
            assert f"sdpa_sm80_qk8_listed_d{head_dim}" in lossy
        else:
            assert lossy == f"sdpa_sm80_qk8_listed_d{head_dim}"
        assert asked(shape, precision=library.QK8) == f"sdpa_sm80_qk8_d{head_dim}"
    those = "cuda with block lists" if "has_block_lists" in wishes else "cuda with a skip_threshold"
    takes = f"those for {those} take head_dim 128, 64, got"
    assert asked("1x200x2x80", **wishes) == f"{takes} 80"
    assert asked("1x200x2x96", **wishes) == f"{takes} 96"
    assert asked("1x200x2x96").startswith("those for cuda take head_dim 64, 128, 256, 80, got")
    assert asked("1x200x2x64", F32, **wishes) == f"none for {those} takes float32"
    for k in op.kernels():
        plain = Request.of(parse_shape("1x200x2x64"), BF16, "cuda")
        for request in (plain, replace(plain, **wishes)):
            status = gpu.lib.wan_attn_why_not(kernels.call_params(request), k.index, error)
            said = "is for block lists or a skip_threshold alone"
            if k.device == "cuda" and k.takes_block_lists == (request is plain):
                assert status == library.UNSUPPORTED
                assert error.text() == f"{k.name}: {said if request is plain else neither}"


def test_select_knows_who_takes_lists(native: str) -> None:
    tensors = calls.operands(BATCH, SEQLEN_Q, SEQLEN_K, HEADS, 2, 16)
    plain = Request.from_tensors(*tensors)
    for wishes in ({"has_block_lists": True}, {"skip_threshold": 0.05}):
        sizes = {n: getattr(plain, n) for n in plain.__dataclass_fields__}
        request = Request(**{**sizes, **wishes})
        row, _ = op.select(request)
        assert row is not None and row.takes_block_lists
        lossy, why = op.select(request, library.QK8)
        if "skip_threshold" in wishes:
            assert lossy is None and "neither pools_others nor a skip_threshold" in why
        else:
            assert lossy is not None and lossy.is_lossy and lossy.takes_block_lists


def test_callers_from_before_lists(native: str) -> None:
    """Their struct ends where block_counts begin: what lies behind it is not theirs."""
    query, key, value = calls.operands(1, 70, 90, 2, 2, 16)
    want, _ = OP(query, key, value)
    lib, error = library.lib(), library.Error()
    out = torch.empty_like(query)
    params = library.Params(
        struct_size=library.Params.block_counts.offset,
        kernel=-1,
        window_size_left=-1,
        window_size_right=-1,
        **{n: bindings.describe(x) for n, x in zip("qkv", (query, key, value), strict=True)},
        out=bindings.describe(out),
    )
    behind = library.Params.block_counts.offset
    ctypes.memset(ctypes.addressof(params) + behind, 0xA5, ctypes.sizeof(params) - behind)
    call = library.Call(struct_size=ctypes.sizeof(library.Call))
    assert lib.wan_attn_prepare(params, call, error) == library.OK, error.text()
    workspace = torch.empty(call.workspace_size + 64, dtype=torch.uint8)
    params.workspace = -(-workspace.data_ptr() // 64) * 64
    params.workspace_size = call.workspace_size
    assert lib.wan_attn_run(params, call, error) == library.OK, error.text()
    assert torch.equal(out, want)
    params.struct_size = ctypes.sizeof(params)
    assert lib.wan_attn_run(params, call, error) == library.INVALID_ARGUMENT, "another call"


@pytest.mark.parametrize("name", ("block_counts", "block_indices"))
def test_results_may_not_lie_on_a_list(name: str, native: str) -> None:
    call = good()
    lib, error = library.lib(), library.Error()
    out = torch.empty_like(call["query"])
    tensors = {"q": call["query"], "k": call["key"], "v": call["value"], "out": out}
    params = library.Params(struct_size=ctypes.sizeof(library.Params), kernel=len(op.kernels()) - 1)
    for field, tensor in {**tensors, name: call[name]}.items():
        setattr(params, field, bindings.describe(tensor))
    other = {"block_counts": "block_indices", "block_indices": "block_counts"}[name]
    setattr(params, other, bindings.describe(call[other]))
    assert call[name].nbytes <= out.nbytes
    getattr(params, name).data = out.data_ptr()  # the other way round, out may reach what is behind
    params.window_size_left = params.window_size_right = -1
    assert lib.wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    assert f"out must share no memory with {name}" in error.text()
    for bad, words in ((0, "point to memory, got NULL"), (3, "multiple of its element's 4 bytes")):
        getattr(params, name).data = bad and call[name].data_ptr() + bad
        assert lib.wan_attn_forward(params, error) == library.INVALID_ARGUMENT
        assert f"{name} must" in error.text() and words in error.text()
