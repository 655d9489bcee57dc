# SPDX-License-Identifier: Apache-2.0
"""test_proof.py - no CUDA kernel runs in a user's process before it was right in another: real
child processes on the mock GPU, whose kernels are right, wrong or deadly; and what they try."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from cuda_mock import prove
from cuda_mock.backward import BackwardGpu
from cuda_mock.gpu import CARDS
from cuda_mock.user import (  # noqa: F401 - some are fixtures
    BACKWARD_ROWS,
    BF16,
    CUDA,
    F16,
    LISTED_ROWS,
    QK8_ROWS,
    ROPE_ROWS,
    ROWS,
    Machine,
    machine_fixture,
    quick_fixture,
    said,
    spoken_fixture,
    user_calls,
)
from emu.build import compiler
from wan_attn.cuda.rows import kernels_for
from wan_attn.native import bindings, cuda_driver, kernels, library
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck import (
    backward_calls,
    child,
    list_reference,
    proof,
    proof_calls,
    proof_child,
    rope_calls,
    skip_calls,
    verdicts,
)
from wan_attn.selfcheck.proof_calls import Known, ProofCall
from wan_attn.selfcheck.reference import MASKS, Case, make_inputs
from wan_attn.selfcheck.verdicts import FAILED, PASSED, UNTRIED, Verdict

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

FAULTS = {
    "sdpa_sm80_f16_d64": "illegal address",
    "sdpa_sm80_bf16_d64": "wrong numbers",
    "sdpa_sm80_f16_d80": "launch timeout",
    "sdpa_sm80_bf16_d80": "hang",
    "sdpa_sm80_f16_d128": "context lost",
    "sdpa_backward_sm80_dkdv_bf16_d64": "wrong numbers",
    "sdpa_backward_sm80_dq_f16_d80": "illegal address",
    "sdpa_backward_sm80_dq_bf16_d128": "other bits",
    "sdpa_sm80_d256": "absent",  # it takes longest, and has nothing to add
}
WORDS = {
    "sdpa_sm80_d64/fp16": "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)",
    "sdpa_sm80_d64/bf16": "ragged: out[1, 17, 1, 5] is",
    "sdpa_sm80_d80/fp16": "CUDA_ERROR_LAUNCH_TIMEOUT",
    "sdpa_sm80_d80/bf16": "hung: no answer within",
    "sdpa_sm80_d128/fp16": "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "sdpa_backward_sm80_d64/bf16": "ragged: grad_key[1, 17, 0, 5] is",
    "sdpa_backward_sm80_d80/fp16": "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was",
    "sdpa_backward_sm80_d128/bf16": "ragged: the same call gave other bits the second time",
}


def test_faults_end_a_child_and_not_the_users_process(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, spoken: pytest.LogCaptureFixture
) -> None:
    machine.faults = FAULTS
    monkeypatch.setattr(proof, "LIMITS", replace(machine.limits, row=25))
    # float16 of d64 is deadly: torch computes, and the call is right.
    assert not user_calls(machine, monkeypatch, 64, F16)
    verdict = verdicts.read(verdicts.key_of(0))  # type: ignore[arg-type]
    tried = [*ROWS[:6], *LISTED_ROWS, *QK8_ROWS, *BACKWARD_ROWS, *ROPE_ROWS]
    assert verdict is not None and list(verdict.rows) == tried
    for name, row in verdict.rows.items():
        assert row.state == (FAILED if name in WORDS else PASSED), name
        assert WORDS.get(name, "") in row.said and row.at > 0
    assert len(machine.children) == 6, "five rows each ended theirs"
    text = said(spoken)
    assert "in a process of its own, once for this driver, torch and build: about 10 s" in text
    assert "22 of 30 CUDA kernels are right on NVIDIA A100" in text
    for name, words in WORDS.items():
        assert f"{name} is not used on NVIDIA A100-SXM4-80GB: " in text and words in text
    # The next start tries nothing again, and each row is used or left as the verdict says.
    machine.restart()
    for head_dim in (64, 80, 128):
        for dtype in (F16, BF16):
            name = f"sdpa_sm80_d{head_dim}/{'fp16' if dtype == F16 else 'bf16'}"
            ours = user_calls(machine, monkeypatch, head_dim, dtype)
            assert ours == (name not in WORDS), name
    assert machine.children == []


# --- what is proven ---------------------------------------------------------------------------


def unknown(row: Any, dtype: torch.dtype, call: ProofCall, case: Case) -> Known:
    """A call whose result nobody asks for."""
    if not row.is_for_lists:
        return Known(make_inputs(case), None)  # type: ignore[arg-type]
    mask = list_reference.listed(case, call.density)
    blocks = list_reference.as_blocks(mask, call.pools(row), torch.device("cpu"))
    return Known(make_inputs(case), None, blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", CARDS)
def test_every_tile_and_every_pass_that_a_card_can_run_is_tried(
    arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    """With rings that go round, and both blocks of a cluster at work: see test_first_call.py."""
    gpu = BackwardGpu(tmp_path, CARDS[arch])
    monkeypatch.setattr(library, "load", lambda: gpu.lib)
    monkeypatch.setattr(library, "lib", lambda: gpu.lib)
    monkeypatch.setattr(proof_calls, "_known", unknown)
    monkeypatch.setattr(proof_calls.Known, "difference", lambda *_: None)
    for calls in (proof_calls, backward_calls):
        monkeypatch.setattr(calls, "difference", lambda *_: None)
    monkeypatch.setattr(skip_calls, "judged", lambda *_: None)
    card = prove.MockCard(0, gpu, {})
    monkeypatch.setattr(card, "_compute", lambda *_: None)
    monkeypatch.setattr(card, "_compute_gradients", lambda *_: None)
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    for row in card.rows():
        for dtype in row.dtypes:
            assert proof_calls.wrong(card, row, dtype) is None
    for row in card.backward_rows():
        for dtype in row.dtypes:
            assert backward_calls.wrong(card, row, dtype) is None
    for row in card.rope_rows():
        for dtype in row.dtypes:
            assert rope_calls.wrong(card, row, dtype) is None
    tried = {name for name, _ in gpu.asked}
    missing = {kernel.key for kernel in kernels_for(arch)} - tried
    is_half_rate = "GeForce" in CARDS[arch].name
    # Such scales are for Turing and for sums in float16 alone.
    allowed = {"wan_attn_find_scale"} if not is_half_rate else set()
    allowed |= {name for name in missing if "_pv16_" in name and not is_half_rate}
    assert missing <= allowed


def test_every_kind_of_call_is_tried() -> None:
    calls = proof_calls.CALLS
    for each in (calls, backward_calls.CALLS):
        assert {call.mask for call in each} == set(MASKS)
        for kind in ("qk_is_f32", "is_unaligned", "lens_on_device"):
            assert any(getattr(call, kind) for call in each)
    assert any(call.pools_others for call in calls)
    assert any(call.seqlen_q <= 256 and call.seqlen_k > 4096 for call in calls), "split and merged"
    for call in calls:
        case = call.case(64)
        (q, k, _), dtype = make_inputs(case), BF16
        assert q.shape[2] == 2 * k.shape[2] and k[1, case.k_lens[1] :].isnan().all()
        placed = call.place(q, dtype, is_value=False, device=torch.device("cpu"))
        assert torch.equal(placed.nan_to_num(), q.to(placed.dtype).nan_to_num())
        assert (placed.data_ptr() % 16 != 0) == call.is_unaligned


def test_rows_of_8_bit_scores_get_lists_alone() -> None:
    """All calls, without pools_others: none is left out for it."""
    rows = {row.name: row for row in kernels.kernels()}
    for name, pools in (
        ("sdpa_sm80_listed_d64", True),
        ("sdpa_sm80_qk8_listed_d64", False),
        ("sdpa_sm80_qk8_d64", False),
    ):
        assert any(call.pools(rows[name]) for call in proof_calls.CALLS) == pools
        for call in proof_calls.CALLS:
            asked = proof_child.request(rows[name], BF16, call, torch.device("cuda"))
            assert asked.has_block_lists == ("listed" in name)
            assert asked.pools_others == call.pools(rows[name])


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The child's program in this process, with two rows."""
    monkeypatch.setattr(cuda_driver, "_find_proof", proof.find_proof)
    monkeypatch.setattr(cuda_driver, "_path", None)
    # As the library was opened: without a proof to ask for.
    machine.gpu.configure(machine.gpu.driver._name)
    key = verdicts.key_of(0)
    assert isinstance(key, verdicts.Key)

    def tried(faults: dict[str, str], digest: str = key.digest) -> tuple[int, Verdict | None]:
        card = prove.MockCard(0, machine.gpu, faults)
        rows = [row for row in card.rows() if row.name == "sdpa_sm80_d64"]
        monkeypatch.setattr(card, "rows", lambda: rows)
        if not any(name.startswith("rms_norm_rope") for name in faults):
            monkeypatch.setattr(card, "rope_rows", list)
        if not any("backward" in name for name in faults):
            monkeypatch.setattr(card, "backward_rows", list)
        code = proof_child.main(["0", digest], lambda index: card)
        return code, verdicts.read(key)

    return tried


def test_what_a_child_finds(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, verdict = here({"sdpa_sm80_f16_d64": "other bits", "sdpa_sm80_bf16_d64": "wrong numbers"})
    assert code == 0 and list(verdict.rows) == ["sdpa_sm80_d64/fp16", "sdpa_sm80_d64/bf16"]
    half, bf16 = verdict.rows.values()
    assert half.state == bf16.state == FAILED
    assert "ragged: the same call gave other bits the second time" in half.said
    assert "ragged: out[1, 17, 1, 5] is" in bf16.said and "1 of " in bf16.said
    assert verdict.skipped == ["CUDA graphs: the mock GPU has none"]
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    lines = [json.loads(line[len(child.MARK) :]) for line in said]
    assert lines[0] == {"begin": "sdpa_sm80_d64/fp16"} and lines[-1] == {"end": True}
    here({})
    assert '"begin"' not in capsys.readouterr().out, "what has a verdict is not tried again"


def test_a_rope_row_that_is_wrong_is_found(here: Any) -> None:
    code, verdict = here({"rms_norm_rope_f16_sm75": "wrong numbers"})
    assert code == 0
    failed = verdict.rows["rms_norm_rope_sm75/fp16"]
    assert failed.state == FAILED and "norm and rotation: out[1, 7, 0, 5] is" in failed.said
    assert verdict.names(FAILED) == ["rms_norm_rope_sm75/fp16"]


def test_a_row_of_gradients_that_is_wrong_is_found(here: Any) -> None:
    code, verdict = here(
        {
            "sdpa_backward_sm80_dkdv_f16_d64": "wrong numbers",
            "sdpa_backward_sm80_dq_bf16_d80": "wrong numbers",
            "sdpa_backward_sm80_dkdv_bf16_d128": "other bits",
        }
    )
    words = {
        "sdpa_backward_sm80_d64/fp16": "ragged: grad_key[1, 17, 0, 5] is",
        "sdpa_backward_sm80_d80/bf16": "ragged: grad_query[1, 17, 1, 5] is",
        "sdpa_backward_sm80_d128/bf16": "ragged: the same call gave other bits the second time",
    }
    assert code == 0 and verdict.names(FAILED) == [*words]
    for name, text in words.items():
        assert text in verdict.rows[name].said
    assert {*BACKWARD_ROWS} < {*verdict.rows}


def test_a_guard_that_says_nothing_is_found(here: Any) -> None:
    code, verdict = here({"wan_attn_watch": "wrong numbers"})
    assert code == 0 and len(verdict.names(FAILED)) == 2
    for row in verdict.rows.values():
        assert "guarded: the guard says [0.0, 0, 0, 0] instead of [2.0, 0, 0, 0]" in row.said


def test_no_memory_is_nothing_against_a_row(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, verdict = here({"sdpa_sm80_bf16_d64": "out of memory"})
    assert code == 1
    assert [row.state for row in verdict.rows.values()] == [PASSED, UNTRIED]
    assert "out of memory" in capsys.readouterr().out.splitlines()[-1]


def test_a_child_that_sees_another_card_tries_nothing(
    here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, verdict = here({}, digest="of something else")
    assert code == 1 and verdict is None
    assert '{"trouble": "it sees ' in capsys.readouterr().out


class Captured:
    """A card whose graphs replay what was computed when they were captured, or do their work."""

    skipped: ClassVar[list[str]] = []

    def __init__(self, is_right: bool) -> None:
        self.is_right = is_right

    def device(self) -> torch.device:
        return torch.device("cpu")

    def why_not(self, *_: Any) -> None:
        return None

    def run(
        self,
        row: Any,
        operands: Any,
        q_lens: Any,
        k_lens: Any,
        case: Any,
        guard: Any = None,
        blocks: Any = DENSE,
    ) -> Any:
        is_causal, (left, right) = MASKS[case.mask]
        options: dict[str, Any] = {"is_causal": is_causal}
        options |= {"window_left": left, "window_right": right}
        options |= {"return_lse": True, "guard": guard, **blocks._asdict()}
        query, key, value = operands
        return bindings.ctypes_sdpa(query, key, value, q_lens, k_lens, **options)

    def captured(self, attend: Any) -> Any:
        first = attend()
        return attend if self.is_right else lambda: first


@pytest.mark.parametrize("is_right", (True, False))
@pytest.mark.parametrize(
    "name", ("sdpa_sm80_d64", "sdpa_sm80_listed_d64", "sdpa_sm80_qk8_listed_d64")
)
def test_a_graph_is_replayed_with_other_contents(name: str, is_right: bool) -> None:
    row = next(row for row in kernels.kernels() if row.name == name)
    found = proof_calls.wrong(Captured(is_right), row, BF16)  # type: ignore[arg-type]
    assert found is None if is_right else found is not None and found.startswith("graph: out[")
