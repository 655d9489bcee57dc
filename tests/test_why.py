# SPDX-License-Identifier: Apache-2.0
"""test_why.py - `why` answers with the selection's own choice and tells every refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from wan_attn import config
from wan_attn.__main__ import main
from wan_attn.backends import REGISTRY
from wan_attn.cli import why
from wan_attn.doctor import rope as rope_facts
from wan_attn.native import backward, op, rope
from wan_attn.native.kernels import backward_kernels
from wan_attn.request import Request
from wan_attn.selection.choose import order, select

CALL = ["why", "--shape", "1x27280x24x128", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("default_settings")


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*CALL, *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def printed(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main([*CALL, *argv]) == 0
    return capsys.readouterr().out


def request(**changes: Any) -> Request:
    plain: dict[str, Any] = {
        "batch": 1,
        "seqlen_q": 27280,
        "seqlen_k": 27280,
        "num_heads_q": 24,
        "num_heads_k": 24,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "query_dtype": torch.bfloat16,
        "key_dtype": torch.bfloat16,
        "device": torch.device("cpu"),
    }
    return Request(**{**plain, **changes})


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ([], {}),
        (
            ["--dtype", "fp16"],
            {"dtype": torch.float16, "query_dtype": torch.float16, "key_dtype": torch.float16},
        ),
        (["--qk-dtype", "float32"], {"query_dtype": torch.float32, "key_dtype": torch.float32}),
        (["--lk", "512"], {"seqlen_k": 512}),
        (["--kv-heads", "8"], {"num_heads_k": 8}),
        (["--causal"], {"is_causal": True}),
        (["--window", "5,0"], {"window": (5, 0)}),
        (["--window=-1,0"], {"window": (-1, 0)}),
        (["--q-lens", "--k-lens"], {"has_q_lens": True, "has_k_lens": True}),
        (["--grad"], {"needs_grad": True}),
        (["--lse"], {"return_lse": True}),
        (["--device", "cuda:3"], {"device": torch.device("cuda:3")}),
    ],
)
def test_the_answer_is_that_of_the_selection(
    argv: list[str], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def explain(request: Request, *_: Any) -> dict[str, str]:
        asked.append(request)
        return {"backend": "x"}

    monkeypatch.setattr(why, "explain", explain)
    monkeypatch.setattr(why, "render", lambda _: "")
    assert main([*CALL, *argv]) == 0
    assert asked == [request(**changes)]


def test_everything_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys)
    choice = select(request(), config.current())
    assert (found["backend"], found["kernel"]) == (choice.backend, choice.kernel_name)
    names = [row["name"] for row in found["backends"]]
    asked = [row["name"] for row in found["backends"] if row["asked"]]
    assert sorted(names) == sorted(REGISTRY)
    assert tuple(asked) == order(request(), config.current()) and names[: len(asked)] == asked
    told = {row["name"]: row["reason"] for row in found["backends"]}
    for name, reason in choice.refusals:
        assert told[name] == reason
    assert told[choice.backend] is None
    assert [row["chosen"] for row in found["backends"]].count(True) == 1
    rows = {row["name"]: row["reason"] for row in found["kernels"]}
    assert list(rows) == [kernel.name for kernel in op.kernels()]
    if op.binding() == "torch":
        assert all(str(reason).startswith("the native library is not") for reason in rows.values())
        return
    for kernel in op.kernels():
        said = op.why_not(request(), kernel.index)
        assert rows[kernel.name] == (
            None if said is None else said.removeprefix(f"{kernel.name}: ")
        )


def test_the_rows_of_gradients_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "gradients" not in printed(capsys, [])
    found = answer(capsys, "--grad")
    wants = request(needs_grad=True)
    if found["backend"] != "sdpa":
        assert found["gradient"] is None
        return
    assert found["gradient"] == backward.chosen(wants)
    told = {row["name"]: row["reason"] for row in found["gradient_kernels"]}
    assert list(told) == [kernel.name for kernel in backward_kernels()]
    assert told[found["gradient"]] is None
    text = printed(capsys, ["--grad"])
    assert f", gradients by {found['gradient']}" in text and "kernels of gradients" in text
    assert "sdpa_backward_sm80_d64" not in text, "those of other devices are counted"


def test_a_forced_backend_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "torch")
    found = answer(capsys)
    assert found["backend"] == "torch"
    assert found["settings"]["forced_by"] == "USE_ATTENTION_BACKEND=torch"


def test_the_text_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CALL, "--qk-dtype", "fp32", "--k-lens", "--causal", "--window", "3,4"]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    assert text.isascii()
    assert "choice" in text and "causal, k_lens, window 3,4" in text
    for name in [*REGISTRY, *(k.name for k in op.kernels() if k.device == "cpu")]:
        assert name in text
    others = sum(k.device != "cpu" for k in op.kernels())
    assert not others or f"and {others} for other devices" in text


def test_a_gpu_call_can_be_asked_about_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.cuda.is_initialized()
    code = main(["why", "--shape", "a14b-720p", "--device", "cuda:0", "--json"])
    assert code in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["call"]["device"] == "cuda:0"
    assert all(row["reason"] or row["chosen"] or row["reason"] is None for row in found["backends"])
    if not torch.cuda.is_available():
        assert torch.cuda.is_initialized() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --shape"),
        (["--shape", "12"], "argument --shape: must be BxLxHxD"),
        (["--shape", "0x1x1x1"], "batch must be at least 1, got 0"),
        (["--shape", "1x8x6x64", "--kv-heads", "4"], "num_heads_k must divide num_heads_q, got 4"),
        (["--shape", "1x8x6x64", "--lk", "-3"], "seqlen_k must be at least 0, got -3"),
        (["--shape", "1x8x6x64", "--lk", "x"], "argument --lk: invalid int value: 'x'"),
        (
            ["--shape", "1x8x6x64", "--dtype", "fp8"],
            "argument --dtype: must be one of bf16, fp16, fp32, got 'fp8'",
        ),
        (
            ["--shape", "1x8x6x64", "--qk-dtype", "i8"],
            "argument --qk-dtype: must be one of bf16, fp16, fp32, got 'i8'",
        ),
        (
            ["--shape", "1x8x6x64", "--window", "3"],
            "must be two integers L,R (-1: no bound), got '3'",
        ),
        (["--shape", "1x8x6x64", "--window", "3,x"], "must be two integers L,R"),
        (["--shape", "1x8x6x64", "--window=-2,3"], "must not be below -1, got '-2,3'"),
        (["--shape", "1x8x6x64", "--device", "tpu"], "must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--shape", "1x8x6x64", "--device", "mps"], "must be cpu, cuda or cuda:N, got 'mps'"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["why", *argv])
    except SystemExit as end:
        code = end.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("usage: wan-attn why ") and "\nwan-attn why: error: " in err


def test_an_impossible_variable_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "best")
    assert main(CALL) == 2
    err = capsys.readouterr().err
    assert "USE_ATTENTION_BACKEND must be one of auto, sdpa" in err and "'best'" in err


def test_what_norms_and_rotates_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    found = answer(capsys)["rope"]
    assert found["kernel"] == rope.chosen(torch.device("cpu")) is not None
    rows = {row["name"]: row["reason"] for row in found["kernels"]}
    assert tuple(rows) == rope.kernels() and rows["rms_norm_rope_ref"] is None
    assert main(CALL) == 0
    assert f"{found['kernel']}, one pass" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setenv("WAN_ATTN_ROPE", "off")
    found = answer(capsys)["rope"]
    assert (found["kernel"], found["reason"]) == (None, "WAN_ATTN_ROPE=off")
    assert main(CALL) == 0
    assert "the model's own steps: WAN_ATTN_ROPE=off" in capsys.readouterr().out


def test_a_device_without_a_rope_kernel_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = rope_facts.facts("mps", config.Settings())
    assert found["kernel"] is None and "mps" in found["reason"]


def test_8_bit_scores(
    native: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which row would compute them, whether they are asked for, and why there is none."""
    for mode in ("exact", "balanced"):
        monkeypatch.setenv("WAN_ATTN_PRECISION", mode)
        found = answer(capsys)["precision"]
        row = next(k for k in op.kernels() if k.is_lossy and op.why_not(request(), k.index) is None)
        assert (found["mode"], found["kernel"], found["reason"]) == (mode, row.name, None)
        assert main(CALL) == 0
        text = " ".join(capsys.readouterr().out.split())
        told = {
            "exact": f"nowhere (WAN_ATTN_PRECISION=exact); if asked for: {row.name}",
            "balanced": f"{row.name}, lossy, in self-attention, but for the first and last steps",
        }
        assert f"8-bit scores {told[mode]}" in text
    found = answer(capsys, "--grad")["precision"]
    assert found["kernel"] is None and "a gradient is wanted" in found["reason"]


def test_blocks_left_out(
    native: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which row would leave them out, and why a call is dense."""
    long = ["--shape", "1x12000x2x64"]
    for mode, told in (("off", "if asked for: "), ("sparse", ""), ("near_exact", "")):
        monkeypatch.setenv("WAN_ATTN_SPARSE", mode)
        found = answer(capsys, *long)["sparse"]
        row = next(k for k in op.kernels() if k.name == found["kernel"])
        assert found["mode"] == mode and row.takes_block_lists and found["reason"] is None
        assert main([*CALL, *long]) == 0
        assert f"{told}{row.name}" in " ".join(capsys.readouterr().out.split())
    for asked, reason in (
        (["--shape", "1x11999x2x64"], "it has 11999 tokens, fewer than 12000"),
        (["--shape", "1x12000:512x2x64"], "self-attention alone leaves blocks out"),
        ([*long, "--causal"], "a causal mask or a window"),
        ([*long, "--grad"], "a gradient is wanted"),
    ):
        found = answer(capsys, *asked)["sparse"]
        assert found["kernel"] is None and reason in found["reason"]
        assert main([*CALL, *asked]) == 0
        assert f"blocks left out dense: {found['reason']}" in " ".join(
            capsys.readouterr().out.split()
        )
