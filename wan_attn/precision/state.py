# SPDX-License-Identifier: Apache-2.0
"""state.py - what watches the calls of this process: by the environment, or by use().

`uses.active` is None where everything is exact and nothing is watched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from wan_attn import config
from wan_attn.observe.uses import AnyUse, Uses
from wan_attn.precision import report, schedule
from wan_attn.precision.watch import Watch, Wishes
from wan_attn.request import gate, refuse


class _Broken(Watch):
    """Stands in where a schedule cannot be read: no call may run as if there were none."""

    def __init__(self, error: config.ConfigError) -> None:
        super().__init__(Wishes())
        self._error = error

    def run(self, *_: Any, **__: Any) -> NoReturn:
        """Says what is wrong with it."""
        raise self._error


def _at_exit(watch: Watch) -> None:
    report.finish(watch, config.current().precision_report)


uses: Uses[Watch] = Uses("precision", _at_exit)


class Use(AnyUse[Watch]):
    """What use() has begun; end() ends it, and so does leaving `with`."""

    def __enter__(self) -> Use:
        return self

    def report(self) -> report.Report:
        """What is known of the layers until now."""
        return report.Report(self.watch or Watch(Wishes()))


def use(
    mode: str = "balanced",
    *,
    rules: str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    budget: float | None = None,
    guard: str | None = None,
) -> Use:
    """Where attention may be computed in 8 bits, from the next call on; see docs/precision.md.

    Goes before WAN_ATTN_PRECISION and the other variables until end(), or until `with` is left.

    Args:
        mode: "exact", "balanced", "fast" or "auto".
        rules: of your own, which go before those of the mode: a JSON file, or what it would hold.
            None: those of WAN_ATTN_SCHEDULE.
        budget: the relative error that "auto" allows. None: WAN_ATTN_ERROR_BUDGET.
        guard: "auto", "off" or "all". None: WAN_ATTN_GUARD.

    Raises:
        RuntimeError: an argument is no such thing.
    """
    settings = config.current()
    if not isinstance(mode, str) or mode not in schedule.MODES:
        refuse("mode", f"one of {', '.join(schedule.MODES)}", gate.kind_of(mode))
    is_word = isinstance(guard, str) and guard in ("auto", "off", "all")
    if guard is not None and not is_word:
        refuse("guard", "None, auto, off or all", gate.kind_of(guard))
    if budget is not None:
        budget = gate.number("budget", budget)
        if not 0.0 < budget < 1.0:
            refuse("budget", "between 0 and 1", budget)
    try:
        if rules is None:
            own = _rules(settings.schedule, "WAN_ATTN_SCHEDULE")
        else:
            own = _rules(rules, "rules")
    except ValueError as error:
        raise RuntimeError(f"wan_attn: {error}") from None
    wishes = Wishes(
        mode,
        guard or settings.guard,
        budget or settings.precision_budget,
        own,
        f"wan_attn.precision.use({mode!r})",
    )
    made = Use(uses, None if wishes.is_plain else Watch(wishes))
    made.begin()
    return made


def _rules(named: Any, name: str) -> tuple[schedule.Rule, ...]:
    if named is None:
        return ()
    return schedule.load(named, name) if isinstance(named, str) else schedule.parse(named, name)


def schedule_error(settings: config.Settings) -> str | None:
    """What is wrong with the file of WAN_ATTN_SCHEDULE; None: nothing."""
    try:
        _rules(settings.schedule, "WAN_ATTN_SCHEDULE")
    except ValueError as error:
        return str(error)
    return None


def current_report() -> report.Report:
    """What is known of the layers: of what is active, or was last."""
    return report.Report(uses.active or uses.last or Watch(Wishes()))


def _obey(settings: config.Settings) -> None:
    known = uses.by_environment
    try:
        rules = _rules(settings.schedule, "WAN_ATTN_SCHEDULE")
    except ValueError as error:
        uses.obey(_Broken(config.ConfigError(str(error))))
        return
    asked_by = f"WAN_ATTN_PRECISION={settings.precision}"
    if settings.precision == "exact" and rules:
        asked_by = "WAN_ATTN_SCHEDULE"
    budget = settings.precision_budget
    wishes = Wishes(settings.precision, settings.guard, budget, rules, asked_by)
    if wishes.is_plain:
        uses.obey(None)
    elif known is None or known.wishes != wishes:
        uses.obey(Watch(wishes))  # else what is known stays
    else:
        uses.obey(known)


config.follow(_obey)
config.memory(uses.forget)
