# SPDX-License-Identifier: Apache-2.0
"""test_rope_op.py - rms_norm_rope as torch's operator: arguments, fake, compile, gradients."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import rope_oracle
import wan_attn
from test_compile import Counter
from wan_attn.native import library, rope, rope_in_torch

assert wan_attn  # registers the op

OP = torch.ops.wan_attn.rms_norm_rope


def sample(of: torch.dtype = torch.float32, **changed: Any) -> dict[str, Any]:
    """The op's arguments: two samples of different grids, and a tail."""
    made: dict[str, Any] = {
        "x": torch.randn(2, 26, 3, 20).to(of),
        "weight": torch.rand(60) + 0.5,
        "table": rope_oracle.table(8, 20),
        "grid_sizes": torch.tensor([[2, 3, 4], [5, 5, 1]]),
        "eps": 1e-6,
    }
    return made | changed


SAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "both": sample,
    "half": lambda: sample(torch.bfloat16, dtype=torch.float16),
    "norm": lambda: sample(table=None, grid_sizes=None),
    "rotation": lambda: sample(weight=None, eps=None, seqlen_offset=7),
    "per_head": lambda: sample(weight=torch.rand(20), per_head=True, round_norm=False),
    "transposed": lambda: sample(x=torch.randn(2, 3, 26, 20).transpose(1, 2)),
    "of_qkv": lambda: sample(
        x=torch.randn(2, 26, 3, 3, 20).bfloat16()[:, :, 1], eps=None, weight=None
    ),
    "expanded": lambda: sample(x=torch.randn(1, 26, 1, 20).expand(2, 26, 3, 20)),
    "each_token": lambda: sample(
        table=rope_oracle.table(26, 20)[None, :, None].expand(2, 26, 3, 20), grid_sizes=None
    ),
}
each_sample = pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)


@each_sample
def test_opcheck(make: Callable[[], dict[str, Any]]) -> None:
    arguments = make()
    torch.library.opcheck(OP.default, (), arguments | {"x": arguments["x"].requires_grad_()})


@each_sample
def test_compiles_into_one_graph(make: Callable[[], dict[str, Any]]) -> None:
    arguments = make()

    def twice(**given: Any) -> Any:
        return OP(**given) + OP(**given | {"x": 2 * given["x"]})

    torch._dynamo.reset()  # which allows one function some variants, and no more
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), twice(**arguments))


@pytest.mark.compile
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_one_graph_for_every_length(backend: str) -> None:
    """Between operators that a compiler fuses, of a strided x, and through the public function."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs g++")
    weight, table = torch.rand(60) + 0.5, rope_oracle.table(8, 20)

    def block(projected: Tensor, grid_sizes: Tensor) -> Any:
        q, k = (2 * projected).unflatten(2, (2, 3, 20)).unbind(2)
        q = OP(q, weight, table, grid_sizes, eps=1e-6, dtype=torch.bfloat16)
        k = wan_attn.rms_norm_rope(k, weight, table, grid_sizes, eps=1e-6)
        return q.float() + 3 * k

    torch._dynamo.reset()
    counter = Counter(backend)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    grid = torch.tensor([[2, 3, 4], [5, 5, 1]])
    for seqlen in (26, 31, 40):
        projected = torch.randn(2, seqlen, 120)
        torch.testing.assert_close(compiled(projected, grid), block(projected, grid))
    assert counter.count == 1


@pytest.mark.parametrize("per_head", (False, True))
@pytest.mark.parametrize("rounds", (False, True))
def test_gradient(per_head: bool, rounds: bool) -> None:
    """Against torch's own derivative of the formula in float64."""
    arguments = sample(per_head=per_head, round_norm=rounds)
    arguments["weight"] = torch.rand(20 if per_head else 60) + 0.5
    grad_out = torch.randn(2, 26, 3, 20)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [arguments[n].to(dtype).requires_grad_() for n in ("x", "weight", "table")]
        rest = {n: v for n, v in arguments.items() if n not in ("x", "weight", "table")}
        out = function(*inputs, **rest)
        return list(torch.autograd.grad(out, inputs, grad_out.to(out.dtype)))

    def plain(x: Tensor, weight: Tensor, table: Tensor, **rest: Any) -> Tensor:
        mean = x.pow(2).mean(dim=-1 if per_head else (-2, -1), keepdim=True)
        y = x / torch.sqrt(mean + rest["eps"]) * weight.view(-1 if per_head else 3, 20)
        angles, is_inside = rope_in_torch._angles(table, rest["grid_sizes"], 26, 0)
        a, b = y.unflatten(-1, (10, 2)).unbind(-1)
        c, s = angles.unflatten(-1, (10, 2)).unbind(-1)
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        return torch.where(is_inside, turned, y)

    for ours, exact in zip(
        gradients(OP, torch.float32), gradients(plain, torch.float64), strict=True
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ("x", "weight"))
@pytest.mark.parametrize("per_head", (False, True))
def test_gradient_is_what_a_small_step_changes(of: str, per_head: bool) -> None:
    """Against differences of the oracle, which knows no autograd; x is a strided view."""
    grids, step = [[2, 3, 4], [5, 5, 1]], 1e-4
    given = sample(x=torch.randn(2, 3, 26, 20).transpose(1, 2), per_head=per_head)
    given["weight"] = torch.rand(20 if per_head else 60) + 0.5
    given[of].requires_grad_()
    out = OP(**given)
    grad_out = torch.randn(out.shape)
    (found,) = torch.autograd.grad(out, given[of], grad_out)
    assert found.shape == given[of].shape

    def exact(moved: Tensor) -> float:
        inputs = {"x": given["x"], "weight": given["weight"], of: moved}
        inputs = {name: value.detach() for name, value in inputs.items()}
        turned = rope_oracle.exact(**inputs, grids=grids, eps=1e-6, per_head=per_head)
        return float((turned * grad_out).sum())

    for _ in range(3):
        way = torch.randn(given[of].shape, dtype=torch.float64)
        here = given[of].detach().double()
        change = (exact(here + step * way) - exact(here - step * way)) / (2 * step)
        assert abs(float((found.double() * way).sum()) - change) <= 1e-4 * max(1.0, abs(change))


def test_a_tangent_is_refused_and_not_dropped() -> None:
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="x must be without a tangent"):
        OP(forward_ad.make_dual(torch.randn(1, 2, 1, 4), torch.ones(1, 2, 1, 4)), eps=1.0)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"x": torch.zeros(2, 26, 60)}, "x must be [batch, seqlen, heads, head_dim]"),
    "dtype": ({"x": torch.zeros(2, 26, 3, 20).double()}, "x must be float32, float16 or bfloat16"),
    "odd": (
        {"x": torch.zeros(2, 26, 3, 21), "weight": None},
        "x must have an even head_dim to be rotated, got 21",
    ),
    "weight size": ({"weight": torch.ones(20)}, "weight must be [heads * head_dim] = [60]"),
    "weight of a head": ({"per_head": True}, "weight must be [head_dim] = [20], got [60]"),
    "weight dtype": (
        {"weight": torch.ones(60).long()},
        "weight must be float32, float16 or bfloat16, got int64",
    ),
    "weight without norm": ({"eps": None}, "weight must be None where eps is None"),
    "table dtype": (
        {"table": rope_oracle.table(8, 20).half()},
        "table must be float32 or float64, got float16",
    ),
    "table size": ({"table": rope_oracle.table(8, 18)}, "table must be [positions, head_dim]"),
    "table rank": ({"grid_sizes": None}, "table must be"),
    "no table": ({"table": None}, "table must be a tensor where grid_sizes is one"),
    "grid shape": ({"grid_sizes": torch.ones(3, 3).long()}, "grid_sizes must be [batch, 3]"),
    "grid dtype": (
        {"grid_sizes": torch.ones(2, 3)},
        "grid_sizes must be int32 or int64, got float32",
    ),
    "offset": ({"seqlen_offset": -1}, "seqlen_offset must be at least 0 and below 2^62, got -1"),
    "weight device": (
        {"weight": torch.ones(60, device="meta")},
        "weight must be on x's device cpu, got",
    ),
    "table device": (
        {"table": rope_oracle.table(8, 20).to("meta")},
        "table must be on x's device cpu, got",
    ),
    "grid device": (
        {"grid_sizes": torch.ones(2, 3, device="meta").long()},
        "grid_sizes must be on the CPU or on x's device cpu, got",
    ),
    "out dtype": ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16"),
}
OF_THE_LIBRARY: dict[str, tuple[dict[str, Any], str]] = {
    "strides": (
        {"x": torch.zeros(2, 26, 3, 40)[..., ::2]},
        "x must have stride 1 in its last dimension, got 2",
    ),
    "head_dim": (
        {"x": torch.zeros(2, 26, 3, 258), "weight": None, "table": None, "grid_sizes": None},
        "x must have at least 1 head and a head_dim of 1 to 256",
    ),
    "eps": ({"eps": math.nan}, "eps must be finite and at least 0, got nan"),
    "negative eps": ({"eps": -1.0}, "eps must be finite and at least 0, got -1"),
    "grid value": (
        {"grid_sizes": torch.tensor([[2, 3, 4], [9, 1, 1]])},
        "grid_sizes must be between 0 and the table's 8 positions, got 9 for sample 1",
    ),
    "negative grid": (
        {"grid_sizes": torch.tensor([[-2, 3, 4], [8, 1, 1]])},
        "grid_sizes must be between 0 and the table's 8 positions, got -2 for sample 0",
    ),
    "kernel": ({"kernel": 99}, "kernel must be -1 (the best) or a row from 0 to"),
    "huge kernel": ({"kernel": 1 << 32}, "kernel must be -1 (the best) or a row, got 4294967296"),
    "positions": (
        {"table": torch.zeros(1, 20).expand((1 << 20) + 1, 20)},
        "table must have at most 2^20 positions",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_arguments_are_refused_by_their_names(name: str, binding: str) -> None:
    changed, message = BROKEN[name]
    functions: dict[str, Callable[..., Tensor]] = {"op": OP, "fake": rope._fake}
    if binding != "torch":
        functions["ctypes"] = rope.by_ctypes
    for way, function in functions.items():
        with pytest.raises(RuntimeError) as caught:
            function(**sample(**changed))
        assert str(caught.value).startswith(f"wan_attn: {message}"), way


@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_what_only_the_library_looks_at(name: str, native: str) -> None:
    changed, message = OF_THE_LIBRARY[name]
    for function in (OP, rope.by_ctypes):
        with pytest.raises(RuntimeError) as caught:
            function(**sample(**changed))
        assert str(caught.value).startswith(f"wan_attn: {message}")


def test_the_table_of_kernels_ends_with_the_specification(native: str) -> None:
    assert rope.kernels()[-1] == "rms_norm_rope_ref"
    lib = library.lib()
    assert lib.wan_attn_rope_kernel_at(len(rope.kernels()), library.KernelInfo(struct_size=56)) != 0
    assert lib.wan_attn_rope_kernel_at(0, None) != 0


def test_the_function_takes_lists_and_looks_at_everything() -> None:
    given = sample()
    expected = OP(**given)
    given["grid_sizes"] = given["grid_sizes"].tolist()
    assert torch.equal(wan_attn.rms_norm_rope(**given), expected)
    assert wan_attn.rms_norm_rope(**given, dtype=torch.float16).dtype == torch.float16
    for name, value, message in (
        ("x", None, "x must be a tensor, got None"),
        ("weight", [1.0], "weight must be a tensor, got"),
        (
            "grid_sizes",
            [[1, 2]],
            "grid_sizes must be a tensor or a list of (frames, height, width)",
        ),
        ("grid_sizes", "abc", "grid_sizes must be a tensor or a list of (frames, height, width)"),
        ("grid_sizes", [[1, 2, 2.5]], "grid_sizes must be a tensor or a list of (frames, height"),
        ("eps", "small", "eps must be a number, got 'small'"),
        ("eps", math.inf, "eps must be finite, got inf"),
        ("per_head", 2, "per_head must be a bool, 0 or 1, got 2"),
        ("round_norm", None, "round_norm must be a bool, 0 or 1, got None"),
        ("seqlen_offset", -1, "seqlen_offset must be at least 0, got -1"),
        ("seqlen_offset", 1.0, "seqlen_offset must be an integer, got 1.0"),
        ("dtype", torch.float64, "dtype must be float32, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError) as caught:
            wan_attn.rms_norm_rope(**given | {name: value})
        assert str(caught.value).startswith(f"wan_attn: {message}"), name


def test_where_there_is_no_kernel_torch_computes() -> None:
    given = sample()
    for name in ("x", "weight", "table"):
        given[name] = given[name].to("meta")
    out = wan_attn.rms_norm_rope(**given)
    assert out.shape == given["x"].shape and out.device.type == "meta"
