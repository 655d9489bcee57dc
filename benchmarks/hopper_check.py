# SPDX-License-Identifier: Apache-2.0
"""hopper_check.py - the first thing to run on a Hopper card: is every instance right?

    python -m benchmarks.hopper_check [--quick]

The same calls as under emulation (tests/emu/cases_sm90.py), on the GPU and held against the float64
oracle; then Wan2.2's own shapes, of which some rows are computed again in float64, and two runs of
which must have the same bits. The first failure is shown, and the instance goes on with the next.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import torch
from torch import Tensor

from benchmarks import hopper_device
from emu import cases, cases_sm90
from emu.rows_sm90 import TileSm90, tiles_sm90
from emu.run import DTYPES, Result

LONG = ((27280, 27280), (32760, 32760), (75600, 75600), (27280, 512))
ROWS = 64


def moved(x: Tensor | None, where: str) -> Tensor | None:
    """The same view into a copy of all of its memory: strides, offsets and NaN around it stay."""
    if x is None:
        return None
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return flat.to(where, copy=True).as_strided(x.size(), x.stride(), x.storage_offset())


class Runner:
    """cases.check's way to run a call, on a device that has `launch_call`."""

    def __init__(self, device: Any, where: str) -> None:
        self.device, self.where = device, where

    def __call__(
        self, tile: TileSm90, *operands: Tensor, return_lse: bool = True, **call: Any
    ) -> Result:
        for unused in ("schedule", "csrc", "split_tiles"):
            call.pop(unused, None)
        lens = {name: moved(call.pop(name, None), self.where) for name in ("q_lens", "k_lens")}
        query, key, value = (moved(x, self.where) for x in operands)
        out, lse = self.device.run(tile, query, key, value, return_lse=return_lse, **lens, **call)
        return Result(out.cpu(), lse.cpu() if lse is not None else None, 0)


def failures(tile: TileSm90, runner: Runner, chances: int) -> Iterator[str]:
    """What is wrong with the calls of the emulation matrix."""
    for case in (*cases_sm90.by_hand(tile), *cases_sm90.by_chance(tile, chances, seed=7)):
        try:
            cases.check(case, tile, runner=runner)  # type: ignore[arg-type]
        except AssertionError as error:
            yield str(error)


def error_of_rows(out: Tensor, query: Tensor, key: Tensor, value: Tensor, head: int) -> float:
    """The largest error of some rows of one head, relative to the largest |out| there."""
    rows = torch.randperm(query.shape[1])[:ROWS].to(query.device)
    q = query[0, rows, head].double()
    scores = q @ key[0, :, head].double().T * query.shape[3] ** -0.5
    want = scores.softmax(dim=1) @ value[0, :, head].double()
    return float((out[0, rows, head].double() - want).abs().max() / want.abs().max())


def long_failures(tile: TileSm90, device: Any, where: str, shapes: Any = LONG) -> Iterator[str]:
    bound = 2.0 * float(torch.finfo(DTYPES[tile.dtype]).eps)
    for seqlen_q, seqlen_k in shapes:
        query, key, value = (
            torch.randn(1, n, 4, tile.head_dim, device=where, dtype=DTYPES[tile.dtype])
            for n in (seqlen_q, seqlen_k, seqlen_k)
        )
        first, _ = device.run(tile, query, key, value)
        again, _ = device.run(tile, query, key, value)
        error = error_of_rows(first, query, key, value, head=3)
        if not (error <= bound and math.isfinite(error)):
            yield f"{tile.name} {seqlen_q}x{seqlen_k}: error {error:.2e}, allowed {bound:.2e}"
        if not torch.equal(first, again):
            yield f"{tile.name} {seqlen_q}x{seqlen_k}: two runs differ"


def main() -> int:
    parser = argparse.ArgumentParser(description="checks every instance of the Hopper rows")
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls by chance")
    options = parser.parse_args()
    why_not = hopper_device.why_not()
    if why_not:
        print(f"cannot check: {why_not}")
        return 1
    device, wrong = hopper_device.Device(), 0
    for tile in tiles_sm90():
        found = [*failures(tile, Runner(device, "cuda"), 20 if options.quick else 200)]
        found += long_failures(tile, device, "cuda")
        print(f"{tile.name}: {len(found) or 'no'} failures", *found[:1], sep="\n    ", flush=True)
        wrong += len(found)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
