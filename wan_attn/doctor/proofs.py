# SPDX-License-Identifier: Apache-2.0
"""proofs.py - what is known of our CUDA kernels on a card: the verdicts of selfcheck/proof.py."""

from __future__ import annotations

import time
from typing import Any

from wan_attn import config
from wan_attn.console import heading, pairs, table
from wan_attn.selfcheck import proof, verdicts
from wan_attn.selfcheck.verdicts import FAILED, PASSED, UNTRIED, Verdict

HOW = f"to repeat: {proof.COMMAND}; everything: {proof.COMMAND} --again"


def facts(index: int) -> dict[str, Any]:
    """What the disk has about cuda:`index`, as plain values; tries nothing."""
    key = verdicts.key_of(index)
    found = key if isinstance(key, str) else verdicts.read(key)
    answer: dict[str, Any] = {
        "device": f"cuda:{index}",
        "card": "" if isinstance(key, str) else key.card,
        "driver": "" if isinstance(key, str) else key.driver,
        "reason": found if isinstance(found, str) else "",
        "rows": {},
        "skipped": [],
        "at": 0,
        "is_missing": not isinstance(found, str),
        "state": "",
    }
    if isinstance(found, Verdict):
        answer["rows"] = {
            name: {"state": row.state, "said": row.said, "at": row.at}
            for name, row in found.rows.items()
        }
        answer["skipped"] = found.skipped
        answer["is_missing"] = not found.is_complete
        answer["at"] = max((row.at for row in found.rows.values()), default=0)
    answer["is_missing"] &= config.current().self_check
    answer["state"] = _state(answer)
    return answer


def _state(answer: dict[str, Any]) -> str:
    """One line."""
    if not config.current().self_check:
        return "not asked for: WAN_ATTN_SELF_CHECK=0 uses every kernel unproven"
    if answer["reason"]:
        return f"none can be made: {answer['reason']}"
    rows = answer["rows"]
    if not rows:
        return f"none yet: the first use makes it, or {proof.COMMAND}"
    counts = {
        state: sum(row["state"] == state for row in rows.values()) for state in verdicts.STATES
    }
    said = [f"{counts[PASSED]} of {len(rows)} passed"]
    said += [f"{counts[state]} {state}" for state in (FAILED, UNTRIED) if counts[state]]
    return f"{', '.join(said)}, {age(answer['at'])}"


def age(at: int, now: float | None = None) -> str:
    """How long ago that was."""
    seconds = max(0.0, (time.time() if now is None else now) - at)
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


def render(answer: dict[str, Any]) -> str:
    """One card's verdict, and each row that is not used."""
    title = f"proof on {answer['card'] or answer['device']}"
    text = f"{heading(title, HOW)}\n{pairs([(answer['device'], answer['state'])])}"
    lines = [
        (name, row["state"], row["said"])
        for name, row in answer["rows"].items()
        if row["state"] != PASSED
    ]
    if lines:
        text += f"\n{table(lines)}"
    if answer["skipped"]:
        text += f"\n{pairs([('skipped', '; '.join(answer['skipped']))])}"
    return text
