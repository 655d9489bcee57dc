# SPDX-License-Identifier: Apache-2.0
"""watch.py - runs a call as the mode and its place want it: exactly, or in 8 bits under a guard.

The one place that decides. A call whose guard is hit, or whose error is above the budget, is
computed once more exactly where it can still be told in time (on the CPU always), and its layer,
or that group of heads, is exact for the rest of the run. Every such step is a line of the log.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_attn import config, log
from wan_attn.backends import native
from wan_attn.backends._errors import why_it_failed
from wan_attn.native.library import QK8
from wan_attn.observe import place, sampling
from wan_attn.observe.heads import Operands, Result, Run, compute_again
from wan_attn.observe.later import Later
from wan_attn.observe.names import title
from wan_attn.observe.pace import Pace
from wan_attn.observe.place import Place
from wan_attn.precision import guard, parts, say, schedule, verdict
from wan_attn.precision.record import Layer, Note
from wan_attn.precision.schedule import Heads, Rule
from wan_attn.request import Call, Refusal, Request, transforms
from wan_attn.store import processes
from wan_attn.tuning import clocks


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks for.

    Attributes:
        mode: of schedule.MODES.
        guard: "auto", "off" or "all".
        budget: the relative error that `auto` allows.
        rules: a user's own, behind those of the mode.
        asked_by: how the log names it: WAN_ATTN_PRECISION=balanced.
    """

    mode: str = "exact"
    guard: str = "auto"
    budget: float = 0.02
    rules: tuple[Rule, ...] = ()
    asked_by: str = ""

    @property
    def is_plain(self) -> bool:
        """Everything is exact and nothing is watched."""
        may_be_lossy = self.mode != "exact" or any(r.precision != "exact" for r in self.rules)
        return not may_be_lossy and self.guard != "all"


class Watch:
    """Decides about every call while it is active, and keeps what the report tells."""

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        self.layers: dict[tuple[int | None, int | None, str], Layer] = {}
        self._rules = schedule.with_own(wishes.mode, wishes.rules)
        self._why_not: dict[Request, str | None] = {}
        self._measures = wishes.mode in ("balanced", "auto")
        self._budget = wishes.budget if wishes.mode == "auto" else None
        self._paces: dict[Request, Pace] = {}
        self.rank: int | None = None  # at exit the process group may be gone

    def run(
        self,
        exact: Run,
        backend: str,
        request: Request,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: Call,
    ) -> tuple[Tensor, Tensor | None, str]:
        """Compute the call.

        Args:
            exact: computes it exactly, as it would be without us.
            backend: what `exact` runs on.

        Returns:
            as `exact`, and what ran as the log calls it; "" if that is what `exact` runs.
        """
        if self.rank is None:
            self.rank = processes.rank()
        where = place.here(request.seqlen_q, request.seqlen_k)
        layer = self._layer(where)
        verdict.read_pending(layer, self._budget)
        heads = self._lossy_heads(request, where, layer, (query, key, value))
        pace = self._pace(request)
        if heads and pace is not None and pace.is_turn_of_exact():
            heads = ()
        begun, ran = clocks.mark(query.device), ""
        result: Result | None = None
        if heads:
            result = self._try_lossy(exact, request, heads, where, layer, (query, key, value), call)
            ran = "" if result is None else self._title(request)
        if result is None:
            result = self._exact(exact, backend, where, (query, key, value), call)
        layer.stop(begun, query.device, bool(ran), pace)
        if pace is not None:
            self._compare(pace, backend, request)
        return (*result, ran)

    def _layer(self, where: Place) -> Layer:
        key = (where.expert, where.layer, where.kind)
        layer = self.layers.get(key)
        if layer is None:
            layer = self.layers.setdefault(key, Layer(*key, where.run))
        layer.begin(where.run)
        return layer

    # --- which heads ------------------------------------------------------------------------

    def _lossy_heads(
        self, request: Request, where: Place, layer: Layer, operands: Operands
    ) -> Heads:
        if None in layer.why_exact:
            return ()
        heads = schedule.lossy_heads(self._rules, where._replace(run=0), request.num_heads_q)
        if not heads:
            if self.wishes.mode in ("balanced", "auto"):
                say.what_is_unknown(where, self.wishes.asked_by)
            return ()
        why_not = self._reason(request, operands)
        if why_not is not None:
            say.why_not(why_not)
            return ()
        layer.groups = sampling.groups(request.num_heads_q, request.num_heads_k)
        for group in layer.why_exact:
            if group is not None:
                heads = parts.without(heads, layer.groups[group])
        if request.num_heads_q != request.num_heads_k and heads != ((0, request.num_heads_q),):
            return ()  # a part of query's heads may read a part of a key's
        return heads

    def _reason(self, request: Request, operands: Operands) -> str | None:
        """Why no lossy row takes the call; None: one does."""
        if transforms.is_transformed(*operands):
            return "torch.func transforms it"
        if _is_captured(operands):
            return "a CUDA graph is being captured, and nothing would watch its replays"
        if request in self._why_not:
            return self._why_not[request]
        reason = native.why_not(request, QK8)
        if reason is None and self._budget is not None:
            reason = sampling.why_not(request)
            reason = reason and f"its error cannot be measured, with {reason}"
        self._why_not[request] = reason
        return reason

    # --- whether it is faster ---------------------------------------------------------------

    def _pace(self, request: Request) -> Pace | None:
        """Where this kind of call is compared; None: no more, or WAN_ATTN_TUNE=off."""
        if config.current().tune == "off":
            return None
        if self._why_not.get(request, "") is not None:
            return None  # no lossy row takes it, or none has been asked for
        return self._paces.setdefault(request, Pace())

    def _compare(self, pace: Pace, backend: str, request: Request) -> None:
        if (least := pace.news()) is None:
            return
        found = f"{self._title(request)} takes {1e3 * least[1]:.3g} ms, "
        found += f"exactly {1e3 * least[0]:.3g} ms on {backend}"
        if least[0] > least[1]:
            say.what_it_brings(found)
        else:
            self._why_not[request] = found
            say.why_not(found)

    # --- running ----------------------------------------------------------------------------

    def _title(self, request: Request) -> str:
        return f"{native.TITLE} ({native.kernel_name(request, QK8)})"

    def _exact(
        self, exact: Run, backend: str, where: Place, operands: Operands, call: Call
    ) -> Result:
        if self.wishes.guard != "all":
            return exact(*operands, call)
        if _is_captured(operands):
            say.not_watched("calls in a CUDA graph are")
            return exact(*operands, call)
        if backend != native.NAME or transforms.is_transformed(*operands):
            say.not_watched(f"calls on {backend} are")
            return exact(*operands, call)
        watched = guard.make(operands[0].device)
        try:
            result = exact(*operands, call, guard=watched)
        except Refusal:
            raise
        except RuntimeError as error:
            say.not_watched(f"a call is ({why_it_failed(error)})")
            return exact(*operands, call)
        hit = guard.Words.of(watched.tolist()).hit()
        if hit is not None:
            name = title(where.expert, where.layer, where.kind)
            key = ("exact guard", name, where.run)
            log.once(key, logging.WARNING, f"{name}{where.at_step}, exact: {hit}")
        return result

    def _try_lossy(
        self,
        exact: Run,
        request: Request,
        heads: Heads,
        where: Place,
        layer: Layer,
        operands: Operands,
        call: Call,
    ) -> Result | None:
        """None: the call has to be computed exactly."""
        watched = None if self.wishes.guard == "off" else guard.make(operands[0].device)
        try:
            out, lse = parts.attend(exact, heads, operands, call, watched)
        except Refusal:
            raise
        except RuntimeError as error:
            said = why_it_failed(error)
            reason = f"{self._title(request)} failed at run time ({said})"
            self._why_not[request] = reason
            say.why_not(reason)
            return None
        say.it_starts(self._title(request), self.wishes.mode, self.wishes.asked_by)
        errors = self._measure(request, layer, operands, out, call)
        note = (
            where,
            None if watched is None else Later(watched),
            None if errors is None else Later(errors),
        )
        if _is_on_a_gpu(operands) and self.wishes.guard != "all":
            layer.pending.append(note)
            return out, lse
        return self._judged(exact, request, note, layer, operands, call, (out, lse))

    def _judged(
        self,
        exact: Run,
        request: Request,
        note: Note,
        layer: Layer,
        operands: Operands,
        call: Call,
        result: Result,
    ) -> Result | None:
        """The result, or what has to stand in for it; None: all of it."""
        over = verdict.read(layer, note, self._budget, is_late=False)
        if None in over:
            return None
        if not over:
            return result
        if len(layer.groups) == 1:
            return None
        groups = [layer.groups[group or 0] for group in over]
        return compute_again(exact, groups, operands, call, result)

    def _measure(
        self, request: Request, layer: Layer, operands: Operands, out: Tensor, call: Call
    ) -> Tensor | None:
        if not self._measures or sampling.why_not(request) is not None:
            return None
        rows = layer.allowance.rows(request.seqlen_q)
        if not rows:
            return None
        return sampling.errors(native.run, rows, layer.groups, operands, out, call)

    def finish(self) -> None:
        """Wait for what GPUs have still to tell, for the report."""
        for layer in self.layers.values():
            layer.drain(wait=True)
            verdict.read_pending(layer, self._budget, wait=True)


def _is_on_a_gpu(operands: Operands) -> bool:
    """Whether what a call says can be read only later."""
    return operands[0].device.type != "cpu"


def _is_captured(operands: Operands) -> bool:
    """Whether the call goes into a CUDA graph: what it says would never be read."""
    return operands[0].is_cuda and torch.cuda.is_current_stream_capturing()
