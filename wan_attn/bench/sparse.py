# SPDX-License-Identifier: Apache-2.0
"""sparse.py - `bench sparse`: how much of a head has to be computed for which error, and what that
takes: by tau and by budget, with tokens in raster order and along a Morton curve.

Errors are those of some blocks of queries against float64. "rule" is the rule's own error, computed
in float64 from its lists; "error" is that of our kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan_attn.backends import native
from wan_attn.bench import facts, progress, sparse_heads
from wan_attn.bench.report import Column, Report
from wan_attn.bench.timing import CPU_TIME_NOTE, Clock, clock_for, interleave
from wan_attn.bench.timing import percentile as pct
from wan_attn.log import dtype_name
from wan_attn.observe import sampling
from wan_attn.observe.heads import Operands
from wan_attn.observe.place import Grid
from wan_attn.request import BLOCK, PLAIN, Request
from wan_attn.sparse import kernel, order, steer
from wan_attn.sparse.lists import BlockLists
from wan_attn.sparse.routing import DENSE, Routing

COLUMNS = (
    Column("head", "head"),
    Column("effective", "eff. keys", ".0f"),
    Column("dtype", "dtype"),
    Column("order", "order"),
    Column("asked", "asked"),
    Column("tau", "tau", ".2f"),
    Column("density", "density %", ".1f", 100),
    Column("rule_error", "rule %", ".2f", 100),
    Column("error", "error %", ".2f", 100),
    Column("p50_ms", "p50 ms", ".1f"),
    Column("speedup", "x dense", ".2f"),
)
RASTER, MORTON = "raster", "morton"
TAUS = (0.0, 0.5, 1.0, 1.5, 2.0)
BUDGETS = (0.02, 0.05)
PROBES = 8  # blocks of queries that errors are of
NOTES = (
    "Heads are made by a seed, not recorded. `tau` lists the blocks that score above it and pools "
    "the others; `budget` is the largest tau that the steering finds within it, dense where it "
    "finds none. ms hold routing and lists, and for Morton order moving q, k, v and the result.",
)


@dataclass(frozen=True)
class Options:
    """What was asked for; cli/bench_sparse.py checks it."""

    device: torch.device
    grid: Grid
    dtypes: tuple[torch.dtype, ...]
    heads: int = 1
    kinds: tuple[str, ...] = tuple(kind.name for kind in sparse_heads.KINDS)
    taus: tuple[float, ...] = TAUS
    budgets: tuple[float, ...] = BUDGETS
    seconds: float = 60.0
    rounds: int | None = None
    cpu_time: bool = False


@dataclass
class Head:
    """Operands [1, tokens, heads, head_dim] of one name.

    Attributes:
        exact: the same in float64, from which errors are judged.
        grid: of its tokens.
    """

    name: str
    operands: Operands
    exact: Operands
    grid: Grid


class Judge:
    """Errors of a head in one order of tokens."""

    def __init__(self, head: Head, in_order: str) -> None:
        tokens, device = head.operands[0].shape[1], head.operands[0].device
        grid = head.grid if in_order == MORTON else None
        self.order = order.of(grid, tokens, tokens, (), device)
        self.operands = tuple_of(order.apply(head.operands, self.order))
        self.exact = tuple_of(order.apply(head.exact, self.order))
        self.routing = Routing(*self.operands[:2], [tokens])
        self.groups = tuple((i, i + 1) for i in range(head.operands[0].shape[2]))
        self._rows = sampling.spread(3, PROBES, max(tokens // BLOCK, 1))
        blocks = [slice(BLOCK * row, BLOCK * (row + 1)) for row in self._rows]
        self._some = [
            (torch.cat([x[:, block] for block in blocks], dim=1), k, v)
            for x, k, v in (self.operands, self.exact)
        ]
        q, k, v = (x.transpose(1, 2) for x in self._some[1])
        self.wanted = by_float64(q, k, v, None).transpose(1, 2)

    def errors(self, tau: float) -> tuple[float, float, float]:
        """(density, of the rule in float64, of our kernel) with this tau in all heads."""
        taus = [tau] * len(self.groups)
        lists = self.routing.lists(taus, self._rows)
        mask = self.routing.mask(taus, self._rows)
        q, k, v = (x.transpose(1, 2) for x in self._some[1])
        rule = by_float64(q, k, v, mask).transpose(1, 2)
        ours, _ = kernel.by_lists(self._some[0], PLAIN, lists)
        density = float(steer.shares_of(lists, self.routing.real).mean())
        return density, off(rule, self.wanted), off(ours, self.wanted)

    def search(self, budget: float) -> float:
        """The largest tau of all heads within it."""
        probes = (self.routing, self.operands, PLAIN, ((0, len(self.groups)),))
        (tau,) = steer.Search(native.run, kernel.by_lists, *probes).taus(budget, max(TAUS))
        return tau


def tuple_of(three: list[Tensor]) -> Operands:
    query, key, value = three
    return query, key, value


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative L2."""
    return float((found.double() - wanted).norm() / wanted.norm())


def by_float64(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The rule by every score: [1, heads, rows, head_dim] each. A block of keys that is not in
    `mask` [1, heads, blocks of rows, blocks of keys] is its mean; None: all are computed."""
    scale, out = query.shape[-1] ** -0.5, torch.empty_like(query)
    sizes = [len(part) for part in torch.arange(key.shape[2]).split(BLOCK)]
    for head in range(query.shape[1]):
        k, v = key[0, head], value[0, head]
        means_k, means_v = (torch.stack([part.mean(0) for part in x.split(BLOCK)]) for x in (k, v))
        weight = torch.tensor(sizes, dtype=torch.float64, device=k.device).log()
        for number, rows in enumerate(query[0, head].split(BLOCK)):
            scores = scale * rows @ k.T
            values = v
            if mask is not None:
                listed = mask[0, head, number]
                kept = listed.repeat_interleave(BLOCK)[: len(k)]
                pooled = scale * rows @ means_k[~listed].T + weight[~listed]
                scores = torch.cat((scores[:, kept], pooled), dim=1)
                values = torch.cat((v[kept], means_v[~listed]))
            first = number * BLOCK
            out[0, head, first : first + len(rows)] = scores.softmax(1) @ values
    return out


def whole_call(head: Head, in_order: str, tau: float) -> Callable[[], Tensor]:
    """What a call with blocks left out does, from operands in the host's order to the result."""
    tokens, device = head.operands[0].shape[1], head.operands[0].device
    grid = head.grid if in_order == MORTON else None
    moved = order.of(grid, tokens, tokens, (), device)
    taus = [tau] * head.operands[0].shape[2]

    def call() -> Tensor:
        operands = tuple_of(order.apply(head.operands, moved))
        lists: BlockLists = Routing(*operands[:2], [tokens]).lists(taus)
        out, _ = order.undo(*kernel.by_lists(operands, PLAIN, lists), moved)
        return out

    return call


def synthetic(options: Options, dtype: torch.dtype) -> Iterator[Head]:
    """The heads of sparse_heads.py."""
    for kind in sparse_heads.KINDS:
        if kind.name not in options.kinds:
            continue
        made = [sparse_heads.make(kind, options.grid, 17 + i) for i in range(options.heads)]
        q, k, v = (torch.stack(x, dim=1)[None] for x in zip(*made, strict=True))
        operands = tuple_of([x.to(options.device, dtype) for x in (q, k, v)])
        exact = (operands[0].double(), operands[1].double(), operands[2].double())
        yield Head(kind.name, operands, exact, options.grid)


def run(options: Options, bar: progress.Progress | None = None) -> Report:
    """Measures every head; nothing where no kernel takes lists, which the report says."""
    began, device = time.perf_counter(), options.device
    native.prove(device)
    title = f"blocks of keys left out of {'x'.join(map(str, options.grid))} tokens"
    report = Report("sparse", f"{title} on {facts.device_name(device)}", COLUMNS)
    report.environment = facts.environment(device)
    report.note([*NOTES, *([CPU_TIME_NOTE] if options.cpu_time else [])])
    clock = clock_for(device, cpu_time=options.cpu_time)
    bar = bar or progress.make(len(options.dtypes) * len(options.kinds))
    for dtype in options.dtypes:
        reason = _why_not(options, dtype)
        if reason is not None:
            report.skipped.append((dtype_name(dtype), "all heads", reason))
            continue
        for head in synthetic(options, dtype):
            bar.step(f"sparse {head.name} {dtype_name(dtype)}")
            share = options.seconds / len(options.dtypes) / len(options.kinds)
            measure(report, head, options, clock, share)
    bar.close()
    report.seconds = time.perf_counter() - began
    return report


def _why_not(options: Options, dtype: torch.dtype) -> str | None:
    frames, rows, columns = options.grid
    shape = (1, frames * rows * columns, frames * rows * columns, options.heads, options.heads, 128)
    request = Request(*shape, dtype, dtype, dtype, options.device)
    return kernel.why_not(kernel.asked(request))


def measure(report: Report, head: Head, options: Options, clock: Clock, seconds: float) -> None:
    """Adds the rows of one head. Times are those of Morton order; the order changes them little."""
    query, key, _ = (x[0, :, 0] for x in head.exact)
    effective = sparse_heads.effective_keys(query, key)
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {"dense": lambda: native.run(*head.operands, PLAIN)}
    for in_order in (RASTER, MORTON):
        judge = Judge(head, in_order)
        asked = [(f"tau {tau:g}", tau) for tau in options.taus]
        asked += [(f"budget {100 * b:g} %", judge.search(b)) for b in options.budgets]
        for what, tau in asked:
            density, rule, error = judge.errors(tau)
            row = {
                "head": head.name,
                "effective": effective,
                "tokens": head.operands[0].shape[1],
                "dtype": dtype_name(head.operands[2].dtype),
                "order": in_order,
                "asked": what,
                "tau": None if tau == DENSE else tau,
                "density": density,
                "rule_error": rule,
                "error": error,
            }
            rows.append(row)
            if in_order == MORTON and tau != DENSE:
                calls[what] = whole_call(head, in_order, tau)
    found = interleave(calls, clock, seconds=seconds, rounds=options.rounds)
    medians = {name: pct(times, 50) for name, times in found.times.items()}
    for row in rows:
        p50 = medians.get(str(row["asked"])) if row["order"] == MORTON else None
        row["p50_ms"] = p50
        row["speedup"] = None if p50 is None else medians["dense"] / p50
    report.rows += rows
