# SPDX-License-Identifier: Apache-2.0
"""say.py - the lines of the log about blocks that are left out, each written once."""

from __future__ import annotations

import logging

from wan_attn import log
from wan_attn.observe.place import Place


def it_starts(title: str, mode: str, asked_by: str) -> None:
    """Blocks are left out, because the mode allows it."""
    log.once(
        ("sparse", title, asked_by),
        logging.WARNING,
        f"Using {title}, which is not exact: it leaves blocks of keys out, where `{mode}` allows it"
        f" ({asked_by})",
    )


def why_not(reason: str) -> None:
    """A call is dense that might leave blocks out."""
    text = f"nothing is left out of a call: {reason}; it is dense"
    log.once(("no sparse row", reason), logging.WARNING, text)


def what_is_unknown(where: Place, asked_by: str) -> None:
    """What no host tells of a self-attention, so that it is dense."""
    known = {"layer": where.layer, "step": where.step, "number of steps": where.steps}
    unknown = [name for name, value in known.items() if value is None]
    if unknown:
        text = f"{asked_by}: no host tells the {' and '.join(unknown)} of a call"
        log.once(("sparse", text), logging.WARNING, f"{text}; it is dense (docs/sparse.md)")


def no_grid(grid: object, tokens: int) -> None:
    """Tokens stay in the order that the host has them in."""
    what = "no host tells" if grid is None else f"not {grid} is"
    text = f"{what} the grid of a call with {tokens} tokens: they stay in raster order"
    log.once(text, logging.WARNING, f"{text}, in which more blocks matter (docs/sparse.md)")
