# SPDX-License-Identifier: Apache-2.0
"""target.py - the device under test: its rows, how a call reaches it, and how large calls are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan_attn.bench import facts, kernels, peers
from wan_attn.bench.timing import Clock, clock_for
from wan_attn.doctor import proofs
from wan_attn.log import dtype_name
from wan_attn.native import op
from wan_attn.request import Blocks, Request, blocks_of
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck import proof_child
from wan_attn.selfcheck.proof_calls import CALLS, Answer
from wan_attn.selfcheck.proof_child import ProofCard
from wan_attn.workloads import WORKLOADS, Workload

# The longest first; then one for each head_dim that Wan's models and encoders have.
SHAPES = (
    *("ti2v-5b-720p", "wav2vec2-10s", "clip-vit-h", "gemma-3-12b", "ti2v-5b-720p-cross"),
    *("a14b-480p", "a14b-720p-image", "a14b-720p"),
)
CPU_SHAPES = SHAPES[:5]
CPU_FLOP_MAX = 1e9
LENGTHS = tuple(range(1, 301, 2))
INT32_ELEMENTS = 1 << 31  # where 32-bit offsets end
# Candidates that only matter where nothing else takes a call; they store every score, or loop.
SLOW_PEERS = ("torch-math", "chunked")


@dataclass(frozen=True)
class Sizes:
    """How large this target's calls are.

    Attributes:
        shapes: real calls, compared with float64 and timed; the first is the one of the verdict.
        dtypes: of value, in which they are timed; the first is that of the verdict.
        lengths: of keys, for the step `lengths`.
        products: dtypes in which torch's matrix product is timed, the peak to compare with.
        far: elements that offsets go beyond.
        far_queries: also in query and output, which then hold so many elements.
        seconds: of timing, for each shape and dtype.
    """

    shapes: tuple[Workload, ...]
    dtypes: tuple[torch.dtype, ...]
    products: tuple[torch.dtype, ...]
    lengths: tuple[int, ...] = LENGTHS
    far: int = INT32_ELEMENTS
    far_queries: bool = True
    seconds: float = 6.0

    def find(self, name: str) -> Workload:
        """The shape of this name."""
        return next(call for call in self.shapes if call.name == name)


HALF = (torch.bfloat16, torch.float16)
CARD_SIZES = Sizes(tuple(WORKLOADS[name] for name in SHAPES), HALF, products=HALF)
CPU_SIZES = Sizes(
    tuple(kernels.scaled(WORKLOADS[name], CPU_FLOP_MAX) for name in CPU_SHAPES),
    (torch.bfloat16, torch.float32),
    products=(torch.float32,),  # half products take minutes where torch has no kernel for them
    lengths=LENGTHS[::5],
    far_queries=False,  # minutes of work, for a loop that a card's blocks are and a CPU's is not
    seconds=1.5,
)


@dataclass(frozen=True)
class Kernel:
    """What a verdict is about: a row of the kernel table for one dtype of value."""

    row: op.KernelInfo
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """As in the proof: sdpa_sm80_d128/bf16."""
        return f"{self.row.name}/{dtype_name(self.dtype)}"

    def head_dim_near(self, wanted: int) -> int:
        """The head_dim nearest to `wanted` that the row takes."""
        return min(max(wanted, self.row.head_dim_min), self.row.head_dim_max)

    def head_dims(self) -> list[int]:
        """What Wan uses, as far as the row takes it, and the ends of what it takes."""
        row = self.row
        wanted = {row.head_dim_min, row.head_dim_max, 64, 80, 128}
        return sorted(d for d in wanted if max(2, row.head_dim_min) <= d <= row.head_dim_max)


def every_block(query: Tensor, key: Tensor) -> Blocks:
    """Lists that say nothing: they name every block of keys."""
    batch, seqlen_q, heads, _ = query.shape
    queries, keys = blocks_of(seqlen_q), blocks_of(key.shape[1])
    shape = batch, heads, queries
    counts = torch.full(shape, keys, dtype=torch.int32, device=query.device)
    indices = torch.arange(keys, dtype=torch.int32, device=query.device)
    return Blocks(counts, indices.expand(*shape, keys))


class CpuCard(proof_child.TorchCard):
    """The CPU, as the calls of a proof see a card."""

    def __init__(self) -> None:
        super().__init__(0)
        self.where = torch.device("cpu")

    def captured(self, attend: Callable[[], Answer]) -> None:
        return None


class Target:
    """One device by way of torch; tests have another one, by way of a mock driver.

    Attributes:
        where: the device as the kernel table is asked about it.
        device: where operands must be.
        has_streams: work may be queued: graphs, streams, a device that may be lost.
        only: names of the rows under test; empty: all that the device can run.
        without: kernels and candidates that are not run again: sdpa_sm80_d128/bf16, fa3/bf16.
        patience: a factor of every item's limit.
    """

    patience = 1.0

    def __init__(self, card: ProofCard, where: torch.device, sizes: Sizes) -> None:
        self.card, self.where, self.sizes = card, where, sizes
        self.device = card.device()
        self.has_streams = where.type == "cuda"
        self.only: tuple[str, ...] = ()
        self.without: tuple[str, ...] = ()

    def kernels(self) -> list[Kernel]:
        """All under test, best first."""
        return [Kernel(row, dtype) for row in self.rows() for dtype in row.dtypes]

    def rope_kernels(self) -> list[Kernel]:
        """The rows of rms_norm_rope under test."""
        rows = [row for row in self.card.rope_rows() if not self.only or row.name in self.only]
        return [Kernel(row, dtype) for row in rows for dtype in row.dtypes]

    def rows(self) -> list[op.KernelInfo]:
        """The rows under test."""
        return [row for row in self.able() if not self.only or row.name in self.only]

    def able(self) -> list[op.KernelInfo]:
        """The rows of the kernel table that the device can run."""
        return [
            row
            for row in op.kernels()
            if row.device == self.where.type
            and self.card.why_not(row, row.dtypes[0], CALLS[0]) is None
        ]

    def why_not(self, kernel: Kernel, call: Workload, **flags: Any) -> str | None:
        """Why the kernel does not take this call by design; None: it does."""
        flags["has_block_lists"] = kernel.row.is_for_lists
        return op.why_not(Request.of(call, kernel.dtype, self.where, **flags), kernel.row.index)

    def run(
        self,
        row: op.KernelInfo,
        operands: tuple[Tensor, Tensor, Tensor],
        q_lens: Tensor | None = None,
        k_lens: Tensor | None = None,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
    ) -> Answer:
        """out and lse of torch.ops.wan_attn.sdpa with this row and no other. A row for lists of
        blocks gets lists of all: other ones are the proof's."""
        blocks = every_block(*operands[:2]) if row.is_for_lists else DENSE
        out, lse = torch.ops.wan_attn.sdpa(
            *operands,
            q_lens,
            k_lens,
            scale=scale,
            is_causal=is_causal,
            window_left=window[0],
            window_right=window[1],
            return_lse=True,
            kernel=row.index,
            **blocks._asdict(),
        )
        return out, lse

    def synchronize(self) -> None:
        """Waits until everything that was queued has run."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def drop_memory(self) -> None:
        """Gives the allocator's free blocks back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def free_bytes(self) -> int | None:
        """See peers.free_bytes()."""
        return peers.free_bytes(self.device)

    def clock(self) -> Clock:
        """What times calls here."""
        return clock_for(self.device)

    def candidates(self) -> list[peers.Peer]:
        """All that can compute a call here and is worth timing, the rows under test first."""
        rows = [row.name for row in self.rows()]
        found = peers.choose(peers.all_peers(self.device), None)
        return [
            peer
            for peer in found
            if (peer.name in rows if peer.is_ours else peer.name not in SLOW_PEERS)
        ]

    def environment(self) -> dict[str, Any]:
        """What a figure depends on; see facts.environment()."""
        found = facts.environment(self.device)
        if self.where.type == "cuda":
            found["proof"] = proofs.facts(self.where.index or 0)["state"]
        return found

    def state(self) -> facts.State:
        """Clocks, power and temperature now; the load of a CPU."""
        return facts.state(self.device)


def of_device(device: torch.device) -> Target:
    """The target for a device of torch: cpu, or cuda:N."""
    if device.type == "cpu":
        return Target(CpuCard(), device, CPU_SIZES)
    torch.cuda.set_device(device)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # what runs on the CPU then is small
    return Target(proof_child.TorchCard(device.index or 0), device, CARD_SIZES)


@functools.cache
def label(call: Workload) -> str:
    """The call's name, and its shape where it is not the size that this name stands for."""
    if call == WORKLOADS.get(call.name) or call.name == call.shape:
        return call.name
    return f"{call.name} cut down to {call.shape}"
