# SPDX-License-Identifier: Apache-2.0
"""measured.py - what the measurements of this machine say about a call; measures nothing."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

from wan_attn.request import Request
from wan_attn.tuning import candidates as known
from wan_attn.tuning import turn
from wan_attn.tuning.book import Entry
from wan_attn.tuning.candidates import Candidate
from wan_attn.tuning.turn import may_decide

__all__ = ["NONE", "Decision", "decide", "may_decide"]


class Decision(NamedTuple):
    """What the measurements say.

    Attributes:
        candidate: what is chosen; None: the order of choose.order() holds.
        entry: the measurement; None: there is none.
        turn: what calls like this wait for until they are measured; None: for nothing.
    """

    candidate: Candidate | None
    entry: Entry | None
    turn: turn.Turn | None


NONE = Decision(None, None, None)


def decide(request: Request, takers: Iterable[str], gone: Container[str]) -> Decision:
    """What was measured for calls like this, which may_decide() admits.

    Args:
        takers: the backends that take the call, in today's order.
        gone: candidates that failed at run time.
    """
    found = tuple(one for one in known.of(request, takers) if one.name not in gone)
    entry = turn.entry_of(request)
    waits = turn.turn_for(request, found, entry)
    if entry is None or waits is not None:
        return Decision(None, entry, waits)
    return Decision(entry.best(found), entry, None)
