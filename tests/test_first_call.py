# SPDX-License-Identifier: Apache-2.0
"""test_first_call.py - a kernel that is wrong on a card is found at its first call, and left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import wan_attn
from emu.rows import tiles, tiles_sm90
from wan_attn import config, log
from wan_attn.backends import native
from wan_attn.cuda.rows import Tile, TileSm90
from wan_attn.request import Blocks, Call
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck import first_call
from wan_attn.selfcheck.reference import UNIT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    first_call.forget()
    log.forget()
    yield
    first_call.forget()


def right(query: Tensor, key: Tensor, value: Tensor, *lens: Any) -> tuple[Tensor, Tensor]:
    q_lens, k_lens, is_causal = lens
    out, lse = torch.ops.wan_attn.sdpa(
        query, key, value, q_lens, k_lens, is_causal=is_causal, return_lse=True
    )
    return out, lse


def reads_padding(query: Tensor, key: Tensor, value: Tensor, *lens: Any) -> tuple[Tensor, Tensor]:
    out, lse = right(query, key, value, lens[0], None, lens[2])
    return out, lse


def one_element(query: Tensor, key: Tensor, value: Tensor, *lens: Any) -> tuple[Tensor, Tensor]:
    out, lse = right(query, key, value, *lens)
    out[1, 17, 1, 5] *= 1.25
    return out, lse


def lse_in_base_2(query: Tensor, key: Tensor, value: Tensor, *lens: Any) -> tuple[Tensor, Tensor]:
    out, lse = right(query, key, value, *lens)
    return out, lse * 1.4427


def nothing_written(query: Tensor, key: Tensor, value: Tensor, *lens: Any) -> tuple[Tensor, Tensor]:
    out, lse = right(query, key, value, *lens)
    return torch.full_like(out, float("nan")), lse


@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_what_is_right_passes(dtype: torch.dtype, head_dim: int) -> None:
    assert first_call.wrong(right, CPU, dtype, head_dim) is None


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_the_programs_defaults_do_not_matter(device: str) -> None:
    """With cuda as default device the check would fail, and no kernel of ours ever run."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):
            assert first_call.wrong(right, CPU, torch.bfloat16, 64) is None
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("run", (reads_padding, one_element, lse_in_base_2, nothing_written))
def test_what_is_wrong_is_said(run: first_call.Run) -> None:
    found = first_call.wrong(run, CPU, torch.bfloat16, 64)
    assert found is not None and "instead of" in found
    lengths = f"seqlen_q={first_call.SEQLEN_Q} seqlen_k={first_call.SEQLEN_K}"
    assert f"{lengths} head_dim=64" in found


def test_rings_go_round_and_clusters_have_rows() -> None:
    """Two buffers, two blocks of a cluster, a loop for clean tiles: all of a kernel is run."""
    every: list[Tile | TileSm90] = [*tiles(), *tiles_sm90()]
    assert {tile.head_dim for tile in every} == {64, 80, 128, 256}
    for tile in every:
        assert -(-first_call.SEQLEN_K // tile.block_n) >= 5, tile.name
        assert first_call.SEQLEN_Q > tile.block_m, tile.name


def test_each_kind_of_call_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def count(*call: Any) -> tuple[Tensor, Tensor]:
        asked.append(call)
        return right(*call)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(3):
        for head_dim in (64, 128):
            assert first_call.verdict(count, row, CPU, torch.bfloat16, head_dim) is None
    assert len(asked) == 2 * len(first_call.MASKED)


@pytest.mark.parametrize("is_final", [True, False])
def test_what_was_raised_is_kept_if_it_is_final(
    is_final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def raises(*call: Any) -> tuple[Tensor, Tensor]:
        asked.append(call)
        raise RuntimeError("wan_attn: no machine code for this device")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no machine code"):
            first_call.verdict(raises, row, CPU, torch.bfloat16, 64, lambda error: is_final)
    assert len(asked) == (1 if is_final else 3)


@pytest.mark.parametrize(
    ("words", "is_final"),
    [
        ("no machine code for sdpa_sm80", True),
        ("CUDA driver error 2 (CUDA_ERROR_OUT_OF_MEMORY): out of memory, when loading", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_is_final(words: str, is_final: bool) -> None:
    assert native._is_final(RuntimeError(words)) == is_final


@pytest.mark.parametrize("gets_well", [True, False])
def test_no_memory_for_a_module_is_tried_once_more(
    gets_well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading needs memory of the driver's, which torch's cache may hold."""
    done: list[str] = []

    def op(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        done.append("call")
        if gets_well and "empty" in done:
            return torch.zeros(1), torch.zeros(1)
        raise RuntimeError("wan_attn: CUDA driver error 2: out of memory, when loading sdpa_sm80")

    query = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(native, "_op", op)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    if gets_well:
        native._call(query)  # type: ignore[arg-type]
    else:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="when loading sdpa_sm80"):
            native._call(query)  # type: ignore[arg-type]
    assert done == ["call", "empty", "call"]


def test_a_capture_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert first_call.verdict(nothing_written, row, CPU, torch.bfloat16, 64) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert first_call.verdict(nothing_written, row, CPU, torch.bfloat16, 64) is not None


def row() -> str:
    return "sdpa_row"


def test_lossy_kernels_have_a_verdict_of_their_own(
    binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within their own bounds, which an error of 10 % is not; and exact calls are not concerned."""
    if binding == "torch":
        pytest.skip("no kernel of ours runs")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    real = native._op

    def wrong(*operands: Any, **options: Any) -> Any:
        out, lse = real(*operands, **options)
        return out * (1.1 if options.get("precision") else 1.0), lse

    for is_lossy in (True, False):
        native._require_self_check(CPU, torch.bfloat16, 64, is_lossy)
    first_call.forget()
    monkeypatch.setattr(native, "_op", wrong)
    native._require_self_check(CPU, torch.bfloat16, 64)
    with pytest.raises(RuntimeError, match="_qk8: out.* instead of"):
        native._require_self_check(CPU, torch.bfloat16, 64, is_lossy=True)
    first_call.forget()


def other_lists(blocks: Blocks, fault: str) -> Blocks:
    """What a kernel takes for its lists that reads them wrong."""
    counts, indices = blocks.block_counts, blocks.block_indices
    assert counts is not None and indices is not None
    if fault == "all":
        return DENSE
    if fault == "others are lost":
        return blocks._replace(pools_others=False)
    if fault == "another head's":
        return blocks._replace(block_counts=counts.roll(1, 1), block_indices=indices.roll(1, 1))
    return blocks._replace(block_counts=(counts - 1).clamp(min=0))  # the last one


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_kernels_for_lists_have_a_verdict_of_their_own(
    dtype: torch.dtype, binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right ones pass, with the means of the others too; each way to read lists wrong is found."""
    if binding == "torch":
        pytest.skip("no kernel of ours runs")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    native._require_self_check(CPU, dtype, 64, has_lists=True)
    for fault in ("all", "others are lost", "another head's", "the last is lost"):

        def answer(
            q: Tensor, k: Tensor, v: Tensor, ql: Any, kl: Tensor, causal: bool, blocks: Blocks,
            fault: str = fault,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            return native._answer(q, k, v, ql, kl, causal, other_lists(blocks, fault))

        assert first_call.wrong(answer, CPU, dtype, 64, has_lists=True), fault
    first_call.forget()
    native._require_self_check(CPU, dtype, 64)
    monkeypatch.setattr(native, "_answer", lambda *_: nothing_written(*_[:6]))
    with pytest.raises(RuntimeError, match="is wrong on cpu"):
        native._require_self_check(CPU, dtype, 64, has_lists=True)
    first_call.forget()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_lists_of_8_bit_scores_have_another(
    dtype: torch.dtype, binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bounds of both, which lists that are read wrong are not."""
    if binding == "torch":
        pytest.skip("no kernel of ours runs")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    native._require_self_check(CPU, dtype, 64, is_lossy=True, has_lists=True)
    kind: dict[str, Any] = {"is_lossy": True, "has_lists": True}
    for fault in ("all", "another head's", "the last is lost"):

        def answer(*x: Any, fault: str = fault) -> tuple[Tensor, Tensor]:
            given = {"is_causal": x[5], "blocks": other_lists(x[6], fault)}
            return native._answer_in_8_bits(*x[:5], **given)

        assert first_call.wrong(answer, CPU, dtype, 64, **kind), fault
    first_call.forget()
    real = native._op

    def wrong(*operands: Any, **options: Any) -> Any:
        out, lse = real(*operands, **options)
        both = options.get("precision") and options["block_counts"] is not None
        return out * (1.1 if both else 1.0), lse

    monkeypatch.setattr(native, "_op", wrong)
    native._require_self_check(CPU, dtype, 64, is_lossy=True)
    native._require_self_check(CPU, dtype, 64, has_lists=True)
    with pytest.raises(RuntimeError, match="_qk8: out.* instead of"):
        native._require_self_check(CPU, dtype, 64, **kind)
    first_call.forget()


def test_which_calls_need_which_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    here = SimpleNamespace(is_cuda=True, device=CPU, shape=(1, 1, 1, 64), dtype=torch.float16)
    here.requires_grad = False
    monkeypatch.setattr(native, "_require_self_check", lambda *x: asked.append(x[3:]))
    monkeypatch.setattr(native, "_call", lambda *_, **__: (None, None))
    for options in (
        *({}, {"precision": 1}, {"block_counts": here, "block_indices": here}),
        *({"skip_threshold": 0.05}, {"skip_threshold": 0.0}),
    ):
        native.run(here, here, here, Call(), **options)  # type: ignore[arg-type]
    assert asked == [(False, False), (True, False), (False, True), (False, True), (False, False)]


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_ATTN_SELF_CHECK", "0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert first_call.verdict(nothing_written, row, CPU, torch.bfloat16, 64) is not None
    config.refresh()
    try:
        assert first_call.verdict(nothing_written, row, CPU, torch.bfloat16, 64) is None
    finally:
        monkeypatch.undo()
        config.refresh()


def test_the_next_backend_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU: the check is made before the kernel's first call, and says what was wrong."""
    plain = native.run

    def checked(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Any:
        native._require_self_check(query.device, value.dtype, query.shape[3])
        return plain(query, key, value, call)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(native, "run", checked)
    monkeypatch.setattr(native, "_op", lambda *x, **y: nothing_written(*x, y["is_causal"]))
    monkeypatch.setattr(native, "last_kernel", row)
    config.forget()
    query, key, value = torch.randn(3, 1, 40, 2, 64).to(torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="wan_attn"):
        out: Any = wan_attn.sdpa(query, key, value)
    config.forget()
    assert out.isfinite().all()
    said = caplog.text
    assert (
        "the kernel for this call is wrong on cpu: sdpa_row: out" in said
        and "is nan instead" in said
    )
    assert "Using PyTorch SDPA" in said
