# SPDX-License-Identifier: Apache-2.0
"""state.py - what leaves blocks out of the calls of this process: by the environment, or by use().

`uses.active` is None where everything is dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from wan_attn import config
from wan_attn.observe.uses import AnyUse, Uses
from wan_attn.request import gate, refuse
from wan_attn.sparse import report
from wan_attn.sparse.watch import Watch
from wan_attn.sparse.wishes import DENSE_STEPS, MIN_TOKENS, MODES, TAU, THRESHOLD, Wishes

LARGEST_THRESHOLD = 0.05  # beyond it, it is not near anything (design of NVIDIA's: 0.8)


class _Broken(Watch):
    """Stands in where a profile cannot be read: no call may run as if there were none."""

    def __init__(self, error: config.ConfigError) -> None:
        super().__init__(Wishes())
        self._error = error

    def run(self, *_: Any, **__: Any) -> NoReturn:
        """Says what is wrong with it."""
        raise self._error


def _at_exit(watch: Watch) -> None:
    report.finish(watch, config.current().sparse_report)


uses: Uses[Watch] = Uses("sparse", _at_exit)


class Use(AnyUse[Watch]):
    """What use() has begun; end() ends it, and so does leaving `with`."""

    def __enter__(self) -> Use:
        return self

    def report(self) -> report.Report:
        """What is known of the layers until now."""
        return report.Report(self.watch or Watch(Wishes()))


def use(
    mode: str = "sparse",
    *,
    budget: float | None = None,
    tau: float | None = None,
    threshold: float | None = None,
    min_tokens: int = MIN_TOKENS,
    dense_steps: float = DENSE_STEPS,
    always: Sequence[tuple[int, int]] = (),
    profile: str | Path | dict[str, Any] | None = None,
) -> Use:
    """Let self-attention leave blocks of keys out, from the next call on; see docs/sparse.md.

    Goes before WAN_ATTN_SPARSE and the other variables until end(), or until `with` is left.

    Args:
        mode: "off", "near_exact" or "sparse".
        budget: the relative error that is allowed. None: WAN_ATTN_ERROR_BUDGET, or 0.05.
        tau: of "sparse", the largest that is tried: the larger, the less is computed. None: 1.5.
        threshold: of "near_exact", up to 0.05: what a block's largest weight must reach, against
            the running maximum. None: 0.05.
        min_tokens: calls of fewer tokens are dense.
        dense_steps: the share of steps that are dense, the first ones.
        always: ranges of tokens, (first, behind the last), that all tokens see exactly: those of a
            text or of a reference, where they stand among the others.
        profile: a report of an earlier run with the same budget, or its file: where this one
            begins. None: WAN_ATTN_SPARSE_PROFILE, or nowhere.

    Raises:
        RuntimeError: an argument is no such thing.
    """
    settings = config.current()
    if not isinstance(mode, str) or mode not in MODES:
        refuse("mode", f"one of {', '.join(MODES)}", gate.kind_of(mode))
    budget = settings.sparse_budget if budget is None else _share("budget", budget)
    threshold = THRESHOLD if threshold is None else gate.number("threshold", threshold)
    if not 0.0 < threshold <= LARGEST_THRESHOLD:
        refuse("threshold", f"above 0 and at most {LARGEST_THRESHOLD}", threshold)
    dense_steps = gate.number("dense_steps", dense_steps)
    if not 0.0 <= dense_steps <= 1.0:
        refuse("dense_steps", "between 0 and 1", dense_steps)
    named, name = profile, "profile"
    if profile is None and mode == "sparse":
        named, name = settings.sparse_profile, "WAN_ATTN_SPARSE_PROFILE"
    try:
        known = () if named is None else report.profile(named, name, budget)
    except ValueError as error:
        raise RuntimeError(f"wan_attn: {error}") from None
    wishes = Wishes(
        mode,
        budget,
        TAU if tau is None else gate.number("tau", tau),
        threshold,
        gate.integer("min_tokens", min_tokens, at_least=0),
        dense_steps,
        _ranges(always),
        known,
        f"wan_attn.sparse.use({mode!r})",
    )
    made = Use(uses, None if mode == "off" else Watch(wishes))
    made.begin()
    return made


def _share(name: str, value: object) -> float:
    share = gate.number(name, value)
    if not 0.0 < share < 1.0:
        refuse(name, "between 0 and 1", share)
    return share


def _ranges(always: Any) -> tuple[tuple[int, int], ...]:
    found = []
    for one in always if isinstance(always, list | tuple) else [always]:
        pair = one if isinstance(one, list | tuple) and len(one) == 2 else None
        if pair is None:
            refuse("always", "pairs (first token, token behind the last)", gate.shown(always))
        first = gate.integer("always", pair[0], at_least=0)
        found.append((first, gate.integer("always", pair[1], at_least=first)))
    return tuple(found)


def current_report() -> report.Report:
    """What is known of the layers: of what is active, or was last."""
    return report.Report(uses.active or uses.last or Watch(Wishes()))


def _obey(settings: config.Settings) -> None:
    known = uses.by_environment
    if settings.sparse == "off":
        uses.obey(None)
        return
    named, budget = settings.sparse_profile, settings.sparse_budget
    try:
        start = () if named is None else report.profile(named, "WAN_ATTN_SPARSE_PROFILE", budget)
    except ValueError as error:
        uses.obey(_Broken(config.ConfigError(str(error))))
        return
    asked_by = f"WAN_ATTN_SPARSE={settings.sparse}"
    wishes = Wishes(settings.sparse, budget, profile=start, asked_by=asked_by)
    if known is None or known.wishes != wishes:
        known = Watch(wishes)  # else what is known stays
    uses.obey(known)


config.follow(_obey)
config.memory(uses.forget)
