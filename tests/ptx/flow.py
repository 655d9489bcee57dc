# SPDX-License-Identifier: Apache-2.0
"""flow.py - where the lanes of a branch meet again: its immediate post-dominator."""

from __future__ import annotations

from ptx.parse import Kernel

EXIT = -1  # a branch whose ways meet nowhere: each runs to its end


def _blocks(kernel: Kernel) -> tuple[list[int], list[list[int]]]:
    """First instruction of each basic block, in order; successors, by block number."""
    ends = {
        i + 1
        for i, one in enumerate(kernel.code)
        if one.opcode.startswith("bra") or one.opcode == "ret"
    }
    starts = sorted(({0} | set(kernel.labels.values()) | ends) - {len(kernel.code)})
    number = {start: i for i, start in enumerate(starts)}
    follow: list[list[int]] = []
    for i in range(len(starts)):
        end = starts[i + 1] if i + 1 < len(starts) else len(kernel.code)
        last = kernel.code[end - 1]
        ways = []
        if last.opcode.startswith("bra"):
            ways.append(number[kernel.labels[last.operands[0]]])
        if (last.guard or last.opcode not in ("bra", "bra.uni", "ret")) and end in number:
            ways.append(number[end])
        follow.append(ways)
    return starts, follow


def meeting_points(kernel: Kernel) -> dict[int, int]:
    """Branch instruction -> the instruction where all its lanes come together, or EXIT.

    Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm, on the reversed graph.
    """
    starts, follow = _blocks(kernel)
    leave = len(starts)  # one block behind all that end
    before: list[list[int]] = [[] for _ in range(leave + 1)]
    for block, ways in enumerate(follow):
        for way in ways or [leave]:
            before[way].append(block)
    order = _post_order(before, leave)
    rank = {block: i for i, block in enumerate(order)}
    above = {leave: leave}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            ways = [way for way in follow[block] or [leave] if way in above]
            new = ways[0]
            for way in ways[1:]:
                a, b = new, way
                while a != b:
                    if rank[a] < rank[b]:
                        a = above[a]
                    else:
                        b = above[b]
                new = a
            if above.get(block) != new:
                above[block] = new
                changed = True
    points = {}
    for block, start in enumerate(starts):
        end = starts[block + 1] if block + 1 < len(starts) else len(kernel.code)
        if kernel.code[end - 1].opcode.startswith("bra") and start < end:
            meet = above.get(block, leave)
            points[end - 1] = EXIT if meet == leave else starts[meet]
    return points


def _post_order(before: list[list[int]], root: int) -> list[int]:
    """Blocks from which `root` can be reached, `root` last."""
    order, seen, stack = list[int](), {root}, [(root, iter(before[root]))]
    while stack:
        block, rest = stack[-1]
        for way in rest:
            if way not in seen:
                seen.add(way)
                stack.append((way, iter(before[way])))
                break
        else:
            order.append(block)
            stack.pop()
    return order
