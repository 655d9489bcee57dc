# SPDX-License-Identifier: Apache-2.0
"""conftest.py - a place to import stub packages from, and a process left as it was found."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_attn import log
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
