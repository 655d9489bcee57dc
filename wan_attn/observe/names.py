# SPDX-License-Identifier: Apache-2.0
"""names.py - how the log and tables call a layer, and some of its heads."""

from __future__ import annotations


def title(expert: int | None, layer: int | None, kind: str) -> str:
    """A layer as lines of the log call it: layer 7 (self), expert 1."""
    name = "a layer that no host names" if layer is None else f"layer {layer}"
    return f"{name} ({kind})" + (f" of expert {expert}" if expert else "")


def of_heads(ranges: list[tuple[int, int]]) -> str:
    """Of a layer: ", heads 0-4, 7", where neighbours are one range."""
    merged: list[tuple[int, int]] = []
    for first, behind in ranges:
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], behind)
        else:
            merged.append((first, behind))
    parts = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in merged]
    if not parts:
        return ""
    is_one = len(merged) == 1 and merged[0][1] - merged[0][0] == 1
    return f", {'head' if is_one else 'heads'} {', '.join(parts)}"
