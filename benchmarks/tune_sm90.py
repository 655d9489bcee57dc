# SPDX-License-Identifier: Apache-2.0
"""tune_sm90.py - which instance of a Hopper row is fastest for which call, on this machine.

    python -m benchmarks.tune_sm90 [--out FILE] [--rounds N] [--dtype bf16|f16]

Times the instances of csrc/cuda/sdpa_rows.def (TILE_SM90) and SPARE ones at the lengths that
Wan2.2 uses, in turns, and writes what it found as JSON. `choose` reads such a table: the entry of
the nearest lengths, or the list's own order where the table has nothing of the kind. An instance
replaces the list's choice only if it is faster by GAIN.

No GPU was at hand when this was written: the logic is tested with a stand-in for the timer
(tests/test_tune_sm90.py), the part that talks to a GPU (hopper_device.py) is not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from emu.rows_sm90 import TileSm90, tile_for, tiles_sm90

# Tiles that the list does not have, but might: as the first of the same row, with these columns.
SPARE = {"sdpa_sm90_d128": {"from_q": 0, "block_n": 128, "stages": 3, "cluster": 2}}
GAIN = 0.01
VERSION = 1


@dataclass(frozen=True)
class Call:
    """What the choice may depend on, and the heads and batch it is timed with."""

    row: str
    is_masked: bool
    seqlen_q: int
    seqlen_k: int
    heads: int = 24
    batch: int = 1

    def flop(self, head_dim: int) -> float:
        pairs = self.seqlen_q * self.seqlen_k * (0.5 if self.is_masked else 1.0)
        return 4.0 * pairs * head_dim * self.heads * self.batch


Timer = Callable[[TileSm90, Call], float]  # seconds of one run


def instances() -> list[TileSm90]:
    """Those of the list, then the spare ones."""
    first = {tile.symbol: tile for tile in reversed(tiles_sm90()) if tile.row in SPARE}
    return [*tiles_sm90(), *(replace(t, use="SPARE", **SPARE[t.row]) for t in first.values())]


def candidates(call: Call) -> list[TileSm90]:
    """Every instance that answers the call; the list's own choice first."""
    default = tile_for(call.row, is_masked=call.is_masked, seqlen_q=call.seqlen_q)
    kinds = ("ANY", "SPARE", "MASKED") if call.is_masked else ("ANY", "SPARE")
    others = [t for t in instances() if t.symbol == call.row and t.use in kinds and t != default]
    return [default, *others]


def measure(call: Call, timer: Timer, rounds: int) -> dict[str, list[float]]:
    """Instance -> seconds. In turns, and every second round backwards, so that a clock that drifts
    favours no instance; the first round only warms up."""
    times: dict[str, list[float]] = {tile.name: [] for tile in candidates(call)}
    for round_number in range(rounds + 1):
        order = candidates(call)
        for tile in reversed(order) if round_number % 2 else order:
            seconds = timer(tile, call)
            if round_number > 0:
                times[tile.name].append(seconds)
    return times


def entry(call: Call, times: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the table."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    default = next(iter(times))
    fastest = min(medians, key=lambda name: medians[name])
    chosen = fastest if medians[fastest] * (1.0 + GAIN) <= medians[default] else default
    head_dim = next(t.head_dim for t in tiles_sm90() if t.name == default)
    return {
        **asdict(call),
        **{"tile": chosen, "default": default},
        "gain": medians[default] / medians[chosen] - 1.0,
        "tflops": {name: call.flop(head_dim) / s / 1e12 for name, s in medians.items()},
    }


def tune(calls: Iterable[Call], timer: Timer, gpu: str, rounds: int = 20) -> dict[str, Any]:
    entries = [entry(call, measure(call, timer, rounds)) for call in calls]
    return {"version": VERSION, "gpu": gpu, "rounds": rounds, "entries": entries}


def _distance(entry: dict[str, Any], seqlen_q: int, seqlen_k: int) -> float:
    """Lengths are near if their ratio is."""
    return abs(math.log(entry["seqlen_q"] / seqlen_q)) + abs(math.log(entry["seqlen_k"] / seqlen_k))


def choose(
    table: dict[str, Any] | None, row: str, *, is_masked: bool, seqlen_q: int, seqlen_k: int
) -> TileSm90:
    """The instance for a call. An entry counts up to a factor of four in each length."""
    default = tile_for(row, is_masked=is_masked, seqlen_q=seqlen_q)
    if not table:
        return default
    if table.get("version") != VERSION:
        raise ValueError(f"table must have version {VERSION}, got {table.get('version')!r}")
    near = [
        e
        for e in table["entries"]
        if (e["row"], e["is_masked"]) == (row, is_masked)
        and max(e["seqlen_q"] / seqlen_q, seqlen_q / e["seqlen_q"]) <= 4
        and max(e["seqlen_k"] / seqlen_k, seqlen_k / e["seqlen_k"]) <= 4
    ]
    if not near:
        return default
    name = min(near, key=lambda e: _distance(e, seqlen_q, seqlen_k))["tile"]
    # Made with another list: what is gone cannot be chosen.
    return next((t for t in instances() if t.name == name), default)


def wan_calls(dtype: str) -> list[Call]:
    """Self and cross attention of Wan2.2's models, and what else head_dim 64 and 256 are for."""
    row = f"sdpa_sm90_{dtype}_d"
    lengths = ((27280, 24), (32760, 40), (75600, 40))
    calls = [Call(row + "128", False, n, n, heads) for n, heads in lengths]
    calls += [Call(row + "128", False, n, 512, heads) for n, heads in lengths]
    calls += [Call(row + "128", True, n, n, 16) for n in (4096, 16384)]
    return calls + [
        Call(row + d, m, 16384, 16384, 16) for d in ("64", "256") for m in (False, True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="times the instances of the Hopper rows")
    parser.add_argument("--out", type=Path, default=Path("build/bench/tune_sm90.json"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=("bf16", "f16"), default="bf16")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {options.rounds}")
    from benchmarks import hopper_device

    why_not = hopper_device.why_not()
    if why_not:
        print(f"cannot tune: {why_not}")
        return 1
    device = hopper_device.Device()
    table = tune(wan_calls(options.dtype), device.seconds, device.name, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for e in table["entries"]:
        fastest = ", ".join(f"{name} {x:.0f}" for name, x in e["tflops"].items())
        print(f"{e['row']} {e['seqlen_q']}x{e['seqlen_k']}: {e['tile']} ({fastest} TFLOP/s)")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
