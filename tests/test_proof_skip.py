# SPDX-License-Identifier: Apache-2.0
"""test_proof_skip.py - what the proof and the first call know of a skip_threshold: right answers of
every kernel on the CPU pass, and each way to be wrong is found, by the words for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calls
from cuda_mock import prove
from cuda_mock.gpu import CARDS, Gpu
from emu.build import compiler
from wan_attn.backends import native
from wan_attn.native import bindings, op
from wan_attn.request import BLOCK, Blocks
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck import first_call, proof_calls, skip_calls
from wan_attn.selfcheck.reference import MASKS, UNIT
from wan_attn.selfcheck.skip_calls import CALLS, SkipCall

pytestmark = pytest.mark.usefixtures("native")

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
ROWS = [row for row in calls.rows() if row is not None and row.takes_block_lists]
Fault = Callable[..., tuple[Tensor, Tensor]]


def attend(*given: Any, kernel: int = -1) -> tuple[Tensor, Tensor]:
    query, key, value, q_lens, k_lens, mask, blocks, guard = given
    is_causal, (left, right) = MASKS[mask]
    return bindings.ctypes_sdpa(
        query,
        key,
        value,
        q_lens,
        k_lens,
        is_causal=is_causal,
        window_left=left,
        window_right=right,
        return_lse=True,
        guard=guard,
        kernel=kernel,
        **blocks._asdict(),
    )


@pytest.mark.parametrize("row", ROWS, ids=calls.row_id)
def test_every_kernel_is_right(row: op.KernelInfo) -> None:
    for dtype in row.dtypes:
        for head_dim in (64, 128):
            found = skip_calls.wrong(
                lambda *given: attend(*given, kernel=row.index), CPU, dtype, head_dim
            )
            assert found is None, (dtype, head_dim)


# --- kernels that are wrong -----------------------------------------------------------------------


def threshold(value: float) -> Fault:
    """As if it had another one."""

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        *operands, mask, blocks, guard = given
        return attend(*operands, mask, blocks._replace(skip_threshold=value), guard)

    return run


def told(factor: float, least: float = 0.0) -> Fault:
    """lost_mass is so many times what it should be."""

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        *rest, guard = given
        own = torch.zeros_like(guard)
        answer = attend(*rest, own)
        share = guard[4:].view(F32)
        share.copy_(torch.maximum(share, factor * own[4:].view(F32) + least))
        return answer

    return run


def lowers(*given: Any) -> tuple[Tensor, Tensor]:
    """lost_mass is that of the last call."""
    given[-1].zero_()
    return attend(*given)


def without(block: int, rows: slice = slice(None), head: int = 1) -> Fault:
    """Rows of a head do not see a block, which is counted as lost."""

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        query, key, value, q_lens, k_lens, mask, blocks, guard = given
        out, lse = attend(*given)
        hidden = key.clone()
        hidden[:, block * BLOCK : (block + 1) * BLOCK, :, 0] = -400.0
        less, less_lse = attend(query, hidden, value, q_lens, k_lens, mask, blocks, guard)
        out[:, rows, head], lse[:, head, rows] = less[:, rows, head], less_lse[:, head, rows]
        return out, lse

    return run


def weighs_without_values(*given: Any) -> tuple[Tensor, Tensor]:
    """What is left out still is in the sum that out is divided by, and in lse."""
    *rest, blocks, guard = given
    out, lse = attend(*given)
    _, whole_lse = attend(*rest, blocks._replace(skip_threshold=0.0), torch.zeros_like(guard))
    factor = torch.exp(lse - whole_lse).nan_to_num(0.0).transpose(1, 2)[..., None]
    return (out * factor).to(out.dtype), whole_lse


def lse_of_all(*given: Any) -> tuple[Tensor, Tensor]:
    *rest, blocks, guard = given
    _, lse = attend(*rest, blocks._replace(skip_threshold=0.0), torch.zeros_like(guard))
    return attend(*given)[0], lse


def nan_is_zero(*given: Any) -> tuple[Tensor, Tensor]:
    """A block is left out whatever its values are."""
    query, key, value, *rest = given
    return attend(query, key, value.nan_to_num(0.0), *rest)


def of_parts(*given: Any) -> tuple[Tensor, Tensor]:
    """Under a mask a block is left out of which a row sees a part."""
    out, lse = attend(*given)
    q_lens, k_lens, mask = given[3:6]
    for b, (used_q, used_k) in enumerate(zip(q_lens.tolist(), k_lens.tolist(), strict=True)):
        for row in range(used_q if mask == "causal" else 0):
            last = row + used_k - used_q
            if last % BLOCK != BLOCK - 1:
                out[b, row, 0, last // BLOCK] = 0.0
    return out, lse


FAULTS: dict[str, tuple[Fault, str]] = {
    "nothing is left out": (threshold(0.0), "blocks that weigh next to nothing were not left out"),
    "hardly anything is left out": (threshold(1e-7), "were not left out"),
    "a threshold of 0.9": (threshold(0.9), "that weighs"),
    "a threshold of 0.2": (threshold(0.2), "that weighs"),
    "it tells nothing": (told(0.0), "lost_mass is 0 where"),
    "it tells a little too little": (told(0.998), "lost_mass is"),
    "it tells too much": (told(1.004), "lost_mass is"),
    "it tells that all was lost": (told(1.0, 1.0), "lost_mass is 1"),
    "it forgets what was lost before": (lowers, "lost_mass was 0.875 before, and is"),
    "a block that matters is lost": (without(5), "lacks block 5, that weighs"),
    "16 rows lose one": (without(6, slice(64, 80)), "lacks block 6, that weighs"),
    "its weights stay in the sum": (weighs_without_values, "out["),
    "lse has what was left out": (lse_of_all, "lse["),
    "a NaN is lost": (nan_is_zero, "a block with a NaN among its values was left out"),
    "a block that is seen in part": (of_parts, "of which it sees a part"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_found(name: str) -> None:
    """In float32, whose kernels leave most out, and in bfloat16, whose bounds are wide."""
    fault, words = FAULTS[name]
    for dtype in (F32, BF16):
        found = skip_calls.wrong(fault, CPU, dtype, 64)
        assert found is not None and words in found, (dtype, found)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_every_call_leaves_something_out(call: SkipCall, dtype: torch.dtype) -> None:
    """And each one finds a certificate that is too small."""
    for head_dim in (64, 128):
        for factor, is_right in ((1.0, True), (0.998, False)):
            found = skip_calls.wrong_in(told(factor), call, CPU, dtype, head_dim)
            assert (found is None) == is_right, found
        known = skip_calls._known(call, head_dim)
        assert all(torch.equal(x.to(dtype).float().nan_to_num(7.0), x.nan_to_num(7.0))
                   for x in known.operands)  # fmt: skip


# --- where they are asked -------------------------------------------------------------------------


def test_the_first_call_asks_it(monkeypatch: pytest.MonkeyPatch, binding: str) -> None:
    if binding == "torch":
        pytest.skip("no kernel of ours runs")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    native._require_self_check(CPU, BF16, 64, has_lists=True)
    first_call.forget()
    right: Any = native._answer

    def answer(
        *given: Any, blocks: Blocks = DENSE, guard: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        *operands, blocks = given if len(given) > 6 else (*given, blocks)
        told: Any = {} if guard is None else {"guard": guard}
        out, lse = right(*operands, blocks._replace(skip_threshold=0.0), **told)
        return out, lse

    monkeypatch.setattr(native, "_answer", answer)
    with pytest.raises(RuntimeError, match="skip_threshold: blocks that weigh next to nothing"):
        native._require_self_check(CPU, BF16, 64, has_lists=True)
    first_call.forget()
    native._require_self_check(CPU, BF16, 64)
    first_call.forget()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")
@pytest.mark.parametrize("fault", ("", "skips too much", "tells too little"))
def test_the_proof_asks_it(fault: str, tmp_path: Path) -> None:
    """Through the C ABI and the mock driver, of rows for lists alone."""
    gpu: Any = Gpu(tmp_path, CARDS[80])
    names = ("sdpa_sm80_d64", "sdpa_sm80_listed_d64")
    dense, listed = (next(row for row in op.kernels() if row.name == name) for name in names)
    faults = {f"{row.name[:-4]}_bf16_d64": fault for row in (dense, listed) if fault}
    card = prove.MockCard(0, gpu, faults)
    assert proof_calls.wrong(card, dense, BF16) is None
    found = proof_calls.wrong(card, listed, BF16)
    if not fault:
        assert found is None
        return
    words = {"skips too much": "that weighs", "tells too little": "lost_mass is"}[fault]
    assert found is not None and found.startswith("skip_threshold: ") and words in found
