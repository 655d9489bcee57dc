# SPDX-License-Identifier: Apache-2.0
"""test_verdicts.py - what may go wrong with the child that makes a proof, with the file that keeps
the verdict, and with processes that want it at once."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cuda_mock.user import (  # noqa: F401 - some are fixtures
    ALL,
    BF16,
    CUDA,
    ROWS,
    Machine,
    machine_fixture,
    quick_fixture,
    said,
    spoken_fixture,
    user_calls,
)
from emu.build import compiler
from wan_attn import config
from wan_attn.native import library
from wan_attn.selfcheck import child, proof, verdicts
from wan_attn.selfcheck.verdicts import FAILED, PASSED, RUNNING, UNTRIED, Verdict

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

# --- what may go wrong with the child, and with the file --------------------------------------

BEGIN = "put(d64='running'); say(begin='x'); "


@pytest.mark.parametrize(
    ("code", "limits", "state", "words"),
    [
        (BEGIN + "time.sleep(60)", {"row": 0.5}, FAILED, "hung: no answer within 0 s"),
        (BEGIN + "time.sleep(60)", {"whole": 1.5}, UNTRIED, "the time was over"),
        (BEGIN + "sys.exit('bad luck')", {}, FAILED, "ended with code 1: bad luck"),
        (BEGIN + "os.kill(os.getpid(), 11)", {}, FAILED, "was killed by SIGSEGV"),
        ("time.sleep(60)", {"start": 0.5}, None, "hung: no answer within 0 s"),
        ("sys.exit('no torch')", {}, None, "ended with code 1: no torch"),
        ("say(trouble='out of memory'); sys.exit(1)", {}, None, "out of memory"),
    ],
)
def test_how_a_child_may_end(
    code: str,
    limits: dict[str, float],
    state: str | None,
    words: str,
    quick: Any,
    spoken: pytest.LogCaptureFixture,
) -> None:
    quick(code, **limits)
    found = proof.ensure(0)
    verdict = verdicts.read(verdicts.key_of(0))  # type: ignore[arg-type]
    if state == FAILED:
        assert verdict is not None
        wrong = verdict.rows["sdpa_sm80_d64/bf16"]
        assert wrong.state == FAILED and words in wrong.said
        assert verdict.rows["sdpa_sm80_d80/bf16"].state == UNTRIED
    else:
        assert isinstance(found, str) and words in found
        assert words in said(spoken) and "To get it: python -m wan_attn prove" in said(spoken)
        assert verdict is None or verdict.names(UNTRIED) == ROWS
    for row in ("sdpa_sm80_d64", "sdpa_sm80_d80"):  # wrong, and not tried
        assert proof.find_proof(0, row, library.BF16) == library.PROOF_FAILED


def test_ctrl_c_ends_the_child_and_blames_no_row(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = quick(BEGIN + "time.sleep(600)")
    plain, processes = child.Child.next, list[Any]()

    def interrupted(self: child.Child, seconds: float) -> Any:
        if processes:
            raise KeyboardInterrupt
        processes.append(self.process)
        return plain(self, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(child.Child, "next", interrupted)
        with pytest.raises(KeyboardInterrupt):
            proof.ensure(0)
    assert processes[0].returncode is not None
    verdict = verdicts.read(verdicts.key_of(0))  # type: ignore[arg-type]
    assert verdict is not None and verdict.names(UNTRIED) == ROWS
    quick(ALL)
    assert isinstance(proof.ensure(0), Verdict) and len(machine.children) == 2


def test_a_row_that_stopped_the_machine_is_not_tried_again(quick: Any) -> None:
    machine = quick("put(d80='passed', d128='passed', d256='passed'); say(end=True)")
    machine.keep(sdpa_sm80_d64__bf16=RUNNING, sdpa_sm80_d256__bf16=UNTRIED)
    verdict = proof.ensure(0)
    assert isinstance(verdict, Verdict) and verdict.names(FAILED) == ["sdpa_sm80_d64/bf16"]
    assert "ended without a word" in verdict.rows["sdpa_sm80_d64/bf16"].said
    assert len(machine.children) == 1


def test_failed_rows_are_tried_again_when_asked_for(quick: Any) -> None:
    machine = quick(ALL)
    machine.keep(sdpa_sm80_d64__bf16=FAILED)
    assert "has not passed" in machine.select() and isinstance(proof.ensure(0), Verdict)
    assert not machine.children
    verdict = proof.again(0, everything=False)
    assert isinstance(verdict, Verdict) and verdict.names(PASSED) == ROWS
    assert len(machine.children) == 1 and machine.select() == "sdpa_sm80_d64"
    quick("put(d64='failed'); say(end=True)")
    verdict = proof.again(0, everything=True)
    assert isinstance(verdict, Verdict)
    assert verdict.names(UNTRIED) == [name for name in ROWS if "_d64" not in name]


def damaged(path: Path, how: str) -> None:
    found = json.loads(path.read_text())
    if how == "half of it":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "not UTF-8":
        path.write_bytes(b"\xff\xfe{}")
    else:
        changes: dict[str, dict[str, Any] | None] = {
            "another schema": {"schema": 2},
            "another card's": {"key": {**found["key"], "card": "NVIDIA H200"}},
            "no rows": {"rows": None},
            "another state": {"rows": {"a/bf16": {**found["rows"][ROWS[0]], "state": "fine"}}},
            "a number for words": {"rows": {"a/bf16": {**found["rows"][ROWS[0]], "said": 7}}},
            "a list": None,
        }
        change = changes[how]
        path.write_text(json.dumps([] if change is None else {**found, **change}))


@pytest.mark.parametrize(
    "how",
    ["half of it", "a folder", "not UTF-8", "another schema", "another card's", "no rows"]
    + ["another state", "a number for words", "a list"],
)
def test_a_file_that_is_no_verdict_is_ignored_with_a_line(
    how: str, quick: Any, spoken: pytest.LogCaptureFixture
) -> None:
    machine = quick("sys.exit(1)" if how == "a folder" else f"os.unlink(path); {ALL}")
    machine.keep()
    path = verdicts.path_of(verdicts.key_of(0))  # type: ignore[arg-type]
    assert path is not None
    damaged(path, how)
    for _ in range(3):
        assert "has no proof on this card yet" in machine.select()
    lines = [
        r for r in spoken.records if "the verdict on the CUDA kernels is not used" in r.msg % r.args
    ]
    assert len(lines) == 1 and not machine.children
    proof.ensure(0)
    assert len(machine.children) == 1


def test_the_file_is_private_and_what_others_can_write_is_not_used(
    machine: Machine, spoken: pytest.LogCaptureFixture
) -> None:
    machine.keep()
    path = verdicts.path_of(verdicts.key_of(0))  # type: ignore[arg-type]
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.parent.chmod(0o777)
    assert "has no proof" in machine.select()
    found = proof.ensure(0)
    assert isinstance(found, str) and "can be written to by other users" in found
    assert not machine.children and "can be written to by other users" in said(spoken)


def test_no_place_for_a_verdict(
    quick: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoken: pytest.LogCaptureFixture,
) -> None:
    machine = quick(ALL)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WAN_ATTN_CACHE_DIR", str(tmp_path / "file"))
    config.forget()
    assert not user_calls(machine, monkeypatch, 64, BF16)
    assert not machine.children and "our CUDA kernels are not used" in said(spoken)
    monkeypatch.setattr(config, "cache_folder", lambda: None)
    config.forget()
    assert not user_calls(machine, monkeypatch, 64, BF16)
    assert "this user has no home directory" in said(spoken)


@pytest.mark.parametrize("name", ["", None, "/opt/blender/blender", "C:/ComfyUI/ComfyUI.exe"])
def test_a_program_without_a_python_is_not_started_again(
    name: str | None,
    quick: Any,
    monkeypatch: pytest.MonkeyPatch,
    spoken: pytest.LogCaptureFixture,
) -> None:
    machine = quick(ALL)
    monkeypatch.setattr(sys, "executable", name)
    assert not user_calls(machine, monkeypatch, 64, BF16)
    assert not machine.children and "has no Python to start" in said(spoken)


def test_this_python_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (sys.executable, "/usr/bin/python3.12", "C:/x/python_embeded/python.exe", "pypy3"):
        monkeypatch.setattr(sys, "executable", name)
        assert child.why_no_python() is None
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert child.why_no_python() is not None


HOLDER = """
import fcntl, os, sys, time
lock, path = sys.argv[1:3]
handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
text = sys.stdin.read()
time.sleep(float(sys.argv[3]))
if text:
    open(path, "w").write(text)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl")
@pytest.mark.parametrize("is_quick", (True, False))
def test_of_two_processes_the_second_proves_nothing(
    is_quick: bool, quick: Any, spoken: pytest.LogCaptureFixture
) -> None:
    machine = quick("sys.exit('this process must not try')", whole=60 if is_quick else 1.0)
    machine.keep()
    path = verdicts.path_of(verdicts.key_of(0))  # type: ignore[arg-type]
    assert path is not None
    text = path.read_text()
    path.unlink()
    words = [str(path.with_suffix(".lock")), str(path), "0.5" if is_quick else "30"]
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdin and other.stdout and other.stdout.readline() == "held\n"
        other.stdin.write(text)
        other.stdin.close()
        found = proof.ensure(0)
    finally:
        other.kill()
        other.wait()
    assert not machine.children
    assert "another process proves our CUDA kernels on NVIDIA A100" in said(spoken)
    if is_quick:
        assert isinstance(found, Verdict) and machine.select() == "sdpa_sm80_d64"
    else:
        assert isinstance(found, str) and "has been at it for 1 s" in found


def test_threads_make_one_proof(quick: Any) -> None:
    machine = quick(f"time.sleep(0.3); {ALL}")
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(proof.ensure(0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(machine.children) == 1 and all(one is found[0] for one in found)
