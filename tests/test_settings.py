# SPDX-License-Identifier: Apache-2.0
"""test_settings.py - every variable, changed while the process runs: what is said is what ran.

What ran is told from the outside: which backend by the frames that Python enters, which row of the
kernel table by the bits of the result, which dtype by both. The log, `why` and `doctor` must agree
with it at every step of a walk through the values of a variable.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import standins
import wan_attn
from calls import BF16, F16
from wan_attn import config, log, precision
from wan_attn.attention import flash_attention
from wan_attn.cli import why
from wan_attn.config import VARIABLES
from wan_attn.cuda import images
from wan_attn.doctor import paths
from wan_attn.doctor.explain import explain
from wan_attn.native import kernels, op, shim
from wan_attn.selection import run as execute
from wan_attn.selfcheck import first_call
from wan_attn.sparse import state as leaving_out
from wan_attn.tuning import book, kinds
from wan_attn.workloads import WORKLOADS

# A call that `doctor` shows, as stock Wan2.2 makes it: float32 query and key, real lengths.
CALL = WORKLOADS["clip-vit-h"]
LATER = {v.name: v.waits_for for v in VARIABLES if v.waits_for}
ROOM = str(Path(wan_attn.__file__).parent / "backends")


@pytest.fixture(autouse=True)
def _reset(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    for variable in VARIABLES:
        if variable.name != "WAN_ATTN_BINDING":
            monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("WAN_ATTN_TUNE", "off")  # what runs is not this machine's speed
    standins.reset()
    config.refresh()
    caplog.set_level(logging.DEBUG, logger="wan_attn")
    yield
    monkeypatch.undo()
    standins.reset()
    config.refresh()


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    shape = (1, CALL.seqlen_q, CALL.num_heads_q, CALL.head_dim)
    query, key, value = torch.randn(3, *shape)
    return query, key, value.to(BF16)


@dataclass
class Ran:
    """One call, told from the outside."""

    out: Tensor
    functions: list[str]  # of backends/, as they were entered: "native.run"
    lines: list[str]  # what the log said

    @property
    def backend(self) -> str:
        modules = {"native": "sdpa", "torch_sdpa": "torch", "chunked": "chunked"}
        runs = [f.removesuffix(".run") for f in self.functions if f.endswith(".run")]
        return modules[runs[0]]  # chunked calls torch_sdpa

    def said(self, pattern: str) -> str:
        """The group of `pattern` in the log, which says it once."""
        (found,) = {m[1] for line in self.lines if (m := re.search(pattern, line))}
        return found


def run(tensors: tuple[Tensor, Tensor, Tensor], caplog: pytest.LogCaptureFixture) -> Ran:
    functions: list[str] = []

    def enter(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOM):
            functions.append(f"{Path(code.co_filename).stem}.{code.co_name}")

    caplog.clear()
    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        out = flash_attention(*tensors, k_lens=torch.tensor([CALL.seqlen_k]))
    finally:
        sys.setprofile(before)
    return Ran(out, functions, [record.getMessage() for record in caplog.records])


def change(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    """As a script does it that runs."""
    if value is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, value)
    config.refresh()


def rows_of(ran: Ran, tensors: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> set[str]:
    """The rows of the kernel table that give these very bits."""
    query, key, value = tensors
    found = set()
    for row in kernels.kernels():
        try:
            out, _ = torch.ops.wan_attn.sdpa(query, key, value.to(dtype), kernel=row.index)
        except RuntimeError:  # for another machine, or no table
            continue
        if torch.equal(out, ran.out):
            found.add(row.name)
    return found


def agree(ran: Ran, tensors: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """What the log, `why` and `doctor` say is what ran; returns the row."""
    said_title = ran.said(r"Using (.*), dropout=")
    assert ran.said(r"Config: backend=(\w+),") == ran.backend
    dtype = {"bf16": BF16, "fp16": F16}[ran.said(r", dtype=(\w+),")]
    kernel = None
    if ran.backend == "sdpa":
        kernel = ran.said(r"Using wan_attn SDPA \((\w+)\)")
        # WAN_ATTN_CPU_ISA shuts rows out that are asked for by number, too: open it meanwhile.
        features, shim.CPU_FEATURES.value = shim.CPU_FEATURES.value, 0
        rows = rows_of(ran, tensors, dtype)
        shim.CPU_FEATURES.value = features
        assert kernel in rows, f"{said_title}: the bits are those of {rows}"
    parser = argparse.ArgumentParser()
    why.add_arguments(parser)
    words = f"--shape {CALL.name} --qk-dtype fp32 --k-lens --device cpu".split()
    settings = config.current()
    answer = explain(why.make_request(parser.parse_args(words), CALL, settings), CALL, settings)
    (shown,) = (c for c in paths.choices(["cpu"], settings) if c["workload"] == CALL.name)
    for told in (answer, shown):
        assert (told["backend"], told["kernel"]) == (ran.backend, kernel)
    assert answer["call"]["dtype"] == shown["dtype"] == log.dtype_name(dtype)
    return kernel


# One walk for each variable; what ran where is in its comment or its assertions.


BACKENDS = ("auto", "torch", "chunked", "sdpa", "fa2", "fa3", "auto")


def test_the_backend(tensors: Any, monkeypatch: Any, caplog: Any) -> None:
    ran = {}
    for value in BACKENDS:
        change(monkeypatch, "USE_ATTENTION_BACKEND", value)
        found = run(tensors, caplog)
        agree(found, tensors)
        ran[value] = found.backend
    assert ran["torch"] == "torch" and ran["chunked"] == "chunked"
    if op.binding() != "torch":
        assert ran["sdpa"] == ran["auto"] == "sdpa"


def test_use_sdpa_and_disable_flash_attn(tensors: Any, monkeypatch: Any, caplog: Any) -> None:
    for name in ("USE_SDPA", "DISABLE_FLASH_ATTN"):
        for value in ("1", "0", "1", None):
            change(monkeypatch, name, value)
            agree(run(tensors, caplog), tensors)
    change(monkeypatch, "USE_ATTENTION_BACKEND", "torch")
    assert agree(run(tensors, caplog), tensors) is None
    change(monkeypatch, "USE_ATTENTION_BACKEND", None)
    change(monkeypatch, "USE_SDPA", "1")
    agree(run(tensors, caplog), tensors)


def test_the_dtype(tensors: Any, monkeypatch: Any, caplog: Any) -> None:
    outs = []
    for value in ("0", "1", "0"):
        change(monkeypatch, "WAN_FORCE_FP16", value)
        found = run(tensors, caplog)
        agree(found, tensors)
        assert found.said(r", dtype=(\w+),") == ("fp16" if value == "1" else "bf16")
        outs.append(found.out)
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])


def test_the_instruction_set(tensors: Any, monkeypatch: Any, caplog: Any, native: str) -> None:
    """The bug: the log named sdpa_ref while sdpa_avx2 ran."""
    (levels,) = (v.values for v in VARIABLES if v.name == "WAN_ATTN_CPU_ISA")
    row = {}
    for value in (*levels, "portable", "auto"):
        change(monkeypatch, "WAN_ATTN_CPU_ISA", value)
        row[value] = agree(run(tensors, caplog), tensors)
    assert row["portable"] == "sdpa_ref"
    if {"avx2", "neon"} & set(op.cpu_features()):
        assert row["auto"] != "sdpa_ref"


def test_strict(tensors: Any, monkeypatch: Any, caplog: Any) -> None:
    change(monkeypatch, "USE_ATTENTION_BACKEND", "fa2")
    for _ in range(2):
        change(monkeypatch, "WAN_ATTN_STRICT", "0")
        found = run(tensors, caplog)
        agree(found, tensors)
        assert any("Flash Attention 2: needs a CUDA device" in line for line in found.lines)
        change(monkeypatch, "WAN_ATTN_STRICT", "1")
        with pytest.raises(RuntimeError, match="nothing else is tried"):
            run(tensors, caplog)
        shown = paths.choices(["cpu"], config.current())
        assert all(c["backend"] is None and "nothing else is tried" in c["error"] for c in shown)


def test_the_threshold(tensors: Any, monkeypatch: Any, caplog: Any) -> None:
    change(monkeypatch, "USE_ATTENTION_BACKEND", "chunked")
    for value, in_blocks in (("0", True), ("1000000000", False), ("0", True), (None, False)):
        change(monkeypatch, "WAN_ATTN_CHUNK_THRESHOLD", value)
        found = run(tensors, caplog)
        agree(found, tensors)
        assert ("chunked._by_rows" in found.functions) is in_blocks


def test_the_log(tensors: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # pytest's own count as the program's
    try:
        log.enable(config.current().log_level)
        for value, is_shown in (("info", True), ("error", False), ("debug", True), ("off", False)):
            change(monkeypatch, "WAN_ATTN_LOG", value)
            flash_attention(*tensors)
            assert ("Using " in capsys.readouterr().err) is is_shown, value
    finally:
        log.disable()
        root.handlers = handlers


def test_the_self_check(monkeypatch: Any, tensors: Any) -> None:
    def wrong(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        lse = query.new_zeros(query.shape[0], query.shape[2], query.shape[1])
        return torch.zeros_like(query), lse.float()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for value, is_found in (("1", True), ("0", False), ("1", True), (None, True)):
        change(monkeypatch, "WAN_ATTN_SELF_CHECK", value)
        verdict = first_call.verdict(wrong, lambda: "a row", torch.device("cpu"), BF16, 64)
        assert (verdict is not None) is is_found, value


def test_the_profile(tensors: Any, monkeypatch: Any, tmp_path: Path, caplog: Any) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    for path, calls in ((first, 2), (second, 3), (None, 1), (first, 1), (None, 0)):
        change(monkeypatch, "WAN_ATTN_PROFILE", str(path) if path else None)
        for _ in range(calls):
            flash_attention(*tensors)
        if path is None:  # the one before is written
            continue
        assert not path.exists() or path == first
    assert json.loads(first.read_text())["calls"] == 1
    assert json.loads(second.read_text())["calls"] == 3
    change(monkeypatch, "WAN_ATTN_PROFILE", str(first))
    found = run(tensors, caplog)
    change(monkeypatch, "WAN_ATTN_PROFILE", None)
    (site,) = json.loads(first.read_text())["sites"]
    assert site["title"] == found.said(r"Using ([^(]*(?:\(sdpa_\w+\))?)").strip()


def test_the_measured_order(tensors: Any, monkeypatch: Any, tmp_path: Path, caplog: Any) -> None:
    """Each value of WAN_ATTN_TUNE, with a measurement in the file that no machine would make."""
    monkeypatch.setenv("WAN_ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kinds, "SMALL", {"cpu": 0.0, "cuda": 0.0})
    change(monkeypatch, "WAN_ATTN_TUNE", "auto")
    before = agree(run(tensors, caplog), tensors)
    (plan,) = (p for p in execute._plans.values() if p.turn is not None)
    found = kinds.machine(plan.request.device)
    assert found is not None and plan.turn is not None
    times = {one.name: 9.0 for one in plan.turn.candidates} | {"torch": 1.0}
    entry = book.Entry(
        plan.turn.kind.text, found, times, times, {}, {}, True, "", book.today(), 1.0
    )
    book.keep(plan.turn.kind, entry, replaces=False)
    for value, is_obeyed in (("auto", True), ("off", False), ("again", False), ("auto", True)):
        change(monkeypatch, "WAN_ATTN_TUNE", value)
        execute._plans.clear()
        ran = run(tensors, caplog)
        kernel = agree(ran, tensors)
        assert (ran.backend, kernel) == (("torch", None) if is_obeyed else ("sdpa", before)), value
        assert any("torch 1.00: torch" in line for line in ran.lines) is is_obeyed


def test_8_bit_scores(
    native: str, tensors: Any, monkeypatch: Any, tmp_path: Path, caplog: Any
) -> None:
    """By the bits of the result, whatever the log says; and the log says it."""
    lens, options = torch.tensor([CALL.seqlen_k]), {"out_like_value": True}
    sdpa = torch.ops.wan_attn.sdpa
    exact = sdpa(*tensors, None, lens, **options)[0].float()
    lossy = sdpa(*tensors, None, lens, precision=1, **options)[0].float()
    assert not torch.equal(exact, lossy)

    def is_lossy(mode: str, **place: Any) -> bool:
        change(monkeypatch, "WAN_ATTN_PRECISION", mode)
        with precision.at(steps=9, layers=9, expert=0, **place):
            ran = run(tensors, caplog)
        out = ran.out.to(BF16).float()
        found = torch.equal(out, lossy)
        assert found or torch.equal(out, exact), mode
        said = [line for line in ran.lines if "which is not exact" in line]
        assert all(f"WAN_ATTN_PRECISION={mode}" in line for line in said)
        return found

    inner = {"step": 4, "layer": 4}
    for mode, wanted in (("exact", 0), ("balanced", 1), ("fast", 1), ("auto", 1), ("exact", 0)):
        assert is_lossy(mode, **inner) == wanted
    assert is_lossy("fast", step=0, layer=4) and not is_lossy("balanced", step=0, layer=4)
    change(monkeypatch, "WAN_ATTN_ERROR_BUDGET", "0.000001")
    assert not is_lossy("auto", **inner) and is_lossy("balanced", **inner)
    change(monkeypatch, "WAN_ATTN_ERROR_BUDGET", None)
    rules = tmp_path / "rules.json"
    rules.write_text('[{"precision": "exact", "layers": 4}]')
    change(monkeypatch, "WAN_ATTN_SCHEDULE", str(rules))
    assert not is_lossy("fast", **inner) and is_lossy("fast", step=4, layer=3)
    change(monkeypatch, "WAN_ATTN_SCHEDULE", None)
    assert is_lossy("fast", **inner)
    for value in ("one", "two"):
        change(monkeypatch, "WAN_ATTN_PRECISION_REPORT", str(tmp_path / value))
        assert config.current().precision_report == str(tmp_path / value)  # read at exit
    assert precision.current_report().is_lossy, "another variable leaves what is known"


def test_the_guard(native: str, tensors: Any, monkeypatch: Any, caplog: Any) -> None:
    query, key, value = (x.clone() for x in tensors)
    query[0, 3] = float("nan")
    for mode, guard, lines in (
        *(("fast", "auto", 1), ("fast", "off", 0), ("fast", "all", 1)),
        *(("exact", "auto", 0), ("exact", "off", 0), ("exact", "all", 1)),
    ):
        change(monkeypatch, "WAN_ATTN_PRECISION", mode)
        change(monkeypatch, "WAN_ATTN_GUARD", guard)
        ran = run((query, key, value), caplog)
        said = [line for line in ran.lines if "NaN or infinite" in line]
        assert len(said) >= lines and bool(said) == bool(lines), (mode, guard)


def test_blocks_left_out(tensors: Any, monkeypatch: Any, tmp_path: Path, caplog: Any) -> None:
    for mode in ("sparse", "near_exact", "off", "sparse"):
        change(monkeypatch, "WAN_ATTN_SPARSE", mode)
        active = leaving_out.uses.active
        assert (active.wishes.mode if active else "off") == mode
    change(monkeypatch, "WAN_ATTN_SPARSE_PROFILE", str(tmp_path / "none"))
    with pytest.raises(config.ConfigError, match="WAN_ATTN_SPARSE_PROFILE must be a JSON file"):
        run(tensors, caplog)
    change(monkeypatch, "WAN_ATTN_SPARSE_PROFILE", None)
    assert run(tensors, caplog).out.isfinite().all()
    for value in ("one", "two"):
        change(monkeypatch, "WAN_ATTN_SPARSE_REPORT", str(tmp_path / value))
        assert config.current().sparse_report == str(tmp_path / value)  # read at exit


def test_folders(monkeypatch: Any, tmp_path: Path) -> None:
    for value in ("one", "two"):
        change(monkeypatch, "WAN_ATTN_CACHE_DIR", str(tmp_path / value))
        assert images.cache_folder() == tmp_path / value / "cubin"
        change(monkeypatch, "WAN22_DIR", str(tmp_path / value))
        assert config.current().wan22_dir == str(tmp_path / value)  # read by `demo` when it starts


@pytest.mark.parametrize("name", LATER)
def test_what_has_to_wait_is_said(name: str, tensors: Any, monkeypatch: Any, caplog: Any) -> None:
    """And until then calls run, and are described, as before."""
    (variable,) = (v for v in VARIABLES if v.name == name)
    now = getattr(config.current(), variable.field)
    binding, before = op.binding(), run(tensors, caplog)
    values = variable.values if variable.kind == "choice" else ("1",)
    if variable.kind == "path":
        values = ("libcuda.so.of_another_driver",)
    value = next(v for v in values if config._parse(variable, v) != now)
    caplog.clear()
    change(monkeypatch, name, value)
    (said,) = (r.getMessage() for r in caplog.records if name in r.getMessage())
    assert said.endswith(f"takes effect with {variable.waits_for}")
    after = run(tensors, caplog)
    agree(after, tensors)
    assert op.binding() == binding and torch.equal(after.out, before.out)
    change(monkeypatch, name, None)


def test_a_refresh_that_changes_nothing_keeps_all() -> None:
    assert config.refresh() is config.refresh()


def test_every_variable_is_walked() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    missing = [v.name for v in VARIABLES if v.name not in LATER and f'"{v.name}"' not in text]
    assert not missing
