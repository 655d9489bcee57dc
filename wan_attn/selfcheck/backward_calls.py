# SPDX-License-Identifier: Apache-2.0
"""backward_calls.py - the calls whose gradients a CUDA row has to get right on a card before it
runs there, with their results in float64; shares no code with a kernel.

Operands are those of reference.py, and so are gradients of out and lse; out and lse are float64's,
rounded. The bound for one element is 2 u (sum |terms| + |gradient|): a kernel rounds P, dS and the
result once each, and dS has the error of <dout, out>, whose out is rounded: P u sum |dout| |out|.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from wan_attn.native.kernels import KernelInfo
from wan_attn.selfcheck.first_call import MASKED, SEQLEN_K, SEQLEN_Q
from wan_attn.selfcheck.proof_calls import ProofCall
from wan_attn.selfcheck.reference import (
    BATCH,
    HEADS_Q,
    MASKS,
    UNIT,
    Case,
    draw,
    make_inputs,
    reference,
    seen_keys,
)

NAMES = ("grad_query", "grad_key", "grad_value")
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """What the op sdpa_backward is called with, by its names."""

    grad_out: Tensor
    grad_lse: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    q_lens: Tensor | None
    k_lens: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The op's positional arguments."""
        left = (self.out, self.lse, self.q_lens, self.k_lens)
        return self.grad_out, self.grad_lse, self.query, self.key, self.value, *left


# run(inputs, is_causal) -> the gradients of query, key and value
Run = Callable[[Inputs, bool], Gradients]

CALLS = (
    ProofCall("ragged"),
    ProofCall("causal", mask="causal"),
    ProofCall("window", mask="window"),
    ProofCall("few rows", seqlen_q=37, lens_on_device=True),
    ProofCall("float32 query and key", mask="causal", qk_is_f32=True),
    ProofCall("unaligned", is_unaligned=True),
)


@dataclass(frozen=True)
class Known:
    """A case's inputs on the CPU in float32, its gradients in float64, and what u multiplies."""

    inputs: Inputs
    truth: tuple[Tensor, Tensor, Tensor]
    sizes: tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=2 * len(CALLS))
def known(case: Case) -> Known:
    """The same for the same case."""
    query, key, value = make_inputs(case)
    forward = reference(case, query, key, value)
    generator = torch.Generator("cpu").manual_seed(case.seqlen_q + 7 * case.head_dim)
    grad_out = draw(generator, *query.shape, lens=case.q_lens)
    grad_lse = draw(generator, BATCH, case.seqlen_q, HEADS_Q, lens=case.q_lens).transpose(1, 2)
    out, lse = forward.out.clone(), forward.lse.clone()
    for b, used in enumerate(case.q_lens or ()):
        out[b, used:], lse[b, :, used:] = math.nan, math.nan
    lens = (
        None if case.q_lens is None else torch.tensor(case.q_lens, device="cpu"),
        torch.tensor(case.k_lens, device="cpu"),
    )
    made = Inputs(grad_out, grad_lse, query, key, value, out.float(), lse.float(), *lens)
    truth = [torch.zeros(x.shape, dtype=torch.float64) for x in (query, key, value)]
    sizes = [torch.zeros_like(x) for x in truth]
    for b in range(BATCH):
        for h in range(HEADS_Q):
            _add_head(case, made, forward.out, forward.lse, b, h, truth, sizes)
    return Known(made, (truth[0], truth[1], truth[2]), (sizes[0], sizes[1], sizes[2]))


def _add_head(
    case: Case,
    made: Inputs,
    out: Tensor,
    lse: Tensor,
    b: int,
    h: int,
    truth: list[Tensor],
    sizes: list[Tensor],
) -> None:
    """Straight from the formulas of csrc/wan_attn.h."""
    used_q = case.seqlen_q if case.q_lens is None else case.q_lens[b]
    used_k, kv = case.k_lens[b], h // (HEADS_Q // made.key.shape[2])
    scale = 1 / math.sqrt(case.head_dim)
    q, do, o = (x[b, :used_q, h].double() for x in (made.query, made.grad_out, out))
    k, v = (x[b, :used_k, kv].double() for x in (made.key, made.value))
    seen = seen_keys(used_q, used_k, *MASKS[case.mask], q.device)
    rows = lse[b, h, :used_q, None]
    weights = torch.exp((q @ k.T * scale).masked_fill(~seen, -math.inf) - rows).nan_to_num(0.0)
    wanted = (do * o).sum(1, keepdim=True) - made.grad_lse[b, h, :used_q, None].double()
    ds = scale * weights * (do @ v.T - wanted)
    ds_size = ds.abs() + scale * weights * (do * o).abs().sum(1, keepdim=True)
    for n, (at, used, grad, size) in enumerate(
        (
            (h, used_q, ds @ k, ds_size @ k.abs()),
            (kv, used_k, ds.T @ q, ds_size.T @ q.abs()),
            (kv, used_k, weights.T @ do, weights.T @ do.abs()),
        )
    ):
        truth[n][b, :used, at] += grad
        sizes[n][b, :used, at] += size


def inputs_for(call: ProofCall, head_dim: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """As this call has them, on this device, in memory of their own."""
    made = known(call.case(head_dim)).inputs

    def placed(x: Tensor, is_value: bool = False) -> Tensor:
        return call.place(x.clone(), dtype, is_value, device)

    # The CPU by name: the program may have another default device.
    where = device if call.lens_on_device else torch.device("cpu")
    return Inputs(
        placed(made.grad_out),
        made.grad_lse.to(device, copy=True),
        placed(made.query),
        placed(made.key),
        placed(made.value, is_value=True),
        placed(made.out),
        made.lse.to(device, copy=True),
        None if made.q_lens is None else made.q_lens.to(where, copy=True),
        made.k_lens.to(where, copy=True),
    )


def difference(case: Case, dtype: torch.dtype, grads: Gradients) -> str | None:
    """What is beyond its bound, in words; None: nothing."""
    made = known(case)
    for name, got, truth, size in zip(NAMES, grads, made.truth, made.sizes, strict=True):
        got = got.to("cpu", torch.float64)
        is_wrong = ~((got - truth).abs() <= 2 * UNIT[dtype] * (size + truth.abs()))
        if bool(is_wrong.any()):  # NaN is wrong
            at = tuple(int(n) for n in is_wrong.nonzero()[0])
            return (
                f"{name}{list(at)} is {float(got[at]):g} instead of {float(truth[at]):g} in a call"
                f" of [{case}], {int(is_wrong.sum())} of {is_wrong.numel()} elements are wrong"
            )
    return None


def first_wrong(run: Run, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What `run` gets wrong in the two calls of first_call.py, in words; None: nothing."""
    for mask in MASKED:
        call = ProofCall("first", SEQLEN_Q, SEQLEN_K, mask)
        inputs = inputs_for(call, head_dim, dtype, device)
        found = difference(call.case(head_dim), dtype, run(inputs, MASKS[mask][0]))
        if found is not None:
            return found
    return None


class Card(Protocol):
    """What a proof's calls run on; see proof_calls.Card."""

    def device(self) -> torch.device:
        """Where operands must be."""

    def gradients(self, row: KernelInfo, inputs: Inputs, case: Case) -> Gradients:
        """The op sdpa_backward with this row and no other."""

    def captured(self, attend: Callable[[], Any]) -> Callable[[], Any] | None:
        """The call as a graph, to be replayed; None: there are no graphs."""


def wrong(card: Card, row: KernelInfo, dtype: torch.dtype) -> str | None:
    """What this row gets wrong on this card, in words; None: nothing.

    Raises:
        RuntimeError: what a call raised.
    """
    for call in CALLS:
        case = call.case(row.head_dim_max)
        inputs = inputs_for(call, row.head_dim_max, dtype, card.device())
        # The first results are still held: the second cannot lie in their memory.
        first, second = card.gradients(row, inputs, case), card.gradients(row, inputs, case)
        found = difference(case, dtype, first) or difference(case, dtype, second)
        if found is None and not all(map(torch.equal, first, second)):
            found = f"the same call gave other bits the second time, [{case}]"
        if found is not None:
            return f"{call.name}: {found}"
    return _wrong_graph(card, row, dtype)


def _wrong_graph(card: Card, row: KernelInfo, dtype: torch.dtype) -> str | None:
    """A captured call is replayed with other contents in the same memory, and other lengths."""
    call = ProofCall("graph", lens_on_device=True)
    case = call.case(row.head_dim_max)
    inputs = inputs_for(call, row.head_dim_max, dtype, card.device())
    held = [x for x in inputs.tensors if x is not None]
    real = [x.clone() for x in held]
    for x in held:
        x.fill_(1)
    replay = card.captured(lambda: card.gradients(row, inputs, case))
    if replay is None:
        return None
    for x, contents in zip(held, real, strict=True):
        x.copy_(contents)
    found = difference(case, dtype, replay())
    return None if found is None else f"graph: {found}"
