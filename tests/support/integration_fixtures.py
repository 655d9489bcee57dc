# SPDX-License-Identifier: Apache-2.0
"""integration_fixtures.py - for tests/integrations: a place to import stub packages from, a process
left as it was found, and a list of the calls that reach wan_attn."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from wan_attn import attention, log
from wan_attn.integrations import wan22

STUBS = ("wan", "vendored", "flash_attn", "flash_attn_interface", "someone")


def _forget() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in STUBS:
            del sys.modules[name]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path; what the test imports from it is forgotten, what it patched undone."""
    wan22.unpatch()
    _forget()
    log.forget()
    finders = list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    wan22.unpatch()
    _forget()
    assert sys.meta_path == finders, "unpatch() must leave no import hook behind"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(seqlen_q, seqlen_k) of every call that goes to wan_attn from here on."""
    seen: list[tuple[int, int]] = []
    sdpa = attention.sdpa

    def counted(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append((query.shape[1], key.shape[1]))
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(attention, "sdpa", counted)
    return seen
