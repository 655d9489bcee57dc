# SPDX-License-Identifier: Apache-2.0
"""test_errors.py - malformed calls: an exception that names argument, rule and value; no crash.

After each, and after all, a good call still works. The C ABI: test_errors_c_abi.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calls import BF16, F16, F32, doubled_last_stride, operands
from tolerances import assert_close_to_oracle
from wan_attn.native import op

OP = torch.ops.wan_attn.sdpa


def good(**changes: Any) -> dict[str, Any]:
    """The keyword arguments of a call that works: batch 2, 17 x 33, 4 heads for 2, head_dim 16."""
    query, key, value = operands(batch=2, heads_q=4, heads_k=2, head_dim=16)
    return {"query": query, "key": key, "value": value, **changes}


def changed(name: str, change: Callable[[Tensor], Any], **more: Any) -> dict[str, Any]:
    call = good(**more)
    call[name] = change(call[name])
    return call


def all_to(dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) for name, x in good().items()}


def zeros(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def i64(*values: int) -> Tensor:
    return torch.tensor(values)


OF_4_DIMS = r"must be \[batch, seqlen, heads, head_dim\], got "
LIKE_QUERY = r"must be \[query's batch.* query's head_dim\](?: = \[2, 33, 2, 16\])?, got "
LAST_STRIDE = r"must have stride 1 in its last dimension, got "

# name -> (arguments, what the message must match); every rule of the contract from both sides.
MALFORMED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    # ranks
    "query_3d": (lambda: changed("query", lambda x: x[0]), f"query {OF_4_DIMS}.*17, 4, 16"),
    "query_5d": (lambda: changed("query", lambda x: x[None]), f"query {OF_4_DIMS}.*1, 2, 17, 4"),
    "query_scalar": (lambda: changed("query", lambda x: x.sum()), f"query {OF_4_DIMS}"),
    "key_2d": (lambda: changed("key", lambda x: x[0, 0]), f"key {OF_4_DIMS}.*2, 16"),
    "value_1d": (lambda: changed("value", lambda x: x[0, 0, 0]), f"value {OF_4_DIMS}.*16"),
    # dtypes
    "all_float64": (
        lambda: all_to(torch.float64),
        "query must be float32, float16 or bfloat16, got",
    ),
    "all_int64": (lambda: all_to(torch.int64), "query must be float32, float16 or bfloat16, got"),
    "all_int8": (lambda: all_to(torch.int8), "query must be float32, float16 or bfloat16, got"),
    "all_bool": (lambda: all_to(torch.bool), "query must be float32, float16 or bfloat16, got"),
    "complex": (lambda: all_to(torch.complex64), "query must be float32, float16 or bfloat16, got"),
    "float8": (
        lambda: all_to(torch.float8_e4m3fn),
        "query must be float32, float16 or bfloat16, got",
    ),
    "value_int32": (
        lambda: changed("value", lambda x: x.int()),
        "value must be float32, float16 or bfloat16, got .*int32",
    ),
    "query_f16_value_bf16": (
        lambda: good(query=good()["query"].to(F16), value=good()["value"].to(BF16)),
        "query must be float32 or have value's dtype .*bfloat16, got .*float16",
    ),
    "key_bf16_value_f32": (
        lambda: changed("key", lambda x: x.to(BF16)),
        "key must have value's dtype .*float32, got .*bfloat16",
    ),
    # shapes (what they should be stands in the message where it is known: not while tracing)
    "key_of_another_batch": (
        lambda: changed("key", lambda x: x[:1]),
        f"key {LIKE_QUERY}" r"\[1, 33, 2, 16\]",
    ),
    "key_of_another_head_dim": (
        lambda: changed("key", lambda x: x[..., :8]),
        f"key {LIKE_QUERY}" r"\[2, 33, 2, 8\]",
    ),
    "value_shorter": (
        lambda: changed("value", lambda x: x[:, :-1]),
        r"value must be shaped like key(?: = \[2, 33, 2, 16\])?, got \[2, 32, 2, 16\]",
    ),
    "value_of_other_heads": (
        lambda: changed("value", lambda x: x[:, :, :1]),
        r"value must be shaped like key(?: = \[2, 33, 2, 16\])?, got \[2, 33, 1, 16\]",
    ),
    "value_of_another_head_dim": (
        lambda: changed("value", lambda x: x[..., :8]),
        r"value must be shaped like key(?: = \[2, 33, 2, 16\])?, got \[2, 33, 2, 8\]",
    ),
    "heads_not_a_multiple": (
        lambda: changed("query", lambda x: x[:, :, :3]),
        "query must have a multiple of key's heads, got 3 heads for key's 2",
    ),
    "fewer_query_heads": (
        lambda: changed("query", lambda x: x[:, :, :1]),
        "query must have a multiple of key's heads, got 1 heads for key's 2",
    ),
    "no_query_heads": (
        lambda: changed("query", lambda x: x[:, :, :0]),
        "query must have a multiple of key's heads, got 0 heads for key's 2",
    ),
    "no_key_heads": (
        lambda: good(key=zeros(2, 33, 0, 16), value=zeros(2, 33, 0, 16)),
        "query must have a multiple of key's heads, got 4 heads for key's 0",
    ),
    "head_dim_0": (
        lambda: {name: x[..., :0] for name, x in good().items()},
        r"query must have a head_dim of at least 1, got \[2, 17, 4, 0\]",
    ),
    # strides
    "query_last_stride_2": (
        lambda: changed("query", doubled_last_stride),
        f"query {LAST_STRIDE}2",
    ),
    "key_transposed": (
        lambda: changed("key", lambda x: zeros(2, 33, 16, 2).transpose(2, 3)),
        f"key {LAST_STRIDE}2",
    ),
    "value_expanded_last": (
        lambda: changed("value", lambda x: x[..., :1].expand(-1, -1, -1, 16)),
        f"value {LAST_STRIDE}0",
    ),
    # devices and layouts
    "key_on_meta": (
        lambda: changed("key", lambda x: x.to("meta")),
        "key must be on query's device.*cpu.*, got .*meta",
    ),
    "query_on_meta": (
        lambda: changed("query", lambda x: x.to("meta")),
        "key must be on query's device.*meta.*, got .*cpu",
    ),
    "value_on_meta": (
        lambda: changed("value", lambda x: x.to("meta")),
        "value must be on query's device.*cpu.*, got .*meta",
    ),
    "sparse": (
        lambda: changed("query", lambda x: x.to_sparse()),
        "query must be a dense tensor on cpu or cuda, got torch.sparse_coo on cpu",
    ),
    "sparse_key": (
        lambda: changed("key", lambda x: x.to_sparse()),
        "key must be a dense tensor on cpu or cuda, got torch.sparse_coo on cpu",
    ),
    "mkldnn": (
        lambda: changed("query", lambda x: x.to_mkldnn()),
        "query must be a dense tensor on cpu or cuda, got torch._mkldnn on cpu",
    ),
    # lengths
    "q_lens_of_another_batch": (
        lambda: good(q_lens=i64(1, 2, 3)),
        r"q_lens must be \[batch\] = \[2\], got \[3\]",
    ),
    "k_lens_scalar": (
        lambda: good(k_lens=torch.tensor(3)),
        r"k_lens must be \[batch\] = \[2\], got \[\]",
    ),
    "k_lens_2d": (
        lambda: good(k_lens=i64(3, 3)[:, None]),
        r"k_lens must be \[batch\] = \[2\], got \[2, 1\]",
    ),
    "k_lens_float": (
        lambda: good(k_lens=torch.tensor([3.0, 3.0])),
        "k_lens must be int32 or int64, got .*float32",
    ),
    "q_lens_int16": (
        lambda: good(q_lens=i64(3, 3).short()),
        "q_lens must be int32 or int64, got ",
    ),
    "q_lens_bool": (
        lambda: good(q_lens=torch.tensor([True, False])),
        "q_lens must be int32 or int64, got ",
    ),
    "k_lens_too_long": (
        lambda: good(k_lens=i64(33, 34)),
        "k_lens must be between 0 and the padded length 33, got 34 for sample 1",
    ),
    "q_lens_too_long": (
        lambda: good(q_lens=i64(18, 17).int()),
        "q_lens must be between 0 and the padded length 17, got 18 for sample 0",
    ),
    "k_lens_negative": (
        lambda: good(k_lens=i64(3, -1)),
        "k_lens must be between 0 and the padded length 33, got -1 for sample 1",
    ),
    "k_lens_beyond_int32": (
        lambda: good(k_lens=i64(2**32 + 1, 3)),
        "k_lens must be between 0 and the padded length 33, got 4294967297 for sample 0",
    ),
    "k_lens_on_meta": (
        lambda: good(k_lens=i64(3, 3).to("meta")),
        "k_lens must be on the CPU or on query's device.*cpu.*, got .*meta",
    ),
    # numbers
    "scale_nan": (lambda: good(scale=math.nan), "scale must be finite, got nan"),
    "scale_inf": (lambda: good(scale=-math.inf), "scale must be finite, got -inf"),
    "window_left": (
        lambda: good(window_left=-2),
        r"window_left must be -1 \(no bound\) or at least 0, got -2",
    ),
    "window_right": (
        lambda: good(window_right=-(2**63)),
        r"window_right must be -1 \(no bound\) or at least 0, got -9223372036854775808",
    ),
    "kernel_below": (lambda: good(kernel=-2), "kernel must be -1.*, got -2"),
    "kernel_beyond": (lambda: good(kernel=1000), "kernel must be -1.*, got 1000"),
    "kernel_beyond_int32": (lambda: good(kernel=2**32), "kernel must be -1.*, got 4294967296"),
}

# What torch itself refuses, by the schema: its message, as long as it names the argument.
WRONG_TYPES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "query_none": (lambda: good(query=None), "query"),
    "key_none": (lambda: good(key=None), "key"),
    "value_list": (lambda: changed("value", lambda x: x.tolist()), "value"),
    "query_string": (lambda: good(query="query"), "query"),
    "query_number": (lambda: good(query=3), "query"),
    "query_array": (lambda: changed("query", lambda x: x.numpy()), "query"),
    "k_lens_list": (lambda: good(k_lens=[3, 3]), "k_lens"),
    "k_lens_number": (lambda: good(k_lens=3.5), "k_lens"),
    "scale_string": (lambda: good(scale="0.5"), "scale"),
    "scale_complex": (lambda: good(scale=1j), "scale"),
    "is_causal_tensor": (lambda: good(is_causal=zeros(2, 2)), "is_causal"),
    "is_causal_string": (lambda: good(is_causal="yes"), "is_causal"),
    "window_left_float": (lambda: good(window_left=1.5), "window_left"),
    "window_right_none": (lambda: good(window_right=None), "window_right"),
    "window_left_beyond_int64": (lambda: good(window_left=2**63), "window_left|[Oo]verflow"),
    "kernel_name": (lambda: good(kernel="sdpa_ref"), "kernel"),
    "unknown_argument": (lambda: good(dropout_p=0.0), "dropout_p"),
    "no_value": (lambda: {n: x for n, x in good().items() if n != "value"}, "value"),
}


def assert_still_works() -> None:
    call = good()
    assert_close_to_oracle(OP(**call)[0], **call)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_call(name: str) -> None:
    make, message = MALFORMED[name]
    call = make()
    with pytest.raises(RuntimeError, match=f"^wan_attn: (.*: )?{message}"):
        OP(**call)
    assert_still_works()


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_type(name: str) -> None:
    make, message = WRONG_TYPES[name]
    call = make()
    with pytest.raises((RuntimeError, TypeError, OverflowError), match=message):
        OP(**call)
    assert_still_works()


def test_a_legal_call_that_no_kernel_takes(native: str) -> None:
    """Every row for this device and dtype says why not. Torch, as the op, has no such limit."""
    with pytest.raises(RuntimeError, match="^wan_attn: no kernel takes this call: ") as caught:
        OP(*operands(head_dim=257))
    said = str(caught.value)
    for row in op.kernels():
        is_near = row.device == "cpu" and torch.float32 in row.dtypes and not row.is_lossy
        assert (f"{row.name}:" in said or f"{row.name}," in said) == is_near, row.name
    assert "head_dim 1 to 256" in said and "got 257" in said


def test_there_are_enough_of_them() -> None:
    assert len(MALFORMED) >= 40


def test_all_of_them_in_a_row_leave_the_process_usable() -> None:
    for _ in range(3):
        for make, _ in (MALFORMED | WRONG_TYPES).values():
            with pytest.raises((RuntimeError, TypeError, OverflowError)):
                OP(**make())
    assert_still_works()


def test_positional_arguments_are_limited_to_the_tensors() -> None:
    call = good()
    with pytest.raises(RuntimeError, match="positional"):
        OP(call["query"], call["key"], call["value"], None, None, None, None, 0.5)
    with pytest.raises(RuntimeError, match="query|positional|argument"):
        OP()


NAMED = (
    "key_of_another_batch",
    "value_shorter",
    "query_3d",
    "scale_nan",
    "window_left",
    "all_int8",
)


@pytest.mark.parametrize("name", NAMED)
def test_fake_tensors_are_refused_like_real_ones(name: str) -> None:
    """What can be told without data must be told while tracing, not when the graph runs."""
    make, message = MALFORMED[name]
    call = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in make().items()}
    with pytest.raises(RuntimeError, match=f"wan_attn: {message}"):
        OP(**call)
