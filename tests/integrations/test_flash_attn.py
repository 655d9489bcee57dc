# SPDX-License-Identifier: Apache-2.0
"""test_flash_attn.py - the functions shaped like FlashAttention 2's, against float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import wan_attn
from calls import BF16, DTYPES, F16, F32, MIXED, NAMES, operands
from tolerances import assert_close_to_oracle
from wan_attn.signatures import _varlen

fa: Any = wan_attn  # what its functions return depends on an argument

# Recorded from flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention at 0251105.
OPTIONS = (
    "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0"
    " alibi_slopes=None deterministic=False return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"q k v {OPTIONS}",
    "flash_attn_kvpacked_func": f"q kv {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv {OPTIONS}",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    f" {OPTIONS} block_table=None",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    f" {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {OPTIONS}",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signature_is_flash_attns(name: str) -> None:
    parameters = inspect.signature(getattr(wan_attn, name)).parameters.values()
    found = [
        p.name if p.default is p.empty else f"{p.name}={str(p.default).replace(' ', '')}"
        for p in parameters
    ]
    assert " ".join(found) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def cumulative(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (7, 2)},
    "causal_window": {"causal": True, "window_size": (9, -1)},
    "scale": {"softmax_scale": 0.3},
}


def as_oracle(options: dict[str, Any]) -> dict[str, Any]:
    names = {"causal": "is_causal", "window_size": "window", "softmax_scale": "scale"}
    return {names[name]: value for name, value in options.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: NAMES[d])
@pytest.mark.parametrize("lengths", ((21, 40), (40, 21), (33, 33)))
def test_a_padded_batch_equals_the_oracle(
    case: str, dtype: torch.dtype, lengths: tuple[int, int]
) -> None:
    q, k, v = operands(2, *lengths, heads_q=4, heads_k=2, head_dim=40, dtype=dtype)
    out, lse, third = fa.flash_attn_func(q, k, v, return_attn_probs=True, **CASES[case])
    assert third is None and out.dtype == dtype and lse.shape == (2, 4, lengths[0])
    assert_close_to_oracle(out, q, k, v, lse=lse, **as_oracle(CASES[case]))
    alone = fa.flash_attn_func(q, k, v, **CASES[case])
    assert isinstance(alone, Tensor)
    assert_close_to_oracle(alone, q, k, v, **as_oracle(CASES[case]))


class TestPacked:
    """One tensor for two or three operands: the same bits as apart."""

    def test_a_padded_batch_equals_the_oracle(self) -> None:
        qkv = torch.randn(2, 19, 3, 4, 32, dtype=BF16)
        apart = fa.flash_attn_func(*qkv.unbind(2), causal=True)
        assert torch.equal(fa.flash_attn_qkvpacked_func(qkv, causal=True), apart)
        assert torch.equal(
            fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), apart
        )

    def test_a_packed_batch_equals_the_oracle(self) -> None:
        qkv, cu = torch.randn(19, 3, 4, 32), cumulative([7, 12])
        apart = fa.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 12, 12, causal=True)
        packed = fa.flash_attn_varlen_qkvpacked_func(qkv, cu, 12, causal=True)
        assert torch.equal(packed, apart)
        packed = fa.flash_attn_varlen_kvpacked_func(
            qkv[:, 0], qkv[:, 1:], cu, cu, 12, 12, causal=True
        )
        assert torch.equal(packed, apart)

    def test_options_keep_their_places(self) -> None:
        qkv, cu = torch.randn(9, 3, 2, 16), cumulative([4, 5])
        options = (0.0, 0.2, True, (2, 1), 0.0, None, False, True)
        out, lse, _ = fa.flash_attn_varlen_qkvpacked_func(qkv, cu, 5, *options)
        assert lse.shape == (2, 9)
        for begin, end in ((0, 4), (4, 9)):
            q, k, v = (x[begin:end].unsqueeze(0) for x in qkv.unbind(1))
            want, _, _ = fa.flash_attn_func(q, k, v, *options)
            assert torch.equal(out[begin:end], want[0])


@pytest.fixture(params=["views", "pad"])
def by_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through _varlen.py; lengths that nobody may look at stand for those on a device."""
    if request.param == "pad":
        monkeypatch.setattr(_varlen, "_may_read", lambda cu_seqlens: False)
    return str(request.param)


BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "mixed": ([3, 17, 1, 30], [9, 17, 40, 5]),
    "uniform": ([12, 12, 12], [20, 20, 20]),
    "runs": ([8, 8, 5, 5, 8], [8, 8, 5, 5, 8]),
    "no_queries": ([4, 0, 6], [4, 5, 6]),
    "no_keys": ([4, 3, 6], [4, 0, 6]),
    "one": ([25], [31]),
    "first_empty": ([0, 9], [0, 9]),
    "all_empty": ([0, 0], [0, 3]),
    "no_key_at_all": ([5, 2], [0, 0]),
}


def packed(
    lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype = F32, extra: int = 0
) -> tuple[Tensor, ...]:
    q = torch.randn(sum(lengths_q) + extra, 4, 32).to(dtype)
    k, v = (torch.randn(sum(lengths_k) + extra, 2, 32).to(dtype) for _ in range(2))
    return q, k, v, cumulative(lengths_q), cumulative(lengths_k)


def check_varlen(result: Any, operands_: tuple[Tensor, ...], case: str) -> None:
    out, lse, third = result
    q, k, v, cu_q, cu_k = operands_
    assert third is None and out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == F32
    begins_q, begins_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(begins_q) - 1):
        rows = slice(begins_q[b], begins_q[b + 1])
        keys = slice(begins_k[b], begins_k[b + 1])
        if rows.start == rows.stop:
            continue
        assert_close_to_oracle(
            out[rows].unsqueeze(0),
            *(x.unsqueeze(0) for x in (q[rows], k[keys], v[keys])),
            lse=lse[:, rows].unsqueeze(0),
            **as_oracle(CASES[case]),
        )
    assert not out[begins_q[-1] :].any() and bool((lse[:, begins_q[-1] :] == -torch.inf).all())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_packed_batch_equals_the_oracle(by_route: str, batch: str, case: str) -> None:
    operands_ = packed(*BATCHES[batch], extra=2)
    longest = [max(lengths) for lengths in BATCHES[batch]]
    result = fa.flash_attn_varlen_func(*operands_, *longest, return_attn_probs=True, **CASES[case])
    check_varlen(result, operands_, case)


@pytest.mark.parametrize("dtype", (F16, BF16), ids=lambda d: NAMES[d])
def test_varlen_half(by_route: str, dtype: torch.dtype) -> None:
    operands_ = packed(*BATCHES["mixed"], dtype=dtype)
    result = fa.flash_attn_varlen_func(*operands_, 64, 64, causal=True, return_attn_probs=True)
    check_varlen(result, operands_, "causal")


def test_a_sequence_never_reaches_another(by_route: str) -> None:
    """Padding is other sequences' tokens: NaN there must stay there."""
    q, k, v, cu_q, cu_k = packed(*BATCHES["mixed"])
    want = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 30, 40)
    poisoned = [x.clone() for x in (q, k, v)]
    for x, cu in zip(poisoned, (cu_q, cu_k, cu_k), strict=True):
        x[cu[1] : cu[2]] = torch.nan
    out = fa.flash_attn_varlen_func(*poisoned, cu_q, cu_k, 30, 40)
    clean = torch.ones(len(q), dtype=torch.bool)
    clean[cu_q[1] : cu_q[2]] = False
    assert torch.equal(out[clean], want[clean])
    assert out[~clean].isnan().all()


def test_many_short_sequences_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3 + n % 2 for n in range(_varlen.RUNS_MAX + 1)]
    operands_ = packed(lengths, lengths)
    want = fa.flash_attn_varlen_func(*operands_, 4, 4)
    monkeypatch.setattr(_varlen, "RUNS_MAX", len(lengths))
    monkeypatch.setattr(_varlen, "_by_padding", lambda *_: pytest.fail("they are few now"))
    out = fa.flash_attn_varlen_func(*operands_, 4, 4)
    assert torch.allclose(out, want, atol=1e-6)
    with pytest.raises(pytest.fail.Exception):
        monkeypatch.setattr(_varlen, "RUNS_MAX", len(lengths) - 1)
        fa.flash_attn_varlen_func(*operands_, 4, 4)


def test_one_long_sequence_among_many_is_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [2 + n % 2 for n in range(_varlen.RUNS_MAX + 1)] + [500]
    operands_ = packed(lengths, lengths)
    monkeypatch.setattr(_varlen, "_by_padding", lambda *_: pytest.fail("15 times the memory"))
    fa.flash_attn_varlen_func(*operands_, 500, 500)


def test_no_sequence_at_all(by_route: str) -> None:
    q, none = torch.randn(3, 2, 16), cumulative([])
    out, lse, _ = fa.flash_attn_varlen_func(q, q, q, none, none, 0, 0, return_attn_probs=True)
    assert not out.any() and lse.shape == (2, 3) and bool((lse == -torch.inf).all())


def test_lengths_on_a_device_are_never_read() -> None:
    """A fake tensor has no numbers: reading one is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(10, 4, 32)
        cu = torch.empty(4, dtype=torch.int32)
        out, lse, _ = fa.flash_attn_varlen_func(
            q, q, q, cu, cu, 6, 6, causal=True, return_attn_probs=True
        )
    assert out.shape == q.shape and lse.shape == (4, 10)


@pytest.mark.parametrize("bounds", [torch.tensor([7, 2]), [7, 2], tuple(torch.tensor([7, 2]))])
def test_a_window_of_any_integers(bounds: Any) -> None:
    q, k, v = operands(1, 20, 30)
    want = fa.sdpa(q, k, v, window=(7, 2))
    assert torch.equal(fa.flash_attn_func(q, k, v, window_size=bounds), want)


def test_every_negative_bound_is_none() -> None:
    q, k, v = operands(1, 20, 30)
    assert torch.equal(
        fa.flash_attn_func(q, k, v, window_size=(-5, -2)), fa.flash_attn_func(q, k, v)
    )


def test_mixed_dtypes_as_wan_has_them() -> None:
    q, k, v = operands(1, 20, 30, dtype=MIXED[0])
    out = fa.flash_attn_func(q, k, v)
    assert out.dtype == q.dtype
    assert_close_to_oracle(out, q, k, v)


def test_dropout_holds_without_a_gradient_too() -> None:
    """As in the original, and unlike Wan2.2's flash_attention."""
    q, k, v = operands(1, 64, 256)
    ones = torch.ones_like(v)
    with torch.no_grad():
        out = fa.flash_attn_func(q, k, ones, 0.25)
        assert torch.allclose(fa.flash_attn_func(q, k, ones), ones[:, :64])
    assert not torch.allclose(out, ones[:, :64]), "some weights must be gone"
    assert abs(out.mean().item() - 1.0) < 0.05, "and the others larger by 1 / (1 - 0.25)"


class TestGradient:
    def test_a_padded_batch_equals_the_oracle(self) -> None:
        leaves = [x.requires_grad_() for x in operands(2, 9, 12, heads_q=4, heads_k=2)]
        self._compare(leaves, lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True), True)

    def test_a_packed_batch_equals_the_oracle(self, by_route: str) -> None:
        q, k, v, cu_q, cu_k = packed([5, 9], [7, 6])
        leaves = [x.requires_grad_() for x in (q, k, v)]
        self._compare(
            leaves,
            lambda q, k, v: torch.stack(
                [
                    fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 7).sum(),
                    fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 7).square().sum(),
                ]
            ),
            False,
            lambda q, k, v: torch.stack(
                [
                    torch.stack([f(x) for x in self._plain_parts(q, k, v, cu_q, cu_k)]).sum()
                    for f in (torch.sum, lambda x: x.square().sum())
                ]
            ),
        )

    def _plain_parts(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
    ) -> list[Tensor]:
        a, b = cu_q.tolist(), cu_k.tolist()
        parts = [(slice(a[n], a[n + 1]), slice(b[n], b[n + 1])) for n in range(len(a) - 1)]
        return [self._plain(q[rows], k[keys], v[keys]) for rows, keys in parts]

    @staticmethod
    def _plain(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """[..., rows, heads, head_dim] by softmax, written out."""
        group = q.shape[-2] // k.shape[-2]
        k, v = k.repeat_interleave(group, -2), v.repeat_interleave(group, -2)
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
        if is_causal:
            rows, keys = scores.shape[-2:]
            seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
            scores = scores.masked_fill(~seen, -torch.inf)
        return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)

    def _compare(
        self,
        leaves: list[Tensor],
        function: Callable[..., Tensor],
        is_causal: bool,
        plain: Callable[..., Tensor] | None = None,
    ) -> None:
        out = function(*leaves)
        q, k, v = leaves
        want = plain(q, k, v) if plain else self._plain(q, k, v, is_causal)
        weights = torch.randn_like(out)
        found = torch.autograd.grad(out, leaves, weights)
        expected = torch.autograd.grad(want, leaves, weights)
        for name, a, b in zip("qkv", found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-4), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "softcap": ({"softcap": 30.0}, r"softcap must be 0.0, .* got 30.0"),
    "alibi": ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes must be None, .* shape \[2\]"),
    "dropout_lse": (
        {"dropout_p": 0.1, "return_attn_probs": True},
        "return_attn_probs must be False with dropout.* dropout_p=0.1",
    ),
    "dropout": ({"dropout_p": 1.5}, "dropout_p must be in .0, 1., got 1.5"),
    "scale": ({"softmax_scale": float("nan")}, "softmax_scale must be finite"),
    "window_float": ({"window_size": (1.5, 0)}, "window_size must be a pair of integers"),
    "window_bool": ({"window_size": (True, 0)}, "window_size must be a pair of integers"),
    "window_one": ({"window_size": (1,)}, "window_size must be a pair"),
    "window_number": ({"window_size": 4}, "window_size must be a pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    options, message = REFUSED[case]
    q, k, v = operands()
    with pytest.raises(RuntimeError, match=f"wan_attn: {message}"):
        fa.flash_attn_func(q, k, v, **options)
    cu_q, cu_k = cumulative([17]), cumulative([33])
    with pytest.raises(RuntimeError, match=f"wan_attn: {message}"):
        fa.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 17, 33, **options)


def test_softcap_of_0_or_less_is_off_as_in_the_original() -> None:
    q, k, v = operands()
    want = fa.flash_attn_func(q, k, v)
    assert torch.equal(fa.flash_attn_func(q, k, v, softcap=-1.0), want)


VARLEN_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "paged": ({"block_table": torch.zeros(2, 3)}, r"block_table must be None, .* \[2, 3\]"),
    "q_dim": ({"q": torch.ones(1, 9, 2, 16)}, r"q must be \[total, heads, head_dim\], got"),
    "q_type": ({"q": [1.0]}, "q must be a tensor, got a list"),
    "v_shape": ({"v": torch.ones(8, 2, 16)}, r"v must be shaped like k, got \[8, 2, 16\]"),
    "cu_type": ({"cu_seqlens_q": [0, 9]}, "cu_seqlens_q must be a tensor, got a list"),
    "cu_dim": ({"cu_seqlens_k": torch.zeros(2, 2, dtype=torch.int32)}, r"cu_seqlens_k must be \["),
    "cu_dtype": ({"cu_seqlens_k": torch.zeros(2)}, "cu_seqlens_k must be int32 or int64"),
    "cu_count": ({"cu_seqlens_k": cumulative([4, 5])}, r"cu_seqlens_k must be \[batch \+ 1\] = \["),
    "cu_begin": (
        {"cu_seqlens_q": torch.tensor([-1, 9])},
        "cu_seqlens_q must be a list of begins, of which the first is at least 0, got -1",
    ),
    "cu_end": ({"cu_seqlens_q": cumulative([10])}, "cu_seqlens_q must be at most the number of"),
    "cu_falls": (
        {"cu_seqlens_q": torch.tensor([0, 5, 3]), "cu_seqlens_k": cumulative([4, 4])},
        "cu_seqlens_q must be non-decreasing, got 5, 3",
    ),
    "longest": ({"max_seqlen_k": 8}, "max_seqlen_k must be at least the length of sequence 0, 9"),
    "negative": ({"max_seqlen_q": -1}, "max_seqlen_q must be at least 0, got -1"),
}


@pytest.mark.parametrize("case", VARLEN_REFUSED)
def test_varlen_refused_by_name(case: str) -> None:
    changed, message = VARLEN_REFUSED[case]
    x, cu = torch.ones(9, 2, 16), cumulative([9])
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    arguments |= {"max_seqlen_q": 9, "max_seqlen_k": 9} | changed
    with pytest.raises(RuntimeError, match=f"wan_attn: {message}"):
        fa.flash_attn_varlen_func(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("flash_attn_qkvpacked_func", (torch.ones(2, 5, 2, 4, 8),), "qkv must be .*3, heads"),
        ("flash_attn_qkvpacked_func", (torch.ones(5, 3, 4, 8),), "qkv must be a tensor .batch"),
        ("flash_attn_kvpacked_func", (torch.ones(1), torch.ones(2, 5, 3, 4, 8)), "kv must be .*2"),
        ("flash_attn_qkvpacked_func", (None,), "qkv must be a tensor .*, got NoneType"),
        ("flash_attn_func", (None, None, None), "q must be a tensor, got None"),
        ("flash_attn_func", (torch.ones(2, 3, 4),) * 3, r"q must be \[batch, seqlen, heads"),
    ],
)
def test_operands_refused_by_name(name: str, arguments: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"wan_attn: {message}"):
        getattr(wan_attn, name)(*arguments)


def test_patch_gives_wan_the_same_function(stubs: Any) -> None:
    """face_blocks.py takes flash_attn_func from the package; without one it gets ours."""
    import importlib
    import sys

    import stub_wan

    stub_wan.write(stubs)
    importlib.import_module("wan")
    wan_attn.patch()
    function = sys.modules["wan.modules.animate.face_blocks"].flash_attn_func
    assert function is not fa.flash_attn_func, "unpatch() must not reach the user's own name"
    q, k, v = operands(1, 20, 30)
    out, lse, _ = function(q, k, v, causal=True, return_attn_probs=True)
    want, want_lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    wan_attn.unpatch()
    assert sys.modules["wan.modules.animate.face_blocks"].flash_attn_func is None


@pytest.mark.compile
class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_dynamo(self) -> Any:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_padded_batch_equals_the_oracle(self) -> None:
        compiled = torch.compile(self._dense, fullgraph=True, backend="aot_eager")
        q, k, v = operands(2, 17, 33)
        with torch.no_grad():
            for found, want in zip(compiled(q, k, v), self._dense(q, k, v), strict=True):
                assert torch.equal(found, want)

    def test_varlen_with_changing_lengths(self) -> None:
        compiled = torch.compile(self._varlen, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.no_grad():
            for batch in ("mixed", "no_keys", "runs"):
                arguments = packed(*BATCHES[batch])
                for found, want in zip(compiled(*arguments), self._varlen(*arguments), strict=True):
                    assert torch.allclose(found, want, atol=1e-5)

    @staticmethod
    def _dense(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fa.flash_attn_func(q * 2, k, v, causal=True, return_attn_probs=True)[:2]

    @staticmethod
    def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Any:
        return fa.flash_attn_varlen_func(
            q * 2, k, v, cu_q, cu_k, 40, 40, causal=True, return_attn_probs=True
        )[:2]
