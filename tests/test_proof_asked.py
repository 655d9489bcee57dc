# SPDX-License-Identifier: Apache-2.0
"""test_proof_asked.py - when a proof of the CUDA kernels is made, who is told what it found, and
which kernel a call gets then."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_attn
from cuda_mock import prove
from cuda_mock.gpu import CARDS
from cuda_mock.rope import RopeGpu
from cuda_mock.user import (  # noqa: F401 - some are fixtures
    ALL,
    BF16,
    CUDA,
    F16,
    Machine,
    machine_fixture,
    quick_fixture,
    spoken_fixture,
    user_calls,
)
from emu.build import compiler
from wan_attn import config, log
from wan_attn.native import cuda_driver, library
from wan_attn.selfcheck import proof, verdicts
from wan_attn.selfcheck.verdicts import FAILED, PASSED

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

# --- whether and how often it is asked --------------------------------------------------------


def test_a_question_makes_no_proof_and_a_call_does(quick: Any) -> None:
    machine = quick(ALL)
    not_yet = "sdpa_sm80_d64: has no proof on this card yet: `python -m wan_attn prove` makes it"
    assert not_yet in machine.select() and not machine.children
    card = prove.MockCard(0, machine.gpu, {})
    card._compute = lambda *_: None  # type: ignore[method-assign]
    query = torch.randn(1, 8, 1, 64).to(BF16)
    cuda_driver.ask_again()
    for _ in range(3):  # the raw op: straight to C
        machine.gpu.sdpa(query, query, query)
    assert len(machine.children) == 1
    assert machine.select() == "sdpa_sm80_d64"


def test_c_asks_once_for_each_row_and_dtype(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.keep(sdpa_sm80_d80__bf16=FAILED)
    asked = []

    def find_proof(*question: Any) -> int:
        asked.append(question)
        return proof.find_proof(*question)

    monkeypatch.setattr(cuda_driver, "_find_proof", find_proof)
    cuda_driver.ask_again()
    for _ in range(3):
        assert machine.select(64) == "sdpa_sm80_d64"
        assert machine.select(64, F16) == "sdpa_sm80_d64"
        assert "has not passed its proof on this card" in machine.select(80)
    assert len(asked) == 3
    config.forget()
    monkeypatch.setattr(cuda_driver, "_find_proof", find_proof)
    machine.select(64)
    assert len(asked) == 4, "what is known may have changed"


@pytest.mark.parametrize("what", ("nothing", "driver", "torch", "build"))
def test_another_start_tries_again_what_has_changed(
    what: str, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = quick(ALL)
    machine.keep(sdpa_sm80_d64__bf16=FAILED)
    if what == "driver":
        monkeypatch.setattr(verdicts, "driver_version", lambda: "999.99")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif what == "build":
        monkeypatch.setattr(verdicts, "_kernels", lambda arch: "others")
    machine.restart()
    quick(ALL)
    assert user_calls(machine, monkeypatch, 64, BF16) == (what != "nothing")
    assert len(machine.children) == (what != "nothing")


def test_a_row_that_failed_leaves_the_call_to_the_next(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = RopeGpu(tmp_path, CARDS[90])
    monkeypatch.setattr(library, "load", lambda: gpu.lib)
    monkeypatch.setattr(library, "lib", lambda: gpu.lib)
    monkeypatch.setattr(cuda_driver, "_path", gpu.driver._name)
    machine.keep(sdpa_sm90_d128__bf16=FAILED, sdpa_sm90_d128__fp16=PASSED)
    cuda_driver.ask_again()
    assert machine.select(128, F16) == "sdpa_sm90_d128"
    assert machine.select(128, BF16) == "sdpa_sm80_d128"


def test_without_the_check_every_row_is_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, is_used in (("0", True), ("1", False), ("0", True)):
        monkeypatch.setenv("WAN_ATTN_SELF_CHECK", value)
        config.refresh()
        assert (machine.select() == "sdpa_sm80_d64") is is_used
    assert not machine.children


# --- when it begins, and who says so ----------------------------------------------------------


def test_a_programs_start_proves_where_ours_may_run(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = quick(ALL)
    proof.before_work()  # there is no CUDA here
    assert not machine.children
    monkeypatch.setattr(proof, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("USE_ATTENTION_BACKEND", "torch"), ("WAN_ATTN_SELF_CHECK", "0")):
        monkeypatch.setenv(name, value)
        config.refresh()
        proof.before_work()
        assert not machine.children
        monkeypatch.delenv(name)
    config.refresh()
    for _ in range(2):
        wan_attn.patch()
        wan_attn.unpatch()
    assert len(machine.children) == 1


def test_doctor_and_why_say_what_is_known(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan_attn.cli import why
    from wan_attn.doctor import proofs

    found = proofs.facts(0)
    assert found["is_missing"]
    assert found["state"] == "none yet: the first use makes it, or python -m wan_attn prove"
    machine.keep(sdpa_sm80_d64__bf16=FAILED)
    found = proofs.facts(0)
    assert found["state"] == "7 of 8 passed, 1 failed, just now" and not found["is_missing"]
    text = proofs.render(found)
    assert "proof on NVIDIA A100" in text and "sdpa_sm80_d64/bf16  failed  wrong" in text
    assert "python -m wan_attn prove --again" in text
    now = found["at"]
    for seconds, words in ((59, "just now"), (61, "1 minute ago"), (7300, "2 hours ago")):
        assert proofs.age(now, now + seconds) == words
    parser = argparse.ArgumentParser()
    why.add_arguments(parser)
    options = ["--shape", "1x64x2x64", "--device", "cuda:0"]
    assert why.main(parser.parse_args(options)) == 0
    shown = capsys.readouterr().out
    assert "7 of 8 passed, 1 failed, just now" in shown
    assert (
        "has not passed its proof on this card: `python -m wan_attn doctor` says why"
        in " ".join(shown.split())
    )


def test_the_command(
    quick: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wan_attn.__main__ import main

    quick(ALL)
    assert main(["prove"]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["prove", "--device", "1"]) == 2
    assert "--device must be below 1" in capsys.readouterr().err
    assert main(["prove"]) == 0
    assert "8 of 8 passed, " in capsys.readouterr().out
    quick("put(d64='failed'); say(end=True)")
    assert main(["prove", "--again"]) == 1
    log.disable("prove")
