# SPDX-License-Identifier: Apache-2.0
"""test_bench_compare.py - `bench compare` on made-up measurements: noise, drift, a planted change.

Times are drawn, not taken: no clock decides here.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from wan_attn.__main__ import main
from wan_attn.bench import compare
from wan_attn.bench.compare import FASTER, SAME, SLOWER, UNCLEAR, Series
from wan_attn.bench.suite import KEYS

BLOCKS, ROUNDS = 3, 5


def measured(
    seed: int,
    milliseconds: float = 300.0,
    noise: float = 0.015,
    between: float = 0.005,
    drift: float = 1.0,
) -> Series:
    """Rounds of one row: noise of each call, of each block, spikes, and a slow or fast machine."""
    draw = random.Random(seed)
    samples, yardstick = [], []
    for _ in range(BLOCKS):
        block = draw.lognormvariate(0.0, between)
        for _ in range(ROUNDS):
            weather = drift * draw.lognormvariate(0.0, noise)  # hits both alike
            spike = 1.8 if draw.random() < 0.05 else 1.0
            own = block * draw.lognormvariate(0.0, noise) * spike
            samples.append(milliseconds * weather * own)
            yardstick.append(20.0 * weather * draw.lognormvariate(0.0, noise / 2))
    return Series(tuple(samples), tuple(yardstick), (ROUNDS,) * BLOCKS)


def words(change: float, pairs: int = 200, **machine: float) -> list[str]:
    """Verdicts of many pairs of runs, the second one's build slower by `change`."""
    return [
        compare.judge(measured(seed), measured(seed + 10_000, 300.0 * (1 + change), **machine)).word
        for seed in range(pairs)
    ]


def test_two_runs_of_one_build_are_the_same() -> None:
    found = words(0.0)
    assert found.count(SLOWER) + found.count(FASTER) <= 2, found
    assert found.count(SAME) >= 190


def test_a_planted_regression_of_ten_percent_is_found() -> None:
    found = words(0.10)
    assert found.count(SLOWER) >= 195, found
    assert FASTER not in found


def test_a_gain_of_ten_percent_is_found() -> None:
    assert words(-0.10).count(FASTER) >= 190


@pytest.mark.parametrize("drift", [0.8, 1.3])
def test_a_machine_of_another_speed_is_no_regression(drift: float) -> None:
    found = words(0.0, drift=drift)
    assert found.count(SLOWER) + found.count(FASTER) <= 2
    assert words(0.10, drift=drift).count(SLOWER) >= 195


def test_without_the_yardstick_that_would_have_been_one() -> None:
    """The test above can fail: the same times against a yardstick that did not slow down."""
    base, new = measured(1), measured(2, drift=1.3)
    deaf = Series(new.samples, tuple(y / 1.3 for y in new.yardstick), new.blocks)
    assert compare.judge(base, deaf).word == SLOWER


def test_too_much_noise_is_said_and_not_called_the_same() -> None:
    noisy = [
        compare.judge(measured(s, noise=0.15), measured(s + 9, noise=0.15)).word for s in range(50)
    ]
    assert noisy.count(UNCLEAR) >= 45
    assert SAME not in noisy


def test_blocks_that_differ_count_even_if_rounds_agree() -> None:
    """Three blocks, each quiet in itself, 6 % apart: what no single run would show."""
    steady = Series((100.0,) * 5 + (106.0,) * 5 + (112.0,) * 5, (10.0,) * 15, (5, 5, 5))
    other = Series((112.0,) * 15, (10.0,) * 15, (5, 5, 5))
    assert compare.uncertainty(steady) == pytest.approx(0.0327, abs=2e-3)
    assert compare.judge(steady, other).word == UNCLEAR


def write(path: Path, rows: dict[str, Series], **change: str) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        fields = [*KEYS, "samples_ms", "yardstick_ms", "block_rounds"]
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for backend, series in rows.items():
            row = dict.fromkeys(KEYS, "x") | {"backend": backend}
            row["samples_ms"] = " ".join(map(str, series.samples))
            row["yardstick_ms"] = " ".join(map(str, series.yardstick))
            row["block_rounds"] = " ".join(map(str, series.blocks))
            writer.writerow(row | change)
    return path


def test_the_command_tells_a_regression_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write(tmp_path / "base.csv", {"sdpa": measured(1), "torch": measured(2)})
    same = write(tmp_path / "same.csv", {"sdpa": measured(3), "torch": measured(4)})
    slow = write(tmp_path / "slow.csv", {"sdpa": measured(3, 333.0), "fa2": measured(4)})
    assert main(["bench", "compare", str(base), str(same)]) == 0
    assert "2 same" in capsys.readouterr().out
    assert main(["bench", "compare", str(base), str(slow)]) == 1
    said = capsys.readouterr().out
    assert "1 slower" in said and "only in slow.csv" in said and "only in base.csv" in said


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: p.write_text("a,b\n1,2\n"), "has no column settings"),
        (lambda p: p.write_text(""), "has none"),
        (lambda p: write(p, {"sdpa": measured(1)}, samples_ms="1.0 fast"), "is no measurement"),
        (lambda p: write(p, {"sdpa": measured(1)}, yardstick_ms="1 2"), "two or more rounds"),
        (lambda p: write(p, {"other": measured(1)}), "no measurement in common"),
    ],
)
def test_files_that_cannot_be_compared(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    base = write(tmp_path / "base.csv", {"sdpa": measured(1)})
    new = write(tmp_path / "new.csv", {"sdpa": measured(2)})
    spoil(new)
    assert main(["bench", "compare", str(base), str(new)]) == 2
    assert message in capsys.readouterr().err


def test_a_suspicious_change_is_not_called_the_same() -> None:
    """Two standard errors of four: too little to call, too much to call nothing."""
    rounds = [100.0 * (1 + 0.04 * (n - 7) / 7) for n in range(15)]  # 4 % up and down
    base = Series(tuple(rounds), (10.0,) * 15, (15,))
    near = Series(tuple(r * 1.031 for r in rounds), (10.0,) * 15, (15,))
    needed = compare.judge(base, base).threshold
    assert 0.04 < needed < 0.062
    assert compare.judge(base, near).word == UNCLEAR
    assert compare.judge(base, base).word == SAME
