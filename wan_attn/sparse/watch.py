# SPDX-License-Identifier: Apache-2.0
"""watch.py - runs a call as the mode and its place want it: densely, or with blocks left out.

The one place that decides. A call whose measured error is above the budget is computed again where
that can still be told in time (on the CPU always), and less is left out of its layer from then on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.backends import native
from wan_attn.backends._errors import why_it_failed
from wan_attn.observe import place, sampling
from wan_attn.observe.heads import Operands, Result, Run, compute_again
from wan_attn.observe.later import Later
from wan_attn.observe.pace import Pace
from wan_attn.observe.place import Place
from wan_attn.request import Call, Refusal, Request, host_lengths, transforms
from wan_attn.sparse import kernel, order, say, steer, verdict
from wan_attn.sparse.record import Layer, Note
from wan_attn.sparse.routing import DENSE, Routing
from wan_attn.sparse.wishes import Wishes
from wan_attn.store import processes
from wan_attn.tuning import clocks

ENOUGH = 6  # calls of each sort before they are compared: densities of layers differ


class Watch:
    """Decides about every call while it is active, and keeps what the report tells."""

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        self.layers: dict[tuple[int | None, int | None, str], Layer] = {}
        self._profile = dict(wishes.profile)
        self._threshold = wishes.threshold if wishes.mode == "near_exact" else 0.0
        self._why_not: dict[Request, str | None] = {}
        self._paces: dict[Request, Pace] = {}
        self.rank: int | None = None  # at exit the process group may be gone

    def run(
        self,
        dense: Run,
        exact: Run,
        request: Request,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: Call,
    ) -> tuple[Tensor, Tensor | None, str]:
        """Compute the call.

        Args:
            dense: computes it as it would be without us, perhaps in 8 bits.
            exact: computes some heads of it exactly.

        Returns:
            out, lse, and what ran as the log calls it; "" if `dense` did.
        """
        if self.rank is None:
            self.rank = processes.rank()
        where, operands = place.here(request.seqlen_q, request.seqlen_k), (query, key, value)
        if where.kind != "self" or request.seqlen_q != request.seqlen_k:
            return (*dense(*operands, call), "")
        layer = self._layer(where)
        verdict.read_pending(layer, self.wishes.budget, self.wishes.tau)
        may_leave_out = self._may_leave_out(request, where, layer, operands, call)
        pace = self._pace(request)
        is_search = self.wishes.mode == "sparse" and not layer.taus
        begun, result, ran = clocks.mark(query.device), None, ""
        if may_leave_out:
            result, ran = self._try(exact, request, where, layer, operands, call)
        if result is None:
            result, ran = dense(*operands, call), ""
        layer.stop(begun, query.device, bool(ran), None if may_leave_out and is_search else pace)
        if pace is not None:
            self._compare(pace, request)
        return (*result, ran)

    def _layer(self, where: Place) -> Layer:
        key = (where.expert, where.layer, where.kind)
        layer = self.layers.get(key)
        if layer is None:
            made = Layer(*key, where.run, threshold=self._threshold)
            layer = self.layers.setdefault(key, made)
        layer.begin(where.run)
        return layer

    # --- whether ----------------------------------------------------------------------------

    def _may_leave_out(
        self, request: Request, where: Place, layer: Layer, operands: Operands, call: Call
    ) -> bool:
        reason = self._reason(request, operands, call)
        if None in layer.why_dense:
            return False
        if self.wishes.is_dense_here(where):
            say.what_is_unknown(where, self.wishes.asked_by)
            return False
        if reason is not None:
            say.why_not(reason)
        return reason is None

    def _reason(self, request: Request, operands: Operands, call: Call) -> str | None:
        if transforms.is_transformed(*operands):
            return "torch.func transforms it"
        if operands[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured, whose replays would keep its blocks"
        if call.k_lens is not None and call.k_lens.device.type != "cpu":
            return "its real lengths are on the device"
        if request not in self._why_not:
            reason = self.wishes.why_not(request) or sampling.why_not(request)
            self._why_not[request] = reason or kernel.why_not(
                kernel.asked(request, self._threshold)
            )
        return self._why_not[request]

    def _pace(self, request: Request) -> Pace | None:
        """Where this kind of call is compared; None: no more, or WAN_ATTN_TUNE=off."""
        if config.current().tune == "off" or self._why_not.get(request, "") is not None:
            return None
        return self._paces.setdefault(request, Pace(ENOUGH))

    def _compare(self, pace: Pace, request: Request) -> None:
        least = pace.news()
        if least is not None and least[0] <= least[1]:
            dense, sparse = (f"{1e3 * seconds:.3g} ms" for seconds in least)
            reason = f"it takes {sparse} with blocks left out, and {dense} densely"
            self._why_not[request] = reason
            say.why_not(reason)

    # --- running ----------------------------------------------------------------------------

    def _try(
        self,
        exact: Run,
        request: Request,
        where: Place,
        layer: Layer,
        operands: Operands,
        call: Call,
    ) -> tuple[Result | None, str]:
        """None: the call has to be computed densely."""
        layer.groups = sampling.groups(request.num_heads_q, request.num_heads_k)
        real = host_lengths("k_lens", call.k_lens, request.batch, request.seqlen_k)
        if not real or min(real) == 0:
            return None, ""
        try:
            made = self._leave_out(where, layer, operands, call, real)
        except Refusal:
            raise
        except RuntimeError as error:
            said = why_it_failed(error)
            self._why_not[request] = f"leaving blocks out failed at run time ({said})"
            return None, ""
        if made is None:
            return None, ""
        (out, lse), shares, watched = made
        title = kernel.title(kernel.asked(request, self._threshold))
        say.it_starts(title, self.wishes.mode, self.wishes.asked_by)
        rows = layer.allowance.rows(min(real))
        errors = None
        if rows:
            errors = sampling.errors(native.run, rows, layer.groups, operands, out, call)
        told = [None if x is None else Later(x) for x in (errors, shares, watched)]
        note = Note(where, told[0], told[1], told[2], layer.threshold)
        if operands[0].device.type != "cpu":
            layer.pending.append(note)
            return (out, lse), title
        result = self._judged(exact, note, layer, operands, call, (out, lse))
        return result, title

    def _leave_out(
        self, where: Place, layer: Layer, operands: Operands, call: Call, real: list[int]
    ) -> tuple[Result, Tensor | None, Tensor | None] | None:
        """(result, the share that each head computes, guard); None: all heads are dense."""
        seqlen, device = operands[0].shape[1], operands[0].device
        grid = order.fitting(where.grid, real)
        if grid is None:
            say.no_grid(where.grid, min(real))
        ordered = order.of(grid, min(real), seqlen, self.wishes.always, device)
        query, key, value = order.apply(operands, ordered)
        if self.wishes.mode == "near_exact":
            watched = kernel.make_guard(device)
            made = kernel.by_threshold((query, key, value), call, layer.threshold, watched)
            return order.undo(*made, ordered), None, watched
        is_negative = call.scale is not None and call.scale < 0
        routing = Routing(query, key, real, ordered.always, is_negative)
        if not layer.taus:
            self._choose_taus(where, layer, routing, (query, key, value), call)
            if all(tau == DENSE for tau in layer.taus):
                return None
        lists = routing.lists(steer.of_heads(layer.groups, layer.taus))
        made = kernel.by_lists((query, key, value), call, lists)
        return order.undo(*made, ordered), steer.shares_of(lists, real), None

    def _choose_taus(
        self, where: Place, layer: Layer, routing: Routing, ordered: Operands, call: Call
    ) -> None:
        """From the profile of another run, else by a search."""
        key = (layer.expert, layer.layer, layer.kind)
        known = self._profile.pop(key, ())
        if len(known) == len(layer.groups):
            found = list(known)
        else:
            first = len(layer.measured) * steer.PROBES
            probes = (routing, ordered, call, layer.groups, first)
            search = steer.Search(native.run, kernel.by_lists, *probes)
            found = search.taus(self.wishes.budget, self.wishes.tau)
        layer.taus = [DENSE if g in layer.why_dense else tau for g, tau in enumerate(found)]
        layer.running.clear()
        layer.measured_since = 0
        gone = [g for g, tau in enumerate(layer.taus) if tau == DENSE and g not in layer.why_dense]
        if gone:
            budget = f"the budget of {100 * self.wishes.budget:g} %"
            reason = f"what may be left out within {budget} would save too little"
            verdict.go_dense(layer, where, gone, reason)

    def _judged(
        self, exact: Run, note: Note, layer: Layer, operands: Operands, call: Call, result: Result
    ) -> Result | None:
        """The result, or what has to stand in for it; None: all of it."""
        over = verdict.read(layer, note, self.wishes.budget, self.wishes.tau, is_late=False)
        if not over:
            return result
        if len(over) == len(layer.groups) or self.wishes.mode == "near_exact":
            return None
        return compute_again(exact, [layer.groups[group] for group in over], operands, call, result)

    def finish(self) -> None:
        """Wait for what GPUs have still to tell, for the report."""
        for layer in self.layers.values():
            layer.drain(wait=True)
            verdict.read_pending(layer, self.wishes.budget, self.wishes.tau, wait=True)
