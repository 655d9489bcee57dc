# SPDX-License-Identifier: Apache-2.0
"""compare.py - `bench compare`: is a build slower or faster than another?

Both files hold, for each row, the time of every round, and beside it what a yardstick took in that
same round: the step with the model's own attention, or a fixed matrix product. A row's figure is
the median over its rounds of time / yardstick, so that a machine that was slower throughout on the
second day is not taken for slower code. How far that figure is certain comes from the file itself,
twice: from the spread of its rounds (robust standard error of a median), and from the spread of its
blocks' medians (model and inputs made anew); the larger counts. A change is called one if it is
larger than SIGMAS times the two files' errors taken together, and larger than LEAST. Where even
PLANTED could not be told from noise, or the change is suspicious (above half of what it needs), the
row says "cannot tell" instead of "same".
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_attn.bench.report import Column, Report
from wan_attn.bench.suite import KEYS
from wan_attn.bench.timing import percentile

SIGMAS = 4.0
LEAST = 0.03
PLANTED = 0.10

SAME, SLOWER, FASTER, UNCLEAR = "same", "slower", "faster", "cannot tell"

COLUMNS = (
    Column("video", "video WxHxF"),
    Column("dtype", "dtype"),
    Column("backend", "backend"),
    Column("base_ms", "baseline ms", ".1f"),
    Column("new_ms", "new ms", ".1f"),
    Column("raw_change", "time", "+.1%"),
    Column("change", "against yardstick", "+.1%"),
    Column("threshold", "needed", ".1%"),
    Column("verdict", "verdict"),
)


class CompareError(Exception):
    """A file is not one of `bench suite`, or the two have nothing in common."""


@dataclass(frozen=True, slots=True)
class Series:
    """One row of a suite's file."""

    samples: tuple[float, ...]
    yardstick: tuple[float, ...]
    blocks: tuple[int, ...]

    @property
    def logs(self) -> list[float]:
        """log(time / yardstick) of every round."""
        pairs = zip(self.samples, self.yardstick, strict=True)
        return [math.log(sample / yard) for sample, yard in pairs]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one row: the change of time over yardstick, how large it must be to count."""

    change: float
    threshold: float
    word: str


def load(path: Path) -> dict[tuple[str, ...], Series]:
    """The rows of a suite's CSV file.

    Raises:
        CompareError: it cannot be read, or is none.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CompareError(f"{path} cannot be read: {error}") from error
    wanted = (*KEYS, "samples_ms", "yardstick_ms", "block_rounds")
    if not rows:
        raise CompareError(f"{path} must hold rows of `bench suite`, has none")
    missing = [name for name in wanted if name not in rows[0]]
    if missing:
        raise CompareError(f"{path} must be a file of `bench suite`, has no column {missing[0]}")
    return {tuple(row[key] for key in KEYS): _series(path, row) for row in rows}


def _series(path: Path, row: Mapping[str, str]) -> Series:
    try:
        samples, yardstick = (
            tuple(map(float, row[name].split())) for name in ("samples_ms", "yardstick_ms")
        )
        blocks = tuple(map(int, row["block_rounds"].split()))
    except (ValueError, AttributeError) as error:
        raise CompareError(f"{path} holds a row that is no measurement: {error}") from error
    is_whole = len(samples) == len(yardstick) == sum(blocks) and len(samples) > 1
    if not is_whole or min(*samples, *yardstick) <= 0:
        name = " ".join(row[key] for key in KEYS)
        raise CompareError(
            f"{path}: {name} must have two or more rounds, each with a time and a yardstick above 0"
        )
    return Series(samples, yardstick, blocks)


def uncertainty(series: Series) -> float:
    """Standard error of the median of `logs`: of the rounds or of the blocks, the larger."""
    logs = series.logs
    # Of a normal distribution the quartiles are 1.349 standard deviations apart, and the median's
    # standard error is 1.2533 / sqrt(n) of one.
    spread = (percentile(logs, 75) - percentile(logs, 25)) / 1.349
    of_rounds = 1.2533 * spread / math.sqrt(len(logs))
    medians, place = [], 0
    for size in series.blocks:
        medians.append(statistics.median(logs[place : place + size]))
        place += size
    if len(medians) < 2:
        return of_rounds
    return max(of_rounds, statistics.stdev(medians) / math.sqrt(len(medians)))


def judge(base: Series, new: Series) -> Verdict:
    """Compares two measurements of the same thing."""
    change = statistics.median(new.logs) - statistics.median(base.logs)
    error = math.hypot(uncertainty(base), uncertainty(new))
    needed = max(math.log1p(LEAST), SIGMAS * error)
    if abs(change) > needed:
        word = SLOWER if change > 0 else FASTER
    elif needed > math.log1p(PLANTED) or abs(change) > max(math.log1p(LEAST), needed / 2):
        word = UNCLEAR
    else:
        word = SAME
    return Verdict(math.expm1(change), math.expm1(needed), word)


def compare(base_path: Path, new_path: Path) -> Report:
    """Every row that both files have, judged.

    Raises:
        CompareError: a file cannot be used, or they have no row in common.
    """
    base, new = load(base_path), load(new_path)
    common = [key for key in base if key in new]
    if not common:
        raise CompareError(f"{base_path} and {new_path} have no measurement in common")
    report = Report("compare", f"{new_path.name} against {base_path.name}", COLUMNS)
    report.rows = [_row(key, base[key], new[key]) for key in common]
    for key in base.keys() ^ new.keys():
        where = base_path if key in base else new_path
        report.skipped.append(("", " ".join(key), f"only in {where.name}"))
    counts = {word: 0 for word in (SLOWER, FASTER, SAME, UNCLEAR)}
    for row in report.rows:
        counts[row["verdict"]] += 1
    said = ", ".join(f"{number} {word}" for word, number in counts.items() if number)
    report.notes = [
        f"Verdict: {said}.",
        "`against yardstick` is the change of time over that of the model's own step (for that "
        f"step: of a matrix product) in the same round; it counts above {LEAST:.0%} and "
        f"{SIGMAS:g} standard errors, which come from the rounds' and blocks' own spread. `cannot "
        f"tell`: the noise would hide a change of {PLANTED:.0%}; measure again on a quieter "
        "machine or with more rounds.",
    ]
    return report


def _row(key: tuple[str, ...], base: Series, new: Series) -> dict[str, Any]:
    verdict = judge(base, new)
    base_ms, new_ms = (statistics.median(s.samples) for s in (base, new))
    return {
        **dict(zip(KEYS, key, strict=True)),
        "base_ms": base_ms,
        "new_ms": new_ms,
        "raw_change": new_ms / base_ms - 1,
        "change": verdict.change,
        "threshold": verdict.threshold,
        "verdict": verdict.word,
    }


def has_regression(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any row is slower."""
    return any(row["verdict"] == SLOWER for row in rows)
