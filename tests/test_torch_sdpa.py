# SPDX-License-Identifier: Apache-2.0
"""test_torch_sdpa.py - PyTorch's SDPA: which calls it gets, on which of its kernels, and when not.

What it computes is tested with every other backend in test_backends.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import standins
import wan_attn
from calls import BF16, F16, F32, operands
from tolerances import assert_close_to_oracle
from wan_attn import config
from wan_attn.backends import _torch_kernels, torch_sdpa
from wan_attn.request import PLAIN, Call, Request


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    standins.reset()
    yield
    standins.reset()


def _drops_masks(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    """As SageAttention's: mask, scale and dropout are taken and not looked at."""
    out = wan_attn.sageattn(query, key, value, is_causal=bool(options.get("is_causal")))
    assert isinstance(out, Tensor)
    return out


def _thin_wrapper(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    heads_last = (x.transpose(1, 2) for x in (query, key, value))
    out = wan_attn.sdpa(*heads_last, scale=options.get("scale"))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    "other",
    [_drops_masks, _thin_wrapper, wan_attn.sageattn, wan_attn.scaled_dot_product_attention],
    ids=["drops", "wrapper", "sageattn", "torch's signature"],
)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_whoever_replaces_torchs_function_does_not_reach_us(
    other: Any, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SageAttention's README: F.scaled_dot_product_attention = sageattn."""
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "torch")
    config.refresh()
    q, k, v = operands(batch=2, seqlen_q=20, seqlen_k=30, dtype=F32)
    lens = torch.tensor([30, 7])
    sdpa: Any = wan_attn.sdpa
    sageattn: Any = wan_attn.sageattn
    if is_compiled:
        torch.compiler.reset()
        sdpa = torch.compile(sdpa, backend="eager", fullgraph=True)
        sageattn = torch.compile(sageattn, backend="eager", fullgraph=True)
    window: dict[str, Any] = {"k_lens": lens, "scale": 0.3, "window": (5, 3)}
    mask = torch.arange(30) < 7
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    with monkeypatch.context() as replaced:  # the judge asks torch's function, too
        replaced.setattr(torch.nn.functional, "scaled_dot_product_attention", other)
        seen = sdpa(q, k, v, **window)
        masked = sageattn(*heads_first, attn_mask=mask, sm_scale=0.3).transpose(1, 2)
        trained = sdpa(q.clone().requires_grad_(), k, v, scale=0.3).detach()
    assert_close_to_oracle(seen, q, k, v, **window)
    assert_close_to_oracle(masked, q, k, v, k_lens=torch.tensor([7, 7]), scale=0.3)
    assert_close_to_oracle(trained, q, k, v, scale=0.3)


class Calls:
    """Records what torch's scaled_dot_product_attention is called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[tuple[int, ...], bool, bool]] = []
        self.is_on = True
        real = _torch_kernels.SDPA

        def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            if self.is_on:
                shape = (query.shape[0], query.shape[2], key.shape[2])
                self.seen.append((shape, options["attn_mask"] is not None, options["is_causal"]))
            return real(query, key, value, **options)

        monkeypatch.setattr(_torch_kernels, "SDPA", spy)

    def stop(self) -> None:
        """What comes now is the judge's."""
        self.is_on = False


@pytest.mark.parametrize(
    ("call", "want"),
    [
        ({}, [((3, 20, 20), False, False)]),
        ({"is_causal": True}, [((3, 20, 20), False, True)]),
        ({"window": (50, 50)}, [((3, 20, 20), False, False)]),
        ({"k_lens": [20, 20, 20]}, [((3, 20, 20), False, False)]),
        ({"q_lens": [9, 9, 9], "k_lens": [12] * 3}, [((3, 9, 12), False, False)]),
        # 10 % of the pairs are padding: one masked call is cheaper than three.
        ({"k_lens": [20, 20, 14]}, [((3, 20, 20), True, False)]),
        # At 0.7 exactly still batched, just below it per sample.
        ({"k_lens": [20, 20, 2]}, [((3, 20, 20), True, False)]),
        ({"k_lens": [20, 20, 1]}, [((1, 20, n), False, False) for n in (20, 20, 1)]),
        ({"k_lens": [20, 0, 5]}, [((1, 20, 20), False, False), ((1, 20, 5), False, False)]),
        # Rows that see different keys: no mask for the batch would be small.
        (
            {"is_causal": True, "q_lens": [20, 19, 20], "k_lens": [20, 19, 20]},
            [((1, n, n), False, True) for n in (20, 19, 20)],
        ),
        ({"window": (2, 2)}, [((3, 20, 20), True, False)]),
    ],
)
def test_a_mask_only_where_one_is_needed(
    call: dict[str, Any], want: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lens: dict[str, Any] = {
        name: torch.tensor(call[name]) for name in ("q_lens", "k_lens") if name in call
    }
    q, k, v = operands(batch=3, seqlen_q=20, seqlen_k=20, dtype=F32)
    calls = Calls(monkeypatch)
    torch_sdpa.run(q, k, v, Call(**(call | lens)))
    assert calls.seen == want


def test_a_window_computes_only_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(seqlen_q=600, seqlen_k=600, heads_q=1, head_dim=8)
    calls = Calls(monkeypatch)
    out, _ = torch_sdpa.run(q, k, v, Call(window=(10, 0)))
    calls.stop()
    assert [shape for shape, _, _ in calls.seen] == [(1, 256, 256), (1, 256, 266), (1, 88, 98)]
    assert_close_to_oracle(out, q, k, v, window=(10, 0))


F_, C_, E_, M_ = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@pytest.mark.parametrize(
    ("platform", "flash", "arch", "cudnn", "want"),
    [
        ("win32", False, (8, 9), 91900, (E_, M_)),
        ("win32", True, (8, 9), 91900, (F_, C_, E_, M_)),
        ("linux", True, (8, 6), 91900, (F_, C_, E_, M_)),
        ("linux", True, (9, 0), 91900, (C_, F_, E_, M_)),
        ("linux", True, (10, 0), 91900, (C_, F_, E_, M_)),
        ("linux", True, (9, 0), 90100, (F_, C_, E_, M_)),
        ("linux", True, (12, 0), 91900, (F_, C_, E_, M_)),
    ],
)
def test_kernel_order(
    platform: str, flash: bool, arch: tuple[int, int], cudnn: int, want: Any
) -> None:
    assert _torch_kernels.kernel_order(platform, flash, arch, cudnn) == want


def test_a_kernel_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_kernels, "_refused", set())
    monkeypatch.setattr(_torch_kernels, "order_for", lambda device: (E_, M_))  # not on a CPU
    q, k, v = operands(dtype=F32)
    calls = Calls(monkeypatch)
    outs = [torch_sdpa.run(q, k, v, PLAIN)[0] for _ in range(3)]
    assert len(calls.seen) == 4  # efficient once, math three times
    torch_sdpa.run(*operands(seqlen_q=5, dtype=F32), PLAIN)
    assert len(calls.seen) == 6  # another kind of call: asked again
    calls.stop()
    for out in outs:
        assert_close_to_oracle(out, q, k, v)


def test_flash_is_pinned_until_it_has_taken_a_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[SDPBackend] = []
    real = _torch_kernels._by

    def spy(kernel: SDPBackend, call: Any) -> Tensor:
        pinned.append(kernel)
        return real(kernel, call)

    monkeypatch.setattr(_torch_kernels, "_settled", set())
    monkeypatch.setattr(_torch_kernels, "order_for", lambda device: (F_, M_))
    monkeypatch.setattr(_torch_kernels, "_by", spy)
    q, k, v = operands(dtype=F32)
    for _ in range(3):
        out, _ = torch_sdpa.run(q, k, v, PLAIN)
        assert_close_to_oracle(out, q, k, v)
    assert pinned == [F_]
    monkeypatch.setattr(_torch_kernels, "order_for", lambda device: (E_, F_))
    for _ in range(3):
        torch_sdpa.run(*operands(seqlen_q=5, dtype=F32), PLAIN)
    assert pinned[1:] == [E_, F_, F_, F_]  # PyTorch itself would not ask in that order


def test_a_kernel_that_meets_a_device_error_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(_torch_kernels, "_refused", set())
    monkeypatch.setattr(_torch_kernels, "order_for", lambda device: (F_, M_))
    monkeypatch.setattr(_torch_kernels, "SDPA", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch_sdpa.run(*operands(dtype=F32), PLAIN)
    assert not _torch_kernels._refused


def test_kernels_that_the_user_switched_off_stay_off() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert _torch_kernels._enabled((F_, C_, E_, M_)) == [M_]


CUDA = Request(
    batch=1, seqlen_q=9, seqlen_k=9, num_heads_q=1, num_heads_k=1, head_dim=128, dtype=BF16,
    query_dtype=F32, key_dtype=F32, device=torch.device("cuda", 0),
)  # fmt: skip


def but(**changes: Any) -> Request:
    return dataclasses.replace(CUDA, **changes)


@pytest.mark.parametrize(
    ("request_", "arch", "flash", "reason"),
    [
        (CUDA, (8, 0), True, None),
        (CUDA, (7, 5), False, "bfloat16 on compute capability 7.x"),
        (but(dtype=F16), (7, 5), False, None),
        (but(dtype=F16, head_dim=66), (7, 5), False, "head_dim % 4"),
        (but(head_dim=84), (8, 6), False, "head_dim % 8"),
        (but(head_dim=84), (8, 6), True, None),
        (but(dtype=F32, head_dim=66), (8, 6), True, "head_dim % 4"),
        (but(dtype=torch.float64), (8, 0), True, "float64"),
        (CUDA, None, True, None),
        (but(device=torch.device("cpu")), None, False, None),
        (but(device=torch.device("cpu"), dropout_p=0.1), None, False, "dropout"),
        (but(device=torch.device("mps")), None, False, "no fused kernel on Apple's GPUs"),
        (but(device=torch.device("xpu")), None, False, None),
        (but(device=torch.device("meta")), None, False, None),
    ],
)
def test_needs_square_memory(
    request_: Request, arch: Any, flash: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.pretend_card(monkeypatch, arch)
    monkeypatch.setattr(_torch_kernels, "has_flash", lambda: flash)
    said = torch_sdpa.needs_square_memory(request_)
    assert said is None if reason is None else said is not None and reason in said, said


@pytest.mark.parametrize(
    "strides", [(1, 80, 16, 1), (0, 80, 16, 1), (64, 1, 16, 1), (64, 16, 3, 1)]
)
def test_rows_that_overlap_are_read_where_they_lie(strides: tuple[int, ...]) -> None:
    """The result has query's order of strides, and torch expects the usual one of it."""
    q, k, v = (torch.randn(2, 4, 5, 16) for _ in range(3))
    q = torch.randn(2000).as_strided(q.shape, strides)
    out = _torch_kernels.attend(q, k, v, None, False, 0.25, 0.0)
    want = _torch_kernels.attend(q.contiguous(), k, v, None, False, 0.25, 0.0)
    assert torch.equal(out, want)
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    tril = torch.ones(5, 5, dtype=torch.bool).tril()
    sageattn: Any = wan_attn.sageattn
    out = sageattn(*by_head, tensor_layout="NHD", attn_mask=tril)
    want = _torch_kernels.attend(q.contiguous(), k, v, tril, False, 0.25, 0.0)
    assert torch.allclose(out, want.transpose(1, 2), atol=1e-6)
