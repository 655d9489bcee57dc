# SPDX-License-Identifier: Apache-2.0
"""nightly.py - what `make test` leaves to `make nightly`, so that it stays under 20 minutes.

Every kernel, compiler and check has its share in `make test`; what is left out differs from what
is in by a dtype, an architecture or the place of a planted bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def unless(is_short: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases, as pytest.mark.parametrize takes them; a tuple is several arguments. Those for
    which is_short(*arguments) does not hold run in `make nightly` alone."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if is_short(*values) else pytest.mark.nightly
        found.append(pytest.param(*values, marks=marks))
    return found


def every(nth: int, cases: Iterable[Any]) -> list[Any]:
    """The first case and each nth after it in `make test`; all in `make nightly`."""
    return [
        pytest.param(case, marks=pytest.mark.nightly if number % nth else ())
        for number, case in enumerate(cases)
    ]
