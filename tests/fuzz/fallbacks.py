# SPDX-License-Identifier: Apache-2.0
"""fallbacks.py - failures of the driver as Python sees them: the op is answered by the mock driver,
so that it shows who computes a call, what reaches the user, and how often a kernel that cannot be
had is tried again: for the same call, for others, and for the check at a kernel's first use.

    python tests/fuzz/fallbacks.py      prints a table, then what is wrong
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wan_attn.config
from cuda_mock.gpu import CARDS, Gpu
from fuzz.count import Count
from fuzz.driver_faults import CODES, TROUBLE, _close
from tolerances import assert_close_to_oracle
from wan_attn import log
from wan_attn.backends import native
from wan_attn.selfcheck import first_call

OF_THE_IMAGE = (200, 209, 222)  # something else may run the call, and this kernel never will
OTHERS = (1, 2, 500, 701, 800, 999)
FUNCTIONS = (
    "cuInit",
    "cuLibraryLoadData",
    "cuLibraryGetKernel",
    "cuLaunchKernel",
    "cuDevicePrimaryCtxRetain",
)
CPU = torch.device("cpu")
TIMES, LENGTHS = 3, (5, 6, 7)


def _op(gpu: Gpu) -> Any:
    """torch.ops.wan_attn.sdpa on this machine, with errors as the bindings raise them."""

    def sdpa(
        query: Tensor, key: Tensor, value: Tensor, q_lens: Any, k_lens: Any, **more: Any
    ) -> Any:
        try:
            window = more.get("window_left", -1), more.get("window_right", -1)
            call = {"scale": more.get("scale"), "is_causal": more.get("is_causal", False)}
            return gpu.sdpa(query, key, value, q_lens=q_lens, k_lens=k_lens, window=window, **call)
        except RuntimeError as error:
            raise RuntimeError(f"wan_attn: {str(error).partition(': ')[2]}") from None

    return sdpa


class _Lines(logging.Handler):
    """What the log says, instead of showing it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def _machine(folder: Path) -> Iterator[tuple[Gpu, _Lines]]:
    gpu, before, lines, logger = Gpu(folder, CARDS[80]), native._op, _Lines(), log.LOGGER
    level, propagates = logger.level, logger.propagate
    asks_cuda, torch.cuda.is_current_stream_capturing = (
        torch.cuda.is_current_stream_capturing,
        lambda: False,  # the real one needs a driver
    )
    native._op = _op(gpu)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(lines)
    try:
        yield gpu, lines
    finally:
        native._op = before
        torch.cuda.is_current_stream_capturing = asks_cuda
        logger.setLevel(level)
        logger.propagate = propagates
        logger.removeHandler(lines)
        wan_attn.config.forget()
        _close(gpu)


def _attempts(gpu: Gpu, function: str) -> int:
    return sum(line.startswith(f"{function} fails") for line in gpu.log())


def _call(length: int) -> str:
    """What this call came to: "raises", "right" or what is wrong with the result."""
    generator = torch.Generator().manual_seed(length)
    operands = [torch.randn(1, n, 1, 64, generator=generator) for n in (length, 20, 20)]
    operands = [x.to(torch.bfloat16) for x in operands]
    try:
        out: Any = wan_attn.sdpa(*operands)
    except RuntimeError:
        return "raises"
    try:
        assert_close_to_oracle(out, *operands)
    except AssertionError as error:
        return str(error)
    return "right"


def try_fault(function: str, code: int, folder: Path) -> tuple[str, list[str]]:
    """A line of the table, and what is wrong."""
    with _machine(folder) as (gpu, lines):
        wan_attn.config.forget()  # plans and verdicts of the machine before are not this one's
        gpu.fail(function, code)
        results = [_call(LENGTHS[0]) for _ in range(TIMES)]
        same = _attempts(gpu, function)
        results += [_call(length) for length in LENGTHS[1:]]
        others = _attempts(gpu, function)
        said = [line for line in lines.said if f"CUDA_ERROR_{CODES[code]}" in line]
        for _ in range(TIMES):
            with contextlib.suppress(RuntimeError):
                first_call.verdict(native._answer, str, CPU, torch.bfloat16, 64, native._is_final)
        proofs = _attempts(gpu, function)
    problems = [f"a wrong result: {r}" for r in results if r not in ("raises", "right")]
    if code in TROUBLE and function != "cuInit" and "right" in results:  # it knows no context
        problems.append("the device is lost, and another backend computes")
    if function == "cuInit" and "raises" in results:
        problems.append("a driver that does not start stops the call")
    if "right" in results and len(said) != 1:
        problems.append(f"{len(said)} lines of the log say why another backend computes")
    if code in OF_THE_IMAGE and function.startswith("cuLibrary"):
        if "raises" in results:
            problems.append("a kernel that cannot be had stops the call")
        if same > 1:
            problems.append(f"tried {same} times in {TIMES} equal calls")
        if proofs > 1:
            problems.append(f"its check at the first use is made {proofs} times of {TIMES}")
    what = ", ".join(dict.fromkeys(results))
    tried = (
        f"tried: same call {same} of {TIMES}, others {others} of 2, first use {proofs} of {TIMES}"
    )
    return f"{function:26} {CODES[code]:26} {what[:40]:14} {tried}", problems


def campaign() -> Iterator[tuple[str, list[str]]]:
    """Every function with one code of each kind, and some more."""
    with tempfile.TemporaryDirectory() as folder:
        for function in FUNCTIONS:
            for code in (*OF_THE_IMAGE, *TROUBLE, *OTHERS):
                yield try_fault(function, code, Path(folder))


def main() -> int:
    count = Count()
    for line, problems in campaign():
        print(line)
        for problem in problems:
            print(f"    WRONG: {problem}")
        count.calls += 1
        count.wrong += bool(problems)
    return count.end()


if __name__ == "__main__":
    sys.exit(main())
