# SPDX-License-Identifier: Apache-2.0
"""driver_faults.py - every call to the CUDA driver fails, the first time or later, with every kind
of error, on the mock driver: what is said, whether something else takes over, whether anything is
left behind, whether it is tried again for ever, and whether calls are right once all is well.

    python tests/fuzz/driver_faults.py [--short] [--write]

Prints a line for each fault, then what is wrong: the table of docs/driver-faults.md, too, unless
--write brings it up to date.
"""

from __future__ import annotations

import _ctypes
import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cuda_mock.gpu import CARDS, LAUNCH, Gpu
from emu import cases_qk8
from emu.rows import tiles_qk8_for
from emu.run import Result
from fuzz import driver_table
from fuzz.count import Count
from tolerances import assert_close_to_oracle
from wan_attn.backends._errors import is_device_error
from wan_attn.native.library import QK8, Guard

# Errors of cuda.h; after those of TROUBLE the device or its context is lost, and nothing else may
# hide it by computing.
CODES = {
    1: "INVALID_VALUE",
    2: "OUT_OF_MEMORY",
    3: "NOT_INITIALIZED",
    4: "DEINITIALIZED",
    100: "NO_DEVICE",
    101: "INVALID_DEVICE",
    200: "INVALID_IMAGE",
    201: "INVALID_CONTEXT",
    209: "NO_BINARY_FOR_GPU",
    218: "INVALID_PTX",
    222: "UNSUPPORTED_PTX_VERSION",
    304: "OPERATING_SYSTEM",
    400: "INVALID_HANDLE",
    500: "NOT_FOUND",
    700: "ILLEGAL_ADDRESS",
    701: "LAUNCH_OUT_OF_RESOURCES",
    702: "LAUNCH_TIMEOUT",
    709: "CONTEXT_IS_DESTROYED",
    719: "LAUNCH_FAILED",
    800: "NOT_PERMITTED",
    801: "NOT_SUPPORTED",
    802: "SYSTEM_NOT_READY",
    803: "SYSTEM_DRIVER_MISMATCH",
    900: "STREAM_CAPTURE_UNSUPPORTED",
    999: "UNKNOWN",
}
TROUBLE = (700, 702, 709, 719)
FINAL = (1, 3, 4, 100, 101, 803)  # a driver that does not start so never will in this process
SHORT_CODES = (2, 209, 700, 702, 709, 800, 999)  # of every kind, and what is an exception

# What fails -> the calls of it that a call of ours makes: after so many, the next one fails.
FUNCTIONS = {
    "cuInit": (0,),
    "cuDriverGetVersion": (0,),
    "cuDeviceGetCount": (0,),
    "cuDeviceGet": (0,),
    "cuDeviceGetName": (0,),
    "cuDeviceGetAttribute": (0, 1, 2),
    "cuDevicePrimaryCtxRetain": (0,),
    "cuCtxPushCurrent_v2": (0,),
    "cuCtxPopCurrent_v2": (0,),
    "cuCtxGetCurrent": (0,),
    "cuThreadExchangeStreamCaptureMode": (0, 1),
    "cuLibraryLoadData": (0, 1, 2),
    "cuLibraryGetKernel": (0, 1, 2),
    "cuKernelSetAttribute": (0,),  # of Hopper's kernel, which needs more than 48 KiB
    "cuKernelGetFunction": (0, 1, 2),
    "cuLaunchKernel": (0, 1, 2),
    "cuTensorMapEncodeTiled": (0, 3),
}
# The same of a call of 8-bit scores with a guard; its passes are lengths, three for V, four for q
# and k, attention, the guard: which of them fails.
LOSSY = dict.fromkeys(
    ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuLaunchKernel"), (4, 8, 9)
)
ASKING = tuple(FUNCTIONS)[:6]  # they only ask what there is: without an answer, another backend
TIMES = 3  # calls while the driver fails
UNTIL_WELL = 50  # calls within which a driver is started again


@dataclass
class Row:
    """What came of one fault."""

    function: str
    after: int
    code: int
    is_lossy: bool = False
    said: str = ""
    is_fallback: bool = False  # whether another backend would compute the call
    attempts: int = 0  # calls of the failing function in TIMES calls of ours
    loads: int = 0  # modules loaded meanwhile
    is_well_again: bool = False
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        name = f"{self.function}+{self.after}{' 8 bits' * self.is_lossy}"
        what = "falls back" if self.is_fallback else "raises"
        again = "right again" if self.is_well_again else "stays out"
        return (
            f"{name:29} {CODES[self.code]:26} {what:10} {self.attempts:3} attempts"
            f" {self.loads:2} loads  {again:15} {self.said[:110]}"
        )


def _operands(function: str, is_lossy: bool) -> tuple[int, dict[str, Any]]:
    """A card, and a call on it with three passes: lengths, conversion of key, attention; or one of
    8-bit scores with a guard."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, n, 1, 64, generator=generator) for n in (5, 20, 20))
    value = value.to(torch.bfloat16)
    if function in ("cuTensorMapEncodeTiled", "cuKernelSetAttribute"):
        query, key = query.to(torch.bfloat16), key.to(torch.bfloat16)
        return 90, {"query": query, "key": key, "value": value}
    call = {"query": query, "key": key, "value": value, "k_lens": torch.tensor([13])}
    if not is_lossy:
        return 80, call
    return 86, call | {"precision": QK8, "guard": torch.zeros(5, dtype=torch.int32)}


def _check_result(arguments: dict[str, Any], out: torch.Tensor, lse: torch.Tensor) -> str:
    """Why the result is wrong; ""."""
    names = ("query", "key", "value")
    call = {n: x for n, x in arguments.items() if n not in (*names, "precision", "guard")}
    operands = [arguments[n] for n in names]
    rounded = [x.to(torch.bfloat16) for x in operands]
    try:
        if "guard" in arguments:
            tile = next(t for t in tiles_qk8_for(86) if (t.dtype, t.head_dim) == ("BF16", 64))
            cases_qk8.check_result(tile, Result(out, lse, 0), *operands, **call)
            _check_guard(arguments)
        else:
            assert_close_to_oracle(out.to(torch.bfloat16), *rounded, lse=lse, **call)
    except AssertionError as error:
        return str(error)
    return ""


def _check_guard(arguments: dict[str, Any]) -> None:
    """Only the call that was computed counts, and of its values the real ones."""
    guard = Guard.from_buffer_copy(bytes(arguments["guard"].numpy().tobytes()))
    largest = float(arguments["value"][:, :13].abs().max())
    found = guard.largest_value, guard.nonfinite_values, guard.nonfinite_results
    assert found == (largest, 0, 0), f"the guard says {found}"


def _close(gpu: Gpu) -> None:
    """Thousands of machines in one process would not fit."""
    for library in (gpu.lib, gpu.driver):
        _ctypes.dlclose(library._handle)


def _attempt(gpu: Gpu, arguments: dict[str, Any]) -> str:
    try:
        gpu.sdpa(**arguments)
    except RuntimeError as error:
        return str(error)
    return ""


def try_fault(
    function: str,
    after: int,
    code: int,
    folder: Path,
    is_emulated: bool = True,
    is_lossy: bool = False,
) -> Row | None:
    """One fault on a machine of its own; None: the call never gets there.

    is_emulated: afterwards the call is computed and held against the oracle; else only launched.
    is_lossy: a call of 8-bit scores, with a guard.
    """
    row = Row(function, after, code, is_lossy)
    arch, arguments = _operands(function, is_lossy)
    gpu = Gpu(folder, CARDS[arch])
    for copy in folder.iterdir():
        copy.unlink()  # it is loaded
    gpu.fail(function, code, after)
    first = _attempt(gpu, arguments)
    log = gpu.log()
    for _ in range(TIMES - 1):
        _attempt(gpu, arguments)
    log += gpu.log()
    row.attempts = sum(line.startswith(f"{function} fails") for line in log)
    row.loads = sum(line.startswith("load ") for line in log)
    unloads = sum(line.startswith("unload") for line in log)
    if row.loads - unloads > len(set(gpu.asked)):
        images = len(set(gpu.asked))
        row.problems.append(f"{row.loads - unloads} modules of {images} images: one a call leaks")
    if row.attempts > 0:
        status, _, said = first.partition(": ")
        row.said = said
        row.is_fallback = bool(first) and not is_device_error(RuntimeError(f"wan_attn: {said}"))
        _judge_refusal(row, status)
        if gpu.driver.mock_depth() != 0:
            row.problems.append("a context is left on the stack")
        gpu.fail("", 0)
        _judge_afterwards(row, gpu, arguments, is_emulated)
    _close(gpu)
    return row if row.attempts > 0 else None


def _judge_afterwards(row: Row, gpu: Gpu, arguments: dict[str, Any], is_emulated: bool) -> None:
    """Once the driver is well again, so are calls; but for one that never starts."""
    is_final = row.function == "cuInit" and row.code in FINAL
    if not is_emulated:
        gpu.driver.mock_on_launch(LAUNCH(0))
    for _ in range(UNTIL_WELL if row.function == "cuInit" and not is_final else 1):
        try:
            out, lse = gpu.sdpa(**arguments)
        except RuntimeError as error:
            said = str(error)
            continue
        wrong = _check_result(arguments, out, lse) if is_emulated else ""
        row.is_well_again = not wrong
        if wrong:
            row.problems.append(f"a wrong result afterwards: {wrong}")
        if is_final:
            row.problems.append("a driver that cannot start is tried again")
        return
    if not is_final:
        row.problems.append(f"not well again: {said}")


def _judge_refusal(row: Row, status: str) -> None:
    """What must be true of any refusal, whatever failed."""
    name = f"CUDA_ERROR_{CODES[row.code]}"
    if not row.said:
        if row.function != "cuCtxPopCurrent_v2":  # what was pushed can be popped
            row.problems.append("the failure is not reported")
        return
    if status not in ("2", "3"):
        row.problems.append(f"status {status}")
    if name not in row.said:
        row.problems.append("the message does not name the driver's error")
    if row.function == "cuInit":  # it knows no context: nothing of the caller's can be lost
        if not row.is_fallback:
            row.problems.append("a driver that does not start stops the call")
        if row.code in FINAL and row.attempts > 1:
            row.problems.append(f"tried {row.attempts} times, and it never starts")
        return
    if row.code in TROUBLE and row.is_fallback:
        row.problems.append("the device is lost, and another backend would compute on it")
    if row.function in ASKING and row.code not in (2, *TROUBLE) and not row.is_fallback:
        row.problems.append("a device that cannot be asked stops the call")


def campaign(short: bool) -> Iterator[Row]:
    """Every function, every place, every code, of an exact call and of a lossy one."""
    with tempfile.TemporaryDirectory() as folder:
        for is_lossy, functions in ((False, FUNCTIONS), (True, LOSSY)):
            for function, places in functions.items():
                # Of a lossy call the guard, which is its last pass.
                few = places[-1:] if is_lossy else places[:1]
                for after in few if short else places:
                    for code in SHORT_CODES if short else CODES:
                        is_emulated = code == SHORT_CODES[0]  # the same for all, and takes time
                        row = try_fault(
                            *(function, after, code, Path(folder), is_emulated, is_lossy)
                        )
                        if row is not None:
                            yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="one place and some errors of each")
    parser.add_argument("--write", action="store_true", help="write docs/driver-faults.md")
    options = parser.parse_args()
    rows = []
    for row in campaign(options.short):
        rows.append(row)
        print(row, flush=True)
        for problem in row.problems:
            print(f"    WRONG: {problem}")
    wrong = sum(bool(row.problems) for row in rows)
    old, new = driver_table.pages(rows, CODES, FINAL)
    if options.write:
        driver_table.PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        wrong += 1
        print(driver_table.STALE)
    return Count(calls=len(rows), wrong=wrong).end()


if __name__ == "__main__":
    sys.exit(main())
