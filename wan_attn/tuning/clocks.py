# SPDX-License-Identifier: Apache-2.0
"""clocks.py - marks before and after a call, and the milliseconds between them.

On a GPU the device's own events are read, once per round: between two events the host only queues
work, and nothing waits. Before each call a buffer larger than the L2 cache is overwritten, so that
no call finds its operands there; that write also gives the host time to queue the call, so that
launching it is not measured.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

FLUSH_BYTES_MIN = 256 << 20  # where a device does not tell the size of its L2 cache


def mark(device: torch.device, api: Any = torch.cuda) -> Any:
    """Now: an event on the device's current stream, or the clock's seconds on the CPU; None while a
    CUDA graph is being captured, in which nothing can be timed. For calls of a run that goes on,
    where nothing may wait.

    Args:
        api: torch.cuda, or a stand-in.
    """
    if device.type != "cuda":
        return time.perf_counter()
    if api.is_current_stream_capturing():
        return None
    event = api.Event(enable_timing=True)
    event.record(api.current_stream(device))
    return event


class Clock(Protocol):
    """Marks the time before and after a call, and reads the marks later."""

    def begin(self) -> Any: ...

    def end(self, begun: Any) -> Any: ...

    def wait(self) -> None:
        """Waits until everything between marks has run."""

    def read(self, mark: Any) -> float:
        """Returns the milliseconds of a mark that end() returned; call wait() before."""

    def flush(self) -> None:
        """Empties the caches, where that is possible."""


class WallClock:
    """time.perf_counter: for the CPU, where a call has run when it returns."""

    def begin(self) -> float:
        return time.perf_counter()

    def end(self, begun: float) -> float:
        return time.perf_counter() - begun

    def wait(self) -> None:
        """Does nothing: on a CPU a call has run when it returns."""

    def read(self, mark: float) -> float:
        return mark * 1e3

    def flush(self) -> None:
        """Does nothing: a model's calls find a CPU's caches as they are, too."""


class CpuTimeClock(WallClock):
    """The CPU time of this process over its threads: for a machine that others use, too.

    What waits for a core is not counted. A waiting OpenMP thread that spins is: set
    OMP_WAIT_POLICY=passive before Python starts.
    """

    def begin(self) -> float:
        return time.process_time()

    def end(self, begun: float) -> float:
        return (time.process_time() - begun) / torch.get_num_threads()


class DeviceClock:
    """Events on the current stream of a CUDA device.

    Args:
        device: the one to time.
        api: torch.cuda, or a stand-in.
        flush_bytes: how much to overwrite before a call; None: twice the L2 cache, 0: nothing.
    """

    def __init__(
        self, device: torch.device, api: Any = torch.cuda, flush_bytes: int | None = None
    ) -> None:
        self.device, self.api = device, api
        if flush_bytes is None:
            l2 = getattr(api.get_device_properties(device), "L2_cache_size", 0)
            flush_bytes = max(FLUSH_BYTES_MIN, 2 * l2)
        self.flush_bytes = flush_bytes
        self._buffer: torch.Tensor | None = None

    def begin(self) -> Any:
        event = self.api.Event(enable_timing=True)
        event.record()
        return event

    def end(self, begun: Any) -> tuple[Any, Any]:
        event = self.api.Event(enable_timing=True)
        event.record()
        return begun, event

    def wait(self) -> None:
        self.api.synchronize(self.device)

    def read(self, mark: tuple[Any, Any]) -> float:
        begin, end = mark
        return float(begin.elapsed_time(end))

    def flush(self) -> None:
        if not self.flush_bytes:
            return
        if self._buffer is None:
            self._buffer = torch.empty(self.flush_bytes, dtype=torch.uint8, device=self.device)
        self._buffer.zero_()


def clock_for(
    device: torch.device, flush_bytes: int | None = None, cpu_time: bool = False
) -> Clock:
    """The clock of this device; flush_bytes as DeviceClock has it, cpu_time for a CPU only."""
    if device.type == "cuda":
        return DeviceClock(device, flush_bytes=flush_bytes)
    return CpuTimeClock() if cpu_time else WallClock()
