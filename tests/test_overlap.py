# SPDX-License-Identifier: Apache-2.0
"""test_overlap.py - where the operands of one call of the C ABI may lie: views of one tensor that
share no element are computed, whatever shares one is refused, and strides may go back or stand
still, but not beyond every memory.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tolerances import assert_close_to_oracle
from wan_attn.attention import flash_attention
from wan_attn.native import library
from wan_attn.native.bindings import describe

pytestmark = pytest.mark.usefixtures("native")

FIELDS = {"query": "q", "key": "k", "value": "v", "q_lens": "seqused_q", "k_lens": "seqused_k"}


class Call:
    """Parameters, the tensors they point to, an error, and the memory of the workspace."""

    def __init__(self, **tensors: Tensor) -> None:
        self.error, self.tensors = library.Error(), tensors
        self.params = library.Params(
            struct_size=ctypes.sizeof(library.Params),
            kernel=-1,
            window_size_left=-1,
            window_size_right=-1,
            num_threads=2,
            **{FIELDS.get(name, name): describe(tensor) for name, tensor in tensors.items()},
        )
        size = ctypes.c_size_t()
        library.lib().wan_attn_workspace_size(self.params, size, self.error)
        self.memory = torch.zeros(size.value + 4096, dtype=torch.uint8)
        self.params.workspace = -(-self.memory.data_ptr() // 64) * 64
        self.params.workspace_size = size.value

    def run(self) -> str:
        """ "", or why the call is refused."""
        status = library.lib().wan_attn_forward(self.params, self.error)
        assert status in (library.OK, library.INVALID_ARGUMENT)
        return "" if status == library.OK else self.error.text()


FUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "slices of every row": lambda x: x.view(2, 9, 4, 3, 16).unbind(2),
    "slices of every head": lambda x: x.view(2, 9, 3, 4, 16).unbind(3),
    "every fourth row": lambda x: x.view(2, 9, 4, 3, 16).unbind(2),
    "slices of every sample": lambda x: x.view(2, 4, 9, 3, 16).unbind(1),
    "heads before rows": lambda x: [y.transpose(1, 2) for y in x.view(2, 4, 3, 9, 16).unbind(1)],
    "each in its own order": lambda x: (
        *x.view(2, 4, 9, 3, 16).unbind(1)[:3],
        x.view(2, 4, 3, 9, 16)[:, 3].transpose(1, 2),
    ),
    "parts of head_dim": lambda x: x.view(2, 9, 3, 64).split(16, dim=3),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_views_of_one_tensor(name: str, dtype: torch.dtype) -> None:
    """Fused projections with room for the result beside them."""
    fused = torch.randn(2 * 9 * 4 * 3 * 16).to(dtype)
    query, key, value, out = FUSED[name](fused)
    before = [x.clone() for x in (query, key, value)]
    assert Call(query=query, key=key, value=value, out=out).run() == ""
    assert all(map(torch.equal, before, (query, key, value))), "an input was written"
    assert_close_to_oracle(out, query, key, value)


def test_rows_that_interleave() -> None:
    memory = torch.randn(2, 18, 3, 16)
    query, out = memory[:, ::2], memory[:, 1::2]
    key, value = torch.randn(2, 2, 7, 3, 16)
    before = query.clone()
    assert Call(query=query, key=key, value=value, out=out).run() == ""
    assert torch.equal(query, before)
    assert_close_to_oracle(out, query, key, value)


def test_lse_beside_the_numbers_of_a_row() -> None:
    """[..., head_dim] of out and, behind each row, its lse."""
    query, key, value = torch.randn(3, 2, 9, 3, 16)
    both = torch.zeros(2, 9, 3, 17)
    out, lse = both[..., :16], both[..., 16].transpose(1, 2)
    assert Call(query=query, key=key, value=value, out=out, lse=lse).run() == ""
    assert_close_to_oracle(out, query, key, value, lse=lse)


def _view(memory: Tensor, shape: tuple[int, ...], order: random.Random) -> Tensor:
    """A view of `memory` with these sizes, without overlap, its dimensions in any order."""
    dims = list(range(len(shape) - 1)) if len(shape) == 4 else list(range(len(shape)))
    order.shuffle(dims)
    strides, step = [1] * len(shape), shape[-1] if len(shape) == 4 else 1
    for dim in dims:
        step += order.choice((0, 0, 1, shape[-1], 5))
        strides[dim] = step
        step *= shape[dim]
    return memory.as_strided(shape, strides, order.randrange(300))


def _bytes(x: Tensor) -> set[int]:
    at = torch.arange(x.untyped_storage().nbytes() // x.element_size())
    elements = at.as_strided(x.shape, x.stride(), x.storage_offset()).flatten().tolist()
    return {n * x.element_size() + byte for n in elements for byte in range(x.element_size())}


def test_random_views() -> None:
    """Refused if and only if a byte is shared."""
    order = random.Random(5)
    seen = {True: 0, False: 0}
    for number in range(600):
        bits = order.choice((16, 32))
        memory = torch.zeros(4000)
        own = memory if bits == 32 else memory.view(torch.bfloat16)
        b, lq, lk, h, d = (order.randint(1, n) for n in (2, 5, 5, 3, 6))
        tensors = {
            "query": _view(own, (b, lq, h, d), order),
            "key": _view(own, (b, lk, h, d), order),
            "value": torch.zeros(b, lk, h, d, dtype=own.dtype),
            "out": _view(own, (b, lq, h, d), order),
            "lse": _view(memory, (b, h, lq), order),
        }
        places = {name: _bytes(x) for name, x in tensors.items() if name != "value"}
        shared = [
            (late, early)
            for late, before in (("out", ("query", "key")), ("lse", ("query", "key", "out")))
            for early in before
            if places[late] & places[early]
        ]
        said = Call(**tensors).run()
        if said.startswith(("out must have each", "lse must have each")):
            continue  # strides that interleave: another rule
        expected = f"{shared[0][0]} must share no memory with {shared[0][1]}, got" if shared else ""
        assert said.startswith(expected) and bool(said) == bool(shared), (number, said, shared)
        seen[bool(shared)] += 1
    assert min(seen.values()) > 100, seen


def _good(**more: Tensor) -> dict[str, Tensor]:
    query, key, value = torch.randn(3, 2, 9, 3, 16)
    out, lse = torch.full((2, 9, 3, 16), math.nan), torch.full((2, 3, 9), math.nan)
    lens = {"q_lens": torch.tensor([9, 4]), "k_lens": torch.tensor([3, 9])}
    return {"query": query, "key": key, "value": value, **lens, "out": out, "lse": lse, **more}


@pytest.mark.parametrize("other", ("query", "key", "value", "q_lens", "k_lens", "out", "lse"))
@pytest.mark.parametrize("written", ("out", "lse", "workspace"))
def test_what_is_written_lies_alone(written: str, other: str) -> None:
    tensors = _good()
    call = Call(**tensors)
    at = tensors[other].data_ptr() + tensors[other].nbytes - tensors[other].element_size()
    if written == other or (written, other) == ("out", "lse"):
        return  # itself; and that one is found from the other's side
    if written == "workspace":
        if not call.params.workspace_size:
            pytest.skip("this machine's best row needs none")
        inside = call.params.workspace + call.params.workspace_size - 8
        getattr(call.params, FIELDS.get(other, other)).data = inside // 8 * 8
    else:
        getattr(call.params, written).data = at
    before = {name: x.clone() for name, x in tensors.items()}
    assert call.run().startswith(f"{written} must share no memory with {other}, got addresses 0x")
    for name, x in tensors.items():
        assert torch.equal(x.nan_to_num(7), before[name].nan_to_num(7)), f"{name} was written"


@pytest.mark.parametrize("dim", (0, 1, 2))
@pytest.mark.parametrize("name", ("query", "key", "value", "out", "lse"))
def test_strides_that_go_back(name: str, dim: int) -> None:
    """Torch has none; another caller may."""
    tensors = _good()
    call = Call(**tensors)
    described = getattr(call.params, FIELDS.get(name, name))
    x = tensors[name]
    described.data += (x.shape[dim] - 1) * x.stride(dim) * x.element_size()
    described.stride[dim] = -x.stride(dim)
    assert call.run() == ""
    tensors[name] = x.flip(dim)
    out, lse = tensors.pop("out"), tensors.pop("lse")
    call_of_it: dict[str, Any] = tensors
    assert_close_to_oracle(out, **call_of_it, lse=lse)


@pytest.mark.parametrize("stride", (-(2**63), 2**63 - 1, -(2**63) + 1, 2**62, 2**58))
@pytest.mark.parametrize("name", ("query", "key", "value", "q_lens", "k_lens", "out", "lse"))
def test_strides_beyond_every_memory(name: str, stride: int) -> None:
    call = Call(**_good())
    described = getattr(call.params, FIELDS.get(name, name))
    for dim in range(max(1, described.ndim - 1)):
        kept, described.stride[dim] = described.stride[dim], stride
        assert call.run().startswith(f"{name} must reach over at most 2^60 bytes, got [")
        described.stride[dim] = kept
    assert call.run() == ""


@pytest.mark.parametrize("name", ("query", "key", "value", "out"))
def test_an_operand_beyond_the_address_space(name: str) -> None:
    call = Call(**_good())
    described = getattr(call.params, FIELDS.get(name, name))
    described.stride[1] = 2**40
    described.data = 2**64 - 2**30
    assert call.run().startswith(f"{name} must lie within the address space, got address 0xf")
    described.stride[1] = -(2**40)
    described.data = 2**30
    assert call.run().startswith(f"{name} must lie within the address space, got address 0x4")


@pytest.mark.parametrize("name", ("query", "key", "value", "q_lens", "k_lens", "out", "lse"))
def test_the_cpu_has_one_number(name: str) -> None:
    call = Call(**_good())
    getattr(call.params, FIELDS.get(name, name)).device_index = 1
    assert call.run() == f"{name} must have device_index 0 on the CPU, got 1"
    for field in ("q", "k", "v", "out", "lse", "seqused_q", "seqused_k"):
        getattr(call.params, field).device_index = 1
    assert call.run() == "query must have device_index 0 on the CPU, got 1"


@pytest.mark.parametrize("stride", (-(2**63), 2**63 - 1))
def test_strides_that_are_never_walked(stride: int) -> None:
    """One sample, one row, one head; and no key at all, where nothing is walked."""
    query, key, value = torch.randn(1, 1, 1, 16), *torch.randn(2, 1, 1, 1, 16)
    out = torch.full_like(query, math.nan)
    call = Call(query=query, key=key, value=value, out=out)
    for field in ("q", "k", "v", "out"):
        for dim in range(3):
            getattr(call.params, field).stride[dim] = stride
    assert call.run() == "" and torch.equal(out, value)
    for field in ("k", "v"):
        described = getattr(call.params, field)
        described.shape[1], described.data = 0, None
    assert call.run() == "" and not out.any()


@pytest.mark.parametrize("strides", [(1, 32, 16, 1), (0, 1, 16, 1)])
def test_rows_that_overlap_are_converted(strides: tuple[int, ...], caplog: Any) -> None:
    """Converting keeps the order of strides, and the kernels want the last one to be 1."""
    q, k, _ = (torch.randn(2, 7, 2, 16) for _ in range(3))
    v = torch.randn(2000).as_strided(q.shape, strides)
    out = flash_attention(q, k, v)
    assert torch.equal(out, flash_attention(q, k, v.contiguous()))
    assert "failed at run time" not in caplog.text
