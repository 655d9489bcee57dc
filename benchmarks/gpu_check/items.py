# SPDX-License-Identifier: Apache-2.0
"""items.py - is a kernel right? The checks of gpu_check, each for one row of the table."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/support"))

import calls
import oracle
from wan_attn.bench import accuracy, kernels, peers
from wan_attn.native import op
from wan_attn.request import Request
from wan_attn.workloads import Workload, parse_shape

LIMIT = 1 << 31  # elements; where 32-bit offsets end
DRY_LIMIT = 1 << 20
LENGTHS = list(range(1, 301, 2))
LOSSY_RMS = 0.05
GROUP = 25  # lengths that share one padded batch


@dataclass(frozen=True)
class Bench:
    """Where items run."""

    device: torch.device
    is_dry: bool

    def rows(self) -> list[op.KernelInfo]:
        """The rows under test: the card's, or the CPU's in a dry run."""
        kind = "cpu" if self.is_dry else "cuda"
        return [r for r in op.kernels() if r.device == kind and calls.can_run(r)]

    def row(self, name: str) -> op.KernelInfo:
        return next(row for row in self.rows() if row.name == name)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def head_dim_for(row: op.KernelInfo, wanted: int) -> int:
    """The head_dim nearest to `wanted` that the row takes."""
    return calls.head_dim_for(row, wanted)


def head_dims(row: op.KernelInfo) -> list[int]:
    """What Wan uses, as far as the row takes it, and the ends of what it takes."""
    wanted = {row.head_dim_min, row.head_dim_max, 64, 80, 128}
    return sorted(d for d in wanted if max(2, row.head_dim_min) <= d <= row.head_dim_max)


def is_refusal(row: op.KernelInfo, error: BaseException) -> bool:
    """Whether the forced row says, by name, that this is no call for it: dispatch.c's words."""
    return isinstance(error, RuntimeError) and str(error).startswith(f"wan_attn: {row.name}: ")


def check_lossy(
    row: op.KernelInfo, *operands: torch.Tensor, **call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As calls.check, for a row that quantises: finite, and within 5 % root mean square."""
    out, lse = calls.sdpa(*operands, row=row, return_lse=True, **call)
    want = torch.from_numpy(oracle.attention(*operands, **call)[0])
    gap = float((out.double() - want).square().mean().sqrt())
    size = float(want.square().mean().sqrt())
    assert gap <= LOSSY_RMS * size, f"relative rms error {gap / size:.1%}, allowed {LOSSY_RMS:.0%}"
    return out, lse


class Tally:
    """Calls that were checked, and those that the row refused, which is no failure."""

    def __init__(self, row: op.KernelInfo) -> None:
        self.row, self.done, self.refused = row, 0, dict[str, int]()

    def check(self, *operands: Any, **call: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """calls.check, which compares with the oracle."""
        try:
            run = check_lossy if self.row.is_lossy else calls.check
            result = run(self.row, *operands, **call)
        except RuntimeError as error:
            if not is_refusal(self.row, error):
                raise
            reason = str(error).partition(f"{self.row.name}: ")[2]
            self.refused[reason] = self.refused.get(reason, 0) + 1
            return None
        self.done += 1
        return result

    def detail(self) -> dict[str, Any]:
        if not self.done and self.refused:
            return {"skipped": "; ".join(self.refused)}
        return {"calls": self.done, "refused": self.refused}


def run_op(row: op.KernelInfo, *operands: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    out, lse = torch.ops.wan_attn.sdpa(*operands, kernel=row.index, **options)
    return out, lse


# --- correctness against the oracle, on small calls -------------------------------------------


def check_small(bench: Bench, row: op.KernelInfo, _: str) -> dict[str, Any]:
    """Every dtype and head_dim once, with lse, twice with the same bits."""
    tally = Tally(row)
    for dtype in row.dtypes:
        for head_dim in head_dims(row):
            q, k, v = calls.operands(1, 130, 197, 2, head_dim=head_dim, dtype=dtype)
            first = tally.check(q, k, v)
            if first is not None:
                again = calls.sdpa(q, k, v, row=row, return_lse=True)
                assert all(map(torch.equal, first, again)), "not the same bits twice"
    return tally.detail()


def check_lengths(bench: Bench, row: op.KernelInfo, _: str) -> dict[str, Any]:
    """Lengths 1, 3, 5 ... 299 of queries and keys, NaN behind every length."""
    head_dim, dtype, tally = head_dim_for(row, 128), row.dtypes[0], Tally(row)
    groups = [LENGTHS[begin : begin + GROUP] for begin in range(0, len(LENGTHS), GROUP)]
    if bench.is_dry:
        groups = [group[::6] for group in groups[::3]]
    for lens_k in groups:
        lens_q = [1 + (7 * length) % 300 for length in lens_k]  # other tails than the keys'
        shape = (len(lens_k), max(lens_q), max(lens_k), 1)
        q, k, v = calls.operands(*shape, head_dim=head_dim, dtype=dtype)
        q, k, v = (calls.poisoned(x, n) for x, n in ((q, lens_q), (k, lens_k), (v, lens_k)))
        tally.check(q, k, v, q_lens=lens_q, k_lens=lens_k)
    return tally.detail() | {"lengths": sum(map(len, groups)), "to": groups[-1][-1]}


def check_masks(bench: Bench, row: op.KernelInfo, _: str) -> dict[str, Any]:
    """Causal, windows, grouped heads, float32 query and key, views of one fused buffer."""
    head_dim, dtype, tally = head_dim_for(row, 128), row.dtypes[-1], Tally(row)
    options: list[dict[str, Any]] = [
        {"is_causal": True},
        {"window": (37, 5)},
        {"is_causal": True, "window": (64, -1)},
        {"is_causal": True, "k_lens": [0, 129]},
        {"scale": 0.3, "q_lens": [150, 7]},
    ]
    for call in options:
        q, k, v = calls.operands(2, 150, 201, 4, 2, head_dim=head_dim, dtype=dtype)
        tally.check(q, k, v, **call)
    if dtype != torch.float32:
        mixed = (torch.float32, torch.float32, dtype)
        tally.check(*calls.operands(1, 97, 65, 2, head_dim=head_dim, dtype=mixed))
    fused = torch.randn(2, 133, 3, 2, head_dim, device=bench.device).to(dtype)
    q, k, v = fused.unbind(2)
    out, _ = run_op(row, q, k, v)
    same, _ = run_op(row, *(x.contiguous() for x in (q, k, v)))
    assert torch.equal(out, same), "a view of a fused buffer gives other bits than its copy"
    return tally.detail()


# --- real shapes ------------------------------------------------------------------------------


@dataclass
class Case:
    """A real call with NaN behind its keys, its exact result and how far torch is from that."""

    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    k_lens: torch.Tensor
    exact: accuracy.Reference
    torch_error: accuracy.Error


@functools.lru_cache(maxsize=1)
def case(device: torch.device, shape: str, dtype: torch.dtype) -> Case:
    """Rows of every head, against float64 in pieces; the last 77 keys are padding."""
    call = parse_shape(shape)
    query, key, value = kernels.operands(call, dtype, None, device)
    real = [max(1, call.seqlen_k - 77)] * call.batch
    exact = accuracy.reference(query, key, value, real)
    theirs = peers._torch(query, key[:, : real[0]], value[:, : real[0]])
    torch_error = accuracy.error(theirs, exact)
    key[:, real[0] :] = math.nan
    value[:, real[0] :] = math.nan
    return Case((query, key, value), torch.tensor(real), exact, torch_error)


def check_wan(bench: Bench, row: op.KernelInfo, shape: str) -> dict[str, Any]:
    """One of Wan's calls: error at most twice torch's, and a rounding of the output."""
    call, dtype = parse_shape(shape), row.dtypes[-1]
    refusal = why_not(bench, row, call, dtype)
    if refusal:
        return {"skipped": refusal}
    found = case(bench.device, shape, dtype)
    out, _ = run_op(row, *found.operands, None, found.k_lens)
    error = accuracy.error(out, found.exact)
    del out
    largest = float(found.operands[2][:, : int(found.k_lens[0])].abs().amax())
    # bf16 stores 8 bits: two roundings of the largest value that a row can be an average of are
    # far more than ever happens; of the typical output they are the floor that counts.
    typical = float(found.exact.out.abs().amax())
    floor = 2 * torch.finfo(dtype).eps * typical
    allowed = 2 * found.torch_error.max + floor
    detail = {
        "dtype": str(dtype).removeprefix("torch."),
        "max_error": error.max,
        "torch_max_error": found.torch_error.max,
        "allowed": allowed,
        "relative_rms": error.relative_rms,
        "torch_relative_rms": found.torch_error.relative_rms,
        "largest_value": largest,
    }
    factor = 20.0 if row.is_lossy else 1.0
    assert error.max <= factor * allowed, f"max error {error.max:.3e}, allowed {allowed:.3e}"
    rms_allowed = 2 * found.torch_error.relative_rms + torch.finfo(dtype).eps / 4
    assert error.relative_rms <= factor * rms_allowed, (
        f"relative rms error {error.relative_rms:.3e}, allowed {rms_allowed:.3e}"
    )
    return detail


def why_not(bench: Bench, row: op.KernelInfo, call: Workload, dtype: torch.dtype) -> str | None:
    return op.why_not(Request.of(call, dtype, bench.device, has_k_lens=True), row.index)


def check_offsets(bench: Bench, row: op.KernelInfo, _: str) -> dict[str, Any]:
    """Offsets beyond 2^31 elements: the last sample's query and output, then far rows of keys."""
    limit, dtype = DRY_LIMIT if bench.is_dry else LIMIT, row.dtypes[-1]
    head_dim = head_dim_for(row, 128)
    free = peers.free_bytes(bench.device) or 0
    bytes_needed = 2.2 * limit * dtype.itemsize + (1 << 30)
    if not bench.is_dry and free < bytes_needed:
        return {"skipped": f"needs {bytes_needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"}
    # Query and output of more than `limit` elements over a few keys.
    seqlen, heads = (128, 4) if bench.is_dry else (16384, 8)
    batch = limit // (seqlen * heads * head_dim) + 1
    query = torch.zeros(batch, seqlen, heads, head_dim, dtype=dtype, device=bench.device)
    key, value = (
        torch.randn(batch, 48, heads, head_dim, device=bench.device).to(dtype) for _ in range(2)
    )
    query[-1] = torch.randn(seqlen, heads, head_dim, device=bench.device).to(dtype)
    out, _ = run_op(row, query, key, value)
    alone, _ = run_op(row, query[-1:].clone(), key[-1:], value[-1:])
    assert torch.equal(out[-1:], alone), "the last sample differs from the same sample alone"
    del query, out, key, value
    # Keys and values whose rows lie so far apart that the last is beyond `limit`.
    rows = 64
    stride = limit // (rows - 1) // 64 * 64 + 64
    buffer = torch.empty((rows - 1) * stride + head_dim, dtype=dtype, device=bench.device)
    far = buffer.as_strided((1, rows, 1, head_dim), (1, stride, head_dim, 1))
    near = torch.randn(1, rows, 1, head_dim, device=bench.device).to(dtype)
    far.copy_(near)
    out, _ = run_op(row, near, far, far)
    same, _ = run_op(row, near, near, near)
    assert torch.equal(out, same), "keys far apart give other bits than the same keys side by side"
    return {"elements": batch * seqlen * heads * head_dim, "row_stride": stride}


# --- how programs call it ---------------------------------------------------------------------


class EagerGraph:
    """Stands in for a CUDA graph where there is none: replays by calling again."""

    def __init__(self, function: Callable[[], torch.Tensor]) -> None:
        self.function, self.out = function, function()

    def replay(self) -> None:
        self.out.copy_(self.function())


class CudaGraph:
    """One call, captured."""

    def __init__(self, function: Callable[[], torch.Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = function()

    def replay(self) -> None:
        self.graph.replay()


def check_graph(bench: Bench, row: op.KernelInfo, _: str) -> dict[str, Any]:
    """A captured call, replayed with new inputs and new lengths on the device."""
    head_dim, dtype = head_dim_for(row, 128), row.dtypes[-1]
    make = EagerGraph if bench.is_dry else CudaGraph
    q, k, v = (torch.randn(2, 300, 2, head_dim, device=bench.device).to(dtype) for _ in range(3))
    lens = torch.tensor([300, 211], device=bench.device)
    graph = make(lambda: run_op(row, q, k, v, None, lens)[0])
    for number in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape, device=bench.device))
        lens.copy_(torch.tensor([17 + number, 300 - 31 * number]))
        graph.replay()
        bench.synchronize()
        eager, _ = run_op(row, q, k, v, None, lens)
        assert torch.equal(graph.out, eager), f"replay {number} differs from the call itself"
    return {"replays": 3, "graph": "stand-in" if bench.is_dry else "CUDA"}


def check_stream(bench: Bench, row: op.KernelInfo, _: str) -> dict[str, Any]:
    """On a second stream, behind work that is still running there, while the first one is busy."""
    head_dim, dtype = head_dim_for(row, 128), row.dtypes[-1]
    q, k, v = (torch.randn(1, 777, 4, head_dim, device=bench.device).to(dtype) for _ in range(3))
    want, _ = run_op(row, q, k, v)
    bench.synchronize()
    if bench.is_dry:
        got, _ = run_op(row, q, k, v)
        assert torch.equal(got, want)
        return {"stream": "stand-in"}
    side = torch.cuda.Stream()
    late = [torch.zeros_like(x) for x in (q, k, v)]
    busy = torch.randn(4096, 4096, device=bench.device)
    bench.synchronize()
    for _turn in range(3):
        busy @ busy
    with torch.cuda.stream(side):
        for _turn in range(
            10
        ):  # the copies below come late: a call on the wrong stream reads zeros
            busy @ busy
        for late_copy, source in zip(late, (q, k, v), strict=True):
            late_copy.copy_(source)
        got, _ = run_op(row, *late)
    side.synchronize()
    assert torch.equal(got, want), "on a second stream the result differs"
    return {"stream": "second"}
