# SPDX-License-Identifier: Apache-2.0
"""lossy_model.py - what machine code allows rows of 8-bit scores, held against what they were built
for: an estimate.

    python -m benchmarks.lossy_model

Prints the two tables of csrc/cuda/README.md (head_dim 128, bf16) and, for each GPU, whether the
bound is at least twice what FlashAttention-2 can reach (GeForce), and whether at least 60 % of it
are left if nothing is hidden behind tensor cores. Ends with 1 if not. The bounds are those of
static_model.py: nothing was measured on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import static_model
from benchmarks.static_model import Estimate

ROWS = ("sdpa_sm80_qk8_bf16_d128", "sdpa_sm75_qk8_bf16_d128")
LEAST_UNHIDDEN = 0.6
LEAST_TIMES = {"RTX 3090": 2.0, "RTX 4090": 2.0}  # the peak of 16-bit products, summed in f32
PARTS = ("V", "K", "copies", "steps", "Q")  # of the use of shared memory


def estimates() -> list[Estimate]:
    return [found for row in ROWS for found in static_model.estimates(row)]


def bounds(rows: Sequence[Estimate]) -> list[str]:
    """What limits them, as shares of the tensor cores' time."""
    lines = [
        "| GPU | bound, TFLOP/s | times the peak of FlashAttention-2 (f32 sums) | issue |"
        " shared memory | exp2 | of the bound, if nothing is hidden |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = [f"{r.clocks[n] / r.clocks['tensor']:.0%}" for n in ("issue", "shared", "exp2")]
        cells = [r.gpu, f"{r.bound_tflops:.0f}", f"{r.of_peak:.2f}", *shares, f"{r.unhidden:.0%}"]
        lines.append(f"| {' | '.join(cells)} |".replace("%", " %"))
    return lines


def shared_memory(rows: Sequence[Estimate]) -> list[str]:
    """What shared memory is busy with, in shares of the tensor cores' time."""
    lines = [f"| GPU | {' | '.join(PARTS)} | together |", "|---|" + "---|" * (len(PARTS) + 1)]
    for r in rows:
        clocks = [*(r.shared_for[part] for part in PARTS), r.clocks["shared"]]
        cells = [f"{n / r.clocks['tensor']:.1%}".replace("%", " %") for n in clocks]
        lines.append(f"| {r.gpu} | {' | '.join(cells)} |")
    return lines


def missed(r: Estimate) -> str:
    """What the row does not reach on this GPU, in words; "": nothing."""
    words = []
    if r.of_peak < LEAST_TIMES.get(r.gpu, 0.0):
        words.append(f"{r.of_peak:.2f} times FlashAttention-2's peak, not {LEAST_TIMES[r.gpu]}")
    if r.unhidden < LEAST_UNHIDDEN:
        words.append(
            f"{r.unhidden:.0%} of the bound if nothing is hidden, not {LEAST_UNHIDDEN:.0%}"
        )
    return "; ".join(words)


def main() -> int:
    why = static_model.what_is_missing()
    if why:
        print(why)
        return 1
    rows = estimates()
    print("\n".join([*bounds(rows), "", *shared_memory(rows), ""]))
    for r in rows:
        print(f"{r.gpu}: {missed(r) or 'what was asked for is reached'}")
    return int(any(map(missed, rows)))


if __name__ == "__main__":
    sys.exit(main())
