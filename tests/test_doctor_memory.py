# SPDX-License-Identifier: Apache-2.0
"""test_doctor_memory.py - doctor's arithmetic against what torch's profiler sees allocated, and
where it is told."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import source_tree
import standins
from calls import BF16, F16, F32, operands
from cuda_mock.gpu import CARDS, Gpu
from emu.build import compiler
from wan_attn import __main__ as cli
from wan_attn import config, flash_attention
from wan_attn.bench.accuracy import peak_bytes
from wan_attn.doctor import examine, memory, report
from wan_attn.native import library
from wan_attn.request import Request
from wan_attn.workloads import WORKLOADS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SLACK = 4096  # lengths and other small things


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def set_it(backend: str) -> None:
        monkeypatch.setenv("USE_ATTENTION_BACKEND", backend)
        config.refresh()

    yield set_it
    monkeypatch.undo()
    config.refresh()


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="runs in test_low_memory.py's own process"
)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="callers hold arguments before 3.11")
@pytest.mark.parametrize("backend", ["sdpa", "torch", "chunked"])
@pytest.mark.parametrize(
    ("sizes", "dtypes"),
    [
        ((1, 900, 900, 4, 4, 64), (F32, F32, BF16)),  # Wan2.2's
        ((1, 900, 512, 4, 4, 64), (F32, F32, F16)),
        ((2, 300, 700, 2, 2, 128), (BF16, BF16, BF16)),
        ((1, 100, 700, 4, 4, 80), (F32, BF16, BF16)),
        ((1, 400, 400, 4, 4, 64), (F32, F32, F32)),
    ],
)
def test_the_peak_is_what_is_allocated(
    sizes: Any, dtypes: Any, backend: str, force: Any, native: str
) -> None:
    force(backend)
    batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim = sizes
    q, k, v = operands(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim)
    request = Request(*(*sizes, dtypes[2], dtypes[0], dtypes[1], CPU))

    def call() -> Tensor:
        given = (x.to(dtype, copy=True) for x, dtype in zip((q, k, v), dtypes, strict=True))
        query, key, value = given
        args = [query, key, value]
        del query, key, value, given
        return flash_attention(args.pop(0), args.pop(0), args.pop(0), dtype=dtypes[2])

    call()
    seen, _ = peak_bytes(call, CPU)
    if seen is None:
        pytest.skip("this torch's profiler does not report allocations")
    told = memory.footprint(request, backend)
    assert told is not None
    assert abs(told.peak - seen) < SLACK, (told, seen)


@pytest.mark.parametrize("seqlen_q", [3, 500])
def test_the_log_sum_exp_and_grouped_heads_of_our_rows(seqlen_q: int, native: str) -> None:
    request = Request(2, seqlen_q, 600, 6, 2, 64, BF16, BF16, BF16, CPU, return_lse=True)
    q, k, v = operands(2, seqlen_q, 600, 6, 2, 64, BF16)
    seen, _ = peak_bytes(lambda: torch.ops.wan_attn.sdpa(q, k, v, return_lse=True)[0], CPU)
    if seen is None:
        pytest.skip("this torch's profiler does not report allocations")
    told = memory.footprint(request, "sdpa")
    assert told is not None and abs(told.peak - told.operands - seen) < SLACK


@pytest.mark.parametrize(
    "change",
    [{"return_lse": True}, {"window": (64, 0)}, {"is_causal": True}, {"needs_grad": True}],
    ids=str,
)
def test_what_depends_on_more_than_sizes_is_not_told(change: dict[str, Any]) -> None:
    request = Request(1, 64, 64, 2, 2, 64, BF16, BF16, BF16, CPU, **change)
    assert memory.footprint(request, "torch") is None
    assert memory.footprint(request, "sage") is None
    where_scores_are_stored = dataclasses.replace(request, device=torch.device("mps"))
    assert memory.footprint(where_scores_are_stored, "torch") is None


E = 2 * 512 * 6 * 64  # elements of query, and of key and value


@pytest.mark.skipif(
    compiler() is None or library.load() is None, reason="no C++ compiler, or no native library"
)
@pytest.mark.parametrize(
    ("arch", "head_dim", "copies", "out", "peak"),
    [
        # Bytes for each element. q stays in float32 and k becomes half: 4 + 4 + 2 + 2 at first,
        # then 4 + 2 + 2 and the result, 4.
        (80, 128, 2, 4, 12),
        # TMA reads halves: q becomes one as well, and the result is converted when they are gone.
        (90, 128, 4, 6, 12),
    ],
)
def test_on_a_card(
    arch: int,
    head_dim: int,
    copies: int,
    out: int,
    peak: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(tmp_path, CARDS[arch])
    monkeypatch.setattr(library, "load", lambda: gpu.lib)
    monkeypatch.setattr(library, "lib", lambda: gpu.lib)
    request = Request(2, 512, 512, 6, 6, head_dim, BF16, F32, F32, CUDA)
    elements = E * head_dim // 64
    told = memory.footprint(request, "sdpa")
    assert told == memory.Footprint(
        10 * elements, copies * elements, 0, out * elements, peak * elements
    )


def test_flash_attention_and_torch_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """q and k in both dtypes, one after the other; 12 bytes at first, and less from then on."""
    standins.pretend_card(monkeypatch, (8, 0))
    request = Request(2, 512, 512, 6, 6, 64, BF16, F32, F32, CUDA)
    lse = 2 * 512 * 6 * 4
    want = memory.Footprint(10 * E, 4 * E, lse, 6 * E, 12 * E)
    for backend in ("fa2", "fa3", "xformers", "torch"):
        assert memory.footprint(request, backend) == want


def test_the_memory_of_this_machine() -> None:
    found = memory.device_bytes(CPU)
    if sys.platform == "linux":
        with open("/proc/meminfo", encoding="ascii") as file:
            assert found is not None and abs(found / 1024 - int(file.readline().split()[1])) < 64
    assert memory.device_bytes(torch.device("cuda", 77)) is None


def test_why_tells_it(capsys: pytest.CaptureFixture[str], native: str) -> None:
    command = ["why", "--shape", "ti2v-5b-720p", "--qk-dtype", "fp32", "--device", "cpu"]
    assert cli.main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    # 27,280 * 24 * 128 elements: 10 bytes of operands, 4 of the result, and the row's workspace.
    assert " GiB at most" in said and "(operands 799.2 MiB, workspace" in said
    assert "result 319.7 MiB)" in said
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    assert found["operands_bytes"] == 10 * 27280 * 24 * 128 and found["copies_bytes"] == 0
    held = ("operands", "workspace", "result")
    assert found["peak_bytes"] == sum(found[f"{name}_bytes"] for name in held)


def test_doctor_tells_it_for_wans_sizes(native: str) -> None:
    found = examine.examine(selftest=False)
    choices = {c["workload"]: c for c in found["choices"] if c["device"] == "cpu"}
    for name in ("ti2v-5b-720p", "a14b-480p", "a14b-720p"):
        call = WORKLOADS[name]
        elements = call.seqlen_q * call.num_heads_q * call.head_dim
        assert choices[name]["memory"]["peak_bytes"] >= 12 * elements
        assert choices[name]["block_bytes"] == 85 * elements
    assert choices["clip-vit-h"]["block_bytes"] is None
    text = report.render(found)
    part = text[text.index("\nmemory  (") : text.index("\nbackends  (")]
    assert "6.63 GiB" in part and "A14B 1280x720, 81 frames, self-attention" in part
    assert report.render({**found, "choices": []}).count("\nmemory") == 0


def test_stock_rope_takes_more(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = WORKLOADS["ti2v-5b-720p"]
    request = Request.of(call, torch.bfloat16, "cpu")
    elements = call.seqlen_q * call.num_heads_q * call.head_dim
    assert memory.block_bytes(request) == 85 * elements
    monkeypatch.setenv("WAN_ATTN_ROPE", "off")
    config.refresh()
    assert memory.block_bytes(request) == 88 * elements
    monkeypatch.undo()
    config.refresh()


def bench(*args: str, **variables: str) -> list[dict[str, Any]]:
    """The rows of benchmarks/bench_memory.py for a small video."""
    script = source_tree.ROOT / "benchmarks" / "bench_memory.py"
    environment = {**os.environ, **variables}
    command = [sys.executable, str(script), "--video", "320x192x33", "--json", "/dev/stdout", *args]
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return cast(list[dict[str, Any]], json.loads(ran.stdout[ran.stdout.index("\n{") :])["rows"])


@pytest.mark.skipif(sys.platform == "win32", reason="/dev/stdout")
def test_the_benchmark_of_diffusers_block() -> None:
    pytest.importorskip("diffusers")
    own, *ours = bench(WAN22_DIR="")
    assert own["host"] == "diffusers" and len(ours) == 2
    assert all(row["block_bytes"] <= own["block_bytes"] for row in ours)
    assert ours[-1]["call_bytes"] <= own["call_bytes"] + SLACK


@pytest.mark.skipif(not os.environ.get("WAN22_DIR"), reason="WAN22_DIR is not set")
def test_the_benchmark_of_stock_wan22s_block_and_what_doctor_says_of_it() -> None:
    """28 bytes are there before the block begins; stock flash_attention takes more than ours."""
    own, _, by_torch = bench()[:3]
    assert own["host"] == "Wan2.2" and by_torch["attention"] == "patched, torch"
    held = (memory.WAN22_BLOCK_BYTES, memory.WAN22_BLOCK_BYTES_ROPE)
    for row, said in zip((own, by_torch), held, strict=True):
        assert said - 1 < 28 + row["block_bytes_per_element"] < said + 1
    assert by_torch["call_bytes"] < own["call_bytes"]
