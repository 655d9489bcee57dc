# SPDX-License-Identifier: Apache-2.0
"""test_tuning.py - the measured order, with made-up timings: what is chosen, kept, and said.

Three stand-in backends compute by PyTorch; a virtual clock says how long each of them took.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calls import F32, operands
from tolerances import assert_close_to_oracle
from wan_attn import config
from wan_attn.attention import sdpa
from wan_attn.backends import REGISTRY, torch_sdpa
from wan_attn.backends._errors import is_device_error
from wan_attn.native import op
from wan_attn.request import Call, Request
from wan_attn.selection import ahead, run
from wan_attn.selection.choose import select
from wan_attn.tuning import book, candidates, kinds, measure, turn
from wan_attn.tuning.candidates import Candidate
from wan_attn.tuning.kinds import Kind
from wan_attn.workloads import parse_shape

NO_PLAN = "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph."


class StandIn:
    """A backend that takes `ms` of the virtual clock for each run."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.NAME, self.TITLE = lab, name, name.capitalize()
        self.ms, self.runs = 10.0, 0
        self.disturbed: list[float] = []  # what the next runs take instead
        self.refusal: str | None = None
        self.spoil: Callable[[Tensor], Tensor] | None = None
        self.error: BaseException | None = None

    def why_not(self, request: Request) -> str | None:
        return self.refusal

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Any:
        self.runs += 1
        self.lab.now += (self.disturbed.pop(0) if self.disturbed else self.ms) / 1e3
        if self.error is not None:
            raise self.error
        out, lse = torch_sdpa.run(query, key, value, call)
        return (out if self.spoil is None else self.spoil(out)), lse


class Lab:
    """A machine with backends one, two and three, in this order, and a clock of its own."""

    def __init__(self, caplog: pytest.LogCaptureFixture, folder: Path) -> None:
        self.now, self.caplog, self.folder = 0.0, caplog, folder
        self.backends = {name: StandIn(self, name) for name in ("one", "two", "three")}
        self.one, self.two, self.three = self.backends.values()

    def takes(self, one: float, two: float, three: float = 10.0) -> Lab:
        for backend, ms in zip(self.backends.values(), (one, two, three), strict=True):
            backend.ms = ms
        return self

    def call(self, **options: Any) -> str:
        """Calls once, checks the result, and returns which backend ran it."""
        q, k, v = operands(seqlen_q=96, seqlen_k=96, dtype=F32)
        before = {name: b.runs for name, b in self.backends.items()}
        out = sdpa(q, k, v, **options)
        assert isinstance(out, Tensor)
        assert_close_to_oracle(out, q, k, v)
        (ran,) = (p.choice for p in run._plans.values() if p.request.seqlen_q == 96)
        assert self.backends[ran.backend].runs > before[ran.backend]
        return ran.backend

    def measured(self) -> bool:
        """Whether another than the one that ran was asked, in all calls so far."""
        return sum(b.runs > 0 for b in self.backends.values()) > 1

    def restart(self) -> None:
        """As a new process."""
        config.forget()
        config.refresh()
        for backend in self.backends.values():
            backend.runs = 0

    def files(self) -> list[Path]:
        return sorted((self.folder / "tuning").glob("*.json"))

    def said(self, words: str) -> list[str]:
        return [r.getMessage() for r in self.caplog.records if words in r.getMessage()]


class VirtualClock:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def begin(self) -> float:
        return self.lab.now

    def end(self, begun: float) -> float:
        return self.lab.now - begun

    def wait(self) -> None: ...

    def read(self, mark: float) -> float:
        return mark * 1e3

    def flush(self) -> None: ...


@pytest.fixture
def lab(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Iterator[Lab]:
    monkeypatch.setenv("WAN_ATTN_TUNE", "auto")
    monkeypatch.setenv("WAN_ATTN_CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.DEBUG, logger="wan_attn")
    config.forget()
    config.refresh()
    made = Lab(caplog, tmp_path)
    real = dict(REGISTRY)
    REGISTRY.clear()
    REGISTRY.update(made.backends)
    monkeypatch.setattr(measure, "clock_for", lambda device: VirtualClock(made))
    monkeypatch.setattr(measure, "_now", lambda: made.now)
    monkeypatch.setattr(kinds, "SMALL", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(turn, "COST", 1e9)  # the first call pays
    yield made
    REGISTRY.clear()
    REGISTRY.update(real)
    monkeypatch.undo()
    config.forget()
    config.refresh()


def test_the_fastest_is_chosen_at_the_first_call(lab: Lab) -> None:
    assert lab.takes(10, 8, 12).call() == "two"
    (line,) = lab.said("Measured calls like 1x96x2x64")
    assert "One 10.0 ms, Two 8.00, Three 12.0: Two" in line
    assert "--again --shape 1x96x2x64 --dtype fp32" in line
    (using,) = lab.said("Using Two")
    assert "measured: One 10.0 ms, Two 8.00, Three 12.0: Two" in using
    runs = lab.two.runs
    assert lab.call() == "two" and lab.two.runs == runs + 1
    assert len(lab.said("Measured")) == 1


@pytest.mark.parametrize(
    ("times", "want"),
    [
        ((10, 9.8, 9.75), "one"),
        ((10, 9.6, 9.75), "two"),
        ((10, 9.69, 9.5), "two"),
        ((9, 10), "one"),
    ],
)
def test_a_tie_keeps_the_order(lab: Lab, times: tuple[float, ...], want: str) -> None:
    assert lab.takes(*times).call() == want


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([10, 10, 10, 30, 30, 30, 10], []),  # three rounds met another program
        ([], [12, 12, 5, 12, 12, 12, 12]),  # a lucky one
        ([10, 100], []),  # the run that is there to leave hopeless ones out
    ],
)
def test_other_programs_do_not_decide(lab: Lab, one: list[float], two: list[float]) -> None:
    """Runs: the one that is checked, one more, and five rounds."""
    lab.takes(10, 12)
    lab.one.disturbed, lab.two.disturbed = one, two
    assert lab.call() == "one" and lab.measured()


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "nan": lambda out: out * float("nan"),
    "heads in another order": lambda out: out.flip(2),
    "4 % off": lambda out: out + 0.04 * out.std() * torch.randn_like(out),
    "one row": lambda out: out.index_fill(1, torch.tensor(out.shape[1] - 1), 0),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_one_is_never_chosen_however_fast(lab: Lab, how: str) -> None:
    lab.takes(10, 0.1, 9).two.spoil = SPOILED[how]
    assert lab.call() == "three" and lab.call() == "three"
    (line,) = lab.said("Measured")
    assert "Two: it is off by" in line and "Two left out" in line


FAILURES = {
    "cuDNN without a plan": RuntimeError(NO_PLAN),
    "a changed signature": TypeError("unexpected keyword"),
    "no memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "no memory on the host": MemoryError(),
}


@pytest.mark.parametrize("name", FAILURES)
def test_one_that_fails_is_left_out(lab: Lab, name: str) -> None:
    assert not is_device_error(RuntimeError(NO_PLAN))
    lab.takes(10, 1, 9).two.error = FAILURES[name]
    assert lab.call() == "three"
    is_memory = "memory" in name
    assert ("out of memory" if is_memory else "failed (") in lab.said("Measured")[0]
    assert len(lab.files()) == (0 if is_memory else 1), "what passes is no lasting verdict"


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), KeyboardInterrupt()]
)
def test_what_is_no_fault_of_a_candidate_is_raised(lab: Lab, error: BaseException) -> None:
    lab.takes(10, 1).two.error = error
    with pytest.raises(type(error)):
        lab.call()
    lab.two.error = None
    assert not lab.files() and lab.call() == "two", "and the lock is free again"


def test_a_second_process_measures_nothing(lab: Lab) -> None:
    assert lab.takes(10, 8).call() == "two" and len(lab.files()) == 1
    assert lab.files()[0].stat().st_mode & 0o077 == 0
    lab.restart()
    lab.takes(1, 100, 1)  # a device that became slow is not chased
    assert lab.call() == "two" and not lab.measured()
    assert "measured: One 10.0 ms, Two 8.00" in lab.said("Using Two")[-1]


def test_again_measures_anew_and_replaces(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.takes(10, 8).call() == "two"
    monkeypatch.setenv("WAN_ATTN_TUNE", "again")
    lab.restart()
    assert lab.takes(10, 12, 8).call() == "three"
    runs = lab.one.runs
    assert lab.call() == "three" and lab.one.runs == runs, "once in a process"
    monkeypatch.setenv("WAN_ATTN_TUNE", "auto")
    lab.restart()
    assert lab.call() == "three" and not lab.measured() and len(lab.files()) == 1


def test_off_and_a_named_backend_ignore_the_file(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.takes(10, 8).call() == "two"
    request = next(iter(run._plans.values())).request
    assert select(request, config.Settings(tune="off")).backend == "one"
    monkeypatch.setenv("WAN_ATTN_TUNE", "off")
    lab.restart()
    assert lab.call() == "one" and not lab.measured()


def damage(text: str, **changes: Any) -> str:
    return json.dumps({**json.loads(text), **changes})


DAMAGED: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "another schema": lambda text: damage(text, schema=99),
    "a list": lambda text: "[1, 2]",
    "times in words": lambda text: damage(text, times={"one": "fast"}),
    "a time below 0": lambda text: damage(text, times={"one": -1.0}),
    "NaN": lambda text: damage(text, times={"one": float("nan")}),
    "no times": lambda text: damage(text, times=None),
    "a fastest round too few": lambda text: damage(text, least={}),
    "another machine's": lambda text: damage(text, machine={"device": "another"}),
    "another kind's": lambda text: damage(text, kind="bf16"),
    "deep": lambda text: "[" * 100000,
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_wrong_file_is_ignored_with_a_line(lab: Lab, how: str) -> None:
    assert lab.takes(10, 8).call() == "two"
    (file,) = lab.files()
    file.write_text(DAMAGED[how](file.read_text()))
    lab.restart()
    lab.caplog.clear()
    assert lab.takes(10, 12, 8).call() == "three", "measured again"
    assert len(lab.said("measurements are ignored: ")) == 1
    lab.restart()
    assert lab.call() == "three" and not lab.measured(), "and a good file is there now"


def test_a_folder_that_others_may_write_to_is_not_trusted(lab: Lab) -> None:
    assert lab.takes(10, 8).call() == "two"
    (lab.folder / "tuning").chmod(0o777)
    lab.restart()
    lab.caplog.clear()
    assert lab.takes(10, 12, 8).call() == "three"
    assert "can be written to by other users" in lab.said("measurements are ignored")[0]
    assert len(lab.said("measurements are not kept")) == 1
    (lab.folder / "tuning").chmod(0o700)


@pytest.mark.parametrize("fact", ["driver", "torch", "wan_attn", "kernels", "device"])
def test_another_driver_or_version_is_another_machine(
    lab: Lab, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab.takes(10, 8).call() == "two"
    real = kinds._cpu()
    monkeypatch.setattr(kinds, "machine", lambda device: {**real, fact: "another"})
    monkeypatch.setattr(turn, "machine", kinds.machine)
    lab.restart()
    assert lab.takes(10, 12, 8).call() == "three" and len(lab.files()) == 2


def test_what_was_installed_or_renewed_since_is_measured(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.three.refusal = "not installed"
    assert lab.takes(10, 8, 5).call() == "two"
    lab.three.refusal = None
    lab.restart()
    assert lab.call() == "three" and len(lab.files()) == 1
    for module in (book, turn):
        monkeypatch.setattr(module, "version", lambda backend: "2.9" * (backend == "three"))
    lab.restart()
    assert lab.takes(10, 8, 20).call() == "two" and lab.three.runs
    lab.restart()
    lab.two.refusal = "switched off"  # figures of those that are left still count
    assert lab.call() == "one" and not lab.measured()


def test_time_that_is_over_keeps_the_order_until_tune(lab: Lab) -> None:
    lab.takes(10, 6000, 1)
    assert lab.call() == "one" and lab.three.runs == 0
    assert "the usual order stays" in lab.said("Measuring calls like")[0]
    lab.restart()
    assert lab.call() == "one" and not lab.measured(), "not again in each process"
    settings = config.current()
    request = next(iter(run._plans.values())).request
    outcome = ahead.tune(parse_shape("1x96x2x64"), "plain", request, settings)
    assert outcome.is_new and outcome.chosen == Candidate("three")
    lab.restart()
    assert lab.call() == "three" and lab.one.runs == lab.two.runs == 0
    again = ahead.tune(parse_shape("1x96x2x64"), "plain", request, settings)
    assert not again.is_new and again.chosen == Candidate("three")


def test_nothing_is_measured_where_it_may_not_be(lab: Lab) -> None:
    lab.takes(10, 8)
    torch.use_deterministic_algorithms(True)
    try:
        assert lab.call() == lab.call() == "one" and not lab.measured()
        assert len(lab.said("Nothing is measured: torch.use_deterministic_algorithms")) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert lab.call() == "two"
    torch.use_deterministic_algorithms(True)
    try:
        lab.restart()
        assert lab.call() == "two", "what is known is obeyed"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_captured_call_is_not_measured(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(dtype=F32)
    on_card = Request.of(parse_shape("1x512x2x64"), torch.bfloat16, "cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in turn._why_not_now(on_card, (q, k, v, Call()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert turn._why_not_now(on_card, (q, k, v, Call())) == ""


def test_gradients_dropout_and_vmap_are_not_measured(lab: Lab) -> None:
    lab.takes(10, 8)
    q, k, v = operands(seqlen_q=96, seqlen_k=96, dtype=F32)
    sdpa(q.requires_grad_(), k, v)
    torch.func.vmap(lambda one: sdpa(one, k, v))(q.detach().unsqueeze(0))
    assert lab.one.runs and not lab.measured()


def test_the_op_of_compiled_graphs_decides_when_it_runs(lab: Lab) -> None:
    q, k, v = operands(seqlen_q=96, seqlen_k=96, dtype=F32)
    lab.takes(10, 8)
    torch.ops.wan_attn.attention(q, k, v, None, None, None, False, -1, -1, False, None, None)
    assert lab.call() == "two"


def test_enough_calls_have_to_run_first(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "COST", 0.05)
    monkeypatch.setattr(turn, "CHECK", {"cpu": 0.0})  # which the virtual clock does not count
    lab.takes(10, 8)
    needed = 0
    while not lab.measured():
        lab.call()
        needed += 1
    cost = lab.one.ms + lab.two.ms + lab.three.ms
    spent = sum(b.runs * b.ms for b in lab.backends.values())
    assert spent - needed * 10 <= 0.05 * needed * 10 * 1.3 + cost
    assert lab.call() == "two"
    # Other shapes of the kind have been decided with it, and those of other kinds have not.
    q, k, v = operands(seqlen_q=90, seqlen_k=90, dtype=F32)
    runs = lab.one.runs
    sdpa(q, k, v)
    assert lab.one.runs == runs
    sdpa(q[:, :40], k, v)
    assert lab.one.runs == runs + 1


def test_one_that_fails_later_gives_way_to_the_next_fastest(lab: Lab) -> None:
    assert lab.takes(10, 8, 9).call() == "two"
    lab.two.error = RuntimeError("broken since")
    assert lab.call() == "three"
    lab.three.error = RuntimeError("broken, too")
    assert lab.call() == "one"


def test_a_second_thread_does_not_wait(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    real = measure.measure

    def slow(*args: Any, **options: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return real(*args, **options)

    monkeypatch.setattr(measure, "measure", slow)
    lab.takes(10, 8)
    first = threading.Thread(target=lambda: sdpa(*operands(seqlen_q=96, seqlen_k=96, dtype=F32)))
    first.start()
    assert inside.wait(60)
    assert lab.call() == "one"
    go_on.set()
    first.join()
    assert lab.call() == "two" and len(lab.said("Measured")) == 1


def _keep(number: int, results: Any, start: Any) -> None:
    start.wait()
    times = {"one": float(number + 1)}
    entry = book.Entry("kind", {"device": "x"}, times, times, {}, {}, True, "", "", 1.0)
    results.put(book.keep(Kind(-1, "kind"), entry, replaces=False).times)


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_processes_that_measure_at_the_same_time_agree(lab: Lab) -> None:
    context = multiprocessing.get_context("fork")
    results, start = context.Queue(), context.Event()
    children = [context.Process(target=_keep, args=(n, results, start)) for n in range(6)]
    for child in children:
        child.start()
    start.set()
    found = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert all(times == found[0] for times in found) and len(lab.files()) == 1
    assert not list((lab.folder / "tuning").glob(".*")), "no partial file is left"


def test_a_decided_call_is_as_short_as_before(lab: Lab) -> None:
    lab.takes(10, 8).call()
    entered: list[str] = []

    def enter(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            entered.append(frame.f_code.co_filename)

    q, k, v = operands(seqlen_q=96, seqlen_k=96, dtype=F32)
    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        sdpa(q, k, v)
    finally:
        sys.setprofile(before)
    assert not [name for name in entered if "tuning" in name and "test_" not in name]


def test_every_way_to_run_is_a_candidate_by_its_name(native: str) -> None:
    request = Request.of(parse_shape("1x512x4x64"), F32, "cpu")
    names = [one.name for one in candidates.of(request, ("fa3", "sdpa", "torch", "chunked"))]
    assert names[0] == "fa3" and names[-1] == "torch" and "chunked" not in names
    rows = [name for name in names if name.startswith("sdpa:")]
    assert rows and ("sdpa:sdpa_ref" in rows) is not bool({"avx2", "neon"} & set(op.cpu_features()))
