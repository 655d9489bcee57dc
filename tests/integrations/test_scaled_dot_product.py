# SPDX-License-Identifier: Apache-2.0
"""test_scaled_dot_product.py - the function with the signature and meaning of torch's SDPA.

torch's own samples of it (its OpInfo) are judged as everything here is: against float64, with twice
the error that torch's function makes.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import wan_attn
from calls import BF16, DTYPES, F16, F32, NAMES
from tolerances import FACTOR, FLOOR_ULP, ulp
from wan_attn import log
from wan_attn.signatures import scaled_dot_product

F64 = torch.float64
TORCHS: Any = F.scaled_dot_product_attention
scaled_dot_product_attention: Any = wan_attn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _say_again() -> None:
    log.forget()


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons of the calls that went to torch's own function."""
    reasons: list[str] = []
    real = scaled_dot_product._by_torch

    def spy(*given: Any) -> Tensor:
        reasons.append(given[-1])
        return real(*given)

    monkeypatch.setattr(scaled_dot_product, "_by_torch", spy)
    return reasons


def make(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def three(
    *leading: int, q: int = 5, k: int = 7, heads_k: int | None = None, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value [*leading, length, 16]; `heads_k` of the last leading dimension."""
    of_k = leading if heads_k is None else (*leading[:-1], heads_k)
    return (
        make(*leading, q, 16, dtype=dtype),
        make(*of_k, k, 16, dtype=dtype, seed=1),
        make(*of_k, k, 16, dtype=dtype, seed=2),
    )


def judge(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """As tolerances.py: our error is at most twice torch's and two units in the last place."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    error = (ours.to(F64) - exact).abs()
    floor = FLOOR_ULP * ulp(ours.dtype, max(1.0, float(exact.abs().max())) if exact.numel() else 1)
    allowed = FACTOR * float((theirs.to(F64) - exact).abs().max() if exact.numel() else 0) + floor
    assert (error <= allowed).all(), f"{name}: {error.max():.2e}, allowed {allowed:.2e}"


def compare(*operands: Tensor, **options: Any) -> Tensor:
    """Ours beside torch's and float64."""
    wide = [x.to(F64) for x in operands]
    mask = options.get("attn_mask")
    if isinstance(mask, Tensor) and mask.is_floating_point():
        exact = TORCHS(*wide, **{**options, "attn_mask": mask.to(F64)})
    else:
        exact = TORCHS(*wide, **options)
    out: Tensor = scaled_dot_product_attention(*operands, **options)
    judge("out", out, TORCHS(*operands, **options), exact)
    return out


def test_the_signature_is_torchs() -> None:
    """As torch documents it; a builtin has no other."""
    said = re.search(r"scaled_dot_product_attention\((.*?)\) -> Tensor", str(TORCHS.__doc__), re.S)
    assert said is not None
    names = scaled_dot_product_attention.__annotations__
    known = [word.strip().split("=")[0] for word in said[1].split(",")]
    assert known == [name for name in names if name != "return"][: len(known)]
    assert scaled_dot_product_attention.__defaults__ == (None, 0.0, False, None, False)


@functools.cache
def op_info() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # It would freeze torch's flags, which other tests of this process set.
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    name = "nn.functional.scaled_dot_product_attention"
    return next(op for op in invocations.op_db if op.name == name)


@pytest.mark.parametrize("wants_grad", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("dtype", (*DTYPES, F64), ids=lambda d: NAMES.get(d, "fp64"))
def test_torchs_own_samples(dtype: torch.dtype, wants_grad: bool, by_torch: list[str]) -> None:
    samples = list(op_info().sample_inputs("cpu", dtype, requires_grad=wants_grad))
    assert len(samples) >= 25
    for number, sample in enumerate(samples):
        options = dict(sample.kwargs)
        given = (sample.input, *sample.args)
        results: list[list[Tensor]] = []
        for function, kind in (
            (scaled_dot_product_attention, dtype),
            (TORCHS, dtype),
            (TORCHS, F64),
        ):
            mask = options.get("attn_mask")
            operands = [x.detach().to(kind).requires_grad_(wants_grad) for x in given]
            if mask is not None:
                mask = mask.detach().to(kind).requires_grad_(wants_grad)
            torch.manual_seed(5)
            out = function(*operands, **{**options, "attn_mask": mask})
            found = [out]
            if wants_grad:
                leaves = operands if mask is None else [*operands, mask]
                weight = make(*out.shape, seed=9).to(kind)
                found += torch.autograd.grad((out * weight).sum(), leaves)
            results.append([x.detach() for x in found])
        ours, theirs, exact = results
        for name, *triple in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
            if options.get("dropout_p", 0.0) > 0:
                assert torch.equal(*triple[:2]), f"sample {number}: {name}, the same bits"
            else:
                judge(f"sample {number}: {name}", *triple)
        assert len(ours) == len(theirs) == len(exact)
    # What is no dropout, mask or broadcast was computed by the selection.
    assert len(by_torch) == len(samples) or dtype != F64
    if dtype != F64:
        assert len(samples) - len(by_torch) == 8, by_torch


LEADING: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3), (2, 2, 3), (2, 1, 2, 3))


@pytest.mark.parametrize("is_causal", (False, True), ids=("all", "causal"))
@pytest.mark.parametrize("lengths", ((5, 7), (7, 5), (6, 6), (1, 4), (4, 1)))
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_any_leading_dimensions(
    leading: tuple[int, ...], lengths: tuple[int, int], is_causal: bool, by_torch: list[str]
) -> None:
    """And causal from the top left, however many more keys or queries there are."""
    operands = three(*leading, q=lengths[0], k=lengths[1])
    compare(*operands, is_causal=is_causal)
    compare(*operands, is_causal=is_causal, scale=0.3)
    assert not by_torch


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: NAMES[d])
@pytest.mark.parametrize("heads", ((6, 2), (6, 1), (6, 6)), ids=str)
def test_grouped_heads(heads: tuple[int, int], dtype: torch.dtype, by_torch: list[str]) -> None:
    for leading in ((2, heads[0]), (heads[0],), (2, 2, heads[0])):
        compare(*three(*leading, heads_k=heads[1], dtype=dtype), enable_gqa=True)
    assert not by_torch


def test_one_head_of_keys_is_broadcast_by_our_kernels(by_torch: list[str]) -> None:
    compare(*three(2, 6, heads_k=1))
    assert not by_torch


def causal(rows: int, keys: int) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril()


def padding(*lengths: int, keys: int = 7) -> Tensor:
    return (torch.arange(keys) < torch.tensor(lengths)[:, None])[:, None, None]


def added(mask: Tensor, hidden: float = -torch.inf) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


LOWEST = torch.finfo(F32).min
OURS: dict[str, Tensor] = {
    "all": torch.ones(5, 7, dtype=torch.bool),
    "nothing": torch.zeros(5, 7, dtype=torch.bool),
    "nothing, -inf": added(torch.zeros(5, 7, dtype=torch.bool)),
    "padding": padding(7, 3),
    "padding, added": added(padding(7, 3)),
    "padding by the lowest number": added(padding(7, 3), LOWEST),
    "a sample without keys": padding(0, 3),
    "causal": causal(5, 7),
    "causal, 3D": causal(5, 7)[None],
    "causal, added": added(causal(5, 7)[None, None]),
    "causal and padding": causal(5, 7) & padding(7, 3),
    "a window": causal(5, 7).logical_not().tril(2),
    "one row for all": causal(1, 7),
}
TORCHS_OWN: dict[str, tuple[Tensor, str]] = {
    "bias": (make(5, 7), "its mask is a bias"),
    "holes": (torch.arange(7).remainder(2).bool().expand(5, 7), "its mask has holes"),
    "by head": (make(2, 3, 5, 7) > 0, "its mask differs from head to head"),
    "an average": (torch.full((5, 7), LOWEST), "its mask is a bias"),
    "one key for all": (torch.ones(5, 1, dtype=torch.bool), "its mask has the shape"),
    "prefix": (causal(5, 7) | (torch.arange(7) < 3), "neither padding nor causal"),
}


@pytest.mark.parametrize("name", OURS)
def test_masks_in_disguise_are_ours(name: str, by_torch: list[str]) -> None:
    compare(*three(2, 3), attn_mask=OURS[name])
    compare(*three(2, 6, heads_k=3), attn_mask=OURS[name], enable_gqa=True, scale=0.4)
    assert not by_torch


@pytest.mark.parametrize("name", TORCHS_OWN)
def test_other_masks_are_torchs(name: str, by_torch: list[str]) -> None:
    mask, reason = TORCHS_OWN[name]
    out = compare(*three(2, 3), attn_mask=mask)
    assert torch.equal(out, TORCHS(*three(2, 3), attn_mask=mask))
    if mask.dim() == 2:
        compare(*three(2, 6, heads_k=3), attn_mask=mask, enable_gqa=True)
    assert by_torch[0].startswith(reason) or reason in by_torch[0]


def test_a_half_call_with_a_float32_mask(by_torch: list[str]) -> None:
    for dtype in (BF16, F16):
        compare(*three(2, 3, dtype=dtype), attn_mask=added(causal(5, 7)))
    assert not by_torch


def test_a_mask_of_fewer_dimensions_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    real = scaled_dot_product._planner._reader
    assert real is not None

    def spy(mask: Tensor, *sizes: int) -> Any:
        read.append(mask)
        return real(mask, *sizes)

    monkeypatch.setattr(scaled_dot_product._planner, "_reader", spy)
    mask = causal(5, 7)
    for _ in range(4):
        scaled_dot_product_attention(*three(2, 3), attn_mask=mask)
    assert len(read) == 1


REASONS: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Any], str]] = {
    "dropout": (lambda: three(2, 3), {"dropout_p": 1.0}, "it has dropout"),
    "float64": (lambda: three(2, 3, dtype=F64), {}, "it is float64"),
    "head_dim": (
        lambda: (*three(2, 3)[:2], make(2, 3, 7, 8)),
        {},
        "its value has another shape than its key",
    ),
    "broadcast": (
        lambda: (make(3, 5, 16), *three(2, 3)[1:]),
        {},
        "its leading dimensions are broadcast",
    ),
    "no keys": (lambda: three(2, 3, k=0), {}, "it has no elements"),
    "gradient of the mask": (
        lambda: three(2, 3),
        {"attn_mask": torch.zeros(5, 7, requires_grad=True)},
        "its mask wants a gradient",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_rest_is_torchs_and_said_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    operands, options, reason = REASONS[name]
    with caplog.at_level(logging.INFO, "wan_attn"):
        for _ in range(2):
            out = scaled_dot_product_attention(*operands(), **options)
    assert torch.equal(out, TORCHS(*operands(), **options))
    assert [r.getMessage() for r in caplog.records] == [
        f"[Attention] Using PyTorch SDPA (scaled_dot_product_attention: {reason})"
    ]


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_are_torchs() -> None:
    def nested(x: Tensor, layout: torch.layout) -> Tensor:
        rows = [x[0].transpose(0, 1), x[1].transpose(0, 1)[:3]]
        return torch.nested.nested_tensor(rows, layout=layout).transpose(1, 2)

    operands = [nested(x, torch.jagged) for x in three(2, 3)]
    out = scaled_dot_product_attention(*operands)
    for ours, theirs in zip(out.unbind(), TORCHS(*operands).unbind(), strict=True):
        assert torch.equal(ours, theirs)


Q, K, V = three(2, 4)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "one dimension": ((Q[0, 0, 0], K, V), {}, "query must be [..., seqlen, head_dim], got [16]"),
    "no heads for GQA": (
        (Q[0, 0], K[0, 0], V[0, 0]),
        {"enable_gqa": True},
        "query must be [..., heads, seqlen, head_dim], got [5, 16]",
    ),
    "integers": (
        (Q.long(), K.long(), V.long()),
        {},
        "query must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "dtypes": ((Q, K.half(), V), {}, "key must be of query's dtype torch.float32"),
    "devices": ((Q, K, V.to("meta")), {}, "value must be on query's device cpu, got meta"),
    "head_dim": ((Q, K[..., :8], V), {}, "key must be of query's head_dim 16"),
    "lengths": ((Q, K, V[:, :, :6]), {}, "value must be of key's seqlen 7"),
    "groups": (
        (Q, K[:, :3], V[:, :3]),
        {"enable_gqa": True},
        "key must be of heads that divide query's 4, got 3",
    ),
    "heads": ((Q, K[:, :2], V[:, :2]), {}, "key must be broadcastable with query's [2, 4] (fewer"),
    "batches": ((Q, K, V[[0, 1, 1]]), {}, "value must be broadcastable with query's [2, 4]"),
    "mask and causal": (
        (Q, K, V),
        {"attn_mask": causal(5, 7), "is_causal": True},
        "attn_mask must be None with is_causal, got a tensor",
    ),
    "mask of integers": (
        (Q, K, V),
        {"attn_mask": torch.ones(5, 7, dtype=torch.int64)},
        "attn_mask must be bool, float32 or of query's dtype torch.float32, got torch.int64",
    ),
    "mask too small": ((Q, K, V), {"attn_mask": causal(5, 6)}, "attn_mask must be of two dimens"),
    "mask too large": ((Q, K, V), {"attn_mask": causal(5, 9)}, "attn_mask must be of two dimens"),
    "mask of more samples": (
        (Q, K, V),
        {"attn_mask": torch.ones(3, 1, 5, 7, dtype=torch.bool)},
        "attn_mask must be of two dimensions or more and broadcastable to [2, 4, 5, 7], got [3",
    ),
    "mask of one dimension": ((Q, K, V), {"attn_mask": torch.ones(7)}, "attn_mask must be of two"),
    "dropout": ((Q, K, V), {"dropout_p": 1.5}, "dropout_p must be in [0, 1], got 1.5"),
    "negative dropout": ((Q, K, V), {"dropout_p": -0.1}, "dropout_p must be in [0, 1], got -0.1"),
}
# torch takes fewer values than keys without a word, and reads beyond them.
TAKEN_BY_TORCH = {"lengths"}


@pytest.mark.parametrize("name", ERRORS)
def test_what_torch_refuses_is_refused_in_our_words(name: str) -> None:
    operands, options, message = ERRORS[name]
    with pytest.raises(RuntimeError, match=re.escape(f"wan_attn: {message}")):
        scaled_dot_product_attention(*operands, **options)
    if name not in TAKEN_BY_TORCH:
        with pytest.raises((RuntimeError, IndexError)):
            TORCHS(*operands, **options)


@pytest.mark.parametrize("is_contiguous", (False, True))
def test_the_result_is_laid_out_as_torchs(is_contiguous: bool) -> None:
    operands = list(three(2, 3))
    if not is_contiguous:
        operands = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands]
    assert scaled_dot_product_attention(*operands).stride() == TORCHS(*operands).stride()


def test_autocast_decides_the_dtype(by_torch: list[str]) -> None:
    with torch.autocast("cpu", BF16):
        for options in ({}, {"attn_mask": added(causal(5, 7))}, {"is_causal": True}):
            out = compare(*three(2, 3, dtype=F32), **options)
            assert out.dtype == BF16
        mixed = (make(2, 3, 5, 16, dtype=BF16), *three(2, 3)[1:])
        assert scaled_dot_product_attention(*mixed).dtype == BF16
    assert not by_torch


def test_shapes_alone() -> None:
    out = scaled_dot_product_attention(*[x.to("meta") for x in three(2, 3)])
    assert out.is_meta and out.shape == (2, 3, 5, 16)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mask", (None, causal(5, 7)), ids=("plain", "mask"))
def test_gradients_and_transforms(mask: Tensor | None) -> None:
    """Each sample alone, by a gradient of torch.func, and by both together."""
    operands = three(2, 3)

    def loss(function: Any, *operands: Tensor) -> Tensor:
        out: Tensor = function(*operands, attn_mask=mask)
        return (out * torch.arange(16.0)).sum()

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1, 2)),
        torch.vmap,
        lambda f: torch.vmap(torch.func.grad(f, argnums=(0, 1, 2))),
    ):
        ours = transform(functools.partial(loss, scaled_dot_product_attention))(*operands)
        theirs = transform(functools.partial(loss, TORCHS))(*operands)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_mask_for_each_sample_of_a_vmap(by_torch: list[str]) -> None:
    masks = torch.stack((causal(5, 7), causal(5, 7).roll(1, 1)))
    ours = torch.vmap(scaled_dot_product_attention)(*three(2, 3), masks)
    torch.testing.assert_close(ours, torch.vmap(TORCHS)(*three(2, 3), masks))
    assert by_torch == ["its mask cannot be read here"]


def test_a_tangent_is_refused_as_elsewhere() -> None:
    q, k, v = three(2, 3)
    with pytest.raises(RuntimeError, match="query must be without a tangent"):
        torch.func.jvp(lambda x: scaled_dot_product_attention(x, k, v), (q,), (q,))


@pytest.mark.compile
@pytest.mark.parametrize("kind", ("plain", "causal", "mask", "dropout", "gqa", "3D"))
def test_compiles_without_a_break(kind: str) -> None:
    torch._dynamo.reset()
    table: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": causal(5, 7)},
        "dropout": {"dropout_p": 1.0},
        "gqa": {"enable_gqa": True},
    }
    options = table.get(kind, {})
    operands = three(3) if kind == "3D" else three(2, 4, heads_k=2 if kind == "gqa" else None)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = scaled_dot_product_attention(q * 2, k, v, **options)
        return out

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for wants_grad in (False, True):
        leaves = [copy.deepcopy(x).requires_grad_(wants_grad) for x in operands]
        out = compiled(*leaves)
        torch.testing.assert_close(out, function(*operands))
        if wants_grad:
            out.sum().backward()
            assert all(x.grad is not None for x in leaves)
    torch._dynamo.reset()
