# SPDX-License-Identifier: Apache-2.0
"""say.py - the lines of the log about 8-bit scores, each written once."""

from __future__ import annotations

import logging

from wan_attn import log
from wan_attn.precision.place import Place


def it_starts(title: str, what: str, asked_by: str) -> None:
    """A row that is not exact runs, because `what`, a mode, allows it."""
    allowing = "rules of your own allow" if what == "exact" else f"`{what}` allows"
    log.once(
        ("lossy", title, asked_by),
        logging.WARNING,
        f"Using {title}, which is not exact: 8-bit scores, where {allowing} them ({asked_by})",
    )


def what_it_brings(found: str) -> None:
    """What calls of one kind take, where 8-bit scores are the faster ones."""
    log.once(("brings", found), logging.INFO, f"8-bit scores: {found}")


def why_not(reason: str) -> None:
    """A call is exact that might have been in 8 bits."""
    text = f"no 8-bit scores for a call: {reason}; it is exact"
    log.once(("no lossy row", reason), logging.WARNING, text)


def not_watched(what: str) -> None:
    """Exact calls that WAN_ATTN_GUARD=all asks for, and that nothing watches."""
    text = f"WAN_ATTN_GUARD=all: {what} not watched, as only those of some of our kernels are"
    log.once(text, logging.WARNING, text)


def what_is_unknown(where: Place, asked_by: str) -> None:
    """What no host tells of a self-attention, so that it is exact."""
    if where.kind != "self":
        return
    known = {"layer": where.layers, "step": where.step, "number of steps": where.steps}
    unknown = [name for name, value in known.items() if value is None]
    if unknown:
        text = f"{asked_by}: no host tells the {' and '.join(unknown)} of a call"
        log.once(text, logging.WARNING, f"{text}; it is exact (docs/precision.md)")
