# SPDX-License-Identifier: Apache-2.0
"""speed.py - how fast our rows are beside everything else that is installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from wan_attn.bench import facts, kernels, peers
from wan_attn.bench.report import Report, as_dict
from wan_attn.bench.timing import describe_failure
from wan_attn.check.calls import Detail
from wan_attn.check.real import case
from wan_attn.check.target import Target, label
from wan_attn.log import DTYPES, dtype_name
from wan_attn.transient import is_out_of_memory
from wan_attn.workloads import Workload

WHOLE_S = 75.0  # more than this for one shape and dtype is left out: other checks wait
ROUNDS = 6  # of every candidate where calls are long: warm-up, three rounds, error, memory
PASSIVE = (
    "waiting OpenMP threads sleep here (OMP_WAIT_POLICY=passive, unless the environment has it):"
    " else the end of one candidate would be timed with the next"
)


def measure_matmul(target: Target, kernel: None, _: str) -> Detail:
    """The peak that torch's own matrix product reaches here, TFLOP/s by dtype."""
    clock, seconds = target.clock(), min(1.5, target.sizes.seconds)
    return {
        dtype_name(dtype): facts.matmul_tflops(target.device, dtype, clock, seconds)
        for dtype in target.sizes.products
    }


def measure_speed(
    target: Target, kernel: None, argument: str, announce: Callable[[str], None] = lambda name: None
) -> Detail:
    """Every candidate on one real call, in turn: times, errors, memory beside the operands.

    Args:
        argument: the shape's name and the dtype: ti2v-5b-720p/bf16.
        announce: is told each candidate before it runs for the first time, as it may be the last.
    """
    case.cache_clear()
    target.drop_memory()
    name, _, word = argument.partition("/")
    call, dtype = target.sizes.find(name), DTYPES[word]
    candidates = _candidates(target, call, dtype)
    seconds = len(candidates) * ROUNDS * _one_call(target, candidates, name, dtype)
    if seconds > WHOLE_S:
        return {"skipped": f"would take about {seconds:.0f} s on this device"}
    broken: dict[str, str] = {}
    watched = [_watched(peer, announce, broken) for peer in candidates]
    before = target.state()
    report = Report("check", label(call), kernels.COLUMNS)
    kernels.measure_case(
        report, watched, call, dtype, target.device, target.clock(),
        seconds=target.sizes.seconds,
    )  # fmt: skip
    after = target.state()
    plain = as_dict(report)
    for row in plain["rows"]:
        row["samples_ms"] = row["samples_ms"][:20]  # more would make the file large
    return {
        "title": report.title,
        "shape": call.shape,
        "dtype": word,
        "rows": plain["rows"],
        "skipped_peers": {entry["what"]: entry["reason"] for entry in plain["skipped"]},
        "broken": {name: why for name, why in broken.items() if name in _ours(candidates)},
        "before": asdict(before)["values"],
        "after": asdict(after)["values"],
        "notes": facts.warnings_of(before, after, target.where)
        + ([PASSIVE] if target.where.type == "cpu" else []),
    }


def _candidates(target: Target, call: Workload, dtype: torch.dtype) -> list[peers.Peer]:
    """All but rows that are made for other calls, and what has ended a worker."""
    able = {
        kernel.row.name
        for kernel in target.kernels()
        if kernel.dtype == dtype
        and not kernel.row.is_for_lists
        and target.why_not(kernel, call) is None
    }
    return [
        peer
        for peer in target.candidates()
        if (not peer.is_ours or peer.name in able)
        and f"{peer.name}/{dtype_name(dtype)}" not in target.without
    ]


def _ours(candidates: list[peers.Peer]) -> list[str]:
    return [peer.name for peer in candidates if peer.is_ours]


def _one_call(target: Target, candidates: list[peers.Peer], name: str, dtype: torch.dtype) -> float:
    """Seconds of one call by torch's own choice; 0 if that fails: then others say why."""
    torchs = next((peer for peer in candidates if peer.name == peers.BASELINE), None)
    if torchs is None:
        return 0.0
    try:
        operands = kernels.operands(target.sizes.find(name), dtype, None, target.device)
        with torch.inference_mode():
            torchs.run(*(x[:, :128] for x in operands))
            target.synchronize()
            start = time.perf_counter()
            torchs.run(*operands)
            target.synchronize()
        return time.perf_counter() - start
    except RuntimeError as error:
        if is_out_of_memory(error):
            return 0.0
        raise


def _watched(
    peer: peers.Peer, announce: Callable[[str], None], broken: dict[str, str]
) -> peers.Peer:
    """The same, saying when it begins, and keeping what it raised."""
    known = False

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        nonlocal known
        if not known:
            known = True
            announce(peer.name)
        try:
            return peer.run(query, key, value)
        except Exception as error:
            if not is_out_of_memory(error):
                broken[peer.name] = describe_failure(error)
            raise

    return replace(peer, run=run)
