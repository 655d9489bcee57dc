# SPDX-License-Identifier: Apache-2.0
"""words.py - a measurement as people read it: figures, what was chosen, age, how to repeat."""

from __future__ import annotations

import datetime

from wan_attn.log import dtype_name
from wan_attn.request import Request
from wan_attn.tuning.book import Entry
from wan_attn.tuning.candidates import Candidate, title
from wan_attn.tuning.slices import Slice

REPEAT = "python -m wan_attn tune --again"


def figures(entry: Entry) -> str:
    """`sdpa_sm80_d128 41.2 ms, torch flash 44.0, torch cuDNN 39.1`, in the order of the file."""
    said = [f"{title(name)} {_number(ms)}" for name, ms in entry.times.items()]
    if said:
        said[0] += " ms"
    said += [f"{title(name)} left out" for name in entry.left_out]
    return ", ".join(said)


def _number(ms: float) -> str:
    return f"{ms:.1f}" if ms > 9.99 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3g}"


def measured(entry: Entry, chosen: Candidate | None) -> str:
    """For the log's line about a call: `measured: ...: torch cuDNN`."""
    if chosen is None:
        return f"not decided by measurement ({REPEAT} takes the time for it)"
    return f"measured: {figures(entry)}: {chosen.title}"


def outcome(entry: Entry, chosen: Candidate | None, request: Request) -> str:
    """The line that says what was measured just now."""
    shape = f"{request.batch}x{request.seqlen_q}"  # as `--shape` reads it
    if request.seqlen_k != request.seqlen_q:
        shape += f":{request.seqlen_k}"
    shape += f"x{request.num_heads_q}x{request.head_dim}"
    repeat = f"{REPEAT} --shape {shape} --dtype {dtype_name(request.dtype)}"
    repeat += " --grad" * request.needs_grad
    took = f"in {entry.seconds:.2g} s, on {entry.slice}"
    if chosen is None:
        return (
            f"Measuring calls like {shape} took longer than it may within a call ({took}): the"
            f" usual order stays; {repeat} takes the time for it"
        )
    reasons = "".join(f"; {title(name)}: {why}" for name, why in entry.left_out.items())
    return (
        f"Measured calls like {shape} {took}: {figures(entry)}: {chosen.title}{reasons}"
        f" (kept; to repeat: {repeat})"
    )


def slice_words(part: Slice, request: Request) -> str:
    """`8 of 24 heads, 2048 of 27280 rows`, or `the whole call`."""
    group = request.num_heads_q // request.num_heads_k
    heads = part.heads_k * group
    if heads == request.num_heads_q and part.rows == request.seqlen_q:
        return "the whole call"
    return f"{heads} of {request.num_heads_q} heads, {part.rows} of {request.seqlen_q} rows"


def age(entry: Entry, now: datetime.datetime | None = None) -> str:
    """`today`, `3 days ago`; the date itself where it cannot be read."""
    now = datetime.datetime.now(datetime.timezone.utc) if now is None else now
    try:
        date = datetime.datetime.strptime(entry.date, "%Y-%m-%dT%H:%MZ")
    except ValueError:
        return entry.date
    days = (now - date.replace(tzinfo=datetime.timezone.utc)).days
    return "today" if days < 1 else "1 day ago" if days == 1 else f"{days} days ago"
