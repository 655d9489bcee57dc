# SPDX-License-Identifier: Apache-2.0
"""test_errors_c_abi.py - malformed calls of the C ABI: what no binding does, but another caller
might. A status and a message that names argument, rule and value; no crash, nothing written.
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

from calls import F16, doubled_last_stride, operands
from tolerances import assert_close_to_oracle
from wan_attn.native import library, op
from wan_attn.native.bindings import describe


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def i64(*values: int) -> Tensor:
    return torch.tensor(values)


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
    arguments: dict[str, list[Any]] = {
        **{"select": [row], "workspace_size": [size], "why_not": [last], "forward": []}
    }
    between = arguments[function]
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
        if not op.kernels()[row].is_lossy:
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


def test_out_has_the_dtype_of_query_or_of_value(
    c_call: tuple[library.Params, list[Tensor]],
) -> None:
    params, tensors = c_call
    value = tensors[2].to(torch.bfloat16)
    params.v, error = describe(value), library.Error()
    for dtype in (F16, torch.float64, torch.int64):
        out = tensors[3].to(dtype)
        params.out = describe(out)
        assert library.lib().wan_attn_forward(params, error) == library.INVALID_ARGUMENT
        if dtype == F16:
            rule = "out must have query's dtype float32 or value's bfloat16, got float16"
            assert error.text() == rule


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
    "rows that go back over others": ("out", (2176, -127, 64, 1)),
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
