# SPDX-License-Identifier: Apache-2.0
"""selftest.py - runs one path over every call of selfcheck and judges what comes back."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wan_attn.log import DTYPES
from wan_attn.selfcheck.reference import MASKS, UNIT, Case, Truth, cases, make_inputs, reference

TF32_UNIT = 2.0**-11  # float32 matrix products on a GPU where the user allows TF32
LARGE = 1e30
MAX_FAILURES = 5  # shown per path; the rest are counted
Answer = tuple[Tensor, Tensor | None]  # out, lse
Prepared = dict[Case, tuple[tuple[Tensor, Tensor, Tensor], Truth]]


@dataclass(frozen=True)
class Path:
    """Something that computes attention: run(q, k, v, q_lens, k_lens, is_causal, window)."""

    kind: str  # "backend", "kernel" or "function"
    name: str
    device: str
    why_not: Callable[[Case, torch.dtype], str | None]
    run: Callable[..., Answer]
    is_ours: bool = False  # scores stay in float32

    @property
    def key(self) -> str:
        return f"{self.device}/{self.kind}/{self.name}"


@dataclass
class Result:
    """What one path did. `ratio` is the worst error as a part of its bound: above 1 is wrong."""

    kind: str
    name: str
    device: str
    calls: int = 0
    failed: int = 0
    skipped: int = 0
    skip_reason: str = ""
    ratio: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    worst_case: str = ""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.device}/{self.kind}/{self.name}"

    def fail(self, what: str) -> None:
        self.failed += 1
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(what)


def _judge(
    result: Result, where: str, got: Answer, truth: Truth, unit: float, is_ours: bool
) -> str | None:
    """What is wrong with an answer, or None; keeps the worst error in `result`."""
    checks = [("out", got[0], truth.out, truth.out_bound(unit, is_ours))]
    if got[1] is not None:
        checks.append(("lse", got[1], truth.lse, truth.lse_bound(unit, is_ours)))
    for what, have, expected, bound in checks:
        if tuple(have.shape) != tuple(expected.shape):
            return f"{what} has shape {list(have.shape)}, not {list(expected.shape)}"
        have = have.detach().to("cpu", torch.float64)
        same = have == expected  # also -inf and -inf
        error = torch.where(same, 0.0, (have - expected).abs())
        if bool(torch.isnan(error).any()):
            return f"{what} has {int(torch.isnan(error).sum())} NaN"
        # A row without keys has bound 0: exactly 0 is asked. JSON has no infinity.
        ratio = torch.where(same, 0.0, error / bound).clamp(max=LARGE)
        error = error.clamp(max=LARGE)
        worst = int(ratio.argmax())
        off, limit, part = (float(x.flatten()[worst]) for x in (error, bound, ratio))
        if part > result.ratio:
            result.ratio, result.error, result.bound, result.worst_case = part, off, limit, where
        if part > 1:
            return f"{what} is off by {off:.3g}, {part:.3g} times the bound"
    return None


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Uses few threads: on a busy machine they would mostly wait for each other in small calls."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare() -> Prepared:
    """Inputs and float64 results of every case: made once, used by every path."""
    prepared = {}
    with _threads(1):
        for case in cases():
            inputs = make_inputs(case)
            prepared[case] = (inputs, reference(case, *inputs))
    return prepared


def _unit(device: str, dtype: torch.dtype) -> float:
    if dtype is torch.float32 and device != "cpu" and torch.backends.cuda.matmul.allow_tf32:
        return TF32_UNIT
    return UNIT[dtype]


def _call(path: Path, case: Case, dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> Answer:
    is_causal, window = MASKS[case.mask]
    # q_lens on the path's device, k_lens on the CPU in int64 as stock Wan2.2 passes them: both are
    # in the contract.
    q_lens = (
        torch.tensor(case.q_lens, dtype=torch.int32, device=path.device) if case.q_lens else None
    )
    return path.run(
        *(x.to(path.device, dtype) for x in inputs),
        q_lens=q_lens,
        k_lens=torch.tensor(case.k_lens, dtype=torch.int64, device="cpu"),
        is_causal=is_causal,
        window=window,
    )


def _try(
    path: Path, case: Case, label: str, prepared: Prepared, threads: int, result: Result
) -> str | None:
    """One call, on all threads if it is long enough to share; what is wrong with it, or None."""
    dtype, (inputs, truth) = DTYPES[label], prepared[case]
    try:
        reason = path.why_not(case, dtype)
        if reason is not None:
            result.skipped += 1
            result.skip_reason = result.skip_reason or reason
            return None
        result.calls += 1
        with _threads(threads if case.is_longest else 1):
            got = _call(path, case, dtype, inputs)
            again = _call(path, case, dtype, inputs) if case.is_longest else got
        if not torch.equal(got[0], again[0]) and not torch.isnan(got[0]).any():
            return "the same call gave other bits the second time"
        unit = _unit(path.device, dtype)
        return _judge(result, f"{case} {label}", got, truth, unit, path.is_ours)
    except Exception as error:  # noqa: BLE001 - any error of a library is its path's failure
        return f"{type(error).__name__}: {_first_line(error)}"


def check(path: Path, prepared: Prepared) -> Result:
    """Runs one path over every case that it takes. A path that fails raises nothing here."""
    result = Result(path.kind, path.name, path.device)
    start, threads = time.perf_counter(), torch.get_num_threads()
    with torch.no_grad(), _threads(1):
        for case, label in itertools.product(prepared, DTYPES):
            wrong = _try(path, case, label, prepared, threads, result)
            if wrong is not None:
                result.fail(f"{case} {label}: {wrong}")
    result.seconds = time.perf_counter() - start
    return result


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def check_all(
    paths: Iterable[Path], started: Callable[[Path], None] = lambda path: None
) -> Iterator[Result]:
    """Yields results one by one; calls `started` before each, so that a crash names its path."""
    prepared = prepare()
    for path in paths:
        started(path)
        yield check(path, prepared)
