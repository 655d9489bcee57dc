# SPDX-License-Identifier: Apache-2.0
"""test_errors.py - malformed calls: an exception that names argument, rule and value; no crash.

One table for the op, one for the C ABI. After each, and after all, a good call still works.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calls import BF16, F16, F32, operands
from tolerances import assert_close_to_oracle
from wan_attn.native import library, op
from wan_attn.native.bindings import describe

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


def doubled_last_stride(x: Tensor) -> Tensor:
    return torch.zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]


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
        "key must be float32 or have value's dtype .*float32, got .*bfloat16",
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
        OP(call["query"], call["key"], call["value"], None, None, 0.5)
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


# The C ABI itself: what no binding does, but another caller might.


def params_for(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> library.Params:
    return library.Params(
        struct_size=ctypes.sizeof(library.Params),
        kernel=-1,
        q=describe(query),
        k=describe(key),
        v=describe(value),
        out=describe(out),
        window_size_left=-1,
        window_size_right=-1,
    )


@pytest.fixture
def c_call(native: str) -> tuple[library.Params, list[Tensor]]:
    """Parameters of a good call, and the tensors they point to, out last."""
    query, key, value = operands()
    tensors = [query, key, value, torch.full_like(query, math.nan)]
    params, size = params_for(*tensors), ctypes.c_size_t()
    assert library.lib().wan_attn_workspace_size(params, size, None) == library.OK
    workspace = torch.empty(size.value + 64, dtype=torch.uint8)
    params.workspace = -(-workspace.data_ptr() // 64) * 64
    params.workspace_size = size.value
    params._kept = workspace  # as long as the parameters
    return params, tensors


def test_c_abi_good_call(c_call: tuple[library.Params, list[Tensor]]) -> None:
    params, (query, key, value, out) = c_call
    error = library.Error()
    assert library.lib().wan_attn_forward(params, error) == library.OK
    assert_close_to_oracle(out, query, key, value)


@pytest.mark.parametrize("size", (0, 4, 8, ctypes.sizeof(library.Params) - 8, 2**32 - 1))
def test_c_abi_struct_size(c_call: tuple[library.Params, list[Tensor]], size: int) -> None:
    params, tensors = c_call
    params.struct_size = size
    error = library.Error()
    assert library.lib().wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    assert "struct_size" in error.text() and str(size) in error.text()
    assert error.status == library.INVALID_ARGUMENT
    assert tensors[-1].isnan().all(), "out was touched"


@pytest.mark.parametrize("function", ("forward", "select", "workspace_size", "why_not"))
def test_c_abi_null_pointers(c_call: tuple[library.Params, list[Tensor]], function: str) -> None:
    params, _ = c_call
    lib, error = library.lib(), library.Error()
    run = getattr(lib, f"wan_attn_{function}")
    row, size = ctypes.c_int32(), ctypes.c_size_t()
    last = lib.wan_attn_kernel_count() - 1  # the reference, which takes everything
    between = {"select": [row], "workspace_size": [size], "why_not": [last], "forward": []}[
        function
    ]
    assert run(None, *between, error) == library.INVALID_ARGUMENT
    assert "params must be a pointer, got NULL" in error.text()
    assert run(None, *between, None) == library.INVALID_ARGUMENT, "without an error struct"
    assert run(params, *between, None) == library.OK
    if function in ("select", "workspace_size"):
        assert run(params, None, error) == library.INVALID_ARGUMENT
        assert "must be a pointer, got NULL" in error.text()


def test_c_abi_workspace_too_small(c_call: tuple[library.Params, list[Tensor]]) -> None:
    """Rows that need a workspace say how much; one byte less is refused, by each of them."""
    params, tensors = c_call
    lib, error, size = library.lib(), library.Error(), ctypes.c_size_t()
    for row in range(lib.wan_attn_kernel_count()):
        params.kernel = row
        if lib.wan_attn_workspace_size(params, size, error) != library.OK:
            continue  # this machine cannot run the row
        memory = ctypes.create_string_buffer(size.value + 64)
        params.workspace = -(-ctypes.addressof(memory) // 64) * 64
        params.workspace_size = size.value
        if size.value:
            params.workspace_size = size.value - 1
            assert lib.wan_attn_forward(params, error) == library.INVALID_ARGUMENT
            assert f"workspace must be at least {size.value} bytes" in error.text()
            params.workspace, params.workspace_size = None, size.value
            assert lib.wan_attn_forward(params, error) == library.INVALID_ARGUMENT
            params.workspace = -(-ctypes.addressof(memory) // 64) * 64
        assert lib.wan_attn_forward(params, error) == library.OK, error.text()
        assert_close_to_oracle(tensors[3], *tensors[:3])


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("out", lambda t: t[..., :8], "out must be shaped like query"),
        ("out", lambda t: t.to(F16), "out must have query's dtype float32, got float16"),
        ("out", lambda t: t[0], "out must be "),
        ("out", doubled_last_stride, "out must have stride 1"),
        ("lse", lambda t: zeros(1, 2, 16), r"lse must be float32 .*\[1, 2, 17\], got .*1, 2, 16"),
        ("lse", lambda t: zeros(1, 2, 17, dtype=torch.int64), "lse must be float32"),
        ("seqused_k", lambda t: i64(34), "k_lens must be between 0 .*33, got 34"),
    ],
)
def test_c_abi_malformed_tensors(
    c_call: tuple[library.Params, list[Tensor]],
    field: str,
    change: Callable[[Tensor], Tensor],
    message: str,
) -> None:
    params, tensors = c_call
    wrong = change(tensors[-1])
    setattr(params, field, describe(wrong))
    error = library.Error()
    assert library.lib().wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    assert re.search(message, error.text()), error.text()
    assert tensors[-1].isnan().all(), "out was touched"


def test_c_abi_missing_pointers(c_call: tuple[library.Params, list[Tensor]]) -> None:
    """Operands without data: fine for questions, refused by forward, and so is a missing out."""
    params, tensors = c_call
    lib, error, size = library.lib(), library.Error(), ctypes.c_size_t()
    for field in ("q", "k", "v", "out"):
        kept = getattr(params, field).data
        getattr(params, field).data = None
        assert lib.wan_attn_workspace_size(params, size, error) == library.OK
        assert lib.wan_attn_forward(params, error) == library.INVALID_ARGUMENT, field
        name = {"q": "query", "k": "key", "v": "value", "out": "out"}[field]
        assert name in error.text() and "NULL" in error.text()
        getattr(params, field).data = kept
    params.out = library.Tensor()
    assert lib.wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    assert "out" in error.text()


@pytest.mark.parametrize("field", ("lse", "seqused_q", "seqused_k"))
def test_c_abi_described_without_memory(
    c_call: tuple[library.Params, list[Tensor]], field: str
) -> None:
    """data == NULL means absent with ndim == 0 alone."""
    params, tensors = c_call
    described = describe(zeros(1, 2, 17) if field == "lse" else i64(1))
    described.data = None
    setattr(params, field, described)
    error = library.Error()
    assert library.lib().wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    name = {"lse": "lse", "seqused_q": "q_lens", "seqused_k": "k_lens"}[field]
    assert error.text() == f"{name} must point to memory, got NULL"
    assert tensors[-1].isnan().all(), "out was touched"


@pytest.mark.parametrize("field", ("q", "k", "v", "out", "lse", "seqused_k"))
def test_c_abi_misaligned_operands(c_call: tuple[library.Params, list[Tensor]], field: str) -> None:
    params, tensors = c_call
    if field in ("lse", "seqused_k"):
        setattr(params, field, describe(zeros(1, 2, 17) if field == "lse" else i64(1)))
    getattr(params, field).data += 2
    error = library.Error()
    assert library.lib().wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    names = {"q": "query", "k": "key", "v": "value", "seqused_k": "k_lens"}
    bytes_ = 8 if field == "seqused_k" else 4
    assert error.text().startswith(
        f"{names.get(field, field)} must lie at a multiple of its element's {bytes_} bytes, got "
    )
    assert tensors[-1].isnan().all(), "out was touched"


def test_c_abi_misaligned_workspace(c_call: tuple[library.Params, list[Tensor]]) -> None:
    params, _ = c_call
    if not params.workspace_size:
        pytest.skip("this machine's best row needs none")
    params.workspace += 32
    error = library.Error()
    assert library.lib().wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    assert error.text().startswith("workspace must lie at a multiple of 64 bytes, got ")


OVERLAPPING: dict[str, tuple[str, tuple[int, ...]]] = {
    "out for all rows in one place": ("out", (2176, 0, 64, 1)),
    "rows of out that overlap": ("out", (2176, 127, 64, 1)),
    "heads of out that overlap": ("out", (2176, 128, 63, 1)),
    "strides that are equal": ("out", (2176, 64, 64, 1)),
    "strides that go back": ("out", (2176, -128, 64, 1)),
    "strides that no number holds": ("out", (2176, 2**62, 64, 1)),
    "lse for all heads in one place": ("lse", (34, 0, 1)),
    "heads of lse that overlap": ("lse", (34, 16, 1)),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_c_abi_overlapping_outputs(c_call: tuple[library.Params, list[Tensor]], name: str) -> None:
    params, tensors = c_call
    field, strides = OVERLAPPING[name]
    memory = zeros(1, 2, 17)
    if field == "lse":
        params.lse = describe(memory)
    for dim, stride in enumerate(strides):
        getattr(params, field).stride[dim] = stride
    error = library.Error()
    assert library.lib().wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    assert error.text().startswith(
        f"{field} must have each element in a place of its own, got [1, "
    )
    assert tensors[-1].isnan().all(), "out was touched"


def test_questions_read_no_lengths(c_call: tuple[library.Params, list[Tensor]]) -> None:
    """why_not and select take a call that need not exist; whoever sizes a workspace reads."""
    params, _ = c_call
    lib, row, size = library.lib(), ctypes.c_int32(), ctypes.c_size_t()
    last = lib.wan_attn_kernel_count() - 1
    for lens in (i64(99), None):
        params.seqused_k = describe(i64(1))
        params.seqused_k.data = lens.data_ptr() if lens is not None else None
        assert lib.wan_attn_why_not(params, last, None) == library.OK
        assert lib.wan_attn_select(params, ctypes.byref(row), None) == library.OK
        assert lib.wan_attn_workspace_size(params, size, None) == library.INVALID_ARGUMENT


def test_c_abi_strided_out_and_lse(c_call: tuple[library.Params, list[Tensor]]) -> None:
    """Any strides, as for inputs; nothing beside the views is written."""
    params, (query, key, value, _) = c_call
    out_memory, lse_memory = torch.full((3, 40, 5, 70), 7.0), torch.full((40, 4, 3), 7.0)
    out, lse = out_memory[1:2, 2:36:2, 1:3, 3:67], lse_memory[3:37:2, 1:3, 1:2].permute(2, 1, 0)
    params.out, params.lse = describe(out), describe(lse)
    assert library.lib().wan_attn_forward(params, None) == library.OK
    assert_close_to_oracle(out, query, key, value, lse=lse)
    out.fill_(7.0)
    lse.fill_(7.0)
    assert (out_memory == 7.0).all() and (lse_memory == 7.0).all()


def test_messages_fit_their_buffer(c_call: tuple[library.Params, list[Tensor]]) -> None:
    params, _ = c_call
    for tensor in (params.q, params.k, params.v):
        tensor.ndim = 2**31 - 1
        for dim in range(library.MAX_NDIM):
            tensor.shape[dim] = -(2**63)
    error = library.Error()
    error.message = b"x" * 1020
    assert library.lib().wan_attn_forward(params, error) == library.INVALID_ARGUMENT
    assert 0 < len(error.text()) < 300 and "query" in error.text()


def test_status_names(native: str) -> None:
    names = [library.lib().wan_attn_status_name(n).decode() for n in (-1, 0, 1, 2, 3, 4, 5)]
    assert names == [
        "UNKNOWN",
        "OK",
        "INVALID_ARGUMENT",
        "UNSUPPORTED",
        "DEVICE_ERROR",
        "INTERNAL",
        "UNKNOWN",
    ]
    info = library.KernelInfo(struct_size=ctypes.sizeof(library.KernelInfo))
    for row in (-1, len(op.kernels()), 2**31 - 1):
        assert library.lib().wan_attn_kernel_at(row, info) == library.INVALID_ARGUMENT
    assert library.lib().wan_attn_kernel_at(0, None) == library.INVALID_ARGUMENT
