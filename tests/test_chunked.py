# SPDX-License-Identifier: Apache-2.0
"""test_chunked.py - the memory-bounded wrapper: exact, bounded, on one device and round a ring."""

from __future__ import annotations

import dataclasses
import math
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import start_processes
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import standins
from calls import BF16, F16, F32, operands, poisoned
from tolerances import assert_close_to_oracle
from wan_attn import config
from wan_attn.backends import _torch_kernels, chunked, torch_sdpa
from wan_attn.backends.chunked import choose_method, windows_flash_attention_wrapper
from wan_attn.config import Settings
from wan_attn.request import Call, Request
from wan_attn.selection.choose import select

CUDA = Request(
    batch=1, seqlen_q=2048, seqlen_k=2048, num_heads_q=4, num_heads_k=4, head_dim=128, dtype=F16,
    query_dtype=F16, key_dtype=F16, device=torch.device("cuda", 0),
)  # fmt: skip


def but(**changes: Any) -> Request:
    return dataclasses.replace(CUDA, **changes)


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    standins.reset()
    yield
    standins.reset()


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


SEQLEN = 1024
MEMORY_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (100, 50)},
    "lengths": {"k_lens": torch.tensor([1000])},
    "with lse": {"return_lse": True},
}


@pytest.mark.parametrize("method", ["chunked", "ring"])
@pytest.mark.parametrize("name", MEMORY_CALLS)
def test_no_buffer_of_all_scores(method: str, name: str) -> None:
    q, k, v = operands(seqlen_q=SEQLEN, seqlen_k=SEQLEN, heads_q=2, head_dim=16, dtype=BF16)
    limit = 2 * SEQLEN * 64
    with Largest() as largest:
        windows_flash_attention_wrapper(
            q, k, v, method=method, max_elements=limit, **MEMORY_CALLS[name]
        )
    assert q.numel() <= largest.numel <= limit, largest.numel


@pytest.mark.parametrize("name", MEMORY_CALLS)
def test_no_buffer_of_all_scores_even_where_pytorch_stores_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The math kernel, which does store the scores of what it is given, gets blocks of rows."""
    q, k, v = operands(seqlen_q=SEQLEN, seqlen_k=SEQLEN, heads_q=2, head_dim=16, dtype=F32)
    monkeypatch.setattr(torch_sdpa, "needs_square_memory", lambda request: "math only")
    monkeypatch.setattr(_torch_kernels, "order_for", lambda d: (SDPBackend.MATH,))
    limit = 2 * SEQLEN * 64
    with Largest() as largest:
        out = windows_flash_attention_wrapper(
            q, k, v, threshold=0, max_elements=limit, **MEMORY_CALLS[name]
        )
    assert q.numel() <= largest.numel <= limit, largest.numel
    call = dict(MEMORY_CALLS[name])
    call.pop("return_lse", None)
    assert_close_to_oracle(out[0] if isinstance(out, tuple) else out, q, k, v, **call)


@pytest.mark.parametrize("name", ["causal", "window", "with lse"])
def test_pytorchs_backend_makes_no_mask_or_score_for_all_pairs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan_attn.backends import _common

    monkeypatch.setattr(torch_sdpa, "MASK_ELEMENTS", SEQLEN * 32)
    monkeypatch.setattr(_common, "SCORE_ELEMENTS", SEQLEN * 64)
    q, k, v = operands(seqlen_q=SEQLEN, seqlen_k=SEQLEN + 1, heads_q=1, head_dim=16, dtype=BF16)
    with Largest() as largest:
        torch_sdpa.run(q, k, v, Call(**MEMORY_CALLS[name]))
    assert largest.numel <= SEQLEN * SEQLEN / 2, largest.numel


# Which way


@pytest.mark.parametrize(
    ("request_", "threshold", "max_elements", "math_only", "want"),
    [
        (CUDA, 2048 * 2048, 1, True, "direct"),
        (CUDA, 2048 * 2048 - 1, 1 << 25, False, "rows"),
        (CUDA, 0, 1, False, "rows"),  # a fused kernel stores no scores
        (CUDA, 0, 4 * 2048 * 64, True, "rows"),
        (but(is_causal=True), 0, 4 * 2048 * 64, True, "chunked"),
        (but(window=(9, 9)), 0, 4 * 2048 * 64, True, "chunked"),
        (but(is_causal=True), 0, 1 << 25, False, "rows"),
        (but(seqlen_k=75600), 0, 4 * 2048 * 64, True, "chunked"),
        (but(seqlen_q=75600), 0, 4 * 2048 * 64, True, "rows"),
        (but(seqlen_q=75600, seqlen_k=75600), 0, 4 * 2048 * 64, True, "ring"),
    ],
)
def test_method(
    request_: Request,
    threshold: int,
    max_elements: int,
    math_only: bool,
    want: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = "math only" if math_only else None
    monkeypatch.setattr(torch_sdpa, "needs_square_memory", lambda request: said)
    assert choose_method(request_, threshold, max_elements) == want


def test_the_threshold_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(request: Request, threshold: int, max_elements: int) -> str:
        seen.append(threshold)
        return "direct"

    monkeypatch.setattr(chunked, "choose_method", spy)
    q, k, v = operands(dtype=F32)
    windows_flash_attention_wrapper(q, k, v)
    monkeypatch.setenv("WAN_ATTN_CHUNK_THRESHOLD", "77")
    config.refresh()
    windows_flash_attention_wrapper(q, k, v)
    windows_flash_attention_wrapper(q, k, v, threshold=5)
    assert seen == [1_048_576, 77, 5]


@pytest.mark.parametrize(
    ("request_", "threshold", "platform", "flash", "arch", "reason"),
    [
        (CUDA, 1 << 20, "win32", False, (8, 9), "no flash kernel in PyTorch on Windows"),
        (CUDA, 1 << 20, "win32", True, (8, 9), None),
        (CUDA, 1 << 20, "linux", False, (8, 9), None),
        (CUDA, 1 << 22, "win32", False, (8, 9), None),  # 2048 * 2048 pairs are not above it
        (but(dtype=BF16), 1 << 20, "linux", False, (7, 5), "compute capability 7.x"),
        (but(dtype=BF16, dropout_p=0.1), 1 << 20, "linux", False, (7, 5), None),
        (but(device=torch.device("cpu")), 1 << 20, "win32", False, None, None),
        (but(device=torch.device("cpu")), 1 << 20, "linux", True, None, None),
    ],
)
def test_when_it_is_needed(
    request_: Request,
    threshold: int,
    platform: str,
    flash: bool,
    arch: Any,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standins.pretend_card(monkeypatch, arch)
    monkeypatch.setattr(_torch_kernels, "has_flash", lambda: flash)
    monkeypatch.setattr(sys, "platform", platform)
    said = chunked.needed(request_, threshold)
    assert said is None if reason is None else said is not None and reason in said, said
    for name in ("auto", "torch"):
        choice = select(request_, Settings(backend=name, chunk_threshold=threshold))
        assert choice.backend == ("torch" if reason is None else "chunked") or name == "auto"
        if reason is not None:
            assert ("torch", said) in choice.refusals


def test_it_has_no_dropout() -> None:
    assert chunked.why_not(but(dropout_p=0.1)) == "has no dropout"
    assert chunked.why_not(but(needs_grad=True)) is None
    with pytest.raises(RuntimeError, match="dropout_p must be 0 for the memory-bounded wrapper"):
        chunked.run(*operands(dtype=F32), Call(dropout_p=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fast"}, "method must be one of auto, direct, rows, chunked, ring, got"),
        ({"max_elements": 0}, "max_elements must be at least 1, got 0"),
        ({"window": (-2, 0)}, "window_left must be -1"),
        ({"k_lens": torch.tensor([1.0])}, "k_lens must be int32 or int64"),
        ({"k_lens": torch.tensor([34])}, "k_lens must be between 0 and the padded length 33"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        windows_flash_attention_wrapper(*operands(dtype=F32), **options)


@pytest.mark.parametrize("method", chunked.METHODS)
def test_each_method_returns_out_or_both(method: str) -> None:
    q, k, v = operands(batch=2, dtype=(F32, F32, BF16))
    call: dict[str, Any] = {"q_lens": torch.tensor([17, 3]), "k_lens": torch.tensor([2, 33])}
    q, k, v = poisoned(q, [17, 3]), poisoned(k, [2, 33]), poisoned(v, [2, 33])
    out = windows_flash_attention_wrapper(q, k, v, method=method, threshold=0, **call)
    assert isinstance(out, Tensor) and out.dtype == F32
    both = windows_flash_attention_wrapper(
        q, k, v, method=method, threshold=0, return_lse=True, **call
    )
    assert isinstance(both, tuple)
    assert_close_to_oracle(both[0], q, k, v, lse=both[1], **call)


# Round a ring of processes

RING_CALLS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"window": (7, 3)},
    {"q_lens": [24, 5], "k_lens": [11, 36]},
    {"is_causal": True, "q_lens": [24, 13], "k_lens": [30, 36]},
    {"k_lens": [12, 12]},  # the last ranks hold only padding
)
RANKS = 3


def ring_operands(call: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(7)
    q, k, v = operands(batch=2, seqlen_q=24, seqlen_k=36, heads_q=4, heads_k=2, dtype=F32)
    call = dict(call)
    if "q_lens" in call:
        q, call["q_lens"] = poisoned(q, call["q_lens"]), torch.tensor(call["q_lens"])
    if "k_lens" in call:
        k, v = poisoned(k, call["k_lens"]), poisoned(v, call["k_lens"])
        call["k_lens"] = torch.tensor(call["k_lens"])
    return [q, k, v], call


def ring_member(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    results = []
    for call in RING_CALLS:
        tensors, call = ring_operands(call)
        own = [x.chunk(RANKS, dim=1)[rank] for x in tensors]
        results.append(
            windows_flash_attention_wrapper(
                *own, group=group, return_lse=True, max_elements=8 * 25, **call
            )
        )
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_ring_of_processes(tmp_path: Path) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A forked child need not import torch again; it runs one thread, so no pool is missing there.
    how = "fork" if "fork" in torch.multiprocessing.get_all_start_methods() else "spawn"
    start_processes(ring_member, (port, str(tmp_path)), nprocs=RANKS, start_method=how)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for index, call in enumerate(RING_CALLS):
        tensors, call = ring_operands(call)
        out = torch.cat([part[index][0] for part in parts], dim=1)
        lse = torch.cat([part[index][1] for part in parts], dim=2)
        assert_close_to_oracle(out, *tensors, lse=lse, **call)


def test_a_ring_of_one_is_the_local_ring(tmp_path: Path) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        q, k, v = operands(dtype=F32)
        out = windows_flash_attention_wrapper(q, k, v, group=dist.group.WORLD)
        assert isinstance(out, Tensor)
        assert_close_to_oracle(out, q, k, v)
        with pytest.raises(RuntimeError, match="query must be without a gradient where a group"):
            windows_flash_attention_wrapper(q.requires_grad_(), k, v, group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="method must be ring where a group is given"):
            windows_flash_attention_wrapper(q, k, v, group=dist.group.WORLD, method="chunked")
    finally:
        dist.destroy_process_group()


def test_blocks_that_nobody_sees_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_attn.backends import _ring

    pairs = 0
    real = _ring._partial

    def spy(query: Tensor, key: Tensor, *rest: Any) -> Any:
        nonlocal pairs
        pairs += query.shape[1] * key.shape[1]
        return real(query, key, *rest)

    monkeypatch.setattr(_ring, "_partial", spy)
    q, k, v = operands(seqlen_q=256, seqlen_k=256, heads_q=1, head_dim=8, dtype=F32)
    options: dict[str, Any] = {"method": "ring", "max_elements": 16 * 16}
    for call, share in (({}, 1.0), ({"is_causal": True}, 0.54), ({"window": (16, 16)}, 0.26)):
        pairs = 0
        windows_flash_attention_wrapper(q, k, v, **options, **call)
        assert pairs / 256**2 <= share, (call, pairs / 256**2)
    pairs = 0
    windows_flash_attention_wrapper(q, k, v, k_lens=torch.tensor([32]), **options)
    assert pairs == 256 * 32


def test_infinite_scores_stay_visible() -> None:
    q, k, v = operands(dtype=F32)
    k[0, 5] = math.inf
    for method in ("chunked", "ring"):
        out = windows_flash_attention_wrapper(q, k, v, method=method, max_elements=2 * 25)
        assert isinstance(out, Tensor) and not out.isfinite().all()
