# SPDX-License-Identifier: Apache-2.0
"""test_bench_timing.py - the clocks and rounds of wan_attn.bench; the GPU's with fake events."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch

import wan_attn
from wan_attn.bench import facts, timing


class FakeCuda:
    """torch.cuda with a time line of its own: work takes as long as it says, waiting nothing.

    An event that is read before synchronize() is the mistake that real events punish with an error.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.synchronized = -1.0
        self.log: list[str] = []

    def Event(self, enable_timing: bool = False) -> Any:
        assert enable_timing, "an event without timing cannot be read"
        return FakeEvent(self)

    def get_device_properties(self, device: torch.device) -> Any:
        return type("Properties", (), {"L2_cache_size": 50 << 20})

    def synchronize(self, device: Any = None) -> None:
        self.log.append("synchronize")
        self.synchronized = self.now

    def work(self, milliseconds: float, name: str = "work") -> None:
        self.log.append(name)
        self.now += milliseconds


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, -1.0

    def record(self, stream: Any = None) -> None:
        self.cuda.log.append("record")
        self.at = self.cuda.now

    def query(self) -> bool:
        return self.at <= self.cuda.synchronized

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.at <= self.cuda.synchronized, "read before synchronize()"
        return end.at - self.at


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def device_clock(cuda: FakeCuda) -> timing.DeviceClock:
    clock = timing.DeviceClock(torch.device("cpu"), api=cuda)
    clock.flush = lambda: cuda.work(1000.0, "flush")  # type: ignore[method-assign]
    return clock


def test_device_times_are_those_of_the_calls_and_not_of_the_flush(cuda: FakeCuda) -> None:
    durations = {"a": 3.0, "b": 7.0}
    calls = {n: (lambda n=n: cuda.work(durations[n], n)) for n in durations}
    found = timing.interleave(calls, device_clock(cuda), rounds=4)
    assert found.times == {"a": [3.0] * 4, "b": [7.0] * 4}
    assert found.skipped == {}


def test_the_cache_is_flushed_before_every_call_and_the_device_waited_for_once_a_round(
    cuda: FakeCuda,
) -> None:
    calls = {n: (lambda n=n: cuda.work(1.0, n)) for n in "ab"}
    timing.interleave(calls, device_clock(cuda), warmup=1, rounds=3)
    rounds = cuda.log[cuda.log.index("record") - 1 :]
    assert rounds.count("synchronize") == 3
    one = ["flush", "record", "?", "record"]
    expected = (one * 2 + ["synchronize"]) * 3
    assert [word if word not in "ab" else "?" for word in rounds] == expected


def test_everybody_comes_first_and_behind_everybody(cuda: FakeCuda) -> None:
    calls = {n: (lambda n=n: cuda.work(1.0, n)) for n in "abc"}
    timing.interleave(calls, device_clock(cuda), warmup=1, rounds=6)
    order = [word for word in cuda.log if word in "abc"][3:]
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert {r[0] for r in rounds} == set("abc")
    behind = {r[i : i + 2] for r in rounds for i in (0, 1)}
    assert len(behind) >= 5, f"of six neighbourhoods, only {behind}"


def test_a_call_that_fails_is_left_out_with_its_reason(cuda: FakeCuda) -> None:
    count = 0

    def late() -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise ValueError("no more")

    def never() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    calls = {"good": lambda: cuda.work(2.0), "late": late, "never": never}
    found = timing.interleave(calls, device_clock(cuda), warmup=2, rounds=5)
    assert found.times == {"good": [2.0] * 5}
    assert found.skipped == {"never": "out of memory", "late": "ValueError: no more"}


def test_a_broken_device_ends_everything(cuda: FakeCuda) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        timing.interleave({"x": broken}, device_clock(cuda), rounds=3)


def test_the_flush_writes_more_than_the_cache_holds(cuda: FakeCuda) -> None:
    clock = timing.DeviceClock(torch.device("cpu"), api=cuda)
    assert clock.flush_bytes >= 2 * (50 << 20)
    small = timing.DeviceClock(torch.device("cpu"), api=cuda, flush_bytes=64)
    small.flush()
    assert small._buffer is not None and small._buffer.numel() == 64
    timing.DeviceClock(torch.device("cpu"), api=cuda, flush_bytes=0).flush()


def test_cpu_time_leaves_out_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = timing.clock_for(torch.device("cpu"), cpu_time=True)
    monkeypatch.setattr(time, "process_time", iter([1.0, 1.5]).__next__)
    mark = clock.end(clock.begin())  # whatever the wall clock says
    assert clock.read(mark) == pytest.approx(500.0 / torch.get_num_threads())


def test_garbage_collection_waits_and_comes_back() -> None:
    seen = []
    timing.interleave({"x": lambda: seen.append(gc.isenabled())}, timing.WallClock(), rounds=2)
    assert seen[-2:] == [False, False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 90, 5.0),
        ([1.0, 3.0], 50, 2.0),
        ([4.0, 1.0, 2.0, 3.0], 100, 4.0),
        ([1.0, 2.0], 0, 1.0),
    ],
)
def test_percentiles_lie_between_the_values(
    values: list[float], percent: float, expected: float
) -> None:
    assert timing.percentile(values, percent) == pytest.approx(expected)


def test_measure_step_counts_only_what_it_should() -> None:
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1

    timing_ = wan_attn.bench.measure_step(step, warmup=2, iters=5)
    assert calls == 7
    avg_ms, p50_ms, p90_ms, iters = timing_
    assert (timing_.avg_ms, timing_.p50_ms, timing_.p90_ms, timing_.iters) == (
        avg_ms,
        p50_ms,
        p90_ms,
        iters,
    )
    assert iters == 5 and 0 <= p50_ms <= p90_ms


def test_measure_step_reads_events(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    clock = device_clock(cuda)
    monkeypatch.setattr(timing, "clock_for", lambda device: clock)
    durations = iter([9.0, *range(1, 11)])
    found = timing.measure_step(lambda: cuda.work(next(durations)), 1, 10, device="cpu")
    assert list(found) == [5.5, 5.5, pytest.approx(9.1), 10]
    assert "flush" not in cuda.log, "a step runs as programs run it"


@pytest.mark.parametrize(("warmup", "iters", "name"), [(-1, 5, "warmup"), (0, 0, "iters")])
def test_measure_step_refuses(warmup: int, iters: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        timing.measure_step(lambda: None, warmup, iters)


def test_smi_is_read_and_missing_values_are_absent() -> None:
    state = facts.parse_smi("1980, 2100, [N/A], 431.25, 600.00, 61", "0x0000000000000004")
    assert state.values == {
        "sm_mhz": 1980.0,
        "sm_mhz_max": 2100.0,
        "power_w": 431.25,
        "power_limit_w": 600.0,
        "temperature_c": 61.0,
    }
    assert state.throttled == ("power limit",)
    assert facts.parse_smi("", "0x1").throttled == ()  # bit 0: idle, no reason to worry


def test_throttling_and_silence_are_said() -> None:
    gpu = torch.device("cuda", 0)
    held = facts.State({"sm_mhz": 1.0}, ("power limit",))
    assert "power limit" in facts.warnings_of(facts.State({"sm_mhz": 2.0}), held, gpu)[0]
    assert "nvidia-smi" in facts.warnings_of(facts.State({}), facts.State({}), gpu)[0]
    busy = facts.State({"load": 1e3})
    assert "busy" in facts.warnings_of(busy, facts.State({}), torch.device("cpu"))[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_gpus_name_leads_to_its_data_sheet(name: str, expected: float | None) -> None:
    assert facts.datasheet_by_name(name) == expected


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(1.0, timing.ROUNDS_SLOW), (20.0, timing.ROUNDS_MIN), (120.0, 12), (1e9, timing.ROUNDS_MAX)],
)
def test_seconds_decide_how_many_rounds(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))  # every look at the time is ten seconds later
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    found = timing.interleave({"x": lambda: None}, FakeClockless(), seconds=seconds)
    assert len(found.times["x"]) == rounds


class FakeClockless(timing.WallClock):
    """Looks at no time of its own."""

    def begin(self) -> float:
        return 0.0

    def end(self, begun: float) -> float:
        return 0.0
