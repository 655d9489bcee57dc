# SPDX-License-Identifier: Apache-2.0
"""proof_child.py - the process in which rows run on a card for the first time.

It writes down which row it is at before it begins, so that its end blames that row and no other.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from wan_attn.log import dtype_name
from wan_attn.native import backward, bindings, cuda_driver, library, rope
from wan_attn.native.kernels import (
    KernelInfo,
    backward_kernels,
    kernels,
    rope_kernels,
    why_not,
)
from wan_attn.request import Blocks, Request
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck import backward_calls, child, proof_calls, rope_calls, verdicts
from wan_attn.selfcheck.proof_calls import Answer, Card, Operands, ProofCall
from wan_attn.selfcheck.reference import BATCH, HEADS_K, HEADS_Q, MASKS, Case
from wan_attn.selfcheck.verdicts import PASSED, RUNNING, UNTRIED, Row, Verdict
from wan_attn.transient import is_out_of_memory
from wan_attn.workloads import Workload

CODE = "from wan_attn.selfcheck.proof_child import main; raise SystemExit(main(sys.argv[1:]))"


class ProofCard(Card, rope_calls.Card, backward_calls.Card, Protocol):
    """What all kinds of calls run on."""

    def backward_rows(self) -> list[KernelInfo]:
        """The rows of gradients that it can run."""

    def rope_rows(self) -> list[KernelInfo]:
        """The rows of rms_norm_rope that it can run."""


def request(row: KernelInfo, dtype: torch.dtype, call: ProofCall, device: torch.device) -> Request:
    """The call as the kernel table is asked about it."""
    case = call.case(row.head_dim_max)
    is_causal, window = MASKS[case.mask]
    sizes = (BATCH, case.seqlen_q, case.seqlen_k, HEADS_Q, HEADS_K, case.head_dim)
    return Request.of(
        Workload("proof", call.name, *sizes),
        dtype,
        device,
        qk_dtype=torch.float32 if call.qk_is_f32 else dtype,
        is_causal=is_causal,
        window=window,
        has_q_lens=case.q_lens is not None,
        has_k_lens=True,
        return_lse=True,
        has_block_lists=row.is_for_lists,
        pools_others=call.pools(row),
    )


class TableCard:
    """A card's rows, by the kernel table's own word."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.where = torch.device("cuda", index)  # as the table is asked
        self.skipped: list[str] = []

    def rows(self) -> list[KernelInfo]:
        return [
            row
            for row in kernels()
            if row.device == self.where.type
            and self.why_not(row, row.dtypes[0], proof_calls.CALLS[0]) is None
        ]

    def why_not(self, row: KernelInfo, dtype: torch.dtype, call: ProofCall) -> str | None:
        return why_not(request(row, dtype, call, self.where), row.index)

    def backward_rows(self) -> list[KernelInfo]:
        """Those of gradients."""
        call = backward_calls.CALLS[0]
        return [
            row
            for row in backward_kernels()
            if row.device == self.where.type
            and backward.why_not(request(row, row.dtypes[0], call, self.where), row.index) is None
        ]

    def rope_rows(self) -> list[KernelInfo]:
        """Those of rms_norm_rope."""
        x = torch.zeros(1, 1, 1, 8, device="cpu")
        return [
            row
            for row in rope_kernels()
            if row.device == self.where.type and self.rope_why_not(row, {"x": x}) is None
        ]

    def rope_why_not(self, row: KernelInfo, given: Mapping[str, Any]) -> str | None:
        return rope.why_not_call(given, row.index, self.where)


class TorchCard(TableCard):
    """torch's CUDA device."""

    def device(self) -> torch.device:
        return self.where

    def run(
        self,
        row: KernelInfo,
        operands: Operands,
        q_lens: Tensor | None,
        k_lens: Tensor,
        case: Case,
        guard: Tensor | None = None,
        blocks: Blocks = DENSE,
    ) -> Answer:
        is_causal, (left, right) = MASKS[case.mask]
        options: dict[str, Any] = {"window_left": left, "window_right": right}
        options |= {"is_causal": is_causal, "return_lse": True, "kernel": row.index}
        options |= blocks._asdict()
        if guard is not None:  # which the op cannot have
            return bindings.ctypes_sdpa(*operands, q_lens, k_lens, guard=guard, **options)
        out, lse = torch.ops.wan_attn.sdpa(*operands, q_lens, k_lens, **options)
        return out, lse

    def gradients(
        self, row: KernelInfo, inputs: backward_calls.Inputs, case: Case
    ) -> backward_calls.Gradients:
        is_causal, (left, right) = MASKS[case.mask]
        options = {"is_causal": is_causal, "window_left": left, "window_right": right}
        op = torch.ops.wan_attn.sdpa_backward
        query, key, value = op(*inputs.tensors, **options, kernel=row.index)
        return query, key, value

    def rope(self, row: KernelInfo, given: Mapping[str, Any]) -> Tensor:
        out: Tensor = torch.ops.wan_attn.rms_norm_rope(**given, kernel=row.index)
        return out

    def captured(self, attend: Callable[[], Any]) -> Callable[[], Any] | None:
        with torch.cuda.device(self.index):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                attend()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = attend()

        def replay() -> Any:
            graph.replay()
            return result

        return replay


def names_of(row: KernelInfo) -> dict[str, torch.dtype]:
    """sdpa_sm80_d128/bf16 and so on: what verdicts have for this row."""
    return {f"{row.name}/{dtype_name(dtype)}": dtype for dtype in row.dtypes}


def allow_all() -> None:
    """Lets this process use every row, proven or not: it is there to try them, and may be lost."""
    cuda_driver.prove_with(lambda *_: library.PROOF_PASSED)


def main(argv: Sequence[str], make_card: Callable[[int], ProofCard] = TorchCard) -> int:
    """The program: tries every row that has no verdict yet, the best first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("index", type=int)
    parser.add_argument("digest")
    options = parser.parse_args(argv)
    allow_all()
    key = verdicts.key_of(options.index)
    if isinstance(key, str) or key.digest != options.digest:
        why = key if isinstance(key, str) else f"it sees {key}, and its parent something else"
        child.say(trouble=why)
        return 1
    verdict = verdicts.read(key) or Verdict(key)
    try:
        card = make_card(options.index)
        todo: dict[str, Callable[[], str | None]] = {}
        for row in card.rows():
            for name, dtype in names_of(row).items():
                todo[name] = partial(proof_calls.wrong, card, row, dtype)
        for row in card.backward_rows():
            for name, dtype in names_of(row).items():
                todo[name] = partial(backward_calls.wrong, card, row, dtype)
        for row in card.rope_rows():
            for name, dtype in names_of(row).items():
                todo[name] = partial(rope_calls.wrong, card, row, dtype)
        for name in todo:
            verdict.rows.setdefault(name, Row())
        verdict.skipped = card.skipped
        with torch.no_grad():
            for name in verdict.names(UNTRIED):
                if name in todo and not _try(verdict, card, name, todo[name]):
                    return 1
    except OSError as error:  # of the file: nothing else here opens one
        child.say(trouble=f"the verdict cannot be kept: {error}")
        return 1
    child.say(end=True)
    return 0


def _try(verdict: Verdict, card: Card, name: str, wrong: Callable[[], str | None]) -> bool:
    """One row, of which `wrong` says what it gets wrong; whether the next one can be tried in this
    process."""
    verdict.put([name], RUNNING)
    verdicts.write(verdict)
    child.say(begin=name)
    start = time.perf_counter()
    try:
        words = wrong()
    except RuntimeError as error:
        if is_out_of_memory(error):
            verdict.put([name], UNTRIED)
            verdicts.write(verdict)
            child.say(trouble=f"out of memory: {line_of(error)}")
            return False
        words = line_of(error)
        if is_lost(card, error):
            _conclude(verdict, name, words, start)
            os._exit(1)  # torch's own end would ask the device again
    _conclude(verdict, name, words, start)
    return True


def _conclude(verdict: Verdict, name: str, words: str | None, start: float) -> None:
    state = PASSED if words is None else verdicts.FAILED
    verdict.put([name], state, words or "", time.perf_counter() - start)
    verdicts.write(verdict)
    child.say(ended=name)


def line_of(error: BaseException) -> str:
    """What it says, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def is_lost(card: Card, error: RuntimeError) -> bool:
    """Whether the device, to this process, is beyond use after this error."""
    text = str(error).lower()
    if "cuda error" in text or "cuda driver error" in text or "illegal memory" in text:
        return True
    try:
        torch.zeros(1, device=card.device()).cpu()
    except RuntimeError:
        return True
    return False
