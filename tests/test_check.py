# SPDX-License-Identifier: Apache-2.0
"""test_check.py - `python -m wan_attn check`: workers that crash, hang, run out of time or find
nothing; what is said of them, to whom, and what is never said."""

from __future__ import annotations

import getpass
import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_attn.__main__ import main
from wan_attn.check import private, report, results, run
from wan_attn.check.results import BAD, RIGHT, UNKNOWN, Results, line
from wan_attn.selfcheck import child

WORKER = """
import json, os, sys, time
words = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if "=" in word)
start = int(words["start"])
def say(**words): print({mark!r} + json.dumps(words), flush=True)
names = [f"row{{n}}/bf16" for n in range(6)]
plan = [dict(step="small", kernel=name, argument="", limit_s={limit}) for name in names]
environment = dict(device="a card", torch="2.15")
{before}
say(plan=plan, kernels=names, shapes={{}}, environment=environment, state={{}})
def end(n, problem="", is_lost=False):
    say(end=n, problem=problem, detail={{}}, seconds=0.1, is_lost=is_lost)
for n in range(start, 6):
    say(begin=n)
    print("a library says something")
    {code}
    end(n)
say(done=True)
"""
FAULTS = """
    if n == 1:
        print("Segmentation fault in row1", file=sys.stderr, flush=True)
        os._exit(139)
    if n == 2:
        assert words["without"] == "row1/bf16"
    if n == 3:
        time.sleep(60)
    if n == 4:
        end(n, "CUDA error: an illegal memory access", is_lost=True)
        os._exit(1)
    if n == 5:
        assert words["without"] == "row1/bf16,row3/bf16,row4/bf16"
        end(n, "out[1, 2] is 7 instead of 6")
        continue
"""


def worker(code: str = "pass", before: str = "", limit: float = 2.0) -> Callable[[Any], list[str]]:
    """Starts a worker of six items.

    Args:
        code: what it does instead of item n. before: what it does before it says its plan.
    """
    words = {"mark": child.MARK, "code": code.strip(), "before": before, "limit": limit}
    program = WORKER.format(**words)
    return lambda words: [sys.executable, "-c", program, *words]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A whole check with these workers."""

    def go(make_command: Any, seconds: float = 60.0) -> tuple[Results, list[int]]:
        changes: list[int] = []
        monkeypatch.setattr(run, "make_command", make_command)
        scope = run.Scope(torch.device("cuda", 0), seconds)
        found = run.Run(scope, lambda now, begins: changes.append(len(now.ended))).all()
        return found, changes

    return go


def test_a_crash_and_a_hang_cost_their_own_item_only(checked: Any) -> None:
    found, changes = checked(worker(FAULTS))
    problems = {n: end["problem"] for n, end in found.ended.items()}
    assert problems[0] == problems[2] == ""
    assert "crashed: the process ended with code 139: Segmentation fault in row1" in problems[1]
    assert problems[3] == "hung: no answer within 2 s"
    assert "illegal memory access" in problems[4]
    assert problems[5] == "out[1, 2] is 7 instead of 6"
    assert not found.is_fine and found.trouble == ""
    assert changes == sorted(changes) and changes[-1] == 6, "results are told as they come"
    assert list(found.kernels().values()) == [RIGHT, BAD, RIGHT, BAD, BAD, BAD]
    assert "on a card: 2 of 6 kernels right, WRONG: row1/bf16, row3/bf16" in line(found)


def test_time_that_runs_out_is_no_failure(checked: Any) -> None:
    found, _ = checked(worker("if n == 1: say(out_of_time=n); sys.exit()"))
    assert list(found.ended) == [0] and found.trouble == "" and found.is_fine
    assert line(found).endswith("1 of 6 kernels right, 5 not checked")
    assert [item["state"] for item in found.items()] == ["passed"] + ["not run"] * 5


def test_an_item_that_outlasts_the_whole_time_is_not_blamed(
    checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRACE_S", 0.5)
    found, _ = checked(worker("if n == 1: time.sleep(60)", limit=50.0), seconds=2.0)
    assert list(found.ended) == [0] and found.is_fine


def test_what_is_known_when_its_user_stops_it_is_told(
    checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = child.Child.next

    def interrupted(self: child.Child, seconds: float) -> Any:
        said = true(self, seconds)
        if said and said.get("begin") == 2:
            raise KeyboardInterrupt
        return said

    monkeypatch.setattr(child.Child, "next", interrupted)
    found, _ = checked(worker())
    assert list(found.ended) == [0, 1] and found.trouble == "stopped by Ctrl-C"
    assert line(found).endswith("2 of 6 kernels right, 4 not checked; the check ended early")


def test_a_worker_that_cannot_start_is_trouble(checked: Any) -> None:
    found, _ = checked(lambda words: [sys.executable, "-c", "raise SystemExit('no torch here')"])
    assert "ended before it began an item" in found.trouble and "no torch here" in found.trouble
    assert not found.is_fine and line(found).endswith("the check ended early")


def test_a_candidate_that_ends_a_worker_while_it_is_timed_is_named(checked: Any) -> None:
    """One of ours is then wrong for that dtype; none is tried again."""
    before = "plan[0].update(step='speed', kernel='', argument='x/fp16'); names[2] = 'row2/fp16'"
    code = """
    if n == 0:
        say(at="row2"); os._exit(3)
    assert words["without"] == "row2/fp16"
    """
    found, _ = checked(worker(code, before))
    assert found.ended[0]["problem"] == "crashed: the process ended with code 3, while row2 ran"
    assert found.kernels()["row2/fp16"] == BAD and found.kernels()["row1/bf16"] == RIGHT
    assert found.ended[1]["problem"] == ""


# --- the command ------------------------------------------------------------------------------


def command(words: list[str]) -> int:
    try:
        return main(["check", *words])
    except SystemExit as end:
        return int(str(end.code))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--only", "small,big"], "--only must name some of small, rope, matmul, speed"),
        (["--device", "cpu", "--rows", "sdpa_x"], "got 'sdpa_x'"),
        (["--device", "cuda:9"], "--device must exist, got 'cuda:9'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
        (["--out", "no/such/folder/report.md"], "--out must be a file that can be written"),
        (["--out", "."], "--out must be a file that can be written"),
    ],
)
def test_bad_options(
    words: list[str], message: str, native: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: str) -> Any:
    """The command on a machine with a card, and these workers."""

    def go(make_command: Any, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(run, "make_command", make_command)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.chdir(tmp_path)
        code = command([*words])
        file = tmp_path / "wan_attn-check-a-card.md"
        return code, file.read_text(encoding="utf-8") if file.exists() else ""

    return go


def test_one_file_and_one_line(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = asked(worker())
    said = capsys.readouterr()
    assert code == 0 and "[6/6] small row5/bf16" in said.err
    verdict = said.out.splitlines()[-1]
    assert re.fullmatch(r"wan_attn \S+ on a card: 6 of 6 kernels right", verdict)
    assert "To attach to an issue: wan_attn-check-a-card.md" in said.out
    assert f"**{verdict}**" in text and "| row0/bf16 | right | ok |" in text
    found = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    assert found["verdict"] == verdict and found["is_fine"] and len(found["items"]) == 6


def test_what_is_wrong_is_red_everywhere(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = asked(worker(FAULTS), "--json")
    said = capsys.readouterr()
    assert code == 1 and "WRONG: small row3/bf16: hung: no answer within 2 s" in said.err
    found = json.loads(said.out)
    assert not found["is_fine"] and found["kernels"]["row5/bf16"] == BAD
    assert "- small row5/bf16: out[1, 2] is 7 instead of 6" in text
    assert "| row1/bf16 | WRONG | FAILED |" in text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "this build has no kernel for a card"),
        (["row0/bf16"], "nothing of --only can be checked on a card"),
    ],
)
def test_where_there_is_nothing_to_check_it_says_why(
    names: list[str], message: str, asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = f"say(plan=[], kernels={names}, environment=environment); say(done=True); sys.exit()"
    code, text = asked(worker(before=nothing))
    assert code == 2 and text == ""
    assert message in capsys.readouterr().err


# --- what is never said -----------------------------------------------------------------------


def test_names_and_folders_stay_out_of_the_report(
    asked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the user, of the machine, and of any folder."""
    monkeypatch.setattr(getpass, "getuser", lambda: "jdoe42")
    monkeypatch.setattr(platform, "node", lambda: "pixel-mill.acme.example")
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/people/jane.doe"))
    private.names.cache_clear()
    code = r"""
    if n == 0:
        print("no /srv/people/jane.doe/secret-film/lib.so for jdoe42", file=sys.stderr, flush=True)
        os._exit(3)
    if n == 1:
        end(n, r"D:\\acme\\films\\x.py on pixel-mill and pixel-mill.acme.example, ~/films/a.txt")
        continue
    if n == 2:
        end(n, "/opt/acme/jdoe42/libcuda.so.1: https://x.org/a/b, 3/4")
        continue
    """
    try:
        _, text = asked(worker(code), "--json")
    finally:
        private.names.cache_clear()
    for spoken in (text, capsys.readouterr().out):
        for word in ("jdoe42", "jane", "pixel", "acme", "film", "people"):
            assert word not in spoken, word
        assert "no .../lib.so for <user>" in spoken.replace("&lt;", "<")
        assert ".../libcuda.so.1: https://x.org/a/b, 3/4" in spoken


def test_common_names_are_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    monkeypatch.setattr(platform, "node", lambda: "gpu")
    home = Path("/root")
    monkeypatch.setattr(Path, "home", lambda: home)
    private.names.cache_clear()
    try:
        assert private.scrub(f"root mean square, torch, gpu, {home}/x") == (
            "root mean square, torch, gpu, ~/x"
        )
    finally:
        private.names.cache_clear()


# --- the verdict ------------------------------------------------------------------------------


def timed(argument: str, **times: float) -> dict[str, Any]:
    """What a speed item found; sdpa_... are ours."""
    name, _, dtype = argument.partition("/")
    rows = [
        {"kernel": kernel.replace("_x_", "-"), "ours": kernel.startswith("sdpa"), "p50_ms": ms}
        for kernel, ms in times.items()
    ]
    empty: dict[str, Any] = {
        "before": {},
        "after": {},
        "notes": [],
        "skipped_peers": {},
        "broken": {},
    }
    return {"title": name, "shape": "1x2x3x4", "dtype": dtype, "rows": rows, **empty}


def of_speed(*details: dict[str, Any], wrong: str = "") -> Results:
    names = ["sdpa_a/bf16", "sdpa_b/bf16"]
    plan = [{"step": "small", "kernel": name, "argument": ""} for name in names]
    plan += [
        {"step": "speed", "kernel": "", "argument": f"{d['title']}/{d['dtype']}"} for d in details
    ]
    ended: dict[int, dict[str, Any]] = {
        n: {"problem": "off" if name == wrong else "", "detail": {}, "seconds": 1.0}
        for n, name in enumerate(names)
    }
    ended |= {2 + n: {"problem": "", "detail": d, "seconds": 1.0} for n, d in enumerate(details)}
    facts = {"kernels": names, "environment": {"device": "NVIDIA GeForce RTX 4090"}}
    return Results(plan, facts, ended)


def test_the_line_has_the_figures_that_people_compare() -> None:
    times = {
        "sdpa_a": 41.2,
        "sdpa_b": 50.0,
        "torch_x_flash": 50.1,
        "torch_x_cudnn": 46.1,
        "fa2": 45.0,
    }
    found = of_speed(timed("ti2v-5b-720p/bf16", **times))
    assert line(found).endswith(
        " on NVIDIA GeForce RTX 4090: 2 of 2 kernels right; ti2v-5b-720p bf16 41.2 ms, "
        "1.12 times as fast as torch's best (cuDNN)"
    )
    text = report.as_text(found)
    assert "ti2v-5b-720p  bf16   sdpa_a 41.2, torch-cudnn 46.1, fa2 45" in text
    # torch's own choice is one of its kernels, unless it is clearly faster.
    for ms, title in ((46.0, "cuDNN"), (30.0, "its own choice")):
        faster = of_speed(timed("x/bf16", **times, torch=ms))
        assert line(faster).endswith(f"torch's best ({title})")
    # A wrong kernel's time counts for nothing.
    spoilt = of_speed(timed("ti2v-5b-720p/bf16", **times), wrong="sdpa_a/bf16")
    assert "ti2v-5b-720p bf16 50 ms, 0.92 times" in line(spoilt)
    # One that only fails when it is timed is wrong, too.
    broken = timed("x/bf16", torch=3.0) | {"broken": {"sdpa_b": "RuntimeError: no"}}
    failed = of_speed(broken)
    assert failed.kernels() == {"sdpa_a/bf16": RIGHT, "sdpa_b/bf16": BAD} and not failed.is_fine
    assert line(failed).endswith("x bf16: no right kernel of ours was timed")
    assert "sdpa_b/bf16, while it was timed: RuntimeError: no" in report.as_text(failed)


def test_a_kernel_that_only_was_skipped_is_not_called_right() -> None:
    plan = [{"step": "small", "kernel": "a/bf16", "argument": ""}]
    skipped = {0: {"problem": "", "detail": {"skipped": "out of memory"}, "seconds": 0.0}}
    found = Results(plan, {"kernels": ["a/bf16"]}, skipped)
    assert found.kernels() == {"a/bf16": UNKNOWN} and not found.is_fine
    assert results.as_dict(found)["items"][0]["state"] == "skipped"
